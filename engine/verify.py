r"""The rule that judges an answer: True, False only where it is sure, None where it cannot tell.

Reinforcement finds whatever a verifier accepts for a wrong reason. So the rules are strict, and
where one is in doubt the verdict is None: then the judge is asked, and without a judge the answer
counts as wrong. From cheap to dear:

1. The same text, once typography, markup and LaTeX for the same thing have been made alike.
2. Multiple choice: the letters that an answer names (engine/wording.py).
3. Numbers with known units (engine/quantity.py).
4. Other mathematics is compared by engine/algebra.py, for a whole batch at once.

What a reader may rely on: only the fourth takes longer than milliseconds, and it is bounded.
"""

import importlib.util
import re
from fractions import Fraction

from data import DataError, Sample
from engine import algebra
from engine.quantity import (
    Quantity,
    asked,
    close,
    mean_relative_accuracy,
    measure,
    near,
    quantity,
    value,
)
from engine.wording import choices, named, tidy, words

__all__ = ["MRA_SOURCES", "choices", "mean_relative_accuracy", "value", "verify", "verify_batch"]

MAX_ANSWER = 1000  # characters; an answer this long is malformed (PAPER)
MRA_SOURCES = "vsi_numerical", "_rule_verifiable"  # endings of data_source: numbers go by MRA
PLACE = re.compile(  # the place as what is said, not as a mark of something else
    r"(?:.* (?:is|are) )?(?:(?:on|to|at) )?(left|right|above|below|behind|under)"
    r"(?: hand)?(?: side)?(?: of .*)?"
)
UNLISTED = re.compile(r"[(\[]?([A-H])(?:[)\].]+ ?([^A-Za-z]*))?")  # "C. 30", with no options listed
EITHER = re.compile(r"\b(?:or|either)\b|/")
SCALE = re.compile(r"(?i)\b(?:hundred|thousand|[mbtr]+illion)s?\b")  # "How much, in billions?"
AMBIGUOUS = re.compile(r"0\d")  # an id or a time
MATHS = re.compile(  # digits, operators, brackets, LaTeX commands, names of one or two letters
    r"(?:\\[a-zA-Z]+|\\[{}|]|(?<![a-zA-Z])[a-zA-Z]{1,2}(?![a-zA-Z])|[\d\s+*/^_=<>()\[\]{}|,.!-])+"
)
NO_MATHS = re.compile(
    r"""
    ^(?! [+-]? [\d,]* \.? \d+ $) [\d\s.,/-]* $     # a range, a date, a list
    | ^[^(\[\\].*,                                # a list without brackets: is its order free?
    | \d\ +[\da-zA-Z](?![a-zA-Z])                 # "1 2", "5 m"
    | (?<![\\a-zA-Z])[a-zA-Z]\ +[a-zA-Z]
    | [A-Z]{2} | \d[A-Z] | [a-zA-Z]\d             # ids and formulas: the order of letters counts
    | ^[a-zA-Z]{1,2}$ | ^[a-zA-Z][a-zA-Z]          # words
    | (?<![a-zA-Z\\])(?:is|or|no|to|in|of|at|on|by|it|an|am|pm|st|nd|rd|th)(?![a-zA-Z])
    | (?<![a-zA-Z\\])(?:[ckm]m|kg|m[gls])(?![a-zA-Z])
    | \d\^\{?\d+\^                                # a tower of powers
    | \\(?:sin|cos|tan)\ *[{(]?\d | \\log(?!_)    # of degrees? to which base?
    """,
    re.VERBOSE,
)


def _compare(answer, reference, question=""):
    """True, False, None, or what the algebra has to compare: (answer, reference)."""
    pair = tidy(answer), tidy(reference)
    if words(answer) == words(reference) != "":
        return True
    if AMBIGUOUS.match(pair[1]):
        return None
    quantities = [quantity(text, question) for text in pair]
    if None not in quantities:
        said, wanted = quantities
        verdict = measure(said, asked(wanted, question) if said.kind else wanted)
        return verdict or None if SCALE.search(question) else verdict
    places = [PLACE.fullmatch(words(text)) for text in pair]
    if None not in places and words(answer) == places[0][1]:
        return True if places[0][1] == places[1][1] else None
    if not all(MATHS.fullmatch(text) and not NO_MATHS.search(text) for text in pair):
        return None
    lists = {text[0] + text[-1] for text in pair if "," in text}
    return pair if len(lists) < 2 else None


def _same(answer, option):
    return _compare(answer, option) is True


def _by_rule(answer, sample):
    """As `verify`; where the algebra has to tell, what it must compare: (answer, reference)."""
    if not answer or len(answer) >= MAX_ANSWER:
        return False
    target = quantity(sample.answer)
    if target and sample.data_source.endswith(MRA_SOURCES):
        return near(answer, asked(target, sample.question))
    options = choices(sample.question)
    letter = UNLISTED.fullmatch(sample.answer.strip())
    if letter and not options:  # they stand in the picture
        options = dict.fromkeys("ABCDEFGHIJ", "") | {letter[1]: letter[2] or ""}
    right = named(sample.answer, options, _same)
    if not right:
        return _compare(answer, sample.answer, sample.question)
    letters = named(answer, options, _same)
    if letters is None or len(right) > 1 and (EITHER.search(answer) or not letters):
        return None
    if letters:
        return letters == right
    return _compare(answer, options[min(right)], sample.question)


def verify_batch(pairs: list[tuple[str | None, Sample]]) -> list[bool | None]:
    """`verify` for each (answer, sample); what is asked several times is decided once."""
    verdicts = {}
    keys = []
    for answer, sample in pairs:
        key = answer, sample.question, sample.answer, sample.data_source
        keys.append(key)
        if key not in verdicts:
            verdicts[key] = _by_rule(answer, sample)
    unsolved = [verdict for verdict in set(verdicts.values()) if isinstance(verdict, tuple)]
    if not unsolved:
        return [verdicts[key] for key in keys]
    if unsolved and importlib.util.find_spec("math_verify") is None:
        raise DataError("an answer in mathematics needs math-verify: pip install math-verify")
    solved = dict(zip(unsolved, map(_solved, unsolved, algebra.equal(unsolved)), strict=True))
    return [solved.get(verdicts[key], verdicts[key]) for key in keys]


def _solved(pair, reply):
    """The verdict for what the algebra replied: numbers are as close here as elsewhere."""
    if not isinstance(reply, list):
        return reply
    return close(*[quantity(x) or Quantity(Fraction(n)) for x, n in zip(pair, reply, strict=True)])


def verify(answer: str | None, sample: Sample) -> bool | None:
    """Does the answer, as extracted, mean the sample's? True, False, or None: a rule cannot tell.

    Raises DataError where math-verify is needed and not installed.
    """
    return verify_batch([(answer, sample)])[0]
