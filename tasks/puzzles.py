r"""The built-in puzzles: pictures and videos in which only looking answers, and scripted searchers that look.

They exist so that reinforcement learning of *looking* can be watched on a laptop:
  - Image: nine small plates lie on a large picture. What is asked about one of them is painted so finely that its mean
    over the plate is plain grey: at context resolution it is not there (tests train a reader on it, in vain), in a
    crop of a few pixels it is. The picture as a whole carries a hint, right with probability `hint`: the temptation to
    answer at once, which the tool reward must outweigh. No other plate carries the answer, so a look that misses is
    never right by luck; answers are uniform and independent of the wording, so a blind policy is at chance.
  - Video: a lamp in 20 to 120 seconds of H.264 (PyAV writes it: it brings its own libx264, decord only reads). Either
    it changes its colour every second and one second is asked about, or it is dark and lights up for half a second,
    once, twice or several times: then code must find the moment. A few uniform frames miss both. Frames are small, so
    that reading a whole clip costs milliseconds.
The demonstrations are of mixed quality on purpose: the shares of looks and the share of looks that aim right leave
reinforcement learning its work. What an observation shows comes from the real sandbox, so the texts never quote one.
Everything derives from (task, seed, index, split). Whether a scene is held out is decided by its own checksum.
"""
import hashlib, os, re, tempfile, zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data import Sample, messages

COLOURS = {"red": (225, 40, 40), "green": (40, 185, 60), "blue": (50, 70, 230),
           "yellow": (235, 215, 40), "cyan": (40, 210, 220), "magenta": (225, 50, 215)}
STRIPES = {"level": (0.0, 1.0), "upright": (1.0, 0.0), "rising": (0.7, 0.7), "falling": (0.7, -0.7)}  # across them
KEPT, UNUSED = 4000, 3 * 3600  # clips in the cache, and seconds after which no run can still need one beyond these
COUNTS = ("1", "2", "4", "8")  # no number is within 30 % of two of them, so MRA >= 0.5 accepts one guess in four
VALUES = {"colour": tuple(COLOURS), "stripes": tuple(STRIPES), "second": tuple(COLOURS), "flash": tuple(COLOURS),
          "order": tuple(COLOURS), "count": COUNTS}
ASK = {
    "colour": ("Plates 1 to 9 lie in rows. What colour is the tiny square on plate {}?",
               "What colour is the tiny square on plate {}? Plates are counted row by row.",
               "Nine plates lie in three rows. Plate {} has a tiny square: which colour?"),
    "stripes": ("Plates 1 to 9 lie in rows. Which way do the fine stripes on plate {} run?",
                "Which way do the fine stripes on plate {} run? Plates are counted row by row.",
                "Nine plates lie in three rows. Plate {} has fine stripes: which way?"),
    "second": ("What colour is the lamp at second {}?", "At second {}, what colour is the lamp?",
               "The lamp changes. At second {}, which colour?"),
    "flash": ("The lamp lights up once. What colour is it then?", "What colour is the one flash of the lamp?"),
    "order": ("The lamp lights up twice. What colour comes {}?", "Of the lamp's two flashes, what colour comes {}?"),
    "count": ("How many times does the lamp light up?", "The lamp lights up several times. How often? Count."),
}
ASK_CROP = {"colour": "What colour is the tiny square?", "stripes": "Which way do the fine stripes run?",
            "lamp": "What colour is the lamp, or is it dark?"}
ASK_WHOLE = {"colour": "What colour is the light?", "stripes": "Which way do the broad bands run?"}
OPTIONS = {kind: f" ({', '.join(values[:-1])} or {values[-1]})" for kind, values in VALUES.items()} | {"count": ""}
CODE = "<code>\n```python\n{}\n```\n</code>"
ANSWER = "<answer>\n\\boxed{{{}}}\n</answer>"
SHOW_SECOND = "Image.fromarray(video_clue_0[round({}*video_clue_0.get_avg_fps())].asnumpy()).show()"
SCAN = "a=video_clue_0.get_batch(range(len(video_clue_0))).asnumpy()\ns=np.ptp(a[:,::8,::8],-1).mean((1,2))\n"
SHOW_FLASH = SCAN + "Image.fromarray(a[np.flatnonzero(s>s.max()/2)[{}]]).show()"  # colour is what tells a lit lamp
COUNT_FLASHES = SCAN + "b=s>s.max()/2\nprint((b[1:]>b[:-1]).sum())"
OBSERVATION = "<tool_response>\n<interpreter>\nText Result:\n{}\n</interpreter>\n</tool_response>"
TRACEBACK = 'Traceback (most recent call last):\n  File "<code>", line 1, in <module>\n    {}\n'
VARIES = re.compile(r"(\d\d+|(?<=late )\d|(?<=\[)-?\d(?=\]\])|(?<=boxed\{)\d|(?<=Result:\n)\d|\b(?:first|last|"
                    + "|".join(sorted({*COLOURS, *STRIPES})) + r")\b)|(?=<code>|<answer>)")
ERRORS = ("ValueError: Coordinate 'right' is less than 'left'", "IndexError: Index: 720 out of bound: 320")


@dataclass(frozen=True)
class Difficulty:
    """Every number that decides how hard a puzzle is and how good its demonstrations are."""
    kinds: tuple = ("colour",)                      # of image questions, equally often: colour, stripes
    hint: float = 0.48                              # probability that the picture's light (or bands) tells the truth
    canvas: int = 448                               # side of the picture in pixels
    plates: tuple = (20, 24)                        # smallest and largest side; a demonstrated crop stays inside
    chip: int = 4                                   # side of the square whose colour is asked
    ring: int = 8                                   # side of its rim in the opposite tint, which makes the mean grey
    balance: float = 1.1                            # strength of that tint; 1 is exact for a box filter
    period: float = 4.0                             # of the fine stripes, in pixels
    jitter: int = 3                                 # of a plate around its place in the grid, in pixels
    crop: int = 14                                  # side of a demonstrated crop; half of it must hold jitter and chip
    looks: tuple = (0.55, 0.15, 0.10, 0.10, 0.10)   # demonstrations: shares of 0, 1, ... looks
    aim: float = 0.65                               # share of looks that go to the right place
    recheck: float = 1.0                            # share of further looks that repeat the one before
    slip: float = 0.03                              # share of looks whose code fails
    clips: tuple = ("second", "second", "flash", "order", "count")  # of video questions, equally often
    seconds: tuple = (20, 120)                      # shortest and longest clip
    fps: tuple = (4, 5, 6)                          # frame rates
    frame: int = 64                                 # side of a frame (decord fails on 48), the lamp's is half of it
    every: int = 10                                 # the seconds asked about are multiples of it
    flash: float = 0.5                              # seconds that a lamp stays lit
    lessons: tuple = (0.4, 0.2, 0.4)                # captions: shares of crops, whole pictures, questions to aim at


def _pick(rng, values):
    return values[int(rng.integers(len(values)))]


def _question(scene):
    return ASK[scene["kind"]][scene["wording"]].format(scene["asked"]) + OPTIONS[scene["kind"]]


# ------------------------------------------------------------------------------------------------ the image puzzle
def _image_scene(rng, d):
    """What there is to know about a picture, as plain values: it can be painted again, and hashed."""
    kind, asked = _pick(rng, d.kinds), int(rng.integers(1, 10))
    answer = _pick(rng, VALUES[kind])
    wrong = [value for value in VALUES[kind] if value != answer]
    plates = [answer if k + 1 == asked else _pick(rng, wrong) for k in range(9)]
    hint = answer if rng.random() < d.hint else _pick(rng, wrong)
    light = hint if kind == "colour" else _pick(rng, list(COLOURS))
    return dict(kind=kind, asked=asked, answer=answer, plates=plates, hint=hint, light=light,
                wording=int(rng.integers(len(ASK[kind]))), side=int(rng.integers(d.plates[0], d.plates[1] + 1)),
                shift=rng.integers(-d.jitter, d.jitter + 1, (9, 2)).tolist(), texture=int(rng.integers(2**32)))


def _centre(d, k):
    """x, y of plate k's place in the grid, from which jitter may shift it."""
    return (2 * (k % 3) + 1) * d.canvas // 6, (2 * (k // 3) + 1) * d.canvas // 6


def _box(d, k):
    """The crop box (left, upper, right, lower) that shows plate k's chip wherever the jitter put it."""
    x, y = _centre(d, k)
    return x - d.crop // 2, y - d.crop // 2, x - d.crop // 2 + d.crop, y - d.crop // 2 + d.crop


def _wave(direction, side, period, phase):
    """Stripes of mean 0 in -1..1 that vary along `direction`, as (side, side)."""
    y, x = np.mgrid[:side, :side]
    return np.sin(2 * np.pi * ((direction[0] * x + direction[1] * y) / period + phase))


def _noise(rng, cells, side):
    """Smooth RGB noise of mean 0 and standard deviation about 1, as (side, side, 3)."""
    cells = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return (np.asarray(cells.resize((side, side), Image.BICUBIC)) - 127.5) / 74


def _plate(rng, d, kind, value, side):
    """One plate as (side, side, 3) floats: mottled grey, and what is asked, invisible in the mean."""
    grey, middle = rng.uniform(110, 150), side // 2
    patch = grey + 14 * _noise(rng, 5, side)
    if kind == "stripes":
        return patch + 60 * _wave(STRIPES[value], side, d.period, rng.random())[..., None]
    contrast = np.array(COLOURS[value]) - grey
    rim = slice(middle - d.ring // 2, middle - d.ring // 2 + d.ring)
    chip = slice(middle - d.chip // 2, middle - d.chip // 2 + d.chip)
    patch[rim, rim] -= d.balance * contrast * d.chip**2 / (d.ring**2 - d.chip**2)
    patch[chip, chip] = grey + contrast
    return patch


def _paint(scene, d):
    """Scene -> RGB picture: noise in one light (the hint on colours), bands (the hint on stripes), nine plates."""
    rng, size = np.random.default_rng(scene["texture"]), (d.canvas, d.canvas)
    cells = d.canvas // int(rng.choice((4, 8, 16)))
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    noise = noise.resize(size, _pick(rng, (Image.NEAREST, Image.BILINEAR)))
    picture = Image.blend(noise, Image.new("RGB", size, COLOURS[scene["light"]]), rng.uniform(0.4, 0.6))
    if scene["kind"] == "stripes":
        bands = _wave(STRIPES[scene["hint"]], 56, rng.uniform(9, 13), rng.random())
        mask = Image.fromarray((127.5 + 127.5 * bands).astype(np.uint8)).resize(size, Image.BILINEAR)
        picture = Image.composite(picture, Image.blend(picture, Image.new("RGB", size), 0.6), mask)
    pixels, side = np.array(picture), scene["side"]
    for k, value in enumerate(scene["plates"]):
        x, y = (place + shift - side // 2 for place, shift in zip(_centre(d, k), scene["shift"][k]))
        pixels[y:y + side, x:x + side] = _plate(rng, d, scene["kind"], value, side).clip(0, 255)
    return Image.fromarray(pixels)


def _image_sample(name, scene, d, folder=None):
    return Sample(name, _question(scene), scene["answer"], (_paint(scene, d),), (), "puzzle_image", scene["kind"])


def _image_look(rng, scene, d):
    """One look of the scripted searcher: (its turn, the value it sees or None where its code fails)."""
    k = scene["asked"] - 1
    if rng.random() >= d.aim:
        k = (k + 1 + int(rng.integers(8))) % 9
    box, slip = _box(d, k), rng.random() < d.slip
    box = (box[2], box[1], box[0], box[3]) if slip else box  # PIL refuses a box turned inside out
    code = f"image_clue_0.crop(({','.join(map(str, box))})).show()"
    return CODE.format(code), None if slip else scene["plates"][k]


def _image_caption(rng, name, scene, d, folder=None):
    """A first lesson: what a crop shows, what the whole picture hints at, or where a question sends one."""
    lesson, kind, k = rng.random(), scene["kind"], int(rng.integers(9))
    if lesson < d.lessons[0]:  # one plate is painted, not the picture: a crop stays inside it
        plate = _plate(rng, d, kind, scene["plates"][k], scene["side"]).clip(0, 255).astype(np.uint8)
        left, upper = (scene["side"] // 2 - d.crop // 2 - shift for shift in scene["shift"][k])
        crop = Image.fromarray(plate).crop((left, upper, left + d.crop, upper + d.crop))
        return Sample(name, ASK_CROP[kind] + OPTIONS[kind], scene["plates"][k], (crop,), data_source="puzzle_image",
                      ability="crop", turns=[ANSWER.format(scene["plates"][k])])
    sample = _image_sample(name, scene, d)
    if lesson < d.lessons[0] + d.lessons[1]:
        return replace(sample, question=ASK_WHOLE[kind] + OPTIONS[kind], answer=scene["hint"], ability="whole",
                       turns=[ANSWER.format(scene["hint"])])
    return replace(sample, ability="call", turns=[_image_look(rng, scene, d)[0]])


# ------------------------------------------------------------------------------------------------ the video puzzle
def _video_scene(rng, d):
    """What there is to know about a clip: `lights` are (begin, end, colour) in seconds, elsewhere the lamp is dark."""
    kind, colours = _pick(rng, d.clips), list(COLOURS)
    seconds = int(np.exp(rng.uniform(*np.log(d.seconds))))  # short clips more often than long ones: they are cheap
    answer, asked = _pick(rng, VALUES[kind]), ""
    if kind == "second":
        asked = d.every * int(rng.integers(1, (seconds - 1) // d.every + 1))
        lights = [(k, k + 1, answer if k == asked else _pick(rng, colours)) for k in range(seconds)]
    else:
        # every other second is a slot in which one flash may begin, so that two never run together
        flashes = {"flash": 1, "order": 2}.get(kind) or int(answer)
        slots = np.sort(rng.choice(np.arange(1, seconds - 1, 2), flashes, replace=False))
        shown = [_pick(rng, colours) for _ in slots]
        if kind == "order":
            asked = _pick(rng, ("first", "last"))
            shown = [answer, _pick(rng, [colour for colour in colours if colour != answer])]
            shown = shown if asked == "first" else shown[::-1]
        elif kind == "flash":
            shown = [answer]
        starts = [round(float(slot + rng.random()), 2) for slot in slots]
        lights = [(start, start + d.flash, colour) for start, colour in zip(starts, shown)]
    return dict(kind=kind, seconds=seconds, fps=_pick(rng, d.fps), answer=answer, asked=asked, lights=lights,
                hint=_pick(rng, VALUES[kind]), wording=int(rng.integers(len(ASK[kind]))),
                texture=int(rng.integers(2**32)))


def _lit(scene, second):
    """The lamp's colour at a time in seconds, or None while it is dark."""
    return next((colour for begin, end, colour in scene["lights"] if begin <= second < end), None)


def _frame(scene, d, colour):
    """One frame as (frame, frame, 3) bytes: a grey texture and the lamp."""
    rng, lamp = np.random.default_rng(scene["texture"]), d.frame // 2
    grey = rng.integers(70, 150) + 12 * _noise(rng, 8, d.frame).mean(-1, keepdims=True)
    pixels = np.repeat(grey, 3, -1).clip(0, 255).astype(np.uint8)
    x, y = rng.integers(2, d.frame - lamp - 2, 2)
    pixels[y:y + lamp, x:x + lamp] = COLOURS[colour] if colour else 40
    return pixels


def _film(scene, d, path):
    """Write the clip as H.264 in mp4. A pale speck drifts through it, so that no two frames are alike."""
    planes = {}
    for colour in {None} | {colour for *_, colour in scene["lights"]}:
        frame = av.VideoFrame.from_ndarray(_frame(scene, d, colour), format="rgb24")
        planes[colour] = frame.reformat(format="yuv420p").to_ndarray()
    with av.open(str(path), "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=scene["fps"])
        stream.width, stream.height, stream.pix_fmt = d.frame, d.frame, "yuv420p"
        stream.options = dict(preset="ultrafast", crf="23")
        stream.codec_context.gop_size, stream.codec_context.thread_count = 6 * scene["fps"], 1
        for k in range(scene["seconds"] * scene["fps"]):
            plane = planes[_lit(scene, k / scene["fps"])].copy()
            y, x = k // 7 % (d.frame - 3), k % (d.frame - 3)
            plane[y:y + 3, x:x + 3] = 190
            film.mux(stream.encode(av.VideoFrame.from_ndarray(plane, format="yuv420p")))
        film.mux(stream.encode(None))


def _video_sample(name, scene, d, folder=None):
    """The clip's name is a hash of what it shows. Written aside, then renamed: other processes see only whole files."""
    folder = Path(folder or f"{tempfile.gettempdir()}/puzzle-clips-{os.getuid()}") / scene["split"]
    path = folder / (hashlib.sha256(repr((scene, d.frame)).encode()).hexdigest()[:20] + ".mp4")
    try:
        os.utime(path)
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.part")
        _film(scene, d, aside)
        aside.replace(path)
        with suppress(FileNotFoundError):  # another process tidies up, too; after every 256th clip, it takes a while
            for old in sorted(folder.iterdir(), key=os.path.getmtime)[:-KEPT] if path.name.startswith("00") else ():
                if path.stat().st_mtime - old.stat().st_mtime > UNUSED:
                    old.unlink()
    return Sample(name, _question(scene), scene["answer"], videos=(str(path),), ability=scene["kind"],
                  data_source="vsi_numerical" if scene["kind"] == "count" else "puzzle_video")


def _video_look(rng, scene, d):
    """One look of the scripted searcher: (its turn, the value it sees or None for a dark lamp or an error)."""
    kind, asked, aimed = scene["kind"], scene["asked"], rng.random() < d.aim
    if rng.random() < d.slip:
        return CODE.format(SHOW_SECOND.format(d.every * (scene["seconds"] // d.every + 1))), None  # after the end
    if kind == "count" and aimed:
        return CODE.format(COUNT_FLASHES), scene["answer"]
    if kind == "order" or kind == "flash" and aimed:
        k = 0 if (asked != "last") == aimed else -1
        return CODE.format(SHOW_FLASH.format(k)), scene["lights"][k][2]
    others = [second for second in range(d.every, scene["seconds"], d.every) if second != asked] or [1]
    second = asked if kind == "second" and aimed else _pick(rng, others)
    return CODE.format(SHOW_SECOND.format(second)), _lit(scene, second) if kind != "count" else None


def _video_caption(rng, name, scene, d, folder=None):
    """A first lesson: what a frame shows, lit or dark, or where a question sends one."""
    if rng.random() < d.lessons[0] + d.lessons[1]:
        value = _pick(rng, (*COLOURS, "dark"))
        frame = Image.fromarray(_frame(scene, d, None if value == "dark" else value))
        return Sample(name, ASK_CROP["lamp"] + OPTIONS["colour"], value, (frame,), data_source="puzzle_video",
                      ability="crop", turns=[ANSWER.format(value)])
    return replace(_video_sample(name, scene, d, folder), ability="call", turns=[_video_look(rng, scene, d)[0]])


# ------------------------------------------------------------------------------------------------ what the rest calls
DRAW = {"image": _image_scene, "video": _video_scene}
SAMPLE = {"image": _image_sample, "video": _video_sample}
LOOK = {"image": _image_look, "video": _video_look}
CAPTION = {"image": _image_caption, "video": _video_caption}


def _scenes(task, n, seed, split, use, d):
    """(task name, sample name, generator, scene) of n samples, the first of which do not depend on n. The seed shifts
    the alternation of several tasks, so that single samples of successive seeds alternate too."""
    names = task.split(",")
    if not set(names) <= set(DRAW) or split not in ("train", "heldout"):
        raise ValueError(f"no task {task!r} (image, video or image,video) or no split {split!r} (train or heldout)")
    for index in range(n):
        name, scene = names[(seed + index) % len(names)], None
        rng = np.random.default_rng((seed % 2**63, index, zlib.crc32(f"{name} {split} {use}".encode())))
        # one description in eight is held out, whatever the seed
        while scene is None or (zlib.crc32(repr(scene).encode()) % 8 == 0) != (split == "heldout"):
            scene = DRAW[name](rng, d)
        yield name, f"{name}-{use}-{split}-{seed}-{index}", rng, scene | {"split": split}


def _turns(rng, task, scene, d):
    """What the scripted searcher says: some looks, then the value seen last, or the guess where it has seen none."""
    turns, turn, value, seen = [], None, None, scene["hint"]
    for _ in range(int(rng.choice(len(d.looks), p=d.looks))):
        if value is None or rng.random() >= d.recheck:
            turn, value = LOOK[task](rng, scene, d)
        turns.append(turn)
        seen = value or seen
    return turns + [ANSWER.format(seen)]


def puzzles(task, n, seed, split="train", folder=None, **difficulty):
    """n puzzles of `task` ("image", "video" or "image,video", alternating) -> list of Samples; a longer call begins
    with the same ones. split: "train" or "heldout", never the same scene. Videos are mp4 files in `folder` (none: a
    cache in the temporary folder). difficulty: fields of Difficulty. Unknown names raise ValueError or TypeError."""
    d = Difficulty(**difficulty)
    return [SAMPLE[task](name, scene, d, folder)
            for task, name, _, scene in _scenes(task, n, seed, split, "puzzle", d)]


def demonstrations(task, n, seed, folder=None, **difficulty):
    """n training puzzles with `turns`, what a scripted searcher of mixed quality says; its code is yet to be run."""
    d = Difficulty(**difficulty)
    return [replace(SAMPLE[task](name, scene, d, folder), turns=_turns(rng, task, scene, d))
            for task, name, rng, scene in _scenes(task, n, seed, "train", "demonstration", d)]


def captions(task, n, seed, folder=None, **difficulty):
    """n Samples of one turn that teach to see, before demonstrations teach to search; ability: crop, whole or call."""
    d = Difficulty(**difficulty)
    return [CAPTION[task](rng, name, scene, d, folder)
            for task, name, rng, scene in _scenes(task, n, seed, "train", "caption", d)]


def corpus(task, n=60, folder=None, **difficulty):
    """Texts as the policy will read and write them, to train a tokenizer on: prompts, turns, observations, errors. They
    are cut where texts vary (numbers, answers, the start of an action): then no token spans a choice of the policy or
    hides a number of the question, and "40" read is the same token as "40" written."""
    texts, n = [OBSERVATION.format(TRACEBACK.format(error)) for error in ERRORS], n * len(task.split(","))
    for sample in captions(task, n, 0, folder, **difficulty) + demonstrations(task, 2 * n, 0, folder, **difficulty):
        texts += [part["text"] for part in messages(sample)[0]["content"] if "text" in part] + sample.turns
        for number in range(len(sample.images), len(sample.images) + len(sample.turns)):
            texts += OBSERVATION.format(f"\nImage Result:\n<image_clue_{number}>|</image_clue_{number}>").split("|")
        texts += [OBSERVATION.format(count + "\n") for count in COUNTS if sample.ability == "count"]
    return [piece for text in texts for piece in VARIES.split(text) if piece]
