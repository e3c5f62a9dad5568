"""What code inside a sandbox meets: values, figures, errors, restarts; code as models write it."""

import re
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_sandbox import VIDEO, box, elsewhere, eventually, fresh, needs_video  # noqa: F401

from engine import figures, session
from sandbox import Result, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the confinement is Linux's")


def text_of(box, code):  # noqa: F811
    """What code prints, when it does not fail and shows nothing."""
    result = box.run(code)
    assert result.error is None and result.images == []
    return result.text


# ---- the value of the last expression


@pytest.mark.parametrize(
    "code, text",
    [
        ("1 + 1", "2\n"),
        ("x = 3\nx", "3\n"),
        ("'a\\nb'", "'a\\nb'\n"),
        ("x = [1]\nx.append(2)\nx", "[1, 2]\n"),
        ("def f():\n    return (1, 2)\nf()", "(1, 2)\n"),
        ("import math\nmath.pi  # the number", "3.141592653589793\n"),
        ("np.arange(3)\n\n\n", "array([0, 1, 2])\n"),
        ("{\n 'a': 1,\n}", "{'a': 1}\n"),
        ("image_clue_0.size", "(448, 336)\n"),
        ("len('abc') if True else None", "3\n"),
        ("(lambda: 5)()", "5\n"),
        ("""'''\nx = 1\n'''""", "'\\nx = 1\\n'\n"),
        ("from __future__ import annotations\n7", "7\n"),
        # Nothing to show.
        ("None", ""),
        ("x = 1", ""),
        ("1;", ""),
        ("if True:\n    5", ""),
        ("", ""),
        ("# only a remark", ""),
        # What was printed or shown is all.
        ("print('a')\n5", "a\n"),
        ("5\nprint('a')", "a\n"),
        ("import sys\nsys.stdout.write('a')", "a"),
        ("_ = print('a')\n[k for k in range(3)]", "a\n"),
    ],
)
def test_a_call_that_returns_nothing_shows_its_value(box, code, text):  # noqa: F811
    assert text_of(box, code) == text


def test_values_that_are_pictures_are_shown(box):  # noqa: F811
    codes = {
        "image_clue_0": (448, 336),
        "image_clue_0.crop((0, 0, 9, 8))": (9, 8),
        "Image.fromarray(np.zeros((5, 6), 'uint8'))": (6, 5),
        "fig = plt.figure(figsize=(3, 2), dpi=100)\nfig": (300, 200),
        "fig, ax = plt.subplots(figsize=(3, 2), dpi=50)\nax.plot([1])\nfig": (150, 100),
    }
    for code, size in codes.items():
        result = box.run(code)
        assert result.error is None and result.text == ""
        assert [image.size for image in result.images] == [size]
    assert box.run("plt.show()").images == []
    result = box.run("image_clue_0.show()\nimage_clue_0")
    assert len(result.images) == 1


def test_a_value_is_made_once_and_its_failure_is_an_error(box):  # noqa: F811
    box.run("count = 0\ndef f():\n    global count\n    count += 1\n    return count")
    assert text_of(box, "f()") == "1\n" and text_of(box, "count") == "1\n"
    assert "ZeroDivisionError" in box.run("x = 1\n\nx / 0").error
    assert '"<code>", line 3' in box.run("x = 1\n\nx / 0").error
    bad = "class A:\n    def __repr__(self): raise KeyError('no repr')\nA()"
    assert "no repr" in box.run(bad).error
    result = box.run("'x' * 50_000")
    assert result.error is None and len(result.text) < 10_100


# ---- figures


def test_display_shows_and_prints(box):  # noqa: F811
    result = box.run("display(image_clue_0, 5, plt.figure())\ndisplay('a')")
    assert result.error is None and len(result.images) == 2 and result.text == "5\n'a'\n"
    imports = [
        "from IPython.display import display as d",
        "import IPython\nd = IPython.display.display",
        "import IPython.display as module\nd = module.display",
        "from IPython.core.display import display as d",
    ]
    for code in imports:
        assert len(box.run(f"{code}\nd(image_clue_0)").images) == 1
    code = "image_clue_0.save('a.png')\nfrom IPython.display import Image as I\ndisplay(I('a.png'))"
    assert [image.size for image in box.run(code).images] == [(448, 336)]
    code = "display(I(data=open('a.png', 'rb').read()), I(filename='a.png'))"
    assert len(box.run(code).images) == 2


@pytest.mark.parametrize(
    "code",
    [
        "import importlib\nimportlib.reload(plt)\nplt.plot([1])\nplt.show()",
        "import importlib, matplotlib.pyplot as p\np = importlib.reload(p)\np.plot([1])\np.show()",
        "import sys\ndel sys.modules['matplotlib.pyplot']\nimport matplotlib.pyplot as p\n"
        "p.plot([1])\np.show()",
        "plt.switch_backend('agg')\nplt.plot([1])\nplt.show()",
        "plt.switch_backend('svg')\nplt.plot([1])\nplt.show()\nplt.switch_backend('agg')",
        "import matplotlib\nmatplotlib.use('pdf')\nplt.plot([1])\nplt.show()\n"
        "matplotlib.use('agg')",
        "plt.ion()\nplt.plot([1])\nplt.show()\nplt.ioff()",
        "plt.plot([1])\nplt.pause(0.01)",
        "plt.plot([1])\nplt.show(block=True)",
        "plt.plot([1])\nplt.gcf().show(warn=False)",
        "plt.plot([1])\nplt.gcf().canvas.manager.show()",
        "from PIL import ImageShow\nImageShow.show(image_clue_0)",
    ],
)
def test_ways_to_show_that_models_find(box, code):  # noqa: F811
    result = box.run(code)
    assert result.error is None and len(result.images) == 1
    assert box.run("plt.show()").images == []


@pytest.mark.parametrize(
    "code",
    [
        "plt.plot([1], [1, 2])",
        "plt.plot([1])\n1 / 0",
        "plt.figure()\nplt.figure()\nraise SystemError",
        "fig, axes = plt.subplots(2)\naxes[0].imshow('x')",
        "plt.title('$\\\\frac$')\nplt.show()",
        "plt.figure()\nplt.figure()\nplt.title('$\\\\frac$')\nplt.show()",
        "plt.title('$\\\\frac$')\nplt.gcf()",
    ],
)
def test_failed_calls_leave_no_figure(box, code):  # noqa: F811
    assert box.run(code).error
    result = box.run("print(plt.get_fignums())\nplt.show()")
    assert result.images == [] and result.text == "[]\n"


def test_figures_of_earlier_calls_stay(box):  # noqa: F811
    box.run("plt.figure(figsize=(3, 2), dpi=100)\nplt.plot([1])")
    assert box.run("plt.figure()\n1 / 0").error
    assert [image.size for image in box.run("plt.show()").images] == [(300, 200)]
    caught = "plt.title('$\\\\frac$')\ntry: plt.show()\nexcept ValueError: print('caught')\n"
    result = box.run(caught + "print(plt.get_fignums())")
    assert result.error is None and result.text == "caught\n[]\n"


def test_figures_look_as_people_see_them(box):  # noqa: F811
    grey = {
        "Image.fromarray(np.full((4, 4), 0.5, 'float32'))": 128,
        "Image.fromarray(np.full((4, 4), 32768, 'uint16'))": 128,
        "Image.fromarray(np.full((4, 4), 200, 'int32'))": 200,
        "Image.new('RGBA', (4, 4), (0, 0, 0, 0))": 255,
        "Image.new('LA', (4, 4), (0, 0))": 255,
    }
    for code, value in grey.items():
        for way in (code, f"({code}).show()", f"display({code})"):
            (image,) = box.run(way).images
            assert abs(image.getpixel((1, 1))[0] - value) <= 1, way


def test_cv2_shows_and_reads_png(box):  # noqa: F811
    pytest.importorskip("cv2")
    code = """
import cv2
Image.new('RGB', (6, 5), (255, 128, 0)).save('a.png')
array = cv2.imread('a.png')
decoded = cv2.imdecode(np.fromfile('a.png', 'uint8'), cv2.IMREAD_COLOR)
cv2.imshow('window', array)
cv2.imshow('window', array / 255)
cv2.imshow('window', array[..., 0])
cv2.imshow('window', decoded.astype('uint16') * 257)
cv2.imshow('window', cv2.cvtColor(array, cv2.COLOR_BGR2BGRA))
cv2.waitKey(0)
cv2.destroyAllWindows()
"""
    result = box.run(code)
    assert result.error is None
    pixels = [image.getpixel((0, 0)) for image in result.images]
    assert pixels == [(255, 128, 0)] * 2 + [(0, 0, 0)] + [(255, 128, 0)] * 2


# ---- time, memory, and what cannot work


def held(seconds):
    """Code that stays in C, where no Python code runs, not even a handler of signals."""
    return (
        "import ctypes, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        f"ctypes.PyDLL(None).usleep({int(seconds * 1e6)})"
    )


@pytest.mark.parametrize(
    "code, text",
    [
        ("print('before')", "before\n"),
        ("print('a', 1, 'é', sep='-')\nprint('b')", "a-1-é\nb\n"),
        ("print('half', end='')", "half\n"),
        ("import sys\nsys.stderr.write('warning')", "warning\n"),
        ("for k in range(1000): print(k)", "".join(f"{k}\n" for k in range(1000))),
        ("print('\\x1b[31mred')", "red\n"),
        ("pass", ""),
    ],
)
def test_text_before_a_timeout_is_kept_when_c_code_holds_on(fresh, code, text):  # noqa: F811
    box = fresh(timeout=0.5)  # noqa: F811
    box.run("print('of an earlier call')")
    start = time.monotonic()
    result = box.run(f"{code}\n{held(60)}")
    assert time.monotonic() - start < 5
    assert result.text == text + result.error and "0.5 s" in result.error
    assert "TimeoutError" in result.error


def test_long_text_before_a_timeout_is_cut(fresh):  # noqa: F811
    box = fresh(timeout=1)  # noqa: F811
    result = box.run(f"print('start')\nfor _ in range(99): print('é' * 9999)\n{held(60)}")
    assert result.text.startswith("start\né") and len(result.text) < 10_200


def test_after_a_restart_all_is_bound_again(fresh):  # noqa: F811
    box = fresh([Image.new("RGB", (8, 8), "red")], seed=5)  # noqa: F811
    box.run(
        "Image.new('RGB', (7, 7), 'blue').show()\nplt.figure(figsize=(3, 2), dpi=100)\nplt.show()"
    )
    box.run("image_clue_1.crop((0, 0, 3, 2)).show()")
    for _ in range(2):
        box.run("import os\nos._exit(1)")
        code = "for k in range(4): print(globals()[f'image_clue_{k}'].size)\nimage_clue_1"
        text = box.run(code).text
        assert text.startswith("[Restarted") and text.endswith(
            "(8, 8)\n(7, 7)\n(300, 200)\n(3, 2)\n"
        )
    result = box.run("image_clue_1.show()\nprint(image_clue_4.getpixel((0, 0)))")
    assert result.text == "(0, 0, 255)\n"


def test_what_is_bound_again_is_bounded(fresh):  # noqa: F811
    import sandbox

    box = fresh()  # noqa: F811
    for _ in range(3):
        box.run("for _ in range(32): Image.new('RGB', (1000, 900)).show()")
        pixels = sum(image.width * image.height for image in box._shown.values())
        assert pixels <= sandbox.SHOWN_PIXELS
    box.run("import os\nos._exit(1)")
    names = "sorted(int(name[11:]) for name in globals() if name.startswith('image_clue'))"
    bound = eval(box.run(names).text.splitlines()[-1])
    assert bound[-1] == 95 and bound == list(range(bound[0], 96)) and len(bound) >= 32
    box.close()
    assert not box._shown


DRAW = "import random\nprint(random.random(), np.random.rand(), random.choice('abc'))"


def test_a_seed_decides_the_random_numbers_also_after_a_restart(fresh):  # noqa: F811
    first = fresh(seed=3).run(DRAW).text
    box = fresh(seed=3)  # noqa: F811
    assert box.run(DRAW).text == first
    assert box.run(DRAW).text != first
    box.run("import os\nos._exit(1)")
    assert box.run(DRAW).text.endswith(first)
    assert fresh(seed=4).run(DRAW).text != first
    assert fresh(seed=2**64 + 3).run(DRAW).error is None
    assert fresh(seed=-1).run(DRAW).error is None
    unseeded = fresh()
    lines = [unseeded.run(DRAW).text]
    unseeded.run("import os\nos._exit(1)")
    lines.append(unseeded.run(DRAW).text.splitlines()[-1])
    lines.append(fresh().run(DRAW).text)
    assert len({line.strip() for line in lines}) == 3


@pytest.mark.parametrize(
    "code",
    [
        "np.ones((99_999, 99_999))",
        "x = []\nwhile True: x.append(bytearray(2**26))",
        "'x' * 2**40",
        "image_clue_0.resize((30_000, 30_000)).show()",
        "plt.figure(figsize=(85, 85), dpi=100)\nplt.imshow(np.zeros((8500, 8500, 3)))\nplt.show()",
        "x = np.ones(1_900_000_000, 'uint8')\nplt.figure(figsize=(85, 85), dpi=100)\n"
        "plt.plot([1])\nplt.savefig('a.png')",
    ],
)
def test_too_much_memory_is_an_error_that_names_the_limit(box, code):  # noqa: F811
    result = box.run(code)
    assert "MemoryError" in result.error and f"{session.MEMORY >> 30} GiB" in result.error
    assert result.text.endswith(result.error)
    assert text_of(box, "x = None\nprint(1)") == "1\n"  # the same process


def test_a_large_plot_is_shown(box):  # noqa: F811
    code = "plt.figure(figsize=(85, 85), dpi=100)\nplt.plot([1, 2])\nplt.show()"
    result = box.run(code)
    assert result.error is None
    assert [image.width * image.height <= figures.MAX_PIXELS for image in result.images] == [True]


@needs_video
@pytest.mark.parametrize(
    "code",
    [
        "video_clue_0.get_batch(list(range(300)) * 80)",
        "kept = []\nfor _ in range(99): kept.append(video_clue_0.get_batch(range(300)))",
        "kept = np.ones(2_050_000_000, 'uint8')\nvideo_clue_0.get_batch(range(99))",
        "kept = np.ones(2_050_000_000, 'uint8')\nvideo_clue_0[0]",
    ],
)
def test_too_many_frames_are_an_error_that_names_the_limit(fresh, code):  # noqa: F811
    box = fresh(videos=[VIDEO])  # noqa: F811
    box.run("video_clue_0[5]")
    result = box.run(code)
    assert "MemoryError" in result.error and f"{session.MEMORY >> 30} GiB" in result.error
    assert text_of(box, "kept = None\nprint(video_clue_0[7].shape)") == "(240, 320, 3)\n"


@pytest.mark.parametrize(
    "code, word",
    [
        ("import asyncio\nasync def f(): pass\nasyncio.run(f())", "asyncio"),
        ("import asyncio\nasyncio.new_event_loop()", "asyncio"),
        ("from multiprocessing import Pool\nPool(2)", "multiprocessing"),
        ("import multiprocessing as m\nm.Process(target=print).start()", "multiprocessing"),
        ("import multiprocessing as m\nm.Manager()", "multiprocessing"),
        (
            "from concurrent.futures import ProcessPoolExecutor as P\n"
            "with P(2) as pool: list(pool.map(abs, [1]))",
            "processes",
        ),
        ("import subprocess\nsubprocess.run(['ls'])", "programs"),
        ("import urllib.request\nurllib.request.urlopen('http://example.com')", "network"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "network"),
    ],
)
def test_what_cannot_work_says_why(box, code, word):  # noqa: F811
    result = box.run(code)
    last = result.error.splitlines()[-1]
    assert re.fullmatch(r"\[.*\.\]", last) and word in last
    assert text_of(box, "print(1)") == "1\n"


def test_other_errors_get_no_such_sentence(box):  # noqa: F811
    for code in ("open('nothing')", "1 / 0", "raise OSError('asyncio')"):
        assert not box.run(code).error.endswith("]\n")


# ---- standard streams


def test_standard_streams_work_as_programs_expect(box):  # noqa: F811
    codes = {
        "import sys\nsys.stdout.buffer.write('é'.encode())\nsys.stdout.flush()": "é",
        "import sys\nprint(sys.stdout.encoding, sys.stdout.isatty())": "utf-8 False\n",
        "import sys\nprint('a', file=sys.stderr, flush=True)": "a\n",
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as s: print('a')\n"
        "print(s.getvalue() * 2, end='')": "a\na\n",
        "import logging\nlogging.warning('careful')": "WARNING:root:careful\n",
        "import sys\nsys.stdout = None": "",
        "print('back')": "back\n",
    }
    for code, text in codes.items():
        assert text_of(box, code) == text
    assert "TypeError" in box.run("import sys\nsys.stdout.write(5)").error
    logged = "import logging\nlogging.warning('again')"
    assert text_of(box, logged) == "WARNING:root:again\n"


def test_context_manager_and_result_are_as_documented():
    with Sandbox([Image.new("RGB", (4, 3))]) as one:
        result = one.run("print(image_clue_0.size)")
    assert result == Result("(4, 3)\n", [], None, [])
    assert eventually(lambda: one.closed) and np.array_equal(result.images, [])


# ---- elsewhere

EVERYWHERE = [
    test_text_before_a_timeout_is_kept_when_c_code_holds_on,
    test_after_a_restart_all_is_bound_again,
    test_a_seed_decides_the_random_numbers_also_after_a_restart,
    test_too_many_frames_are_an_error_that_names_the_limit,
    test_what_cannot_work_says_why,
    test_cv2_shows_and_reads_png,
]


def test_code_meets_the_same_elsewhere(tmp_path):
    elsewhere(tmp_path, [f"{__file__}::{test.__name__}" for test in EVERYWHERE])
