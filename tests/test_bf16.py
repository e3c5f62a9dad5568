"""bf16 compute with fp32 master weights, on a CPU: rollout and update agree, and it learns."""

import pytest
import test_train
import torch
from test_train import make_run

import train
from engine import parallel
from engine.batching import flat
from model import load_policy

tiny = test_train.tiny  # fixtures
rows = test_train.rows
taught = test_train.taught


@pytest.fixture
def group():
    """One process that is a group, as --dtype bfloat16 makes it."""
    parallel.join("bfloat16")
    yield
    parallel.leave()


def test_one_process_is_a_group_only_where_it_computes_in_bf16():
    for dtype in ("", "float32"):
        parallel.join(dtype)
        assert not torch.distributed.is_initialized()
        assert parallel.compute_dtype(dtype) is torch.float32
    parallel.join("bfloat16")
    assert parallel.world() == 1
    assert torch.distributed.is_initialized()
    parallel.leave()


def computed_in(run):
    """The types of what a decoder layer is given and of the weights that it computes with."""
    seen = set()
    layer = run.model.model.language_model.layers[1].mlp.down_proj

    def note(layer, inputs):
        seen.update({inputs[0].dtype, layer.weight.dtype})

    layer.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_rollout_and_update_agree(slow, group, taught, rows, tmp_path):
    """Both compute in bf16, with weights, gradients and moments in fp32."""
    run = make_run(taught, rows, tmp_path, dtype="bfloat16", slow=slow, lr=1e-3)
    seen = computed_in(run)
    groups = run.rollout(run.samples, 8, max_new_tokens=40)
    trajectories = flat(groups)
    for place, t in enumerate(trajectories):
        t.advantage = (-1.0) ** place
    assert seen == {torch.bfloat16}
    result = train.update(run, groups)
    assert seen == {torch.bfloat16}
    assert 0 < result["logprob_gap"] < 0.02
    assert result["clip_fraction"] == 0
    for weight in run.model.parameters():
        moments = run.optimizer.state[weight]
        assert weight.dtype is moments["exp_avg"].dtype is torch.float32


def test_a_step_in_bf16_is_about_that_in_fp32(taught, rows, tmp_path):
    """Norm of the gradient, entropy and loss of the same batch, and where the step leads."""
    results = []
    for dtype in ("float32", "bfloat16"):
        parallel.join(dtype)
        run = make_run(taught, rows, tmp_path, stage="sft", dtype=dtype)
        run.optimizer = torch.optim.SGD(run.model.parameters(), 1e-2)
        batch = test_train.batch_of(run)
        results.append([train.update(run, [batch]), parallel.full_weights(run.model)])
        parallel.leave()
    (exact, after), (rounded, near) = results
    for key in ("loss", "entropy", "grad_norm"):
        assert rounded[key] == pytest.approx(exact[key], rel=0.03)
    assert rounded["loss"] != exact["loss"]
    before = load_policy(str(taught)).model.state_dict()
    moved = sum(float((after[name] - before[name]).norm()) ** 2 for name in before)
    apart = sum(float((after[name] - near[name]).norm()) ** 2 for name in before)
    assert apart < 0.1**2 * moved


def test_small_steps_are_not_rounded_away(group, tiny, rows, tmp_path):
    """A master weight in bf16 would not move by a thousandth of itself."""
    run = make_run(tiny, rows, tmp_path, stage="sft", dtype="bfloat16")
    run.optimizer = torch.optim.SGD(run.model.parameters(), 1e-6)
    before = parallel.full_weights(run.model)["lm_head.weight"].clone()
    train.update(run, [test_train.batch_of(run)])
    after = parallel.full_weights(run.model)["lm_head.weight"]
    moved = (after != before).float().mean()
    seen = (after.bfloat16() != before.bfloat16()).float().mean()  # also in bf16
    assert moved > 0.1
    assert seen < 0.2 * moved


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_run_in_bf16_resumes_number_for_number(stage, tiny, rows, tmp_path):
    """With the command line, and its checkpoint is in fp32."""
    found = []
    for name, parts in (("whole", [4]), ("parts", [2, 4])):
        out = tmp_path / name
        for steps in parts:
            words = test_train.flags(tiny, rows, out, "--dtype", "bfloat16", "--save_every", 1)
            words += ["--stage", stage, "--steps", steps]
            if out.exists():
                words = ["--out", out, "--resume", "--steps", steps]
            process = test_train.Started(tmp_path / f"{name}.txt", *words)
            assert process.wait() == 0, process.text
        found.append(test_train.numbers(out))
    whole, parts = found
    assert len(whole) == 4
    assert whole == parts
    saved = load_policy(str(out)).model.state_dict()
    rounded = [torch.equal(weight, weight.bfloat16().float()) for weight in saved.values()]
    assert not all(rounded)  # weights that had no gradient are as they were
