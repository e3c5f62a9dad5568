"""Evaluation: how good a policy is, where it looked, and the page on which one sees it.

  - rollouts.jsonl is the state of a long run: a line is a finished trajectory as the report shows it. An interrupted
    run goes on from it, torchrun's processes meet in it, and results and report are made from nothing else.
  - Whatever made the answers, the same code scores them; intervals resample whole questions, not their k samples.
  - What a policy writes is untrusted: in the report it is JSON, then text nodes, and no script but the page's runs.
"""
import argparse
import base64
import hashlib
import inspect
import io
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import DataError, Sample, load, load_templates, open_image, video_info
from model import load_policy
from reward import Judge, reward, score
from rollout import EndReason, Trajectory, rollout
from sandbox import Sandbox, SandboxError
from tasks.benchmarks import BENCHMARKS, final_answer, read_benchmark, read_predictions, score_benchmark
from tasks.puzzles import puzzles


@dataclass
class EvalConfig:
    """Every setting of an evaluation; `settle` fills in what is none."""
    task: str = "image"                 # held-out puzzles: image, video or image,video
    n: int = 200                        # puzzles
    seed: int = 0                       # of puzzles and sampling
    model: str = ""                     # checkpoint folder or hub name; none: the newest checkpoint under runs/
    data: str = ""                      # data file, or the benchmark's folder; none: puzzles
    benchmark: str = ""                 # vstar, hrbench-4k, hrbench-8k, mathverse, mathvision, wemath, dynamath, …
    predictions: str = ""               # JSON lines {"id", "prediction"}: score these, run no model
    compare: tuple = ()                 # two results.json: their paired difference
    ask: tuple = ()                     # a question and an image or video file: watch the policy answer
    out: str = ""                       # folder of the results; none: one of its own under runs/
    k: int | None = None                # samples a question, for avg@k and pass@k; paper: 32 on V*, else 1
    temperature: float | None = None    # paper: 0.5, V* and videos 0.01; puzzles 1; 0 is greedy
    top_k: int | None = None            # paper: 20, V* and videos 0 (all)
    max_turns: int = 30                 # turns, the last of which can only answer
    max_new_tokens: int | None = None   # new tokens a turn; none: as in the checkpoint's training, else 10,240
    max_context: int = 32_768           # tokens of a trajectory
    no_tools: bool = False              # answer directly, without Python
    frames: str = ""                    # N or 1fps: a video's frames in the context, no tool (the uniform baseline)
    prompt_template: str = ""           # JSON object of prompt templates
    batch_size: int = 64                # trajectories that run at a time
    timeout: float = 30.0               # seconds a tool call may take
    unsafe_sandbox: bool = False        # run code without confinement where the system has none
    judge: str = ""                     # OpenAI-compatible endpoint, http://host:port/v1, where the rule cannot decide
    judge_model: str = ""               # the judge's model name; paper: Qwen2.5-72B-Instruct
    judge_only: bool = False            # ask the judge for every answer: the paper's protocol
    judge_key_file: str = ""            # file with the judge's API key, or the variable that holds it


def parse_flags(cls, argv=None):
    """An instance of dataclass `cls` from the command line: one flag a field, the field's trailing comment its help.
    A bool is a switch (`--flag`, or `--flag false`), a tuple takes values. Anything else: one line and exit code 2."""
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    about = dict(description=sys.modules[cls.__module__].__doc__.split("\n")[0], usage="%(prog)s [--flag value …]")
    parser = argparse.ArgumentParser(**about, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help lists the flags)\n")
    switch = dict(nargs="?", const=True, type=lambda text: bool(("false", "true").index(text)))
    for name, hint in inspect.get_annotations(cls).items():
        kind, default = getattr(hint, "__args__", [hint])[0], getattr(cls, name)       # int of `int | None`
        words = f"{comments.get(name, '')} [{'none' if default in (None, '', ()) else default}]".replace("%", "%%")
        takes = switch if kind is bool else dict(nargs="+") if kind is tuple else dict(type=kind)
        parser.add_argument(f"--{name}", default=default, help=words, metavar=kind.__name__, **takes)
    return cls(**vars(parser.parse_args(argv)))


# ------------------------------------------------------------------------------------------------ rolling out
def evaluate(policy, samples, *, k=1, batch_size=64, seed=0, tool_reward=0.1, judge=None, judge_only=False, **limits):
    """k trajectories of each sample, in memory -> means accuracy (0..1), tool_calls, visual_tokens; trajectories.
    limits: settings of `rollout`. Leaves the policy's generator as it was: training goes on undisturbed. Where a batch
    raises, its samples run one by one, and the one at fault gets an `error`: it must not end a run of thousands."""
    state, done, size = policy.generator.get_state(), [], max(1, batch_size // k)
    policy.generator.manual_seed(seed)
    for batch in (samples[at:at + size] for at in range(0, len(samples), size)):
        try:                                            # a benchmark's picture can be a function that opens it
            opened = [replace(s, images=tuple(i() if callable(i) else i for i in s.images)) for s in batch]
            done += [t for group in rollout(policy, opened, k, **limits) for t in group]
        except SandboxError:
            raise                                       # this machine cannot run code, for no sample
        except Exception as error:
            if len(batch) > 1:
                done += [t for one in batch for t in evaluate(policy, [one], k=k, seed=seed, **limits)["trajectories"]]
            else:
                why = f"{type(error).__name__}: {error}"
                done += [Trajectory(batch[0], end_reason=EndReason.ERROR_IN_ACTION, error=why) for _ in range(k)]
    policy.generator.set_state(state)
    score(done, tool_reward, judge, judge_only)
    columns = dict(accuracy="correct", tool_calls="n_tool_calls", visual_tokens="visual_tokens")
    means = {name: sum(getattr(t, column) for t in done) / max(1, len(done)) for name, column in columns.items()}
    return {**means, "trajectories": done}


def collect(config, samples, folder, settings):
    """Roll out this process's share of what rollouts.jsonl in `folder` does not hold -> all lines; [] but on rank 0.
    A batch's seed comes from its place, so that a resumed run draws what an uninterrupted one does."""
    rank, world, k = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), config.k
    policy = load_policy(config.model, torch.cuda.is_available() and f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    done, right, size = read_state(folder), [], max(1, config.batch_size // k)
    todo = [place for place in range(rank, len(samples), world) if (place, k - 1) not in done]
    name = f"rollouts.rank{rank}.jsonl" if rank else "rollouts.jsonl"
    with open(folder / name, "a", buffering=1) as file, tqdm(total=len(todo) * k, disable=rank > 0) as bar:
        file.write("\n" * (file.tell() > 0))            # ends the line that a killed process left half-written
        for places in (todo[at:at + size] for at in range(0, len(todo), size)):
            batch, seed = [samples[place] for place in places], config.seed * 1_000_003 + places[0]
            new = evaluate(policy, batch, k=k, batch_size=config.batch_size, seed=seed, **settings)["trajectories"]
            file.writelines(json.dumps(record(t, places[n // k], n % k)) + "\n" for n, t in enumerate(new))
            right += [t.correct for t in new]
            bar.set_postfix_str(f"accuracy {np.mean(right):.1%}", refresh=False)
            bar.update(len(new))
    while rank == 0 and len(done := read_state(folder)) < len(samples) * k:
        time.sleep(2)                                   # the other processes are still at it
    return list(done.values()) if rank == 0 else []


def looks(t):
    """Where in its videos a trajectory looked: seconds of the frames that its code decoded or its context shows."""
    videos, n = [], (t.prompt_images - len(t.sample.images)) // max(1, len(t.sample.videos))    # uniform frames of each
    for k, path in enumerate(() if t.error else t.sample.videos):
        info = video_info(path)
        at = {(i + 0.5) / n * info["frames"] for i in range(n)}
        at |= {frame for turn in t.turns for video, frame in turn.frames if video == k}
        videos.append(dict(looked=sorted(round(f / info["fps"], 2) for f in at), seconds=info["frames"] / info["fps"]))
    return dict(videos=videos, frames_looked_at=sum(len(v["looked"]) for v in videos),
                seconds_covered=sum(len({int(second) for second in v["looked"]}) for v in videos))


def record(t, index=0, repeat=0):
    """Trajectory -> its line of rollouts.jsonl: all that results and report need, pictures as thumbnails."""
    return dict(
        question=t.sample.question, images=[thumbnail(image) for image in t.images[:t.prompt_images]], **looks(t),
        turns=[dict(text=turn.text, code=turn.code, output=turn.output or turn.error,
                    images=[thumbnail(image) for image in turn.images]) for turn in t.turns],
        error=t.error, answer=t.answer, reference=t.sample.answer, correct=t.correct if t.sample.answer else None,
        reward=t.reward, advantage=t.advantage, tool_calls=t.n_tool_calls, visual_tokens=t.visual_tokens,
        response_tokens=sum(t.action_mask), end_reason=t.end_reason.value, data_source=t.sample.data_source,
        id=t.sample.id, index=index, repeat=repeat)


def read_state(folder):
    """{(index, repeat): line} of all rollouts*.jsonl in `folder`, in order; a half-written line is dropped."""
    texts = [text for file in folder.glob("rollouts*.jsonl") for text in file.read_text("utf-8").split("\n")]
    lines = [json.loads(text) for text in texts if re.search(r'"repeat": \d+}$', text)]
    return {(line["index"], line["repeat"]): line for line in sorted(lines, key=lambda t: (t["index"], t["repeat"]))}


# ------------------------------------------------------------------------------------------------ results
def by_source(samples, scores):
    """Percent right of all samples, and of each data_source."""
    sources, scores = [sample.data_source for sample in samples], 100 * np.array(scores)
    parts = {source: scores[np.array(sources) == source].mean() for source in sorted(set(sources))}
    return {"score": scores.mean(), "scores": parts}


def bootstrap(summary, samples, scores, seed=0):
    """{name: [value, low, high]} in percent of what `summary` makes of scores (0..1, a list for each of k repeats);
    95 % intervals; "" is the score. Rows that are one question in several forms are drawn together, and a drawn copy
    counts as a question of its own, so that scores over seeds or composites stay what they are."""
    clusters, found, rng = defaultdict(list), defaultdict(list), np.random.default_rng(seed)
    for i, sample in enumerate(samples):
        meta = getattr(sample, "meta", {})
        form = sample.question.split("\n")[0] if "cycle" in meta else i
        clusters[meta.get("seed", meta.get("composite", form))].append(i)
    clusters = list(clusters.values())
    for n in range(1 + int(np.clip(300_000 // (len(samples) * len(scores)), 200, 2000))):
        draw = rng.integers(0, len(clusters), len(clusters)) if n else range(len(clusters))    # first, all as they are
        places = [i for k in draw for i in clusters[k]]
        rows = [replace(samples[i], meta={**samples[i].meta, "seed": copy, "composite": copy})
                if hasattr(samples[i], "meta") else samples[i] for copy, k in enumerate(draw) for i in clusters[k]]
        results = [summary(rows, [repeat[i] for i in places]) for repeat in scores]
        for name in ("", *results[0]["scores"]):
            found[name].append(np.mean([result["scores"][name] if name else result["score"] for result in results]))
    return {name: [v[0], *np.percentile(v[1:], [2.5, 97.5]).round(2).tolist()] for name, v in found.items() if v[1:]}


def summarize(config, samples, lines, judge):
    """Lines in order of (index, repeat) -> results.json. A benchmark's rule replaces the training rule's verdict."""
    for part in [lines[repeat::config.k] for repeat in range(config.k)] if config.benchmark else ():
        graded = score_benchmark(config.benchmark, samples, [t["answer"] or "" for t in part], judge, config.judge_only)
        for line, correct in zip(part, graded["correct"]):
            line.update(correct=correct, reward=reward(correct >= 0.5, line["tool_calls"]))
    scores = np.reshape([float(line["correct"]) for line in lines], (len(samples), config.k)).T     # (k, samples)
    points = bootstrap(getattr(BENCHMARKS.get(config.benchmark), "summary", by_source), samples, scores.tolist())
    overall, *interval = points.pop("")
    means = ("tool_calls", "visual_tokens", "response_tokens", "frames_looked_at", "seconds_covered")
    return {"score": overall, "interval": interval, "n": len(samples), "k": config.k, "avg@k": 100 * scores.mean(),
            "pass@k": 100 * scores.max(0).mean(), **{name: np.mean([line[name] for line in lines]) for name in means},
            "end_reasons": dict(Counter(line["end_reason"] for line in lines)), "settings": asdict(config),
            "errors": sum(line["error"] is not None for line in lines),
            "judge_failures": judge.failures if judge else 0,
            "scores": {name: point[0] for name, point in points.items()},
            "intervals": {name: point[1:] for name, point in points.items()},
            "correct": {f"{i} {sample.id}": x for i, (sample, x) in enumerate(zip(samples, scores.mean(0)))}}


def compare(files):
    """Two results.json -> text: the paired difference with its 95 % interval, and the samples that differ."""
    try:
        a, b = (json.loads(Path(path).read_text("utf-8"))["correct"] for path in files)
        both = [key for key in a if key in b]
        paired = bootstrap(by_source, [Sample(key, "", "") for key in both], [[b[key] - a[key] for key in both]])[""]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(f"--compare {' '.join(files)}: not two results with samples in common ({error!r})") from error
    summary = "B - A: {:+.1f} points, 95 % interval [{:+.1f}, {:+.1f}]; {} samples in both, {} in one only; different:"
    return "\n".join([summary.format(*paired, len(both), len({*a} ^ {*b})),
                      *[f"  {key}: A {a[key]:g}, B {b[key]:g}" for key in both if a[key] != b[key]]])


# ------------------------------------------------------------------------------------------------ the report
PAGE_BYTES = 64_000_000                                 # more than that a phone does not open
PAGE = Path(__file__).parent / "docs" / "report.html"    # its script is run, DATA and DIGEST are filled in


def thumbnail(image, side=256):
    """PIL image -> data URI of a JPEG whose longer side is at most `side` pixels."""
    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_report(path, trajectories, title):
    """One self-contained HTML page of Trajectories or lines of rollouts.jsonl; an even share, if all are too much."""
    lines = [json.dumps(t if isinstance(t, dict) else record(t)) for t in trajectories]
    shown = ",".join(lines[::1 + sum(map(len, lines)) // PAGE_BYTES])
    data = f'{{"title": {json.dumps(title)}, "trajectories": [{shown}]}}'.replace("<", "\\u003c")
    page = PAGE.read_text("utf-8")
    script = re.search("<script>(.*)</script>", page, re.S)[1]
    page = page.replace("DIGEST", base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    Path(path).write_text(page.replace("DATA", data), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ command line
def read_samples(config):
    """What is asked, by the flags. What is wrong with it is found here, before a model is loaded."""
    if config.benchmark:
        return read_benchmark(config.benchmark, config.data, media=not config.predictions)
    if not config.ask:
        return load(config.data) if config.data else puzzles(config.task, config.n, config.seed, split="heldout")
    question, file = config.ask if len(config.ask) == 2 else ("", "")
    if not Path(file).is_file():
        raise DataError(f"--ask takes a question and an image or video file; {file!r} is no file")
    try:
        return [Sample("ask", question, "", images=(open_image(file),))]
    except DataError:
        return [Sample("ask", question, "", videos=(file,))] if video_info(file) else []


def settle(config):
    """Check the flags, fill in what is none (the model: the newest runs/*/step_N of a run on the task) and make the
    folder of the results: --out, or one that these settings always get; never another run's. Returns it."""
    if not config.model and not config.predictions:
        runs = [file for file in Path("runs").glob("*/config.json") if f'"task": "{config.task}"' in file.read_text()]
        steps = [step for run in runs for step in run.parent.glob("step_*") if (step / "config.json").exists()]
        if not steps:
            raise DataError(f"no checkpoint of task {config.task} under runs/: make one with `python train.py --task "
                            f"{config.task}` (about ten minutes), or name one with --model")
        config.model = str(max(steps, key=os.path.getmtime))
    training = Path(config.model).parent / "config.json"
    tokens = json.loads(training.read_text("utf-8")).get("max_new_tokens", 10_240) if training.exists() else 10_240
    bench, puzzle = BENCHMARKS.get(config.benchmark), not config.data and not config.ask
    k, heat, top_k = (bench.k, bench.temperature, bench.top_k) if bench else (1, 1.0, 0) if puzzle else (1, 0.5, 20)
    for name, value in dict(k=k, temperature=heat, top_k=top_k, max_new_tokens=tokens).items():
        setattr(config, name, value if getattr(config, name) is None else getattr(config, name))
    for name, least in dict(n=1, k=1, batch_size=1, max_turns=1, max_new_tokens=1, temperature=0).items():
        if getattr(config, name) < least:
            raise DataError(f"--{name} must be at least {least}")
    if not re.fullmatch(r"|[1-9]\d*|[\d.]+fps", config.frames):
        raise DataError(f"--frames {config.frames}: expected a number of frames, or a rate such as 1fps")
    free = ("out", "batch_size", "judge", "judge_model", "judge_only", "judge_key_file")     # may change on resuming
    state = {name: value for name, value in asdict(config).items() if name not in free}
    state["model_time"] = os.path.getmtime(config.model) if os.path.isdir(config.model) else 0
    state, what = json.dumps(state, indent=1), config.benchmark or Path(config.data).stem or config.task
    file = Path(config.out or f"runs/eval-{what}-{hashlib.sha256(state.encode()).hexdigest()[:8]}") / "config.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_text("utf-8") != state:
            raise DataError(f"{file} is of a run with other settings: give another --out, or delete that folder")
        file.write_text(state, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out {file.parent} cannot be written: {error.strerror}") from error
    return file.parent


def run(config):
    """What the flags say: samples -> lines of rollouts.jsonl -> results and report."""
    if config.compare:
        return print(compare(config.compare))
    samples, folder = read_samples(config), settle(config)
    limits = {name: getattr(config, name) for name in inspect.signature(rollout).parameters if hasattr(config, name)}
    limits["templates"] = config.prompt_template and load_templates(config.prompt_template)
    cache, key = folder / "judge.jsonl", config.judge_key_file
    judge = Judge(config.judge, config.judge_model, cache, api_key=key) if config.judge else None
    grading = dict(judge=None if config.benchmark else judge, judge_only=config.judge_only)
    if config.predictions:
        config.k, extract = 1, str if config.benchmark else final_answer     # a benchmark's rule does it by itself
        done = [Trajectory(replace(sample, images=(), videos=()), answer=extract(answer), end_reason=EndReason.DONE)
                for sample, answer in zip(samples, read_predictions(config.predictions, samples))]
        score(done, **grading)
        lines = [record(t, i) for i, t in enumerate(done)]
    else:
        Sandbox(unsafe=config.unsafe_sandbox).close()   # where code cannot be confined, say so before a model is loaded
        if config.ask:
            (folder / "rollouts.jsonl").unlink(missing_ok=True)
            limits["on_turn"] = lambda t: print(f"--- turn {len(t.turns)}\n{t.turns[-1].text}\n{t.turns[-1].output}",
                                                f"[{len(t.turns[-1].images)} figures]", flush=True)
        lines = collect(config, samples, folder, {**grading, **limits, "tools": not config.no_tools})
    if lines and not config.ask:
        results = summarize(config, samples, lines, judge)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(BENCHMARKS[config.benchmark].table(results) if config.benchmark else "\n".join(
            f"{name:<20}{value:8.1f}  {results['intervals'][name]}" for name, value in results["scores"].items()))
        print(*(f"{name:<20}{round(value, 1) if isinstance(value, float) else value}" for name, value in results.items()
                if name not in ("scores", "intervals", "correct", "settings")), sep="\n")
    if lines:
        (folder / "rollouts.tmp").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (folder / "rollouts.tmp").replace(folder / "rollouts.jsonl")
        for file in folder.glob("rollouts.rank*.jsonl"):
            file.unlink()
        write_report(folder / "rollouts.html", lines, f"{config.benchmark or config.data or config.task}, {folder}")
        print(f"{folder}/rollouts.html shows every trajectory")


def main(argv=None):
    """Bad input: one line, exit code 2. Ctrl-C: the same command goes on where this one stopped."""
    try:
        run(parse_flags(EvalConfig, argv))
    except (DataError, SandboxError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
