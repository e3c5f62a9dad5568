"""The prompt that asks a sample, and the ids that it becomes.

The built-in prompts use few words, since the tiny policy reads them with a vocabulary of a few
hundred tokens. An image is in the context *and* in the Python session, a video only in the session:
the policy pays for what it looks at.
"""

import copy
import functools
import json
import re
from pathlib import Path

import numpy as np

from data import DataError, Sample, image_size, open_video, video_info
from engine.prelude import named_in_prompt
from engine.video import frame_times

ANSWER_FORMAT = "<answer>\n\\boxed{your answer}\n</answer>\nQuestion: {query}"
DIRECT_PROMPT = f"Answer the question below. Write\n{ANSWER_FORMAT}"
AGENT_PROMPT = (
    "Answer the question below with the help of Python. The session keeps its variables and holds "
    "{clues}. print() shows text; plt.show() and image.show() show a figure, the next image_clue. "
    "To run code, write\n<code>\n```python\nyour code\n```\n</code>\nand read what comes back. "
    "Look as often as you need. To answer, write\n" + ANSWER_FORMAT
)
IMAGE = "image_clue_{} (PIL image, width {}, height {})"
VIDEO = """video_clue_{number} (decord VideoReader, width {width}, height {height}, \
{frames} frames, {rate}; video_clue_{number}[i].asnumpy() is frame i)"""
MARK = re.compile(r"(?:<(?:image|video)_clue_\d+>)?<(image|video)>(?:</(?:image|video)_clue_\d+>)?")
BUILT_IN = {"direct": DIRECT_PROMPT, "image": AGENT_PROMPT, "video": AGENT_PROMPT}


def load_templates(path: str | Path) -> dict[str, str] | None:
    """A JSON object of name -> text with {query}, {width}, {height}, {video_info}, {image_info}.

    None without a path. Other braces are text, doubled ones are halved. A name is a data_source, or
    "image", "video" or "direct"; one template alone serves for all. Raises DataError.
    """
    if not path:
        return None
    try:
        templates = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        complete = [isinstance(text, str) and "{query}" in text for text in templates.values()]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a JSON object of name -> text ({error})") from error
    if not complete or not all(complete):
        raise DataError(f"{path}: expected names with texts, each with {{query}} in it")
    if len(templates) > 1:
        return templates
    return dict.fromkeys(BUILT_IN, *templates.values())


def _frame_rate(path: str) -> str:
    """A video's frame rate in words: average and what the session says, where they differ."""
    fps = video_info(path)["fps"]
    gaps = np.diff(frame_times(path))
    if np.allclose(gaps, 1 / fps, rtol=0.1, atol=0.002):  # containers round to milliseconds
        return f"{fps:.4g} fps"
    with open_video(path) as reader:
        average = reader.get_avg_fps()
    return f"a variable rate of {fps:.4g} fps on average (get_avg_fps() says {average:.4g})"


def _name_marks(text: str) -> str:
    """A text whose <image> and <video> marks became the names of what they stand for.

    A mark before the first word says nothing and is left out.
    """
    named, *pieces = MARK.split(text)
    kinds = pieces[::2]
    for number, (kind, piece) in enumerate(zip(kinds, pieces[1::2], strict=True)):
        if named.strip():
            named += f"{kind}_clue_{kinds[:number].count(kind)}"
        named += piece
    return named.strip() if kinds else text


def _facts(sample: Sample) -> dict[str, str]:
    """What the fields of a template stand for. Reads the headers of the media."""
    images = []
    videos = []
    sizes = [("", "")]
    for number, image in enumerate(sample.images):
        sizes.append(image_size(image))
        images.append(IMAGE.format(number, *sizes[-1]))
    for number, video in enumerate(sample.videos):
        info = video_info(video)
        sizes.append((info["width"], info["height"]))
        videos.append(VIDEO.format(number=number, rate=_frame_rate(video), **info))
    clues = ", ".join(images + videos)
    width, height = sizes[:2][-1]  # of the first, if there is one
    return {
        "{query}": _name_marks(sample.question),
        "{width}": str(width),
        "{height}": str(height),
        "{image_info}": ", ".join(images),
        "{video_info}": ", ".join(videos),
        "{clues}": clues or "nothing yet",
        "{{": "{",
        "}}": "}",
    }


def _fill(text: str, facts: dict[str, str]) -> str:
    """A template with its fields filled in, once: what is filled in stays as it is."""
    return re.sub(r"\{\w+\}|\{\{|\}\}", lambda field: facts.get(field[0], field[0]), text)


def _template(sample: Sample, templates: dict[str, str], direct: bool) -> str:
    """The template for a sample: that of its data_source, or else of its kind."""
    kind = "video" if sample.videos else "image"
    kind = "direct" if direct else kind
    text = templates.get(sample.data_source) or templates.get(kind)
    if not text:
        raise DataError(f"no prompt template is named {kind!r} or {sample.data_source!r}")
    return text


def messages(
    sample: Sample,
    templates: dict[str, str] | None = None,
    tools: bool = True,
    frames: list[float] | None = None,
    prelude: str = "",
) -> list[dict]:
    """The chat messages that ask a sample.

    Their content is a list of {"type": "text", "text"} and {"type": "image"}, one of the latter per
    image of the context. The row's own prompt goes before templates, and those before the built-in
    words; it speaks of the tool, and so it is not used without: with tools=False, or with frames,
    the seconds of a video's frames in the context. prelude: a file whose functions are named at the
    end, where there is the tool (engine/prelude.py). Raises DataError.
    """
    direct = not tools or frames is not None
    facts = _facts(sample)
    own = None if direct else sample.prompt
    prompt = own
    if not own:
        text = _template(sample, templates or BUILT_IN, direct)
        if "<image>" not in text:
            clues = range(len(sample.images))
            marks = [f"<image_clue_{k}><image></image_clue_{k}>\n" for k in clues]
            marks += [f"{second:.1f} s <image>\n" for second in frames or ()]
            text = "".join(marks) + text
        prompt = [{"role": "user", "content": text}]
    chat = []
    shown = 0
    for message in prompt:
        content = []
        for part in re.split("(<image>)", message["content"]):
            if part == "<image>":
                content.append({"type": "image"})
                shown += 1
            elif part:
                text = _name_marks(part) if own else _fill(part, facts)
                content.append({"type": "text", "text": text})
        chat.append({"role": message["role"], "content": content})
    functions = "" if direct else named_in_prompt(prelude)
    if functions:
        chat[-1]["content"].append({"type": "text", "text": functions})
    images = len(sample.images) + len(frames or ())
    if shown != images:
        raise DataError(f"{shown} <image> marks for {images} images; a prompt needs one for each")
    return chat


def encode(tokenizer: object, messages: list[dict], after_action: bool) -> list[int]:
    """Chat messages -> ids, with one placeholder per image.

    The template's text may hold special tokens, that of a message never. after_action: the messages
    answer an action; the ids are what the template puts between the end of that assistant turn and
    the start of the next, so that a trajectory only ever appends ids and never encodes its own text
    again.
    """
    # The template is filled with marks in place of texts, cut there, and encoded piece by piece.
    mark = "\ue000"
    before = []
    if after_action:
        for role in ("user", "assistant"):
            before.append({"role": role, "content": [{"type": "text", "text": ""}]})
    chat = copy.deepcopy(before + messages)
    texts = [""]  # before the first mark there is no text of a message
    for message in chat:
        for part in message["content"]:
            if "text" in part:
                texts.append(part["text"])
                part["text"] = mark
    filled = _fill_chat(tokenizer, tokenizer.get_chat_template(), json.dumps(chat))
    pieces = list(zip(texts, filled.split(mark), strict=True))
    ids = []
    for text, piece in pieces[len(before) :]:
        ids += _ids(tokenizer, text, split_special_tokens=True)
        ids += _ids(tokenizer, piece)
    return ids


@functools.lru_cache(64)
def _fill_chat(tokenizer: object, template: str, chat: str) -> str:
    """A chat template filled with marks: chats have few shapes, and a template takes its time."""
    settings = dict(chat_template=template, tokenize=False, add_generation_prompt=True)
    return tokenizer.apply_chat_template(json.loads(chat), **settings)


@functools.lru_cache(512)
def _ids(tokenizer: object, text: str, **settings) -> tuple[int, ...]:
    """Ids of a piece. Most pieces are the same in every prompt and in every observation."""
    return tuple(tokenizer(text, add_special_tokens=False, **settings).input_ids)
