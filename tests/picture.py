"""docs/first.png, the README's first picture: where a policy looked before and after training.

`python tests/picture.py --run runs/image` takes a finished run of the image puzzles. The cold start
that it began from and its newest step answer the first held-out puzzles several times each. Drawn
is the puzzle on which most rollouts became right. The boxes are the crops that their code showed;
beside them is the run's accuracy on all held-out puzzles.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from data import DataError  # noqa: E402
from engine.batching import flat  # noqa: E402
from engine.fast import FastPolicy  # noqa: E402
from engine.report import crops  # noqa: E402
from engine.run import earlier, one_line_errors  # noqa: E402
from model import load_policy  # noqa: E402
from reward import score  # noqa: E402
from rollout import rollout  # noqa: E402
from tasks.puzzles import puzzles, read_difficulty  # noqa: E402
from train import Config  # noqa: E402

PUZZLES = 16  # of which one is drawn
ROLLOUTS = 16  # of each
SHOWN = 4  # crops that are shown enlarged
INK = "#1f2933"
FAINT = "#7b8794"
BEFORE = "#c2571a"
AFTER = "#1f6fb2"


@dataclass
class Looks:
    """How a policy answered one puzzle, time and again."""

    right: int
    calls: float  # tool calls a rollout
    boxes: list  # ((left, upper, right, lower), how often), the most frequent first


def look(model, samples, config) -> list[Looks]:
    """Let a checkpoint answer each puzzle ROLLOUTS times at temperature 1."""
    policy = FastPolicy(load_policy(model))
    policy.generator.manual_seed(config.seed)
    groups = rollout(policy, samples, ROLLOUTS, config, temperature=1.0)
    found = []
    for group in groups:
        score(group)
        boxes = Counter()
        for turn in flat([t.turns for t in group]):
            boxes.update(filter(None, crops(turn.code, turn.images)))
        right = sum(t.correct for t in group)
        calls = mean(t.n_tool_calls for t in group)
        found.append(Looks(right, calls, boxes.most_common()))
    return found


def read_run(run: Path):
    """A run's settings and its rows with an evaluation. Raises DataError."""
    try:
        config = earlier(Config, run)
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except (DataError, OSError):
        raise DataError(f"--run {run}: no run is there; make one with train.py") from None
    rows = [json.loads(line) for line in lines]
    evaluated = [row for row in rows if "eval_accuracy" in row]
    if config.task != "image" or config.data or len(evaluated) < 2:
        raise DataError(f"{run} is no run of the image puzzles that was evaluated twice")
    return config, evaluated


# ------------------------------------------------------------------------------------- the drawing
def draw_looks(panel, below, picture, looks: Looks, title: str, colour: str) -> None:
    """The picture with the boxes of its crops, and the most frequent crops enlarged below it."""
    panel.imshow(picture, interpolation="nearest")
    panel.set_title(title, loc="left", fontsize=13, color=colour, weight="bold", pad=24)
    told = f"{looks.right} of {ROLLOUTS} right · {looks.calls:.1f} looks each"
    panel.text(0, 1.025, told, transform=panel.transAxes, fontsize=11, color=INK)
    for box, count in looks.boxes:
        left, upper, right, lower = box
        place = (left - 0.5, upper - 0.5)
        size = (right - left, lower - upper)
        for width, edge in ((4.5, "white"), (2.2, colour)):
            panel.add_patch(Rectangle(place, *size, fill=False, lw=width, ec=edge))
        panel.annotate(
            f"{count}×",
            ((left + right) / 2, upper - 1),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            weight="bold",
            color="white",
            bbox=dict(boxstyle="round,pad=0.22", fc=colour, ec="white", lw=0.8),
        )
    panel.set_axis_off()
    panel.set_anchor("SW")
    draw_crops(below, picture, looks.boxes[:SHOWN], colour)


def draw_crops(panel, picture, boxes: list, colour: str) -> None:
    """Crops beside each other, each with how often it was shown."""
    for place, (box, count) in enumerate(boxes):
        part = picture.crop(tuple(map(round, box)))
        across = (place * 1.14, place * 1.14 + 1, 1, 0)
        panel.imshow(part, interpolation="nearest", extent=across)
        frame = Rectangle((across[0], 0), 1, 1, fill=False, lw=1.6, ec=colour)
        panel.add_patch(frame)
        panel.text(across[0] + 0.5, 1.3, f"{count}×", ha="center", fontsize=10, color=INK)
    if len(boxes) <= SHOWN // 2:
        panel.text(
            len(boxes) * 1.14 + 0.08, 0.6, "what such a look shows", fontsize=10, color=FAINT
        )
    panel.set(xlim=(-0.03, 4.45), ylim=(1.4, -0.05), anchor="NW")
    panel.set_axis_off()


def draw_accuracy(panel, evaluated: list, hint: float) -> None:
    """Held-out accuracy over the run."""
    steps = [row["step"] for row in evaluated]
    values = [row["eval_accuracy"] for row in evaluated]
    panel.axhline(hint, color=FAINT, lw=1.2, ls=(0, (4, 3)))
    words = f"answering without a look: {hint:.2f} at best"
    panel.text(steps[-1], hint - 0.02, words, ha="right", va="top", fontsize=9.5, color=FAINT)
    panel.plot(steps, values, "-", color=AFTER, lw=2.5, zorder=2)
    ends = {0: (BEFORE, (2, -24)), len(steps) - 1: (AFTER, (0, 10))}
    for place, (step, value) in enumerate(zip(steps, values, strict=True)):
        colour, offset = ends.get(place, (AFTER, None))
        panel.plot(step, value, "o", color=colour, ms=9, mec="white", mew=1.5, zorder=3)
        if offset:
            panel.annotate(
                f"{value:.2f}",
                (step, value),
                offset,
                textcoords="offset points",
                ha="center",
                fontsize=14,
                weight="bold",
                color=colour,
            )
    panel.set_title("Held-out accuracy", loc="left", fontsize=13, color=INK, weight="bold", pad=24)
    calls = [evaluated[place]["eval_tool_calls"] for place in (0, -1)]
    told = f"looks at a puzzle: {calls[0]:.1f} → {calls[1]:.1f}"
    panel.text(0, 1.025, told, transform=panel.transAxes, fontsize=11, color=INK)
    panel.margins(x=0.08)
    panel.set(ylim=(0, 1.05), xlabel="steps of reinforcement learning", xticks=steps)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(colors=INK, length=3)
    panel.xaxis.label.set_color(INK)
    panel.grid(axis="y", color="#e4e7eb", lw=0.8)
    panel.set_axisbelow(True)


def draw(path: Path, sample, before: Looks, after: Looks, evaluated: list, hint: float) -> None:
    """Everything, in one row."""
    figure = pyplot.figure(figsize=(12.2, 5.5), facecolor="white")
    grid = figure.add_gridspec(
        2,
        3,
        width_ratios=(1, 1, 1.05),
        height_ratios=(1, 0.27),
        left=0.02,
        right=0.985,
        top=0.78,
        bottom=0.02,
        wspace=0.06,
        hspace=0.04,
    )
    panels = [figure.add_subplot(grid[0, column]) for column in (0, 1)]
    belows = [figure.add_subplot(grid[1, column]) for column in (0, 1)]
    picture = sample.images[0]
    draw_looks(panels[0], belows[0], picture, before, "Where it looked before training", BEFORE)
    draw_looks(panels[1], belows[1], picture, after, "Where it looks after training", AFTER)
    draw_accuracy(figure.add_axes((0.7, 0.12, 0.285, 0.66)), evaluated, hint)
    question = f"{sample.question.partition(' (')[0]}   ({sample.answer})"
    figure.text(0.02, 0.93, question, fontsize=15, color=INK)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "image")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "first.png")
    args = parser.parse_args()
    with one_line_errors():
        config, evaluated = read_run(args.run)
        difficulty = read_difficulty(config.difficulty)
        samples = puzzles("image", PUZZLES, config.seed, "heldout", **difficulty)
        before = look(config.model, samples, config)
        after = look(args.run, samples, config)

    def gain(k):
        return after[k].right - before[k].right, before[k].calls

    best = max(range(PUZZLES), key=gain)
    draw(args.out, samples[best], before[best], after[best], evaluated, difficulty["hint"])
    right = f"{before[best].right} of {ROLLOUTS} right before, {after[best].right} after"
    print(f"{args.out}: puzzle {best}, {right}")


if __name__ == "__main__":
    main()
