"""The page of rollouts and the curves: what people look at.

A record is a trajectory as the page shows it: plain values, pictures as thumbnails. A line of an
evaluation's rollouts.jsonl is one. What a reader may rely on: what a policy writes is untrusted, so
in the page it is JSON, then text nodes, and no script but the page's own runs there. The page is
one file, fetches nothing, and stays under PAGE_BYTES.
"""

import ast
import base64
import hashlib
import io
import json
import math
import re
import warnings
from pathlib import Path

from PIL import Image

from data import DataError, video_info
from engine.video import frame_times, middle_frames, show_frames

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
            info = video_info(path)
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
        length = info["frames"] / info["fps"]
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


def crops(code: str | None, images: list) -> list:
    """For each figure of a call the box of image_clue_0 that it shows, or None where unknown.

    The boxes are those of the code's literal `image_clue_0.crop((left, upper, right, lower))`, in
    the order in which they are written. They are believed where there are as many as figures, and
    a figure has its box's proportions or was drawn by imshow, which gives it others.
    """
    code = code or ""
    try:
        with warnings.catch_warnings():  # Python has some to say about odd code
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        nodes = []
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.args]
    boxes = []
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        match call.func:
            case ast.Attribute(ast.Name("image_clue_0"), "crop"):
                boxes.append(literal_box(call.args[0]))
    if len(boxes) != len(images):
        return [None] * len(images)
    drawn = "imshow" in code
    pairs = zip(boxes, images, strict=True)
    return [box if box and (drawn or fits(box, image)) else None for box, image in pairs]


def literal_box(node: ast.expr) -> tuple | None:
    """The four numbers that code names a box by; None for variables, and for no box at all."""
    try:
        left, upper, right, lower = map(float, ast.literal_eval(node))
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    wide = math.isfinite(left) and left < right < math.inf
    high = math.isfinite(upper) and upper < lower < math.inf
    return (left, upper, right, lower) if wide and high else None


def fits(box: tuple, image: Image.Image) -> bool:
    """Has a figure the proportions of the box, to five parts in a hundred?"""
    left, upper, right, lower = box
    wide = (right - left) * image.height
    high = (lower - upper) * image.width
    return abs(wide - high) < 0.05 * wide


def record(t, index: int = 0, repeat: int = 0, step: int | None = None, fate: str = "") -> dict:
    """Trajectory -> plain values, pictures as thumbnails: all that results and page need.

    index, repeat: of the question, and of its sample. step: of training. fate: what selection did.
    """
    prompt = t.images[: len(t.sample.images)]
    turns = []
    for turn in t.turns:
        shown = dict(
            text=turn.text,
            code=turn.code,
            output=turn.output or turn.error,
            failed=turn.error is not None,
            images=[thumbnail(image) for image in turn.images],
            boxes=crops(turn.code, turn.images),
            tokens=turn.n_tokens,
        )
        turns.append(shown)
    return dict(
        question=t.sample.question,
        images=[thumbnail(image) for image in prompt],
        sizes=[image.size for image in prompt],
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


def write_report(path: Path, records: list[dict], title: str, history: list[dict] = ()) -> None:
    """One self-contained HTML page of records; an even share of them, if all are too much.

    history: records of the same questions at several steps, which the page shows side by side.
    """
    lines = [json.dumps(line) for line in records]
    before = [json.dumps(line) for line in history]
    size = sum(map(len, lines + before))
    shown = ",".join(lines[:: 1 + size // PAGE_BYTES])
    earlier = ",".join(before[:: 1 + size // PAGE_BYTES])
    words = json.dumps(title)
    data = f'{{"title": {words}, "trajectories": [{shown}], "history": [{earlier}]}}'
    page = PAGE.read_text("utf-8")
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("DIGEST", digest).replace("DATA", data.replace("<", "\\u003c"))
    Path(path).write_text(page, encoding="utf-8")


def curves(path: Path, rows: list[dict]) -> None:
    """How a run went, step by step: a panel for each of PANELS that the rows hold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"{}": "-", "eval_{}": "o-", "eval_{}_greedy": "s--"}
    lines = {}
    for name in PANELS:
        keys = {form.format(name): style for form, style in styles.items()}
        lines[name] = {key: style for key, style in keys.items() if any(key in row for row in rows)}
    names = [name for name in PANELS if lines[name]] or ["step"]
    columns = min(4, len(names))
    height = -(-len(names) // columns)
    size = (3.4 * columns, 2.8 * height)
    figure, axes = pyplot.subplots(
        height, columns, figsize=size, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for key, style in lines.get(name, {}).items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            label = key.replace("_", " ")
            axis.plot(*zip(*points, strict=True), style, ms=4, lw=1, label=label)
        axis.set(xlabel="step", title=name.replace("_", " "))
        if axis.lines:
            axis.legend(fontsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
