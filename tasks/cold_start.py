"""The tiny policy's cold start: what it is taught, by SFT, before reinforcement learning.

First to see (captions of crops, of whole pictures, and where a question sends one), then to look
(demonstrations of a scripted searcher of mixed quality). train.py runs these stages once for a seed
and keeps the result beside the runs.
"""

import zlib
from dataclasses import replace
from pathlib import Path

from engine.prompt import load_templates
from model import tiny_policy
from tasks.puzzles import ANSWER, captions, corpus, demonstrations, read_difficulty

STAGES = dict(  # settings of train.Config, by the stage's name
    captions=dict(steps=80, batch_size=96, lr=3e-3),
    demonstrations=dict(steps=140, batch_size=32, lr=2.5e-3),
)
LESSONS = dict(captions=(captions, 2400), demonstrations=(demonstrations, 1500))
SECONDS = dict(captions=0.3, demonstrations=0.4, rl=2.0, sft=1.0)  # about, a step of each


def cold_start_folder(config) -> Path:
    """Where the tiny policy's cold start for these settings is, or is to be made."""
    name = f"cold_start_{config.task.replace(',', '_')}"
    if config.frames or config.difficulty or config.prompt_template:
        difficulty = config.difficulty and read_difficulty(config.difficulty)
        made_for = [config.task, config.frames, difficulty]
        if config.prompt_template:
            made_for.append(load_templates(config.prompt_template))
        name += f"_{zlib.crc32(repr(made_for).encode()):08x}"
    return Path(config.out).parent / f"{name}_seed{config.seed}"


def parts_of_job(config) -> dict:
    """Name -> (steps, about how many seconds a step takes) of all that a run has to do."""
    parts = {}
    if not config.model and not cold_start_folder(config).exists():
        parts = {name: (stage["steps"], SECONDS[name]) for name, stage in STAGES.items()}
    parts[config.stage] = (config.steps, SECONDS[config.stage])
    return parts


def stages(config, folder: Path):
    """A random tiny policy in `folder`, and (name, settings, samples) of each stage."""
    difficulty = read_difficulty(config.difficulty)
    tiny_policy(folder, corpus(config.task), config.seed)
    sft = replace(
        config,
        stage="sft",
        model=str(folder),
        out=str(folder),
        save_every=0,
        eval_every=0,
    )
    for name, settings in STAGES.items():
        make, number = LESSONS[name]
        samples = make(config.task, number, config.seed, **difficulty)
        if config.frames:  # no tool: lessons in seeing, then only the right answers
            samples = [s for s in samples if s.ability != "call"]
            samples = [replace(s, turns=[ANSWER.format(s.answer)]) for s in samples]
        yield name, replace(sft, **settings), samples
