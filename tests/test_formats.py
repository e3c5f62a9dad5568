"""What people really have: pictures as they see them, and rows as the field publishes them."""

import base64
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_data import MEDIA, images_of, needs_media, text_of, video

from data import DataError, Sample, image_size, load, open_image, rgb, video_info
from engine.prompt import messages

ORIENTATION = 0x0112
RED = (255, 0, 0)
WHITE = (255, 255, 255)


@pytest.fixture
def folder(tmp_path):
    """A folder with a red and a blue picture of different sizes."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    Image.new("RGB", (32, 16), "blue").save(tmp_path / "blue.png")
    return tmp_path


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def data_of(path):
    return path.read_bytes()


def colours(sample):
    """What one sees in the middle of each picture of a sample."""
    seen = []
    for picture in sample.images:
        image = open_image(picture)
        seen.append(image.getpixel((image.width // 2, image.height // 2)))
    return seen


def error_of(path):
    """The message of a file that cannot be loaded: one line of at most 300 characters."""
    with pytest.raises(DataError) as error:
        load(path)
    message = str(error.value)
    assert len(message) < 300 and "\n" not in message
    return message


# Pixels are what people see


def corners():
    """An upright picture with another colour in each corner, and twice as wide as high."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = (250, 10, 10)
    pixels[:16, 32:] = (10, 250, 10)
    pixels[16:, :32] = (10, 10, 250)
    return Image.fromarray(pixels)


STORED = {  # how a camera with this orientation stores an upright picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_and_their_header_says_so(tmp_path, suffix, orientation):
    upright = corners()
    method = STORED[orientation]
    stored = upright.transpose(method) if method is not None else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif)
    seen = open_image(path)
    assert seen.size == (64, 32) == image_size(path)
    difference = np.asarray(seen, float) - np.asarray(upright, float)
    assert np.abs(difference[4:12, 4:28]).max() < 40  # inside a corner, where JPEG is exact enough
    assert np.abs(difference[20:28, 4:28]).max() < 40
    assert np.abs(difference[4:12, 36:60]).max() < 40


def test_reading_a_header_decodes_no_pixels(tmp_path):
    path = tmp_path / "half.png"
    Image.effect_noise((300, 200), 90).save(path)
    path.write_bytes(data_of(path)[:20_000])
    assert image_size(path) == (300, 200)
    with pytest.raises(DataError, match="half.png"):
        open_image(path)


def test_header_and_pixels_agree_where_the_orientation_follows_the_pixels(tmp_path):
    path = tmp_path / "late.png"
    corners().save(path)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    block = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    data = data_of(path)
    end = data.rfind(b"IEND") - 4
    path.write_bytes(data[:end] + chunk + data[end:])
    assert open_image(path).size == image_size(path)


def test_a_damaged_exif_block_changes_nothing(tmp_path):
    path = tmp_path / "a.jpg"
    for block in (
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\5\0",
    ):
        corners().save(path, exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert open_image(path).size == image_size(path) == (64, 32)


@pytest.mark.parametrize(
    "values, kind, greys",
    [
        ([0, 32768, 65535], np.uint16, [0, 128, 255]),
        ([0, 2048, 4095], np.uint16, [0, 128, 255]),  # 12 bits in 16
        ([0, 100, 255], np.uint16, [0, 100, 255]),
        ([0, 2**30, 2**31 - 1], np.int32, [0, 128, 255]),
        ([0, 77, 77], np.int32, [0, 77, 77]),
        ([-1000, 0, 4095], np.int32, [0, 50, 255]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([0, 0.25, 0.5], np.float32, [0, 64, 128]),
        ([0, 0.6, 1.2], np.float32, [0, 128, 255]),  # a filter that went beyond 1
        ([0, 100, 255], np.float32, [0, 100, 255]),
        ([0, 500, 1000], np.float32, [0, 128, 255]),
        ([np.nan, 0.5, np.inf], np.float32, [0, 128, 0]),
    ],
)
def test_deep_pictures_are_scaled_and_not_clipped(tmp_path, values, kind, greys):
    picture = Image.fromarray(np.array([values], kind))
    path = tmp_path / ("a.png" if kind is np.uint16 else "a.tiff")
    picture.save(path)
    for image in (rgb(picture), open_image(path)):
        seen = np.asarray(image)[0]
        assert image.mode == "RGB"
        assert seen[:, 0].tolist() == pytest.approx(greys, abs=1)
        assert (seen[:, 0] == seen[:, 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa", "La"])
def test_transparent_parts_are_white(mode):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        picture = picture.quantize(4)
    elif mode == "La":
        picture = picture.convert("LA").convert("La")
    else:
        picture = picture.convert(mode)
    seen = rgb(picture)
    assert seen.getpixel((1, 1)) == (0, 0, 0)
    assert seen.getpixel((6, 6)) == WHITE


def test_a_colour_that_stands_for_transparent_is_white(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png", transparency=RED)
    assert open_image(tmp_path / "a.png").getpixel((1, 1)) == WHITE


def test_nothing_but_pixels_is_passed_on(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("label", "the answer is red")
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), RED).save(path, pnginfo=notes)
    assert "label" in Image.open(path).info
    seen = open_image(path)
    assert seen.info == {} and not hasattr(seen, "text")
    assert open_image(Image.open(path)).info == {}


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_used_with_one_notice(tmp_path, capsys, suffix):
    first = Image.new("RGB", (16, 8), "blue")
    path = tmp_path / f"moves.{suffix}"
    first.save(path, save_all=True, append_images=[Image.new("RGB", (16, 8), "red")], lossless=True)
    for _ in range(3):
        assert image_size(path) == (16, 8)
        assert open_image(path).getpixel((1, 1)) == (0, 0, 255)
    notices = capsys.readouterr().err.splitlines()
    assert [path.name in notice for notice in notices] == [True]
    assert open_image(first).size == (16, 8) and not capsys.readouterr().err


def test_the_function_that_makes_pictures_rgb_runs_on_its_own():
    import inspect

    space = {"Image": Image}
    exec(inspect.getsource(rgb), space)
    assert space["rgb"](Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == WHITE


# Nothing that one row holds ends a run


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (400, 2), (2, 400)])
def test_a_picture_that_is_too_thin_is_named_with_its_row(folder, size):
    Image.new("RGB", size).save(folder / "thin.png")
    rows = [
        {"question": "?", "answer": "a", "image_path": name} for name in ("red.png", "thin.png")
    ]
    message = error_of(write(folder / "rows.json", rows))
    assert "row 2" in message and "image_path" in message and "thin.png" in message
    Image.new("RGB", (398, 2)).save(folder / "thin.png")
    assert len(load(folder / "rows.json")) == 2


ROW = {"question": "What colour?", "answer": "red", "image_path": "red.png"}
HALF = "half \ud83d of a character"


@pytest.mark.parametrize(
    "change, field",
    [
        ({"question": HALF}, "question"),
        ({"answer": HALF}, "answer"),
        ({"id": HALF}, "id"),
        ({"data_source": HALF}, "data_source"),
        ({"turns": ["<answer>a</answer>", HALF]}, "turns"),
        ({"prompt": [{"role": "user", "content": f"<image>{HALF}"}]}, "prompt"),
        ({"answer": float("nan")}, "answer"),
        ({"question": float("nan")}, "question"),
        ({"answer": "<answer> </answer>"}, "answer"),
        ({"image_path": "x" * 5000}, "image_path"),
        ({"image_path": ["red.png", None]}, "image_path"),
        ({"image_path": "a\nb.png"}, "image_path"),
        ({"image_path": "a\0b.png"}, "image_path"),
        ({"image_path": "https://example.com/a.png"}, "image_path"),
        ({"image_path": {"bytes": None, "path": None}}, "image_path"),
        ({"images": ["blue.png"]}, "images"),  # beside image_path
        ({"image": "blue.png"}, "image"),
        ({"question": "<image> like <image>?"}, "2 <image> marks for 1 images"),
        ({"question": "<video> What?"}, "1 <video> marks for 0 videos"),
        ({"prompt": [{"role": "user", "content": "<image><video>?"}]}, "1 <video> marks"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"conversations": "hello"}, "conversations"),
        ({"conversations": []}, "conversations"),
        ({"conversations": [{"from": "gpt", "value": "Red."}]}, "conversations"),
    ],
)
def test_what_a_row_cannot_be_is_named(folder, change, field):
    message = error_of(write(folder / "rows.json", [ROW, ROW | change]))
    assert f"{folder / 'rows.json'}, row 2: " in message and field in message


def test_a_backslash_is_no_half_character(folder):
    text = r"Is \udf a macro, and \ud800 too? 😀"
    assert load(write(folder / "rows.json", [ROW | {"question": text}]))[0].question == text


@pytest.mark.parametrize(
    "name, codec, rate",
    [
        ("a.flv", "flv1", 10),
        ("a.wmv", "wmv2", 10),
        ("a.avi", "mpeg4", 10),
        ("a.mov", "libx264", 10),
        ("vp9.mp4", "libvpx-vp9", 10),
        ("a.mp4", "libx264", 24),
    ],
)
def test_the_frame_rate_is_that_of_the_frames(tmp_path, name, codec, rate):
    path = video(tmp_path / name, 30, (320, 240), rate, codec)
    info = video_info(path)
    assert (info["frames"], info["fps"]) == (30, pytest.approx(rate, abs=0.01))
    assert "variable rate" not in text_of(messages(Sample("0", "?", "1", videos=(str(path),))))


def test_a_variable_frame_rate_is_said_to_be_variable(tmp_path):
    stamps = [10 * k * k for k in range(31)]  # 9 seconds, ever slower
    path = video(tmp_path / "variable.mp4", 31, (320, 240), stamps=stamps)
    text = text_of(messages(Sample("0", "?", "1", videos=(str(path),))))
    decord = pytest.importorskip("decord")
    session = decord.VideoReader(str(path)).get_avg_fps()
    assert "variable" in text and "3.333 fps on average" in text and f"{session:.4g}" in text


def test_a_video_without_times_is_named_with_its_row(folder):
    video(folder / "a.mpg", 50, (320, 240), 25, "mpeg2video")
    rows = [ROW, {"question": "?", "answer": "a", "video_path": "a.mpg"}]
    message = error_of(write(folder / "rows.json", rows))
    assert "row 2" in message and "a.mpg" in message and "frame rate" in message


@pytest.mark.parametrize(
    "name, codec, container",
    [("a.ts", "libx264", "mpegts"), ("av1.mp4", "libsvtav1", "av1"), ("a.gif", "gif", "gif")],
)
def test_what_decord_cannot_read_is_blamed_on_decord(folder, name, codec, container):
    try:
        video(folder / name, 30, (320, 240), codec=codec)
    except ValueError:  # this PyAV has no such encoder, or gif wants other pixels
        pytest.skip(f"{codec} cannot be written here")
    finally:  # as root the AV1 encoder takes all processors for the thread that calls it
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    rows = [{"question": "?", "answer": "a", "video_path": name}]
    message = error_of(write(folder / "rows.json", rows))
    assert name in message and "decord" in message and container in message and "ffmpeg" in message
    assert "cut short" not in message


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json.gz", "a.xlsx"])
def test_a_format_that_is_not_read_says_which_are(folder, name):
    (folder / name).write_bytes(b"\x1f\x8b\x08\0,id,question\n")
    message = error_of(folder / name)
    assert name in message and ".jsonl" in message and ".parquet" in message


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 and not much more PAR1"])
def test_a_broken_table_is_named(folder, content):
    pytest.importorskip("pyarrow")
    (folder / "broken.parquet").write_bytes(content)
    assert "broken.parquet" in error_of(folder / "broken.parquet")


def test_a_table_without_pyarrow_says_what_to_install(folder, monkeypatch):
    (folder / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error_of(folder / "rows.parquet")


# Rows as the field publishes them


def pictures(folder):
    """Ways in which a row holds the red picture."""
    data = data_of(folder / "red.png")
    text = base64.b64encode(data).decode()
    return {
        "path": "red.png",
        "absolute": str(folder / "red.png"),
        "address": f"file://{folder / 'red.png'}",
        "base64": text,
        "data uri": f"data:image/png;base64,{text}",
        "lines": "\n".join(text[k : k + 76] for k in range(0, len(text), 76)),
        "path in object": {"path": "red.png"},
        "image in object": {"image": "red.png"},
        "bytes": data,
        "bytes in object": {"bytes": data, "path": None},
        "bytes with a name": {"bytes": data, "path": "gone.png"},
    }


@pytest.mark.parametrize(
    "kind",
    [
        "path",
        "absolute",
        "address",
        "base64",
        "data uri",
        "lines",
        "path in object",
        "image in object",
        "bytes",
        "bytes in object",
        "bytes with a name",
    ],
)
@pytest.mark.parametrize("field", ["image", "images", "image_path"])
def test_pictures_in_every_form(folder, kind, field):
    picture = pictures(folder)[kind]
    row = {"question": "What colour?", "answer": "red"}
    for value in (picture, [picture]):
        path = write_parquet(folder / "rows.parquet", [row | {field: value}])
        assert colours(load(path)[0]) == [RED]
        if "bytes" not in kind:
            path = write(folder / "rows.json", [row | {field: value}])
            assert colours(load(path)[0]) == [RED]


def verl_row(data, number=0):
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": "<image>What colour is it?"}],
        "images": [{"bytes": data, "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "red"},
        "extra_info": {"split": "train", "index": number, "answer": "", "question": None},
    }


def test_rows_of_verl_and_deepeyes(folder):
    data = data_of(folder / "red.png")
    rows = [verl_row(data, number) for number in range(3)]
    for row in rows[1:]:
        row["prompt"] = [{"role": "system", "content": "Zoom."}, *row["prompt"]]
    samples = load(write_parquet(folder / "train.parquet", rows))
    assert [sample.id for sample in samples] == ["0", "1", "2"]
    assert samples[1].prompt == rows[1]["prompt"] and samples[1].answer == "red"
    assert samples[0].data_source == "hiyouga/geometry3k" and samples[0].ability == "math"
    for sample in samples:
        assert colours(sample) == [RED]
        assert images_of(messages(sample)) == 1
        direct = messages(sample, tools=False)  # there is no question but that of the prompt
        assert images_of(direct) == 1
        assert text_of(direct).endswith("Question: What colour is it?")


def test_rows_of_easyr1(folder):
    data = data_of(folder / "blue.png")
    row = {
        "images": [{"bytes": data, "path": "a.png"}],
        "problem": "<image>Which?",
        "answer": "blue",
    }
    sample = load(write_parquet(folder / "train.parquet", [row]))[0]
    assert colours(sample) == [(0, 0, 255)] and sample.answer == "blue" and sample.prompt is None
    assert images_of(messages(sample)) == 1 and text_of(messages(sample)).endswith(": Which?")


def test_a_row_with_its_own_prompt_and_no_question_works_without_tools(folder):
    content = "<image_clue_0><image></image_clue_0>\nWhat colour?"
    row = {"prompt": [{"role": "user", "content": content}], "answer": "red", "images": ["red.png"]}
    sample = load(write(folder / "rows.json", [row]))[0]
    assert text_of(messages(sample)) == content
    direct = messages(sample, tools=False)
    assert images_of(direct) == 1 and text_of(direct).endswith("Question: What colour?")


def test_a_prompt_may_hold_an_example(folder):
    texts = ["2 + 2?", "<answer>4</answer>", "<image>What colour?"]
    roles = ["user", "assistant", "user"]
    prompt = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    row = {"prompt": prompt, "answer": "red", "images": ["red.png"]}
    sample = load(write(folder / "rows.json", [row]))[0]
    assert (sample.prompt, sample.turns, sample.answer) == (prompt, None, "red")
    assert [message["role"] for message in messages(sample)] == roles
    assert text_of(messages(sample, tools=False)).endswith("Question: What colour?")


def test_marks_become_names_where_they_stand_between_words(folder):
    row = {
        "question": "<image>Is <image> like it?",
        "answer": "no",
        "images": ["red.png", "blue.png"],
    }
    sample = load(write(folder / "rows.json", [row]))[0]
    for tools in (True, False):
        chat = messages(sample, tools=tools)
        assert images_of(chat) == 2 and text_of(chat).endswith("Question: Is image_clue_1 like it?")


def test_video_marks_are_used_up(folder):
    video(folder / "a.mp4", size=(320, 240))
    plain = {"question": "What does <video> show?", "answer": "grey", "videos": ["a.mp4"]}
    own = {
        "prompt": [{"role": "user", "content": "<video>\nWhat?"}],
        "answer": "grey",
        "video": "a.mp4",
    }
    samples = load(write(folder / "rows.json", [plain, own]))
    assert text_of(messages(samples[0])).endswith("Question: What does video_clue_0 show?")
    assert text_of(messages(samples[1])) == "What?"
    assert "<video>" not in text_of(messages(samples[1], tools=False))


@pytest.mark.parametrize(
    "options, asked",
    [
        (["red", "blue"], ["(A) red", "(B) blue"]),
        ({"A": "red", "B": "blue", "C": None}, ["(A) red", "(B) blue"]),
        ([3, 4], ["(A) 3", "(B) 4"]),
        ("A. red B. blue", ["A. red B. blue"]),
    ],
)
@pytest.mark.parametrize("name", ["options", "choices"])
def test_options_beside_the_question_are_asked(folder, name, options, asked):
    row = ROW | {"answer": "A", name: options}
    text = text_of(messages(load(write(folder / "rows.json", [row]))[0]))
    assert all(line in text for line in asked) and "None" not in text


@pytest.mark.parametrize(
    "written, reference",
    [
        ("<answer>\n\\boxed{red}\n</answer>", "red"),
        ("<answer> 3.5 </answer>", "3.5"),
        ("<think>2 or 3?</think><answer>3</answer>", "3"),
        ("\\boxed{\\frac{\\sqrt{2}}{3}}", "\\frac{\\sqrt{2}}{3}"),
        ("so it is \\boxed{5}, in {x}", "5"),
        (" red ", "red"),
        (0, "0"),
        ("a < b", "a < b"),
    ],
)
def test_a_reference_is_unwrapped(folder, written, reference):
    for row in (ROW | {"answer": written}, {**ROW, "answer": "", "solution": written}):
        assert load(write(folder / "rows.json", [row]))[0].answer == reference


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>What colour?"},
        {"from": "gpt", "value": "Red."},
    ],
    "images": ["red.png"],
}
TOOL_LOOP = {
    "messages": [
        {"role": "system", "content": "Use Python on image_clue_0."},
        {"role": "user", "content": "<image>What colour?"},
        {"role": "assistant", "content": "<code>\n```python\nimage_clue_0.show()\n```\n</code>"},
        {"role": "user", "content": "<tool_response><image></tool_response>"},
        {"role": "assistant", "content": "<answer>\n\\boxed{red}\n</answer>"},
    ],
    "images": ["red.png", "blue.png"],
}


def test_conversations_are_questions_and_demonstrations(folder):
    plain, loop = load(write(folder / "rows.json", [SHAREGPT, TOOL_LOOP]))
    assert (plain.question, plain.answer, plain.prompt) == ("<image>What colour?", "Red.", None)
    assert plain.turns == ["<answer>\n\\boxed{Red.}\n</answer>"]
    assert images_of(messages(plain)) == 1 and "Python" in text_of(messages(plain))
    assert loop.answer == "red" and len(loop.turns) == 2 and "```python" in loop.turns[0]
    assert [message["role"] for message in loop.prompt] == ["system", "user"]
    assert colours(loop) == [RED]  # the other picture came from the tool
    assert images_of(messages(loop)) == 1


def test_a_conversation_in_parts_and_an_answer_beside_it(folder):
    parts = [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    row = {"messages": [{"role": "user", "content": parts}], "image": "red.png", "solution": "red"}
    sample = load(write(folder / "rows.json", [row]))[0]
    assert sample.question == "<image>What colour?" and sample.answer == "red"
    assert sample.turns is None
    row = SHAREGPT | {"solution": "crimson"}
    assert load(write(folder / "rows.json", [row]))[0].answer == "crimson"


def test_a_conversation_with_several_questions_is_refused(folder):
    talk = SHAREGPT["conversations"] * 2
    message = error_of(write(folder / "rows.json", [SHAREGPT | {"conversations": talk}]))
    assert "several questions" in message


def test_folders_that_datasets_saved_and_folders_of_parquet(folder):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": Image.new("RGB", (20, 10), "red"), "question": f"{k}?", "answer": "red"}
        for k in range(5)
    ]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(folder / "saved")
    splits = datasets.DatasetDict(train=table, test=table.select([3]))
    splits.save_to_disk(folder / "splits")
    (folder / "hub" / "data").mkdir(parents=True)
    for name, part in splits.items():
        part.to_parquet(folder / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    (folder / "hub" / "README.md").write_text("A dataset.")
    for name in ("saved", "splits", "splits/train", "hub"):
        samples = load(folder / name)
        assert [sample.question for sample in samples] == [f"{k}?" for k in range(5)]
        assert colours(samples[4]) == [RED]
    for name in ("splits/test", "hub/data/test-00000-of-00001.parquet"):
        assert [sample.question for sample in load(folder / name)] == ["3?"]
    (folder / "empty").mkdir()
    assert "empty" in error_of(folder / "empty")


@pytest.mark.parametrize("group", [7, 1000])
def test_pictures_in_a_table_are_read_when_they_are_asked_for(folder, group):
    noise = np.random.default_rng(0).integers(0, 255, (300, 40, 40, 3), np.uint8)
    rows = []
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / "noise.png")
        rows.append(verl_row(data_of(folder / "noise.png"), number))
    path = write_parquet(folder / "train.parquet", rows, row_group_size=group)
    samples = load(path)
    assert len(pickle.dumps(samples)) < path.stat().st_size / 8  # pictures are not in it
    for number in (299, 0, 150, 6, 7):
        assert samples[number].id == str(number)
        assert (np.asarray(open_image(samples[number].images[0])) == noise[number]).all()
    path.unlink()
    with pytest.raises(DataError, match="train.parquet"):
        open_image(samples[20].images[0])


BIG = """
import resource, sys, time
sys.path.insert(0, {root!r})
from data import load, open_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
samples = load({path!r})
open_image(samples[-1].images[0])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(samples), grown, time.process_time())
"""


def test_memory_does_not_grow_with_the_pictures_of_a_table(folder):
    picture = np.random.default_rng(0).bytes(100_000)
    rows = [verl_row(data_of(folder / "red.png") + picture, number) for number in range(3000)]
    path = write_parquet(folder / "big.parquet", rows, compression="none", use_dictionary=False)
    assert path.stat().st_size > 250e6  # in a single row group
    code = BIG.format(root=str(Path(__file__).resolve().parents[1]), path=str(path))
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    count, kibibytes, seconds = out.stdout.split()
    assert int(count) == 3000 and int(kibibytes) < 150_000 and float(seconds) < 20


@needs_media
def test_all_media_in_every_layout(folder):
    """The shared photographs and the video give the same questions from every layout."""
    datasets = pytest.importorskip("datasets")
    rows = []
    for name in ("real_image_val_dataset.json", "real_video_val_dataset.json"):
        rows += json.loads((MEDIA / name).read_text())
    for row in rows:
        for kind in ("image", "video"):
            if f"{kind}_path" in row:
                shutil.copy(MEDIA / row[f"{kind}_path"], folder)
    images = [row for row in rows if "image_path" in row]
    questions = []
    verl = []
    talks = []
    for row in rows:
        kind = "image" if "image_path" in row else "video"
        path = row[f"{kind}_path"]
        asked = f"<{kind}>{row['question']}"
        questions.append({"problem": asked, "answer": row["answer"], f"{kind}s": [path]})
        said = [{"from": "human", "value": asked}, {"from": "gpt", "value": row["answer"]}]
        talks.append({"conversations": said, f"{kind}s": [path]})
        media = [{"bytes": data_of(folder / path), "path": path}] if kind == "image" else [path]
        prompt = [{"role": "user", "content": asked}]
        model = {"ground_truth": row["answer"], "style": "rule"}
        verl.append({"prompt": prompt, "reward_model": model, f"{kind}s": media})
    seen = [
        row | {"image": Image.open(folder / row["image_path"]), "image_path": ""} for row in images
    ]
    datasets.Dataset.from_list(seen).save_to_disk(folder / "saved")
    files = [
        write(folder / "plain.json", rows),
        write(folder / "questions.json", questions),
        write(folder / "talks.json", talks),
        write_parquet(folder / "verl.parquet", verl),
        folder / "saved",
    ]
    for file in files:
        samples = load(file)
        wanted = images if file.name == "saved" else rows
        assert [sample.answer for sample in samples] == [row["answer"] for row in wanted]
        for sample, row in zip(samples, wanted, strict=True):
            assert row["question"] in text_of(messages(sample, tools=False))
            assert images_of(messages(sample)) == len(sample.images)
            if sample.images:
                whole = open_image(folder / row["image_path"])
                assert open_image(sample.images[0]).tobytes() == whole.tobytes()
