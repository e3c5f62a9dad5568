"""The objective, the update, and what a run leaves behind."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from model import tiny_policy
from rollout import Script, rollout

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
ANSWER = "<answer>\n\\boxed{red}\n</answer>"
LOOK = "<code>\n```python\nimage_clue_0.crop((0,0,32,32)).show()\n```\n</code>"


def run_train(*flags, timeout=240, **env):
    return subprocess.run([sys.executable, "train.py", *map(str, flags)], cwd=ROOT, text=True, capture_output=True, timeout=timeout,
                          env={**os.environ, **env})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny checkpoint on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy(folder, [LOOK, ANSWER] * 3, vocabulary=330)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data file of image rows that are also demonstrations."""
    folder = tmp_path_factory.mktemp("rows")
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [{"id": str(i), "question": "Which colour?", "answer": "red", "image_path": f"{i}.png", "turns": [LOOK] * (i % 3) + [ANSWER]}
            for i in range(4)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


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


def make_run(tiny, rows, tmp_path, **settings):
    config = train.Config(model=str(tiny), data=str(rows), out=str(tmp_path), group_size=2, batch_size=2, steps=2, eval_every=0,
                          max_new_tokens=8, max_context=1024, **{"lr": 1e-2, **settings})
    return train.Run(config, train.load(str(rows)), None), config


def batch_of(run, advantages=(1.0, -0.5, 0.25, -1.0)):
    samples = run.prompts.samples
    trajectories = [t for g in rollout(Script(run.policy, samples), samples, 1) for t in g]
    for t, a in zip(trajectories, advantages):
        t.advantage, t.logprobs = a, []
    return trajectories


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.policy.model.parameters()]).clone()


def test_the_token_mean_is_over_the_whole_step(tiny, rows, tmp_path):
    """However the batch is cut into micro-batches, the same parameters come out."""
    results = []
    for budget in (10 ** 6, 1):
        run, config = make_run(tiny, rows, tmp_path, tokens_per_microbatch=budget)
        run.optimizer = torch.optim.SGD(run.policy.model.parameters(), 1e-2)
        metrics = train.update(run, batch_of(run), config, 1e-2)
        results.append((weights(run), metrics))
    (a, first), (b, second) = results
    assert (a - b).norm() / a.norm() < 1e-6
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4) and first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


def test_microbatches_respect_the_budget_and_lose_nothing(tiny, rows, tmp_path):
    run, _ = make_run(tiny, rows, tmp_path)
    trajectories = batch_of(run)
    longest = max(len(t.tokens) for t in trajectories)
    for budget in (1, longest, 3 * longest, 10 ** 6):
        parts = train.microbatches(trajectories, budget)
        assert sorted(id(t) for part in parts for t in part) == sorted(map(id, trajectories))
        assert all(len(part) == 1 or sum(len(t.tokens) for t in part) <= budget for part in parts)


def test_one_update_a_batch_never_clips_and_more_do(tiny, rows, tmp_path):
    for minibatches, expected in ((1, False), (2, True)):
        run, config = make_run(tiny, rows, tmp_path, minibatches=minibatches, lr=0.05)
        groups = rollout(run.policy, run.prompts.samples, 4, max_new_tokens=8)
        trajectories = [t for g in groups for t in g]
        for i, t in enumerate(trajectories):
            t.advantage = (-1.0) ** i
        metrics = train.update(run, trajectories, config, config.lr)
        assert (metrics["clip_fraction"] > 0) == expected
        if not expected:
            assert metrics["logprob_gap"] < 1e-4


def test_a_non_finite_step_is_skipped_and_counted(tiny, rows, tmp_path):
    run, config = make_run(tiny, rows, tmp_path)
    before, trajectories = weights(run), batch_of(run, (math.nan, 1.0, 1.0, 1.0))
    assert train.update(run, trajectories, config, 1e-2)["updates_skipped"] == 1
    assert torch.equal(before, weights(run))


def test_sft_learns_to_recite(tiny, rows, tmp_path):
    """Imitation is the same update with advantage 1: the demonstrations' log-probs rise."""
    run, config = make_run(tiny, rows, tmp_path, stage="sft", lr=3e-3)
    trajectories = batch_of(run, (1.0,) * 4)
    before = run.policy.logprobs(trajectories)[0].mean().item()
    for _ in range(8):
        train.update(run, trajectories, config, 3e-3)
    assert run.policy.logprobs(trajectories)[0].mean().item() > before + 1


# ------------------------------------------------------------------------------------------------ the command line
def test_two_steps_on_a_data_file_leave_what_the_readme_says(tiny, rows, tmp_path):
    out = tmp_path / "run"
    done = run_train("--model", tiny, "--data", rows, "--out", out, "--steps", 2, "--batch_size", 2, "--group_size", 2, "--max_new_tokens", 8,
                     "--max_context", 1024, "--keep_zero_variance", "--lr", 1e-3, "--eval_every", 0)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2]
    keys = """step reward accuracy tool_calls turns response_tokens visual_tokens reward_std groups_sampled groups_zero_variance
        trajectories_broken correct_negative_advantage loss grad_norm entropy clip_fraction lr seconds_rollout seconds_tool seconds_update
        tokens_per_second""".split()
    assert not set(keys) - set(metrics[0]), set(keys) - set(metrics[0])
    assert metrics[1]["grad_norm"] >= 0 and metrics[1]["trajectories_trained"] == 4
    for name in ("config.json", "curves.png", "rollouts.html", "step_2/config.json", "step_2/model.safetensors", "state/step_2"):
        assert (out / name).exists(), name
    assert json.loads((out / "config.json").read_text())["lr"] == 1e-3
    assert "step    1" in done.stdout + done.stderr


def refused(monkeypatch, capsys, *flags):
    """What train.py says on stderr when it refuses these flags, without having loaded a model."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    monkeypatch.setattr(train, "tiny_policy", None)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--nonsense", "1"], "nonsense"),
    (["--steps", "many"], "steps"),
    (["--group_size", "1"], "group_size"),
    (["--rank", "best"], "rank"),
    (["--data", "missing.json"], "missing.json"),
    (["--model", "/nowhere/model", "--data", "ROWS"], "/nowhere/model"),
    (["--out", "/dev/null/x"], "/dev/null/x"),
    (["--stage", "sft"], "demonstrations"),
    (["--prompt_template", "missing.json"], "missing.json"),
])
def test_bad_input_is_one_line_and_exit_code_2(flags, words, rows, tmp_path, monkeypatch, capsys):
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
    bad = rows.with_name(f"bad{abs(hash(words))}.json")
    bad.write_text(json.dumps([good, row]))
    error = refused(monkeypatch, capsys, "--data", bad, "--out", tmp_path)
    assert words in error and "row 2" in error and len(error.strip().splitlines()) == 1


def test_help_lists_every_field():
    done = run_train("--help")
    assert done.returncode == 0 and all(f"--{name} " in done.stdout for name in vars(train.Config()))


def start(tiny, rows, out, *flags):
    return subprocess.Popen([sys.executable, "train.py", "--model", str(tiny), "--data", str(rows), "--out", str(out), "--batch_size", "2",
                             "--group_size", "2", "--max_new_tokens", "8", "--max_context", "1024", "--keep_zero_variance", "--eval_every", "0",
                             "--lr", "1e-3", *map(str, flags)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines(out):
    file = out / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def test_ctrl_c_ends_soon_and_keeps_what_there_is(tiny, rows, tmp_path):
    process = start(tiny, rows, tmp_path, "--steps", 10_000, "--save_every", 1)
    wait_for(lambda: len(lines(tmp_path)) >= 2 and (tmp_path / "step_1").exists())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert all(json.loads(line) for line in lines(tmp_path)) and list(tmp_path.glob("step_*"))
    assert "Traceback" not in process.stderr.read()


def test_sigterm_finishes_the_step_saves_and_exits_0(tiny, rows, tmp_path):
    process = start(tiny, rows, tmp_path, "--steps", 10_000)
    wait_for(lambda: len(lines(tmp_path)) >= 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / f"step_{len(lines(tmp_path))}" / "model.safetensors").exists()


TIMES = ("seconds_rollout", "seconds_tool", "seconds_update", "tokens_per_second")


def numbers(out):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines(out)]


@pytest.mark.parametrize("stage, kills", [("rl", 3), ("sft", 2)])       # rl restores sampling, sft weights and optimizer
def test_a_killed_run_resumes_number_for_number(stage, kills, tiny, rows, tmp_path):
    whole, killed, flags = tmp_path / "whole", tmp_path / "killed", ("--stage", stage, "--steps", 6, "--save_every", 1)
    assert start(tiny, rows, whole, *flags).wait(timeout=240) == 0
    rng = np.random.default_rng(int(time.time()))
    for kill in range(kills):
        process = start(tiny, rows, killed, *flags, *(["--resume"] if kill else []))
        wait_for(lambda: len(lines(killed)) > kill or process.poll() is not None)
        time.sleep(float(rng.uniform(0, 0.5)))                  # anywhere, also in the middle of writing a checkpoint
        process.kill()
        process.wait()
    assert start(tiny, rows, killed, *flags, "--resume").wait(timeout=240) == 0
    assert numbers(killed) == numbers(whole) and len(numbers(whole)) == 6
    assert (numbers(whole)[-1]["loss"] != numbers(whole)[0]["loss"]) == (stage == "sft")


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
    done = run_train("--model", folder, "--data", SHARED / "media" / "real_image_val_dataset.json", "--out", tmp_path / "run", "--steps", 2,
                     "--batch_size", 1, "--group_size", 2, "--max_new_tokens", 6, "--max_turns", 2, "--max_pixels", 100_000, "--eval_every", 0,
                     "--keep_zero_variance", "--max_oversample", 2)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(m["visual_tokens"] > 0 and math.isfinite(m["loss"]) for m in metrics)
