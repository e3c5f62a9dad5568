"""Reinforcement learning of an agent that looks with Python: GRPO without std normalisation, in plain PyTorch.

One step: collect (sample twice the prompts that are trained on, G rollouts each) -> select (drop what the environment
broke and groups that teach nothing, keep those with the largest reward std) -> update (PPO-clipped policy gradient,
token-mean over the whole optimizer step) -> log -> evaluate -> save. What is not here, and why:
  - No KL term and no reference model, no entropy bonus, no value network: the paper trains without.
  - No division by the std of the rewards (--normalize_std brings it back): it fluctuates, and it is not in the paper.
  - No separate log-prob pass: the sampler's log-probs are the old ones; `logprob_gap` reports how far they are off.
  - No separate SFT trainer: token loss on demonstrations is this update with advantage 1 (--stage sft).

  torchrun train.py --task image                    # the built-in puzzles on a laptop, ten to fifteen minutes
  torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-VL-7B-Instruct --data rl.json --out runs/7b
"""
import errno
import importlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

from data import DataError, load, load_templates
from evaluate import evaluate, looks, parse_flags, write_report
from model import load_policy, save_policy, shard_policy, tiny_policy
from reward import Judge, score
from rollout import EndReason, Script, rollout, select
from sandbox import SandboxError
from tasks.puzzles import ANSWER, Difficulty, captions, corpus, demonstrations, puzzles


@dataclass
class Config:
    """Every setting of a run, with the paper's value as default. Without --model the built-in tiny policy trains, with
    the values of LAPTOP for what the command line leaves open."""
    task: str = "image"                     # built-in puzzles: image, video or image,video
    stage: str = "rl"                       # rl, or sft on demonstrations (rows with "turns")
    model: str = ""                         # checkpoint folder or hub name; none: the tiny policy, cold-started here
    data: str = ""                          # training file (validation JSON, RL JSON, JSON lines); none: puzzles
    eval_data: str = ""                     # held-out file; none: held-out puzzles when training on puzzles
    prompt_template: str = ""               # JSON object of prompt templates
    frames: str = ""                        # N or 1fps: a video's frames in the context, no tool (the uniform baseline)
    difficulty: str = ""                    # JSON object of fields of Difficulty in tasks/puzzles.py
    out: str = ""                           # output folder; none: runs/TASK
    seed: int = 0                           # of puzzles, data order, weights of the tiny policy, sampling
    steps: int = 700                        # optimizer steps
    batch_size: int = 16                    # prompts a step trains on, over all processes
    oversample: float = 2.0                 # prompts sampled, times batch_size
    max_oversample: float = 4.0             # where too few groups are left: sample up to this times batch_size
    group_size: int = 8                     # rollouts a prompt
    max_turns: int = 5                      # turns, the last of which can only answer: 4 tool calls
    max_new_tokens: int = 10_240            # new tokens a turn
    max_context: int = 52_480               # tokens of a trajectory: 32,000 prompt + 20,480 response
    max_images: int = 32                    # images in the context
    max_pixels: int = 2_000_000             # of an image, as the model sees it
    temperature: float = 1.0                # of sampling
    top_p: float = 1.0                      # of sampling
    tool_reward: float = 0.1                # reward a tool call of a correct trajectory
    rank: str = "std"                       # which groups are kept: std, or random (ablation)
    normalize_std: bool = False             # divide advantages by the group's reward std (ablation; plain GRPO)
    keep_zero_variance: bool = False        # keep groups whose rewards are all equal
    require_images: bool = False            # drop trajectories whose tools showed no image, as the published code does
    lr: float = 1e-6                        # AdamW learning rate, constant after warm-up
    warmup: int = 0                         # steps of linear warm-up
    weight_decay: float = 0.0               # AdamW weight decay
    clip: float = 0.2                       # PPO ratio clip
    dual_clip: float = 3.0                  # bound on the loss of negative advantages
    max_grad_norm: float = 1.0              # gradient clipping
    minibatches: int = 1                    # optimizer updates a batch
    tokens_per_microbatch: int = 16_384     # packed tokens of one forward and backward
    checkpoint_activations: bool = False    # recompute layers in backward: less memory, a third more time
    unshard_rollout: bool = True            # gather the whole model on every GPU for generation
    offload: bool = False                   # parameters and optimizer on the CPU
    eval_every: int = 20                    # steps between held-out evaluations, 0: none
    eval_n: int = 128                       # held-out puzzles
    save_every: int = 20                    # steps between checkpoints, 0: none
    keep: int = 2                           # newest checkpoints kept
    resume: bool = False                    # go on from the newest complete state in --out
    judge: str = ""                         # OpenAI-compatible endpoint (http://host:port/v1) where the rule is unsure
    judge_model: str = ""                   # the judge's model name; the paper's is Qwen2.5-72B-Instruct
    judge_only: bool = False                # ask the judge for every answer: the paper's protocol
    judge_key_file: str = ""                # file with the judge's API key
    timeout: float = 30.0                   # seconds a tool call may take
    unsafe_sandbox: bool = False            # run code without confinement where the system has none
    slow: bool = False                      # rollouts by plain model.generate, for reading and for proofs
    log: str = ""                           # also log to wandb or trackio, if installed


LAPTOP = dict(steps=50, batch_size=8, max_new_tokens=96, max_context=2048, lr=1.5e-4, warmup=4, timeout=10.0,
              tokens_per_microbatch=2048, eval_every=25)
COLD_START = (                              # the tiny policy's SFT: first to see, then to look
    (captions, 2400, dict(steps=80, batch_size=96, lr=3e-3, save_every=0)),
    (demonstrations, 1500, dict(steps=140, batch_size=32, lr=2.5e-3, save_every=0)))


# ------------------------------------------------------------------------------------------------ prompts and groups
class Prompts:
    """An endless stream of samples that depends on seed and position only: what --resume goes on from is `position`."""

    def __init__(self, config, samples):
        self.config, self.samples, self.position = config, samples, 0

    def take(self, n, rank=0, world=1):
        """The next n samples of the stream, of which this process gets its share."""
        start, self.position = self.position, self.position + n
        mine = range(start + rank, start + n, world)
        if not self.samples:
            seeds, hard = (self.config.seed * 1_000_003 + i for i in mine), difficulty(self.config)
            return [puzzles(self.config.task, 1, seed, **hard)[0] for seed in seeds]
        return [self.samples[self._order(i // len(self.samples))[i % len(self.samples)]] for i in mine]

    def _order(self, epoch):
        generator = torch.Generator().manual_seed(self.config.seed * 9973 + epoch)
        return torch.randperm(len(self.samples), generator=generator).tolist()


def collect(run, config):
    """Sample prompts and roll them out until batch_size groups are worth training on, or max_oversample is reached."""
    groups, kept, counts, target = [], [], Counter(), round(config.oversample * config.batch_size)
    stats = {}
    while len(kept) < config.batch_size and len(groups) < config.max_oversample * config.batch_size:
        n = min(target - len(groups), round(config.max_oversample * config.batch_size) - len(groups))
        samples = run.prompts.take(n, run.rank, run.world)
        fresh = rollout(run.policy, samples, config.group_size, **run.limits, stats=stats)
        score([t for group in fresh for t in group], config.tool_reward, run.judge, config.judge_only)
        groups += run.gather(fresh)
        kept, counts = select(groups, config.batch_size, config.rank, config.keep_zero_variance, config.normalize_std,
                              config.require_images, seed=config.seed + run.prompts.position)
        target = len(groups) + config.batch_size
    return groups, kept, dict(counts, **stats)


# ------------------------------------------------------------------------------------------------ the objective
def policy_loss(logprobs, old, advantages, clip=0.2, dual_clip=3.0):
    """PPO's clipped objective with dual clip, for each action token (A,): a loss to be summed and divided by the action
    tokens of the whole optimizer step. Returns it and which tokens the clip held (PAPER: objective)."""
    ratio = (logprobs - old).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    objective = torch.minimum(plain, clipped)
    objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective, (objective != plain).float()


def microbatches(trajectories, budget):
    """Lists of trajectories of at most `budget` packed tokens, by length; a group's prompt counts once in each."""
    groups = {}
    for t in trajectories:
        groups.setdefault(id(t.sample), []).append(t)
    groups = sorted(groups.values(), key=lambda group: max(len(t.tokens) for t in group))
    batches, size, seen = [], budget, set()
    for t in (t for group in groups for t in sorted(group, key=lambda t: len(t.tokens))):
        cost = len(t.tokens) - t.prompt_length * (id(t.sample) in seen)
        if size + cost > budget:
            batches, size, seen, cost = batches + [[]], 0, set(), len(t.tokens)
        batches[-1].append(t)
        size, seen = size + cost, seen | {id(t.sample)}
    return batches


def update(run, trajectories, config, lr):
    """Train on the batch -> metrics. trajectories: the whole batch, the same list on every process."""
    sums, norms, skipped = torch.zeros(5, dtype=torch.float64), [], 0          # loss, entropy, clipped, gap, tokens
    parts = run.share(trajectories, config.minibatches)
    for mine, part in parts:
        tokens = sum(sum(t.action_mask) for t in part)  # of the whole optimizer step, over all processes
        batches = microbatches(mine, config.tokens_per_microbatch)
        for i, batch in enumerate(batches + [part[:1]] * (run.most(len(batches)) - len(batches))):
            real = float(i < len(batches))              # 0: a batch that only keeps the processes in step
            logprobs, entropy = run.policy.logprobs(batch, config.temperature)
            sampled = torch.tensor([x for t in batch for x in t.logprobs], device=logprobs.device)
            old = sampled if len(sampled) else logprobs.detach()
            advantages = [t.advantage for t in batch for _ in range(sum(t.action_mask))]
            advantages = torch.tensor(advantages, device=logprobs.device)
            loss, clipped = -logprobs * advantages, torch.zeros_like(old)       # imitation: the same gradient, readable
            if len(sampled):
                loss, clipped = policy_loss(logprobs, old, advantages, config.clip, config.dual_clip)
            (loss.sum() * real * run.world / tokens).backward()         # FSDP averages over processes
            gap, share = (logprobs.detach() - old).abs(), loss.detach().sum() / tokens / len(parts)
            sums += real * torch.stack([share, *(x.sum() for x in (entropy, clipped, gap, gap * 0 + 1))]).double().cpu()
        norms.append(run.clip_grad_norm(config.max_grad_norm))
        if math.isfinite(norms[-1]):
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            run.optimizer.step()
        else:
            skipped += 1
        run.optimizer.zero_grad(set_to_none=True)
    loss, entropy, clipped, gap, tokens = run.sum(sums).tolist()
    return dict(loss=loss, grad_norm=sum(norms) / len(norms), entropy=entropy / tokens, clip_fraction=clipped / tokens,
                logprob_gap=gap / tokens, updates_skipped=skipped, lr=lr)


# ------------------------------------------------------------------------------------------------ a run's state
class Run:
    """The policy, its optimizer and the stream of prompts, on one process or many; what --resume restores."""

    def __init__(self, config, samples, templates, alone=False):
        many = dist.is_initialized() and not alone
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        self.config, self.out, self.step, self.start = config, Path(config.out), 0, {}
        self.recited, self.held_out, self.terminated, self.idle, self.bad, self.logger = {}, [], False, 0, 0, None
        self.policy = load_policy(config.model, dtype=torch.float32, max_pixels=config.max_pixels)
        self.policy.generator.manual_seed(config.seed * 7919 + self.rank)
        if many:
            shard_policy(self.policy, config.offload, config.checkpoint_activations)
        self.optimizer = torch.optim.AdamW(self.policy.model.parameters(), config.lr, weight_decay=config.weight_decay)
        self.prompts = Prompts(config, samples)
        key = config.judge_key_file or None
        self.judge = config.judge and Judge(config.judge, config.judge_model, self.out / "judge.jsonl", api_key=key)
        names = "max_turns max_new_tokens max_context max_images temperature top_p frames timeout unsafe_sandbox slow".split()
        self.limits = dict({name: getattr(config, name) for name in names}, templates=templates)

    def gather(self, groups):
        """All processes' groups, in rank order, on every process."""
        if self.world == 1:
            return groups
        parts = [None] * self.world
        dist.all_gather_object(parts, groups)
        return [group for part in parts for group in part]

    def share(self, trajectories, minibatches):
        """[(this process's trajectories, all trajectories)] for each optimizer step; groups stay whole where they can,
        and go to the process that has the fewest tokens."""
        groups = {}
        for t in trajectories:
            groups.setdefault(id(t.sample), []).append(t)
        groups, parts = list(groups.values()), []
        for k in range(min(minibatches, len(groups))):
            part = groups[k::minibatches]
            units = part if len(part) >= 2 * self.world else [[t] for group in part for t in group]
            loads = [[] for _ in range(self.world)]
            for unit in sorted(units, key=lambda unit: -sum(len(t.tokens) for t in unit)):
                min(loads, key=lambda load: sum(len(t.tokens) for t in load)).extend(unit)
            parts.append((loads[self.rank], [t for group in part for t in group]))
        return parts

    def most(self, n):
        """The largest n of any process."""
        return int(self.sum(torch.tensor([n]), "max")[0])

    def sum(self, values, how="sum"):
        if self.world > 1:
            dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
        return values

    def clip_grad_norm(self, limit):
        norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def stopped(self):
        """Has a scheduler asked any process to end (SIGTERM)?"""
        return bool(self.most(int(self.terminated)))

    def log(self, metrics, groups, progress):
        """One row to metrics.jsonl, one line to the terminal; at evaluations and at the end also the pictures."""
        m, held = metrics, [f"{metrics[k]:.2f}" for k in ("eval_accuracy", "eval_accuracy_greedy") if k in metrics]
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(m) + "\n")
            if self.logger:
                self.logger.log(m, step=self.step)
            line = ("step {step:4d}  accuracy {accuracy:.2f}  reward {reward:.2f}  tool calls {tool_calls:.2f}  tokens "
                    "{response_tokens:.0f}  trained on {trajectories_trained}  {seconds_rollout:.1f}+{seconds_update:.1f} s")
            progress.write(line.format(**m) + (f"  held out {held[0]}, greedily {held[1]}" if held else ""))
            if held or self.step == self.config.steps:
                write_report(self.out / "rollouts.html", [t for group in groups for t in group], f"Step {self.step}")
                curves(self.out / "curves.png", read_metrics(self.out), self.start)
        if m.get("logprob_gap", 0) > 0.01:
            progress.write(f"warning: rollout and update disagree on log-probs by {m['logprob_gap']:.3f} on average")

    def check(self, metrics, kept):
        """Raises DataError when the run goes nowhere: nothing to train on, or no finite gradient, step after step."""
        self.idle = 0 if kept else self.idle + 1
        self.bad = self.bad + 1 if metrics.get("updates_skipped") else 0
        if self.idle >= 10:
            raise DataError("10 steps in a row had nothing to train on: every group's rewards are equal, or it is broken. "
                            "Are the questions too hard or too easy, or the limits too small? (or --keep_zero_variance)")
        if self.bad >= 5:
            records = [(t.sample.id, t.tokens, t.action_mask, t.logprobs, t.advantage) for group in kept for t in group]
            torch.save(records, self.out / f"nonfinite_rank{self.rank}.pt")
            raise DataError(f"the gradient was not finite in 5 steps in a row; their data: {self.out}/nonfinite_rank*.pt")

    def save(self):
        """The checkpoint step_N/ and state/step_N for --resume: written aside, synced, renamed; `keep` newest stay."""
        parts = {self.out / f"step_{self.step}": lambda d: save_policy(self.policy, d),
                 self.out / "state" / f"step_{self.step}": self._save_state}
        for final, write in parts.items():
            aside = final.with_name(final.name + ".tmp")
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.most(0)                                    # nobody writes before the folder is there
            write(aside)
            self.most(0)                                    # nobody renames before all have written
            if self.rank == 0:
                for file in filter(Path.is_file, aside.rglob("*")):
                    with open(file) as opened:
                        os.fsync(opened.fileno())
                shutil.rmtree(final, ignore_errors=True)
                aside.rename(final)
        if self.rank == 0:
            for folder in (self.out, self.out / "state"):
                for old in sorted(complete(folder), key=step_of)[:-self.config.keep]:
                    shutil.rmtree(old)

    def _save_state(self, folder):
        options = StateDictOptions(cpu_offload=True)
        model, optimizer = get_state_dict(self.policy.model, self.optimizer, options=options)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, no_dist=self.world == 1)
        state = dict(step=self.step, position=self.prompts.position, world=self.world, start=self.start)
        torch.save(dict(state, generator=self.policy.generator.get_state()), folder / f"rank{self.rank}.pt")

    def restore(self):
        """Go on from the newest complete state; metrics behind it are cut off, they will be written again."""
        states = sorted(complete(self.out / "state"), key=step_of)
        if states:
            model, optimizer = get_state_dict(self.policy.model, self.optimizer)
            dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=states[-1], no_dist=self.world == 1)
            set_state_dict(self.policy.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
            ranks = sorted(states[-1].glob("rank*.pt"))
            saved = torch.load(ranks[self.rank % len(ranks)], weights_only=True)
            self.step, self.prompts.position, self.start = saved["step"], saved["position"], saved["start"]
            if saved["world"] == self.world:
                self.policy.generator.set_state(saved["generator"])
        if self.rank == 0:
            rows = [row for row in read_metrics(self.out) if row["step"] <= self.step]
            (self.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def complete(folder):
    """The finished step_N folders in `folder`; one that is being written ends in .tmp."""
    return [path for path in folder.glob("step_*") if path.name[5:].isdigit()]


def step_of(path):
    return int(path.name[5:])


def read_metrics(out):
    """Rows of metrics.jsonl; a line that a killed run left half-written is dropped."""
    rows, file = [], Path(out) / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


# ------------------------------------------------------------------------------------------------ the loop
def train(run, config, quiet=False):
    """collect -> select -> update -> log -> evaluate -> save, until `steps`."""
    progress = tqdm(total=config.steps, initial=run.step, desc=config.stage, disable=quiet or run.rank > 0)
    while run.step < config.steps and not run.stopped():
        times = [time.perf_counter()]
        with run.policy.whole(config.unshard_rollout):
            groups, kept, counts = (collect_demonstrations if config.stage == "sft" else collect)(run, config)
        times.append(time.perf_counter())
        lr = config.lr * min(1.0, (run.step + 1) / (config.warmup + 1))
        losses = update(run, [t for group in kept for t in group], config, lr) if kept else {}
        times.append(time.perf_counter())
        run.step += 1
        if len(kept) < config.batch_size and run.rank == 0:
            progress.write(f"step {run.step}: {len(kept)} of {config.batch_size} groups teach something, after {len(groups)} sampled")
        metrics = measure(run, groups, kept, counts, losses, times)
        run.check(metrics, kept)
        if config.eval_every and run.held_out and (run.step % config.eval_every == 0 or run.step == config.steps):
            metrics.update(held_out(run, config))
        run.log(metrics, groups, progress)
        progress.update()
        if config.save_every and (run.step % config.save_every == 0 or run.step == config.steps or run.stopped()):
            run.save()
    progress.close()


def collect_demonstrations(run, config):
    """The sft stage's batch: demonstrations recited with their code really run, as trajectories of advantage 1."""
    samples = run.prompts.take(config.batch_size, run.rank, run.world)
    new = [s for s in samples if id(s) not in run.recited]
    limits = dict(run.limits, max_turns=max([len(s.turns) for s in new], default=1), slow=False)
    groups = rollout(Script(run.policy, new), new, 1, **limits)
    run.recited.update((id(s), group[0]) for s, group in zip(new, groups))
    groups = run.gather([[run.recited[id(s)]] for s in samples])
    for (t,) in groups:
        t.advantage, t.logprobs = 1.0, []
    return groups, [group for group in groups if any(group[0].action_mask)], {}


def measure(run, groups, kept, counts, losses, times):
    """The step's row of metrics.jsonl: means over everything sampled, counts of everything dropped."""
    sampled, trained = [t for g in groups for t in g], [t for g in kept for t in g]
    right = [t for t in trained if t.correct]

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else 0.0
    calls, looked = [[turn.code for turn in t.turns if turn.code is not None] for t in sampled], [*map(looks, sampled)]
    seconds = times[1] - times[0]
    return dict(
        step=run.step, reward=mean(t.reward for t in sampled), accuracy=mean(bool(t.correct) for t in sampled),
        tool_calls=mean(t.n_tool_calls for t in sampled), turns=mean(len(t.turns) for t in sampled),
        response_tokens=mean(sum(t.action_mask) for t in sampled), visual_tokens=mean(t.visual_tokens for t in sampled),
        frames_looked_at=mean(where["frames_looked_at"] for where in looked),
        seconds_covered=mean(where["seconds_covered"] for where in looked),
        reward_std=mean(statistics.pstdev(t.reward for t in g) for g in groups),
        correct_negative_advantage=mean(t.advantage < 0 for t in right),
        repeated_calls=mean(len(c) - len(set(c)) for c in calls),
        empty_calls=mean(sum(bool(u.code) and not u.output and not u.images for u in t.turns) for t in sampled),
        format_errors=mean(t.end_reason is EndReason.ERROR_IN_ACTION for t in sampled),
        turn_limit=mean(t.end_reason is EndReason.EXCEED_MAX_TURNS for t in sampled),
        trajectories_trained=len(trained), **{"seconds_tool": 0.0, **counts}, **losses, seconds_rollout=seconds,
        seconds_update=times[2] - times[1], tokens_per_second=sum(len(t.tokens) for t in sampled) / seconds)


def held_out(run, config):
    """Accuracy on the held-out samples, sampled as in training and greedily, over all processes."""
    result = {}
    for name, temperature in (("", config.temperature), ("_greedy", 0.0)):
        limits = dict(run.limits, temperature=temperature)
        with run.policy.whole(config.unshard_rollout):
            done = evaluate(run.policy, run.held_out[run.rank::run.world], judge=run.judge, **limits)
        rows = [(1, bool(t.correct), t.n_tool_calls, t.visual_tokens) for t in done]
        n, *sums = run.sum(torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).sum(0)).tolist()
        for key, value in zip(("accuracy", "tool_calls", "visual_tokens"), sums):
            result[f"eval_{key}{name}"] = value / n
    return result


def curves(path, rows, start):
    """curves.png: how the run went, step by step; held-out accuracy as dots."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, name in zip(axes.flat, ("accuracy", "reward", "tool_calls", "response_tokens", "entropy", "grad_norm")):
        points = [(r["step"], r[name]) for r in rows if name in r] or [(0, 0)]
        axis.plot(*zip(*points), color="tab:blue", lw=1, label="training, sampled")
        for key, style in ((f"eval_{name}", "o-"), (f"eval_{name}_greedy", "s--")):
            points = [(r["step"], r[key]) for r in [{"step": 0, **start}, *rows] if key in r]
            if points:
                axis.plot(*zip(*points), style, ms=4, label="held out" + (", greedy" if "greedy" in key else ""))
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def difficulty(config):
    """--difficulty as arguments of `puzzles`. Raises DataError."""
    try:
        return asdict(Difficulty(**json.loads(config.difficulty or "{}")))
    except (ValueError, TypeError) as error:
        raise DataError(f"--difficulty: expected a JSON object of fields of Difficulty in tasks/puzzles.py ({error})") from None


def cold_start(config):
    """The folder of the tiny policy after SFT on scripted demonstrations: made once for its settings, then reused."""
    made_for = [config.task, config.frames, config.difficulty and difficulty(config)]
    name = "_".join([config.task.replace(",", "_"), *([f"{zlib.crc32(repr(made_for).encode()):08x}"] if any(made_for[1:]) else [])])
    folder = Path(config.out).parent / f"cold_start_{name}_seed{config.seed}"
    if (folder / "config.json").exists() or dist.is_initialized() and dist.get_rank():
        return str(folder)
    print(f"cold start: teaching the tiny policy to look, into {folder} (reused by later runs)", flush=True)
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    tiny_policy(aside, corpus(config.task), config.seed)
    for make, n, settings in COLD_START:
        stage = replace(config, stage="sft", model=str(aside), out=str(aside), eval_every=0, **settings)
        lessons = make(config.task, n, config.seed, **difficulty(config))
        if config.frames:                               # no tool: the whole demonstration is the right answer
            lessons = [replace(s, turns=[ANSWER.format(s.answer)]) for s in lessons]
        run = Run(stage, lessons, None, alone=True)
        train(run, stage)
        save_policy(run.policy, aside)
    aside.rename(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------ command line
def configure(argv=None):
    """Flags -> Config, checked before any model is loaded."""
    argv = sys.argv[1:] if argv is None else argv
    config, given = parse_flags(Config, argv), {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    if not config.model:
        config = replace(config, **{name: value for name, value in LAPTOP.items() if name not in given})
    config.out = config.out or f"runs/{config.task.replace(',', '_')}{config.frames and '_' + config.frames}"
    difficulty(config)
    if config.group_size < 2:
        raise DataError("--group_size must be at least 2: an advantage is a difference from the group's mean")
    choices = dict(stage=("rl", "sft"), rank=("std", "random"), task=("image", "video", "image,video"))
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise DataError(f"--{name} {getattr(config, name)}: choose from {', '.join(allowed)}")
    for name in ("steps", "batch_size", "max_turns", "max_new_tokens", "minibatches", "tokens_per_microbatch"):
        if getattr(config, name) < 1:
            raise DataError(f"--{name} must be at least 1")
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        (Path(config.out) / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    except OSError as error:
        raise DataError(f"--out {config.out} cannot be written: {error.strerror}") from None
    return config


def begin(config):
    """Data, processes, cold start, state, held-out baseline: the Run that `train` goes on with."""
    samples = load(config.data) if config.data else []
    templates = load_templates(config.prompt_template) if config.prompt_template else None
    if config.stage == "sft" and not (samples and all(sample.turns for sample in samples)):
        raise DataError('--stage sft needs --data with demonstrations: rows with "turns", what the assistant says')
    held = load(config.eval_data) if config.eval_data else []
    if not held and not samples and config.eval_every:
        held = puzzles(config.task, config.eval_n, config.seed, split="heldout", **difficulty(config))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if cuda or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511").items():
            os.environ.setdefault(name, value)                          # `python train.py` is torchrun with one process
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if not cuda and "OMP_NUM_THREADS" not in os.environ:                # threads that wait spin, and sandboxes need cores
        torch.set_num_threads(max(1, os.cpu_count() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if not config.model:
        config.model = cold_start(config)
        if dist.is_initialized():
            dist.barrier()
    run = Run(config, samples, templates)
    run.held_out = held
    if config.resume:
        run.restore()
    elif run.rank == 0:
        (run.out / "metrics.jsonl").write_text("")
    if config.log and run.rank == 0:
        run.logger = importlib.import_module(config.log)                # wandb and trackio share these calls
        run.logger.init(project="pyvision-rl", name=run.out.name, config=asdict(config), resume="allow",
                        **({"id": run.out.name} if config.log == "wandb" else {}))
    if held and config.eval_every and run.step == 0:
        run.start = held_out(run, config)
        if run.rank == 0:
            print("before: held out {eval_accuracy:.2f}, greedily {eval_accuracy_greedy:.2f}, tool calls "
                  "{eval_tool_calls:.2f}".format(**run.start), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "terminated", True))
    return run


def stop(*_):
    """Ctrl-C: at once. What runs at the time may be a library that turns KeyboardInterrupt into an error of its own, or
    a thread of torch that waits; sandboxes end with this process, and checkpoints are complete or absent."""
    os.write(2, b"train.py: stopped; the last checkpoint is whole (--resume)\n")
    os._exit(130)


def main():
    """Run; bad input is one line and exit code 2, a full disk one line and exit code 1, Ctrl-C 130."""
    signal.signal(signal.SIGINT, stop)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")          # of a checkpoint by one process
    try:
        config = configure()
        train(begin(config), config)
    except (DataError, SandboxError) as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(print(f"train.py: {error}; the last complete checkpoint is untouched", file=sys.stderr) or 1)


if __name__ == "__main__":
    main()
