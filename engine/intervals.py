"""How sure a score is: confidence intervals, by drawing the questions of an evaluation again.

What a reader may rely on: the same samples and seed give the same draws. So two results of the same
samples can be compared in pairs, which is far more exact than comparing their intervals.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import DataError, Sample

DRAWS = 1000


def bootstrap(summary: Callable, samples: list[Sample], scores, seed: int = 0) -> dict:
    """scores (k, n) in 0..1 -> {"score": percents (1 + D,), "scores": {name: percents (1 + D,)}}.

    First comes what `summary` (of tasks/benchmarks.py) makes of the k repeats, on average; then
    what it makes of D resamples of the questions. A question's repeats are drawn together, and so
    are rows that are one question in several forms.
    """
    rng = np.random.default_rng(seed)
    units = [getattr(sample, "unit", place) for place, sample in enumerate(samples)]
    names, unit = np.unique(units, return_inverse=True)
    size = len(names)
    drawn = rng.multinomial(size, np.full(size, 1 / size), DRAWS)  # (D, units)
    weights = np.vstack([np.ones(size), drawn])[:, unit]  # (1 + D, n)
    found = [summary(samples, np.array(repeat), weights) for repeat in scores]
    parts = {}
    for name in found[0]["scores"]:
        parts[name] = np.mean([one["scores"][name] for one in found], 0)
    return {"score": np.mean([one["score"] for one in found], 0), "scores": parts}


def interval(draws) -> list[float]:
    """95 % of the resamples, but for those (nan) in which there was nothing to count."""
    bounds = np.nanpercentile(draws[1:], [2.5, 97.5])
    return np.nan_to_num(bounds).round(2).tolist()


def compare(files: tuple) -> str:
    """Two results.json -> their paired difference with its 95 % interval, and where they differ.

    Raises DataError.
    """
    if len(files) != 2:
        raise DataError(f"--compare takes two results.json, not {' '.join(files) or 'none':.150}")
    a, b = [read_result(file) for file in files]
    if list(a["correct"]) != list(b["correct"]):
        raise DataError(f"--compare: {str(files[1])[-150:]} is of other samples than the first one")
    drawn = b["draws"] - a["draws"]  # both drew the same questions
    low, high = interval(drawn)
    shown = [
        f"B - A: {drawn[0]:+.1f} points, 95 % interval [{low:+.1f}, {high:+.1f}]; "
        f"{len(a['correct'])} samples, different:"
    ]
    for name, right in a["correct"].items():
        other = b["correct"][name]
        if right != other:
            shown.append(f"  {name}: A {right:g}, B {other:g}")
    return "\n".join(shown)


def read_result(file: str) -> dict:
    """correct: {sample: score}, and draws (1 + D,) of a results.json. Raises DataError."""
    try:
        found = json.loads(Path(file).read_text("utf-8"))
        draws = np.array([found["score"], *found["draws"]], dtype=float)
        correct = {name: float(right) for name, right in found["correct"].items()}
        if len(draws) != 1 + DRAWS:
            raise ValueError(f"{len(draws) - 1} draws, not {DRAWS}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"--compare {str(file)[-150:]}: not the results.json of an evaluation ({error!r:.60})"
        ) from None
    return dict(correct=correct, draws=draws)
