"""How policy and sandbox meet: the agent loop, and the choice of what to train on (oversample, filter, rank).

The loop runs a batch of trajectories turn by turn. The policy generates for all rows at once; the moment a row closes
its code, the code runs in that row's sandbox while the others go on generating; when all have stopped, what the tools
returned is appended as the next user turn and the rows that are not done go on. Three rules keep a trajectory right at
every moment: ids are appended and never encoded again; an observation is added whole, and only after it was checked
to fit; an error in the code is shown to the policy, which can mend it.

`Script` and `Plain` stand in for a policy's generation: the one recites a demonstration (so that SFT data gets its
observations from the real sandbox), the other is the slow path through `model.generate`, for reading and for proofs.
"""
import enum
import functools
import random
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from data import DataError, Sample, messages, open_image, uniform_frames
from model import CLOSING_TAGS, Action
from reward import advantages, extract_answer
from sandbox import Packed, Sandbox, warm

CODE = re.compile(r"<code>\s*```python\n(.*?)```\s*</code>", re.DOTALL)
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


class EndReason(enum.Enum):
    """How a trajectory ended."""
    ONGOING = "ONGOING"
    DONE = "DONE"                                   # it answered
    OVER_LENGTH = "OVER_LENGTH"                     # the context is full
    EXCEED_MAX_TURNS = "EXCEED_MAX_TURNS"           # code in the last turn
    EXCEED_MAX_IMAGES = "EXCEED_MAX_IMAGES"         # more images than the limit
    ERROR_IN_ACTION = "ERROR_IN_ACTION"             # neither code nor answer, or cut by the turn's token limit


@dataclass
class Turn:
    """One action and what came back. frames: (video, frame) pairs that the code decoded."""
    text: str = ""
    code: str | None = None
    output: str = ""
    error: str | None = None
    images: list = field(default_factory=list)
    frames: list = field(default_factory=list)
    n_tokens: int = 0


@dataclass
class Trajectory:
    """The one record that travels: filled by rollout, then reward, then select, read by update and report."""
    sample: Sample
    tokens: list = field(default_factory=list)          # ids of prompt, actions and observations (T)
    action_mask: list = field(default_factory=list)     # True where the policy sampled the token (T)
    logprobs: list = field(default_factory=list)        # of the sampled tokens, under the sampling temperature (A)
    images: list = field(default_factory=list)          # PIL images in the context, the prompt's first
    turns: list = field(default_factory=list)
    n_tool_calls: int = 0                               # code that the sandbox ran, with or without an error
    end_reason: EndReason = EndReason.ONGOING
    answer: str | None = None
    correct: bool | None = None
    reward: float = 0.0
    advantage: float | None = None
    prompt_length: int = 0                              # tokens
    prompt_images: int = 0
    visual_tokens: int = 0                              # image tokens in the context
    error: str | None = None                            # why the sample could not be run

    @property
    def broken(self):
        """Cut by the environment, so its reward says nothing about the policy: leaves its group before the baseline."""
        return self.error is not None or self.end_reason in (EndReason.OVER_LENGTH, EndReason.EXCEED_MAX_IMAGES)

    def append(self, ids, action, image_token):
        """Add tokens; observation tokens may be image tokens, action tokens never are (Policy.ban)."""
        self.tokens += ids
        self.action_mask += [action] * len(ids)
        self.visual_tokens += 0 if action else ids.count(image_token)


def find_code(text):
    """The last code block of an action, or None: tags around a fence, or a bare fence where the tags are missing."""
    blocks = CODE.findall(text) or FENCE.findall(text)
    return blocks[-1] if blocks else None


def observation(result, first_clue):
    """Sandbox Result -> the content of the user turn that shows it; figures are numbered from `first_clue`."""
    parts = [{"type": "text", "text": f"<tool_response>\n<interpreter>\nText Result:\n{result.text}\n"}]
    for k in range(first_clue, first_clue + len(result.images)):
        title = "Image Result:\n" if k == first_clue else ""
        parts += [{"type": "text", "text": f"{title}<image_clue_{k}>"}, {"type": "image"},
                  {"type": "text", "text": f"</image_clue_{k}>\n"}]
    return [{"role": "user", "content": parts + [{"type": "text", "text": "</interpreter>\n</tool_response>"}]}]


def rollout(policy, samples, group_size, *, max_turns=5, max_new_tokens=10_240, max_context=52_480, max_images=32,
            temperature=1.0, top_p=1.0, top_k=0, tools=True, frames=None, templates=None, timeout=30.0,
            unsafe_sandbox=False, slow=False, on_turn=None, stats=None):
    """Sample `group_size` trajectories for each sample -> one list of Trajectory per sample.

    The last of `max_turns` turns can only answer. max_new_tokens: of one turn; max_context: of the whole trajectory.
    max_images: in the context; uniform `frames` are not limited. tools=False: answer directly; frames=N or "1fps": a
    video's frames in the context, no tool. on_turn(trajectory) is called after every turn. stats: a dict in which
    seconds_tool, the time that generation waited for tools, is summed. A sample that cannot be read becomes
    trajectories with `error` set; nothing that a policy does raises.
    """
    groups, prompts, rows = [[Trajectory(sample) for _ in range(group_size)] for sample in samples], [], []
    tools = tools and not frames
    for sample, group in zip(samples, groups):
        try:
            opened = (None, [open_image(image) for image in sample.images])
            seconds, images = uniform_frames(sample, frames) if frames else opened
            prompt = policy.encode(messages(sample, templates, tools, seconds), images)
        except DataError as error:
            for t in group:
                t.error, t.end_reason = str(error), EndReason.ERROR_IN_ACTION
            continue
        for t in group:
            t.images, t.prompt_images, t.prompt_length = list(images), len(images), len(prompt.ids)
            t.append(prompt.ids, False, policy.image_token)
            if len(images) > max_images and not frames:
                t.end_reason = EndReason.EXCEED_MAX_IMAGES
            elif len(prompt.ids) >= max_context:
                t.end_reason = EndReason.OVER_LENGTH
        if group[0].end_reason is EndReason.ONGOING:
            prompts, rows = prompts + [prompt], rows + group
    if not prompts:
        return groups
    policy, sampling = Plain(policy, rows) if slow else policy, dict(temperature=temperature, top_p=top_p, top_k=top_k)
    with Tools(rows if tools and max_turns > 1 else (), timeout, unsafe_sandbox) as toolbox:
        state = policy.prefill(prompts, group_size)
        while state is not None:                        # a turn of all rows that are not done
            budget = {row: min(max_new_tokens, max_context - len(rows[row].tokens)) for row in state.order}
            act = functools.partial(book, policy, rows, toolbox, tools, max_turns, max_context)
            policy.generate(state, budget, **sampling, on_stop=act)
            seen = {}
            for row in sorted(state.order):
                if rows[row].end_reason is EndReason.ONGOING:
                    seen[row] = observe(policy, rows[row], toolbox.result(row), max_context, max_images)
                if rows[row].end_reason is not EndReason.ONGOING:
                    seen.pop(row, None)
                    toolbox.close(row)
                if on_turn:
                    on_turn(rows[row])
            state = policy.extend(state, seen) if seen else None
    if stats is not None:
        stats["seconds_tool"] = stats.get("seconds_tool", 0.0) + toolbox.waited
    return groups


def book(policy, rows, toolbox, tools, max_turns, max_context, row, action):
    """Append a row's action and start its code; called the moment the row stops, while the others still generate."""
    t, text = rows[row], policy.tokenizer.decode(action.ids, skip_special_tokens=True)
    t.append(action.ids, True, policy.image_token)
    t.logprobs += action.logprobs
    code = find_code(text) if tools and "</answer>" not in text else None
    t.turns.append(Turn(text, code, n_tokens=len(action.ids)))
    if not action.complete:
        t.end_reason = EndReason.OVER_LENGTH if len(t.tokens) >= max_context else EndReason.ERROR_IN_ACTION
    elif "</answer>" in text:
        t.end_reason, t.answer = EndReason.DONE, extract_answer(text)
    elif code is None:
        t.end_reason = EndReason.ERROR_IN_ACTION
    elif len(t.turns) >= max_turns:
        t.end_reason = EndReason.EXCEED_MAX_TURNS
    else:
        toolbox.start(row, code)


def observe(policy, t, result, max_context, max_images):
    """Append a tool's result to trajectory t, whole or, where it does not fit, not at all. Returns it Encoded."""
    turn = t.turns[-1]
    turn.output, turn.error, turn.images, turn.frames = result.text, result.error, result.images, result.frames
    t.n_tool_calls += 1
    if len(t.images) + len(result.images) > max_images:
        t.end_reason = EndReason.EXCEED_MAX_IMAGES
        return None
    seen = policy.encode(observation(result, len(t.images)), result.images, after_action=True)
    if t.tokens[-1] == policy.end and seen.ids[0] == policy.end:
        del seen.ids[0]                                 # the policy has closed its turn itself
    if len(t.tokens) + len(seen.ids) >= max_context:
        t.end_reason = EndReason.OVER_LENGTH
        return None
    t.append(seen.ids, False, policy.image_token)
    t.images += result.images
    return seen


class Tools:
    """The sandboxes of a batch, made while the policy reads its prompts, since a first call would wait for that; calls
    of different rows run concurrently. waited: seconds spent in `result`."""

    def __init__(self, rows, timeout, unsafe):
        self.rows, self.settings, self.waited = rows, dict(timeout=timeout, unsafe=unsafe), 0.0
        self.pool, self.boxes, self.calls = ThreadPoolExecutor(16), {}, {}

    def __enter__(self):
        packed = {}                                     # a group's images, once for its sandboxes
        for row, t in enumerate(self.rows):
            if id(t.sample) not in packed:
                packed[id(t.sample)] = Packed(t.images)
            self.boxes[row] = self.pool.submit(Sandbox, packed[id(t.sample)], t.sample.videos, **self.settings)
        return self

    def __exit__(self, failed, *_):
        for row in list(self.boxes):
            self.close(row, wait=bool(failed))
        self.pool.shutdown(wait=bool(failed))
        for videos in (False, True):                    # prepared while the policy learns, at 5 MiB each
            warm(min(128, sum(bool(t.sample.videos) == videos for t in self.rows)), videos)

    def start(self, row, code):
        """Run code in the row's sandbox, in the background."""
        t, made = self.rows[row], self.boxes[row]
        seed = hash(tuple(t.tokens)) % 2 ** 32          # so that a resumed run draws what an uninterrupted one does

        def run():
            if not t.n_tool_calls:
                made.result().run(f"__import__('random').seed({seed}); __import__('numpy').random.seed({seed})")
            return made.result().run(code)
        self.calls[row] = self.pool.submit(run)

    def result(self, row):
        """Wait for the row's call."""
        began = time.perf_counter()
        result = self.calls.pop(row).result()
        self.waited += time.perf_counter() - began
        return result

    def close(self, row, wait=False):
        """The row is done: its sandbox ends, in the background; or now, with the call that runs in it."""
        box = self.boxes.pop(row, None)

        def end():
            if not box.exception():
                box.result().close()
        if box and not box.cancel():
            end() if wait else self.pool.submit(end)


class Script:
    """Stands in for a policy: every row says what its sample's demonstration says, turn by turn."""

    def __init__(self, policy, samples):
        self.tokenizer, self.encode, self.image_token = policy.tokenizer, policy.encode, policy.image_token
        self.end, self.turns = policy.end, [list(sample.turns) for sample in samples]

    def prefill(self, prompts, group_size):
        return SimpleNamespace(order=range(len(prompts) * group_size))

    def extend(self, state, seen):
        return SimpleNamespace(order=[row for row in sorted(seen) if self.turns[row]])

    def generate(self, state, budget, on_stop, **sampling):
        for row in state.order:
            text = self.turns[row].pop(0)
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            ids += [] if any(tag in text for tag in CLOSING_TAGS) else [self.end]
            on_stop(row, Action(ids, [0.0] * len(ids), True))


class Plain(Script):
    """Stands in for a policy: `model.generate` over everything so far, again in every turn and row of a group."""

    def __init__(self, policy, rows):
        super().__init__(policy, [])
        self.policy, self.rows = policy, rows

    def extend(self, state, seen):
        return SimpleNamespace(order=sorted(seen))

    @torch.no_grad()
    def generate(self, state, budget, on_stop, temperature, **sampling):
        policy, rows = self.policy, [self.rows[row] for row in state.order]
        width = max(len(t.tokens) for t in rows)
        ids = torch.tensor([[policy.end] * (width - len(t.tokens)) + t.tokens for t in rows], device=policy.device)
        real = torch.tensor([[0] * (width - len(t.tokens)) + [1] * len(t.tokens) for t in rows], device=policy.device)
        pixels, grid = policy.pixels([image for t in rows for image in t.images])
        images = {} if pixels is None else dict(pixel_values=pixels.to(policy.device, policy.model.dtype),
                                                image_grid_thw=grid.to(policy.device))
        sampling = dict(sampling, do_sample=True, temperature=temperature) if temperature else {}
        settings = GenerationConfig(max_new_tokens=max(budget.values()), eos_token_id=sorted(policy.ends), **sampling,
                                    pad_token_id=policy.end, output_logits=True, return_dict_in_generate=True)

        def stopped(ids, _):
            return torch.tensor([policy.stops(row[width:].tolist()) for row in ids], device=ids.device)
        out = policy.model.generate(
            input_ids=ids, attention_mask=real, mm_token_type_ids=(ids == policy.image_token).int(), **images,
            generation_config=settings, logits_processor=[lambda _, scores: scores + policy.ban],
            stopping_criteria=StoppingCriteriaList([stopped]))
        for i, row in enumerate(state.order):
            action = Action([], [])
            for step, token in enumerate(out.sequences[i, width:].tolist()):
                logits = out.logits[step][i].float() + policy.ban
                action.ids.append(token)
                action.logprobs.append(float((logits / (temperature or 1.0)).log_softmax(-1)[token]))
                action.complete = policy.stops(action.ids)
                if action.complete or len(action.ids) >= budget[row]:
                    break
            on_stop(row, action)


def select(groups, keep, rank="std", keep_zero_variance=False, normalize_std=False, require_images=False, seed=0):
    """Filter and rank groups of scored trajectories -> (groups to train on, counts of what was dropped).

    Broken trajectories leave first, so that baseline and std are over what is left and a group's advantages sum to
    zero; groups of fewer than two or without reward variance drop; the rest are ranked by the standard deviation of
    their rewards (rank="std", PAPER: rollouts) or shuffled ("random"), and the first `keep` are kept whole, with
    advantage = R - mean(R). require_images also drops trajectories whose tools showed no image, as published code does.
    """
    counts = dict(groups_sampled=len(groups), groups_zero_variance=0, groups_too_small=0, trajectories_broken=0,
                  trajectories_imageless=0)
    left = []
    for group in groups:
        whole = [t for t in group if not t.broken]
        counts["trajectories_broken"] += len(group) - len(whole)
        shown = [t for t in whole if not require_images or len(t.images) > t.prompt_images]
        counts["trajectories_imageless"] += len(whole) - len(shown)
        std = statistics.pstdev([t.reward for t in shown]) if shown else 0.0
        if len(shown) < 2:
            counts["groups_too_small"] += 1
        elif std < 1e-9 and not keep_zero_variance:
            counts["groups_zero_variance"] += 1
        else:
            for t, advantage in zip(shown, advantages([t.reward for t in shown], normalize_std)):
                t.advantage = advantage
            left.append((std, shown))
    if rank == "random":
        random.Random(seed).shuffle(left)
    else:
        left.sort(key=lambda pair: -pair[0])
    counts["groups_outranked"] = max(0, len(left) - keep)
    return [group for _, group in left[:keep]], counts
