"""What a run says: in time, in lines that fit, and about what does nothing or cannot be reached."""

import json
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import train
from data import Sample
from engine import run as running
from engine.judge import Judge
from engine.metrics import measure
from engine.run import Journal, Progress, greet
from model import tiny_policy
from reward import score
from rollout import EndReason, Trajectory

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9/v1"  # nothing listens there


def config(tmp_path, **settings):
    return train.Config(out=str(tmp_path), **settings)


def greeting(capsys, *given):
    greet(*given)
    return capsys.readouterr().out.splitlines()


# ----------------------------------------------------------------------------------------- in time
def test_what_is_slow_to_import_is_not_imported_before_the_first_line():
    """transformers' models and torch's compiler take seconds."""
    program = "import json, sys, train, evaluate; print(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = json.loads(done.stdout)
    slow = ("torch._dynamo", "torch.distributed.fsdp", "matplotlib.pyplot", "transformers.model")
    assert [name for name in modules if name.startswith(slow)] == []
    assert "torch" in modules and "engine.fast" in modules


# ------------------------------------------------------------------------------------- the greeting
def test_the_greeting_says_policy_data_place_and_size_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    some = config(tmp_path, model="DIR", data="rl.json", steps=70)
    shown = " ".join(greeting(capsys, some, [0] * 12, [0] * 3))
    for words in ("DIR", "rl.json, 12 rows", "3 held out", "70 steps of rl", "processes: 8"):
        assert words in shown
    assert str(tmp_path) in shown and "tiny" not in shown


def test_the_tiny_policy_is_no_model_for_photographs(tmp_path, capsys):
    shown = " ".join(greeting(capsys, config(tmp_path, data="rl.json"), [0], []))
    assert "tiny" in shown and "no model for photographs" in shown and "minutes" in shown
    assert "photographs" not in " ".join(greeting(capsys, config(tmp_path), [], []))


@pytest.mark.parametrize("cuda", [False, True])
def test_offload_where_it_does_nothing_says_so(tmp_path, capsys, monkeypatch, cuda):
    monkeypatch.setattr(running.torch.cuda, "is_available", lambda: cuda)
    shown = greeting(capsys, config(tmp_path, offload=True), [], [])
    assert any("--offload does nothing" in line for line in shown) != cuda
    shown = greeting(capsys, config(tmp_path, offload=False), [], [])
    assert not any("--offload" in line for line in shown)


def test_a_judge_that_cannot_be_reached_is_named_at_the_start(tmp_path, capsys, monkeypatch):
    judged = config(tmp_path, judge=NOWHERE, judge_model="m")
    assert any("judge cannot be reached" in line for line in greeting(capsys, judged, [], []))
    monkeypatch.setattr(Judge, "reachable", lambda judge: True)
    assert not any("reached" in line for line in greeting(capsys, judged, [], []))
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")  # one process asks and says it
    assert greeting(capsys, judged, [], []) == []


def test_every_line_of_a_usual_run_fits_into_100_columns(tmp_path, capsys):
    out = "runs/photographs_of_the_street_seed0"
    some = train.Config(out=out, data="rows/of/photographs.json", offload=True)
    shown = greeting(capsys, some, [0] * 12_345, [0] * 128)
    row = dict.fromkeys(running.SHOWN["rl"], -1234.5678)
    row.update(step=1234, seconds_rollout=12_345.0, seconds_update=1.0)
    progress = Progress({"rl": (70_000, 1.0)})
    progress.step("rl")
    shown.append(progress.line("rl", "rl", row))
    assert max(map(len, shown)) <= 100


def test_the_bar_is_no_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(running.sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress({"rl": (10, 1.0)})
    assert len(str(progress.bar)) <= 60
    progress.bar.close()


def test_the_time_that_is_left_counts_from_the_first_step(monkeypatch):
    """A long evaluation before it says nothing of the pace."""
    clock = [0.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: clock[0])
    progress = Progress({"rl": (11, 1.0)})
    clock[0] = 1000.0
    progress.skip("rl", 0)
    clock[0] = 1006.0
    progress.step("rl")
    row = dict(step=1, seconds_rollout=5.0, seconds_update=1.0)
    assert progress.line("rl", "rl", row).endswith("1:00 left")


# --------------------------------------------------------------------- answers that nobody decided
def answered(words):
    sample = Sample("q", "What is it?", "a warm colour")
    return Trajectory(sample, answer=words, end_reason=EndReason.DONE, advantage=0.0)


def test_undecided_answers_and_failures_of_the_judge_are_metrics():
    group = [answered("a warm colour"), answered("some long waves"), answered("another thing")]
    down = Judge(NOWHERE, "m", timeout=1, retries=1)
    judged = Counter(score(group, judge=down))
    row = measure([group], [group], "rl", 1.0, judged)
    assert row["undecided"] == pytest.approx(2 / 3)
    assert row["judge_failures"] == 2
    assert row["accuracy"] == pytest.approx(1 / 3)
    row = measure([group], [group], "rl", 1.0)
    assert row["undecided"] == row["judge_failures"] == 0
    assert "undecided" not in measure([group], [group], "sft", 1.0)


def test_they_are_those_of_the_step_without_its_evaluation(tmp_path, monkeypatch):
    def nobody_knows(trajectories, *_):
        for t in trajectories:
            t.correct = False
        return {"undecided": len(trajectories), "judge_failures": 1}

    monkeypatch.setattr(train, "score", nobody_knows)
    tiny_policy(tmp_path / "tiny", ["What is it?"] * 20)
    sample = Sample("q", "What is it?", "red", images=(Image.new("RGB", (60, 60)),))
    settings = dict(model=str(tmp_path / "tiny"), steps=2, batch_size=1, group_size=2)
    limits = dict(max_new_tokens=4, max_context=900, eval_every=1, keep_zero_variance=True)
    some = config(tmp_path / "run", **settings, **limits)
    run = train.Run(some, [sample], held=[sample] * 5)
    (tmp_path / "run").mkdir()
    train.held_out(run)
    run.journal.begin()
    train.train(run)
    for row in run.rows:
        rollouts = 2 * row["groups_sampled"]
        assert row["undecided"] == 1 and rollouts >= 2
        assert row["judge_failures"] <= row["groups_sampled"]  # one a call of score


# ------------------------------------------------------------------------------------ the trackers
def test_a_tracker_gets_numbers_curves_and_what_a_trajectory_saw(tmp_path, monkeypatch):
    logged = []
    package = types.SimpleNamespace(
        init=lambda **settings: None,
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append("finished"),
        Image=lambda image: image,
    )
    monkeypatch.setitem(sys.modules, "trackio", package)
    some = config(tmp_path, tracker="trackio")
    journal = Journal(some, Progress({"rl": (9, 1.0)}), "rl", [])
    journal.begin()
    t = answered("red")
    t.images = [Image.new("RGB", (8, 8))] * (running.LOGGED + 1)
    for step in (1, 2):
        row = dict(step=step, seconds_rollout=1.0, seconds_update=1.0)
        row.update(trajectories_trained=1, updates_skipped=0)
        journal.log(row, [[t]], [[t]], pictures=step == 1)
    journal.end()
    (first, with_pictures), (second, numbers), end = logged
    assert (first, second, end) == (1, 2, "finished")
    assert "step" not in numbers  # it is not a number of the step
    assert numbers["seconds_rollout"] == 1.0 and numbers.keys() < with_pictures.keys()
    pictures = with_pictures.keys() - numbers.keys()
    assert pictures == {"curves", *[f"look_{number}" for number in range(running.LOGGED)]}
    assert with_pictures["curves"] == str(tmp_path / "curves.png")
    assert with_pictures["look_0"] is t.images[0]
