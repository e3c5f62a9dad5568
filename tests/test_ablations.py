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


def row(step, arm, seed):
    """A made-up row of metrics.jsonl: arms differ by 0.1 times their number, seeds by much more."""
    value = 0.1 * list(ablations.ARMS).index(arm) + seed / 4
    return {"step": step, **dict.fromkeys(ablations.KEPT, value), "tool_calls": 2 - value * step / 40}


@pytest.fixture
def fake_runs(monkeypatch):
    """Stands in for train.py: notes the command, writes made-up metrics; -> the commands."""
    commands, steps = [], int(ablations.SETTING["steps"])

    def call(words, cwd, env, stdout, stderr):
        commands.append(words)
        flags = dict(zip(words, words[1:]))
        config = train.parse_flags(train.Config, words[words.index("--task"):])             # every flag exists
        if "-c" not in words:
            arm = next(name for name, extra in ablations.ARMS.items() if ablations.command(
                flags["--out"], config.seed, extra) == words)
            folder = ablations.Path(flags["--out"])
            folder.mkdir()
            folder.joinpath("metrics.jsonl").write_text(
                "".join(json.dumps(row(step, arm, config.seed)) + "\n" for step in range(1, steps + 1)))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", call)
    return commands


def test_runs_are_shared_kept_and_paired(fake_runs, tmp_path, capsys):
    arms = list(ablations.ARMS)
    ablations.run(range(2), arms, tmp_path, jobs=1)
    runs = [words for words in fake_runs if "-c" not in words]
    assert len(runs) == 2 * len(arms) and len(fake_runs) == len(runs) + 2           # one cold start a seed
    assert len({ablations.Path(words[words.index("--out") + 1]).parent for words in runs}) == 1    # where it is found
    (tmp_path / "seed1_two_calls" / "metrics.jsonl").write_text("")                 # as if it had been killed
    done = ablations.gather(tmp_path, range(2), arms)
    assert all(list(by_seed) == ["0"] for by_seed in done.values())                 # only what every arm has finished
    (tmp_path / "seed1_two_calls" / "metrics.jsonl").unlink()
    (tmp_path / "seed1_two_calls").rmdir()
    fake_runs.clear()
    ablations.run(range(2), arms, tmp_path, jobs=1)
    assert [words[-1] for words in fake_runs if "-c" not in words] == ["3"]         # that one, and no other
    done = ablations.gather(tmp_path, range(2), arms)
    # the arms' difference is the same for each seed, however far apart the seeds are
    assert ablations.differences(done, "random groups", "held out, sampled") == pytest.approx([0.2, 0.2])
    assert "random groups: correct, A < 0 | +0.200 ± 0.000 | shows |" in ablations.tables(dict(runs=done))
    assert "two calls: held out, sampled | +0.400 ± 0.000 | the opposite shows |" in ablations.tables(dict(runs=done))


def test_intervals():
    mean, half = ablations.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)          # t(2) * s / sqrt(n), s = 1


NUMBER = re.compile(r"[+-]?\d+\.\d+(?:e-?\d+)?")


def test_the_lesson_is_true():
    """Words and whole numbers are the same, decimals nearly: another machine rounds otherwise."""
    said, now = (ablations.DOCS / "lesson.md").read_text(), lesson.lesson()
    assert NUMBER.sub("x", said) == NUMBER.sub("x", now), "python tests/lesson.py writes it again"
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (said, now)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.002)
    ratio, reported = (float(re.search(pattern, now)[1]) for pattern in (r"/ \d+ = (-?[\d.]+)", r"reports loss (-?[\d.]+)"))
    assert ratio == reported                                                        # by hand and by `update`


def test_log_probs_that_disagree_are_warned_of(tmp_path):
    said = []
    run = SimpleNamespace(rank=1, out=tmp_path)
    for gap in (0.009, 0.011):
        train.Run.log(run, {"logprob_gap": gap}, [], SimpleNamespace(write=said.append))
    assert len(said) == 1 and "0.011" in said[0]
