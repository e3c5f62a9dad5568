"""tasks/benchmarks.py: every benchmark in its published layout, with an example of known numbers.

Each benchmark has a function that writes a few rows of it into a folder, and predictions whose
scores under the published script are known. Then comes what all share: final answers, the judge,
files of predictions, broken folders.
"""

import base64
import io
import json
import pickle
import re
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from data import DataError
from tasks.benchmarks import (
    BENCHMARKS,
    final_answer,
    read_benchmark,
    read_predictions,
    score_benchmark,
)


class Case(NamedTuple):
    """A question, an answer to it, and the score that the answer deserves."""

    kind: str  # task or type of question
    question: str
    reference: str | int
    said: str
    right: float | None  # None: the rule cannot tell


def percent(value):
    """What equals a percentage that is given with two decimals."""
    return pytest.approx(value, abs=0.01)


def jpeg(color="red", size=(16, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path, content=None):
    """Write bytes, JSON (a list for .jsonl: one line each) or, without content, a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        content = jpeg()
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    elif not isinstance(content, bytes):
        content = json.dumps(content).encode()
    path.write_bytes(content)


def cell(value):
    """A value as a cell of a table: quoted where it has to be."""
    text = str(value)
    if set(text) & set('"\t\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def put_table(path, rows):
    """Write rows, which are dicts, as tab-separated values."""
    lines = ["\t".join(rows[0])]
    lines += ["\t".join(cell(value) for value in row.values()) for row in rows]
    put(path, ("\n".join(lines) + "\n").encode())


# V* ----------------------------------------------------------------------------------------------
VSTAR_FORM = "\nAnswer with the option's letter from the given choices directly."
VSTAR_COLOURS = "What color is the cap?\n(A) red\n(B) blue\n(C) gold\n(D) gray"
VSTAR_SIDES = (
    "Is the cat left or right of the van?"
    "\n(A) The cat is left of the van.\n(B) The cat is right of the van."
)
VSTAR = [  # category, question, letter
    ("direct_attributes", VSTAR_COLOURS, "B"),
    ("direct_attributes", VSTAR_COLOURS, "C"),
    ("direct_attributes", VSTAR_COLOURS, "A"),
    ("relative_position", VSTAR_SIDES, "A"),
    ("relative_position", VSTAR_SIDES, "B"),
]


def put_vstar(folder):
    rows = []
    for number, (category, question, letter) in enumerate(VSTAR):
        image = f"{category}/sa_{number}.jpg"
        put(folder / image)
        row = {
            "image": image,
            "text": question + VSTAR_FORM,
            "category": category,
            "label": letter,
            "question_id": str(number),
        }
        rows.append(row)
    put(folder / "test_questions.jsonl", rows)


def test_vstar_is_read(tmp_path):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    assert [row.answer for row in rows] == ["B", "C", "A", "A", "B"]
    assert rows[0].data_source == "vstar"
    assert rows[0].question == VSTAR_COLOURS + VSTAR_FORM
    assert Image.open(rows[0].images[0]).size == (16, 12)
    assert rows[3].meta["options"]["B"].startswith("The cat is right of the van")


def test_vstar_is_scored(tmp_path):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    result = score_benchmark("vstar", rows, ["B", "A", r"so \boxed{A}", "A", "A"])
    assert result["correct"] == [1, 0, 1, 1, 0]
    assert result["n"] == 5
    assert result["score"] == 60
    assert result["scores"] == {"direct_attributes": percent(66.67), "relative_position": 50}


def test_vstar_reads_letters_and_words(tmp_path):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    rows[2].meta["options"] = {"A": "gold", "B": "blue", "C": "red", "D": "gray"}
    said = [
        "B",
        "According to it, the answer is C",
        "(A) gold",
        "The cat is left of the van.",
        "The answer is B.",
    ]
    assert score_benchmark("vstar", rows, said)["score"] == 100


def test_vstar_quirks_of_the_script_are_not_ours(tmp_path):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    rule = BENCHMARKS["vstar"].matches
    assert rule("Answer: B", rows[0]) == 1  # the script takes the A that leads
    assert rule("Because it shines it is blue", rows[0]) != 0  # and the B
    assert rule("the answer is blue", rows[1]) == 0
    assert rule("", rows[2]) == 0
    assert rule("<answer>\n\\boxed{}\n</answer>", rows[2]) != 1
    assert rule("b", rows[0]) == 1
    assert rule("I cannot tell", rows[0]) is None
    rows[0].meta["options"] = {"A": "a bus", "B": "a car"}
    assert rule("A car", rows[0]) == 1


def put_vstar_folders(folder):
    """The pictures' own files, without test_questions.jsonl; OCR is none of the 191 rows."""
    for category in ("direct_attributes", "relative_position", "OCR"):
        put(folder / category / "sa_7.jpg")
        record = {
            "target_object": ["cap"],
            "bbox": [[1, 2, 3, 4]],
            "question": "Color?",
            "options": ["red", "blue"],
        }
        put(folder / category / "sa_7.json", record)


def test_vstar_folders_alone(tmp_path):
    put_vstar_folders(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    assert [row.meta["category"] for row in rows] == ["direct_attributes", "relative_position"]
    assert rows[0].answer == "A"
    assert rows[0].question == "Color?\n(A) red\n(B) blue"
    assert Path(rows[0].images[0]) == tmp_path / "direct_attributes" / "sa_7.jpg"


def test_vstar_with_one_folder_missing(tmp_path):
    put_vstar_folders(tmp_path)
    (tmp_path / "relative_position" / "sa_7.json").unlink()
    expected = r"test_questions\.jsonl.*relative_position/sa_\*\.json"
    with pytest.raises(DataError, match=expected):
        read_benchmark("vstar", tmp_path)


# HRBench -----------------------------------------------------------------------------------------
HRBENCH = [  # category, question, options of the first cycle
    ("single", 'What is "on"\nthe gate?', ["9", "4", "6", "2"]),
    ("cross", "What is left?", ["bus", "car", "van", "tram"]),
]


def put_hrbench(folder, picture=None):
    """Two questions of four cycles each; the k-th row's picture is 16 + k wide."""
    rows = []
    for category, question, texts in HRBENCH:
        for cycle in range(4):
            options = texts[-cycle:] + texts[:-cycle] if cycle else texts
            image = picture or jpeg(size=(16 + len(rows), 12))
            row = {
                "index": len(rows),
                "question": question,
                "answer": "ABCD"[cycle],
                "category": category,
                **dict(zip("ABCD", options, strict=True)),
                "cycle_category": cycle,
                "image": base64.b64encode(image).decode(),
            }
            rows.append(row)
    put_table(folder / "hr_bench_4k.tsv", rows)


def test_hrbench_is_read(tmp_path):
    put_hrbench(tmp_path)
    rows = read_benchmark("hrbench-4k", tmp_path)
    assert rows[0].question == 'What is "on"\nthe gate?\n(A) 9\n(B) 4\n(C) 6\n(D) 2'
    assert rows[5].meta["options"]["B"] == "bus"
    widths = [row.images[0]().size[0] for row in rows]
    assert widths == list(range(16, 24))  # each has its own picture, opened where it lies
    travelled = pickle.loads(pickle.dumps(rows[3].images[0]))
    assert travelled().size == (19, 12)


def test_hrbench_is_scored(tmp_path):
    put_hrbench(tmp_path)
    rows = read_benchmark("hrbench-4k", tmp_path)
    far = "It is C, since the bus is on the far left side of it"
    said = ["A", "B. 9", "The answer is C.", "A", "bus", "A", far, "D"]
    result = score_benchmark("hrbench-4k", rows, said)
    assert result["correct"] == [1, 1, 1, 0, 1, 0, 0, 1]
    assert result["undecided"] == 1
    assert result["score"] == 62.5
    assert result["scores"]["single"] == 75
    assert result["scores"]["cross"] == 50


def test_hrbench_is_a_mean_of_cycles(tmp_path):
    put_hrbench(tmp_path)
    rows = read_benchmark("hrbench-4k", tmp_path)[:4]
    result = score_benchmark("hrbench-4k", rows + rows[:1], ["A", "C", "A", "A", "A"])
    assert result["score"] == 25  # over the rows it would be 40


def test_a_big_table_is_streamed(tmp_path):
    put_hrbench(tmp_path, picture=bytes(1_000_000))
    file = tmp_path / "hr_bench_4k.tsv"
    _, rows = file.read_bytes().split(b"\n", 1)
    with open(file, "ab") as stream:
        for copy in range(1, 10):
            stream.write(re.sub(rb"(?m)^(\d)\t", rb"%d\1\t" % copy, rows))
    assert file.stat().st_size > 100_000_000
    tracemalloc.start()
    rows = read_benchmark("hrbench-4k", tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 80
    assert kept < 1_000_000
    assert peak < 20_000_000
    _, start, _ = rows[79].images[0].args
    assert start > 100_000_000  # a picture is where it was: this far into the file


def test_a_table_that_was_cut_off(tmp_path):
    put_hrbench(tmp_path)
    file = tmp_path / "hr_bench_4k.tsv"
    whole = file.read_bytes()
    for missing in (30, 1000):
        file.write_bytes(whole[:-missing])
        with pytest.raises(DataError, match="hr_bench_4k.tsv: row [78]: .*download"):
            read_benchmark("hrbench-4k", tmp_path)


def test_the_folder_of_the_other_hrbench(tmp_path):
    put_hrbench(tmp_path)
    with pytest.raises(DataError, match="hr_bench_8k.tsv.*there is hr_bench_4k.tsv"):
        read_benchmark("hrbench-8k", tmp_path)


# MathVerse ---------------------------------------------------------------------------------------
MATHVERSE = [  # version, answer, prediction
    ("Text Dominant", "C", "C"),
    ("Text Lite", "C", "C:30"),
    ("Vision Intensive", "C", " C"),
    ("Vision Dominant", "14", "14"),
    ("Vision Only", "14", "14.0"),
]


def put_mathverse(folder):
    rows = []
    for number, (version, answer, _) in enumerate(MATHVERSE):
        image = f"images_version_{number + 1}/image_1.png"
        put(folder / "images" / image)
        row = {
            "sample_index": str(number),
            "problem_index": "1",
            "problem_version": version,
            "question": "",
            "answer": answer,
            "image": image,
            "question_type": "multi-choice" if answer == "C" else "free-form",
            "metadata": {
                "split": "testmini",
                "source": "GeoQA",
                "subject": "Plane Geometry",
                "subfield": "Angle",
            },
            "query_wo": f"Directly answer {number}.",
            "query_cot": "First reason.",
        }
        rows.append(row)
    put(folder / "testmini.json", rows)


def test_mathverse(tmp_path):
    put_mathverse(tmp_path)
    rows = read_benchmark("mathverse", tmp_path)
    assert rows[2].question == "Directly answer 2."
    assert Path(rows[2].images[0]).exists()
    result = score_benchmark("mathverse", rows, [said for *_, said in MATHVERSE])
    assert result["correct"] == [1, 0, 1, 1, 0]
    assert result["score"] == 60
    assert result["undecided"] == 2
    assert result["scores"]["Vision Only"] == 0
    assert result["scores"]["Plane Geometry"] == 60


def test_the_judge_is_asked_once_for_what_the_rule_cannot_tell(tmp_path):
    put_mathverse(tmp_path)
    rows = read_benchmark("mathverse", tmp_path)
    asked = []

    def judge(items):
        asked.append(items)
        return [True, None]

    result = score_benchmark("mathverse", rows, [said for *_, said in MATHVERSE], judge=judge)
    assert asked == [[("Directly answer 1.", "C", "C:30"), ("Directly answer 4.", "14", "14.0")]]
    assert result["correct"] == [1, 1, 1, 1, 0]
    assert result["undecided"] == 1


# MathVision --------------------------------------------------------------------------------------
LETTERS = ["A", "B", "C", "D", "E"]
DIGITS = ["5", "6", "7", "8", "9"]
ORDERS = ["5-4-3-2-1", "5-2-3-4-1", "5-4-2-3-1", "5-3-2-1-4", "5-2-3-1-4"]
MATHVISION = [  # answer, options, prediction, score
    ("0.75", [], r"\boxed{\frac{3}{4}}", 1),
    ("C", LETTERS, "The correct answer is (C).", 1),
    ("B", DIGITS, r"\boxed{6}", 1),
    ("3.14", [], r"\boxed{3.1416}", 1),
    ("12", [], "x is 12 cm", 0),
    ("D", LETTERS, "D. 16", 0),
]


def put_mathvision(folder, cases=MATHVISION):
    rows = []
    for number, (answer, options, _, _) in enumerate(cases):
        image = f"images/{number}.jpg"
        put(folder / image)
        row = {
            "id": str(number),
            "question": "How many?\n<image1>",
            "options": options,
            "answer": answer,
            "solution": None,
            "level": 1 + number % 2,
            "subject": "counting",
            "image": image,
        }
        rows.append(row)
    put(folder / "data" / "test.jsonl", rows)


def test_mathvision(tmp_path):
    put_mathvision(tmp_path)
    rows = read_benchmark("mathvision", tmp_path)
    assert [len(row.images) for row in rows] == [1] * 6
    assert rows[1].question == "How many?\n<image1>"  # options that repeat the letters are left out
    assert rows[2].question.endswith("\n(A) 5\n(B) 6\n(C) 7\n(D) 8\n(E) 9")
    result = score_benchmark("mathvision", rows, [said for _, _, said, _ in MATHVISION])
    assert result["correct"] == [right for *_, right in MATHVISION]
    assert result["score"] == percent(66.67)
    parts = {"level 1": percent(66.67), "level 2": percent(66.67), "counting": percent(66.67)}
    assert result["scores"] == parts


@pytest.mark.parametrize(
    "answer, options, said, right",
    [
        ("(2,0.5)", [], r"\boxed{(2, \frac{1}{2})}", 1),
        ("(2,3)", [], r"\boxed{(3,2)}", 0),
        ("12.566", [], r"\boxed{4\pi}", 1),
        ("7", [], r"first \boxed{3}, no: \boxed{7}", 1),
        ("60", [], r"$\alpha = 60^\circ$", 1),
        ("12", [], "11.999", 1),
        ("3.14", [], "3.12", 0),
        ("3-\\sqrt{5}", [], r"\boxed{0.76}", 1),
        ("2^{10}", [], "1024", 1),
        ("1,000", [], "1000", 1),
        ("B", DIGITS, "B", 1),
        ("B", DIGITS, "A", 0),
        ("B", DIGITS, r"\boxed{7}", 0),
        ("A", LETTERS, "A\nfor a reason", 1),
        ("16", [], "The answer is 16. It was easy", 1),
        ("E", ORDERS, r"\boxed{5-4-3-2-1}", None),
        ("E", ORDERS, r"\boxed{5-2-3-1-4}", 1),
        ("KNAO", [], "knao", 1),
        ("6 m", [], r"\boxed{6\text{ cm}}", None),
        ("2", [], "1(", None),
        ("2", [], "...", None),
        ("2", [], "(" * 300, None),
        ("A", LETTERS, "(" + "," * 50_000, None),
        ("2", [], "9^{9^{9^{9^{9}}}}", None),
        ("2", [], "__import__('os')", None),
    ],
)
def test_mathvision_rule(tmp_path, answer, options, said, right):
    put_mathvision(tmp_path, [(answer, options, said, right)])
    (row,) = read_benchmark("mathvision", tmp_path)
    assert BENCHMARKS["mathvision"].matches(said, row) == right


# WeMath ------------------------------------------------------------------------------------------
def put_wemath(folder, patterns):
    """Write composites such as "101": a right and a wrong part, the whole right. -> predictions."""
    rows = []
    said = []
    for number, pattern in enumerate(patterns):
        steps = len(pattern) - 1
        parts = [*(str(part) for part in range(1, steps + 1)), "multi"]
        for part, right in zip(parts, pattern, strict=True):
            image = f"{steps}steps/image/{number}-{part}.png"
            put(folder / "data" / image)
            row = {
                "ID": f"{steps}steps_{number}",
                "split": "testmini",
                "knowledge concept": "Translation",
                "question": "Which?",
                "option": "A. 4; B. 9;C. 16;C.",
                "answer": "B",
                "image_path": image,
                "key": f"{steps}steps_{part}",
                "question number": len(rows),
                "knowledge concept description": "moves",
            }
            rows.append(row)
            well = "<Thought process>: the Answer is near <Answer>: B"
            said.append(well if right == "1" else "<Answer>: C")
    put(folder / "data" / "testmini.json", rows)
    return said


def test_wemath(tmp_path):
    said = put_wemath(tmp_path, ["111", "101", "110", "010", "0001", "1111"])
    rows = read_benchmark("wemath", tmp_path)
    assert rows[0].question == "Which?\nA. 4; B. 9;C. 16;C."
    assert len(rows) == 20
    assert len({row.id for row in rows}) == 20
    result = score_benchmark("wemath", rows, said)
    assert result["score"] == percent(41.67)
    assert result["scores"] == {
        "strict": percent(41.67),
        "CM strict": percent(33.33),
        "RM strict": 50,
        "loose": percent(58.33),
        "CM loose": 50,
        "RM loose": 25,
        "IK": percent(16.67),
        "IG": percent(16.67),
        "S1": percent(64.29),
        "S2": 50,
        "S3": 100,
    }


def test_wemath_of_some_rows(tmp_path):
    said = put_wemath(tmp_path, ["111", "101"])
    rows = read_benchmark("wemath", tmp_path)
    part = score_benchmark("wemath", rows[:4], said[:4])
    assert part["score"] == 100  # a composite that is not complete is only in S1
    assert part["scores"]["RM strict"] == 0
    assert part["scores"]["S1"] == 100
    assert score_benchmark("wemath", rows[:1], ["C"])["score"] == 0


def test_wemath_letters(tmp_path):
    put_wemath(tmp_path, ["111"])
    row = read_benchmark("wemath", tmp_path)[0]
    rule = BENCHMARKS["wemath"].matches
    forms = ["B", "Answer: (B)", "**Answer**: B", "B. 9", r"\boxed{B}", "<Answer>: B.", "b"]
    for said in [*forms, "The answer is B"]:
        assert rule(said, row) == 1, said
    assert rule("C", row) == 0
    assert rule("Because of it", row) is None
    assert rule("Answer:", row) != 1


# DynaMath ----------------------------------------------------------------------------------------
def short_answer(text):
    """A response in the form that DynaMath asks for."""
    return f'```json\n{{"solution": "\\frac{{1}}{{2}}", "short answer": "{text}"}}\n```'


class Variant(NamedTuple):
    """One form of a question of DynaMath, and a prediction."""

    seed: int
    number: int
    kind: str
    answer: str
    said: str

    def fields(self):
        """What all layouts call the same."""
        return {
            "question": "Which?",
            "answer_type": self.kind,
            "subject": "statistics",
            "knowledge_level": "high school",
        }


DYNAMATH = [
    Variant(1, 1, "float", "2.0", short_answer("2.0009")),
    Variant(1, 2, "float", "3.0", short_answer("3.002")),
    Variant(1, 3, "float", "4.0", "4"),
    Variant(2, 1, "multiple choice", "A", "A"),
    Variant(2, 2, "multiple choice", "B", short_answer("b")),
    Variant(2, 3, "multiple choice", "C", short_answer("C. 12")),
    Variant(3, 1, "text", "May", short_answer("may")),
    Variant(3, 2, "text", "June", short_answer("June 4")),
    Variant(3, 3, "text", "July", "Ju"),
]


def put_dynamath(folder):
    rows = []
    for index, variant in enumerate(DYNAMATH):
        row = {
            "index": index,
            "qid": variant.seed,
            "varid": variant.number,
            "image": base64.b64encode(jpeg()).decode(),
            "answer": variant.answer,
        }
        rows.append(row | variant.fields())
    put_table(folder / "DynaMath.tsv", rows)


def test_dynamath_table(tmp_path):
    put_dynamath(tmp_path)
    rows = read_benchmark("dynamath", tmp_path)
    assert rows[0].question != "Which?"  # the form of a number is asked for
    assert rows[6].question == "Which?"
    assert rows[4].images[0]().size == (16, 12)
    result = score_benchmark("dynamath", rows, [variant.said for variant in DYNAMATH])
    assert result["correct"] == [1, 0, 1, 1, 1, 1, 1, 0, 1]
    assert result["score"] == result["scores"]["average"] == percent(77.78)
    assert result["scores"]["worst case"] == percent(33.33)


def test_dynamath_rule(tmp_path):
    put_dynamath(tmp_path)
    rows = read_benchmark("dynamath", tmp_path)
    number, letter, text = rows[0], rows[4], rows[6]
    rule = BENCHMARKS["dynamath"].matches
    assert rule("", text) == 0  # to the script it is right
    assert rule(short_answer(""), text) == 0
    assert rule("1/2", number) is None
    assert rule("0.6366197723675814π", number) == 1
    assert rule("Both", letter) is None
    text.answer = "14"
    assert rule("1", text) == 0
    assert rule("14", text) == 1


def test_dynamath_one_variant_as_json(tmp_path):
    record = {
        "question": "Period?",
        "answer": "2.0944",
        "image": "image/image1.png",
        "answer_type": "float",
        "subject": "analytic geometry",
        "level": "high school",
    }
    put(tmp_path / "dataset" / "dataset.json", {"1": record})
    put(tmp_path / "dataset" / "image" / "image1.png")
    rows = read_benchmark("dynamath", tmp_path)
    assert rows[0].id == "1"
    assert score_benchmark("dynamath", rows, [r"\boxed{2.094}"])["score"] == 100


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    put(tmp_path / "data" / "sample1-00000-of-00001.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_benchmark("dynamath", tmp_path)


def put_parquet(folder):
    """A file for each variant -> predictions in the order of the rows."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    said = []
    for number in (1, 2, 3):
        records = []
        for variant in DYNAMATH:
            if variant.number == number:
                record = {
                    "id": str(variant.seed),
                    "image": "image/1.png",
                    "decoded_image": {"bytes": jpeg(), "path": None},
                    "ground_truth": variant.answer,
                }
                records.append(record | variant.fields())
                said.append(variant.said)
        file = folder / "data" / f"sample{number}-00000-of-00001.parquet"
        file.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return said


def test_parquet_is_read(tmp_path):
    put_parquet(tmp_path)
    rows = read_benchmark("dynamath", tmp_path)
    assert [row.id for row in rows[:4]] == ["1-1", "2-1", "3-1", "1-2"]
    assert rows[4].images[0]().size == (16, 12)


def test_parquet_is_scored_as_the_table_is(tmp_path):
    said = put_parquet(tmp_path)
    rows = read_benchmark("dynamath", tmp_path)
    result = score_benchmark("dynamath", rows, said)
    assert result["score"] == percent(77.78)
    assert result["scores"]["worst case"] == percent(33.33)


def test_the_tenth_variant_comes_after_the_ninth(tmp_path):
    put_parquet(tmp_path)
    files = tmp_path / "data"
    shutil.copy(files / "sample1-00000-of-00001.parquet", files / "sample10-00000-of-00001.parquet")
    assert read_benchmark("dynamath", tmp_path)[-1].id == "3-10"


# TIR-Bench ---------------------------------------------------------------------------------------
TIR = [
    Case("instrument", "What is the temperature?", 72, "72 degrees", 1),
    Case("math", "How much?\nA. 12%\nB. 13%\nC. 14%", "B", "(B) 13%", 1),
    Case("jigsaw", "In which order?", "3, 1, 4, 2", "3, 1, 2, 4", 0.5),
    Case("spot_difference", "Where?", "2, 5, 7", "5, 7, 9", 0.5),
    Case("word_search", "Where?", "(3, 8)", "(3,8)", 1),
    Case("ocr", "What does it say?", "harbor", "Harbor", 0),
]


def put_tir(folder, cases=TIR):
    rows = []
    for number, case in enumerate(cases):
        first = f"data/{case.kind}/{number}.jpg"
        second = f"data/{case.kind}/{number}b.jpg"
        put(folder / first)
        put(folder / second)
        row = {
            "id": number,
            "task": case.kind,
            "prompt": case.question,
            "answer": case.reference,
            "image_1": first,
            "image_2": second if case.kind == "spot_difference" else None,
            "meta_data": {"difficulty": 2},
        }
        rows.append(row)
    put(folder / "TIR-Bench.json", rows)


def test_tir(tmp_path):
    put_tir(tmp_path)
    rows = read_benchmark("tir-bench", tmp_path)
    assert [len(row.images) for row in rows] == [1, 1, 1, 2, 1, 1]
    assert rows[1].question == TIR[1].question
    result = score_benchmark("tir-bench", rows, [case.said for case in TIR])
    assert result["correct"] == [case.right for case in TIR]
    assert result["score"] == percent(66.67)
    assert result["scores"]["jigsaw"] == 50
    assert len(result["scores"]) == 6


COLOURS = "Which?\nA. red\nB. blue"
TWO_NUMBERS = "I see 3, then 4. " * 20


@pytest.mark.parametrize(
    "case",
    [
        Case("color", COLOURS, "A", "", 0),
        Case("color", COLOURS, "A", "green", None),
        Case("color", COLOURS, "B", "blue", 1),
        Case("color", COLOURS, "B", "**B**", 1),
        Case("color", COLOURS, "A", "A, B", 0),
        Case("symbolic", "Which of A B C D?", "ACD", "D, A and C", 1),
        Case("symbolic", "Which of A B C D?", "ACD", "AC", 0),
        Case("jigsaw", "Order?", "3, 1, 4, 2", r"Of 4 pieces: \boxed{3,1,4,2}", 1),
        Case("jigsaw", "Order?", "3, 1, 4, 2", "1 2", None),
        Case("spot_difference", "How many?", "3", "3", 1),
        Case("spot_difference", "How many?", "3", "3, 4", 0),
        Case("word_search", "How many?", "7", "7", 1),
        Case("word_search", "Where?", "(3, 8)", "Row 3, 9", 0),
        Case("ocr", "Say?", "harbor", "It says harbor.", 1),
        Case("maze", "How many?", "12", r"\boxed{12.0}", 1),
        Case("math", "How much?", "0.75", r"\boxed{\frac{3}{4}}", 1),
        Case("math", "How much?", "7", TWO_NUMBERS + "So the answer is 7.", 1),
        Case("math", "How much?", "7", TWO_NUMBERS + "So it is 7.", None),
    ],
    ids=lambda case: f"{case.kind}-{case.said[-20:]}",
)
def test_tir_rule(tmp_path, case):
    put_tir(tmp_path, [case])
    (row,) = read_benchmark("tir-bench", tmp_path)
    found = BENCHMARKS["tir-bench"].matches(case.said, row)
    if case.right == 0:
        assert found in (0, None)  # what nobody can tell is wrong, too
    else:
        assert found == case.right


def test_tir_corrects_two_answers(tmp_path):
    put_tir(tmp_path, [Case("ocr", "Say?", "wrong", "", 0)] * 61)
    rows = read_benchmark("tir-bench", tmp_path)
    found = [BENCHMARKS["tir-bench"].matches("It says mobi", row) for row in rows]
    assert found == [0] * 60 + [1]


# VSI-Bench ---------------------------------------------------------------------------------------
VSI = [
    Case("object_counting", "Which?", "4", "3", 0.6),
    Case("object_abs_distance", "Which?", "2.0", "1.9", 1),
    Case("object_size_estimation", "Which?", "100", "120", 0.6),
    Case("room_size_estimation", "Which?", "20", "about 20", 0),
    Case("object_rel_distance", "Which?", "B", "B.", 1),
    Case("object_rel_direction_easy", "Which?", "A", "A", 1),
    Case("object_rel_direction_medium", "Which?", "A", "B", 0),
    Case("object_rel_direction_hard", "Which?", "B", "b", 1),
    Case("route_planning", "Which?", "A", "a", 1),
    Case("obj_appearance_order", "Which?", "C", "The answer is C", 0),
]


def put_vsi(folder):
    rows = []
    for number, case in enumerate(VSI):
        scene = f"scene{number:04}_00"
        put(folder / "scannet" / f"{scene}.mp4", b"video")
        numeric = number < 4
        row = {
            "id": number,
            "dataset": "scannet",
            "scene_name": scene,
            "question_type": case.kind,
            "question": case.question,
            "options": None if numeric else ["A. bed", "B. sofa", "C. lamp"],
            "ground_truth": case.reference,
        }
        rows.append(row)
    put(folder / "test.jsonl", rows)


def test_vsi(tmp_path):
    put_vsi(tmp_path)
    rows = read_benchmark("vsi-bench", tmp_path)
    assert rows[4].question.startswith("Which?\n(A) bed\n(B) sofa\n(C) lamp\n")
    assert Path(rows[4].videos[0]) == tmp_path / "scannet" / "scene0004_00.mp4"
    assert rows[0].data_source == "vsi_numerical"
    assert rows[4].data_source == "vsi"
    assert rows[0].images == ()
    result = score_benchmark("vsi-bench", rows, [case.said for case in VSI])
    assert result["correct"] == pytest.approx([case.right for case in VSI])
    assert result["score"] == percent(60.83)
    assert len(result["scores"]) == 8
    assert result["scores"]["object_rel_direction"] == percent(66.67)


@pytest.mark.parametrize("said", ["nan", "inf", "two", "-4", "4" * 400])
def test_vsi_numbers_that_are_none(tmp_path, said):
    put_vsi(tmp_path)
    row = read_benchmark("vsi-bench", tmp_path)[0]
    assert BENCHMARKS["vsi-bench"].matches(said, row) == 0


# What is shared ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prediction, answer",
    [
        ("  plain ", "plain"),
        ("<answer>\n\\boxed{B}\n</answer>", "B"),
        (
            "<answer>\\boxed{A}</answer> no: <answer>\\boxed{\\frac{1}{2}}</answer>",
            r"\frac{1}{2}",
        ),
        (r"\boxed{1} and \boxed{\text{C}}", "C"),
        ("<answer> (B) </answer>", "(B)"),
        (r"so $\boxed{x}$ " + "then " * 500, "x"),
        (r"\boxed{3", r"\boxed{3"),
    ],
)
def test_final_answers(prediction, answer):
    assert final_answer(prediction) == answer


def test_judge_only(tmp_path):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    verdicts = [True, None, True, None]

    def judge(items):
        return verdicts[: len(items)]

    judged = score_benchmark("vstar", rows, ["A", "B", "", "?", "?"], judge, judge_only=True)
    assert judged["correct"] == [1, 0, 0, 1, 0]
    assert judged["undecided"] == 1


def test_the_judge_is_not_asked_where_the_rule_can_tell(tmp_path):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)

    def judge(items):
        pytest.fail("asked without need")

    assert score_benchmark("vstar", rows, ["B", "C", "A", "A", "B"], judge)["score"] == 100


class Yes:
    """A judge that finds everything right, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, items):
        self.asked += items
        return [True] * len(items)


def test_the_judge_is_not_asked_for_numbers_of_vsi(tmp_path):
    """They are right in part: by mean relative accuracy."""
    put_vsi(tmp_path)
    rows = read_benchmark("vsi-bench", tmp_path)
    judge = Yes()
    result = score_benchmark("vsi-bench", rows, [case.said for case in VSI], judge, True)
    assert result["correct"] == [0.6, 1, 0.6, 0] + [1] * 6
    assert len(judge.asked) == 6


def test_the_judge_is_not_asked_for_what_is_right_in_part(tmp_path):
    put_tir(tmp_path)
    rows = read_benchmark("tir-bench", tmp_path)
    result = score_benchmark("tir-bench", rows, [case.said for case in TIR], Yes(), True)
    assert result["correct"] == [1, 1, 0.5, 0.5, 1, 1]


# Predictions -------------------------------------------------------------------------------------
def test_predictions_come_in_any_order_or_without_ids(tmp_path):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    file = tmp_path / "predictions.jsonl"
    with_ids = [
        {"id": "3", "prediction": "D"},
        {"id": "1", "prediction": "B"},
        {"id": 0, "prediction": "A"},
        {"id": 2, "prediction": "C"},
        {"id": 4, "prediction": "E"},
    ]
    put(file, with_ids)
    assert read_predictions(file, rows) == ["A", "B", "C", "D", "E"]
    put(file, [{"prediction": text} for text in ("A\u2028", 2.5, None, "D\nE", "")])
    assert read_predictions(file, rows) == ["A\u2028", "2.5", "", "D\nE", ""]


GOOD = [json.dumps({"id": number, "prediction": "A"}) for number in range(5)]
NO_ID = '{"prediction": "A"}'


@pytest.mark.parametrize(
    "lines, match",
    [
        (GOOD[:4], "4 predictions for 5 rows.* 4$"),
        ([*GOOD, GOOD[2]], "line 6: the id 2 a second time"),
        ([*GOOD[:4], '{"id": "x", "prediction": "A"}'], "line 5: the id 'x' of no row"),
        ([*GOOD[:2], "{"], "line 3: "),
        ([*GOOD[:2], '"A"'], "line 3: "),
        ([*GOOD[:2], '{"id": 2, "answer": "A"}'], "line 3: "),
        ([*GOOD[:2], NO_ID], "line 3: "),
        ([*[NO_ID] * 4, GOOD[4]], "line 5: "),
        ([NO_ID] * 6, "6 predictions for 5 rows"),
        (['{"prediction": ["A"]}'], "line 1: "),
    ],
)
def test_predictions_that_are_wrong(tmp_path, lines, match):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    file = tmp_path / "predictions.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=match):
        read_predictions(file, rows)


def test_predictions_that_are_missing(tmp_path):
    put_vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    with pytest.raises(DataError, match="nothing.jsonl"):
        read_predictions(tmp_path / "nothing.jsonl", rows)


# Broken folders ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BENCHMARKS)
def test_wrong_folders_say_what_was_expected(tmp_path, name):
    (tmp_path / "holiday.txt").touch()
    expected = f"{tmp_path}.*expected .*{BENCHMARKS[name].source}.*holiday.txt"
    with pytest.raises(DataError, match=expected):
        read_benchmark(name, tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_benchmark(name, tmp_path / "nowhere")


def test_an_unknown_benchmark(tmp_path):
    with pytest.raises(DataError, match="vstar, hrbench-4k"):
        read_benchmark("vstart", tmp_path)


def test_a_missing_video(tmp_path):
    put_vsi(tmp_path)
    (tmp_path / "scannet" / "scene0003_00.mp4").unlink()
    with pytest.raises(DataError, match="test.jsonl: row 4: scannet/scene0003_00.mp4"):
        read_benchmark("vsi-bench", tmp_path)
    assert len(read_benchmark("vsi-bench", tmp_path, media=False)) == 10


@pytest.mark.parametrize(
    "text, match",
    [
        ("[]", "no rows"),
        ('[{"sample_index": 1}]', "row 1: no field 'query_wo'"),
        ("version https://git-lfs.github.com/spec/v1", "row 1"),
        ("[3]", "row 1"),
    ],
)
def test_a_file_that_holds_no_rows(tmp_path, text, match):
    put(tmp_path / "testmini.json", text.encode())
    with pytest.raises(DataError, match=match):
        read_benchmark("mathverse", tmp_path)


def test_a_field_that_only_the_summary_needs(tmp_path):
    row = {"image": "", "text": "?\n(A) a\n(B) b", "label": "A", "question_id": 1}
    put(tmp_path / "test_questions.jsonl", [row])
    with pytest.raises(DataError, match="row 1: no field 'category'"):
        read_benchmark("vstar", tmp_path)


def test_the_file_of_records_itself(tmp_path):
    put_mathverse(tmp_path)
    assert len(read_benchmark("mathverse", tmp_path / "testmini.json")) == 5


def test_an_id_that_comes_twice(tmp_path):
    put_mathverse(tmp_path)
    file = tmp_path / "testmini.json"
    put(file, json.loads(file.read_text()) * 2)
    with pytest.raises(DataError, match="row 6: the id '0' a second time"):
        read_benchmark("mathverse", tmp_path)


# The paper ---------------------------------------------------------------------------------------
RESULT = {
    "score": 88.0,
    "scores": {"direct_attributes": 90.0, "relative_position": 85.0},
    "n": 191,
}


def test_the_table_shows_the_paper_and_this_run():
    lines = BENCHMARKS["vstar"].table(RESULT).split("\n")
    assert lines[0].startswith("V*")
    assert "191 of 191" in lines[0]
    assert [line.split()[-1] for line in lines[1:]] == ["78.5", "88.7", "88.0", "90.0", "85.0"]
    assert "28.7" in BENCHMARKS["mathvision"].table(RESULT)


def test_the_table_shows_intervals():
    more = {"interval": [80.0, 93.5], "intervals": {}, "visual_tokens": 0}
    lines = BENCHMARKS["vstar"].table(RESULT | more).split("\n")
    assert lines[3].split() == ["this", "run", "88.0", "[80.0,", "93.5]"]


def test_the_table_shows_visual_tokens():
    table = BENCHMARKS["vsi-bench"].table(RESULT | {"visual_tokens": 5120.0})
    for part in ("~45K", "5120 visual", "44.0"):
        assert part in table


def test_the_protocol_is_the_papers():
    protocol = {}
    for name, benchmark in BENCHMARKS.items():
        protocol[name] = (benchmark.temperature, benchmark.top_k, benchmark.k)
    assert protocol.pop("vstar") == (0.01, 0, 32)
    assert protocol.pop("vsi-bench") == (0.01, 0, 1)
    assert len(protocol) == 7
    assert set(protocol.values()) == {(0.5, 20, 1)}


# Degenerate answers ------------------------------------------------------------------------------
PIECES = [
    "0",
    "1",
    "(",
    "{",
    ",",
    " ",
    "is 1",
    "answer is ",
    "\\boxed{",
    "<answer>",
    "\\frac",
    "^{9",
    "$",
]


@pytest.mark.parametrize(
    "name, write, index",
    [
        ("vstar", put_vstar, 0),
        ("mathverse", put_mathverse, 0),
        ("mathvision", put_mathvision, 0),
        ("mathvision", put_mathvision, 2),
        ("tir-bench", put_tir, 0),
        ("tir-bench", put_tir, 1),
        ("tir-bench", put_tir, 2),
        ("tir-bench", put_tir, 4),
        ("vsi-bench", put_vsi, 0),
    ],
)
def test_degenerate_answers(tmp_path, name, write, index):
    """Repetition is what a broken policy says.

    A rule whose time is quadratic in it would stay here for minutes.
    """
    write(tmp_path)
    row = read_benchmark(name, tmp_path)[index]
    rule = BENCHMARKS[name].matches
    for piece in PIECES:
        begin = "x" if piece == " " else ""
        said = begin + piece * (100_000 // len(piece)) + "x"
        assert not rule(said, row), piece
    assert rule(None, row) == 0
