r"""The rule that judges an answer: True, False only where it is sure, None where it cannot tell.

Reinforcement finds whatever a verifier accepts for a wrong reason. So the rules are strict, and
where one is in doubt the verdict is None: then the judge is asked, and without a judge the answer
counts as wrong. From cheap to dear:

1. The same text, once typography, markup and LaTeX for the same thing have been made alike.
2. Multiple choice: the letters that an answer names, by the letter or by the words of an option.
3. Numbers with known units: whole ones are exact, decimals must agree as far as they are written.
4. Other mathematics is compared by engine/algebra.py, for a whole batch at once.

What a reader may rely on: only the fourth takes longer than milliseconds, and it is bounded.
"""

import functools
import importlib.util
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from data import DataError, Sample
from engine import algebra
from engine.wording import AGAINST, choices, named, rewrite, tidy, words

MAX_ANSWER = 1000  # characters; an answer this long is malformed (PAPER)
MRA_SOURCES = "vsi_numerical", "_rule_verifiable"  # endings of data_source: numbers go by MRA

ARITHMETIC = {  # LaTeX -> plain
    r"(?<=\d) *\\frac *\{(\d+)\} *\{(\d+)\}": r" \1/\2",
    r"\\frac *\{([^{}]*)\} *\{([^{}]*)\}": r"((\1)/(\2))",
    r"\\sqrt *\{([^{}]*)\}": r"((\1)^.5)",
    r"\^ *\{([^{}]*)\}": r"^(\1)",
    r"\\pi ?": "π",
}
PYTHON = {  # plain -> what Python computes with floats, where 9^9^9^9 overflows at once
    r"(?<=\d),(?=\d{3}(?!\d))": "",
    r"(?<![\d.])(\d+) (\d+/\d+)": r"(\1+\2)",
    r"\^": "**",
    r"(?<=[\d.)π]) ?(?=[(π])|(?<=[)π]) ?(?=\d)": "*",
    "π": repr(math.pi),
    r"\d+\.?\d*|\.\d+": lambda number: repr(float(number[0])),
}
LITERAL = re.compile(r"[+-]?(?:(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.(\d*))?|\.(\d+))")
RANGE_OR_DATE = re.compile(
    r"[+-]?[\d.,]+(?:/\d+)?%?(?: ?- ?[\d.,]+(?:/\d+)?%?)+|\d+(?:/\d+){2,}|0\d*/\d+|\d+/0\d*"
)
BEFORE_NUMBER = {
    r"(?i)^(?:about|around|approximately|roughly|nearly|[~≈]|\\approx) *": "",
    r"(?i)^an? (?=hundred|thousand|million|billion|dozen)": "1 ",
}
QUANTITY = re.compile(
    r"(?P<money>[$€£¥₹]?) ?(?P<number>[-+*/^().,\dπ ]*[\d).π]) ?"
    r"(?P<scale>(?:(?<=\d)(?:[kKMB]|bn)(?![a-zA-Z])|(?:hundred|dozen|thousand|[mbtr]+illion)\b)?)"
    r" ?(?P<unit>(?:[^\d ](?:.*\S)?)?)"
)
SLASH = re.compile(r"\d+/\d+")
PRODUCT = re.compile(r"\d+[a-zA-Z]")  # "2m" may be two metres
NOUN = re.compile(r"[a-z]{3,}(?: [a-z]{3,})?")
UNIT_ASKED = re.compile(r"(?:\bin |\(in |\(|\bunit:? )((?:square |cubic )?[a-zA-Z/%^2-3]+)")
PLACE = re.compile(  # the place as what is said, not as a mark of something else
    r"(?:.* (?:is|are) )?(?:(?:on|to|at) )?(left|right|above|below|behind|under)"
    r"(?: hand)?(?: side)?(?: of .*)?"
)
UNLISTED = re.compile(r"[(\[]?([A-H])(?:[)\].]+ ?([^A-Za-z]*))?")  # "C. 30", with no options listed
EITHER = re.compile(r"\b(?:or|either)\b|/")
IS = re.compile(r"\b(?:is|are)\b|[=:]")
ONE_NUMBER = re.compile(r"\D*?((-?[\d,]*\.?\d+)(?: ?[^\W\d]+)?)\b\D*")
DATE = re.compile(r"(?i)\b(?:dates?|days?|when|month|birthday|ratio|odds|score|rating)\b")
AMBIGUOUS = re.compile(r"0\d")  # an id or a time
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen"""
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = dict(zip(f"{ONES} {TENS}".split(), [*range(20), *range(20, 100, 10)], strict=True))
NUMBER_WORD = re.compile(
    rf"(?i)\b(?:(?:{TENS.replace(' ', '|')})[- ])?(?:{'|'.join(NUMBERS)})\b(?! ones?\b)"
)
MATHS = re.compile(  # digits, operators, brackets, LaTeX commands, names of one or two letters
    r"(?:\\[a-zA-Z]+|\\[{}|]|(?<![a-zA-Z])[a-zA-Z]{1,2}(?![a-zA-Z])|[\d\s+*/^_=<>()\[\]{}|,.!-])+"
)
NO_MATHS = re.compile(  # what only looks like it, or has two readings
    r"\d +[\da-zA-Z](?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z] +[a-zA-Z]|[A-Z]{2}|[a-zA-Z]\d|\d\^\{?\d+\^"
    r"|^(?![+-]?[\d,]*\.?\d+$)[\d\s.,/-]*$|^[a-zA-Z][a-zA-Z]|^[^(\[\\].*,"
    r"|(?<![a-zA-Z\\])(?:is|or|no|to|in|of|at|on|by|it|an|am|pm|[ckm]m|kg|m[gls])(?![a-zA-Z])"
)
UNIT_TABLE = """
scale 12 dozen
scale 100 hundred
scale 1000 k, K, thousand
scale 1000000 M, million
scale 1000000000 B, bn, billion
scale 1000000000000 trillion
length 0.001 mm, MM, millimeter, millimetre
length 0.01 cm, CM, centimeter, centimetre
length 1 m, meter, metre
length 1000 km, KM, Km, kilometer, kilometre
length 0.0254 in, inch
length 0.3048 ft, foot, feet
length 0.9144 yd, yard
length 1609.344 mi, mile
area 0.0001 cm^2, sq cm, square centimeter, square centimetre
area 1 m^2, m2, sqm, sq m, square meter, square metre
area 1000000 km^2, sq km, square kilometer, square kilometre
area 0.09290304 ft^2, sq ft, sqft, square foot, square feet
volume 0.000001 cm^3, cubic centimeter, cubic centimetre
volume 0.001 L, l, liter, litre
volume 0.000001 mL, ml, milliliter, millilitre
volume 1 m^3, cubic meter, cubic metre
mass 0.000001 mg, milligram
mass 0.001 g, gram
mass 1 kg, KG, Kg, kilogram
mass 0.45359237 lb, pound
mass 0.028349523125 oz, ounce
time 0.001 ms, millisecond
time 1 s, sec, second
time 60 min, minute
time 3600 h, hr, hour
time 86400 day
time 604800 week
month 1 month
month 12 year, yr
speed 1 m/s, meter per second, metre per second
speed 5/18 km/h, kmh, kph, kmph, kilometer per hour, kilometre per hour
speed 0.44704 mph, mile per hour
rate 1 bpm, beats per minute
frequency 1 Hz, hertz
frequency 1000 kHz, kilohertz
celsius 1 degree C, degree Celsius, C, celsius
fahrenheit 1 degree F, degree Fahrenheit, F, fahrenheit
kelvin 1 K, kelvin
angle 0.017453292519943295 degree, deg
angle 1 rad, radian
percent 1/100 %
dollar 1 $, dollar, usd, USD
dollar 1/100 cent
euro 1 €, euro, EUR
pound 1 £, GBP
yen 1 ¥, yen, JPY
rupee 1 ₹, rupee, INR
"""
UNITS = {}  # name -> (what it measures, how many of the base unit)
for _line in UNIT_TABLE.strip().splitlines():
    _kind, _factor, _names = _line.split(maxsplit=2)
    UNITS |= dict.fromkeys(_names.split(", "), (_kind, Fraction(_factor)))


@dataclass(frozen=True)
class Quantity:
    """A number with a unit."""

    value: Fraction  # in the unit
    decimals: int | None = None  # that are written; None: not a decimal, as 1/3, 2√3, 5 million
    kind: str = ""  # what the unit measures
    factor: Fraction = Fraction(1)  # the unit in the base unit of its kind
    doubtful: bool = False  # 2m may be a product and 24/7 no division


@functools.lru_cache(4096)
def _arithmetic(text):
    text = tidy(text)
    for _ in range(4):  # as deep as anybody nests fractions
        text = rewrite(text, ARITHMETIC)
    return text


def value(text: str) -> float | None:
    """The number that plain or LaTeX arithmetic stands for; None for a range (10-11) or a date."""
    text = _arithmetic(text[:400])
    if RANGE_OR_DATE.fullmatch(text):
        return None
    text = rewrite(text, PYTHON)
    if re.search(r"[^\d.e+*/() -]", text):
        return None
    try:
        number = eval(text)  # digits and operators, nothing else
    except (ArithmeticError, SyntaxError, NameError, TypeError, MemoryError, RecursionError):
        return None
    return number if isinstance(number, float) and math.isfinite(number) else None


def _unit(name):
    """(what it measures, factor) of a unit or a scale, also in the plural; None if unknown."""
    singular = re.sub(r"(?<=ch)es\b|(?<=[a-z]{2})s\b(?!$)|(?<=[a-z]{2})s$", "", name)
    for spelling in (name, singular, singular.lower()):
        if spelling in UNITS:
            return UNITS[spelling]
    return None


@functools.lru_cache(4096)
def _quantity(text, question=""):
    """The Quantity that a text is: its unit is a known one, or a noun that the question names."""
    text = rewrite(_arithmetic(text[:200]), BEFORE_NUMBER)
    text = NUMBER_WORD.sub(_digits, text).rstrip(" .")
    found = QUANTITY.fullmatch(text)
    if not found:
        return None
    written = found["number"].replace(" ", "")
    literal = LITERAL.fullmatch(written)
    number = Fraction(written.replace(",", "")) if literal else value(found["number"])
    if number is None:
        return None
    decimals = len(literal[1] or literal[2] or "") if literal else None
    if found["scale"]:
        decimals = None
        number *= _unit(found["scale"])[1]
    unit = found["money"] + found["unit"] or ("rad" if "π" in text else "")
    kind, factor = _unit(unit) or ("unknown", 1)
    if not unit or NOUN.fullmatch(unit) and unit in question.lower():
        kind = ""
    slash = SLASH.fullmatch(text)
    if kind == "unknown" or slash and str(Fraction(text)) != text:  # 12/6 is a date or a ratio
        return None
    improper = slash and (number >= 1 or DATE.search(question))
    doubtful = bool(improper or PRODUCT.fullmatch(text))
    return Quantity(Fraction(number), decimals, kind, factor, doubtful)


def _digits(word):
    return str(sum(NUMBERS[part] for part in re.split("[- ]", word[0].lower())))


def _close(answer, reference):
    """Are two numbers equal as far as they are written? None if they only nearly are."""
    gap = abs(answer.value - reference.value)
    size = abs(reference.value)
    decimals = [x.decimals for x in (answer, reference) if x.decimals is not None]
    computed = len(decimals) < 2 and gap <= 1e-12 * min(size, 10**9)
    if gap == 0 or computed:
        return True
    if decimals == [0, 0] or gap > size / 20:
        return False
    coarser = min(decimals, default=99)
    rounded = gap <= Fraction(1, 2) / 10**coarser
    near = gap <= size / 100
    if rounded and near and coarser > 0:
        return True
    return None if rounded or near else False


def _scaled(x):
    """The same Quantity in the base unit of its kind."""
    decimals = None
    if x.decimals is not None:
        decimals = x.decimals - round(math.log10(x.factor))
    return Quantity(x.value * x.factor, decimals, x.kind)


def _measure(answer, reference):
    """Compare two Quantities: True, False or None."""
    kinds = {answer.kind, reference.kind}
    if answer.doubtful or reference.doubtful:
        return True if len(kinds) == 1 and answer.value == reference.value else None
    plain = _close(answer, reference)
    scaled = _close(_scaled(answer), _scaled(reference))
    if kinds == {"", "percent"}:  # 75% is 0.75; that the answer is in percent may be left out
        if scaled or plain and reference.kind:
            return True
        return False if plain is scaled is False else None
    if len(kinds) == 1 and answer.factor != reference.factor:
        return scaled or None
    return plain if len(kinds) == 1 or "" in kinds else None  # the unit may be left out


def _compare(answer, reference, question=""):
    """True, False, None, or what the algebra has to compare: (answer, reference)."""
    pair = tidy(answer), tidy(reference)
    if words(answer) == words(reference) != "":
        return True
    if AMBIGUOUS.match(pair[1]):
        return None
    quantities = [_quantity(text, question) for text in pair]
    if None not in quantities:
        said, wanted = quantities
        return _measure(said, _asked(wanted, question) if said.kind else wanted)
    places = [PLACE.fullmatch(words(text)) for text in pair]
    if None not in places and words(answer) == places[0][1]:
        return True if places[0][1] == places[1][1] else None
    if not all(MATHS.fullmatch(text) and not NO_MATHS.search(text) for text in pair):
        return None
    lists = {text[0] + text[-1] for text in pair if "," in text}
    return pair if len(lists) < 2 else None


def mean_relative_accuracy(prediction: float, target: float) -> float:
    """Share of the ten thresholds 0.50, 0.55 ... 0.95 for which |p - y| / |y| <= 1 - threshold.

    Source: VSI-Bench.
    """
    if not target:
        return float(prediction == target)
    thresholds = np.linspace(0.5, 0.95, 10)  # as the benchmark: the last bit decides on 120 for 100
    return float(np.mean(abs(prediction - target) / abs(target) <= 1 - thresholds))


def _stated_number(text):
    """The Quantity of "3.2 m", "The distance is 3.2 meters" or another text with one number."""
    text = NUMBER_WORD.sub(_digits, tidy(text))
    number = _quantity(text) or _quantity(IS.split(text)[-1])
    alone = ONE_NUMBER.fullmatch(text)
    if number or not alone or AGAINST.search(text):
        return number
    return _quantity(alone[1]) or _quantity(alone[2])


def _asked(quantity, question):
    """A Quantity without a unit gets the one that the question names: "How long, in meters?"."""
    for match in UNIT_ASKED.finditer(question):
        if not quantity.kind and _unit(match[1]):
            kind, factor = _unit(match[1])
            quantity = replace(quantity, kind=kind, factor=factor)
    return quantity


def _near(answer, target):
    """Is the one number that an answer states near enough to the target, by MRA >= 0.5?"""
    number = _stated_number(answer)
    if not number:
        return False
    if "" in (number.kind, target.kind):
        return mean_relative_accuracy(float(number.value), float(target.value)) >= 0.5
    said = float(_scaled(number).value)
    same = number.kind == target.kind
    return same and mean_relative_accuracy(said, float(_scaled(target).value)) >= 0.5


def _same(answer, option):
    return _compare(answer, option) is True


def _by_rule(answer, sample):
    """As `verify`; where the algebra has to tell, what it must compare: (answer, reference)."""
    if not answer or len(answer) >= MAX_ANSWER:
        return False
    target = _quantity(sample.answer)
    if target and sample.data_source.endswith(MRA_SOURCES):
        return _near(answer, _asked(target, sample.question))
    options = choices(sample.question)
    letter = UNLISTED.fullmatch(sample.answer.strip())
    if letter and not options:  # they stand in the picture
        options = dict.fromkeys("ABCDEFGHIJ", "") | {letter[1]: letter[2] or ""}
    right = named(sample.answer, options, _same)
    if not right:
        return _compare(answer, sample.answer, sample.question)
    letters = named(answer, options, _same)
    if letters is None or len(right) > 1 and EITHER.search(answer):
        return None
    if letters or len(right) > 1:
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
    if unsolved and importlib.util.find_spec("math_verify") is None:
        raise DataError("an answer in mathematics needs math-verify: pip install math-verify")
    solved = dict(zip(unsolved, map(_solved, unsolved, algebra.equal(unsolved)), strict=True))
    return [solved.get(verdicts[key], verdicts[key]) for key in keys]


def _solved(pair, reply):
    """The verdict for what the algebra replied: numbers are as close here as elsewhere."""
    if not isinstance(reply, list):
        return reply
    return _close(
        *[_quantity(x) or Quantity(Fraction(n)) for x, n in zip(pair, reply, strict=True)]
    )


def verify(answer: str | None, sample: Sample) -> bool | None:
    """Does the answer, as extracted, mean the sample's? True, False, or None: a rule cannot tell.

    Raises DataError where math-verify is needed and not installed.
    """
    return verify_batch([(answer, sample)])[0]
