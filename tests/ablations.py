"""The paper's four ablations on the built-in puzzles: `python tests/ablations.py --seeds 5` (or --quick).

Every arm is one flag of train.py. All arms of a seed share cold start, prompts and held-out puzzles, so differences are
taken in pairs, seed by seed. Runs go seed by seed into --out, and those that are finished are kept: a study that was
stopped goes on, and what is finished is balanced. Accuracy in training is that of rollouts on prompts never seen before.
The setting was chosen on seeds 100 and 101, looking at the tool reward alone, and fixed before the seeds from 0 were run:
docs/ablations.md says what was tried. Leaves docs/ablations.json (every number), .md and .png, the latter two drawn
from the first.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SETTING = {"difficulty": '{"aim": 0.47, "looks": [0.35, 0.05, 0.10, 0.20, 0.30]}', "steps": "40", "batch_size": "6",
           "eval_every": "20", "save_every": "0"}
BASE = "all as in the paper"
ARMS = {BASE: [], "no tool reward": ["--tool_reward", "0"], "random groups": ["--rank", "random"],
        "advantage / std": ["--normalize_std"], "two calls": ["--max_turns", "3"]}
KEPT = ("accuracy tool_calls correct_negative_advantage repeated_calls empty_calls turn_limit format_errors eval_accuracy "
        "eval_accuracy_greedy eval_tool_calls").split()        # of each row of metrics.jsonl
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}   # 97.5 % quantile, by n


def late(name):
    return lambda rows: statistics.mean(row[name] for row in rows[-5:])


MEASURES = {                                                    # of one run: its rows of metrics.jsonl -> number
    "held out, sampled": lambda rows: rows[-1]["eval_accuracy"],
    "held out, greedy": lambda rows: rows[-1]["eval_accuracy_greedy"],
    "early accuracy": lambda rows: statistics.mean(row["accuracy"] for row in rows[:len(rows) // 3]),
    "fluctuation": lambda rows: statistics.pstdev(b["accuracy"] - a["accuracy"] for a, b in zip(rows, rows[1:])),
    "correct, A < 0": lambda rows: statistics.mean(row["correct_negative_advantage"] for row in rows),
    "tool calls": late("tool_calls"),
    "change of calls": lambda rows: late("tool_calls")(rows) - rows[0]["tool_calls"],
    "repeated calls": late("repeated_calls"),
    "empty calls": late("empty_calls"),
}
EXPECTED = [                                                    # arm, measure, sign of arm - base, the paper's words
    ("no tool reward", "change of calls", -1, "without the tool reward calls fall, with it they hold or grow"),
    ("no tool reward", "held out, sampled", -1, "without the tool reward accuracy ends lower"),
    ("random groups", "correct, A < 0", +1, "ranking by std lowers the share of correct trajectories with A < 0"),
    ("random groups", "early accuracy", -1, "ranking by std helps early"),
    ("advantage / std", "fluctuation", +1, "dividing by the std makes accuracy fluctuate more"),
    ("two calls", "held out, sampled", -1, "a larger turn budget ends higher"),
]


# ------------------------------------------------------------------------------------------------ the runs
def command(out, seed, flags, code=("train.py",)):
    setting = [word for name, value in SETTING.items() for word in (f"--{name}", value)]
    return [sys.executable, *code, "--task", "image", "--seed", str(seed), "--out", str(out), *setting, *flags]


def run(seeds, arms, out, jobs):
    """Cold starts and runs that are not there yet, `jobs` at a time, seed by seed."""
    def call(folder, words):
        with open(out / f"{folder.name}.log", "w") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            if subprocess.run(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT).returncode:
                sys.exit(f"{folder.name} failed: see {log.name}")

    def start(seed):
        folder, code = out / f"cold_start_seed{seed}", "import train; train.cold_start(train.configure())"
        call(folder, command(folder, seed, [], ("-c", code)))   # returns at once where it exists

    def arm(seed, name, begun):
        begun.result()
        folder = place(out, seed, name)
        if len(rows_of(folder)) < int(SETTING["steps"]):
            call(folder, command(folder, seed, ARMS[name]))
        print(f"seed {seed}, {name}: " + ", ".join(f"{m} {f(rows_of(folder)):.2f}" for m, f in MEASURES.items()), flush=True)

    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        starts, runs = {}, []
        for seed in seeds:
            for ahead in (seed, seed + 1):                      # the next seed's cold start beside this seed's runs
                if ahead in seeds and ahead not in starts:
                    starts[ahead] = pool.submit(start, ahead)
            runs += [pool.submit(arm, seed, name, starts[seed]) for name in arms]
        for future in runs:
            future.result()


def place(out, seed, name):
    return out / f"seed{seed}_{'_'.join(filter(str.isalpha, name.replace(',', '').split()))}"


def rows_of(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def gather(out, seeds, arms):
    """{arm: {seed: rows}} of the seeds that every arm has finished; rows keep what is drawn."""
    done = [s for s in seeds if all(len(rows_of(place(out, s, a))) == int(SETTING["steps"]) for a in arms)]
    return {a: {str(s): [{k: round(r[k], 4) for k in KEPT if k in r} for r in rows_of(place(out, s, a))] for s in done}
            for a in arms}


# ------------------------------------------------------------------------------------------------ what they say
def interval(values):
    """Mean and half of the 95 % interval of Student's t."""
    spread = STUDENT.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.mean(values), spread


def differences(runs, arm, measure):
    """arm - base, seed by seed."""
    f = MEASURES[measure]
    return [f(runs[arm][seed]) - f(runs[BASE][seed]) for seed in runs[BASE]]


def verdict(runs, arm, measure, sign):
    mean, half = interval(differences(runs, arm, measure))
    word = "not clear from these seeds" if abs(mean) <= half else "shows" if mean * sign > 0 else "the opposite shows"
    return f"{mean:+.3f} ± {half:.3f}", word


def tables(study):
    """docs/ablations.md but for its last part, which is written by hand."""
    runs = study["runs"]
    seeds = list(runs[BASE])
    lines = [f"{len(seeds)} seeds ({', '.join(seeds)}), {len(runs[BASE][seeds[0]])} steps. Mean ± half of the 95 % interval over seeds.", "",
             "| | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for arm in runs:
        cells = [interval([f(rows) for rows in runs[arm].values()]) for f in MEASURES.values()]
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.2f} ± {half:.2f}" for mean, half in cells) + " |")
    lines += ["", "| the paper's expectation | measure | arm − base, in pairs | here |", "|---|---|---|---|"]
    for arm, measure, sign, words in EXPECTED:
        if arm in runs:
            lines.append(f"| {words} | {arm}: {measure} | " + " | ".join(verdict(runs, arm, measure, sign)) + " |")
    return "\n".join(lines) + "\n"


def figure(study, path):
    """Top: accuracy in training, of base and arm. Bottom: what the ablation is about. Bands: 95 % interval over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = study["runs"]
    arms = [arm for arm in runs if arm != BASE]
    below = {"random groups": "correct_negative_advantage"}
    _, axes = plt.subplots(2, len(arms), figsize=(3.6 * len(arms), 6), squeeze=False, sharex=True, layout="constrained")
    for column, arm in enumerate(arms):
        for axis, name in zip(axes[:, column], ("accuracy", below.get(arm, "tool_calls"))):
            for label, colour in ((BASE, "tab:blue"), (arm, "tab:orange")):
                curves = [[statistics.mean(row[name] for row in rows[max(0, i - 2):i + 1]) for i in range(len(rows))]
                          for rows in runs[label].values()]     # a mean of three steps
                steps, points = range(1, len(curves[0]) + 1), [interval(values) for values in zip(*curves)]
                axis.plot(steps, [mean for mean, _ in points], color=colour, label=label)
                axis.fill_between(steps, *zip(*((m - h, m + h) for m, h in points)), color=colour, alpha=0.15, lw=0)
            axis.set(ylim=(0, 1 if name == "accuracy" else 4 if name == "tool_calls" else None), title=name.replace("_", " "))
            axis.grid(alpha=0.3)
        axes[0, column].legend(fontsize=8, loc="lower right")
        axes[1, column].set_xlabel("step")
    plt.savefig(path, dpi=100)
    plt.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--quick", action="store_true", help="two seeds of the first ablation, nothing written to docs/")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--draw", action="store_true", help="no runs: what is finished in --out")
    args = parser.parse_args()
    seeds, arms = (range(2), list(ARMS)[:2]) if args.quick else (range(args.seeds), list(ARMS))
    if not args.draw:
        run(seeds, arms, args.out, args.jobs)
    study = dict(setting=SETTING, runs=gather(args.out, seeds, arms))
    print(tables(study))
    if not args.quick:
        write(study)


def write(study, folder=DOCS):
    (folder / "ablations.json").write_text(json.dumps(study) + "\n")
    figure(study, folder / "ablations.png")


if __name__ == "__main__":
    main()
