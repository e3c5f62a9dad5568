"""The page of rollouts: its records, and what a browser makes of it, whatever a policy wrote."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Sample
from engine import report
from engine.boxes import crops
from engine.report import (
    as_text,
    curves,
    read_lines,
    record,
    step_records,
    thumbnail,
    write_report,
)
from rollout import EndReason, Trajectory, Turn, select

MEDIA = Path(__file__).parents[2] / "shared" / "media"
CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
TAKE_OVER = "document.title='taken'"
HOSTILE = (
    f'</script><script>{TAKE_OVER}</script><img src=x onerror="{TAKE_OVER}"><!--<script>{"x" * 200}'
)
ANSWER = "<answer>\n\\boxed{red}\n</answer>"
ACCENT = (47, 111, 222)  # the colour of a box


def picture(seed=0, size=(64, 48)):
    values = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def plain(size=(64, 48), colour=(200, 190, 40)):
    return Image.new("RGB", size, colour)


def look(box, size=None, text="Let me look."):
    """A turn that showed a box of the first picture."""
    code = f"image_clue_0.crop({box}).show()"
    figure = plain(size or (box[2] - box[0], box[3] - box[1]))
    shown = f"{text}\n<code>\n```python\n{code}\n```\n</code>"
    return Turn(shown, code, "", None, [figure], n_tokens=9)


def answered(sample, right, *looks, image=None):
    """A trajectory of one picture that looked and then answered."""
    t = Trajectory(sample, images=[image or plain()], prompt_images=1)
    t.turns = [*looks, Turn(ANSWER, n_tokens=5)]
    t.answer = "red" if right else "blue"
    t.correct = right
    t.n_tool_calls = len(looks)
    t.reward = right * (1 + 0.1 * len(looks))
    t.end_reason = EndReason.DONE
    return t


def ask(name="q", question="Which colour?"):
    return Sample(name, question, "red", images=(0,))


def hostile(i):
    """Every text that a policy or a data file can write holds markup, and a word without end."""
    turn = Turn(f"turn {HOSTILE}", f"code {HOSTILE}", f"output {HOSTILE}", None, [picture(i)])
    question = f"question {i} {HOSTILE}"
    sample = Sample(f"{i} {HOSTILE}", question, f"reference {HOSTILE}", (0,), data_source=HOSTILE)
    t = answered(sample, i % 4 == 0, *[turn] * (i % 3), image=picture(i))
    t.turns[-1].text += f" needle{i}."
    t.answer = f"answer {HOSTILE}"
    t.error = HOSTILE
    t.end_reason = list(EndReason)[1 + i % 2]
    return t


# ---------------------------------------------------------------------------- the boxes of a call
def show(*boxes):
    return "\n".join(f"image_clue_0.crop({box}).show()" for box in boxes)


def test_a_crop_has_its_box():
    assert crops(show("(10, 20, 40, 60)"), [plain((30, 40))]) == [(10, 20, 40, 60)]
    assert crops(show("[10, 20, 40, 60]"), [plain((30, 40))]) == [(10, 20, 40, 60)]
    assert crops(show("(10.5, 20, 40, 60)"), [plain((30, 40))]) == [(10.5, 20, 40, 60)]
    enlarged = "image_clue_0.crop((10, 20, 40, 60)).resize((300, 400)).show()"
    assert crops(enlarged, [plain((300, 400))]) == [(10, 20, 40, 60)]


def test_a_box_may_reach_beyond_the_picture():
    assert crops(show("(-10, -5, 40, 60)"), [plain((50, 65))]) == [(-10, -5, 40, 60)]


def test_several_crops_have_their_boxes_in_the_order_of_the_code():
    code = (
        "display(Image.fromarray(np.array(image_clue_0.crop((1, 2, 11, 12)))))\n"
        "image_clue_0.crop((3, 4, 13, 14)).show(); image_clue_0.crop((5, 6, 15, 16)).show()"
    )
    figures = [plain((10, 10))] * 3
    assert crops(code, figures) == [(1, 2, 11, 12), (3, 4, 13, 14), (5, 6, 15, 16)]


def test_a_box_that_is_computed_is_not_guessed_and_leaves_the_others_theirs():
    square = plain((10, 10))
    assert crops("x = 5\n" + show("(x, 0, 15, 10)"), [square]) == [None]
    assert crops(show("box", "(0, 0, 10, 10)"), [square] * 2) == [None, (0, 0, 10, 10)]


def test_figures_that_do_not_fit_have_no_box():
    assert crops(show("(0, 0, 10, 10)"), [plain((10, 20))]) == [None]  # of other proportions
    assert crops(show("(0, 0, 10, 10)"), [plain((10, 10))] * 2) == [None, None]  # one too many
    assert crops(show("(0, 0, 9, 9)", "(5, 5, 9, 9)"), [plain((9, 9))]) == [None]  # one too few
    assert crops("image_clue_1.crop((0, 0, 10, 10)).show()", [plain((10, 10))]) == [None]
    assert crops("print(1)", [plain()]) == [None]
    assert crops(None, []) == []


def test_the_whole_picture_is_no_crop_also_where_figures_were_made_small():
    """Code that crops and then shows the picture itself, in a trajectory that was cut."""
    code = "image_clue_0.crop((0, 0, 100, 100))\nimage_clue_0.show()"
    for end in (EndReason.DONE, EndReason.OVER_LENGTH):
        t = Trajectory(Sample("0", "?", "a", images=("x.png",)), images=[plain((600, 600))])
        t.turns = [Turn(code=code, images=[plain((600, 600))])]
        t.end_reason = end
        if t.broken:
            report.shrink(t)
            assert t.turns[0].images[0].size == (256, 256)
        assert record(t)["turns"][0]["boxes"] == [None]
        t.turns = [Turn(code=show("(0, 0, 100, 100)"), images=[plain((100, 100))])]
        assert record(t)["turns"][0]["boxes"] == [(0, 0, 100, 100)]


def test_a_drawing_has_its_own_proportions_and_still_its_box():
    code = "plt.imshow(image_clue_0.crop((0, 0, 10, 10)))\nplt.axis('off')\nplt.show()"
    assert crops(code, [plain((640, 480))]) == [(0, 0, 10, 10)]


def test_a_figure_is_what_was_shown_and_not_what_was_cropped_beside_it():
    size = (400, 400)
    beside = "c = image_clue_0.crop((0, 0, 100, 100))\nprint(c.getextrema())\n"
    assert crops(beside + "image_clue_0.show()", [plain(size)], size) == [None]
    assert crops(beside + "c.resize((400, 400)).show()", [plain((400, 400))], (800, 800)) == [
        (0, 0, 100, 100)
    ]
    assert crops(show("(0, 0, 400, 400)"), [plain(size)], size) == [(0, 0, 400, 400)]
    assert crops(beside + "plt.imshow(image_clue_0)\nplt.show()", [plain((640, 480))]) == [None]
    both = beside + "plt.imshow(image_clue_0.crop((5, 5, 9, 9)))\nplt.show()"
    assert crops(both, [plain((640, 480))]) == [(5, 5, 9, 9)]


def test_a_box_is_found_by_way_of_variables():
    square = [plain((10, 10))]
    named = "img = image_clue_0\nbox = (5, 5, 15, 15)\npart = img.crop(box)\n"
    assert crops(named + "part.show()", square) == [(5, 5, 15, 15)]
    assert crops(named + "plt.imshow(np.array(part))\nplt.show()", [plain((640, 480))]) == [
        (5, 5, 15, 15)
    ]


@pytest.mark.parametrize(
    "change",
    [
        "image_clue_0 = image_clue_0.rotate(90)",
        "for box in boxes: pass",
        "box, other = find()",
        "with find() as box: pass",
        "box = find()",
        "img = image_clue_0.rotate(90)",
    ],
)
def test_a_variable_that_was_changed_is_not_believed(change):
    code = f"img = image_clue_0\nbox = (5, 5, 15, 15)\n{change}\n"
    source = "image_clue_0" if change.startswith("image") else "img"
    assert crops(f"{code}{source}.crop(box).show()", [plain((10, 10))]) == [None]


@pytest.mark.parametrize(
    "box",
    [
        f"({10**400}, 0, 1, 1)",
        "(0, 0, 1e999, 1)",
        "(1e999, 0, 1e999, 1)",
        "(-1e999, 0, 1, 1)",
        "(1j, 0, 1, 1)",
        "('a', 0, 1, 1)",
        "{0: []}",
        "{[]: 0}",
        "(1, 2, 3)",
        "5",
        "(4, 0, 1, 1)",
        "(0, 0, 0, 0)",
        "*a",
        f"({'-' * 5000}1, 0, 1, 1)",
    ],
)
def test_no_box_and_no_failure_whatever_the_code_says(box):
    assert crops(show(box), [plain((10, 10))]) == [None]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("code", ["(", "\0", "(" * 5000, "'\\d' is 1", f"a{'.b' * 9999}(1)", ""])
def test_code_that_is_no_python_or_odd_is_passed_over_in_silence(code):
    assert crops(code, [plain()]) == [None]


# -------------------------------------------------------------------------------------- the records
def test_a_record_holds_what_page_and_results_need():
    sample = Sample("q", "Which?", "red", images=(0,), data_source="vstar")
    t = answered(sample, True, look((0, 0, 20, 10)), image=picture(size=(600, 300)))
    t.turns.insert(1, Turn("oops", "1/0", "Traceback…", "ZeroDivisionError", n_tokens=4))
    t.action_mask = [False] * 3 + [True] * 18
    t.advantage = 0.25
    line = record(t, 3, 1, step=20, trained=True)
    assert json.loads(json.dumps(line))["turns"][0]["boxes"] == [[0, 0, 20, 10]]
    assert line["sizes"] == [(600, 300)] and len(line["images"]) == 1
    assert [turn["failed"] for turn in line["turns"]] == [False, True, False]
    assert [turn["tokens"] for turn in line["turns"]] == [9, 4, 5]
    assert (line["index"], line["repeat"], line["step"]) == (3, 1, 20)
    assert (line["reward"], line["advantage"]) == (1.1, 0.25)
    assert (line["trained"], line["broken"]) == (True, False)
    assert (line["answer"], line["reference"], line["correct"]) == ("red", "red", True)
    assert (line["end_reason"], line["response_tokens"]) == ("DONE", 18)
    assert (line["id"], line["data_source"]) == ("q", "vstar")


def test_without_a_reference_nothing_is_right_or_wrong():
    assert record(answered(Sample("q", "Which?", "", images=(0,)), False))["correct"] is None


def test_a_picture_is_a_small_jpeg():
    uri = thumbnail(picture(size=(2000, 1000)))
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 60_000


def test_a_step_says_what_was_trained_on():
    def group(*rights):
        return [answered(ask(), right) for right in rights]

    groups = [group(1, 0, 0, 0), group(1, 1, 1, 1), group(1, 1, 0, 0), group(1, 1, 0, 0)]
    groups[2][3].end_reason = EndReason.OVER_LENGTH
    kept, _ = select(groups, 2)
    records = step_records(groups, kept, 7)
    by_group = [records[start : start + 4] for start in range(0, 16, 4)]
    assert [[line["index"] for line in lines] for lines in by_group] == [[k] * 4 for k in range(4)]
    trained = [[line["trained"] for line in lines] for lines in by_group]
    assert trained == [[False] * 4, [False] * 4, [True, True, True, False], [True] * 4]
    assert [line["broken"] for line in records] == [False] * 11 + [True] + [False] * 4
    without = [line["advantage"] is None for line in records]
    assert without == [False] * 4 + [True] * 4 + [False] * 3 + [True] + [False] * 4
    assert {line["step"] for line in records} == {7}
    assert [line["repeat"] for line in records] == [0, 1, 2, 3] * 4


@pytest.mark.skipif(not MEDIA.exists(), reason="needs the shared media")
def test_a_video_says_where_it_was_looked_at():
    video = str(MEDIA / "photo_tour.mp4")  # 12 s at 25 fps
    sample = Sample("v", "?", "4", videos=(video,))
    outside = [(0, -1), (0, 10**9), (7, 0)]  # what runs in a sandbox can say anything
    turns = [Turn(frames=[(0, 0), (0, 10), (0, 100)]), Turn(frames=[(0, 100), (0, 250), *outside])]
    line = record(Trajectory(sample, turns=turns))
    (strip,) = line["videos"]
    assert (strip["looked"], strip["seconds"]) == ([0, 0.4, 4, 10], 12)
    assert strip["turns"] == [[1], [1], [1, 2], [2]]
    assert [second for second, _ in strip["shown"]] == strip["looked"]
    assert len({uri for _, uri in strip["shown"]}) == 4 and line["images"] == []
    assert (line["frames_looked_at"], line["seconds_covered"]) == (4, 3)

    everywhere = [Turn(frames=[(0, frame) for frame in range(300)])]
    line = record(Trajectory(sample, turns=everywhere))
    (strip,) = line["videos"]
    assert len(strip["looked"]) == 300 and len(strip["shown"]) == 12
    assert line["seconds_covered"] == 12

    uniform = Trajectory(sample, prompt_images=6, turns=[Turn()])
    (strip,) = record(uniform)["videos"]
    assert strip["looked"] == [1, 3, 5, 7, 9, 11] and len(strip["shown"]) == 6
    assert strip["turns"] == [[]] * 6  # the context showed them, and no turn


def test_a_line_that_a_kill_cut_is_left_out(tmp_path):
    some = [json.loads(json.dumps(record(answered(ask(), True), k))) for k in range(3)]
    file = tmp_path / "rollouts.jsonl"
    assert read_lines(file) == []
    file.write_text(as_text(some))
    assert read_lines(file) == some
    file.write_text(as_text(some)[:-2])
    assert read_lines(file) == some[:2]


def test_curves_are_drawn_of_whatever_the_rows_hold(tmp_path):
    rows = [{"step": 0, "eval_accuracy": 0.4}, {"step": 1, "loss": 1.0, "accuracy": 0.5}]
    curves(tmp_path / "rl.png", rows)
    curves(tmp_path / "sft.png", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    curves(tmp_path / "none.png", [])
    two, one, _ = [Image.open(tmp_path / f"{name}.png") for name in ("rl", "sft", "none")]
    assert two.width > 1.9 * one.width  # panels beside each other


# ------------------------------------------------------------------------------------ the page file
def data_of(path):
    """What a page's data block holds."""
    return json.loads(
        re.search(r'"application/json">(.*?)</script>', path.read_text(), re.DOTALL)[1]
    )


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "rollouts.html"
    records = [record(hostile(i), i // 4, i % 4) for i in range(24)]
    history = [record(hostile(i), i, 0, step) for step in (0, 20) for i in range(4)]
    write_report(path, records, f"title {HOSTILE}", history)
    return path


def test_the_page_is_one_file_with_nothing_hostile_in_its_markup(hostile_page):
    text = hostile_page.read_text()
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text and "<!--" not in text
    outside = text.replace(re.search('id="data".*?</script>', text, re.DOTALL)[0], "")
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|fetch\(|innerHTML", outside)
    assert re.findall(r"(?:src|href)=\S*", outside) == ['href="#"']  # nothing is fetched
    assert text.count("data:image/jpeg;base64,") >= 24


def test_a_page_that_would_be_too_large_shows_an_even_share(tmp_path, monkeypatch):
    some = [record(hostile(i), i) for i in range(20)]
    size = sum(len(json.dumps(line)) for line in some)
    monkeypatch.setattr(report, "PAGE_BYTES", size // 3)
    write_report(tmp_path / "r.html", some, "t")
    shown = data_of(tmp_path / "r.html")["trajectories"]
    assert [t["index"] for t in shown] == list(range(0, 20, 4))
    monkeypatch.setattr(report, "PAGE_BYTES", size // 2)
    write_report(tmp_path / "r.html", some[:4], "t", some * 2)
    assert (tmp_path / "r.html").stat().st_size < size // 2 + 40_000
    assert data_of(tmp_path / "r.html")["history"]


def test_a_share_holds_whole_groups_and_says_so(tmp_path, monkeypatch):
    some = [record(hostile(i), i // 4, i % 4) for i in range(24)]
    size = sum(len(json.dumps(line)) for line in some)
    monkeypatch.setattr(report, "PAGE_BYTES", size // 2 + 1000)
    write_report(tmp_path / "r.html", some, "t", [])
    data = data_of(tmp_path / "r.html")
    assert [t["index"] for t in data["trajectories"]] == [0] * 4 + [2] * 4 + [4] * 4
    assert "one question of 2" in data["title"]
    write_report(tmp_path / "r.html", some[:12], "t")
    assert data_of(tmp_path / "r.html")["title"] == "t"
    for line in some:
        line["index"] = 0
    write_report(tmp_path / "r.html", some, "t")  # of one question a share of its trajectories
    assert len(data_of(tmp_path / "r.html")["trajectories"]) == 12


# ------------------------------------------------------------------------------------- in a browser
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--virtual-time-budget=4000"
).split()


def browse(path, anchor, folder, *flags):
    """Open a page in a browser with a fresh profile in `folder`; what it prints."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/chromium", *flags]
    done = subprocess.run(
        [*command, f"file://{path}#{anchor}"], capture_output=True, text=True, timeout=120
    )
    return done.stdout


def page(path, anchor=""):
    """The page after its script ran, and how many trajectories it says it shows."""
    shown = browse(path, anchor, path.parent, "--dump-dom")
    return shown, int(re.search(r"<output>(\d+) of", shown)[1])


def screenshot(path, anchor, width, height):
    """What is on the screen: (height, width, 3)."""
    file = path.with_suffix(".png")
    size = f"--window-size={width},{height}"
    browse(path, anchor, path.parent, size, f"--screenshot={file}")
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """A page of two groups, and of a question that was learned."""
    path = tmp_path_factory.mktemp("run") / "rollouts.html"
    first = [answered(ask("a", "First?"), k < 3, *[look((8, 8, 24, 20))] * k) for k in range(4)]
    second = [answered(ask("b", "Second?"), False) for _ in range(4)]
    groups = [first, second]
    kept, _ = select(groups, 1)
    before = record(answered(ask("h", "Held out?"), False), 0, 0, 0)
    after = record(answered(ask("h", "Held out?"), True, look((8, 8, 24, 20))), 0, 0, 20)
    write_report(path, step_records(groups, kept, 20), "image, step 20", [before, after])
    return path


@in_browser
def test_groups_say_how_many_are_right_and_what_became_of_them(run_page):
    shown, count = page(run_page)
    groups = re.findall("<article.*?</article>", shown.split("<main>")[1], re.DOTALL)
    assert count == 8 and len(groups) == 2
    for words in (
        "First?",
        "reference red · 3 of 4 right",
        "trained on",
        "reward 1.2 = 1 + 0.1 × 2",
    ):
        assert words in groups[0], words
    for words in ("Second?", "0 of 4 right", "nothing to learn from its group", "reward 0 ·"):
        assert words in groups[1], words
    bars = re.findall(r'<span class="(.*?)" title=".*?" style="height: ([\d.]+)%', groups[0])
    assert [kind for kind, _ in bars] == ["right", "right", "right", "wrong"]
    assert [float(height) for _, height in bars] == pytest.approx([100 / 1.2, 110 / 1.2, 100, 0])
    assert "advantage" in groups[0] and "1 call ·" in groups[0]


@in_browser
def test_one_held_out_question_is_shown_at_every_step(run_page):
    shown, _ = page(run_page)
    history = re.search('<div id="history">(.*?)<main>', shown, re.DOTALL)[1]
    assert "step 0: 0 of 1 right · step 20: 1 of 1 right" in history
    cells = history.split("<small")[1:]
    assert len(cells) == 2 and "blue" in cells[0] and "red" in cells[1]
    assert 'class="box' not in cells[0] and 'class="box' in cells[1]


@in_browser
def test_of_what_a_resumed_run_answered_again_the_last_answer_is_shown(tmp_path):
    abandoned = record(answered(ask("h"), True), 0, 0, 40)
    first = record(answered(ask("h"), False), 0, 0, 20)
    again = record(answered(ask("h"), True), 0, 0, 20)
    groups = [[answered(ask("a"), False)]]
    records = step_records(groups, groups, 30)
    write_report(tmp_path / "r.html", records, "t", [abandoned, first, again])
    shown, _ = page(tmp_path / "r.html")
    assert "step 20: 1 of 1 right" in shown
    assert "step 40" not in shown.split("<main>")[0]  # it is ahead of the run


@in_browser
def test_the_box_of_a_crop_lies_on_the_picture_where_it_was_cut(tmp_path):
    box = (240, 80, 320, 160)
    t = answered(ask(), True, look(box), look(box), image=plain((400, 200)))
    t.turns[0].images = t.turns[1].images = [Image.new("RGB", (80, 80))]  # black
    write_report(tmp_path / "r.html", [record(t)], "t")
    shown, _ = page(tmp_path / "r.html", "at=0.0")
    assert "<b" in shown and ">1,2</b>" in shown  # two looks at one place share a box
    pixels = screenshot(tmp_path / "r.html", "at=0.0", 1000, 900)
    near = np.abs(pixels - plain().getpixel((0, 0))).max(2) < 12  # (height, width)
    opened = np.flatnonzero((np.abs(pixels - ACCENT).max(2) < 12).any(1)).min()
    near[: opened - 100] = False  # the group's own picture stands above
    rows = np.flatnonzero(near.sum(1) > 150)
    columns = np.flatnonzero(near.sum(0) > 60)
    scale = (columns[-1] - columns[0] + 1) / 400
    blue = np.abs(pixels - ACCENT).max(2) < 12
    sides = np.flatnonzero(blue.sum(0) > 60 * scale)
    low = np.flatnonzero(blue.sum(1) > 70 * scale)[-1]
    assert (sides[0] - columns[0]) / scale == pytest.approx(box[0], abs=6)
    assert (sides[-1] - columns[0]) / scale == pytest.approx(box[2], abs=6)
    assert (rows[-1] - low) / scale == pytest.approx(200 - box[3], abs=6)


@in_browser
def test_boxes_beyond_the_picture_stay_on_it(tmp_path):
    boxes = [(-500, -500, 30, 30), (40, 30, 5000, 5000), (900, 900, 950, 950)]
    t = answered(ask(), True, *[look(box) for box in boxes])
    write_report(tmp_path / "r.html", [record(t)], "t")
    shown, _ = page(tmp_path / "r.html", "at=0.0")
    form = r"left: min\(([\d.]+)%.*?top: min\(([\d.]+)%.*?width: ([\d.]+)%; height: ([\d.]+)%"
    found = [[float(value) for value in place] for place in re.findall(form, shown)]
    assert len(found) == 6  # on the group's picture and on the trajectory's
    for left, top, width, height in found:
        assert 0 <= left <= left + width <= 100 and 0 <= top <= top + height <= 100


@in_browser
def test_a_turn_shows_its_code_once_and_errors_in_their_colour(tmp_path):
    t = answered(ask(), False, look((0, 0, 9, 9), text="I look closer."))
    t.turns[0].output = t.turns[0].error = "ZeroDivisionError: division by zero"
    write_report(tmp_path / "r.html", [record(t)], "t")
    body = page(tmp_path / "r.html", "at=0.0")[0].split("<main>")[1].split("<script")[0]
    assert body.count("image_clue_0.crop((0, 0, 9, 9))") == 1 and "I look closer." in body
    assert re.search(r'<pre class="output failed">ZeroDivisionError', body)
    assert "turn 1 · 9 tokens" in body and "turn 2 · 5 tokens" in body


@in_browser
def test_hostile_output_runs_no_script(hostile_page):
    shown, count = page(hostile_page, "open=24")
    assert count == 24
    assert "<title>title &lt;/script&gt;" in shown and "taken</title>" not in shown
    assert len(re.findall("<section", shown)) == sum(i % 3 + 1 for i in range(24))
    assert shown.count("code &lt;/script&gt;&lt;script&gt;") == 24  # there, as text
    for word in ("question 7 ", "output ", "answer ", "reference ", "= 1 + 0.1 × 2", "OVER_LENGTH"):
        assert word in shown, word


@in_browser
def test_the_page_lets_no_other_script_run(hostile_page, tmp_path):
    added = "<main></main><script>document.documentElement.id = 'taken'</script>"
    changed = hostile_page.read_text().replace("<main></main>", added)
    (tmp_path / "r.html").write_text(changed)
    shown, count = page(tmp_path / "r.html")
    assert count == 24 and 'id="taken"' not in shown


@in_browser
@pytest.mark.parametrize(
    "anchor, count",
    [
        ("result=right&calls=0", 2),
        ("end=OVER_LENGTH&calls=2", 4),
        ("text=NEEDLE1", 11),
        ("result=wrong&text=needle23.", 1),
        ("at=3.0", 4),  # a link shows the trajectory among those of its group
    ],
)
def test_filters(hostile_page, anchor, count):
    assert page(hostile_page, anchor)[1] == count


def told(group, form):
    """What the visible trajectories of a group say, from top to bottom, in the form's place."""
    lines = re.findall(r'<details class=""><summary.*?</summary>', group)
    return [float(re.search(form, line)[1]) for line in lines]


@in_browser
@pytest.mark.parametrize(
    "key, form",
    [
        ("reward", r"reward ([\d.]+)"),
        ("tool_calls", r"(\d) calls?"),
        ("advantage", r"advantage ([-\d.]+)"),
    ],
)
def test_the_order_is_that_of_a_key(run_page, key, form):
    groups = page(run_page)[0].split("<main>")[1].split("<article")[1:]
    assert told(groups[0], form) != sorted(told(groups[0], form), reverse=True)
    groups = page(run_page, f"sort={key}")[0].split("<main>")[1].split("<article")[1:]
    assert told(groups[0], form) == sorted(told(groups[0], form), reverse=True)
    assert "First?" in groups[0] and "Second?" in groups[1]  # the group of the best comes first


@in_browser
def test_a_link_opens_one_trajectory(run_page):
    shown, count = page(run_page, "at=0.2")
    assert count == 4 and shown.count("<section") == 3 and shown.count(' open=""') == 1
    assert re.search(
        r'<details class="" open=""><summary class="right">red<small[^>]*>reward 1.2 = 1', shown
    )
    assert all(f'href="#at={group}.{k}"' in shown for group in (0, 1) for k in range(4))
    assert '<div id="history" hidden' in shown  # what was linked is on the first screen


def film(shown):
    """The lines of a video's strip: the turn's number, and where its marks are in percent."""
    strip = re.search('<div class="film">(.*?)<small', shown, re.DOTALL)[1]
    lines = re.split("<b ", strip)[1:]
    numbers = [re.search(r">(\d*)</b>", line)[1] for line in lines]
    return numbers, [re.findall(r'<i class="" style="left: ([\d.]+)%', line) for line in lines]


@in_browser
def test_a_video_says_which_turn_looked_where(tmp_path):
    t = answered(ask(), True, look((0, 0, 9, 9)), look((0, 0, 9, 9)))
    line = record(t)
    frame = thumbnail(picture())
    seconds = [0, 3, 6, 9]
    video = dict(looked=seconds, seconds=12, turns=[[1], [1, 2], [], [2]])
    line["videos"] = [dict(video, shown=[[second, frame] for second in seconds])]
    write_report(tmp_path / "r.html", [line], "t")
    shown, _ = page(tmp_path / "r.html", "at=0.0")
    numbers, places = film(shown)
    assert numbers == ["", "1", "2"]  # what the context showed has no number
    assert places == [["50"], ["0", "25"], ["25", "75"]]
    captions = re.findall("<figcaption.*?</figcaption>", shown)
    told = [" ".join(re.sub("<.*?>", " ", caption).split()) for caption in captions]
    assert told == ["1 0 s", "1,2 3 s", "6 s", "2 9 s"]


@in_browser
def test_a_video_at_which_nobody_looked_is_an_empty_strip(tmp_path):
    line = record(answered(ask(), True))
    line["videos"] = [dict(looked=[], turns=[], seconds=12, shown=[])]
    write_report(tmp_path / "r.html", [line], "t")
    assert film(page(tmp_path / "r.html", "at=0.0")[0]) == ([""], [[]])


@in_browser
def test_two_thousand_trajectories_wait_until_they_are_opened(tmp_path):
    some = [record(hostile(i), i) for i in range(20)]
    frame = some[0]["images"][0]
    some[0]["videos"] = [
        dict(looked=[0.5, 4.5], turns=[[1], [2]], seconds=12, shown=[[4.5, frame]])
    ]
    write_report(tmp_path / "many.html", some * 100, "many")
    shown, count = page(tmp_path / "many.html", "open=1")
    body = shown.split("<main>")[1].split("<script")[0]
    assert count == 2000 and body.count("<details") == 2000
    assert body.count("<article") == 20
    assert body.count("<img") == 20 + 2  # of the groups, and of the opened one
    assert body.count("<section") == 1
    assert "4.5 s</figcaption>" in shown and body.count('<i class="" style="left: ') == 2


@in_browser
@pytest.mark.parametrize("anchor", ["", "open=24"])
def test_nothing_reaches_beyond_the_width_of_a_phone(hostile_page, anchor):
    """The margin at the right stays empty, however long the words are."""
    pixels = screenshot(hostile_page, anchor, 390, 12_000)
    assert pixels.shape[1] == 390
    background = pixels[0, 0]
    assert (pixels[:, 380:] == background).all()
    assert (pixels[:, 20:370] != background).any(axis=(1, 2)).sum() > 1000  # there is a page
