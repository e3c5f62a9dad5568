"""The command line: one flag for each field of a dataclass, and one line for whatever is wrong.

tyro makes the flags: a field's trailing comment is its help, `--batch_size` and `--batch-size` are
the same flag, and a switch has an opposite (`--fast`, `--no_fast`). It reports errors in boxes of
many lines, so here they are caught and told again in one.

torchrun reports a process that fails with a long traceback of its own. It shows our message there,
as the last one, if the process writes it into the file that torchrun names; `stop` does this.
"""

import difflib
import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import tyro

COLOUR = re.compile(r"\x1b\[[\d;]*m")
WITHOUT_WORDS = re.compile(r"\n\W*\n")  # rules and empty lines in a box that tyro draws


def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr. torchrun repeats it at the end of its own report.

    The exit code is this process's. torchrun itself ends with 1 whatever its processes end with.
    """
    line = f"{Path(sys.argv[0]).name}: {message}"
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        content = {"message": line, "timestamp": int(time.time())}
        Path(report).write_text(json.dumps(content), encoding="utf-8")
    if not report or os.environ["LOCAL_RANK"] == "0":  # once, and not once a process
        print(line, file=sys.stderr)
    sys.exit(code)


def parse_flags(cls: type, argv: Sequence[str] | None = None, default: Any = None) -> Any:
    """An instance of dataclass `cls` from the command line: `argv`, or what the program was given.

    `default` holds what the flags that are left open mean, where that is not what the class says.
    What is wrong with the flags ends the program: one line, exit code 2.
    """
    shown = io.StringIO()
    settings = {"default": default or cls(), "use_underscores": True, "return_unknown_args": True}
    try:
        with redirect_stderr(shown):
            config, unknown = tyro.cli(cls, args=argv, **settings)
    except SystemExit as stopped:
        if stopped.code == 0:  # --help
            raise
        below_title = COLOUR.sub("", shown.getvalue()).partition("\n")[2]
        paragraph = WITHOUT_WORDS.split(below_title.lstrip("- \n"))[0]
        message = " ".join(paragraph.replace("│", " ").split())
        stop(f"{message:.200} (--help lists the flags)")
    if unknown:
        stop(f"{unknown_word(unknown[0], cls)} (--help lists the flags)")
    return config


def unknown_word(word: str, cls: type) -> str:
    """What is wrong with a word that is no flag, and the flag that was probably meant."""
    if not word.startswith("-"):
        return f"unexpected word {word:.100}"
    flag = word.split("=")[0]
    names = [field.name for field in fields(cls)]
    close = difflib.get_close_matches(flag.strip("-").replace("-", "_"), names, 1)
    hint = f": did you mean --{close[0]}?" if close else ""
    return f"unknown flag {flag:.100}{hint}"
