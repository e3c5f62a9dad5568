"""The paper's four ablations on the built-in puzzles: `python tests/ablations.py --seeds 5` (or --quick).

Every arm is one flag of train.py. All begin from one cold start; the arms of a seed share prompts and held-out
puzzles, so differences are taken in pairs, seed by seed. Runs go seed by seed, and those that are finished are kept: a
study that was stopped goes on, and what there is of it is balanced. The setting was fixed before the seeds from 0 were
run; docs/ablations.md says how. Leaves docs/ablations.json (every number) and, drawn from it, docs/ablations.md and
.png.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

DOCS = ROOT / "docs"
COLD_START = '{"aim": 0.60, "looks": [0.35, 0.05, 0.10, 0.20, 0.30]}'   # --difficulty of its demonstrations
SETTING = {**train.LAPTOP, "difficulty": '{"hint": 0.90}', "steps": 40, "batch_size": 6, "eval_every": 40,
           "save_every": 0}
BASE = "as in the paper"
ARMS = {BASE: [], "no tool reward": ["--tool_reward", "0"], "random groups": ["--rank", "random"],
        "advantage / std": ["--normalize_std"], "two calls": ["--max_turns", "3"]}
KEPT = """accuracy tool_calls correct_negative_advantage repeated_calls empty_calls turn_limit format_errors
    eval_accuracy eval_accuracy_greedy eval_tool_calls""".split()   # of each row of metrics.jsonl
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %, by n
MEASURES = {                                                        # of one run: rows of metrics.jsonl -> number
    "held out, sampled": lambda rows: rows[-1]["eval_accuracy"],
    "held out, greedy": lambda rows: rows[-1]["eval_accuracy_greedy"],
    "early accuracy": lambda rows: mean(rows[:len(rows) // 3], "accuracy"),
    "fluctuation": lambda rows: statistics.pstdev(b["accuracy"] - a["accuracy"] for a, b in zip(rows, rows[1:])),
    "correct, A < 0": lambda rows: mean(rows, "correct_negative_advantage"),
    "tool calls": lambda rows: mean(rows[-5:], "tool_calls"),
    "change of calls": lambda rows: mean(rows[-5:], "tool_calls") - rows[0]["tool_calls"],
    "repeated calls": lambda rows: mean(rows[-5:], "repeated_calls"),
    "empty calls": lambda rows: mean(rows[-5:], "empty_calls"),
}
EXPECTED = [                                                        # arm, measure, sign of arm - base, in words
    ("no tool reward", "change of calls", -1, "without the tool reward calls fall, against a run with it"),
    ("no tool reward", "held out, sampled", -1, "without the tool reward accuracy ends lower"),
    ("random groups", "correct, A < 0", +1, "ranking by std lowers the share of correct trajectories with A < 0"),
    ("random groups", "early accuracy", -1, "ranking by std helps early"),
    ("advantage / std", "fluctuation", +1, "dividing by the std makes accuracy fluctuate more"),
    ("two calls", "held out, sampled", -1, "a larger turn budget ends higher"),
]
BY_HAND = "\n## What this says"                                   # from here on docs/ablations.md is kept


# ------------------------------------------------------------------------------------------------ the runs
def flags(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run(seeds, arms, out, jobs, cold_start=100):
    """The runs that are not there yet, `jobs` at a time; first of all the cold start."""
    def call(words, log):
        with open(log, "w") as file:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            if subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=file, stderr=file).returncode:
                sys.exit(f"a run failed: see {log}")

    def one(seed, arm):
        folder = place(out, seed, arm)
        if len(rows_of(folder)) < SETTING["steps"]:                 # absent, or stopped on the way
            shutil.rmtree(folder, ignore_errors=True)
            call(["train.py", *flags(model=start, seed=seed, out=folder, **SETTING), *ARMS[arm]], f"{folder}.log")
        print(f"seed {seed}, {arm}:", *(f"{m} {f(rows_of(folder)):.2f}," for m, f in MEASURES.items()), flush=True)

    out.mkdir(parents=True, exist_ok=True)
    made = f"cold_start_*_seed{cold_start}"
    if not list(out.glob(made)):
        print("cold start", flush=True)
        code = "import train; train.cold_start(train.configure())"
        call(["-c", code, *flags(out=out / "start", seed=cold_start, difficulty=COLD_START)], out / "cold_start.log")
    start = next(out.glob(made))
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(one, seed, arm) for seed in seeds for arm in arms]:
            done.result()


def place(out, seed, name):
    return out / f"seed{seed}_{name.replace(' ', '_').replace('_/_', '_by_')}"


def rows_of(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def gather(out, seeds, arms):
    """{arm: {seed: rows}} of the seeds that every arm has finished; of the rows what is kept."""
    done = [s for s in seeds if all(len(rows_of(place(out, s, a))) == SETTING["steps"] for a in arms)]
    return {a: {str(s): [{k: round(r[k], 4) for k in KEPT if k in r} for r in rows_of(place(out, s, a))] for s in done}
            for a in arms}


# ------------------------------------------------------------------------------------------------ what they say
def mean(rows, name):
    return statistics.mean(row[name] for row in rows)


def interval(values):
    """Mean and half of its 95 % interval (Student's t)."""
    n = len(values)
    half = STUDENT.get(n, 2.0) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return statistics.mean(values), half


def differences(runs, arm, measure):
    """arm - base, seed by seed."""
    return [MEASURES[measure](rows) - MEASURES[measure](runs[BASE][seed]) for seed, rows in runs[arm].items()]


def tables(study):
    """What the runs measured, and for each expectation of the paper whether it shows."""
    runs = study["runs"]
    lines = [f"Seeds {', '.join(runs[BASE])}; mean ± half of the 95 % interval over seeds.", "",
             "| | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for arm, by_seed in runs.items():
        cells = [interval([measure(rows) for rows in by_seed.values()]) for measure in MEASURES.values()]
        lines.append(f"| {arm} | " + " | ".join(f"{middle:.2f} ± {half:.2f}" for middle, half in cells) + " |")
    lines += ["", "| expectation | measure | arm − paper's, in pairs | here |", "|---|---|---|---|"]
    for arm, measure, sign, words in (row for row in EXPECTED if row[0] in runs):
        middle, half = interval(differences(runs, arm, measure))
        seen = "not clear" if abs(middle) <= half else "shows" if middle * sign > 0 else "the opposite shows"
        lines.append(f"| {words} | {arm}: {measure} | {middle:+.3f} ± {half:.3f} | {seen} |")
    return "\n".join(lines) + "\n"


def figure(study, path):
    """Top: accuracy in training, paper's and arm. Bottom: what the ablation is about. Bands: 95 % interval."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = study["runs"]
    arms = [arm for arm in runs if arm != BASE]
    _, axes = plt.subplots(2, len(arms), figsize=(3.4 * len(arms), 6), squeeze=False, layout="constrained")
    for column, arm in zip(axes.T, arms):
        below = "correct_negative_advantage" if arm == "random groups" else "tool_calls"
        for axis, name, top in zip(column, ("accuracy", below), (1, 4 if below == "tool_calls" else 0.5)):
            for label, colour in ((BASE, "tab:blue"), (arm, "tab:orange")):
                smooth = [[mean(rows[max(0, i - 2):i + 1], name) for i in range(len(rows))]
                          for rows in runs[label].values()]         # of three steps
                middle, half = zip(*map(interval, zip(*smooth)))
                steps, ends = range(1, len(middle) + 1), [(m - h, m + h) for m, h in zip(middle, half)]
                axis.plot(steps, middle, color=colour, label=label)
                axis.fill_between(steps, *zip(*ends), color=colour, alpha=0.15, lw=0)
            axis.set(ylim=(0, top), title=name.replace("_", " "), xlabel="step")
            axis.grid(alpha=0.3)
        column[0].legend(fontsize=8, loc="lower right")
    plt.savefig(path, dpi=100)
    plt.close()


def write(study):
    """docs/: the numbers, the tables above what was written by hand, the figure."""
    page = DOCS / "ablations.md"
    by_hand = page.read_text().partition(BY_HAND)[2] if page.exists() else "\n"
    head = "# The paper's ablations, on the puzzles\n\nWritten by `python tests/ablations.py`."
    page.write_text(f"{head}\n\n![](ablations.png)\n\n" + tables(study) + BY_HAND + by_hand)
    (DOCS / "ablations.json").write_text(json.dumps(study) + "\n")
    figure(study, DOCS / "ablations.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--quick", action="store_true", help="two seeds of the first ablation; docs/ stays as it is")
    parser.add_argument("--draw", action="store_true", help="no runs: tables and figure of what is finished in --out")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--cold_start", type=int, default=100, help="its seed")
    args = parser.parse_args()
    seeds, arms = (range(2), list(ARMS)[:2]) if args.quick else (range(args.seeds), list(ARMS))
    if not args.draw:
        run(seeds, arms, args.out, args.jobs, args.cold_start)
    study = dict(cold_start=COLD_START, setting=SETTING, runs=gather(args.out, seeds, arms))
    print(tables(study))
    if not args.quick:
        write(study)


if __name__ == "__main__":
    main()
