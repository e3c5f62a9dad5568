"""Measure what the README says about speed and size: `python tests/bench.py NAME`.

    sandbox   start, call, plot, memory, and what a thousand cycles leave behind
    rollout   generation of forced lengths: here, without some tricks, and plain
    update    log-probs, loss and backward of the same trajectories, likewise
    step      generation and update here and, where it is installed, with TRL
    length    time and peak memory of an update by the length of its rows
    memory    peak memory of log-probs at a real vocabulary, in chunks and whole
    verify    the rule verifier on a batch of ordinary answers
    widths    two layers of the real models' widths in bf16 on a CPU: a rollout, an update, the peak
    gpu       a model of the 7B's shape against the limits of the GPU
    compare   this checkout against another one: `python tests/bench.py compare OTHER_CHECKOUT`

Figures are ratios taken in one run where that is possible, since machines differ. Seconds are CPU
seconds of one thread, which a busy machine disturbs least. `compare` runs the benches of both
checkouts in turn, so both see the same load. To bind it to one core: `taskset -c 0 python …`.
"""

import argparse
import atexit
import copy
import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


# ---------------------------------------------------------------------------------------- measuring
def median_ms(action, n: int) -> float:
    """Median milliseconds of n runs."""
    times = []
    for _ in range(n):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def measure(title: str, works: dict, repeats: int):
    """Run each {name: function} in turn -> what each returned last, and median CPU seconds.

    Prints the medians, and how many times those of "here" each takes.
    """
    seconds = {name: [] for name in works}
    made = {}
    for _ in range(repeats):
        for name, work in works.items():
            begin = time.process_time()
            made[name] = work()
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{title}: {against_here(medians)}", flush=True)
    return made, medians


def against_here(medians: dict) -> str:
    """Seconds of each, and how many times those of "here" they are."""
    words = []
    for name, value in medians.items():
        words.append(f"{name} {value:.3f} ({value / medians['here']:.2f}x)")
    return "  ".join(words)


def peak_mib() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(name: str, *arguments):
    """What a function of ALONE returns in a process of its own; None: too little memory for it.

    A process remembers its highest peak, so each peak takes a process.
    """
    command = [sys.executable, __file__, "alone", name, *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    killed = done.returncode < 0
    if killed or "memory" in done.stderr.lower():
        return None
    raise SystemExit(f"bench.py {name}: {done.stderr.strip().splitlines()[-1]}")


def scratch() -> str:
    """A folder that goes when this process ends."""
    folder = tempfile.mkdtemp(prefix="bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def swapped(*changes):
    """(object, name, value): set for the duration."""
    before = [(thing, name, getattr(thing, name)) for thing, name, _ in changes]
    for thing, name, value in changes:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, name, value in before:
            setattr(thing, name, value)


# ------------------------------------------------------------------------------------------ sandbox
PLOT = "plt.imshow(image_clue_0.crop((0, 0, 640, 480))); plt.show()"
CROP = "image_clue_0.crop((0, 0, 56, 56)).show()"
IMPORT_FOR_ITSELF = """
import sys
import numpy as np, matplotlib, decord
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
exec(sys.stdin.readline())
sys.stdout.flush()
"""
STARTS = 15
CYCLES = 1000
TOGETHER = 128  # sandboxes that live at once
THREADS = 8  # that make them
PREPARED = 32  # that wait, for their memory to be measured


def descendants(pid: int) -> set:
    """The processes below a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            behind_name = path.read_text().rpartition(")")[2]
        except OSError:
            continue
        parents[int(path.parent.name)] = int(behind_name.split()[1])
    found = {pid}
    size = 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def pss_mib(pid: int) -> float:
    """Proportional set size: a process's own pages and its share of those that others have too."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    line = re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)
    return int(line[1]) / 1024 if line else 0.0


def import_for_itself():
    """The first result of a process that imports what a sandbox has."""
    command = [sys.executable, "-c", IMPORT_FOR_ITSELF]
    subprocess.run(command, input="print(1)\n", text=True, capture_output=True, check=True)


def first_result_ms() -> float:
    """Milliseconds from Sandbox() to its first result, without close()."""
    from sandbox import Sandbox

    begin = time.perf_counter()
    with Sandbox() as box:
        result = box.run("print(1)")
        seconds = time.perf_counter() - begin
    assert result.text == "1\n"
    return seconds * 1e3


def median_start_ms() -> float:
    """Median of first results, with time between them to prepare the next child."""
    times = []
    for _ in range(STARTS):
        time.sleep(0.15)
        times.append(first_result_ms())
    return statistics.median(times)


def sandbox():
    """Start, call and plot against a process that imports for itself; memory; what cycles leave."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    sandbox_start()
    sandbox_calls()
    sandbox_memory()
    sandbox_cycles()


def sandbox_start():
    """First results, with children that wait and without."""
    from engine import pool

    import_for_itself()
    reference = median_ms(import_for_itself, 5)
    print(f"imports for itself: first result after {reference:.0f} ms")
    first_result_ms()
    time.sleep(1)
    for name, waiting, target in (("warm pool", pool.WAITING, 100), ("cold", 0, 20)):
        with swapped((pool, "WAITING", waiting)):
            for _ in range(STARTS if waiting == 0 else 0):  # take those that still wait
                first_result_ms()
            took = median_start_ms()
        faster = f"{reference / took:.0f}x faster (target {target}x)"
        print(f"{name}: first result after {took:.1f} ms, {faster}")


def sandbox_calls():
    """Calls that print, crop and plot."""
    import matplotlib
    from PIL import Image

    from sandbox import Sandbox

    matplotlib.use("Agg")
    picture = Image.effect_noise((1024, 768), 80).convert("RGB")
    with Sandbox([picture]) as box:
        assert len(box.run(PLOT).images) == 1
        plot_here(picture)
        printed = median_ms(lambda: box.run("print(1)"), 500)
        print(f"print(1): {printed:.3f} ms a call (target 1)")
        cropped = median_ms(lambda: box.run(CROP), 500)
        print(f"crop and show with PIL: {cropped:.3f} ms a call")
        there = []
        here = []
        for _ in range(STARTS):  # in turn, so that both see the same load
            there.append(median_ms(lambda: box.run(PLOT), 1))
            here.append(median_ms(lambda: plot_here(picture), 1))
    inside = statistics.median(there)
    outside = statistics.median(here)
    times = f"{inside / outside:.2f} times (target 1.5)"
    print(f"imshow and show of 640x480: {inside:.0f} ms, in-process {outside:.0f} ms, {times}")


def plot_here(picture):
    """What PLOT does, in this process."""
    import numpy as np
    from matplotlib import pyplot
    from PIL import Image

    pyplot.imshow(picture.crop((0, 0, 640, 480)))
    canvas = pyplot.gcf().canvas
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    pyplot.close("all")


def sandbox_memory():
    """Memory of sandboxes that wait, and of many that have run."""
    from PIL import Image

    from sandbox import Sandbox, warm

    before = descendants(os.getpid())
    warm(PREPARED)
    time.sleep(5)
    waiting = descendants(os.getpid()) - before
    each = statistics.mean(pss_mib(pid) for pid in waiting)
    print(f"a waiting sandbox: {each:.1f} MiB PSS (target 8)")
    million = Image.effect_noise((1000, 1000), 80).convert("RGB")
    boxes = []

    def make():
        for _ in range(TOGETHER // THREADS):
            box = Sandbox([million])
            boxes.append(box)
            box.run("image_clue_0.crop((0, 0, 99, 99)).show()")

    threads = [threading.Thread(target=make) for _ in range(THREADS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    total = sum(pss_mib(pid) for pid in descendants(os.getpid()))
    memory = f"{total:.0f} MiB PSS all together (target 2048)"
    print(f"{len(boxes)} at once, a megapixel each: {memory}, made and run in {seconds:.1f} s")
    for box in boxes:
        box.close()


def sandbox_cycles():
    """What a thousand sandboxes leave behind: processes, descriptors, folders, memory."""
    from sandbox import Sandbox

    time.sleep(2)
    before = left_behind()
    begin = time.perf_counter()
    for _ in range(CYCLES):
        with Sandbox() as box:
            box.run("print(1)")
    each = (time.perf_counter() - begin) / CYCLES * 1e3
    after = left_behind()
    print(f"{CYCLES} create-run-close cycles, {each:.1f} ms each: before {before}, after {after}")


def left_behind() -> dict:
    """Everything that sandboxes could leave."""
    from engine.pool import pool

    time.sleep(1)
    server = pool.server.pid
    forking = descendants(server) | {server}
    return dict(
        processes=len(descendants(os.getpid())),
        descriptors=len(os.listdir("/proc/self/fd")),
        directories=len(list(Path(tempfile.gettempdir()).glob("sandbox-*/*"))),
        trainer_mib=round(pss_mib(os.getpid())),
        server_mib=round(max(pss_mib(pid) for pid in forking)),
    )


# ------------------------------------------------------------------------- rollout, update and step
N_PROMPTS = 4
GROUP = 8
NEW_TOKENS = 64  # of a turn
SIDE = 112  # of a picture, in pixels
PROMPT_TOKENS = 309
TOKENS = 4096  # of a micro-batch here
ROWS = 4  # of a micro-batch of the others: about where TRL is fastest
REPEATS = 5


def learner(hidden: int = 256, layers: int = 4, vocabulary: int = 4160, padded: int = 0):
    """A random FastPolicy in the comparison's size: 5.6 M parameters, one thread.

    A turn has NEW_TOKENS tokens, whatever they say. padded: the vocabulary of the embedding, where
    it is larger than the tokenizer's.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from engine.fast import FastPolicy
    from model import load_policy, tiny_policy
    from tasks.puzzles import corpus

    torch.set_num_threads(1)
    folder = scratch()
    policy = tiny_policy(folder, [*corpus("image"), *random_words()], vocabulary=vocabulary)
    config = policy.model.config
    text = dict(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        layer_types=["full_attention"] * layers,
        vocab_size=max(padded, config.text_config.vocab_size),
    )
    config.text_config.update(text)
    half = hidden // 16  # of a head's size, which the three axes share
    config.text_config.rope_parameters["mrope_section"] = [half // 4, half * 3 // 8, half * 3 // 8]
    config.vision_config.out_hidden_size = hidden
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    policy = load_policy(folder)
    policy.image_processor.size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    policy.ban[[*policy.ends, *policy.closing]] = -1e9
    real = policy.stops

    def stops(ids):
        real(ids)  # it takes its time, whatever it says
        return len(ids) == NEW_TOKENS

    policy.stops = stops
    return FastPolicy(policy)


def random_words() -> list[str]:
    """Texts that fill the tokenizer's vocabulary."""
    rng = random.Random(0)
    words = []
    for _ in range(2000):
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 9))
        words.append(" " + "".join(letters))
    return words * 3


def picture():
    from PIL import Image

    return Image.effect_noise((SIDE, SIDE), 90).convert("RGB")


def questions(policy) -> list:
    """Samples whose prompts have PROMPT_TOKENS tokens, the image included."""
    from data import Sample
    from engine.prompt import messages

    made = []
    for i in range(N_PROMPTS):
        image = picture()
        text = f"{i}<image>"
        length = 0
        while length < PROMPT_TOKENS:
            text += " or"
            prompt = [{"role": "user", "content": text}]
            sample = Sample(str(i), "?", "1", images=(image,), prompt=prompt)
            length = len(policy.encode(messages(sample), [image]))
        made.append(sample)
    return made


class Look:
    """In the place of the sandbox: every call shows a picture, in no time."""

    def __init__(self, *_, **settings):
        pass

    def run(self, code):
        from sandbox import Result

        return Result("ok\n", [picture()], None, [])

    def close(self):
        pass


def forced(policy, samples: list, turns: int, group: int = GROUP) -> list:
    """Groups of forced lengths, with a picture after all turns but the last."""
    import rollout as loop

    limits = loop.Limits(max_turns=turns, max_new_tokens=NEW_TOKENS, max_context=10**6)
    sandbox = (loop, "Sandbox", Look)
    prepared = (loop, "warm", lambda *_: None)
    code = (loop, "find_code", lambda text: "look")
    with swapped(sandbox, prepared, code):
        return loop.rollout(policy, samples, group, limits)


def train_on(policy, groups: list, tokens: int = TOKENS):
    """Forward, the trainer's loss and backward, in the trainer's micro-batches."""
    import torch

    from engine.batching import microbatches
    from train import policy_loss

    actions = sum(len(t.logprobs) for group in groups for t in group)
    for batch in microbatches(groups, tokens):
        logprobs, _ = policy.logprobs(batch)
        sampled = []
        advantages = []
        for i, t in enumerate(batch):
            sampled += t.logprobs
            advantages += [float(i % 2 * 2 - 1)] * len(t.logprobs)
        loss, _ = policy_loss(logprobs, torch.tensor(sampled), torch.tensor(advantages))
        (loss.sum() / actions).backward()


def plain_train_on(policy, trajectories: list, rows: int):
    """Plain forwards of so many padded rows at a time, each with its own prompt and images."""
    for start in range(0, len(trajectories), rows):
        logprobs, _ = policy.logprobs(trajectories[start : start + rows])
        logprobs.sum().backward()


class Forgetful:
    """The policy without a cache across turns: every turn reads everything so far."""

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def act(self, *arguments):
        self.policy.forget()
        self.policy.act(*arguments)


def rollout(turns: list, repeats: int):
    """Generation of 4 prompts x 8 of forced lengths: here, without some tricks, and plain."""
    policy = learner()
    samples = questions(policy)
    apart = [dataclasses.replace(sample) for sample in samples for _ in range(GROUP)]
    forgetful = Forgetful(policy)
    for n in turns:
        works = {
            "here": functools.partial(forced, policy, samples, n),
            "prompt run for every row": functools.partial(forced, policy, apart, n, 1),
            "no cache across turns": functools.partial(forced, forgetful, samples, n),
            "plain model.generate": functools.partial(forced, policy.policy, samples, n),
        }
        made, medians = measure(f"generate, {n} turns", works, repeats)
        floor, _ = floors(policy, made["here"])
        say_floor(floor, medians["here"])


def update(turns: list, repeats: int):
    """Log-probs, loss and backward of the same trajectories: here, without each trick, plain."""
    policy = learner()
    samples = questions(policy)
    for n in turns:
        groups = forced(policy, samples, n)
        rows = [t for group in groups for t in group]
        apart = [[dataclasses.replace(t, sample=dataclasses.replace(t.sample))] for t in rows]
        scored = [[all_scored(t) for t in group] for group in groups]
        plain = functools.partial(plain_train_on, policy.policy, rows)
        works = {
            "here": functools.partial(train_on, policy, groups),
            "prompt run for every row": functools.partial(train_on, policy, apart),
            "all response tokens scored": functools.partial(train_on, policy, scored),
            "one micro-batch": functools.partial(train_on, policy, groups, 10**9),
            "plain": functools.partial(plain, len(rows)),
            f"plain, {ROWS} rows at a time": functools.partial(plain, ROWS),
        }
        _, medians = measure(f"update, {n} turns", works, repeats)
        _, floor = floors(policy, groups)
        say_floor(floor, medians["here"])


def all_scored(t):
    """A trajectory as if the policy had sampled its observations too."""
    reply = len(t.tokens) - t.prompt_length
    mask = [False] * t.prompt_length + [True] * reply
    return dataclasses.replace(t, action_mask=mask, logprobs=[0.0] * reply)


def step(turns: list, repeats: int):
    """A whole step here and, where it is installed, with TRL."""
    import torch

    policy = learner()
    samples = questions(policy)
    optimizer = torch.optim.AdamW(policy.model.parameters(), 1e-6)
    peer = find_peer(policy, samples)

    def learn(optimizer, train, *arguments):
        train(*arguments)
        optimizer.step()
        optimizer.zero_grad()

    for n in turns:
        works = {"here": functools.partial(forced, policy, samples, n)}
        if peer:
            works["TRL"] = functools.partial(peer.generate, n)
        made, first = measure(f"generate, {n} turns", works, repeats)
        works = {"here": functools.partial(learn, optimizer, train_on, policy, made["here"])}
        if peer:
            theirs = functools.partial(learn, peer.optimizer, peer.train_on, made["TRL"])
            works["TRL"] = functools.partial(theirs, len(peer.rows))
            works[f"TRL, {ROWS} rows at a time"] = functools.partial(theirs, ROWS)
        _, second = measure(f"update, {n} turns", works, repeats)
        total = {}
        for name, seconds in second.items():
            total[name] = first.get(name, first.get("TRL")) + seconds
        print(f"step, {n} turns: {against_here(total)}", flush=True)
        floor = sum(floors(policy, made["here"]))
        times = [f"{name} {seconds / floor:.1f} times that" for name, seconds in total.items()]
        print(f"  floor {floor:.2f}; {', '.join(times)}", flush=True)


# ------------------------------------------------------------------------------------------- floors
def rates():
    """FLOPs a second of a matmul in the model's shapes; bytes a second of a copy beyond caches."""
    import torch

    a = torch.randn(2048, 256)
    b = torch.randn(256, 768)
    target = torch.zeros(2**25)
    source = torch.zeros(2**25)

    def seconds(work, n):
        work()
        begin = time.process_time()
        for _ in range(n):
            work()
        return (time.process_time() - begin) / n

    flops = 2 * 2048 * 256 * 768 / seconds(lambda: a @ b, 50)
    copied = 2 * target.nbytes / seconds(lambda: target.copy_(source), 10)
    return flops, copied


def floors(policy, groups: list):
    """Least seconds for the generation and for the update of these groups.

    Each distinct token goes through the weights once, in the update three times; attention's own
    products; in decoding, weights and own keys and values are read once a token.
    """
    flops, copied = rates()
    text = policy.model.config.text_config
    layers = policy.model.model.language_model.layers
    weights = sum(p.numel() for p in layers.parameters())
    head_size = text.hidden_size // text.num_attention_heads
    kept = head_size * text.num_key_value_heads * 2 * text.num_hidden_layers * 4  # bytes a token
    product = 4 * text.hidden_size * text.num_hidden_layers  # FLOPs a pair of tokens
    tokens = 0
    pairs = 0.0
    sampled = 0
    steps = 0
    read = 0  # keys and values
    for group in groups:
        prompt = group[0].prompt_length
        tokens += prompt
        pairs += prompt**2 / 2
        for t in group:
            length = len(t.tokens)
            tokens += length - prompt
            pairs += (length**2 - prompt**2) / 2
            places = [i for i, action in enumerate(t.action_mask) if action]
            sampled += len(places)
            steps = max(steps, len(places))
            read += kept * sum(i - prompt for i in places)
        read += kept * prompt * len(places)  # once for all rows
    head = 2 * sampled * text.vocab_size * text.hidden_size
    forward = 2 * weights * tokens + product * pairs + head
    generation = forward / flops + (read + steps * 4 * weights) / copied
    return generation, 3 * forward / flops


def say_floor(floor: float, here: float):
    print(f"  floor {floor:.2f}, here {here / floor:.1f} times that", flush=True)


# ---------------------------------------------------------------------------------------------- TRL
TOOL_ROLE = ("{{ m.role }}", "{{ 'user' if m.role == 'tool' else m.role }}")
TOOL_CALLS = ("{% endfor %}<|im_end|>", "{% endfor %}{{ m.tool_calls or '' }}<|im_end|>")
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


def find_peer(policy, samples: list):
    """A Peer, or None where TRL is not installed."""
    try:
        return Peer(policy, samples)
    except ImportError:
        print("TRL is not installed (pip install trl): without it")
        return None


def look():
    """Show a picture."""
    from rollout import observation

    shown = Look().run("")
    parts = observation(shown, 1)[0]["content"]
    return [
        {**part, "image": shown.images[0]} if part["type"] == "image" else part for part in parts
    ]


def split_reply(tokenizer, ids, **_) -> dict:
    """That the tool was called is read off a reply in no time, as on our side."""
    content = tokenizer.decode(ids, skip_special_tokens=True)
    return dict(role="assistant", content=content, tool_calls=[CALL])


class Peer:
    """TRL's GRPOTrainer on the same weights, prompts and lengths; its tool takes no time.

    Raises ImportError where TRL is not installed.
    """

    def __init__(self, policy, samples: list):
        import torch
        import trl.trainer.grpo_trainer as module
        from datasets import Dataset
        from transformers import AutoModelForImageTextToText, Qwen2_5_VLProcessor

        class Processor(Qwen2_5_VLProcessor):
            def check_argument_for_proper_class(self, *_):
                pass  # there is no video processor: it wants torchvision

        folder = scratch()
        policy.model.save_pretrained(folder)
        tokenizer = copy.deepcopy(policy.tokenizer)
        template = tokenizer.chat_template.replace(*TOOL_ROLE).replace(*TOOL_CALLS)
        tokenizer.chat_template = template
        tokenizer.response_template = {"unused": True}
        module.parse_response = split_reply
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
        self.trainer = module.GRPOTrainer(
            model,
            tools=[look],
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            args=peer_settings(policy, folder),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}]),
            processing_class=Processor(
                policy.image_processor, tokenizer, None, chat_template=template
            ),
        )
        self.trainer.model.train()
        self.optimizer = torch.optim.AdamW(self.trainer.model.parameters(), 1e-6)
        self.rows = [row for sample in samples for row in peer_rows(sample)]

    def generate(self, turns: int):
        """Rollouts with rewards and advantages: the batch that its loss takes."""
        self.trainer.max_tool_calling_iterations = turns - 1
        return self.trainer._generate_and_score_completions(self.rows)

    def train_on(self, batch: dict, rows: int):
        """Forward, its own loss, backward, so many rows at a time, cut as it cuts them itself."""
        from trl.trainer.utils import (
            split_pixel_values_by_grid,
            split_tensor_dict,
            unsplit_pixel_values_by_grid,
        )

        pieces = len(self.rows) // rows
        self.trainer.current_gradient_accumulation_steps = pieces
        for part in split_tensor_dict(split_pixel_values_by_grid(dict(batch)), pieces):
            inputs = unsplit_pixel_values_by_grid(part)
            self.trainer.compute_loss(self.trainer.model, inputs).backward()


def peer_settings(policy, folder: str):
    """TRL's settings for lengths like ours."""
    from trl import GRPOConfig

    banned = (policy.ban < 0).nonzero()[:, 0].tolist()
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=N_PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=10**4,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        generation_kwargs=dict(max_new_tokens=NEW_TOKENS, suppress_tokens=banned),
    )


def peer_rows(sample) -> list[dict]:
    """A sample as TRL's trainer takes it, once for each of its group."""
    from engine.prompt import messages

    prompt = []
    for message in messages(sample):
        prompt.append({**message, "content": [dict(part) for part in message["content"]]})
    return [{"prompt": prompt, "images": list(sample.images)}] * GROUP


# -------------------------------------------------------------------------------- length and memory
LENGTHS = ((8, 2048), (4, 4096), (2, 8192), (1, 16_384))  # rows, tokens of each
LENGTH_PROMPT = 1024  # tokens that the rows have in common
VOCABULARY = 152_064
HEAD_ACTIONS = 4096
WORDS = (20, 250)  # ids of plain text in any of our tokenizers


def group_of(rows: int, prompt: int, reply: int) -> list:
    """A group of trajectories of random tokens; all tokens of the replies are actions."""
    from data import Sample
    from rollout import Trajectory

    rng = random.Random(0)
    sample = Sample("0", "?", "1")
    ids = range(*WORDS)
    asked = rng.choices(ids, k=prompt)
    made = []
    for _ in range(rows):
        t = Trajectory(sample, prompt_length=prompt)
        t.append(asked, False, -1)
        t.append(rng.choices(ids, k=reply), True, -1)
        t.logprobs = [0.0] * reply
        made.append(t)
    return made


def length():
    """An update of rows of several lengths, as many tokens in each, on the tiny policy."""
    print(f"one group behind a prompt of {LENGTH_PROMPT} tokens, which is packed once")
    for rows, tokens in LENGTHS:
        found = alone("row", rows, tokens)
        if found is None:
            print(f"{rows} x {tokens}: did not fit into memory", flush=True)
            continue
        microseconds = found["seconds"] / found["packed"] * 1e6
        cost = f"{microseconds:.0f} us a packed token"
        peak = f"peak +{found['mib']:.0f} MiB of {found['whole_mib']:.0f}"
        print(f"{rows} x {tokens}, {found['packed']} packed: {cost}, {peak}", flush=True)


def row(rows: int, tokens: int) -> dict:
    """CPU seconds and peak memory of one update of a group of equal rows, one thread."""
    import torch

    from engine.fast import FastPolicy
    from model import tiny_policy
    from tasks.puzzles import corpus

    torch.set_num_threads(1)
    folder = scratch()
    policy = FastPolicy(tiny_policy(folder, corpus("image")))
    reply = tokens - LENGTH_PROMPT
    backward(policy, group_of(2, 64, 64))
    group = group_of(rows, LENGTH_PROMPT, reply)
    before = peak_mib()
    begin = time.process_time()
    backward(policy, group)
    seconds = time.process_time() - begin
    return dict(
        seconds=seconds,
        packed=LENGTH_PROMPT + rows * reply,
        mib=peak_mib() - before,
        whole_mib=peak_mib(),  # with Python, torch and the policy
    )


def backward(policy, trajectories: list):
    """Log-probs and their gradient."""
    logprobs, _ = policy.logprobs(trajectories)
    logprobs.sum().backward()


def memory():
    """Peak memory of log-probs and backward at a real vocabulary: in chunks, and all logits."""
    chunks = alone("head", 0)
    whole = alone("head", 1)
    print(f"chunks: {chunks:.0f} MiB")
    note = ""
    if whole is None:
        whole = 3 * 4 * VOCABULARY * HEAD_ACTIONS / 2**20
        note = ", of logits, log-probs and gradient: the run did not fit"
    print(f"full: {whole:.0f} MiB{note}")
    print(f"full over chunks: {whole / chunks:.1f} (target 5)")


def head(whole: int) -> float:
    """MiB that log-probs of one row and backward take at their peak. whole: all logits at once."""
    from engine import fast

    policy = learner(hidden=128, layers=1, vocabulary=300, padded=VOCABULARY)
    if whole:
        fast.HEAD_LOGITS = 10**12
    backward(policy, group_of(1, 16, 8))
    before = peak_mib()
    backward(policy, group_of(1, 16, HEAD_ACTIONS))
    return peak_mib() - before


ALONE = {"row": row, "head": head}


# ------------------------------------------------------------------------------------------- verify


def verify():
    """Milliseconds that the rule takes for a batch of answers: of puzzles, and mathematics."""
    import bench_verify

    bench_verify.verify()


# ---------------------------------------------------------------------------------------------- gpu
SEVEN_B = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=128_000,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
)
TOWER = dict(hidden_size=1280, depth=32, num_heads=16, intermediate_size=3420, out_hidden_size=3584)


@dataclasses.dataclass
class Card:
    """What the hardware can do."""

    device: str
    flops: float = 0.0  # of a matmul in bf16, a second
    copied: float = 0.0  # bytes a second

    def seconds(self, work):
        """Seconds and peak GiB of the second run: the first one warms up."""
        import torch

        cuda = self.device == "cuda"
        for _ in range(2):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            took = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        return took, peak

    def wait(self):
        import torch

        getattr(torch, self.device).synchronize()

    def measure(self):
        """Find its limits."""
        import torch

        n = 8192 if self.device == "cuda" else 512
        a = torch.randn(n, n, dtype=torch.bfloat16, device=self.device)
        big = torch.zeros(n * n * 16, dtype=torch.uint8, device=self.device)
        product, _ = self.seconds(lambda: a @ a)
        cloned, _ = self.seconds(lambda: big.clone())
        self.flops = 2 * n**3 / product
        self.copied = 2 * big.nbytes / cloned


def gpu(device="cuda", text=SEVEN_B, vision=TOWER, prompt=3000, reply=1000, decoded=128):
    """A random model of the 7B's config in bf16.

    Decoding against the memory's bandwidth, the update against the matmul peak, and peak memory
    with and without each trick.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.py gpu: needs a GPU of 80 GB, and torch sees none")
    policy = random_policy(device, text, vision)
    card = Card(device)
    card.measure()
    weights = layer_weights(policy) + policy.model.lm_head.weight.numel()
    speed = f"matmul {card.flops / 1e12:.1f} TFLOP/s, copy {card.copied / 1e9:.0f} GB/s"
    print(f"{speed}, {weights / 1e9:.2f} G parameters")
    for rows in (64, 128):
        gpu_decode(policy, card, rows, prompt, decoded)
    gpu_update(policy, card, prompt, reply)


def random_policy(device: str, text: dict, vision: dict, family: str = "Qwen2_5_VL"):
    """A FastPolicy of random bf16 weights, whose turns end at their limit only."""
    import torch
    import transformers

    from engine.fast import FastPolicy
    from model import Policy, tiny_policy

    tiny = tiny_policy(scratch(), ["a"] * 3, vocabulary=300)
    names = ("image_token_id", "video_token_id", "vision_start_token_id")
    ids = {name: getattr(tiny.model.config, name) for name in names}
    config = getattr(transformers, f"{family}Config")
    config = config(**ids, text_config=text, vision_config=vision)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        network = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    torch.set_default_dtype(torch.float32)
    network.set_attn_implementation({"vision_config": "sdpa"})
    policy = Policy(network, tiny.tokenizer, tiny.image_processor)
    policy.stops = lambda ids: False
    return FastPolicy(policy)


def layer_weights(policy) -> int:
    """Parameters of the decoder layers."""
    layers = policy.model.model.language_model.layers
    return sum(p.numel() for p in layers.parameters())


def gpu_decode(policy, card, rows: int, prompt: int, decoded: int):
    """Tokens a second behind long prompts, each shared by a group."""
    from rollout import Limits

    trajectories = []
    for _ in range(rows // GROUP):
        trajectories += group_of(GROUP, prompt, 0)
    limits = Limits(max_new_tokens=decoded)

    def on_action(t, action):
        t.append(action.ids, True, -1)

    # The second run goes on where the first one ended: it reads no prompt.
    took, peak = card.seconds(lambda: policy.act(trajectories, limits, on_action))
    text = policy.model.config.text_config
    head_size = text.hidden_size // text.num_attention_heads
    pair = 4 * text.num_hidden_layers * text.num_key_value_heads * head_size  # bytes a token
    weights = layer_weights(policy) + policy.model.lm_head.weight.numel()
    seen = rows // GROUP * prompt + rows * decoded * 3 / 2
    floor = decoded * (2 * weights + pair * seen) / card.copied
    speed = f"{rows * decoded / took:.0f} tokens/s, {floor / took:.2f} of the bandwidth floor's"
    print(f"decode, {rows} rows behind prompts of {prompt}: {speed}, peak {peak:.1f} GiB")
    policy.forget()


def gpu_update(policy, card, prompt: int, reply: int):
    """TFLOP/s and peak memory of an update, with and without tricks. Attention is not counted."""
    import torch

    layers = policy.model.model.language_model.layers
    forwards = [layer.forward for layer in layers]
    recomputed = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    head = policy.model.lm_head.weight.numel()

    def train(batch):
        backward(policy, batch)
        policy.model.zero_grad()

    for name, shared, recompute in (
        ("prompt once, recomputed activations", True, True),
        ("prompt once", True, False),
        ("prompt for every row, recomputed activations", False, True),
    ):
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = functools.partial(recomputed, forward) if recompute else forward
        batch = group_of(GROUP, prompt, reply)
        if not shared:
            for t in batch:
                t.sample = dataclasses.replace(t.sample)
        try:
            took, peak = card.seconds(functools.partial(train, batch))
        except torch.OutOfMemoryError:
            print(f"update, {name}: does not fit")
            continue
        tokens = (1 if shared else GROUP) * prompt + GROUP * reply
        done = 6 * (tokens * layer_weights(policy) + GROUP * reply * head)
        speed = f"{done / took / 1e12:.2f} TFLOP/s, {done / took / card.flops:.2f} of the peak"
        print(f"update, {name}: {speed} of a matmul, peak {peak:.1f} GiB")


# ------------------------------------------------------------------------------------------- widths
WIDE_SIDE = 224  # of a picture, in pixels
WIDE_TOKENS = 32  # of a reply
WIDE = {  # the widths of the 7B and of Qwen3-VL 8B; two layers of the text model and of the tower
    "Qwen2_5_VL": (
        dict(SEVEN_B, num_hidden_layers=2),
        dict(TOWER, depth=2, fullatt_block_indexes=[1]),
    ),
    "Qwen3VL": (
        dict(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151_936,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        ),
        dict(
            hidden_size=1152,
            depth=2,
            num_heads=16,
            intermediate_size=4304,
            out_hidden_size=4096,
            patch_size=16,
            deepstack_visual_indexes=[0, 1],
        ),
    ),
}


def widths():
    """Peak memory and seconds of a rollout and an update, one model at a time."""
    for number, name in enumerate(WIDE):
        found = alone("wide", number)
        if found is None:
            print(f"{name}: too little memory")
            continue
        times = f"rollout {found['rollout']:.1f} s, update {found['update']:.1f} s"
        peaks = f"peak {found['rollout_mib'] / 1024:.1f} and {found['update_mib'] / 1024:.1f} GiB"
        size = f"{found['parameters'] / 1e9:.2f} G parameters"
        print(f"{name}, {size}: {times}, {peaks}, gap of log-probs {found['gap']:.4f}", flush=True)


def wide(number: int) -> dict:
    """Sample a group behind a picture, then follow its gradient, all weights in bf16."""
    import torch
    from transformers import Qwen2VLImageProcessorPil

    from data import Sample
    from rollout import rollout

    name = list(WIDE)[number]
    text, vision = WIDE[name]
    policy = random_policy("cpu", text, vision, name)
    pixels = WIDE_SIDE**2
    patch = policy.model.config.vision_config.patch_size
    policy.policy.image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=pixels, max_pixels=pixels
    )
    asked = [{"role": "user", "content": "<image>?"}]
    sample = Sample("0", "?", "1", images=(picture(),), prompt=asked)
    begin = time.perf_counter()
    groups = rollout(policy, [sample], 4, max_turns=1, max_new_tokens=WIDE_TOKENS)
    rolled = time.perf_counter()
    mib = peak_mib()
    trajectories = groups[0]
    old = torch.tensor([value for t in trajectories for value in t.logprobs])
    logprobs, _ = policy.logprobs(trajectories)
    (-logprobs.mean()).backward()
    torch.optim.SGD(policy.model.parameters(), 1e-3, foreach=False).step()
    updated = time.perf_counter()
    return dict(
        rollout=rolled - begin,
        update=updated - rolled,
        rollout_mib=mib,
        update_mib=peak_mib(),
        gap=float((logprobs.detach() - old).abs().mean()),
        parameters=sum(weight.numel() for weight in policy.model.parameters()),
    )


ALONE["wide"] = wide


# ------------------------------------------------------------------------------------------ compare
# Where the figures stand in what `step` prints, in this checkout and in older ones.
OF_STEP = re.compile(r"^((?:generate|update|step), \d turns): here ([\d.]+)")
# The sandbox has the same interface everywhere, so one program measures it in every checkout.
SANDBOXES = """
import json, statistics, time
from sandbox import Sandbox

def timed(action):
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e3

def start():
    boxes.append(Sandbox())
    boxes[-1].run("print(1)")

def quarter(action, n, pause=0.0):
    times = []
    for _ in range(n):
        time.sleep(pause)
        times.append(timed(action))
    return statistics.quantiles(times, n=4)[0]  # a busy machine disturbs the others

boxes = []
start()
time.sleep(1)
figures = {"sandbox, ms to a first result": quarter(start, 31, 0.15)}
figures["sandbox, ms each of 24 in a row"] = quarter(start, 24)
box = boxes[0]
figures["print(1), ms a call"] = quarter(lambda: box.run("print(1)"), 500)
plot = "plt.imshow([[1, 2], [3, 4]]); plt.show()"
box.run(plot)
figures["imshow and show, ms a call"] = quarter(lambda: box.run(plot), 15)
while len(boxes) < 128:
    start()
time.sleep(1)
figures["beside 128, ms to a first result"] = quarter(start, 15, 0.15)
figures["beside 128, print(1), ms a call"] = quarter(lambda: box.run("print(1)"), 200)
for one in boxes:
    one.close()
print(json.dumps(figures))
"""
# A bench that finds TRL also measures it, which `compare` does not need.
WITHOUT_TRL = """
import runpy, sys
sys.modules["trl"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The seconds in metrics.jsonl become CPU seconds of the trainer.
BY_CPU = """
import runpy, sys, time
time.perf_counter = time.process_time
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WARM_STEPS = 2  # of the default run, which are left out


def compare(other: str, pairs: int, repeats: int, turns: list, steps: int, start: str):
    """Run the benches of this checkout and of another one in turn; print medians and ratios.

    start: a cold start for the step of the default run; none: it is made here first.
    """
    checkouts = {"this": ROOT, "other": Path(other).resolve()}
    start = str(Path(start or make_cold_start()).resolve())
    found = {"this": [], "other": []}
    for pair in range(pairs):
        order = ["this", "other"] if pair % 2 else ["other", "this"]
        for name in order:
            figures = all_figures(checkouts[name], repeats, turns, steps, start)
            found[name].append(figures)
        print(f"pair {pair + 1} of {pairs}", flush=True)
        print_comparison(found)


def print_comparison(found: dict):
    """Medians of both, and the median over pairs of this / other."""
    print(f"{'':34}{'this':>10}{'other':>10}{'ratio':>8}")
    for label in found["this"][0]:
        this = [figures[label] for figures in found["this"]]
        other = [figures[label] for figures in found["other"]]
        ratio = statistics.median(a / b for a, b in zip(this, other, strict=True))
        columns = f"{statistics.median(this):10.3f}{statistics.median(other):10.3f}{ratio:8.2f}"
        print(f"{label:34}{columns}{'  slower' if ratio > 1.05 else ''}", flush=True)


def all_figures(checkout: Path, repeats: int, turns: list, steps: int, start: str) -> dict:
    """Every figure of one checkout, smaller is better."""
    figures = {}
    if turns:
        asked = ["step", "--repeats", repeats, "--turns", turns[0], *turns]  # the first warms up
        for line in program(checkout, "-c", WITHOUT_TRL, "tests/bench.py", *asked).splitlines():
            match = OF_STEP.search(line)
            if match:
                figures[match[1]] = float(match[2])
    figures.update(json.loads(program(checkout, "-c", SANDBOXES)))
    if steps:
        figures["default run, CPU s a step"] = default_step(checkout, start, steps)
    return figures


def program(checkout: Path, *arguments) -> str:
    """Run Python in a checkout, with one thread -> what it prints. It ends this one if it fails."""
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise SystemExit(f"{checkout}: ended with code {done.returncode}: {' '.join(last)}")
    return done.stdout


def make_cold_start() -> str:
    """The tiny policy's cold start, as the default run makes it, in a folder of its own."""
    print("making a cold start for the default run (--start FOLDER takes one that is there)")
    folder = scratch()
    asked = ["--steps", "1", "--eval_every", "0", "--save_every", "0", "--out", f"{folder}/image"]
    program(ROOT, "train.py", *asked)
    return str(next(Path(folder).glob("cold_start*")))


def default_step(checkout: Path, start: str, steps: int) -> float:
    """Median CPU seconds of a step of the default run, from a cold start that both share.

    Waiting for tools is not in it: the sandbox is measured apart.
    """
    import train

    usual = train.Config()
    out = f"{scratch()}/run"
    settings = dict(model=start, out=out, steps=steps + WARM_STEPS, eval_every=0, save_every=0)
    for field in dataclasses.fields(usual):
        value = getattr(train.LAPTOP, field.name)
        if value != getattr(usual, field.name):
            settings.setdefault(field.name, value)
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", str(value)]
    program(checkout, "-c", BY_CPU, "train.py", *flags)
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds_rollout"] + row["seconds_update"] for row in rows if row["step"]]
    return statistics.median(seconds[WARM_STEPS:])


# --------------------------------------------------------------------------------------------- main
SIMPLE = {
    "sandbox": sandbox,
    "length": length,
    "memory": memory,
    "verify": verify,
    "widths": widths,
    "gpu": gpu,
}
TIMED = {"rollout": rollout, "update": update, "step": step}


def main():
    if sys.argv[1:2] == ["alone"]:
        name, *numbers = sys.argv[2:]
        print(json.dumps(ALONE[name](*map(int, numbers))))
        return
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("benchmark", choices=[*SIMPLE, *TIMED, "compare"])
    parser.add_argument("other", nargs="?", help="the other checkout, of compare")
    parser.add_argument("--repeats", type=int, help="of rollout, update and step; medians count")
    parser.add_argument("--turns", type=int, nargs="*", help="of these; the first warms up")
    parser.add_argument("--pairs", type=int, default=3, help="of compare")
    parser.add_argument("--steps", type=int, default=8, help="of compare: of the default run")
    parser.add_argument("--start", default="", help="of compare: a cold start that is there")
    asked = parser.parse_args()
    if asked.benchmark in TIMED:
        turns = asked.turns or [1, 1, 3, 5]
        TIMED[asked.benchmark](turns, asked.repeats or REPEATS)
    elif asked.benchmark == "compare":
        if not asked.other:
            parser.error("compare needs the other checkout")
        turns = [1, 3, 5] if asked.turns is None else asked.turns
        compare(asked.other, asked.pairs, asked.repeats or 1, turns, asked.steps, asked.start)
    else:
        SIMPLE[asked.benchmark]()


if __name__ == "__main__":
    main()
