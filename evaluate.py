"""Evaluation: how good a policy is, where it looked, and the page on which one sees it.

  - rollouts.jsonl is the state of a long run: a line is a finished trajectory as the report shows it. An interrupted
    run goes on from it, torchrun's processes meet in it, and results and report are made from nothing else.
  - Whatever made the answers, the same code scores them; intervals resample whole questions, not their k samples.
  - What a policy writes is untrusted: in the report it is JSON, then text nodes, and no script but the page's runs.
"""
import base64, hashlib, inspect, io, json, os, re, signal, sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (DataError, Sample, frame_times, load, load_templates, middle_frames, open_image, show_frames,
                  video_info)
from engine.flags import parse_flags, stop
from model import load_policy
from reward import Judge, reward, score
from rollout import EndReason, Trajectory, rollout
from sandbox import Sandbox, SandboxError
from tasks.benchmarks import BENCHMARKS, PLAIN, read_benchmark, read_predictions, score_benchmark
from tasks.puzzles import puzzles


@dataclass
class EvalConfig:
    """Every setting of an evaluation; `settle` fills in what is none."""
    task: str = "image"                 # held-out puzzles: image, video or image,video
    questions: int = 200                # held-out puzzles
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
    difficulty: str | None = None       # of puzzles, JSON as in train.py; none: as in the checkpoint's training
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


# ------------------------------------------------------------------------------------------------ rolling out
def evaluate(policy, samples, k=1, *, batch_size=64, seed=0, tool_reward=0.1, judge=None, judge_only=False, **limits):
    """k trajectories of each sample, in memory, scored; limits: settings of `rollout`. Leaves the policy's generator as
    it was: training goes on undisturbed. Where a batch raises, its samples run one by one, and the one at fault gets an
    `error`: it must not end a run of thousands."""
    state, done, size = policy.generator.get_state(), [], max(1, batch_size // k)
    policy.generator.manual_seed(seed)
    for batch in (samples[at:at + size] for at in range(0, len(samples), size)):
        try:
            done += [t for group in rollout(policy, batch, k, **limits) for t in group]
        except SandboxError:
            raise                                       # this machine cannot run code, for no sample
        except Exception as error:
            failed = dict(end_reason=EndReason.ERROR_IN_ACTION, error=f"{type(error).__name__}: {error}")
            done += [Trajectory(batch[0], **failed) for _ in range(k)] if len(batch) == 1 else [
                t for one in batch for t in evaluate(policy, [one], k, seed=seed, **limits)]
    policy.generator.set_state(state)
    score(done, tool_reward, judge, judge_only)
    return done


def collect(config, samples, folder):
    """Roll out this process's share of what rollouts.jsonl in `folder` does not hold -> all lines; [] but on rank 0.
    A batch's seed comes from its place, so that a resumed run draws what an uninterrupted one does."""
    rank, world, k = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), config.k
    limits = {name: getattr(config, name) for name in inspect.signature(rollout).parameters if hasattr(config, name)}
    limits["tools"] = not config.no_tools
    limits["templates"] = config.prompt_template and load_templates(config.prompt_template)
    if config.ask:
        (folder / "rollouts.jsonl").unlink(missing_ok=True)
        limits["on_turn"] = lambda t: print(f"--- turn {len(t.turns)}\n{t.turns[-1].text}\n{t.turns[-1].output}",
                                            f"[{len(t.turns[-1].images)} figures]", flush=True)
    Sandbox(unsafe=config.unsafe_sandbox).close()       # where code cannot be confined, say so before a model is loaded
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    policy = load_policy(config.model, torch.cuda.is_available() and f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    done, right, size = read_state(folder), [], max(1, config.batch_size // k)
    todo = [place for place in range(rank, len(samples), world) if (place, k - 1) not in done]
    name = f"rollouts.rank{rank}.jsonl" if rank else "rollouts.jsonl"
    with open(folder / name, "a", buffering=1) as file, tqdm(total=len(todo) * k, disable=rank > 0) as bar:
        file.write("\n" * (file.tell() > 0))            # ends the line that a killed process left half-written
        for places in (todo[at:at + size] for at in range(0, len(todo), size)):
            batch, seed = [samples[place] for place in places], config.seed * 1_000_003 + places[0]
            new = evaluate(policy, batch, k, batch_size=config.batch_size, seed=seed, **limits)
            file.writelines(json.dumps(record(t, places[n // k], n % k)) + "\n" for n, t in enumerate(new))
            right += [t.correct for t in new]
            bar.set_postfix_str(f"accuracy {np.mean(right):.1%}", refresh=False)
            bar.update(len(new))
    if world > 1:
        try:
            dist.barrier()                              # breaks at once where a process has died
        except RuntimeError:
            sys.exit("evaluate.py: another process has ended too early; the same command goes on")
        dist.destroy_process_group()
    return list(read_state(folder).values()) if rank == 0 else []


def looks(t, pictures=False):
    """Where in its videos a trajectory looked: seconds of the frames that its code decoded or its context shows, and,
    with `pictures`, at most a dozen of them as [second, thumbnail]."""
    videos, n = [], (t.prompt_images - len(t.sample.images)) // max(1, len(t.sample.videos))    # uniform frames of each
    for k, path in enumerate(() if t.error else t.sample.videos):
        times, info = frame_times(path), video_info(path)
        frames = {*middle_frames(path, n), *(frame for turn in t.turns for video, frame in turn.frames if video == k)}
        frames = sorted(frames & {*range(len(times))})  # the sandbox says which, and what runs there can say anything
        looked, some = [round(float(times[frame]), 2) for frame in frames], frames[::(len(frames) + 11) // 12 or 1]
        try:
            shown = [thumbnail(image, 96) for image in show_frames(path, some)] if pictures else []
        except DataError:
            shown = []                                  # the video breaks where the policy looked
        videos.append(dict(looked=looked, seconds=info["frames"] / info["fps"],
                           shown=[[looked[frames.index(frame)], image] for frame, image in zip(some, shown)]))
    return dict(videos=videos, frames_looked_at=sum(len(v["looked"]) for v in videos),
                seconds_covered=sum(len({int(second) for second in v["looked"]}) for v in videos))


def record(t, index=0, repeat=0):
    """Trajectory -> its line of rollouts.jsonl: all that results and report need, pictures as thumbnails."""
    return dict(
        question=t.sample.question, images=[thumbnail(image) for image in t.images[:len(t.sample.images)]],
        **looks(t, pictures=True),
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
def bootstrap(summary, samples, scores, seed=0):
    """scores (k, n) in 0..1, of each of k repeats -> {"score": percents (1 + D,), "scores": {name: percents (1 + D,)}}:
    first what `summary` makes of them, then of D = 1,000 resamples of the questions. A question's repeats are drawn
    together, and so are rows that are one question in several forms. The same samples and seed: the same draws."""
    units, rng = {}, np.random.default_rng(seed)
    unit = [units.setdefault(getattr(sample, "unit", i), len(units)) for i, sample in enumerate(samples)]
    n = len(units)
    weights = np.array([np.ones(n), *(np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(1000))])[:, unit]
    found = [summary(samples, np.array(repeat), weights) for repeat in scores]
    return {"score": np.mean([one["score"] for one in found], 0),
            "scores": {name: np.mean([one["scores"][name] for one in found], 0) for name in found[0]["scores"]}}


def interval(draws):
    """95 % of the resamples, but for those (nan) in which there was nothing to count."""
    return np.nan_to_num(np.nanpercentile(draws[1:], [2.5, 97.5])).round(2).tolist()


def summarize(config, samples, lines, judge):
    """Lines in order of (index, repeat) -> results.json. Fills in what each line's answer is worth."""
    rows, answers = [samples[line["index"]] for line in lines], [line["answer"] or "" for line in lines]
    graded = score_benchmark(config.benchmark, rows, answers, judge, config.judge_only)
    for line, worth in zip(lines, graded["correct"]):
        line.update(correct=worth, reward=reward(worth >= 0.5, line["tool_calls"]))
    scores = np.reshape(graded["correct"], (len(samples), config.k)).T                              # (k, n)
    found = bootstrap(BENCHMARKS.get(config.benchmark, PLAIN).summary, samples, scores)
    draws = {"avg@k": bootstrap(PLAIN.summary, samples, scores)["score"],
             "pass@k": bootstrap(PLAIN.summary, samples, scores.max(0, keepdims=True))["score"], **found["scores"]}
    means = ("tool_calls", "visual_tokens", "response_tokens", "frames_looked_at", "seconds_covered")
    errors = [line["error"] for line in lines if line["error"]]
    return {"score": np.nan_to_num(found["score"][0]), "interval": interval(found["score"]),
            "n": len(samples), "k": config.k, **{name: draws[name][0] for name in ("avg@k", "pass@k")},
            **{name: np.mean([line[name] for line in lines]) for name in means},
            "end_reasons": dict(Counter(line["end_reason"] for line in lines)), "undecided": graded["undecided"],
            "errors": len(errors), "first_error": next(iter(errors), ""),
            "judge_failures": judge.failures if judge else 0, "judge_error": judge.last_error if judge else "",
            "scores": {name: np.nan_to_num(values[0]) for name, values in found["scores"].items()},
            "intervals": {name: interval(values) for name, values in draws.items()}, "settings": asdict(config),
            "correct": {f"{i} {sample.id}": x for i, (sample, x) in enumerate(zip(samples, scores.mean(0)))},
            "draws": np.nan_to_num(found["score"][1:]).round(3).tolist()}


def compare(files):
    """Two results.json -> text: the paired difference with its 95 % interval, and the samples that differ."""
    try:
        a, b = (json.loads(Path(path).read_text("utf-8")) for path in files)
        if [*a["correct"]] != [*b["correct"]]:
            raise ValueError("they are of different samples")
        draws = np.array([[one["score"], *one["draws"]] for one in (a, b)])                 # (2, 1 + D), paired
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--compare {' '.join(files)}: not two results of the same samples ({error!r})") from error
    summary = "B - A: {:+.1f} points, 95 % interval [{:+.1f}, {:+.1f}]; {} samples, different:"
    return "\n".join([summary.format(b["score"] - a["score"], *interval(draws[1] - draws[0]), len(a["correct"])), *[
        f"  {key}: A {x:g}, B {b['correct'][key]:g}" for key, x in a["correct"].items() if x != b["correct"][key]]])


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
def read_json(file):
    """The settings that a run's or evaluation's config.json holds; {} where there is none."""
    try:
        return json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def read_samples(config):
    """What is asked, by the flags; [] for puzzles. What is wrong with it is found here, before a model is loaded."""
    if config.benchmark:
        return read_benchmark(config.benchmark, config.data, media=not config.predictions)
    if not config.ask:
        return load(config.data) if config.data else []
    if len(config.ask) != 2:
        raise DataError("--ask takes a question and an image or video file")
    try:
        return [Sample("ask", config.ask[0], "", images=(open_image(config.ask[1]),))]
    except DataError:
        return [Sample("ask", config.ask[0], "", videos=(config.ask[1],))] if video_info(config.ask[1]) else []


def newest(config):
    """The newest runs/*/step_N of a run that fits: trained on this task, with the same --frames. Raises DataError."""
    fits = {file.parent for file in Path("runs").glob("*/config.json") for run in [read_json(file)]
            if {*config.task.split(",")} <= {*run.get("task", "").split(",")} and run.get("frames", "") == config.frames
            and (config.data or config.ask or not run.get("data"))}
    steps = [file.parent for folder in fits for file in folder.glob("step_*/config.json")]
    flags = f"--task {config.task}" + (f" --frames {config.frames}" if config.frames else "")
    if not steps:
        raise DataError(f"no checkpoint of a run with {flags} under runs/: make one with `python train.py {flags}` "
                        "(about ten minutes), or name one with --model")
    return str(max(steps, key=os.path.getmtime))


def settle(config):
    """Check the flags, fill in what is none and make the folder of the results: --out, or one that these settings
    always get; never another run's. Returns samples and folder."""
    if not re.fullmatch(r"|[1-9]\d*|\d*\.?\d+fps", config.frames):
        raise DataError(f"--frames {config.frames}: expected a number of frames, or a rate such as 1fps")
    samples, bench = read_samples(config), BENCHMARKS.get(config.benchmark, PLAIN)
    if samples:
        config.task = ",".join(sorted({"video" if sample.videos else "image" for sample in samples}))
    elif not {*config.task.split(",")} <= {"image", "video"}:
        raise DataError(f"--task {config.task}: choose from image, video and image,video")
    config.model = config.model or ("" if config.predictions else newest(config))
    given = {name: value for name, value in vars(config).items() if value is not None}
    k, heat, top_k = (bench.k, bench.temperature, bench.top_k) if samples else (1, 1.0, 0)
    training = read_json(Path(config.model).parent / "config.json")
    usual = dict(k=k, temperature=heat, top_k=top_k, max_new_tokens=10_240, difficulty="")
    as_trained = {name: training[name] for name in ("max_new_tokens", "difficulty") if name in training}
    vars(config).update(usual | as_trained | given | ({"k": 1} if config.predictions else {}))
    for name, least in dict(questions=1, k=1, batch_size=1, max_turns=1, max_new_tokens=1, temperature=0).items():
        if getattr(config, name) < least:
            raise DataError(f"--{name} must be at least {least}")
    try:
        hard = json.loads(config.difficulty or "{}")
        samples = samples or puzzles(config.task, config.questions, config.seed, "heldout", **hard)
    except (ValueError, TypeError) as error:
        raise DataError(f"--difficulty {config.difficulty}: {error}") from error
    free = ("out", "batch_size", "judge", "judge_model", "judge_only", "judge_key_file")     # may change on resuming
    state = {name: value for name, value in asdict(config).items() if name not in free}
    state["model_time"] = os.path.getmtime(config.model) if os.path.isdir(config.model) else 0
    state, what = json.dumps(state, indent=1), config.benchmark or Path(config.data).stem or config.task
    folder = Path(config.out or f"runs/eval-{what}-{hashlib.sha256(state.encode()).hexdigest()[:8]}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.json").exists() and (folder / "config.json").read_text("utf-8") != state:
            raise DataError(f"{folder} is of a run with other settings: give another --out, or delete that folder")
        own = folder / f"config.{os.getpid()}"          # whole at any time, for torchrun's processes all come here
        own.write_text(state, encoding="utf-8")
        own.replace(folder / "config.json")
    except OSError as error:
        raise DataError(f"--out {folder} cannot be written: {error.strerror}") from error
    return samples, folder


def run(config):
    """What the flags say: samples -> lines of rollouts.jsonl -> results and report."""
    if config.compare:
        return print(compare(config.compare))
    samples, folder = settle(config)
    cache, key = folder / "judge.jsonl", config.judge_key_file
    judge = config.judge and Judge(config.judge, config.judge_model, cache, api_key=key)
    if config.predictions:
        lines = [record(Trajectory(replace(sample, videos=()), answer=answer, end_reason=EndReason.DONE), i)
                 for i, (sample, answer) in enumerate(zip(samples, read_predictions(config.predictions, samples)))]
    else:
        lines = collect(config, samples, folder)
    if not lines:
        return                                          # rank 0 has them
    if not config.ask:
        results = summarize(config, samples, lines, judge)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        long = ("score", "interval", "scores", "intervals", "settings", "correct", "draws")
        print(BENCHMARKS.get(config.benchmark, PLAIN).table(results), *(
            f"{name:<20}{round(value, 1) if isinstance(value, float) else value}" for name, value in results.items()
            if name not in long and value != ""), sep="\n")
    (folder / "rollouts.tmp").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "rollouts.tmp").replace(folder / "rollouts.jsonl")
    for file in folder.glob("rollouts.rank*.jsonl"):
        file.unlink()
    write_report(folder / "rollouts.html", lines, f"{config.benchmark or config.data or config.task}, {folder}")
    print(f"{folder}/rollouts.html shows every trajectory")


def main(argv=None):
    """Bad input: one line, exit code 2."""
    try:
        run(parse_flags(EvalConfig, argv))
    except (DataError, SandboxError) as error:
        stop(error)


if __name__ == "__main__":                              # Ctrl-C at once: a library could make of it a sample's error
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    main()
