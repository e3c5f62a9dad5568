r"""The answer in a turn, the tool reward and the advantage. The verifier has tests of its own."""

import time

import numpy as np
import pytest

from data import Sample
from reward import advantages, extract_answer, is_correct, paid_calls, reward, score
from rollout import Trajectory, Turn

COLOURS = "What colour is it?\n(A) white\n(B) orange\n(C) dark red\n(D) red"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("I see it.\n<answer>\n\\boxed{B}\n</answer>", "B"),
        (
            r"<answer>\boxed{\frac{\sqrt{\frac{1}{2}}}{3}}</answer>",
            r"\frac{\sqrt{\frac{1}{2}}}{3}",
        ),
        (r"<answer>\boxed{\{1, 2\}}</answer>", r"\{1, 2\}"),
        (r"<answer>It is \boxed{ a cat } .</answer>", "a cat"),
        (r"<answer>\boxed{A}</answer> no: <answer>\boxed{B}</answer>", "B"),
        (r"<answer>\boxed{A}</answer> and <answer>nothing</answer>", "A"),
        (r"<answer>\boxed{A}</answer> then <answer>\boxed{B", "A"),
        (r"<answer>\boxed{A} or \boxed{A}</answer>", "A"),
        (r"<answer>\boxed {A}</answer>", "A"),
        (r"<answer>\boxed{\text{\boxed{A}}}</answer>", r"\text{\boxed{A}}"),
        (r"<answer>\boxed{%s}</answer>" % ("x" * 999), "x" * 999),
    ],
)
def test_the_answer_is_the_box_of_the_last_well_formed_block(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        r"<answer>\boxed{%s}</answer>" % ("x" * 1000),
        r"<answer><answer>\boxed{A}</answer></answer>",
        r"<answer>\boxed{A}<answer>\boxed{B}</answer></answer>",
        r"<answer><answer>\boxed{A}</answer>",
        "<answer>B</answer>",
        r"\boxed{B}",
        r"<answer>\boxed{}</answer>",
        r"<answer>\boxed{ }</answer>",
        r"<answer>\boxed{A} \boxed{}</answer>",
        r"<answer>\boxed{B</answer>",
        r"<answer>\boxed{B}",
        r"\boxed{B}</answer>",
        "",
        None,
    ],
)
def test_what_is_not_well_formed_is_no_answer(text):
    assert extract_answer(text) is None


def test_two_different_boxes_are_no_way_to_answer_twice():
    answer = extract_answer(r"<answer>\boxed{A} \boxed{B}</answer>")
    assert answer == "A, B"
    assert not is_correct(answer, Sample("0", COLOURS, "A"))
    assert not is_correct(answer, Sample("0", COLOURS, "B"))
    assert is_correct("A", Sample("0", COLOURS, "A"))


@pytest.mark.parametrize(
    "piece", ["<answer>", "</answer>", "\\boxed{", "<answer>\\boxed{", "{", "}", "\\", "\\boxed{x}"]
)
def test_repetition_is_read_in_no_time(piece):
    """A broken policy repeats itself. What is quadratic in it would stay here for minutes."""
    started = time.monotonic()
    extract_answer(f"<answer>\\boxed{{{piece * 20_000}")
    extract_answer(f"<answer>\\boxed{{{piece * 20_000}}}</answer>")
    assert time.monotonic() - started < 10


def test_reward():
    assert reward(True, 3) == pytest.approx(1.3)
    assert reward(True, 0) == 1
    assert reward(True, 4, 0.0) == 1
    assert reward(False, 4) == 0  # a wrong answer earns nothing for its calls


def right_after(*codes):
    """A trajectory that ran these codes and then answered rightly."""
    turns = [Turn(code=code) for code in codes]
    sample = Sample("0", COLOURS, "A")
    return Trajectory(sample, turns=[*turns, Turn()], n_tool_calls=len(codes), answer="A")


@pytest.mark.parametrize(
    "which, paid",
    [("inf", 4), ("0", 0), ("2", 2), ("9", 4), ("new", 2)],
)
def test_which_calls_earn_the_tool_reward(which, paid):
    looks = right_after("left", "right", "left", "left")
    assert paid_calls(looks, which) == paid
    score([looks], paid=which)
    assert looks.reward == pytest.approx(1 + 0.1 * paid)


def test_code_that_did_not_run_is_no_new_call():
    """The code of a last turn, which can only answer, never runs."""
    looks = right_after("left", "left")
    looks.turns[-1].code = "right"
    assert paid_calls(looks, "new") == 1


def test_every_call_earns_the_tool_reward_by_default():
    looks = right_after("left", "left")
    score([looks])
    assert looks.reward == pytest.approx(1.2)


def test_advantages_are_rewards_less_their_mean():
    assert advantages([1.2, 0, 0, 1.2]) == pytest.approx([0.6, -0.6, -0.6, 0.6])
    assert sum(advantages([1.3, 1.1, 0.0])) == pytest.approx(0)
    assert advantages([1, 1]) == [0, 0]
    assert advantages([]) == []


def test_advantages_of_plain_grpo_have_a_standard_deviation_of_one():
    normalized = advantages([1.2, 0, 0, 1], normalize_std=True)
    assert np.std(normalized, ddof=1) == pytest.approx(1, abs=1e-4)
    assert advantages([1, 1], normalize_std=True) == [0, 0]
    assert advantages([1], normalize_std=True) == [0]
