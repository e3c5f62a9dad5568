"""What an evaluation stands on: its settings, the newest checkpoint, its folder and lines.

What a reader may rely on: a folder belongs to one set of settings, and to one group of processes at
a time. Files are replaced whole. Of rollouts.jsonl, which grows, a kill can only cut the last line,
and such a line is dropped.
"""

import hashlib
import json
import os
from pathlib import Path

from data import DataError
from engine.report import as_text, read_lines
from engine.run import append, leader, open_folder, read_json, versions, write_whole


def newest(task: str, frames: str, any_data: bool) -> str:
    """The newest checkpoint under runs/ of a run that had this task and these frames.

    any_data: also of a run on data of its own, which does not fit puzzles. Raises DataError where
    there is none.
    """
    wanted = set(task.split(","))
    steps = []
    for file in Path("runs").glob("*/config.json"):
        run = read_json(file)
        taught = run.get("task", "").split(",")
        fits = wanted.issubset(taught) and run.get("frames", "") == frames
        if fits and (any_data or not run.get("data")):
            steps += file.parent.glob("step_*")
    if not steps:
        flags = f"--task {task}" + f" --frames {frames}" * bool(frames)
        raise DataError(
            f"no checkpoint of a run with {flags} under runs/: make one with "
            f"`python train.py {flags}` (about ten minutes), or name one with --model"
        )
    return str(max(steps, key=os.path.getmtime))


def take_folder(out: str, what: str, settings: dict) -> str:
    """Make and lock a folder for these settings, write its config.json -> the folder.

    out: the folder, or "" for one that an evaluation of `what` with these settings always gets.
    Versions are written beside the settings; an evaluation may go on with others. Raises DataError
    where the folder is of other settings, or in use.
    """
    text = json.dumps(settings)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    out = out or f"runs/eval-{what}-{digest}"
    open_folder(Path(out))
    file = Path(out, "config.json")
    before = read_json(file)
    differ = []
    for name, value in json.loads(text).items():
        if before and before.get(name) != value:
            differ.append(f"{name} was {before.get(name)!r:.50} and is {value!r:.50}")
    if differ:
        listed = "; ".join(differ)
        raise DataError(
            f"{out:.60} is of other settings: give another --out, or those again: {listed:.170}"
        )
    if leader():
        write_whole(file, json.dumps({**settings, "versions": versions()}, indent=1) + "\n")
    return out


class Lines:
    """rollouts.jsonl: a line a finished trajectory, by its place (index, repeat).

    Process 0 reads what an earlier process wrote (not if `fresh`), and it alone holds and writes.
    """

    def __init__(self, file: Path, fresh: bool = False):
        self.file = file
        self.held = {}
        if leader():
            self.hold([] if fresh else read_lines(file))
            write_whole(file, as_text(self.in_order()))

    def hold(self, lines: list[dict]) -> None:
        """Remember lines, in place of those of the same place."""
        for line in lines:
            self.held[line["index"], line["repeat"]] = line

    def add(self, lines: list[dict]) -> None:
        """Remember further lines and append them to the file, at once."""
        if leader():
            self.hold(lines)
            append(self.file, lines)

    def in_order(self) -> list[dict]:
        """The lines in order of (index, repeat)."""
        return [self.held[place] for place in sorted(self.held)]
