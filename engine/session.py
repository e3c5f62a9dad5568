"""What runs inside a sandbox: the namespace of the code, what it prints and shows, and its errors.

The policy's code is meant for a notebook: it prints, shows figures, and ends with a value. A
Session behaves as one. It lives in a process that engine/confine.py has enclosed, hears calls
from the trainer (sandbox.py) on a socket, and answers each with one reply. Nothing in here is a
security boundary: the code can reach every object of this process. The kernel holds the code in,
and the trainer checks what comes out.

What a reader may rely on:
  - One namespace per sandbox. Variables, functions and imports of a call are there in the next
    one.
  - A call that printed and showed nothing shows the value of its last expression.
  - What is printed reaches the trainer at once, so that it is not lost when the process is
    killed.
  - A failed call leaves no figure open.
  - An error says why where something cannot work here: memory, asyncio, processes, network.
"""

import _signal
import ast
import ctypes
import io
import json
import linecache
import mmap
import os
import pickle
import random
import re
import signal
import struct
import sys
import time
import traceback
import types

from engine.figures import Figures, open_figures, open_video

MAX_FRAMES = 4096  # of videos, reported by one call
MEMORY = 2 << 30  # bytes that the code may take
PRINTED_BYTES = 1 << 15  # of printed text that the trainer can read when a call is killed
HEADER = struct.Struct("<16sI")  # of a message: the id of the call, how many bytes follow
JSON_SIZE = struct.Struct("<I")  # what follows: the length of JSON, JSON, pixels
# Last lines after which there is no value to show.
NO_VALUE = re.compile(r"print\(.*\)$|.*\.show\(\)$|[A-Za-z_]\w* *=[^=]")
OWN_FILE = "<sandbox>"  # the name of our sources in tracebacks, in which they are left out

REASONS = {
    "asyncio": "asyncio cannot run here: its event loop needs sockets, and code here gets none. "
    "Call the functions one after another, or use threads.",
    "multiprocessing": "multiprocessing cannot run here: code here may not start processes. "
    "Use a loop or threads.",
    "concurrent/futures/process": "Processes cannot be started here. Use a loop or threads.",
    "subprocess": "subprocess cannot run here: code here may not start programs.",
    "socket": "Code here has no network.",
}
MEMORY_REASON = (
    f"Code here may take {MEMORY >> 30} GiB of memory. Use smaller arrays or fewer frames."
)


class Session:
    """The namespace of one sandbox and everything that its code can print and show."""

    def __init__(self, descriptor: int):
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        os.cpu_count = lambda: 4  # by which pools of threads choose their size
        self.descriptor = descriptor  # of the socket to the trainer
        self.call = bytes(16)
        self.frames = []  # (video, frame) of every frame that the call decoded
        self.namespace = vars(main)
        self.figures = Figures(self.namespace)
        self.console = Console()

    def serve(self, missing: list[str], videos: list[int]):
        """Say which layers of the confinement are missing, then answer calls, without end.

        Before, the code of --prelude runs, and the inputs are bound.
        videos: descriptors of the files that become video_clue_0, video_clue_1, …
        """
        # Ahead of the inputs: these take a millisecond and more the first time.
        _seed(None)
        self.figures.begin(0)
        self.console.begin()
        self._run("", 1)
        requests = open(self.descriptor, "rb", closefd=False)
        self.call, self.console.limit, seed, prelude = pickle.load(requests)
        if prelude:
            try:
                self._execute(prelude)
            except BaseException as error:
                raise RuntimeError(f"--prelude: it raised {error!r}") from error
        if prelude or seed is not None:
            _seed(seed)
        for clue, image in enumerate(pickle.load(requests)):
            self.namespace[f"image_clue_{clue}"] = image
        for number, descriptor in enumerate(videos):
            self.namespace[f"video_clue_{number}"] = open_video(number, descriptor, self.frames)
        for clue, image in pickle.load(requests).items():
            self.namespace[f"image_clue_{clue}"] = image
        self.send(json.dumps([missing, self.console.address]).encode())
        while True:
            self.call, code, next_clue, seconds = pickle.load(requests)
            self.frames.clear()
            self.figures.begin(next_clue)
            self.console.begin()
            error = self._run(code, seconds)
            self._reply(error)

    def _reply(self, error):
        half = self.console.limit // 2  # as much of the text's end is kept
        if error:
            self.console.write(error)
        reply = {
            "text": self.console.text(),
            "error": error[-half:] or None,
            "frames": self.frames[:MAX_FRAMES],
            "sizes": self.figures.sizes,
        }
        text = json.dumps(reply).encode()
        self.send(JSON_SIZE.pack(len(text)) + text, *self.figures.pixels)

    def send(self, start: bytes, *pixels: bytes):
        """Write one message to the trainer. Pixels are many, and are not copied for it."""
        size = len(start) + sum(map(len, pixels))
        for part in (HEADER.pack(self.call, size) + start, *pixels):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]

    def _run(self, code, seconds):
        """Run code in the namespace; the traceback of what it raised, or an empty text."""
        start = time.monotonic()
        before = open_figures()
        text = ""
        try:
            _signal.signal(signal.SIGALRM, signal.default_int_handler)  # raises KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, seconds)
            self._execute(code)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                self.console.write(stop.code)
        except BaseException as error:
            text = _traceback(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() - start >= seconds:
            text += f"TimeoutError: the code ran for more than the limit of {seconds:g} s\n"
        if text:
            self.figures.close_since(before)
        return text

    def _execute(self, code):
        """Run code with one dict as globals: functions and comprehensions see each other."""
        name = f"<code {len(linecache.cache)}>"
        lines = code.splitlines(True)
        linecache.cache[name] = (len(code), None, lines, name)  # where tracebacks find the source
        if NO_VALUE.match(code.rpartition("\n")[2]):  # most calls, and a tree takes time
            exec(compile(code, name, "exec", dont_inherit=True), self.namespace)
            return
        tree = compile(code, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        last = None
        hidden = code.rstrip().endswith(";")  # as in a notebook
        if tree.body and isinstance(tree.body[-1], ast.Expr) and not hidden:
            last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, name, "exec", dont_inherit=True), self.namespace)
        if last is None:
            return
        value = eval(compile(last, name, "eval", dont_inherit=True), self.namespace)
        if value is not None and not self.figures.sizes and not self.console.tell():
            self.figures.display(value)


class Console(io.StringIO):
    """Standard output and error of the code. It keeps the start and the end of what is printed.

    The start is also kept as UTF-8 at a fixed place in memory. When a call into C has to be killed,
    no Python code runs any more, and the trainer reads it there, up to the first zero.
    """

    encoding = "utf-8"

    def __init__(self):
        super().__init__()
        self.limit = 0  # characters of one call
        self.memory = mmap.mmap(-1, 2 * PRINTED_BYTES)  # half of it stays empty
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.begin()

    def begin(self):
        """Forget the text of the last call."""
        self.seek(0)
        self.truncate()
        self.dropped = 0  # characters of the middle
        used = self.memory.tell()
        self.memory.seek(0)
        self.memory.write(bytes(used))
        self.memory.seek(0)
        sys.stdout = sys.stderr = self
        sys.stdin = io.StringIO()

    @property
    def buffer(self):
        """Where sys.stdout.buffer.write leads."""
        return types.SimpleNamespace(write=self._write_bytes, flush=self.flush)

    def _write_bytes(self, data):
        self.write(bytes(data).decode("utf-8", "replace"))
        return len(data)

    def write(self, text):
        """Called for every part of every line, so nothing here takes time."""
        length = len(text)
        if length > 100 * self.limit:
            text = self._shorten(text)
        super().write(text)
        self.memory.write(text.encode("utf-8", "replace")[: PRINTED_BYTES - self.memory.tell()])
        if self.tell() > 100 * self.limit:
            kept = self._shorten(self.getvalue())
            self.seek(0)
            self.truncate()
            super().write(kept)
        return length

    def _shorten(self, text):
        """The start and the end of a text: all of it that can be in the reply."""
        kept = text[: self.limit] + text[-self.limit :]
        self.dropped += len(text) - len(kept)
        return kept

    def text(self):
        """What was printed, cut in the middle to `limit` characters."""
        text = self.getvalue()
        half = self.limit // 2
        cut = len(text) + self.dropped - 2 * half
        if cut <= 0:
            return text
        return f"{text[:half]}\n[… {cut} characters cut …]\n{text[-half:]}"


def _seed(seed):
    """Random numbers of this sandbox's own, and the same ones whenever a seed is given."""
    import numpy

    random.seed(seed)
    numpy.random.seed(None if seed is None else seed % 2**32)


def _traceback(error):
    """A traceback without our own frames and folders, and why what failed cannot work here."""
    trace = traceback.TracebackException(type(error), error, error.__traceback__)
    trace.stack[:] = [frame for frame in trace.stack if frame.filename != OWN_FILE]
    full = "".join(trace.format())
    folders = "|".join(re.escape(f"{path}/") for path in sys.path if path)
    text = re.sub(r"<code \d+>", "<code>", full)
    text = re.sub(folders, "", text)
    if isinstance(error, MemoryError):
        return f"{text}[{MEMORY_REASON}]\n"
    if isinstance(error, OSError):
        for module, reason in REASONS.items():
            if re.search(rf'File ".*/{module}(/.*|\.py)",', full):
                return f"{text}[{reason}]\n"
    return text
