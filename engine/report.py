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
from engine.batching import flat
from engine.boxes import crops
from engine.video import duration, frame_times, middle_frames, show_frames

PAGE_BYTES = 64_000_000  # more than that a phone does not open
PAGE = Path(__file__).parents[1] / "docs" / "report.html"  # DATA and DIGEST are filled in
COMPLETE = re.compile(r'"repeat": \d+}$')  # how a record ends, as JSON
SIDE = 256  # pixels of the longer side of a figure
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


def shrink(t) -> None:
    """Keep of a trajectory that nobody trains on what the page shows: its figures, made small."""
    for turn in t.turns:
        for image in turn.images:
            image.thumbnail((SIDE, SIDE))


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """A picture as the data URI of a JPEG whose longer side has at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def looks(t, pictures: bool = False) -> dict:
    """Where in its videos a trajectory looked: frames that code decoded, or the context shows.

    videos: for each the seconds of these frames, the turns whose code decoded each (none for the
    context's), its length in seconds and, with `pictures`, at most a dozen of the frames as
    [second, thumbnail].
    """
    videos = []
    paths = [] if t.error else t.sample.videos
    uniform = t.prompt_images - len(t.sample.images)
    for number, path in enumerate(paths):
        try:
            times = frame_times(path).astype(float).round(2).tolist()
            length = duration(path)
        except DataError:  # it vanished since
            continue
        turns = {frame: [] for frame in middle_frames(path, uniform // len(paths))}
        for place, turn in enumerate(t.turns, 1):
            for frame in {frame for video, frame in turn.frames if video == number}:
                turns.setdefault(frame, []).append(place)
        # The sandbox says which frames, and what runs there can say anything.
        frames = sorted(turns.keys() & range(len(times)))
        some = frames[:: len(frames) // STRIP + 1] if pictures else []
        try:
            shown = [thumbnail(image, 96) for image in show_frames(path, some)]
        except DataError:  # the video breaks where the policy looked
            shown = []
        strip = dict(
            looked=[times[frame] for frame in frames],
            turns=[turns[frame] for frame in frames],
            seconds=round(length, 2),
            shown=[[times[frame], uri] for frame, uri in zip(some, shown, strict=False)],
        )
        videos.append(strip)
    covered = [len(set(map(int, video["looked"]))) for video in videos]
    return dict(
        videos=videos,
        frames_looked_at=sum(len(video["looked"]) for video in videos),
        seconds_covered=sum(covered),
    )


def record(t, index: int = 0, repeat: int = 0, step: int | None = None, trained=None) -> dict:
    """Trajectory -> plain values, pictures as thumbnails: all that results and page need.

    index, repeat: of the question, and of its sample. step: of training. trained: was it trained
    on? None where nothing is.
    """
    prompt = t.images[: len(t.sample.images)]
    sizes = [image.size for image in prompt]
    whole = [image.copy() for image in prompt[:1]]  # as a figure that shows all of it
    if t.broken:
        for image in whole:
            image.thumbnail((SIDE, SIDE))  # as `shrink` did with the figures
    turns = []
    for turn in t.turns:
        shown = dict(
            text=turn.text,
            code=turn.code,
            output=turn.output or turn.error,
            failed=turn.error is not None,
            images=[thumbnail(image) for image in turn.images],
            boxes=crops(turn.code, turn.images, *(image.size for image in whole)),
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
        broken=t.broken,
        trained=trained,
        step=step,
        id=t.sample.id,
        index=index,
        repeat=repeat,
    )


def as_text(lines: list[dict]) -> str:
    """Dicts as JSON lines."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_lines(file: Path) -> list[dict]:
    """The whole records of a file of JSON lines: a kill may cut the last. [] without a file."""
    texts = file.read_text("utf-8").split("\n") if file.exists() else []
    return [json.loads(text) for text in texts if COMPLETE.search(text)]


def step_records(groups: list[list], kept: list[list], step: int) -> list[dict]:
    """Records of all that a step sampled. kept: the groups that were trained on."""
    trained = {id(t) for t in flat(kept)}
    records = []
    for index, group in enumerate(groups):
        for repeat, t in enumerate(group):
            records.append(record(t, index, repeat, step, id(t) in trained))
    return records


def write_report(path: Path, records: list[dict], title: str, history: list[dict] = ()) -> None:
    """One self-contained HTML page of records; an even share of them, if all are too much.

    history: records of the same questions at several steps, which the page shows side by side.
    """
    stride = 1 + len(json.dumps([records, history])) // PAGE_BYTES
    if stride > 1:
        title += f" (one question of {stride}: more do not fit)"
    content = dict(
        title=title,
        trajectories=share(records, stride),
        history=share(history, stride),
    )
    data = json.dumps(content).replace("<", "\\u003c")
    page = PAGE.read_text("utf-8")
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("DIGEST", digest).replace("DATA", data)
    Path(path).write_text(page, encoding="utf-8")


def share(records: list[dict], stride: int) -> list[dict]:
    """One question of `stride` with all its trajectories; one record, where questions are few."""
    some = [line for line in records if line["index"] % stride == 0]
    return some if len(some) < len(records) else records[::stride]


def curves(path: Path, rows: list[dict]) -> None:
    """How a run went, step by step: a panel for each of PANELS that the rows hold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = set().union(*rows)
    panels = {}
    for name in PANELS:
        keys = {name: "-", f"eval_{name}": "o-", f"eval_{name}_greedy": "s--"}
        lines = {key: style for key, style in keys.items() if key in known}
        if lines:
            panels[name] = lines
    columns = min(4, len(panels)) or 1
    height = math.ceil(len(panels) / columns) or 1
    figure = pyplot.figure(figsize=(3.4 * columns, 2.8 * height), layout="constrained")
    for place, (name, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(height, columns, place)
        for key, style in lines.items():
            some = [row for row in rows if key in row]
            steps = [row["step"] for row in some]
            values = [row[key] for row in some]
            axis.plot(steps, values, style, ms=4, lw=1, label=key.replace("_", " "))
        axis.set(xlabel="step", title=name.replace("_", " "))
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
