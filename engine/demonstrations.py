"""Demonstrations that were recited, kept so that later epochs need not run their code again.

What a reader may rely on: memory is bounded. The prompt's own pictures are not kept, they are read
again. What the code showed is kept up to MOST_BYTES; beyond that the oldest are forgotten. Each
demonstration that cannot be trained on is named once.
"""

import copy

from data import DataError, open_image
from engine.run import say

MOST_BYTES = 256 << 20  # of pixels that the code of all kept demonstrations showed
MOST_KEPT = 10_000
WHY = {
    "OVER_LENGTH": "it is longer than --max_context",
    "EXCEED_MAX_IMAGES": "it shows more images than --max_images",
    "EXCEED_MAX_TURNS": "its last turn holds no answer",
    "ERROR_IN_ACTION": "turn {} holds no code and no answer, or something behind its closing tag",
    "DONE": "its answer holds no \\boxed{{}}",
}


class Demonstrations:
    """Row number of the data -> recited trajectory."""

    def __init__(self):
        self.kept = {}
        self.bytes = 0
        self.named = set()

    def __contains__(self, row: int) -> bool:
        return row in self.kept

    def get(self, row: int):
        """The trajectory of a row, with its prompt's pictures read again."""
        t = copy.copy(self.kept[row])
        try:
            t.images = [open_image(image) for image in t.sample.images] + t.images
        except DataError as error:
            t.fail(error)
        return t

    def update(self, fresh: dict) -> None:
        """Keep {row: trajectory}; the oldest leave where it becomes too much."""
        for row, t in fresh.items():
            kept = copy.copy(t)
            kept.images = t.images[t.prompt_images :]
            self.kept[row] = kept
            self.bytes += pixel_bytes(kept.images)
        while self.bytes > MOST_BYTES or len(self.kept) > MOST_KEPT:
            oldest = next(iter(self.kept))
            self.bytes -= pixel_bytes(self.kept.pop(oldest).images)

    def report(self, t) -> None:
        """Say, once, which demonstration cannot be trained on, and why."""
        if t.sample.id not in self.named:
            self.named.add(t.sample.id)
            why = t.error or WHY[t.end_reason.value].format(len(t.turns))
            say(f"demonstration {t.sample.id} is skipped: {why}")


def pixel_bytes(images: list) -> int:
    return sum(3 * image.width * image.height for image in images)
