"""What people see of a run: rollouts.html, and curves.png.

A trajectory becomes a record, one JSON object of texts, numbers and thumbnails. The page, the lines
of an evaluation's rollouts.jsonl and the held-out lines of a training run are made of records. The
page is docs/report.html with the records filled in. What a policy wrote is untrusted: on the page
it is JSON, then text nodes, and no script but the page's own runs.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from data import DataError
from engine.boxes import boxes
from engine.video import duration, frame_times, middle_frames, show_frames

PAGE = Path(__file__).parents[1] / "docs" / "report.html"  # its DATA and DIGEST are filled in
PAGE_BYTES = 64_000_000  # more than that a phone does not open
PICTURE = 384  # pixels of the longer side of a prompt's picture
FIGURE = 256  # and of a figure
FRAME = 96  # and of a video's frame, of which a strip has at most FRAMES
FRAMES = 12
STEPS = 9  # evaluations that the page shows side by side
OF_GROUP = ("index", "id", "question", "reference", "images", "data_source")
PANELS = ("loss", "accuracy", "reward", "tool_calls", "response_tokens", "entropy", "grad_norm")


# --------------------------------------------------------------------------------- records
def thumbnail(image: Image.Image, side: int = FIGURE) -> str:
    """A data URI of a JPEG whose longer side is at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def looks(t, pictures: bool = False) -> dict:
    """Where in its videos a trajectory looked.

    For each video: the seconds of the frames that its code decoded or its context shows, the turns
    in which it first did (0: the prompt), and, with `pictures`, some frames as [second, thumbnail].
    """
    paths = [] if t.error else t.sample.videos
    videos = [look(t, number, path, pictures) for number, path in enumerate(paths)]
    frames = [second for video in videos for second in video["looked"]]
    covered = [len({int(second) for second in video["looked"]}) for video in videos]
    return dict(videos=videos, frames_looked_at=len(frames), seconds_covered=sum(covered))


def look(t, number: int, path: str, pictures: bool) -> dict:
    """Where in one of its videos a trajectory looked."""
    times = frame_times(path)
    uniform = (t.prompt_images - len(t.sample.images)) // len(t.sample.videos)
    turn_of = dict.fromkeys(middle_frames(path, uniform), 0)
    for place, turn in enumerate(t.turns, 1):
        for video, frame in turn.frames:  # what runs in a sandbox can say anything
            if video == number and frame in range(len(times)):
                turn_of.setdefault(frame, place)
    frames = sorted(turn_of)
    seconds = {frame: round(float(times[frame]), 2) for frame in frames}
    some = frames[:: -(-len(frames) // FRAMES) or 1] if pictures else []
    try:
        images = [thumbnail(image, FRAME) for image in show_frames(path, some)]
    except DataError:  # the video breaks where the policy looked
        images = []
    return dict(
        looked=list(seconds.values()),
        turns=[turn_of[frame] for frame in frames],
        seconds=duration(path),
        shown=[[seconds[frame], image] for frame, image in zip(some, images, strict=False)],
    )


def record(t, index: int = 0, repeat: int = 0) -> dict:
    """All that results and page need of a trajectory. index: of its sample, repeat: within it."""
    turns = []
    for turn, places in zip(t.turns, boxes(t), strict=True):
        images = [thumbnail(image) for image in turn.images]
        shown = dict(text=turn.text, code=turn.code, output=turn.output, error=turn.error)
        turns.append(dict(shown, images=images, boxes=places, tokens=turn.n_tokens))
    pictures = t.images[: len(t.sample.images)]
    return dict(
        question=t.sample.question,
        images=[thumbnail(image, PICTURE) for image in pictures],
        **looks(t, pictures=True),
        turns=turns,
        error=t.error,
        answer=t.answer,
        reference=t.sample.answer,
        correct=t.correct if t.sample.answer else None,
        reward=t.reward,
        advantage=t.advantage,
        broken=t.broken,
        tool_calls=t.n_tool_calls,
        visual_tokens=t.visual_tokens,
        response_tokens=sum(t.action_mask),
        end_reason=t.end_reason.value,
        data_source=t.sample.data_source,
        id=t.sample.id,
        index=index,
        repeat=repeat,
    )


def records(trajectories: Iterable, kept: list | None = None) -> list[dict]:
    """Trajectories as records; those that are records already stay. kept: see `write_report`."""
    numbers = {}  # of the samples
    trained = {id(t) for group in kept or () for t in group}
    found = []
    for t in trajectories:
        line = t
        if not isinstance(t, dict):
            line = record(t, numbers.setdefault(id(t.sample), len(numbers)))
        if kept is not None:
            line["trained"] = id(t) in trained
        found.append(line)
    return found


# ----------------------------------------------------------------------------- the page of rollouts
def remember(path: str | Path, step: int, trajectories: Iterable) -> None:
    """Keep a step's held-out trajectories for the page. A step run again takes its place."""
    lines = [line for line in read_lines(path) if line["step"] < step]
    lines += [dict(line, step=step) for line in records(trajectories)]
    aside = Path(f"{path}.tmp")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    aside.replace(path)


def read_lines(path: str | Path) -> list[dict]:
    """The objects of a file of JSON lines; none where there is no file."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def write_report(
    path: str | Path,
    trajectories: Iterable,
    title: str,
    kept: list | None = None,
    heldout: str | Path = "",
) -> None:
    """One self-contained page of trajectories or records, in groups. Too many: an even share.

    kept: the groups that `select` chose, for what became of each group. heldout: the file that
    `remember` wrote, for the same questions at several steps, side by side.
    """
    lines = records(trajectories, kept)
    history = read_lines(heldout) if heldout else []
    steps = sorted({line["step"] for line in history})
    places = np.linspace(0, len(steps) - 1, min(STEPS, len(steps)))
    chosen = {steps[round(place)] for place in places}
    history = [line for line in history if line["step"] in chosen]
    content = {
        "title": title,
        "total": len(lines),
        "groups": share(grouped(lines), PAGE_BYTES // 2 if history else PAGE_BYTES),
        "heldout": share(grouped(history), PAGE_BYTES // 2),
    }
    page = PAGE.read_text("utf-8")
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(content).replace("<", "\\u003c")
    Path(path).write_text(page.replace("DIGEST", digest).replace("DATA", data), encoding="utf-8")


def grouped(lines: list[dict]) -> list[dict]:
    """Records of one sample together, with what they share said once."""
    groups = {}
    for line in lines:
        shared = {name: line[name] for name in OF_GROUP}
        group = groups.setdefault((line["index"], line["id"]), dict(shared, trajectories=[]))
        own = {name: value for name, value in line.items() if name not in OF_GROUP}
        group["trajectories"].append(own)
    return list(groups.values())


def share(groups: list[dict], budget: int) -> list[dict]:
    """An even share of the groups that fits into so many bytes; of one group, of its rollouts."""
    while len(json.dumps(groups)) > budget:
        if len(groups) > 1:
            groups = groups[::2]
        else:
            groups[0]["trajectories"] = groups[0]["trajectories"][::2]
    return groups


# ------------------------------------------------------------------------------------ curves
def curves(path: str | Path, rows: list[dict]) -> None:
    """A picture of how a run went: a panel for each of PANELS that the rows of metrics hold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = {key for row in rows for key in row}
    names = [name for name in PANELS if name in known]
    across = (len(names) + 1) // 2 or 1
    figure, axes = pyplot.subplots(2, across, figsize=(4 * across, 6), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for key, style in ((name, "-"), (f"eval_{name}", "o-"), (f"eval_{name}_greedy", "s--")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, style, ms=4, lw=1, label=key.replace("_", " "))
        axis.set(xlabel="step")
        axis.legend(fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
