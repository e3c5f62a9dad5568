"""Measure what the README says about speed and size, as ratios taken in one run: `python tests/bench.py NAME`."""
import argparse
import copy
import dataclasses
import functools
import os
import random
import re
import socket
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
            for fd in socket.recv_fds(_pool.control[0], 4096, 2)[1]:
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
    _pool.control[0].send(b"f" * 32)
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


# ------------------------------------------------------------------------------------------- rollout and update
N_PROMPTS, GROUP, NEW_TOKENS, SIDE, PROMPT_TOKENS, REPEATS = 4, 8, 64, 112, 309, 5
TOKENS, ROWS = 4096, 4                # of a micro-batch: here; of the others, about where TRL is fastest


def learner(hidden=256, layers=4, vocabulary=4160):
    """A random policy in the comparison's size: 5.6 M parameters, one thread, no end-of-turn token (forced lengths)."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from model import load_policy, tiny_policy
    from tasks.puzzles import corpus
    torch.set_num_threads(1)
    folder, rng = tempfile.mkdtemp(prefix="bench-"), random.Random(0)
    words = [" " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 9))) for _ in range(2000)]
    policy = tiny_policy(folder, [*corpus("image"), *words * 3], vocabulary=vocabulary)
    config, third = policy.model.config, hidden // 64
    config.text_config.update(dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                                   num_attention_heads=8, num_key_value_heads=4, layer_types=["full_attention"] * layers))
    config.text_config.rope_parameters["mrope_section"] = [third, third * 3 // 2, third * 3 // 2]
    config.vision_config.out_hidden_size = hidden
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    policy = load_policy(folder)
    policy.image_processor.size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    policy.ban[[*policy.ends, *policy.closing]] = -1e9          # nothing ends a turn but its length
    return policy


def picture():
    from PIL import Image
    return Image.effect_noise((SIDE, SIDE), 90).convert("RGB")


def questions(policy):
    """Four samples whose prompts have PROMPT_TOKENS tokens, image included."""
    from data import Sample, messages
    made = []
    for i in range(N_PROMPTS):
        image, text, n = picture(), f"{i}<image>", 0
        while n < PROMPT_TOKENS:
            text += " or"
            prompt = [{"role": "user", "content": text}]
            sample = Sample(str(i), "?", "1", images=(image,), prompt=prompt)
            n = len(policy.encode(messages(sample), [image]).ids)
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


@contextmanager
def swapped(*changes):
    """(object, name, value): set for the duration."""
    old = [(thing, name, getattr(thing, name)) for thing, name, _ in changes]
    for thing, name, value in changes:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, name, value in old:
            setattr(thing, name, value)


def forced(policy, samples, turns, group=GROUP, **options):
    """Groups of forced lengths: NEW_TOKENS a turn, whatever they say, and a picture after all turns but the last."""
    import rollout as loop
    inner = getattr(policy, "policy", policy)                   # of a Refeed
    stops = inner.stops
    with swapped((loop, "Sandbox", Look), (loop, "find_code", lambda text: "look"),
                 (inner, "stops", lambda ids: stops(ids) and False or len(ids) == NEW_TOKENS)):
        return loop.rollout(policy, samples, group, max_turns=turns, max_new_tokens=NEW_TOKENS, max_context=10 ** 6, **options)


def train_on(policy, groups, tokens=TOKENS):
    """Forward, the trainer's loss, backward, in the trainer's micro-batches."""
    import torch
    from train import microbatches, policy_loss
    for batch in microbatches(groups, tokens):
        logprobs, _ = policy.logprobs(batch)
        sampled = torch.tensor([x for t in batch for x in t.logprobs])
        advantages = torch.tensor([float(i % 2 * 2 - 1) for i, t in enumerate(batch) for _ in t.logprobs])
        loss, _ = policy_loss(logprobs, sampled, advantages, 0.2, 3.0)
        (loss.sum() / sum(len(t.logprobs) for group in groups for t in group)).backward()


def plain_train_on(policy, trajectories, rows):
    """What the packed update replaces, so many rows at a time: each with its prompt and images, padded, full logits."""
    for i in range(0, len(trajectories), rows):
        plain_logprobs(policy, trajectories[i:i + rows]).sum().backward()


def plain_logprobs(policy, trajectories):
    """Log-probs of all action tokens, with gradients."""
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


class Peer:
    """TRL's GRPOTrainer on the same weights, prompts and lengths, where it is installed (ImportError otherwise). A tool
    returns a picture in no time, and that it was called is read off in no time, as on our side."""

    def __init__(self, policy, samples):
        import trl.trainer.grpo_trainer as module
        from datasets import Dataset
        from transformers import AutoModelForImageTextToText, Qwen2_5_VLProcessor
        from trl import GRPOConfig
        from data import messages
        from rollout import observation

        class Processor(Qwen2_5_VLProcessor):
            def check_argument_for_proper_class(self, *_):                      # no video processor: it wants torchvision
                pass

        def look():
            """Show a picture."""
            shown = Look().run("")
            return [dict(part, image=shown.images[0]) if part["type"] == "image" else part
                    for part in observation(shown, 1)[0]["content"]]
        folder = tempfile.mkdtemp(prefix="bench-")
        policy.model.save_pretrained(folder)
        tokenizer = copy.deepcopy(policy.tokenizer)
        template = tokenizer.chat_template.replace("{{ m.role }}", "{{ 'user' if m.role == 'tool' else m.role }}")
        template = template.replace("{% endfor %}<|im_end|>", "{% endfor %}{{ m.tool_calls or '' }}<|im_end|>")
        tokenizer.chat_template, tokenizer.response_template = template, {"unused": True}
        call = {"type": "function", "function": {"name": "look", "arguments": {}}}
        module.parse_response = lambda tokenizer, ids, **_: dict(
            role="assistant", content=tokenizer.decode(ids, skip_special_tokens=True), tool_calls=[call])
        banned = (policy.ban < 0).nonzero()[:, 0].tolist()
        self.trainer = module.GRPOTrainer(
            AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa"), tools=[look],
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            args=GRPOConfig(output_dir=folder, per_device_train_batch_size=N_PROMPTS * GROUP, num_generations=GROUP,
                            max_completion_length=10 ** 4, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[],
                            generation_kwargs=dict(max_new_tokens=NEW_TOKENS, suppress_tokens=banned)),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}]),
            processing_class=Processor(policy.image_processor, tokenizer, None, chat_template=template))
        self.trainer.model.train()
        self.rows = []
        for sample in samples:
            prompt = [dict(m, content=[dict(part) for part in m["content"]]) for m in messages(sample)]
            self.rows += [{"prompt": prompt, "images": list(sample.images)}] * GROUP

    def generate(self, turns):
        """Rollouts with rewards and advantages: the batch that its loss takes."""
        self.trainer.max_tool_calling_iterations = turns - 1
        return self.trainer._generate_and_score_completions(self.rows)

    def train_on(self, batch, rows):
        """Forward, its own loss, backward, so many rows at a time: as its own micro-batches are cut."""
        from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
        pieces = len(self.rows) // rows
        self.trainer.current_gradient_accumulation_steps = pieces
        for part in split_tensor_dict(split_pixel_values_by_grid(dict(batch)), pieces):
            self.trainer.compute_loss(self.trainer.model, unsplit_pixel_values_by_grid(part)).backward()


class Refeed:
    """The policy without a cache across turns: every turn prefills everything so far, each row by itself."""

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def prefill(self, prompts, group_size):
        self.context = [prompt for prompt in prompts for _ in range(group_size)]
        return self.policy.prefill(prompts, group_size)

    def generate(self, state, *args, **options):
        self.actions = self.policy.generate(state, *args, **options)

    def extend(self, state, observations):
        import torch
        from model import Encoded
        rows = sorted(observations)
        for row in rows:
            old, new = self.context[row], observations[row]
            pixels, grid = torch.cat([old.pixels, new.pixels]), torch.cat([old.grid, new.grid])
            self.context[row] = Encoded(old.ids + self.actions[row].ids + new.ids, pixels, grid)
        state = self.policy.prefill([self.context[row] for row in rows], 1)
        state.order = rows
        return state


def measure(title, works, repeats):
    """Run each {name: function} in turn; print median CPU seconds and how many times those of "here" each takes.
    Returns what each returned, and the medians."""
    seconds, made = {name: [] for name in works}, {}
    for _ in range(repeats):
        for name, work in works.items():
            begin = time.process_time()
            made[name] = work()
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{title}: {report(medians)}", flush=True)
    return made, medians


def report(medians):
    return "  ".join(f"{name} {value:.2f} ({value / medians['here']:.2f}x)" for name, value in medians.items())


def rates():
    """FLOPs a second of a matmul in the model's shapes, and bytes a second of a copy that no cache holds."""
    import torch
    a, b, big, small = torch.randn(2048, 256), torch.randn(256, 768), torch.zeros(2 ** 25), torch.zeros(2 ** 25)

    def seconds(work, n):
        begin = time.process_time()
        for _ in range(n):
            work()
        return (time.process_time() - begin) / n
    big.copy_(small), a @ b
    return 2 * 2048 * 256 * 768 / seconds(lambda: a @ b, 50), 2 * big.nbytes / seconds(lambda: big.copy_(small), 10)


def floors(policy, groups):
    """Least seconds for generation and for the update of these groups: each distinct token through the weights once,
    three times in the update; attention's products; in decoding, weights and own keys and values read once a token."""
    flops, copied = rates()
    model, text = policy.model, policy.model.config.text_config
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters())
    size = text.hidden_size // text.num_attention_heads * text.num_key_value_heads * 2 * text.num_hidden_layers * 4
    tokens = attention = scored = steps = read = 0
    for group in groups:
        spans = [(0, group[0].prompt_length)] + [(t.prompt_length, len(t.tokens)) for t in group]
        tokens += sum(hi - lo for lo, hi in spans)
        attention += sum(4 * text.hidden_size * text.num_hidden_layers * (hi * hi - lo * lo) / 2 for lo, hi in spans)
        for t in group:
            places = [i for i, sampled in enumerate(t.action_mask) if sampled]
            scored, steps = scored + len(places), max(steps, len(places))
            read += size * sum(i - t.prompt_length for i in places)
        read += size * group[0].prompt_length * len(places)
    head = 2 * scored * text.vocab_size * text.hidden_size
    forward = 2 * weights * tokens + attention + head
    return (forward / flops + (read + steps * 4 * weights) / copied), 3 * forward / flops


def rollout(turns, repeats):
    """Generation of 4 prompts x 8 of forced lengths: here, without each trick, and plain."""
    import model
    policy = learner()
    samples = questions(policy)
    apart = [dataclasses.replace(sample) for sample in samples for _ in range(GROUP)]

    def growing(n):
        with swapped((model.Store, "spare", 0.0)):
            return forced(policy, samples, n)
    for n in turns:
        works = {"here": lambda: forced(policy, samples, n),
                 "prompt run for every row": lambda: forced(policy, apart, n, 1),
                 "cache copied at every token": lambda: growing(n),
                 "no cache across turns": lambda: forced(Refeed(policy), samples, n),
                 "plain model.generate": lambda: forced(policy, samples, n, slow=True)}
        made, medians = measure(f"generate, {n} turns", works, repeats)
        floor, _ = floors(policy, made["here"])
        print(f"  floor {floor:.2f}, here {medians['here'] / floor:.1f} times that", flush=True)


def update(turns, repeats):
    """Log-probs, loss and backward of the same trajectories: here, without each trick, and plain."""
    policy = learner()
    samples = questions(policy)
    for n in turns:
        groups = forced(policy, samples, n)
        rows = [t for group in groups for t in group]
        apart = [[dataclasses.replace(t, sample=dataclasses.replace(t.sample))] for t in rows]
        scored = [[dataclasses.replace(t, action_mask=[i >= t.prompt_length for i in range(len(t.tokens))],
                                       logprobs=[0.0] * (len(t.tokens) - t.prompt_length)) for t in group] for group in groups]
        works = {"here": lambda: train_on(policy, groups), "prompt run for every row": lambda: train_on(policy, apart),
                 "all response tokens scored": lambda: train_on(policy, scored),
                 "one micro-batch": lambda: train_on(policy, groups, 10 ** 9),
                 "plain": lambda: plain_train_on(policy, rows, len(rows)),
                 f"plain, {ROWS} rows at a time": lambda: plain_train_on(policy, rows, ROWS)}
        _, medians = measure(f"update, {n} turns", works, repeats)
        _, floor = floors(policy, groups)
        print(f"  floor {floor:.2f}, here {medians['here'] / floor:.1f} times that", flush=True)


def step(turns, repeats):
    """A whole step here and, where it is installed, with TRL: generation, then loss, backward and AdamW."""
    import torch
    policy = learner()
    samples = questions(policy)
    optimizer, works = torch.optim.AdamW(policy.model.parameters(), 1e-6), {}
    try:
        peer = Peer(policy, samples)
        theirs = torch.optim.AdamW(peer.trainer.model.parameters(), 1e-6)
    except ImportError:
        print("TRL is not installed (pip install trl): without it")
        peer = None

    def learn(optimizer, train):
        train()
        optimizer.step()
        optimizer.zero_grad()
    for n in turns:
        works = {"here": lambda: forced(policy, samples, n), **({"TRL": lambda: peer.generate(n)} if peer else {})}
        made, first = measure(f"generate, {n} turns", works, repeats)
        groups, batch, split = made["here"], made.get("TRL"), f"TRL, {ROWS} rows at a time"
        works = {"here": lambda: learn(optimizer, lambda: train_on(policy, groups))}
        if peer:
            works |= {"TRL": lambda: learn(theirs, lambda: peer.train_on(batch, len(peer.rows))),
                      split: lambda: learn(theirs, lambda: peer.train_on(batch, ROWS))}
        _, second = measure(f"update, {n} turns", works, repeats)
        total = {name: first.get(name, first.get("TRL")) + second[name] for name in works}
        print(f"step, {n} turns: " + report(total), flush=True)
        floor = sum(floors(policy, groups))
        print(f"  floor {floor:.2f}; " + ", ".join(f"{name} {total[name] / floor:.1f} times that" for name in works), flush=True)


def memory(vocabulary=152_064, actions=4096, hidden=128):
    """Peak memory of log-probs and backward at a real vocabulary: in chunks, and with all logits at once."""
    peaks = {}
    for name in ("chunks", "full"):
        child = subprocess.run([sys.executable, __file__, "head", name, str(vocabulary), str(actions), str(hidden)],
                               text=True, capture_output=True)
        peaks[name] = float(child.stdout) if child.returncode == 0 else None
        print(f"{name}: " + (f"{peaks[name]:.0f} MiB" if peaks[name] else "did not fit into memory"), flush=True)
    full = peaks["full"] or 3 * 4 * vocabulary * actions / 2 ** 20
    print(f"full over chunks: {full / peaks['chunks']:.1f} (target 5)" + ("" if peaks["full"] else ", of logits, log-probs, gradient"))


def head(name, vocabulary, actions, hidden):
    """What `memory` runs in a process of its own: prints the MiB that log-probs and backward took at their peak."""
    import resource
    import torch
    import model
    torch.set_num_threads(1)
    if name == "full":
        model.HEAD_LOGITS = 10 ** 12
    net = torch.nn.Module()
    net.lm_head = torch.nn.Linear(hidden, vocabulary, bias=False)
    states, ban = torch.randn(actions, hidden, requires_grad=True), torch.zeros(vocabulary)
    (net.lm_head(states[:8]).sum() * 0).backward()
    with swapped((model, "hidden", lambda *_, **__: states)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        logprobs, _ = model.score(net, *[None] * 5, torch.arange(actions), torch.zeros(actions, dtype=torch.long), ban, 1.0)
        logprobs.sum().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


SEVEN_B = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               vocab_size=152_064, max_position_embeddings=128_000, tie_word_embeddings=False,
               rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
TOWER = dict(hidden_size=1280, depth=32, num_heads=16, intermediate_size=3420, out_hidden_size=3584)


def gpu(device="cuda", text=SEVEN_B, vision=TOWER, prompt=3000, reply=1000, decoded=128):
    """A random model of the real 7B config in bf16: decoding against the memory's bandwidth, the update against the
    matmul peak, peak memory with and without each trick."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from data import Sample
    from model import Encoded, Policy, tiny_policy
    from rollout import Trajectory
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.py gpu: needs a GPU of 80 GB, and torch sees none")
    tiny = tiny_policy(tempfile.mkdtemp(prefix="bench-"), ["a"] * 3, vocabulary=300)
    ids = {name: getattr(tiny.model.config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**ids, text_config=text, vision_config=vision)).eval()
        torch.set_default_dtype(torch.float32)
    network.set_attn_implementation({"text_config": "packed", "vision_config": "sdpa"})
    policy = Policy(network, tiny.tokenizer, tiny.image_processor)
    policy.stops = lambda ids: False
    layers = sum(p.numel() for p in network.model.language_model.layers.parameters())
    weights, config = layers + network.lm_head.weight.numel(), network.config.text_config
    words = torch.randint(20, 250, (prompt,)).tolist()

    def seconds(work):
        """Seconds and peak GiB of one run after a warm-up."""
        for _ in range(2):
            synchronize, begin = getattr(torch, device).synchronize, time.perf_counter()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            work()
            synchronize()
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else 0.0
        return time.perf_counter() - begin, peak
    n = 8192 if device == "cuda" else 512
    a, big = torch.randn(n, n, dtype=torch.bfloat16, device=device), torch.zeros(n * n * 16, dtype=torch.uint8, device=device)
    flops, copied = 2 * n ** 3 / seconds(lambda: a @ a)[0], 2 * big.nbytes / seconds(lambda: big.clone())[0]
    print(f"matmul {flops / 1e12:.1f} TFLOP/s, copy {copied / 1e9:.0f} GB/s, {weights / 1e9:.2f} G parameters")
    del a, big
    for rows in (64, 128):
        state = policy.prefill([Encoded(words, None, torch.zeros(0, 3, dtype=torch.long))] * (rows // GROUP), GROUP)
        took, peak = seconds(lambda: policy.generate(state, dict.fromkeys(range(rows), decoded)))
        pair = 4 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        read = 2 * weights + pair * (rows // GROUP * prompt + rows * decoded * 3 / 2)           # in the second run
        print(f"decode, {rows} rows behind prompts of {prompt}: {rows * decoded / took:.0f} tokens/s, "
              f"{decoded * read / copied / took:.2f} of the bandwidth floor's speed, peak {peak:.1f} GiB")
        del state

    def trajectories(shared):
        sample, made = Sample("0", "?", "1"), []
        for _ in range(GROUP):
            tokens = words + torch.randint(20, 250, (reply,)).tolist()
            made.append(Trajectory(sample if shared else dataclasses.replace(sample), tokens=tokens, prompt_length=prompt,
                                   action_mask=[False] * prompt + [True] * reply))
        return made

    def train(batch):
        policy.logprobs(batch)[0].sum().backward()
        network.zero_grad()
    forwards = [layer.forward for layer in network.model.language_model.layers]
    for name, shared, recompute in (("prompt once, recomputed activations", True, True), ("prompt once", True, False),
                                    ("prompt for every row, recomputed activations", False, True)):
        for layer, forward in zip(network.model.language_model.layers, forwards):
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, forward, use_reentrant=False) if recompute else forward
        try:
            took, peak = seconds(lambda: train(trajectories(shared)))
        except torch.OutOfMemoryError:
            print(f"update, {name}: does not fit")
            continue
        tokens = (prompt if shared else GROUP * prompt) + GROUP * reply
        done = 6 * (tokens * layers + GROUP * reply * network.lm_head.weight.numel())           # attention not counted
        print(f"update, {name}: {done / took / 1e12:.2f} TFLOP/s, {done / took / flops:.2f} of the matmul peak, peak {peak:.1f} GiB")


BENCHMARKS = {"sandbox": sandbox, "rollout": rollout, "update": update, "step": step, "memory": memory, "gpu": gpu}


def main():
    if sys.argv[1:2] == ["head"]:
        return head(sys.argv[2], *map(int, sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of rollout, update and step; medians are printed")
    parser.add_argument("--turns", type=int, nargs="*", default=[1, 1, 3, 5], help="of these three; the first warms up")
    args = parser.parse_args()
    timed = args.benchmark in ("rollout", "update", "step")
    BENCHMARKS[args.benchmark](*[args.turns, args.repeats] if timed else [])


if __name__ == "__main__":
    main()
