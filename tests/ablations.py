"""The paper's four ablations on the built-in puzzles: `python tests/ablations.py --seeds 5`.

Every arm is one flag of train.py. All begin from one cold start. The arms of a seed share prompts
and held-out puzzles, so differences are taken in pairs, seed by seed. Runs go seed by seed, and
those that are finished are kept: a study that was stopped goes on, and what there is of it is
balanced. The setting was fixed before the seeds from 0 were run; docs/ablations.md says how.

Leaves docs/ablations.json (every number) and, drawn from it, docs/ablations.md and .png. --quick
runs two seeds of the first ablation and leaves docs/ as it is.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BY_HAND = "\n## What this says"  # from here on docs/ablations.md is kept

# --difficulty of the cold start's demonstrations, and the settings of all runs
COLD_START = '{"aim": 0.60, "looks": [0.35, 0.05, 0.10, 0.20, 0.30]}'
SETTING = {
    "steps": 40,
    "batch_size": 6,
    "max_new_tokens": 96,
    "max_context": 2048,
    "lr": 1.5e-4,
    "warmup": 4,
    "timeout": 10.0,
    "tokens_per_microbatch": 2048,
    "eval_every": 40,
    "difficulty": '{"hint": 0.90}',
    "save_every": 0,
}
BASE = "as in the paper"
ARMS = {
    BASE: [],
    "no tool reward": ["--tool_reward", "0"],
    "random groups": ["--rank", "random"],
    "advantage / std": ["--normalize_std"],
    "two calls": ["--max_turns", "3"],
}
KEPT = [  # of each row of metrics.jsonl
    "accuracy",
    "tool_calls",
    "correct_negative_advantage",
    "repeated_calls",
    "empty_calls",
    "turn_limit",
    "format_errors",
    "eval_accuracy",
    "eval_accuracy_greedy",
    "eval_tool_calls",
]
STUDENT = {  # number of values: 97.5 % quantile of Student's t
    2: 12.71,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}


def mean(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def at_the_end(name):
    """A measure: the mean of a metric over the last five steps."""
    return lambda rows: mean(rows[-5:], name)


def fluctuation(rows: list[dict]) -> float:
    """The standard deviation of the change of accuracy from step to step."""
    values = [row["accuracy"] for row in rows]
    changes = [after - before for before, after in zip(values, values[1:], strict=False)]
    return statistics.pstdev(changes)


MEASURES = {  # of one run: rows of metrics.jsonl -> number
    "held out, sampled": lambda rows: rows[-1]["eval_accuracy"],
    "held out, greedy": lambda rows: rows[-1]["eval_accuracy_greedy"],
    "early accuracy": lambda rows: mean(rows[: len(rows) // 3], "accuracy"),
    "fluctuation": fluctuation,
    "correct, A < 0": lambda rows: mean(rows, "correct_negative_advantage"),
    "tool calls": at_the_end("tool_calls"),
    "change of calls": lambda rows: mean(rows[-5:], "tool_calls") - rows[0]["tool_calls"],
    "repeated calls": at_the_end("repeated_calls"),
    "empty calls": at_the_end("empty_calls"),
}


class Expectation(NamedTuple):
    """What the paper says of an arm."""

    arm: str
    measure: str
    sign: int  # of arm - base
    words: str


EXPECTED = [
    Expectation(
        "no tool reward",
        "change of calls",
        -1,
        "without the tool reward calls fall, against a run with it",
    ),
    Expectation(
        "no tool reward",
        "held out, sampled",
        -1,
        "without the tool reward accuracy ends lower",
    ),
    Expectation(
        "random groups",
        "correct, A < 0",
        +1,
        "ranking by std lowers the share of correct trajectories with A < 0",
    ),
    Expectation("random groups", "early accuracy", -1, "ranking by std helps early"),
    Expectation(
        "advantage / std",
        "fluctuation",
        +1,
        "dividing by the std makes accuracy fluctuate more",
    ),
    Expectation("two calls", "held out, sampled", -1, "a larger turn budget ends higher"),
]


# The runs ----------------------------------------------------------------------------------------
def flags(**settings) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    return words


def train(words: list[str], log: Path) -> None:
    """Run train.py with these flags; end the study if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        done = subprocess.run(
            [sys.executable, "train.py", *words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
        )
    if done.returncode:
        sys.exit(f"a run failed: see {log}")


def cold_start(out: Path, seed: int) -> Path:
    """The folder of the cold start, which train.py makes beside the run of a single step."""
    pattern = f"cold_start_*_seed{seed}"
    if not list(out.glob(pattern)):
        print("cold start", flush=True)
        one_step = {"steps": 1, "eval_every": 0, "save_every": 0}
        words = flags(out=out / "start", seed=seed, difficulty=COLD_START, **one_step)
        train(words, out / "cold_start.log")
    return next(out.glob(pattern))


def place(out: Path, seed: int, arm: str) -> Path:
    """The folder of a run."""
    name = arm.replace(" / ", "_by_").replace(" ", "_")
    return out / f"seed{seed}_{name}"


def rows_of(folder: Path) -> list[dict]:
    """A run's rows of metrics.jsonl, one a step: without step 0, the evaluation before them."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


def finished(folder: Path) -> bool:
    return len(rows_of(folder)) == SETTING["steps"]


def run_arm(out: Path, start: Path, seed: int, arm: str) -> None:
    """One run, if it is not there yet; one that was stopped on the way begins again."""
    folder = place(out, seed, arm)
    if not finished(folder):
        shutil.rmtree(folder, ignore_errors=True)
        words = flags(model=start, seed=seed, out=folder, **SETTING)
        train([*words, *ARMS[arm]], folder.with_name(f"{folder.name}.log"))
    rows = rows_of(folder)
    found = ", ".join(f"{name} {measure(rows):.2f}" for name, measure in MEASURES.items())
    print(f"seed {seed}, {arm}: {found}", flush=True)


def run(seeds, arms: list[str], out: Path, jobs: int, cold_start_seed: int = 100) -> None:
    """The runs that are not there yet, `jobs` at a time; first of all the cold start."""
    out.mkdir(parents=True, exist_ok=True)
    start = cold_start(out, cold_start_seed)
    with ThreadPoolExecutor(jobs) as pool:
        calls = []
        for seed in seeds:
            calls += [pool.submit(run_arm, out, start, seed, arm) for arm in arms]
        for call in calls:
            call.result()


def kept(row: dict) -> dict:
    return {name: round(row[name], 4) for name in KEPT if name in row}


def gather(out: Path, seeds, arms: list[str]) -> dict:
    """{arm: {seed: rows}} of the seeds that every arm has finished; of the rows what is kept."""
    done = [seed for seed in seeds if all(finished(place(out, seed, arm)) for arm in arms)]
    runs = {}
    for arm in arms:
        runs[arm] = {}
        for seed in done:
            rows = rows_of(place(out, seed, arm))
            runs[arm][str(seed)] = [kept(row) for row in rows]
    return runs


# What they say -----------------------------------------------------------------------------------
def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t)."""
    n = len(values)
    half = math.inf
    if n > 1:
        half = STUDENT.get(n, 2.0) * statistics.stdev(values) / math.sqrt(n)
    return statistics.mean(values), half


def differences(runs: dict, arm: str, measure: str) -> list[float]:
    """arm - base, seed by seed."""
    value = MEASURES[measure]
    return [value(rows) - value(runs[BASE][seed]) for seed, rows in runs[arm].items()]


def line(cells) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def measured(runs: dict) -> list[str]:
    """A table of what the runs measured: a row an arm."""
    lines = [f"| | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
    for arm, by_seed in runs.items():
        cells = [arm]
        for measure in MEASURES.values():
            middle, half = interval([measure(rows) for rows in by_seed.values()])
            cells.append(f"{middle:.2f} ± {half:.2f}")
        lines.append(line(cells))
    return lines


def judged(runs: dict) -> list[str]:
    """A table that says for each expectation of the paper whether it shows."""
    lines = ["| expectation | measure | arm − paper's, in pairs | here |", "|---|---|---|---|"]
    for expected in EXPECTED:
        if expected.arm not in runs:
            continue
        middle, half = interval(differences(runs, expected.arm, expected.measure))
        if abs(middle) <= half:
            seen = "not clear"
        else:
            seen = "shows" if middle * expected.sign > 0 else "the opposite shows"
        measure = f"{expected.arm}: {expected.measure}"
        lines.append(line([expected.words, measure, f"{middle:+.3f} ± {half:.3f}", seen]))
    return lines


def tables(study: dict) -> str:
    """What the runs measured, and for each expectation of the paper whether it shows."""
    runs = study["runs"]
    title = f"Seeds {', '.join(runs[BASE])}; mean ± half of the 95 % interval over seeds."
    return "\n".join([title, "", *measured(runs), "", *judged(runs)]) + "\n"


def smooth(rows: list[dict], name: str) -> list[float]:
    """A metric step by step, as the mean of three steps."""
    return [mean(rows[max(0, step - 2) : step + 1], name) for step in range(len(rows))]


def draw_band(axis, by_seed: dict, name: str, label: str, colour: str) -> None:
    """A metric's mean over seeds, step by step, in its 95 % interval."""
    curves = [smooth(rows, name) for rows in by_seed.values()]
    bands = [interval(list(values)) for values in zip(*curves, strict=True)]
    steps = range(1, len(bands) + 1)
    low = [middle - half for middle, half in bands]
    high = [middle + half for middle, half in bands]
    axis.plot(steps, [middle for middle, _ in bands], color=colour, label=label)
    axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)


def figure(study: dict, path: Path) -> None:
    """Top: accuracy in training, the paper's and the arm's. Bottom: what the ablation is about."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = study["runs"]
    arms = [arm for arm in runs if arm != BASE]
    size = (3.4 * len(arms), 6)
    _, axes = plt.subplots(2, len(arms), figsize=size, squeeze=False, layout="constrained")
    for column, arm in enumerate(arms):
        below = ("tool_calls", 4)
        if arm == "random groups":
            below = ("correct_negative_advantage", 0.5)
        for axis, (name, top) in zip(axes[:, column], [("accuracy", 1), below], strict=True):
            draw_band(axis, runs[BASE], name, BASE, "tab:blue")
            draw_band(axis, runs[arm], name, arm, "tab:orange")
            axis.set(ylim=(0, top), title=name.replace("_", " "), xlabel="step")
            axis.grid(alpha=0.3)
        axes[0, column].legend(fontsize=8, loc="lower right")
    plt.savefig(path, dpi=100)
    plt.close()


def write(study: dict) -> None:
    """docs/: the numbers, the tables above what was written by hand, the figure."""
    page = DOCS / "ablations.md"
    by_hand = page.read_text().partition(BY_HAND)[2] if page.exists() else "\n"
    head = "# The paper's ablations, on the puzzles\n\nWritten by `python tests/ablations.py`."
    page.write_text(f"{head}\n\n![](ablations.png)\n\n{tables(study)}{BY_HAND}{by_hand}")
    (DOCS / "ablations.json").write_text(json.dumps(study) + "\n")
    figure(study, DOCS / "ablations.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--quick", action="store_true", help="two seeds of the first ablation")
    parser.add_argument("--draw", action="store_true", help="no runs: what is finished in --out")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--cold_start", type=int, default=100, help="its seed")
    args = parser.parse_args()
    seeds = range(2 if args.quick else args.seeds)
    arms = list(ARMS)[:2] if args.quick else list(ARMS)
    if not args.draw:
        run(seeds, arms, args.out, args.jobs, args.cold_start)
    runs = gather(args.out, seeds, arms)
    study = {"cold_start": COLD_START, "setting": SETTING, "runs": runs}
    print(tables(study))
    if not args.quick:
        write(study)


if __name__ == "__main__":
    main()
