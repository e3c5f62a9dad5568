r"""Numbers with units: what a text states, and whether two of them are equal.

Whole numbers are exact. Decimals must agree as far as the coarser of the two is written, and be
within one percent, so that 0.00 is not 1/250 and 0.01 is not 0.0149. A unit may be left out, but
two units must be the same. What has two readings is no number here, or a doubtful one: ranges are
not subtractions, dates and ratios are not divisions, and the 2m of algebra is not two metres.
"""

import functools
import math
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from engine.wording import AGAINST, rewrite, table, tidy

ARITHMETIC = table(r"""
(?<=\d) *\\frac *\{(\d+)\} *\{(\d+)\}           → ␣\1/\2
\\frac *\{([^{}]*)\} *\{([^{}]*)\}              → ((\1)/(\2))
\\sqrt *\{([^{}]*)\}                            → ((\1)^.5)
\^ *\{([^{}]*)\}                                → ^(\1)
\\pi ?                                          → π
""")
# What Python computes, with floats, of which 9^9^9^9 overflows at once.
PYTHON = table(r"""
(?<=\d),(?=\d{3}(?!\d))                         →
(?<![\d.])(\d+) (\d+/\d+)                       → (\1+\2)
\^                                              → **
(?<=[\d.)π])\ ?(?=[(π])|(?<=[)π])\ ?(?=\d)        → *
π                                               → 3.141592653589793
(?<![\d.])(\d+)(?![\d.])                        → \1.
""")
SPOKEN = table(r"""
§                    → ?
(?i)^(?:about|around|approximately|roughly|nearly|[~≈]|\\approx) *   →
(?i)^an? (?=hundred|thousand|million|billion|dozen)   → 1␣
(?i)\bzero\b         → 0
(?i)\bone\b          → 1
(?i)\btwo\b          → 2
(?i)\bthree\b        → 3
(?i)\bfour\b         → 4
(?i)\bfive\b         → 5
(?i)\bsix\b          → 6
(?i)\bseven\b        → 7
(?i)\beight\b        → 8
(?i)\bnine\b         → 9
(?i)\bten\b          → 10
(?i)\beleven\b       → 11
(?i)\btwelve\b       → 12
(?i)\bthirteen\b     → 13
(?i)\bfourteen\b     → 14
(?i)\bfifteen\b      → 15
(?i)\bsixteen\b      → 16
(?i)\bseventeen\b    → 17
(?i)\beighteen\b     → 18
(?i)\bnineteen\b     → 19
(?i)\btwenty\b       → 2§
(?i)\bthirty\b       → 3§
(?i)\bforty\b        → 4§
(?i)\bfifty\b        → 5§
(?i)\bsixty\b        → 6§
(?i)\bseventy\b      → 7§
(?i)\beighty\b       → 8§
(?i)\bninety\b       → 9§
§[- ]([1-9])\b       → \1
§                    → 0
""")
NUMBER = r"[+-]?(?:(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?|\.\d+)"
RANGE_OR_DATE = re.compile(
    r"[+-]?[\d.,]+(?:/\d+)?%?(?: ?- ?[+-]?[\d.,]+(?:/\d+)?%?)+|\d+(?:/\d+){2,}"
    r"|(?:0\d*|\d{4,})/\d+|\d+/0\d*"
)
QUANTITY = re.compile(
    r"(?P<money>[$€£¥₹]?) ?(?P<number>[-+*/^().,\dπ ]*[\d).π]) ?"
    r"(?P<scale>(?:(?<=\d)(?:[kKMB]|bn)(?![a-zA-Z])"
    r"|(?:hundred|dozen|thousand|[mb]illion|trillion)\b)?)"
    r" ?(?P<unit>(?:[^\d ](?:.*\S)?)?)"
)
ONE_NUMBER = re.compile(r"\D*?((-?[\d,]*\.?\d+)(?: ?[^\W\d]+)?)\b\D*")
DATE = r"(?i)\b(?:dates?|days?|when|month|birthday|ratio|odds|score|rating)\b"
UNIT_ASKED = r"(?:\bin |\((?!in ))(?!per)((?:square |cubic )?[a-zA-Z/^23]+)"
UNIT_TABLE = """
scale 12 ×dozen
scale 100 ×hundred
scale 1000 ×k, ×K, ×thousand
scale 1000000 ×M, ×million
scale 1000000000 ×B, ×bn, ×billion
scale 1000000000000 ×trillion
length 0.001 mm, mms, MM, millimeter, millimeters, millimetre, millimetres
length 0.01 cm, cms, CM, centimeter, centimeters, centimetre, centimetres
length 1 m, meter, meters, metre, metres
length 1000 km, kms, KM, Km, kilometer, kilometers, kilometre, kilometres
length 0.0254 in, inch, inches
length 0.3048 ft, foot, feet
length 0.9144 yd, yds, yard, yards
length 1609.344 mi, mile, miles
area 0.0001 cm^2, sq cm, square centimeter, square centimeters, square centimetre
area 0.0001 square centimetres
area 1 m^2, m2, sqm, sq m, square meter, square meters, square metre, square metres
area 1000000 km^2, sq km, square kilometer, square kilometers, square kilometre, square kilometres
area 0.09290304 ft^2, sq ft, sqft, square foot, square feet
volume 0.000001 cm^3, cubic centimeter, cubic centimeters, cubic centimetre, cubic centimetres
volume 0.001 L, l, liter, liters, litre, litres
volume 0.000001 mL, ml, milliliter, milliliters, millilitre, millilitres
volume 1 m^3, cubic meter, cubic meters, cubic metre, cubic metres
mass 0.000001 mg, milligram, milligrams
mass 0.001 g, gram, grams
mass 1 kg, kgs, KG, Kg, kilogram, kilograms
mass 0.45359237 lb, lbs, pound, pounds
mass 0.028349523125 oz, ounce, ounces
time 0.001 ms, millisecond, milliseconds
time 1 s, sec, secs, second, seconds
time 60 min, mins, minute, minutes
time 3600 h, hr, hrs, hour, hours
time 86400 day, days
time 604800 week, weeks
month 1 month, months
month 12 year, years, yr, yrs
speed 1 m/s, meter per second, meters per second, metre per second, metres per second
speed 5/18 km/h, kmh, kph, kmph, kilometer per hour, kilometers per hour, kilometre per hour
speed 5/18 kilometres per hour
speed 0.44704 mph, mile per hour, miles per hour
rate 1 bpm, beats per minute
frequency 1 Hz, hertz
frequency 1000 kHz, kilohertz
celsius 1 degree C, degrees C, degree Celsius, degrees Celsius, C, celsius
fahrenheit 1 degree F, degrees F, degree Fahrenheit, degrees Fahrenheit, F, fahrenheit
kelvin 1 kelvin
angle 0.017453292519943295 degree, degrees, deg
angle 1 rad, radian, radians
percent 1 %
dollar 1 $, dollar, dollars, usd, USD
dollar 1/100 cent, cents
euro 1 €, euro, euros, EUR
pound 1 £, GBP
yen 1 ¥, yen, JPY
rupee 1 ₹, rupee, rupees, INR
"""
UNITS = {}  # name -> (what it measures, how many of the base unit)


def _key(name):
    """A name as the table is asked: long ones in any case; short ones differ by it, as m and M."""
    return name if len(name) < 3 else name.lower()


for _line in UNIT_TABLE.strip().splitlines():
    _kind, _factor, _names = _line.split(maxsplit=2)
    for _name in _names.split(", "):
        UNITS[_key(_name)] = _kind, Fraction(_factor)


class Quantity(NamedTuple):
    """A number with a unit."""

    value: Fraction  # in the unit; a percentage as a share
    decimals: float = math.inf  # that are written; inf: not a decimal, as 1/3, 2√3, 5 million
    kind: str = ""  # what the unit measures
    factor: Fraction = Fraction(1)  # the unit in the base unit of its kind
    doubtful: bool = False  # 2m may be a product, 24/7 may be no division

    def percent(self):
        """So many percent, as a share."""
        return self._replace(value=self.value / 100, decimals=self.decimals + 2, kind="percent")


def value(text: str) -> float | None:
    """The number that plain or LaTeX arithmetic stands for; None for a range (10-11) or a date.

    Also None from 1e15 on, where a float does not tell whole numbers apart.
    """
    text = rewrite(tidy(text[:400]), ARITHMETIC)
    if RANGE_OR_DATE.fullmatch(text):
        return None
    text = rewrite(text, PYTHON)
    if re.search(r"[^\d.+*/() -]", text):
        return None
    try:
        number = float(eval(text))  # digits and operators, nothing else
    except Exception:  # of many kinds, for what is no arithmetic
        return None
    return number if abs(number) < 1e15 else None


def _number(text):
    """Quantity without a unit, or None."""
    if re.fullmatch(NUMBER, text):
        decimals = text.partition(".")[2]
        return Quantity(Fraction(text.replace(",", "")), len(decimals))
    number = value(text)
    return None if number is None else Quantity(Fraction(number))


@functools.lru_cache(4096)
def quantity(text: str, question: str = "") -> Quantity | None:
    """What a text states that is a number with a known unit, or a noun that the question names."""
    text = rewrite(rewrite(tidy(text[:200]), ARITHMETIC), SPOKEN).rstrip(" .")
    found = QUANTITY.fullmatch(text)
    number = _number(found["number"]) if found else None
    if number is None:
        return None
    if re.fullmatch(r"\d+/\d+", text):
        improper = number.value >= 1 or re.search(DATE, question) is not None
        lowest_terms = str(Fraction(text)) == text  # 12/6 is a date or a ratio
        return number._replace(doubtful=improper) if lowest_terms else None
    if found["scale"]:
        number = Quantity(number.value * UNITS["×" + found["scale"]][1])
    unit = found["money"] + found["unit"]
    if not unit and "π" in text:
        unit = "rad"
    noun = re.fullmatch("[a-z]{3,}(?: [a-z]{3,})?", unit)
    if not unit or noun and unit in question.lower():
        return number
    if _key(unit) not in UNITS:
        return None
    kind, factor = UNITS[_key(unit)]
    if kind == "percent":
        return number.percent()
    product = re.fullmatch(r"\d+[a-zA-Z]", text) is not None
    return number._replace(kind=kind, factor=factor, doubtful=product)


def asked(text: str, question: str) -> Quantity | None:
    """As `quantity`; a number alone is in the unit that the question names: "in meters?"."""
    for name in re.findall(UNIT_ASKED, question):
        number = quantity(f"{text} {name}")
        if number:
            return number
    return quantity(text, question)


def close(answer: Quantity, reference: Quantity) -> bool | None:
    """Are two numbers equal as far as they are written? None if they only nearly are."""
    gap = abs(answer.value - reference.value)
    size = abs(reference.value)
    coarser = min(answer.decimals, reference.decimals)
    if gap <= 1e-12 * min(size, 10**9):
        return True
    if answer.decimals == reference.decimals == 0 or gap > size / 20:
        return False
    rounded = gap * 10**coarser <= 0.5
    near = gap <= size / 100
    if rounded and near and coarser > 0:
        return True
    return None if rounded or near else False


def measure(answer: Quantity, reference: Quantity) -> bool | None:
    """Are two Quantities equal? None where that is in doubt."""
    if reference.kind == "percent" and not answer.kind and answer.value > 1:
        answer = answer.percent()  # the sign was left out
    if answer.kind == "percent" and not reference.kind and reference.value > 1:
        return None
    same = (answer.kind, answer.factor) == (reference.kind, reference.factor)
    left_out = "" in (answer.kind, reference.kind)
    if (same or left_out) and not (answer.doubtful or reference.doubtful):
        return close(answer, reference)
    said = answer.value * answer.factor
    wanted = reference.value * reference.factor
    equal = answer.kind == reference.kind and abs(said - wanted) <= 1e-9 * abs(wanted)
    return equal or None


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
    text = rewrite(tidy(answer), SPOKEN)
    stated = re.split(r"\b(?:is|are)\b|[=:]", text)[-1]
    number = quantity(stated)
    alone = ONE_NUMBER.fullmatch(stated)
    if not number and alone and not AGAINST.search(text):
        number = quantity(alone[1]) or quantity(alone[2])
    if not number:
        return False
    if "" in (number.kind, target.kind):  # a unit may be left out
        number = number._replace(kind=target.kind, factor=target.factor)
    said = number.value * number.factor / target.factor
    accuracy = mean_relative_accuracy(float(said), float(target.value))
    return number.kind == target.kind and accuracy >= 0.5
