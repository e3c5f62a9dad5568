"""The rooms that sandboxes live in: the process that forks them, and what the kernel holds them to.

The code of a policy in training does whatever may pay, so it is treated as hostile. sandbox.py
starts one forking process by exec: a clean Python, without the trainer's memory, environment,
files and network. It imports numpy, matplotlib, PIL, cv2 and decord once, and forks one child per
sandbox. A child gives up all that it can before it knows its inputs, and runs code
(engine/session.py) only when every layer is there. Its source comes on standard input, so that no
folder of ours must be readable.

What is guaranteed where the kernel has the layers (a missing one is reported, and sandbox.py
refuses):
  - Files: Landlock. Code reads Python, system libraries and its videos, and writes in a scratch
    folder. With namespaces the root is read-only and the scratch folder a tmpfs with limits;
    without, the folder is watched. No file that code may read can be emptied, on any kernel.
  - Network, programs, other processes, privileges: seccomp allows the system calls listed here
    and no others, now and in kernels to come. No capabilities, no way to new privileges; network,
    pid and ipc namespaces, Landlock scopes, a user namespace of its own. As root with namespaces
    a child gives up real, effective and saved ids, unless Python or a video is readable by root
    alone.
  - Between sandboxes: no shared descriptors, no file locks, no futexes on shared pages.
  - Memory, descriptors, threads, file sizes: limits of the kernel. Sandboxes die first when the
    machine runs out of memory.
  - Life: children die with the forking process, and that one with the trainer, whatever ended it.
    No accident with one child ends the forking process. Scratch folders that a killed tree left
    behind are swept at the next start.

What is not:
  - Bugs of the kernel; timing, caches and load as side channels; the names of host and kernel.
  - Without namespaces: names and sizes of files and numbers of processes are visible; bombs of
    threads, of disk and of deleted files end only after 0.1 s, 0.1 s and a second; as root the
    ids stay.
"""

import ctypes
import errno
import fcntl
import functools
import gc
import glob
import json
import os
import platform
import random
import re
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from itertools import islice

from PIL import Image

from engine.session import MEMORY, Session

SCRATCH = 64 << 20  # bytes in the scratch folder, and of one file
FILES = 1000  # in the scratch folder
THREADS = 16
DESCRIPTORS = 128
TAKE = 255  # the request for one child; smaller numbers are how many should wait
WAITING = 4  # children that wait for inputs, at least
MAPS_READ = 1 << 20  # bytes of the list of a child's mappings; an honest one has a tenth
WATCH_SECONDS = 0.1
# Removes a folder at any depth, whatever the modes in it.
REMOVE = 'while chmod -R u+rwx "$0"; ! rm -rf "$0"; do sleep 1; done'

FEW = (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)  # no descriptor is left

# ---- the kernel's constants

CLONE_VM = 0x100
CLONE_FS = 0x200
CLONE_FILES = 0x400
CLONE_SIGHAND = 0x800
CLONE_THREAD = 0x10000
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
CLONE_NAMESPACES = 0x7E020000
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 0x1000
MS_REC = 0x4000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
FUTEX_PRIVATE_FLAG = 128
O_ACCMODE = 3

# These system calls have one number on all machines.
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_RIGHTS = (13, 14, 15, 15, 16)  # how many rights over files the ABIs 1, 2, 3, 4, 5+ have
LANDLOCK_NET_TCP = 3  # bind and connect
LANDLOCK_SCOPES = 3  # abstract sockets and signals
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_FIFO = 1 << 10
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
SCRATCH_RIGHTS = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | REFER
SCRATCH_RIGHTS |= REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM

# ---- system calls: what is allowed, by name. Everything else is answered with EPERM.

SECCOMP_RET_KILL_PROCESS = 0x80000000
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x50000
# What libraries call without need is answered as if it were done (error 0) or not there.
ANSWERS = {
    SECCOMP_RET_ALLOW: """
    read write readv writev pread64 pwrite64 lseek close dup dup2 dup3 pipe pipe2 eventfd2 sendfile
    copy_file_range ftruncate fsync fdatasync stat fstat lstat newfstatat statx access faccessat
    faccessat2 getdents getdents64 getcwd chdir fchdir umask
    creat rename renameat renameat2 mkdir mkdirat rmdir unlink unlinkat symlink symlinkat
    poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait
    mmap munmap mremap mprotect msync madvise brk
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack restart_syscall pause alarm
    getitimer setitimer nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times
    exit exit_group sched_yield sched_getaffinity getcpu set_tid_address set_robust_list
    get_robust_list rseq gettid getpid getppid getuid geteuid getgid getegid getgroups getresuid
    getresgid getrlimit getrusage sysinfo uname getrandom""",
    SECCOMP_RET_ERRNO: "flock chmod fchmod fchmodat fchmodat2 utime utimes futimesat utimensat",
    SECCOMP_RET_ERRNO | errno.ENOTTY: "ioctl",
    SECCOMP_RET_ERRNO | errno.ENOSYS: "clone3",
    SECCOMP_RET_ERRNO
    | errno.EINVAL: "readlink readlinkat",  # "is no link": links in /proc tell the names of videos
    SECCOMP_RET_ERRNO
    | errno.EOPNOTSUPP: """fallocate setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr
        listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr""",
}
# Calls that are allowed by one of their arguments: which one, the bits that count, the values that
# are allowed, the values that are answered as if it were done, and the error for all others.
THREAD = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD
OPENED = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC]
DESCRIPTOR_FLAGS = [fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL]
DUPLICATE = [fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC]
LOCKS = [fcntl.F_SETLK, fcntl.F_SETLKW]
CHECKED = {
    # Threads only. Whoever had descriptors of his own would hide them from the watch.
    "clone": (0, THREAD | CLONE_NAMESPACES, [THREAD], [], errno.EPERM),
    # No file is emptied that is not opened for writing; Landlock sees that only since ABI 3.
    "open": (1, O_ACCMODE | os.O_TRUNC, OPENED, [], errno.EACCES),
    "openat": (2, O_ACCMODE | os.O_TRUNC, OPENED, [], errno.EACCES),
    # Locks on files that all sandboxes read would be a channel between them.
    "fcntl": (1, 0xFFFFFFFF, DESCRIPTOR_FLAGS + DUPLICATE, LOCKS, errno.EPERM),
    # So would futexes on shared pages. EAGAIN lets pthread_join try again until the thread ended.
    "futex": (1, FUTEX_PRIVATE_FLAG, [FUTEX_PRIVATE_FLAG], [], errno.EAGAIN),
}

# The numbers of the calls above, by machine. What a machine lacks has a newer form that it has.
NUMBERS = {
    "x86_64": """
        read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10
        munmap 11 brk 12 rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17
        pwrite64 18 readv 19 writev 20 access 21 pipe 22 select 23 sched_yield 24 mremap 25 msync 26
        madvise 28 dup 32 dup2 33 pause 34 nanosleep 35 getitimer 36 alarm 37 setitimer 38 getpid 39
        sendfile 40 clone 56 exit 60 uname 63 fcntl 72 flock 73 fsync 74 fdatasync 75 ftruncate 77
        getdents 78 getcwd 79 chdir 80 fchdir 81 rename 82 mkdir 83 rmdir 84 creat 85 unlink 87
        symlink 88 readlink 89 chmod 90 fchmod 91 umask 95 gettimeofday 96 getrlimit 97 getrusage 98
        sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110 getgroups 115
        getresuid 118 getresgid 120 rt_sigtimedwait 128 sigaltstack 131 utime 132 gettid 186
        setxattr 188 lsetxattr 189 fsetxattr 190 getxattr 191 lgetxattr 192 fgetxattr 193
        listxattr 194 llistxattr 195 flistxattr 196 removexattr 197 lremovexattr 198
        fremovexattr 199 time 201 futex 202 sched_getaffinity 204 getdents64 217 set_tid_address 218
        restart_syscall 219 clock_gettime 228 clock_getres 229 clock_nanosleep 230 exit_group 231
        epoll_wait 232 epoll_ctl 233 utimes 235 openat 257 mkdirat 258 futimesat 261 newfstatat 262
        unlinkat 263 renameat 264 symlinkat 266 readlinkat 267 fchmodat 268 faccessat 269
        pselect6 270 ppoll 271 set_robust_list 273 get_robust_list 274 utimensat 280 epoll_pwait 281
        fallocate 285 eventfd2 290 epoll_create1 291 dup3 292 pipe2 293 getcpu 309 renameat2 316
        getrandom 318 copy_file_range 326 statx 332 rseq 334 clone3 435 faccessat2 439 fchmodat2 452
    """,
    "aarch64": """
        setxattr 5 lsetxattr 6 fsetxattr 7 getxattr 8 lgetxattr 9 fgetxattr 10 listxattr 11
        llistxattr 12 flistxattr 13 removexattr 14 lremovexattr 15 fremovexattr 16 getcwd 17
        eventfd2 19 epoll_create1 20 epoll_ctl 21 epoll_pwait 22 dup 23 dup3 24 fcntl 25 ioctl 29
        flock 32 mkdirat 34 unlinkat 35 symlinkat 36 renameat 38 ftruncate 46 fallocate 47
        faccessat 48 chdir 49 fchdir 50 fchmod 52 fchmodat 53 openat 56 close 57 pipe2 59
        getdents64 61 lseek 62 read 63 write 64 readv 65 writev 66 pread64 67 pwrite64 68
        sendfile 71 pselect6 72 ppoll 73 readlinkat 78 newfstatat 79 fstat 80 fsync 82 fdatasync 83
        utimensat 88 exit 93 exit_group 94 set_tid_address 96 futex 98 set_robust_list 99
        get_robust_list 100 nanosleep 101 getitimer 102 setitimer 103 clock_gettime 113
        clock_getres 114 clock_nanosleep 115 sched_getaffinity 123 sched_yield 124
        restart_syscall 128 sigaltstack 132 rt_sigaction 134 rt_sigprocmask 135 rt_sigtimedwait 137
        rt_sigreturn 139 getresuid 148 getresgid 150 times 153 getgroups 158 uname 160 getrlimit 163
        getrusage 165 umask 166 getcpu 168 gettimeofday 169 getpid 172 getppid 173 getuid 174
        geteuid 175 getgid 176 getegid 177 gettid 178 sysinfo 179 brk 214 munmap 215 mremap 216
        clone 220 mmap 222 mprotect 226 msync 227 madvise 233 renameat2 276 getrandom 278
        copy_file_range 285 statx 291 rseq 293 clone3 435 faccessat2 439 fchmodat2 452
    """,
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # seccomp's names of the machines

# ---- the packet filter that seccomp runs: instructions, and where it finds the call

BPF_LOAD = 0x20
BPF_AND = 0x54
BPF_JUMP_IF_EQUAL = 0x15
BPF_RETURN = 0x06
SECCOMP_DATA_NUMBER = 0
SECCOMP_DATA_ARCH = 4
SECCOMP_DATA_ARGUMENTS = 16  # 8 bytes each, the low half first

libc = ctypes.CDLL(None, use_errno=True)


def _libc(name, *arguments):
    """Call a C function; its value, or OSError."""
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    value = libc[name](*values)
    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return value


def _instruction(code, value, if_true=0, if_false=0):
    return struct.pack("HBBI", code, if_true, if_false, value)


def _errno(number):
    return _instruction(BPF_RETURN, SECCOMP_RET_ERRNO | number)


def _argument(number, mask, allowed, done, error):
    """The instructions for a call that is allowed by one of its arguments (CHECKED)."""
    place = SECCOMP_DATA_ARGUMENTS + 8 * number
    steps = [_instruction(BPF_LOAD, place), _instruction(BPF_AND, mask)]
    answers = dict.fromkeys(allowed, _instruction(BPF_RETURN, SECCOMP_RET_ALLOW))
    answers.update(dict.fromkeys(done, _errno(0)))
    for value, answer in answers.items():
        steps += [_instruction(BPF_JUMP_IF_EQUAL, value, 0, 1), answer]
    return [*steps, _errno(error)]


def system_calls(machine: str) -> dict[str, int]:
    """The number of each system call that this file names. KeyError: an unknown machine."""
    words = NUMBERS[machine].split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


@functools.cache
def _filter():
    """The kernel's structure of a filter, and the instructions that it points to.

    Made once, before children are forked.
    """
    machine = platform.machine()
    numbers = system_calls(machine)
    answers = {}
    for answer, names in ANSWERS.items():
        for name in names.split():
            answers[name] = [_instruction(BPF_RETURN, answer)]
    for name, check in CHECKED.items():
        answers[name] = _argument(*check)
    program = [
        _instruction(BPF_LOAD, SECCOMP_DATA_ARCH),
        _instruction(BPF_JUMP_IF_EQUAL, AUDIT_ARCH[machine], 1, 0),
        _instruction(BPF_RETURN, SECCOMP_RET_KILL_PROCESS),
        _instruction(BPF_LOAD, SECCOMP_DATA_NUMBER),
    ]
    for name, steps in answers.items():
        if name in numbers:
            program.append(_instruction(BPF_JUMP_IF_EQUAL, numbers[name], 0, len(steps)))
            program += steps
    program.append(_errno(errno.EPERM))
    code = ctypes.create_string_buffer(b"".join(program))
    return struct.pack("HP", len(program), ctypes.addressof(code)), code


# ---- the forking process


def too_few_descriptors() -> str:
    """What to say where descriptors are short (an errno of FEW)."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    why = f"this process may open only {most} files (ulimit -n), and each sandbox takes two"
    return f"{why}: raise the limit, or use fewer sandboxes at once"


class Room:
    """Where the children of this forking process live."""

    def __init__(self, reads: list[str]):
        self.reads = reads  # paths that code may read
        self.spaces = os.getpid() == 1  # whether there are namespaces
        if self.spaces:
            under_tmp = any(path.startswith("/tmp/") for path in reads)
            self.root = "/scratch" if under_tmp else "/tmp"
        else:
            self.root = _scratch_root()

    def enter(self):
        """Leave the root of the machine, if there are namespaces."""
        if self.spaces:
            _pivot(self.reads, self.root)

    def scratch(self, pid: int) -> str:
        """The scratch folder of a child. With namespaces each mounts its own at the same place."""
        return self.root if self.spaces else f"{self.root}/{pid}"


class Nursery:
    """The children of one kind (with or without videos) that wait for the trainer to take them."""

    def __init__(self, descriptor: str, room: Room, with_videos: bool):
        self.control = socket.socket(fileno=int(descriptor))
        self.room = room
        self.with_videos = with_videos
        self.wanted = 0  # children that should wait
        self.waiting = deque()  # (message, descriptors) of children that do

    def listen(self) -> bool:
        """Answer the trainer's requests, a byte each. False: it is gone.

        TAKE: hand over one child, now. Any other number: so many should wait. The trainer asks for
        one ahead, so that it need not wait for us, and no more: the kernel counts descriptors that
        are under way per user.
        """
        requests = self.control.recv(4096)
        for request in requests:
            if request == TAKE:
                self._hand_over()
                self.wanted = max(self.wanted - 1, WAITING)
            else:
                self.wanted = max(self.wanted, request)
        return bool(requests)

    def prepare(self) -> bool:
        """Make one child if more should wait; whether there is one more."""
        if len(self.waiting) >= self.wanted:
            return False
        try:
            self.waiting.append(self._fork())
            return True
        except OSError:  # no descriptor, no process, no memory: whoever takes one is told
            self.wanted = 0
            return False

    def _hand_over(self):
        """Send one child to the trainer, or the reason why there is none."""
        descriptors = []
        try:
            message, descriptors = self.waiting.popleft() if self.waiting else self._fork()
            socket.send_fds(self.control, [message.encode()], descriptors)
        except OSError as error:
            reason = f"{type(error).__name__}: {error}"
            if error.errno in FEW:
                reason = too_few_descriptors()
            self.control.send(json.dumps(reason).encode())
        for descriptor in descriptors:
            os.close(descriptor)

    def _fork(self):
        """Make a child: what the trainer is told of it, its descriptors (channel and process)."""
        theirs, ours = socket.socketpair()
        with theirs, ours:
            pid = os.fork()
            if pid == 0:
                _child(ours.fileno(), self.room, self.with_videos)
            descriptors = [theirs.fileno()]
            try:
                if hasattr(os, "pidfd_open"):
                    descriptors.append(os.pidfd_open(pid))
            except OSError:
                os.kill(pid, signal.SIGKILL)
                raise
            theirs.detach()
        scratch = None if self.room.spaces else self.room.scratch(pid)
        return json.dumps([pid, scratch, len(descriptors)]), descriptors


def serve(control: str, videos: str, trainer: str, packages: str, *reads: str):
    """Be the forking process until the trainer is gone.

    control, videos: sockets to the trainer for children without and with videos
    trainer: a descriptor that becomes readable when it ends
    packages: folders of packages, joined by ":"
    reads: paths that code may read
    """
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.path += [path for path in packages.split(":") if path not in sys.path]
    room = Room(list(reads))
    _import()
    room.enter()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    with suppress(KeyError):
        _filter()
    gc.collect()
    gc.freeze()  # collections in children do not touch shared pages
    os.dup2(null, 2)  # until here errors went to the trainer
    _work(control, videos, int(trainer), room)


def _work(control, videos, trainer, room):
    """Answer requests and watch the children."""
    nurseries = [Nursery(control, room, False), Nursery(videos, room, True)]
    poller = select.poll()
    for source in (trainer, *(nursery.control for nursery in nurseries)):
        poller.register(source, select.POLLIN)
    watched = 0.0
    while True:
        made = [nursery.prepare() for nursery in nurseries]
        timeout = None if room.spaces else 1000 * WATCH_SECONDS
        events = dict(poller.poll(0 if any(made) else timeout))
        if trainer in events:
            return
        now = time.monotonic()
        if not room.spaces and now - watched >= WATCH_SECONDS:
            watched = now
            _watch_all(room.root)
        for nursery in nurseries:
            if nursery.control.fileno() in events and not nursery.listen():
                return


def _import():
    """Load what code uses, once for all children."""
    import numpy.fft  # noqa: F401
    import numpy.random  # noqa: F401
    import PIL.ImageDraw  # noqa: F401
    import PIL.ImageEnhance  # noqa: F401
    import PIL.ImageFilter  # noqa: F401
    import PIL.ImageOps  # noqa: F401
    from matplotlib import get_cachedir, pyplot

    if "/matplotlib-" in get_cachedir():  # made where the home is closed
        subprocess.run(["rm", "-rf", get_cachedir()])
    with suppress(ImportError):
        import cv2  # before decord: after it, cv2 reads no PNG

        cv2.setNumThreads(1)
    with suppress(ImportError):
        import decord  # noqa: F401
    Image.preinit()
    pyplot.title("loads fonts and canvas for all").figure.canvas.draw()
    pyplot.close("all")


def _pivot(reads, scratch):
    """Make a read-only root of `reads`, /proc and a place for `scratch`, and change into it."""
    new = "/sys"  # no Python lives there
    _libc("mount", b"tmpfs", new.encode(), b"tmpfs", 0, b"mode=755")
    for name in (scratch, "/proc"):
        os.mkdir(new + name)
    for name in reads:
        folder = name if os.path.isdir(name) else os.path.dirname(name)
        os.makedirs(new + folder, exist_ok=True)
        if not os.path.exists(new + name):
            os.mknod(new + name)
        _bind_mount(name, new + name)
    with suppress(OSError):  # an old kernel: Landlock and the ids are left
        attributes = struct.pack("4Q", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
        arguments = (AT_FDCWD, new.encode(), AT_RECURSIVE, attributes, len(attributes))
        _libc("syscall", MOUNT_SETATTR, *arguments)
    _bind_mount("/proc", f"{new}/proc")
    os.chdir(new)
    _libc("pivot_root", b".", b".")
    _libc("umount2", b".", MNT_DETACH)  # the old root is gone


def _bind_mount(source, target):
    _libc("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)


def _scratch_root():
    """A folder for scratch folders that somebody removes, whatever ends this process.

    It is locked while this process lives, from the moment that it has its name.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most == 0:
        raise OSError("no file may be written (ulimit -f 0): raise the limit")
    _sweep()
    made = tempfile.mkdtemp(prefix="new-sandbox-")
    fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_EX)
    folder, name = os.path.split(os.path.realpath(made))
    root = os.path.join(folder, name.removeprefix("new-"))
    os.rename(made, root)
    # This shell outlives us, should we be killed.
    subprocess.Popen(["sh", "-c", f"read _; {REMOVE}", root], stdin=subprocess.PIPE)
    return root


def _sweep():
    """Remove the folders of forking processes that were killed together with their shells."""
    for path in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), "sandbox-*")):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while one lives
                    subprocess.Popen(["sh", "-c", REMOVE, path])
            finally:
                os.close(descriptor)


# ---- the watch: without namespaces no limit of the kernel bounds a child's threads and folder


def _watch_all(root):
    """End the children that take too much. Whatever goes wrong with one ends that one only."""
    for name in os.listdir(root):
        if not name.isdigit():
            continue
        pid = int(name)
        try:
            over = _is_over(pid, f"{root}/{name}")
        except (FileNotFoundError, ProcessLookupError):  # it ended
            continue
        except Exception:  # a path too long, or closed to us: something is hidden
            over = True
        if over:
            _kill_own(pid)


def _kill_own(pid):
    """Kill a child of ours; a later process of that number is left alone."""
    with suppress(OSError, ValueError, IndexError):
        if int(_process_state(pid)[1]) == os.getpid():
            os.kill(pid, signal.SIGKILL)


def _process_state(pid):
    """The fields of /proc/PID/stat from the state on: state, parent, …; 17: threads."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def _is_over(pid, scratch):
    """Whether a child has too many threads or files, or takes too much room on the disk."""
    state = _process_state(pid)
    if int(state[17]) > THREADS:
        return True
    paths = [scratch.encode()]
    size = 0
    for path in islice(paths, FILES + 1):  # the list grows on the way
        with suppress(FileNotFoundError):
            info = os.lstat(path)
            size += info.st_size
            if stat.S_ISDIR(info.st_mode):
                paths += [os.path.join(path, name) for name in os.listdir(path)]
    for descriptor in os.listdir(f"/proc/{pid}/fd"):  # deleted files take room while they are open
        with suppress(FileNotFoundError):
            info = os.stat(f"/proc/{pid}/fd/{descriptor}")
            if info.st_nlink == 0:
                size += info.st_size
    if size > SCRATCH or len(paths) > FILES + 1:
        return True
    once_a_second = (time.monotonic() + pid * WATCH_SECONDS) % 1 < WATCH_SECONDS
    return state[0] != b"T" and once_a_second and _hides_files(pid, scratch)


def _hides_files(pid, scratch):
    """Whether deleted files of the scratch folder are mapped, or too many mappings to tell."""
    with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
        maps = b""
        while len(maps) < MAPS_READ:
            part = file.read(1 << 16)
            maps += part
            if not part:
                deleted = re.escape(scratch.encode()) + rb"/.* \(deleted\)$"
                return bool(re.search(deleted, maps, re.MULTILINE))
    return True


# ---- the child: it encloses itself and runs code


def _child(channel, room, with_videos):
    """Be a sandbox. Never returns."""
    session = None
    try:
        _take_streams(channel)
        inside = Inside(room)
        session = Session(3)
        videos = []
        if with_videos:
            connection = socket.socket(fileno=3)
            count, videos, _, _ = socket.recv_fds(connection, 250, 250)
            if len(videos) < len(count):
                raise OSError(f"more than {DESCRIPTORS} descriptors")
        missing = inside.enclose(videos)
        session.serve(missing, videos)
    except EOFError:  # the trainer let go
        pass
    except BaseException as error:
        with suppress(BaseException):
            reason = json.dumps(f"{type(error).__name__}: {error}").encode()
            session = session or Session(3)
            session.send(reason)
    finally:
        os._exit(1)


def _take_streams(channel):
    """Keep the channel as descriptor 3, a /dev/null of one's own as 0, 1, 2, and nothing else."""
    os.dup2(channel, 3)
    os.closerange(4, 1 << 20)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.close(null)


class Inside:
    """The way of a child into its confinement: first what can go before the inputs are known."""

    def __init__(self, room: Room):
        self.room = room
        self.scratch = room.scratch(os.getpid())
        self.linux = sys.platform == "linux"
        self.uid = 2**30 + random.getrandbits(29)  # nobody else's
        self.memory = None
        if not room.spaces:
            os.mkdir(self.scratch)
        if self.linux:
            self._prepare()
        os.chdir(self.scratch)
        os.environ.update(HOME=self.scratch, TMPDIR=self.scratch)
        tempfile.tempdir = None
        sys.argv = [""]

    def _prepare(self):
        """Shared mounts go; be the first to die when memory is short."""
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        self.memory = pages * resource.getpagesize() + MEMORY
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        if not self.room.spaces:
            return
        owner = b""
        try:
            os.setresuid(self.uid, -1, -1)
            owner = b",uid=%d,gid=%d" % (self.uid, self.uid)
        except OSError:  # not root: the user namespace is enough
            self.uid = None
        options = b"size=%d,nr_inodes=%d,mode=700%s" % (SCRATCH, FILES, owner)
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
        _libc("unshare", CLONE_NEWNS)
        _libc("mount", b"tmpfs", self.scratch.encode(), b"tmpfs", flags, options)

    def enclose(self, videos: list[int]) -> list[str]:
        """Give up everything else; the layers that this kernel does not have, with the reasons."""
        missing = []
        if self.linux:
            self._give_up(videos)
        for name, layer in (("landlock", self._landlock), ("seccomp", self._seccomp)):
            try:
                layer(videos)
            except (OSError, KeyError, AttributeError) as error:
                if getattr(error, "errno", None) in FEW:
                    raise OSError(too_few_descriptors()) from error
                missing.append(f"{name} ({error})")
        return missing

    def _give_up(self, videos):
        """Ids, room for bombs, capabilities, and a life without the parent."""
        limits = {
            resource.RLIMIT_AS: self.memory,
            resource.RLIMIT_FSIZE: SCRATCH,
            resource.RLIMIT_NOFILE: DESCRIPTORS,
            resource.RLIMIT_CORE: 1,  # 0 would feed a core_pattern that is a pipe
        }
        if self.room.spaces:
            if self.uid is not None:
                self._drop_ids(videos)
            with suppress(OSError):
                _libc("unshare", CLONE_NEWUSER)
            limits[resource.RLIMIT_NPROC] = THREADS  # counted by real uid and user namespace
        else:
            soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
            if soft != resource.RLIM_INFINITY:  # the user's: leave some to the trainer
                limits[resource.RLIMIT_NPROC] = soft * 3 // 4
        for name, value in limits.items():
            with suppress(ValueError):  # the limit that we have is lower
                resource.setrlimit(name, (value, value))
        _libc("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))
        _libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)

    def _drop_ids(self, videos):
        """Become nobody, if what must be read can still be read; else only the real uid goes."""
        with suppress(OSError):
            os.setgroups([])
        os.setresgid(self.uid, self.uid, 0)
        os.setresuid(self.uid, self.uid, 0)
        _libc("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root
        files = [f"/proc/self/fd/{descriptor}" for descriptor in videos]
        for module in (os, sys.modules["numpy"], sys.modules["matplotlib"]):
            files.append(module.__file__)
        try:
            for path in files:
                os.close(os.open(path, os.O_RDONLY))
        except OSError:
            os.setresuid(self.uid, 0, 0)
            os.setresgid(self.uid, 0, 0)
            os.chown(self.scratch, 0, 0)
        else:
            os.setresgid(-1, -1, self.uid)
            os.setresuid(-1, -1, self.uid)
        _libc("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)

    def _landlock(self, videos):
        """Files: read `reads` and the videos, write in the scratch folder, and nothing else."""
        create = ("syscall", LANDLOCK_CREATE_RULESET)
        abi = _libc(*create, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
        every = (1 << LANDLOCK_RIGHTS[min(abi, 5) - 1]) - 1  # all rights that this kernel knows
        size = 8 if abi < 4 else 16 if abi < 6 else 24
        handled = struct.pack("QQQ", every, LANDLOCK_NET_TCP, LANDLOCK_SCOPES)[:size]
        ruleset = _libc(*create, handled, size, 0)
        rights = {"/dev/null": READ_FILE | WRITE_FILE, self.scratch: SCRATCH_RIGHTS}
        for path in self.room.reads:
            folder = os.path.isdir(path)
            rights.setdefault(path, READ_FILE | READ_DIR if folder else READ_FILE)
        opened = {os.open(path, os.O_PATH): right for path, right in rights.items()}
        for descriptor, right in {**opened, **dict.fromkeys(videos, READ_FILE)}.items():
            rule = struct.pack("=Qi", right & every, descriptor)
            add = ("syscall", LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH)
            _libc(*add, rule, 0)
        _libc("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
        for descriptor in (ruleset, *opened):
            os.close(descriptor)

    def _seccomp(self, _):
        """System calls: those of the lists, and no others."""
        structure, _ = _filter()
        _libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, structure, 0, 0)
