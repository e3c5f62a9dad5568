"""tasks/puzzles.py: nothing but looking answers, looking does answer, and everything follows from the seed."""
import json
import os
import re
import tempfile
import zlib
from collections import Counter, namedtuple
from pathlib import Path

import decord
import numpy as np
import pytest
from PIL import Image

import train
from data import messages, uniform_frames
from model import tiny_policy
from reward import extract_answer, is_correct
from rollout import find_code
from sandbox import Sandbox
from tasks import puzzles as module
from tasks.puzzles import (ANSWER, CODE, COLOURS, COUNTS, VALUES, Difficulty, captions, corpus, demonstrations,
                           puzzles)

PALETTE = np.array(list(COLOURS.values()), float)
DIFFICULT = dict(kinds=("colour", "stripes"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


def nearest(pixels):
    """The colour name that most pixels of (..., 3) have, almost."""
    far = np.abs(np.asarray(pixels, float).reshape(-1, 1, 3) - PALETTE).max(-1)  # (pixels, colours)
    return list(COLOURS)[int((far < 25).sum(0).argmax())]


def lamp(frame):
    """The lamp's colour in a decoded frame, or None when it is dark: all else in the frame is grey."""
    return nearest(frame) if (np.ptp(frame.astype(int), -1) > 80).mean() > 0.1 else None


def scenes(n, difficulty, seed=0, split="train", task="image"):
    return [scene for *_, scene in module._scenes(task, n, seed, split, "test", difficulty)]


def independent(pairs, bound=0.03):
    """Mutual information of two columns in bits, less what chance alone gives, is below `bound`."""
    both, left, right, n = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs), len(pairs)
    bits = sum(k / n * np.log2(k * n / left[a] / right[b]) for (a, b), k in both.items())
    return bits - (len(left) - 1) * (len(right) - 1) / (2 * n * np.log(2)) < bound


def reads(kind, size=None, n=200, box=7, **difficulty):
    """Accuracy of a linear reader fitted on plates as they are in the context (side 56), or in crops (`size`)."""
    d, inputs, targets = Difficulty(kinds=(kind,), **difficulty), [], []
    for scene in scenes(n, d):
        picture = module._paint(scene, d)
        small = np.asarray(picture.resize((56, 56), Image.BICUBIC), float)
        for k, value in enumerate(scene["plates"]):
            x, y = (place // 8 for place in module._centre(d, k))
            look = picture.crop(module._box(d, k)).resize((size, size)) if size else \
                small[y - box // 2:y + box // 2 + 1, x - box // 2:x + box // 2 + 1]
            inputs.append(np.asarray(look, float).ravel() / 50)
            targets.append(VALUES[kind].index(value))
    x, y = np.array(inputs), np.eye(len(VALUES[kind]))[targets]
    x, half = np.c_[x - x.mean(0), np.ones(len(x))], len(x) * 3 // 4
    weights = np.linalg.solve(x[:half].T @ x[:half] + 10 * np.eye(x.shape[1]), x[:half].T @ y[:half])
    return float(((x[half:] @ weights).argmax(1) == y[half:].argmax(1)).mean())


def test_samples_follow_from_seed_and_index():
    few, more = puzzles("image", 3, 7, **DIFFICULT), puzzles("image", 6, 7, **DIFFICULT)
    assert [(s.id, s.question, s.answer, s.images[0].tobytes()) for s in few] == \
        [(s.id, s.question, s.answer, s.images[0].tobytes()) for s in more[:3]]
    pictures = {s.images[0].tobytes() for seed in range(4) for split in ("train", "heldout")
                for s in puzzles("image", 5, seed, split)}
    assert len(pictures) == 40 and len({s.id for s in more}) == 6
    assert more[0].images[0].mode == "RGB" and more[0].images[0].size == (448, 448)


def test_a_scene_is_never_in_both_splits(monkeypatch):
    monkeypatch.setitem(module.DRAW, "image", lambda rng, d: {"scene": int(rng.integers(60))})  # few enough to run out
    drawn = {split: {scene["scene"] for seed in range(20) for scene in scenes(20, Difficulty(), seed, split)}
             for split in ("train", "heldout")}
    assert drawn["train"] | drawn["heldout"] == set(range(60)) and not drawn["train"] & drawn["heldout"]
    assert 0 < len(drawn["heldout"]) < 20


def test_tasks_alternate_also_one_by_one(folder):
    names = ["video" if s.videos else "image" for s in puzzles("image,video", 4, 0, folder=folder)]
    singles = ["video" if puzzles("image,video", 1, seed, folder=folder)[0].videos else "image" for seed in range(4)]
    assert names == singles == ["image", "video"] * 2


def test_unknown_names_are_refused():
    for bad in (dict(task="audio"), dict(task="image", split="test"), dict(task="image", hints=0.5)):
        with pytest.raises((ValueError, TypeError)):
            puzzles(**dict(n=1, seed=0) | bad)


@pytest.mark.parametrize("task,kind", [("image", "colour"), ("image", "stripes"), ("video", "second"),
                                       ("video", "flash"), ("video", "order"), ("video", "count")])
def test_a_blind_policy_is_at_chance(task, kind):
    drawn = scenes(2000, Difficulty(kinds=(kind,), clips=(kind,)), task=task)
    shares = Counter(scene["answer"] for scene in drawn)
    assert set(shares) == set(VALUES[kind]) and max(shares.values()) / 2000 < 1 / len(shares) + 0.04
    known = ("asked", "wording", "seconds", "fps", "side", "light" if kind == "stripes" else "wording")
    for name in known:  # what the question and the prompt's figures tell
        column = [scene[name] // 20 if name == "seconds" else scene[name] for scene in drawn if name in scene]
        assert not column or independent(list(zip(column, (scene["answer"] for scene in drawn)))), name


@pytest.mark.parametrize("kind", ["colour", "stripes"])
def test_the_hint_is_right_as_often_as_it_says(kind):
    for hint in (0.48, 0.9):
        drawn = scenes(2000, Difficulty(kinds=(kind,), hint=hint))
        assert abs(np.mean([scene["hint"] == scene["answer"] for scene in drawn]) - hint) < 0.04
        assert all(plate != scene["answer"] for scene in drawn for k, plate in enumerate(scene["plates"], 1)
                   if k != scene["asked"])


def test_the_picture_carries_the_hint():
    samples = puzzles("image", 60, 1)
    tints = [np.asarray(s.images[0].resize((1, 1), Image.BOX), float).ravel() - 127.5 for s in samples]
    seen = [list(COLOURS)[int(np.argmax((PALETTE - 127.5) / np.linalg.norm(PALETTE - 127.5, axis=1)[:, None] @ tint))]
            for tint in tints]
    truth = [scene["hint"] for *_, scene in module._scenes("image", 60, 1, "train", "puzzle", Difficulty())]
    assert np.mean([a == b for a, b in zip(seen, truth)]) > 0.9


def test_context_resolution_does_not_show_what_a_crop_shows():
    assert reads("colour") < 0.33 and reads("stripes") < 0.36          # chance: 0.17 and 0.25; the hint: 0.48
    assert reads("colour", balance=0.0, chip=8, ring=9) > 0.6          # the reader can read where there is something
    assert reads("colour", size=14) > 0.6                              # and does in the crop


@pytest.mark.parametrize("task", ["image", "video"])
def test_demonstrations_say_what_the_sandbox_shows(task, folder):
    checked = Counter()
    for sample in demonstrations(task, 24, 3, folder=folder, slip=0.2, aim=0.5, looks=(0.2, 0.4, 0.4)):
        seen = None
        with Sandbox(sample.images, sample.videos) as sandbox:
            for turn in sample.turns[:-1]:
                result = sandbox.run(find_code(turn))
                assert result.error is None or re.search("ValueError|IndexError", result.error)
                checked["error" if result.error else "fine"] += 1
                if result.error is None and sample.ability == "count":
                    seen = result.text.strip() or seen
                elif result.error is None:
                    (shown,) = result.images
                    seen = (lamp(np.asarray(shown)) if task == "video" else nearest(shown)) or seen
        assert extract_answer(sample.turns[-1]) in VALUES[sample.ability]
        if seen is not None:
            assert extract_answer(sample.turns[-1]) == seen
            checked["right" if seen == sample.answer else "wrong"] += 1
    assert min(checked[key] for key in ("error", "fine", "right", "wrong")) > 0


def test_demonstrations_are_of_the_quality_asked_for():
    looks, aim = (0.35, 0.05, 0.10, 0.20, 0.30), 0.47
    drawn = demonstrations("image", 250, 0, looks=looks, aim=aim)
    counts = Counter(len(s.turns) - 1 for s in drawn)
    assert all(abs(counts[k] / 250 - share) < 0.1 for k, share in enumerate(looks))
    right = [extract_answer(s.turns[-1]) == s.answer for s in drawn if len(s.turns) > 1]
    assert abs(np.mean(right) - aim) < 0.12
    perfect = demonstrations("image", 30, 0, aim=1.0, slip=0.0, looks=(0.0, 1.0))
    assert all(extract_answer(s.turns[-1]) == s.answer and len(s.turns) == 2 for s in perfect)


def test_captions_teach_what_is_there(folder):
    lessons = captions("image,video", 80, 0, folder=folder, **DIFFICULT)
    assert {s.ability for s in lessons} == {"crop", "whole", "call"} and all(len(s.turns) == 1 for s in lessons)
    for sample in lessons:
        if sample.ability == "call":
            assert find_code(sample.turns[0])
        else:
            assert extract_answer(sample.turns[0]) == sample.answer
        if sample.ability == "crop" and sample.answer in COLOURS:
            assert nearest(sample.images[0]) == sample.answer


def test_the_corpus_holds_what_the_policy_reads_and_writes(folder):
    pieces = corpus("image,video", 4, folder=folder)
    text = "".join(pieces)
    written = ("<code>\n```python\n", "\\boxed{", "Text Result:", "Traceback", "second", "plate")
    assert all(part in text for part in written)
    question = messages(puzzles("image", 1, 0)[0])[0]["content"][-1]["text"].split("Question")[0]
    assert question in text
    # what varies stands alone: a tokenizer cannot merge a number or an answer with the words around it
    assert {"217", "448", "20", *COLOURS, *COUNTS} <= set(pieces)
    assert not any(re.search(r"\d\d|red", piece) for piece in pieces if len(piece) > 4 and piece.strip())


# ------------------------------------------------------------------------------------------------ video
def test_clips_are_h264_and_show_what_the_scene_says(folder):
    d = Difficulty(seconds=(20, 40))
    drawn = scenes(12, d, 5, task="video")
    assert {scene["kind"] for scene in drawn} == set(d.clips) and len({scene["fps"] for scene in drawn}) > 1
    for scene in drawn:
        path = module._video_sample("clip", scene, d, folder).videos[0]
        assert b"avc1" in open(path, "rb").read()
        reader = decord.VideoReader(path, num_threads=1)
        fps = reader.get_avg_fps()
        assert round(fps) == scene["fps"] and len(reader) == scene["fps"] * scene["seconds"]
        states = [lamp(frame) for frame in reader.get_batch(range(len(reader))).asnumpy()]
        if scene["kind"] == "second":
            assert states[round(scene["asked"] * fps)] == scene["answer"] and None not in states
            continue
        shown = [state for before, state in zip([None] + states, states) if before is None and state]
        if scene["kind"] == "count":
            assert str(len(shown)) == scene["answer"]
        else:
            assert shown[-1 if scene["asked"] == "last" else 0] == scene["answer"]
        assert sum(state is not None for state in states) / fps <= 0.75 * len(shown)  # flashes are short


def test_flashes_do_not_run_together():
    for scene in scenes(300, Difficulty(clips=("order", "count")), task="video"):
        assert all(later[0] - earlier[1] >= 0.49 for earlier, later in zip(scene["lights"], scene["lights"][1:]))


def test_no_handful_of_frames_answers(folder):
    """Eight uniform frames: the second asked about, or the only flash, is rarely among them; nor is it the first."""
    hits, first = [], []
    for scene in scenes(300, Difficulty(clips=("second", "flash", "order")), task="video"):
        times = [(k + 0.5) * scene["seconds"] / 8 for k in range(8)]
        begin, end, _ = next(light for light in scene["lights"] if light[2] == scene["answer"]
                             and scene["kind"] != "second" or light[0] == scene["asked"])
        hits.append(any(begin <= t < end for t in times))
        first.append(module._lit(scene, 0.0) == scene["answer"])
        assert scene["seconds"] >= 20
    assert np.mean(hits) < 0.25 and np.mean(first) < 0.2
    sample = puzzles("video", 1, 0, folder=folder, clips=("flash",), seconds=(60, 60.5))[0]
    seconds, images = uniform_frames(sample, 8)
    assert len(images) == 8 and all(lamp(np.asarray(image)) in (None, sample.answer) for image in images)


def test_no_guess_passes_for_two_counts(folder):
    sample = puzzles("video", 1, 0, folder=folder, clips=("count",), seconds=(20, 30))[0]
    assert sample.data_source == "vsi_numerical" and is_correct(sample.answer, sample)
    for guess in np.arange(0.5, 12, 0.25):
        passed = []
        for count in COUNTS:
            sample.answer = count
            passed.append(is_correct(f"{guess:g}", sample))
        assert sum(passed) <= 1, guess


def test_old_clips_make_room(tmp_path, monkeypatch):
    """Beyond KEPT the oldest go, where they are too old to be in use; what was asked for again is not old."""
    monkeypatch.setattr(module, "KEPT", 2)
    monkeypatch.setattr(module.hashlib, "sha256", lambda text: namedtuple("Hash", "hexdigest")(
        lambda: f"00{zlib.crc32(text):018d}"))  # the name of a clip after which the cache is tidied up
    short = dict(folder=tmp_path, seconds=(20, 21))
    old, found = [Path(s.videos[0]) for s in puzzles("video", 2, 0, **short)]
    held_out = Path(puzzles("video", 1, 0, "heldout", **short)[0].videos[0])
    for clip in (old, found, held_out):
        os.utime(clip, (0, 0))
    puzzles("video", 5, 0, **short)
    os.utime(old, (0, 0))
    new = [Path(s.videos[0]) for s in puzzles("video", 2, 1, **short)]
    assert not old.exists() and all(clip.exists() for clip in (found, held_out, *new))
    assert len(list(tmp_path.rglob("*.mp4"))) == 4 + 1 + 2  # those of the last hours stay, however many


def test_clips_are_written_once_and_found_again(folder):
    first = puzzles("video", 2, 11, folder=folder)
    files = [os.stat(s.videos[0]).st_ino for s in first]
    again = puzzles("video", 2, 11, folder=folder)
    assert [s.videos for s in again] == [s.videos for s in first]
    assert [os.stat(s.videos[0]).st_ino for s in again] == files
    assert not list(folder.rglob("*.part"))
    assert {s.videos for s in first}.isdisjoint(s.videos for s in puzzles("video", 8, 11, "heldout", folder=folder))


# ------------------------------------------------------------------------------------------------ trained on
def train_on(folder, *flags):
    """Rows of metrics.jsonl of a short run of train.py, in this process."""
    small = "--steps 2 --batch_size 2 --group_size 2 --max_new_tokens 6 --max_context 1500 --save_every 0"
    config = train.configure(["--out", str(folder / "out"), "--keep_zero_variance", *small.split(), *map(str, flags)])
    train.train(train.begin(config), config)
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny checkpoint on disk."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_policy(path, [ANSWER, CODE], vocabulary=330)
    return path


def test_one_run_trains_on_images_and_videos(tiny, folder, tmp_path):
    """Rows of both kinds, with batches in which no prompt shows an image; what the code decodes is counted."""
    (picture,), (clip,) = puzzles("image", 1, 0), puzzles("video", 1, 0, folder=folder, clips=("flash",))
    picture.images[0].save(tmp_path / "picture.png")
    look = CODE.format("Image.fromarray(video_clue_0.get_batch([0, 1, 40]).asnumpy()[0]).show()")
    red = ANSWER.format("red")
    rows = [dict(question=picture.question, answer=picture.answer, image_path="picture.png", turns=[red]),
            dict(question=clip.question, answer=clip.answer, video_path=clip.videos[0], turns=[look, red])]
    (tmp_path / "both.json").write_text(json.dumps(rows))
    (tmp_path / "video.json").write_text(json.dumps(rows[1:]))
    for name, visual, seconds in (("both", 4, 1), ("video", 4, 2)):
        first, _ = train_on(tmp_path, "--model", tiny, "--stage", "sft", "--data", tmp_path / f"{name}.json")
        assert first["visual_tokens"] == visual and first["trajectories_trained"] == 2 and first["grad_norm"] > 0
        assert first["frames_looked_at"] == 1.5 * seconds and first["seconds_covered"] == seconds
    rows = train_on(tmp_path, "--model", tiny, "--data", tmp_path / "both.json")
    assert all(row["trajectories_trained"] == 4 and row["trajectories_broken"] == 0 for row in rows)


def test_uniform_frames_train_without_a_tool(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = train_on(tmp_path, "--model", tiny, "--task", "image,video", "--frames", 3, "--eval_every", 2, "--eval_n", 2)
    assert all(row["tool_calls"] == 0 and row["frames_looked_at"] == 1.5 for row in rows)  # 3 in every second sample
    assert rows[-1]["eval_visual_tokens"] == (4 + 3 * 4) / 2
