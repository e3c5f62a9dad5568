r"""The built-in puzzles: pictures and videos in which only looking answers, and how to look.

They exist so that one can watch, on a laptop, how reinforcement learning teaches a policy to look.

Image: nine small plates lie on a large picture. What is asked about one of them is painted so
finely that its mean over the plate is plain grey. At the resolution of the context it is not there
(a test trains a reader on it, in vain); in a crop of a few pixels it is. The picture as a whole
carries a hint, which is right with probability `hint`: this tempts the policy to answer at once,
and the tool reward must outweigh it. No other plate carries the answer, so a look that misses is
never right by luck. Answers are uniform and do not depend on the wording, so that a blind policy is
at chance.

Video: a lamp in 20 to 120 seconds of H.264. Either it changes its colour every second and one
second is asked about, or it is dark and lights up for half a second, once, twice or several times:
then code must find the moment. A few uniform frames miss both. Frames are small, so that reading a
whole clip costs milliseconds. PyAV writes the clips, since it brings its own libx264; decord only
reads.

Demonstrations are of mixed quality on purpose. How often they look, and how often a look aims
right, leaves reinforcement learning its work. What a look shows comes from the real sandbox when
the demonstration is run, so the texts never quote it.

Everything follows from (task, seed, index, split). Whether a scene is held out is decided by a
checksum of the scene itself, so that no scene is in both splits.

A task of your own
------------------
A task is a function that returns a list of `data.Sample`; nothing needs to be registered:

    def dots(task, n, seed, split="train", folder=None, **difficulty):
        samples = []
        for k in range(n):
            rng = default_rng((seed, k, split == "heldout"))
            count, picture = draw_dots(rng)
            question = "How many dots are there?"
            sample = Sample(f"{seed}-{k}", question, str(count), (picture,), data_source="dots")
            samples.append(sample)
        return samples

- `images` are PIL images (or paths), which the policy sees and code finds as image_clue_0, ….
  `videos` are paths; code finds them as video_clue_0, …, and the policy sees only what it shows.
- engine/prompt.py puts prompt and question together; a sample's own `prompt` replaces the
  built-in words.
- What the policy writes into \boxed{} reaches `verify(answer, sample)`. It compares with
  `sample.answer`: as an option where the question lists options "(A) … (B) …", as a number, or
  as words; True, False, or None where a rule cannot tell. Where `data_source` ends in
  "vsi_numerical" or "_rule_verifiable", a number is right when it is near enough (mean relative
  accuracy of at least 0.5).
- For a verifier of your own, give the samples a `data_source` of their own, and let `score` in
  reward.py call your function, from (answer, sample) to True or False, for this data_source.
- train.py calls `puzzles`: with n = 1 and a new seed for each training sample, and once with
  split="heldout" for all that it evaluates on. Import your function there in its place. Or write
  the samples to a file and give it as --data.
- `demonstrations`, `captions` and `corpus` only serve the cold start of the built-in tiny policy.
  With --model a task does without them.
"""

import hashlib
import json
import os
import re
import tempfile
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import numpy as np
from numpy.random import default_rng
from PIL import Image

from data import DataError, Sample
from engine.prompt import messages

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 185, 60),
    "blue": (50, 70, 230),
    "yellow": (235, 215, 40),
    "cyan": (40, 210, 220),
    "magenta": (225, 50, 215),
}
STRIPES = {  # (x, y): the direction across the stripes
    "level": (0.0, 1.0),
    "upright": (1.0, 0.0),
    "rising": (0.7, 0.7),
    "falling": (0.7, -0.7),
}
# No number is within 30 % of two of these, so MRA >= 0.5 accepts one guess in four.
COUNTS = ("1", "2", "4", "8")
NAMES = tuple(COLOURS)
KEPT = 4000  # clips in the cache
UNUSED = 3 * 3600  # seconds after which no run can still need a clip beyond these

# What is asked -----------------------------------------------------------------------------------
ASK = {  # {}: what is asked for
    "colour": (
        "Plates 1 to 9 lie in rows. What colour is the tiny square on plate {}?",
        "What colour is the tiny square on plate {}? Plates are counted row by row.",
        "Nine plates lie in three rows. Plate {} has a tiny square: which colour?",
    ),
    "stripes": (
        "Plates 1 to 9 lie in rows. Which way do the fine stripes on plate {} run?",
        "Which way do the fine stripes on plate {} run? Plates are counted row by row.",
        "Nine plates lie in three rows. Plate {} has fine stripes: which way?",
    ),
    "second": (
        "What colour is the lamp at second {}?",
        "At second {}, what colour is the lamp?",
        "The lamp changes. At second {}, which colour?",
    ),
    "flash": (
        "The lamp lights up once. What colour is it then?",
        "What colour is the one flash of the lamp?",
    ),
    "order": (
        "The lamp lights up twice. What colour comes {}?",
        "Of the lamp's two flashes, what colour comes {}?",
    ),
    "count": (
        "How many times does the lamp light up?",
        "The lamp lights up several times. How often? Count.",
    ),
}
# The possible answers to each kind of question
VALUES = dict.fromkeys(ASK, NAMES) | {"stripes": tuple(STRIPES), "count": COUNTS}
ASK_CROP = {  # about a picture that shows only what is asked for
    "colour": "What colour is the tiny square?",
    "stripes": "Which way do the fine stripes run?",
    "lamp": "What colour is the lamp, or is it dark?",
}
ASK_WHOLE = {  # about the hint
    "colour": "What colour is the light?",
    "stripes": "Which way do the broad bands run?",
}

# What demonstrations say -------------------------------------------------------------------------
CODE = "<code>\n```python\n{}\n```\n</code>"
ANSWER = "<answer>\n\\boxed{{{}}}\n</answer>"
SHOW_CROP = "image_clue_0.crop(({0},{1},{2},{3})).show()"
TURNED_CROP = "image_clue_0.crop(({2},{1},{0},{3})).show()"  # PIL refuses it
SHOW_SECOND = "Image.fromarray(video_clue_0[round({}*video_clue_0.get_avg_fps())].asnumpy()).show()"
# A lit lamp has a colour, and all else is grey: s says how colourful each frame is.
SCAN = (
    "a=video_clue_0.get_batch(range(len(video_clue_0))).asnumpy()\n"
    "s=np.ptp(a[:,::8,::8],-1).mean((1,2))\n"
)
SHOW_FLASH = SCAN + "Image.fromarray(a[np.flatnonzero(s>s.max()/2)[{}]]).show()"
COUNT_FLASHES = SCAN + "b=s>s.max()/2\nprint((b[1:]>b[:-1]).sum())"

# Texts for the tokenizer -------------------------------------------------------------------------
OBSERVATION = "<tool_response>\n<interpreter>\nText Result:\n{}\n</interpreter>\n</tool_response>"
FIGURE = "\nImage Result:\n<image_clue_{0}>|</image_clue_{0}>"  # |: here is the image
TRACEBACK = 'Traceback (most recent call last):\n  File "<code>", line 1, in <module>\n    {}\n'
ERRORS = (
    "ValueError: Coordinate 'right' is less than 'left'",
    "IndexError: Index: 720 out of bound: 320",
)
ANSWERS = "|".join([*COLOURS, *STRIPES])
VARIES = re.compile(  # a text is cut around what this finds
    r"(\d\d+"  # a number: a place, a second, a size
    r"|(?<=late )\d"  # the plate that is asked about
    r"|(?<=\[)-?\d(?=\]\])"  # the flash that is looked at
    r"|(?<=boxed\{)\d|(?<=Result:\n)\d"  # a count, written or read
    rf"|\b(?:first|last|{ANSWERS})\b)"
    r"|(?=<code>|<answer>)"  # the start of an action
)


@dataclass(frozen=True)
class Difficulty:
    """Every number that decides how hard a puzzle is and how good its demonstrations are."""

    # The image puzzle; lengths are in pixels.
    kinds: tuple = ("colour",)  # of questions, equally often: colour, stripes
    hint: float = 0.48  # probability that the picture's light (or bands) tells the truth
    canvas: int = 448  # side of the picture
    plates: tuple = (20, 24)  # smallest and largest side; a demonstrated crop stays inside
    chip: int = 4  # side of the square whose colour is asked
    ring: int = 8  # side of its rim in the opposite tint, which makes the mean grey
    balance: float = 1.1  # strength of that tint; 1 is exact for a box filter
    period: float = 4.0  # of the fine stripes
    jitter: int = 3  # of a plate around its place in the grid
    crop: int = 14  # side of a demonstrated crop; half of it must hold jitter and chip
    # Demonstrations.
    looks: tuple = (0.55, 0.15, 0.10, 0.10, 0.10)  # shares of 0, 1, ... looks
    aim: float = 0.65  # share of looks that go to the right place
    slip: float = 0.03  # share of looks whose code fails
    # The video puzzle.
    clips: tuple = ("second", "second", "flash", "order", "count")  # of questions, equally often
    seconds: tuple = (20, 120)  # shortest and longest clip
    fps: tuple = (4, 5, 6)  # frame rates
    frame: int = 64  # side of a frame (decord fails on 48), twice the lamp's
    every: int = 10  # the seconds asked about are multiples of it
    flash: float = 0.5  # seconds that a lamp stays lit
    # Captions.
    lessons: tuple = (0.4, 0.2, 0.4)  # shares of crops, whole pictures, questions to aim at


def _below(rng, n):
    """A random whole number from 0 to n - 1."""
    return int(rng.integers(n))


def _pick(rng, values):
    return values[_below(rng, len(values))]


def _others(values, value):
    return [other for other in values if other != value]


def _options(kind):
    """The end of a question: the possible answers, except for counts."""
    if kind == "count":
        return ""
    *values, last = VALUES[kind]
    return f" ({', '.join(values)} or {last})"


def _question(scene):
    return ASK[scene.kind][scene.wording].format(scene.asked) + _options(scene.kind)


# In all that follows, `rng` is a numpy Generator and `d` a Difficulty.


# Pixels -------------------------------------------------------------------------------------------
def _box(x, y, side):
    """left, upper, right, lower of a square around (x, y)."""
    left = x - side // 2
    upper = y - side // 2
    return left, upper, left + side, upper + side


def _square(x, y, side):
    """The same as an index of pixels (height, width, 3)."""
    left, upper, right, lower = _box(x, y, side)
    return slice(upper, lower), slice(left, right)


def _wave(direction, side, period, phase):
    """Stripes of mean 0 in -1..1 that vary along `direction`, as (side, side)."""
    y, x = np.mgrid[:side, :side]
    way = direction[0] * x + direction[1] * y
    return np.sin(2 * np.pi * (way / period + phase))


def _cells(rng, count):
    """A picture of count x count pixels of random colours."""
    return Image.fromarray(rng.integers(0, 256, (count, count, 3), dtype=np.uint8))


def _noise(rng, count, side):
    """Smooth RGB noise of mean 0 and standard deviation about 1, as (side, side, 3)."""
    smooth = _cells(rng, count).resize((side, side), Image.BICUBIC)
    return (np.asarray(smooth) - 127.5) / 74


def _centre(d, plate):
    """x, y of the place in the grid of a plate (from 0), from which jitter may shift it."""
    row, column = divmod(plate, 3)
    return (2 * column + 1) * d.canvas // 6, (2 * row + 1) * d.canvas // 6


def _crop_box(d, plate):
    """The crop that shows a plate's chip, wherever the plate was shifted."""
    return _box(*_centre(d, plate), d.crop)


def _paint_plate(rng, d, kind, value, side):
    """One plate as (side, side, 3) bytes: mottled grey, and `value`, invisible in the mean."""
    grey = rng.uniform(110, 150)
    patch = grey + 14 * _noise(rng, 5, side)
    if kind == "stripes":
        patch += 60 * _wave(STRIPES[value], side, d.period, rng.random())[..., None]
    else:
        contrast = np.array(COLOURS[value]) - grey
        middle = side // 2
        rim_area = d.ring**2 - d.chip**2
        patch[_square(middle, middle, d.ring)] -= d.balance * contrast * d.chip**2 / rim_area
        patch[_square(middle, middle, d.chip)] = grey + contrast
    return patch.clip(0, 255).astype(np.uint8)


# The image puzzle --------------------------------------------------------------------------------
class Picture:
    """What there is to know about a picture, as plain values: it can be painted again.

    Names, values and order of the attributes decide the checksum, and so the split.
    """

    source = "puzzle_image"

    def __init__(self, rng, d):
        """A random picture; `scenes` adds `split`."""
        self.kind = _pick(rng, d.kinds)  # colour or stripes
        self.asked = 1 + _below(rng, 9)  # the plate that is asked about
        self.answer = _pick(rng, VALUES[self.kind])
        wrong = _others(VALUES[self.kind], self.answer)
        # What each plate shows, what the picture as a whole suggests, and its colour.
        self.plates = [self.answer if k == self.asked else _pick(rng, wrong) for k in range(1, 10)]
        self.hint = self.answer if rng.random() < d.hint else _pick(rng, wrong)
        self.light = self.hint if self.kind == "colour" else _pick(rng, NAMES)
        self.wording = _below(rng, len(ASK[self.kind]))  # which of the questions
        smallest, largest = d.plates
        self.side = int(rng.integers(smallest, largest + 1))  # of a plate
        # (x, y) by which each plate is off its place in the grid
        self.shift = rng.integers(-d.jitter, d.jitter + 1, (9, 2)).tolist()
        self.texture = _below(rng, 2**32)  # seed of all that is random in the pixels

    def paint(self, d) -> Image.Image:
        """The pixels: noise in one light (the hint of colours), bands (of stripes), nine plates."""
        rng = default_rng(self.texture)
        size = (d.canvas, d.canvas)
        noise = _cells(rng, d.canvas // int(rng.choice((4, 8, 16))))
        noise = noise.resize(size, _pick(rng, (Image.NEAREST, Image.BILINEAR)))
        light = Image.new("RGB", size, COLOURS[self.light])
        ground = Image.blend(noise, light, rng.uniform(0.4, 0.6))
        if self.kind == "stripes":
            bands = _wave(STRIPES[self.hint], 56, rng.uniform(9, 13), rng.random())
            mask = Image.fromarray((127.5 + 127.5 * bands).astype(np.uint8))
            shade = Image.blend(ground, Image.new("RGB", size), 0.6)
            ground = Image.composite(ground, shade, mask.resize(size, Image.BILINEAR))
        pixels = np.array(ground)
        for plate, value in enumerate(self.plates):
            x, y = _centre(d, plate)
            right, down = self.shift[plate]
            painted = _paint_plate(rng, d, self.kind, value, self.side)
            pixels[_square(x + right, y + down, self.side)] = painted
        return Image.fromarray(pixels)

    def sample(self, name, d, folder=None) -> Sample:
        """The picture and its question; it needs no folder."""
        images = (self.paint(d),)
        return Sample(name, _question(self), self.answer, images, (), self.source, self.kind)

    def look(self, rng, d) -> tuple:
        """(code, what it shows): a crop of the plate asked about or of another, or a failure."""
        plate = self.asked - 1
        if rng.random() >= d.aim:
            plate = (plate + 1 + _below(rng, 8)) % 9
        box = _crop_box(d, plate)
        if rng.random() < d.slip:
            return TURNED_CROP.format(*box), None
        return SHOW_CROP.format(*box), self.plates[plate]

    def lesson(self, name, rng, d) -> Sample | None:
        """What a crop shows, or what the whole picture hints at; None: a look is to be learned."""
        crops, wholes = d.lessons[:2]
        share = rng.random()
        plate = _below(rng, 9)
        options = _options(self.kind)
        if share < crops:
            # One plate is painted and not the whole picture, since a crop stays inside it.
            value = self.plates[plate]
            painted = Image.fromarray(_paint_plate(rng, d, self.kind, value, self.side))
            x, y = self.shift[plate]
            middle = self.side // 2
            crop = painted.crop(_box(middle - x, middle - y, d.crop))
            question = ASK_CROP[self.kind] + options
            return Sample(name, question, value, (crop,), (), self.source, "crop")
        if share < crops + wholes:
            question = ASK_WHOLE[self.kind] + options
            return Sample(name, question, self.hint, (self.paint(d),), (), self.source, "whole")
        return None


# The video puzzle --------------------------------------------------------------------------------
class Clip:
    """What there is to know about a clip. As with Picture, the attributes decide the checksum."""

    source = "puzzle_video"

    def __init__(self, rng, d):
        """A random clip; `scenes` adds `split`. The file comes later."""
        self.kind = _pick(rng, d.clips)  # second, flash, order or count
        # Short clips come more often than long ones: they are cheap.
        self.seconds = int(np.exp(rng.uniform(*np.log(d.seconds))))
        answer = _pick(rng, VALUES[self.kind])
        draw = self._changes if self.kind == "second" else self._flashes
        asked, lights = draw(rng, d, answer)
        self.fps = _pick(rng, d.fps)
        self.answer = answer
        self.asked = asked  # a second, or "first" or "last", or ""
        self.lights = lights  # (begin, end, colour) in seconds; at other times the lamp is dark
        self.hint = _pick(rng, VALUES[self.kind])  # a guess, for those who never look
        self.wording = _below(rng, len(ASK[self.kind]))  # which of the questions
        self.texture = _below(rng, 2**32)  # seed of all that is random in the pixels

    def _changes(self, rng, d, answer):
        """(the second that is asked about, the lights) of a lamp that changes every second."""
        asked = d.every * (1 + _below(rng, (self.seconds - 1) // d.every))
        lights = []
        for second in range(self.seconds):
            colour = answer if second == asked else _pick(rng, NAMES)
            lights.append((second, second + 1, colour))
        return asked, lights

    def _flashes(self, rng, d, answer):
        """("first", "last" or "", the lights) of a lamp that is dark most of the time."""
        numbers = {"flash": 1, "order": 2, "count": answer}
        # In every other second one flash may begin, so that two never run together.
        slots = np.arange(1, self.seconds - 1, 2)
        slots = np.sort(rng.choice(slots, int(numbers[self.kind]), replace=False))
        shown = [_pick(rng, NAMES) for _ in slots]
        asked = ""
        if self.kind == "flash":
            shown = [answer]
        elif self.kind == "order":
            asked = _pick(rng, ("first", "last"))
            shown = [answer, _pick(rng, _others(NAMES, answer))]
            if asked == "last":
                shown.reverse()
        lights = []
        for slot, colour in zip(slots, shown, strict=True):
            begin = round(float(slot + rng.random()), 2)
            lights.append((begin, begin + d.flash, colour))
        return asked, lights

    def lit(self, second) -> str | None:
        """The lamp's colour at a time in seconds, or None while it is dark."""
        for begin, end, colour in self.lights:
            if begin <= second < end:
                return colour
        return None

    def frame(self, d, colour) -> np.ndarray:
        """One frame as (frame, frame, 3) bytes: a grey texture and the lamp; None: dark."""
        rng = default_rng(self.texture)
        lamp = d.frame // 2
        grey = rng.integers(70, 150) + 12 * _noise(rng, 8, d.frame).mean(-1, keepdims=True)
        pixels = np.repeat(grey, 3, -1).clip(0, 255).astype(np.uint8)
        x, y = rng.integers(2, d.frame - lamp - 2, 2)
        pixels[y : y + lamp, x : x + lamp] = COLOURS.get(colour, 40)
        return pixels

    def film(self, d, path) -> None:
        """Write H.264 in mp4. A pale speck drifts through it, so that no two frames are alike."""
        planes = {}  # a frame as H.264 has it (YUV), for each state of the lamp
        for colour in (None, *NAMES):
            frame = av.VideoFrame.from_ndarray(self.frame(d, colour), format="rgb24")
            planes[colour] = frame.to_ndarray(format="yuv420p")
        with av.open(str(path), "w", format="mp4") as file:
            options = {
                "preset": "ultrafast",
                "crf": "23",
                "g": str(6 * self.fps),  # frames from one that stands by itself to the next
                "threads": "1",
            }
            stream = file.add_stream("libx264", self.fps, options, width=d.frame, height=d.frame)
            for number in range(self.seconds * self.fps):
                plane = planes[self.lit(number / self.fps)].copy()
                x = number % (d.frame - 3)
                y = number // 7 % (d.frame - 3)
                plane[y : y + 3, x : x + 3] = 190
                file.mux(stream.encode(av.VideoFrame.from_ndarray(plane, format="yuv420p")))
            file.mux(stream.encode())

    def path(self, d, folder=None) -> Path:
        """The clip's file, written if it is not there. Its name is a hash of what it shows.

        It is written aside and then renamed, so that other processes only ever see whole files.
        """
        folder = Path(folder or f"{tempfile.gettempdir()}/puzzle-clips-{os.getuid()}")
        description = repr((vars(self), d.frame)).encode()
        name = hashlib.sha256(description).hexdigest()[:20]
        path = folder / self.split / f"{name}.mp4"
        try:
            os.utime(path)  # it is in use
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            aside = path.with_suffix(f".{os.getpid()}.part")
            self.film(d, aside)
            aside.replace(path)
            if name.startswith("00"):  # one clip in 256, since it takes a while
                _make_room(path)
        return path

    def sample(self, name, d, folder=None) -> Sample:
        """The clip and its question; a count goes by mean relative accuracy."""
        videos = (str(self.path(d, folder)),)
        source = "vsi_numerical" if self.kind == "count" else self.source
        return Sample(name, _question(self), self.answer, (), videos, source, self.kind)

    def look(self, rng, d) -> tuple:
        """(code, what it shows) of a frame or a count, also elsewhere, or a failure.

        It shows None where the code fails or the lamp is dark.
        """
        aimed = rng.random() < d.aim
        if rng.random() < d.slip:
            # At a second after the end there is no frame.
            return SHOW_SECOND.format(d.every * (self.seconds // d.every + 1)), None
        if self.kind == "count" and aimed:
            return COUNT_FLASHES, self.answer
        if self.kind == "order" or (self.kind == "flash" and aimed):
            first = self.asked != "last"
            place = 0 if first == aimed else -1  # a look that misses goes to the other flash
            *_, colour = self.lights[place]
            return SHOW_FLASH.format(place), colour
        second = self.asked
        if self.kind != "second" or not aimed:
            others = _others(range(d.every, self.seconds, d.every), self.asked)
            second = _pick(rng, others or [1])
        value = None if self.kind == "count" else self.lit(second)  # one frame is no count
        return SHOW_SECOND.format(second), value

    def lesson(self, name, rng, d) -> Sample | None:
        """What a frame shows, lit or dark; None: a look is to be learned."""
        if rng.random() >= sum(d.lessons[:2]):
            return None
        value = _pick(rng, (*NAMES, "dark"))
        question = ASK_CROP["lamp"] + _options("colour")
        frame = Image.fromarray(self.frame(d, value))
        return Sample(name, question, value, (frame,), (), self.source, "crop")


def _make_room(newest):
    """Delete the oldest clips beside `newest` beyond KEPT, unless a run may still need them."""
    with suppress(FileNotFoundError):  # another process may make room at the same time
        for file in sorted(newest.parent.iterdir(), key=os.path.getmtime)[:-KEPT]:
            if newest.stat().st_mtime - file.stat().st_mtime > UNUSED:
                file.unlink()


# What the rest calls -----------------------------------------------------------------------------
TASKS = {"image": Picture, "video": Clip}


def scenes(task: str, n: int, seed: int, split: str, use: str, **difficulty):
    """Yield (a sample's name, its scene, its random numbers, the Difficulty) n times.

    The first of them do not depend on n. `use` sets apart what scenes are drawn for. The seed
    shifts the alternation of several tasks, so that single samples of successive seeds alternate,
    too. Raises ValueError for an unknown task or split.
    """
    d = Difficulty(**difficulty)
    names = task.split(",")
    if not set(names) <= set(TASKS) or split not in ("train", "heldout"):
        raise ValueError(
            f"no task {task!r} (image, video or image,video)"
            f" or no split {split!r} (train or heldout)"
        )
    for index in range(n):
        name = names[(seed + index) % len(names)]
        rng = default_rng((seed % 2**63, index, zlib.crc32(f"{name} {split} {use}".encode())))
        found = None
        while found != split:
            scene = TASKS[name](rng, d)
            # One scene in eight is held out, whatever the seed.
            checksum = zlib.crc32(repr(vars(scene)).encode())
            found = "train" if checksum % 8 else "heldout"
        scene.split = split
        yield f"{name}-{use}-{split}-{seed}-{index}", scene, rng, d


def _turns(scene, rng, d):
    """What a scripted searcher says: some looks, then the value seen, else the guess.

    Once it has seen a value, further looks only repeat that one.
    """
    turns = []
    seen = None
    for _ in range(rng.choice(len(d.looks), p=d.looks)):
        if seen is None:
            code, seen = scene.look(rng, d)
        turns.append(CODE.format(code))
    return [*turns, ANSWER.format(seen or scene.hint)]


def read_difficulty(text: str) -> dict:
    """A JSON object of fields of Difficulty -> all of them, as arguments of `puzzles`.

    Raises DataError.
    """
    try:
        found = asdict(Difficulty(**json.loads(text or "{}")))
        for name, usual in asdict(Difficulty()).items():
            if not _possible(found[name], usual):
                raise ValueError(f"{name} cannot be {found[name]!r}")
    except (ValueError, TypeError) as error:
        raise DataError(
            f"--difficulty: a JSON object of fields of Difficulty in tasks/puzzles.py ({error})"
        ) from None
    return found


def _possible(value, usual):
    """Is a value of the same kind as the usual one, and no negative number?"""
    if isinstance(usual, tuple):
        some = isinstance(value, list | tuple) and value
        return some and all(_possible(item, usual[0]) for item in value)
    if isinstance(usual, str):
        return value in VALUES
    return isinstance(value, int | float) and value >= 0


def puzzles(
    task: str,
    n: int,
    seed: int,
    split: str = "train",
    folder: Path | None = None,
    **difficulty,
) -> list[Sample]:
    """n puzzles; a longer call begins with the same ones.

    task: "image", "video" or "image,video", which alternates. split: "train" or "heldout", never
    the same scene. folder: of the clips; None: a cache in the temporary folder. difficulty: fields
    of Difficulty. Raises ValueError or TypeError for unknown names.
    """
    return [
        scene.sample(name, d, folder)
        for name, scene, _, d in scenes(task, n, seed, split, "puzzle", **difficulty)
    ]


def demonstrations(task: str, n: int, seed: int, folder=None, **difficulty) -> list[Sample]:
    """n training puzzles with `turns`: what a searcher of mixed quality says, code not yet run."""
    return [
        replace(scene.sample(name, d, folder), turns=_turns(scene, rng, d))
        for name, scene, rng, d in scenes(task, n, seed, "train", "demonstration", **difficulty)
    ]


def captions(task: str, n: int, seed: int, folder=None, **difficulty) -> list[Sample]:
    """n Samples of one turn that teach to see, before demonstrations teach to search.

    ability: "crop" (what a crop shows), "whole" (the hint) or "call" (where to look).
    """
    samples = []
    for name, scene, rng, d in scenes(task, n, seed, "train", "caption", **difficulty):
        sample = scene.lesson(name, rng, d)
        if sample:
            turn = ANSWER.format(sample.answer)
        else:
            # It ends with its code, and has no answer to compare with.
            sample = replace(scene.sample(name, d, folder), answer="", ability="call")
            code, _ = scene.look(rng, d)
            turn = CODE.format(code)
        samples.append(replace(sample, turns=[turn]))
    return samples


def corpus(task: str, n: int = 60, folder=None, **difficulty) -> list[str]:
    """Texts as the policy will read and write them, to train a tokenizer on.

    They are prompts, turns, observations and errors, cut where texts vary (numbers, answers, the
    start of an action). Then no token spans a choice of the policy or hides a number of the
    question, and "40" read is the same token as "40" written.
    """
    n *= len(task.split(","))
    samples = captions(task, n, 0, folder, **difficulty)
    samples += demonstrations(task, 2 * n, 0, folder, **difficulty)
    texts = [OBSERVATION.format(TRACEBACK.format(error)) for error in ERRORS]
    for sample in samples:
        parts = messages(sample)[0]["content"]
        texts += [part["text"] for part in parts if "text" in part]
        texts += sample.turns
        for turn in range(len(sample.turns)):
            figure = FIGURE.format(len(sample.images) + turn)
            texts += OBSERVATION.format(figure).split("|")
        if sample.ability == "count":
            texts += [OBSERVATION.format(count + "\n") for count in COUNTS]
    return [piece for text in texts for piece in VARIES.split(text) if piece]
