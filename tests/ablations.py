"""The paper's ablations on the built-in puzzles, over cold starts: `python tests/ablations.py`.

Every arm is a flag or two of train.py. The tiny policy's cold start decides much of what follows,
so the study has several, and several seeds of runs from each. The arms of a seed share cold start,
prompts and held-out puzzles: differences are taken in pairs, averaged over the seeds of a cold
start, and their interval is over cold starts. Runs go seed by seed, and those that are finished are
kept: a study that was stopped goes on, and what there is of it is balanced. The setting was fixed
on other cold starts; docs/ablations.md says how.

Leaves docs/ablations.json (every number) and, drawn from it, docs/ablations.md and .png. --quick
runs one seed of the first ablation from one cold start and leaves docs/ as it is.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
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
    "difficulty": '{"hint": 0.86}',
    "save_every": 0,
}
FIRST = 301  # seed of the first cold start; 100 to 105, 201 and 202 served to find the setting
GROUP = 8  # rollouts a prompt
BASE = "as in the paper"
ARMS = {
    BASE: [],
    "no tool reward": ["--tool_reward", "0"],
    "first call pays": ["--paid", "1"],
    "new code pays": ["--paid", "new"],
    "random groups": ["--rank", "random"],
    "no oversampling": ["--oversample", "1", "--max_oversample", "1", "--steps", "80"],
    "advantage / std": ["--normalize_std"],
    "two calls": ["--max_turns", "3"],
}
BEYOND = ["first call pays", "new code pays"]  # not in the paper
KEPT = [  # of metrics.jsonl, step by step; what an evaluation measured only once
    "accuracy",
    "tool_calls",
    "correct_negative_advantage",
    "repeated_calls",
    "empty_calls",
    "turn_limit",
    "format_errors",
    "response_tokens",
    "visual_tokens",
    "groups_sampled",
    "seconds_rollout",
    "seconds_update",
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


# What is measured of a run: {metric: its value in each step} -------------------------------------
def part(run: dict, name: str, share: float) -> float:
    """The mean of a metric over the first steps (share > 0) or the last (share < 0)."""
    values = run[name]
    n = round(len(values) * abs(share))
    return statistics.mean(values[:n] if share > 0 else values[-n:])


def at_the_end(name):
    """A measure: the mean of a metric over the last eighth of the steps."""
    return lambda run: part(run, name, -1 / 8)


def change(run: dict) -> float:
    """How the calls of a rollout change, from the first step to the end."""
    return part(run, "tool_calls", -1 / 8) - run["tool_calls"][0]


def fluctuation(run: dict) -> float:
    """The standard deviation of the change of accuracy from step to step."""
    values = run["accuracy"]
    changes = [after - before for before, after in zip(values, values[1:], strict=False)]
    return statistics.pstdev(changes)


def rollouts(run: dict) -> float:
    """How many rollouts were sampled in training."""
    return GROUP * sum(run["groups_sampled"])


def seconds_a_rollout(run: dict) -> float:
    """Seconds that sampling one rollout took at the end, of a whole batch at a time."""
    return part(run, "seconds_rollout", -1 / 8) / part(run, "groups_sampled", -1 / 8) / GROUP


MEASURES = {
    "held out, sampled": lambda run: run["eval_accuracy"][-1],
    "held out, greedy": lambda run: run["eval_accuracy_greedy"][-1],
    "early accuracy": lambda run: part(run, "accuracy", 1 / 3),
    "accuracy at the end": at_the_end("accuracy"),
    "fluctuation": fluctuation,
    "correct, A < 0": lambda run: statistics.mean(run["correct_negative_advantage"]),
    "tool calls": at_the_end("tool_calls"),
    "change of calls": change,
    "repeated calls": at_the_end("repeated_calls"),
}
COSTS = {
    "tokens written": at_the_end("response_tokens"),
    "visual tokens": at_the_end("visual_tokens"),
    "seconds a rollout": seconds_a_rollout,
    "rollouts": rollouts,
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
        "no oversampling",
        "early accuracy",
        -1,
        "oversampling and ranking help early, at equal rollouts",
    ),
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


def timed(words: list[str], folder: Path) -> None:
    """Run train.py; leave in `folder` how long it took, in seconds."""
    began = time.monotonic()
    train(words, folder.with_name(f"{folder.name}.log"))
    (folder / "seconds").write_text(f"{time.monotonic() - began:.0f}\n")


def home(out: Path, cold: int) -> Path:
    """The folder of a cold start and of the runs from it."""
    return out / f"cold{cold}"


def cold_start(out: Path, cold: int) -> Path:
    """The folder of the cold start, which train.py makes beside the run of a single step."""
    folder = home(out, cold)
    pattern = f"cold_start_*_seed{cold}"
    if not list(folder.glob(pattern)):
        print(f"cold start {cold}", flush=True)
        (folder / "start").mkdir(parents=True, exist_ok=True)
        one_step = {"steps": 1, "eval_every": 0, "save_every": 0}
        words = flags(out=folder / "start", seed=cold, difficulty=COLD_START, **one_step)
        timed(words, folder / "start")
    return next(folder.glob(pattern))


def place(out: Path, cold: int, seed: int, arm: str) -> Path:
    """The folder of a run."""
    name = arm.replace(" / ", "_by_").replace(" ", "_")
    return home(out, cold) / f"seed{seed}_{name}"


def rows_of(folder: Path) -> list[dict]:
    """A run's rows of metrics.jsonl, one a step: without step 0, the evaluation before them."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


def finished(folder: Path, arm: str) -> bool:
    words = [*flags(steps=SETTING["steps"]), *ARMS[arm]]
    last = len(words) - 1 - words[::-1].index("--steps")  # an arm may have steps of its own
    return len(rows_of(folder)) == int(words[last + 1])


def run_arm(out: Path, cold: int, seed: int, arm: str) -> None:
    """One run, if it is not there yet; one that was stopped on the way begins again."""
    folder = place(out, cold, seed, arm)
    if not finished(folder, arm):
        start = cold_start(out, cold)
        shutil.rmtree(folder, ignore_errors=True)
        words = flags(model=start, seed=seed, out=folder, **SETTING)
        timed([*words, *ARMS[arm]], folder)
    done = columns(folder)
    found = ", ".join(f"{name} {measure(done):.2f}" for name, measure in MEASURES.items())
    print(f"cold start {cold}, seed {seed}, {arm}: {found}", flush=True)


def run(colds, seeds, arms: list[str], out: Path, jobs: int) -> None:
    """The runs that are not there yet, `jobs` at a time; first of all the cold starts."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cold: cold_start(out, cold), colds))
        calls = []
        for seed in seeds:
            for cold in colds:
                calls += [pool.submit(run_arm, out, cold, seed, arm) for arm in arms]
        for call in calls:
            call.result()


def columns(folder: Path) -> dict:
    """A run's metrics, those that are kept: {name: values, step by step}."""
    rows = rows_of(folder)
    kept = {}
    for name in KEPT:
        kept[name] = [round(row[name], 4) for row in rows if name in row]
    return kept


def gather(out: Path, colds, seeds) -> dict:
    """{arm: {seed: {cold start: columns}}} of the seeds finished from every cold start."""
    runs = {}
    for arm in ARMS:
        for seed in seeds:
            folders = {str(cold): place(out, cold, seed, arm) for cold in colds}
            if all(finished(folder, arm) for folder in folders.values()):
                done = {cold: columns(folder) for cold, folder in folders.items()}
                runs.setdefault(arm, {})[str(seed)] = done
    return runs


def hours(out: Path) -> float:
    """How long all that is in `out` took."""
    return sum(int(file.read_text()) for file in out.glob("*/*/seconds")) / 3600


# What they say -----------------------------------------------------------------------------------
def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t)."""
    n = len(values)
    half = math.inf
    if n > 1:
        half = STUDENT.get(n, 2.0) * statistics.stdev(values) / math.sqrt(n)
    return statistics.mean(values), half


def by_cold_start(by_seed: dict, value) -> list[float]:
    """A number for each cold start: the mean over seeds of value(seed, cold start)."""
    found = {}
    for seed, by_cold in by_seed.items():
        for cold in by_cold:
            found.setdefault(cold, []).append(value(seed, cold))
    return [statistics.mean(values) for values in found.values()]


def values(runs: dict, arm: str, measure) -> list[float]:
    """A measure of an arm, a number for each cold start."""
    return by_cold_start(runs[arm], lambda seed, cold: measure(runs[arm][seed][cold]))


def differences(runs: dict, arm: str, measure) -> list[float]:
    """arm - base, in pairs of the same seed, a number for each cold start."""

    def difference(seed, cold):
        return measure(runs[arm][seed][cold]) - measure(runs[BASE][seed][cold])

    return by_cold_start(runs[arm], difference)


def line(cells) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def heading(cells) -> list[str]:
    """The first two lines of a table."""
    return [line(cells), "|---" * len(cells) + "|"]


def plus_minus(numbers: list[float], form: str = ".2f") -> str:
    """Mean ± half of the interval; of a single number just that."""
    middle, half = interval(numbers)
    if len(numbers) == 1:
        return f"{middle:{form}}"
    return f"{middle:{form}} ± {half:{form.strip('+')}}"


def measured(runs: dict, measures: dict, over: str = "cold starts × seeds") -> list[str]:
    """A table of what the runs measured: a row an arm."""
    lines = heading(["", over, *measures])
    for arm, by_seed in runs.items():
        colds = next(iter(by_seed.values()))
        cells = [arm, f"{len(colds)} × {len(by_seed)}"]
        for name, measure in measures.items():
            form = ".0f" if name in ("rollouts", "tokens written", "visual tokens") else ".2f"
            form = ".3f" if name == "seconds a rollout" else form
            cells.append(plus_minus(values(runs, arm, measure), form))
        lines.append(line(cells))
    return lines


def verdict(numbers: list[float], sign: int) -> str:
    """Does an expectation show in differences? Only where the interval leaves 0 out."""
    middle, half = interval(numbers)
    if abs(middle) <= half:
        return "not clear"
    return "shows" if middle * sign > 0 else "the opposite shows"


def judged(runs: dict) -> list[str]:
    """A table that says for each expectation of the paper whether it shows."""
    lines = heading(["expectation", "measure", "arm − paper's, in pairs", "here"])
    for expected in EXPECTED:
        if expected.arm not in runs:
            continue
        found = differences(runs, expected.arm, MEASURES[expected.measure])
        measure = f"{expected.arm}: {expected.measure}"
        seen = verdict(found, expected.sign)
        lines.append(line([expected.words, measure, plus_minus(found, "+.3f"), seen]))
    return lines


def compared(runs: dict) -> list[str]:
    """A table of the variants that the paper does not have, less the paper's setting."""
    names = ["held out, sampled", "held out, greedy", "tool calls", "repeated calls"]
    measures = {name: MEASURES[name] for name in names}
    measures.update({name: COSTS[name] for name in ("tokens written", "visual tokens")})
    lines = heading(["− the paper's, in pairs", *measures])
    for arm in BEYOND:
        if arm in runs:
            found = [differences(runs, arm, measure) for measure in measures.values()]
            lines.append(line([arm, *(plus_minus(numbers, "+.2f") for numbers in found)]))
    return lines


def start_by_start(runs: dict) -> list[str]:
    """A table with a row for each cold start: with and without the tool reward."""
    arms = [BASE, "no tool reward"]
    names = ["tool calls", "held out, sampled", "held out, greedy"]
    title = ["cold start", "calls at the start", *(f"{name}: with, without" for name in names)]
    lines = heading(title)
    first = values(runs, BASE, lambda run: run["tool_calls"][0])
    columns_ = []
    for name in names:
        with_it, without = (values(runs, arm, MEASURES[name]) for arm in arms)
        columns_.append([f"{a:.2f}, {b:.2f}" for a, b in zip(with_it, without, strict=True)])
    colds = next(iter(runs[BASE].values()))
    for row, cold in enumerate(colds):
        cells = [cold, f"{first[row]:.2f}", *(column[row] for column in columns_)]
        lines.append(line(cells))
    return lines


def tried(pilots: list[dict]) -> list[str]:
    """A table of the runs that the setting was fixed on: none is of the study's cold starts."""
    lines = heading(["hint", "cold start", "seed", "arm", "calls", "held out: sampled, greedily"])
    for pilot in pilots:
        run = pilot["run"]
        calls = f"{run['tool_calls'][0]:.1f} → {MEASURES['tool calls'](run):.1f}"
        held_out = [run.get(name) for name in ("eval_accuracy", "eval_accuracy_greedy")]
        shown = ", ".join(f"{values[-1]:.2f}" for values in held_out if values)
        cells = [f"{pilot['hint']:.2f}", pilot["cold"], pilot["seed"], pilot["arm"], calls, shown]
        lines.append(line(map(str, cells)))
    return lines


def tables(study: dict) -> str:
    """What the runs measured, and for each expectation of the paper whether it shows."""
    runs = study["runs"]
    colds = next(iter(runs[BASE].values()))
    title = f"Cold starts {', '.join(colds)}; mean ± half of the 95 % interval over cold starts."
    lines = [title, "", *measured(runs, MEASURES), "", *judged(runs)]
    lines += ["", "## Cold start by cold start", "", *start_by_start(runs)]
    lines += ["", "## What looks cost", "", *measured(runs, COSTS)]
    if any(arm in runs for arm in BEYOND):
        lines += ["", "## Beyond the paper: which calls are paid", "", *compared(runs)]
    if "pilots" in study:
        lines += ["", "## The runs that the setting was fixed on", "", *tried(study["pilots"])]
    if "earlier" in study:
        lines += ["", "## One cold start, five seeds: the study before", ""]
        lines += measured(study["earlier"], MEASURES, "seeds × runs of each")
        lines += ["", *judged(study["earlier"])]
    return "\n".join(lines) + "\n"


def died(runs: dict, arm: str) -> str:
    """In how many cold starts the calls end below half of where they began."""
    ends = values(runs, arm, MEASURES["tool calls"])
    starts = values(runs, arm, lambda run: run["tool_calls"][0])
    number = sum(end < start / 2 for start, end in zip(starts, ends, strict=True))
    return f"{number} of {len(ends)} cold starts"


def course(runs: dict, arm: str) -> str:
    """Calls a rollout, at the first step and at the end."""
    begin = statistics.mean(values(runs, arm, lambda run: run["tool_calls"][0]))
    end = statistics.mean(values(runs, arm, MEASURES["tool calls"]))
    return f"{begin:.1f} → {end:.1f}"


def less_base(runs: dict, arm: str, name: str, form: str = "+.2f") -> str:
    """A measure of an arm, less the paper's setting: mean ± half of the interval."""
    measure = MEASURES.get(name) or COSTS[name]
    return plus_minus(differences(runs, arm, measure), form)


def sentences(study: dict) -> list[str]:
    """What docs/ablations.md says of the runs, made from them: a test looks for each there."""
    runs = study["runs"]
    none = "no tool reward"
    said = [
        f"Without the tool reward the calls die in {died(runs, none)}, {course(runs, none)}",
        f"With it they die in {died(runs, BASE)}, {course(runs, BASE)}",
        f"held out, sampled, {less_base(runs, none, 'held out, sampled')} without it",
        f"greedily {less_base(runs, none, 'held out, greedy')}",
        f"{less_base(runs, none, 'tokens written', '+.0f')} tokens written",
        f"{less_base(runs, none, 'visual tokens', '+.0f')} visual tokens",
        f"{less_base(runs, none, 'seconds a rollout', '+.3f')} s a rollout",
    ]
    for arm in BEYOND:
        if arm in runs:
            said.append(f"calls {course(runs, arm)}, they die in {died(runs, arm)}")
            said.append(f"repeated {less_base(runs, arm, 'repeated calls')}")
            said.append(f"held out {less_base(runs, arm, 'held out, sampled')}")
    if "random groups" in runs:
        said.append(f"correct with A < 0 {less_base(runs, 'random groups', 'correct, A < 0')}")
    for arm in ("random groups", "no oversampling"):
        if arm in runs:
            said.append(f"early accuracy {less_base(runs, arm, 'early accuracy')}")
            said.append(f"at the end {less_base(runs, arm, 'held out, sampled')}")
    return said


def band(run_columns: list[list[float]]) -> list[tuple[float, float]]:
    """Step by step: mean and half of the interval over cold starts, of means of three steps."""
    smooth = []
    for column in run_columns:
        smooth.append([statistics.mean(column[max(0, i - 2) : i + 1]) for i in range(len(column))])
    return [interval(list(step)) for step in zip(*smooth, strict=True)]


def draw_band(axis, runs: dict, arm: str, name: str, colour: str) -> None:
    """A metric's mean over cold starts, of the first seed, against the rollouts sampled."""
    by_cold = next(iter(runs[arm].values()))
    bands = band([run[name] for run in by_cold.values()])
    total = statistics.mean(rollouts(run) for run in by_cold.values())
    places = [total * (step + 1) / len(bands) for step in range(len(bands))]
    low = [middle - half for middle, half in bands]
    high = [middle + half for middle, half in bands]
    axis.plot(places, [middle for middle, _ in bands], color=colour, label=arm)
    axis.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)


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
            draw_band(axis, runs, BASE, name, "tab:blue")
            draw_band(axis, runs, arm, name, "tab:orange")
            axis.set(ylim=(0, top), title=name.replace("_", " "), xlabel="rollouts sampled")
            axis.grid(alpha=0.3)
        axes[0, column].legend(fontsize=8, loc="lower right")
    plt.savefig(path, dpi=100)
    plt.close()


def write(study: dict) -> None:
    """docs/: the numbers, the tables above what was written by hand, the figure."""
    page = DOCS / "ablations.md"
    by_hand = page.read_text().partition(BY_HAND)[2] if page.exists() else "\n"
    head = "# The paper's ablations, on the puzzles\n\nWritten by `python tests/ablations.py`"
    head += f": {study['hours']:.1f} hours, all runs added up."
    page.write_text(f"{head}\n\n![](ablations.png)\n\n{tables(study)}{BY_HAND}{by_hand}")
    (DOCS / "ablations.json").write_text(json.dumps(study) + "\n")
    figure(study, DOCS / "ablations.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cold_starts", type=int, default=5, help=f"how many, from {FIRST}")
    parser.add_argument("--seeds", type=int, default=3, help="runs from each, from 0")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--quick", action="store_true", help="one run of two arms, not for docs/")
    parser.add_argument("--draw", action="store_true", help="no runs: what is finished in --out")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations")
    args = parser.parse_args()
    colds = range(FIRST, FIRST + (1 if args.quick else args.cold_starts))
    seeds = range(1 if args.quick else args.seeds)
    arms = list(ARMS)[:2] if args.quick else args.arms
    if not args.draw:
        run(colds, seeds, arms, args.out, args.jobs)
    study = {
        "cold_start": COLD_START,
        "setting": SETTING,
        "hours": round(hours(args.out), 2),
        "runs": gather(args.out, colds, seeds),
    }
    before = json.loads((DOCS / "ablations.json").read_text())
    for name in ("pilots", "earlier"):
        study[name] = before[name]
    print(tables(study))
    if not args.quick:
        write(study)


if __name__ == "__main__":
    main()
