"""The study of the ablations keeps, pairs and judges its runs rightly, and the documents that it and the lesson leave
are still what the code says."""
import json
import re
import subprocess
from types import SimpleNamespace

import pytest

import ablations
import lesson
import train
from data import Sample
from rollout import Trajectory, Turn


def row(step, arm, seed):
    """A made-up row of metrics.jsonl: arms differ by 0.1 times their number, seeds by much more."""
    value = 0.1 * list(ablations.ARMS).index(arm) + seed / 4
    return {"step": step, **dict.fromkeys(ablations.KEPT, value), "tool_calls": 2 - value * step / 40}


@pytest.fixture
def fake_runs(monkeypatch):
    """Stands in for train.py: notes the runs' flags and writes made-up metrics; -> the flags, run by run."""
    seen = []

    def call(words, cwd, env, stdout, stderr):
        given = words[3:] if "-c" in words else words[2:]
        config = train.parse_flags(train.Config, given)                             # every flag exists
        folder = ablations.Path(config.out)
        if "-c" in words:
            folder.with_name(f"cold_start_image_seed{config.seed}").mkdir()
        else:
            arm = next(arm for arm in ablations.ARMS if ablations.place(folder.parent, config.seed, arm) == folder)
            assert given[len(given) - len(ablations.ARMS[arm]):] == ablations.ARMS[arm]
            folder.mkdir(exist_ok=True)
            rows = [row(step, arm, config.seed) for step in range(1, config.steps + 1)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        seen.append(config)
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", call)
    return seen


def test_runs_are_shared_kept_and_paired(fake_runs, tmp_path):
    arms = list(ablations.ARMS)
    ablations.run(range(2), arms, tmp_path, jobs=1)
    start, *runs = fake_runs
    assert len(runs) == 2 * len(arms)
    assert {r.model for r in runs} == {str(tmp_path / f"cold_start_image_seed{start.seed}")}
    assert start.seed not in {r.seed for r in runs} and len({r.difficulty for r in runs}) == 1
    file = tmp_path / "seed1_two_calls" / "metrics.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:3]))                   # as if it had been killed
    done = ablations.gather(tmp_path, range(2), arms)
    assert all(list(by_seed) == ["0"] for by_seed in done.values())                 # only what every arm has finished
    fake_runs.clear()
    ablations.run(range(2), arms, tmp_path, jobs=1)
    assert [(r.seed, r.max_turns) for r in fake_runs] == [(1, 3)]                   # that one, and no other
    done = ablations.gather(tmp_path, range(2), arms)
    # the arms' difference is the same for each seed, however far apart the seeds are
    assert ablations.differences(done, "random groups", "held out, sampled") == pytest.approx([0.2, 0.2])
    assert "random groups: correct, A < 0 | +0.200 ± 0.000 | shows |" in ablations.tables(dict(runs=done))
    assert "two calls: held out, sampled | +0.400 ± 0.000 | the opposite shows |" in ablations.tables(dict(runs=done))


def test_intervals():
    mean, half = ablations.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)          # t(2) * s / sqrt(n), s = 1


def test_the_documents_show_what_was_measured():
    study = json.loads((ablations.DOCS / "ablations.json").read_text())
    assert ablations.tables(study) in (ablations.DOCS / "ablations.md").read_text(), "python tests/ablations.py --draw"
    assert study["setting"] == ablations.SETTING and list(study["runs"]) == list(ablations.ARMS)


NUMBER = re.compile(r"[+-]?\d+\.\d+(?:e-?\d+)?")


def test_the_lesson_is_true():
    """Words and whole numbers are the same, decimals nearly: another machine rounds otherwise."""
    said, now = (ablations.DOCS / "lesson.md").read_text(), lesson.lesson()
    assert NUMBER.sub("x", said) == NUMBER.sub("x", now), "python tests/lesson.py writes it again"
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (said, now)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.002)
    by_hand, reported = (re.search(words + r" (-?[\d.]+)", now)[1] for words in (r"/ \d+ =", "reports loss"))
    assert by_hand == reported


def test_calls_that_only_earn_the_reward_are_counted():
    """The same crop twice, a call without output; code in the last turn never ran and is no call."""
    look, still, last = Turn("", "look", images=["crop"]), Turn("", "still"), Turn("", "still")
    ran = {3: [look, look, still, last], 1: [look, Turn()]}
    group = [Trajectory(Sample("0", "?", "a"), turns=turns, n_tool_calls=calls) for calls, turns in ran.items()]
    row = train.measure(SimpleNamespace(step=1, limits={"stats": {}}), [group], [], (0.0, 1.0, 2.0))
    assert (row["tool_calls"], row["repeated_calls"], row["empty_calls"]) == (2.0, 0.5, 0.5)


def test_log_probs_that_disagree_are_warned_of(tmp_path):
    said = []
    run = SimpleNamespace(rows=[], rank=0, out=tmp_path, logger=None, step=1, config=SimpleNamespace(batch_size=0, steps=9))
    bar = SimpleNamespace(update=lambda: None, write=said.append)
    for gap in (0.009, 0.011):
        train.log(run, dict(logprob_gap=gap, trajectories_trained=1, updates_skipped=0), [], [], bar)
    assert [text for text in said if "warning" in text and "0.011" in text] == said[-1:] and len(said) == 3
