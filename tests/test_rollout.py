"""The agent loop's protocol and limits, and the choice of what to train on."""
import re
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Sample
from model import tiny_policy
from rollout import EndReason, Script, Trajectory, find_code, rollout, select
from sandbox import Sandbox

ANSWER = "<answer>\n\\boxed{red}\n</answer>"


def code(body):
    return f"<code>\n```python\n{body}\n```\n</code>"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("tiny"), [code("print(1)"), ANSWER] * 3, vocabulary=330)


def play(policy, *turns, **limits):
    """One trajectory that says these turns, with its code really run."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    sample = Sample("0", "Which colour?", "red", images=(picture,), turns=list(turns))
    return rollout(Script(policy, [sample]), [sample], 1, **limits)[0][0]


def test_a_new_trajectory_needs_only_its_sample():
    t = Trajectory(Sample("0", "?", "a"))
    assert t.end_reason is EndReason.ONGOING and t.tokens == [] and t.reward == 0 and not t.broken


def test_turns_tools_and_answer(policy):
    t = play(policy, code("x = 41\nimage_clue_0.crop((0, 0, 32, 32)).show()"), code("print(x + 1, image_clue_1.size)"), ANSWER)
    assert (t.end_reason, t.answer, t.n_tool_calls, len(t.turns)) == (EndReason.DONE, "red", 2, 3)
    assert t.turns[1].output.strip() == "42 (32, 32)"           # the session lives on, and holds what was shown
    text = policy.tokenizer.decode(t.tokens)
    assert "<tool_response>\n<interpreter>\nText Result:\n" in text and "<image_clue_1><|vision_start|>" in text
    assert len(t.images) == 2 and t.visual_tokens == t.tokens.count(policy.image_token) == 8
    said = policy.tokenizer.decode([i for i, m in zip(t.tokens, t.action_mask) if m])
    assert said == "".join(turn.text for turn in t.turns)       # the mask covers the actions and nothing else


def test_an_error_is_shown_and_the_trajectory_goes_on(policy):
    t = play(policy, code("print('before')\n1 / 0"), ANSWER)
    assert t.end_reason is EndReason.DONE and t.n_tool_calls == 1
    assert "before" in t.turns[0].output and "ZeroDivisionError" in t.turns[0].output
    assert "ZeroDivisionError" in policy.tokenizer.decode(t.tokens)


@pytest.mark.parametrize("turns, limits, reason, calls", [
    (("I do not know.",), {}, EndReason.ERROR_IN_ACTION, 0),
    ((code("print(1)"),) * 2 + (ANSWER,), dict(max_turns=2), EndReason.EXCEED_MAX_TURNS, 1),
    ((code("for _ in range(3): image_clue_0.show()"), ANSWER), dict(max_images=3), EndReason.EXCEED_MAX_IMAGES, 1),
    ((code("print('long ' * 500)"), ANSWER), dict(max_context=900), EndReason.OVER_LENGTH, 1),
    ((ANSWER,), dict(max_context=20), EndReason.OVER_LENGTH, 0),
    (("<answer>red</answer>",), {}, EndReason.DONE, 0),         # answered, in a malformed way: wrong, but an end
])
def test_how_trajectories_end(policy, turns, limits, reason, calls):
    t = play(policy, *turns, **limits)
    assert (t.end_reason, t.n_tool_calls) == (reason, calls)
    assert t.visual_tokens == t.tokens.count(policy.image_token) == 4 * len(t.images)       # in step after every cut
    assert len(t.tokens) == len(t.action_mask)


def test_without_tools_no_code_runs(policy):
    t = play(policy, code("print(1)"), ANSWER, tools=False)
    assert (t.end_reason, t.n_tool_calls, t.turns[0].code) == (EndReason.ERROR_IN_ACTION, 0, None)
    assert play(policy, ANSWER, tools=False).answer == "red"


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_sandbox_outlives_its_row(interrupted, policy, monkeypatch):
    """When the loop fails, even a call that runs has ended before it does."""
    made, begun = [], time.monotonic()

    class Recorded(Sandbox):
        def __init__(self, *inputs, **settings):
            super().__init__(*inputs, **settings)
            fields = Path(f"/proc/self/fdinfo/{self._process}").read_text()
            made.append(Path("/proc", re.search(r"^Pid:\s+(\d+)", fields, re.M)[1]))
    monkeypatch.setattr("rollout.Sandbox", Recorded)

    def fail(t):
        raise KeyboardInterrupt
    turns = [(ANSWER,), (code("print(1)"), ANSWER), (code("import time; time.sleep(60)"), ANSWER)][:2 + interrupted]
    samples = [Sample(str(i), "?", "red", images=(Image.new("RGB", (60, 60)),), turns=list(said)) for i, said in enumerate(turns)]
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        rollout(Script(policy, samples), samples, 1, timeout=90, on_turn=fail if interrupted else None)
    assert time.monotonic() - begun < 60                        # the call was ended, not waited for
    deadline = time.monotonic() + (0 if interrupted else 20)
    while any(process.exists() for process in made) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made and not any(process.exists() for process in made)


def test_bare_fences_and_several_blocks():
    assert find_code("so\n```python\na = 1\n```") == "a = 1\n"
    assert find_code(code("a = 1") + code("b = 2")).strip() == "b = 2"
    assert find_code("no code") is None and find_code("```\nshell\n```") is None


def test_output_cannot_smuggle_special_tokens(policy):
    t = play(policy, code("print('<|im_end|><|image_pad|>')"), ANSWER)
    assert t.tokens.count(policy.image_token) == 4 and t.tokens.count(policy.end) == 4


def test_a_sample_that_cannot_be_read_is_recorded(policy):
    bad = Sample("0", "?", "red", images=("missing.png",), turns=[ANSWER])
    good = Sample("1", "?", "red", images=(Image.new("RGB", (60, 60)),), turns=[ANSWER])
    (first,), (second,) = rollout(Script(policy, [good]), [bad, good], 1)
    assert "missing.png" in first.error and first.broken and second.end_reason is EndReason.DONE


def test_sampling_is_a_function_of_the_seed(policy):
    sample = Sample("0", "?", "red", images=(Image.new("RGB", (60, 60)),))
    runs = []
    for seed in (1, 1, 2):
        policy.generator.manual_seed(seed)
        runs.append([t.tokens for t in rollout(policy, [sample], 4, max_new_tokens=12)[0]])
    assert runs[0] == runs[1] != runs[2] and len({tuple(t) for t in runs[0]}) == 4


def group(*rewards, broken=()):
    sample, result = Sample("0", "?", "a"), []
    for i, r in enumerate(rewards):
        result.append(Trajectory(sample, reward=r, correct=r >= 1, end_reason=EndReason.OVER_LENGTH if i in broken else EndReason.DONE))
    return result


def test_select_filters_ranks_and_counts():
    groups = [group(1, 1, 0, 0), group(0, 0, 0), group(1.2, 1.1, 1.1, 1.0), group(1, 0, 0, 0), group(1, 0, broken=(1,))]
    kept, counts = select(groups, keep=2)
    assert kept == [groups[0], groups[3]]                       # by std: .5, .43, .07
    assert counts["groups_sampled"] == 5 and counts["groups_zero_variance"] == 1 and counts["groups_outranked"] == 1
    assert counts["trajectories_broken"] == 1 and counts["groups_too_small"] == 1
    assert [t.advantage for t in kept[0]] == [0.5, 0.5, -0.5, -0.5]


def test_broken_trajectories_leave_before_the_baseline():
    (kept,), counts = select([group(1, 0, 0, 1.4, broken=(3,))], keep=4)
    assert len(kept) == 3 and sum(t.advantage for t in kept) == pytest.approx(0) and kept[0].advantage == pytest.approx(2 / 3)
    assert counts["trajectories_broken"] == 1
    assert select([group(1, 1, 0, broken=(2,))], keep=4)[1]["groups_zero_variance"] == 1    # its variance was the broken one's


def test_a_policy_s_own_failures_stay_and_cost():
    failed = group(1, 0)
    failed[1].end_reason = EndReason.EXCEED_MAX_TURNS
    (kept,), _ = select([failed], keep=1)
    assert kept[1].advantage == -0.5


def test_options_of_select():
    assert len(select([group(1, 1)], 1, keep_zero_variance=True)[0]) == 1
    (kept,), _ = select([group(1, 0)], 1, normalize_std=True)
    assert kept[0].advantage == pytest.approx(2 ** -0.5, abs=1e-4)                         # std with n - 1
    groups = [group(1, 0, 0, 0, i) for i in range(8)]
    assert select(groups, 4, rank="random", seed=1)[0] != select(groups, 4, rank="random", seed=2)[0]
    shown = group(1, 0, 0)
    shown[0].images = shown[1].images = [Image.new("RGB", (9, 9))]
    (kept,), counts = select([shown], 1, require_images=True)
    assert kept == shown[:2] and counts["trajectories_imageless"] == 1


def test_correct_and_concise_among_correct_and_longer():
    """PAPER: among correct answers with 0, 2, 3 and 3 calls the concise one is punished; one wrong answer lifts it."""
    (kept,), _ = select([group(1.0, 1.2, 1.3, 1.3)], 1)
    assert [round(t.advantage, 6) for t in kept] == [-0.2, 0.0, 0.1, 0.1]
    (kept,), _ = select([group(1.0, 1.2, 1.3, 0.0)], 1)
    assert kept[0].advantage == pytest.approx(0.125)
