"""What the README says is so: its flags, its paths, its commands, its table of files."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from test_house import code_tokens

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ROW = re.compile(r"^\| \[(\S+\.py)\]\(\1\) \| ([\d,]+) \| .+ \|$", re.MULTILINE)
NOT_OURS = {  # flags of torchrun, of pip, and of the studies in tests/
    "nproc_per_node",
    "nnodes",
    "rdzv_backend",
    "rdzv_endpoint",
    "shutdown_timeout",
    "check",
    "git",
    "help",
    "quick",
    "seeds",
    "repeats",
    "run",
}


def test_every_flag_of_the_readme_exists():
    import evaluate
    import train

    known = {field.name for cls in (train.Config, evaluate.EvalConfig) for field in fields(cls)}
    used = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", README)}
    assert not used - known - NOT_OURS, used - known - NOT_OURS


def test_every_key_of_the_metrics_is_explained(tmp_path):
    """The table holds what train.py writes down, and nothing else."""
    source = (ROOT / "train.py").read_text() + (ROOT / "rollout.py").read_text()
    source += (ROOT / "engine" / "metrics.py").read_text() + (ROOT / "reward.py").read_text()
    table = README.split("## Metrics")[1].split("\n## ")[0]
    explained = re.findall(r"`([a-z_]+)`", "\n".join(re.findall(r"^\| (.+?) \|", table, re.M)))
    assert len(explained) > 30
    for key in explained:
        name = key.removeprefix("eval_")
        assert f"{name}=" in source or f'"{name}"' in source or f"eval_{name}" in source, key


def test_every_path_of_the_readme_exists():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_table_of_files_says_how_long_they_are():
    """About, in hundreds, so that a small change needs no new table."""
    rows = {name: int(tokens.replace(",", "")) for name, tokens in ROW.findall(README)}
    listed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "engine").glob("*.py")}
    listed |= {"rollout.py", "reward.py", "train.py", "model.py", "data.py", "sandbox.py"}
    assert set(rows) == listed
    for name, tokens in rows.items():
        found = len(code_tokens((ROOT / name).read_text()))
        assert found == pytest.approx(tokens, rel=0.15, abs=60), name


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_of_the_readme_s_scripts(script):
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--task" in done.stdout
