"""The prompt that asks a sample, and the ids that it becomes.

The built-in prompts use few words, since the tiny policy reads them with a vocabulary of a few
hundred tokens. An image is in the context *and* in the Python session, a video only in the session:
the policy pays for what it looks at.
"""

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
    fps = f"{video_info(path)['fps']:.4g} fps"
    gaps = np.diff(frame_times(path))
    if len(gaps) == 0:
        return fps
    tolerance = max(0.1 * gaps.mean(), 0.002)  # containers round to milliseconds
    if np.abs(gaps - gaps.mean()).max() <= tolerance:
        return fps
    with open_video(path) as reader:
        average = reader.get_avg_fps()
    return f"a variable rate of {fps} on average (get_avg_fps() says {average:.4g})"


def _name_marks(text: str, kind: str) -> str:
    """A text whose <image> or <video> marks became the names of what they stand for.

    A mark before the first word says nothing and is left out.
    """
    pieces = re.split(rf"(?:<{kind}_clue_\d+>)?<{kind}>(?:</{kind}_clue_\d+>)?", text)
    if len(pieces) == 1:
        return text
    named = pieces[0]
    for number, piece in enumerate(pieces[1:]):
        named += f"{kind}_clue_{number}{piece}" if named.strip() else piece
    return named.strip()


def _facts(sample: Sample) -> dict[str, str]:
    """What the fields of a template stand for. Reads the headers of the media."""
    sizes = []
    images = []
    videos = []
    for number, image in enumerate(sample.images):
        width, height = image_size(image)
        sizes.append((width, height))
        images.append(f"image_clue_{number} (PIL image, width {width}, height {height})")
    for number, video in enumerate(sample.videos):
        info = video_info(video)
        sizes.append((info["width"], info["height"]))
        videos.append(
            f"video_clue_{number} (decord VideoReader, width {info['width']}, height "
            f"{info['height']}, {info['frames']} frames, {_frame_rate(video)}; "
            f"video_clue_{number}[i].asnumpy() is frame i)"
        )
    width, height = sizes[0] if sizes else ("", "")
    question = _name_marks(sample.question, "image")
    return dict(
        query=_name_marks(question, "video"),
        width=str(width),
        height=str(height),
        image_info=", ".join(images),
        video_info=", ".join(videos),
        clues=", ".join(images + videos) or "nothing yet",
    )


def _fill(text: str, facts: dict[str, str]) -> str:
    """A template with its fields filled in, once: what is filled in stays as it is."""

    def value(match: re.Match) -> str:
        if match[1]:
            return facts.get(match[1], match[0])
        return match[0][0]  # one brace of two

    return re.sub(r"\{(\w+)\}|\{\{|\}\}", value, text)


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
                text = _name_marks(part, "video") if own else _fill(part, facts)
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
    empty = [{"type": "text", "text": ""}]
    before = [{"role": "user", "content": empty}, {"role": "assistant", "content": empty}]
    chat = before + messages if after_action else messages
    texts = [""]  # before the first mark there is no text of a message
    marked = []
    for message in chat:
        content = []
        for part in message["content"]:
            if "text" in part:
                texts.append(part["text"])
                part = {"type": "text", "text": mark}
            content.append(part)
        marked.append({**message, "content": content})
    filled = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    pieces = list(zip(texts, filled.split(mark), strict=True))
    ids = []
    for text, piece in pieces[2:] if after_action else pieces:
        ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids
