"""Reinforcement learning of an agent that looks with Python: GRPO without std normalisation, in plain PyTorch.

One step: collect (sample twice the prompts that are trained on, G rollouts each) -> select (drop what the environment
broke and groups that teach nothing, keep those with the largest reward std) -> update (PPO-clipped policy gradient,
token-mean over the whole optimizer step) -> log -> evaluate -> save. What is not here, and why:
  - No KL term and no reference model, no entropy bonus, no value network: the paper trains without.
  - No division by the std of the rewards (--normalize_std brings it back): it fluctuates, and it is not in the paper.
  - No separate log-prob pass: the sampler's log-probs are the old ones; `logprob_gap` reports how far they are off.
  - No separate SFT trainer: token loss on demonstrations is this update with advantage 1 (--stage sft).

  torchrun train.py --task image                    # the built-in puzzles on a laptop, about five minutes
  torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-VL-7B-Instruct --data rl.json --out runs/7b
"""
import errno, importlib.util, inspect, itertools, json, math, os, re, shutil, signal, statistics, sys, tempfile, time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
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
    resume: bool = False                    # go on from the newest complete state in --out, with its settings
    judge: str = ""                         # OpenAI-compatible endpoint (http://host:port/v1) where the rule is unsure
    judge_model: str = ""                   # the judge's model name; the paper's is Qwen2.5-72B-Instruct
    judge_only: bool = False                # ask the judge for every answer: the paper's protocol
    judge_key_file: str = ""                # file with the judge's API key
    timeout: float = 30.0                   # seconds a tool call may take
    unsafe_sandbox: bool = False            # run code without confinement where the system has none
    slow: bool = False                      # rollouts by plain model.generate, for reading and for proofs
    log: str = ""                           # also log to wandb or trackio, if installed
    name: str = ""                          # the run's name there; none: the output folder's and the time of the start


LAPTOP = dict(steps=80, batch_size=8, max_new_tokens=96, max_context=2048, lr=1.5e-4, warmup=4, timeout=10.0,
              tokens_per_microbatch=2048, eval_every=20)
COLD_START = (                              # the tiny policy's SFT: first to see, then to look
    (captions, 2400, dict(steps=80, batch_size=96, lr=3e-3, save_every=0)),
    (demonstrations, 1500, dict(steps=140, batch_size=32, lr=2.5e-3, save_every=0)))
ALLOWED = dict(stage="rl|sft", rank="std|random", task="image|video|image,video", log="|wandb|trackio",
               frames=r"|[1-9]\d*|[\d.]+fps")           # regular expressions
LEAST = dict(group_size=2, steps=1, batch_size=1, oversample=1, max_turns=1, max_new_tokens=1, minibatches=1, keep=1,
             tokens_per_microbatch=1, temperature=0.01)  # one trajectory has no group's mean to differ from


SHOWN = """step accuracy reward tool_calls response_tokens trajectories_trained seconds_rollout seconds_update
eval_accuracy eval_accuracy_greedy""".split()            # on the terminal
STATE = ("step", "position", "rows", "start")           # of Run, besides weights, optimizer and random states
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# --------------------------------------------------------------------------------------------------------- collect
def prompts(run, n):
    """The next n prompts of an endless stream that depends on seed and position only; this process gets its share."""
    start, run.position = run.position, run.position + n
    for i in range(start + run.rank, start + n, run.world):
        if run.samples:
            epoch, place = divmod(i, len(run.samples))
            order = torch.Generator().manual_seed(run.config.seed * 9973 + epoch)
            yield run.samples[torch.randperm(len(run.samples), generator=order)[place]]
        else:
            yield puzzles(run.config.task, 1, run.config.seed * 1_000_003 + i, **difficulty(run.config))[0]


def collect(run, config):
    """Roll out prompts until batch_size groups are worth training on or max_oversample is reached -> groups."""
    groups, target = [], round(config.oversample * config.batch_size)
    most, run.limits["stats"] = max(target, round(config.max_oversample * config.batch_size)), {}
    while len(groups) < target:
        samples = list(prompts(run, target - len(groups)))
        with run.policy.whole(config.unshard_rollout):  # every process at its own pace
            fresh = rollout(run.policy, samples, config.group_size, **run.limits)
        score(sum(fresh, []), config.tool_reward, run.judge, config.judge_only)
        groups += run.gather(fresh)
        if len(choose(run, groups)[0]) < config.batch_size:
            target = min(target + config.batch_size, most)
    return groups


def recite(run, config):
    """The sft stage's groups: demonstrations, their code really run, each a trajectory of advantage 1."""
    samples = list(prompts(run, config.batch_size))
    new = [s for s in samples if id(s) not in run.recited]
    limits = dict(run.limits, max_turns=max([len(s.turns) for s in new], default=1), slow=False)
    run.recited.update(zip(map(id, new), rollout(Script(run.policy, new), new, 1, **limits)))
    groups = run.gather([run.recited[id(s)] for s in samples])
    for (t,) in groups:
        t.advantage, t.logprobs = 1.0, []
    return groups


def choose(run, groups):
    """The groups to train on, with their advantages, and counts of what was dropped."""
    c = run.config
    if c.stage == "rl":
        return select(groups, c.batch_size, c.rank, c.keep_zero_variance, c.normalize_std, c.require_images,
                      seed=c.seed + run.position)
    whole = [group for group in groups if any(group[0].action_mask)]
    return whole, dict(groups_sampled=len(groups), groups_zero_variance=0, trajectories_broken=len(groups) - len(whole))


# ---------------------------------------------------------------------------------------------------------- update
def policy_loss(logprobs, old, advantages, clip=0.2, dual_clip=3.0):
    """PPO's clipped objective with dual clip, for each action token (A,): a loss to be summed and divided by the action
    tokens of the whole optimizer step. Returns it and which tokens the clip held (PAPER: objective)."""
    ratio = (logprobs - old).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    objective = torch.minimum(plain, clipped)
    objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective, (objective != plain).float()


def share(groups, rank, world):
    """This process's groups: about equally many tokens for each process; where there are few groups they are cut up."""
    units = groups if len(groups) >= 2 * world or world == 1 else [[t] for group in groups for t in group]
    loads = [[] for _ in range(world)]
    for unit in sorted(units, key=lambda unit: -sum(len(t.tokens) for t in unit)):
        min(loads, key=lambda load: sum(len(t.tokens) for unit in load for t in unit)).append(unit)
    return loads[rank]


def microbatches(groups, budget):
    """Lists of trajectories of at most `budget` packed tokens, by length; a group's prompt counts once in each."""
    batches, size = [], budget
    for group in sorted(groups, key=lambda group: max(len(t.tokens) for t in group)):
        for t in sorted(group, key=lambda t: len(t.tokens)):
            size += len(t.tokens) - t.prompt_length * (bool(batches) and batches[-1][-1].sample is t.sample)
            if size > budget:
                batches, size = batches + [[]], len(t.tokens)
            batches[-1].append(t)
    return batches


def backward(run, batch, config, scale):
    """Add the gradient of scale * the batch's summed loss -> (5,) sums over its action tokens: loss, entropy, clipped,
    gap between the log-probs of update and rollout, 1."""
    logprobs, entropy = run.policy.logprobs(batch, config.temperature)                  # (A,), (A,)
    old = torch.tensor([x for t in batch for x in t.logprobs], device=logprobs.device)
    advantages = torch.tensor([t.advantage for t in batch for m in t.action_mask if m], device=logprobs.device)
    if len(old):
        loss, clipped = policy_loss(logprobs, old, advantages, config.clip, config.dual_clip)
    else:                                               # a demonstration: the same gradient of a loss one can read
        old, loss, clipped = logprobs.detach(), -logprobs * advantages, torch.zeros_like(advantages)
    (loss.sum() * scale * run.world).backward()         # FSDP averages over processes
    columns = loss.detach(), entropy, clipped, (logprobs.detach() - old).abs(), torch.ones_like(old)
    return torch.stack([column.sum() for column in columns]).double().cpu()


def update(run, groups, config, lr):
    """Train on the batch -> metrics. groups: the whole batch, the same on every process."""
    weights, totals, norms, skipped = [*run.policy.model.parameters()], torch.zeros(5, dtype=torch.float64), [], 0
    for part in (groups[k::config.minibatches] for k in range(min(config.minibatches, len(groups)))):
        tokens = sum(sum(t.action_mask) for t in sum(part, []))    # of the whole optimizer step, over all processes
        batches = microbatches(share(part, run.rank, run.world), config.tokens_per_microbatch)
        idle = max(run.gather([len(batches)])) - len(batches)
        sums = sum([backward(run, batch, config, 1 / tokens) for batch in batches], torch.zeros_like(totals))
        for _ in range(idle):
            backward(run, part[0][:1], config, 0.0)             # only keeps the processes in step
        sums = sum(run.gather([sums]))
        for weight in (w for w in weights if w.grad is None):   # no image in the batch: no matter to the optimizer
            weight.grad = torch.zeros_like(weight)
        norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm) and math.isfinite(sums[0]):
            run.optimizer.param_groups[0]["lr"] = lr
            run.optimizer.step()
            totals, norms = totals + sums, norms + [norm]
        else:
            skipped += 1
        run.optimizer.zero_grad(set_to_none=True)
    tokens, steps = max(1.0, float(totals[4])), max(1, len(norms))
    loss, entropy, clipped, gap = (totals[:4] / tokens).tolist()
    return dict(loss=loss, grad_norm=sum(norms) / steps, entropy=entropy, clip_fraction=clipped, logprob_gap=gap, lr=lr,
                updates_skipped=skipped)


# ----------------------------------------------------------------------------------------------------------- state
class Run:
    """The policy, its optimizer and its place in the stream of prompts, on one process or many."""

    def __init__(self, config, samples, templates, held=(), resume=None, alone=False):
        """held: samples to evaluate on. resume: state/step_N.pt, to go on with the weights of step_N."""
        many = dist.is_initialized() and not alone
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        self.config, self.out, self.samples, self.held, self.recited = config, Path(config.out), samples, held, {}
        self.step, self.position, self.rows, self.start, self.logger, self.terminated = 0, 0, [], {}, None, False
        weights = self.out / resume.stem if resume else config.model
        self.policy = load_policy(weights, dtype=torch.float32, max_pixels=config.max_pixels, sharded=many)
        if many:
            shard_policy(self.policy, config.offload, config.checkpoint_activations)
        self.optimizer = torch.optim.AdamW(self.policy.model.parameters(), config.lr, weight_decay=config.weight_decay)
        saved = torch.load(resume, mmap=True, weights_only=True) if resume else {}
        if resume:
            set_optimizer_state_dict(self.policy.model, self.optimizer, saved["optimizer"], options=WHOLE)
            self.step, self.position, self.rows, self.start = (saved[name] for name in STATE)
        self.policy.generator.manual_seed(config.seed * 7919 + self.rank + 104_729 * self.step)
        if len(saved.get("generators", ())) == self.world:
            self.policy.generator.set_state(saved["generators"][self.rank])
        key = config.judge_key_file or None
        self.judge = config.judge and Judge(config.judge, config.judge_model, self.out / "judge.jsonl", api_key=key)
        names = set(inspect.signature(rollout).parameters) & set(vars(config)) - {"group_size"}
        self.limits = dict({name: getattr(config, name) for name in names}, templates=templates, stats={})

    def gather(self, items):
        """The lists of all processes, joined in rank order, on every process."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return sum(parts, [])

    def due(self, every):
        return every and (self.step % every == 0 or self.step == self.config.steps)

    def save(self):
        """step_N/ for everyone, and state/step_N.pt with what --resume needs besides: written aside, synced, renamed. A
        kill at any moment leaves checkpoints that are complete or absent; a full disk ends the run and says so."""
        state, name = {name: getattr(self, name) for name in STATE}, f"step_{self.step}"
        state["optimizer"] = get_optimizer_state_dict(self.policy.model, self.optimizer, options=WHOLE)
        state["generators"], aside = self.gather([self.policy.generator.get_state()]), self.out / "unfinished"
        try:
            if self.rank == 0:
                discard(aside)
                (self.out / "state").mkdir(exist_ok=True)
            save_policy(self.policy, aside / name)      # together; the first process writes
            if self.rank == 0:
                torch.save(state, aside / "state.pt")
                for path in filter(Path.is_file, aside.rglob("*")):
                    with open(path, "rb") as file:
                        os.fsync(file)
                discard(self.out / name)
                (aside / name).rename(self.out / name)
                (aside / "state.pt").rename(self.out / "state" / f"{name}.pt")
                discard(aside)
                for old in complete(self.out)[:-self.config.keep]:
                    old.unlink()
                    discard(self.out / old.stem)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.rank:                               # not of this process's writing
                raise
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(self.out).free / 2 ** 20
            why = f"{name} could not be written ({str(error).splitlines()[0]}); {free:.0f} MiB are free in {self.out}"
            raise SystemExit(f"train.py: {why}; earlier checkpoints are whole (--resume)") from None


def complete(out):
    """The files state/step_N.pt, oldest first, whose step_N is there too."""
    files = [file for file in Path(out, "state").glob("step_*.pt") if Path(out, file.stem).exists()]
    return sorted(files, key=lambda file: int(file.stem[5:]))


def discard(folder):
    """Remove a folder; a kill on the way leaves nothing that looks like a checkpoint."""
    trash = folder.with_name("discarded")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder.rename(trash))


# -------------------------------------------------------------------------------------------------------- the loop
def train(run, config):
    """collect -> select -> update -> log -> evaluate -> save, until `steps` or a scheduler's SIGTERM."""
    bar, stop = tqdm(total=config.steps, initial=run.step, desc=config.stage, disable=run.rank > 0), False
    while run.step < config.steps and not stop:
        clock = [time.perf_counter()]
        groups = (recite if config.stage == "sft" else collect)(run, config)
        kept, counts = choose(run, groups)
        clock.append(time.perf_counter())
        lr = config.lr * min(1.0, (run.step + 1) / (config.warmup + 1))
        losses = update(run, kept, config, lr)
        clock.append(time.perf_counter())
        run.step += 1
        metrics = dict(measure(run, groups, kept, clock), **counts, **losses)
        if run.held and run.due(config.eval_every):
            metrics.update(held_out(run, config))
        log(run, metrics, groups, kept, bar)
        stop = any(run.gather([run.terminated]))
        if stop or run.due(config.save_every):
            run.save()
    bar.close()


def mean(values):
    values = [*values]
    return sum(values) / len(values) if values else 0.0


def measure(run, groups, kept, clock):
    """The step's row of metrics.jsonl: means over everything sampled, what was trained on, seconds."""
    sampled, trained, seconds = sum(groups, []), sum(kept, []), clock[1] - clock[0]
    calls, looked = [t.turns[:t.n_tool_calls] for t in sampled], [*map(looks, sampled)]      # what ran
    return dict(
        step=run.step, reward=mean(t.reward for t in sampled), accuracy=mean(bool(t.correct) for t in sampled),
        tool_calls=mean(t.n_tool_calls for t in sampled), turns=mean(len(t.turns) for t in sampled),
        response_tokens=mean(sum(t.action_mask) for t in sampled), visual_tokens=mean(t.visual_tokens for t in sampled),
        frames_looked_at=mean(where["frames_looked_at"] for where in looked),
        seconds_covered=mean(where["seconds_covered"] for where in looked),
        reward_std=mean(statistics.pstdev(t.reward for t in group) for group in groups),
        correct_negative_advantage=mean(t.advantage < 0 for t in trained if t.correct),
        repeated_calls=mean(len(ran) - len({turn.code for turn in ran}) for ran in calls),
        empty_calls=mean(sum(not turn.output and not turn.images for turn in ran) for ran in calls),
        format_errors=mean(t.end_reason is EndReason.ERROR_IN_ACTION for t in sampled),
        turn_limit=mean(t.end_reason is EndReason.EXCEED_MAX_TURNS for t in sampled), trajectories_trained=len(trained),
        seconds_rollout=seconds, seconds_tool=run.limits["stats"].get("seconds_tool", 0.0),
        seconds_update=clock[2] - clock[1], tokens_per_second=sum(len(t.tokens) for t in sampled) / seconds)


def held_out(run, config):
    """Accuracy on the held-out samples, sampled as in training and greedily, over all processes."""
    result, names = {}, ("accuracy", "tool_calls", "visual_tokens")
    for kind, temperature in (("", config.temperature), ("_greedy", 0.0)):
        limits = dict(run.limits, temperature=temperature, stats=None, judge=run.judge, judge_only=config.judge_only)
        with run.policy.whole(config.unshard_rollout):
            done = evaluate(run.policy, run.held[run.rank::run.world], **limits)
        rows = run.gather([(bool(t.correct), t.n_tool_calls, t.visual_tokens) for t in done])
        result.update({f"eval_{name}{kind}": mean(column) for name, column in zip(names, zip(*rows))})
    return result


def log(run, metrics, groups, kept, bar):
    """A row to metrics.jsonl, a line to the terminal, pictures at evaluations and at the end. Ends a run that goes
    nowhere: nothing to train on, or no finite gradient, step after step."""
    run.rows.append(metrics)
    why, last = None, run.rows[-10:]
    if len(last) == 10 and not any(row["trajectories_trained"] for row in last):
        why = ("10 steps in a row had nothing to train on: every group's rewards are equal, or it is broken. Are the "
               "questions too hard or too easy, or the limits too small? (or --keep_zero_variance)")
    if len(last) >= 5 and all(row["updates_skipped"] for row in last[-5:]):
        why = f"the gradient was not finite in 5 steps in a row; what it came from is in {run.out}/nonfinite.pt"
    if run.rank == 0:
        with open(run.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if run.logger:
            run.logger.log(metrics, step=run.step)
        bar.update()
        bar.write("  ".join(f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in SHOWN if name in metrics))
        if len(kept) < run.config.batch_size:
            bar.write(f"{len(kept)} of {run.config.batch_size} groups teach something, after {len(groups)} sampled")
        if metrics["logprob_gap"] > 0.01:
            bar.write(f"warning: rollout and update disagree on log-probs by {metrics['logprob_gap']:.3f} on average")
        if "eval_accuracy" in metrics or run.step == run.config.steps:
            write_report(run.out / "rollouts.html", sum(groups, []), f"Step {run.step}")
            curves(run.out / "curves.png", [{"step": 0, **run.start}, *run.rows])
        if why and kept:
            torch.save(kept, run.out / "nonfinite.pt")
    if why:
        raise SystemExit(f"train.py: {why}" if run.rank == 0 else 1)


def curves(path, rows):
    """curves.png: how the run went, step by step; what was held out as dots."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, name in zip(axes.flat, ("accuracy", "reward", "tool_calls", "response_tokens", "entropy", "grad_norm")):
        for key, style in ((name, "-"), (f"eval_{name}", "o-"), (f"eval_{name}_greedy", "s--")):
            if points := [(row["step"], row[key]) for row in rows if key in row]:
                axis.plot(*zip(*points), style, ms=4, lw=1, label=key.replace("_", " "))
        axis.set(xlabel="step")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------- begin
def difficulty(config):
    """--difficulty as arguments of `puzzles`. Raises DataError."""
    try:
        return asdict(Difficulty(**json.loads(config.difficulty or "{}")))
    except (ValueError, TypeError) as error:
        raise DataError(f"--difficulty: a JSON object of fields of Difficulty in tasks/puzzles.py ({error})") from None


def configure(argv=None):
    """Flags -> Config, checked before any model is loaded. What they leave open comes from the run that --resume goes
    on with, else from LAPTOP where the tiny policy trains."""
    argv = sys.argv[1:] if argv is None else argv
    config, given = parse_flags(Config, argv), {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    config.out = config.out or f"runs/{config.task.replace(',', '_')}{config.frames and '_' + config.frames}"
    out, old = Path(config.out), {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        if config.resume and (out / "config.json").exists():
            old = json.loads((out / "config.json").read_text())
            old = {name: old[name] for name in sorted(vars(config).keys() & old.keys() - {"out", "resume"})}
    except (OSError, ValueError) as error:
        raise DataError(f"--out {out} cannot be used: {getattr(error, 'strerror', None) or error}") from None
    for name, value in (old or ({} if config.model else LAPTOP)).items():
        setattr(config, name, getattr(config, name) if name in given else value)
    changed = [name for name in old if old[name] != getattr(config, name)]
    if {"stage", "task"} & set(changed):
        raise DataError(f"--out {out}: a run of stage {old['stage']}, task {old['task']} stays one")
    if changed and not int(os.environ.get("RANK", 0)):
        print("going on with other settings; they were", *(f"--{name} {old[name]}" for name in changed), flush=True)
    config.name = config.name or f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    difficulty(config)
    for name, pattern in ALLOWED.items():
        if not re.fullmatch(pattern, getattr(config, name)):
            raise DataError(f"--{name} {getattr(config, name)}: expected {pattern}")
    for name, least in LEAST.items():
        if not getattr(config, name) >= least:
            raise DataError(f"--{name} must be at least {least}")
    if config.log and not importlib.util.find_spec(config.log):
        raise DataError(f"--log {config.log} is not installed: pip install {config.log}")
    return config


def cold_start(config):
    """The folder of the tiny policy after SFT on scripted demonstrations: made once for its settings, then reused."""
    made_for = [config.task, config.frames, config.difficulty and difficulty(config)]
    special = f"_{zlib.crc32(repr(made_for).encode()):08x}" if any(made_for[1:]) else ""
    folder = Path(config.out).parent / f"cold_start_{config.task.replace(',', '_')}{special}_seed{config.seed}"
    if folder.exists() or int(os.environ.get("RANK", 0)):
        return str(folder)
    print(f"cold start: teaching the tiny policy to look, into {folder} (reused by later runs)", flush=True)
    aside = folder.with_name(folder.name + ".tmp")
    tiny_policy(aside, corpus(config.task), config.seed)
    for make, n, settings in COLD_START:
        stage = replace(config, stage="sft", model=str(aside), out=str(aside), eval_every=0, **settings)
        lessons = make(config.task, n, config.seed, **difficulty(config))
        if config.frames:                               # no tool: lessons in seeing, then only the right answers
            lessons = [replace(s, turns=[ANSWER.format(s.answer)]) for s in lessons if s.ability != "call"]
        run = Run(stage, lessons, None, alone=True)
        train(run, stage)
        save_policy(run.policy, aside)
    aside.rename(folder)
    return str(folder)


def join():
    """Join torchrun's processes. On a GPU `python train.py` is a group of one: it shards, and so computes in bf16."""
    cuda, launched = torch.cuda.is_available(), "WORLD_SIZE" in os.environ
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif "OMP_NUM_THREADS" not in os.environ:           # threads that wait spin, and sandboxes need cores
        torch.set_num_threads(max(1, os.cpu_count() // 2))
    if cuda or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        alone = {} if launched else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)


def begin(config):
    """The Run that `train` goes on with, at step 0 or at the newest complete state; an earlier run in --out moves."""
    samples, held = (load(file) if file else [] for file in (config.data, config.eval_data))
    templates = load_templates(config.prompt_template) if config.prompt_template else None
    if config.stage == "sft" and not (samples and all(sample.turns for sample in samples)):
        raise DataError('--stage sft needs --data with demonstrations: rows with "turns", what the assistant says')
    if config.eval_every and not held and not samples:
        held = puzzles(config.task, config.eval_n, config.seed, split="heldout", **difficulty(config))
    join()
    out, states = Path(config.out), complete(config.out) if config.resume else []
    if not states and not config.model:
        config.model = cold_start(config)
        if dist.is_initialized():
            dist.barrier()
    run = Run(config, samples, templates, held, *states[-1:])
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "terminated", True))
    if run.rank == 0:
        if not states:
            set_aside(out)
        for name, text in (("config.json", json.dumps(asdict(config), indent=1) + "\n"),
                           ("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run.rows))):
            (out / "unfinished.txt").write_text(text)
            (out / "unfinished.txt").rename(out / name)
        if config.log:                                  # wandb and trackio share these calls
            same, run.logger = {"id": config.name} if config.log == "wandb" else {}, importlib.import_module(config.log)
            run.logger.init(project="pyvision-rl", name=config.name, config=asdict(config), resume="allow", **same)
    if held and not run.step:
        run.start = held_out(run, config)
        if run.rank == 0:
            print("before: " + "  ".join(f"{name} {value:.4g}" for name, value in run.start.items()), flush=True)
    return run


def set_aside(out):
    """Move what an earlier run left in `out` into a folder there: a new run destroys and continues none by mistake."""
    names = ("config.json", "metrics.jsonl", "curves.png", "rollouts.html", "state", "step_*")
    old = [path for name in names for path in out.glob(name)]
    if len(old) > 1:
        aside = next(folder for n in itertools.count(1) if not (folder := out / f"earlier_{n}").exists())
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        print(f"{out} held a run: it is in {aside} now", flush=True)


def stop(*_):
    """Ctrl-C: at once. What runs at the time may be a library that turns KeyboardInterrupt into an error of its own, or
    a thread of torch that waits; sandboxes end with this process, and checkpoints are complete or absent."""
    os.write(2, b"train.py: stopped; --resume goes on from the last checkpoint\n")
    os._exit(130)


def main():
    """Run; bad input is one line and exit code 2, a full disk one line and exit code 1, Ctrl-C 130."""
    signal.signal(signal.SIGINT, stop)
    transformers.utils.logging.disable_progress_bar()
    try:
        config = configure()
        run = begin(config)
        train(run, config)
        if run.logger:
            run.logger.finish()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (DataError, SandboxError) as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"train.py: {error}; checkpoints are whole (--resume)")


if __name__ == "__main__":
    main()
