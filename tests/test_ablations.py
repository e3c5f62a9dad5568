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


def made_up_row(step, steps, arm, cold, seed):
    """A row of metrics.jsonl: arms differ by 0.1 times their number, cold starts by much more."""
    value = 0.1 * list(ablations.ARMS).index(arm) + cold / 4 + seed / 8
    row = dict.fromkeys(ablations.KEPT, value)
    return {**row, "step": step, "tool_calls": 2 - value * step / steps, "groups_sampled": 12}


def run_of(config):
    """The arm and the cold start that a run's folder is named after."""
    folder = ablations.Path(config.out)
    cold = int(folder.parent.name.removeprefix("cold"))
    for arm in ablations.ARMS:
        if ablations.place(folder.parents[1], cold, config.seed, arm) == folder:
            return arm, cold
    raise AssertionError(f"{folder} is of no arm")


def leave_what_a_run_leaves(config, words):
    """The rows of an arm's run, after an evaluation at step 0; the folder of a cold start."""
    folder = ablations.Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == "start":
        folder.with_name(f"cold_start_image_seed{config.seed}").mkdir()
        return
    arm, cold = run_of(config)
    own = ablations.ARMS[arm]
    assert words[len(words) - len(own) :] == own
    rows = [{"step": 0, "eval_accuracy": 0.5}]
    for step in range(1, config.steps + 1):
        rows.append(made_up_row(step, config.steps, arm, cold, config.seed))
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


ARMS = [ablations.BASE, "no tool reward", "two calls"]
COLDS = (1, 2)


def test_the_runs_of_a_cold_start_share_it(fake_runs, tmp_path):
    ablations.run(COLDS, range(2), ARMS, tmp_path, jobs=1)
    starts = fake_runs[: len(COLDS)]
    runs = fake_runs[len(COLDS) :]
    assert [start.seed for start in starts] == list(COLDS)
    assert {start.difficulty for start in starts} == {ablations.COLD_START}
    assert len(runs) == len(COLDS) * 2 * len(ARMS)
    for config in runs:
        _, cold = run_of(config)
        folder = ablations.home(tmp_path, cold) / f"cold_start_image_seed{cold}"
        assert config.model == str(folder)
        assert config.difficulty == ablations.SETTING["difficulty"]


def test_the_arms_sample_as_many_rollouts(fake_runs, tmp_path):
    """Without oversampling a step samples half, so that there are twice as many steps."""
    ablations.run(COLDS[:1], range(1), list(ablations.ARMS), tmp_path, jobs=1)
    sampled = set()
    for config in fake_runs[1:]:
        sampled.add(config.steps * config.batch_size * config.oversample * config.group_size)
    assert len(sampled) == 1
    assert fake_runs[1].group_size == ablations.GROUP


def test_a_study_that_was_stopped_goes_on(fake_runs, tmp_path):
    ablations.run(COLDS, range(2), ARMS, tmp_path, jobs=1)
    file = ablations.place(tmp_path, 2, 1, "two calls") / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]))  # as if it had been killed
    done = ablations.gather(tmp_path, COLDS, range(2))
    assert list(done["two calls"]) == ["0"]  # only what is finished from every cold start
    assert list(done[ablations.BASE]) == ["0", "1"]
    fake_runs.clear()
    ablations.run(COLDS, range(2), ARMS, tmp_path, jobs=1)
    (again,) = fake_runs  # that one, and no other
    assert (again.seed, again.max_turns) == (1, 3)
    done = ablations.gather(tmp_path, COLDS, range(2))
    for by_seed in done.values():
        assert list(by_seed) == ["0", "1"]


def test_arms_are_compared_pair_by_pair(fake_runs, tmp_path):
    """The arms' difference is the same for each cold start, however far apart these are."""
    ablations.run(COLDS, range(1), [*ARMS, "random groups"], tmp_path, jobs=1)
    runs = ablations.gather(tmp_path, COLDS, range(1))
    found = ablations.differences(runs, "random groups", ablations.MEASURES["held out, sampled"])
    assert found == pytest.approx([0.4, 0.4])
    table = ablations.tables({"runs": runs})
    assert "random groups: correct, A < 0 | +0.400 ± 0.000 | shows |" in table
    assert "two calls: held out, sampled | +0.700 ± 0.000 | the opposite shows |" in table


def test_an_interval_is_over_cold_starts(fake_runs, tmp_path):
    """Its values are means over seeds, one for each cold start; pairs are of one seed."""
    ablations.run(COLDS, range(2), ARMS, tmp_path, jobs=1)
    runs = ablations.gather(tmp_path, COLDS, range(2))
    sampled = ablations.MEASURES["held out, sampled"]
    found = ablations.values(runs, ablations.BASE, sampled)
    assert found == pytest.approx([cold / 4 + 1 / 16 for cold in COLDS], abs=1e-3)
    del runs["no tool reward"]["1"]
    found = ablations.differences(runs, "no tool reward", sampled)
    assert found == pytest.approx([0.1, 0.1])


def test_the_time_of_all_runs_is_told(fake_runs, tmp_path):
    ablations.run(COLDS, range(1), ARMS[:2], tmp_path, jobs=1)
    files = list(tmp_path.glob("*/*/seconds"))
    assert len(files) == len(COLDS) * 3  # with each cold start
    for file in files:
        file.write_text("1200\n")
    assert ablations.hours(tmp_path) == pytest.approx(2)


def test_a_run_that_fails_ends_the_study(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="start.log"):
        ablations.run(COLDS, range(1), [ablations.BASE], tmp_path, jobs=1)


def test_intervals():
    middle, half = ablations.interval([1.0, 2.0, 3.0])
    assert middle == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # t(2) * s / sqrt(n), s = 1


def test_nothing_shows_where_the_interval_holds_zero():
    assert ablations.verdict([1.0, 1.1, 0.9], +1) == "shows"
    assert ablations.verdict([1.0, 1.1, 0.9], -1) == "the opposite shows"
    assert ablations.verdict([1.0, -1.1, 0.9], +1) == "not clear"
    assert ablations.verdict([1.0], +1) == "not clear"  # one cold start says nothing


# The documents -----------------------------------------------------------------------------------
PAGE = (ablations.DOCS / "ablations.md").read_text()
README = (ablations.ROOT / "README.md").read_text()
STUDY = json.loads((ablations.DOCS / "ablations.json").read_text())
DECIMAL = re.compile(r"\d+\.\d+")


def test_the_documents_show_what_was_measured():
    assert ablations.tables(STUDY) in PAGE, "python tests/ablations.py --draw"
    assert STUDY["setting"] == ablations.SETTING
    assert set(STUDY["runs"]) <= set(ablations.ARMS)


def test_what_is_said_of_the_study_is_what_was_measured():
    """Every sentence with a number from the runs is made from them, and stands on the page."""
    said = " ".join(PAGE.partition(ablations.BY_HAND)[2].split())
    for sentence in ablations.sentences(STUDY):
        assert sentence in said, sentence


def test_the_readme_says_no_number_that_the_page_does_not():
    section = README.partition("## What the paper's ablations show here")[2].partition("\n## ")[0]
    numbers = set(DECIMAL.findall(section))
    assert numbers
    assert numbers <= set(DECIMAL.findall(PAGE))


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
