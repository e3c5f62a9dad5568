"""Where the policy's Python runs: one locked-down process per trajectory.

A policy in training writes whatever may pay, so its code is hostile. A clean process (by exec, no fork of the trainer)
imports numpy, matplotlib, PIL and decord once and forks a child per Sandbox. A reply: the call's random id, JSON, RGB.
Covered, by two layers where the kernel has them:
  - files: Landlock; a read-only root of Python and system libraries. Scratch is a tmpfs with limits (where namespaces
    are refused: a watched directory). Videos come as descriptors.
  - network, programs, other processes, privileges: a list of allowed system calls (seccomp), no_new_privs, no
    capabilities; network, pid and ipc namespaces, Landlock scopes, a user namespace of its own.
  - memory, descriptors, threads, file sizes: rlimits; sandboxes die first when the machine runs out of memory.
  - time: one deadline a reply, then SIGKILL by pidfd; between calls the process is stopped.
  - protocol: the trainer unpickles nothing, decodes no image, checks sizes before it takes memory.
  - life: children die with the forking process, that one with the trainer, whatever ended it.
Not covered:
  - kernel bugs; timing, caches and load as side channels; CPU time within a call; the names of host and kernel,
    numbers of other processes.
  - where namespaces are refused: names and sizes of files; bombs of threads, of disk and of deleted files end only
    after 0.1 s, 0.1 s and a second.
  - unsafe=True where a layer is missing (not Linux, an old kernel): it contains mistakes, not attacks.
"""
import ctypes, functools, gc, io, json, linecache, os, pickle, platform, random, re, resource, select, signal, socket
import stat, struct, subprocess, sys, tempfile, threading, time, traceback, types, warnings, weakref
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from itertools import islice

from PIL import Image

MEMORY, SCRATCH, FILES, THREADS, DESCRIPTORS = 2 << 30, 64 << 20, 1000, 64, 128     # what the code may take
MAX_FIGURES, MAX_PIXELS, MAX_ASPECT, MAX_FRAMES = 32, 2_000_000, 200, 4096          # figures and video frames of a call
START, GRACE, WAITING = 120, 0.25, 4        # seconds until a child is there, from timeout to kill; children that wait
HEADER = struct.Struct("<16sI")             # of a reply: id of the call, bytes of JSON
READS = """/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /nix/store /usr/share/fonts /usr/local/share/fonts /etc/fonts
/usr/share/zoneinfo /etc/localtime /etc/alternatives /etc/ld.so.cache /dev/null /dev/zero /dev/random /dev/urandom"""
REMOVE = 'while chmod -R u+rwx "$0"; ! rm -rf "$0"; do sleep 1; done'       # at any depth, whatever the modes
# Namespaces: as root, else by a user namespace, else none. The command that finds itself process 1 has got them.
SPACES = """start="--fork --kill-child --mount-proc"; for own in -mnip -rmnip; do
unshare $own $start mount -t tmpfs none /tmp && exec unshare $own $start "$@"; done; exec "$@" """
# By machine: seccomp's name for it; the numbers of clone and fcntl, which are allowed in part; then what the
# kernel does (files, own memory and signal handlers, threads, clocks) and what is only answered: done (chmod, utime,
# flock), ENOTTY (ioctl), ENOSYS (clone3), EOPNOTSUPP (extended attributes, fallocate). All else, now or in kernels to
# come (socket, kill, ptrace, exec, fork, prctl, mount, unshare, memfd, io_uring), is EPERM.
CALLS = {"x86_64": (0xC000003E, 56, 72, {None: """0-15 17-26 28 32-40 60 63 74-75 77-85 87-89 95-100 102 104
    107-108 110 115 118 120 128 131 186 201-202 204 217-219 228-233 257-258 262-264 266-267 269-271 273-274 281 290-293
    309 316 318 326 332 334 439""", 0: "73 90-91 132 235 261 268 280 452", 25: "16", 38: "435", 95: "188-199 285"}),
         "aarch64": (0xC00000B7, 220, 25, {None: """17 19-24 34-36 38 46 48-50 56-57 59 61-68 71-73 78-80 82-83
    93-94 96 98-103 113-115 123-124 128 132 134-135 137 139 148 150 153 158 160 163 165-166 168-169 172-179 214-216 222
    226-227 233 276 278 285 291 293 439""", 0: "32 52-53 88 452", 25: "29", 38: "435", 95: "5-16 47"})}

class SandboxError(RuntimeError):
    """A layer of the confinement is missing on this machine, or the sandbox's process does not start."""

@dataclass
class Result:
    """What one call left: printed text, then the traceback; shown figures (RGB); traceback; (video, frame) decoded."""
    text: str
    images: list
    error: str | None
    frames: list

class Packed:
    """PIL images as a process of its own takes them: made once, for any number of sandboxes."""
    def __init__(self, images):
        images = [image if type(image) is Image.Image else image.copy() for image in images]     # a file's: loaded
        self.count, self.bytes = len(images), pickle.dumps(images)

class Sandbox(AbstractContextManager):
    """A persistent Python namespace, in a process of its own, for code that nobody trusts. A context manager.

    images: PIL images or Packed ones, bound as image_clue_0…; videos: paths, bound as video_clue_0… (decord
    VideoReaders that open at first use). timeout: seconds of wall time a call. output_limit: characters of text a call.
    Raises SandboxError where the kernel lacks Landlock or seccomp, unless `unsafe`, and OSError for a video that cannot
    be opened.
    """
    def __init__(self, images=(), videos=(), timeout=30.0, *, unsafe=False, output_limit=10_000, seed=None):
        self.videos, self.timeout, self.unsafe = list(videos), timeout, unsafe
        self._images = images if isinstance(images, Packed) else Packed(images)
        self._clue, self._limit, self._lock = self._images.count, output_limit, threading.RLock()
        self._start()
        if seed is not None: self.run(f"__import__('random').seed({seed}); __import__('numpy').random.seed({seed})")

    def close(self, *_):
        """End the process and a call that runs; process and scratch directory are gone when this returns."""
        self.timeout = None
        if self._owner == os.getpid():                          # not from a fork: the connection is shared
            with suppress(OSError): self._channel.shutdown(socket.SHUT_RDWR)
        with self._lock: self._end()
    __exit__ = close

    def _start(self):
        """Take a prepared child, hand it the inputs, hear what it could not do to enclose itself."""
        with ExitStack() as files:
            videos = [files.enter_context(open(path, "rb")).fileno() for path in self.videos]
            for _ in range(WAITING + 3):                        # children that waited may have died
                with suppress(OSError, EOFError, ValueError):
                    self._channel, self._process, scratch = _take(bool(videos))
                    self._owner = os.getpid()
                    self._end = weakref.finalize(self, _end, self._channel, self._process, scratch, self._owner)
                    self._end.atexit = False                    # at exit the forking process ends what is left
                    self._channel.settimeout(START)
                    if videos: socket.send_fds(self._channel, [b"v"], videos)
                    missing, _ = self._exchange((self._limit,), START, self._images.bytes)
                    break
            else:
                raise SandboxError("the sandbox process does not start: can this Python import numpy, matplotlib, PIL?")
        lack = f"no safe place for code without {', '.join(missing)}: use Linux 5.13+ or unsafe=True (--unsafe_sandbox)"
        if missing and not self.unsafe: raise SandboxError(lack)
        if missing: warnings.warn(lack, RuntimeWarning, stacklevel=3)

    def run(self, code):
        """Run `code` in the namespace, return a Result. What the code does never raises here: it is Result.error."""
        with self._lock:
            if self.timeout is None: raise SandboxError("this sandbox is closed")
            notice, images, frames, lives = "", [], [], False
            if not self._end.alive or self._owner != os.getpid():       # it ended at the last call, or is a fork's copy
                self._start()
                notice = "[Restarted: earlier variables, imports and files are lost; the inputs are bound again.]\n"
            seconds, begun = self.timeout or 0, time.monotonic()        # 0: closed by another thread meanwhile
            try:
                _send(self._process, signal.SIGCONT)
                text, error, frames, images = self._exchange((code, self._clue, seconds), seconds)
                text, error = (t if t is None else str(t)[:self._limit + 99].encode("utf-8", "replace").decode()
                               for t in (text or "", error))
                frames = [(int(video), int(frame)) for video, frame in frames]
                _send(self._process, signal.SIGSTOP)            # threads that outlive a call wait for the next
                lives = time.monotonic() - begun < seconds
            except (OSError, EOFError, ValueError, TypeError, OverflowError, RecursionError) as problem:
                text = error = f"{type(problem).__name__}: {problem}\n"
            finally:
                if not lives:                                   # also when interrupted: late replies must meet nobody
                    self._end()
            self._clue += len(images)
            return Result(notice + text, images, error, frames)

    def _exchange(self, request, seconds, more=b""):
        """Send a request and `more`; the values of its reply, of which nothing is trusted, and its images."""
        call, deadline = os.urandom(16), time.monotonic() + seconds + GRACE
        self._channel.settimeout(seconds)
        self._channel.sendall(pickle.dumps((call, *request)))
        if more: self._channel.sendall(more)                    # else it may be closed by now, with a reply to read
        sender, size = HEADER.unpack(self._receive(HEADER.size, deadline))
        if sender != call or size > 24 * self._limit + 2 ** 18:
            raise ValueError("its process sent a malformed reply")
        *values, sizes = json.loads(self._receive(size, deadline))
        if len(sizes) > MAX_FIGURES or not all(w > 0 < h and w * h <= MAX_PIXELS for w, h in sizes):
            raise ValueError("its process sent malformed figures")
        return *values, [Image.frombytes("RGB", (w, h), self._receive(3 * w * h, deadline)) for w, h in sizes]

    def _receive(self, size, deadline):
        """Exactly `size` bytes before the deadline, however they dribble in."""
        view = memoryview(buffer := bytearray(size))
        while view:
            if (left := deadline - time.monotonic()) <= 0: raise TimeoutError("timed out")
            self._channel.settimeout(left)
            if not (count := self._channel.recv_into(view)):
                raise EOFError("its process died")
            view = view[count:]
        return buffer

# ---- the trainer's side: the forking process and the children it has prepared
_send = getattr(signal, "pidfd_send_signal", os.kill)           # a pidfd never means a later process of that number
_pool = types.SimpleNamespace(server=None, lock=threading.RLock())
os.register_at_fork(after_in_child=lambda: vars(_pool).update(server=None, lock=threading.RLock()))

def warm(count, videos=False):
    """Have `count` children wait, for inputs with or without videos, while the policy generates. Returns at once."""
    with _pool.lock, suppress(OSError):                         # a dead forking process is replaced at the next call
        if _pool.server is None or _pool.server.poll() is not None: _launch()
        _pool.control[videos].send(b"f" * (count - _pool.waiting[videos]))
        _pool.waiting[videos] = max(count, _pool.waiting[videos])

def _take(videos):
    """A prepared child: the channel to it, its pidfd (where there is none, its number), its scratch directory."""
    with _pool.lock:
        warm(WAITING + 1, videos)                               # more than we take: some are always prepared
        try:
            message, fds, _, _ = socket.recv_fds(_pool.control[videos], 4096, 2)
            _pool.waiting[videos] -= 1
            for fd in fds: os.set_inheritable(fd, False)
            pid, scratch = json.loads(message)
        except (OSError, ValueError):                           # it died
            _pool.server = None
            raise
        return socket.socket(fileno=fds[0]), (*fds[1:], pid)[0], scratch

def _launch():
    """Start the forking process by exec, in a session no Ctrl-C reaches, its source from stdin: no path of ours."""
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3: pass   # closed standard streams: not to become our sockets
    os.close(spare)
    _pool.control, theirs = zip(socket.socketpair(), socket.socketpair())       # for children without and with videos
    for control in _pool.control: control.settimeout(START)
    _pool.waiting = [0, 0]
    trainer = os.pidfd_open(os.getpid()) if hasattr(os, "pidfd_open") else os.pipe()[0]      # readable when we are gone
    packages = [path for path in sys.path if path.endswith("-packages")]        # and no folder of somebody's projects
    libraries = [f"{prefix}/{lib}" for prefix in (sys.prefix, sys.base_prefix) for lib in ("lib", "lib64")]
    reads = {inner for path in (*libraries, *packages, *READS.split()) for inner in _but_for_us(path)}
    environment = dict(PATH="/usr/bin:/bin", LANG="C.UTF-8", MPLBACKEND="Agg", PYTHONUTF8="1", PYTHONSAFEPATH="1",
                       PYTHONHASHSEED="0", OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1", TMPDIR=os.getenv("TMPDIR", ""))
    with theirs[0], theirs[1], open(__file__) as source, open(os.devnull, "w") as null, open(trainer):
        fds = theirs[0].fileno(), theirs[1].fileno(), trainer
        command = ["sh", "-c", SPACES, "sh", sys.executable, "-", *map(str, fds), ":".join(packages), *sorted(reads)]
        _pool.server = subprocess.Popen(command, stdin=source, stdout=null, stderr=null, env=environment, cwd="/",
                                        pass_fds=fds, start_new_session=True)

def _but_for_us(path):
    """A path that code may read; where the checkout lies in it, all else that is there."""
    ours = os.path.dirname(os.path.realpath(__file__))
    if os.path.commonpath([ours, real := os.path.realpath(path)]) != real:
        return [path] * os.path.exists(path)
    return [inner for name in os.listdir(path) if ours != real for inner in _but_for_us(f"{path}/{name}")]

def _end(channel, process, scratch, owner):
    """Kill a child, wait until it is reaped, remove its scratch directory. In a fork of the trainer: only let go."""
    channel.close()
    if owner == os.getpid():
        with suppress(ProcessLookupError):
            _send(process, signal.SIGKILL)
            if _send is not os.kill:                            # readable at its end: many may wait, and none spins
                (ended := select.poll()).register(process, select.POLLIN)
                ended.poll(2000)
            for _ in range(4000): time.sleep(_send(process, signal.SIGKILL) or 0.0005)
        if scratch: subprocess.run(["sh", "-c", REMOVE, scratch], stderr=subprocess.DEVNULL)
    if _send is not os.kill: os.close(process)

# ---- the forking process
_libc = ctypes.CDLL(None, use_errno=True)

def _kernel(call, *arguments):
    """A system call by number, or a C function by name; its value, or OSError."""
    function, arguments = (_libc.syscall, (call, *arguments)) if isinstance(call, int) else (_libc[call], arguments)
    value = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if value < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value

def _serve(control, videos, trainer, packages, *reads):
    """Import once, enclose what the children share, fork a child a request, until the trainer is gone."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    sys.path += [path for path in packages.split(":") if path not in sys.path]
    import numpy.fft, numpy.random, PIL.ImageDraw, PIL.ImageEnhance, PIL.ImageFilter, PIL.ImageOps  # noqa: F401
    from matplotlib import get_cachedir, pyplot
    if "/matplotlib-" in get_cachedir(): subprocess.run(["rm", "-rf", get_cachedir()])      # made where home is closed
    with suppress(ImportError):
        import decord  # noqa: F401
    Image.preinit()
    pyplot.title("loads fonts and canvas for all").figure.canvas.draw()
    pyplot.close("all")
    if spaces := os.getpid() == 1:
        root = "/scratch" if any(path.startswith("/tmp/") for path in reads) else "/tmp"
        _pivot(reads, root)
    else:                                                       # a shell outlives us, should we be killed as well
        root = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
        subprocess.Popen(["sh", "-c", f"read _; {REMOVE}", root], stdin=subprocess.PIPE)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)               # the kernel reaps
    with suppress(KeyError): _filter()
    gc.collect()
    gc.freeze()                                                 # collections in children do not touch shared pages
    controls = [socket.socket(fileno=int(fd)) for fd in (control, videos)]
    poller, trainer = select.poll(), int(trainer)
    for fd in (*controls, trainer): poller.register(fd, select.POLLIN)
    while trainer not in (ready := dict(poller.poll(None if spaces else 100))):
        for name in () if spaces else os.listdir(root): _watch(int(name), f"{root}/{name}")
        for control in (control for control in controls if control.fileno() in ready):
            if not (requests := control.recv(WAITING)): return  # a few, then watch again
            for _ in requests:
                theirs, ours = socket.socketpair()
                if not (pid := os.fork()):
                    try:
                        _child(ours.fileno(), reads, root, spaces, control is controls[1])
                    finally:
                        os._exit(1)
                fds = [theirs.fileno()] + ([os.pidfd_open(pid)] if hasattr(os, "pidfd_open") else [])
                socket.send_fds(control, [json.dumps((pid, None if spaces else f"{root}/{pid}")).encode()], fds)
                for fd in (theirs.detach(), ours.detach(), *fds[1:]): os.close(fd)

def _watch(pid, scratch):
    """Where namespaces are refused, no kernel limit bounds a child's threads and scratch directory: kill instead."""
    paths, size, maps = [scratch], 0, ""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()
        for path in islice(paths, FILES + 1):                   # they grow on the way
            with suppress(FileNotFoundError):
                size += (info := os.lstat(path)).st_size
                if stat.S_ISDIR(info.st_mode):
                    paths += [f"{path}/{name}" for name in os.listdir(path)]
        for fd in os.listdir(f"/proc/{pid}/fd"):                # deleted files take room while they are open or mapped
            with suppress(FileNotFoundError):
                info = os.stat(f"/proc/{pid}/fd/{fd}")
                size += info.st_size * (info.st_nlink == 0)
        if state[0] != "T" and time.monotonic() % 1 < 0.1:      # takes a millisecond
            with open(f"/proc/{pid}/maps") as file: maps = file.read()
        hidden = re.search(re.escape(scratch) + r"/.* \(deleted\)$", maps, re.MULTILINE)
        over = int(state[17]) > THREADS or size > SCRATCH or len(paths) > FILES + 1 or hidden
    except (FileNotFoundError, ProcessLookupError):
        return                                                  # the process ended
    except OSError:
        over = True                                             # a path too long, or closed to us, to hide something
    if over and int(state[1]) == os.getpid(): os.kill(pid, signal.SIGKILL)

def _pivot(reads, scratch):
    """A read-only root directory of `reads`, /proc and a place for `scratch`, in the mount namespace that we are in."""
    _kernel("mount", b"tmpfs", b"/sys", b"tmpfs", 0, b"mode=755")       # on /sys, where no Python lives
    for name in (scratch, "/proc"): os.mkdir(f"/sys{name}")
    for name in reads:
        os.makedirs(f"/sys{name}" if os.path.isdir(name) else f"/sys{os.path.dirname(name)}", exist_ok=True)
        if not os.path.exists(f"/sys{name}"): os.mknod(f"/sys{name}")
        _kernel("mount", name.encode(), f"/sys{name}".encode(), None, 0x5000, None)     # MS_BIND | MS_REC
    with suppress(OSError):                                     # mount_setattr: all read-only and nosuid, but for /proc
        _kernel(442, -100, b"/sys", 0x8000, struct.pack("4Q", 3, 0, 0, 0), 32)
    _kernel("mount", b"/proc", b"/sys/proc", None, 0x5000, None)
    os.chdir("/sys")
    _kernel("pivot_root", b".", b".")
    _kernel("umount2", b".", 2)                                 # MNT_DETACH: the old root is gone

# ---- the child: it encloses itself and runs code
def _give_up(scratch, spaces):
    """What can go before the inputs are known: shared mounts, room for bombs, privileges, a life without its parent."""
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    limits = dict(AS=memory, FSIZE=SCRATCH, NOFILE=DESCRIPTORS, CORE=1)      # 1: not into a pipe either
    if spaces:
        limits["NPROC"] = THREADS                               # counted by real uid and user namespace
        _kernel("unshare", 0x00020000)                          # CLONE_NEWNS
        _kernel("mount", b"tmpfs", scratch.encode(), b"tmpfs", 14, b"size=%d,nr_inodes=%d,mode=700" % (SCRATCH, FILES))
        with suppress(OSError):                                 # not root: the user namespace is enough
            os.setresuid(2 ** 30 + random.getrandbits(29), -1, -1)
        with suppress(OSError):
            _kernel("unshare", 0x10000000)                      # CLONE_NEWUSER
    for name, value in limits.items():
        with suppress(ValueError):                              # the limit that we have is lower
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    _kernel("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    _kernel("prctl", 38, 1, 0, 0, 0)                            # PR_SET_NO_NEW_PRIVS
    _kernel("prctl", 1, signal.SIGKILL)                         # PR_SET_PDEATHSIG

def _landlock(reads, scratch, videos):
    """Files: read `reads` and the videos, write in the scratch directory, and nothing else."""
    abi = _kernel(444, None, 0, 1)
    every = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1    # all rights over files that this kernel can take away
    rules = struct.pack("QQQ", every, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]   # and TCP, signals, sockets
    ruleset = _kernel(444, rules, len(rules), 0)
    rights = {path: 0xC if os.path.isdir(path) else 4 for path in reads} | {"/dev/null": 6, scratch: 0x75BE}
    rights = {os.open(path, os.O_PATH): right for path, right in rights.items()}    # 2: write files, 4: read, 8: list
    for fd, right in {**rights, **dict.fromkeys(videos, 4)}.items():
        _kernel(445, ruleset, 1, struct.pack("=Qi", right & every, fd), 0)
    _kernel(446, ruleset, 0)
    for fd in (ruleset, *rights): os.close(fd)

@functools.cache
def _filter():
    """The list of calls in the instructions of the kernel's packet filter, made before the children are: a kernel
    structure, and the memory that it points to."""
    machine, clone, fcntl, answers = CALLS[platform.machine()]
    allow, refuse, load, equal = (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50001), 0x20, 0x15
    tests = {clone: [(load, 0, 0, 16), (0x45, 0, 1, 0x10000), allow, refuse],                   # threads only
             fcntl: [(load, 0, 0, 24), (equal, 1, 0, 1030), (0x35, 1, 0, 8), allow, refuse]}    # no owner, no signal
    for error, numbers in answers.items():
        for first, last in re.findall(r"(\d+)-?(\d*)", numbers):
            answer = allow if error is None else (6, 0, 0, 0x50000 + error)
            tests |= {number: [answer] for number in range(int(first), int(last or first) + 1)}
    program = [(load, 0, 0, 4), (equal, 1, 0, machine), (6, 0, 0, 0x80000000), (load, 0, 0, 0)]
    for number, answer in tests.items():
        program += [(equal, 0, len(answer), number), *answer]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in [*program, refuse]))
    return struct.pack("HP", len(program) + 1, ctypes.addressof(code)), code

def _seccomp(*_):
    """System calls: those of the list, and nothing else."""
    _kernel("prctl", 22, 2, _filter()[0], 0, 0)

def _child(channel, reads, root, spaces, videos):
    """Enclose itself, with the videos that are to be read if there will be any; wait for a job, run calls."""
    os.dup2(channel, 3)
    os.closerange(4, 1 << 20)
    scratch, missing = root if spaces else f"{root}/{os.getpid()}", []
    if not spaces: os.mkdir(scratch)
    if sys.platform == "linux": _give_up(scratch, spaces)
    os.chdir(scratch)
    os.environ.update(HOME=scratch, TMPDIR=scratch)
    import numpy
    numpy.random.seed()
    sys.argv, sys.modules["__main__"], tempfile.tempdir = [""], types.ModuleType("__main__"), None
    space = vars(sys.modules["__main__"])
    console = _Console(space)
    space.update(plt=console.plt, np=numpy, Image=Image)
    channel, requests, replies = socket.socket(fileno=3), open(3, "rb", closefd=False), open(3, "wb", closefd=False)
    videos = socket.recv_fds(channel, 1, 250)[1] if videos else ()
    space.update({f"video_clue_{k}": _video(k, fd, console) for k, fd in enumerate(videos)})
    for layer in (_landlock, _seccomp):
        try:
            layer(reads, scratch, videos)
        except (OSError, KeyError, AttributeError) as error:
            missing.append(f"{layer.__name__[1:]} ({error})")
    call, console.limit = pickle.load(requests)                 # from here on somebody waits
    space.update({f"image_clue_{k}": image for k, image in enumerate(pickle.load(requests))})
    reply = missing, []
    while True:
        reply = json.dumps(reply).encode()
        replies.write(b"".join((HEADER.pack(call, len(reply)), reply, *console.pixels)))
        replies.flush()
        call, code, clue, seconds = pickle.load(requests)
        console.begin(clue)
        error = _execute(code, space, seconds)
        io.StringIO.write(console, error or "")
        reply = console.text(), error and error[-console.limit:], console.frames[:MAX_FRAMES], console.sizes

def _execute(code, space, seconds):
    """Run in one dict as globals, so that functions and comprehensions see each other. Its traceback, or None."""
    name, text, start = f"<code {len(linecache.cache)}>", "", time.monotonic()
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)      # where tracebacks find the source
    try:
        signal.signal(signal.SIGALRM, signal.default_int_handler)               # raises KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, seconds)
        exec(compile(code, name, "exec", dont_inherit=True), space)
    except SystemExit as stop:
        print(stop.code if isinstance(stop.code, str) else "", end="")
    except BaseException as error:
        trace = traceback.TracebackException(type(error), error, error.__traceback__)
        trace.stack[:] = [frame for frame in trace.stack if frame.filename != "<stdin>"]
        paths = "|".join(re.escape(f"{path}/") for path in sys.path if path)
        text = re.sub(paths, "", re.sub(r"<code \d+>", "<code>", "".join(trace.format())))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    late = time.monotonic() - start >= seconds
    return text + f"TimeoutError: the code ran for more than {seconds:g} s\n" * late or None

def _video(number, fd, console):
    """A decord VideoReader that opens at its first use and notes the frames that it decodes."""
    import decord

    class VideoReader(decord.VideoReader):
        _handle, _at, __init__ = None, 0, lambda self: None
        def __getattr__(self, name):                            # what opening would have set, asked for the first time
            if self._handle is not None or name[:1] != "_" or name[:2] == "__": raise AttributeError(name)
            try: super().__init__(f"/proc/self/fd/{fd}", num_threads=1)
            except Exception as error:                          # decord has no class of its own for them all
                raise OSError(f"video_clue_{number} cannot be read: {str(error).splitlines()[0]}") from None
            return getattr(self, name)
        def next(self):
            console.frames += [(number, self._at)] * (self._at < len(self))
            self._at += 1
            return super().next()
        def get_batch(self, indices):
            console.frames += [(number, int(k) % len(self)) for k in indices]
            return super().get_batch(indices)
        def seek_accurate(self, pos):
            self._at = range(len(self))[pos]
            super().seek_accurate(pos)
        seek, __next__ = seek_accurate, next
    return VideoReader()

class _Console(io.StringIO):
    """Standard output and error of the code, and where its figures go, until a reply takes them."""
    def __init__(self, space):
        from matplotlib import pyplot
        super().__init__()
        self.space, self.plt, self.pixels = space, pyplot, []
        Image.Image.show = lambda image, *_, **__: self.show(image)
        pyplot.Figure.show = lambda figure, *_, **__: self.draw(figure)
        pyplot.show = lambda *_, **__: [self.draw(pyplot.figure(number)) for number in pyplot.get_fignums()][:0] or None
    def begin(self, clue):
        self.seek(self.truncate(0))
        self.clue, self.frames, self.sizes, self.pixels = clue, [], [], []
        sys.stdout, sys.stderr, sys.stdin = self, self, io.StringIO()
    def write(self, text):
        if self.tell() > 100 * self.limit: raise RuntimeError(f"more than {100 * self.limit} characters printed")
        return super().write(text)
    def text(self):
        text, half = self.getvalue(), self.limit // 2
        cut = len(text) - 2 * half
        return text if cut <= 0 else f"{text[:half]}\n[… {cut} characters cut …]\n{text[-half:]}"
    def show(self, image):
        """Any mode as RGB, scaled down when too large; bound as the next image_clue."""
        width, height = image.size
        if not 0 < max(width, height) < MAX_ASPECT * min(width, height):
            return print(f"[Not shown: {width}x{height} pixels; the aspect ratio must be below {MAX_ASPECT}.]")
        if len(self.sizes) == MAX_FIGURES: raise RuntimeError(f"more than {MAX_FIGURES} figures in one call")
        image, scale = _rgb(image), (MAX_PIXELS / (width * height)) ** 0.5
        if scale < 1: image = image.resize((max(int(width * scale), 1), max(int(height * scale), 1)))
        self.space[f"image_clue_{self.clue + len(self.sizes)}"] = image
        self.sizes.append(image.size)
        self.pixels.append(image.tobytes())
    def draw(self, figure):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        width, height = figure.get_size_inches() * figure.dpi
        figure.set_dpi(figure.dpi * min(1, (MAX_PIXELS / (width * height)) ** 0.5))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.plt.close(figure)
        self.show(Image.fromarray(self.space["np"].asarray(canvas.buffer_rgba())))

def _rgb(image):
    """Transparent parts become white; more than 8 bits are squeezed into 0–255 where they do not fit."""
    import numpy
    if image.mode[0] in "IF":
        values = numpy.nan_to_num(numpy.asarray(image, float))
        low, high = min(values.min(), 0), max(values.max(), 255)
        image = Image.fromarray(((values - low) * (255 / (high - low))).astype("uint8"))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return (image.getchannel(0) if image.mode == "LAB" else image).convert("RGB")

if __name__ == "__main__": _serve(*sys.argv[1:])
