"""Two processes (gloo, FSDP2) do what one does: the same update, the same run, and an end together."""
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import tiny_policy
from test_train import ANSWER, LOOK, ROOT, lines, wait_for

UPDATE = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
import train, test_train
from pathlib import Path
if {world} > 1:
    dist.init_process_group("gloo")
run, config = test_train.make_run({model!r}, Path({rows!r}), Path({out!r}), tokens_per_microbatch={budget}, checkpoint_activations={recompute})
run.optimizer = torch.optim.SGD(run.policy.model.parameters(), 1e-2)
with run.policy.whole():
    trajectories = test_train.batch_of(run, (1.0, -0.5, 0.25, -1.0, 0.75))
metrics = train.update(run, trajectories, config, 1e-2)
train.save_policy(run.policy, {out!r} + "/saved")
if run.rank == 0:
    print("METRICS", metrics)
"""


def torchrun(n, *command, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={port}", *map(str, command)],
                            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            start_new_session=True, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny checkpoint and five rows: images, a text-only prompt in context, looks or none."""
    folder = tmp_path_factory.mktemp("files")
    tiny_policy(folder / "model", [LOOK, ANSWER] * 3, vocabulary=330)
    rows = []
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"id": str(i), "question": "Which colour?" * (i + 1), "answer": "red", "image_path": f"{i}.png",
                     "turns": [LOOK] * (i % 3) + [ANSWER]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def weights(folder):
    from safetensors.torch import load_file
    return torch.cat([x.flatten() for _, x in sorted(load_file(folder / "model.safetensors").items())])


def updated(files, out, world, budget, recompute=False):
    script = out / "update.py"
    out.mkdir()
    script.write_text(UPDATE.format(root=str(ROOT), tests=str(ROOT / "tests"), world=world, model=str(files / "model"),
                                    rows=str(files / "rows.json"), out=str(out), budget=budget, recompute=recompute))
    process = torchrun(world, script)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    return weights(out / "saved"), eval(text.split("METRICS ")[1].splitlines()[0])


def test_two_processes_give_the_update_of_one(files, tmp_path):
    """Also with unequal numbers of micro-batches (five trajectories, one each) and recomputed activations."""
    before = weights(files / "model")
    one, first = updated(files, tmp_path / "one", 1, 10 ** 6)
    for name, budget, recompute in (("whole", 10 ** 6, False), ("uneven", 1, True)):
        two, second = updated(files, tmp_path / name, 2, budget, recompute)
        assert (one - two).norm() / (one - before).norm() < 1e-4 and (one - two).norm() / one.norm() < 1e-5
        for key in ("loss", "grad_norm", "entropy"):
            assert second[key] == pytest.approx(first[key], rel=1e-4)


def flags(files, out, *more):
    return ["train.py", "--model", files / "model", "--data", files / "rows.json", "--out", out, "--batch_size", 2, "--group_size", 2,
            "--max_new_tokens", 8, "--max_context", 1024, "--keep_zero_variance", "--eval_every", 0, "--lr", 1e-3, *more]


def test_a_run_on_two_processes_resumes_on_one(files, tmp_path):
    process = torchrun(2, *flags(files, tmp_path, "--steps", 2))
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert len(lines(tmp_path)) == 2 and (tmp_path / "step_2" / "model.safetensors").exists()
    process = torchrun(1, *flags(files, tmp_path, "--steps", 3, "--resume"))
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_one_process_s_death_ends_all(files, tmp_path):
    process = torchrun(2, *flags(files, tmp_path, "--steps", 10_000, "--save_every", 0))
    wait_for(lambda: len(lines(tmp_path)) >= 1, 240)
    workers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and p.joinpath("cmdline").exists()
               and str(tmp_path).encode() in (p / "cmdline").read_bytes() and f"\nPPid:\t{process.pid}\n" in (p / "status").read_text()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert not [w for w in workers if Path(f"/proc/{w}").exists()]
