r"""The rule that judges an answer: True, False only where it is sure, None where it cannot tell.

Reinforcement finds whatever a verifier accepts for a wrong reason. So the rules are strict, and
where one is in doubt the verdict is None: then the judge is asked, and without a judge the answer
counts as wrong. From cheap to dear:

1. The same text, once typography, markup and LaTeX for the same thing have been made alike
   (engine/wording.py).
2. Multiple choice: the letters that an answer names. A letter in a sentence is a claim only where
   nothing speaks against it: "not B", "A to D" and "anything but B" name nothing, "B or C" names
   two, and "The answer is B. Note that A is a distractor." names B.
3. Numbers with known units (engine/quantity.py).
4. Other mathematics is compared by engine/algebra.py, for a whole batch at once.

What a reader may rely on: only the fourth takes longer than milliseconds, and it is bounded.
"""

import functools
import importlib.util
import re
from fractions import Fraction

from data import DataError, Sample
from engine import algebra
from engine.quantity import (  # noqa: F401, some are only to be found here, too
    Quantity,
    asked,
    close,
    mean_relative_accuracy,
    measure,
    near,
    quantity,
    value,
)
from engine.wording import AGAINST, choices, tidy, words

MAX_ANSWER = 1000  # characters; an answer this long is malformed (PAPER)
MRA_SOURCES = "vsi_numerical", "_rule_verifiable"  # endings of data_source: numbers go by MRA
# The place as what is said, not as a mark of something else.
PLACE = r"""(?x)(?:.*\ (?:is|are)\ )?(?:(?:on|to|at)\ )?(left|right|above|below|behind|under)
    (?:\ hand)?(?:\ side)?(?:\ of\ .*)?"""
UNLISTED = re.compile(r"[(\[]?([A-H])(?:[)\].]+ ?|$)([^A-Za-z]*)")  # "C. 30", with none listed
LETTER = re.compile(  # a capital by itself, but not the article in "A dog", the pronoun in "I see"
    r"(?<![a-zA-Z0-9_'*^+=<-])[(\[]?([B-HJ-Z]|[AI](?! (?!or\b|and\b|is\b|to\b)[a-z]))"
    r"[)\].:、]*(?![a-zA-Z0-9_'*^+=-])"
    r"|(?:[(\[]|(?i:option|answer|choice) |^)([a-z])(?:[)\].:、]+|$)"
)
FILLER = r"""(?x)(?i:\b(?:so|thus|hence|therefore|i|think|believe|choose|pick|select|would|should|
    must|be|say|go|with|it|is|it's|are|the|an|my|final|correct|best|right|answers?|options?|
    choices?|letters?|ones?|both|either|or|and)\b)
    |\ba(?=\ \w)|[\s.,;:/&()\[\]"'!、]|答案|选项?|择|是|为"""
MORE = rf"{AGAINST.pattern}|\b(?:and|all|any)\b"  # "black and white" is not white
CLAIM = r"(?i)(final |最终)?(?:\b(?:answer|choice|option)(?: is|:)|答案[是为:])\s*"
HEAD = re.compile(r"(?<=[.!;。])\s+|,? (?:because|since|as) |\n")
MATHS = re.compile(
    r"""(?x)
    (?!
        (?! [+-]? [\d,]* \.? \d+ $) [\d\s.,/-]* $     # a range, a date, a list
        | [^(\[\\].*,                                 # a list without brackets: is its order free?
        | [a-zA-Z]{1,2}$ | [a-zA-Z][a-zA-Z]           # words
        | .* (?:
            \d\ +[\da-zA-Z](?![a-zA-Z])               # "1 2", "5 m"
            | (?<![\\a-zA-Z])[a-zA-Z]\ +[a-zA-Z]
            | [A-Z]{2} | \d[A-Z] | [a-zA-Z]\d         # ids, formulas: the order counts
            | (?<![a-zA-Z\\])(?:is|or|no|to|in|of|at|on|by|it|an|am|pm|st|nd|rd|th)(?![a-zA-Z])
            | (?<![a-zA-Z\\])(?:[ckm]m|kg|m[gls])(?![a-zA-Z])
            | \d\^\{?\d+\^                            # a tower of powers
            | \\(?:sin|cos|tan)\ *[{(]?\d | \\log(?!_)   # of degrees? to which base?
        )
    )
    # Digits, operators, brackets, LaTeX commands, names of one or two letters.
    (?:\\[a-zA-Z]+|\\[{}|]|(?<![a-zA-Z])[a-zA-Z]{1,2}(?![a-zA-Z])|[\d\s+*/^_=<>()\[\]{}|,.!-])+
    """
)


def _compare(answer, reference, question=""):
    """True, False, None, or what the algebra has to compare: (answer, reference)."""
    pair = tidy(answer), tidy(reference)
    if words(answer) == words(reference) != "":
        return True
    if re.match(r"0\d", pair[1]):  # an id or a time
        return None
    said = quantity(answer, question)
    wanted = asked(reference, question)
    if said and wanted:
        verdict = measure(said, wanted)
        in_billions = re.search(r"(?i)\b(?:hundred|thousand|[mbtr]+illion)s?\b", question)
        return None if in_billions and not verdict else verdict
    places = [re.fullmatch(PLACE, words(text)) for text in pair]
    if None not in places and words(answer).removesuffix(" side") == places[0][1]:
        return places[0][1] == places[1][1] or None
    if not all(map(MATHS.fullmatch, pair)):
        return None
    brackets = {text[0] + text[-1] for text in pair if "," in text}
    return pair if len(brackets) < 2 else None


def _named(text, options):
    """The letters that `text` names; the empty set if none; None if it is unclear.

    What counts is the last thing that is called the answer, or else the beginning; what follows it
    may only give reasons.
    """
    text = tidy(text)
    claims = list(re.finditer(CLAIM, text))
    start = claims[-1].end() if claims else 0
    before = HEAD.split(text[:start])[-1]
    if AGAINST.search(before) or LETTER.search(before):
        return None
    if len(claims) > 1 and not claims[-1][1]:
        return None
    letters = _plainly(text[start:], options)
    head, *reasons = HEAD.split(text[start:], maxsplit=1)
    if letters is not None or not reasons:
        return letters
    letters = _plainly(head, options)
    others = _plainly(reasons[0], options)
    agree = others in (set(), letters) or others is None and not AGAINST.search(reasons[0])
    return letters if agree else None


def _plainly(text, options):
    """The letters of a phrase that says nothing else, as `_named`."""

    def mark(match):
        letter = match[match.lastindex].upper()
        return f" §{letter} " if letter in options else match[0]

    marked = LETTER.sub(mark, text)
    alone = re.fullmatch(r"[\s.:]*§(.)[\s.:]*", marked)
    if alone:
        return {alone[1]}
    equal = {x for x, option in options.items() if option and _compare(text, option) is True}
    if equal:
        return equal
    phrase = words(marked)
    certain = re.match(r"[(\[]?[A-Z][)\].:、]", text) is not None
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        wording = words(option)
        said = rf"(?<![\w.+/^*=§-]){re.escape(wording)}(?![\w+/^*=-]|[.,]\d)"
        if wording and re.search(said, phrase):
            phrase = re.sub(said, f" §{letter} ", phrase)
            certain = True
    found = set(re.findall("§(.)", phrase))
    rest = re.sub(FILLER, "", re.sub("§.", " ", phrase))
    clear = not rest or len(found) == 1 and certain and not re.search(MORE, phrase)
    return found if clear or not found else None


@functools.lru_cache(4096)
def _by_rule(answer, question, reference, source):
    """As `verify`; where the algebra has to tell, what it must compare: (answer, reference)."""
    if not answer or len(answer) >= MAX_ANSWER:
        return False
    target = asked(reference, question)
    if target and source.endswith(MRA_SOURCES):
        return near(answer, target)
    options = choices(question)
    said = UNLISTED.fullmatch(answer.strip(" ."))
    letter = UNLISTED.fullmatch(reference.strip(" ."))
    if letter and said:
        texts = {letter[2], said[2]}
        if len(texts) == 2 and "" not in texts:  # "C. 30" is not "C. 70"
            return None
    if letter and not options:  # they stand in the picture
        options = dict.fromkeys("ABCDEFGHIJ", "") | {letter[1]: letter[2]}
    right = _named(reference, options)
    if not right:
        return _compare(answer, reference, question)
    letters = _named(answer, options)
    several = len(right) > 1
    either = re.search(r"\b(?:or|either)\b|/", answer)
    if letters and not (several and either):
        return letters == right
    if letters is None or several:
        return None
    return _compare(answer, options[min(right)], question)


def verify_batch(pairs: list[tuple[str | None, Sample]]) -> list[bool | None]:
    """`verify` for each (answer, sample); what is asked several times is decided once."""
    verdicts = [_by_rule(answer, x.question, x.answer, x.data_source) for answer, x in pairs]
    unsolved = list({verdict for verdict in verdicts if isinstance(verdict, tuple)})
    if not unsolved:
        return verdicts
    if importlib.util.find_spec("math_verify") is None:
        raise DataError("an answer in mathematics needs math-verify: pip install math-verify")
    solved = dict(zip(unsolved, map(_solved, unsolved, algebra.equal(unsolved)), strict=True))
    return [solved.get(verdict, verdict) for verdict in verdicts]


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
