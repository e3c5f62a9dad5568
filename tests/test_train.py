"""The objective, the update, demonstrations, metrics, what a run leaves, how it ends and goes on.

It ends by signals, kills, a full disk, or numbers that are not finite. It goes on as if it had not.
"""

import errno
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import DataError, Sample, load
from engine import demonstrations
from engine.batching import flat, microbatches, share
from engine.checkpoint import FullDisk, complete, save_state
from engine.fast import FastPolicy
from engine.metrics import measure
from engine.run import Journal, NoProgress, Progress
from model import load_policy, save_policy, tiny_policy
from rollout import EndReason, Recital, Trajectory, Turn, rollout
from sandbox import SandboxError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
ANSWER = "<answer>\n\\boxed{red}\n</answer>"
CROP = "image_clue_0.crop((0,0,32,32)).show()"
LOOK = f"<code>\n```python\n{CROP}\n```\n</code>"
LUCK = "<code>\n```python\nimport random\nprint(random.random())\n```\n</code>"
COMMON_KEYS = """step tool_calls turns response_tokens visual_tokens loss grad_norm entropy lr
    seconds_rollout seconds_tool seconds_update tokens_per_second repeated_calls empty_calls
    unreadable format_errors turn_limit trajectories_trained updates_skipped"""
RL_KEYS = """reward accuracy reward_std groups_sampled groups_zero_variance trajectories_broken
    correct_negative_advantage clip_fraction logprob_gap"""
KEYS = dict(
    rl={*COMMON_KEYS.split(), *RL_KEYS.split()},
    sft={*COMMON_KEYS.split(), "demonstrations_skipped"},
)
TIMES = ("seconds_rollout", "seconds_tool", "seconds_update", "tokens_per_second")
# A process that has imported torch once, and from which each run is forked.
FORK = multiprocessing.get_context("forkserver")
PRELOADED = [
    "train",
    "matplotlib.pyplot",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
]
FORK.set_forkserver_preload(PRELOADED)


# ---------------------------------------------------------------------------------- runs to look at
def child(target, args, output, env):
    """In a process of its own: call target(*args). All that it prints goes to the file `output`."""
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    target(*args)


def command_line(*argv):
    sys.argv = ["train.py", *map(str, argv)]
    train.main()


class Started:
    """A running process; the whole of what it prints is in `text`."""

    def __init__(self, output, *args, target=command_line, **env):
        self.output = Path(output)
        self.process = FORK.Process(target=child, args=(target, args, self.output, env))
        self.process.start()

    def wait(self, timeout=240):
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running:\n{self.text}"
        return self.process.exitcode

    def wait_for(self, condition):
        """Wait until the condition holds, or the process has ended."""
        wait_for(lambda: condition() or not self.process.is_alive())

    def signal(self, number):
        os.kill(self.process.pid, number)

    @property
    def text(self):
        return self.output.read_text() if self.output.exists() else ""


def picture(seed):
    values = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny checkpoint on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy(folder, [LOOK, ANSWER] * 3, vocabulary=330)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data file whose rows are also demonstrations: with looks or without, and with luck."""
    folder = tmp_path_factory.mktemp("rows")
    made = []
    for i in range(5):
        picture(i).save(folder / f"{i}.png")
        turns = [LOOK] * (i % 3) + [ANSWER]
        if i == 3:
            turns = [LUCK, ANSWER]
        question = "Which colour?" * (i + 1)
        row = dict(id=str(i), question=question, answer="red", image_path=f"{i}.png", turns=turns)
        made.append(row)
    (folder / "rows.json").write_text(json.dumps(made))
    return folder / "rows.json"


@pytest.fixture(scope="module")
def taught(tiny, rows, tmp_path_factory):
    """A checkpoint that answers and calls the tool, sometimes well and sometimes not."""
    folder = tmp_path_factory.mktemp("taught")
    run = make_run(tiny, rows, folder / "run", stage="sft", batch_size=5, steps=100, lr=5e-3)
    for _ in range(20):
        kept, _ = train.choose(run, train.recite(run))
        train.update(run, kept)
    save_policy(run.policy, folder / "policy")
    return folder / "policy"


def flags(tiny, rows, out, *more):
    """A command line for a small run."""
    settings = dict(
        model=tiny,
        data=rows,
        out=out,
        batch_size=2,
        group_size=2,
        max_new_tokens=8,
        max_context=1024,
        eval_every=0,
        lr=1e-3,
    )
    words = []
    for name, value in settings.items():
        words += [f"--{name}", value]
    return [*words, "--keep_zero_variance", *more]


def start(tiny, rows, out, *more, **env):
    return Started(out.with_suffix(".txt"), *flags(tiny, rows, out, *more), **env)


def lines(out):
    file = out / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def metrics(out):
    """The rows of metrics.jsonl; NaN and Infinity, which are not JSON, are refused."""
    return [json.loads(line, parse_constant=None) for line in lines(out)]


def numbers(out):
    """The rows of metrics.jsonl without what the clock says."""
    rows = metrics(out)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def make_run(tiny, data, out, **settings):
    """A small Run in this process. data: a file, or samples."""
    samples = data if isinstance(data, list) else load(str(data))
    small = dict(
        group_size=2,
        batch_size=2,
        steps=2,
        eval_every=0,
        save_every=0,
        max_new_tokens=8,
        max_context=1024,
        lr=1e-2,
    )
    config = train.Config(model=str(tiny), out=str(out), **{**small, **settings})
    Path(out).mkdir(exist_ok=True)
    return train.Run(config, samples)


def batch_of(run, advantages=(1.0, -0.5, 0.25, -1.0, 0.75)):
    """The demonstrations as if the policy had sampled them, with its own log-probs."""
    trajectories = flat(rollout(Recital(run.policy), run.samples, 1))
    for t, advantage in zip(trajectories, advantages, strict=True):
        with torch.no_grad():
            t.logprobs = run.policy.logprobs([t])[0].tolist()
        t.advantage = advantage
    return trajectories


def weights(run):
    return torch.cat([weight.detach().flatten() for weight in run.model.parameters()]).clone()


# ------------------------------------------------------------------------------------ the objective
def test_policy_loss_against_hand_computed_values():
    """Ratios 1, 1.5, 0.5, 4 with advantages of both signs; clip 0.2, dual clip 3."""
    old = torch.zeros(6)
    logprobs = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 4.0]).log()
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, clipped = train.policy_loss(logprobs, old, advantages, 0.2, 3.0)
    assert loss.tolist() == pytest.approx([-2.0, -2.4, -1.0, 3.0, 1.6, 6.0])
    assert clipped.tolist() == [0, 1, 0, 0, 1, 1]


def test_gradient_of_the_loss_equals_a_hand_written_one():
    """Three tokens, vocabulary of four, and ratios of 1.

    There d loss / d logit = -A / n * (onehot - softmax).
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([1, 3, 0])
    advantages = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    loss, _ = train.policy_loss(logprobs, logprobs.detach(), advantages)
    (loss.sum() / 3).backward()
    onehot = torch.eye(4, dtype=torch.float64)[tokens]
    by_hand = -(advantages / 3)[:, None] * (onehot - logits.detach().softmax(-1))
    assert torch.allclose(logits.grad, by_hand)


def test_the_token_mean_is_over_the_whole_step(tiny, rows, tmp_path):
    """However the batch is cut into micro-batches, the same parameters come out."""
    results = []
    for budget in (10**6, 1):
        run = make_run(tiny, rows, tmp_path, tokens_per_microbatch=budget)
        run.optimizer = torch.optim.SGD(run.model.parameters(), 1e-2)
        result = train.update(run, [batch_of(run)])
        results.append((result, weights(run)))
    (first, a), (second, b) = results
    assert (a - b).norm() / a.norm() < 1e-6
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    assert first["grad_norm"] > 0


def test_one_update_a_batch_never_clips_and_more_do(tiny, rows, tmp_path):
    """The gap between rollout and update is that before the first update in both cases."""
    for minibatches, clips in ((1, False), (2, True)):
        run = make_run(tiny, rows, tmp_path, minibatches=minibatches, lr=0.05)
        groups = rollout(run.policy, run.samples[:4], 4, max_new_tokens=8)
        for place, t in enumerate(flat(groups)):
            t.advantage = (-1.0) ** place
        result = train.update(run, groups)
        assert (result["clip_fraction"] > 0) == clips
        assert result["logprob_gap"] < 1e-4


def test_a_gap_between_rollout_and_update_is_measured(tiny, rows, tmp_path):
    """It is the mean over action tokens of the first minibatch, before its update."""
    for minibatches in (1, 2):
        run = make_run(tiny, rows, tmp_path, minibatches=minibatches, lr=0.05)
        batch = batch_of(run)
        for t in batch:
            t.logprobs = [value + 0.25 for value in t.logprobs]
        result = train.update(run, [[t] for t in batch])
        assert result["logprob_gap"] == pytest.approx(0.25, abs=1e-3)


# ------------------------------------------------------------------------------ how a batch is cut
def made_of(*lengths, prompt=0):
    """A group of trajectories of so many tokens."""
    sample = Sample("0", "?", "a")
    return [Trajectory(sample, tokens=[0] * length, prompt_length=prompt) for length in lengths]


def test_microbatches_respect_the_budget_and_lose_nothing():
    trajectories = [made_of(length)[0] for length in (70, 20, 50, 90, 40)]
    for budget in (1, 90, 200, 10**6):
        parts = microbatches([[t] for t in trajectories], budget)
        assert sorted(map(id, flat(parts))) == sorted(map(id, trajectories))
        for part in parts:
            assert len(part) == 1 or sum(len(t.tokens) for t in part) <= budget
    assert len(parts) == 1


def test_a_prompt_counts_once_in_a_microbatch():
    groups = [made_of(60, 60, 60, prompt=50), made_of(60, 60, prompt=50)]
    assert [len(part) for part in microbatches(groups, 80)] == [3, 2]
    assert [len(part) for part in microbatches(groups, 70)] == [2, 1, 2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_processes_lose_nothing_and_weigh_about_the_same(world):
    rng = np.random.default_rng(0)
    groups = [made_of(*rng.integers(50, 100, 4)) for _ in range(12)]
    shares = [share(groups, rank, world) for rank in range(world)]
    assert sorted(map(id, flat(flat(shares)))) == sorted(map(id, flat(groups)))
    loads = [sum(len(t.tokens) for t in flat(part)) for part in shares]
    assert max(loads) < 1.2 * min(loads)


def test_few_groups_are_cut_into_trajectories_for_many_processes():
    groups = [made_of(50, 50, 50, 50)]
    assert [len(flat(share(groups, rank, 4))) for rank in range(4)] == [1, 1, 1, 1]


# ------------------------------------------------------------------------------------- select, once
def test_select_runs_once_a_step(taught, rows, tmp_path, monkeypatch):
    """Also where a step has to sample more often than once."""
    seen = []
    sampled = []

    def counted(groups, *args, **kwargs):
        seen.append(len(groups))
        return select(groups, *args, **kwargs)

    def rolled(*args, **kwargs):
        sampled.append(1)
        return roll(*args, **kwargs)

    select = train.select
    roll = train.rollout
    monkeypatch.setattr(train, "select", counted)
    monkeypatch.setattr(train, "rollout", rolled)
    # With turns of two tokens no group can differ in its rewards.
    run = make_run(taught, rows, tmp_path, max_new_tokens=2, batch_size=1)
    train.train(run)
    assert seen == [4, 4]
    assert len(sampled) > 2


# ----------------------------------------------------------------------------------- demonstrations
def test_sft_learns_to_recite(tiny, rows, tmp_path):
    run = make_run(tiny, rows, tmp_path, stage="sft", lr=3e-3)
    trajectories = batch_of(run)
    before = run.policy.logprobs(trajectories)[0].mean().item()
    for _ in range(8):
        train.update(run, [trajectories])
    assert run.policy.logprobs(trajectories)[0].mean().item() > before + 1


def test_the_loss_of_sft_is_the_mean_log_likelihood_at_any_temperature(tiny, rows, tmp_path):
    """--temperature is of sampling: it rescales neither the loss of sft nor its gradient."""
    results = []
    for temperature in (1.0, 0.5, 3.0):
        run = make_run(tiny, rows, tmp_path, stage="sft", temperature=temperature)
        batch = batch_of(run)
        logprobs, _ = run.policy.logprobs(batch)
        expected = -logprobs.mean().item()
        result = train.update(run, [batch])
        assert result["loss"] == pytest.approx(expected, rel=1e-5)
        results.append(weights(run))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_loss_of_rl_is_at_the_temperature_of_sampling(tiny, rows, tmp_path):
    """The negative control of the test above."""
    run = make_run(tiny, rows, tmp_path, temperature=0.5)
    groups = run.rollout(run.samples[:2], 2)
    for t in flat(groups):
        t.advantage = 1.0
    assert train.update(run, groups)["logprob_gap"] < 1e-4
    run.config.temperature = 1.0
    groups = run.rollout(run.samples[:2], 2, temperature=0.5)
    for t in flat(groups):
        t.advantage = 1.0
    assert train.update(run, groups)["logprob_gap"] > 0.01


COLOURS = ("red", "green", "blue", "grey")


def lesson(folder, name, colour="red", looks=1, turns=None):
    """A demonstration with a picture of its own on disk. turns: instead of looks and an answer."""
    file = folder / f"{name}.png"
    picture(sum(map(ord, name))).save(file)
    if turns is None:
        turns = [LOOK] * looks + [ANSWER.replace("red", colour)]
    return Sample(name, f"Which colour is {name}?", colour, images=(str(file),), turns=turns)


def truncated(sample):
    """The same, but its picture ends in the middle: its header can still be read."""
    (file,) = map(Path, sample.images)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return sample


def endless(sample):
    """The same with a question that no context holds."""
    sample.question *= 100
    return sample


def learned(run, monkeypatch):
    """Train, and note what each update got: lists of trajectories."""
    batches = []

    def noted(run, groups):
        batches.append(flat(groups))
        return update(run, groups)

    update = train.update
    monkeypatch.setattr(train, "update", noted)
    train.train(run)
    return batches


def named(capsys):
    """The lines on the terminal that name a demonstration."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("demonstration ")]


def actions(policy, t):
    """What the trajectory's action tokens say, without the ends of turns."""
    ids = [i for i, mine in zip(t.tokens, t.action_mask, strict=True) if mine]
    return policy.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("spoil", [truncated, endless])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_prompt_that_cannot_run_shifts_no_turns(
    spoil, place, tiny, tmp_path, monkeypatch, capsys
):
    """Every other row is trained on its own turns, wherever in the batch the bad row is."""
    samples = [lesson(tmp_path, c, c, looks=i % 3) for i, c in enumerate(COLOURS)]
    spoil(samples[place])
    order = samples[:]
    monkeypatch.setattr(train, "prompts", lambda run, n: list(enumerate(order))[:n])
    run = make_run(tiny, samples, tmp_path / "run", stage="sft", batch_size=4, steps=3)
    batches = learned(run, monkeypatch)
    good = [sample for sample in samples if sample is not samples[place]]
    assert len(batches) == 3
    for batch in batches:
        assert [t.sample for t in batch] == good
        for t in batch:
            assert actions(run.policy, t) == "".join(t.sample.turns)
            assert t.answer == t.sample.answer
    assert [row["demonstrations_skipped"] for row in run.rows] == [1, 1, 1]
    assert [row["trajectories_trained"] for row in run.rows] == [3, 3, 3]
    said = named(capsys)
    assert len(said) == 1
    assert f"demonstration {COLOURS[place]} " in said[0]


FIGURES = "<code>\n```python\nfor _ in range(9): image_clue_0.show()\n```\n</code>"
PRINT = "<code>\n```python\nprint('long ' * 500)\n```\n</code>"
FAULTS = {
    "too many images": [FIGURES, ANSWER],
    "the context is full after a call": [PRINT, ANSWER],
    "the context is full within a turn": [LOOK, "so " * 1000 + ANSWER],
    "no answer": [LOOK, LOOK],
    "no turns": None,
    "an answer without a box": ["<answer>red</answer>"],
    "neither code nor answer at first": ["I think.", LOOK, ANSWER],
    "neither code nor answer in the middle": [LOOK, "I think.", ANSWER],
    "neither code nor answer at last": [LOOK, "It is red."],
    "text behind the code": [LOOK + " and then", ANSWER],
    "text behind the answer": [LOOK, ANSWER + " I hope"],
    "turns after the answer": [ANSWER, LOOK, ANSWER],
    "two answers": [ANSWER, ANSWER],
    "a fence that is not closed": ["<code>\n```python\nprint(1)\n</code>", ANSWER],
    "code of another language": ["<code>\n```bash\nls\n```\n</code>", ANSWER],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_demonstration_is_named_once_and_never_trained_in_part(
    fault, tiny, tmp_path, monkeypatch, capsys
):
    good = lesson(tmp_path, "good")
    bad = lesson(tmp_path, "bad", turns=FAULTS[fault] or [ANSWER])
    bad.turns = FAULTS[fault]
    settings = dict(stage="sft", steps=3, max_images=4)
    run = make_run(tiny, [good, bad], tmp_path / "run", **settings)
    batches = learned(run, monkeypatch)
    assert [[t.sample.id for t in batch] for batch in batches] == [["good"]] * 3
    assert [row["demonstrations_skipped"] for row in run.rows] == [1, 1, 1]
    said = named(capsys)
    assert len(said) == 1
    assert "demonstration bad " in said[0]


OTHER_FENCES = {
    "py": "<code>\n```py\nCODE\n```\n</code>",
    "Python": "<code>\n```Python\nCODE\n```\n</code>",
    "no name": "<code>\n```\nCODE\n```\n</code>",
    "CRLF": "<code>\r\n```python\r\nCODE\r\n```\r\n</code>",
    "spaces": "<code>\n```python  \nCODE\n```  \n</code>",
    "two fences": "<code>\n```python\nnonsense(\n```\nor\n```python\nCODE\n```\n</code>",
    "no tags": "I look.\n```python\nCODE\n```",
}


@pytest.mark.parametrize("fence", OTHER_FENCES)
def test_code_in_other_fences_runs_and_is_trained_on(fence, tiny, tmp_path):
    turn = OTHER_FENCES[fence].replace("CODE", "print(40 + 2)")
    sample = lesson(tmp_path, "good", turns=[turn, ANSWER])
    run = make_run(tiny, [sample], tmp_path / "run", stage="sft", batch_size=1)
    ((t,),), counts = train.choose(run, train.recite(run))
    assert t.turns[0].output == "42\n"
    assert counts["demonstrations_skipped"] == 0
    assert actions(run.policy, t) == turn.strip() + ANSWER


def test_demonstrations_of_equal_names_are_each_named(tiny, tmp_path, capsys):
    """Ids may repeat: those of rows without one count from 0 in every file."""
    samples = [lesson(tmp_path, name, turns=[LOOK]) for name in ("one", "two")]
    for sample in samples:
        sample.id = "0"
    run = make_run(tiny, samples, tmp_path / "run", stage="sft", steps=2)
    train.train(run)
    assert len(named(capsys)) == 2


def spoken(run, steps):
    """What the demonstrations of so many steps look like: {id: set of all that was seen}."""
    seen = {}
    for _ in range(steps):
        for (t,) in train.recite(run):
            pictures = tuple(image.tobytes() for image in t.images)
            outputs = tuple(turn.output for turn in t.turns)
            seen.setdefault(t.sample.id, set()).add((tuple(t.tokens), outputs, pictures))
    return seen


@pytest.mark.parametrize("most_bytes, most_kept", [(10**9, 10**9), (0, 10**9), (10**9, 1)])
def test_the_cache_of_demonstrations_changes_nothing(
    most_bytes, most_kept, tiny, rows, tmp_path, monkeypatch
):
    """Neither tokens nor pictures, nor the random numbers that the code draws.

    They are the same in every epoch, in every order, and in a run that starts in the middle.
    """
    monkeypatch.setattr(demonstrations, "MOST_BYTES", most_bytes)
    monkeypatch.setattr(demonstrations, "MOST_KEPT", most_kept)
    run = make_run(tiny, rows, tmp_path, stage="sft", batch_size=2)
    seen = spoken(run, 6)
    assert len(seen) == 5
    assert all(len(variants) == 1 for variants in seen.values())
    resumed = make_run(tiny, rows, tmp_path, stage="sft", batch_size=3)
    resumed.position = 6
    assert spoken(resumed, 4) == seen


def test_other_seeds_draw_other_numbers_in_demonstrations(tiny, rows, tmp_path):
    runs = [make_run(tiny, rows, tmp_path, stage="sft", seed=s, batch_size=5) for s in (0, 1)]
    first, second = [spoken(run, 1) for run in runs]
    assert first["3"] != second["3"]
    assert first["1"] == second["1"]


def test_the_cache_of_demonstrations_is_bounded_and_keeps_no_prompt_s_pixels(monkeypatch):
    monkeypatch.setattr(demonstrations, "MOST_BYTES", 100_000)
    cache = demonstrations.Demonstrations()
    prompt = Image.new("RGB", (500, 500))
    figure = Image.new("RGB", (100, 100))
    for row in range(20):
        sample = Sample(str(row), "?", "a", images=(prompt,))
        t = Trajectory(sample, images=[prompt, figure], prompt_images=1)
        cache.update({row: t})
        kept = sum(
            image.width * image.height * 3 for t in cache.kept.values() for image in t.images
        )
        assert kept <= 100_000
        assert t.images == [prompt, figure]
    assert list(cache.kept) == [17, 18, 19]
    again = cache.get(19)
    assert [image.size for image in again.images] == [(500, 500), (100, 100)]
    assert [image.size for image in cache.get(19).images] == [(500, 500), (100, 100)]


def test_a_picture_that_is_gone_in_a_later_epoch_is_named(tiny, tmp_path, monkeypatch, capsys):
    samples = [lesson(tmp_path, "stays"), lesson(tmp_path, "goes")]
    run = make_run(tiny, samples, tmp_path / "run", stage="sft", steps=2)
    train.train(run)
    os.remove(samples[1].images[0])
    run.config.steps = 4
    batches = learned(run, monkeypatch)
    assert [[t.sample.id for t in batch] for batch in batches] == [["stays"]] * 2
    assert [row["demonstrations_skipped"] for row in run.rows] == [0, 0, 1, 1]
    assert "goes.png" in capsys.readouterr().out


def test_demonstrations_with_frames_keep_their_frames_in_later_epochs(tiny, tmp_path):
    """--frames: the frames are the prompt's pictures, and no code runs."""
    samples = train.puzzles("video", 2, 0)
    for sample in samples:
        sample.turns = [ANSWER]
    settings = dict(stage="sft", frames="2", max_context=4096)
    run = make_run(tiny, samples, tmp_path, **settings)
    for _ in range(3):
        groups, counts = train.choose(run, train.recite(run))
        assert counts["demonstrations_skipped"] == 0
        for (t,) in groups:
            assert len(t.images) == 2
            assert t.tokens.count(run.policy.image_token) == t.visual_tokens == 8
        assert math.isfinite(train.update(run, groups)["loss"])


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_both_stages_ask_with_the_prompt_template(stage, tiny, rows, tmp_path):
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"image": "ODDLY {query}"}))
    run = make_run(tiny, rows, tmp_path, stage=stage, prompt_template=str(template))
    groups = train.recite(run) if stage == "sft" else train.collect(run)
    for t in flat(groups):
        prompt = run.policy.tokenizer.decode(t.tokens[: t.prompt_length])
        assert "ODDLY Which colour?" in prompt


# ----------------------------------------------------------------------------------------- metrics
def test_metrics_of_hand_made_trajectories():
    """Generated tokens count, and not those of prompts; an unreadable sample is no format error."""
    sample = Sample("0", "?", "a")
    mask = [False] * 100 + [True] * 10
    wrong = Trajectory(sample, tokens=[0] * 110, action_mask=mask, end_reason=EndReason.DONE)
    right = Trajectory(sample, tokens=[0] * 110, action_mask=mask, end_reason=EndReason.DONE)
    right.correct = True
    right.reward = 1.1
    right.advantage = -0.1
    right.n_tool_calls = 2
    right.turns = [
        Turn(code="a", output="x", seconds_tool=1.5),
        Turn(code="a", seconds_tool=0.5),
        Turn(),
    ]
    lost = Trajectory(sample, end_reason=EndReason.ERROR_IN_ACTION)
    spoilt = Trajectory(sample)
    spoilt.fail(DataError("gone.png: no such file"))
    groups = [[wrong, right], [lost, spoilt]]
    wrong.advantage = 0.1
    row = measure(groups, [[wrong, right]], "rl", 2.0)
    assert row["tokens_per_second"] == 10
    assert row["response_tokens"] == 5
    assert row["unreadable"] == row["format_errors"] == 0.25
    assert row["seconds_tool"] == 2.0
    assert row["tool_calls"] == 0.5
    assert row["repeated_calls"] == row["empty_calls"] == 0.25
    assert row["accuracy"] == 0.25
    assert row["reward"] == pytest.approx(0.275)
    assert row["reward_std"] == pytest.approx(0.275)
    assert row["correct_negative_advantage"] == 1
    assert row["trajectories_trained"] == 2


def test_seconds_of_tools_are_those_of_this_step(tiny, tmp_path):
    """In sft too: a demonstration that comes from the cache has run no code."""
    nap = "<code>\n```python\nimport time\ntime.sleep(0.4)\n```\n</code>"
    sample = lesson(tmp_path, "good", turns=[nap, ANSWER])
    run = make_run(tiny, [sample], tmp_path / "run", stage="sft", batch_size=1)
    train.train(run)
    first, second = [row["seconds_tool"] for row in run.rows]
    assert first > 0.3
    assert second == 0


def test_a_sample_that_cannot_be_read_is_named_once_and_is_no_format_error(tiny, tmp_path, capsys):
    samples = [lesson(tmp_path, "good"), truncated(lesson(tmp_path, "bad"))]
    settings = dict(batch_size=1, steps=3, max_new_tokens=4, keep_zero_variance=True)
    run = make_run(tiny, samples, tmp_path / "run", **settings)
    train.train(run)
    for row in run.rows:
        assert row["unreadable"] == 0.5
        assert row["format_errors"] == 0.5  # of the other one: no turn ends within 4 tokens
        assert row["trajectories_broken"] == 2
    assert capsys.readouterr().out.count("bad.png") == 1


def test_a_gap_is_warned_of(tiny, rows, tmp_path, capsys):
    run = make_run(tiny, rows, tmp_path)
    row = dict(
        step=1, trajectories_trained=1, updates_skipped=0, seconds_rollout=1, seconds_update=1
    )
    run.journal.log(dict(row, logprob_gap=0.001), [], [], False)
    assert "log-probs" not in capsys.readouterr().out
    run.journal.log(dict(row, logprob_gap=0.02), [], [], False)
    assert "log-probs by 0.020" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_slow_and_fast_runs_give_the_same_metrics(stage, taught, rows, tmp_path):
    """Sampled at temperature 1, with tools: the same tokens, and numbers to rounding."""
    results = []
    for slow in (True, False):
        settings = dict(stage=stage, max_new_tokens=40, keep_zero_variance=True, lr=1e-4)
        run = make_run(taught, rows, tmp_path / str(slow), slow=slow, **settings)
        assert isinstance(run.policy, FastPolicy) != slow
        train.train(run)
        results.append(numbers(tmp_path / str(slow)))
    plain, fast = results
    assert len(plain) == len(fast) == 2
    assert plain[0]["tool_calls"] > 0
    for a, b in zip(plain, fast, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


# ---------------------------------------------------------------------------- runs that go nowhere
def test_five_steps_without_a_finite_gradient_stop_and_leave_their_data(
    tiny, rows, tmp_path, monkeypatch
):
    """Each is skipped and counted; the rows are JSON that any reader takes."""
    settings = dict(steps=20, keep_zero_variance=True)
    run = make_run(tiny, rows, tmp_path, **settings)
    choose = train.choose
    before = weights(run)

    def poisoned(run, groups):
        kept, counts = choose(run, groups)
        kept[0][0].advantage = math.nan
        return kept, counts

    monkeypatch.setattr(train, "choose", poisoned)
    with pytest.raises(NoProgress, match="not finite"):
        train.train(run)
    assert torch.equal(before, weights(run))
    assert [row["updates_skipped"] for row in metrics(tmp_path)] == [1] * 5
    assert "NaN" not in "".join(lines(tmp_path))
    kept = torch.load(tmp_path / "nonfinite.pt", weights_only=False)
    first = kept[0][0]
    assert math.isnan(first.advantage)
    assert first.tokens
    assert first.sample.question


@pytest.mark.parametrize("minibatches", [1, 2])
def test_metrics_of_a_skipped_update_are_finite(minibatches, tiny, rows, tmp_path):
    """Also where it is the log-probs that are not finite."""
    run = make_run(tiny, rows, tmp_path, minibatches=minibatches)
    batch = batch_of(run)
    batch[0].logprobs[0] = math.nan
    result = train.update(run, [[t] for t in batch])
    assert result["updates_skipped"] == 1
    assert all(math.isfinite(value) for value in result.values())


def test_ten_steps_without_anything_to_train_on_stop(tiny, rows, tmp_path):
    """Every group's rewards are equal: sampling is bounded, and the end says why."""
    settings = dict(batch_size=1, max_turns=1, max_new_tokens=2, steps=100)
    run = make_run(tiny, rows, tmp_path, **settings)
    with pytest.raises(NoProgress, match="nothing to train on"):
        train.train(run)
    found = metrics(tmp_path)
    assert len(found) == 10
    for row in found:
        assert KEYS["rl"] <= set(row)
        assert row["groups_sampled"] == row["groups_zero_variance"] == 4
        assert row["trajectories_trained"] == 0


ERRORS = [
    (DataError("x.json, row 3: has no answer"), 2),
    (SandboxError("no safe place"), 2),
    (FullDisk("step_2 could not be written"), 1),
    (NoProgress("nothing to train on"), 1),
    (OSError(errno.ENOSPC, "No space left on device"), 1),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 1),
]


@pytest.mark.parametrize("error, status", ERRORS)
def test_errors_for_people_are_one_line(error, status, monkeypatch, capsys):
    def failing(config):
        raise error

    monkeypatch.setattr(train, "configure", lambda: None)
    monkeypatch.setattr(train, "begin", failing)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(error) in line


# --------------------------------------------------------------------------------- the command line
def refused(monkeypatch, capsys, *flags):
    """What train.py says on stderr when it refuses these flags, without having loaded a model."""

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    monkeypatch.setattr("model.load_parts", loaded)
    monkeypatch.setattr(train, "cold_start", loaded)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


BAD_FLAGS = [
    (["--nonsense", "1"], "nonsense"),
    (["--steps", "many"], "steps"),
    (["--steps", "0"], "steps"),
    (["--group_size", "1"], "group_size"),
    (["--temperature", "0"], "temperature"),
    (["--rank", "best"], "rank"),
    (["--stage", "dpo"], "stage"),
    (["--task", "audio"], "task"),
    (["--frames", "some"], "frames"),
    (["--paid", "old"], "paid"),
    (["--paid", "-1"], "paid"),
    (["--lora_rank", "-1"], "lora_rank"),
    (["--max_pixels", "0"], "max_pixels"),
    (["--plan", "--model", "x/y", "--gpus", "0"], "gpus"),
    (["--plan", "--model", "x/y", "--gpu_memory", "nan"], "gpu_memory"),
    (["--difficulty", "[]"], "difficulty"),
    (["--difficulty", '{"size": 1'], "difficulty"),
    (["--tracker", "stdout"], "wandb"),
    (["--tracker", "wandb"], "pip install wandb"),
    (["--tracker", "trackio"], "pip install trackio"),
    (["--data", "missing.json"], "missing.json"),
    (["--model", "/nowhere/model", "--data", "ROWS"], "/nowhere/model"),
    (["--out", "/dev/null/x"], "/dev/null/x"),
    (["--stage", "sft"], "demonstrations"),
    (["--prompt_template", "missing.json"], "missing.json"),
    (["--judge", "localhost:8000"], "localhost:8000"),
    (["--judge", "http://localhost:8000/v1", "--judge_key_file", "gone.key"], "key"),
    (["--resume"], "--resume"),
]


@pytest.mark.parametrize("words, expected", BAD_FLAGS)
def test_bad_input_is_one_line_and_exit_code_2(
    words, expected, rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("engine.run.importlib.util.find_spec", lambda name: None)
    words = [str(rows) if word == "ROWS" else word for word in words]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "run")]
    error = refused(monkeypatch, capsys, *words)
    assert expected in error
    assert len(error.strip().splitlines()) == 1


def test_slow_is_for_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(monkeypatch, capsys, "--slow", "--out", tmp_path / "run")


BAD_ROWS = [
    ({"question": "?", "image_path": "0.png"}, "row 2"),
    ({"question": "?", "answer": "a", "image_path": "gone.png"}, "gone.png"),
    ({"question": "?", "answer": "a", "image_path": "rows.json"}, "rows.json"),
]


@pytest.mark.parametrize("row, expected", BAD_ROWS)
def test_a_bad_row_is_named(row, expected, rows, tmp_path, monkeypatch, capsys):
    good = json.loads(rows.read_text())[0]
    bad = rows.with_name("bad.json")
    bad.write_text(json.dumps([good, row]))
    error = refused(monkeypatch, capsys, "--data", bad, "--out", tmp_path)
    assert expected in error
    assert "row 2" in error
    assert len(error.strip().splitlines()) == 1


def test_help_lists_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        train.configure()
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in fields(train.Config):
        assert re.search(rf"--{field.name}\b", text), field.name


# ------------------------------------------------------------------------------- what a run leaves
TEXT = "Which colour? red"


def logits(folder):
    """Of the plain transformers model, by its Auto classes, on a fixed text: (1, T, V)."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits


@pytest.fixture(scope="module")
def whole(tiny, rows, tmp_path_factory):
    """A run of each stage that nothing interrupts: six steps, two checkpoints kept."""
    folder = tmp_path_factory.mktemp("whole")
    for stage in ("rl", "sft"):
        more = ("--stage", stage, "--steps", 6, "--save_every", 1)
        process = start(tiny, rows, folder / stage, *more)
        assert process.wait() == 0, process.text
    return folder


LEFT = """config.json curves.png rollouts.html state step_6/config.json
    step_6/model.safetensors step_6/tokenizer.json step_6/preprocessor_config.json"""


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_run_leaves_what_the_readme_says(stage, whole):
    out = whole / stage
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]
    for row in metrics(out):
        assert KEYS[stage] <= set(row)
    for name in LEFT.split():
        assert (out / name).exists(), name
    # --keep 2
    assert sorted(path.name for path in out.glob("step_*")) == ["step_5", "step_6"]
    assert sorted(path.name for path in out.glob("state/*")) == ["step_5.pt", "step_6.pt"]
    assert not {"unfinished", "discarded"} & {path.name for path in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert config["lr"] == 1e-3
    assert config["versions"]["torch"] == torch.__version__


def test_a_run_says_a_line_a_step(whole):
    text = (whole / "rl.txt").read_text()
    for step in range(1, 7):
        assert f"rl {step}/6" in text
    assert max(len(line) for line in text.splitlines()) <= 250
    assert metrics(whole / "rl")[1]["trajectories_trained"] == 4


def test_what_has_no_meaning_in_sft_is_absent(whole):
    """In metrics.jsonl and on the terminal."""
    for row in metrics(whole / "sft"):
        assert not (KEYS["rl"] - KEYS["sft"]) & set(row)
        assert not any("accuracy" in key or "reward" in key for key in row)
    steps = [line for line in (whole / "sft.txt").read_text().splitlines() if "/6 " in line]
    assert len(steps) == 6
    for line in steps:
        assert "loss" in line
        assert not re.search("accuracy|reward", line)


def test_a_run_without_checkpoints_leaves_pictures_at_its_end(tiny, rows, tmp_path):
    run = make_run(tiny, rows, tmp_path, stage="sft", save_every=0, eval_every=0)
    train.train(run)
    assert (tmp_path / "curves.png").exists()
    assert "Which colour?" in (tmp_path / "rollouts.html").read_text()


@pytest.mark.parametrize("fast", [False, True])
def test_a_checkpoint_is_a_hugging_face_model_with_the_same_logits(fast, whole, tiny):
    folder = whole / "sft" / "step_6"
    policy = load_policy(str(folder))
    if fast:
        policy = FastPolicy(policy)
    ids = policy.tokenizer(TEXT).input_ids
    t = Trajectory(Sample("0", "?", "a"), prompt_length=1)
    t.append(ids[:1], False, policy.image_token)
    t.append(ids[1:], True, policy.image_token)
    with torch.no_grad():
        ours, _ = policy.logprobs([t])

    def theirs(folder):
        logprobs = (logits(folder)[0, :-1] + policy.ban).log_softmax(-1)
        return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    assert torch.allclose(ours, theirs(folder), atol=1e-4)
    assert not torch.allclose(ours, theirs(tiny), atol=1e-2)


# ------------------------------------------------------------------------- ends and new beginnings
@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_killed_run_resumes_number_for_number(stage, tiny, rows, whole, tmp_path):
    """Killed at random moments, among them in the middle of writing a checkpoint.

    Of rl it shows that sampling goes on as it was, of sft that weights and optimizer do.
    """
    out = tmp_path / "killed"
    more = ("--stage", stage, "--steps", 6, "--save_every", 1)
    rng = np.random.default_rng(int(time.time()))
    for kill in range(3):
        resume = ["--resume"] if complete(out) else []
        process = start(tiny, rows, out, *more, *resume)
        if kill == 0:
            process.wait_for(lambda: complete(out))
            process.wait_for((out / "unfinished").exists)
        else:
            step = len(lines(out)) + 1
            process.wait_for(lambda step=step: len(lines(out)) >= step)
            time.sleep(float(rng.uniform(0, 0.3)))
        process.signal(signal.SIGKILL)
        process.wait()
        for folder in out.glob("step_*"):
            logits(folder)  # complete or absent
    process = start(tiny, rows, out, "--resume", "--stage", stage)
    assert process.wait() == 0, process.text
    assert numbers(out) == numbers(whole / stage)
    assert len(numbers(out)) == 6
    moved = numbers(out)[-1]["loss"] != numbers(out)[0]["loss"]
    assert moved == (stage == "sft")


def test_resume_keeps_settings_and_says_what_is_new(
    tiny, rows, whole, tmp_path, monkeypatch, capsys
):
    """--out and --resume are enough, and a setting that is given again is new, and said.

    A run never becomes one of another stage.
    """
    out = tmp_path / "run"
    shutil.copytree(whole / "sft", out)
    again = ["--out", out, "--resume", "--steps", 7, "--weight_decay", 0.1]
    process = Started(tmp_path / "said", *again)
    assert process.wait() == 0, process.text
    assert numbers(out)[:6] == numbers(whole / "sft")
    assert [row["lr"] for row in metrics(out)] == [1e-3] * 7
    assert "--steps 6" in process.text
    assert "--weight_decay 0.0" in process.text
    assert "--lr" not in process.text
    assert json.loads((out / "config.json").read_text())["steps"] == 7
    assert "stage" in refused(monkeypatch, capsys, "--out", out, "--resume", "--stage", "rl")


def contents(folder):
    """{path: bytes} of all files but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_second_run_in_the_same_folder_is_refused_and_destroys_nothing(
    tiny, rows, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    shutil.copytree(whole / "rl", out)
    before = contents(out)
    error = refused(monkeypatch, capsys, *flags(tiny, rows, out))
    assert "--resume" in error
    assert "--out" in error
    assert contents(out) == before


def test_resume_without_a_run_is_refused(tiny, rows, tmp_path, monkeypatch, capsys):
    """Nothing in the folder, or a run that was killed before its first checkpoint."""
    out = tmp_path / "empty"
    assert str(out) in refused(monkeypatch, capsys, *flags(tiny, rows, out, "--resume"))
    out = tmp_path / "early"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert str(out) in refused(monkeypatch, capsys, *flags(tiny, rows, out, "--resume"))


@pytest.mark.parametrize("changed", ["lora_rank", "stage", "task"])
def test_what_was_saved_fits_the_run_that_goes_on(changed, tmp_path, monkeypatch, capsys):
    """It is said before anything is loaded, and which setting it was."""
    monkeypatch.setattr("engine.run.importlib.util.find_spec", lambda name: True)
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text('{"lora_rank": 4, "stage": "rl", "task": "image"}')
    other = {"lora_rank": "8", "stage": "sft", "task": "video"}[changed]
    error = refused(monkeypatch, capsys, "--out", str(out), "--resume", f"--{changed}", other)
    assert f"--{changed}" in error and str(out) in error


def test_a_folder_holds_one_run_at_a_time(tiny, rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    first = start(tiny, rows, out, "--steps", 10_000)
    wait_for(lambda: lines(out))
    error = refused(monkeypatch, capsys, *flags(tiny, rows, out))
    assert "another run" in error
    first.signal(signal.SIGKILL)
    first.wait()


def small_disk(tmp_path):
    """A file system of 8 MB, which only root can have."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    return folder


@pytest.mark.parametrize("limit", ["weights", "state", "disk"])
def test_a_full_disk_stops_and_leaves_the_last_checkpoint(limit, tiny, rows, tmp_path):
    """A file-size limit stands in for the disk, at the weights and at the optimizer's state.

    Root has a small disk too.
    """
    out = small_disk(tmp_path) if limit == "disk" else tmp_path / "run"
    try:
        run = make_run(tiny, rows, out, keep=5)
        train.update(run, [batch_of(run)])
        (out / "metrics.jsonl").touch()
        run.step = 1
        save_state(run)
        size = (out / "step_1" / "model.safetensors").stat().st_size
        allowed = dict(weights=size // 2, state=size + 10_000)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        run.step = 2
        try:
            if limit != "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (allowed[limit], hard))
            with pytest.raises(FullDisk, match="step_2 could not be written.*MiB are free"):
                save_state(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert complete(out) == [out / "state" / "step_1.pt"]
        assert not (out / "step_2").exists()
        assert not (out / "unfinished").exists()
        again = train.Run(run.config, run.samples, resume=complete(out)[-1])
        assert again.step == 1
        assert torch.equal(weights(again), weights(run))
    finally:
        if limit == "disk":
            subprocess.run(["umount", "-l", out], check=True)


def test_sigterm_finishes_the_step_saves_and_exits_0(tiny, rows, tmp_path):
    out = tmp_path / "run"
    process = start(tiny, rows, out, "--steps", 10_000, "--save_every", 0)
    wait_for(lambda: lines(out))
    process.signal(signal.SIGTERM)
    assert process.wait() == 0, process.text
    assert complete(out)[-1].stem == f"step_{len(lines(out))}"


def test_ctrl_c_ends_soon_and_keeps_what_there_is(tiny, rows, tmp_path):
    out = tmp_path / "run"
    process = start(tiny, rows, out, "--steps", 10_000, "--save_every", 1)
    wait_for(lambda: len(lines(out)) >= 2 and complete(out))
    process.signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130, process.text
    assert metrics(out)
    assert complete(out)
    assert "Traceback" not in process.text


def test_progress_of_a_resumed_job_counts_what_is_left(capsys):
    progress = Progress({"first": (10, 2.0), "second": (20, 1.0)})
    assert progress.total == 40
    progress.skip("first", 5)
    assert progress.total == 30
    progress.step("first")
    row = dict(step=6, accuracy=0.5, seconds_rollout=1, seconds_update=1)
    line = progress.line("first", "rl", row)
    assert "6/10" in line
    assert "accuracy 0.50" in line
    assert len(line) <= 100


# ----------------------------------------------------------------------------------------- trackers
TRACKER = """
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
def Image(path):
    return f"image {{path}}"
"""


def tracked(*argv):
    sys.path.insert(0, os.environ["PLACE"])
    command_line(*argv)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_its_log(name, tiny, rows, tmp_path):
    """A module of that name is called in the way that both packages take."""
    record = tmp_path / "calls"
    (tmp_path / f"{name}.py").write_text(TRACKER.format(file=str(record)))
    out = tmp_path / "run"
    for more in (["--steps", 1, "--tracker", name], ["--steps", 2, "--resume"]):
        words = flags(tiny, rows, out, *more)
        process = Started(tmp_path / "text", *words, target=tracked, PLACE=str(tmp_path))
        assert process.wait() == 0, process.text
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
    assert [call[1] for call in calls[1::3]] == [1, 2]
    first = calls[0][1]
    second = calls[3][1]
    assert first["name"] == second["name"]
    assert first["resume"] == second["resume"] == "allow"
    assert first.get("id") == second.get("id")
    assert KEYS["rl"] - {"step"} <= set(calls[1][2])
    assert calls[1][2]["curves"] == f"image {out / 'curves.png'}"
    assert first["config"]["lr"] == 1e-3


def test_tensorboard_gets_numbers_and_curves(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder):
            assert Path(folder) == tmp_path

        def add_scalar(self, key, value, step):
            calls.append((key, value, step))

        def add_image(self, key, image, step, dataformats):
            calls.append((key, image.shape[-1], step))

        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    picture(0).save(tmp_path / "curves.png")
    config = train.Config(out=str(tmp_path), tracker="tensorboard")
    journal = Journal(config, Progress({"rl": (9, 1.0)}), "rl", [])
    journal.begin()
    journal.track(dict(step=3, loss=0.5), True)
    journal.end()
    assert calls == [("step", 3, 3), ("loss", 0.5, 3), ("curves", 3, 3), "flush", "close"]


# ----------------------------------------------------------------------------------- the real thing
def shrink(config):
    """Make the configuration of a real checkpoint that of a small model."""
    text = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_window_layers=2,
        layer_types=["full_attention"] * 2,
    )
    vision = dict(
        hidden_size=32,
        depth=2,
        num_heads=2,
        intermediate_size=64,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
    )
    for part, values in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in values.items():
            setattr(part, name, value)
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
def test_the_official_rows_train_with_the_real_tokenizer(tmp_path):
    """A small random model of the real architecture, with the real tokenizer and photographs."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    source = SHARED / "qwen2.5-vl-7b"
    folder = tmp_path / "model"
    out = tmp_path / "run"
    config = AutoConfig.from_pretrained(source)
    shrink(config)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(source, backend="pil").save_pretrained(folder)
    data = SHARED / "media" / "real_image_val_dataset.json"
    settings = dict(
        model=folder,
        data=data,
        out=out,
        steps=2,
        batch_size=1,
        group_size=2,
        max_new_tokens=6,
        max_turns=2,
        max_pixels=100_000,
        eval_every=0,
        max_oversample=2,
    )
    words = ["--keep_zero_variance"]
    for name, value in settings.items():
        words += [f"--{name}", value]
    process = Started(tmp_path / "text", *words)
    assert process.wait() == 0, process.text
    assert len(metrics(out)) == 2
    for row in metrics(out):
        assert row["visual_tokens"] > 0
        assert math.isfinite(row["loss"])
