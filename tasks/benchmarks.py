r"""How good it is, as the field counts it: nine published benchmarks, read from their own files, scored by their rules.

    rows = read_benchmark("vstar", "/data/vstar_bench")               # each row is a Sample
    result = score_benchmark("vstar", rows, read_predictions("answers.jsonl", rows))

A benchmark says where its records are and which fields are id, question, answer and picture; its `rule` gives an answer
a score in 0..1, or None where it cannot tell (the judge's, and wrong without one); its `summary` makes numbers of them.
On unambiguous predictions it is the number of the published script (for V*, HRBench and DynaMath VLMEvalKit's); where
that has a quirk we do the sensible thing, and a comment says "Quirk" and what the script does. Files can be gigabytes:
they are read row by row, and an item of `Row.images` is a path or a function that opens the picture where it lies.
"""
import base64, csv, io, json, math, re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data import DataError, Sample
from reward import MRA_SOURCES, choices, extract_answer, mean_relative_accuracy, value, verify

FLOAT = r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"


@dataclass
class Row(Sample):
    """A Sample that keeps the record it was made of: category, type, seed, … and the "options", {letter: text}.
    unit: the same for rows that are one question in several forms; intervals draw them together."""
    meta: dict = field(default_factory=dict)
    unit: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. The defaults are the paper's protocol for images; `paper` holds its figures."""
    title: str
    source: str  # where the files come from
    size: int  # rows of the full benchmark
    files: tuple  # where the records are, the best first: glob patterns, joined by " + " when all must be there
    rule: Callable  # (answer, row) -> score in 0..1, or None: cannot tell
    summary: Callable  # (rows, scores (n,), weights (D, n)) -> {"score": percents (D,), "scores": {name: percents}}
    paper: tuple  # the scores of `methods`
    fields: tuple = ("{id}", "{question}", "{answer}")  # of a record
    images: tuple = ("image",)  # fields with pictures; a video is always in "video"
    prepare: Callable = lambda record, file: record  # brings a record of another layout into the one of `fields`
    extract: Callable = lambda prediction: final_answer(prediction)  # what the rule reads
    methods: tuple = ("Qwen2.5-VL-7B", "PyVision-Image")
    unit: str = "{id}"  # rows of which this is the same are one question in several forms
    temperature: float = 0.5
    top_k: int = 20
    k: int = 1  # samples a row, whose scores are averaged

    def row(self, record, file, media=True):
        """Record of a file -> Row. Raises KeyError for a field that is missing, ValueError for one that is wrong."""
        record = self.prepare(record, file)
        name, question, answer = (pattern.format(**record).strip() for pattern in self.fields)
        options = {x: re.sub(rf"^{x}\. *", "", str(text)) for x, text in zip("ABCDEFGH", record.get("options") or ())}
        if options and answer not in options:
            raise DataError(f"the answer {answer!r} is none of the options {', '.join(options)}")
        if choices(question) != options and list(options) != list(options.values()):
            question += "".join(f"\n({letter}) {text}" for letter, text in options.items())
        def find(name):  # beside the records, in images/ there, or one folder up
            for folder in (file.parent, file.parent / "images", file.parent.parent):
                if callable(name) or not media or (folder / name).is_file():
                    return name if callable(name) else str(folder / name)
            raise DataError(f"{name} is not under {file.parent}: is the archive that holds it unpacked there?")
        images, videos = (tuple(map(find, filter(None, found))) for found in (
            [record[key] for key in self.images], [record.get("video")]))
        row = Row(name, question + record.get("form", ""), answer, images, videos, record.get("data_source", ""),
                  meta=record | {"options": options}, unit=self.unit.format(**{"id": name, **record}))
        self.summary([row], np.zeros(1), np.ones((1, 1)))  # a field that it misses is an error now, not after the run
        return row

    def matches(self, prediction, row):
        """Score of one row in 0..1, or None where the rule cannot tell. No answer is wrong."""
        answer = self.extract(prediction or "")
        return self.rule(answer, row) if answer else 0.0

    def table(self, result):
        """The paper's table with this run as its last line, then the parts of the score."""
        tokens = f" (~{result['visual_tokens']:.0f} visual tokens)" if result.get("visual_tokens") else ""
        found = {f"this run{tokens}": result["score"], **result["scores"]}
        ranges = {f"this run{tokens}": result["interval"], **result["intervals"]} if "interval" in result else {}
        ranges = {name: "  [{:.1f}, {:.1f}]".format(*limits) for name, limits in ranges.items()}
        lines, width = [*zip(self.methods, self.paper), *found.items()], max(map(len, (*self.methods, *found)))
        return "\n".join([f"{self.title}, {result['n']:,} of {self.size or result['n']:,} rows"] + [
            f"{name:{width}}  {score if isinstance(score, str) else format(score, '.1f'):>5}{ranges.get(name, '')}"
            for name, score in lines])


# Reading ------------------------------------------------------------------------------------------------------------
def read_benchmark(name, path, media=True):
    """Folder as published, or its file of records -> list of Row. With media=False pictures and videos need not be
    there, which is enough to score predictions. DataError for a wrong or partial folder: what was expected where."""
    if name not in BENCHMARKS:
        raise DataError(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    benchmark, path, rows, ids = BENCHMARKS[name], Path(path), [], set()
    layouts = [[sorted(path.glob(pattern), key=lambda x: (len(x.name), x)) for pattern in layout.split(" + ")]
               for layout in benchmark.files]
    files = [path] if path.is_file() else next((sum(found, []) for found in layouts if all(found)), [])
    if not files:
        there = ", ".join(sorted(x.name for x in path.glob("*"))[:8]) if path.is_dir() else "no such folder"
        raise DataError(f"{path} is not a {benchmark.title} folder: expected {', or '.join(benchmark.files)} in it, as "
                        f"published in {benchmark.source}; there is {there or 'nothing'}")
    for file in files:
        before = len(rows)
        try:
            for record in _records(file):
                row = benchmark.row(record, file, media)
                if row.id in ids:
                    raise DataError(f"the id {row.id!r} a second time")
                ids.add(row.id)
                row.data_source = row.data_source or name
                rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, csv.Error) as error:
            why = f"no field {error}, which {benchmark.source} has" if isinstance(error, KeyError) else error
            raise DataError(f"{file}: row {len(rows) - before + 1}: {why}") from error
    if not rows:
        raise DataError(f"{path}: no rows in it; {benchmark.title} has {benchmark.size:,}")
    return rows


def _records(file):
    """The records of a file one after the other, whatever its format; pictures inside it stay encoded."""
    if file.suffix == ".tsv":
        csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB is less than a picture
        rows = _cells(file)
        _, header = next(rows, (0, []))
        for start, cells in rows:
            record = dict(zip(header, cells))
            if len(cells) != len(header) or not record.get("image") or len(record["image"]) % 4:
                raise DataError(f"{len(cells)} of {len(header)} columns or half a picture: download it again")
            yield record | {"image": partial(_open, str(file), start, header.index("image"))}
    elif file.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise DataError("Parquet needs pyarrow, which is not installed: pip install pyarrow") from error
        for batch in ParquetFile(file).iter_batches(batch_size=64):
            for record in batch.to_pylist():
                image = (record.pop("decoded_image", None) or {}).get("bytes")
                yield record | ({"image": partial(_open, image)} if image else {})
    elif file.suffix == ".jsonl":
        yield from (json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip())
    else:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            found = [found] if "question" in found else [{"id": key, **value} for key, value in found.items()]
        yield from found


def _cells(file, start=0):
    """(byte where it begins, cells) of each row of a table from the byte `start` on."""
    with open(file, "rb") as stream:
        stream.seek(start)
        for cells in csv.reader((line.decode("utf-8") for line in iter(stream.readline, b"")), delimiter="\t"):
            yield start, cells
            start = stream.tell()  # the reader takes no line before it needs it


def _open(source, start=None, column=None):
    """Opens the picture in a row of a table (file, byte where the row begins, column), or in these bytes."""
    data = source if start is None else base64.b64decode(next(_cells(source, start))[1][column])
    return Image.open(io.BytesIO(data))


def read_predictions(file, rows):
    """JSON lines {"id", "prediction"} in any order, or without ids in the order of the rows -> list of str. DataError
    names the line for what is no such line, an unknown id or a second one, and the first row that has none."""
    places, found, first, number = {row.id: i for i, row in enumerate(rows)}, {}, None, 1
    try:
        lines = enumerate(Path(file).read_text(encoding="utf-8-sig").split("\n"), 1)
        for number, line in ((number, line) for number, line in lines if line.strip()):
            record = json.loads(line)
            first = first or record
            if (not isinstance(record, dict) or not isinstance(record.get("prediction", ()), str | int | float | None)
                    or ("id" in record) != ("id" in first)):
                raise DataError('it should be {"id": …, "prediction": "…"}, with an id in all lines or in none')
            place = places.get(str(record["id"])) if "id" in record else len(found)
            if place is None or place in found:
                raise DataError(f"the id {record['id']!r} " + ("of no row" if place is None else "a second time"))
            found[place] = "" if record["prediction"] is None else str(record["prediction"])
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: line {number}: {error}") from error
    if len(found) != len(rows):
        missing = [row.id for i, row in enumerate(rows) if i not in found]
        raise DataError(f"{file}: {len(found)} predictions for {len(rows)} rows; without one: {', '.join(missing[:5])}")
    return [found[i] for i in range(len(rows))]


# Scoring ------------------------------------------------------------------------------------------------------------
def score_benchmark(name, rows, predictions, judge=None, judge_only=False):
    """Rows and their predictions -> {"score", "scores", "n", "undecided", "correct"}; score and scores in percent.
    `judge` maps [(question, reference, answer)] to True, False or None each. It gets in one call what the rule cannot
    tell (judge_only: every row with an answer, but for what is right in part, such as MRA); where it says None the rule
    stands. `undecided` counts the rows that nobody could tell: they are wrong. `correct`: the rows' scores in 0..1."""
    benchmark = BENCHMARKS.get(name, PLAIN)
    correct = [benchmark.matches(prediction, row) for row, prediction in zip(rows, predictions, strict=True)]
    answers = [benchmark.extract(prediction or "") for prediction in predictions]
    asked = [i for i, score in enumerate(correct) if judge and answers[i] and (score is None or judge_only and not (
        0 < score < 1 or rows[i].data_source.endswith(MRA_SOURCES)))]
    verdicts = judge([(rows[i].question, rows[i].answer, answers[i]) for i in asked]) if asked else []
    for i, verdict in zip(asked, verdicts, strict=True):
        correct[i] = correct[i] if verdict is None else verdict
    scores = [float(score or 0) for score in correct]
    found = benchmark.summary(rows, np.array(scores), np.ones((1, len(rows))))
    return {"score": float(np.nan_to_num(found["score"][0])),
            "scores": {name: float(np.nan_to_num(x[0])) for name, x in found["scores"].items()},
            "n": len(rows), "undecided": correct.count(None), "correct": scores}


def final_answer(prediction):
    r"""The last JSON "short answer" (DynaMath), box in <answer>, \boxed{} or <answer>; else all of it."""
    short = re.findall(r'"short answer"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",}]+))', prediction)
    box = prediction[max(prediction.rfind("\\boxed"), 0):]
    text = "".join(short[-1]) if short else extract_answer(prediction) or extract_answer(f"<answer>{box}</answer>")
    if text is None:
        text = re.sub(r"\\boxed\{\s*\}", "", prediction.rsplit("<answer>", 1)[-1].split("</answer>")[0]).strip()
    wrapped = re.fullmatch(r"\$([^$]*)\$|\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", text)
    return (wrapped[1] or wrapped[2] or "" if wrapped else text).strip()


def _choice(text, row):
    """VLMEvalKit's multiple choice: the one letter, near the end; the one after "answer is"; the one option's text."""
    options = row.meta["options"]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [x for x in options if x in words]
    said = re.search(r"(?i:answer\s+is)[\s:*(]*([A-Za-z])(?![A-Za-z])", text)
    found = (
        [x for x in options if text.strip(" ().").upper() == x],
        # Quirk: the script reads the option "A car" as the letter A
        [x for x, option in options.items() if text.lower().rstrip(".") == option.lower().rstrip(".")],
        letters if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4 else [],
        # Quirk: the script sees no end of the letter and reads "answer is blue" as B
        [said[1].upper()] if said and (said[1].isupper() or not re.search(r"\w", text[said.end():])) else [],
        [x for x, option in options.items() if option.lower() in text.lower()]
        if len(text) <= 2 * sum(map(len, options.values())) else [])
    letter = next((x[0] for x in found if len(x) == 1), None)
    return None if letter is None else letter == row.answer


def _by_words(text, row):
    """The letter at the beginning (after the last "answer", if there is one), else the rule of training."""
    # Quirk: the scripts read "Because" (WeMath) and "Both" (DynaMath) as B, and an empty answer (TIR-Bench) as A
    tail = re.split(r"(?i)answer(?:\s+is\b)?", text)[-1]
    letter = re.match(r"[\W_]*([A-J])(?![A-Za-z]| [a-z]|\)?\s*[,/&]\s*\(?[A-J]\b)", tail)
    if letter and re.fullmatch("[A-J]", row.answer):
        return letter[1] == row.answer
    return next((verify(words, row) for words in (text, tail) if len(words) < 200), None)


def _weighted(scores, weights):
    """Percent right (D,) of scores (n,), by each row of weights (D, n); nan where nothing has any weight."""
    total = weights.sum(1)
    return 100 * (weights @ scores) / np.where(total, total, np.nan)


def _percents(rows, scores, weights, outer, inner=""):
    """{group: percents (D,), the mean of those of its parts}; patterns over Row.meta name the groups and the parts."""
    groups = {}
    for i, row in enumerate(rows):
        names = {"data_source": row.data_source, **getattr(row, "meta", {})}
        groups.setdefault(outer.format(**names), {}).setdefault(inner.format(**names), []).append(i)
    return {name: np.mean([_weighted(scores[part], weights[:, part]) for part in parts.values()], 0)
            for name, parts in groups.items()}


def summary(*groups, overall=("",)):
    """A summary: the mean over all rows (or over the groups that `overall` makes), and the percents of all `groups`."""
    return lambda *asked: {"score": np.mean([*_percents(*asked, *overall).values()], 0),
                           "scores": {name: x for group in groups for name, x in _percents(*asked, *group).items()}}


# The benchmarks -----------------------------------------------------------------------------------------------------
def _vstar_record(record, file):
    folder = {"question_id": f"{file.parent.name}/{file.stem}", "text": record.get("question"), "label": "A",
              "image": f"{file.stem}.jpg", "category": file.parent.name}  # in a folder's own files the first is right
    return record | ({"options": choices(record["text"]).values()} if "text" in record else folder)


def _mathvision_rule(text, row):
    """Equal to the letter or to its option's text: as strings, or as numbers (tuples of them) at two decimals."""
    said = re.split(r"(?i)the (?:(?:final |correct )?answer is|answer should be)", text)
    text = said[-1].strip().split("\n")[0].split(". ")[0] if len(said) > 1 else text
    letter = re.search(r"(?:^| )\(?([A-E])\)?\.$|^\(?([A-E])\)?(?:\n|$)", text)
    number = re.fullmatch(r".*is (-?[\d.]*\d)\.?", text, re.DOTALL)
    text = (letter[1] or letter[2]) if letter else number[1] if number else text[-400:]
    drop = r"\\(?:text|mbox|mathrm|left|right)|\\[,!; ]|\^\{?\\circ\}?|\\?[$%]|\{?(?:units|km|m\^3)\}?|[\s~°]"
    verdicts = []
    for target in (row.answer, row.meta["options"].get(row.answer, row.answer)):
        a, b = (re.sub(drop, "", re.split(r"=|\\approx", x.lower())[-1]).strip(":").rstrip(".") for x in (text, target))
        tuples = [x[1:-1].split(",") if re.fullmatch(r"[(\[].*,.*[)\]]", x) else [x] for x in (a, b)]
        # Quirk: to the script the orders 5-2-3-1-4 and 5-4-3-2-1 are both -5, and so equal; to `value` they are none
        numbers = [[None if (x := value(part)) is None else round(x, 2) for part in parts] for parts in tuples]
        verdicts.append(a == b or (numbers[0] == numbers[1] if None not in sum(numbers, []) else None))
    return True in verdicts or (False if False in verdicts or letter and row.meta["options"] else None)


def _wemath_summary(rows, scores, weights):
    """Four kinds of composite problem: IK part and whole wrong, IG only the whole wrong, CM parts and whole right, RM
    only the whole right; strict wants all parts, loose one. S1: all parts; S2, S3: wholes of two and three steps."""
    wholes, steps = {}, {}  # places of rows
    for i, row in enumerate(rows):
        n, part = row.meta["key"].split("steps_")
        wholes.setdefault((int(n), row.meta["ID"]), {})[part] = i
        steps.setdefault(f"S{n}" if part == "multi" else "S1", []).append(i)
    whole = [(parts.pop("multi"), [*parts.values()]) for (n, _), parts in wholes.items()
             if "multi" in parts and len(parts) == n + 1]  # those of which no row is missing
    right, drawn = scores >= 0.5, weights[:, [multi for multi, _ in whole]]  # the script divides by 525, no subset's N
    multi, every, some = np.array([(right[multi], all(right[subs]), any(right[subs])) for multi, subs in whole]
                                  or np.zeros((0, 3)), bool).T
    share = lambda kind: _weighted(kind, drawn)
    ik, ig, result = share(~multi & ~every), share(~multi & every), {}
    for name, mastered in (("strict", every), ("loose", some)):
        cm, rm = share(multi & mastered), share(multi & ~mastered)
        result |= {name: cm + ig / 2, f"CM {name}": cm, f"RM {name}": _weighted(np.arange(2), np.stack([cm, rm], 1))}
    result |= {"IK": ik, "IG": ig} | {x: _weighted(scores[steps[x]], weights[:, steps[x]]) for x in sorted(steps)}
    return {"score": result["strict"], "scores": result}


def _dynamath_record(record, file):
    """Three layouts: a table (index, qid), Parquet with files for each variant, one variant as JSON."""
    variant = re.search(r"sample\D*(\d+)", file.name) if file.suffix == ".parquet" else None
    seed, kind = record.get("qid") or record["id"], record["answer_type"]
    answer = record["ground_truth"] if "ground_truth" in record else record["answer"]
    form = {"float": "\nAnswer with a number with three decimals.", "multiple choice": "\nAnswer with a letter."}
    return record | {"id": record.get("index") or (f"{seed}-{variant[1]}" if variant else seed), "seed": seed,
                     "answer": float(answer) if kind == "float" else answer, "form": form.get(kind, ""),
                     "level": record.get("knowledge_level") or record["level"]}


def _dynamath_summary(rows, scores, weights):
    """The mean over rows and, as worst case, the share of seeds with every variant right."""
    seeds = {}
    for row, score in zip(rows, scores):
        seeds.setdefault(row.unit, []).append(score)
    worst, variants = np.array([(min(seeds[row.unit]), len(seeds[row.unit])) for row in rows]).T
    found = summary(("average",), ("{subject}",), ("{level}",))(rows, scores, weights)
    return found | {"scores": found["scores"] | {"worst case": _weighted(worst, weights / variants)}}


def _dynamath_rule(text, row):
    if row.meta["answer_type"] == "float":
        number = re.fullmatch(FLOAT + "(π.*)?", text.split()[0])  # π, 3,000 and 1/2 are the judge's
        return abs(float(number[1]) * (math.pi if number[2] else 1) - float(row.answer)) <= 0.001 if number else None
    if row.meta["answer_type"] == "multiple choice" or re.fullmatch(r"[\d.]+", row.answer):
        return _by_words(text, row)
    return text.lower() in row.answer.lower()  # Quirk: to the script an empty text is right too, and 1 for 14


def _tir_rule(text, row):
    task, gold = row.meta["task"], row.answer
    if task == "ocr":  # anywhere in the response; the script corrects two answers
        return {"60.jpg": "mobi", "62.jpg": "aires"}.get(Path(row.meta["image_1"]).name, gold) in text
    text = final_answer(text).replace("*", "").strip()
    numbers, wanted = ([x.lstrip("0") or "0" for x in re.findall(r"\d+", part)] for part in (text, gold))
    if task == "jigsaw":  # share of places right, in the first run of as many numbers
        runs = map(partial(re.findall, r"\d+"), re.findall(r"[\d\s,\uff0c]+", text))
        return next((float(np.mean([*map(str.__eq__, run, wanted)])) for run in runs if len(run) == len(wanted)), None)
    if task == "word_search" and len(wanted) == 2:
        pair = re.search(r"\b(\d+)\s*,\s*(\d+)\b", text)
        return [x.lstrip("0") or "0" for x in pair.groups()] == wanted if pair else None
    if task == "spot_difference" and not gold.isdecimal():
        return len({*numbers} & {*wanted}) / len({*numbers} | {*wanted})
    if gold.isalpha() and len(gold) > 1:  # several letters, in any order
        letters = re.sub(r"\band\b|[\W_]", "", text)
        return True if sorted(letters) == sorted(gold) else False if letters.isupper() else None
    return _by_words(text, row)


def _vsi_record(record, file):
    kind = record["question_type"]
    numeric = kind in ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
    return record | {"kind": re.sub("_(easy|medium|hard)$", "", kind), "options": () if numeric else record["options"],
                     "data_source": "vsi_numerical" if numeric else "vsi",
                     "form": "\nAnswer with a number." if numeric else "\nAnswer with the letter.",
                     "video": f"{record['dataset']}/{record['scene_name']}.mp4"}


def _vsi_rule(text, row):
    word = text.split()[0].rstrip(".")  # strictly the first: "about 20" and "The answer is C" are wrong
    if row.data_source == "vsi":
        return word.lower() == row.answer.lower()
    return mean_relative_accuracy(float(word), float(row.answer)) if re.fullmatch(FLOAT, word) else 0.0


PLAIN = Benchmark("Accuracy", "", 0, (), verify, summary(("{data_source}",)), (), methods=())  # what is no benchmark
BENCHMARKS = {
    "vstar": Benchmark(
        "V* (avg@32)", "craigwu/vstar_bench", 191,
        ("test_questions.jsonl", "direct_attributes/sa_*.json + relative_position/sa_*.json"), _choice,
        summary(("{category}",)), (78.5, 88.7), ("{question_id}", "{text}", "{label}"), prepare=_vstar_record,
        temperature=0.01, top_k=0, k=32),
    **{f"hrbench-{size}k": Benchmark(
        f"HRBench-{size}K", "DreamMr/HR-Bench", 800, (f"hr_bench_{size}k.tsv",), _choice,
        summary(("{category}", "{cycle_category}"), ("cycle {cycle_category}",), overall=("", "{cycle_category}")),
        paper, ("{index}", "{question}", "{answer}"),
        prepare=lambda record, file: record | {"options": [record[x] for x in "ABCD" if record[x]]}, unit="{question}")
        for size, paper in ((4, (71.6, 78.1)), (8, (67.9, 74.3)))},
    "mathverse": Benchmark(
        "MathVerse", "AI4Math/MathVerse", 3940, ("testmini.json",),  # what is neither equal nor a letter is the judge's
        lambda text, row: text == row.answer or (False if re.fullmatch("[A-H]{2}", text + row.answer) else None),
        summary(("{problem_version}",), ("{metadata[subject]}",), ("subfield {metadata[subfield]}",)), (45.6, 55.8),
        ("{sample_index}", "{query_wo}", "{answer}"), unit="{problem_index}"),
    "mathvision": Benchmark(
        "MathVision", "MathLLMs/MathVision", 3040, ("data/test.jsonl", "test.jsonl", "data/test-*.parquet"),
        _mathvision_rule, summary(("level {level}",), ("{subject}",)), ("–", 28.7)),
    "wemath": Benchmark(
        "WeMath", "We-Math/We-Math", 1740, ("data/testmini.json", "testmini.json"), _by_words, _wemath_summary,
        (34.6, 47.7), ("{ID} {key}", "{question}\n{option}", "{answer}"), ("image_path",), unit="{ID}"),
    "dynamath": Benchmark(
        "DynaMath", "DynaMath/DynaMath_Sample", 5010,
        ("DynaMath.tsv", "data/sample*.parquet", "dataset/dataset.json", "dataset.json"), _dynamath_rule,
        _dynamath_summary, (53.3, 61.6), prepare=_dynamath_record, unit="{seed}"),
    "tir-bench": Benchmark(
        "TIR-Bench", "Agents-X/TIR-Bench", 1215, ("TIR-Bench.json",), _tir_rule, summary(("{task}",)), (16.0, 19.8),
        ("{id}", "{prompt}", "{answer}"), ("image_1", "image_2"), lambda record, file: {"image_2": None} | record,
        str.strip),
    "vsi-bench": Benchmark(
        "VSI-Bench", "nyu-visionx/VSI-Bench", 5130, ("test.jsonl", "test-*.parquet"), _vsi_rule,
        summary(("{kind}", "{question_type}"), overall=("{kind}", "{question_type}")), (38.0, "~37", 45.6, 44.0),
        ("{id}", "{question}", "{ground_truth}"), (), _vsi_record, temperature=0.01, top_k=0, methods=(
            "Qwen2.5-VL-7B, 1 fps (~45K tokens)", "Video-R1 (~25K)", "SpaceR (~25K)", "PyVision-Video (~5K)")),
}
