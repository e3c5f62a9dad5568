"""A step's row of metrics.jsonl: means over everything that was sampled, and what was trained on.

What a reader may rely on: a key that has no meaning in a stage is left out. Everything that is
dropped on the way is counted here or in the counts of `select`.
"""

import statistics
from collections import Counter

from engine.batching import flat
from engine.parallel import gather
from engine.report import looks


def mean(values) -> float:
    """The mean of numbers or booleans; 0 where there are none."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def measure(
    groups: list[list],
    kept: list[list],
    stage: str,
    seconds: float,
    judged: Counter | None = None,
) -> dict:
    """Metrics of a step. groups: all that was sampled in `seconds`; kept: what was trained on.

    judged: the counts of `score` in this process. All processes call it.
    """
    sampled = flat(groups)
    looked = [looks(t) for t in sampled]
    calls = [t.turns[: t.n_tool_calls] for t in sampled]
    ended = [None if t.error else t.end_reason.value for t in sampled]
    generated = [sum(t.action_mask) for t in sampled]
    waits = [turn.seconds_tool for t in sampled for turn in t.turns]
    metrics = dict(
        tool_calls=mean(t.n_tool_calls for t in sampled),
        turns=mean(len(t.turns) for t in sampled),
        response_tokens=mean(generated),
        visual_tokens=mean(t.visual_tokens for t in sampled),
        frames_looked_at=mean(where["frames_looked_at"] for where in looked),
        seconds_covered=mean(where["seconds_covered"] for where in looked),
        repeated_calls=mean(repeated(turns) for turns in calls),
        empty_calls=mean(empty(turns) for turns in calls),
        unreadable=mean(t.error is not None for t in sampled),
        format_errors=mean(end == "ERROR_IN_ACTION" for end in ended),
        turn_limit=mean(end == "EXCEED_MAX_TURNS" for end in ended),
        trajectories_trained=len(flat(kept)),
        seconds_rollout=seconds,
        seconds_tool=sum(waits),
        tokens_per_second=sum(generated) / seconds,
    )
    if stage == "rl":
        right = [t for t in flat(kept) if t.correct]
        total = sum(gather([judged or Counter()]), Counter())
        spreads = [statistics.pstdev(t.reward for t in group) for group in groups]
        metrics.update(
            reward=mean(t.reward for t in sampled),
            accuracy=mean(bool(t.correct) for t in sampled),
            reward_std=mean(spreads),
            undecided=total["undecided"] / max(1, len(sampled)),
            judge_failures=total["judge_failures"],
            correct_negative_advantage=mean(t.advantage < 0 for t in right),
        )
    return metrics


def repeated(turns: list) -> int:
    """Calls whose code an earlier call of the trajectory had already run."""
    codes = {turn.code for turn in turns}
    return len(turns) - len(codes)


def empty(turns: list) -> int:
    """Calls that returned neither text nor a figure."""
    return sum(not turn.output and not turn.images for turn in turns)
