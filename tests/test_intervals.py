"""Confidence intervals: that of a mean, whole questions drawn, two results compared in pairs."""

import json
import re

import numpy as np
import pytest

from data import DataError, Sample
from engine.intervals import DRAWS, bootstrap, compare, interval
from tasks.benchmarks import BENCHMARKS, PLAIN, Row


def width(found):
    low, high = interval(found["score"])
    return high - low


def test_intervals_are_those_of_the_mean():
    samples = [Sample(str(i), "?", "a", data_source="ab"[i % 2]) for i in range(200)]
    scores = [[float(i % 4 < 2) for i in range(200)]]
    found = bootstrap(PLAIN.summary, samples, scores)
    low, high = interval(found["score"])
    expected = 2 * 1.96 * 100 * (0.25 / 200) ** 0.5
    assert found["score"].shape == (1 + DRAWS,)
    assert found["score"][0] == 50
    assert low < 50 < high
    assert abs(width(found) - expected) < 1.5
    assert found["scores"]["a"][0] == 50


def test_repeats_that_all_agree_are_no_more_evidence_than_one():
    samples = [Sample(str(i), "?", "a") for i in range(200)]
    scores = [[float(i % 2) for i in range(200)]]
    once = bootstrap(PLAIN.summary, samples, scores)
    four_times = bootstrap(PLAIN.summary, samples, scores * 4)
    assert abs(width(once) - width(four_times)) < 1


def test_a_part_of_which_some_resamples_hold_nothing_has_an_interval():
    samples = [Sample(str(i), "?", "a", data_source="ab"[i % 2]) for i in range(5)]
    found = bootstrap(PLAIN.summary, samples, [[1, 1, 1, 1, 1]])
    assert np.isnan(found["scores"]["b"]).any()  # else this test shows nothing
    assert interval(found["scores"]["b"]) == [100, 100]


def test_the_same_seed_gives_the_same_draws():
    samples = [Sample(str(i), "?", "a") for i in range(20)]
    scores = np.random.default_rng(0).integers(0, 2, (2, 20))
    first, again, other = [bootstrap(PLAIN.summary, samples, scores, seed) for seed in (0, 0, 1)]
    assert (first["score"] == again["score"]).all()
    assert (first["score"] != other["score"]).any()


FORMS = 3  # rows that are one question
META = {
    "dynamath": lambda question, form: {"subject": "x", "level": 1},
    "hrbench-4k": lambda question, form: {"category": "single", "cycle_category": form},
    "wemath": lambda question, form: {
        "ID": str(question),
        "key": "2steps_" + ("1", "2", "multi")[form],
        "step": ("S1", "S1", "S2")[form],
    },
}


@pytest.mark.parametrize("name", META)
def test_rows_that_are_one_question_are_drawn_together(name):
    rows = []
    for question in range(40):
        for form in range(FORMS):
            meta = META[name](question, form)
            rows.append(Row(f"{question}-{form}", "?", "a", meta=meta, unit=str(question)))
    right = [float(place // FORMS < 20) for place in range(len(rows))]
    found = bootstrap(BENCHMARKS[name].summary, rows, [right])
    assert found["score"][0] == 50
    assert 25 < width(found) < 36  # of 40 questions; of 120 rows it would be 18
    if name == "dynamath":  # in each draw, in which questions come twice
        assert (found["scores"]["average"] == found["score"]).all()
        assert np.allclose(found["scores"]["worst case"], found["score"])


# --------------------------------------------------------------------------- two results in pairs
def result(path, right):
    """A results.json of samples that were answered so."""
    samples = [Sample(str(i), "?", "a") for i in range(len(right))]
    draws = bootstrap(PLAIN.summary, samples, [right])["score"]
    found = dict(score=draws[0], draws=draws[1:].tolist())
    found["correct"] = dict(zip(map(str, range(len(right))), right, strict=True))
    path.write_text(json.dumps(found))
    return path


def difference(text):
    return [float(x) for x in re.search(r"(\S+) points.*\[(\S+), (\S+)\]", text).groups()]


def test_a_difference_in_pairs_is_far_surer_than_two_intervals(tmp_path):
    right = [float(i % 2) for i in range(200)]
    better = [1.0] * 10 + right[10:]  # 5 of them are news
    a = result(tmp_path / "a.json", right)
    b = result(tmp_path / "b.json", better)
    shown = compare((a, b))
    points, low, high = difference(shown)
    assert points == 2.5
    assert 0 < low < 2.5 < high < 6
    assert re.findall(r"(\d+): A 0, B 1", shown) == ["0", "2", "4", "6", "8"]
    assert difference(compare((b, a)))[0] == -2.5


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"correct": {}}', '{"correct": {"0": 1}, "score": 1}', None]
)
def test_what_is_no_pair_of_results_is_named(tmp_path, text):
    good = result(tmp_path / "good.json", [1.0, 0.0])
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    for files in ((str(good), str(bad)), (str(bad), str(good)), (str(bad),), (str(bad),) * 2):
        with pytest.raises(DataError, match="bad.json"):
            compare(files)


def test_results_of_other_samples_are_not_compared(tmp_path):
    files = [result(tmp_path / "a.json", [1.0, 0.0]), result(tmp_path / "b.json", [1.0])]
    with pytest.raises(DataError, match="b.json is of other samples"):
        compare(tuple(map(str, files)))
