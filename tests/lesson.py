"""docs/lesson.md: one step of training with its real numbers. `python tests/lesson.py` writes it again.

A cast of scripted rollouts stands in for sampling, so that every case is there and the page stays the same; all else is
the code that trains: `rollout` with the real sandbox, `score`, `select`, `update`. The policy is a tiny one that has
imitated the cast for a few updates, so that its log-probs are those of a policy that could have said this.
"""
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from model import tiny_policy  # noqa: E402
from reward import score  # noqa: E402
from rollout import Script, rollout, select  # noqa: E402
from tasks.puzzles import ANSWER, CODE, COLOURS, corpus, puzzles  # noqa: E402

CAST = {"A": ("right", "look right", "miss wrong", "flood right"),      # four rollouts of each of four prompts
        "B": ("wrong", "miss wrong", "wrong", "look wrong"),
        "C": ("right", "look look right", "look look right", "look look look right"),
        "D": ("look right", "wrong", "look look right", "chat")}
PAGE = """# One step of training, with its numbers

Written by `python tests/lesson.py`; a test fails when this page is no longer what the code does. The rollouts are
scripted, so that every case occurs; all that follows is real: the sandbox runs the code, and `score`, `select` and
`update` are those of training. Four prompts are sampled, {oversample:g} times the {keep} that are trained on, with four
rollouts each.

## 1. A prompt (A)

```text
{prompt}
```

It is {prompt_tokens} tokens, of which {visual} stand for the picture ({width} × {height} pixels, shrunk to 56 × 56).
The answer is *{answer}*.

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

A4 was cut by the environment (its context is full): its reward says nothing about the policy. It leaves the group
before mean and standard deviation are taken. D4 is the policy's own failure (neither code nor answer): it stays, with
R = 0. Groups whose rewards are all equal teach nothing; the others are ranked by the standard deviation of their
rewards, and the first {keep} are kept whole.

| prompt | R of what is left | mean | std | |
|---|---|---|---|---|
{groups}

Counted in metrics.jsonl: {counts}.

In C everything is right, and C1, which answered at once, would have got an advantage of {spared:+.3f}: a correct,
concise answer punished for being concise. Its group has the smallest std, so ranking by std leaves it out. In A, where
an answer is wrong, the same kind of answer gets {concise:+.3f}.

## 5. Advantages: A = R − mean(R)

Not divided by the standard deviation. They sum to zero in each group.

| | {names} |
|---|{rules}|
| advantage | {advantages} |

## 6. Which tokens learn

Of A2's {a2_tokens} tokens {a2_actions} are actions. Only these are in the loss; prompt and observation are read, not
learned.

| part | tokens | mask |
|---|---|---|
{segments}

## 7. The loss: `update`

Token by token −min(ρA, clip(ρ, 0.8, 1.2) A), and never above −3A for A < 0, summed and divided by the {n} action tokens
of the whole step. ρ is the ratio of the policy now to the policy that sampled. In the only update of a batch they are
the same, ρ = 1, so the clip holds nothing, and the loss is −Σ A · tokens / {n}:

    −({sum}) / {n} = {by_hand:.4f}

`update` reports loss {loss:.4f}, gradient norm {grad_norm:.2f} (above 1 it would be cut to 1), clipped tokens
{clip_fraction:.2f}.

## 8. What one update does

Mean log-prob of a trajectory's action tokens before and after the update (learning rate {lr:g}):

| | advantage | before | after | change |
|---|---|---|---|---|
{effect}

What good and bad rollouts share is pushed both ways; what tells them apart is learned. The sum of A · log π over all
action tokens, which the step climbs, went from {climbed[0]:.2f} to {climbed[1]:.2f}.
"""


def say(word, sample):
    """A word of the cast as what the policy says: a crop of the plate that is asked for or of another, an answer."""
    if word in ("right", "wrong"):
        return ANSWER.format(sample.answer if word == "right" else next(c for c in COLOURS if c != sample.answer))
    if word == "chat":
        return "I can see it well."
    if word == "flood":
        return CODE.format("print('nothing ' * 5000)")
    plate = int(re.search(r"plate (\d)", sample.question, re.I)[1]) - 1
    plate = plate if word == "look" else (plate + 4) % 9
    x, y = (2 * (plate % 3) + 1) * 448 // 6, (2 * (plate // 3) + 1) * 448 // 6
    return CODE.format(f"image_clue_0.crop(({x - 7},{y - 7},{x + 7},{y + 7})).show()")


def play(run, config, samples):
    """The cast's rollouts, scored: a group for each sample."""
    rows = [replace(sample, turns=[say(word, sample) for word in line.split()])
            for sample, lines in zip(samples, CAST.values()) for line in lines]
    groups = rollout(Script(run.policy, rows), samples, 4, **run.limits)
    score([t for group in groups for t in group], config.tool_reward)
    return groups


def lesson():
    """The page."""
    with tempfile.TemporaryDirectory() as folder:
        samples = puzzles("image", len(CAST), 3)
        tiny_policy(f"{folder}/policy", corpus("image"))
        config = train.Config(model=f"{folder}/policy", out=folder, group_size=4,
                              **{**train.LAPTOP, "batch_size": 2})
        run = train.Run(config, samples, None)
        rehearsal = [t for group in play(run, config, samples) for t in group if not t.broken]
        for t in rehearsal:
            t.advantage, t.logprobs = 1.0, []
        for _ in range(20):                                         # imitation: the cast becomes likely
            train.update(run, [rehearsal], config, 2e-3)
        groups = play(run, config, samples)
        kept, counts = select(groups, config.batch_size, config.rank)
        trained = [t for group in kept for t in group]
        before = logprobs(run, trained)
        for t, values in zip(trained, before):
            t.logprobs = values                                     # where a sampler notes them; a script has none
        metrics = train.update(run, kept, config, config.lr)
        return page(run, groups, kept, counts, before, logprobs(run, trained), metrics)


def logprobs(run, trajectories):
    """Of each trajectory's action tokens, under the policy as it is now."""
    values = iter(run.policy.logprobs(trajectories)[0].tolist())
    return [[next(values) for _ in range(sum(t.action_mask))] for t in trajectories]


def page(run, groups, kept, counts, before, after, metrics):
    """The text around the numbers."""
    config, decode = run.config, run.policy.tokenizer.decode
    names = {id(t): f"{letter}{i + 1}" for letter, group in zip(CAST, groups) for i, t in enumerate(group)}
    trained, first, second = [t for group in kept for t in group], *groups[0][:2]
    prompt, n = first.tokens[:first.prompt_length], sum(len(values) for values in before)
    rank = {id(t): i + 1 for i, group in enumerate(kept) for t in group}

    def group_row(letter, group):
        left = [t.reward for t in group if not t.broken]
        dropped = "outranked" if pstdev(left) else "no variance"
        fate = f"rank {rank[id(group[0])]}, kept" if id(group[0]) in rank else dropped
        return letter, ", ".join(f"{r:.1f}" for r in left), f"{mean(left):.3f}", f"{pstdev(left):.3f}", fate
    return PAGE.format(
        oversample=config.oversample, keep=config.batch_size, n=n, lr=config.lr, answer=first.sample.answer,
        prompt=IMAGE.sub("<|image_pad|>…", decode(prompt)).strip(), prompt_tokens=len(prompt),
        visual=prompt.count(run.policy.image_token), width=first.images[0].width, height=first.images[0].height,
        rollouts="\n".join(line for t in groups[0] for line in said(names[id(t)], t)),
        rewards=table((names[id(t)], t.end_reason.value, t.answer or "–", "yes" if t.correct else "no", t.n_tool_calls,
                       f"{t.reward:.1f}") for group in groups for t in group),
        groups=table(group_row(*pair) for pair in zip(CAST, groups)),
        counts=", ".join(f"{name} {value}" for name, value in counts.items() if value),
        spared=groups[2][0].advantage, concise=first.advantage, names=" | ".join(names[id(t)] for t in trained),
        rules="|".join(["---"] * len(trained)), advantages=" | ".join(f"{t.advantage:+.3f}" for t in trained),
        a2_tokens=len(second.tokens), a2_actions=sum(second.action_mask), segments=table(segments(decode, second)),
        sum=" ".join(f"{t.advantage:+.3f} · {len(values)}" for t, values in zip(trained, before)),
        by_hand=-sum(t.advantage * len(values) for t, values in zip(trained, before)) / n,
        effect=table((names[id(t)], f"{t.advantage:+.3f}", f"{mean(b):.4f}", f"{mean(a):.4f}",
                      f"{mean(a) - mean(b):+.4f}") for t, b, a in zip(trained, before, after)),
        climbed=[sum(t.advantage * sum(values) for t, values in zip(trained, found)) for found in (before, after)],
        **{name: metrics[name] for name in ("loss", "grad_norm", "clip_fraction")})


IMAGE = re.compile(r"(<\|image_pad\|>)+")


def table(rows):
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def short(text, width=10_000):
    """One line, its image tokens as one, its middle left out where it is wider than `width`."""
    text = " ".join(IMAGE.sub("<|image_pad|>…", text).split())
    return text if len(text) <= width else f"{text[:width // 2]} … {text[-width // 2:]}"


def said(name, t):
    """A rollout turn by turn, with what came back."""
    for turn in t.turns:
        back = "an image" if turn.images else short(turn.output, 40)
        yield f"{name}  {short(turn.text)}" + (f"  →  {back}" if back else "")
        name = "  "


def segments(decode, t):
    """Runs of tokens with the same mask: what they say, how many, the mask."""
    cuts = [i for i, mask in enumerate(t.action_mask) if not i or mask != t.action_mask[i - 1]] + [len(t.tokens)]
    return [(f"`{short(decode(t.tokens[a:b]), 100)}`", b - a, int(t.action_mask[a])) for a, b in zip(cuts, cuts[1:])]


if __name__ == "__main__":
    (ROOT / "docs" / "lesson.md").write_text(lesson())
