"""Demonstrations that were recited, kept so that later epochs need not run their code again.

What a reader may rely on: memory is bounded. The prompt's own pictures are not kept, they are read
again. What the code showed is kept up to MOST_BYTES; beyond that the oldest are forgotten. A
demonstration is trained on as a whole or not at all, and one that cannot be is named once.
"""

import copy
from dataclasses import replace

from data import DataError, open_image
from engine.run import say
from engine.video import uniform_frames

MOST_BYTES = 256 << 20  # of pixels that the code of all kept demonstrations showed
MOST_KEPT = 10_000
WHY = {
    "OVER_LENGTH": "it is longer than --max_context",
    "EXCEED_MAX_IMAGES": "it shows more images than --max_images",
    "EXCEED_MAX_TURNS": "its last turn holds no answer",
    "ERROR_IN_ACTION": "turn {} holds no code and no answer, or something behind its closing tag",
    "DONE": "its answer holds no \\boxed{{}}, or more turns follow it",
}


class Demonstrations:
    """Row number of the data -> recited trajectory."""

    def __init__(self, frames: str = ""):
        """frames: rollout.Limits.frames, whose pictures are a prompt's too."""
        self.frames = frames
        self.kept = {}
        self.bytes = 0
        self.named = set()

    def __contains__(self, row: int) -> bool:
        return row in self.kept

    def get(self, row: int):
        """The trajectory of a row, with its prompt's pictures read again."""
        t = copy.copy(self.kept[row])
        t.turns = [replace(turn, seconds_tool=0.0) for turn in t.turns]  # no code runs this time
        try:
            if self.frames:
                _, shown = uniform_frames(t.sample, self.frames)
            else:
                shown = [open_image(image) for image in t.sample.images]
            t.images = shown + t.images
        except DataError as error:
            t.fail(error)
        return t

    def update(self, fresh: dict) -> None:
        """Keep {row: trajectory}; the oldest leave where it becomes too much."""
        for row, t in fresh.items():
            if t.error is not None:  # its file may be readable the next time
                continue
            kept = copy.copy(t)
            kept.images = t.images[t.prompt_images :]
            self.kept[row] = kept
            self.bytes += pixel_bytes(kept.images)
        while self.bytes > MOST_BYTES or len(self.kept) > MOST_KEPT:
            oldest = next(iter(self.kept))
            self.bytes -= pixel_bytes(self.kept.pop(oldest).images)

    def accept(self, t) -> bool:
        """Can it be trained on? Says, once for each, why not."""
        why = fault(t)
        key = (t.sample.id, t.sample.question)  # ids may repeat where there are several files
        if why and key not in self.named:
            self.named.add(key)
            say(f"demonstration {t.sample.id} is skipped: {why:.200}")
        return not why


def fault(t) -> str:
    """Why a recited trajectory cannot be trained on; empty where it can."""
    end = t.end_reason.value
    said = len(t.sample.turns or ())
    if t.error:
        return t.error
    if end == "DONE" and t.answer is not None and len(t.turns) == said:
        return ""
    if end == "EXCEED_MAX_TURNS" and not t.sample.answer:
        return ""  # without a reference it is a lesson in how to begin: it ends with its code
    if len(t.turns) > said:
        return WHY["EXCEED_MAX_TURNS"]
    return WHY[end].format(len(t.turns))


def pixel_bytes(images: list) -> int:
    """What RGB images take in memory."""
    return sum(3 * image.width * image.height for image in images)
