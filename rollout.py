"""How policy and sandbox meet: the agent loop, and the choice of what to train on.

The loop runs a batch of trajectories turn by turn. The policy acts for all of them at once. The
moment one closes its code, the code runs in that trajectory's sandbox, while the others are still
being sampled. When all have stopped, what the tools returned is appended as the next user turn, and
those that are not done go on. Three rules keep a trajectory right at every moment:
  - Ids are only appended. Nothing that was sampled is decoded and encoded again.
  - An observation is added whole, and only after a check that it fits.
  - An error in the code is shown to the policy, which can mend it.

`select` then filters and ranks groups of scored trajectories: oversample, filter, rank.
"""

import collections
import enum
import functools
import random
import statistics
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from data import Action, DataError, Sample, open_image
from engine.blocks import find_code
from engine.prompt import messages
from engine.report import shrink
from engine.video import check_video, uniform_frames
from model import CLOSING_TAGS
from reward import advantages, extract_answer
from sandbox import Packed, Sandbox, warm


@dataclass
class Limits:
    """What a trajectory may take, and how it is sampled.

    Figures are held as pixels until the step ends. A figure has at most 2 million of them, so a
    trajectory holds at most 32 x 6 MB. Those of one that was cut are made small as it ends.
    """

    max_turns: int = 5  # turns, the last of which can only answer: 4 tool calls
    max_new_tokens: int = 10_240  # new tokens a turn
    max_context: int = 52_480  # tokens of a trajectory; paper: 32,000 prompt + 20,480 response
    max_images: int = 32  # images in the context; those of --frames are not counted
    temperature: float = 1.0  # of sampling; 0 is greedy
    top_p: float = 1.0  # of sampling; the gradient is always of the whole distribution
    top_k: int = 0  # of sampling, 0: all tokens; the gradient is of the whole distribution
    frames: str = ""  # N or 1fps: a video's frames in the context, and no tool (the baseline)
    prelude: str = ""  # file of Python: functions of your own that the code can call
    timeout: float = 30.0  # seconds a tool call may take
    unsafe_sandbox: bool = False  # run code without confinement where the system has none

    def new_tokens(self, t) -> int:
        """How many tokens the next turn of trajectory t may have."""
        return min(self.max_new_tokens, self.max_context - len(t.tokens))


class EndReason(enum.Enum):
    """How a trajectory ended."""

    ONGOING = "ONGOING"
    DONE = "DONE"  # it answered
    OVER_LENGTH = "OVER_LENGTH"  # the context is full
    EXCEED_MAX_TURNS = "EXCEED_MAX_TURNS"  # code in the last turn
    EXCEED_MAX_IMAGES = "EXCEED_MAX_IMAGES"  # more images than the limit
    ERROR_IN_ACTION = "ERROR_IN_ACTION"  # no code and no answer, or cut by the turn's token limit


@dataclass
class Turn:
    """One action and what came back."""

    text: str = ""
    code: str | None = None
    output: str = ""
    error: str | None = None  # the traceback of the code
    images: list = field(default_factory=list)  # figures that the code showed
    frames: list = field(default_factory=list)  # (video, frame) pairs that the code decoded
    n_tokens: int = 0
    seconds_tool: float = 0.0  # that the loop waited for the code


@dataclass(eq=False)
class Trajectory:
    """The one record that travels: filled by rollout, score and select, read by update.

    It has T tokens, of which the policy sampled A.
    """

    sample: Sample
    tokens: list = field(default_factory=list)  # ids of prompt, actions and observations (T)
    action_mask: list = field(default_factory=list)  # True where the policy sampled the token (T)
    logprobs: list = field(default_factory=list)  # of the sampled tokens (A)
    images: list = field(default_factory=list)  # PIL images in the context, the prompt's first
    turns: list = field(default_factory=list)
    n_tool_calls: int = 0  # code that the sandbox ran, with or without an error
    end_reason: EndReason = EndReason.ONGOING
    answer: str | None = None
    correct: bool | None = None
    reward: float = 0.0
    advantage: float | None = None
    prompt_length: int = 0  # tokens
    prompt_images: int = 0
    visual_tokens: int = 0  # image tokens in the context
    error: str | None = None  # why the sample could not be read

    @property
    def broken(self) -> bool:
        """Cut by the environment, so that its reward says nothing about the policy."""
        cut = (EndReason.OVER_LENGTH, EndReason.EXCEED_MAX_IMAGES)
        return self.error is not None or self.end_reason in cut

    def append(self, ids: list[int], sampled: bool, image_token: int):
        """Add tokens of an action (sampled) or of an observation."""
        self.tokens += ids
        self.action_mask += [sampled] * len(ids)
        if not sampled:  # an action never holds image tokens (Policy.ban)
            self.visual_tokens += ids.count(image_token)

    def fail(self, error: Exception):
        """End it because its sample cannot be read."""
        self.error = str(error)
        self.end_reason = EndReason.ERROR_IN_ACTION


def observation(result, first_clue: int) -> list[dict]:
    """A sandbox's Result -> the user turn that shows it; figures are numbered from `first_clue`."""
    parts = [f"<tool_response>\n<interpreter>\nText Result:\n{result.text}\n"]
    for number, _ in enumerate(result.images, first_clue):
        title = "Image Result:\n" if number == first_clue else ""
        parts += [f"{title}<image_clue_{number}>", None, f"</image_clue_{number}>\n"]
    parts.append("</interpreter>\n</tool_response>")
    content = [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]
    return [{"role": "user", "content": content}]


# ----------------------------------------------------------------------------------------- the loop
def rollout(
    policy,
    samples: list[Sample],
    group_size: int,
    limits: Limits = Limits(),
    *,
    tools: bool = True,
    templates: dict | None = None,
    on_turn=None,
    seed: int = 0,
    **changes,
) -> list[list[Trajectory]]:
    """Sample `group_size` trajectories for each sample -> one list of them per sample.

    limits, and `changes` of its fields: what a trajectory may take. tools=False: answer directly.
    templates: prompt templates by name. on_turn(trajectory) is called after every turn. seed: of
    the random numbers that code draws. A sample that cannot be read becomes trajectories with
    `error` set. Nothing that a policy does raises. Raises SandboxError where the machine can run
    no code.
    """
    limits = replace(limits, **changes)
    tools = tools and not limits.frames
    groups = []
    for sample in samples:
        group = [Trajectory(sample) for _ in range(group_size)]
        ask(policy, group, limits, tools, templates)
        groups.append(group)
    live = ongoing([t for group in groups for t in group])
    with Tools(live if tools else [], limits, seed) as toolbox:
        on_action = functools.partial(take_action, policy, toolbox, limits, tools)
        while live:
            policy.act(live, limits, on_action)
            for t in ongoing(live):
                observe(policy, toolbox, limits, t)
            for t in live:
                if t.end_reason is not EndReason.ONGOING:
                    toolbox.close(t)
                if t.broken:
                    shrink(t)
                if on_turn:
                    on_turn(t)
            live = ongoing(live)
    return groups


def ongoing(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Those that have not ended."""
    return [t for t in trajectories if t.end_reason is EndReason.ONGOING]


def ask(policy, group, limits, tools, templates):
    """Give every trajectory of a group its prompt, or the reason why there is none."""
    sample = group[0].sample
    try:
        seconds = None
        images = [open_image(image) for image in sample.images]
        for path in sample.videos:
            check_video(path)
        if limits.frames:
            seconds, images = uniform_frames(sample, limits.frames)
        ids = policy.encode(messages(sample, templates, tools, seconds, limits.prelude), images)
    except DataError as error:
        for t in group:
            t.fail(error)
        return
    for t in group:
        t.append(ids, False, policy.image_token)
        t.images = list(images)
        t.prompt_images = len(images)
        t.prompt_length = len(ids)
        if len(images) > limits.max_images and not limits.frames:
            t.end_reason = EndReason.EXCEED_MAX_IMAGES
        elif len(ids) >= limits.max_context:
            t.end_reason = EndReason.OVER_LENGTH


def take_action(policy, toolbox, limits, tools, t, action):
    """Append an action and start its code; called the moment the trajectory stops."""
    text = policy.tokenizer.decode(action.ids, skip_special_tokens=True)
    answered = "</answer>" in text
    code = find_code(text) if tools and not answered else None
    t.append(action.ids, True, policy.image_token)
    t.logprobs += action.logprobs
    t.turns.append(Turn(text, code, n_tokens=len(action.ids)))
    if not action.complete:
        full = len(t.tokens) >= limits.max_context
        t.end_reason = EndReason.OVER_LENGTH if full else EndReason.ERROR_IN_ACTION
    elif answered:
        t.end_reason = EndReason.DONE
        t.answer = extract_answer(text)
    elif code is None:
        t.end_reason = EndReason.ERROR_IN_ACTION
    elif len(t.turns) >= limits.max_turns:
        t.end_reason = EndReason.EXCEED_MAX_TURNS
    else:
        toolbox.start(t, code)


def observe(policy, toolbox, limits, t):
    """Append what the code returned: whole or, where it does not fit, not at all."""
    turn = t.turns[-1]
    began = time.perf_counter()
    try:
        result = toolbox.result(t)
    except OSError as error:  # a video that can no longer be opened
        t.fail(error)
        return
    turn.seconds_tool = time.perf_counter() - began
    turn.output = result.text
    turn.error = result.error
    turn.frames = result.frames
    t.n_tool_calls += 1
    if len(t.images) + len(result.images) > limits.max_images:
        t.end_reason = EndReason.EXCEED_MAX_IMAGES
        return
    turn.images = result.images
    shown = observation(result, len(t.images))
    ids = policy.encode(shown, result.images, after_action=True)
    if t.tokens[-1] == policy.end and ids[0] == policy.end:
        del ids[0]  # the policy has closed its turn itself
    if len(t.tokens) + len(ids) >= limits.max_context:
        t.end_reason = EndReason.OVER_LENGTH
        return
    t.append(ids, False, policy.image_token)
    t.images += result.images


class Tools:
    """The sandboxes of a batch, one a trajectory. Calls of different trajectories run concurrently.

    They start while the prompts are fed, so that the first call need not wait for them, and they
    end in the background.
    """

    def __init__(self, trajectories: list[Trajectory], limits: Limits, seed: int):
        self.trajectories = trajectories if limits.max_turns > 1 else []
        self.settings = dict(
            timeout=limits.timeout,
            unsafe=limits.unsafe_sandbox,
            prelude=limits.prelude,
        )
        self.seed = seed
        self.threads = ThreadPoolExecutor(16)
        self.boxes = {}  # trajectory -> future of its Sandbox
        self.calls = {}  # trajectory -> future of its Result

    def __enter__(self):
        packed = {}  # a group's images are packed once for all its sandboxes
        place = collections.Counter()  # in the group
        for t in self.trajectories:
            group = id(t.sample)
            if group not in packed:
                packed[group] = Packed(t.images)
            seed = zlib.crc32(f"{self.seed} {t.sample.id} {place[group]}".encode())
            place[group] += 1
            future = self.threads.submit(
                Sandbox, packed[group], t.sample.videos, seed=seed, **self.settings
            )
            self.boxes[t] = future
        return self

    def __exit__(self, failed, *_):
        for t in list(self.boxes):
            self.close(t, wait=failed is not None)
        self.threads.shutdown(wait=failed is not None)
        films = sum(bool(t.sample.videos) for t in self.trajectories)
        # The next batch's are made ahead, while the policy learns.
        warm(len(self.trajectories) - films, False)
        warm(films, True)

    def start(self, t: Trajectory, code: str):
        """Run code in the trajectory's sandbox, in the background."""
        made = self.boxes[t]
        self.calls[t] = self.threads.submit(lambda: made.result().run(code))

    def result(self, t: Trajectory):
        """Wait for the trajectory's call. Raises OSError where its video cannot be opened."""
        return self.calls.pop(t).result()

    def close(self, t: Trajectory, wait: bool = False):
        """End the trajectory's sandbox: in the background, or now with the call that it runs."""
        box = self.boxes.pop(t, None)
        if box is None or box.cancel():
            return
        if wait:
            end(box)
        else:
            self.threads.submit(end, box)


def end(box):
    """Close a sandbox, once it is made."""
    if not box.exception():
        box.result().close()


class Recital:
    """A policy whose actions are a demonstration's turns, so that SFT sees real observations."""

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def act(self, trajectories, limits, on_action):
        """Say the next turn of each.

        A turn that no sampler can reach, or that does not fit into the context, is not complete.
        """
        for t in trajectories:
            turns = (t.sample.turns or [])[len(t.turns) :]
            text = turns[0].strip() if turns else ""
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            ids = encoded.input_ids
            behind = [text.split(tag, 1)[1] for tag in CLOSING_TAGS if tag in text]
            if not behind:
                ids = [*ids, self.end]
            fits = len(t.tokens) + len(ids) <= limits.max_context
            reachable = bool(turns) and fits and not any(behind)
            on_action(t, Action(ids, [0.0] * len(ids), reachable))


# ------------------------------------------------------------------------ oversample, filter, rank
def teaches(group: list[Trajectory], keep_zero_variance: bool = False) -> bool:
    """Does a group hold two trajectories that are not broken, and of different reward?"""
    rewards = [t.reward for t in group if not t.broken]
    return len(rewards) >= 2 and (keep_zero_variance or statistics.pstdev(rewards) > 1e-9)


def select(
    groups: list[list[Trajectory]],
    keep: int,
    rank: str = "std",
    keep_zero_variance: bool = False,
    normalize_std: bool = False,
    seed: int = 0,
):
    """Filter and rank groups of scored trajectories -> (groups to train on, counts of the rest).

    Broken trajectories leave first, so that baseline and std are over what is left and a group's
    advantages sum to zero. Groups of fewer than two, or without reward variance, drop. The rest are
    ranked by the standard deviation of their rewards (PAPER: rollouts), or shuffled with
    rank="random". The first `keep` are kept whole, with advantage = R - mean(R).
    """
    counts = dict(
        groups_sampled=len(groups),
        groups_zero_variance=0,
        groups_too_small=0,
        trajectories_broken=0,
    )
    ranked = []
    for group in groups:
        whole = [t for t in group if not t.broken]
        rewards = [t.reward for t in whole]
        counts["trajectories_broken"] += len(group) - len(whole)
        if len(whole) < 2:
            counts["groups_too_small"] += 1
        elif not teaches(group, keep_zero_variance):
            counts["groups_zero_variance"] += 1
        else:
            for t, advantage in zip(whole, advantages(rewards, normalize_std), strict=True):
                t.advantage = advantage
            ranked.append((statistics.pstdev(rewards), whole))
    if rank == "random":
        random.Random(seed).shuffle(ranked)
    else:
        ranked.sort(key=lambda pair: -pair[0])
    counts["groups_outranked"] = max(0, len(ranked) - keep)
    return [group for _, group in ranked[:keep]], counts
