"""Adapters: they learn, the model's own weights stay, and what is saved is what was trained."""

import importlib.util

import pytest
import test_train
import torch
from test_train import make_run
from transformers import AutoModelForImageTextToText

import train
from data import DataError
from engine import lora, parallel
from engine.checkpoint import save_state
from engine.fast import FastPolicy
from model import load_policy, save_policy

pytest.importorskip("peft")
tiny = test_train.tiny  # fixtures
rows = test_train.rows
taught = test_train.taught

DTYPES = ["float32", "bfloat16"]


@pytest.fixture(params=DTYPES)
def dtype(request):
    parallel.join(request.param)
    yield request.param
    parallel.leave()


def lora_run(tiny, rows, out, dtype="float32", **settings):
    usual = dict(lora_rank=4, stage="sft", lr=1e-2, dtype=dtype)
    return make_run(tiny, rows, out, **{**usual, **settings})


def groups_of(run):
    return [[t] for t in test_train.batch_of(run)]


def own_weights(run):
    """The model's own weights, copied."""
    weights = parallel.full_weights(run.model)
    return {name: w.clone() for name, w in weights.items() if lora.ADAPTER not in name}


WAYS = dict(
    plain={},
    slow=dict(slow=True),
    recomputed=dict(checkpoint_activations=True),
    minibatches=dict(minibatches=2),
)


@pytest.mark.parametrize("way", WAYS)
def test_it_learns_and_the_model_s_own_weights_do_not_move(way, dtype, tiny, rows, tmp_path):
    run = lora_run(tiny, rows, tmp_path, dtype, **WAYS[way])
    groups = groups_of(run)
    before = own_weights(run)
    losses = [train.update(run, groups)["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.5
    for name, weight in own_weights(run).items():
        assert torch.equal(weight, before[name]), name
    trained = [name for name, w in run.model.named_parameters() if w.requires_grad]
    assert all(lora.ADAPTER in name for name in trained)
    assert len(trained) == 2 * 7 * len(run.model.model.language_model.layers)
    assert not any("visual" in name for name in trained)


def test_adapters_begin_as_nothing_and_the_seed_makes_them(tiny, rows, tmp_path):
    run = lora_run(tiny, rows, tmp_path)
    trajectories = test_train.batch_of(run)
    plain = FastPolicy(load_policy(str(tiny)))
    expected = plain.logprobs(trajectories)[0]
    assert torch.equal(run.policy.logprobs(trajectories)[0], expected)
    drawn = [lora.adapters(lora_run(tiny, rows, tmp_path, seed=seed).model) for seed in (0, 0, 1)]
    same = [all(torch.equal(made[name], drawn[0][name]) for name in made) for made in drawn]
    assert same == [True, True, False]


def test_the_checkpoint_is_the_trained_policy_for_everybody(dtype, tiny, rows, tmp_path):
    """Its tensors have a plain model's names. In bf16 the policy rounds what the other does not."""
    run = lora_run(tiny, rows, tmp_path, dtype)
    groups = groups_of(run)
    trajectories = [t for (t,) in groups]
    start = run.policy.logprobs(trajectories)[0]
    for _ in range(3):
        train.update(run, groups)
    run.step = 3
    save_state(run)
    folder = str(tmp_path / "step_3")
    trained = run.policy.logprobs(trajectories)[0]
    merged = FastPolicy(load_policy(folder)).logprobs(trajectories)[0]
    near = 1e-4 if dtype == "float32" else 0.1
    assert (trained - start).abs().max() > 1
    assert (trained - merged).abs().max() < near
    theirs, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([trajectories[0].tokens[:3]])
    ours = load_policy(folder).model
    assert torch.allclose(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5)


def test_merged_weights_are_those_of_peft(tiny, rows, tmp_path):
    """And not only what this project takes for them."""
    from peft.tuners.lora import LoraLayer

    run = lora_run(tiny, rows, tmp_path)
    groups = groups_of(run)
    for _ in range(2):
        train.update(run, groups)
    ours = lora.merged(parallel.full_weights(run.model))
    layers = [(n, part) for n, part in run.model.named_modules() if isinstance(part, LoraLayer)]
    assert layers
    for name, layer in layers:
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        assert torch.allclose(ours[f"{name}.weight"], expected, atol=1e-6)


def test_rollout_and_update_have_the_same_policy(dtype, taught, rows, tmp_path):
    """Also once the adapters have moved."""
    run = lora_run(taught, rows, tmp_path, dtype, stage="rl")
    for _ in range(3):
        groups = run.rollout(run.samples, 4, max_new_tokens=20)
        for group in groups:
            for place, t in enumerate(group):
                t.advantage = (-1.0) ** place
        result = train.update(run, groups)
        assert result["logprob_gap"] < (1e-4 if dtype == "float32" else 0.02)


def test_a_run_resumes_number_for_number(tiny, rows, tmp_path):
    """On the first weights with the adapters of the state, and not on the merged ones."""
    found = []
    for name, parts in (("whole", [4]), ("parts", [2, 4])):
        out = tmp_path / name
        for steps in parts:
            words = test_train.flags(tiny, rows, out, "--lora_rank", 4, "--save_every", 1)
            words += ["--steps", steps]
            if out.exists():
                words = ["--out", out, "--resume", "--steps", steps]
            process = test_train.Started(tmp_path / f"{name}.txt", *words)
            assert process.wait() == 0, process.text
        found.append(test_train.numbers(out))
        last = load_policy(str(out)).model.state_dict()
        found[-1].append({key: float(weight.double().sum()) for key, weight in last.items()})
    assert len(found[0]) == 5
    assert found[0] == found[1]
    state = torch.load(out / "state" / "step_4.pt")
    assert state["adapters"]
    assert set(state["optimizer"]["state"]) == set(state["adapters"])


def test_a_checkpoint_without_adapters_has_none_in_its_state(tiny, rows, tmp_path):
    run = lora_run(tiny, rows, tmp_path, lora_rank=0)
    assert lora.adapters(run.model) == {}
    weights = run.model.state_dict()
    assert lora.merged(weights).keys() == weights.keys()
    save_policy(run.policy, tmp_path / "saved")
    again = load_policy(tmp_path / "saved").model.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    lora.check_adapters(0)
    with pytest.raises(DataError, match="pip install peft"):
        lora.check_adapters(4)
