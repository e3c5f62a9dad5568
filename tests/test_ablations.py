"""The studies' own code and documents.

tests/ablations.py keeps, pairs and judges its runs rightly; what it and tests/lesson.py wrote into
docs/ is still what the code says.
"""

import json
import re
import subprocess
from types import SimpleNamespace

import ablations
import lesson
import pytest

import train
from engine.flags import parse_flags


def made_up_row(step, arm, seed):
    """A row of metrics.jsonl: arms differ by 0.1 times their number, seeds by much more."""
    value = 0.1 * list(ablations.ARMS).index(arm) + seed / 4
    row = dict.fromkeys(ablations.KEPT, value)
    return {**row, "step": step, "tool_calls": 2 - value * step / 40}


def arm_of(config):
    """The arm that a run's folder is named after."""
    folder = ablations.Path(config.out)
    for arm in ablations.ARMS:
        if ablations.place(folder.parent, config.seed, arm) == folder:
            return arm
    raise AssertionError(f"{folder} is of no arm")


def leave_what_a_run_leaves(config, words):
    """The rows of an arm's run, after an evaluation at step 0; the folder of a cold start."""
    folder = ablations.Path(config.out)
    if folder.name == "start":
        folder.with_name(f"cold_start_image_seed{config.seed}").mkdir()
        return
    arm = arm_of(config)
    own = ablations.ARMS[arm]
    assert words[len(words) - len(own) :] == own
    rows = [{"step": 0, "eval_accuracy": 0.5}]
    rows += [made_up_row(step, arm, config.seed) for step in range(1, config.steps + 1)]
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def fake_runs(monkeypatch):
    """Stands in for train.py: writes made-up metrics. -> the settings, run by run."""
    seen = []

    def call(command, cwd, env, stdout, stderr):
        _, script, *words = command
        assert script == "train.py"
        config = parse_flags(train.Config, words)  # every flag exists
        leave_what_a_run_leaves(config, words)
        seen.append(config)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", call)
    return seen


def test_runs_share_one_cold_start(fake_runs, tmp_path):
    arms = list(ablations.ARMS)
    ablations.run(range(2), arms, tmp_path, jobs=1)
    start, *runs = fake_runs
    assert len(runs) == 2 * len(arms)
    models = {config.model for config in runs}
    assert models == {str(tmp_path / f"cold_start_image_seed{start.seed}")}
    assert start.seed not in {config.seed for config in runs}
    assert start.difficulty == ablations.COLD_START
    assert {config.difficulty for config in runs} == {ablations.SETTING["difficulty"]}


def test_a_study_that_was_stopped_goes_on(fake_runs, tmp_path):
    arms = list(ablations.ARMS)
    ablations.run(range(2), arms, tmp_path, jobs=1)
    file = tmp_path / "seed1_two_calls" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]))  # as if it had been killed
    done = ablations.gather(tmp_path, range(2), arms)
    for by_seed in done.values():
        assert list(by_seed) == ["0"]  # only what every arm has finished
    fake_runs.clear()
    ablations.run(range(2), arms, tmp_path, jobs=1)
    (again,) = fake_runs  # that one, and no other
    assert (again.seed, again.max_turns) == (1, 3)
    done = ablations.gather(tmp_path, range(2), arms)
    for by_seed in done.values():
        assert list(by_seed) == ["0", "1"]
        assert len(by_seed["1"]) == ablations.SETTING["steps"]


def test_arms_are_compared_seed_by_seed(fake_runs, tmp_path):
    """The arms' difference is the same for each seed, however far apart the seeds are."""
    arms = list(ablations.ARMS)
    ablations.run(range(2), arms, tmp_path, jobs=1)
    runs = ablations.gather(tmp_path, range(2), arms)
    found = ablations.differences(runs, "random groups", "held out, sampled")
    assert found == pytest.approx([0.2, 0.2])
    table = ablations.tables({"runs": runs})
    assert "random groups: correct, A < 0 | +0.200 ± 0.000 | shows |" in table
    assert "two calls: held out, sampled | +0.400 ± 0.000 | the opposite shows |" in table


def test_a_run_that_fails_ends_the_study(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="cold_start.log"):
        ablations.run(range(1), [ablations.BASE], tmp_path, jobs=1)


def test_intervals():
    middle, half = ablations.interval([1.0, 2.0, 3.0])
    assert middle == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # t(2) * s / sqrt(n), s = 1


def test_the_documents_show_what_was_measured():
    study = json.loads((ablations.DOCS / "ablations.json").read_text())
    page = (ablations.DOCS / "ablations.md").read_text()
    assert ablations.tables(study) in page, "python tests/ablations.py --draw"
    assert study["setting"] == ablations.SETTING
    assert list(study["runs"]) == list(ablations.ARMS)


def test_the_setting_is_that_of_the_laptop():
    """What the study leaves as it is in the default run has not moved away from it."""
    changed = {"steps", "batch_size", "eval_every", "save_every", "difficulty"}
    for name, value in ablations.SETTING.items():
        if name not in changed:
            assert getattr(train.LAPTOP, name) == value, name


# The lesson --------------------------------------------------------------------------------------
NUMBER = re.compile(r"[+-]?\d+\.\d+(?:e-?\d+)?")


def test_the_lesson_is_true():
    """Words and whole numbers are the same, decimals nearly: another machine rounds otherwise."""
    said = (ablations.DOCS / "lesson.md").read_text()
    now = lesson.lesson()
    assert NUMBER.sub("x", said) == NUMBER.sub("x", now), "python tests/lesson.py writes it again"
    said_numbers = [float(number) for number in NUMBER.findall(said)]
    numbers = [float(number) for number in NUMBER.findall(now)]
    assert said_numbers == pytest.approx(numbers, rel=0.05, abs=0.002)
    by_hand = re.search(r"/ \d+ = (-?[\d.]+)", now)[1]
    reported = re.search(r"reports loss (-?[\d.]+)", now)[1]
    assert by_hand == reported
