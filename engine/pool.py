"""The trainer's end of the forking process: it is started here, and children are taken from it.

The forking process (engine/confine.py) is started by exec once per trainer, and replaced when it
died or when the trainer forked. Children are forked ahead and wait, so that a sandbox is there in
milliseconds.

What a reader may rely on:
  - The forking process gets nothing of the trainer's: a clean environment, no open files, its
    source on standard input. Code may read Python, system libraries and fonts, and neither the
    checkout, also where it lies inside Python's folder, nor projects on the trainer's path.
  - A Child holds exactly two descriptors, and never one that was lost on the way: where there are
    too few, an error names the limit.
  - A process is signalled by its descriptor (where the kernel has them) and never by a number
    that may mean another one by now.
  - Why the forking process ended is said in the error of whoever wants a child.
"""

import errno
import inspect
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import data
from engine import confine, figures, session
from engine.session import PRINTED_BYTES

START = 120  # seconds until a child is there
PAUSE = 0.3  # seconds, where there is no process or descriptor to be had for a moment
MOST_WAITING = 128  # at 5 MiB each
READS = """/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /nix/store /usr/share/fonts
/usr/local/share/fonts /etc/fonts /usr/share/zoneinfo /etc/localtime /etc/alternatives
/etc/ld.so.cache /dev/null /dev/zero /dev/random /dev/urandom"""
# Namespaces: as root, else by a user namespace, else none. Process 1 has got them.
SPACES = """start="--fork --kill-child --mount-proc"; for own in -mnip -rmnip; do
unshare $own $start mount -t tmpfs none /tmp && exec unshare $own $start "$@"; done; exec "$@" """
# The whole environment of the forking process, but for the temporary folder.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "MPLBACKEND": "Agg",
    "PYTHONUTF8": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
CHECKOUT = Path(__file__).resolve().parents[1]
# Sockets that keep messages apart, where the system has them between processes.
KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM
# The forking process: modules made from source text, which are forgotten before code runs.
PROGRAM = """
import sys, types
sources = {sources!r}
for name, source in sources.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, {file!r}, "exec"), vars(module))
for name in sources:
    module = sys.modules.pop(name)
module.serve(*sys.argv[1:])
"""


_pidfd_signal = getattr(signal, "pidfd_send_signal", None)


class Child:
    """A process that is or becomes a sandbox."""

    def __init__(self, channel: socket.socket, process: int, scratch: str | None):
        self.channel = channel
        self.process = process  # a descriptor of it; where there are none, its number
        self.scratch = scratch  # its folder on disk, where there are no namespaces
        self.owner = os.getpid()

    @property
    def ours(self) -> bool:
        """Whether it was taken by this process, and not by one that this is a fork of."""
        return self.owner == os.getpid()

    def signal(self, number: int) -> None:
        """Send it a signal. ProcessLookupError: it ended and is reaped."""
        if _pidfd_signal is None:
            os.kill(self.process, number)
        else:
            _pidfd_signal(self.process, number)

    def printed(self, address: int) -> str:
        """Text at a place in its memory, as Console in engine/session.py keeps it there.

        Read while no code of ours runs in it. Empty where the system does not let us.
        """
        try:
            with open(f"/proc/self/fdinfo/{self.process}") as info:
                number = re.search(r"^Pid:\s*(\d+)$", info.read(), re.MULTILINE)[1]
            with open(f"/proc/{number}/mem", "rb", buffering=0) as memory:
                text = os.pread(memory.fileno(), PRINTED_BYTES, address).partition(b"\0")[0]
            self.signal(0)  # else the number may have been another process's
            return text.decode("utf-8", "replace")
        except (OSError, ValueError, TypeError, OverflowError):
            return ""

    def end(self) -> None:
        """Kill it, wait until it is reaped, remove its folder. In a fork: only let go."""
        self.channel.close()
        if self.ours:
            with suppress(ProcessLookupError):
                self._kill()
            if self.scratch:
                command = ["sh", "-c", confine.REMOVE, self.scratch]
                with suppress(OSError, subprocess.TimeoutExpired):  # goes with the forking process
                    null = subprocess.DEVNULL
                    subprocess.run(command, stdout=null, stderr=null, timeout=10)
        if _pidfd_signal is not None:
            os.close(self.process)

    def _kill(self):
        self.signal(signal.SIGKILL)
        if _pidfd_signal is not None:  # readable at its end: many may wait, and none spins
            ended = select.poll()
            ended.register(self.process, select.POLLIN)
            ended.poll(2000)
        for _ in range(4000):
            self.signal(signal.SIGKILL)
            time.sleep(0.0005)


class Pool:
    """The forking process, and the children that it has ready."""

    def __init__(self):
        self.forget()

    def forget(self):
        """Have no forking process; in a fork of the trainer: leave the parent's alone."""
        self.server = None
        self.lock = threading.RLock()
        self.control = []  # sockets to it, for children without and with videos
        self.asked = set()  # those of them on which a child is on its way

    def warm(self, count: int, videos: bool = False) -> None:
        """Have `count` children wait, at most MOST_WAITING. Returns at once.

        videos: for inputs with videos or without.
        """
        with suppress(OSError):  # whoever takes one is told
            self._control(videos).send(bytes([min(count, MOST_WAITING)]))

    def take(self, videos: bool) -> Child:
        """A child that waited. OSError, EOFError, ValueError: why there is none."""
        with self.lock:
            try:
                control = self._control(videos)
                if control not in self.asked:  # the first one of its kind
                    control.send(bytes([confine.TAKE]))
                    self.asked.add(control)
                message, descriptors, _, _ = socket.recv_fds(control, 4096, 2)
                if not message:
                    raise ConnectionError("its forking process ended")
                with suppress(OSError):  # the next one is handed over while this one is used
                    control.send(bytes([confine.TAKE]))
                child = json.loads(message)
            except (OSError, ValueError) as problem:
                server = self.server
                self.server = None
                if server is not None and isinstance(problem, ConnectionError):
                    raise EOFError(_last_words(server)) from problem
                raise
        if isinstance(child, str):  # it cannot be made
            time.sleep(PAUSE)  # before it is tried again
            raise OSError(child)
        number, scratch, count = child
        if len(descriptors) != count:  # the kernel dropped what we may not open
            for descriptor in descriptors:
                os.close(descriptor)
            raise OSError(errno.EMFILE, confine.too_few_descriptors())
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        process = descriptors[1] if count == 2 else number
        return Child(socket.socket(fileno=descriptors[0]), process, scratch)

    def _control(self, videos):
        """The socket for requests (Nursery.listen in engine/confine.py).

        The forking process is started where there is none.
        """
        with self.lock:
            if self.server is None or self.server.poll() is not None:
                self.server = None
                self._launch()
            return self.control[videos]

    def _launch(self):
        """Start the forking process by exec, in a session that no Ctrl-C reaches."""
        _fill_standard_streams()
        with ExitStack() as theirs:
            self.control = []
            self.asked = set()
            descriptors = []
            for _ in range(2):
                ours, their_end = socket.socketpair(socket.AF_UNIX, KIND)
                ours.settimeout(START)
                self.control.append(ours)
                descriptors.append(theirs.enter_context(their_end).fileno())
            lives = _descriptor_of_our_life()
            theirs.callback(os.close, lives)
            descriptors.append(lives)
            packages = [path for path in sys.path if path.endswith("-packages")]
            arguments = [*map(str, descriptors), ":".join(packages), *_readable(packages)]
            self.server = subprocess.Popen(
                ["sh", "-c", SPACES, "sh", sys.executable, "-", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT | {"TMPDIR": os.getenv("TMPDIR", "")},
                cwd="/",
                pass_fds=descriptors,
                start_new_session=True,
            )
        with suppress(BrokenPipeError), self.server.stdin as source:
            source.write(_program())


pool = Pool()
os.register_at_fork(after_in_child=pool.forget)


def _last_words(server):
    """Why the forking process ended: the last line of its errors."""
    words = "its forking process ended"
    with suppress(OSError, subprocess.TimeoutExpired):
        server.wait(2)
        os.set_blocking(server.stderr.fileno(), False)
        errors = server.stderr.read() or b""
        for line in errors.decode("utf-8", "replace").splitlines():
            words = line.strip() or words
    return words


def _fill_standard_streams():
    """Where standard streams are closed, open them: our sockets are not to become them."""
    while True:
        spare = os.open(os.devnull, os.O_RDWR)
        if spare > 2:
            os.close(spare)
            return


def _descriptor_of_our_life():
    """A descriptor that becomes readable when this process ends."""
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(os.getpid())
    reader, _ = os.pipe()
    return reader


def _program():
    """The source of the forking process, from standard input: it needs no path of ours."""
    sources = {"data": f"from PIL import Image\n{inspect.getsource(data.rgb)}"}
    for module in (figures, session, confine):  # in the order in which they import each other
        sources[module.__name__] = Path(module.__file__).read_text(encoding="utf-8")
    return PROGRAM.format(sources=sources, file=session.OWN_FILE).encode()


def _readable(packages):
    """The paths that code may read: Python, system libraries, fonts."""
    paths = [*packages, *READS.split()]
    for prefix in (sys.prefix, sys.base_prefix):
        paths += [f"{prefix}/lib", f"{prefix}/lib64"]
    readable = set()
    for path in paths:
        readable.update(_but_for_us(path))
    return sorted(readable)


def _but_for_us(path):
    """A path that code may read; where the checkout lies in it, all else that is there."""
    ours = str(CHECKOUT)
    real = os.path.realpath(path)
    if os.path.commonpath([ours, real]) != real:
        return [path] if os.path.exists(path) else []
    if ours == real:
        return []
    readable = []
    for name in os.listdir(path):
        readable += _but_for_us(f"{path}/{name}")
    return readable
