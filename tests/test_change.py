"""docs/change.md: each diff applies, is small, and does what it says in two steps of training."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from model import tiny_policy

ROOT = Path(__file__).resolve().parents[1]
CHANGES = sorted((ROOT / "docs/change").glob("*.diff"))
CODE = ("data.py", "evaluate.py", "model.py", "reward.py", "rollout.py", "sandbox.py", "train.py")
FOLDERS = ("docs", "engine", "tasks")
LOOK = "<code>\n```python\nimage_clue_0.crop((0, 0, 32, 32)).show()\n```\n</code>"
ZOOM = "<code>\n```python\nzoom(48, 32, 4)\n```\n</code>"
ANSWER = "<answer>\n\\boxed{{{}}}\n</answer>"
MOST_LINES = 20
STEPS = 2
# Training whose policy says what the rows of data say, so that a test knows what is to be rewarded.
TRAIN = """
import sys, train
from engine.fast import FastPolicy
from rollout import Recital
train.FastPolicy = lambda plain: Recital(FastPolicy(plain))
sys.argv[0] = "train.py"
train.main()
"""
SEE_ZOOM = """
from PIL import Image
from data import Sample
from engine.prompt import messages
from sandbox import Sandbox
picture = Image.new("RGB", (64, 64), "red")
picture.paste("blue", (44, 28, 52, 36))
with Sandbox([picture]) as box:
    result = box.run("zoom(48, 32, 4)")
shown = result.images[0]
print(shown.size, shown.getpixel((32, 32)), shown.getpixel((2, 2)))
print(messages(Sample("0", "?", "1", images=(picture,))))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny checkpoint on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy(folder, [LOOK, ANSWER.format("red")] * 3, vocabulary=330)
    return folder


@pytest.fixture
def copy(tmp_path):
    """A copy of the code, without the history."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.png", "*.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def run(folder, *command):
    """Run a command in a folder -> what it prints."""
    # git must not take the folder for a part of a repository that it may lie in.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def apply(copy, name):
    run(copy, "git", "apply", f"docs/change/{name}.diff")


def picture_row(folder, *turns):
    """A row of data with a picture, and what the policy is to say."""
    Image.new("RGB", (64, 64), "red").save(folder / "picture.png")
    row = dict(question="Which colour?", answer="red", image_path="picture.png")
    return dict(row, turns=[*turns, ANSWER.format("red")])


def train(copy, tiny, rows, folder):
    """Two steps on rows whose media lie in `folder` -> the steps' metrics."""
    data = folder / "rows.json"
    data.write_text(json.dumps(rows))
    settings = dict(
        model=tiny,
        data=data,
        out=copy / "run",
        steps=STEPS,
        batch_size=len(rows),
        oversample=1,
        max_oversample=1,
        group_size=2,
        max_context=2048,
        eval_every=0,
        save_every=0,
    )
    flags = ["--keep_zero_variance"]
    for name, value in settings.items():
        flags += [f"--{name}", str(value)]
    run(copy, sys.executable, "-c", TRAIN, *flags)
    lines = (copy / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["trajectories_trained"] == 2 * len(rows) for row in metrics)
    assert not any(row["updates_skipped"] for row in metrics)
    return metrics


@pytest.mark.parametrize("diff", CHANGES, ids=lambda path: path.stem)
def test_a_change_is_small_and_explained(diff):
    text = diff.read_text()
    files = re.findall(r"^\+\+\+ b/(.*)$", text, re.MULTILINE)
    changed = re.findall(r"^(?:\+(?!\+\+ b/)|-(?!-- (?:a/|/dev))).*$", text, re.MULTILINE)
    assert 1 <= len(files) <= 2
    assert 1 <= len(changed) <= MOST_LINES
    assert f"git apply docs/change/{diff.name}" in (ROOT / "docs/change.md").read_text()


def test_repeated_code_costs(copy, tiny, tmp_path):
    apply(copy, "reward")
    rows = [picture_row(tmp_path, LOOK, LOOK, LOOK), picture_row(tmp_path, LOOK)]
    for row in train(copy, tiny, rows, tmp_path):
        assert row["accuracy"] == 1.0
        three_calls = 1.0 + 3 * 0.1 - 2 * 0.05
        one_call = 1.0 + 0.1
        assert row["reward"] == pytest.approx((three_calls + one_call) / 2)


def test_a_task_with_its_own_verifier(copy, tiny, tmp_path):
    apply(copy, "task")
    printed = run(tmp_path, sys.executable, str(copy / "tasks" / "grey.py"))
    rows = [json.loads(line) for line in printed.splitlines()]
    assert len({row["answer"] for row in rows}) == len(rows) > 10
    for row, off, box in zip(rows, (5, -4, 6, 0), ("{}", "{}", "{}", "about {}"), strict=False):
        with Image.open(tmp_path / row["image_path"]) as picture:
            assert picture.getpixel((0, 0)) == (int(row["answer"]),) * 3
        said = box.format(int(row["answer"]) + off)
        row["turns"] = [ANSWER.format(said)]
    for row in train(copy, tiny, rows[:4], tmp_path):
        assert row["accuracy"] == 0.5  # the first two: near enough, and a number


def test_a_second_tool(copy, tiny, tmp_path):
    apply(copy, "tool")
    pixels, prompt = run(copy, sys.executable, "-c", SEE_ZOOM).splitlines()
    assert pixels == "(64, 64) (0, 0, 255) (255, 0, 0)"
    assert "zoom(x, y, factor)" in prompt
    for row in train(copy, tiny, [picture_row(tmp_path, ZOOM)], tmp_path):
        assert row["tool_calls"] == 1
        assert row["visual_tokens"] == 2 * 4  # the picture, and what zoom showed
