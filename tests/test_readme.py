"""What the README says is so: the files and their lines, the flags, the commands. `python tests/test_readme.py` renews
the table of files."""
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = "data.py sandbox.py model.py rollout.py reward.py train.py evaluate.py tasks/puzzles.py tasks/benchmarks.py".split()
ROW = re.compile(r"^\| \[(\S+)\]\(\1\) \| (\d+) \| (.+) \|$", re.M)


def lines(name):
    return len((ROOT / name).read_text().splitlines())


def table():
    """name, lines, and the first sentence of the file's docstring."""
    rows = []
    for name in FILES:
        about = (ROOT / name).read_text().split('"""')[1].split("\n\n")[0].replace("\n", " ")
        rows.append(f"| [{name}]({name}) | {lines(name)} | {about} |")
    return "\n".join(rows)


def test_the_table_of_files_is_true():
    said = {name: int(n) for name, n, _ in ROW.findall((ROOT / "README.md").read_text())}
    assert said == {name: lines(name) for name in FILES}, "python tests/test_readme.py renews it"


def test_every_flag_of_the_readme_exists():
    import evaluate
    import train
    known = {field.name for cls in (train.Config, evaluate.EvalConfig) for field in fields(cls)}
    used = set(re.findall(r"--(\w+)", (ROOT / "README.md").read_text())) - {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint",
                                                                                       "shutdown_timeout", "help", "quick", "seeds", "repeats"}
    assert not used - known, used - known


def test_every_path_of_the_readme_exists():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_of_the_readme_s_scripts(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--task" in done.stdout


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text()
    rows = list(ROW.finditer(text))
    start, end = (rows[0].start(), rows[-1].end()) if rows else (text.index("FILES_TABLE"), text.index("FILES_TABLE") + 11)
    readme.write_text(text[:start] + table() + text[end:])
