"""Flags, intervals, resuming, scoring alone, one question, and a report that hostile output cannot take over."""
import base64
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from data import Sample
from evaluate import EvalConfig, bootstrap, interval, main, parse_flags, record, write_report
from model import load_policy, save_policy, tiny_policy
from rollout import EndReason, Script, Trajectory, Turn, rollout
from tasks.benchmarks import BENCHMARKS, PLAIN, Row
from tasks.puzzles import puzzles

ROOT = Path(__file__).parents[1]
MEDIA = ROOT.parent / "shared" / "media"
LOOK = "<code>\n```python\nplt.imshow([[True]])\nplt.show()\nprint('looked')\n```\n</code>"
ANSWER = "<answer>\n\\boxed{red}\n</answer>"
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"><!--<script>"


def picture(seed=0, size=(64, 48)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint that was taught to look 0 to 2 times and then to say red or blue."""
    folder = tmp_path_factory.mktemp("runs") / "image" / "step_1"
    policy = tiny_policy(folder, [LOOK, ANSWER] * 50)
    taught = [Sample(str(i), "Which colour?", "red", images=(picture(i),), turns=[LOOK] * i + [
        ANSWER.replace("red", ("red", "blue")[i % 2])]) for i in range(3)]
    taught = [group[0] for group in rollout(Script(policy, taught), taught, 1)]
    optimizer = torch.optim.AdamW(policy.model.parameters(), 3e-3)
    for _ in range(30):
        (-policy.logprobs(taught)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_policy(policy, folder)
    (folder.parent / "config.json").write_text(json.dumps({"task": "image", "max_new_tokens": 30}, indent=1))
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for i in range(8):
        picture(i).save(folder / f"{i}.png")
    (folder / "rows.json").write_text(json.dumps([
        {"id": f"row {i}", "question": "Which colour?", "answer": "red", "image_path": f"{i}.png",
         "data_source": ("vstar", "deepeyes")[i % 2]} for i in range(8)]))
    return str(folder / "rows.json")


def run(*flags, capsys=None):
    main([str(flag) for flag in flags])
    return capsys.readouterr().out if capsys else None


def fails(capsys, *flags):
    """The one line that a wrong command gets."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def lines(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ intervals
def test_intervals_are_those_of_the_mean():
    samples = [Sample(str(i), "?", "a", data_source="ab"[i % 2]) for i in range(200)]
    scores = [[float(i % 4 < 2) for i in range(200)]]
    found = bootstrap(PLAIN.summary, samples, scores)
    assert interval(bootstrap(PLAIN.summary, samples[:5], [[1, 1, 1, 1, 1]])["scores"]["b"]) == [100, 100]
    low, high = interval(found["score"])
    assert found["score"][0] == 50 and abs(high - low - 2 * 1.96 * 100 * (0.25 / 200) ** 0.5) < 1.5 and low < 50 < high
    assert found["scores"]["a"][0] == 50
    # 4 samples of each question that all agree are no more evidence than one
    repeated = interval(bootstrap(PLAIN.summary, samples, scores * 4)["score"])
    assert abs((repeated[1] - repeated[0]) - (high - low)) < 1


@pytest.mark.parametrize("name, meta", [
    ("dynamath", lambda unit, form: {"subject": "x", "level": 1}), ("hrbench-4k", lambda unit, form: {
        "category": "single", "cycle_category": form}), ("wemath", lambda unit, form: {
            "ID": str(unit), "key": "2steps_" + ("1", "2", "multi")[form % 3]})])
def test_rows_that_are_one_question_are_drawn_together(name, meta):
    forms = 3
    rows = [Row(f"{i}-{v}", "?", "a", meta=meta(i, v), unit=str(i)) for i in range(40) for v in range(forms)]
    found = bootstrap(BENCHMARKS[name].summary, rows, [[float(i // forms < 20) for i in range(len(rows))]])
    low, high = interval(found["score"])
    assert found["score"][0] == 50 and 25 < high - low < 36     # of 40 questions; of 120 rows it would be 18
    if name == "dynamath":
        assert (found["scores"]["average"] == found["score"]).all()
        assert np.allclose(found["scores"]["worst case"], found["score"])       # each draw, in which seeds come twice


# ------------------------------------------------------------------------------------------------ evaluating
def test_evaluate_in_memory_leaves_the_generator_alone(model):
    policy, limits = load_policy(model), dict(k=2, batch_size=4, max_new_tokens=30, temperature=2.0)
    samples = puzzles("image", 3, 0, split="heldout")
    before = policy.generator.get_state()
    first, again = (evaluate.evaluate(policy, samples, **limits) for _ in range(2))
    assert (policy.generator.get_state() == before).all()
    assert [t.tokens for t in first] == [t.tokens for t in again]
    assert [t.sample.id for t in first] == [s.id for s in samples for _ in range(2)]
    other = evaluate.evaluate(policy, samples, **limits, seed=1)
    assert [t.tokens for t in other] != [t.tokens for t in first]
    assert all(t.correct in (True, False) and t.visual_tokens for t in first)       # scored


def test_what_an_evaluation_leaves(model, rows, tmp_path, capsys):
    shown = run("--model", model, "--data", rows, "--k", 4, "--out", tmp_path, "--temperature", 1, "--top_k", 0,
                capsys=capsys)
    found, rollouts = results(tmp_path), lines(tmp_path)
    assert [(line["index"], line["repeat"]) for line in rollouts] == [(i, r) for i in range(8) for r in range(4)]
    right = np.reshape([line["correct"] for line in rollouts], (8, 4))
    assert 0 < right.mean() < 1 and any(line["tool_calls"] for line in rollouts)      # else this test shows nothing
    assert found["n"] == 8 and found["k"] == 4 and found["settings"]["max_new_tokens"] == 30
    assert found["score"] == pytest.approx(found["avg@k"]) == pytest.approx(100 * right.mean())
    assert found["pass@k"] == pytest.approx(100 * right.max(1).mean())
    assert found["interval"][0] <= found["score"] <= found["interval"][1]
    assert found["scores"]["deepeyes"] == pytest.approx(100 * right[1::2].mean())
    assert set(found["intervals"]) == {"vstar", "deepeyes", "avg@k", "pass@k"}      # on every accuracy
    low, high = found["intervals"]["pass@k"]
    assert low <= found["pass@k"] <= high and found["intervals"]["avg@k"] == found["interval"]
    assert found["tool_calls"] == pytest.approx(np.mean([line["tool_calls"] for line in rollouts]))
    assert sum(found["end_reasons"].values()) == 32 and found["errors"] == found["judge_failures"] == 0
    assert list(found["correct"].values()) == pytest.approx(right.mean(1).tolist())
    assert "deepeyes" in shown and (tmp_path / "rollouts.html").exists()
    looked = next(line for line in rollouts if line["turns"][0]["images"])
    assert looked["turns"][0]["output"].strip() == "looked" and looked["turns"][0]["code"] in LOOK


def test_an_interrupted_evaluation_goes_on(model, rows, tmp_path):
    flags = ["--model", model, "--data", rows, "--k", 2, "--batch_size", 4, "--temperature", 1, "--max_new_tokens", 20]
    run(*flags, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    texts = (tmp_path / "whole" / "rollouts.jsonl").read_text().splitlines(keepends=True)
    marked = texts[0].replace('"question": "Which colour?"', '"question": "not run again"')
    (tmp_path / "cut" / "rollouts.jsonl").write_text(marked + "".join(texts[1:8]) + texts[8][:70])
    run(*flags, "--out", tmp_path / "cut")
    whole, cut = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    assert cut[0].pop("question") == "not run again" and whole[0].pop("question")
    assert cut == whole and results(tmp_path / "cut")["correct"] == results(tmp_path / "whole")["correct"]


def test_other_settings_do_not_mix_with_a_run(model, rows, tmp_path, capsys):
    flags = ["--model", model, "--data", rows, "--out", tmp_path, "--max_new_tokens", 4]
    run(*flags)
    before = (tmp_path / "rollouts.jsonl").read_text()
    assert "other settings" in fails(capsys, *flags, "--seed", 1)
    assert (tmp_path / "rollouts.jsonl").read_text() == before
    run(*flags, "--batch_size", 3)                              # this one may change


def test_processes_share_the_work_and_one_that_dies_ends_the_other(model, rows, tmp_path, monkeypatch):
    flags = ["--model", model, "--data", rows, "--temperature", "0", "--max_new_tokens", "20"]
    run(*flags, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    subprocess.run([*torchrun, ROOT / "evaluate.py", *flags, "--out", tmp_path / "two"], check=True, timeout=300)
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "config.json", "results.json", "rollouts.html", "rollouts.jsonl"]

    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, str(value))                    # this process is the first of two, the other one dies
    dies = "import os, torch.distributed as dist; dist.init_process_group('gloo'); os._exit(0)"
    other = subprocess.Popen([sys.executable, "-c", dies], env=dict(os.environ, RANK="1"))
    with pytest.raises(SystemExit, match="goes on"):
        run(*flags, "--out", tmp_path / "half")
    torch.distributed.destroy_process_group()
    assert other.wait(60) == 0 and not (tmp_path / "half" / "results.json").exists()
    assert [line["index"] for line in lines(tmp_path / "half")] == [0, 2, 4, 6]
    monkeypatch.setenv("WORLD_SIZE", "1")
    run(*flags, "--out", tmp_path / "half")                     # the same command goes on, with fewer processes too
    assert lines(tmp_path / "half") == lines(tmp_path / "one")


def test_a_sample_that_fails_is_recorded_and_the_others_run(model):
    def broken():
        raise KeyError("no such cell")
    samples = [Sample(str(i), "?", "red", images=(picture(i),)) for i in range(3)]
    samples[1].images = (broken,)
    samples.append(Sample("gone", "?", "red", images=("gone.png",)))
    done = evaluate.evaluate(load_policy(model), samples, k=2, max_new_tokens=8)
    assert ["no such cell" in (t.error or "") for t in done] == [False] * 2 + [True] * 2 + [False] * 4
    assert [bool(t.turns) for t in done] == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2
    assert not done[2].correct and "gone.png" in done[-1].error
    assert record(done[2])["error"] == done[2].error


def test_the_newest_checkpoint_that_fits_is_found(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "train.py --task image`" in fails(capsys, "--questions", 2)
    for age, (name, settings) in enumerate([
            ("image", {}), ("of_data", {"data": "rl.json"}), ("both", {"task": "image,video"}),
            ("frames", {"task": "video", "frames": "8"}), ("hard", {"task": "image", "difficulty": '{"hint": 0.5}'})]):
        shutil.copytree(model, tmp_path / "runs" / name / "step_1")
        os.utime(tmp_path / "runs" / name / "step_1", (9 - age, 9 - age))
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(
            {"task": "image", "max_new_tokens": 4, "data": "", "frames": "", "difficulty": "", **settings}))
    (tmp_path / "runs" / "cold_start").mkdir()
    (tmp_path / "runs" / "cold_start" / "config.json").write_text("half a fi")

    def chosen(*flags):
        config = parse_flags(EvalConfig, [*flags, "--questions", "1", "--out", str(tmp_path / "-".join(flags))])
        evaluate.settle(config)
        return Path(config.model).parent.name
    assert chosen() == "image" and chosen("--task", "video") == "both"
    assert chosen("--task", "video", "--frames", "8") == "frames"
    assert "train.py --task video --frames 9`" in fails(capsys, "--task", "video", "--frames", "9")
    os.utime(tmp_path / "runs" / "hard" / "step_1", (99, 99))
    shown = run("--questions", 2, capsys=capsys)
    folder = tmp_path / re.search(r"(\S+)/rollouts.html", shown)[1]
    assert results(folder)["settings"]["model"] == "runs/hard/step_1" and len(lines(folder)) == 2
    assert results(folder)["settings"]["difficulty"] == '{"hint": 0.5}'              # as that run was trained


@pytest.mark.parametrize("flags, words", [
    (["--data", "gone.json"], "gone.json"), (["--benchmark", "nosuch"], "nosuch"),
    (["--benchmark", "vstar", "--data", "gone"], "gone"), (["--compare", "a.json", "b.json"], "a.json"),
    (["--compare", "a.json"], "a.json"), (["--ask", "What?"], "--ask"), (["--ask", "What?", "gone.jpg"], "gone.jpg"),
    (["--frames", "many"], "many"), (["--task", "imgae"], "imgae: choose"), (["--difficulty", "{"], "--difficulty"),
    (["--k", "0"], "--k"), (["--out", "file/x"], "file/x"),
    (["--model", "empty"], "empty"), (["--prompt_template", "gone.json"], "gone.json")])
def test_bad_input_is_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    if "--model" not in flags:                                  # an existing folder that is never looked into
        flags = flags + ["--model", "empty"]
    assert words in fails(capsys, "--questions", "1", *flags)


# ------------------------------------------------------------------------------------------------ answers alone
@pytest.fixture
def vstar(tmp_path):
    """The published layout, five rows, without the pictures."""
    rows = [("direct_attributes", "What color?\n(A) red\n(B) blue\n(C) gold\n(D) gray", label) for label in "BCA"]
    rows += [("relative_position", "Left or right?\n(A) It is left.\n(B) It is right.", label) for label in "AB"]
    (tmp_path / "vstar").mkdir()
    (tmp_path / "vstar" / "test_questions.jsonl").write_text("".join(json.dumps(
        {"image": f"{category}/sa_{i}.jpg", "text": text, "category": category, "label": label, "question_id": str(i)})
        + "\n" for i, (category, text, label) in enumerate(rows)))
    return str(tmp_path / "vstar")


def predict(folder, *answers):
    folder.mkdir()
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps({"prediction": answer}) + "\n" for answer in answers))
    return ["--predictions", str(file), "--out", str(folder)]


def test_predictions_are_scored_without_a_model_and_compared(vstar, tmp_path, capsys):
    for name, answers in (("a", "BCAAA"), ("b", "BAAAB")):
        shown = run("--benchmark", "vstar", "--data", vstar, *predict(tmp_path / name, *answers), capsys=capsys)
        assert "88.7" in shown                                  # the paper's figure stands beside ours
    a, b = results(tmp_path / "a"), results(tmp_path / "b")
    assert (a["score"], a["n"], a["k"]) == (80, 5, 1) and a["scores"]["relative_position"] == 50
    assert b["scores"]["direct_attributes"] == pytest.approx(200 / 3) and b["score"] == 80
    assert [line["correct"] for line in lines(tmp_path / "b")] == [1, 0, 1, 1, 1]
    shown = run("--compare", tmp_path / "a" / "results.json", tmp_path / "b" / "results.json", capsys=capsys)
    difference, low, high = map(float, re.search(r"([-+.\d]+) points.*\[([-+.\d]+), ([-+.\d]+)\]", shown).groups())
    assert difference == 0 and low < 0 < high
    assert re.findall(r"(\d): A ([01]), B ([01])", shown) == [("1", "1", "0"), ("4", "0", "1")]


def test_predictions_for_a_data_file(rows, tmp_path):
    answers = ["red", "The answer is \\boxed{red}", "blue", *["<answer>\\boxed{Red}</answer>"] * 5]
    run("--data", rows, *predict(tmp_path / "x", *answers))
    assert results(tmp_path / "x")["score"] == pytest.approx(100 * 7 / 8)


def test_a_benchmark_with_pictures_in_its_table(model, tmp_path, capsys):
    file = io.BytesIO()
    picture().save(file, "PNG")
    cells = base64.b64encode(file.getvalue()).decode()
    header = "index question answer category A B C D cycle_category image".split()
    rows = [[str(i), "Which colour?", "ABCD"[i], "single", *np.roll(["red", "b", "c", "d"], i), str(i), cells]
            for i in range(4)]                                  # "red" is the right option, with another letter each
    (tmp_path / "hr_bench_4k.tsv").write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
    shown = run("--model", model, "--benchmark", "hrbench-4k", "--data", tmp_path, "--k", 2, "--out", tmp_path / "out",
                capsys=capsys)
    found, rollouts = results(tmp_path / "out"), lines(tmp_path / "out")
    assert found["settings"]["temperature"] == 0.5 and found["settings"]["top_k"] == 20 and "78.1" in shown
    said = [line["answer"] == "red" for line in rollouts]
    assert [line["correct"] for line in rollouts] == said and any(said)
    assert found["score"] == pytest.approx(100 * np.mean(said)) and found["errors"] == 0
    assert found["interval"] == [round(found["score"], 2)] * 2  # one question in four forms: always drawn whole
    assert found["settings"]["max_turns"] == 30 and found["settings"]["max_context"] == 2**15


class Yes(http.server.BaseHTTPRequestHandler):
    """A judge that says 1 to everything."""
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        reply = json.dumps({"id": "0", "created": 0, "model": "m", "system_fingerprint": "", "usage": {
            "completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}, "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "1"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def test_the_judge_decides_what_the_rule_cannot_and_may_be_down(rows, tmp_path):
    answers = ["red"] * 4 + ["a warm colour of long waves"] * 4
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v1"
        run("--data", rows, "--judge", address, "--judge_model", "m", *predict(tmp_path / "up", *answers))
        server.shutdown()
    assert results(tmp_path / "up")["score"] == 100 and results(tmp_path / "up")["judge_failures"] == 0
    run("--data", rows, "--judge", address, "--judge_model", "m", *predict(tmp_path / "down", *answers))
    assert results(tmp_path / "down")["score"] == 50 and results(tmp_path / "down")["judge_failures"] == 4


# ------------------------------------------------------------------------------------------------ one question
def test_ask_prints_the_turns_and_writes_the_report(model, tmp_path, capsys):
    picture(size=(80, 60)).save(tmp_path / "photo.jpg")
    for _ in range(2):                                          # asking again runs again
        shown = run("--model", model, "--ask", "What is written on the sign?", tmp_path / "photo.jpg",
                    "--out", tmp_path / "o", capsys=capsys)
        (line,) = lines(tmp_path / "o")
        assert [turn["text"] in shown for turn in line["turns"]] == [True] * len(line["turns"]) and "turn 1" in shown
    assert line["question"] == "What is written on the sign?" and line["correct"] is None
    assert "What is written on the sign?" in (tmp_path / "o" / "rollouts.html").read_text()


# ------------------------------------------------------------------------------------------------ videos
@pytest.mark.skipif(not MEDIA.exists(), reason="needs the shared media")
def test_a_video_line_says_where_it_was_looked_at(model, tmp_path):
    sample = Sample("v", "?", "4", videos=(str(MEDIA / "photo_tour.mp4"),))             # 12 s at 25 fps
    t = Trajectory(sample, turns=[Turn(frames=[(0, 0), (0, 10), (0, 100)]), Turn(frames=[(0, 100), (0, 250)])])
    t.turns[1].frames += [(0, -1), (0, 10**9), (7, 0)]          # no frames: what runs in a sandbox can say anything
    line = record(t)
    (strip,) = line["videos"]
    assert (strip["looked"], strip["seconds"]) == ([0, 0.4, 4, 10], 12)
    assert [second for second, _ in strip["shown"]] == strip["looked"]
    assert len({uri for _, uri in strip["shown"]}) == 4 and max(map(len, line["images"]), default=0) == 0
    assert (line["frames_looked_at"], line["seconds_covered"]) == (4, 3)
    run("--model", model, "--data", MEDIA / "real_video_val_dataset.json", "--frames", 6, "--out", tmp_path,
        "--max_new_tokens", 4)
    found, (first, *_) = results(tmp_path), lines(tmp_path)
    assert found["frames_looked_at"] == 6 and found["tool_calls"] == 0 and found["visual_tokens"] >= 6
    (strip,) = first["videos"]
    assert strip["looked"] == [1, 3, 5, 7, 9, 11] and len(strip["shown"]) == 6 and first["visual_tokens"] >= 6
    many = record(Trajectory(sample, turns=[Turn(frames=[(0, k) for k in range(300)])]))    # it looked everywhere
    (strip,) = many["videos"]
    assert len(strip["looked"]) == 300 and len(strip["shown"]) == 12 and many["seconds_covered"] == 12


# ------------------------------------------------------------------------------------------------ the report
def hostile(i):
    """Every text that a policy or a data file can write holds markup."""
    turn = Turn(f"turn {HOSTILE}", f"code {HOSTILE}", f"output {HOSTILE}", None, [picture(i, (40, 30))])
    sample = Sample(f"{i} {HOSTILE}", f"question {i} {HOSTILE}", f"reference {HOSTILE}", (0,), data_source=HOSTILE)
    turns = [turn] * (i % 3) + [Turn(ANSWER + f" needle{i}.")]
    t = Trajectory(sample, images=[picture(i)], prompt_images=1, turns=turns)
    t.answer, t.correct, t.n_tool_calls, t.error = f"answer {HOSTILE}", i % 4 == 0, i % 3, HOSTILE
    t.reward, t.end_reason = t.correct * (1 + 0.1 * t.n_tool_calls), list(EndReason)[1 + i % 2]
    return t


def page(path, anchor=""):
    """The page as it is after its script ran, and the number of trajectories it says it shows."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000",
             f"--user-data-dir={path.parent}/chromium", "--dump-dom"]
    shown = subprocess.run(["chromium", *flags, f"file://{path}#{anchor}"], capture_output=True, text=True,
                           timeout=120).stdout
    return shown, int(re.search(r"<output>(\d+) of", shown)[1])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "rollouts.html"
    write_report(path, [hostile(i) for i in range(24)], f"title {HOSTILE}")
    return path


def test_the_report_is_one_file_with_nothing_hostile_in_its_markup(report):
    text = report.read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "<img" not in text and "<!--" not in text
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text.split('id="data"')[0])     # nothing is fetched
    assert text.count("data:image/jpeg;base64,") >= 24


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_hostile_output_runs_no_script(report):
    shown, count = page(report, "open=24")
    assert count == 24 and "<title>title &lt;/script&gt;" in shown and "taken</title>" not in shown
    assert len(re.findall("<section", shown)) == sum(i % 3 + 1 for i in range(24))
    assert shown.count("code &lt;/script&gt;&lt;script&gt;") == 24                              # there, as text
    for word in ("question 7 ", "output ", "answer ", "reference ", "reward_of_calls 0.1", "OVER_LENGTH"):
        assert word in shown, word


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_lets_no_other_script_run(report, tmp_path):
    added = "<main></main><script>document.documentElement.id = 'taken'</script>"
    (tmp_path / "r.html").write_text(report.read_text().replace("<main></main>", added))
    shown, count = page(tmp_path / "r.html")
    assert count == 24 and 'id="taken"' not in shown


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("anchor, count", [
    ("result=right&calls=0", 2), ("end=OVER_LENGTH&calls=2", 4), ("text=NEEDLE1", 11),
    ("result=wrong&text=needle23.", 1)])
def test_filters(report, anchor, count):
    assert page(report, anchor)[1] == count


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_two_thousand_trajectories_wait_until_they_are_opened(tmp_path):
    some = [record(hostile(i)) for i in range(20)]
    frame = some[0]["images"][0]
    some[0]["videos"] = [dict(looked=[0.5, 4.5], seconds=12, shown=[[4.5, frame]])]
    write_report(tmp_path / "many.html", some * 100, "many")
    shown, count = page(tmp_path / "many.html", "open=1")
    assert count == 2000 and shown.count("<details") == 2000
    assert shown.count("<img") == 2 and shown.count("<section") == 2                            # only the opened one
    assert '<figcaption class="">4.5 s</figcaption>' in shown and shown.count('<i class="" style="left: ') == 2


def test_a_report_that_would_be_too_large_shows_an_even_share(tmp_path, monkeypatch):
    some = [record(hostile(i)) for i in range(20)]
    monkeypatch.setattr(evaluate, "PAGE_BYTES", sum(len(json.dumps(line)) for line in some) // 3)
    write_report(tmp_path / "r.html", some, "t")
    text = (tmp_path / "r.html").read_text()
    shown = json.loads(re.search(r'application/json">(.*)</script><script>', text, re.S)[1])
    assert [t["id"].split()[0] for t in shown["trajectories"]] == [str(i) for i in range(0, 20, 4)]
