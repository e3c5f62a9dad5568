r"""Numbers with units: what a text states, and whether two of them are equal.

Whole numbers are exact. Decimals must agree as far as the coarser of the two is written, and be
within one percent, so that 0.00 is not 1/250 and 0.01 is not 0.0149. A unit may be left out, but
two units must be the same. What has two readings is no number here, or a doubtful one: ranges are
not subtractions, dates and ratios are not divisions, and the 2m of algebra is not two metres.
"""

import functools
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from engine.wording import AGAINST, rewrite, tidy

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
    r"[+-]?[\d.,]+(?:/\d+)?%?(?: ?- ?[+-]?[\d.,]+(?:/\d+)?%?)+|\d+(?:/\d+){2,}|0\d*/\d+|\d+/0\d*"
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
PRODUCT = re.compile(r"\d+[a-zA-Z]")
NOUN = re.compile(r"[a-z]{3,}(?: [a-z]{3,})?")
IS = re.compile(r"\b(?:is|are)\b|[=:]")
ONE_NUMBER = re.compile(r"\D*?((-?[\d,]*\.?\d+)(?: ?[^\W\d]+)?)\b\D*")
DATE = re.compile(r"(?i)\b(?:dates?|days?|when|month|birthday|ratio|odds|score|rating)\b")
UNIT_ASKED = re.compile(r"(?:\bin |\()((?:square |cubic )?[a-zA-Z/%^2-3]+)")
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen"""
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = dict(zip(f"{ONES} {TENS}".split(), [*range(20), *range(20, 100, 10)], strict=True))
NUMBER_WORD = re.compile(
    rf"(?i)\b(?:(?:{TENS.replace(' ', '|')})[- ])?(?:{'|'.join(NUMBERS)})\b(?! ones?\b)"
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
kelvin 1 kelvin
angle 0.017453292519943295 degree, deg
angle 1 rad, radian
percent 1 %
dollar 1 $, dollar, usd, USD
dollar 1/100 cent
euro 1 €, euro, EUR
pound 1 £, GBP
yen 1 ¥, yen, JPY
rupee 1 ₹, rupee, INR
"""
SCALES = {}  # name -> (scale, how many)
UNITS = {}  # name in the singular -> (what it measures, how many of the base unit)


def _singular(name):
    return re.sub(r"(?<=ch)es\b|(?<=[a-z]{2})s\b", "", name)


for _line in UNIT_TABLE.strip().splitlines():
    _kind, _factor, _names = _line.split(maxsplit=2)
    _table = SCALES if _kind == "scale" else UNITS
    for _name in _names.split(", "):
        _table[_singular(_name)] = _kind, Fraction(_factor)


@dataclass(frozen=True)
class Quantity:
    """A number with a unit."""

    value: Fraction  # in the unit; a percentage as a share
    decimals: int | None = None  # that are written; None: not a decimal, as 1/3, 2√3, 5 million
    kind: str = ""  # what the unit measures
    factor: Fraction = Fraction(1)  # the unit in the base unit of its kind
    doubtful: bool = False  # 2m may be a product, 24/7 may be no division


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
    """(what it measures, factor) of a unit, also in the plural; None if unknown."""
    singular = _singular(name)
    return UNITS.get(singular) or UNITS.get(singular.lower() if len(name) > 2 else "")


def _with_unit(number, unit):
    """The Quantity in a unit that was left out; a percentage becomes a share."""
    kind, factor = unit
    if kind == "percent":
        number = _share(number)
    return replace(number, kind=kind, factor=factor)


def _share(percentage):
    decimals = None if percentage.decimals is None else percentage.decimals + 2
    return replace(percentage, value=percentage.value / 100, decimals=decimals)


def in_digits(text: str) -> str:
    """The text with "twenty-five" as 25."""

    def digits(match):
        return str(sum(NUMBERS[word] for word in re.split("[- ]", match[0].lower())))

    return NUMBER_WORD.sub(digits, text)


def _number(text):
    """Quantity without a unit, or None."""
    literal = LITERAL.fullmatch(text)
    if literal:
        return Quantity(Fraction(text.replace(",", "")), len(literal[1] or literal[2] or ""))
    number = value(text)
    exact = number is not None and abs(number) < 1e15  # as far as a float tells whole numbers apart
    return Quantity(Fraction(number)) if exact else None


@functools.lru_cache(4096)
def quantity(text: str, question: str = "") -> Quantity | None:
    """What a text states that is a number with a known unit, or a noun that the question names."""
    text = in_digits(rewrite(_arithmetic(text[:200]), BEFORE_NUMBER)).rstrip(" .")
    found = QUANTITY.fullmatch(text)
    number = _number(found["number"]) if found else None
    if number is None:
        return None
    if SLASH.fullmatch(text):
        improper = number.value >= 1 or DATE.search(question) is not None
        lowest_terms = str(Fraction(text)) == text  # 12/6 is a date or a ratio
        return replace(number, doubtful=improper) if lowest_terms else None
    if found["scale"]:
        number = Quantity(number.value * SCALES[found["scale"]][1])
    unit = found["money"] + found["unit"] or ("rad" if "π" in text else "")
    if not unit or NOUN.fullmatch(unit) and unit in question.lower():
        return number
    if not _unit(unit):
        return None
    return _with_unit(replace(number, doubtful=PRODUCT.fullmatch(text) is not None), _unit(unit))


def asked(number: Quantity, question: str) -> Quantity:
    """A Quantity without a unit in the one that the question names: "How long, in meters?"."""
    for name in UNIT_ASKED.findall(question):
        if _unit(name) and not number.kind:
            return _with_unit(number, _unit(name))
    return number


def close(answer: Quantity, reference: Quantity) -> bool | None:
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


def measure(answer: Quantity, reference: Quantity) -> bool | None:
    """Are two Quantities equal? None where that is in doubt."""
    if answer.doubtful or reference.doubtful:
        same = (answer.value, answer.kind) == (reference.value, reference.kind)
        return same or None
    if answer.kind == reference.kind:
        if answer.factor == reference.factor:
            return close(answer, reference)
        said = answer.value * answer.factor
        wanted = reference.value * reference.factor
        return abs(said - wanted) <= 1e-9 * abs(wanted) or None
    if answer.kind and reference.kind:
        return None
    if reference.kind == "percent" and answer.value > 1:  # the sign was left out
        return close(_share(answer), reference)
    if answer.kind == "percent" and reference.value > 1:
        return None
    return close(answer, reference)


def mean_relative_accuracy(prediction: float, target: float) -> float:
    """Share of the ten thresholds 0.50, 0.55 ... 0.95 for which |p - y| / |y| <= 1 - threshold.

    Source: VSI-Bench.
    """
    if not target:
        return float(prediction == target)
    thresholds = np.linspace(0.5, 0.95, 10)  # as the benchmark: the last bit decides on 120 for 100
    return float(np.mean(abs(prediction - target) / abs(target) <= 1 - thresholds))


def near(answer: str, target: Quantity) -> bool:
    """Does an answer state one number, and is its mean relative accuracy at least 0.5?"""
    text = in_digits(tidy(answer))
    stated = IS.split(text)[-1]
    number = quantity(text) or quantity(stated)
    alone = ONE_NUMBER.fullmatch(stated)
    if not number and alone and not AGAINST.search(text):
        number = quantity(alone[1]) or quantity(alone[2])
    if not number:
        return False
    said = number.value
    if number.kind and target.kind:
        said *= number.factor / target.factor if number.kind == target.kind else 0
    return mean_relative_accuracy(float(said), float(target.value)) >= 0.5
