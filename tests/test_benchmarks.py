"""Every benchmark in its published layout, a few rows each, with a worked example whose numbers are known; then what is
shared: final answers, the judge, prediction files, broken folders, big tables.
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

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError  # noqa: E402
from tasks.benchmarks import BENCHMARKS, final_answer, read_benchmark, read_predictions  # noqa: E402
from tasks.benchmarks import score_benchmark as score  # noqa: E402

VERSIONS = ["Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only"]


def jpeg(color="red", size=(16, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path, content=None):
    """Write bytes, JSON (a list for .jsonl: one line each) or, without content, a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    elif not isinstance(content, bytes | None):
        content = json.dumps(content).encode()
    path.write_bytes(jpeg() if content is None else content)


def tsv(path, rows):
    cell = lambda x: '"' + str(x).replace('"', '""') + '"' if set(str(x)) & set('"\t\n') else str(x)
    lines = ["\t".join(rows[0])] + ["\t".join(cell(x) for x in row.values()) for row in rows]
    put(path, ("\n".join(lines) + "\n").encode())


# V* -----------------------------------------------------------------------------------------------------------------
def vstar(folder):
    form = "\nAnswer with the option's letter from the given choices directly."
    colors = "What color is the cap?\n(A) red\n(B) blue\n(C) gold\n(D) gray"
    sides = "Is the cat left or right of the van?\n(A) The cat is left of the van.\n(B) The cat is right of the van."
    asked = [("direct_attributes", colors, label) for label in "BCA"] + [("relative_position", sides, x) for x in "AB"]
    for i, (category, _, _) in enumerate(asked):
        put(folder / category / f"sa_{i}.jpg")
    put(folder / "test_questions.jsonl", [
        {"image": f"{category}/sa_{i}.jpg", "text": text + form, "category": category, "label": label,
         "question_id": str(i)} for i, (category, text, label) in enumerate(asked)])


def test_vstar(tmp_path):
    vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    assert [row.answer for row in rows] == list("BCAAB") and rows[0].data_source == "vstar"
    assert rows[0].question.endswith("directly.") and Image.open(rows[0].images[0]).size == (16, 12)
    assert rows[3].meta["options"]["B"].startswith("The cat is right of the van")
    said = ["B", "According to it, the answer is C", "(A) gold", "The cat is left of the van.", "The answer is B."]
    rows[2].meta["options"] = {"A": "gold", "B": "blue", "C": "red", "D": "gray"}
    assert score("vstar", rows, said)["score"] == 100
    result = score("vstar", rows, ["B", "A", r"so \boxed{A}", "A", "A"])
    assert result["score"] == 60 and result["correct"] == [1, 0, 1, 1, 0] and result["n"] == 5
    assert result["scores"] == {"direct_attributes": pytest.approx(66.67, abs=.01), "relative_position": 50}


def test_vstar_quirks_of_the_script_are_not_ours(tmp_path):
    vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    rule = BENCHMARKS["vstar"].matches
    assert rule("Answer: B", rows[0]) == 1  # leading A
    assert rule("Because it shines it is blue", rows[0]) != 0 and rule("the answer is blue", rows[1]) == 0  # leading B
    assert rule("", rows[2]) == 0 and rule("<answer>\n\\boxed{}\n</answer>", rows[2]) != 1
    assert rule("b", rows[0]) == 1 and rule("I cannot tell", rows[0]) is None
    rows[0].meta["options"] = {"A": "a bus", "B": "a car"}
    assert rule("A car", rows[0]) == 1


def test_vstar_folders_alone(tmp_path):
    for category in ("direct_attributes", "relative_position", "OCR"):
        put(tmp_path / category / "sa_7.jpg")
        put(tmp_path / category / "sa_7.json", {"target_object": ["cap"], "bbox": [[1, 2, 3, 4]], "question": "Color?",
                                                "options": ["red", "blue"]})
    rows = read_benchmark("vstar", tmp_path)
    assert [row.meta["category"] for row in rows] == ["direct_attributes", "relative_position"]
    assert rows[0].answer == "A" and rows[0].question == "Color?\n(A) red\n(B) blue"
    assert Path(rows[0].images[0]) == tmp_path / "direct_attributes" / "sa_7.jpg"
    (tmp_path / "relative_position" / "sa_7.json").unlink()
    with pytest.raises(DataError, match=r"test_questions\.jsonl.*relative_position/sa_\*\.json"):
        read_benchmark("vstar", tmp_path)


# HRBench ------------------------------------------------------------------------------------------------------------
def hrbench(folder, picture=None):
    rows = []
    for category, question, texts in (("single", 'What is "on"\nthe gate?', ["9", "4", "6", "2"]),
                                      ("cross", "What is left?", ["bus", "car", "van", "tram"])):
        for cycle in range(4):
            options = texts[-cycle:] + texts[:-cycle] if cycle else texts
            rows.append({"index": len(rows), "question": question, "answer": "ABCD"[cycle], "category": category,
                         **dict(zip("ABCD", options)), "cycle_category": cycle,
                         "image": base64.b64encode(picture or jpeg(size=(16 + len(rows), 12))).decode()})
    tsv(folder / "hr_bench_4k.tsv", rows)


def test_hrbench(tmp_path):
    hrbench(tmp_path)
    rows = read_benchmark("hrbench-4k", tmp_path)
    assert rows[0].question == 'What is "on"\nthe gate?\n(A) 9\n(B) 4\n(C) 6\n(D) 2'
    assert rows[5].meta["options"]["B"] == "bus"
    assert [row.images[0]().size[0] for row in rows] == list(range(16, 24))  # each its own picture, where it lies
    assert pickle.loads(pickle.dumps(rows[3].images[0]))().size == (19, 12)
    far = "It is C, since the bus is on the far left side of it"
    result = score("hrbench-4k", rows, ["A", "B. 9", "The answer is C.", "A", "bus", "A", far, "D"])
    assert result["correct"] == [1, 1, 1, 0, 1, 0, 0, 1] and result["undecided"] == 1
    assert result["score"] == 62.5 and result["scores"]["single"] == 75 and result["scores"]["cross"] == 50


def test_hrbench_is_a_mean_of_cycles(tmp_path):
    hrbench(tmp_path)
    rows = read_benchmark("hrbench-4k", tmp_path)[:4]
    assert score("hrbench-4k", rows + rows[:1], ["A", "C", "A", "A", "A"])["score"] == 25  # 40 over the rows


def test_a_big_table_is_streamed(tmp_path):
    hrbench(tmp_path, picture=bytes(1_000_000))
    file = tmp_path / "hr_bench_4k.tsv"
    header, rest = file.read_bytes().split(b"\n", 1)
    with open(file, "ab") as stream:
        for i in range(1, 10):
            stream.write(re.sub(rb"(?m)^(\d)\t", rb"%d\1\t" % i, rest))
    tracemalloc.start()
    rows = read_benchmark("hrbench-4k", tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 80 and file.stat().st_size > 100_000_000 and kept < 1_000_000 and peak < 20_000_000
    assert rows[79].images[0].args[1] > 100_000_000


def test_a_table_that_was_cut_off(tmp_path):
    hrbench(tmp_path)
    file = tmp_path / "hr_bench_4k.tsv"
    whole = file.read_bytes()
    for cut in (-30, -1000):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="hr_bench_4k.tsv: row [78]: .*download"):
            read_benchmark("hrbench-4k", tmp_path)
    with pytest.raises(DataError, match="hr_bench_8k.tsv.*there is hr_bench_4k.tsv"):
        read_benchmark("hrbench-8k", tmp_path)


# MathVerse ----------------------------------------------------------------------------------------------------------
def mathverse(folder):
    put(folder / "testmini.json", [
        {"sample_index": str(i), "problem_index": "1", "problem_version": version, "question": "", "answer": answer,
         "image": f"images_version_{i + 1}/image_1.png",
         "question_type": "multi-choice" if answer == "C" else "free-form",
         "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
         "query_wo": f"Directly answer {i}.", "query_cot": "First reason."}
        for i, (version, answer) in enumerate(zip(VERSIONS, ["C", "C", "C", "14", "14"]))])
    for i in range(5):
        put(folder / "images" / f"images_version_{i + 1}" / "image_1.png")


def test_mathverse(tmp_path):
    mathverse(tmp_path)
    rows = read_benchmark("mathverse", tmp_path)
    assert rows[2].question == "Directly answer 2." and Path(rows[2].images[0]).exists()
    said, asked = ["C", "C:30", " C", "14", "14.0"], []
    result = score("mathverse", rows, said)
    assert result["correct"] == [1, 0, 1, 1, 0] and result["score"] == 60 and result["undecided"] == 2
    assert result["scores"]["Vision Only"] == 0 and result["scores"]["Plane Geometry"] == 60

    def judge(items):
        asked.append(items)
        return [True, None]
    result = score("mathverse", rows, said, judge=judge)
    assert asked == [[("Directly answer 1.", "C", "C:30"), ("Directly answer 4.", "14", "14.0")]]
    assert result["correct"] == [1, 1, 1, 1, 0] and result["undecided"] == 1


# MathVision ---------------------------------------------------------------------------------------------------------
MATHVISION = [("0.75", [], r"\boxed{\frac{3}{4}}", 1), ("C", list("ABCDE"), "The correct answer is (C).", 1),
              ("B", list("56789"), r"\boxed{6}", 1), ("3.14", [], r"\boxed{3.1416}", 1), ("12", [], "x is 12 cm", 0),
              ("D", list("ABCDE"), "D. 16", 0)]


def mathvision(folder, rows=MATHVISION):
    put(folder / "data" / "test.jsonl", [
        {"id": str(i), "question": "How many?\n<image1>", "options": options, "answer": answer, "solution": None,
         "level": 1 + i % 2, "subject": "counting", "image": f"images/{i}.jpg"}
        for i, (answer, options, _, _) in enumerate(rows)])
    for i in range(len(rows)):
        put(folder / "images" / f"{i}.jpg")


def test_mathvision(tmp_path):
    mathvision(tmp_path)
    rows = read_benchmark("mathvision", tmp_path)
    assert [len(row.images) for row in rows] == [1] * 6
    assert rows[1].question == "How many?\n<image1>"  # options that only repeat the letters are not shown
    assert rows[2].question.endswith("\n(A) 5\n(B) 6\n(C) 7\n(D) 8\n(E) 9")
    result = score("mathvision", rows, [said for _, _, said, _ in MATHVISION])
    assert result["correct"] == [right for _, _, _, right in MATHVISION]
    assert result["score"] == pytest.approx(66.67, abs=.01)
    assert result["scores"] == pytest.approx({"level 1": 66.67, "level 2": 66.67, "counting": 66.67}, abs=.01)


ORDERS = ["5-4-3-2-1", "5-2-3-4-1", "5-4-2-3-1", "5-3-2-1-4", "5-2-3-1-4"]


@pytest.mark.parametrize("answer, options, said, right", [
    ("(2,0.5)", [], r"\boxed{(2, \frac{1}{2})}", 1), ("(2,3)", [], r"\boxed{(3,2)}", 0),
    ("12.566", [], r"\boxed{4\pi}", 1), ("7", [], r"first \boxed{3}, no: \boxed{7}", 1),
    ("60", [], r"$\alpha = 60^\circ$", 1), ("12", [], "11.999", 1), ("3.14", [], "3.12", 0),
    ("3-\\sqrt{5}", [], r"\boxed{0.76}", 1), ("2^{10}", [], "1024", 1), ("1,000", [], "1000", 1),
    ("B", list("56789"), "B", 1), ("B", list("56789"), "A", 0), ("B", list("56789"), r"\boxed{7}", 0),
    ("A", list("ABCDE"), "A\nfor a reason", 1), ("16", [], "The answer is 16. It was easy", 1),
    ("E", ORDERS, r"\boxed{5-4-3-2-1}", None), ("E", ORDERS, r"\boxed{5-2-3-1-4}", 1), ("KNAO", [], "knao", 1),
    ("6 m", [], r"\boxed{6\text{ cm}}", None), ("2", [], "1(", None), ("2", [], "...", None),
    ("2", [], "(" * 300, None), ("A", list("ABCDE"), "(" + "," * 50_000, None),
    ("2", [], "9^{9^{9^{9^{9}}}}", None), ("2", [], "__import__('os')", None)])
def test_mathvision_rule(tmp_path, answer, options, said, right):
    mathvision(tmp_path, [(answer, options, said, right)])
    assert BENCHMARKS["mathvision"].matches(said, read_benchmark("mathvision", tmp_path)[0]) == right


# WeMath -------------------------------------------------------------------------------------------------------------
def wemath(folder, patterns):
    """Rows and predictions for composites such as "101": parts right, wrong, and the whole right."""
    rows, said = [], []
    for number, pattern in enumerate(patterns):
        steps = len(pattern) - 1
        for part, right in zip([*map(str, range(1, steps + 1)), "multi"], pattern):
            rows.append({"ID": f"{steps}steps_{number}", "split": "testmini", "knowledge concept": "Translation",
                         "question": "Which?", "option": "A. 4; B. 9;C. 16;C.", "answer": "B",
                         "image_path": f"{steps}steps/image/{number}-{part}.png", "key": f"{steps}steps_{part}",
                         "question number": len(rows), "knowledge concept description": "moves"})
            put(folder / "data" / rows[-1]["image_path"])
            said.append("<Thought process>: the Answer is near <Answer>: B" if right == "1" else "<Answer>: C")
    put(folder / "data" / "testmini.json", rows)
    return said


def test_wemath(tmp_path):
    said = wemath(tmp_path, ["111", "101", "110", "010", "0001", "1111"])
    rows = read_benchmark("wemath", tmp_path)
    assert rows[0].question == "Which?\nA. 4; B. 9;C. 16;C." and len({row.id for row in rows}) == len(rows) == 20
    result = score("wemath", rows, said)
    assert result["score"] == pytest.approx(41.67, abs=.01)
    assert result["scores"] == pytest.approx({
        "strict": 41.67, "CM strict": 33.33, "RM strict": 50, "loose": 58.33, "CM loose": 50, "RM loose": 25,
        "IK": 16.67, "IG": 16.67, "S1": 64.29, "S2": 50, "S3": 100}, abs=.01)
    part = score("wemath", rows[:4], said[:4])  # a composite that is not whole is only in S1
    assert part["score"] == 100 and part["scores"]["RM strict"] == 0 and part["scores"]["S1"] == 100
    assert score("wemath", rows[:1], ["C"])["score"] == 0


def test_wemath_letters(tmp_path):
    wemath(tmp_path, ["111"])
    row, rule = read_benchmark("wemath", tmp_path)[0], BENCHMARKS["wemath"].matches
    for said in ("B", "Answer: (B)", "**Answer**: B", "B. 9", r"\boxed{B}", "<Answer>: B.", "The answer is B", "b"):
        assert rule(said, row) == 1, said
    assert rule("C", row) == 0 and rule("Because of it", row) is None and rule("Answer:", row) != 1


# DynaMath -----------------------------------------------------------------------------------------------------------
def dynamath_rows():
    seeds = [("float", ["2.0", "3.0", "4.0"]), ("multiple choice", ["A", "B", "C"]), ("text", ["May", "June", "July"])]
    for seed, (kind, answers) in enumerate(seeds, 1):
        for variant, answer in enumerate(answers, 1):
            yield seed, variant, {"question": "Which?", "answer_type": kind, "subject": "statistics",
                                  "knowledge_level": "high school"}, answer


SHORT = ['```json\n{"solution": "\\frac{1}{2}", "short answer": "%s"}\n```', "%s"]
DYNAMATH = [SHORT[0] % "2.0009", SHORT[0] % "3.002", "4", "A", SHORT[0] % "b", SHORT[0] % "C. 12", SHORT[0] % "may",
            SHORT[0] % "June 4", "Ju"]


def test_dynamath_table(tmp_path):
    image = base64.b64encode(jpeg()).decode()
    tsv(tmp_path / "DynaMath.tsv", [
        {"index": i, "qid": seed, "varid": variant, "image": image, "answer": answer, **more}
        for i, (seed, variant, more, answer) in enumerate(dynamath_rows())])
    rows = read_benchmark("dynamath", tmp_path)
    assert rows[0].question != "Which?" and rows[6].question == "Which?" and rows[4].images[0]().size == (16, 12)
    result = score("dynamath", rows, DYNAMATH)
    assert result["correct"] == [1, 0, 1, 1, 1, 1, 1, 0, 1]
    assert result["score"] == result["scores"]["average"] == pytest.approx(77.78, abs=.01)
    assert result["scores"]["worst case"] == pytest.approx(33.33, abs=.01)
    rule = BENCHMARKS["dynamath"].matches
    assert rule("", rows[6]) == 0 and rule(SHORT[0] % "", rows[6]) == 0  # right to the script
    assert rule("1/2", rows[0]) is None and rule("0.6366197723675814π", rows[0]) == 1 and rule("Both", rows[4]) is None
    rows[6].answer = "14"
    assert rule("1", rows[6]) == 0 and rule("14", rows[6]) == 1


def test_dynamath_one_variant_as_json(tmp_path):
    put(tmp_path / "dataset" / "dataset.json", {
        "1": {"question": "Period?", "answer": "2.0944", "image": "image/image1.png", "answer_type": "float",
              "subject": "analytic geometry", "level": "high school"}})
    put(tmp_path / "dataset" / "image" / "image1.png")
    rows = read_benchmark("dynamath", tmp_path)
    assert rows[0].id == "1" and score("dynamath", rows, [r"\boxed{2.094}"])["score"] == 100


def test_parquet(tmp_path, monkeypatch):
    file = tmp_path / "data" / "sample1-00000-of-00001.parquet"
    put(file, b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_benchmark("dynamath", tmp_path)
    monkeypatch.undo()
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for variant in (1, 2, 3):
        parquet.write_table(pyarrow.Table.from_pylist([
            {"id": str(seed), "image": "image/1.png", "decoded_image": {"bytes": jpeg(), "path": None},
             "ground_truth": answer, **more} for seed, number, more, answer in dynamath_rows() if number == variant]),
            tmp_path / "data" / f"sample{variant}-00000-of-00001.parquet")
    rows = read_benchmark("dynamath", tmp_path)
    assert [row.id for row in rows[:4]] == ["1-1", "2-1", "3-1", "1-2"] and rows[4].images[0]().size == (16, 12)
    shutil.copy(file, file.with_name("sample10-00000-of-00001.parquet"))
    assert read_benchmark("dynamath", tmp_path)[-1].id == "3-10"  # after the ninth
    result = score("dynamath", rows, [DYNAMATH[i + 3 * j] for i in range(3) for j in range(3)])
    assert result["score"] == pytest.approx(77.78, abs=.01)
    assert result["scores"]["worst case"] == pytest.approx(33.33, abs=.01)


# TIR-Bench ----------------------------------------------------------------------------------------------------------
TIR = [("instrument", "What is the temperature?", 72, "72 degrees", 1),
       ("math", "How much?\nA. 12%\nB. 13%\nC. 14%", "B", "(B) 13%", 1),
       ("jigsaw", "In which order?", "3, 1, 4, 2", "3, 1, 2, 4", 0.5),
       ("spot_difference", "Where?", "2, 5, 7", "5, 7, 9", 0.5),
       ("word_search", "Where?", "(3, 8)", "(3,8)", 1), ("ocr", "What does it say?", "harbor", "Harbor", 0)]


def tir(folder, rows=TIR):
    put(folder / "TIR-Bench.json", [
        {"id": i, "task": task, "prompt": prompt, "answer": answer, "image_1": f"data/{task}/{i}.jpg",
         "image_2": f"data/{task}/{i}b.jpg" if task == "spot_difference" else None, "meta_data": {"difficulty": 2}}
        for i, (task, prompt, answer, _, _) in enumerate(rows)])
    for i, row in enumerate(rows):
        put(folder / "data" / row[0] / f"{i}.jpg")
        put(folder / "data" / row[0] / f"{i}b.jpg")


def test_tir(tmp_path):
    tir(tmp_path)
    rows = read_benchmark("tir-bench", tmp_path)
    assert [len(row.images) for row in rows] == [1, 1, 1, 2, 1, 1] and rows[1].question == TIR[1][1]
    result = score("tir-bench", rows, [said for *_, said, _ in TIR])
    assert result["correct"] == [right for *_, right in TIR] and result["score"] == pytest.approx(66.67, abs=.01)
    assert result["scores"]["jigsaw"] == 50 and len(result["scores"]) == 6


@pytest.mark.parametrize("task, prompt, answer, said, right", [
    ("color", "Which?\nA. red\nB. blue", "A", "", 0), ("color", "Which?\nA. red\nB. blue", "A", "green", None),
    ("color", "Which?\nA. red\nB. blue", "B", "blue", 1), ("color", "Which?\nA. red\nB. blue", "B", "**B**", 1),
    ("symbolic", "Which of A B C D?", "ACD", "D, A and C", 1), ("symbolic", "Which of A B C D?", "ACD", "AC", 0),
    ("jigsaw", "Order?", "3, 1, 4, 2", r"Of 4 pieces: \boxed{3,1,4,2}", 1),
    ("jigsaw", "Order?", "3, 1, 4, 2", "1 2", None),
    ("spot_difference", "How many?", "3", "3", 1), ("spot_difference", "How many?", "3", "3, 4", 0),
    ("word_search", "How many?", "7", "7", 1), ("word_search", "Where?", "(3, 8)", "Row 3, 9", 0),
    ("ocr", "Say?", "harbor", "It says harbor.", 1), ("maze", "How many?", "12", r"\boxed{12.0}", 1),
    ("math", "How much?", "0.75", r"\boxed{\frac{3}{4}}", 1),
    ("math", "How much?", "7", "I see 3, then 4. " * 20 + "So the answer is 7.", 1),
    ("math", "How much?", "7", "I see 3, then 4. " * 20 + "So it is 7.", None),
    ("color", "Which?\nA. red\nB. blue", "A", "A, B", 0)])
def test_tir_rule(tmp_path, task, prompt, answer, said, right):
    tir(tmp_path, [(task, prompt, answer, said, right)])
    got = BENCHMARKS["tir-bench"].matches(said, read_benchmark("tir-bench", tmp_path)[0])
    assert got == right or right == 0 and got is None


def test_tir_corrects_two_answers(tmp_path):
    tir(tmp_path, [("ocr", "Say?", "wrong", "", 0)] * 61)
    rows = read_benchmark("tir-bench", tmp_path)
    assert [BENCHMARKS["tir-bench"].matches("It says mobi", row) for row in rows] == [0] * 60 + [1]


# VSI-Bench ----------------------------------------------------------------------------------------------------------
VSI = [("object_counting", "4", "3", 0.6), ("object_abs_distance", "2.0", "1.9", 1),
       ("object_size_estimation", "100", "120", 0.6), ("room_size_estimation", "20", "about 20", 0),
       ("object_rel_distance", "B", "B.", 1), ("object_rel_direction_easy", "A", "A", 1),
       ("object_rel_direction_medium", "A", "B", 0), ("object_rel_direction_hard", "B", "b", 1),
       ("route_planning", "A", "a", 1), ("obj_appearance_order", "C", "The answer is C", 0)]


def vsi(folder):
    put(folder / "test.jsonl", [
        {"id": i, "dataset": "scannet", "scene_name": f"scene{i:04}_00", "question_type": kind, "question": "Which?",
         "options": None if answer.replace(".", "").isdigit() else ["A. bed", "B. sofa", "C. lamp"],
         "ground_truth": answer} for i, (kind, answer, _, _) in enumerate(VSI)])
    for i in range(len(VSI)):
        put(folder / "scannet" / f"scene{i:04}_00.mp4", b"video")


def test_vsi(tmp_path):
    vsi(tmp_path)
    rows = read_benchmark("vsi-bench", tmp_path)
    assert rows[4].question.startswith("Which?\n(A) bed\n(B) sofa\n(C) lamp\n")
    assert Path(rows[4].videos[0]) == tmp_path / "scannet" / "scene0004_00.mp4"
    assert rows[0].data_source == "vsi_numerical" and rows[4].data_source == "vsi" and rows[0].images == ()
    result = score("vsi-bench", rows, [said for _, _, said, _ in VSI])
    assert result["correct"] == pytest.approx([right for *_, right in VSI])
    assert result["score"] == pytest.approx(60.83, abs=.01) and len(result["scores"]) == 8
    assert result["scores"]["object_rel_direction"] == pytest.approx(66.67, abs=.01)
    for said in ("nan", "inf", "two", "-4", "4" * 400):
        assert BENCHMARKS["vsi-bench"].matches(said, rows[0]) == 0, said


# What is shared -----------------------------------------------------------------------------------------------------
def test_final_answers():
    assert final_answer("  plain ") == "plain"
    assert final_answer("<answer>\n\\boxed{B}\n</answer>") == "B"
    assert final_answer("<answer>\\boxed{A}</answer> no: <answer>\\boxed{\\frac{1}{2}}</answer>") == r"\frac{1}{2}"
    assert final_answer(r"\boxed{1} and \boxed{\text{C}}") == "C" and final_answer("<answer> (B) </answer>") == "(B)"
    assert final_answer(r"so $\boxed{x}$ " + "then " * 500) == "x" and final_answer(r"\boxed{3") == r"\boxed{3"


def test_judge_only_and_no_judge(tmp_path):
    vstar(tmp_path)
    rows = read_benchmark("vstar", tmp_path)
    judged = score("vstar", rows, ["A", "B", "", "?", "?"], judge=lambda items: [True, None, True, None][:len(items)],
                   judge_only=True)
    assert judged["correct"] == [1, 0, 0, 1, 0] and judged["undecided"] == 1
    assert score("vstar", rows, list("BCAAB"), judge=lambda items: pytest.fail("asked without need"))["score"] == 100


def test_the_judge_is_not_asked_for_what_is_right_in_part(tmp_path):
    asked = []
    judge = lambda items: asked.extend(items) or [True] * len(items)
    vsi(tmp_path / "vsi")
    numeric = score("vsi-bench", read_benchmark("vsi-bench", tmp_path / "vsi"), [x for _, _, x, _ in VSI], judge, True)
    assert numeric["correct"][:4] == [.6, 1, .6, 0] and numeric["correct"][4:] == [1] * 6 and len(asked) == 6
    tir(tmp_path / "tir")
    places = score("tir-bench", read_benchmark("tir-bench", tmp_path / "tir"), [x for *_, x, _ in TIR], judge, True)
    assert places["correct"] == [1, 1, 0.5, 0.5, 1, 1]


def test_predictions(tmp_path):
    vstar(tmp_path)
    rows, file = read_benchmark("vstar", tmp_path), tmp_path / "predictions.jsonl"
    put(file, [{"id": str(i) if i % 2 else i, "prediction": "ABCDE"[i]} for i in (3, 1, 0, 2, 4)])
    assert read_predictions(file, rows) == list("ABCDE")
    put(file, [{"prediction": x} for x in ("A\u2028", 2.5, None, "D\nE", "")])
    assert read_predictions(file, rows) == ["A\u2028", "2.5", "", "D\nE", ""]

    def fails(lines, match):
        file.write_text("\n".join(lines))
        with pytest.raises(DataError, match=match):
            read_predictions(file, rows)
    good = [json.dumps({"id": i, "prediction": "A"}) for i in range(5)]
    fails(good[:4], "4 predictions for 5 rows.* 4$")
    fails(good + [good[2]], "line 6: the id 2 a second time")
    fails(good[:4] + ['{"id": "x", "prediction": "A"}'], "line 5: the id 'x' of no row")
    fails(good[:2] + ["{"], "line 3: ")
    fails(good[:2] + ['"A"'], "line 3: ")
    fails(good[:2] + ['{"id": 2, "answer": "A"}'], "line 3: ")
    fails(good[:2] + ['{"prediction": "A"}'], "line 3: ")
    fails(['{"prediction": "A"}'] * 4 + [good[4]], "line 5: ")
    fails(['{"prediction": "A"}'] * 6, "6 predictions for 5 rows")
    fails(['{"prediction": ["A"]}'], "line 1: ")
    with pytest.raises(DataError, match="nothing.jsonl"):
        read_predictions(tmp_path / "nothing.jsonl", rows)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_wrong_folders_say_what_was_expected(tmp_path, name):
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(DataError, match=f"{tmp_path}.*expected .*{BENCHMARKS[name].source}.*holiday.txt"):
        read_benchmark(name, tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_benchmark(name, tmp_path / "nowhere")


def test_partial_folders(tmp_path):
    vsi(tmp_path / "vsi")
    (tmp_path / "vsi" / "scannet" / "scene0003_00.mp4").unlink()
    with pytest.raises(DataError, match="test.jsonl: row 4: scannet/scene0003_00.mp4"):
        read_benchmark("vsi-bench", tmp_path / "vsi")
    assert len(read_benchmark("vsi-bench", tmp_path / "vsi", media=False)) == 10
    for name, text, match in (("a", "[]", "no rows"), ("b", '[{"sample_index": 1}]', "row 1: no field 'query_wo'"),
                              ("c", "version https://git-lfs.github.com/spec/v1", "row 1"), ("d", "[3]", "row 1")):
        put(tmp_path / name / "testmini.json", text.encode())
        with pytest.raises(DataError, match=match):
            read_benchmark("mathverse", tmp_path / name)
    put(tmp_path / "e" / "test_questions.jsonl", [
        {"image": "", "text": "?\n(A) a\n(B) b", "label": "A", "question_id": 1}])
    with pytest.raises(DataError, match="row 1: no field 'category'"):  # which only the summary needs
        read_benchmark("vstar", tmp_path / "e")
    mathverse(tmp_path)
    assert len(read_benchmark("mathverse", tmp_path / "testmini.json")) == 5  # the file itself
    put(tmp_path / "testmini.json", json.loads((tmp_path / "testmini.json").read_text()) * 2)
    with pytest.raises(DataError, match="row 6: the id '0' a second time"):
        read_benchmark("mathverse", tmp_path)
    with pytest.raises(DataError, match="vstar, hrbench-4k"):
        read_benchmark("vstart", tmp_path)


def test_tables_and_protocol(tmp_path):
    result = {"score": 88.0, "scores": {"direct_attributes": 90.0, "relative_position": 85.0}, "n": 191}
    lines = BENCHMARKS["vstar"].table(result).split("\n")
    assert lines[0].startswith("V*") and "191 of 191" in lines[0]
    assert [line.split()[-1] for line in lines[1:]] == ["78.5", "88.7", "88.0", "90.0", "85.0"]
    more = {"interval": [80.0, 93.5], "intervals": {}, "visual_tokens": 0}
    lines = BENCHMARKS["vstar"].table(result | more).split("\n")
    assert lines[3].split() == ["this", "run", "88.0", "[80.0,", "93.5]"]
    video = BENCHMARKS["vsi-bench"].table(result | {"visual_tokens": 5120.0})
    assert "~45K" in video and "5120 visual" in video and "44.0" in video
    assert "28.7" in BENCHMARKS["mathvision"].table(result)
    protocol = {name: (b.temperature, b.top_k, b.k) for name, b in BENCHMARKS.items()}
    assert protocol.pop("vstar") == (0.01, 0, 32) and protocol.pop("vsi-bench") == (0.01, 0, 1)
    assert set(protocol.values()) == {(0.5, 20, 1)} and len(protocol) == 7


@pytest.mark.parametrize("name, build, index", [
    ("vstar", vstar, 0), ("mathverse", mathverse, 0), ("mathvision", mathvision, 0), ("mathvision", mathvision, 2),
    ("tir-bench", tir, 0), ("tir-bench", tir, 1), ("tir-bench", tir, 2), ("tir-bench", tir, 4), ("vsi-bench", vsi, 0)])
def test_degenerate_answers(tmp_path, name, build, index):
    """Repetition is what a broken policy says. A rule that is quadratic in it would stay here for minutes."""
    build(tmp_path)
    row = read_benchmark(name, tmp_path)[index]
    for piece in ("0", "1", "(", "{", ",", " ", "is 1", "answer is ", "\\boxed{", "<answer>", "\\frac", "^{9", "$"):
        said = "x" * (piece == " ") + piece * (100_000 // len(piece)) + "x"
        assert not BENCHMARKS[name].matches(said, row), piece
    assert BENCHMARKS[name].matches(None, row) == 0
