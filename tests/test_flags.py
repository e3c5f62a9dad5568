"""Flags are fields of a dataclass; what is wrong with them is one line, under torchrun too."""

import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser, parse_args

from engine.flags import parse_flags, stop
from evaluate import EvalConfig
from train import Config

ROOT = Path(__file__).parents[1]


@dataclass
class Bounds:
    """What is inherited."""

    max_turns: int = 5  # turns of a row


@dataclass
class Flags(Bounds):
    """Settings."""

    steps: int = 3  # how many
    rate: float | None = None  # in 100 % of cases
    group_size: int = 8  # of one group
    name: str = ""  # who
    fast: bool = False  # in a hurry
    tidy: bool = True  # with care
    files: tuple = ()  # two


def fails(capsys, cls, flags):
    """The one line that wrong flags get."""
    with pytest.raises(SystemExit) as stopped:
        parse_flags(cls, flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and len(error) <= 300
    return error


def test_flags_come_from_the_fields_of_a_dataclass():
    assert parse_flags(Flags, []) == Flags()
    given = parse_flags(Flags, shlex.split("--steps 5 --rate 1e-3 --name x --fast --max_turns 2"))
    assert given == Flags(steps=5, rate=1e-3, name="x", fast=True, max_turns=2)
    assert parse_flags(Config, ["--group_size", "4"]).group_size == 4
    assert parse_flags(Flags, ["--name", ""]).name == ""


def test_a_tuple_takes_values_until_the_next_flag():
    assert parse_flags(Flags, shlex.split("--files a b --steps 4")) == Flags(
        files=("a", "b"), steps=4
    )
    assert parse_flags(EvalConfig, ["--ask", "What?", "a.jpg"]).ask == ("What?", "a.jpg")


@pytest.mark.parametrize(
    "words", [["--group_size", "4"], ["--group-size", "4"], ["--group_size=4"], ["--group-size=4"]]
)
def test_hyphens_are_as_good_as_underscores(words):
    assert parse_flags(Flags, words).group_size == 4


def test_a_switch_has_an_opposite():
    assert parse_flags(Flags, ["--no_tidy"]).tidy is False
    assert parse_flags(Flags, ["--no-tidy"]).tidy is False
    assert parse_flags(Flags, ["--no_fast"], Flags(fast=True)).fast is False


def test_defaults_can_be_those_of_an_earlier_run():
    earlier = Flags(steps=7, rate=0.5, fast=True, files=("a", "b"))
    given = parse_flags(Flags, ["--steps", "9"], earlier)
    assert given == Flags(steps=9, rate=0.5, fast=True, files=("a", "b"))
    assert parse_flags(Flags, ["--steps", "3"], earlier).steps == 3  # the class's own default


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--step", "5"], "did you mean --steps"),
        (["--Steps=5"], "did you mean --steps"),
        (["--max-turn", "5"], "did you mean --max_turns"),
        (["--group", "5"], "did you mean --group_size"),
        (["--zzz"], "--zzz"),
        (["-x"], "-x"),
        (["--steps", "5.5"], "--steps"),
        (["--steps", "x" * 500], "--steps"),
        (["--steps"], "--steps"),
        (["--rate", "fast"], "--rate"),
        (["--fast", "maybe"], "maybe"),
        (["--fast=false"], "false"),
        (["word"], "word"),
        (["word" * 200], "word"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(capsys, flags, words):
    assert words in fails(capsys, Flags, flags)


def test_the_line_is_the_same_on_a_terminal_without_unicode_and_on_a_narrow_one():
    """tyro draws its boxes by the terminal; nothing of that may be left in our line."""
    program = "import sys; from tests.test_flags import *; parse_flags(Flags, sys.argv[1:])"
    seen = set()
    for settings in ({}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "40"}, {"FORCE_COLOR": "1"}):
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **settings}
        command = [sys.executable, "-c", program, "--steps", "many"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        seen.add(done.stderr)
    assert len(seen) == 1 and seen.pop().count("\n") == 1


@pytest.mark.parametrize("config", [Flags, EvalConfig, Config])
def test_help_shows_every_flag_with_comment_and_default(capsys, config):
    with pytest.raises(SystemExit) as stopped:
        parse_flags(config, ["--help"])
    assert stopped.value.code == 0
    shown = " ".join(re.sub(r"[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    for field in fields(config):
        assert re.search(rf"--{field.name}\b.*?\w.*?\(default: [^)]*\)", shown), field.name
    if config is Flags:
        assert "in 100 % of cases (default: None)" in shown and "how many (default: 3)" in shown
        assert "turns of a row (default: 5)" in shown


# ------------------------------------------------------------------------------------- torchrun
def spellings(config):
    """Every way to write a flag of the dataclass."""
    for field in fields(config):
        for name in (field.name, field.name.replace("_", "-")):
            yield f"--{name}"
            if field.type in (bool, "bool"):
                yield f"--no-{name}"
                yield f"--no_{name}"


@pytest.mark.parametrize("config", [EvalConfig, Config])
def test_every_flag_passes_through_torchrun(config):
    """torchrun's parser reads the flags after the script too, and takes beginnings of its own."""
    own = get_args_parser()._option_string_actions
    for flag in spellings(config):
        given = parse_args(["--nproc_per_node=2", "script.py", flag, "value"])
        assert given.training_script_args == [flag, "value"]
        meant = {id(action) for option, action in own.items() if option.startswith(flag)}
        assert len(meant) <= 1, flag  # an error in every version of Python, or in the next


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="argparse is more patient there")
@pytest.mark.parametrize("flag", ["--n", "--log"])
def test_a_beginning_of_two_of_its_flags_does_not_pass_through_torchrun(flag, capsys):
    """The test above can fail."""
    with pytest.raises(SystemExit):
        parse_args(["--nproc_per_node=2", "script.py", flag, "value"])
    assert "ambiguous" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_ends_with_our_line(processes, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.test_flags import Flags, parse_flags\nparse_flags(Flags)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--master_port={port}"]
    command = [*torchrun, f"--nproc_per_node={processes}", script, "--step", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    line = "script.py: unknown flag --step: did you mean --steps? (--help lists the flags)"
    last = [text for text in done.stderr.splitlines() if re.search(r"\w", text)][-1]
    assert done.returncode and last.strip().endswith(line)
    assert re.search(r"exitcode +: 2 ", done.stderr)
    assert done.stderr.splitlines().count(line) == 1  # once, and not once a process


def test_stop_without_torchrun_prints_its_line(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(SystemExit) as stopped:
        stop("rows.json: row 3: no question", code=1)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.endswith(": rows.json: row 3: no question\n")
