"""tasks/puzzles.py: nothing but looking answers, looking does, and all follows from the seed."""

import json
import os
import re
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import decord
import numpy as np
import pytest
from PIL import Image

import train
from engine.prompt import messages
from engine.video import uniform_frames
from model import tiny_policy
from reward import extract_answer, is_correct
from rollout import find_code
from sandbox import Sandbox
from tasks import puzzles as module
from tasks.puzzles import (
    ANSWER,
    CODE,
    COLOURS,
    COUNTS,
    VALUES,
    Difficulty,
    captions,
    corpus,
    demonstrations,
    puzzles,
)

PALETTE = np.array(list(COLOURS.values()), float)  # (colours, 3)
BOTH_KINDS = {"kinds": ("colour", "stripes")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where clips are written, one folder for all tests."""
    return tmp_path_factory.mktemp("clips")


def nearest(pixels):
    """The colour name that most pixels of (..., 3) have, almost."""
    pixels = np.asarray(pixels, float).reshape(-1, 1, 3)
    distances = np.abs(pixels - PALETTE).max(-1)  # (pixels, colours)
    counts = (distances < 25).sum(0)
    return list(COLOURS)[int(counts.argmax())]


def lamp(frame):
    """The lamp's colour in a decoded frame, or None when it is dark: all else is grey."""
    colourful = np.ptp(frame.astype(int), -1) > 80
    return nearest(frame) if colourful.mean() > 0.1 else None


def draw(n, seed=0, split="train", task="image", **difficulty):
    """n scenes."""
    drawn = module.scenes(task, n, seed, split, "test", **difficulty)
    return [scene for _, scene, _, _ in drawn]


def independent(pairs, bound=0.03):
    """Whether the mutual information of two columns, less what chance gives, is below `bound`."""
    n = len(pairs)
    both = Counter(pairs)
    left = Counter(a for a, _ in pairs)
    right = Counter(b for _, b in pairs)
    bits = 0.0
    for (a, b), count in both.items():
        bits += count / n * np.log2(count * n / (left[a] * right[b]))
    by_chance = (len(left) - 1) * (len(right) - 1) / (2 * n * np.log(2))
    return bits - by_chance < bound


def views(kind, size=None, n=200, reach=3, **difficulty):
    """What a reader may see of n * 9 plates, and what is on them -> (n * 9, features), (n * 9,).

    Without `size`: the plate in the picture as the context shows it (side 56). With it: the
    demonstrated crop, as a picture of that side.
    """
    d = Difficulty(kinds=(kind,), **difficulty)
    inputs = []
    targets = []
    for scene in draw(n, kinds=(kind,), **difficulty):
        picture = scene.paint(d)
        context = np.asarray(picture.resize((56, 56), Image.BICUBIC), float)
        for plate, value in enumerate(scene.plates):
            if size:
                view = picture.crop(module._crop_box(d, plate)).resize((size, size))
            else:
                x, y = (place // 8 for place in module._centre(d, plate))
                view = context[y - reach : y + reach + 1, x - reach : x + reach + 1]
            inputs.append(np.asarray(view, float).ravel() / 50)
            targets.append(VALUES[kind].index(value))
    return np.array(inputs), np.array(targets)


def reads(kind, size=None, **difficulty):
    """Accuracy of a linear reader, fitted on three quarters of the plates, on the others."""
    inputs, targets = views(kind, size, **difficulty)
    inputs = np.c_[inputs - inputs.mean(0), np.ones(len(inputs))]
    wanted = np.eye(len(VALUES[kind]))[targets]
    fitted = len(inputs) * 3 // 4
    x = inputs[:fitted]
    ridge = 10 * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + ridge, x.T @ wanted[:fitted])
    said = (inputs[fitted:] @ weights).argmax(1)
    return float((said == targets[fitted:]).mean())


# Scenes and splits -------------------------------------------------------------------------------
def content(sample):
    return sample.id, sample.question, sample.answer, sample.images[0].tobytes()


def test_samples_follow_from_seed_and_index():
    few = puzzles("image", 3, 7, **BOTH_KINDS)
    more = puzzles("image", 6, 7, **BOTH_KINDS)
    assert [content(sample) for sample in few] == [content(sample) for sample in more[:3]]
    assert len({sample.id for sample in more}) == 6
    assert more[0].images[0].mode == "RGB"
    assert more[0].images[0].size == (448, 448)


def test_no_picture_comes_twice():
    pictures = set()
    for seed in range(4):
        for split in ("train", "heldout"):
            samples = puzzles("image", 5, seed, split)
            pictures.update(sample.images[0].tobytes() for sample in samples)
    assert len(pictures) == 40


def test_a_scene_is_never_in_both_splits(monkeypatch):
    class Number:
        """A scene of which there are few, so that they run out."""

        def __init__(self, rng, d):
            self.number = int(rng.integers(60))

    monkeypatch.setitem(module.TASKS, "image", Number)
    drawn = {"train": set(), "heldout": set()}
    for split, numbers in drawn.items():
        for seed in range(20):
            numbers.update(scene.number for scene in draw(20, seed, split))
    assert drawn["train"] | drawn["heldout"] == set(range(60))
    assert not drawn["train"] & drawn["heldout"]
    assert 0 < len(drawn["heldout"]) < 20


def test_tasks_alternate_also_one_by_one(folder):
    together = puzzles("image,video", 4, 0, folder=folder)
    singles = [puzzles("image,video", 1, seed, folder=folder)[0] for seed in range(4)]
    for samples in (together, singles):
        kinds = ["video" if sample.videos else "image" for sample in samples]
        assert kinds == ["image", "video", "image", "video"]


@pytest.mark.parametrize(
    "wrong", [{"task": "audio"}, {"split": "test"}, {"hints": 0.5}], ids=lambda wrong: str(wrong)
)
def test_unknown_names_are_refused(wrong):
    arguments = {"task": "image", "n": 1, "seed": 0}
    with pytest.raises((ValueError, TypeError)):
        puzzles(**arguments | wrong)


# What answers, and what does not -----------------------------------------------------------------
@pytest.mark.parametrize(
    "task, kind",
    [
        ("image", "colour"),
        ("image", "stripes"),
        ("video", "second"),
        ("video", "flash"),
        ("video", "order"),
        ("video", "count"),
    ],
)
def test_a_blind_policy_is_at_chance(task, kind):
    drawn = draw(2000, task=task, kinds=(kind,), clips=(kind,))
    answers = [scene.answer for scene in drawn]
    shares = Counter(answers)
    assert set(shares) == set(VALUES[kind])
    assert max(shares.values()) / 2000 < 1 / len(shares) + 0.04
    # what the question and the prompt's figures tell
    known = {
        "asked": [scene.asked for scene in drawn],
        "wording": [scene.wording for scene in drawn],
    }
    if task == "image":
        known["side"] = [scene.side for scene in drawn]
    else:
        known["fps"] = [scene.fps for scene in drawn]
        known["seconds"] = [scene.seconds // 20 for scene in drawn]
    if kind == "stripes":
        known["light"] = [scene.light for scene in drawn]
    for name, column in known.items():
        assert independent(list(zip(column, answers, strict=True))), name


@pytest.mark.parametrize("kind", ["colour", "stripes"])
@pytest.mark.parametrize("hint", [0.48, 0.9])
def test_the_hint_is_right_as_often_as_it_says(kind, hint):
    drawn = draw(2000, kinds=(kind,), hint=hint)
    right = [scene.hint == scene.answer for scene in drawn]
    assert abs(np.mean(right) - hint) < 0.04


@pytest.mark.parametrize("kind", ["colour", "stripes"])
def test_no_other_plate_carries_the_answer(kind):
    for scene in draw(2000, kinds=(kind,)):
        others = scene.plates[: scene.asked - 1] + scene.plates[scene.asked :]
        assert len(others) == 8
        assert scene.answer not in others


def test_the_picture_carries_the_hint():
    directions = PALETTE - 127.5
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    drawn = module.scenes("image", 60, 1, "train", "puzzle")
    right = []
    for sample, (_, scene, _, _) in zip(puzzles("image", 60, 1), drawn, strict=True):
        mean = np.asarray(sample.images[0].resize((1, 1), Image.BOX), float).ravel()
        seen = list(COLOURS)[int(np.argmax(directions @ (mean - 127.5)))]
        right.append(seen == scene.hint)
    assert np.mean(right) > 0.9


def test_context_resolution_does_not_show_what_a_crop_shows():
    # By chance it would be 0.17 and 0.25; the hint gives 0.48.
    assert reads("colour") < 0.33
    assert reads("stripes") < 0.36
    # The reader can read where there is something, and it does in the crop.
    assert reads("colour", balance=0.0, chip=8, ring=9) > 0.6
    assert reads("colour", size=14) > 0.6


# Demonstrations, captions, corpus ----------------------------------------------------------------
def what_it_shows(sample, result):
    """The value that a look's result shows; None: an error, or a dark lamp."""
    if result.error is not None:
        return None
    if sample.ability == "count":
        return result.text.strip() or None
    (shown,) = result.images
    return lamp(np.asarray(shown)) if sample.videos else nearest(shown)


@pytest.mark.parametrize("task", ["image", "video"])
def test_demonstrations_say_what_the_sandbox_shows(task, folder):
    quality = {"slip": 0.2, "aim": 0.5, "looks": (0.2, 0.4, 0.4)}
    counts = Counter()
    for sample in demonstrations(task, 24, 3, folder=folder, **quality):
        seen = None
        with Sandbox(sample.images, sample.videos) as sandbox:
            for turn in sample.turns[:-1]:
                result = sandbox.run(find_code(turn))
                assert result.error is None or re.search("ValueError|IndexError", result.error)
                counts["error" if result.error else "fine"] += 1
                seen = what_it_shows(sample, result) or seen
        said = extract_answer(sample.turns[-1])
        assert said in VALUES[sample.ability]
        if seen is not None:
            assert said == seen
            counts["right" if seen == sample.answer else "wrong"] += 1
    for case in ("error", "fine", "right", "wrong"):
        assert counts[case] > 0, case


LOOKS = (0.35, 0.05, 0.10, 0.20, 0.30)  # shares of 0, 1, ... looks
AIM = 0.47


def test_demonstrations_look_as_often_as_asked_for():
    drawn = demonstrations("image", 250, 0, looks=LOOKS, aim=AIM)
    counts = Counter(len(sample.turns) - 1 for sample in drawn)
    for count, share in enumerate(LOOKS):
        assert abs(counts[count] / 250 - share) < 0.1


def test_demonstrations_aim_as_well_as_asked_for():
    drawn = demonstrations("image", 250, 0, looks=LOOKS, aim=AIM)
    looked = [sample for sample in drawn if len(sample.turns) > 1]
    right = [extract_answer(sample.turns[-1]) == sample.answer for sample in looked]
    assert abs(np.mean(right) - AIM) < 0.12


def test_what_was_seen_is_only_looked_at_again():
    drawn = demonstrations("image", 100, 0, looks=(0.0, 0.0, 1.0), slip=0.0)
    for sample in drawn:
        first, second, _ = sample.turns
        assert second == first


def test_perfect_demonstrations_look_once_and_are_right():
    for sample in demonstrations("image", 30, 0, aim=1.0, slip=0.0, looks=(0.0, 1.0)):
        assert len(sample.turns) == 2
        assert extract_answer(sample.turns[-1]) == sample.answer


def test_captions_teach_what_is_there(folder):
    lessons = captions("image,video", 80, 0, folder=folder, **BOTH_KINDS)
    assert {sample.ability for sample in lessons} == {"crop", "whole", "call"}
    for sample in lessons:
        (turn,) = sample.turns
        if sample.ability == "call":
            assert find_code(turn)
            assert not sample.answer  # so that nothing is missed where it ends with its code
        else:
            assert extract_answer(turn) == sample.answer
        if sample.ability == "crop" and sample.answer in COLOURS:
            assert nearest(sample.images[0]) == sample.answer


def test_the_corpus_holds_what_the_policy_reads_and_writes(folder):
    pieces = corpus("image,video", 4, folder=folder)
    text = "".join(pieces)
    code = "<code>\n```python\n"
    for part in (code, "\\boxed{", "Text Result:", "Traceback", "second", "plate"):
        assert part in text
    (message,) = messages(puzzles("image", 1, 0)[0])
    instruction = message["content"][-1]["text"].split("Question")[0]
    assert instruction in text


def test_what_varies_stands_alone_in_the_corpus(folder):
    """So that a tokenizer cannot merge a number or an answer with the words around it."""
    pieces = corpus("image,video", 4, folder=folder)
    assert {"217", "448", "20", *COLOURS, *COUNTS} <= set(pieces)
    words = [piece for piece in pieces if len(piece) > 4 and piece.strip()]
    assert words
    assert not any(re.search(r"\d\d|red", piece) for piece in words)


# Clips -------------------------------------------------------------------------------------------
def test_clips_are_h264_and_show_what_the_scene_says(folder):
    short = {"seconds": (20, 40)}
    d = Difficulty(**short)
    drawn = draw(12, 5, task="video", **short)
    assert {scene.kind for scene in drawn} == set(d.clips)
    assert len({scene.fps for scene in drawn}) > 1
    for scene in drawn:
        (path,) = scene.sample("clip", d, folder).videos
        assert b"avc1" in Path(path).read_bytes()
        reader = decord.VideoReader(path, num_threads=1)
        fps = reader.get_avg_fps()
        assert round(fps) == scene.fps
        assert len(reader) == scene.fps * scene.seconds
        frames = reader.get_batch(range(len(reader))).asnumpy()
        check_lamp(scene, [lamp(frame) for frame in frames], fps)


def check_lamp(scene, states, fps):
    """Whether the lamp's states, frame by frame, are those of the scene, and give its answer."""
    if scene.kind == "second":
        assert states[round(scene.asked * fps)] == scene.answer
        assert None not in states
        return
    before = [None, *states[:-1]]
    flashes = [state for was, state in zip(before, states, strict=True) if state and was is None]
    if scene.kind == "count":
        assert str(len(flashes)) == scene.answer
    else:
        place = -1 if scene.asked == "last" else 0
        assert flashes[place] == scene.answer
    lit = sum(state is not None for state in states) / fps  # seconds
    assert lit <= 0.75 * len(flashes)  # flashes are short


def test_flashes_do_not_run_together():
    for scene in draw(300, task="video", clips=("order", "count")):
        for earlier, later in zip(scene.lights, scene.lights[1:], strict=False):
            assert later[0] - earlier[1] >= 0.49


def answering_light(scene):
    """(begin, end, colour) of the light that answers the question."""
    for light in scene.lights:
        begin, _, colour = light
        if scene.kind == "second":
            if begin == scene.asked:
                return light
        elif colour == scene.answer:
            return light
    raise AssertionError(f"no light answers {vars(scene)}")


def test_no_handful_of_frames_answers():
    """Eight uniform frames rarely hold the answer, and the first frame does not either."""
    hits = []
    first = []
    for scene in draw(300, task="video", clips=("second", "flash", "order")):
        begin, end, _ = answering_light(scene)
        times = [(k + 0.5) * scene.seconds / 8 for k in range(8)]
        hits.append(any(begin <= time < end for time in times))
        first.append(scene.lit(0.0) == scene.answer)
        assert scene.seconds >= 20
    assert np.mean(hits) < 0.25
    assert np.mean(first) < 0.2


def test_uniform_frames_show_the_lamp_as_it_is(folder):
    minute = {"clips": ("flash",), "seconds": (60, 60.5)}
    (sample,) = puzzles("video", 1, 0, folder=folder, **minute)
    _, images = uniform_frames(sample, 8)
    assert len(images) == 8
    for image in images:
        assert lamp(np.asarray(image)) in (None, sample.answer)


def test_no_guess_passes_for_two_counts(folder):
    count = {"clips": ("count",), "seconds": (20, 30)}
    (sample,) = puzzles("video", 1, 0, folder=folder, **count)
    assert sample.data_source == "vsi_numerical"
    assert is_correct(sample.answer, sample)
    for guess in np.arange(0.5, 12, 0.25):
        passed = []
        for count in COUNTS:
            sample.answer = count
            passed.append(is_correct(f"{guess:g}", sample))
        assert sum(passed) <= 1, guess


# The cache of clips ------------------------------------------------------------------------------
class AlwaysMakesRoom:
    """Stands in for sha256: names of clips after which the cache makes room."""

    def __init__(self, text):
        self.checksum = zlib.crc32(text)

    def hexdigest(self):
        return f"00{self.checksum:018d}"


def test_old_clips_make_room(tmp_path, monkeypatch):
    """Beyond KEPT the oldest go, if they are too old to be in use; a clip asked for is not old."""
    monkeypatch.setattr(module, "KEPT", 2)
    monkeypatch.setattr(module.hashlib, "sha256", AlwaysMakesRoom)

    def clips(n, seed, split="train"):
        samples = puzzles("video", n, seed, split, folder=tmp_path, seconds=(20, 21))
        return [Path(sample.videos[0]) for sample in samples]

    old, found = clips(2, seed=0)
    (held_out,) = clips(1, seed=0, split="heldout")
    for clip in (old, found, held_out):
        os.utime(clip, (0, 0))
    clips(5, seed=0)  # asks for `old` and `found` again
    os.utime(old, (0, 0))
    new = clips(2, seed=1)
    assert not old.exists()
    for clip in (found, held_out, *new):
        assert clip.exists()
    # Those of the last hours stay, however many they are.
    assert len(list(tmp_path.rglob("*.mp4"))) == 4 + 1 + 2


def test_clips_are_written_once_and_found_again(folder):
    first = [sample.videos[0] for sample in puzzles("video", 2, 11, folder=folder)]
    files = [os.stat(path).st_ino for path in first]
    again = [sample.videos[0] for sample in puzzles("video", 2, 11, folder=folder)]
    assert again == first
    assert [os.stat(path).st_ino for path in again] == files
    assert not list(folder.rglob("*.part"))


def test_held_out_clips_are_files_of_their_own(folder):
    first = [sample.videos[0] for sample in puzzles("video", 2, 11, folder=folder)]
    held_out = [sample.videos[0] for sample in puzzles("video", 8, 11, "heldout", folder=folder)]
    assert not set(first) & set(held_out)


# Trained on --------------------------------------------------------------------------------------
SMALL_RUN = """--steps 2 --batch_size 2 --group_size 2 --max_new_tokens 6 --max_context 1500
    --save_every 0 --keep_zero_variance"""


def train_on(folder, *flags):
    """Rows of metrics.jsonl of a short run of train.py, in this process, without step 0."""
    out = folder / "out"
    flags = ["--out", out, *SMALL_RUN.split(), *flags]
    config = train.configure([str(flag) for flag in flags])
    train.train(train.begin(config))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["step"] > 0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny checkpoint on disk."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_policy(path, [ANSWER, CODE], vocabulary=330)
    return path


@pytest.fixture
def data_files(folder, tmp_path):
    """both.json holds a picture's and a clip's demonstration, video.json only the clip's.

    The clip's code decodes three frames, seconds apart, and shows one.
    """
    (picture,) = puzzles("image", 1, 0)
    (clip,) = puzzles("video", 1, 0, folder=folder, clips=("flash",))
    picture.images[0].save(tmp_path / "picture.png")
    frame = "video_clue_0.get_batch([0, 1, 40]).asnumpy()[0]"
    look = CODE.format(f"Image.fromarray({frame}).show()")
    red = ANSWER.format("red")
    picture_row = {
        "question": picture.question,
        "answer": picture.answer,
        "image_path": "picture.png",
        "turns": [red],
    }
    clip_row = {
        "question": clip.question,
        "answer": clip.answer,
        "video_path": clip.videos[0],
        "turns": [look, red],
    }
    (tmp_path / "both.json").write_text(json.dumps([picture_row, clip_row]))
    (tmp_path / "video.json").write_text(json.dumps([clip_row]))
    return tmp_path


@pytest.mark.parametrize("name, clips", [("both", 1), ("video", 2)])
def test_demonstrations_with_and_without_an_image_in_the_prompt(tiny, data_files, name, clips):
    """Batches in which no prompt shows an image train, too; what the code decodes is counted."""
    data = data_files / f"{name}.json"
    first, _ = train_on(data_files, "--model", tiny, "--stage", "sft", "--data", data)
    assert first["visual_tokens"] == 4
    assert first["trajectories_trained"] == 2
    assert first["grad_norm"] > 0
    assert first["frames_looked_at"] == 3 * clips / 2
    assert first["seconds_covered"] == clips


def test_one_run_trains_on_images_and_videos(tiny, data_files):
    rows = train_on(data_files, "--model", tiny, "--data", data_files / "both.json")
    for row in rows:
        assert row["trajectories_trained"] == 4
        assert row["trajectories_broken"] == 0


def test_uniform_frames_train_without_a_tool(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the clips are cached
    flags = ["--task", "image,video", "--frames", 3, "--eval_every", 2, "--eval_n", 2]
    rows = train_on(tmp_path, "--model", tiny, *flags)
    for row in rows:
        assert row["tool_calls"] == 0
        assert row["frames_looked_at"] == 3 / 2  # three in every second sample
    assert rows[-1]["eval_visual_tokens"] == (4 + 3 * 4) / 2
