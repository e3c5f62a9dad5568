"""The agent loop's protocol and limits, the code of a turn, and the choice of what to train on."""

import time
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from data import Sample
from engine.fast import FastPolicy
from model import tiny_policy
from rollout import EndReason, Limits, Recital, Trajectory, find_code, rollout, select
from sandbox import Sandbox

ANSWER = "<answer>\n\\boxed{red}\n</answer>"


def code(body):
    return f"<code>\n```python\n{body}\n```\n</code>"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_policy(folder, [code("print(1)"), ANSWER] * 3, vocabulary=330)


def noise(seed=0):
    """A picture without two equal corners."""
    values = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def asked(*turns, name="0"):
    """A sample with one picture, whose demonstration says these turns."""
    return Sample(name, "Which colour?", "red", images=(noise(),), turns=list(turns))


def play(policy, *turns, **settings):
    """One trajectory that says these turns, with its code really run."""
    ((t,),) = rollout(Recital(policy), [asked(*turns)], 1, **settings)
    return t


# ----------------------------------------------------------------------------------------- the loop
def test_a_new_trajectory_needs_only_its_sample():
    t = Trajectory(Sample("0", "?", "a"))
    assert t.end_reason is EndReason.ONGOING
    assert t.tokens == []
    assert t.reward == 0
    assert not t.broken


def test_turns_tools_and_answer(policy):
    look = code("x = 41\nimage_clue_0.crop((0, 0, 32, 32)).show()")
    t = play(policy, look, code("print(x + 1, image_clue_1.size)"), ANSWER)
    assert t.end_reason is EndReason.DONE
    assert t.answer == "red"
    assert t.n_tool_calls == 2
    assert len(t.turns) == 3
    # The session lives on, and it holds what was shown.
    assert t.turns[1].output.strip() == "42 (32, 32)"
    text = policy.tokenizer.decode(t.tokens)
    assert "<tool_response>\n<interpreter>\nText Result:\n" in text
    assert "<image_clue_1><|vision_start|>" in text
    assert len(t.images) == 2
    assert t.visual_tokens == t.tokens.count(policy.image_token) == 8
    sampled = [i for i, mine in zip(t.tokens, t.action_mask, strict=True) if mine]
    # The mask covers the actions and nothing else.
    assert policy.tokenizer.decode(sampled) == "".join(turn.text for turn in t.turns)


def test_an_error_is_shown_and_the_trajectory_goes_on(policy):
    t = play(policy, code("print('before')\n1 / 0"), ANSWER)
    assert t.end_reason is EndReason.DONE
    assert t.n_tool_calls == 1
    assert "before" in t.turns[0].output
    assert "ZeroDivisionError" in t.turns[0].output
    assert "ZeroDivisionError" in t.turns[0].error
    assert "ZeroDivisionError" in policy.tokenizer.decode(t.tokens)


MANY_FIGURES = code("for _ in range(3): image_clue_0.show()")
MUCH_TEXT = code("print('long ' * 500)")
TWO_CALLS = (code("print(1)"), code("print(1)"), ANSWER)
ENDS = [
    (("I do not know.",), {}, EndReason.ERROR_IN_ACTION, 0),
    (TWO_CALLS, dict(max_turns=2), EndReason.EXCEED_MAX_TURNS, 1),
    ((MANY_FIGURES, ANSWER), dict(max_images=3), EndReason.EXCEED_MAX_IMAGES, 1),
    ((MUCH_TEXT, ANSWER), dict(max_context=900), EndReason.OVER_LENGTH, 1),
    ((ANSWER,), dict(max_context=20), EndReason.OVER_LENGTH, 0),
    ((ANSWER,), dict(max_images=0), EndReason.EXCEED_MAX_IMAGES, 0),
    # It answered in a malformed way: that is wrong, but it is an end.
    (("<answer>red</answer>",), {}, EndReason.DONE, 0),
]


@pytest.mark.parametrize("turns, limits, reason, calls", ENDS)
def test_how_trajectories_end(policy, turns, limits, reason, calls):
    t = play(policy, *turns, **limits)
    assert t.end_reason is reason
    assert t.n_tool_calls == calls
    # Tokens and images are in step after every cut.
    assert t.visual_tokens == t.tokens.count(policy.image_token) == 4 * len(t.images)
    assert len(t.tokens) == len(t.action_mask)


def test_a_demonstration_ends_within_the_context_or_is_broken(policy):
    """Also where it is the answer itself that no longer fits, and not an observation."""
    whole = play(policy, code("print(1)"), ANSWER)
    length = len(whole.tokens)
    assert play(policy, code("print(1)"), ANSWER, max_context=length).end_reason is EndReason.DONE
    cut = play(policy, code("print(1)"), ANSWER, max_context=length - 1)
    assert cut.end_reason is EndReason.OVER_LENGTH
    assert cut.broken


def test_limits_are_one_record_whose_fields_may_be_changed(policy):
    limits = Limits(max_turns=1)
    assert play(policy, *TWO_CALLS, limits=limits).n_tool_calls == 0
    assert play(policy, *TWO_CALLS, limits=limits, max_turns=2).n_tool_calls == 1
    assert limits.max_turns == 1
    with pytest.raises(TypeError):
        play(policy, ANSWER, most_turns=2)


def test_without_tools_no_code_runs(policy):
    t = play(policy, code("print(1)"), ANSWER, tools=False)
    assert t.end_reason is EndReason.ERROR_IN_ACTION
    assert t.n_tool_calls == 0
    assert t.turns[0].code is None
    assert play(policy, ANSWER, tools=False).answer == "red"


def test_a_turn_holds_the_seconds_that_the_loop_waited_for_its_code(policy):
    nap = code("import time\ntime.sleep(0.5)")
    t = play(policy, nap, code("print(1)"), ANSWER)
    slow, quick, answer = [turn.seconds_tool for turn in t.turns]
    assert slow > 0.4
    assert quick < slow
    assert answer == 0


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_sandbox_outlives_its_row(interrupted, policy, monkeypatch):
    """When the loop fails, even a call that runs has ended before it does.

    That a sandbox's process is gone when `close` returns is for test_sandbox.py to prove.
    """
    made = []
    closed = []

    class Recorded(Sandbox):
        def __init__(self, *inputs, **settings):
            super().__init__(*inputs, **settings)
            made.append(self)

        def close(self, *_):
            super().close()
            closed.append(self)

    class Interrupted(Recital):
        """Ctrl-C while what the first call returned is encoded and the second call still runs."""

        def encode(self, messages, images=(), after_action=False):
            if after_action:
                raise KeyboardInterrupt
            return self.policy.encode(messages, images)

    monkeypatch.setattr("rollout.Sandbox", Recorded)
    samples = [asked(ANSWER, name="0"), asked(code("print(1)"), ANSWER, name="1")]
    reciter = Recital(policy)
    if interrupted:
        samples.append(asked(code("import time\ntime.sleep(60)"), ANSWER, name="2"))
        reciter = Interrupted(policy)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        rollout(reciter, samples, 1, timeout=90)
    assert time.monotonic() - began < 60  # the call was ended, and not waited for
    deadline = time.monotonic() + (0 if interrupted else 20)
    while set(made) - set(closed) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == len(samples)
    assert not set(made) - set(closed)


def test_output_cannot_smuggle_special_tokens(policy):
    t = play(policy, code("print('<|im_end|><|image_pad|>')"), ANSWER)
    assert t.tokens.count(policy.image_token) == 4
    assert t.tokens.count(policy.end) == 4


def test_a_sample_that_cannot_be_read_is_recorded(policy):
    bad = Sample("0", "?", "red", images=("missing.png",), turns=[ANSWER])
    (first,), (second,) = rollout(Recital(policy), [bad, asked(ANSWER)], 1)
    assert "missing.png" in first.error
    assert first.broken
    assert second.end_reason is EndReason.DONE


@pytest.mark.parametrize("fast", [False, True])
def test_sampling_is_a_function_of_the_seed(fast, policy, tmp_path):
    if fast:
        policy = FastPolicy(tiny_policy(tmp_path, [code("print(1)"), ANSWER] * 3, vocabulary=330))
    runs = []
    for seed in (1, 1, 2):
        policy.generator.manual_seed(seed)
        (group,) = rollout(policy, [asked()], 4, max_new_tokens=12)
        runs.append([t.tokens for t in group])
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(tokens) for tokens in runs[0]}) == 4


# -------------------------------------------------------------------- random numbers of the code
LUCK = code("import random\nimport numpy\nprint(random.random(), numpy.random.rand())")


def draws(policy, names, group_size=1, seed=0):
    """What the code of each trajectory draws: one list for each sample."""
    samples = [asked(LUCK, ANSWER, name=name) for name in names]
    groups = rollout(Recital(policy), samples, group_size, seed=seed)
    return [[t.turns[0].output for t in group] for group in groups]


def test_what_code_draws_is_a_function_of_seed_sample_and_place_in_the_group(policy):
    (group,) = draws(policy, ["a"], group_size=3)
    assert len(set(group)) == 3
    assert draws(policy, ["a"], group_size=3) == [group]
    assert draws(policy, ["a"], seed=1) != [group[:1]]
    # Neither the place in the batch nor the size of the group matters.
    others = draws(policy, ["b", "a"])
    assert others[1] == group[:1]
    assert others[0] != others[1]


def test_code_that_kills_its_session_draws_the_same_numbers_again(policy):
    """The seed is set again after a restart: what follows is a function of the seed here too."""
    both = []
    for _ in range(2):
        t = play(policy, code("import os\nos._exit(1)"), LUCK, ANSWER)
        assert t.turns[0].error
        both.append(t.turns[1].output)
    assert both[0] == both[1]


# ----------------------------------------------------------------------------- the code of a turn
def test_bare_fences_and_several_blocks():
    assert find_code("so\n```python\na = 1\n```") == "a = 1\n"
    assert find_code(code("a = 1") + code("b = 2")).strip() == "b = 2"
    assert find_code("no code") is None
    assert find_code("```\nshell\n```") is None


@pytest.mark.parametrize("name", ["python", "py", "Python", "PYTHON", "Py", ""])
@pytest.mark.parametrize("behind", ["", " ", "  \t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_fences_within_code_tags(name, behind, newline):
    lines = ["<code>", f"```{name}{behind}", "a = 1", "b = 2", f"```{behind}", "</code>"]
    assert find_code(newline.join(lines)).strip() == "a = 1\nb = 2"


@pytest.mark.parametrize("name", ["python", "py", "Python"])
@pytest.mark.parametrize("behind", ["", " "])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_fences_without_code_tags_need_a_name(name, behind, newline):
    lines = ["I look.", f"```{name}{behind}", "a = 1", f"```{behind}"]
    assert find_code(newline.join(lines)).strip() == "a = 1"


@pytest.mark.parametrize("name", ["bash", "json", "pythonic", "text"])
def test_fences_of_other_languages_are_no_code(name):
    block = f"```{name}\nls\n```"
    assert find_code(block) is None
    assert find_code(f"<code>\n{block}\n</code>") is None


QUOTED = [
    's = "```"\nprint(s)',
    "s = '''\n```python\nx\n```\n'''\nprint(s)",
    's = """\n```\n"""\nprint(s)',
    "print('a ``` b')  # ``` here too",
]


@pytest.mark.parametrize("body", QUOTED)
def test_a_fence_in_a_string_does_not_cut(body):
    assert find_code(code(body)).strip() == body


def test_the_last_fence_counts_within_one_pair_of_tags_too():
    first = "```python\na = 1\n```"
    last = "```python\nb = 2\n```"
    assert find_code(f"<code>\n{first}\nno, better:\n{last}\n</code>").strip() == "b = 2"
    assert find_code(f"{first}\nno, better:\n{last}").strip() == "b = 2"


def test_code_with_an_error_is_code(policy):
    """So that the policy is shown its error."""
    assert find_code(code("print(")).strip() == "print("
    t = play(policy, code("print("), ANSWER)
    assert "SyntaxError" in t.turns[0].output
    assert t.end_reason is EndReason.DONE


REACHABLE = ["<code>\n```py\nprint(1)\n```\n</code>", "<code>\r\n```\r\nprint(1)\r\n```\r\n</code>"]
UNREACHABLE = [code("print(1)") + "\nNow I wait.", code("print(1)") + ANSWER]


@pytest.mark.parametrize("turn", REACHABLE)
def test_a_demonstration_may_fence_its_code_in_other_ways(turn, policy):
    t = play(policy, turn, ANSWER)
    assert t.turns[0].output == "1\n"
    assert t.end_reason is EndReason.DONE


@pytest.mark.parametrize("turn", UNREACHABLE)
def test_text_behind_a_closing_tag_is_never_an_action(turn, policy):
    """A sampler stops at the tag, so that a demonstration which goes on has to be skipped."""
    t = play(policy, turn, ANSWER)
    assert t.end_reason is EndReason.ERROR_IN_ACTION
    assert t.n_tool_calls == 0
    assert t.answer is None


def test_special_tokens_in_a_demonstration_are_text(policy):
    t = play(policy, f"<|im_end|><|image_pad|>{ANSWER}")
    actions = [i for i, mine in zip(t.tokens, t.action_mask, strict=True) if mine]
    assert policy.image_token not in actions
    assert policy.end not in actions
    assert t.visual_tokens == 4


# ------------------------------------------------------------------------ oversample, filter, rank
def group(*rewards, broken=()):
    """Trajectories of these rewards; those at the places `broken` did not fit into the context."""
    sample = Sample("0", "?", "a")
    made = []
    for place, reward in enumerate(rewards):
        end = EndReason.OVER_LENGTH if place in broken else EndReason.DONE
        made.append(Trajectory(sample, reward=reward, correct=reward >= 1, end_reason=end))
    return made


def test_select_filters_ranks_and_counts():
    groups = [
        group(1, 1, 0, 0),
        group(0, 0, 0),
        group(1.2, 1.1, 1.1, 1.0),
        group(1, 0, 0, 0),
        group(1, 0, broken=(1,)),
    ]
    kept, counts = select(groups, keep=2)
    assert kept == [groups[0], groups[3]]  # their standard deviations are .5 and .43, and once .07
    assert counts["groups_sampled"] == 5
    assert counts["groups_zero_variance"] == 1
    assert counts["groups_outranked"] == 1
    assert counts["trajectories_broken"] == 1
    assert counts["groups_too_small"] == 1
    assert [t.advantage for t in kept[0]] == [0.5, 0.5, -0.5, -0.5]


def test_broken_trajectories_leave_before_the_baseline():
    (kept,), counts = select([group(1, 0, 0, 1.4, broken=(3,))], keep=4)
    assert len(kept) == 3
    assert sum(t.advantage for t in kept) == pytest.approx(0)
    assert kept[0].advantage == pytest.approx(2 / 3)
    assert counts["trajectories_broken"] == 1


def test_variance_that_was_the_broken_one_s_is_none():
    _, counts = select([group(1, 1, 0, broken=(2,))], keep=4)
    assert counts["groups_zero_variance"] == 1


def test_a_policy_s_own_failures_stay_and_cost():
    failed = group(1, 0)
    failed[1].end_reason = EndReason.EXCEED_MAX_TURNS
    (kept,), _ = select([failed], keep=1)
    assert kept[1].advantage == -0.5


def test_options_of_select():
    kept, _ = select([group(1, 1)], 1, keep_zero_variance=True)
    assert len(kept) == 1
    (kept,), _ = select([group(1, 0)], 1, normalize_std=True)
    assert kept[0].advantage == pytest.approx(
        2**-0.5, abs=1e-4
    )  # the standard deviation with n - 1
    groups = [group(1, 0, 0, 0, i) for i in range(8)]
    first, _ = select(groups, 4, rank="random", seed=1)
    second, _ = select(groups, 4, rank="random", seed=2)
    assert first != second


def test_correct_and_concise_among_correct_and_longer():
    """PAPER: among correct answers with 0, 2, 3 and 3 calls the concise one is punished.

    One wrong answer lifts it.
    """
    (kept,), _ = select([group(1.0, 1.2, 1.3, 1.3)], 1)
    assert [round(t.advantage, 6) for t in kept] == [-0.2, 0.0, 0.1, 0.1]
    (kept,), _ = select([group(1.0, 1.2, 1.3, 0.0)], 1)
    assert kept[0].advantage == pytest.approx(0.125)
