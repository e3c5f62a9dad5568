"""Measure what the README says about speed and size, as ratios taken in one run: `python tests/bench.py NAME`."""
import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PLOT = "plt.imshow(image_clue_0.crop((0, 0, 640, 480))); plt.show()"
IMPORT_FOR_ITSELF = """
import sys
import numpy as np, matplotlib, decord
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
exec(sys.stdin.readline())
sys.stdout.flush()
"""


def median_ms(action, n):
    """Median milliseconds of n runs."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def descendants(pid):
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def pss_mib(pid):
    """Proportional set size of a process: its own pages and its share of those that it has in common with others."""
    try:
        return int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) / 1024
    except OSError:
        return 0.0


def sandbox(cycles=1000):
    """Start, call and plot of a sandbox against a process that imports for itself; memory; what cycles leave behind."""
    from PIL import Image
    from sandbox import WAITING, Sandbox, _pool
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")

    def by_itself():
        command = [sys.executable, "-c", IMPORT_FOR_ITSELF]
        subprocess.run(command, input="print(1)\n", text=True, capture_output=True, check=True)

    def start():
        with Sandbox() as box:
            first.append(time.perf_counter())
            assert box.run("print(1)").text == "1\n"
            first.append(time.perf_counter())

    def started():
        """Milliseconds from Sandbox() to its first result, close() apart."""
        times = []
        for _ in range(15):
            time.sleep(0.15)
            begin = time.perf_counter()
            start()
            times.append((first[-1] - begin) * 1e3)
        return statistics.median(times)

    def drain(count):
        """Take away children that wait: with none, each has to be made."""
        for _ in range(count):
            for fd in socket.recv_fds(_pool.control, 4096, 2)[1]:
                os.close(fd)
    first = []
    by_itself()
    reference = median_ms(by_itself, 5)
    start()
    print(f"imports for itself: first result after {reference:.0f} ms")
    for name, waiting, target in (("warm pool", WAITING, 100), ("cold", 0, 20)):
        drain(WAITING - waiting)
        value = started()
        print(f"{name}: first result after {value:.1f} ms, {reference / value:.0f}x faster (target {target}x)")

    picture = Image.effect_noise((1024, 768), 80).convert("RGB")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def plot_here():
        plt.imshow(picture.crop((0, 0, 640, 480)))
        plt.gcf().canvas.draw()
        Image.fromarray(__import__("numpy").asarray(plt.gcf().canvas.buffer_rgba())).convert("RGB")
        plt.close("all")
    with Sandbox([picture]) as box:
        box.run(PLOT), plot_here()
        print(f"print(1): {median_ms(lambda: box.run('print(1)'), 500):.3f} ms a call (target 1)")
        shown = median_ms(lambda: box.run("image_clue_0.crop((0, 0, 56, 56)).show()"), 500)
        print(f"crop and show with PIL: {shown:.3f} ms a call")
        pairs = [(median_ms(lambda: box.run(PLOT), 1), median_ms(plot_here, 1)) for _ in range(15)]     # interleaved
        there, here = (statistics.median(column) for column in zip(*pairs))
        print(f"imshow and show of 640x480: {there:.0f} ms, in-process {here:.0f} ms, "
              f"{there / here:.2f} times (target 1.5)")
        assert len(box.run(PLOT).images) == 1

    before = descendants(os.getpid())
    _pool.control.send(b"f" * 32)
    time.sleep(5)
    waiting = descendants(os.getpid()) - before
    print(f"a waiting sandbox: {statistics.mean(map(pss_mib, waiting)):.1f} MiB PSS (target 8)")
    boxes, million = [], Image.effect_noise((1000, 1000), 80).convert("RGB")

    def make():
        boxes.append(Sandbox([million]))
        boxes[-1].run("image_clue_0.crop((0, 0, 99, 99)).show()")
    threads = [threading.Thread(target=lambda: [make() for _ in range(16)]) for _ in range(8)]
    begin = time.perf_counter()
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    total = sum(map(pss_mib, descendants(os.getpid())))
    print(f"{len(boxes)} at once, a megapixel each: {total:.0f} MiB PSS all together (target 2048), "
          f"made and run in {time.perf_counter() - begin:.1f} s")
    while boxes:
        boxes.pop().close()
    drain(32 - WAITING)
    time.sleep(2)

    def state():
        time.sleep(1)
        return dict(processes=len(descendants(os.getpid())), descriptors=len(os.listdir("/proc/self/fd")),
                    directories=len(list(Path(tempfile.gettempdir()).glob("sandbox-*/*"))),
                    trainer_mib=round(pss_mib(os.getpid())),
                    server_mib=round(max(map(pss_mib, descendants(_pool.server.pid) | {_pool.server.pid}))))
    earlier = state()
    begin = time.perf_counter()
    for _ in range(cycles):
        with Sandbox() as box:
            box.run("print(1)")
    each = (time.perf_counter() - begin) / cycles * 1e3
    print(f"{cycles} create-run-close cycles, {each:.1f} ms each: before {earlier}, after {state()}")


def forced_groups(policy, turns, slow=False, n_tokens=24):
    """Rollouts of fixed length: every turn has n_tokens sampled tokens and then looks, whatever it says."""
    import rollout as loop
    from tasks.puzzles import puzzles
    policy.stops, find_code = (lambda ids: len(ids) >= n_tokens), loop.find_code
    loop.find_code = lambda text: "image_clue_0.crop((0, 0, 60, 60)).show()"
    try:
        return loop.rollout(policy, puzzles("image", 4, 0), 8, max_turns=turns, max_new_tokens=n_tokens, max_context=10 ** 6, slow=slow)
    finally:
        loop.find_code = find_code
        del policy.stops


def plain_logprobs(policy, trajectories):
    """What the packed update replaces: every row with its prompt and its images, padded, full logits."""
    import torch
    width = max(len(t.tokens) for t in trajectories)
    ids = torch.tensor([t.tokens + [policy.end] * (width - len(t.tokens)) for t in trajectories])
    real = torch.tensor([[1] * len(t.tokens) + [0] * (width - len(t.tokens)) for t in trajectories])
    pixels, grid = policy.pixels([image for t in trajectories for image in t.images])
    policy.model.model.rope_deltas = None
    logits = policy.model(input_ids=ids, attention_mask=real, pixel_values=pixels, image_grid_thw=grid,
                          mm_token_type_ids=(ids == policy.image_token).int()).logits + policy.ban
    logprobs = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    mask = torch.tensor([t.action_mask[1:] + [False] * (width - len(t.tokens)) for t in trajectories])
    return logprobs[mask]


def compare(name, fast, slow, repeats=5):
    """Medians of CPU seconds of both, in turn, and their ratio; one warm-up each."""
    times = [[], []]
    for i in range(repeats + 1):
        for work, seconds in zip((fast, slow), times):
            begin = time.process_time()
            work()
            seconds.append(time.process_time() - begin)
    a, b = (statistics.median(seconds[1:]) for seconds in times)
    print(f"{name}: {a:.2f} s, plain {b:.2f} s, ratio {b / a:.1f}", flush=True)


def learner():
    import torch
    from model import tiny_policy
    from tasks.puzzles import corpus
    torch.set_num_threads(1)
    return tiny_policy(tempfile.mkdtemp(prefix="bench-"), corpus("image"))


def rollout():
    """Generation of 4 prompts x 8 at 1, 3 and 5 turns against model.generate over everything, every turn again."""
    policy = learner()
    for turns in (1, 3, 5):
        compare(f"rollout, {turns} turns", lambda: forced_groups(policy, turns), lambda: forced_groups(policy, turns, slow=True))


def update():
    """Log-probs and backward of the same trajectories: packed, prompt once a group, chunks; against padded rows."""
    policy = learner()
    for turns in (1, 3, 5):
        trajectories = [t for group in forced_groups(policy, turns) for t in group]
        compare(f"update, {turns} turns", lambda: policy.logprobs(trajectories)[0].sum().backward(),
                lambda: plain_logprobs(policy, trajectories).sum().backward())


BENCHMARKS = {"sandbox": sandbox, "rollout": rollout, "update": update}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    BENCHMARKS[parser.parse_args().benchmark]()


if __name__ == "__main__":
    main()
