"""Where the policy's Python runs: one locked-down process per trajectory. The trainer's side.

    with Sandbox(images, videos) as sandbox:
        result = sandbox.run("print(image_clue_0.size)")

A policy in training writes whatever may pay, so its code is hostile. It runs in a process that
engine/confine.py encloses and in which engine/session.py behaves like a notebook. Children are
forked ahead by one clean process, so that a sandbox starts in milliseconds.

What is guaranteed here:
  - Nothing that the code does raises in the trainer: it becomes Result.error.
  - A reply is bytes: nothing in it is unpickled, no image is decoded. Its size is bounded before
    memory is taken, and `check_reply` lets through only what a Result may hold.
  - A reply answers its own call: every call has a random id.
  - One deadline holds for a whole call, however its reply arrives. Who misses it is killed, by a
    descriptor of the process and never by its number. Between calls the process stands still.
  - After a call that ended the process, the next one starts a new process, in which the inputs
    and what was shown are bound again and the random numbers are seeded again.
  - The sandbox refuses to start where a layer of the confinement is missing, unless `unsafe`,
    which contains mistakes and no attacks.
  - After `close` the process, its descriptors and its scratch folder are gone.
"""

import json
import os
import pickle
import re
import signal
import socket
import threading
import time
import warnings
import weakref
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass

from PIL import Image, ImageOps

import data
from engine.confine import FEW, too_few_descriptors
from engine.figures import MAX_ASPECT, MAX_CALL_PIXELS, MAX_FIGURES, MAX_PIXELS
from engine.pool import START
from engine.pool import pool as _pool
from engine.prelude import read_prelude
from engine.session import HEADER, JSON_SIZE, MAX_FRAMES

KEYS = {"text", "error", "frames", "sizes"}  # of a reply
warm = _pool.warm  # have some processes ready, while the policy generates
RESTARTED = """[Restarted: earlier variables, imports and files are lost; the inputs and the \
figures that were shown are bound again.]
"""
GRACE = 0.25  # seconds from the timeout, which the child ends by itself, to the kill
MARK = 99  # characters of text that a reply may have above its limit: the note of what was cut
SHOWN_PIXELS = 32_000_000  # of figures that are bound again after a restart, the last ones
# Colours and other control sequences, and control characters but for line ends and tabs.
CONTROL = re.compile(r"\x1b\[[0-?]{0,20}[ -/]{0,3}[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class SandboxError(RuntimeError):
    """The sandbox is closed, does not start, or a layer of its confinement is missing here."""


@dataclass
class Result:
    """What one call left."""

    text: str  # what was printed, then the traceback
    images: list[Image.Image]  # figures that were shown, RGB
    error: str | None  # the traceback
    frames: list[tuple[int, int]]  # (video, frame) of each frame that was decoded


class Packed:
    """PIL images as a process of its own takes them: made once, for any number of sandboxes."""

    def __init__(self, images: list[Image.Image]):
        plain = [_plain(image) for image in images]
        self.count = len(plain)
        self.bytes = pickle.dumps(plain)


def _plain(image):
    """A copy of an image as people see it, without texts and tags that its file holds."""
    transparency = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    image.load()
    image.info = {} if transparency is None else {"transparency": transparency}
    return image


class Sandbox(AbstractContextManager):
    """A persistent Python namespace, in a process of its own, for code that nobody trusts.

    images: PIL images or Packed ones, bound as image_clue_0, …
    videos: paths, bound as video_clue_0, … (decord VideoReaders that open at first use)
    timeout: seconds of wall time for one call
    output_limit: characters of text of one call
    seed: of the random numbers that the code draws by `random` and numpy; None: of its own
    prelude: path of code that runs first, also after a restart: functions for the code to call; it
        has `timeout` seconds
    Raises SandboxError where the kernel lacks Landlock or seccomp, unless `unsafe`, or where the
    prelude raises; OSError for a video that cannot be opened; DataError for a prelude that is none.
    """

    def __init__(
        self,
        images: list[Image.Image] | Packed = (),
        videos: list[str | os.PathLike] = (),
        timeout: float = 30.0,
        *,
        unsafe: bool = False,
        output_limit: int = 10_000,
        seed: int | None = None,
        prelude: str = "",
    ):
        self.videos = list(videos)
        self.timeout = timeout
        self.unsafe = unsafe
        self.closed = False
        self._images = images if isinstance(images, Packed) else Packed(images)
        self._clue = self._images.count  # the number of the next figure
        self._shown = {}  # number -> figure, to be bound again after a restart
        self._limit = output_limit
        self._start_seconds = timeout if prelude else START
        self._settings = (output_limit, seed, read_prelude(prelude))
        self._frame_counts = {}  # of the videos, asked for when a call decodes frames
        self._lock = threading.RLock()
        self._start()

    def close(self, *_):
        """End the process and a call that runs. A second close does nothing."""
        self.closed = True
        if self._child.ours:  # in a fork the connection is the parent's
            with suppress(OSError):
                self._child.channel.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._end()
            self._shown = {}

    __exit__ = close

    def run(self, code: str) -> Result:
        """Run code in the namespace. What the code does never raises here: it is Result.error."""
        with self._lock:
            if self.closed:
                raise SandboxError("this sandbox is closed")
            notice = ""
            if not self._end.alive or not self._child.ours:
                self._start()
                notice = RESTARTED
            result = self._call(code)
            result.text = notice + result.text
            self._keep(result.images)
            return result

    def _call(self, code):
        """One call and its result; a process that did not answer in time and as agreed is ended."""
        start = time.monotonic()
        alive = False
        try:
            self._child.signal(signal.SIGCONT)
            reply = self._exchange((code, self._clue, self.timeout), self.timeout)
            result = check_reply(reply, self._limit, self._count_frames)
            self._child.signal(signal.SIGSTOP)  # threads that outlive a call wait for the next
            alive = time.monotonic() - start < self.timeout
            return result
        except (OSError, EOFError, ValueError, RecursionError) as problem:
            late = time.monotonic() - start >= self.timeout
            return self._broken(problem, late)
        finally:
            if not alive:  # also when interrupted: a late reply must meet nobody
                self._end()

    def _broken(self, problem, late):
        """The Result of a call that has no reply: what was printed before, and what went wrong."""
        error = f"{type(problem).__name__}: {problem}\n"
        if late and not self.closed:
            error = f"TimeoutError: the code ran into the limit of {self.timeout:g} s\n"
        text = clean(self._child.printed(self._printed_at)[: self._limit])
        if text:
            text = text.rstrip() + "\n"
        return Result(text + error, [], error, [])

    def _start(self):
        """Have a process in which the inputs are bound."""
        with ExitStack() as files:
            try:
                videos = [files.enter_context(open(path, "rb")) for path in self.videos]
                missing = self._connect(videos)
            except OSError as problem:
                if problem.errno in FEW:
                    raise SandboxError(too_few_descriptors()) from problem
                raise
        if missing:
            lack = (
                f"no safe place for code without {', '.join(missing)}: "
                "use Linux 5.13+ or unsafe=True (--unsafe_sandbox)"
            )
            if not self.unsafe:
                self._end()
                raise SandboxError(lack)
            warnings.warn(lack, RuntimeWarning, stacklevel=4)

    def _connect(self, videos):
        """Take a child that lives and bind the inputs in it; the layers that it lacks."""
        for _ in range(7):  # children that waited may have died
            try:
                self._child = _pool.take(bool(videos))
                self._received = bytearray()  # and not yet looked at
                self._end = weakref.finalize(self, self._child.end)
                self._end.atexit = False  # at exit the forking process ends what is left
                return self._bind(videos)
            except TimeoutError:
                raise SandboxError(
                    f"--prelude or the start itself: it ran for more than {self._start_seconds:g} s"
                ) from None
            except (OSError, EOFError, ValueError) as failure:
                if getattr(failure, "errno", None) in FEW:
                    raise
                problem = failure
        reason = clean(str(problem))[:200]
        raise SandboxError(f"the sandbox's process does not start: {reason}")

    def _bind(self, videos):
        """Hand the inputs to a child and hear which layers are missing."""
        try:
            if videos:
                descriptors = [file.fileno() for file in videos]
                socket.send_fds(self._child.channel, [b"v" * len(videos)], descriptors)
            inputs = self._images.bytes + pickle.dumps(self._shown)
            answer = json.loads(self._exchange(self._settings, self._start_seconds, inputs))
            if isinstance(answer, str):  # it failed, and says why
                raise OSError(answer)
        except BaseException:
            self._end()
            raise
        missing, self._printed_at = answer
        return missing

    def _keep(self, images):
        """Remember figures for a restart, the last ones within a bound."""
        for image in images:
            self._shown[self._clue] = image
            self._clue += 1
        while sum(image.width * image.height for image in self._shown.values()) > SHOWN_PIXELS:
            del self._shown[min(self._shown)]

    def _count_frames(self, video):
        """How many frames a video has; 0 if there is no such video or it cannot be read."""
        if video not in range(len(self.videos)):
            return 0
        if video not in self._frame_counts:
            self._frame_counts[video] = 0
            with suppress(data.DataError, OSError):
                self._frame_counts[video] = data.video_info(str(self.videos[video]))["frames"]
        return self._frame_counts[video]

    def _exchange(self, request, seconds, inputs=b""):
        """Send a request; the bytes of its reply."""
        call = os.urandom(16)
        deadline = time.monotonic() + seconds + GRACE
        channel = self._child.channel
        channel.settimeout(seconds)
        try:
            channel.sendall(pickle.dumps((call, *request)))
            if inputs:
                channel.sendall(inputs)
        except ConnectionError:
            pass  # what it said before is still there
        sender, size = HEADER.unpack(self._receive(HEADER.size, deadline))
        failed = inputs and sender == bytes(16)  # it did not get as far as the request
        largest = MAX_CALL_PIXELS * 3 + 24 * self._limit + 2**18
        if size > largest or not (sender == call or failed):
            raise ValueError("its process sent a malformed reply")
        return self._receive(size, deadline)

    def _receive(self, size, deadline):
        """Exactly `size` bytes before the deadline, however they dribble in."""
        received = self._received
        while len(received) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._child.channel.settimeout(left)
            part = self._child.channel.recv(size + 4096)  # a short reply at once
            if not part:
                raise EOFError("its process died")
            received += part
        self._received = received[size:]
        del received[size:]
        return received


# ---- what is let through


def clean(text: str) -> str:
    """Text without control sequences and surrogates, with one kind of line end."""
    text = text.encode("utf-8", "replace").decode()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return CONTROL.sub("", text)


def check_reply(reply: bytes, output_limit: int, count_frames) -> Result:
    """The Result that the bytes of a reply hold. ValueError: they hold none.

    reply: the length of JSON, JSON, RGB bytes of the figures one after another
    count_frames: number of a video -> how many frames it has; frames outside are left out
    """
    if len(reply) < JSON_SIZE.size:
        raise ValueError("its process sent a malformed reply")
    (size,) = JSON_SIZE.unpack_from(reply)
    start = JSON_SIZE.size + size
    values = json.loads(reply[JSON_SIZE.size : start].decode("utf-8"))
    if type(values) is not dict or values.keys() != KEYS:
        raise ValueError("its process sent a malformed reply")
    text = values["text"]
    error = values["error"]
    if type(text) is not str or not (error is None or type(error) is str):
        raise ValueError("its process sent malformed text")
    text = clean(text[: output_limit + MARK])
    if error is not None:
        error = clean(error[: output_limit + MARK])
        if not error.strip():
            raise ValueError("its process sent a malformed error")
    frames = [
        pair
        for pair in _pairs(values["frames"], MAX_FRAMES)
        if 0 <= pair[1] < count_frames(pair[0])
    ]
    sizes = _pairs(values["sizes"], MAX_FIGURES)
    return Result(text, _figures(reply, start, sizes), error, frames)


def _pairs(values, most):
    """A list of at most so many pairs of whole numbers."""
    if type(values) is not list or len(values) > most:
        raise ValueError("its process sent a malformed reply")
    for pair in values:
        if type(pair) is not list or [type(number) for number in pair] != [int, int]:
            raise ValueError("its process sent a malformed reply")
    return [tuple(pair) for pair in values]


def _figures(reply, start, sizes):
    """The figures whose pixels begin at `start` and fill the rest of the reply."""
    images = []
    left = 3 * MAX_CALL_PIXELS
    for size in sizes:
        length = 3 * size[0] * size[1]
        left -= length
        if left < 0 or not _is_size(size):
            raise ValueError("its process sent malformed figures")
        images.append(Image.frombytes("RGB", size, reply[start : start + length]))
        start += length
    if start != len(reply):
        raise ValueError("its process sent malformed figures")
    return images


def _is_size(size):
    """Whether a figure can have this width and height."""
    shortest, longest = sorted(size)
    return shortest > 0 and longest < MAX_ASPECT * shortest and shortest * longest <= MAX_PIXELS
