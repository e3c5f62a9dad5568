r"""What is asked: samples, the files they come from, and the prompt that asks them.

`load` turns everything wrong with a data file into a `DataError` that names file, row and field, in the first second
of a run and not at step 300: it reads every image's header and opens every video. Pixels wait until asked for.
`messages` words the prompt, in few words, since the tiny policy reads them with a vocabulary of a few hundred tokens.
An image is in the context *and* in the Python session, a video only in the session: what it looks at is what it pays.
"""
import functools
import json
import os
import re
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ANSWER_FORMAT = "<answer>\n\\boxed{your answer}\n</answer>\nQuestion: {query}"
DIRECT_PROMPT = f"Answer the question below. Write\n{ANSWER_FORMAT}"
AGENT_PROMPT = (
    "Answer the question below with the help of Python. The session keeps its variables and holds {clues}. print() "
    "shows text; plt.show() shows a figure, which becomes the next image_clue. To run code, write\n<code>\n```python\n"
    "your code\n```\n</code>\nand read what comes back. Look as often as you need. To answer, write\n" + ANSWER_FORMAT)
SEGMENT = re.compile(rb"\x1a\x45\xdf\xa3.*?\x18\x53\x80\x67\x01(?!\xff{7})(.{7})", re.DOTALL)  # mkv, webm: its bytes
ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height change places


class DataError(ValueError):
    """Bad input, worded for people: names file, row and the way out. Command lines print it and exit with code 2."""


@dataclass
class Sample:
    """One question. `images` are PIL images or paths, `videos` are paths; nothing is decoded before it is needed."""
    id: str
    question: str
    answer: str
    images: tuple = ()
    videos: tuple = ()
    data_source: str = ""
    ability: str = ""
    prompt: list | None = None  # the row's own messages [{role, content}], with <image> marks in the content
    turns: list | None = None  # a demonstration: what the assistant says, turn by turn (SFT)


@dataclass
class Action:
    """One turn as the policy sampled it. complete: it ended by itself and not at a limit."""
    ids: list[int]
    logprobs: list[float]  # of each id, at the temperature it was sampled with
    complete: bool = False


def _need(condition, why):
    if not condition:
        raise DataError(why)


def rgb(image: Image.Image) -> Image.Image:
    """A new RGB image of what people see in an image of any mode, without its `info`.

    Values of more than 8 bits are scaled: 12 and 16 bits by their range, floats up to 1 by 255, anything larger by its
    maximum. Transparent parts become white. The source of this function also runs inside the sandbox, so it uses no
    name of this file but `Image`.
    """
    import numpy

    if image.mode[0] in "IF":
        values = numpy.asarray(image, float)
        finite = values[numpy.isfinite(values)]
        low = finite.min(initial=0.0)
        high = finite.max(initial=0.0)
        ranges = [255.0, 4095.0, 65535.0]  # 8, 12 and 16 bits
        if image.mode == "F":
            ranges = [high] if 1.0 < high < 1.5 else [1.0, 255.0]  # just above 1: a filter's overshoot
        fitting = [full for full in ranges if high <= full]
        high = fitting[0] if fitting else high
        values = numpy.nan_to_num(values, nan=low, posinf=high, neginf=low)
        scaled = (values - low) * (255.0 / (high - low))
        image = Image.fromarray(scaled.round().astype("uint8"))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode == "LAB":
        image = image.getchannel(0)
    image = image.convert("RGB")
    image.info = {}
    return image


def _opened(image):
    """The PIL image of a path, a PIL image or a function that opens one; its pixels need not be decoded yet."""
    if callable(image):
        image = image()
    return image if isinstance(image, Image.Image) else Image.open(image)


@contextmanager
def _image_errors(image):
    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{getattr(image, 'filename', image)}: cannot be read as an image ({error})") from error


def open_image(image) -> Image.Image:
    """PIL image, path or function that opens one -> RGB image as people see it. DataError: unreadable."""
    with _image_errors(image):
        return rgb(ImageOps.exif_transpose(_opened(image)))


def image_size(image) -> tuple[int, int]:
    """(width, height) of what `open_image` gives, from the file's header alone. DataError: unreadable."""
    with _image_errors(image):
        opened = _opened(image)
        turned = opened.format != "TIFF" and opened.getexif().get(ORIENTATION, 1) >= 5  # TIFF's size is turned already
        return opened.size[::-1] if turned else opened.size


def _cut_short(path):
    """Does the file end before its boxes (mp4, mov) or its segment (mkv, webm) do? decord may read what there is."""
    with open(path, "rb") as file:
        head, end, size = file.read(4096), 0, os.path.getsize(path)
        if segment := SEGMENT.match(head):
            return segment.end() + int.from_bytes(segment[1], "big") > size
        while head[4:8] == b"ftyp" and end + 8 <= size:  # from box to box; 1: the length is 64 bits, 0: up to the end
            file.seek(end)
            short, _, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            end += max(8, {0: size - end, 1: long}.get(short, short))
    return end > size


@contextmanager
def open_video(path):
    import decord  # takes half a second to import, and only video needs it
    decord.logging.set_level(decord.logging.QUIET)
    try:
        _need(not _cut_short(path), f"{path}: cut short, some of the video is missing")
        yield decord.VideoReader(str(path), num_threads=1)
    except (OSError, RuntimeError, IndexError, decord.DECORDError) as error:
        why = getattr(error, "strerror", "") or "cannot be read as a video (it is empty, cut short or of another kind)"
        raise DataError(f"{path}: {why}") from error


@functools.lru_cache(maxsize=4096)
def video_info(path):
    """width and height in pixels as decoded, frames, average fps; read once per path. DataError: no whole video."""
    with open_video(path) as reader:
        height, width = reader[0].shape[:2]  # decodes one frame
        length = float(np.ptp(reader.get_frame_timestamp([0, len(reader) - 1])))  # a variable rate's header misleads
        return dict(width=width, height=height, frames=len(reader), fps=round(len(reader) / (length or 1), 3))


def _read(path, lines=False):
    """The JSON value of a file or, with `lines`, its rows as {number from 1: row}: a list, or one value a line."""
    number, rows = 1, {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if not lines or text.lstrip().startswith("["):
            return dict(enumerate(json.loads(text), 1)) if lines else json.loads(text)
        for number, line in enumerate(text.split("\n"), 1):
            rows.update({number: json.loads(line)} if line.strip() else {})
        return rows
    except (OSError, ValueError, RecursionError) as error:
        line = number + getattr(error, "lineno", 1) - 1
        raise DataError(f"{path}: {getattr(error, 'strerror', '') or f'line {line} is not JSON ({error})'}") from error


def _texts(values):
    return isinstance(values, list) and len(values) > 0 and all(isinstance(value, str) and value for value in values)


def _sample(row, number, folder):
    _need(isinstance(row, dict), f"is a JSON {type(row).__name__}, expected an object")
    prompt, turns = row.get("prompt"), row.get("turns")
    model, extra = (row[key] if isinstance(row.get(key), dict) else {} for key in ("reward_model", "extra_info"))
    answers = [a for a in (row.get("answer"), model.get("ground_truth"), extra.get("answer")) if a not in (None, "")]
    _need(answers and isinstance(answers[0], (str, int, float)) and str(answers[0]).strip(),
          "has no answer (a string or a number in 'answer' or 'reward_model.ground_truth')")
    _need(prompt is None or isinstance(prompt, list) and _texts([isinstance(message, dict) and message.get(key)
          for message in prompt for key in ("role", "content")]), "'prompt' is not a list of {role, content} with text")
    _need(turns is None or _texts(turns), "'turns' is not a list of the assistant's texts")
    question = row.get("question") or extra.get("question") or (prompt and prompt[-1]["content"])
    _need(isinstance(question, str) and question.strip(), "has no question")
    hint, media = row.get("mm_hint") or {}, {}
    _need(isinstance(hint, dict) and hint.get("hint_type", "image") in ("image", "video"), "'mm_hint' has no hint_type")
    for kind in ("image", "video"):
        paths = hint.get("hint_path") if hint.get("hint_type") == kind else row.get(f"{kind}_path")
        paths = [paths] if isinstance(paths, str) and paths else paths or []
        _need(not paths or _texts(paths), f"the {kind} path {paths!r} is neither a string nor a list of strings")
        media[kind] = tuple(str(folder / path) for path in paths)
    _need(any(media.values()), "has neither an image nor a video ('image_path', 'video_path' or 'mm_hint')")
    sample = Sample(str(row.get("id", extra.get("index", number - 1))), question, str(answers[0]), media["image"],
                    media["video"], str(row.get("data_source") or ""), str(row.get("ability") or ""), prompt, turns)
    messages(sample)  # reads the headers of all media and matches <image> marks with images
    return sample


def load(path):
    """Validation JSON, RL JSON or JSON lines -> list of Samples; media paths are relative to the file.
    Raises DataError (file, row from 1, what is wrong) for whatever would otherwise fail later in a run."""
    samples = []
    for number, row in _read(path, lines=True).items():
        try:
            samples.append(_sample(row, number, Path(path).parent))
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
    _need(samples, f"{path}: has no rows")
    return samples


def load_templates(path):
    """JSON object name -> text with {query} {width} {height} {video_info} {image_info}; other braces are text, doubled
    ones are halved. Names: a data_source, or "image", "video", "direct"; one alone serves for all. Raises DataError."""
    templates = _read(path)
    _need(isinstance(templates, dict) and _texts(list(templates.values())) and all("{query}" in text for text in
          templates.values()), f"{path}: expected an object of name -> text, with {{query}} in every text")
    return templates if len(templates) > 1 else dict.fromkeys(("image", "video", "direct"), *templates.values())


def _fields(sample):
    sizes = [image_size(image) for image in sample.images]
    films = [tuple(video_info(video).values()) for video in sample.videos]
    images = [f"image_clue_{k} (PIL image, width {w}, height {h})" for k, (w, h) in enumerate(sizes)]
    videos = [f"video_clue_{k} (decord VideoReader, width {w}, height {h}, {frames} frames, {fps:.4g} fps; "
              f"video_clue_{k}[i].asnumpy() is frame i)" for k, (w, h, frames, fps) in enumerate(films)]
    width, height = (sizes + [film[:2] for film in films] + [("", "")])[0]
    return dict(query=sample.question, width=str(width), height=str(height), image_info=", ".join(images),
                video_info=", ".join(videos), clues=", ".join(images + videos) or "nothing yet")


def messages(sample, templates=None, tools=True, frames=None):
    """The chat messages that ask `sample`: content is a list of {"type": "text", "text"} and {"type": "image"}, one of
    the latter per context image. The row's own prompt goes before templates, those before the built-in words; it speaks
    of the tool and is not used without: tools=False, or frames=[seconds, ...] in the context. Raises DataError."""
    direct, fields = not tools or frames is not None, _fields(sample)
    if not (prompt := None if direct else sample.prompt):
        templates = templates or dict(direct=DIRECT_PROMPT, image=AGENT_PROMPT, video=AGENT_PROMPT)
        names = sample.data_source, "direct" if direct else "video" if sample.videos else "image"
        text = next((templates[name] for name in names if name in templates), "")
        _need(text, f"no prompt template is named {names[1]!r} or {names[0]!r}")
        clues = "".join([f"<image_clue_{k}><image></image_clue_{k}>\n" for k in range(len(sample.images))]
                        + [f"{second:.1f} s <image>\n" for second in frames or ()])
        prompt = [{"role": "user", "content": text if "<image>" in text else clues + text}]
    marks, images = sum(m["content"].count("<image>") for m in prompt), len(sample.images) + len(frames or ())
    _need(marks == images, f"{marks} <image> marks for {images} images; the prompt needs one mark per image")
    fill = functools.partial(re.sub, r"\{(\w+)\}|\{\{|\}\}", lambda m: fields.get(m[1], m[0]) if m[1] else m[0][0])
    return [{"role": message["role"], "content": [  # cut at the marks, then filled, once: a question stays as it is
        dict(type="image") if part == "<image>" else
        dict(type="text", text=part if prompt is sample.prompt else fill(part))
        for part in re.split("(<image>)", message["content"]) if part]} for message in prompt]


def encode(tokenizer, messages, after_action):
    """Chat messages -> ids, one placeholder an image. The template's text may hold special tokens, a message's never.

    after_action: the messages answer an action; the ids are what the template puts between the end of that assistant
    turn and the start of the next, so that a trajectory only ever appends ids and never encodes its own text again.
    """
    empty, mark = [{"type": "text", "text": ""}], "\ue000"  # the template is filled with marks, cut there, then encoded
    before = [{"role": role, "content": empty} for role in ("user", "assistant")] if after_action else []
    chat, skip, ids = before + messages, len(before), []
    texts = [part["text"] for m in chat for part in m["content"] if "text" in part]
    marked = [{**m, "content": [part | {"text": mark} if "text" in part else part for part in m["content"]]}
              for m in chat]
    pieces = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True).split(mark)
    for text, piece in zip(["", *texts][skip:], pieces[skip:], strict=True):
        ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids
