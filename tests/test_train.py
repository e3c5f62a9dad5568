"""The objective, the update, what a run leaves behind, and how it ends and goes on: signals, kills, a full disk, NaN."""
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from model import Encoded, load_policy, tiny_policy
from rollout import Script, rollout

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
ANSWER = "<answer>\n\\boxed{red}\n</answer>"
LOOK = "<code>\n```python\nimage_clue_0.crop((0,0,32,32)).show()\n```\n</code>"
LUCK = "<code>\n```python\nimport random\nprint(random.random())\n```\n</code>"
KEYS = set("""step reward accuracy tool_calls turns response_tokens visual_tokens reward_std groups_sampled groups_zero_variance
    trajectories_broken correct_negative_advantage loss grad_norm entropy clip_fraction lr seconds_rollout seconds_tool
    seconds_update tokens_per_second repeated_calls empty_calls logprob_gap updates_skipped""".split())
TIMES = ("seconds_rollout", "seconds_tool", "seconds_update", "tokens_per_second")
FORK = multiprocessing.get_context("forkserver")        # a process that has imported torch once, and forks each run
FORK.set_forkserver_preload(["train", "matplotlib.pyplot", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"])


# ------------------------------------------------------------------------------------------------ runs to look at
def child(target, args, output, env):
    """In a process of its own: call target(*args) with all that it prints going to the file `output`."""
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    target(*args)


def command_line(*argv):
    sys.argv = ["train.py", *map(str, argv)]
    train.main()


class Started:
    """A running process; the whole of what it prints in `text`."""

    def __init__(self, output, *args, target=command_line, **env):
        self.output = Path(output)
        self.process = FORK.Process(target=child, args=(target, args, self.output, env))
        self.process.start()

    def wait(self, timeout=240):
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running:\n{self.text}"
        return self.process.exitcode

    def signal(self, number):
        os.kill(self.process.pid, number)

    @property
    def text(self):
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny checkpoint on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy(folder, [LOOK, ANSWER] * 3, vocabulary=330)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data file of image rows that are also demonstrations: looks or none, luck, a prompt without an image."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"id": str(i), "question": "Which colour?" * (i + 1), "answer": "red", "image_path": f"{i}.png",
             "turns": [LOOK] * (i % 3) + [LUCK] * (i == 3) + [ANSWER]} for i in range(5)]
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def flags(tiny, rows, out, *more):
    return ["--model", tiny, "--data", rows, "--out", out, "--batch_size", 2, "--group_size", 2, "--max_new_tokens", 8, "--max_context", 1024,
            "--keep_zero_variance", "--eval_every", 0, "--lr", 1e-3, *more]


def start(tiny, rows, out, *more, **env):
    return Started(out.with_suffix(".txt"), *flags(tiny, rows, out, *more), **env)


def lines(out):
    file = out / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def metrics(out):
    return [json.loads(line, parse_constant=None) for line in lines(out)]


def numbers(out):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(out)]


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def make_run(tiny, rows, out, **settings):
    small = dict(group_size=2, batch_size=2, steps=2, eval_every=0, save_every=0, max_new_tokens=8, max_context=1024, lr=1e-2)
    config = train.Config(model=str(tiny), data=str(rows), out=str(out), **{**small, **settings})
    Path(out).mkdir(exist_ok=True)
    return train.Run(config, train.load(str(rows)), None), config


def batch_of(run, advantages=(1.0, -0.5, 0.25, -1.0, 0.75)):
    trajectories = [t for g in rollout(Script(run.policy, run.samples), run.samples, 1) for t in g]
    for t, a in zip(trajectories, advantages):
        t.advantage, t.logprobs = a, []
    return trajectories


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.policy.model.parameters()]).clone()


# ------------------------------------------------------------------------------------------------ the objective
def test_policy_loss_against_hand_computed_values():
    """Ratios 1, 1.5, 0.5, 4 with advantages of both signs; clip 0.2, dual clip 3."""
    old = torch.zeros(6)
    logprobs = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 4.0]).log()
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, clipped = train.policy_loss(logprobs, old, advantages, 0.2, 3.0)
    assert loss.tolist() == pytest.approx([-2.0, -2.4, -1.0, 3.0, 1.6, 6.0])
    assert clipped.tolist() == [0, 1, 0, 0, 1, 1]


def test_gradient_of_the_loss_equals_a_hand_written_one():
    """Three tokens, vocabulary of four: d loss / d logit = -A / n * (onehot - softmax) where the ratio is 1."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    tokens, advantages = torch.tensor([1, 3, 0]), torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    loss, _ = train.policy_loss(logprobs, logprobs.detach(), advantages)
    (loss.sum() / 3).backward()
    by_hand = -(advantages / 3)[:, None] * (torch.eye(4, dtype=torch.float64)[tokens] - logits.detach().softmax(-1))
    assert torch.allclose(logits.grad, by_hand)


def test_the_token_mean_is_over_the_whole_step(tiny, rows, tmp_path):
    """However the batch is cut into micro-batches, the same parameters come out."""
    results = []
    for budget in (10 ** 6, 1):
        run, config = make_run(tiny, rows, tmp_path, tokens_per_microbatch=budget)
        run.optimizer = torch.optim.SGD(run.policy.model.parameters(), 1e-2)
        results.append((train.update(run, [batch_of(run)], config, 1e-2), weights(run)))
    (first, a), (second, b) = results
    assert (a - b).norm() / a.norm() < 1e-6
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4) and first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


def test_microbatches_respect_the_budget_and_lose_nothing(tiny, rows, tmp_path):
    run, _ = make_run(tiny, rows, tmp_path)
    trajectories = batch_of(run)
    longest = max(len(t.tokens) for t in trajectories)
    for budget in (1, longest, 3 * longest, 10 ** 6):
        parts = train.microbatches([[t] for t in trajectories], budget)
        assert sorted(id(t) for part in parts for t in part) == sorted(map(id, trajectories))
        assert all(len(part) == 1 or sum(len(t.tokens) for t in part) <= budget for part in parts)


def test_one_update_a_batch_never_clips_and_more_do(tiny, rows, tmp_path):
    for minibatches, expected in ((1, False), (2, True)):
        run, config = make_run(tiny, rows, tmp_path, minibatches=minibatches, lr=0.05)
        groups = rollout(run.policy, run.samples[:4], 4, max_new_tokens=8)
        for i, t in enumerate(t for group in groups for t in group):
            t.advantage = (-1.0) ** i
        result = train.update(run, groups, config, config.lr)
        assert (result["clip_fraction"] > 0) == expected
        if not expected:
            assert result["logprob_gap"] < 1e-4


def test_sft_learns_to_recite(tiny, rows, tmp_path):
    """Imitation is the same update with advantage 1: the demonstrations' log-probs rise."""
    run, config = make_run(tiny, rows, tmp_path, stage="sft", lr=3e-3)
    trajectories = batch_of(run, (1.0,) * 5)
    before = run.policy.logprobs(trajectories)[0].mean().item()
    for _ in range(8):
        train.update(run, [trajectories], config, 3e-3)
    assert run.policy.logprobs(trajectories)[0].mean().item() > before + 1


# ------------------------------------------------------------------------------------------------ runs that go nowhere
def test_five_steps_without_a_finite_gradient_stop_and_leave_their_data(tiny, rows, tmp_path, monkeypatch):
    """Each is skipped and counted; the rows are JSON that any reader takes."""
    run, config = make_run(tiny, rows, tmp_path, stage="sft", steps=20)
    recite, before = train.recite, weights(run)

    def poisoned(run, config):
        groups = recite(run, config)
        groups[0][0].advantage = math.nan
        return groups
    monkeypatch.setattr(train, "recite", poisoned)
    with pytest.raises(SystemExit, match="not finite"):
        train.train(run, config)
    assert torch.equal(before, weights(run))
    assert [row["updates_skipped"] for row in metrics(tmp_path)] == [1] * 5 and not "NaN" in "".join(lines(tmp_path))
    (first,), *_ = torch.load(tmp_path / "nonfinite.pt", weights_only=False)
    assert math.isnan(first.advantage) and first.tokens and first.sample.question


def test_ten_steps_without_anything_to_train_on_stop(tiny, rows, tmp_path):
    """Every group's rewards are equal: bounded sampling, all keys in metrics.jsonl, an end that says why."""
    run, config = make_run(tiny, rows, tmp_path, batch_size=1, max_turns=1, max_new_tokens=2, steps=100)
    with pytest.raises(SystemExit, match="nothing to train on"):
        train.train(run, config)
    assert len(metrics(tmp_path)) == 10 and all(KEYS <= set(row) for row in metrics(tmp_path))
    assert all(row["groups_sampled"] == row["groups_zero_variance"] == 4 and row["trajectories_trained"] == 0 for row in metrics(tmp_path))


# ------------------------------------------------------------------------------------------------ the command line
def refused(monkeypatch, capsys, *flags):
    """What train.py says on stderr when it refuses these flags, without having loaded a model."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    monkeypatch.setattr(train, "tiny_policy", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--nonsense", "1"], "nonsense"),
    (["--steps", "many"], "steps"),
    (["--steps", "0"], "steps"),
    (["--group_size", "1"], "group_size"),
    (["--temperature", "0"], "temperature"),
    (["--rank", "best"], "rank"),
    (["--frames", "some"], "frames"),
    (["--difficulty", "[]"], "difficulty"),
    (["--log", "tensorboard"], "wandb"),
    (["--log", "wandb"], "pip install wandb"),
    (["--data", "missing.json"], "missing.json"),
    (["--model", "/nowhere/model", "--data", "ROWS"], "/nowhere/model"),
    (["--out", "/dev/null/x"], "/dev/null/x"),
    (["--stage", "sft"], "demonstrations"),
    (["--prompt_template", "missing.json"], "missing.json"),
])
def test_bad_input_is_one_line_and_exit_code_2(flags, words, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)          # nothing is installed
    flags = [str(rows) if f == "ROWS" else f for f in flags]
    error = refused(monkeypatch, capsys, *flags, *([] if "--out" in flags else ["--out", tmp_path / "run"]))
    assert words in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("row, words", [
    ({"question": "?", "image_path": "0.png"}, "row 2"),
    ({"question": "?", "answer": "a", "image_path": "gone.png"}, "gone.png"),
    ({"question": "?", "answer": "a", "image_path": "rows.json"}, "rows.json"),
])
def test_a_bad_row_is_named(row, words, rows, tmp_path, monkeypatch, capsys):
    good = json.loads(rows.read_text())[0]
    bad = rows.with_name("bad.json")
    bad.write_text(json.dumps([good, row]))
    error = refused(monkeypatch, capsys, "--data", bad, "--out", tmp_path)
    assert words in error and "row 2" in error and len(error.strip().splitlines()) == 1


def test_help_lists_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        train.configure()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{field.name} " in text for field in fields(train.Config))


# ------------------------------------------------------------------------------------------------ what a run leaves
def logits(folder):
    """Of the plain transformers model, by its Auto classes, on a fixed text."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Which colour? red", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits


@pytest.fixture(scope="module")
def whole(tiny, rows, tmp_path_factory):
    """A run that nothing interrupts: six steps of each stage, two checkpoints kept."""
    folder = tmp_path_factory.mktemp("whole")
    for process in [start(tiny, rows, folder / stage, "--stage", stage, "--steps", 6, "--save_every", 1) for stage in ("rl", "sft")]:
        assert process.wait() == 0, process.text
    return folder


def test_a_run_leaves_what_the_readme_says(whole):
    for stage in ("rl", "sft"):
        out = whole / stage
        assert [row["step"] for row in metrics(out)] == [*range(1, 7)] and all(KEYS <= set(row) for row in metrics(out))
        for name in ("config.json", "curves.png", "rollouts.html", "step_6/config.json", "step_6/model.safetensors", "state"):
            assert (out / name).exists(), name
        assert sorted(path.name for path in out.glob("step_*")) == ["step_5", "step_6"]             # --keep 2
        assert sorted(path.name for path in (out / "state").iterdir()) == ["step_5.pt", "step_6.pt"]
        assert not {"unfinished", "discarded"} & {path.name for path in out.iterdir()}
        assert json.loads((out / "config.json").read_text())["lr"] == 1e-3
    assert metrics(whole / "rl")[1]["trajectories_trained"] == 4
    assert "step 6" in whole.joinpath("rl.txt").read_text()


def test_a_checkpoint_is_a_hugging_face_model_with_the_same_logits(whole, tiny):
    folder = whole / "sft" / "step_6"
    policy = load_policy(str(folder))
    prompt = Encoded(policy.tokenizer("Which colour? red").input_ids, *policy.pixels(()))
    ours = policy.prefill([prompt], 1).logits[0]
    assert torch.allclose(ours, logits(folder)[0, -1], atol=1e-4) and not torch.allclose(ours, logits(tiny)[0, -1], atol=1e-2)


# ------------------------------------------------------------------------------------------------ ends and new beginnings
@pytest.mark.parametrize("stage, kills", [("rl", 3), ("sft", 3)])       # rl restores sampling, sft weights and optimizer
def test_a_killed_run_resumes_number_for_number(stage, kills, tiny, rows, whole, tmp_path):
    """Killed at random moments, among them in the middle of writing a checkpoint."""
    out, more = tmp_path / "killed", ("--stage", stage, "--steps", 6, "--save_every", 1)
    rng = np.random.default_rng(int(time.time()))
    for kill in range(kills):
        process = start(tiny, rows, out, *more, *(["--resume"] if kill else []))
        seen = len(lines(out))
        wait_for(lambda: len(lines(out)) > seen or not process.process.is_alive())
        if kill == 0:
            wait_for(lambda: (out / "unfinished").exists() or not process.process.is_alive())
        else:
            time.sleep(float(rng.uniform(0, 0.3)))
        process.signal(signal.SIGKILL)
        process.wait()
        for folder in out.glob("step_*"):
            logits(folder)                              # complete or absent
    process = start(tiny, rows, out, "--resume", "--stage", stage)
    assert process.wait() == 0, process.text
    assert numbers(out) == numbers(whole / stage) and len(numbers(out)) == 6
    assert (numbers(out)[-1]["loss"] != numbers(out)[0]["loss"]) == (stage == "sft")


def test_resume_keeps_settings_and_says_what_is_new(tiny, rows, whole, tmp_path, monkeypatch, capsys):
    """--out and --resume are enough; a setting given again is new, and said; a run never becomes one of another stage."""
    out = tmp_path / "run"
    shutil.copytree(whole / "sft", out)
    process = Started(tmp_path / "said", "--out", out, "--resume", "--steps", 7, "--weight_decay", 0.1)
    assert process.wait() == 0, process.text
    assert numbers(out)[:6] == numbers(whole / "sft") and [row["lr"] for row in metrics(out)] == [1e-3] * 7
    assert "--steps 6" in process.text and "--weight_decay 0.0" in process.text and "--lr" not in process.text
    assert json.loads((out / "config.json").read_text())["steps"] == 7
    assert "stage" in refused(monkeypatch, capsys, "--out", out, "--resume", "--stage", "rl")


def test_the_same_command_twice_destroys_nothing(tiny, rows, tmp_path):
    """The second run starts anew; the first is found in a folder; --resume where there is nothing starts."""
    for _ in range(2):
        process = start(tiny, rows, tmp_path / "run", "--steps", 1)
        assert process.wait() == 0, process.text
    earlier = tmp_path / "run" / "earlier_1"
    assert str(earlier) in process.text and (earlier / "config.json").exists() and (earlier / "state" / "step_1.pt").exists()
    assert numbers(earlier) == numbers(tmp_path / "run") and len(numbers(earlier)) == 1
    assert torch.equal(logits(earlier / "step_1"), logits(tmp_path / "run" / "step_1"))
    process = start(tiny, rows, tmp_path / "fresh", "--steps", 1, "--resume")
    assert process.wait() == 0 and numbers(tmp_path / "fresh") == numbers(earlier)


def small_disk(tmp_path):
    """A file system of 8 MB, which only root can have."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    return folder


@pytest.mark.parametrize("limit", ["weights", "state", "disk"])
def test_a_full_disk_stops_and_leaves_the_last_checkpoint(limit, tiny, rows, tmp_path):
    """A file-size limit stands in for the disk, at the weights and at the optimizer's state; root has a small disk too."""
    out = small_disk(tmp_path) if limit == "disk" else tmp_path / "run"
    try:
        run, config = make_run(tiny, rows, out, keep=5)
        train.update(run, [batch_of(run)], config, 1e-3)
        (out / "metrics.jsonl").touch()
        run.step = 1
        run.save()
        size, (soft, hard) = (out / "step_1" / "model.safetensors").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if limit != "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 if limit == "weights" else size + 10_000, hard))
            run.step = 2
            with pytest.raises(SystemExit, match="step_2 could not be written.*MiB are free"):
                run.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert train.complete(out) == [out / "state" / "step_1.pt"] and not (out / "step_2").exists() and not (out / "unfinished").exists()
        again = train.Run(config, run.samples, None, (), train.complete(out)[-1])
        assert again.step == 1 and torch.equal(weights(again), weights(run))
    finally:
        if limit == "disk":
            subprocess.run(["umount", "-l", out], check=True)


def test_sigterm_finishes_the_step_saves_and_exits_0(tiny, rows, tmp_path):
    process = start(tiny, rows, tmp_path / "run", "--steps", 10_000, "--save_every", 0)
    wait_for(lambda: len(lines(tmp_path / "run")) >= 1)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0, process.text
    assert train.complete(tmp_path / "run")[-1].stem == f"step_{len(lines(tmp_path / 'run'))}"


def test_ctrl_c_ends_soon_and_keeps_what_there_is(tiny, rows, tmp_path):
    out = tmp_path / "run"
    process = start(tiny, rows, out, "--steps", 10_000, "--save_every", 1)
    wait_for(lambda: len(lines(out)) >= 2 and train.complete(out))
    process.signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130, process.text
    assert metrics(out) and train.complete(out) and "Traceback" not in process.text


LOGGER = """
import json
def note(*call):
    with open({file!r}, "a") as file:
        file.write(json.dumps(call) + "\\n")
def init(**settings):
    note("init", settings)
def log(metrics, step):
    note("log", step, metrics)
def finish():
    note("finish")
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_its_log(name, tiny, rows, tmp_path):
    """A module of that name is called in the way that both packages take."""
    (tmp_path / f"{name}.py").write_text(LOGGER.format(file=str(tmp_path / "calls")))
    for more in (["--steps", 1, "--log", name], ["--steps", 2, "--resume"]):
        process = Started(tmp_path / "text", *flags(tiny, rows, tmp_path / "run", *more), target=logged, PLACE=str(tmp_path))
        assert process.wait() == 0, process.text
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2 and [call[1] for call in calls[1::3]] == [1, 2]
    first, second = calls[0][1], calls[3][1]
    assert first["name"] == second["name"] and first["resume"] == second["resume"] == "allow" and first.get("id") == second.get("id")
    assert KEYS <= set(calls[1][2]) and first["config"]["lr"] == 1e-3


def logged(*argv):
    sys.path.insert(0, os.environ["PLACE"])
    command_line(*argv)


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
def test_the_official_rows_train_with_the_real_tokenizer(tmp_path):
    """A small random model of the real architecture, with the real tokenizer, processor and photographs."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
    source, folder = SHARED / "qwen2.5-vl-7b", tmp_path / "model"
    config = AutoConfig.from_pretrained(source)
    for part, values in ((config.text_config, dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                                   num_key_value_heads=2, max_window_layers=2, layer_types=["full_attention"] * 2)),
                         (config.vision_config, dict(hidden_size=32, depth=2, num_heads=2, intermediate_size=64, out_hidden_size=64,
                                                     fullatt_block_indexes=[1]))):
        for name, value in values.items():
            setattr(part, name, value)
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(source, backend="pil").save_pretrained(folder)
    process = Started(tmp_path / "text", "--model", folder, "--data", SHARED / "media" / "real_image_val_dataset.json", "--out",
                      tmp_path / "run", "--steps", 2, "--batch_size", 1, "--group_size", 2, "--max_new_tokens", 6, "--max_turns", 2,
                      "--max_pixels", 100_000, "--eval_every", 0, "--keep_zero_variance", "--max_oversample", 2)
    assert process.wait() == 0, process.text
    assert len(metrics(tmp_path / "run")) == 2 and all(m["visual_tokens"] > 0 and math.isfinite(m["loss"]) for m in metrics(tmp_path / "run"))
