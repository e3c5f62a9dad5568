"""Two processes (gloo, FSDP2) do what one does: the same update, the same run, and an end together."""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import test_train
import train
from test_train import ROOT, Started, flags, lines, metrics, numbers, rows, tiny, wait_for  # noqa: F401, two are fixtures


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def together(n, output, *args, **options):
    """n processes as torchrun starts them; each prints to a file of its own."""
    common = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [Started(f"{output}{k}", *args, **options, **common, RANK=str(k), LOCAL_RANK=str(k)) for k in range(n)]


def finish(processes):
    assert [process.wait() for process in processes] == [0] * len(processes), "\n".join(p.text for p in processes)


def one_update(tiny, rows, out, settings, empty):
    """The update of a batch; with torch's sharding where there are several processes."""
    train.join()
    run, config = test_train.make_run(tiny, rows, out, **settings)
    run.optimizer = torch.optim.SGD(run.policy.model.parameters(), 1e-2)
    with run.policy.whole():
        batch = test_train.batch_of(run, (1.0, -0.5, 0.25, -1.0, 0.75))
    groups = [[t] for t in (batch[:1] if empty else batch)]
    result = train.update(run, groups, config, 1e-2)
    train.save_policy(run.policy, out / "saved")
    if run.rank == 0:
        torch.save(result, out / "result.pt")


def updated(tiny, rows, out, world, empty=False, **settings):
    from safetensors.torch import load_file
    out.mkdir()
    finish(together(world, out / "text", tiny, rows, out, settings, empty, target=one_update))
    weights = load_file(out / "saved" / "model.safetensors")
    return torch.cat([x.flatten() for _, x in sorted(weights.items())]), torch.load(out / "result.pt")


@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_give_the_update_of_one(empty, tiny, rows, tmp_path):
    """Also with unequal numbers of micro-batches (five trajectories, one each, or one for both processes), recomputed
    activations, and parameters and optimizer kept on the CPU."""
    one, first = updated(tiny, rows, tmp_path / "one", 1, empty)
    before = updated(tiny, rows, tmp_path / "nothing", 1, empty, max_grad_norm=0.0)[0]
    ways = dict(uneven=dict(tokens_per_microbatch=1, checkpoint_activations=True, offload=True))
    for name, settings in ways.items() if empty else dict(ways, whole={}).items():
        two, second = updated(tiny, rows, tmp_path / name, 2, empty, **settings)
        assert (one - two).norm() / (one - before).norm() < 1e-4 and (one - two).norm() / one.norm() < 1e-5
        for key in ("loss", "grad_norm", "entropy"):
            assert second[key] == pytest.approx(first[key], rel=1e-4)


def sharded_rollout(folder):
    """Only process 0 reads the weights; both then answer as the unsharded policy does, one much longer than the other."""
    import torch.distributed as dist
    from PIL import Image
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from data import Sample
    from model import load_policy, shard_policy
    from rollout import rollout
    train.join()
    rank, alone = dist.get_rank(), load_policy(folder, dtype=torch.float32)
    sample = Sample("0", "What?", "red", images=(Image.linear_gradient("L").convert("RGB"),)) if rank == 0 else \
        Sample("1", "no image", "red", prompt=[{"role": "user", "content": "say"}])

    def answers(policy):
        return [t.tokens for t in rollout(policy, [sample], 2, max_new_tokens=(20, 5)[rank], temperature=0)[0]]
    policy = load_policy(folder, dtype=torch.float32, sharded=True)
    assert all(weight.is_meta for weight in policy.model.parameters()) == (rank > 0)
    shard_policy(policy)
    state = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert rank > 0 or all(torch.equal(state[name], weight) for name, weight in alone.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(alone.model.buffers(), policy.model.buffers()))
    for gather in (True, False):
        with policy.whole(gather):
            assert answers(policy) == answers(alone)


def test_weights_are_read_once_and_generation_may_stay_sharded(tiny, tmp_path):
    """Sharded generation ends although the processes make unequally many forwards, with and without images."""
    finish(together(2, tmp_path / "text", tiny, target=sharded_rollout))


def test_a_run_changes_its_number_of_processes_and_changes_back(tiny, rows, tmp_path):
    """Two processes, then one, then two; what was there stays, and killed and resumed is uninterrupted here too."""
    out, more = tmp_path / "run", ("--save_every", 1, "--stage", "sft")
    finish(together(2, tmp_path / "a", *flags(tiny, rows, out, *more, "--steps", 3)))
    begun = numbers(out)
    finish(together(1, tmp_path / "b", "--out", out, "--resume", "--steps", 4))
    assert numbers(out)[:3] == begun and len(numbers(out)) == 4
    finish(together(2, tmp_path / "c", "--out", out, "--resume", "--steps", 5))
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5] and numbers(out)[:3] == begun
    assert metrics(out)[4]["loss"] < metrics(out)[0]["loss"]


def test_killed_and_resumed_on_two_processes_is_uninterrupted(tiny, rows, tmp_path):
    whole, killed, more = tmp_path / "whole", tmp_path / "killed", ("--save_every", 1, "--steps", 4)
    finish(together(2, tmp_path / "a", *flags(tiny, rows, whole, *more)))
    processes = together(2, tmp_path / "b", *flags(tiny, rows, killed, *more))
    wait_for(lambda: len(lines(killed)) >= 2)
    for process in processes:
        process.signal(signal.SIGKILL)
        process.wait()
    finish(together(2, tmp_path / "c", "--out", killed, "--resume"))
    assert numbers(killed) == numbers(whole)


def test_one_process_s_death_ends_the_other(tiny, rows, tmp_path):
    """Even without torchrun, which ends all and says which process died."""
    processes = together(2, tmp_path / "text", *flags(tiny, rows, tmp_path / "run", "--steps", 10_000, "--save_every", 0))
    wait_for(lambda: len(lines(tmp_path / "run")) >= 1)
    processes[1].signal(signal.SIGKILL)
    assert processes[0].wait(timeout=60) == 1 and "onnection" in processes[0].text, processes[0].text


def test_ctrl_c_under_torchrun_leaves_no_process(tiny, rows, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "train.py"]
    with open(tmp_path / "text", "w") as text:
        process = subprocess.Popen([*map(str, [*words, *flags(tiny, rows, out, "--steps", 10_000, "--stage", "sft", "--save_every", 1)])],
                                   cwd=ROOT, stdout=text, stderr=text, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    wait_for(lambda: len(lines(out)) >= 2, 240)
    session = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and belongs(path, process.pid)]
    assert len(session) >= 4                            # torchrun, two trainers, a forking process of sandboxes
    os.killpg(process.pid, signal.SIGINT)               # what a terminal does
    assert process.wait(timeout=60) != 0
    wait_for(lambda: not [pid for pid in session if Path(f"/proc/{pid}").exists()], 60)
    assert train.complete(out) and "--resume goes on" in (tmp_path / "text").read_text()


def belongs(path, ancestor):
    """Is the process of /proc/N a descendant of `ancestor`?"""
    pid = int(path.name)
    while pid > 1 and pid != ancestor:
        try:
            pid = int(Path(f"/proc/{pid}/status").read_text().split("\nPPid:\t")[1].split("\n")[0])
        except (OSError, IndexError):
            return False
    return pid == ancestor
