"""docs/lesson.md: one step of training with its real numbers. `python tests/lesson.py` writes it.

A cast of scripted rollouts stands in for sampling, so that every case is there and the page stays
the same. All else is the code that trains: `rollout` with the real sandbox, `score`, `select`,
`update`. The policy is a tiny one that has imitated the cast for a few updates, so that its
log-probs are those of a policy that could have said this.
"""

import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, pstdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from engine.batching import flat  # noqa: E402
from model import tiny_policy  # noqa: E402
from reward import score  # noqa: E402
from rollout import Recital, rollout, select  # noqa: E402
from tasks.puzzles import ANSWER, CODE, COLOURS, corpus, puzzles  # noqa: E402

CAST = {  # four rollouts of each of four prompts, turn by turn
    "A": ["right", "look right", "miss wrong", "flood right"],
    "B": ["wrong", "miss wrong", "wrong", "look wrong"],
    "C": ["right", "look look right", "look look right", "look look look right"],
    "D": ["look right", "wrong", "look look right", "chat"],
}
REHEARSALS = 20  # updates in which the cast becomes likely
IMAGE = re.compile(r"(<\|image_pad\|>)+")
PAGE = """# One step of training, with its numbers

Written by `python tests/lesson.py`; a test fails when this page is no longer what the code does.
The rollouts are scripted, so that every case occurs; all that follows is real: the sandbox runs the
code, and `score`, `select` and `update` are those of training. Four prompts are sampled,
{oversample:g} times the {keep} that are trained on, with four rollouts each.

## 1. A prompt (A)

```text
{prompt}
```

It is {prompt_tokens} tokens, of which {visual} stand for the picture ({width} × {height} pixels,
shrunk to 56 × 56). The answer is *{answer}*.

## 2. Four rollouts

Turn by turn, line breaks left out; the arrow is what the sandbox gave back.

```text
{rollouts}
```

## 3. Rewards: `score`

R = R_acc + 0.1 · calls · R_acc. A wrong answer earns nothing for its calls.

| rollout | ended | answer | right | calls | R |
|---|---|---|---|---|---|
{rewards}

## 4. What is trained on: `select`

A4 was cut by the environment (its context is full): its reward says nothing about the policy. It
leaves the group before mean and standard deviation are taken. D4 is the policy's own failure
(neither code nor answer): it stays, with R = 0. Groups whose rewards are all equal teach nothing;
the others are ranked by the standard deviation of their rewards, and the first {keep} are kept
whole.

| prompt | R of what is left | mean | std | |
|---|---|---|---|---|
{groups}

Counted in metrics.jsonl: {counts}.

In C everything is right, and C1, which answered at once, would have got an advantage of
{spared:+.3f}: a correct, concise answer punished for being concise. Its group has the smallest std,
so ranking by std leaves it out. In A, where an answer is wrong, the same kind of answer gets
{concise:+.3f}.

## 5. Advantages: A = R − mean(R)

Not divided by the standard deviation. They sum to zero in each group.

| | {names} |
|---|{rules}|
| advantage | {advantages} |

## 6. Which tokens learn

Of A2's {a2_tokens} tokens {a2_actions} are actions. Only these are in the loss; prompt and
observation are read, not learned.

| part | tokens | mask |
|---|---|---|
{segments}

## 7. The loss: `update`

Token by token −min(ρA, clip(ρ, 0.8, 1.2) A), and never above −3A for A < 0, summed and divided by
the {n} action tokens of the whole step. ρ is the ratio of the policy now to the policy that
sampled. In the only update of a batch they are the same, ρ = 1, so the clip holds nothing, and the
loss is −Σ A · tokens / {n}:

    −({sum}) / {n} = {by_hand:.4f}

`update` reports loss {loss:.4f}, gradient norm {grad_norm:.2f} (above 1 it would be cut to 1),
clipped tokens {clip_fraction:.2f}.

## 8. What one update does

Mean log-prob of a trajectory's action tokens before and after the update (learning rate {lr:g}):

| | advantage | before | after | change |
|---|---|---|---|---|
{effect}

What good and bad rollouts share is pushed both ways; what tells them apart is learned. The sum of A
· log π over all action tokens, which the step climbs, went from {climbed[0]:.2f} to
{climbed[1]:.2f}.
"""


@dataclass
class Step:
    """All that a step of training leaves for the page to show."""

    run: train.Run
    groups: list  # of all prompts, scored
    kept: list  # what was trained on
    counts: dict  # of what was not
    before: list  # log-probs of each trained trajectory's action tokens before the update
    after: list  # and after it
    metrics: dict

    def __post_init__(self):
        self.trained = flat(self.kept)
        self.names = {}  # trajectory -> A1 …
        for letter, group in zip(CAST, self.groups, strict=True):
            for number, t in enumerate(group, 1):
                self.names[t] = f"{letter}{number}"


# The step ----------------------------------------------------------------------------------------
def say(word: str, sample) -> str:
    """A word of the cast as the policy says it: an answer, or a crop of this or another plate."""
    if word == "right":
        return ANSWER.format(sample.answer)
    if word == "wrong":
        return ANSWER.format(next(colour for colour in COLOURS if colour != sample.answer))
    if word == "chat":
        return "I can see it well."
    if word == "flood":
        return CODE.format("print('nothing ' * 5000)")
    plate = int(re.search(r"plate (\d)", sample.question, re.IGNORECASE)[1]) - 1
    if word == "miss":
        plate = (plate + 4) % 9
    row, column = divmod(plate, 3)
    x = (2 * column + 1) * 448 // 6
    y = (2 * row + 1) * 448 // 6
    box = f"({x - 7},{y - 7},{x + 7},{y + 7})"
    return CODE.format(f"image_clue_0.crop({box}).show()")


def play(run: train.Run, samples: list) -> list:
    """The cast's rollouts, scored: a group for each sample."""
    groups = []
    for sample, lines in zip(samples, CAST.values(), strict=True):
        parts = []
        for line in lines:
            turns = [say(word, sample) for word in line.split()]
            parts.append(replace(sample, turns=turns))
        group = flat(rollout(Recital(run.policy), parts, 1, run.config))
        for t in group:
            t.sample = sample  # they are a group
        groups.append(group)
    score(flat(groups), run.config.tool_reward)
    return groups


def rehearse(run: train.Run, samples: list) -> None:
    """Imitate the cast for a few updates."""
    config = run.config
    whole = [t for t in flat(play(run, samples)) if not t.broken]
    run.config = replace(config, stage="sft", lr=2e-3)
    for _ in range(REHEARSALS):
        train.update(run, [whole])
    run.config = config


def logprobs(run: train.Run, trajectories: list) -> list:
    """Of each trajectory's action tokens, under the policy as it is now."""
    with torch.no_grad():
        values, _ = run.policy.logprobs(trajectories, run.config.temperature)
    lengths = [sum(t.action_mask) for t in trajectories]
    return [part.tolist() for part in values.split(lengths)]


def step(folder: str) -> Step:
    """Train on the cast once."""
    samples = puzzles("image", len(CAST), 3)
    tiny_policy(f"{folder}/policy", corpus("image"))
    settings = {"group_size": 4, "batch_size": 2, "warmup": 0}
    config = replace(train.LAPTOP, model=f"{folder}/policy", out=folder, **settings)
    run = train.Run(config, samples)
    rehearse(run, samples)
    groups = play(run, samples)
    kept, counts = select(groups, config.batch_size, config.rank)
    trained = flat(kept)
    before = logprobs(run, trained)
    for t, values in zip(trained, before, strict=True):
        t.logprobs = values  # a sampler notes them; a recital has none
    metrics = train.update(run, kept)
    return Step(run, groups, kept, counts, before, logprobs(run, trained), metrics)


# The page ----------------------------------------------------------------------------------------
def table(rows) -> str:
    """Rows of cells in Markdown."""
    lines = []
    for row in rows:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short(text: str, width: int = 10_000) -> str:
    """One line, its image tokens as one, its middle left out where it is wider than `width`."""
    text = " ".join(IMAGE.sub("<|image_pad|>…", text).split())
    if len(text) <= width:
        return text
    return f"{text[: width // 2]} … {text[-width // 2 :]}"


def told(name: str, t) -> list[str]:
    """A rollout turn by turn, with what came back."""
    lines = []
    for turn in t.turns:
        line = f"{name}  {short(turn.text)}"
        back = "an image" if turn.images else short(turn.output, 40)
        lines.append(f"{line}  →  {back}" if back else line)
        name = "  "
    return lines


def segments(decode, t) -> list[tuple]:
    """Runs of tokens with the same mask: what they say, how many they are, the mask."""
    masks = t.action_mask
    cuts = [place for place in range(1, len(masks)) if masks[place] != masks[place - 1]]
    rows = []
    for start, end in zip([0, *cuts], [*cuts, len(masks)], strict=True):
        text = short(decode(t.tokens[start:end]), 100)
        rows.append((f"`{text}`", end - start, int(masks[start])))
    return rows


def reward_rows(done: Step) -> list[tuple]:
    rows = []
    for t, name in done.names.items():
        answer = t.answer or "–"
        right = "yes" if t.correct else "no"
        reward = f"{t.reward:.1f}"
        rows.append((name, t.end_reason.value, answer, right, t.n_tool_calls, reward))
    return rows


def group_rows(done: Step) -> list[tuple]:
    rank = {}  # of a trajectory's group
    for place, group in enumerate(done.kept, 1):
        rank.update(dict.fromkeys(group, place))
    rows = []
    for letter, group in zip(CAST, done.groups, strict=True):
        left = [t.reward for t in group if not t.broken]
        if group[0] in rank:
            fate = f"rank {rank[group[0]]}, kept"
        else:
            fate = "outranked" if pstdev(left) else "no variance"
        rewards = ", ".join(f"{reward:.1f}" for reward in left)
        rows.append((letter, rewards, f"{mean(left):.3f}", f"{pstdev(left):.3f}", fate))
    return rows


def effect_rows(done: Step) -> list[tuple]:
    rows = []
    for t, values, later in zip(done.trained, done.before, done.after, strict=True):
        before = mean(values)
        after = mean(later)
        name = done.names[t]
        change = f"{after - before:+.4f}"
        rows.append((name, f"{t.advantage:+.3f}", f"{before:.4f}", f"{after:.4f}", change))
    return rows


def climbed(trained: list, values: list) -> float:
    """The sum of A * log-prob over all action tokens."""
    return sum(t.advantage * sum(part) for t, part in zip(trained, values, strict=True))


def page(done: Step) -> str:
    """The text around the numbers."""
    config = done.run.config
    decode = done.run.policy.tokenizer.decode
    first, second = done.groups[0][:2]
    prompt = first.tokens[: first.prompt_length]
    lengths = [sum(t.action_mask) for t in done.trained]
    products = [f"{t.advantage:+.3f} · {n}" for t, n in zip(done.trained, lengths, strict=True)]
    gained = sum(t.advantage * n for t, n in zip(done.trained, lengths, strict=True))
    counts = [f"{name} {value}" for name, value in done.counts.items() if value]
    advantages = [f"{t.advantage:+.3f}" for t in done.trained]
    return PAGE.format(
        oversample=config.oversample,
        keep=config.batch_size,
        prompt=IMAGE.sub("<|image_pad|>…", decode(prompt)).strip(),
        prompt_tokens=len(prompt),
        visual=prompt.count(done.run.policy.image_token),
        width=first.images[0].width,
        height=first.images[0].height,
        answer=first.sample.answer,
        rollouts="\n".join(flat(told(done.names[t], t) for t in done.groups[0])),
        rewards=table(reward_rows(done)),
        groups=table(group_rows(done)),
        counts=", ".join(counts),
        spared=done.groups[2][0].advantage,
        concise=first.advantage,
        names=" | ".join(done.names[t] for t in done.trained),
        rules="|".join("---" for _ in done.trained),
        advantages=" | ".join(advantages),
        a2_tokens=len(second.tokens),
        a2_actions=sum(second.action_mask),
        segments=table(segments(decode, second)),
        sum=" ".join(products),
        n=sum(lengths),
        by_hand=-gained / sum(lengths),
        loss=done.metrics["loss"],
        grad_norm=done.metrics["grad_norm"],
        clip_fraction=done.metrics["clip_fraction"],
        lr=config.lr,
        effect=table(effect_rows(done)),
        climbed=[climbed(done.trained, done.before), climbed(done.trained, done.after)],
    )


def lesson() -> str:
    """The page."""
    with tempfile.TemporaryDirectory() as folder:
        return page(step(folder))


if __name__ == "__main__":
    (ROOT / "docs" / "lesson.md").write_text(lesson())
