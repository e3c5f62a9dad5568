"""Evaluation: settings, resuming, processes, scoring alone, one question, and what is no score."""

import base64
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from data import Sample
from engine.evaluation import Lines
from engine.flags import parse_flags
from engine.report import as_text
from engine.run import LOCKS
from evaluate import EvalConfig, main
from model import load_policy, save_policy, tiny_policy
from rollout import EndReason, Recital, Trajectory, Turn, rollout
from tasks.puzzles import puzzles

ROOT = Path(__file__).parents[1]
MEDIA = ROOT.parent / "shared" / "media"
needs_media = pytest.mark.skipif(not MEDIA.exists(), reason="needs the shared media")
CODE = "plt.imshow([[True]])\nplt.show()\nprint('looked')"
LOOK = f"<code>\n```python\n{CODE}\n```\n</code>"
ANSWER = "<answer>\n\\boxed{red}\n</answer>"


def picture(seed=0, size=(64, 48)):
    values = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint that was taught to look 0 to 2 times and then to say red or blue."""
    folder = tmp_path_factory.mktemp("runs") / "image" / "step_1"
    policy = tiny_policy(folder, [LOOK, ANSWER] * 50)
    samples = []
    for looks in range(3):
        answer = ANSWER.replace("red", "blue") if looks == 1 else ANSWER
        turns = [LOOK] * looks + [answer]
        image = picture(looks)
        samples.append(Sample(str(looks), "Which colour?", "red", images=(image,), turns=turns))
    taught = [t for (t,) in rollout(Recital(policy), samples, 1)]
    optimizer = torch.optim.AdamW(policy.model.parameters(), 3e-3)
    for _ in range(30):
        logprobs, _ = policy.logprobs(taught)
        (-logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_policy(policy, folder)
    settings = {"task": "image", "max_new_tokens": 30}
    (folder.parent / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data file of eight pictures, of two sources."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for i in range(8):
        picture(i).save(folder / f"{i}.png")
        source = ("vstar", "deepeyes")[i % 2]
        row = dict(id=f"row {i}", question="Which colour?", answer="red", data_source=source)
        rows.append(dict(row, image_path=f"{i}.png"))
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


@pytest.fixture(autouse=True)
def undisturbed():
    """main sets what Ctrl-C does, and holds its folder until its process ends."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    LOCKS.clear()


def run(*flags):
    LOCKS.clear()
    main([str(flag) for flag in flags])


def shows(capsys, *flags):
    """What a command prints."""
    capsys.readouterr()
    run(*flags)
    return capsys.readouterr().out


def fails(capsys, *flags):
    """The one line that a wrong command gets."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line and "Loading weights" not in line]
    assert stopped.value.code == 2
    assert len(lines) == 1, error
    assert len(lines[0]) <= 300
    return lines[0]


def settled(*flags):
    """The settings that flags come to."""
    LOCKS.clear()
    config = parse_flags(EvalConfig, [str(flag) for flag in flags])
    evaluate.settle(config)
    return config


def results(folder):
    return json.loads((folder / "results.json").read_text())


def lines(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------ what it leaves
@pytest.fixture(scope="module")
def evaluated(model, rows, tmp_path_factory):
    """The folder of an evaluation of eight rows, four samples of each."""
    out = tmp_path_factory.mktemp("evaluated")
    flags = ["--model", model, "--data", rows, "--k", 4, "--temperature", 1, "--top_k", 0]
    run(*flags, "--out", out)
    return out


def test_lines_are_all_samples_in_order(evaluated):
    places = [(line["index"], line["repeat"]) for line in lines(evaluated)]
    assert places == [(i, repeat) for i in range(8) for repeat in range(4)]
    looked = next(line for line in lines(evaluated) if line["tool_calls"])
    assert looked["turns"][0]["output"].strip() == "looked"
    assert looked["turns"][0]["code"].strip() == CODE
    assert looked["turns"][0]["images"]


def test_results_are_made_of_the_lines(evaluated):
    found = results(evaluated)
    right = np.reshape([line["correct"] for line in lines(evaluated)], (8, 4))
    calls = [line["tool_calls"] for line in lines(evaluated)]
    assert 0 < right.mean() < 1 and any(calls)  # else this test shows nothing
    assert (found["n"], found["k"]) == (8, 4)
    assert found["score"] == pytest.approx(100 * right.mean())
    assert found["avg@k"] == pytest.approx(100 * right.mean())
    assert found["pass@k"] == pytest.approx(100 * right.max(1).mean())
    assert found["scores"]["deepeyes"] == pytest.approx(100 * right[1::2].mean())
    assert list(found["correct"].values()) == pytest.approx(right.mean(1).tolist())
    assert found["tool_calls"] == pytest.approx(np.mean(calls))
    assert sum(found["end_reasons"].values()) == 32
    assert found["errors"] == found["judge_failures"] == 0
    assert found["settings"]["max_new_tokens"] == 30  # as in the checkpoint's training


def test_every_accuracy_has_an_interval(evaluated):
    found = results(evaluated)
    assert set(found["intervals"]) == {"vstar", "deepeyes", "avg@k", "pass@k"}
    low, high = found["intervals"]["pass@k"]
    assert low <= found["pass@k"] <= high
    low, high = found["interval"]
    assert low <= found["score"] <= high
    assert found["intervals"]["avg@k"] == found["interval"]


def test_config_holds_the_settings_versions_and_commit(evaluated, model):
    settings = json.loads((evaluated / "config.json").read_text())
    assert settings["model"] == model and settings["k"] == 4
    assert settings["versions"]["torch"] == version("torch")
    assert "commit" in settings["versions"]


def test_the_policy_and_the_data_are_named_and_the_parts_printed(model, rows, tmp_path, capsys):
    folder = Path(model).parent  # a run's folder stands for its newest step
    flags = ["--data", rows, "--max_new_tokens", 4, "--out", tmp_path]
    shown = shows(capsys, "--model", folder, *flags)
    assert model in shown and rows in shown and "puzzles" in shown.splitlines()[0]
    assert "deepeyes" in shown
    assert (tmp_path / "rollouts.html").exists()
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(model, tmp_path / "run" / "step_10")
    flags[-1] = tmp_path / "newer"
    assert f"{tmp_path}/run/step_10" in shows(capsys, "--model", tmp_path / "run", *flags)


def test_only_a_tiny_policy_is_said_to_know_only_puzzles(model, tmp_path, capsys):
    def greeting(folder):
        capsys.readouterr()
        evaluate.greet(EvalConfig(model=str(folder)), [])
        return capsys.readouterr().out.splitlines()[0]

    larger = json.loads(Path(model, "config.json").read_text())
    larger["text_config"]["hidden_size"] = 3584
    (tmp_path / "config.json").write_text(json.dumps(larger))
    assert "puzzles" in greeting(model)
    assert "puzzles" not in greeting(tmp_path)
    assert "puzzles" not in greeting("Agents-X/PyVision-Image-7B-RL")


# ------------------------------------------------------------------------------ rolling out
def test_sampling_is_a_function_of_the_seed(model):
    policy = load_policy(model)
    samples = puzzles("image", 3, 0, split="heldout")
    config = EvalConfig(k=2, max_new_tokens=30, temperature=2.0, top_k=0)
    first, again, other = [evaluate.evaluate(policy, samples, config, seed) for seed in (0, 0, 1)]
    assert [t.tokens for t in first] == [t.tokens for t in again]
    assert [t.tokens for t in first] != [t.tokens for t in other]
    assert [t.sample.id for t in first] == [s.id for s in samples for _ in range(2)]


def test_a_sample_that_fails_is_recorded_and_the_others_run(model):
    def broken():
        raise KeyError("no such cell")

    images = [picture(0), broken, picture(2), "gone.png"]
    samples = [Sample(str(i), "?", "red", images=(image,)) for i, image in enumerate(images)]
    config = EvalConfig(k=2, max_new_tokens=8, temperature=1.0, top_k=0)
    done = evaluate.evaluate(load_policy(model), samples, config, 0)
    assert [bool(t.turns) for t in done] == [True, True, False, False] * 2
    assert [bool(t.error) for t in done] == [False, False, True, True] * 2
    assert "no such cell" in done[2].error and "gone.png" in done[-1].error


def test_what_raises_in_the_middle_costs_one_sample(model, monkeypatch):
    """Also where it says nothing: what failed has an error, and no turns."""

    def rolls_out(policy, samples, *settings, **others):
        if any(sample.id == "1" for sample in samples):
            raise RuntimeError
        return rollout(policy, samples, *settings, **others)

    monkeypatch.setattr(evaluate, "rollout", rolls_out)
    samples = [Sample(str(i), "?", "red", images=(picture(i),)) for i in range(3)]
    config = EvalConfig(k=2, max_new_tokens=8, temperature=1.0, top_k=0)
    done = evaluate.evaluate(load_policy(model), samples, config, 0)
    assert [t.sample.id for t in done] == ["0", "0", "1", "1", "2", "2"]
    assert [bool(t.error) for t in done] == [False] * 2 + [True] * 2 + [False] * 2
    assert done[2].end_reason is EndReason.ERROR_IN_ACTION


def test_slow_answers_as_fast_does(model, rows, tmp_path):
    flags = ["--model", model, "--data", rows, "--temperature", 0]
    run(*flags, "--out", tmp_path / "fast")
    run(*flags, "--out", tmp_path / "slow", "--slow")
    said = {}
    for name in ("fast", "slow"):
        turns = [line["turns"] for line in lines(tmp_path / name)]
        said[name] = [[turn["text"] for turn in one] for one in turns]
    assert said["fast"] == said["slow"]


# ------------------------------------------------------------------------------ what is no score
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max_context", 10], "--max_context"),
        (["--max_images", 0], "--max_images"),
    ],
)
def test_a_setting_that_fails_for_every_sample_is_no_score(
    model, rows, tmp_path, capsys, flags, words
):
    told = fails(capsys, "--model", model, "--data", rows, "--out", tmp_path, *flags)
    assert words in told
    assert not (tmp_path / "results.json").exists()


def test_pictures_that_can_all_not_be_read_are_no_score_and_are_tried_again(
    model, rows, tmp_path, capsys
):
    data = tmp_path / "rows.json"
    shutil.copytree(Path(rows).parent, tmp_path, dirs_exist_ok=True)
    whole = {file: file.read_bytes() for file in tmp_path.glob("*.png")}
    for file, content in whole.items():
        file.write_bytes(content[:2000])  # whose header is right
    flags = ["--model", model, "--data", data, "--out", tmp_path / "out", "--max_new_tokens", 4]
    assert "0.png" in fails(capsys, *flags)
    for file, content in whole.items():
        file.write_bytes(content)
    run(*flags)
    assert results(tmp_path / "out")["errors"] == 0


def test_one_picture_that_cannot_be_read_is_counted(model, rows, tmp_path):
    shutil.copytree(Path(rows).parent, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "3.png"
    file.write_bytes(file.read_bytes()[:2000])
    data = tmp_path / "rows.json"
    run("--model", model, "--data", data, "--out", tmp_path / "out", "--max_new_tokens", 4)
    found = results(tmp_path / "out")
    assert found["errors"] == 1 and "3.png" in found["first_error"]


# ------------------------------------------------------------------------------ going on
@pytest.mark.parametrize("held", [8, 10])  # lines: to the end of a batch, or into the next one
def test_an_interrupted_evaluation_goes_on_as_if_it_had_not_been(model, rows, tmp_path, held):
    flags = ["--model", model, "--data", rows, "--k", 2, "--batch_size", 8, "--temperature", 1]
    run(*flags, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    texts = (tmp_path / "whole" / "rollouts.jsonl").read_text().splitlines(keepends=True)
    texts[0] = texts[0].replace('"question": "Which colour?"', '"question": "not run again"')
    (tmp_path / "cut" / "rollouts.jsonl").write_text("".join(texts[:held]) + texts[held][:70])
    run(*flags, "--out", tmp_path / "cut")
    whole = lines(tmp_path / "whole")
    cut = lines(tmp_path / "cut")
    assert cut[0].pop("question") == "not run again"
    assert whole[0].pop("question")
    assert cut == whole
    assert results(tmp_path / "cut")["correct"] == results(tmp_path / "whole")["correct"]


def test_a_line_may_be_cut_anywhere(evaluated, tmp_path):
    """It is dropped, and the next ones stand on lines of their own."""
    first, second, third = lines(evaluated)[:3]
    file = tmp_path / "rollouts.jsonl"
    text = json.dumps(second)
    ends = [match.end() for match in re.finditer("[}\\]]", text)]
    for end in (0, 1, *ends[:-1], len(text) - 1):
        file.write_text(as_text([first]) + text[:end])
        state = Lines(file)
        assert state.in_order() == [first]
        state.add([third])
        assert lines(tmp_path) == [first, third]
    file.write_text(as_text([third, first]) + text)  # only its end of line is missing
    assert Lines(file).in_order() == [first, second, third]


def test_other_settings_do_not_mix_with_an_evaluation(model, rows, tmp_path, capsys):
    flags = ["--model", model, "--data", rows, "--out", tmp_path, "--max_new_tokens", 4]
    run(*flags)
    before = (tmp_path / "rollouts.jsonl").read_text()
    told = fails(capsys, *flags, "--seed", 17, "--no_tools")
    assert all(word in told for word in ("seed", "17", "no_tools", "--out"))
    assert "delete" not in told and "max_turns" not in told
    assert (tmp_path / "rollouts.jsonl").read_text() == before
    assert "max_new_tokens" in fails(capsys, *flags[:-1], 5)
    run(*flags, "--batch_size", 3)  # this one may change
    assert (tmp_path / "rollouts.jsonl").read_text() == before


def test_weights_that_were_written_again_are_another_model(model, rows, tmp_path, capsys):
    shutil.copytree(Path(model).parent, tmp_path / "run")
    step = tmp_path / "run" / "step_1"
    flags = ["--model", step, "--data", rows, "--out", tmp_path / "o", "--max_new_tokens", 4]
    os.utime(step, (10, 10))
    run(*flags)
    os.utime(step, (1000, 1000))
    assert "model" in fails(capsys, *flags)


def test_other_versions_and_another_commit_may_go_on(model, rows, tmp_path):
    flags = ["--model", model, "--data", rows, "--out", tmp_path, "--max_new_tokens", 4]
    run(*flags)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["versions"] = {"torch": "1.0", "commit": "abc"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    run(*flags)
    assert json.loads((tmp_path / "config.json").read_text())["versions"]["torch"] != "1.0"


def test_two_evaluations_in_one_folder_at_once_are_refused(model, rows, tmp_path, capsys):
    flags = ["--model", model, "--data", rows, "--out", tmp_path, "--max_new_tokens", 4]
    run(*flags)
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])  # the first one still holds the folder
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


# ------------------------------------------------------------------------------ processes
# A process that ends at the third time that lists are gathered: in the second round.
DIES = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import evaluate
from engine import parallel
gather, times = parallel.gather, []
def dies(items):
    times.append(1)
    return gather(items) if len(times) < 3 else os._exit(3)
parallel.gather = dies
evaluate.main()
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def by_one(model, rows, tmp_path_factory):
    """Flags, and the folder of what one process makes of them."""
    out = tmp_path_factory.mktemp("by_one")
    flags = ["--model", model, "--data", rows, "--temperature", "1", "--batch_size", "2"]
    flags += ["--top_k", "0"]
    run(*flags, "--out", out)
    return flags, out


def test_two_processes_do_what_one_does(by_one, tmp_path):
    flags, one = by_one
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun.append(f"--master_port={free_port()}")
    command = [*torchrun, ROOT / "evaluate.py", *flags, "--out", tmp_path]
    subprocess.run(command, check=True, timeout=300)
    assert lines(tmp_path) == lines(one)
    assert results(tmp_path)["draws"] == results(one)["draws"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path.name for path in one.iterdir()}
    assert {"config.json", "results.json", "rollouts.html", "rollouts.jsonl"} <= left


def test_where_a_process_dies_the_other_ends_and_one_alone_goes_on(by_one, tmp_path):
    flags, one = by_one
    flags = [*flags, "--out", str(tmp_path)]
    there = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    commands = [[sys.executable, ROOT / "evaluate.py", *flags]]
    commands.append([sys.executable, "-c", DIES, str(ROOT), *flags])
    started = []
    for rank, command in enumerate(commands):
        place = dict(there, RANK=str(rank), LOCAL_RANK=str(rank))
        pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, env=place, **pipes))
    first, second = started
    _, told = first.communicate(timeout=200)
    second.communicate(timeout=200)
    told = [line for line in told.splitlines() if line.startswith("evaluate.py")]
    assert (first.returncode, second.returncode) == (1, 3)
    assert len(told) == 1 and "the same command goes on" in told[0]
    assert not (tmp_path / "results.json").exists()
    assert [line["index"] for line in lines(tmp_path)] == [0, 1, 2, 3]  # one round of two batches
    run(*flags)
    assert lines(tmp_path) == lines(one)


# ------------------------------------------------------------------------------ the settings
def make_run(model, age, name, **settings):
    """A folder under runs/ that looks like a run's."""
    step = Path("runs", name, "step_1")
    shutil.copytree(model, step)
    os.utime(step, (100 - age, 100 - age))
    usual = {"task": "image", "max_new_tokens": 4, "data": "", "frames": "", "difficulty": ""}
    (step.parent / "config.json").write_text(json.dumps({**usual, **settings}))


def chosen(*flags):
    return Path(settled("--questions", 1, "--out", "-".join(["out", *flags]), *flags).model).parts[
        1
    ]


def test_the_newest_checkpoint_that_fits_is_found(model, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "train.py --task image`" in fails(capsys, "--questions", 2)
    make_run(model, 3, "older")
    make_run(model, 2, "both", task="image,video")
    make_run(model, 1, "frames", task="video", frames="8")
    make_run(model, 0, "of_data", data="rl.json")
    (tmp_path / "runs" / "cold_start").mkdir()
    (tmp_path / "runs" / "cold_start" / "config.json").write_text("half a fi")
    assert chosen("--task", "video") == "both"
    assert chosen() == "both"
    assert chosen("--task", "image,video") == "both"
    assert chosen("--task", "video", "--frames", "8") == "frames"
    assert chosen("--data", rows) == "of_data"  # which does not fit puzzles
    assert "train.py --task video --frames 9`" in fails(capsys, "--task", "video", "--frames", 9)


def test_puzzles_are_as_difficult_as_in_the_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(model, 0, "hard", difficulty='{"hint": 0.5}')
    shown = shows(capsys, "--questions", 2)
    (folder,) = tmp_path.glob("runs/eval-image-*")
    assert str(folder.relative_to(tmp_path)) in shown
    assert results(folder)["settings"]["model"] == "runs/hard/step_1"
    assert results(folder)["settings"]["difficulty"] == '{"hint": 0.5}'
    assert len(lines(folder)) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "gone.json"], "gone.json"),
        (["--benchmark", "nosuch"], "nosuch"),
        (["--benchmark", "vstar", "--data", "gone"], "gone"),
        (["--compare", "a.json", "b.json"], "a.json"),
        (["--compare", "a.json"], "a.json"),
        (["--ask", "What?"], "--ask"),
        (["--ask", "What?", "gone.jpg"], "gone.jpg"),
        (["--ask", "What?", "gone.mp4"], "gone.mp4"),
        (["--frames", "many"], "many"),
        (["--frames", "..fps"], "..fps"),
        (["--task", "imgae"], "imgae"),
        (["--difficulty", "{"], "--difficulty"),
        (["--difficulty", '{"hints": 1}'], "hints"),
        (["--difficulty", '{"hint": "a"}'], "--difficulty"),
        (["--difficulty", '{"kinds": ["x"]}'], "--difficulty"),
        (["--k", "0"], "--k"),
        (["--batch_size", "0"], "--batch_size"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top_p", "0"], "--top_p"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--out", "file/x"], "file/x"),
        (["--model", "empty"], "empty"),
        (["--model", "gone"], "gone"),
        (["--prompt_template", "gone.json"], "gone.json"),
        (["--judge", "ftp://there", "--judge_model", "m"], "ftp://there"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unloadable").mkdir()
    (tmp_path / "unloadable" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    monkeypatch.setattr(evaluate, "load_policy", lambda name: pytest.fail("it was loaded"))
    if "--model" not in flags:
        flags = [*flags, "--model", "unloadable"]
    assert words in fails(capsys, "--questions", "1", *flags)


@needs_media
def test_pictures_and_videos_are_sampled_as_in_the_paper(model, rows, tmp_path):
    video = MEDIA / "real_video_val_dataset.json"

    def sampling(*flags):
        name = re.sub(r"\W+", "-", " ".join(map(str, flags)))[-40:]
        config = settled("--model", model, *flags, "--out", tmp_path / name)
        return config.temperature, config.top_k

    assert sampling("--data", rows) == (0.5, 20)
    assert sampling("--data", video) == (0.01, 0)
    assert sampling("--data", video, "--temperature", "0.7") == (0.7, 0)
    assert sampling("--ask", "What?", MEDIA / "photo_tour.mp4") == (0.01, 0)
    assert sampling("--ask", "What?", MEDIA / "coffee.png") == (0.5, 20)
    assert sampling("--questions", 1) == (1.0, 0)


# ------------------------------------------------------------------------------ answers alone
COLOURS = "What color?\n(A) red\n(B) blue\n(C) gold\n(D) gray"
SIDES = "Left or right?\n(A) It is left.\n(B) It is right."


@pytest.fixture
def vstar(tmp_path):
    """The published layout, five rows, without the pictures."""
    questions = [("direct_attributes", COLOURS, label) for label in "BCA"]
    questions += [("relative_position", SIDES, label) for label in "AB"]
    rows = []
    for i, (category, text, label) in enumerate(questions):
        row = dict(image=f"{category}/sa_{i}.jpg", text=text, category=category, label=label)
        rows.append(json.dumps(dict(row, question_id=str(i))) + "\n")
    (tmp_path / "vstar").mkdir()
    (tmp_path / "vstar" / "test_questions.jsonl").write_text("".join(rows))
    return str(tmp_path / "vstar")


def predict(folder, *answers):
    """Flags that score these answers in this folder."""
    folder.mkdir()
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps({"prediction": answer}) + "\n" for answer in answers))
    return ["--predictions", str(file), "--out", str(folder)]


def test_predictions_are_scored_without_a_model_and_compared(vstar, tmp_path, capsys):
    for name, answers in (("a", "BCAAA"), ("b", "BAAAB")):
        flags = ["--benchmark", "vstar", "--data", vstar, *predict(tmp_path / name, *answers)]
        assert "88.7" in shows(capsys, *flags)  # the paper's figure stands beside ours
    a = results(tmp_path / "a")
    b = results(tmp_path / "b")
    assert (a["score"], a["n"], a["k"]) == (80, 5, 1)
    assert a["scores"]["relative_position"] == 50
    assert b["scores"]["direct_attributes"] == pytest.approx(200 / 3)
    assert b["score"] == 80
    assert [line["correct"] for line in lines(tmp_path / "b")] == [1, 0, 1, 1, 1]
    files = [tmp_path / name / "results.json" for name in "ab"]
    shown = shows(capsys, "--compare", *files)
    found = re.search(r"([-+.\d]+) points.*\[([-+.\d]+), ([-+.\d]+)\]", shown).groups()
    difference, low, high = map(float, found)
    assert difference == 0 and low < 0 < high
    assert re.findall(r"(\d): A ([01]), B ([01])", shown) == [("1", "1", "0"), ("4", "0", "1")]


def test_predictions_for_a_data_file(rows, tmp_path):
    answers = ["red", "The answer is \\boxed{red}", "blue"]
    answers += ["<answer>\\boxed{Red}</answer>"] * 5
    run("--data", rows, *predict(tmp_path / "x", *answers))
    assert results(tmp_path / "x")["score"] == pytest.approx(100 * 7 / 8)


def test_no_answer_at_all_is_a_score_of_predictions(rows, tmp_path):
    run("--data", rows, *predict(tmp_path / "x", *[""] * 8))
    assert results(tmp_path / "x")["score"] == 0


@pytest.fixture
def hrbench(tmp_path):
    """One question in four forms: "red" is right, with another letter each, in a table."""
    file = io.BytesIO()
    picture().save(file, "PNG")
    cells = base64.b64encode(file.getvalue()).decode()
    table = ["index question answer category A B C D cycle_category image".split()]
    for i in range(4):
        options = np.roll(["red", "b", "c", "d"], i)
        table.append([str(i), "Which colour?", "ABCD"[i], "single", *options, str(i), cells])
    text = "".join("\t".join(row) + "\n" for row in table)
    (tmp_path / "hr_bench_4k.tsv").write_text(text)
    return tmp_path


def test_a_benchmark_with_pictures_in_its_table(model, hrbench, capsys):
    out = hrbench / "out"
    flags = ["--model", model, "--benchmark", "hrbench-4k", "--data", hrbench, "--k", 2]
    assert "78.1" in shows(capsys, *flags, "--out", out)
    found = results(out)
    said = [line["answer"] == "red" for line in lines(out)]
    assert any(said)
    assert [line["correct"] for line in lines(out)] == said
    assert found["score"] == pytest.approx(100 * np.mean(said))
    assert found["errors"] == 0
    score = round(found["score"], 2)
    assert found["interval"] == [score, score]  # one question: always drawn whole
    settings = found["settings"]
    assert (settings["temperature"], settings["top_k"]) == (0.5, 20)
    assert (settings["max_turns"], settings["max_context"]) == (30, 32_768)


# ------------------------------------------------------------------------------ the judge
class Yes(http.server.BaseHTTPRequestHandler):
    """A judge that says 1 to everything."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        said = {"index": 0, "finish_reason": "stop"}
        said["message"] = {"role": "assistant", "content": "1"}
        reply = {"id": "0", "created": 0, "model": "m", "system_fingerprint": "", "choices": [said]}
        reply["usage"] = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        pass


def test_the_judge_decides_what_the_rule_cannot_and_may_be_down(rows, tmp_path, capsys):
    answers = ["red"] * 4 + ["a warm colour of long waves"] * 4
    flags = ["--data", rows, "--judge_model", "m"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags += ["--judge", f"http://127.0.0.1:{server.server_port}/v1"]
        up = shows(capsys, *flags, *predict(tmp_path / "up", *answers))
        server.shutdown()
    found = results(tmp_path / "up")
    assert (found["score"], found["undecided"], found["judge_failures"]) == (100, 0, 0)
    assert "warning" not in up
    down = shows(capsys, *flags, *predict(tmp_path / "down", *answers))
    found = results(tmp_path / "down")
    assert (found["score"], found["undecided"], found["judge_failures"]) == (50, 0.5, 4)
    assert down.index("warning") < down.index("this run")  # said at the start


# ------------------------------------------------------------------------------ one question
def test_ask_prints_the_turns_as_they_come_and_no_accuracy(model, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    picture(size=(80, 60)).save(photo)
    question = "What is written on the sign?"
    for _ in range(2):  # asking again runs again
        shown = shows(capsys, "--model", model, "--ask", question, photo, "--out", tmp_path / "o")
        (line,) = lines(tmp_path / "o")
        places = [shown.index(turn["text"].strip()) for turn in line["turns"]]
        assert places == sorted(places) and places
    assert line["question"] == question and line["correct"] is None
    assert question in (tmp_path / "o" / "rollouts.html").read_text()
    assert model in shown.splitlines()[0] and "puzzles" in shown.splitlines()[0]
    assert "accuracy" not in shown.lower() and "%" not in shown and "right" not in shown
    assert not (tmp_path / "o" / "results.json").exists()


def test_a_turn_shows_its_words_then_what_came_back(capsys):
    """And nothing that a policy writes steers the terminal."""
    title = "\x1b]0;taken\x07"
    t = Trajectory(Sample("0", "?", ""))
    t.turns = [Turn(LOOK + title, CODE, "it was seen" + title, None, [picture()], seconds_tool=1.0)]
    evaluate.show(t)
    words, back = capsys.readouterr().out.split("came back")
    assert "turn 1" in words and CODE in words
    assert "figures: 1" in back and "it was seen" in back
    assert "\x1b" not in words + back and "\x07" not in words + back


@pytest.mark.parametrize("name", ["broken.png", "broken.JPG", "broken.webp", "broken.tiff"])
def test_a_broken_picture_is_said_to_be_one(model, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"\x89PNG nothing more")
    told = fails(capsys, "--model", model, "--ask", "What?", tmp_path / name)
    assert name in told and "image" in told and "video" not in told


@needs_media
@pytest.mark.parametrize("name", ["film.mp4", "film.mpg", "film"])
def test_a_film_is_one_by_its_content(model, tmp_path, name):
    shutil.copy(MEDIA / "photo_tour.mp4", tmp_path / name)
    flags = ["--model", model, "--ask", "What?", tmp_path / name, "--max_new_tokens", 4]
    run(*flags, "--out", tmp_path / "o")
    (line,) = lines(tmp_path / "o")
    assert len(line["videos"]) == 1 and not line["images"]


@pytest.mark.parametrize("name", ["film.mp4", "film.mpg", "notes.txt", "nothing"])
def test_what_is_neither_picture_nor_film_is_said(model, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"nothing more")
    assert name in fails(capsys, "--model", model, "--ask", "What?", tmp_path / name)


# ------------------------------------------------------------------------------ videos
@needs_media
def test_uniform_frames_are_in_the_context_and_counted(model, tmp_path):
    data = MEDIA / "real_video_val_dataset.json"
    flags = ["--model", model, "--data", data, "--frames", 6, "--max_new_tokens", 4]
    run(*flags, "--out", tmp_path)
    found = results(tmp_path)
    first = lines(tmp_path)[0]
    assert (found["frames_looked_at"], found["tool_calls"]) == (6, 0)
    assert found["visual_tokens"] >= 6 and first["visual_tokens"] >= 6
    (strip,) = first["videos"]
    assert strip["looked"] == [1, 3, 5, 7, 9, 11]
    assert len(strip["shown"]) == 6


# ------------------------------------------------------------------ in transformers' own hands
def test_a_checkpoint_works_in_transformers_own_pipeline(model):
    """AutoProcessor wants torchvision, which is not needed here otherwise."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor, pipeline

    image = picture(size=(448, 336))
    theirs = AutoProcessor.from_pretrained(model).image_processor(images=[image])
    _, grid = load_policy(model).pixels([image])
    assert np.array_equal(theirs["image_grid_thw"], grid)
    question = {"type": "text", "text": "Which colour?"}
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
    told = pipeline("image-text-to-text", model=model)(text=chat, max_new_tokens=20)
    reply = told[0]["generated_text"][-1]
    assert reply["role"] == "assistant" and "boxed" in reply["content"]
