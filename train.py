"""Reinforcement learning of an agent that looks with Python: GRPO without std normalisation.

One step: collect (sample twice the prompts that are trained on, G rollouts each) -> choose (drop
what the environment broke and groups that teach nothing, keep those with the largest reward std) ->
update (PPO-clipped policy gradient, token-mean over the whole optimizer step) -> evaluate -> log ->
save. Where it says (PAPER), a value or a formula is that of arXiv 2602.20739.
What is not here, and why:
  - No KL term and no reference model, no entropy bonus, no value network: the paper has none.
  - No division by the std of the rewards (--normalize_std brings it back): it fluctuates.
  - No separate log-prob pass: the sampler's log-probs are the old ones. `logprob_gap` in
    metrics.jsonl says how far the update's are from them.
  - No separate SFT trainer: --stage sft is this loop with demonstrations instead of rollouts and
    the log-likelihood as the objective.

  torchrun train.py --task image        # the built-in puzzles, on a laptop
  torchrun --nproc_per_node=8 train.py --model Agents-X/PyVision-Image-7B-SFT --data rl.json
"""

import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data import DataError, load
from engine import parallel
from engine.batching import flat, microbatches, share
from engine.checkpoint import load_state, save_policy, save_state, state_to_resume
from engine.demonstrations import Demonstrations
from engine.fast import FastPolicy
from engine.judge import open_judge
from engine.lora import check_adapters
from engine.metrics import mean, measure
from engine.plan import plan
from engine.prompt import load_templates
from engine.run import Journal, Progress, check, greet, leader, one_line_errors, open_folder, settle
from model import load_policy
from reward import score
from rollout import Limits, Recital, rollout, select, teaches
from sandbox import SandboxError
from tasks.cold_start import cold_start_folder, parts_of_job, stages
from tasks.puzzles import puzzles, read_difficulty


@dataclass
class Config(Limits):
    """Every setting of a run, with the paper's value as default.

    Without --model the built-in tiny policy trains, with the values of LAPTOP for what the command
    line leaves open.
    """

    task: str = "image"  # built-in puzzles: image, video or image,video
    stage: Literal["rl", "sft"] = "rl"  # rl, or sft on demonstrations (rows with turns)
    model: str = ""  # checkpoint, run folder or hub name; none: the tiny policy, made here
    data: str = ""  # training file or folder (README: Data); none: puzzles
    eval_data: str = ""  # held-out file; none: held-out puzzles when training on puzzles
    prompt_template: str = ""  # JSON object of prompt templates
    difficulty: str = ""  # JSON object of fields of Difficulty in tasks/puzzles.py
    out: str = ""  # output folder; none: runs/TASK
    seed: int = 0  # of puzzles, data order, weights of the tiny policy, sampling
    steps: int = 700  # optimizer steps
    batch_size: int = 16  # prompts a step trains on, over all processes
    oversample: float = 2.0  # prompts sampled, in multiples of batch_size
    max_oversample: float = 4.0  # where too few groups teach: sample up to this times batch_size
    group_size: int = 8  # rollouts a prompt
    max_pixels: int = 2_000_000  # an image is scaled down to at most so many
    tool_reward: float = 0.1  # what each tool call adds to the reward of a right answer
    paid: str = "inf"  # how many calls of a rollout earn it; new: those of new code (paper: all)
    rank: Literal["std", "random"] = "std"  # which groups are kept: std, or random (ablation)
    normalize_std: bool = False  # divide advantages by the group's reward std (ablation)
    keep_zero_variance: bool = False  # keep groups whose rewards are all equal
    lr: float = 1e-6  # AdamW's, constant after warm-up; with --lora_rank try 10 times as much
    lora_rank: int = 0  # train adapters of this rank (such as 32, by peft), 0: all weights
    warmup: int = 0  # steps of linear warm-up
    weight_decay: float = 0.0  # AdamW weight decay
    clip: float = 0.2  # PPO ratio clip
    dual_clip: float = 3.0  # where A < 0, a token's objective is at least this times A
    max_grad_norm: float = 1.0  # gradient clipping
    minibatches: int = 1  # optimizer updates a batch
    tokens_per_microbatch: int = 16_384  # packed tokens of one forward and backward
    dtype: Literal["", "bfloat16", "float32"] = ""  # of what is computed; none: bfloat16 on a GPU
    checkpoint_activations: bool = False  # recompute layers in backward: less memory, slower
    offload: bool = False  # parameters and optimizer in main memory (with a GPU)
    eval_every: int = 20  # steps between held-out evaluations, 0: none
    eval_n: int = 128  # held-out puzzles
    save_every: int = 20  # steps between checkpoints, 0: none
    keep: int = 2  # newest checkpoints kept
    resume: bool = False  # go on from the newest complete state in --out, with its settings
    judge: str = ""  # OpenAI-compatible endpoint (http://host:port/v1) where the rule is unsure
    judge_model: str = ""  # the judge's model name; the paper's is Qwen2.5-72B-Instruct
    judge_only: bool = False  # ask the judge for every answer: the paper's protocol
    judge_key_file: str = ""  # file with the judge's API key
    slow: bool = False  # plain transformers instead of engine/fast.py: for reading and for proofs
    plan: bool = False  # print what such a run needs on each GPU, and end
    gpus: int = 1  # of the plan
    gpu_memory: float = 80.0  # GB of each GPU of the plan
    tracker: Literal["", "tensorboard", "wandb", "trackio"] = ""  # also log there, if installed
    name: str = ""  # the run's name there; none: the output folder's and the time of the start


LAPTOP = Config(
    steps=80,
    batch_size=8,
    max_new_tokens=96,
    max_context=2048,
    lr=1.5e-4,
    warmup=4,
    timeout=10.0,
    tokens_per_microbatch=2048,
)
EVAL_BATCH = 64  # held-out samples that run at a time, over all processes
SHOWN = 16  # held-out samples that the page follows through training


class Run:
    """The policy, its optimizer, and its place in the stream of prompts."""

    def __init__(self, config, samples, held=(), resume=None, progress=None, part=None):
        """held: samples to evaluate on. resume: state/step_N.pt, to go on with step_N's weights.

        progress, part: of the whole job, and the name of this run's steps in it.
        """
        weights = config.model  # with adapters they stay what they are
        if resume and not config.lora_rank:
            weights = resume.parents[1] / resume.stem
        plain = load_policy(
            weights,
            dtype=torch.float32,
            max_pixels=config.max_pixels,
            sharded=torch.distributed.is_initialized(),
        )
        parallel.make_trainable(plain, config)
        self.policy = plain if config.slow else FastPolicy(plain)
        self.model = plain.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            config.lr,
            weight_decay=config.weight_decay,
        )
        self.config = config
        self.out = Path(config.out)
        self.samples = samples
        self.held = held
        self.difficulty = read_difficulty(config.difficulty)
        self.templates = load_templates(config.prompt_template)
        self.judge = open_judge(config)
        self.demonstrations = Demonstrations(config.frames)
        self.step = 0
        self.position = 0  # in the stream of prompts
        self.rows = []  # of metrics.jsonl
        self.terminated = False
        self.policy.generator.manual_seed(config.seed * 7919 + parallel.rank())
        if resume:
            load_state(resume, self)
        part = part or config.stage
        progress = progress or Progress({part: (config.steps, 1.0)})
        self.journal = Journal(config, progress, part, self.rows)

    def due(self, every: int):
        """Is something due that happens every so many steps, and at the end?"""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def rollout(self, samples: list, group_size: int, **changes):
        """Groups of scored trajectories; every process samples at its own pace."""
        with parallel.whole(self.model):
            groups = rollout(
                self.policy,
                samples,
                group_size,
                self.config,
                templates=self.templates,
                **changes,
            )
        config = self.config
        counts = score(flat(groups), config.tool_reward, self.judge, config.judge_only, config.paid)
        self.journal.judged.update(counts)
        return groups


# ------------------------------------------------------------------------------------------ collect
def prompts(run: Run, n: int):
    """This process's share of the next n prompts: (row, Sample) of an endless stream.

    What lies at a place of the stream depends on the seed alone, so that a resumed run goes on
    with the prompts that an uninterrupted one would see.
    """
    start = run.position
    run.position += n
    for place in range(start + parallel.rank(), start + n, parallel.world()):
        if run.samples:
            epoch, index = divmod(place, len(run.samples))
            order = torch.Generator().manual_seed(run.config.seed * 9973 + epoch)
            row = int(torch.randperm(len(run.samples), generator=order)[index])
            yield row, run.samples[row]
        else:
            seed = run.config.seed * 1_000_003 + place
            yield place, puzzles(run.config.task, 1, seed, **run.difficulty)[0]


def collect(run: Run) -> list:
    """Roll out prompts until batch_size groups can teach something -> groups (PAPER: rollouts).

    It samples `oversample` times batch_size; where too few groups are left, up to `max_oversample`.
    """
    config = run.config
    groups = []
    target = round(config.oversample * config.batch_size)
    most = max(target, round(config.max_oversample * config.batch_size))
    while len(groups) < target:
        samples = [sample for _, sample in prompts(run, target - len(groups))]
        fresh = run.rollout(samples, config.group_size, seed=config.seed + run.position)
        groups += parallel.gather(fresh)
        useful = sum(teaches(group, config.keep_zero_variance) for group in groups)
        if useful < config.batch_size:
            target = min(target + config.batch_size, most)
    return groups


def recite(run: Run) -> list:
    """Groups of one: demonstrations whose code really ran.

    They may have as many turns as they have, whatever --max_turns says. Their advantage is 1, for
    the page alone: the loss of this stage has none.
    """
    wanted = list(prompts(run, run.config.batch_size))
    new = {row: sample for row, sample in wanted if row not in run.demonstrations}
    samples = list(new.values())
    lengths = [len(sample.turns or ()) for sample in samples]
    spoken = rollout(
        Recital(run.policy),
        samples,
        1,
        run.config,
        max_turns=max(lengths, default=1),
        templates=run.templates,
        seed=run.config.seed,
    )
    fresh = {row: t for row, (t,) in zip(new, spoken, strict=True)}
    groups = []
    for row, _ in wanted:
        t = fresh.get(row) or run.demonstrations.get(row)
        t.advantage = 1.0
        groups.append([t])
    run.demonstrations.update(fresh)
    return parallel.gather(groups)


def choose(run: Run, groups: list):
    """The groups to train on, and counts of what is not trained on."""
    config = run.config
    if config.stage == "rl":
        return select(
            groups,
            config.batch_size,
            config.rank,
            config.keep_zero_variance,
            config.normalize_std,
            seed=config.seed + run.position,
        )
    kept = [[t] for (t,) in groups if run.demonstrations.accept(t)]
    return kept, dict(demonstrations_skipped=len(groups) - len(kept))


# ------------------------------------------------------------------------------------------- update
def policy_loss(logprobs, old, advantages, clip: float = 0.2, dual_clip: float = 3.0):
    """PPO's clipped objective with dual clip, for each action token (A,) (PAPER: objective).

    Returns a loss (A,), to be summed and divided by the action tokens of the whole optimizer step,
    and which tokens the clip held (A,).
    """
    ratio = (logprobs - old).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    objective = torch.minimum(plain, clipped)
    bounded = torch.maximum(objective, dual_clip * advantages)
    objective = torch.where(advantages < 0, bounded, objective)
    return -objective, (objective != plain).float()


def backward(run: Run, batch: list, scale: float):
    """Add the gradient of scale * the batch's summed loss to the parameters.

    Returns sums (5,) over the batch's action tokens: loss, entropy, clipped, the gap between the
    log-probs of update and rollout, and 1.
    """
    config = run.config
    sft = config.stage == "sft"
    logprobs, entropy = run.policy.logprobs(batch, 1.0 if sft else config.temperature)  # (A,)
    if sft:
        old = logprobs.detach()
        loss = -logprobs
        clipped = torch.zeros_like(loss)
    else:
        old = torch.tensor([x for t in batch for x in t.logprobs], device=logprobs.device)
        spread = [[t.advantage] * sum(t.action_mask) for t in batch]
        advantages = torch.tensor(flat(spread), device=logprobs.device)
        loss, clipped = policy_loss(logprobs, old, advantages, config.clip, config.dual_clip)
    total = loss.sum() * scale * parallel.world()  # FSDP averages over processes
    total.backward()
    gap = (logprobs.detach() - old).abs()
    columns = [loss.detach(), entropy, clipped, gap, torch.ones_like(gap)]
    return torch.stack([column.sum() for column in columns]).double().cpu()


def gradient(run: Run, part: list):
    """The gradient of a minibatch, over all processes -> (sums (5,) of `backward`, its norm)."""
    tokens = sum(sum(t.action_mask) for t in flat(part))  # of the whole optimizer step
    mine = share(part, parallel.rank(), parallel.world())
    batches = microbatches(mine, run.config.tokens_per_microbatch)
    most = max(parallel.gather([len(batches)]))
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        sums += backward(run, batch, 1 / tokens)
    for _ in range(most - len(batches)):
        backward(run, part[0][:1], 0.0)  # only keeps the processes in step
    norm = parallel.clip_gradients(run.model, run.config.max_grad_norm)
    return sum(parallel.gather([sums])), norm


def update(run: Run, groups: list) -> dict:
    """Train on the batch -> metrics. groups: the whole batch, the same on every process."""
    config = run.config
    lr = config.lr * min(1.0, (run.step + 1) / (config.warmup + 1))
    totals = torch.zeros(5, dtype=torch.float64)
    norms = []
    gaps = [0.0]  # before any update
    skipped = 0
    parts = [groups[k :: config.minibatches] for k in range(config.minibatches)]
    for part in filter(None, parts):
        sums, norm = gradient(run, part)
        if math.isfinite(norm) and math.isfinite(sums[0]):
            run.optimizer.param_groups[0]["lr"] = lr
            run.optimizer.step()
            gaps.append(float(sums[3] / sums[4]))
            totals += sums
            norms.append(norm)
        else:
            skipped += 1
        run.optimizer.zero_grad(set_to_none=True)
    means = (totals / max(1.0, float(totals[4]))).tolist()
    metrics = dict(loss=means[0], grad_norm=mean(norms), entropy=means[1], lr=lr)
    metrics.update(updates_skipped=skipped)
    if config.stage == "rl":
        # The gap before the first update that was taken: later ones differ by design.
        metrics.update(clip_fraction=means[2], logprob_gap=gaps[:2][-1])
    return metrics


# ----------------------------------------------------------------------------------------- evaluate
def held_out(run: Run) -> dict:
    """How it does on the held-out samples, sampled as in training and greedily."""
    metrics = {}
    for kind, temperature in (("", run.config.temperature), ("_greedy", 0.0)):
        done = []
        undisturbed = run.policy.generator.get_state()
        run.policy.generator.manual_seed(0)
        for start in range(0, len(run.held), EVAL_BATCH):  # as many rounds on every process
            batch = run.held[start : start + EVAL_BATCH]
            mine = batch[parallel.rank() :: parallel.world()]
            done += flat(run.rollout(mine, 1, temperature=temperature))
        run.policy.generator.set_state(undisturbed)
        done = parallel.gather(done)
        if not kind:
            same = {sample.id for sample in run.held[:SHOWN]}
            run.journal.remember(run.step, [t for t in done if t.sample.id in same])
        run.journal.name_unreadable(done)
        metrics[f"eval_accuracy{kind}"] = mean(bool(t.correct) for t in done)
        metrics[f"eval_tool_calls{kind}"] = mean(t.n_tool_calls for t in done)
        metrics[f"eval_visual_tokens{kind}"] = mean(t.visual_tokens for t in done)
    return metrics


# --------------------------------------------------------------------------------------------- loop
def train(run: Run):
    """collect -> select -> update -> evaluate -> log -> save, until `steps` or a SIGTERM."""
    config = run.config
    while run.step < config.steps:
        began = time.perf_counter()
        groups = recite(run) if config.stage == "sft" else collect(run)
        kept, counts = choose(run, groups)
        collected = time.perf_counter()
        losses = update(run, kept)
        updated = time.perf_counter()
        run.step += 1
        metrics = dict(step=run.step, **counts, **losses, seconds_update=updated - collected)
        metrics.update(measure(groups, kept, config.stage, collected - began, run.journal.judged))
        if run.held and run.due(config.eval_every):
            metrics.update(held_out(run))
        stopped = any(parallel.gather([run.terminated]))
        saving = stopped or run.due(config.save_every)
        pictures = saving or run.due(config.eval_every) or run.step == config.steps
        run.journal.log(metrics, groups, kept, pictures)
        if saving:
            save_state(run)
        if stopped:
            break


# -------------------------------------------------------------------------------------------- begin
def configure(argv: list[str] | None = None) -> Config:
    """Flags -> Config, checked before any model is loaded. Raises DataError."""
    config = settle(Config, argv, LAPTOP)
    check(config)
    check_adapters(config.lora_rank)
    read_difficulty(config.difficulty)
    if config.plan:
        plan(config)
        sys.exit()
    if config.slow and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DataError("--slow is for one process")
    open_folder(Path(config.out))
    load_templates(config.prompt_template)
    open_judge(config)
    return config


def cold_start(config: Config, folder: Path, progress: Progress):
    """Make the tiny policy: teach it to see and to look, by SFT on scripted demonstrations."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for part, stage, samples in stages(config, aside):
        run = Run(stage, samples, progress=progress, part=part)
        train(run)
        save_policy(run.policy, aside)
    if not folder.exists():  # another run may have been faster
        aside.rename(folder)


def begin(config: Config) -> Run:
    """The Run that `train` goes on with, at step 0 or at the newest complete state."""
    resume = state_to_resume(config)
    samples = load(config.data) if config.data else []
    held = load(config.eval_data) if config.eval_data else []
    if config.stage == "sft" and not any(sample.turns for sample in samples):
        raise DataError("--stage sft needs --data with demonstrations: rows with turns")
    if config.eval_every and not held and not samples:
        held = puzzles(
            config.task,
            config.eval_n,
            config.seed,
            "heldout",
            **read_difficulty(config.difficulty),
        )
    parallel.prepare()
    folder = cold_start_folder(config)
    progress = Progress(parts_of_job(config))
    greet(config, samples, held)
    if not config.model:
        if leader() and not folder.exists():
            cold_start(config, folder, progress)
        config.model = str(folder)
    parallel.join(config.dtype)
    run = Run(config, samples, held, resume, progress)
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "terminated", True))
    if held and config.eval_every and not run.rows:
        run.rows.append(dict(step=0, **held_out(run)))
    run.journal.begin()
    return run


def main():
    """Train as the command line says."""
    with one_line_errors(SandboxError):
        run = begin(configure())
        train(run)
        run.journal.end()
        parallel.leave()


if __name__ == "__main__":
    main()
