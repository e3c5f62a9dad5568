"""Evaluation: how well a policy answers puzzles, a data file, a benchmark, or one question.

- rollouts.jsonl is the state of a long evaluation: a line is a finished trajectory, as the page
  shows it. An interrupted evaluation goes on from it, with any number of processes. Results and
  page are made of nothing else.
- The same code scores the answers of a policy and those of a file.
- A setup that fails for every sample is an error, and never a score of 0.

python evaluate.py                                          # the newest checkpoint under runs/
python evaluate.py --model runs/image --ask "What colour is the car?" photo.jpg
torchrun --nproc_per_node=8 evaluate.py --model DIR --benchmark vstar --data /data/vstar_bench
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from data import DataError, Sample, load, open_image, video_info
from engine import parallel
from engine.batching import flat
from engine.checkpoint import checkpoint_folder
from engine.demonstrations import WHY
from engine.evaluation import Lines, newest, take_folder
from engine.fast import FastPolicy
from engine.flags import parse_flags, stop
from engine.intervals import bootstrap, compare, interval
from engine.prompt import load_templates
from engine.report import as_text, record, write_report
from engine.run import (
    Progress,
    check_bounds,
    leader,
    one_line_errors,
    reach_judge,
    read_json,
    say,
    write_whole,
)
from model import load_policy
from reward import reward
from rollout import EndReason, Limits, Trajectory, rollout
from sandbox import Sandbox, SandboxError
from tasks.benchmarks import BENCHMARKS, PLAIN, read_benchmark, read_predictions, score_benchmark
from tasks.puzzles import puzzles, read_difficulty


@dataclass
class EvalConfig(Limits):
    """Every setting of an evaluation; `settle` fills in what is none."""

    max_turns: int = 30  # turns, the last of which can only answer
    max_new_tokens: int | None = None  # new tokens a turn; none: as in its training, else 10,240
    max_context: int = 32_768  # tokens of a trajectory
    temperature: float | None = None  # paper: 0.5, V* and videos 0.01; puzzles 1; 0 is greedy
    top_k: int | None = None  # paper: 20, V* and videos 0 (all); puzzles 0
    task: str = "image"  # held-out puzzles: image, video or image,video
    questions: int = 200  # held-out puzzles
    seed: int = 0  # of puzzles and sampling
    model: str = ""  # checkpoint, run folder or hub name; none: the newest checkpoint under runs/
    data: str = ""  # data file, or the benchmark's folder; none: puzzles
    benchmark: str = ""  # vstar, hrbench-4k, hrbench-8k, mathverse, mathvision, wemath, dynamath, …
    predictions: str = ""  # JSON lines {"id", "prediction"}: score these, run no model
    compare: tuple = ()  # two results.json: their paired difference
    ask: tuple = ()  # a question and an image or video file: watch the policy answer
    out: str = ""  # folder of the results; none: one of its own under runs/
    k: int | None = None  # samples a question, for avg@k and pass@k; paper: 32 on V*, else 1
    difficulty: str | None = None  # of puzzles, JSON as in train.py; none: as in its training
    no_tools: bool = False  # answer directly, without Python
    prompt_template: str = ""  # JSON object of prompt templates
    batch_size: int = 64  # trajectories that run at a time, in each process
    slow: bool = False  # plain transformers instead of engine/fast.py: for reading and for proofs
    judge: str = ""  # OpenAI-compatible endpoint (http://host:port/v1) where the rule is unsure
    judge_model: str = ""  # the judge's model name; the paper's is Qwen2.5-72B-Instruct
    judge_only: bool = False  # ask the judge for every answer: the paper's protocol
    judge_key_file: str = ""  # file with the judge's API key


PUZZLES = dict(k=1, temperature=1.0, top_k=0)  # as in their training
VIDEOS = dict(temperature=0.01, top_k=0)  # the paper's, also where only some rows have a video
FREE = {  # what may change when an evaluation goes on
    "out",
    "batch_size",
    "judge",
    "judge_model",
    "judge_only",
    "judge_key_file",
}
TINY = 96  # hidden size of the tiny policy (engine/tiny.py)
MEANS = ("tool_calls", "visual_tokens", "response_tokens", "frames_looked_at", "seconds_covered")


# ------------------------------------------------------------------------------------- the settings
def settle(config: EvalConfig) -> list[Sample]:
    """Check the settings, fill in what is none, take the folder. Returns what is asked.

    Raises DataError, before any model is loaded.
    """
    samples = read_samples(config)
    if samples:
        kinds = {"video" if sample.videos else "image" for sample in samples}
        config.task = ",".join(sorted(kinds))
    check_bounds(config)
    if config.predictions or config.ask:
        config.k = 1
    if not config.predictions:
        config.model = checkpoint_folder(
            config.model or newest(config.task, config.frames, bool(samples))
        )
    training = read_json(Path(config.model).parent / "config.json")
    benchmark = BENCHMARKS.get(config.benchmark, PLAIN)
    usual = dict(
        k=benchmark.k,
        temperature=benchmark.temperature,
        top_k=benchmark.top_k,
        max_new_tokens=training.get("max_new_tokens", 10_240),
        difficulty=training.get("difficulty", ""),
    )
    if not samples:
        usual.update(PUZZLES)
    elif "video" in config.task:
        usual.update(VIDEOS)
    for name, value in usual.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    load_templates(config.prompt_template)
    difficulty = read_difficulty(config.difficulty)
    try:
        samples = samples or puzzles(
            config.task, config.questions, config.seed, "heldout", **difficulty
        )
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"--difficulty {config.difficulty:.100}: {error!r:.150}") from None
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    if os.path.isdir(config.model):
        settings["model_written"] = time.ctime(os.path.getmtime(config.model))
    what = config.benchmark or Path(config.data).stem or config.task
    config.out = take_folder(config.out, what, settings)
    return samples


def read_samples(config: EvalConfig) -> list[Sample]:
    """What is asked; [] for puzzles. Raises DataError."""
    if config.benchmark:
        return read_benchmark(config.benchmark, config.data, media=not config.predictions)
    if config.ask:
        return [asked(config.ask)]
    return load(config.data) if config.data else []


def asked(words: tuple) -> Sample:
    """A question and a file -> Sample. Raises DataError."""
    if len(words) != 2:
        raise DataError("--ask takes a question and an image or video file")
    question, file = words
    try:
        return Sample("ask", question, "", images=(open_image(file),))
    except DataError:
        # Pillow knows the name of an MPEG film, too, and cannot show it.
        kind = Image.registered_extensions().get(Path(file).suffix.lower(), "MPEG")
        if kind != "MPEG":
            raise
    video_info(file)
    return Sample("ask", question, "", videos=(file,))


def greet(config: EvalConfig, samples: list[Sample]) -> None:
    """Say what is going to happen, before anything slow."""
    model = config.model or f"none; the answers are in {config.predictions}"
    text_model = read_json(Path(config.model, "config.json")).get("text_config", {})
    if text_model.get("hidden_size") == TINY:
        model += ", a tiny one: it knows only the built-in puzzles"
    data = config.benchmark or config.data or " ".join(config.ask) or f"puzzles, {config.task}"
    say(
        f"policy   {model}\n"
        f"data     {data}; questions: {len(samples)}, samples of each: {config.k}\n"
        f"run      temperature {config.temperature}, top_k {config.top_k}, in {config.out}"
    )


# -------------------------------------------------------------------------------------- rolling out
def evaluate(policy, samples: list[Sample], config: EvalConfig, seed: int, **settings) -> list:
    """k trajectories of each sample, in order. settings: further ones of `rollout`.

    Where a batch raises, its samples run one by one, and the one at fault gets an `error`: it must
    not end an evaluation of thousands.
    """
    policy.generator.manual_seed(seed)
    try:
        return flat(rollout(policy, samples, config.k, config, seed=seed, **settings))
    except SandboxError:  # this machine cannot run code, for no sample
        raise
    except Exception as error:
        if len(samples) > 1:
            return flat(evaluate(policy, [one], config, seed, **settings) for one in samples)
        reason = EndReason.ERROR_IN_ACTION
        return [
            Trajectory(samples[0], error=repr(error), end_reason=reason) for _ in range(config.k)
        ]


def collect(config: EvalConfig, samples: list[Sample]) -> list[dict]:
    """Roll out what rollouts.jsonl does not hold yet -> all its lines, on process 0.

    In each round every process runs one batch, and process 0 writes what they did. A batch and its
    seed depend on its place alone. So neither interruptions nor the number of processes change
    what is sampled.
    """
    if not (config.no_tools or config.frames):
        # It says before a model is loaded if it cannot.
        Sandbox(
            (), (), config.timeout, unsafe=config.unsafe_sandbox, prelude=config.prelude
        ).close()
    parallel.prepare()
    parallel.join()
    plain = load_policy(config.model)
    policy = plain if config.slow else FastPolicy(plain)
    settings = dict(
        tools=not config.no_tools,
        templates=load_templates(config.prompt_template),
    )
    if config.ask:
        settings["on_turn"] = show
    state = Lines(Path(config.out, "rollouts.jsonl"), fresh=bool(config.ask))
    places = range(len(samples))
    size = max(1, config.batch_size // config.k)
    done = Counter(place // size for place, _ in share(list(state.held)))
    batches = [places[start : start + size] for start in places[::size]]
    todo = [batch for n, batch in enumerate(batches) if done[n] < len(batch) * config.k]
    rounds = range(0, len(todo), parallel.world())
    progress = None
    if leader() and not config.ask:
        progress = Progress({"evaluation": (len(rounds), 1.0)})
    for start in rounds:
        mine = start + parallel.rank()
        lines = []
        for batch in todo[mine : mine + 1]:  # the last round may have none for this process
            chosen = [samples[place] for place in batch]
            seed = config.seed * 1_000_003 + batch[0]
            new = evaluate(policy, chosen, config, seed, **settings)
            lines = [record(t, batch[n // config.k], n % config.k) for n, t in enumerate(new)]
            if not config.ask:
                grade(config, samples, lines)
        state.add(share(lines))
        if progress:
            progress.step("evaluation")
            right = [line["correct"] for line in state.in_order()]
            say(f"{len(right)} of {len(samples) * config.k} answered, {np.mean(right):.1%} right")
    parallel.leave()
    lines = state.in_order()
    if leader():
        refuse(config, lines)
    return lines


def share(items: list) -> list:
    """The items of all processes. Where one of them has died, the others end."""
    try:
        return parallel.gather(items)
    except RuntimeError:
        stop("another process has ended too early; the same command goes on", 1)


def show(t) -> None:
    """Print a trajectory's newest turn: what the policy wrote, then what came back."""
    turn = t.turns[-1]
    title = f" turn {len(t.turns)}, {turn.n_tokens} tokens "
    say(f"\n{title:-^80}\n{printable(turn.text)}")
    if turn.seconds_tool:  # its code ran
        title = f" came back, figures: {len(turn.images)} "
        say(f"\n{title:-^80}\n{printable(turn.output)}")


def printable(text: str) -> str:
    """Without what would steer a terminal: a policy wrote it."""
    return "".join(x if x.isprintable() or x == "\n" else " " for x in text.strip())


# ------------------------------------------------------------------------------------------ results
def grade(config: EvalConfig, samples: list[Sample], lines: list[dict], judge=None) -> dict:
    """Fill in what each line's answer is worth -> what score_benchmark says."""
    rows = [samples[line["index"]] for line in lines]
    answers = [line["answer"] or "" for line in lines]
    graded = score_benchmark(config.benchmark, rows, answers, judge, config.judge_only)
    for line, worth in zip(lines, graded["correct"], strict=True):
        line["correct"] = worth
        line["reward"] = reward(worth >= 0.5, line["tool_calls"])
    return graded


def summarize(config: EvalConfig, samples: list[Sample], lines: list[dict], judge) -> dict:
    """Lines in order of (index, repeat) -> what results.json holds."""
    graded = grade(config, samples, lines, judge)
    scores = np.reshape(graded["correct"], (len(samples), config.k)).T  # (k, n)
    best = scores.max(0, keepdims=True)
    found = bootstrap(BENCHMARKS.get(config.benchmark, PLAIN).summary, samples, scores)
    draws = {
        "avg@k": bootstrap(PLAIN.summary, samples, scores)["score"],
        "pass@k": bootstrap(PLAIN.summary, samples, best)["score"],
    }
    parts = found["scores"]
    errors = [line["error"] for line in lines if line["error"]]
    names = [f"{place} {sample.id}" for place, sample in enumerate(samples)]
    return {
        "score": np.nan_to_num(found["score"][0]),
        "interval": interval(found["score"]),
        "n": len(samples),
        "k": config.k,
        **{name: values[0] for name, values in draws.items()},
        **{name: np.mean([line[name] for line in lines]) for name in MEANS},
        "end_reasons": dict(Counter(line["end_reason"] for line in lines)),
        "undecided": graded["undecided"] / len(lines),
        "errors": len(errors),
        "first_error": next(iter(errors), ""),
        "judge_failures": judge.failures if judge else 0,
        "judge_error": judge.last_error if judge else "",
        "scores": {name: np.nan_to_num(values[0]) for name, values in parts.items()},
        "intervals": {name: interval(values) for name, values in {**draws, **parts}.items()},
        "settings": asdict(config),
        "correct": dict(zip(names, scores.mean(0), strict=True)),
        "draws": np.nan_to_num(found["score"][1:]).round(3).tolist(),
    }


def given(config: EvalConfig, samples: list[Sample]) -> list[dict]:
    """The answers of --predictions as lines."""
    lines = []
    predictions = read_predictions(config.predictions, samples)
    for index, sample in enumerate(samples):
        text_only = replace(sample, videos=())  # its pictures and videos need not be there
        t = Trajectory(text_only, answer=predictions[index], end_reason=EndReason.DONE)
        lines.append(record(t, index))
    return lines


def refuse(config: EvalConfig, lines: list[dict]) -> None:
    """Raise DataError where no sample came to a turn, or none could be read: that is no score."""
    if all(line["error"] or not line["turns"] for line in lines):
        Path(config.out, "rollouts.jsonl").unlink()  # else the same command would take them as done
        first = lines[0]
        why = first["error"] or WHY[first["end_reason"]]
        raise DataError(f"no sample could be answered, such as {first['id']:.60}: {why!r:.180}")


def report(config: EvalConfig, samples: list[Sample], lines: list[dict], judge) -> None:
    """Write results and page, and print the results."""
    out = Path(config.out)
    if config.ask:
        say(f"\nanswer   {lines[0]['answer'] or 'none: ' + lines[0]['end_reason']}")
    else:
        results = summarize(config, samples, lines, judge)
        write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
        say(BENCHMARKS.get(config.benchmark, PLAIN).table(results))
        for name in list(results)[2:-5]:  # the others are in the table, or long
            value = results[name]
            if value != "":
                say(f"{name:<20}{value:.4g}" if isinstance(value, float) else f"{name:<20}{value}")
    write_whole(out / "rollouts.jsonl", as_text(lines))
    title = f"{config.benchmark or config.data or config.task}, {out}"
    write_report(out / "rollouts.html", lines, title)
    say(f"open {out}/rollouts.html, which shows every trajectory")


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says."""
    with one_line_errors(SandboxError):
        config = parse_flags(EvalConfig, argv)
        if config.compare:
            print(compare(config.compare))
            return
        samples = settle(config)
        greet(config, samples)
        judge = reach_judge(config)
        if config.predictions:
            lines = given(config, samples)
        else:
            lines = collect(config, samples)
        if leader():
            report(config, samples, lines, judge)


if __name__ == "__main__":
    main()
