"""Two processes (gloo, FSDP2) do what one does: the same update, the same run, an end together."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_train
import torch
from test_train import ROOT, Started, flags, lines, metrics, numbers, wait_for

import train
from data import Sample
from engine import parallel
from engine.checkpoint import complete, save_policy
from engine.fast import FastPolicy
from model import load_policy
from rollout import rollout

tiny = test_train.tiny  # fixtures
rows = test_train.rows


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def together(n, output, *args, **options):
    """n processes as torchrun starts them; each prints to a file of its own."""
    common = dict(
        WORLD_SIZE=str(n),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
    )
    started = []
    for rank in range(n):
        own = dict(RANK=str(rank), LOCAL_RANK=str(rank))
        started.append(Started(f"{output}{rank}", *args, **options, **common, **own))
    return started


def finish(processes):
    codes = [process.wait() for process in processes]
    assert codes == [0] * len(processes), "\n".join(process.text for process in processes)


# --------------------------------------------------------------------------------------- the update
def one_update(tiny, rows, out, settings, empty):
    """The update of a batch; with torch's sharding where there are several processes, or bf16."""
    parallel.join(settings.get("dtype", ""))
    run = test_train.make_run(tiny, rows, out, **settings)
    run.optimizer = torch.optim.SGD(run.model.parameters(), 1e-2)
    alone = FastPolicy(load_policy(str(tiny), dtype=torch.float32))
    sharded = run.policy
    run.policy = alone  # the same log-probs of the sampler everywhere, bit for bit
    batch = test_train.batch_of(run)
    run.policy = sharded
    groups = [[t] for t in (batch[:1] if empty else batch)]
    result = train.update(run, groups)
    save_policy(run.policy, out / "saved")
    if parallel.rank() == 0:
        torch.save(result, out / "result.pt")
    parallel.leave()


def updated(tiny, rows, out, world, empty=False, **settings):
    """Weights after an update by so many processes, and its metrics."""
    from safetensors.torch import load_file

    out.mkdir()
    arguments = (tiny, rows, out, settings, empty)
    finish(together(world, out / "text", *arguments, target=one_update))
    weights = load_file(out / "saved" / "model.safetensors")
    flat = torch.cat([weight.flatten() for _, weight in sorted(weights.items())])
    return flat, torch.load(out / "result.pt")


UNEVEN = dict(tokens_per_microbatch=1, checkpoint_activations=True, offload=True)


@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_give_the_update_of_one(empty, tiny, rows, tmp_path):
    """Also with unequal numbers of micro-batches: five trajectories, one each, or one for both.

    And with recomputed activations, and parameters and optimizer in main memory.
    """
    one, first = updated(tiny, rows, tmp_path / "one", 1, empty)
    before, _ = updated(tiny, rows, tmp_path / "nothing", 1, empty, max_grad_norm=0.0)
    assert (one - before).norm() > 0
    ways = dict(uneven=UNEVEN)
    if not empty:
        ways["whole"] = {}
    for name, settings in ways.items():
        two, second = updated(tiny, rows, tmp_path / name, 2, empty, **settings)
        assert (one - two).norm() / (one - before).norm() < 1e-4
        assert (one - two).norm() / one.norm() < 1e-5
        for key in ("loss", "grad_norm", "entropy", "clip_fraction", "logprob_gap"):
            assert second[key] == pytest.approx(first[key], rel=1e-4, abs=1e-6), key


BF16 = dict(dtype="bfloat16")


def test_two_processes_give_the_update_of_one_in_bf16(tiny, rows, tmp_path):
    """To bf16's rounding, since each of their matmuls has other rows."""
    one, first = updated(tiny, rows, tmp_path / "one", 1, **BF16)
    before, _ = updated(tiny, rows, tmp_path / "nothing", 1, max_grad_norm=0.0, **BF16)
    two, second = updated(tiny, rows, tmp_path / "two", 2, **BF16)
    assert (one - two).norm() / (one - before).norm() < 0.02
    for key in ("loss", "grad_norm", "entropy"):
        assert second[key] == pytest.approx(first[key], rel=0.01, abs=1e-3), key


def test_two_processes_train_the_adapters_of_one(tiny, rows, tmp_path):
    """The merged weights are equal."""
    pytest.importorskip("peft")
    lora = dict(lora_rank=4)
    one, first = updated(tiny, rows, tmp_path / "one", 1, **lora)
    before, _ = updated(tiny, rows, tmp_path / "nothing", 1, max_grad_norm=0.0, **lora)
    assert (one - before).norm() > 0
    for name, settings in dict(whole={}, uneven=UNEVEN).items():
        two, second = updated(tiny, rows, tmp_path / name, 2, **lora, **settings)
        assert (one - two).norm() / (one - before).norm() < 1e-3
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


# -------------------------------------------------------------------------------------- the weights
def own_sample(rank):
    """Process 0 has a picture, process 1 has none."""
    from PIL import Image

    if rank == 0:
        picture = Image.linear_gradient("L").convert("RGB")
        return Sample("0", "What?", "red", images=(picture,))
    return Sample("1", "no image", "red", prompt=[{"role": "user", "content": "say"}])


def sharded_rollout(folder):
    """Only process 0 reads the weights, and both then answer as the unsharded policy does.

    One answers much longer than the other.
    """
    import torch.distributed as dist

    parallel.join()
    rank = dist.get_rank()
    alone = load_policy(folder, dtype=torch.float32)
    policy = load_policy(folder, dtype=torch.float32, sharded=True)
    assert all(weight.is_meta for weight in policy.model.parameters()) == (rank > 0)
    parallel.shard(policy)
    state = parallel.full_weights(policy.model)
    if rank == 0:
        for name, weight in alone.model.state_dict().items():
            assert torch.equal(state[name], weight), name
    buffers = zip(alone.model.buffers(), policy.model.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)
    sample = own_sample(rank)

    def answers(policy):
        (group,) = rollout(policy, [sample], 2, max_new_tokens=(20, 5)[rank], temperature=0)
        return [t.tokens for t in group]

    expected = answers(FastPolicy(alone))
    fast = FastPolicy(policy)
    for _ in range(2):
        with parallel.whole(policy.model):
            assert answers(fast) == expected
    assert parallel.gather([rank] * (rank + 1)) == [0, 1, 1]
    parallel.leave()


def test_weights_are_read_once_and_processes_generate_at_their_own_pace(tiny, tmp_path):
    """They make unequally many forwards, with and without pictures."""
    finish(together(2, tmp_path / "text", tiny, target=sharded_rollout))


# ------------------------------------------------------------------------------------------ the run
def test_two_processes_recite_what_one_does(tiny, rows, tmp_path):
    """The rows of metrics.jsonl are equal to rounding: same demonstrations, in sum."""
    found = []
    for world in (1, 2):
        out = tmp_path / str(world)
        words = flags(tiny, rows, out, "--stage", "sft", "--steps", 3, "--batch_size", 3)
        finish(together(world, tmp_path / f"text{world}", *words))
        found.append(numbers(out))
    one, two = found
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_run_changes_its_number_of_processes_and_changes_back(tiny, rows, tmp_path):
    """Two processes, then one, then two, and what was there stays."""
    out = tmp_path / "run"
    words = flags(tiny, rows, out, "--save_every", 1, "--stage", "sft", "--steps", 3)
    finish(together(2, tmp_path / "a", *words))
    begun = numbers(out)
    finish(together(1, tmp_path / "b", "--out", out, "--resume", "--steps", 4))
    assert numbers(out)[:3] == begun
    assert len(numbers(out)) == 4
    finish(together(2, tmp_path / "c", "--out", out, "--resume", "--steps", 5))
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5]
    assert numbers(out)[:3] == begun
    assert metrics(out)[4]["loss"] < metrics(out)[0]["loss"]


def test_killed_and_resumed_on_two_processes_is_uninterrupted(tiny, rows, tmp_path):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    more = ("--save_every", 1, "--steps", 4)
    finish(together(2, tmp_path / "a", *flags(tiny, rows, whole, *more)))
    processes = together(2, tmp_path / "b", *flags(tiny, rows, killed, *more))
    wait_for(lambda: len(lines(killed)) >= 2)
    for process in processes:
        process.signal(signal.SIGKILL)
        process.wait()
    finish(together(2, tmp_path / "c", "--out", killed, "--resume"))
    assert numbers(killed) == numbers(whole)


# --------------------------------------------------------------------------------------- their ends
def test_one_process_s_death_ends_the_other(tiny, rows, tmp_path):
    """Even without torchrun, which ends all and says which process died."""
    out = tmp_path / "run"
    words = flags(tiny, rows, out, "--steps", 10_000, "--save_every", 0)
    processes = together(2, tmp_path / "text", *words)
    wait_for(lambda: lines(out))
    processes[1].signal(signal.SIGKILL)
    assert processes[0].wait(timeout=60) == 1
    assert "onnection" in processes[0].text, processes[0].text


def torchrun(*words, text):
    """torchrun with two processes, in a session of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [*launch, f"--master_port={free_port()}", "train.py", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=text,
        stderr=text,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def belongs(path, ancestor):
    """Is the process of /proc/N a descendant of `ancestor`?"""
    pid = int(path.name)
    while pid > 1 and pid != ancestor:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            pid = int(status.split("\nPPid:\t")[1].split("\n")[0])
        except (OSError, IndexError):
            return False
    return pid == ancestor


def test_ctrl_c_under_torchrun_leaves_no_process(tiny, rows, tmp_path):
    out = tmp_path / "run"
    words = flags(tiny, rows, out, "--steps", 10_000, "--stage", "sft", "--save_every", 1)
    with open(tmp_path / "text", "w") as text:
        process = torchrun(*words, text=text)
    wait_for(lambda: len(lines(out)) >= 2, 240)
    paths = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    family = [path for path in paths if belongs(path, process.pid)]
    assert len(family) >= 4  # torchrun, two trainers, a process that forks sandboxes
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.wait(timeout=60) != 0
    wait_for(lambda: not any(path.exists() for path in family), 60)
    assert complete(out)
    assert "--resume" in (tmp_path / "text").read_text()
