"""Accuracy against visual tokens on the video puzzles: `python tests/video_study.py`.

Three policies get the same budget: cold start on the same clips, the same number of reinforcement
steps, prompts a step and rollouts a prompt. One looks on demand. The others have uniform frames in
the context and no tool, and their cold start is lessons in seeing, then the right answers. All
answer the same held-out puzzles.

Runs go into --out. What is finished is kept, and a run that was stopped goes on from its last
checkpoint. Leaves docs/video.png and prints the table, with what a perfect reader of the same
frames could get: a flash of half a second can fall between two frames.
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

ON_DEMAND = "on demand"
ONE_FPS = "uniform, 1 fps"
ARMS = {ON_DEMAND: "", "uniform, 8 frames": "8", ONE_FPS: "1fps"}  # --frames
MEANS = [  # of results.json
    "visual tokens",
    "frames looked at",
    "seconds covered",
    "tool calls",
]
FLASH = 0.5  # seconds


# The runs ----------------------------------------------------------------------------------------
def call(*words) -> None:
    """Run one of our scripts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(str(word) for word in words)]
    subprocess.run(command, cwd=ROOT, check=True, env=environment)


def place(args, arm: str) -> Path:
    """The folder of an arm's run."""
    return args.out / f"video_{ARMS[arm] or 'on_demand'}_seed{args.seed}"


def train(args, arm: str) -> None:
    """Train an arm, or go on with its training."""
    folder = place(args, arm)
    flags = ["--task", "video", "--frames", ARMS[arm], "--out", folder]
    flags += ["--seed", args.seed, "--steps", args.steps]
    if list(folder.glob("state/step_*.pt")):
        flags.append("--resume")
    call("train.py", *flags)


def answer(args, arm: str, temperature: int) -> None:
    """Let a trained arm answer the held-out puzzles."""
    folder = place(args, arm)
    flags = ["--task", "video", "--frames", ARMS[arm], "--out", answers(args, arm, temperature)]
    flags += ["--model", folder / f"step_{args.steps}", "--questions", args.n, "--max_turns", 5]
    call("evaluate.py", *flags, "--temperature", temperature)


def answers(args, arm: str, temperature: int) -> Path:
    """The folder of an arm's answers: sampled at temperature 1, greedy at 0."""
    return place(args, arm) / f"held_out_{temperature}"


def run(args, arm: str) -> None:
    """Train one arm, then let it answer the held-out puzzles, sampled and greedily."""
    if not (place(args, arm) / f"step_{args.steps}").exists():
        train(args, arm)
    answer(args, arm, 1)
    answer(args, arm, 0)


def results(args) -> dict:
    """{arm: results.json of (the sampled answers, the greedy ones)} of what is finished."""
    found = {}
    for arm in ARMS:
        files = [answers(args, arm, temperature) / "results.json" for temperature in (1, 0)]
        if files[1].exists():
            found[arm] = [json.loads(file.read_text()) for file in files]
    return found


# What they say -----------------------------------------------------------------------------------
def likeliest_count(seen: int, chance: float) -> str:
    """The number of flashes that makes it most likely that `seen` are, each with this chance."""
    likely = []
    for count in map(int, COUNTS):
        ways = math.comb(count, seen)
        likely.append(ways * chance**seen * (1 - chance) ** (count - seen))
    return COUNTS[int(np.argmax(likely))]


def readable(scene, frames: int) -> float:
    """Probability that a perfect reader of uniform frames answers one puzzle rightly.

    It knows the colour where a frame shows it, and guesses where none does; of flashes it says the
    number that makes those it sees most likely.
    """
    times = (np.arange(frames) + 0.5) * scene.seconds / frames
    seen = []
    for light in scene.lights:
        begin, end, _ = light
        if any(begin <= time < end for time in times):
            seen.append(light)
    if scene.kind == "count":
        chance = min(1.0, FLASH * frames / scene.seconds)  # that a frame shows a flash
        return float(likeliest_count(len(seen), chance) == scene.answer)
    if scene.kind == "second":
        seen = [light for light in seen if light[0] == scene.asked]
    colours = [colour for *_, colour in seen]
    return 1.0 if scene.answer in colours else 1 / 6


def ceiling(arm: str, n: int) -> float:
    """Percent of the held-out puzzles that a perfect reader of the arm's frames would get."""
    right = []
    for _, scene, _, _ in scenes("video", n, 0, "heldout", "puzzle"):
        frames = scene.seconds if arm == ONE_FPS else int(ARMS[arm])
        right.append(readable(scene, frames))
    return 100 * float(np.mean(right))


def line(cells) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def table(args, found: dict) -> str:
    """Markdown: a row a method, with accuracy by kind of question."""
    samples = puzzles("video", args.n, 0, split="heldout")
    kind_of = np.array([sample.ability for sample in samples])
    kinds = np.unique(kind_of)
    title = [f"{args.n} held-out puzzles", "accuracy", "95 % interval", "greedily", *MEANS]
    title += [*kinds, "perfect reader"]
    lines = [line(title), "|---" * len(title) + "|"]
    for arm, (sampled, greedy) in found.items():
        low, high = sampled["interval"]
        right = np.array(list(sampled["correct"].values()))
        cells = [arm, f"{sampled['score']:.1f}", f"{low:.1f}–{high:.1f}", f"{greedy['score']:.1f}"]
        cells += [f"{sampled[name.replace(' ', '_')]:.1f}" for name in MEANS]
        cells += [f"{100 * right[kind_of == kind].mean():.0f}" for kind in kinds]
        cells.append(f"{ceiling(arm, args.n):.1f}" if ARMS[arm] else "100")
        lines.append(line(cells))
    if ON_DEMAND in found and ONE_FPS in found:
        lines += ["", *gain(args, found)]
    return "\n".join(lines)


def gain(args, found: dict) -> list[str]:
    """What looking on demand gains on 1 fps, in tokens and puzzle by puzzle."""
    sampled = {arm: found[arm][0] for arm in (ONE_FPS, ON_DEMAND)}
    share = sampled[ONE_FPS]["visual_tokens"] / sampled[ON_DEMAND]["visual_tokens"]
    difference = compare([answers(args, arm, 1) / "results.json" for arm in sampled])
    more = f"1 fps puts {share:.1f} times as many visual tokens into the context"
    return [
        f"{more} as looking on demand.",
        f"A: 1 fps, B: on demand. {difference.split(';')[0]}",
    ]


def draw(args, found: dict, path: Path) -> None:
    """A point a method in its 95 % interval; a ring where a perfect reader of its frames is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, (result, _) in found.items():
        tokens = result["visual_tokens"]
        score = result["score"]
        error = np.abs(np.array(result["interval"])[:, None] - score)
        points = axis.errorbar(tokens, score, error, fmt="o", capsize=4)
        if ARMS[arm]:
            colour = points[0].get_color()
            axis.plot(tokens, ceiling(arm, args.n), "o", mfc="none", color=colour)
        axis.annotate(arm, (tokens, score), (8, 8), textcoords="offset points")
    if ONE_FPS in found:
        ninth = found[ONE_FPS][0]["visual_tokens"] / 9
        axis.axvline(ninth, ls=":", color="grey", label="a ninth of the tokens of 1 fps")
    axis.plot([], [], "o", mfc="none", color="grey", label="at most, from the same frames")
    axis.legend(fontsize=8, loc="lower left")
    axis.set(xscale="log", ylim=(0, 100))
    axis.set(xlabel="visual tokens a sample", ylabel="accuracy on held-out puzzles, %")
    axis.margins(x=0.35)
    axis.grid(alpha=0.3)
    plt.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="of reinforcement, for every arm")
    parser.add_argument("--n", type=int, default=256, help="held-out puzzles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs")
    parser.add_argument("--draw", action="store_true", help="no runs: what is finished in --out")
    args = parser.parse_args()
    if not args.draw:
        for arm in ARMS:
            run(args, arm)
    found = results(args)
    print(table(args, found))
    draw(args, found, ROOT / "docs" / "video.png")


if __name__ == "__main__":
    main()
