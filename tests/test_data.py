"""Data files, good and bad, and the prompts made of them."""

import json
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DataError, Sample, load, open_image, video_info
from engine.prompt import load_templates, messages
from engine.video import uniform_frames

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"
needs_media = pytest.mark.skipif(
    not MEDIA.is_dir(), reason="the shared photographs and videos are not here"
)


@pytest.fixture
def folder(tmp_path):
    """A folder with two small images of different sizes and one that is none."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    Image.new("L", (32, 16)).save(tmp_path / "grey.jpg")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def write(folder, rows, name="rows.json"):
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def video(
    path, frames=30, size=(64, 48), rate=10, codec="libx264", stamps=None, picture=None, **options
):
    """A real video whose frame k is the picture, or has the grey level 8 * k (modulo 256).

    options: of the container.
    """
    av = pytest.importorskip("av")
    if (
        codec == "libvpx-vp9" and "decord" in sys.modules
    ):  # the two bring a libvpx each, and the first one loaded wins
        places = [str(entry) for entry in sys.path]
        code = f"import sys; sys.path[:] = {places}; import test_data as t; "
        code += f"t.video({str(path)!r}, {frames}, {size}, {rate}, {codec!r})"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
        return path
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for k in range(frames):
            grey = np.full((size[1], size[0], 3), 8 * k % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey if picture is None else picture, format="rgb24")
            if stamps:
                stream.codec_context.time_base = frame.time_base = Fraction(1, 1000)
                frame.pts = stamps[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


ROW = {
    "id": "7",
    "question": "What colour?",
    "answer": "red",
    "ability": "search",
    "data_source": "vstar",
    "image_path": "red.png",
}
RL_ROW = {
    "prompt": [
        {"role": "system", "content": "Look."},
        {
            "role": "user",
            "content": "<image_clue_0><image></image_clue_0>\nWhat {query} {{is it}}?",
        },
    ],
    "data_source": "deepeyes",
    "ability": "search",
    "env_name": "pyvision",
    "reward_model": {"ground_truth": "red", "style": "model"},
    "extra_info": {"answer": "red", "index": 3, "question": "What colour?", "split": "train"},
    "mm_hint": {"hint_path": "red.png", "hint_type": "image"},
}


def text_of(chat):
    return "".join(part.get("text", "<image>") for message in chat for part in message["content"])


def images_of(chat):
    return sum(part["type"] == "image" for message in chat for part in message["content"])


@needs_media
def test_the_shared_files_load_as_they_are():
    images, videos = (
        load(MEDIA / "real_image_val_dataset.json"),
        load(str(MEDIA / "real_video_val_dataset.json")),
    )
    assert [len(images), len(videos)] == [5, 3]
    assert images[0].answer == "B" and images[0].data_source == "vstar"
    assert open_image(images[0].images[0]).size == (512, 512)
    assert video_info(videos[0].videos[0]) == dict(width=320, height=240, frames=300, fps=25)
    assert images_of(messages(images[0])) == 1 and images_of(messages(videos[0])) == 0
    with pytest.raises(DataError, match="truncated.mp4"):
        video_info(MEDIA / "truncated.mp4")


def test_validation_rows_rl_rows_and_json_lines_give_the_same_sample(folder):
    plain = load(write(folder, [ROW]))[0]
    lines = load(
        write(
            folder,
            "\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW | {"id": 8}) + "\n",
            "rows.jsonl",
        )
    )
    rl = load(write(folder, [RL_ROW]))[0]
    assert plain == lines[0] and lines[1].id == "8" and isinstance(plain, Sample)
    assert (rl.id, rl.question, rl.answer, rl.images) == ("3", plain.question, "red", plain.images)
    assert rl.prompt == RL_ROW["prompt"] and plain.prompt is None and plain.ability == "search"
    assert open_image(plain.images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_several_images_numbers_as_answers_and_demonstrations(folder):
    row = dict(
        ROW,
        image_path=["red.png", "grey.jpg"],
        answer=0,
        turns=["<code>…</code>", "<answer>…</answer>"],
    )
    sample = load(write(folder, [row]))[0]
    assert [Path(path).name for path in sample.images] == [
        "red.png",
        "grey.jpg",
    ] and sample.answer == "0"
    assert sample.turns == row["turns"]
    two = dict(
        RL_ROW,
        mm_hint={"hint_path": ["red.png", "grey.jpg"], "hint_type": "image"},
        prompt=[{"role": "user", "content": "<image><image> same?"}],
    )
    assert images_of(messages(load(write(folder, [two]))[0])) == 2
    assert load(write(folder, [dict(RL_ROW, answer="")]))[0].answer == "red"
    no_id = {key: value for key, value in ROW.items() if key != "id"}
    assert [sample.id for sample in load(write(folder, [no_id, no_id]))] == ["0", "1"]


def drop(row, key):
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    "row, names",
    [
        (drop(ROW, "answer"), "answer"),
        (dict(ROW, answer=""), "answer"),
        (dict(ROW, answer=None), "answer"),
        (dict(ROW, answer=["red"]), "answer"),
        (drop(ROW, "question"), "question"),
        (dict(ROW, question=" "), "question"),
        (drop(ROW, "image_path"), "image_path"),
        (dict(ROW, image_path="none.png"), "none.png"),
        (dict(ROW, image_path="text.png"), "text.png"),
        (dict(ROW, image_path=3), "image path"),
        (dict(ROW, image_path=["red.png", ""]), "image path"),
        (dict(ROW, image_path=""), "image_path"),
        (dict(ROW, video_path="none.mp4"), "none.mp4"),
        (dict(ROW, turns="answer"), "turns"),
        ("a string", "object"),
        (dict(RL_ROW, reward_model={}, extra_info={}), "answer"),
        (dict(RL_ROW, mm_hint=None), "mm_hint"),
        (dict(RL_ROW, mm_hint={"hint_path": "red.png", "hint_type": "sound"}), "hint_type"),
        (dict(RL_ROW, prompt=[]), "prompt"),
        (dict(RL_ROW, prompt=[{"role": "user"}]), "prompt"),
        (dict(RL_ROW, prompt="What?"), "prompt"),
        (dict(RL_ROW, prompt=["What?"]), "prompt"),
        (
            dict(RL_ROW, prompt=[{"role": "user", "content": "no mark"}]),
            "0 <image> marks for 1 images",
        ),
        (
            dict(RL_ROW, prompt=[{"role": "user", "content": "<image> <image>"}]),
            "2 <image> marks for 1 images",
        ),
    ],
)
def test_a_bad_row_is_named_in_one_line(folder, row, names):
    for path, number in (
        (write(folder, [ROW, RL_ROW, row]), 3),
        (write(folder, json.dumps(ROW) + "\n\n" + json.dumps(row), "rows.jsonl"), 3),
    ):
        with pytest.raises(DataError) as error:
            load(path)
        message = str(error.value)
        assert f"{path}, row {number}: " in message and names in message and "\n" not in message


@pytest.mark.parametrize(
    "text, says",
    [
        ("[{]", "line 1 is"),
        ("[\n{},\n{]", "line 3 is"),
        ('{"id": 1}\n{"id": ', "line 2 is"),
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("\n \n", "has no rows"),
        ("[" * 5000, "line 1 is"),
        ("\udcff", "line 1 is"),
        ("id,question\n1,What?", "line 1 is"),
    ],
)
def test_a_bad_file_is_named(folder, text, says):
    path = folder / "rows.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {says}")


def test_a_file_that_is_not_there(folder):
    for path in (folder / "none.json", folder):
        with pytest.raises(DataError, match=str(path)):
            load(path)


def test_an_image_that_breaks_while_it_is_decoded(folder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    noise.save(folder / "whole.jpg")
    noise.save(folder / "bad.png")
    data = bytearray((folder / "bad.png").read_bytes())
    data[data.rfind(b"IDAT")] = 7  # PIL says SyntaxError to this
    (folder / "bad.png").write_bytes(data)
    with pytest.raises(DataError, match="bad.png"):
        open_image(folder / "bad.png")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:9000])
    sample = load(write(folder, [dict(ROW, image_path="half.jpg")]))[0]  # its header is whole
    with pytest.raises(DataError, match="half.jpg"):
        open_image(sample.images[0])


def test_images_of_every_mode_become_rgb(folder):
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        Image.new(mode, (8, 8)).save(folder / "x.tiff")
        assert open_image(folder / "x.tiff").mode == "RGB"
    assert open_image(Image.new("RGBA", (3, 2))).size == (3, 2)


def test_the_agent_prompt_says_everything_and_is_short(folder):
    chat = messages(load(write(folder, [dict(ROW, question="Is {this} <image> it?")]))[0])
    text = text_of(chat)
    for fact in (
        "image_clue_0",
        "width 64",
        "height 48",
        "print()",
        "plt.show()",
        "<code>\n```python\n",
        "```\n</code>",
        "<answer>\n\\boxed{",
        "}\n</answer>",
        "Is {this} image_clue_0 it?",
    ):
        assert fact in text
    assert (
        text.startswith("<image_clue_0><image></image_clue_0>")
        and images_of(chat) == 1
        and len(text) < 900
    )
    assert all(part["type"] in ("text", "image") for message in chat for part in message["content"])
    two = text_of(
        messages(Sample("0", "Same?", "yes", (Image.new("RGB", (5, 6)), Image.new("RGB", (7, 8)))))
    )
    assert (
        "<image_clue_1><image></image_clue_1>" in two
        and "image_clue_1 (PIL image, width 7, height 8)" in two
    )


def test_a_video_is_described_and_not_shown(tmp_path):
    sample = Sample("0", "How many?", "4", videos=(str(video(tmp_path / "a.mp4")),))
    text = text_of(messages(sample))
    for fact in (
        "video_clue_0",
        "VideoReader",
        "width 64",
        "height 48",
        "30 frames",
        "10 fps",
        "plt.show()",
    ):
        assert fact in text
    assert images_of(messages(sample)) == 0 and len(text) < 900
    both = messages(Sample("0", "?", "4", (Image.new("RGB", (5, 6)),), sample.videos))
    assert images_of(both) == 1 and "height 6), video_clue_0 (" in text_of(both)


def test_without_tools_nothing_is_said_of_python(folder):
    sample = load(write(folder, [RL_ROW]))[0]
    text = text_of(messages(sample, tools=False))
    assert (
        "ython" not in text
        and "<code>" not in text
        and "What colour?" in text
        and "\\boxed{" in text
    )
    assert images_of(messages(sample, tools=False)) == 1


def test_a_rows_own_prompt_is_kept_letter_by_letter(folder):
    chat = messages(load(write(folder, [RL_ROW]))[0], templates={"image": "{query}"})
    assert [message["role"] for message in chat] == ["system", "user"]
    assert [text_of([message]) for message in chat] == [
        message["content"] for message in RL_ROW["prompt"]
    ]
    assert images_of(chat) == 1


def test_templates_fill_each_field_once_and_leave_other_braces(folder):
    path = write(
        folder,
        {
            "image": "{image_info}; {width}x{height} \\frac{1}{2} {{x}} {query}",
            "video": "{video_info} {query}",
            "direct": "{query}",
            "ecd": "chart <image> {query}",
        },
        "templates.json",
    )
    templates = load_templates(path)
    sample = load(write(folder, [dict(ROW, question="{width} <image> {{?}}")]))[0]
    text = text_of(messages(sample, templates))
    assert text.startswith("<image_clue_0><image></image_clue_0>\nimage_clue_0 (")
    assert images_of(messages(sample, templates)) == 1
    assert text.endswith("; 64x48 \\frac{1}{2} {x} {width} image_clue_0 {{?}}")
    assert text_of(messages(sample, templates, tools=False)).endswith(
        "</image_clue_0>\n{width} image_clue_0 {{?}}"
    )
    sample.data_source = "ecd"  # a template of its own, with its own mark
    assert text_of(messages(sample, templates)).startswith("chart <image> ")
    only = load_templates(write(folder, {"any_name": "Q: {query}"}, "one.json"))
    assert text_of(messages(sample, only)).endswith("Q: {width} image_clue_0 {{?}}")
    with pytest.raises(DataError, match="image"):
        messages(sample, {"video": "{query}", "direct": "{query}"})
    with pytest.raises(DataError, match="marks"):
        messages(sample, {"image": "<image> <image> {query}"})


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"image": 3}', '{"image": "no query"}', "{", '["{query}"]']
)
def test_bad_templates_are_named(folder, content):
    with pytest.raises(DataError, match="templates.json"):
        load_templates(write(folder, content, "templates.json"))


@pytest.mark.parametrize(
    "name, size, frames, codec",
    [
        ("a.mp4", (64, 48), 30, "libx264"),
        ("a.mkv", (64, 48), 30, "libx264"),
        ("a.webm", (64, 48), 30, "libvpx-vp9"),
        ("portrait.mp4", (48, 64), 30, "libx264"),
        ("one.mp4", (64, 48), 1, "libx264"),
    ],
)
def test_containers_and_shapes(tmp_path, name, size, frames, codec):
    path = video(tmp_path / name, frames, size, codec=codec)
    assert video_info(path) == dict(width=size[0], height=size[1], frames=frames, fps=10)
    seconds, images = uniform_frames(Sample("0", "?", "1", videos=(path,)), "1fps")
    assert len(images) == max(1, frames // 10) and all(image.size == size for image in images)


def turned(path, corner):
    """The video as a telephone stores it: lying on its side, with a matrix that turns it."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, corner << 16, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("width, height", [(320, 240), (640, 360), (176, 144)])
def test_a_telephone_s_portrait_video_stands_upright(tmp_path, width, height):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 255  # the left half is white: upright, the upper half
    path = turned(video(tmp_path / "a.mp4", size=(width, height), picture=pixels), height)
    sample = Sample("0", "?", "1", videos=(str(path),))
    assert f"width {height}, height {width}, 30 frames" in text_of(messages(sample))
    frame = uniform_frames(sample, 1)[1][0]
    assert frame.size == (height, width)
    values = np.asarray(frame.convert("L"), float)
    assert values[: width // 2 - 8].mean() > 240 and values[width // 2 + 8 :].mean() < 15


def test_broken_videos_are_named_with_their_row(folder):
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"no video",
        "image.mp4": (folder / "red.png").read_bytes(),
    }
    for name, options in (
        ("end.mp4", {}),
        ("start.mp4", {"movflags": "faststart"}),
        ("cut.mkv", {}),
        ("cut.webm", {}),
    ):
        whole = video(
            folder / name, 300, codec="libx264" if name != "cut.webm" else "libvpx-vp9", **options
        )
        contents[name] = whole.read_bytes()[
            : whole.stat().st_size * 2 // 3
        ]  # where the index lies decides what is left
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            load(write(folder, [ROW, dict(drop(ROW, "image_path"), video_path=name)]))
        assert (
            "row 2" in str(error.value)
            and name in str(error.value)
            and "\n" not in str(error.value)
        )


def test_the_hint_of_an_rl_row_can_be_a_video(folder):
    video(folder / "whole.mp4")
    hint = dict(drop(RL_ROW, "prompt"), mm_hint={"hint_path": ["whole.mp4"], "hint_type": "video"})
    sample = load(write(folder, [hint]))[0]
    assert sample.videos == (str(folder / "whole.mp4"),) and sample.images == ()


def test_uniform_frames_lie_in_the_middle_of_equal_parts(tmp_path):
    sample = Sample("0", "?", "1", (Image.new("RGB", (5, 5)),), (video(tmp_path / "a.mkv"),))
    seconds, images = uniform_frames(sample, 3)
    assert (
        seconds == pytest.approx([0.5, 1.5, 2.5], abs=0.06)
        and len(images) == 4
        and images[0].size == (5, 5)
    )
    levels = [np.asarray(image).mean() for image in images[1:]]
    assert levels == pytest.approx(
        [8 * round(10 * second) for second in seconds], abs=4
    )  # the right frames
    chat = messages(sample, frames=seconds)
    assert (
        images_of(chat) == 4
        and f"{seconds[1]:.1f} s <image>" in text_of(chat)
        and "ython" not in text_of(chat)
    )
    assert len(uniform_frames(sample, 1000)[0]) == 30  # no frame twice
    assert len(uniform_frames(sample, "2fps")[0]) == 6


def test_a_variable_frame_rate_is_sampled_in_time(tmp_path):
    path = video(
        tmp_path / "variable.mkv", 31, stamps=[10 * k * k for k in range(31)]
    )  # 9 s, ever slower
    assert video_info(path)["fps"] == pytest.approx(31 / 9, rel=0.05)  # the header says 10
    seconds, _ = uniform_frames(Sample("0", "?", "1", videos=(path,)), "1fps")
    assert len(seconds) == 9 and np.diff(seconds) == pytest.approx(np.ones(8), abs=0.7)
