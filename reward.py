"""What a trajectory was worth: the answer in its last turn, the tool reward, the advantage.

R = R_acc + 0.1 * n_tc * 1{R_acc = 1}. A wrong answer earns nothing, however many tools were called.
Whether an answer is right, a rule decides (engine/verify.py), which is free and cannot be talked
into anything. Where the rule cannot tell, a judge is asked (engine/judge.py), if there is one;
where the judge fails, the rule's verdict stands, and an answer that nobody could judge is wrong.
"""

import re
import statistics

from data import Sample
from engine.judge import Judge
from engine.verify import (  # noqa: F401, some are only to be found here, too
    MAX_ANSWER,
    MRA_SOURCES,
    mean_relative_accuracy,
    verify,
    verify_batch,
)


def extract_answer(text: str | None) -> str | None:
    r"""What the \boxed{} of the last well-formed <answer> block holds, or None.

    Not well-formed: answer tags inside one another, no box or an empty one, a box that does not
    end, an answer of MAX_ANSWER characters and more. Several different boxes are joined by commas,
    so that naming two answers is not a way to be right twice.
    """
    for block in reversed(_answer_blocks(text or "")):
        boxes = _boxes(block)
        answer = ", ".join(dict.fromkeys(boxes))
        if boxes and all(boxes) and len(answer) < MAX_ANSWER:
            return answer
    return None


def _answer_blocks(text):
    """The insides of all <answer>…</answer> that hold no other tag of the kind."""
    blocks = []
    start = None  # of the open block
    for tag in re.finditer(r"</?answer>", text):
        opens = tag[0] == "<answer>"
        if not opens and start is not None:
            blocks.append(text[start : tag.start()])
        start = tag.end() if opens and start is None else None
    return blocks


def _boxes(block):
    r"""The contents of all \boxed{}, with the braces inside them in pairs; none if one is open."""
    boxes = []
    depth = 0  # of braces, in a box
    for mark in re.finditer(r"\\boxed\s*\{|\\.|[{}]", block, re.DOTALL):
        found = mark[0]
        if not depth and found.startswith(r"\boxed"):
            start = mark.end()
            depth = 1
        elif depth and found == "}":
            depth -= 1
            if depth == 0:
                boxes.append(block[start : mark.start()].strip())
        elif depth and found != r"\{" and found.endswith("{"):
            depth += 1
    return [] if depth else boxes


def is_correct(answer: str | None, sample: Sample) -> bool:
    """R_acc by the rule alone."""
    return bool(verify(answer, sample))


def reward(correct: bool, n_tool_calls: int, coefficient: float = 0.1) -> float:
    """R = R_acc + coefficient * n_tc * 1{R_acc = 1} (PAPER)."""
    return 1.0 + coefficient * n_tool_calls if correct else 0.0


def paid_calls(t, which: str) -> float:
    """How many calls of trajectory t earn the tool reward: the first so many; "inf": all (PAPER).

    "new": those whose code no earlier call of the trajectory has run.
    """
    if which == "new":
        return len({turn.code for turn in t.turns[: t.n_tool_calls]})
    return min(t.n_tool_calls, float(which))


def advantages(rewards: list[float], normalize_std: bool = False) -> list[float]:
    """A = R - mean(R) over a group (PAPER); normalize_std divides by the std, as GRPO does."""
    scale = 1.0
    if normalize_std and len(rewards) > 1:
        scale = statistics.stdev(rewards) + 1e-6
    return [(one - statistics.fmean(rewards)) / scale for one in rewards]


def score(
    trajectories: list,
    coefficient: float = 0.1,
    judge: Judge | None = None,
    judge_only: bool = False,
    paid: str = "inf",
) -> dict[str, int]:
    """Fill .correct and .reward of each trajectory from its .answer and .n_tool_calls.

    The judge is asked where the rule cannot tell; with judge_only everywhere but for MRA, which is
    the paper's protocol. paid: which calls earn the tool reward (`paid_calls`).
    Counts: answers that nobody decided (they are wrong), and those that the judge failed on, where
    the rule's verdict stands.
    """
    verdicts = verify_batch([(t.answer, t.sample) for t in trajectories])
    asked = []
    for t, verdict in zip(trajectories, verdicts, strict=True):
        t.correct = verdict
        by_judge = judge_only and not t.sample.data_source.endswith(MRA_SOURCES)
        if judge and t.answer and (by_judge or verdict is None):
            asked.append(t)
    judged = judge([(t.sample.question, t.sample.answer, t.answer) for t in asked]) if asked else []
    for t, verdict in zip(asked, judged, strict=True):
        if verdict is not None:
            t.correct = verdict
    undecided = sum(t.correct is None for t in trajectories)
    for t in trajectories:
        t.correct = bool(t.correct)
        t.reward = reward(t.correct, paid_calls(t, paid), coefficient)
    return {"undecided": undecided, "judge_failures": judged.count(None)}
