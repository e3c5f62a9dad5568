"""A step's row of metrics.jsonl: means over everything that was sampled, and what was trained on.

What a reader may rely on: a key that has no meaning in a stage is left out. Everything that is
dropped on the way is counted here or in the counts of `select`.
"""

import statistics

from engine.report import looks


def mean(values) -> float:
    """The mean of numbers or booleans; 0 where there are none."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def measure(groups: list[list], kept: list[list], stage: str, seconds_rollout: float) -> dict:
    """Metrics of a step. groups: all that was sampled; kept: what was trained on."""
    sampled = [t for group in groups for t in group]
    trained = [t for group in kept for t in group]
    generated = sum(sum(t.action_mask) for t in sampled)
    looked = [looks(t) for t in sampled]
    calls = [t.turns[: t.n_tool_calls] for t in sampled]
    ended = [t.end_reason.value for t in sampled if t.error is None]
    metrics = dict(
        tool_calls=mean(t.n_tool_calls for t in sampled),
        turns=mean(len(t.turns) for t in sampled),
        response_tokens=generated / max(1, len(sampled)),
        visual_tokens=mean(t.visual_tokens for t in sampled),
        frames_looked_at=mean(where["frames_looked_at"] for where in looked),
        seconds_covered=mean(where["seconds_covered"] for where in looked),
        repeated_calls=mean(repeats(turns) for turns in calls),
        empty_calls=mean(sum(empty(turn) for turn in turns) for turns in calls),
        unreadable=mean(t.error is not None for t in sampled),
        format_errors=ended.count("ERROR_IN_ACTION") / max(1, len(sampled)),
        turn_limit=ended.count("EXCEED_MAX_TURNS") / max(1, len(sampled)),
        trajectories_trained=len(trained),
        seconds_rollout=seconds_rollout,
        seconds_tool=sum(turn.seconds_tool for t in sampled for turn in t.turns),
        tokens_per_second=generated / max(seconds_rollout, 1e-9),
    )
    if stage == "rl":
        metrics.update(
            reward=mean(t.reward for t in sampled),
            accuracy=mean(bool(t.correct) for t in sampled),
            reward_std=mean(statistics.pstdev(t.reward for t in group) for group in groups),
            correct_negative_advantage=mean(t.advantage < 0 for t in trained if t.correct),
        )
    return metrics


def repeats(turns: list) -> int:
    """Calls whose code an earlier call of the trajectory had already run."""
    return len(turns) - len({turn.code for turn in turns})


def empty(turn) -> bool:
    """Did the call return neither text nor a figure?"""
    return not turn.output and not turn.images
