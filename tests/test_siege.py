"""The second siege of the sandbox: attacks that once worked, each judged by its effect.

As in test_sandbox.py, the last test runs them again as another user and without namespaces.
"""

import errno
import json
import os
import platform
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from test_sandbox import (  # noqa: F401
    FORGE,
    MOUNT,
    REFUSE,
    ROOT,
    UNSHARE,
    VIDEO,
    attack,
    box,
    elsewhere,
    eventually,
    family,
    fresh,
    host_pid,
    needs_video,
    processes,
    scratch_folders,
)

import sandbox
from data import Sample
from engine import confine, figures, session
from model import tiny_policy
from rollout import EndReason, Recital, rollout
from sandbox import Result, SandboxError, check_reply

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the confinement is Linux's")
LIMIT = 1000  # characters of output in the fuzz test
FRAMES = [300, 7]  # frames of its two videos


# ---- what ends the run, or lies


def keeps_contract(result: Result) -> bool:
    """Whether everything in a Result is what its users rely on."""
    texts = [result.text] if result.error is None else [result.text, result.error]
    for text in texts:
        assert type(text) is str and len(text) <= LIMIT + sandbox.MARK
        for character in text:
            assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
    assert result.error is None or result.error
    assert len(result.frames) <= session.MAX_FRAMES
    for video, frame in result.frames:
        assert type(video) is int and type(frame) is int
        assert 0 <= video < len(FRAMES) and 0 <= frame < FRAMES[video]
    assert len(result.images) <= figures.MAX_FIGURES
    for image in result.images:
        width, height = image.size
        assert image.mode == "RGB" and len(image.tobytes()) == 3 * width * height
        assert 0 < width * height <= figures.MAX_PIXELS
        assert max(image.size) < figures.MAX_ASPECT * min(image.size)
    pixels = sum(image.width * image.height for image in result.images)
    assert pixels <= figures.MAX_CALL_PIXELS
    return True


def count_frames(video):
    return FRAMES[video] if video in range(len(FRAMES)) else 0


def pack(values, pixels=b""):
    text = json.dumps(values).encode()
    return struct.pack("<I", len(text)) + text + pixels


def strange_value(dice, depth=0):
    """A value that JSON can hold, and that somebody may not expect."""
    simple = [
        None,
        True,
        False,
        0,
        1,
        -1,
        1.5,
        2.0,
        1e300,
        float("nan"),
        float("inf"),
        2**31,
        2**63,
        -(2**63),
        10**400,
        "",
        "text",
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\x9b31m",
        "a\ud800b",
        "\0",
        "\r\b\x7f",
        "x" * 5000,
        "\u202e\N{GRINNING FACE}",
    ]
    kind = dice.randrange(4 if depth < 3 else 2)
    if kind == 2:
        return [strange_value(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind == 3:
        return {str(k): strange_value(dice, depth + 1) for k in range(dice.randrange(3))}
    return dice.choice(simple)


def structured_reply(dice):
    """A reply of the right shape in which some parts are not what they should be."""
    sizes = []
    for _ in range(dice.choice((0, 0, 1, 2, 33))):
        sides = (0, 1, 2, 7, 199, 200, 1414, 1415, 2000, 100_000, -3, True, 2.0, "3", None)
        weights = (1, 9, 9, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
        sizes.append(dice.choices(sides, weights, k=dice.choice((2, 2, 2, 2, 2, 2, 3))))
    frames = []
    for _ in range(dice.choice((0, 0, 1, 3, 5000))):
        frames.append([dice.choice((0, 0, 1, 2, -1)), dice.choice((0, 6, 7, 299, 300, -1))])
    values = {
        "text": dice.choice(("text", "a\ud800b\x1b[2J", "\x1b]8;;x\x07y", "z" * 3000)),
        "error": dice.choice((None, None, None, "Error", "", "\x1b")),
        "frames": frames,
        "sizes": sizes,
    }
    for name in list(values):
        if dice.random() < 0.1:
            values[name] = strange_value(dice)
        if dice.random() < 0.02:
            del values[name]
    if dice.random() < 0.02:
        values["other"] = strange_value(dice)
    if dice.random() < 0.02:
        values = strange_value(dice)
    pixels = 0
    for size in sizes:
        if [type(side) for side in size] == [int, int] and 0 < size[0] * size[1] < 10**7:
            pixels += size[0] * size[1]
    length = 3 * pixels + dice.choice((0, 0, 0, 0, 0, 0, 1, -1))
    return pack(values, bytes(max(0, length)))


def test_two_thousand_structured_replies_keep_the_contract():
    dice = random.Random(15)
    passed = []
    for _ in range(2000):
        try:
            result = check_reply(structured_reply(dice), LIMIT, count_frames)
        except (ValueError, RecursionError):
            continue
        assert keeps_contract(result)
        passed.append(result)
    assert len(passed) > 200  # neither all nor nothing is let through
    assert any(result.images for result in passed)
    assert any(result.frames for result in passed)
    assert any(result.error for result in passed)


@pytest.mark.parametrize(
    "reply",
    [b"", b"\0", b"\0\0\0\0", b"\xff\xff\xff\xff{}", struct.pack("<I", 10**5) + b"[" * 10**5],
)
def test_replies_without_shape_are_refused(reply):
    with pytest.raises((ValueError, RecursionError)):
        check_reply(reply, LIMIT, count_frames)


def test_what_is_honest_is_let_through():
    values = {"text": "é\t\n", "error": None, "frames": [[0, 299], [0, 300]], "sizes": [[2, 1]]}
    result = check_reply(pack(values, b"abcdef"), LIMIT, count_frames)
    assert (result.text, result.error, result.frames) == ("é\t\n", None, [(0, 299)])
    assert result.images[0].tobytes() == b"abcdef"


@pytest.mark.parametrize(
    "code",
    [
        # Limits of the child that the code patches away.
        "figures = session.figures\nshow = type(figures).show\n"
        "show.__globals__.update(MAX_ASPECT=10 ** 9, MAX_PIXELS=10 ** 9, MAX_FIGURES=10 ** 9)\n"
        "Image.new('RGB', (100_000, 1)).show()",
        "type(session.figures)._size = lambda self, width, height: (width, height)\n"
        "Image.new('RGB', (3000, 3000)).show()",
        "for _ in range(99):\n    session.figures.sizes.append((1, 1))\n"
        "    session.figures.pixels.append(bytes(3))",
        "session.frames = 'x'",
        "session.frames = {}",
        "session.frames.append((0, 1.5))",
        "session.figures.sizes = [(2, True)]\nsession.figures.pixels = [bytes(6)]",
    ],
)
def test_patched_sessions_do_not_reach_the_trainer(box, code):  # noqa: F811
    box.run("1")
    result = box.run(FORGE + code)
    assert result.error and result.images == [] and result.frames == []
    assert box.run("print(1)").text.endswith("1\n")


@needs_video
def test_frames_lie_inside_the_video(fresh):  # noqa: F811
    box = fresh(videos=[VIDEO])  # noqa: F811
    frames = [(0, 5), (0, 299), (0, 300), (0, -1), (1, 0), (-1, 0), (10**30, 1), (0, 10**30)]
    result = box.run(FORGE + f"session.frames.extend({frames})")
    assert result.error is None and result.frames == [(0, 5), (0, 299)]


def test_text_has_no_control_sequences(box):  # noqa: F811
    parts = ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\x1bc", "\b\b", "\x7f", "\0"]
    result = box.run(f"print({''.join(parts)!r}); raise ValueError({'a' + parts[0]!r})")
    assert "red" in result.text and "ared" in result.error
    for text in (result.text, result.error):
        assert all(c in "\n\t" or unicodedata.category(c) != "Cc" for c in text)
    assert box.run("print('10 %\\r20 %')").text == "10 %\n20 %\n"


def test_pixels_of_a_call_are_bounded_and_every_figure_is_shown(box):  # noqa: F811
    code = "for _ in range(32):\n    Image.new('RGB', (2100, 1400), 'red').show()"
    result = box.run(code)
    assert result.error is None and len(result.images) == 32
    areas = [image.width * image.height for image in result.images]
    assert sum(areas) <= figures.MAX_CALL_PIXELS and max(areas) <= figures.MAX_PIXELS
    assert min(areas) > 0.9 * figures.KEPT_PIXELS
    for image in result.images:
        assert abs(image.width / image.height - 1.5) < 0.01
    thin = "for _ in range(32):\n    Image.new('RGB', (19_900, 100), 'red').show()"
    result = box.run(thin)
    assert result.error is None and len(result.images) == 32


def test_what_a_trajectory_holds_is_bounded(tmp_path):
    """The largest figures that pass: a batch's memory is a number that is known beforehand."""
    show = "for _ in range(8):\n    Image.new('RGB', (1414, 1414), 'red').show()"
    turns = [f"<code>\n```python\n{show}\n```\n</code>"] * 6
    policy = Recital(tiny_policy(tmp_path / "tiny", turns * 20))
    asked = Sample("q", "?", "red", turns=turns)
    ((t,),) = rollout(policy, [asked], 1, max_turns=4, max_context=10**7)
    assert t.end_reason is EndReason.EXCEED_MAX_TURNS and t.n_tool_calls == 3
    pixels = [image.width * image.height for image in t.images]
    assert len(pixels) == 24
    assert figures.MAX_PIXELS / 2 < max(pixels) <= figures.MAX_PIXELS  # it may be trained on
    ((t,),) = rollout(policy, [asked], 1, max_turns=7, max_context=10**7)
    assert t.end_reason is EndReason.EXCEED_MAX_IMAGES and t.n_tool_calls == 5
    assert len(t.images) == 32  # those of the last call are let go
    cut = [t]
    ((t,),) = rollout(policy, [asked], 1, max_turns=7, max_context=len(t.tokens) - 9)
    assert t.end_reason is EndReason.OVER_LENGTH and len(t.turns[-1].images) == 8
    cut.append(t)
    for t in cut:  # nobody trains on these: what the page shows is left
        shown = t.images + [image for turn in t.turns for image in turn.images]
        assert max(max(image.size) for image in shown) <= 256


# ---- what ends the neighbours


@pytest.mark.parametrize(
    "code",
    [
        # A name that is no UTF-8, mapped and removed.
        "import mmap, os, time\nname = b'\\xff\\xfe'\n"
        "file = os.open(name, os.O_RDWR | os.O_CREAT)\n"
        "os.ftruncate(file, 4096)\nkept = mmap.mmap(file, 4096)\nos.remove(name)\ntime.sleep(2)",
        "import os\nos.mkdir(b'\\xff')\nfor k in range(99): open(b'\\xff/\\xfe%d' % k, 'w')",
        # Tens of thousands of mappings.
        "import mmap, os, time\nname = 'n' * 200\nfile = os.open(name, os.O_RDWR | os.O_CREAT)\n"
        "os.ftruncate(file, 4096)\nkept = []\ntry:\n    while len(kept) < 60_000:\n"
        "        kept.append(mmap.mmap(file, 4096, mmap.MAP_PRIVATE, prot=1 + len(kept) % 2 * 2))\n"
        "except OSError: pass\ntime.sleep(2)",
        "import os\nos.abort()",
    ],
)
def test_no_accident_with_one_child_ends_the_others(fresh, code):  # noqa: F811
    other = fresh()
    other.run("kept = 1")
    server = sandbox._pool.server.pid
    box = fresh(timeout=4)  # noqa: F811
    box.run(code)
    assert other.run("print(kept)").text == "1\n"
    start = time.monotonic()
    assert fresh().run("print(2)").text == "2\n" and time.monotonic() - start < 5
    assert sandbox._pool.server.pid == server and sandbox._pool.server.poll() is None


def test_what_goes_wrong_in_the_watch_costs_that_child_only(tmp_path, monkeypatch):
    """The watch meets every error that a file system has; only the child in question is ended."""
    for name in ("11", "12", "13", "14", "not a child", "15"):
        (tmp_path / name).mkdir()
    problems = {
        11: ProcessLookupError(),
        12: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no UTF-8"),
        13: OSError(errno.ENAMETOOLONG, "too long"),
        14: IndexError("a process that is half gone"),
    }
    looked_at = []
    killed = []

    def is_over(pid, scratch):
        looked_at.append(pid)
        if pid in problems:
            raise problems[pid]
        return False

    monkeypatch.setattr(confine, "_is_over", is_over)
    monkeypatch.setattr(confine, "_kill_own", killed.append)
    confine._watch_all(str(tmp_path))
    assert sorted(looked_at) == [11, 12, 13, 14, 15] and sorted(killed) == [12, 13, 14]


def test_the_watch_kills_children_of_its_own_only():
    with subprocess.Popen(["sleep", "60"]) as child:
        confine._kill_own(os.getppid())
        confine._kill_own(2**22 + 1)
        assert os.getppid() and child.poll() is None
        confine._kill_own(child.pid)
        assert child.wait(5) == -signal.SIGKILL


FEW = """
import resource, sys
import sandbox
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
boxes = []
try:
    while len(boxes) < 60:
        boxes.append(sandbox.Sandbox())
        boxes[-1].run(f"number = {len(boxes) - 1}")
except sandbox.SandboxError as error:
    print("refused" if "ulimit -n" in str(error) else error)
print(len(boxes))
for number in range(0, len(boxes), 2):
    boxes[number].close()
for number in range(1, len(boxes), 2):
    assert boxes[number].run("print(number)").text == f"{number}\\n"
print("others live")
"""


def python(code, *arguments, before=(), **options):
    """Start Python with code, from the checkout."""
    command = [*before, sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)


@pytest.mark.parametrize("most", [12, 20, 33, 34, 35, 36, 64])
def test_few_descriptors_are_named_and_hurt_nobody(most):
    with python(FEW, most) as trainer:
        output, _ = trainer.communicate(timeout=100)
    refused, count, alive = output.splitlines()[-3:]
    assert refused == "refused" and int(count) < most / 2 and alive == "others live"


MANY = """
import resource, sys, time
import sandbox
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sandbox.warm(100)
print("warm", flush=True)
sys.stdin.readline()
server = sandbox._pool.server.pid
for _ in range(3):
    boxes = [sandbox.Sandbox() for _ in range(30)]
    assert [box.run("print(1)").text for box in boxes] == ["1\\n"] * 30
    for box in boxes:
        box.close()
assert sandbox._pool.server.pid == server
print("fine")
"""


def test_many_warm_sandboxes_of_several_trainers_do_not_end_the_forking_processes():
    trainers = [python(MANY, stdin=subprocess.PIPE) for _ in range(2)]
    for trainer in trainers:
        assert trainer.stdout.readline() == "warm\n"
    time.sleep(3)
    for trainer in trainers:
        trainer.stdin.write("go\n")
        trainer.stdin.flush()
    for trainer in trainers:
        output, _ = trainer.communicate(timeout=100)
        assert output == "fine\n"


# ---- what leaves, shares or tells something


@needs_video
def test_no_file_that_code_may_read_can_be_emptied(tmp_path):
    """Also by a kernel whose Landlock does not see it: here, without Landlock at all."""
    video = tmp_path / "video.mp4"
    video.write_bytes(VIDEO.read_bytes())
    video.chmod(0o666)
    code = """
import sys, warnings
warnings.simplefilter("ignore")
import sandbox
box = sandbox.Sandbox(videos=[sys.argv[1]], unsafe=True)
box.run("len(video_clue_0)")
for flags in ("os.O_RDONLY | os.O_TRUNC", "3 | os.O_TRUNC", "3", "os.O_TRUNC | os.O_CREAT",
              "os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC"):
    for fd in range(3, 12):
        box.run(f"import os\\nos.open('/proc/self/fd/{fd}', {flags})")
        box.run(f"import os\\nos.open('{fd}', {flags}, dir_fd=os.open('/proc/self/fd', os.O_PATH))")
    box.run(f"os.truncate('/proc/self/fd/{fd}', 0)")
print(box.run("print(len(video_clue_0))").text)
"""
    refuse = [sys.executable, "-c", REFUSE, "{444: None}"]
    output, _ = python(code, video, before=refuse).communicate(timeout=100)
    assert output.split() == ["300"] and video.read_bytes() == VIDEO.read_bytes()


def test_files_that_are_opened_for_writing_are_emptied(box):  # noqa: F811
    code = "open('a', 'w').write('long'); open('a', 'w').write('b'); print(open('a').read())"
    assert box.run(code).text == "b\n"


def ids(pid):
    """Real, effective, saved and file system ids of a process: users, then groups."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"^[UG]id:\t(.*)$", status, re.M)
    return [int(number) for line in found for number in line.split()]


spaces_as_root = pytest.mark.skipif(
    os.getuid() != 0 or bool(subprocess.call(["unshare", "-mnip", "true"], stderr=-3)),
    reason="root with namespaces",
)


@spaces_as_root
@needs_video
def test_nothing_of_root_is_left(fresh):  # noqa: F811
    box, other = fresh(videos=[VIDEO]), fresh()  # noqa: F811
    assert box.run("print(len(video_clue_0))").text == "300\n"
    for one in (box, other):
        assert one.run("open('a', 'w').write('x'); import numpy.ma, wave").error is None
        found = ids(host_pid(one))
        assert 0 not in found and len(found) == 8 and len(set(found)) == 1
        groups = re.search(
            r"^Groups:(.*)$", Path(f"/proc/{host_pid(one)}/status").read_text(), re.M
        )
        assert groups[1].strip() == ""
    assert not set(ids(host_pid(box))) & set(ids(host_pid(other)))


@spaces_as_root
@needs_video
def test_a_video_of_roots_own_is_read_and_not_written(fresh, tmp_path):  # noqa: F811
    video = tmp_path / "video.mp4"
    video.write_bytes(VIDEO.read_bytes())
    video.chmod(0o600)
    box = fresh(videos=[video])  # noqa: F811
    assert box.run("print(len(video_clue_0)); open('a', 'w').write('x')").text == "300\n"
    status = Path(f"/proc/{host_pid(box)}/status").read_text()
    assert f"CapEff:\t{0:016x}" in status and f"CapPrm:\t{0:016x}" in status
    for flags in ("os.O_RDWR", "os.O_RDONLY | os.O_TRUNC", "os.O_WRONLY"):
        for fd in range(3, 9):
            box.run(f"import os\nos.open('/proc/self/fd/{fd}', {flags})")
    assert video.read_bytes() == VIDEO.read_bytes()


def test_threads_share_their_descriptors(box):  # noqa: F811
    """A thread with descriptors of its own would hide files from the watch."""
    number = confine.system_calls(platform.machine())["clone"]
    flags = {
        "no files": confine.THREAD & ~confine.CLONE_FILES,
        "no fs": confine.THREAD & ~confine.CLONE_FS,
        "no memory": confine.CLONE_THREAD,
        "process": 17,
        "vfork": 0x4111,
        "namespace": confine.THREAD | confine.CLONE_NEWUSER,
    }
    code = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    for name, value in flags.items():
        code += (
            f"print({name!r}, libc.syscall({number}, {value}, 0, 0, 0, 0), ctypes.get_errno())\n"
        )
    assert box.run(code).text == "".join(f"{name} -1 {errno.EPERM}\n" for name in flags)


@needs_video
def test_the_name_of_a_video_is_not_told(fresh, tmp_path):  # noqa: F811
    video = tmp_path / "golden-retriever.mp4"
    video.write_bytes(VIDEO.read_bytes())
    box = fresh(videos=[video])  # noqa: F811
    text = box.run("print(len(video_clue_0))").text
    assert text == "300\n"
    text = attack(
        box,
        """
        [os.readlink(f'/proc/self/fd/{fd}') for fd in range(3, 8)]
        [os.path.realpath(f'/proc/self/fd/{fd}') for fd in range(3, 8)]
        [pathlib.Path(f'/proc/self/fd/{fd}').resolve() for fd in range(3, 8)]
        [os.readlink(str(fd), dir_fd=os.open('/proc/self/fd', os.O_PATH)) for fd in range(3, 8)]
        [os.readlink(f'/proc/thread-self/fd/{fd}') for fd in range(3, 8)]
        [open(f'/proc/self/fdinfo/{fd}').read() for fd in range(3, 8)]
        open('/proc/self/maps').read()
        os.listdir('/proc/self/map_files')
        (b := ctypes.create_string_buffer(999), libc.readlink(b'/proc/self/fd/4', b, 999), b.raw)
        (b := ctypes.create_string_buffer(9999), libc.realpath(b'/proc/self/fd/4', b), b.raw)
        {name: str(getattr(video_clue_0, name)) for name in dir(video_clue_0)}
        video_clue_0.__dict__
        """,
    )
    assert text.count("->") == 12 and "golden" not in text and "retriever" not in text


def test_images_bring_no_texts_of_their_files(fresh, tmp_path):  # noqa: F811
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("label", "golden-retriever")
    path = tmp_path / "golden-retriever.png"
    Image.new("RGB", (9, 7), "red").save(path, pnginfo=info)
    plain = Image.new("RGB", (9, 7))
    plain.info["label"] = "golden-retriever"
    exif = Image.Exif()
    exif[0x010E] = "golden-retriever"
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (9, 7), "blue").save(tmp_path / "a.jpg", exif=exif)
    box = fresh([Image.open(path), plain, Image.open(tmp_path / "a.jpg")])  # noqa: F811
    code = (
        "for i in (image_clue_0, image_clue_1, image_clue_2): print(i.size, vars(i), i.getexif())"
    )
    text = box.run(code).text
    assert "golden" not in text and re.findall(r"^\(\d, \d\)", text, re.M) == ["(9, 7)"] * 2 + [
        "(7, 9)"
    ]


def asked(one, code):
    """What code prints, as a number."""
    return int(one.run(code).text.split()[-1])


def test_file_locks_are_no_channel(fresh):  # noqa: F811
    one, other = fresh(), fresh()
    ask = """
import fcntl, os, struct
file = os.open(os.__file__, os.O_RDONLY)
lock = struct.pack('hhqqi', fcntl.F_WRLCK, 0, 7, 1, 0)
for command in (fcntl.F_GETLK, 36):
    try: print(struct.unpack('hhqqi', fcntl.fcntl(file, command, lock))[0])
    except OSError as error: print(error.errno)
"""
    before = other.run(ask).text
    one.run("import fcntl, os\nfile = open(os.__file__, 'rb')")
    one.run("fcntl.lockf(file, fcntl.LOCK_SH, 1, 7)")
    one.run("fcntl.flock(file, fcntl.LOCK_EX)")
    assert other.run(ask).text == before
    assert other.run("fcntl.flock(open(os.__file__), fcntl.LOCK_EX | fcntl.LOCK_NB)").error is None


def test_other_commands_of_fcntl_are_refused(box):  # noqa: F811
    allowed = [*confine.DUPLICATE, *confine.DESCRIPTOR_FLAGS]
    code = (
        "import fcntl, os\nfile = os.open('locked', os.O_RDWR | os.O_CREAT)\nworked = []\n"
        "for command in [*range(0, 50), *range(1020, 1050)]:\n"
        "    try: fcntl.fcntl(file, command, 0)\n    except OSError: continue\n"
        "    worked.append(command)\nprint(worked)"
    )
    worked = json.loads(box.run(code).text)
    assert set(worked) <= {*allowed, *confine.LOCKS}
    assert (
        box.run("import sqlite3\nd = sqlite3.connect('d')\nd.execute('create table t(x)')").error
        is None
    )


def test_futexes_are_no_channel(fresh):  # noqa: F811
    """One sandbox waits at a byte of the C library, another one wakes whoever waits there."""
    one, other = fresh(), fresh()
    number = confine.system_calls(platform.machine())["futex"]
    place = f"""
import ctypes, threading, time
libc = ctypes.CDLL(None, use_errno=True)
place = ctypes.cast(libc.printf, ctypes.c_void_p).value & ~4095
value = ctypes.c_int.from_address(place).value
def futex(operation, *arguments):
    return libc.syscall({number}, ctypes.c_void_p(place), operation, *arguments)
"""
    one.run(
        place + "def wait():\n    for _ in range(300):\n        futex(0, value, None)\n"
        "        time.sleep(0.01)\nthread = threading.Thread(target=wait, daemon=True)\n"
        "thread.start()"
    )
    threading.Thread(target=one.run, args=("time.sleep(1.5)",)).start()
    other.run(place)
    woken = [asked(other, "time.sleep(0.1); print(futex(1, 99))") for _ in range(9)]
    assert max(woken) <= 0


def test_the_null_device_is_no_channel(fresh):  # noqa: F811
    one, other = fresh(), fresh()
    flags = "import fcntl, os\nprint(*(fcntl.fcntl(fd, fcntl.F_GETFL) for fd in range(3)))"
    before = other.run(flags).text
    one.run(
        "import fcntl, os\n"
        "for fd in range(3): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)"
    )
    assert one.run(flags).text != before
    assert other.run(flags).text == before
    one.close()
    assert fresh().run(flags).text == before


# ---- what starves the neighbours, and what stays behind


def test_sixteen_threads_are_all(fresh):  # noqa: F811
    assert confine.THREADS == 16
    code = (
        "import threading, time\nthreading.stack_size(32768)\ncount = 0\ntry:\n"
        "    while count < 100:\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "        count += 1\n"
        "except RuntimeError: pass\ntime.sleep(0.5)\nprint(count)"
    )
    boxes = [fresh(timeout=5) for _ in range(3)]
    for one in boxes:
        result = one.run(code)
        assert result.error or int(result.text) < 16  # without namespaces it was ended
    threads = [threading.Thread(target=time.sleep, args=(0.1,)) for _ in range(50)]
    for thread in threads:
        thread.start()  # the trainer still gets threads
    for thread in threads:
        thread.join()


def test_pools_of_threads_fit(fresh):  # noqa: F811
    code = """
from concurrent.futures import ThreadPoolExecutor
import time
with ThreadPoolExecutor() as pool:
    print(sum(pool.map(lambda k: time.sleep(0.01) or k, range(60))))
"""
    assert fresh().run(code).text == "1770\n"


NO_SPACES = [sys.executable, "-c", REFUSE, repr({UNSHARE: None, MOUNT: None})]


def test_folders_of_a_tree_that_was_killed_at_once_are_swept(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    code = (
        'import sandbox, time\nbox = sandbox.Sandbox()\nbox.run(\'open("x", "w").write("x")\')\n'
        "print('ready', flush=True); time.sleep(99)"
    )
    first = python(code, before=NO_SPACES, env=environment)
    assert first.stdout.readline() == "ready\n"
    second = python(code, before=NO_SPACES, env=environment)
    assert second.stdout.readline() == "ready\n"
    folders = set(tmp_path.glob("sandbox-*"))
    assert len(folders) == 2 and len(list(tmp_path.glob("sandbox-*/*/x"))) == 2
    tree = {first.pid} | family(first.pid)
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)  # so that nobody sweeps behind the others
    for pid in tree:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    (tmp_path / "sandbox-of-mine").write_text("a file of the user's")
    time.sleep(0.5)
    assert set(tmp_path.glob("sandbox-*/")) - {tmp_path / "sandbox-of-mine"} == folders
    third = python(code, before=NO_SPACES, env=environment)
    assert third.stdout.readline() == "ready\n"
    assert eventually(lambda: len([p for p in tmp_path.glob("sandbox-*") if p.is_dir()]) == 2)
    assert len(list(tmp_path.glob("sandbox-*/*/x"))) == 2  # of those that live
    assert (tmp_path / "sandbox-of-mine").exists()
    for trainer in (second, third):
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    assert eventually(lambda: not [path for path in tmp_path.glob("*sandbox-*") if path.is_dir()])


# ---- errors that say what is missing

START = """
import sys
import sandbox
try:
    print(sandbox.Sandbox().run("open('f', 'w').write('x'); print('works')").text)
except (sandbox.SandboxError, OSError) as error:
    print(error)
"""
needs_mounts = pytest.mark.skipif(
    os.getuid() != 0 or bool(subprocess.call(["unshare", "-m", "true"], stderr=-3)),
    reason="mounts need root",
)


def started(shell, *before, tmp_path="/tmp"):
    """What starting a sandbox says after some shell commands, with mounts of its own."""
    command = ["unshare", "-m", "sh", "-c", f'{shell}; exec "$@"', "sh", *before]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command += [sys.executable, "-c", START]
    run = subprocess.run(command, cwd="/proc", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_mounts
def test_errors_say_what_is_missing(tmp_path):
    read_only = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,ro,bind {tmp_path}"
    everywhere = (
        "mount -o remount,ro,bind /; for f in /tmp /var/tmp /dev/shm; do mount --bind $f $f; "
        "mount -o remount,ro,bind $f; done"
    )
    full = f"mount -t tmpfs -o size=4k,nr_inodes=2 none {tmp_path}"
    assert "temporary" in started(everywhere, *NO_SPACES) or "works" in started(
        everywhere, *NO_SPACES
    )
    assert "No space left" in started(full, *NO_SPACES, tmp_path=tmp_path)
    assert "works" in started(read_only, *NO_SPACES, tmp_path=tmp_path)  # there are other folders
    assert "ulimit -f" in started("ulimit -f 0", *NO_SPACES)
    assert "/proc" in started("mount -t tmpfs none /proc", *NO_SPACES)
    assert "/dev/null" in started("mount -t tmpfs none /dev", *NO_SPACES)
    assert "/dev/null" in started("mount -t tmpfs none /dev")
    assert "works" in started("true")


def test_closed_is_said_and_closing_again_is_fine(fresh):  # noqa: F811
    box = fresh()  # noqa: F811
    box.close()
    box.close()
    for _ in range(2):
        with pytest.raises(SandboxError, match="closed"):
            box.run("print(1)")
    box.close()
    ended = fresh()
    ended.run("import os; os._exit(0)")
    ended.close()
    ended.close()
    with pytest.raises(SandboxError, match="closed"):
        ended.run("print(1)")


@pytest.mark.parametrize(
    "loop",
    [
        "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "'a' in ('b' for _ in iter(int, 1))",
    ],
)
def test_a_prelude_without_end_is_ended_and_named(tmp_path, loop):
    path = tmp_path / "tools.py"
    path.write_text(f"def f(): pass\n{loop}\n")
    start = time.monotonic()
    with pytest.raises(SandboxError, match="--prelude.* it ran for more than 0.5 s"):
        sandbox.Sandbox(prelude=str(path), timeout=0.5)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "code",
    [
        "print('x' * 3_000_000)",
        "for k in range(300_000): print('x' * 9)",
        "import sys\nfor k in range(3000): sys.stdout.write('x' * 1000)\nprint()",
        "import sys\nfor k in range(30): sys.stderr.write('é' * 100_000)\nprint()",
    ],
)
def test_more_than_a_million_characters_are_cut_like_any_other(fresh, code):  # noqa: F811
    box = fresh(timeout=60)  # noqa: F811
    result = box.run(f"print('start')\n{code}\nprint('end')")
    assert result.error is None and len(result.text) < 10_100
    assert result.text.startswith("start\n") and result.text.endswith("\nend\n")
    cut = int(re.search(r"(\d+) characters cut", result.text)[1])
    assert 2_500_000 < cut < 3_100_000
    assert len(result.text) - len(re.search(r"\n\[….*…\]\n", result.text)[0]) == 10_000


# ---- elsewhere

SIEGE = [
    test_patched_sessions_do_not_reach_the_trainer,
    test_frames_lie_inside_the_video,
    test_no_accident_with_one_child_ends_the_others,
    test_few_descriptors_are_named_and_hurt_nobody,
    test_many_warm_sandboxes_of_several_trainers_do_not_end_the_forking_processes,
    test_no_file_that_code_may_read_can_be_emptied,
    test_threads_share_their_descriptors,
    test_the_name_of_a_video_is_not_told,
    test_file_locks_are_no_channel,
    test_other_commands_of_fcntl_are_refused,
    test_futexes_are_no_channel,
    test_the_null_device_is_no_channel,
    test_sixteen_threads_are_all,
    test_pools_of_threads_fit,
]


def test_the_siege_fails_elsewhere_too(tmp_path):
    elsewhere(tmp_path, [f"{__file__}::{test.__name__}" for test in SIEGE])
