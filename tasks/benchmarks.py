r"""Nine published benchmarks, read from their own files and scored by their own rules.

    rows = read_benchmark("vstar", "/data/vstar_bench")  # each row is a Sample
    result = score_benchmark("vstar", rows, read_predictions("answers.jsonl", rows))

A benchmark says where its records are, and which fields are id, question, answer and picture. Its
`rule` gives an answer a score in 0..1, or None where it cannot tell: then a judge decides, and
without a judge the answer is wrong. Its `summary` turns the scores of rows into the numbers that
the field reports.

On unambiguous predictions the number is that of the published script (for V*, HRBench and DynaMath
that of VLMEvalKit). Where a script has a quirk we do the sensible thing; a comment that begins with
"Quirk" says what the script does.

Files can be gigabytes. They are read row by row, and an item of `Row.images` is a path, or a
function that opens the picture where it lies.

A benchmark of your own is one more entry of BENCHMARKS, at the end of this file.
"""

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data import DataError, Sample
from engine.verify import MRA_SOURCES, choices, mean_relative_accuracy, value, verify
from reward import extract_answer

FLOAT = r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
SHORT_ANSWER = r'"short answer"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",}]+))'  # in DynaMath's JSON
MARKUP_OR_UNIT = (  # that MathVision takes out of an answer
    r"\\(?:text|mbox|mathrm|left|right)|\\[,!; ]|\^\{?\\circ\}?|\\?[$%]"
    r"|\{?(?:units|km|m\^3)\}?|[\s~°]"
)
# What reading a record may raise where a field is missing or wrong, or the file is cut off
BAD_RECORD = (ValueError, LookupError, TypeError, AttributeError, OSError, csv.Error)


@dataclass
class Row(Sample):
    """A Sample that keeps the record it was made of.

    meta: the record (category, type, seed, …) and its "options", {letter: text}.
    unit: the same for rows that are one question in several forms; intervals draw them together.
    """

    meta: dict = field(default_factory=dict)
    unit: str = ""


def final_answer(prediction: str) -> str:
    r"""The last JSON "short answer", box in <answer>, \boxed{} or <answer>; else all of it."""
    short = re.findall(SHORT_ANSWER, prediction)
    if short:
        text = "".join(short[-1])
    else:
        box = prediction[max(prediction.rfind("\\boxed"), 0) :]
        text = extract_answer(prediction) or extract_answer(f"<answer>{box}</answer>")
    if text is None:
        inside = prediction.rsplit("<answer>", 1)[-1].split("</answer>")[0]
        text = re.sub(r"\\boxed\{\s*\}", "", inside).strip()
    wrapped = re.fullmatch(r"\$([^$]*)\$|\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", text)
    if wrapped:
        text = wrapped[1] or wrapped[2] or ""
    return text.strip()


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. The defaults are the paper's protocol for images.

    Patterns such as "{id}" are filled in from a record.
    """

    title: str
    source: str  # where the files come from
    size: int  # rows of the full benchmark
    files: str  # where the records are, the best first: glob patterns, "+" where all must be there
    paper: str  # names of methods and their scores, as the paper prints them
    rule: Callable  # (answer, row) -> score in 0..1, or None: cannot tell
    # (rows, scores (n,), weights (D, n)) -> {"score": percents (D,), "scores": {name: percents}}
    summary: Callable
    fields: str = "{id} | {question} | {answer}"  # the three that every row has
    images: str = "image"  # fields with pictures; a video is always in "video"
    prepare: Callable = lambda record, file: record  # brings another layout into that of `fields`
    extract: Callable = final_answer  # what the rule reads of a prediction
    unit: str = "{id}"  # rows of which this is the same are one question in several forms
    temperature: float = 0.5
    top_k: int = 20
    k: int = 1  # samples of each row, whose scores are averaged

    def matches(self, prediction: str | None, row: Sample) -> float | None:
        """Score of one row in 0..1, or None where the rule cannot tell. No answer is wrong."""
        answer = self.extract(prediction or "")
        return self.rule(answer, row) if answer else 0.0

    def table(self, result: dict) -> str:
        """The paper's table with this run as its last line, then the parts of the score."""
        this = "this run"
        if result.get("visual_tokens"):
            this += f" (~{result['visual_tokens']:.0f} visual tokens)"
        rows = [line.rsplit(" ", 1) for line in self.paper.split("; ") if line]
        ranges = {this: result.get("interval"), **result.get("intervals", {})}
        for name, score in {this: result["score"], **result["scores"]}.items():
            shown = f"{score:5.1f}"
            if ranges.get(name):
                shown += "  [{:.1f}, {:.1f}]".format(*ranges[name])
            rows.append((name, shown))
        width = max(len(name) for name, _ in rows)
        lines = [f"{self.title}, {result['n']:,} of {self.size or result['n']:,} rows"]
        lines += [f"{name:{width}}  {shown:>5}" for name, shown in rows]
        return "\n".join(lines)


# Reading -----------------------------------------------------------------------------------------
def read_benchmark(name: str, path: str | Path, media: bool = True) -> list[Row]:
    """A folder as published, or its file of records -> Rows.

    With media=False pictures and videos need not be there, which is enough to score predictions.
    Raises DataError for a wrong or partial folder: what was expected, and where.
    """
    if name not in BENCHMARKS:
        raise DataError(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    path = Path(path)
    rows = {}  # by id
    for file in _files(benchmark, path):
        number = 1
        try:
            for record in _records(file):
                row = _row(benchmark, record, file, media)
                if row.id in rows:
                    raise DataError(f"the id {row.id!r} a second time")
                row.data_source = row.data_source or name
                rows[row.id] = row
                number += 1
        except BAD_RECORD as error:
            missing = f"no field {error}, which {benchmark.source} has"
            why = missing if isinstance(error, KeyError) else error
            raise DataError(f"{file}: row {number}: {why}") from error
    if not rows:
        raise DataError(f"{path}: no rows in it; {benchmark.title} has {benchmark.size:,}")
    return list(rows.values())


def _files(benchmark, path):
    """The files of records in the first layout that is all there."""
    if path.is_file():
        return [path]
    for layout in benchmark.files.split(", or "):
        patterns = layout.split(" + ")
        # sample10 comes after sample9
        found = [sorted(path.glob(x), key=lambda file: (len(file.name), file)) for x in patterns]
        if all(found):
            return sum(found, [])
    names = ", ".join(sorted(file.name for file in path.glob("*"))[:8]) or "nothing"
    there = names if path.is_dir() else "no such folder"
    raise DataError(
        f"{path} is not a {benchmark.title} folder: expected {benchmark.files} in it,"
        f" as published in {benchmark.source}; there is {there}"
    )


def _row(benchmark, record, file, media):
    """A record of a file -> Row. Raises what BAD_RECORD names."""
    record = benchmark.prepare(record, file)
    name, question, answer = (x.format(**record).strip() for x in benchmark.fields.split(" | "))
    texts = record.get("options") or ()
    options = {}
    for letter, text in zip("ABCDEFGH", texts, strict=False):
        options[letter] = re.sub(rf"^{letter}\. *", "", str(text))
    if options and answer not in options:
        raise DataError(f"the answer {answer!r} is none of the options {', '.join(options)}")
    # Options that the question lists, or that only repeat the letters, are not shown again.
    only_letters = list(options) == list(options.values())
    if choices(question) != options and not only_letters:
        question += "".join(f"\n({letter}) {text}" for letter, text in options.items())
    files = [record[key] for key in benchmark.images.split()]
    images = [_path(image, file, media) for image in files if image]
    videos = [_path(record["video"], file, media)] if record.get("video") else []
    question += record.get("form", "")
    unit = benchmark.unit.format(**{"id": name, **record})
    row = Row(
        name,
        question,
        answer,
        tuple(images),
        tuple(videos),
        data_source=record.get("data_source", ""),
        meta=record | {"options": options},
        unit=unit,
    )
    # A field that the summary misses is an error now, and not after the run.
    benchmark.summary([row], np.zeros(1), np.ones((1, 1)))
    return row


def _path(name, file, media):
    """A file beside the records, in images/ there, or one folder up; what opens itself as it is."""
    if callable(name):
        return name
    for folder in (file.parent, file.parent / "images", file.parent.parent):
        if not media or (folder / name).is_file():
            return str(folder / name)
    raise DataError(
        f"{name} is not under {file.parent}: is the archive that holds it unpacked there?"
    )


def _records(file):
    """The records of a file, one after the other; pictures inside it stay encoded."""
    if file.suffix == ".tsv":
        return _table_records(file)
    if file.suffix == ".parquet":
        return _parquet_records(file)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return (json.loads(line) for line in text.split("\n") if line.strip())
    found = json.loads(text)
    if not isinstance(found, dict):
        return found
    if "question" in found:
        return [found]
    return ({"id": key, **record} for key, record in found.items())


def _table_records(file):
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB is less than a picture
    rows = _cells(file)
    _, header = next(rows, (0, []))
    for start, cells in rows:
        record = dict(zip(header, cells, strict=False))
        image = record.get("image")
        if len(cells) != len(header) or not image or len(image) % 4:
            raise DataError(
                f"{len(cells)} of {len(header)} columns or half a picture: download it again"
            )
        record["image"] = partial(_open_cell, str(file), start, header.index("image"))
        yield record


def _parquet_records(file):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            "Parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from error
    for batch in ParquetFile(file).iter_batches(batch_size=64):
        for record in batch.to_pylist():
            image = (record.pop("decoded_image", None) or {}).get("bytes")
            if image:
                record["image"] = partial(_open_bytes, image)
            yield record


def _cells(file, start=0):
    """(byte where it begins, cells) of each row of a table from the byte `start` on."""
    with open(file, "rb") as stream:
        stream.seek(start)
        lines = (line.decode("utf-8") for line in iter(stream.readline, b""))
        for cells in csv.reader(lines, delimiter="\t"):
            yield start, cells
            start = stream.tell()  # the reader takes no line before it needs it


def _open_bytes(encoded):
    return Image.open(io.BytesIO(encoded))


def _open_cell(file, start, column):
    """Open the picture in this column of the row that begins at the byte `start` of a table."""
    _, cells = next(_cells(file, start))
    return _open_bytes(base64.b64decode(cells[column]))


def read_predictions(file: str | Path, rows: list[Row]) -> list[str]:
    """JSON lines {"id", "prediction"} in any order, or without ids in the order of the rows.

    Raises DataError, which names the line, for what is no such line and for an id that is unknown
    or comes twice; where predictions are missing, it names the first rows without one.
    """
    places = {row.id: place for place, row in enumerate(rows)}
    found = {}
    first = None
    number = 1
    try:
        for line in Path(file).read_text(encoding="utf-8-sig").split("\n"):
            if line.strip():
                record = json.loads(line)
                first = first or record
                said = record.get("prediction", ()) if isinstance(record, dict) else ()
                fits = isinstance(said, str | int | float | None)
                if not fits or ("id" in record) != ("id" in first):
                    form = '{"id": …, "prediction": "…"}'
                    raise DataError(f"it should be {form}, with an id in all lines or in none")
                place = places.get(str(record["id"])) if "id" in record else len(found)
                if place is None or place in found:
                    why = "of no row" if place is None else "a second time"
                    raise DataError(f"the id {record['id']!r} {why}")
                found[place] = "" if said is None else str(said)
            number += 1
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: line {number}: {error}") from error
    missing = [row.id for place, row in enumerate(rows) if place not in found]
    if missing or len(found) > len(rows):
        raise DataError(
            f"{file}: {len(found)} predictions for {len(rows)} rows;"
            f" without one: {', '.join(missing[:5])}"
        )
    return [found[place] for place in range(len(rows))]


# Scoring -----------------------------------------------------------------------------------------
def score_benchmark(
    name: str,
    rows: list[Sample],
    predictions: list[str],
    judge: Callable | None = None,
    judge_only: bool = False,
) -> dict:
    """Rows and their predictions -> {"score", "scores", "n", "undecided", "correct"}.

    score and scores are in percent; correct: the rows' scores in 0..1; undecided: how many rows
    nobody could tell, which are wrong. `judge` maps [(question, reference, answer)] to True, False
    or None each. It gets, in one call, what the rule cannot tell; with judge_only every row with an
    answer, except what is right in part, such as MRA. Where it says None the rule stands.
    """
    benchmark = BENCHMARKS.get(name, PLAIN)
    correct = []
    asked = {}  # place: what the judge is asked
    for row, prediction in zip(rows, predictions, strict=True):
        score = benchmark.matches(prediction, row)
        answer = benchmark.extract(prediction or "")
        in_part = row.data_source.endswith(MRA_SOURCES) or 0 < (score or 0) < 1
        if answer and (score is None or (judge_only and not in_part)):
            asked[len(correct)] = (row.question, row.answer, answer)
        correct.append(score)
    if judge and asked:
        for place, verdict in zip(asked, judge(list(asked.values())), strict=True):
            if verdict is not None:
                correct[place] = verdict
    scores = [float(score or 0) for score in correct]
    found = benchmark.summary(rows, np.array(scores), np.ones((1, len(rows))))
    percent = lambda percents: float(np.nan_to_num(percents[0]))
    return {
        "score": percent(found["score"]),
        "scores": {name: percent(percents) for name, percents in found["scores"].items()},
        "n": len(rows),
        "undecided": correct.count(None),
        "correct": scores,
    }


def _weighted(scores, weights, places=slice(None)):
    """Percent right (D,) of scores (n,), or of some of them, by each row of weights (D, n).

    It is nan where nothing has any weight.
    """
    weights = weights[:, places]
    total = weights.sum(1)
    return 100 * (weights @ scores[places]) / np.where(total, total, np.nan)


def _percents(rows, scores, weights, group):
    """{name: percents (D,)} of the groups of rows that a pattern over their records names.

    "X by Y": the percents of a group X are the mean of those of its parts Y.
    """
    outer, _, inner = group.partition(" by ")
    groups = {}
    for place, row in enumerate(rows):
        names = {"data_source": row.data_source, **getattr(row, "meta", {})}
        parts = groups.setdefault(outer.format(**names), {})
        parts.setdefault(inner.format(**names), []).append(place)
    for name, parts in groups.items():
        percents = [_weighted(scores, weights, places) for places in parts.values()]
        groups[name] = np.mean(percents, 0)
    return groups


def summary(*groups: str, overall: str = "") -> Callable:
    """A summary: the mean over the groups that `overall` makes, and the percents of all `groups`.

    Without `overall` it is the mean over all rows.
    """

    def summarize(rows, scores, weights):
        found = {}
        for group in groups:
            found |= _percents(rows, scores, weights, group)
        means = _percents(rows, scores, weights, overall)
        return {"score": np.mean([*means.values()], 0), "scores": found}

    return summarize


# Rules -------------------------------------------------------------------------------------------
def _choice(text, row):
    """VLMEvalKit's multiple choice: the first way of reading that gives one letter."""
    for letters in _readings(text, row.meta["options"]):
        if len(letters) == 1:
            return letters[0] == row.answer
    return None


def _readings(text, options):
    """The letters that a text may mean, by one way of reading it after the other."""
    lower = text.lower()
    yield [letter for letter in options if text.strip(" ().").upper() == letter]
    # Quirk: the script reads the option "A car" as the letter A.
    whole = lower.rstrip(".")
    yield [letter for letter, option in options.items() if option.lower().rstrip(".") == whole]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:
        yield letters
    # Quirk: the script sees no end of the letter and reads "answer is blue" as B.
    said = re.search(r"(?i:answer\s+is)[\s:*(]*([A-Za-z])(?![A-Za-z])", text)
    if said and (said[1].isupper() or not re.search(r"\w", text[said.end() :])):
        yield [said[1].upper()]
    if len(text) <= 2 * sum(map(len, options.values())):
        yield [letter for letter, option in options.items() if option.lower() in lower]


def _by_words(text, row):
    """The letter at the beginning, or after the last "answer"; else the rule of training."""
    # Quirk: the scripts read "Because" (WeMath) and "Both" (DynaMath) as B, and an empty answer
    # (TIR-Bench) as A.
    tail = re.split(r"(?i)answer(?:\s+is\b)?", text)[-1]
    letter = re.match(r"[\W_]*([A-J])(?![A-Za-z]| [a-z]|\)?\s*[,/&]\s*\(?[A-J]\b)", tail)
    if letter and re.fullmatch("[A-J]", row.answer):
        return letter[1] == row.answer
    for words in (text, tail):
        if len(words) < 200:
            return verify(words, row)
    return None


def _vstar_record(record, file):
    if "text" in record:
        return record | {"options": choices(record["text"]).values()}
    return record | {
        "question_id": f"{file.parent.name}/{file.stem}",
        "text": record.get("question"),
        "label": "A",  # in a folder's own files the first option is right
        "image": f"{file.stem}.jpg",
        "category": file.parent.name,
    }


def _mathverse_rule(text, row):
    """Equal, or another letter; all else is the judge's."""
    if text == row.answer:
        return True
    return False if re.fullmatch("[A-H]{2}", text + row.answer) else None


def _mathvision_rule(text, row):
    """Equal to the letter or to its option's text."""
    options = row.meta["options"]
    parts = re.split(r"(?i)the (?:(?:final |correct )?answer is|answer should be)", text)
    if len(parts) > 1:
        text = parts[-1].strip().split("\n")[0].split(". ")[0]
    letter = re.search(r"(?:^| )\(?([A-E])\)?\.$|^\(?([A-E])\)?(?:\n|$)", text)
    number = re.fullmatch(r".*is (-?[\d.]*\d)\.?", text, re.DOTALL)
    said = text[-400:]
    if letter:
        said = letter[1] or letter[2]
    elif number:
        said = number[1]
    option = options.get(row.answer, row.answer)
    verdicts = [_mathvision_equal(said, target) for target in (row.answer, option)]
    if True in verdicts:
        return True
    return False if False in verdicts or (letter and options) else None


def _mathvision_equal(a, b):
    """As strings, or as numbers (or tuples of them) at two decimals; None: cannot tell."""
    plain = []
    numbers = []
    for text in (a, b):
        text = re.split(r"=|\\approx", text.lower())[-1]
        text = re.sub(MARKUP_OR_UNIT, "", text).strip(":").rstrip(".")
        plain.append(text)
        parts = text[1:-1].split(",") if re.fullmatch(r"[(\[].*,.*[)\]]", text) else [text]
        # Quirk: to the script the orders 5-2-3-1-4 and 5-4-3-2-1 are both -5, and so equal; to
        # `value` they are no numbers.
        values = [value(part) for part in parts]
        numbers.append(None if None in values else [round(number, 2) for number in values])
    if plain[0] == plain[1]:
        return True
    return None if None in numbers else numbers[0] == numbers[1]


def _wemath_summary(rows, scores, weights):
    """Four kinds of composite problem, whose parts and whole are rows of their own.

    IK: part and whole wrong. IG: only the whole wrong. CM: parts and whole right. RM: only the
    whole right. Strict wants all parts right, loose one. S1: all parts; S2, S3: wholes of two and
    three steps.
    """
    problems = {}  # (steps, ID): {part: place of its row}
    for place, row in enumerate(rows):
        count, part = row.meta["key"].split("steps_")
        problems.setdefault((int(count), row.meta["ID"]), {})[part] = place
    right = scores >= 0.5
    wholes = []  # places of the wholes of problems of which no row is missing
    share = []  # of their parts that are right
    for (count, _), parts in problems.items():
        if "multi" in parts and len(parts) == count + 1:
            wholes.append(parts.pop("multi"))
            share.append(right[list(parts.values())].mean())
    share = np.array(share)
    whole = right[wholes]
    drawn = weights[:, wholes]  # the script divides by 525, which no subset has
    ig = ~whole & (share == 1)
    result = {
        "IK": _weighted(~whole & (share < 1), drawn),
        "IG": _weighted(ig, drawn),
    }
    for name, mastered in (("strict", share == 1), ("loose", share > 0)):
        cm = whole & mastered
        result[name] = _weighted(cm + ig / 2, drawn)
        result[f"CM {name}"] = _weighted(cm, drawn)
        result[f"RM {name}"] = _weighted(~mastered, drawn * whole)  # of the wholes that are right
    result |= _percents(rows, scores, weights, "{step}")
    return {"score": result["strict"], "scores": result}


def _wemath_record(record, file):
    steps, part = record["key"].split("steps_")
    return record | {"step": f"S{steps}" if part == "multi" else "S1"}


def _dynamath_record(record, file):
    """Three layouts: a table (index, qid), Parquet with a file a variant, one variant as JSON."""
    seed = record.get("qid") or record["id"]
    variant = re.search(r"sample\D*(\d+).*\.parquet$", file.name)
    name = record.get("index") or (f"{seed}-{variant[1]}" if variant else seed)
    kind = record["answer_type"]
    answer = record["ground_truth"] if "ground_truth" in record else record["answer"]
    forms = {
        "float": "\nAnswer with a number with three decimals.",
        "multiple choice": "\nAnswer with a letter.",
    }
    return record | {
        "id": name,
        "seed": seed,
        "answer": float(answer) if kind == "float" else answer,
        "form": forms.get(kind, ""),
        "level": record.get("knowledge_level") or record["level"],
    }


def _dynamath_summary(rows, scores, weights):
    """The mean over rows and, as worst case, the share of seeds with every variant right."""
    seeds = {}
    for place, row in enumerate(rows):
        seeds.setdefault(row.unit, []).append(scores[place])
    worst = np.array([min(seeds[row.unit]) for row in rows])
    variants = np.array([len(seeds[row.unit]) for row in rows])
    found = summary("average", "{subject}", "{level}")(rows, scores, weights)
    found["scores"]["worst case"] = _weighted(worst, weights / variants)
    return found


def _dynamath_rule(text, row):
    kind = row.meta["answer_type"]
    if kind == "float":
        number = re.fullmatch(FLOAT + "(π.*)?", text.split()[0])
        if not number:  # π, 3,000 and 1/2 are the judge's
            return None
        factor = np.pi if number[2] else 1
        return abs(float(number[1]) * factor - float(row.answer)) <= 0.001
    if kind == "multiple choice" or re.fullmatch(r"[\d.]+", row.answer):
        return _by_words(text, row)
    # Quirk: to the script an empty text is right, too, and 1 for 14.
    return text.lower() in row.answer.lower()


def _integers(text):
    return [digits.lstrip("0") or "0" for digits in re.findall(r"\d+", text)]


def _tir_rule(text, row):
    task = row.meta["task"]
    gold = row.answer
    if task == "ocr":  # anywhere in the response; the script corrects two answers
        corrected = {"60.jpg": "mobi", "62.jpg": "aires"}
        return corrected.get(Path(row.meta["image_1"]).name, gold) in text
    text = final_answer(text).replace("*", "").strip()
    wanted = _integers(gold)
    if task == "jigsaw":
        return _places_right(text, wanted)
    if task == "word_search" and len(wanted) == 2:
        pair = re.search(r"\b\d+\s*,\s*\d+\b", text)
        return _integers(pair[0]) == wanted if pair else None
    if task == "spot_difference" and not gold.isdecimal():
        numbers = set(_integers(text))
        return len(numbers.intersection(wanted)) / len(numbers.union(wanted))
    if gold.isalpha() and len(gold) > 1:  # several letters, in any order
        letters = re.sub(r"\band\b|[\W_]", "", text)
        if sorted(letters) == sorted(gold):
            return True
        return False if letters.isupper() else None
    return _by_words(text, row)


def _places_right(text, wanted):
    """The share of places that are right, in the first run of as many numbers."""
    for run in re.findall(r"[\d\s,\uff0c]+", text):
        numbers = re.findall(r"\d+", run)
        if len(numbers) == len(wanted):
            return float(np.mean(np.array(numbers) == np.array(wanted)))
    return None


NUMERIC = "object_counting|object_abs_distance|object_size_estimation|room_size_estimation"


def _vsi_record(record, file):
    kind = record["question_type"]
    numeric = re.fullmatch(NUMERIC, kind)
    return record | {
        "kind": re.sub("_(easy|medium|hard)$", "", kind),
        "options": () if numeric else record["options"],
        "data_source": "vsi_numerical" if numeric else "vsi",
        "form": "\nAnswer with a number." if numeric else "\nAnswer with the letter.",
        "video": f"{record['dataset']}/{record['scene_name']}.mp4",
    }


def _vsi_rule(text, row):
    word = text.split()[0].rstrip(".")  # the first: "about 20" and "The answer is C" are wrong
    if row.data_source == "vsi":
        return word.lower() == row.answer.lower()
    if not re.fullmatch(FLOAT, word):
        return 0.0
    return mean_relative_accuracy(float(word), float(row.answer))


# The benchmarks ----------------------------------------------------------------------------------
PLAIN = Benchmark("Accuracy", "", 0, "", "", verify, summary("{data_source}"))  # none of these


def _hrbench(size, paper):
    return Benchmark(
        f"HRBench-{size}K",
        "DreamMr/HR-Bench",
        800,
        f"hr_bench_{size}k.tsv",
        paper,
        _choice,
        summary(
            "{category} by {cycle_category}",
            "cycle {cycle_category}",
            overall=" by {cycle_category}",
        ),
        fields="{index} | {question} | {answer}",
        prepare=lambda record, file: record | {"options": [record[x] for x in "ABCD" if record[x]]},
        unit="{question}",
    )


BENCHMARKS = {
    "vstar": Benchmark(
        "V* (avg@32)",
        "craigwu/vstar_bench",
        191,
        "test_questions.jsonl, or direct_attributes/sa_*.json + relative_position/sa_*.json",
        "Qwen2.5-VL-7B 78.5; PyVision-Image 88.7",
        _choice,
        summary("{category}"),
        fields="{question_id} | {text} | {label}",
        prepare=_vstar_record,
        temperature=0.01,
        top_k=0,
        k=32,
    ),
    "hrbench-4k": _hrbench(4, "Qwen2.5-VL-7B 71.6; PyVision-Image 78.1"),
    "hrbench-8k": _hrbench(8, "Qwen2.5-VL-7B 67.9; PyVision-Image 74.3"),
    "mathverse": Benchmark(
        "MathVerse",
        "AI4Math/MathVerse",
        3940,
        "testmini.json",
        "Qwen2.5-VL-7B 45.6; PyVision-Image 55.8",
        _mathverse_rule,
        summary("{problem_version}", "{metadata[subject]}", "subfield {metadata[subfield]}"),
        fields="{sample_index} | {query_wo} | {answer}",
        unit="{problem_index}",
    ),
    "mathvision": Benchmark(
        "MathVision",
        "MathLLMs/MathVision",
        3040,
        "data/test.jsonl, or test.jsonl, or data/test-*.parquet",
        "Qwen2.5-VL-7B –; PyVision-Image 28.7",
        _mathvision_rule,
        summary("level {level}", "{subject}"),
    ),
    "wemath": Benchmark(
        "WeMath",
        "We-Math/We-Math",
        1740,
        "data/testmini.json, or testmini.json",
        "Qwen2.5-VL-7B 34.6; PyVision-Image 47.7",
        _by_words,
        _wemath_summary,
        fields="{ID} {key} | {question}\n{option} | {answer}",
        prepare=_wemath_record,
        images="image_path",
        unit="{ID}",
    ),
    "dynamath": Benchmark(
        "DynaMath",
        "DynaMath/DynaMath_Sample",
        5010,
        "DynaMath.tsv, or data/sample*.parquet, or dataset/dataset.json, or dataset.json",
        "Qwen2.5-VL-7B 53.3; PyVision-Image 61.6",
        _dynamath_rule,
        _dynamath_summary,
        prepare=_dynamath_record,
        unit="{seed}",
    ),
    "tir-bench": Benchmark(
        "TIR-Bench",
        "Agents-X/TIR-Bench",
        1215,
        "TIR-Bench.json",
        "Qwen2.5-VL-7B 16.0; PyVision-Image 19.8",
        _tir_rule,
        summary("{task}"),
        fields="{id} | {prompt} | {answer}",
        images="image_1 image_2",
        prepare=lambda record, file: {"image_2": None} | record,
        extract=str.strip,
    ),
    "vsi-bench": Benchmark(
        "VSI-Bench",
        "nyu-visionx/VSI-Bench",
        5130,
        "test.jsonl, or test-*.parquet",
        "Qwen2.5-VL-7B, 1 fps (~45K tokens) 38.0; Video-R1 (~25K) ~37; SpaceR (~25K) 45.6;"
        " PyVision-Video (~5K) 44.0",
        _vsi_rule,
        summary("{kind} by {question_type}", overall="{kind} by {question_type}"),
        fields="{id} | {question} | {ground_truth}",
        images="",
        prepare=_vsi_record,
        temperature=0.01,
        top_k=0,
    ),
}
