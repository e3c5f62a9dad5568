"""Accuracy against visual tokens on the video puzzles: `python tests/video_study.py` (--draw: of what is finished).

Three policies get the same budget: cold start on the same clips, the same number of reinforcement steps, prompts a step
and rollouts a prompt. One looks on demand; the others have uniform frames in the context and no tool, and their cold
start is lessons in seeing, then the right answers. All answer the same held-out puzzles. Runs go into --out; what is
finished is kept, and a run that was stopped goes on from its last checkpoint. Leaves docs/video.png and prints the
table, with what a perfect reader of the same frames could get: a flash of half a second can fall between two frames.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from evaluate import compare  # noqa: E402
from tasks.puzzles import COUNTS, puzzles, scenes  # noqa: E402

ARMS = {"on demand": "", "uniform, 8 frames": "8", "uniform, 1 fps": "1fps"}
COLUMNS = "accuracy", "95 % interval", "greedily", "visual tokens", "frames looked at", "seconds covered", "tool calls"


def call(*words):
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(args, arm):
    """Train one arm, then let it answer the held-out puzzles, sampled and greedily."""
    flags, folder = ["--task", "video", "--frames", ARMS[arm]], place(args, arm)
    if not (folder / f"step_{args.steps}").exists():
        call("train.py", *flags, "--seed", args.seed, "--steps", args.steps, "--out", folder, "--resume")
    for temperature in (1, 0):
        call("evaluate.py", *flags, "--model", folder / f"step_{args.steps}", "--n", args.n, "--max_turns", 5,
             "--temperature", temperature, "--out", folder / f"held_out_{temperature}")


def place(args, arm):
    return args.out / f"video_{ARMS[arm] or 'on_demand'}_seed{args.seed}"


def results(args):
    """{arm: [results.json of the sampled answers, of the greedy ones]} of the arms that are finished."""
    files = {arm: [place(args, arm) / f"held_out_{heat}" / "results.json" for heat in (1, 0)] for arm in ARMS}
    return {arm: [json.loads(file.read_text()) for file in pair] for arm, pair in files.items() if pair[1].exists()}


def ceiling(arm, n):
    """Percent of the held-out puzzles that a perfect reader of the arm's uniform frames would answer, at most: the
    colour where a frame shows it, else a guess; of flashes, the number that makes those it sees most likely."""
    right = []
    for _, scene, _, _ in scenes("video", n, 0, "heldout", "puzzle"):
        frames = scene.seconds if ARMS[arm] == "1fps" else int(ARMS[arm])
        times = (np.arange(frames) + 0.5) * scene.seconds / frames
        seen = [light for light in scene.lights if any(light[0] <= time < light[1] for time in times)]
        if scene.kind == "count":
            p = min(1.0, 0.5 * frames / scene.seconds)       # that a frame shows a flash
            likely = [math.comb(k, len(seen)) * p ** len(seen) * (1 - p) ** (k - len(seen)) for k in map(int, COUNTS)]
            right.append(COUNTS[int(np.argmax(likely))] == scene.answer)
        else:
            asked = [colour for begin, _, colour in seen if scene.kind != "second" or begin == scene.asked]
            right.append(1 if scene.answer in asked else 1 / 6)
    return 100 * np.mean(right)


def table(args, found):
    """Markdown: a row a method; accuracy by kind of question; what on demand gains on 1 fps, puzzle by puzzle."""
    kinds = np.array([sample.ability for sample in puzzles("video", args.n, 0, split="heldout")])
    lines = [f"| {args.n} held-out puzzles | " + " | ".join((*COLUMNS, *np.unique(kinds), "perfect reader")) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for arm, (sampled, greedy) in found.items():
        low, high = sampled["interval"]
        right = np.array(list(sampled["correct"].values()))
        cells = [f"{sampled['score']:.1f}", f"{low:.1f}–{high:.1f}", f"{greedy['score']:.1f}"]
        cells += [f"{sampled[name.replace(' ', '_')]:.1f}" for name in COLUMNS[3:]]
        cells += [f"{100 * right[kinds == kind].mean():.0f}" for kind in np.unique(kinds)]
        cells += [f"{ceiling(arm, args.n):.1f}" if ARMS[arm] else "100"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    if {"on demand", "uniform, 1 fps"} <= set(found):
        files = [place(args, arm) / "held_out_1" / "results.json" for arm in ("uniform, 1 fps", "on demand")]
        share = found["uniform, 1 fps"][0]["visual_tokens"] / found["on demand"][0]["visual_tokens"]
        lines += ["", f"1 fps puts {share:.1f} times as many visual tokens into the context as looking on demand.",
                  "A: 1 fps, B: on demand. " + compare(files).split(";")[0]]
    return "\n".join(lines)


def draw(args, found, path):
    """One point a method with its 95 % interval, a ring where a perfect reader of the same frames would be."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    _, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, (result, _) in found.items():
        error = np.abs(np.array(result["interval"])[:, None] - result["score"])
        points = axis.errorbar(result["visual_tokens"], result["score"], error, fmt="o", capsize=4)
        if ARMS[arm]:
            axis.plot(result["visual_tokens"], ceiling(arm, args.n), "o", mfc="none", color=points[0].get_color())
        axis.annotate(arm, (result["visual_tokens"], result["score"]), (8, 8), textcoords="offset points")
    if "uniform, 1 fps" in found:
        ninth = found["uniform, 1 fps"][0]["visual_tokens"] / 9
        axis.axvline(ninth, ls=":", color="grey", label="a ninth of the tokens of 1 fps")
    axis.plot([], [], "o", mfc="none", color="grey", label="at most, from the same frames")
    axis.legend(fontsize=8, loc="lower left")
    axis.set(xscale="log", ylim=(0, 100), xlabel="visual tokens a sample", ylabel="accuracy on held-out puzzles, %")
    axis.margins(x=0.35)
    axis.grid(alpha=0.3)
    plt.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="of reinforcement, for every arm")
    parser.add_argument("--n", type=int, default=256, help="held-out puzzles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs")
    parser.add_argument("--draw", action="store_true", help="no runs: what is finished in --out")
    args = parser.parse_args()
    for arm in () if args.draw else ARMS:
        run(args, arm)
    found = results(args)
    print(table(args, found))
    draw(args, found, ROOT / "docs" / "video.png")


if __name__ == "__main__":
    main()
