"""What --plan says against what is measured here, on the tiny policy and a small one."""

import gc
import json
import sys
from dataclasses import replace

import bench
import pytest
import test_train
import torch
from test_train import SHARED, make_run

import train
from data import DataError
from engine import plan
from engine.batching import flat
from engine.lora import ADAPTER
from engine.plan import Memory, Needs, Shape, count
from model import load_policy
from rollout import Recital, rollout

tiny = test_train.tiny  # fixtures
rows = test_train.rows
SEVEN_B = SHARED / "qwen2.5-vl-7b"
GB = plan.GB


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The model that tests/bench.py measures: hidden size 256, 4 layers."""
    return bench.learner()


def shape_of(policy, folder, rank=0):
    policy.model.config.save_pretrained(folder)
    return Shape(str(folder), torch.float32, rank)


def trained_memory(policy, trajectories):
    """Bytes at the peak of log-probs and backward, of what they make, without gradients."""
    known = [*policy.model.parameters(), *policy.model.buffers(), policy.ban]
    for weight in policy.model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        known += [weight.grad] if weight.requires_grad else []
    gc.collect()
    with Memory(known) as memory:
        policy.logprobs(trajectories)[0].sum().backward()
    return memory.most


def sizes(policy, trajectories):
    """Packed tokens, patches, and sampled tokens of a batch."""
    firsts = {id(t.sample): t for t in trajectories}.values()
    tokens = sum(t.prompt_length - 1 for t in firsts)
    tokens += sum(len(t.tokens) - t.prompt_length for t in trajectories)
    pictures = {image.tobytes(): image for t in trajectories for image in t.images}
    _, grid = policy.pixels(list(pictures.values()))
    return tokens, int(grid.prod(1).sum()), sum(sum(t.action_mask) for t in trajectories)


def planned(shape, policy, trajectories, recompute=False):
    tokens, patches, sampled = sizes(policy, trajectories)
    return shape.activations(tokens, patches, recompute) + shape.logits(sampled)


WAYS = {
    "all weights": (0, False),
    "recomputed": (0, True),
    "adapters": (4, False),
    "adapters, recomputed": (4, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_activations_of_the_tiny_policy(way, tiny, rows, tmp_path):
    rank, recompute = WAYS[way]
    if rank:
        pytest.importorskip("peft")
    run = make_run(tiny, rows, tmp_path, lora_rank=rank, checkpoint_activations=recompute)
    batch = flat(rollout(Recital(run.policy), run.samples, 1))
    shape = Shape(str(tiny), torch.float32, rank)
    measured = trained_memory(run.policy, batch)
    assert planned(shape, run.policy, batch, recompute) == pytest.approx(measured, rel=0.15)


def test_activations_of_a_small_model(small, tmp_path):
    shape = shape_of(small, tmp_path)
    for group in (bench.group_of(1, 16, 1500), bench.group_of(2, 300, 700)):
        measured = trained_memory(small, group)
        assert planned(shape, small, group) == pytest.approx(measured, rel=0.15)


def test_logits_at_a_large_vocabulary(tmp_path):
    policy = bench.learner(hidden=128, layers=1, vocabulary=300, padded=60_000)
    shape = shape_of(policy, tmp_path)
    group = bench.group_of(1, 16, 500)
    assert shape.logits(500) > 5 * shape.activations(516, 0, False)
    assert planned(shape, policy, group) == pytest.approx(trained_memory(policy, group), rel=0.15)


def test_the_cache_of_a_rollout(small, tmp_path):
    """Of rows that sample token by token, and so grow it as the plan assumes."""
    from rollout import Limits

    shape = shape_of(small, tmp_path)
    stops = small.policy.stops
    small.policy.stops = lambda ids: False
    try:
        trajectories = bench.group_of(6, 40, 0)
        limits = Limits(max_new_tokens=150)
        small.act(trajectories, limits, lambda t, action: None)
        held = 0
        for layer in small.cache.layers.values():
            held += sum(tensor.nbytes for tensor in layer)
    finally:
        small.policy.stops = stops
        small.forget()
    assert shape.cache(6, 150) == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_gradients_and_optimizer_are_exact(rank, tiny, rows, tmp_path):
    if rank:
        pytest.importorskip("peft")
    run = make_run(tiny, rows, tmp_path, lora_rank=rank, dtype="float32", stage="sft")
    train.update(run, [test_train.batch_of(run)])
    needs = Needs(run.config)
    assert needs.weights == sum(weight.nbytes for weight in run.model.parameters())
    trained = [weight for weight in run.model.parameters() if weight.requires_grad]
    assert needs.gradients == sum(weight.nbytes for weight in trained)
    moments = []
    for state in run.optimizer.state.values():
        moments += [state["exp_avg"], state["exp_avg_sq"]]
    assert needs.optimizer == sum(moment.nbytes for moment in moments)
    adapters = [w for name, w in run.model.named_parameters() if ADAPTER in name]
    assert needs.shape.trained == count(adapters if rank else run.model.parameters())


def test_alive_tensors_are_counted_once_and_until_they_go():
    weight = torch.zeros(1000)
    with Memory([weight]) as memory:
        view = weight[:10]
        made = torch.zeros(100)
        again = made.view(10, 10)
        assert memory.now == memory.most == 400
        del made, view
        assert memory.now == 400
        del again
        assert memory.now == 0
        assert memory.most == 400


# ------------------------------------------------------------------------------------ the command
def asked(model=SEVEN_B, gpus=1):
    """The paper's settings."""
    return train.Config(model=str(model), gpus=gpus)


needs_config = pytest.mark.skipif(not SEVEN_B.exists(), reason="needs the 7B's config")


@needs_config
def test_the_seven_b_by_hand():
    """8.29 G parameters: fp32 weights and gradients, two moments, and a copy in bf16."""
    needs = Needs(asked(gpus=8))
    assert needs.shape.parameters == 8_292_166_656
    assert needs.weights == needs.gradients == 4 * 8_292_166_656 / 8
    assert needs.optimizer == 2 * needs.weights
    assert needs.copy == 2 * 8_292_166_656
    pair = 28 * 2 * 4 * 128 * 2  # layers, key and value, heads, size, bytes
    least = needs.rows * 52_480 * pair
    assert least <= needs.cache <= 1.5 * least
    assert needs.rows == 32


@needs_config
def test_what_saves_memory_does():
    config = asked(gpus=8)
    before = Needs(config)
    recomputed = Needs(replace(config, checkpoint_activations=True))
    assert recomputed.activations < 0.1 * before.activations
    offloaded = Needs(replace(config, offload=True))
    assert offloaded.weights == offloaded.optimizer == 0
    assert offloaded.main_memory == before.weights + before.gradients + before.optimizer
    halved = Needs(replace(config, dtype="float32"))
    assert halved.copy == 2 * before.copy
    assert Needs(replace(config, gpus=16)).weights == before.weights / 2


@needs_config
def test_adapters_save_the_optimizer_and_half_of_the_weights():
    pytest.importorskip("peft")
    before = Needs(asked(gpus=8))
    adapted = Needs(replace(asked(gpus=8), lora_rank=32))
    assert adapted.optimizer < 0.05 * before.optimizer
    assert adapted.weights < 0.6 * before.weights


@needs_config
def test_the_flags_that_are_advised_make_it_fit():
    config = asked(gpus=8)
    assert Needs(config).most > 80 * GB
    lines = plan.advise(config)
    assert lines[-1].startswith("fits")
    for line in lines[:-1]:
        flag = line.split("--")[1].split(" saves")[0]
        name, _, value = flag.partition(" ")
        kind = type(getattr(config, name))
        config = replace(config, **{name: kind(value) if value else True})
    assert Needs(config).most <= 80 * GB
    assert plan.advise(config) == lines[-1:]
    lines = plan.advise(replace(config, gpu_memory=1.0))
    assert lines[-1].startswith("does not fit")


def run_plan(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        train.main()
    return ended.value.code


@needs_config
def test_the_command_prints_and_writes_nothing(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    code = run_plan(monkeypatch, "--model", SEVEN_B, "--gpus", 8, "--out", out)
    assert not code
    assert not out.exists()
    printed = capsys.readouterr().out
    assert "8.29 G parameters" in printed
    assert max(map(len, printed.splitlines())) <= 100 + len(str(SEVEN_B))


def test_the_plan_needs_a_model_and_reads_its_config(monkeypatch, capsys, tmp_path):
    assert run_plan(monkeypatch, "--model", "") == 2
    assert "--model" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert run_plan(monkeypatch, "--model", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "llava" in line


def test_a_plan_takes_no_weights(tiny, tmp_path):
    """The config alone is enough."""
    config = (tiny / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(DataError):
        load_policy(tmp_path)
    assert Needs(asked(model=tmp_path)).most == Needs(asked(model=tiny)).most
