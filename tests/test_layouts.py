"""Real photographs and a real video in every layout that `load` reads: trained on and evaluated.

And files that vanish or break in the middle of a run.
"""

import base64
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_data import MEDIA, needs_media, video
from test_formats import write_parquet
from test_train import make_run, metrics, picture

import evaluate
import rollout as rollout_file
import train
from data import load
from engine.batching import flat
from model import load_policy, tiny_policy
from reward import score
from rollout import EndReason, Recital, rollout

SIZE = "print(*image_clue_0.size)"
SHAPE = "print(*video_clue_0[7].asnumpy().shape, len(video_clue_0))"
SHORT = "--steps 2 --batch_size 4 --max_new_tokens 4 --max_context 4096 --eval_every 0".split()


def code(text):
    return f"<code>\n```python\n{text}\n```\n</code>"


def answer(text):
    return f"<answer>\n\\boxed{{{text}}}\n</answer>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy(folder, [code(SIZE), code(SHAPE), answer("A")] * 3, vocabulary=400)
    return folder


# ------------------------------------------------------------------------------- rows of a layout
# Each of these makes a row of one layout out of a question about one file. `media`: the file, as
# the row holds it.
def validation(row, kind, media):
    return {**row, f"{kind}_path": media}


def reinforcement(row, kind, media):
    content = f"<{kind}_clue_0><{kind}></{kind}_clue_0>\n{row['question']}"
    about = {"answer": row["answer"], "index": row["id"], "question": row["question"]}
    return {
        "prompt": [{"role": "user", "content": content}],
        "data_source": row["data_source"],
        "reward_model": {"ground_truth": row["answer"], "style": "model"},
        "extra_info": about,
        "mm_hint": {"hint_path": media, "hint_type": kind},
    }


def verl(row, kind, media):
    chat = [
        {"role": "system", "content": "Look with Python before you answer."},
        {"role": "user", "content": f"<{kind}>{row['question']}"},
    ]
    return {
        "data_source": row["data_source"],
        "prompt": chat,
        "images": [media] if kind == "image" else [],
        "videos": [media] if kind == "video" else [],
        "ability": row["ability"],
        "reward_model": {"ground_truth": row["answer"], "style": "rule"},
        "extra_info": {"index": row["id"], "split": "train"},
    }


def easyr1(row, kind, media):
    problem = f"<{kind}>{row['question']}"
    return {"problem": problem, "answer": row["answer"], f"{kind}s": [media]}


def sharegpt(row, kind, media):
    chat = [
        {"from": "human", "value": f"<{kind}>{row['question']}"},
        {"from": "gpt", "value": row["answer"]},
    ]
    return {"conversations": chat, f"{kind}s": [media]}


def parts(row, kind, media):
    """Messages whose content is a list; the first assistant turn runs code."""
    content = [{"type": kind}, {"type": "text", "text": row["question"]}]
    look = code(SIZE if kind == "image" else SHAPE)
    chat = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": look},
        {"role": "user", "content": "<tool_response>…</tool_response>"},
        {"role": "assistant", "content": answer(row["answer"])},
    ]
    return {"messages": chat, f"{kind}s": [media]}


# ----------------------------------------------------------------------- how a row holds a picture
def path(file):
    return file.name


def in_base64(file):
    return base64.b64encode(file.read_bytes()).decode()


def in_uri(file):
    return f"data:image/{file.suffix[1:]};base64,{in_base64(file)}"


def with_bytes(file):
    return {"bytes": file.read_bytes(), "path": None}


def with_path(file):
    return {"bytes": None, "path": file.name}


# ----------------------------------------------------------------------------------------- files
def as_json(folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def as_lines(folder, rows):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def as_parquet(folder, rows):
    return write_parquet(folder / "train.parquet", rows)


def as_hub(folder, rows):
    """A folder as one downloads it from the hub: two files of the split that is trained on."""
    data = folder / "hub" / "data"
    data.mkdir(parents=True)
    for file in folder.glob("*.*"):  # paths are relative to the folder that --data names
        shutil.copy(file, folder / "hub")
    write_parquet(data / "train-00000-of-00002.parquet", rows[:5])
    write_parquet(data / "train-00001-of-00002.parquet", rows[5:])
    write_parquet(data / "test-00000-of-00001.parquet", rows[:1])
    return folder / "hub"


def as_saved(folder, rows):
    """What save_to_disk leaves; its pictures are decoded ones, of the feature Image."""
    datasets = pytest.importorskip("datasets")
    saved = folder / "saved"
    for row in rows:
        for name in row.pop("images", []):
            row["image"] = Image.open(folder / name)
        for name in row.pop("videos", []):
            row["video"] = str(folder / name)
    names = {name for row in rows for name in row}
    columns = {name: [row.get(name) for row in rows] for name in names}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(saved)
    return saved


LAYOUTS = {
    "validation JSON": (validation, path, as_json),
    "validation JSON, base64": (validation, in_base64, as_json),
    "JSON lines, data URIs": (validation, in_uri, as_lines),
    "RL JSON": (reinforcement, path, as_json),
    "RL JSON lines, base64": (reinforcement, in_base64, as_lines),
    "verl, Parquet with bytes": (verl, with_bytes, as_parquet),
    "verl, Parquet with paths": (verl, with_path, as_parquet),
    "DeepEyes, plain bytes": (verl, Path.read_bytes, as_parquet),
    "EasyR1, Parquet": (easyr1, with_bytes, as_parquet),
    "EasyR1, JSON": (easyr1, path, as_json),
    "a folder from the hub": (verl, with_bytes, as_hub),
    "a folder that datasets saved": (easyr1, path, as_saved),
    "ShareGPT": (sharegpt, path, as_json),
    "ShareGPT, data URIs": (sharegpt, in_uri, as_lines),
    "messages in parts": (parts, in_base64, as_json),
}


def questions():
    """All rows about the shared files, with kind and name of each one's file."""
    rows = []
    for kind in ("image", "video"):
        for row in json.loads((MEDIA / f"real_{kind}_val_dataset.json").read_text()):
            rows.append((row, kind, row.pop(f"{kind}_path")))
    return rows


def written(layout, folder):
    """All questions in a layout -> the file or folder for --data."""
    make, hold, write = LAYOUTS[layout]
    rows = []
    for row, kind, name in questions():
        file = Path(shutil.copy(MEDIA / name, folder))
        rows.append(make(row, kind, hold(file) if kind == "image" else name))
    return write(folder, rows)


@pytest.fixture
def handlers():
    """Both commands set handlers of signals, which this process must not keep."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def command(*words):
    """`python train.py …`, in this process -> the rows of its metrics."""
    config = train.configure(list(map(str, words)))
    train.train(train.begin(config))
    return metrics(Path(config.out))


@needs_media
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_media_in_every_layout_are_trained_on_and_evaluated(layout, tiny, tmp_path, handlers):
    data = written(layout, tmp_path)
    out = tmp_path / "run"
    results = tmp_path / "results"
    few = ["--group_size", 2, "--max_turns", 2, "--oversample", 1, "--keep_zero_variance"]
    rows = command("--model", tiny, "--data", data, "--out", out, *SHORT, *few)
    assert len(rows) == 2
    for row in rows:
        assert row["trajectories_trained"] == 8  # in both steps together two of each question
        assert row["unreadable"] == 0
        assert row["visual_tokens"] > 0
    words = ["--model", out, "--data", data, "--out", results, "--max_turns", 2]
    evaluate.main(list(map(str, words)))
    found = json.loads((results / "results.json").read_text())
    assert found["n"] == 8
    assert found["errors"] == 0
    assert found["visual_tokens"] > 0


@needs_media
@pytest.mark.parametrize("layout", ["ShareGPT", "ShareGPT, data URIs", "messages in parts"])
def test_conversations_are_demonstrations_too(layout, tiny, tmp_path, handlers):
    data = written(layout, tmp_path)
    out = tmp_path / "run"
    for row in command("--stage", "sft", "--model", tiny, "--data", data, "--out", out, *SHORT):
        assert row["demonstrations_skipped"] == 0
        assert row["trajectories_trained"] == 4


@needs_media
@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_finds_the_whole_file_and_the_reference_is_right(layout, tiny, tmp_path):
    samples = []
    for sample in load(written(layout, tmp_path)):
        look = code(SIZE if sample.images else SHAPE)
        samples.append(replace(sample, turns=[look, answer(sample.answer)]))
    done = flat(rollout(Recital(load_policy(tiny)), samples, 1))
    score(done)
    for t, (row, kind, name) in zip(done, questions(), strict=True):
        size = (240, 320, 3, 300)
        if kind == "image":
            size = Image.open(MEDIA / name).size
        assert tuple(map(int, t.turns[0].output.split())) == size
        assert t.end_reason is EndReason.DONE
        assert t.sample.answer == row["answer"]
        assert t.correct


# --------------------------------------------------------- files that vanish or break after `load`
def gone(file):
    file.unlink()


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def overwritten(file):
    """As long as before, and its time changes, but there is nothing in it."""
    file.write_bytes(bytes(file.stat().st_size))


def naming(file, capsys):
    """The lines on the terminal that name a file."""
    return [line for line in capsys.readouterr().out.splitlines() if str(file) in line]


def picture_file(folder, name):
    file = folder / f"{name}.png"
    picture(len(name)).save(file)
    return file, dict(id=name, question="?", answer="red", image_path=file.name)


def video_file(folder, name):
    file = video(folder / f"{name}.mp4", size=(160, 120))
    return file, dict(id=name, question="?", answer="red", video_path=file.name)


@pytest.mark.parametrize("harm", [gone, cut, overwritten])
@pytest.mark.parametrize("make", [picture_file, video_file])
def test_a_file_that_is_lost_during_a_run_costs_its_own_trajectories(
    make, harm, tiny, tmp_path, capsys
):
    """From the step on in which it is lost; it is named once, and the run goes on."""
    _, good = make(tmp_path, "good")
    file, bad = make(tmp_path, "bad")
    samples = load(as_json(tmp_path, [good, bad]))
    settings = dict(steps=4, batch_size=2, oversample=1, max_oversample=1, max_new_tokens=4)
    run = make_run(tiny, samples, tmp_path / "run", **settings, keep_zero_variance=True)
    run.config.steps = 1
    train.train(run)
    harm(file)
    run.config.steps = 4
    train.train(run)
    assert [row["unreadable"] for row in run.rows] == [0, 0.5, 0.5, 0.5]
    assert [row["trajectories_broken"] for row in run.rows] == [0, 2, 2, 2]
    assert [row["trajectories_trained"] for row in run.rows] == [4, 2, 2, 2]
    assert len(naming(file, capsys)) == 1


@pytest.mark.parametrize("harm", [gone, cut])
def test_a_table_that_is_lost_during_a_run(harm, tiny, tmp_path, capsys):
    rows = []
    for number in range(4):
        file, row = picture_file(tmp_path, "x" * (number + 1))
        rows.append({**row, "image_path": None, "images": [with_bytes(file)]})
    table = as_parquet(tmp_path, rows)
    samples = load(table)
    harm(table)
    run = make_run(tiny, samples, tmp_path / "run", steps=2, max_new_tokens=4)
    train.train(run)
    assert [row["unreadable"] for row in run.rows] == [1, 1]
    assert naming(table, capsys)


@pytest.mark.parametrize("make", [picture_file, video_file])
def test_a_demonstration_whose_file_is_lost_is_skipped(make, tiny, tmp_path, capsys):
    file, row = make(tmp_path, "bad")
    _, good = make(tmp_path, "good")
    turns = [answer("red")]
    samples = load(as_json(tmp_path, [{**row, "turns": turns}, {**good, "turns": turns}]))
    harmed = make_run(tiny, samples, tmp_path / "run", stage="sft")
    file.unlink()
    train.train(harmed)
    assert [row["demonstrations_skipped"] for row in harmed.rows] == [1, 1]
    assert [row["trajectories_trained"] for row in harmed.rows] == [1, 1]
    assert len(naming(file, capsys)) == 1


def test_a_video_that_is_lost_after_it_was_asked(tiny, tmp_path, monkeypatch):
    """Between prompt and session: the session cannot open it."""
    _, good = video_file(tmp_path, "good")
    file, bad = video_file(tmp_path, "bad")
    turns = [code("print(1)"), answer("red")]
    rows = [{**good, "turns": turns}, {**bad, "turns": turns}]
    samples = load(as_json(tmp_path, rows))
    tools = rollout_file.Tools

    def late(*args):
        file.unlink(missing_ok=True)
        return tools(*args)

    monkeypatch.setattr(rollout_file, "Tools", late)
    kept, lost = flat(rollout(Recital(load_policy(tiny)), samples, 1))
    assert kept.answer == "red"
    assert lost.broken
    assert str(file) in lost.error
