"""What a run leaves in its folder, besides checkpoints, and what it says on the terminal.

What a reader may rely on: only process 0 writes. The folder is locked while a run lives in it.
metrics.jsonl gets a line a step, at once. On a terminal there is one bar for the whole job; in a
file there are only lines. A line has at most 100 columns.
"""

import errno
import fcntl
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import DataError
from engine.batching import flat
from engine.checkpoint import FullDisk
from engine.flags import parse_flags, stop
from engine.judge import open_judge
from engine.prelude import read_prelude
from engine.report import as_text, curves, read_lines, record, step_records, write_report

LOGGED = 8  # pictures of a trajectory that a tracker gets
PACKAGES = ("torch", "transformers", "numpy", "pillow", "matplotlib", "av")
WIDTH = 100  # columns of the terminal
SHOWN = dict(  # what one wants to see of a step, by stage, and what it is called there
    rl=dict(
        accuracy="accuracy",
        reward="reward",
        tool_calls="calls",
        eval_accuracy="held-out",
        eval_accuracy_greedy="greedy",
    ),
    sft=dict(loss="loss", demonstrations_skipped="skipped"),
)
EXPECTED = dict(  # regular expressions of what a setting may be
    task="image|video|image,video|video,image",
    frames=r"|[1-9]\d*|(\d+\.?\d*|\.\d+)fps",
    paid=r"inf|new|\d+",
)
LEAST = dict(  # of a setting of train.py or evaluate.py
    group_size=2,  # one trajectory has no group's mean to differ from
    steps=1,
    questions=1,
    k=1,
    batch_size=1,
    oversample=1,
    max_turns=1,
    max_new_tokens=1,
    max_context=1,
    max_images=0,
    minibatches=1,
    keep=1,
    tokens_per_microbatch=1,
    temperature=0,
    top_p=0.001,
    top_k=0,
    timeout=0.001,
    warmup=0,
    lr=0,
    lora_rank=0,
    max_pixels=28 * 28,  # an image token
    gpus=1,
    gpu_memory=1,
)
FIXED = "stage", "task", "lora_rank"  # of a run: what was saved does not fit another one

LOCKS = []  # open files: a lock is held as long as its file is open


class NoProgress(RuntimeError):
    """A run that goes nowhere was ended."""


def leader() -> bool:
    """Is this the first process? Known from the environment, before the processes have joined."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str) -> None:
    """A line on the terminal, above the bar, from process 0."""
    if leader():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def reach_judge(config):
    """The judge, or None. Says so where it cannot be reached."""
    judge = open_judge(config)
    if judge and leader() and not judge.reachable():
        why = judge.last_error.strip()
        say(f"warning: the judge cannot be reached ({why}): the rule decides alone")
    return judge


def greet(config, samples, held) -> None:
    """Say what is going to happen, before anything slow, and which setting does nothing here."""
    data = f"{config.data}, {len(samples)} rows" if config.data else f"puzzles, {config.task}"
    processes = os.environ.get("WORLD_SIZE", "1")
    say(f"policy   {config.model or 'the built-in tiny one, for the built-in puzzles'}")
    say(f"data     {data}; {len(held)} held out")
    say(f"run      {config.steps} steps of {config.stage} in {config.out}; processes: {processes}")
    if not config.model:
        say("time     the default run takes 4 to 10 minutes on two cores, with its cold start")
    if config.data and not config.model:
        say("note     --data without --model trains the tiny policy, no model for photographs")
    if config.offload and not torch.cuda.is_available():
        say("note     --offload does nothing: there is no GPU whose memory it could spare")
    reach_judge(config)


@contextmanager
def one_line_errors(*bad_input):
    """Around a command: what goes wrong is one line, and Ctrl-C ends it at once.

    Exit codes: 2 for bad input (DataError, and errors of the classes in `bad_input`), 1 where the
    run cannot go on, 130 after Ctrl-C.
    """
    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    except (DataError, *bad_input) as error:
        stop(str(error), 2)
    except (FullDisk, NoProgress) as error:
        stop(str(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        stop(f"{error}; checkpoints are whole (--resume)", 1)


def interrupted(*_) -> None:
    """What runs at the time may be a library that turns KeyboardInterrupt into an error of its own.

    So the process ends here. Its sandboxes end with it, and checkpoints are complete or absent.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once, and not once a process
        os.write(2, b"stopped; the same command goes on (train.py: with --resume)\n")
    os._exit(130)


# ------------------------------------------------------------------------------------- the settings
def settle(cls: type, argv, laptop):
    """Flags -> settings, with what they leave open from elsewhere. Raises DataError.

    Under --resume that is the run in --out. Without --model it is `laptop`.
    """
    asked = parse_flags(cls, argv)
    words = [*asked.task.split(","), *filter(None, [asked.frames])]
    out = Path(asked.out or f"runs/{'_'.join(words)}")
    default = cls() if asked.model else laptop
    if asked.resume:
        default = earlier(cls, out)
    config = parse_flags(cls, argv, default)
    config.out = str(out)
    config.name = config.name or f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if asked.resume:
        for name in FIXED:
            old = getattr(default, name)
            if getattr(config, name) != old:
                raise DataError(f"{out} holds a run with --{name} {old}; give another --out")
        now = asdict(config)
        before = [f"--{name} {old}" for name, old in asdict(default).items() if now[name] != old]
        if before:
            say(f"going on with other settings; they were {' '.join(before)}")
    return config


def earlier(cls: type, out: Path):
    """The settings of the run in `out`. Raises DataError where there is none to go on with."""
    saved = read_json(out / "config.json")
    if not saved:
        raise DataError(f"--resume: no run to go on with in {out}: it has no whole config.json")
    known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
    return cls(**{**known, "out": str(out), "resume": True})


def check(config) -> None:
    """Hold a run's settings against what they may be. Raises DataError."""
    check_bounds(config, temperature=0.01)  # the gradient is of the sampled distribution
    tracker = config.tracker
    if tracker and importlib.util.find_spec(tracker) is None:
        raise DataError(f"--tracker {tracker} is not installed: pip install {tracker}")


def check_bounds(config, **least) -> None:
    """Hold settings against EXPECTED, LEAST and `least`; None comes later. Raises DataError."""
    read_prelude(config.prelude)
    for name, pattern in EXPECTED.items():
        value = getattr(config, name, None)
        if value is not None and not re.fullmatch(pattern, value):
            raise DataError(f"--{name} {value}: expected {pattern}")
    for name, bound in {**LEAST, **least}.items():
        value = getattr(config, name, None)
        if value is not None and not value >= bound:
            raise DataError(f"--{name} {value}: must be at least {bound}")


def open_folder(out: Path) -> None:
    """Make the folder and lock it until this process ends. Raises DataError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if leader():
            lock = open(out / "lock", "w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            LOCKS.append(lock)
    except BlockingIOError:
        raise DataError(f"--out {out}: another run is working there; give another --out") from None
    except OSError as error:
        raise DataError(f"--out {out} cannot be used: {error.strerror}") from None


def versions() -> dict:
    """Versions of Python and of what computes, and the commit of this code, where known."""
    found = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    describe = shlex.join(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    )
    failed, commit = subprocess.getstatusoutput(describe)
    return dict(found, python=platform.python_version(), commit=None if failed else commit)


def read_json(file: Path | str) -> dict:
    """The object that a JSON file holds; {} where there is none."""
    try:
        found = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def write_whole(file: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    aside = file.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def append(file: Path, lines: list[dict]) -> None:
    """Add JSON lines to a file, at once."""
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(as_text(lines))


# ------------------------------------------------------------------------------------- the terminal
class Progress:
    """One bar for a job of several parts, each of so many steps that take so long.

    The seconds need only be right against each other: the bar's pace is measured.
    """

    def __init__(self, parts: dict):
        """parts: name -> (steps, seconds a step)."""
        self.parts = parts
        self.total = sum(steps * seconds for steps, seconds in parts.values())
        self.done = 0.0
        self.began = time.monotonic()
        form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
        hidden = not (leader() and sys.stderr.isatty())
        width = min(WIDTH, shutil.get_terminal_size().columns)
        self.bar = tqdm(
            total=self.total,
            disable=hidden,
            bar_format=form,
            ncols=width,
            leave=False,
        )

    def skip(self, part: str, steps: int) -> None:
        """A part begins, of which so many steps were done before this job began."""
        self.total -= steps * self.parts[part][1]
        self.bar.total = self.total
        if not self.done:  # what came before the first step says nothing of the pace
            self.began = time.monotonic()
            self.bar.unpause()

    def step(self, part: str) -> None:
        """A step of a part is done."""
        seconds = self.parts[part][1]
        self.done += seconds
        self.bar.set_description_str(part, refresh=False)
        self.bar.update(seconds)

    def line(self, part: str, stage: str, metrics: dict) -> str:
        """A step in words, and the time that is left."""
        words = [f"{part} {metrics['step']}/{self.parts[part][0]}"]
        for key, name in SHOWN[stage].items():
            if key in metrics:
                words.append(f"{name} {metrics[key]:.2f}")
        seconds = metrics["seconds_rollout"] + metrics["seconds_update"]
        elapsed = time.monotonic() - self.began
        left = tqdm.format_interval(elapsed * max(0.0, self.total / self.done - 1))
        words.append(f"{seconds:.1f} s  {left} left")
        return "  ".join(words)[:WIDTH]


class Journal:
    """What a run writes down: a row a step, a line a step, pictures when something is saved."""

    def __init__(self, config, progress: Progress, part: str, rows: list[dict]):
        """part: the name of this run's steps in the progress of the job. rows: earlier steps."""
        self.config = config
        self.out = Path(config.out)
        self.progress = progress
        self.part = part
        self.rows = rows
        self.unreadable = set()  # what was said of files that cannot be read
        self.judged = Counter()  # of a step: what `score` counts
        self.track = None
        self.finish = None

    def begin(self) -> None:
        """Write config.json, and metrics.jsonl as far as it goes; open the tracker."""
        self.judged.clear()  # of the evaluation before the first step
        self.progress.skip(self.part, max((row["step"] for row in self.rows), default=0))
        if leader():
            settings = dict(asdict(self.config), versions=versions())
            write_whole(self.out / "config.json", json.dumps(settings, indent=1) + "\n")
            write_whole(self.out / "metrics.jsonl", as_text(self.rows))
            if self.config.tracker:
                self.track, self.finish = tracker(self.config)

    def log(self, metrics: dict, groups: list, kept: list, pictures: bool) -> None:
        """Note a step. groups: all that was sampled, of which `kept` were trained on.

        Raises NoProgress where nothing was to be trained on, or no gradient was finite, step after
        step. It does so on every process.
        """
        self.rows.append(metrics)
        self.progress.step(self.part)
        say(self.progress.line(self.part, self.config.stage, metrics))
        if self.config.stage == "rl":  # in sft it is said of the demonstration
            self.name_unreadable(flat(groups))
        gap = metrics.get("logprob_gap", 0.0)
        if gap > 0.01:
            say(f"warning: rollout and update disagree on log-probs by {gap:.3f} on average")
        if leader():
            append(self.out / "metrics.jsonl", [metrics])
            seen = groups[0][0].images[:LOGGED] if pictures else []
            if pictures:
                self.draw(groups, kept)
            if self.track:
                looks = [(f"look_{number}", image) for number, image in enumerate(seen)]
                self.track(metrics, pictures, looks)
        self.judged.clear()
        self.check(kept)

    def name_unreadable(self, trajectories: list) -> None:
        """Say, once for each file, what of the data cannot be read."""
        for t in trajectories:
            if t.error and t.error not in self.unreadable:
                self.unreadable.add(t.error)
                say(f"sample {t.sample.id} cannot be read: {t.error:.200}")

    def remember(self, step: int, held: list) -> None:
        """Keep how the held-out questions were answered at a step, for the page."""
        if leader():
            file = self.out / "heldout.jsonl"
            if not step:
                file.unlink(missing_ok=True)
            append(file, [record(t, index, 0, step) for index, t in enumerate(held)])

    def draw(self, groups: list, kept: list) -> None:
        """curves.png and rollouts.html as they are now."""
        step = self.rows[-1]["step"]
        history = read_lines(self.out / "heldout.jsonl")
        records = step_records(groups, kept, step)
        curves(self.out / "curves.png", self.rows)
        write_report(self.out / "rollouts.html", records, f"{self.out.name}, step {step}", history)

    def check(self, kept: list) -> None:
        """End a run that goes nowhere."""
        recent = [row for row in self.rows if row["step"]][-10:]
        if len(recent) == 10 and not any(row["trajectories_trained"] for row in recent):
            raise NoProgress(
                "10 steps in a row had nothing to train on: every group's rewards are equal, or it "
                "is broken. Are the questions too hard or too easy? (or --keep_zero_variance)"
            )
        if len(recent) >= 5 and all(row["updates_skipped"] for row in recent[-5:]):
            place = self.out / "nonfinite.pt"
            if leader():
                torch.save(kept, place)
            raise NoProgress(f"the gradient was not finite in 5 steps; what it came from: {place}")

    def end(self) -> None:
        """Say what came of it, and which files to open; close the tracker."""
        self.progress.bar.close()
        if self.finish:
            self.finish()
        found = [row["eval_accuracy"] for row in self.rows if "eval_accuracy" in row]
        if len(found) > 1:
            say(f"held-out accuracy {found[0]:.2f} before, {found[-1]:.2f} after")
        say(f"open {self.out}/curves.png and {self.out}/rollouts.html")


def tracker(config):
    """How to log to the package that --tracker names: log(metrics, drawn, looks), and finish().

    drawn: is curves.png new? looks: (name, PIL image) pairs, of what a policy saw.
    """
    curves_png = str(Path(config.out, "curves.png"))
    if config.tracker == "tensorboard":
        from matplotlib.image import imread
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(config.out)

        def log(metrics, drawn, looks=()):
            step = metrics["step"]
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
            images = [*looks, ("curves", imread(curves_png))] if drawn else looks
            for key, image in images:
                writer.add_image(key, np.asarray(image), step, dataformats="HWC")
            writer.flush()

        return log, writer.close
    package = importlib.import_module(config.tracker)  # wandb and trackio share these calls
    about = dict(project="pyvision-rl", name=config.name, config=asdict(config), resume="allow")
    if config.tracker == "wandb":
        about.update(id=config.name, dir=config.out)
    package.init(**about)

    def log(metrics, drawn, looks=()):
        shown = {key: package.Image(image) for key, image in looks}
        if drawn:
            shown["curves"] = package.Image(curves_png)
        values = {key: value for key, value in metrics.items() if key != "step"}
        package.log({**values, **shown}, step=metrics["step"])

    return log, package.finish
