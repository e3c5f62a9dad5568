"""What is asked: samples, and the files and folders that they come from.

`load` turns everything wrong with a data file into a `DataError` that names file, row and field, in
the first seconds of a run and not at step 300: it reads the header of every image and opens every
video. Pixels wait until they are asked for, and so do pictures that lie inside a table. A row goes
through one way, whatever its layout: its fields -> `_converse` for a conversation -> `_sample`.
docs/data.md shows all layouts; engine/prompt.py asks a sample, engine/video.py chooses frames.
"""

import base64
import functools
import io
import itertools
import json
import os
import re
import struct
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

CHECKED = 10_000  # rows of a table whose pictures `load` looks at; the others wait
MAX_ASPECT = 200  # the image processor takes no image as long as this

# Where a row keeps things: the first field that is filled; a point leads into an object.
QUESTIONS = [
    "question",
    "problem",
    "extra_info.question",
]
ANSWERS = [
    "answer",
    "solution",
    "reward_model.ground_truth",
    "extra_info.answer",
]
ROLES = {  # of ShareGPT, by the names that chat templates know
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
}
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # braces in braces in it
BASE64 = re.compile(r"(?:data:[^,]*,)?([A-Za-z0-9+/\s]{60,}=*\s*)")
SURROGATE = re.compile(r"(?<!\\)\\ud[89a-f]")  # half a character, as ascii() writes it
# The head of mkv and webm, up to the length of the segment that holds all of the video.
SEGMENT = re.compile(rb"\x1a\x45\xdf\xa3.*?\x18\x53\x80\x67\x01(?!\xff{7})(.{7})", re.DOTALL)


class DataError(ValueError):
    """Bad input, in one line for people. Command lines print it and exit with code 2."""


@dataclass
class Sample:
    """One question. Nothing of its media is decoded before it is needed."""

    id: str
    question: str
    answer: str
    images: tuple = ()  # PIL images, paths, the bytes of files, or functions that give one of these
    videos: tuple = ()  # paths
    data_source: str = ""
    ability: str = ""
    prompt: list | None = None  # the row's own messages {role, content}, with <image> marks
    turns: list | None = None  # a demonstration: what the assistant says, turn by turn (SFT)


@dataclass
class Action:
    """One turn as the policy sampled it."""

    ids: list[int]
    logprobs: list[float]  # of each id, at the temperature it was sampled with
    complete: bool = False  # it ended by itself and not at a limit


def _need(condition, why):
    """Raises DataError unless the condition holds."""
    if not condition:
        raise DataError(why)


# Pictures


def rgb(image: Image.Image) -> Image.Image:
    """A new RGB image of what people see in an image of any mode, without its `info`.

    Values of more than 8 bits are scaled: integers by the range of 12 or 16 bits, floats up to 1 by
    255, and what is larger by its maximum. Transparent parts become white. The source of this
    function also runs inside the sandbox, so it uses no name of this file but `Image`.
    """
    import numpy

    if image.mode[0] in "IF":
        values = numpy.nan_to_num(numpy.asarray(image, float), posinf=0.0, neginf=0.0)
        low = values.min(initial=0.0)
        high = values.max(initial=0.0)
        ranges = [255.0, 4095.0, 65535.0, high]  # of 8, 12 and 16 bits
        if image.mode == "F":
            ranges = [1.0 if high < 1.5 else 255.0, high]  # a filter may go a little beyond 1
        high = next(limit for limit in ranges if limit >= high)
        scaled = (values - low) * (255.0 / (high - low))
        image = Image.fromarray(scaled.round().astype("uint8"))
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    if image.mode == "LAB":
        image = image.getchannel(0)
    image = image.convert("RGB")
    image.info = {}
    return image


@functools.cache  # so that it comes once
def _notice(text):
    print(text, file=sys.stderr)


@contextmanager
def _opened(image):
    """The PIL image of an item of `Sample.images`, its pixels not yet decoded, and its orientation.

    Whatever goes wrong until it is closed is a DataError; a damaged file may raise anything.
    """
    name = getattr(image, "filename", image)
    try:
        while callable(image):
            image = image()
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        aspect = max(image.size) / min(image.size)
        _need(aspect < MAX_ASPECT, f"its aspect is {aspect:.0f}, it must be below {MAX_ASPECT}")
        if getattr(image, "is_animated", False) and image.format != "MPO":
            _notice(f"{name!s:.199}: has several frames; the first one is used")
        exif = Image.Image.getexif(image)  # the method of PNG would decode all of it
        yield image, image.format != "TIFF" and exif.get(0x0112)  # Pillow itself turns TIFF
    except Exception as error:
        raise DataError(f"{name!s:.199}: cannot be read as an image ({error})") from error


def open_image(image: object) -> Image.Image:
    """An item of `Sample.images` -> the RGB image that people see. DataError: it cannot be read."""
    with _opened(image) as (opened, _):
        return rgb(ImageOps.exif_transpose(opened))


def image_size(image: object) -> tuple[int, int]:
    """(width, height) of what `open_image` gives, from the header alone. DataError: unreadable."""
    with _opened(image) as (opened, orientation):
        return opened.size[::-1] if orientation in range(5, 9) else opened.size


# Videos


def _cut_short(path):
    """Does a file end before its boxes (mp4, mov) or its segment (mkv, webm)?

    decord reads what there is of such a file and says nothing.
    """
    size = os.path.getsize(path)
    end = 0
    with open(path, "rb") as file:
        head = file.read(4096)
        segment = SEGMENT.match(head)
        if segment:
            return segment.end() + int.from_bytes(segment[1], "big") > size
        while head[4:8] == b"ftyp" and end + 8 <= size:
            file.seek(end)
            length, _, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16))
            if length < 2:  # 1: it is in the next field; 0: up to the end of the file
                length = length * long_length or size - end
            end += max(8, length)
    return end > size


def _unreadable(path):
    """Why decord cannot read a file, with the codec where PyAV can tell."""
    try:
        import av

        with av.open(str(path)) as container:
            codec = container.streams.video[0].codec_context.codec.canonical_name
            kind = f"{container.format.name}, {codec}"
        return f"decord cannot read it ({kind}); convert it: ffmpeg -i IN -c:v libx264 OUT.mp4"
    except Exception:  # PyAV is missing, or raises one of its many errors
        return "cannot be read as a video (it is empty, cut short or no video)"


@contextmanager
def open_video(path: str):
    """decord's VideoReader of a file. DataError: it cannot be read, or a part of it is missing."""
    import decord  # takes half a second to import, and only video needs it

    decord.logging.set_level(decord.logging.QUIET)
    try:
        _need(not _cut_short(path), f"{path}: cut short, some of the video is missing")
        yield decord.VideoReader(str(path), num_threads=1)
    except (OSError, RuntimeError, IndexError, decord.DECORDError) as error:
        why = getattr(error, "strerror", None) or _unreadable(path)
        raise DataError(f"{path}: {why}") from error


@functools.cache
def video_info(path: str) -> dict:
    """width and height in pixels as decoded, frames, and the average fps. DataError: unreadable."""
    with open_video(path) as reader:
        height, width = reader[0].shape[:2]  # decodes one frame
        frames = len(reader)
        fps = reader.get_avg_fps()
        starts = reader.get_frame_timestamp([0, frames - 1])[:, 0]
    if frames > 1:  # by the times of the frames, since the header misleads where the rate varies
        fps = (frames - 1) / max(float(np.ptp(starts)), 1e-9)
    _need(1e-3 < fps < 1e4, f"{path}: its times or frame rate are missing; convert it by ffmpeg")
    return dict(width=width, height=height, frames=frames, fps=round(fps, 3))


# From a file to rows


def _json_rows(path):
    """(number from 1, row) of a JSON list, or of one value a line."""
    number = 1
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return enumerate(json.loads(text), 1)
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((number, json.loads(line)))
        return rows
    except (OSError, ValueError, RecursionError) as error:
        line = number + getattr(error, "lineno", 1) - 1
        why = getattr(error, "strerror", None) or f"line {line} is not JSON ({error})"
        if path.exists() and path.suffix not in (".json", ".jsonl"):
            why = "this is none of .json, .jsonl, .parquet, and a folder of Parquet or of datasets"
        raise DataError(f"{path}: {why}") from error


def _tables(path):
    """The files of a table; of a folder those whose paths say train, or else all. Or none."""
    if path.suffix == ".parquet":
        return [path]
    files = sorted(path.rglob("*.parquet")) or sorted(path.rglob("data-*.arrow"))
    train = [file for file in files if "train" in str(file.relative_to(path))]
    return train or files


def _groups(table):
    """Functions that give the rows of a part of a table, in small batches; nothing is read yet."""
    from pyarrow import ipc, memory_map, parquet

    if table.suffix == ".arrow":
        mapped = ipc.open_stream(memory_map(str(table))).read_all()
        return [functools.partial(mapped.to_batches, 64)]
    file = parquet.ParquetFile(table, buffer_size=2**20, pre_buffer=False)
    return [functools.partial(file.iter_batches, 64, [k]) for k in range(file.num_row_groups)]


def _table_rows(tables):
    """(number from 1, row, where `_embedded` finds it again) of all rows."""
    numbers = itertools.count(1)
    for table in tables:
        try:
            for group, read in enumerate(_groups(table)):
                rows = itertools.chain.from_iterable(batch.to_pylist() for batch in read())
                for place, row in enumerate(rows):
                    yield next(numbers), row, table, group, place
        except ImportError as error:
            raise DataError(f"{table}: needs pyarrow; install it: pip install pyarrow") from error
        except Exception as error:  # pyarrow has many
            raise DataError(f"{table}: cannot be read as a table ({error})") from error


@functools.lru_cache  # the last 128: the prompt asks for the size before the pixels are needed
def _embedded(table, group, row, name, place):
    """A function that opens a picture inside a table: number `place` in a field of a row."""
    for batch in _groups(table)[group]():
        if row < len(batch):
            return _medium(_listed(batch[name][row].as_py())[place], None)
        row -= len(batch)


# From a row to a sample


def _listed(value):
    """A list, also of a single value."""
    return value if isinstance(value, list) else [value]


def _fields(row):
    """The filled fields of a row, without null, NaN and ""; "object.field" leads into an object."""
    fields = dict(row)
    for name, value in row.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{inner}": held for inner, held in value.items()}
    return {name: v for name, v in fields.items() if v == v and v not in (None, "")}


def _first(fields, names, default=None):
    """The first of the named fields that is filled."""
    return next((fields[name] for name in names if name in fields), default)


def _medium(value, folder):
    """A picture or a video as rows hold it -> its path, or a function that opens its bytes."""
    if isinstance(value, dict):
        value = _first(_fields(value), ["bytes", "path", "image", "video"])
    encoded = isinstance(value, str) and BASE64.fullmatch(value)
    if encoded:
        value = base64.b64decode(encoded[1])
    if isinstance(value, bytes):
        opener = functools.partial(io.BytesIO, value)
        opener.filename = "a picture in the row"
        return opener
    _need(isinstance(value, str) and value, f"{value!r} is neither a path nor a picture")
    return str(folder / value.removeprefix("file://"))


def _media(fields, kind, read, folder, at):
    """The images or videos of a row, each read once. at: where the row lies in a table, or []."""
    names = f"{kind}_path", f"{kind}s", kind, f"{kind}_hint"
    given = [name for name in names if fields.get(name)]
    _need(len(given) < 2, f"has {kind}s in {' and in '.join(given)}; keep one of them")
    media = []
    for name in given:
        for place, value in enumerate(_listed(fields[name])):
            try:
                medium = _medium(value, folder)
                read(medium)
            except Exception as error:
                raise DataError(f"the {kind} path in '{name}': {error}") from error
            if at and callable(medium):  # it is read again when it is needed, and not kept
                medium = functools.partial(_embedded, *at, name, place)
            media.append(medium)
    return tuple(media)


def _reference(text):
    """The answer in a text: what its answer tags and its last box hold, or all of it."""
    for pattern in (TAGGED, BOXED):
        text = [text, *pattern.findall(text)][-1]
    return text.strip()


def _options(options):
    """The lines that ask the options of a question."""
    if not isinstance(options, dict):
        options = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", _listed(options), strict=False))
    return "".join(f"\n({label}) {text}" for label, text in options.items() if text is not None)


def _chat(messages, name):
    """Messages of any layout as {role, content}; parts that are no text become marks."""
    chat = []
    for message in _listed(messages) or [{}]:
        message = message if isinstance(message, dict) else {}
        role = message.get("from") or message.get("role")
        content = message.get("value") or message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text") or f"<{part['type']}>" for part in content)
        _need(
            role and content and isinstance(content, str),
            f"'{name}' is not a list of {{role, content}} with text",
        )
        chat.append({"role": ROLES.get(role, role), "content": content})
    return chat


def _converse(fields, name):
    """Adds what a conversation holds to the fields of its row: question, answer, prompt, turns.

    It asks one question. Assistant turns before the last one run code, and what the tool answered
    is left out, since the session answers again.
    """
    chat = _chat(fields[name], name)
    whole = name == "prompt"  # it may hold examples of what an assistant says
    asked = list(itertools.takewhile(lambda turn: whole or turn["role"] != "assistant", chat))
    said = [turn["content"] for turn in chat[len(asked) :] if turn["role"] == "assistant"]
    code = ["```" in turn for turn in said]
    _need(asked and all(code[:-1]), f"'{name}' asks several questions, or none")
    fields.setdefault("extra_info.question", asked[-1]["content"])
    if whole or len(asked) > 1:
        fields["prompt"] = asked
    if said and not code[-1]:
        fields.setdefault("extra_info.answer", said[-1])
        if "<answer>" not in said[-1]:
            said[-1] = f"<answer>\n\\boxed{{{_reference(said[-1])}}}\n</answer>"
        fields.setdefault("turns", said)


def _sample(row, number, folder, at):
    """A row of any layout -> its Sample. DataError: what is wrong, and in which field.

    number: of the row, from 1. at: where the row lies in a table, for `_embedded`, or [].
    """
    _need(isinstance(row, dict), "is not a JSON object")
    fields = _fields(row)
    fields[f"{fields.get('mm_hint.hint_type')}_hint"] = fields.get("mm_hint.hint_path")
    for name in ("prompt", "conversations", "messages"):
        if name in fields:
            _converse(fields, name)
    question = _first(fields, QUESTIONS)
    answer = _first(fields, ANSWERS)
    answer = _reference(str(answer)) if isinstance(answer, (str, int, float)) else ""
    prompt = fields.get("prompt")
    turns = fields.get("turns")
    images = _media(fields, "image", id if at and number > CHECKED else image_size, folder, at)
    videos = _media(fields, "video", video_info, folder, at)
    _need(isinstance(question, str) and question.strip(), "has no question")
    _need(answer, f"has no answer, a string or a number in {', '.join(ANSWERS)}")
    _need(
        images or videos,
        "has no 'image_path', 'images', 'video_path' or 'videos', nor 'mm_hint' with a hint_type",
    )
    _need(
        turns is None or isinstance(turns, list) and all(turns) and "".join(turns),
        "'turns' is not a list of the assistant's texts",
    )
    asked = str(prompt or question)
    if turns:  # images beyond the marks came from the tool, which will give them again
        images = images[: asked.count("<image>") or None]
    for kind, media in (("image", images), ("video", videos)):
        marks = asked.count(f"<{kind}>")
        _need(
            marks == len(media) or not (marks or prompt and kind == "image"),
            f"{marks} <{kind}> marks for {len(media)} {kind}s",
        )
    sample = Sample(
        id=str(_first(fields, ["id", "extra_info.index"], number - 1)),
        question=question + _options(_first(fields, ["options", "choices"], [])),
        answer=answer,
        images=images,
        videos=videos,
        data_source=str(fields.get("data_source", "")),
        ability=str(fields.get("ability", "")),
        prompt=prompt,
        turns=turns,
    )
    for name, value in [] if at else vars(sample).items():  # the text of tables is sound
        _need(not SURROGATE.search(ascii(value)), f"'{name}' holds half a character")
    return sample


def load(path: str | Path) -> list[Sample]:
    """A file or a folder of rows -> Samples; media paths are relative to it. docs/data.md says how.

    Raises DataError (file, row from 1, what is wrong) for what would fail later in a run.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    tables = _tables(path)
    samples = []
    for number, row, *at in _table_rows(tables) if tables else _json_rows(path):
        try:
            samples.append(_sample(row, number, folder, at))
        except Exception as error:  # a row may hold anything
            why = " ".join(f"{path}, row {number}: {error}".split())
            raise DataError(why[:299]) from error
    _need(samples, f"{path}: has no rows")
    return samples
