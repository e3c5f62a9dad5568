"""The page of rollouts and the curves: what people look at.

A record is a trajectory as the page shows it: plain values, pictures as thumbnails. A line of an
evaluation's rollouts.jsonl is one. What a reader may rely on: what a policy writes is untrusted, so
in the page it is JSON, then text nodes, and no script but the page's own runs there. The page is
one file, fetches nothing, and stays under PAGE_BYTES.
"""

import base64
import hashlib
import io
import json
import math
import re
from pathlib import Path

from PIL import Image

from data import DataError
from engine.boxes import crops
from engine.video import duration, frame_times, middle_frames, show_frames

PAGE_BYTES = 64_000_000  # more than that a phone does not open
PAGE = Path(__file__).parents[1] / "docs" / "report.html"  # DATA and DIGEST are filled in
STRIP = 12  # frames that are shown of a video
PANELS = (
    "accuracy",
    "reward",
    "tool_calls",
    "loss",
    "entropy",
    "grad_norm",
    "response_tokens",
    "visual_tokens",
)


def thumbnail(image: Image.Image, side: int = 256) -> str:
    """A picture as the data URI of a JPEG whose longer side has at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def looks(t, pictures: bool = False) -> dict:
    """Where in its videos a trajectory looked: frames that code decoded, or the context shows.

    videos: for each the seconds of these frames, its length in seconds and, with `pictures`, at
    most a dozen of them as [second, thumbnail].
    """
    videos = []
    paths = [] if t.error else t.sample.videos
    uniform = t.prompt_images - len(t.sample.images)
    for number, path in enumerate(paths):
        try:
            times = frame_times(path)
            length = duration(path)
        except DataError:  # it vanished since
            continue
        decoded = {frame for turn in t.turns for video, frame in turn.frames if video == number}
        in_context = middle_frames(path, uniform // len(paths))
        # The sandbox says which frames, and what runs there can say anything.
        frames = sorted(decoded.union(in_context) & set(range(len(times))))
        some = frames[:: (len(frames) + STRIP - 1) // STRIP or 1] if pictures else []
        try:
            shown = zip(some, show_frames(path, some), strict=True)
            shown = [[seconds(times[k]), thumbnail(image, 96)] for k, image in shown]
        except DataError:  # the video breaks where the policy looked
            shown = []
        looked = [seconds(times[k]) for k in frames]
        videos.append(dict(looked=looked, seconds=length, shown=shown))
    covered = [len({int(second) for second in video["looked"]}) for video in videos]
    return dict(
        videos=videos,
        frames_looked_at=sum(len(video["looked"]) for video in videos),
        seconds_covered=sum(covered),
    )


def seconds(time) -> float:
    """A time in a video, in seconds to two decimals."""
    return round(float(time), 2)


def record(t, index: int = 0, repeat: int = 0, step: int | None = None, fate: str = "") -> dict:
    """Trajectory -> plain values, pictures as thumbnails: all that results and page need.

    index, repeat: of the question, and of its sample. step: of training. fate: what selection did.
    """
    prompt = t.images[: len(t.sample.images)]
    sizes = [image.size for image in prompt]
    turns = []
    for turn in t.turns:
        shown = dict(
            text=turn.text,
            code=turn.code,
            output=turn.output or turn.error,
            failed=turn.error is not None,
            images=[thumbnail(image) for image in turn.images],
            boxes=crops(turn.code, turn.images, *sizes[:1]),
            tokens=turn.n_tokens,
        )
        turns.append(shown)
    return dict(
        question=t.sample.question,
        images=[thumbnail(image) for image in prompt],
        sizes=sizes,
        **looks(t, pictures=True),
        turns=turns,
        error=t.error,
        answer=t.answer,
        reference=t.sample.answer,
        correct=t.correct if t.sample.answer else None,
        reward=t.reward,
        advantage=t.advantage,
        tool_calls=t.n_tool_calls,
        visual_tokens=t.visual_tokens,
        response_tokens=sum(t.action_mask),
        end_reason=t.end_reason.value,
        data_source=t.sample.data_source,
        fate=fate,
        step=step,
        id=t.sample.id,
        index=index,
        repeat=repeat,
    )


def step_records(groups: list[list], kept: list[list], step: int) -> list[dict]:
    """Records of all that a step sampled, with what became of each."""
    trained = {id(t) for group in kept for t in group}
    records = []
    for index, group in enumerate(groups):
        for repeat, t in enumerate(group):
            if id(t) in trained:
                fate = "trained on"
            elif t.broken:
                fate = "broken"
            elif t.advantage is None:
                fate = "nothing to learn from its group"
            else:
                fate = "outranked"
            records.append(record(t, index, repeat, step, fate))
    return records


def write_report(path: Path, records: list, title: str, history: list[dict] = ()) -> None:
    """One self-contained HTML page of records or trajectories; an even share, if all are too much.

    history: records of the same questions at several steps, which the page shows side by side.
    """
    numbers = {}  # of the samples
    lines = []
    for t in records:
        if not isinstance(t, dict):
            index = numbers.setdefault(id(t.sample), len(numbers))
            t = record(t, index, len(lines))
        lines.append(t)
    size = len(json.dumps([lines, list(history)]))
    stride = 1 + size // PAGE_BYTES
    if stride > 1:
        title += f" (one question of {stride}: more do not fit)"
    content = {
        "title": title,
        "trajectories": share(lines, stride),
        "history": share(history, stride),
    }
    data = json.dumps(content).replace("<", "\\u003c")
    page = PAGE.read_text("utf-8")
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("DIGEST", digest).replace("DATA", data)
    Path(path).write_text(page, encoding="utf-8")


def share(records: list[dict], stride: int) -> list[dict]:
    """One question of `stride` with all its trajectories; one record, where questions are few."""
    places = {}
    for line in records:
        places.setdefault(line["index"], len(places))
    if len(places) < stride:
        return records[::stride]
    return [line for line in records if places[line["index"]] % stride == 0]


def curves(path: Path, rows: list[dict]) -> None:
    """How a run went, step by step: a panel for each of PANELS that the rows hold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = set().union(*rows)
    lines = {}
    for name in PANELS:
        keys = {name: "-", f"eval_{name}": "o-", f"eval_{name}_greedy": "s--"}
        lines[name] = {key: style for key, style in keys.items() if key in known}
    names = [name for name in PANELS if lines[name]]
    columns = min(4, len(names)) or 1
    height = math.ceil(len(names) / columns) or 1
    size = (3.4 * columns, 2.8 * height)
    figure, axes = pyplot.subplots(
        height, columns, figsize=size, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for key, style in lines[name].items():
            some = [row for row in rows if key in row]
            steps = [row["step"] for row in some]
            values = [row[key] for row in some]
            axis.plot(steps, values, style, ms=4, lw=1, label=key.replace("_", " "))
        axis.set(xlabel="step", title=name.replace("_", " "))
        axis.legend(fontsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
