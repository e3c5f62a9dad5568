"""tests/reproduce.md: its commands parse, and its figures are the paper's or follow from it."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed.run import parse_args

import engine.run
from engine.flags import parse_flags
from evaluate import EvalConfig
from tasks.benchmarks import BENCHMARKS
from train import Config

PAGE = (Path(__file__).parent / "reproduce.md").read_text(encoding="utf-8")
PARAMETERS = 7.6e9
PEAK = 989e12  # FLOP/s
SECONDS = {"sampled": 0.02 * PEAK, "trained": 0.3 * PEAK}  # FLOP/s that are reached


class Expected(NamedTuple):
    """A row of the page's table."""

    benchmark: str
    model: str
    questions: int
    rows: int
    k: int
    tokens: int
    published: float
    tolerance: float
    hours: float


def expected():
    found = []
    for line in PAGE.split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in BENCHMARKS:
            benchmark, model, *figures = cells
            numbers = [float(figure.replace(",", "")) for figure in figures]
            found.append(Expected(benchmark, model, *numbers))
    return found


def commands():
    """The lines of all blocks of code."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def parsed(command):
    """The settings that a command gives, as the program would read them."""
    launcher, *words = shlex.split(command)
    assert launcher == "torchrun"
    given = parse_args(words)  # torchrun's own parser
    if given.training_script == "train.py":
        config = parse_flags(Config, given.training_script_args)
        engine.run.check(config)
    else:
        assert given.training_script == "evaluate.py"
        config = parse_flags(EvalConfig, given.training_script_args)
        engine.run.check_bounds(config)
    return config


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command):
    config = parsed(command)
    assert config.model
    assert config.data


def test_a_wrong_flag_would_be_seen(capsys):
    with pytest.raises(SystemExit):
        parsed("torchrun train.py --tool_rewards 0")
    assert "--tool_reward" in capsys.readouterr().err


def test_every_expected_score_has_its_command():
    asked = []
    for command in commands():
        config = parsed(command)
        if isinstance(config, EvalConfig):
            asked.append((config.benchmark, config.model.split("/")[-1]))
    models = {
        "PyVision-Image": "PyVision-Image-7B-RL",
        "PyVision-Video": "PyVision-Video-7B-RL",
        "Qwen2.5-VL-7B": "Qwen2.5-VL-7B-Instruct",
        "Qwen2.5-VL-7B, 1 fps": "Qwen2.5-VL-7B-Instruct",
    }
    wanted = [(row.benchmark, models[row.model]) for row in expected()]
    assert sorted(asked) == sorted(wanted)


def test_scores_are_those_of_the_paper():
    for row in expected():
        printed = {}
        for words in BENCHMARKS[row.benchmark].paper.split("; "):
            name, score = words.rsplit(" ", 1)
            printed[re.sub(r" \(.*\)", "", name)] = score
        assert printed[row.model] == f"{row.published:.1f}"


def test_every_benchmark_is_expected():
    """Once with the paper's model, and once with the base model where the paper has a score."""
    rows = expected()
    ours = [row.benchmark for row in rows if row.model.startswith("PyVision")]
    assert sorted(ours) == sorted(BENCHMARKS)
    base = {row.benchmark for row in rows if row.model.startswith("Qwen")}
    assert base == set(BENCHMARKS) - {"mathvision"}


def test_sizes_are_those_of_the_benchmarks():
    for row in expected():
        benchmark = BENCHMARKS[row.benchmark]
        assert (row.rows, row.k) == (benchmark.size, benchmark.k)
        assert row.questions <= row.rows


def test_the_tolerance_is_the_interval_of_a_share():
    for row in expected():
        share = row.published / 100
        half = 196 * (share * (1 - share) / row.questions) ** 0.5
        assert row.tolerance == pytest.approx(half, abs=0.051)


def test_gpu_hours_follow_from_the_formula():
    for row in expected():
        flop = row.rows * row.k * 2 * PARAMETERS * row.tokens
        assert row.hours == pytest.approx(flop / SECONDS["sampled"] / 3600, abs=0.051)


@pytest.mark.parametrize("tokens, hours", [(5000, 217), (7000, 303)])
def test_gpu_hours_of_training_follow_from_the_formula(tokens, hours):
    default = Config()
    trained = default.batch_size * default.group_size
    sampled = trained * default.oversample
    assert (sampled, trained) == (256, 128)
    pass_over = PARAMETERS * tokens  # multiply-adds
    step = (
        sampled * 2 * pass_over / SECONDS["sampled"] + trained * 8 * pass_over / SECONDS["trained"]
    )
    assert default.steps * step / 3600 == pytest.approx(hours, abs=0.6)
    assert re.search(rf"\b{hours}\b", PAGE)


def test_an_ablation_differs_by_one_setting():
    """From the run of the paper, apart from the folder."""
    configs = [parsed(command) for command in commands() if "PyVision-Image-7B-SFT" in command]
    usual, *ablations = [vars(config) for config in configs]
    changed = []
    for ablation in ablations:
        differ = [name for name in usual if ablation[name] != usual[name] and name != "out"]
        assert len(differ) == 1
        changed += differ
    assert changed == ["tool_reward", "max_turns", "rank", "normalize_std"]
