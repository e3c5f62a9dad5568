"""Checkpoints: reading one that somebody made, and writing ours so that a kill loses nothing.

What a reader may rely on: `step_N/` is a Hugging Face folder, and `state/step_N.pt` holds what
--resume needs besides. Both are written aside, synced and renamed, so that a kill at any moment
leaves checkpoints that are complete or absent. A checkpoint that lacks a tensor, or holds one of
another name, is refused: transformers would fill in random numbers and go on. So is one whose
tokenizer or chat template does not fit. Whatever is wrong with one is a DataError of one line.
"""

import importlib.util
import json
import logging
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import DataError
from engine.lora import adapters, load_adapters, merged
from engine.parallel import full_weights, gather, rank, world
from engine.prompt import encode

# transformers' classes and torch's state dicts are imported where they are used: together they take
# two seconds, in which a command should have said what it is going to do.

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SOURCE = "; copy it from the model that this one was made of"
SPECIAL = (  # what model.Policy takes for granted
    "<|im_end|>",
    "<|endoftext|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
)


class FullDisk(RuntimeError):
    """A checkpoint could not be written; the earlier ones are whole."""


# ---------------------------------------------------------------------------------------- reading
def refuse(folder, why: str):
    """Raises DataError: one line about a checkpoint."""
    raise DataError(f"{folder}: {why}"[:299])


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def checkpoint_folder(name) -> str:
    """What --model names -> a folder with a model, or a hub name.

    A run's folder stands for its newest step_N. Raises DataError for anything else.
    """
    folder = Path(name)
    if not folder.is_dir():
        if str(name).count("/") == 1 and not str(name).startswith((".", "/")):
            return str(name)
        refuse(name, "no such folder, and not a hub name such as Qwen/Qwen2.5-VL-7B-Instruct")
    steps = [step for step in numbered(folder.glob("step_*")) if (step / "config.json").exists()]
    if steps:
        return str(steps[-1])
    if (folder / "adapter_config.json").exists():
        refuse(
            name, "an adapter, without the model it is for; merge them (merge_and_unload of peft)"
        )
    if not (folder / "config.json").exists():
        refuse(name, "not a checkpoint, it holds neither config.json nor step_N")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse(name, f"its config.json cannot be read ({first_line(error)})")
    if not isinstance(config, dict) or "model_type" not in config:
        refuse(
            name, "not a checkpoint, it holds no step_N, and its config.json names no model_type"
        )
    return str(name)


@contextmanager
def quiet(bars: bool = False):
    """Keep off the terminal what transformers reports over many lines, and its bars."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    logging.disable(logging.WARNING)
    if not bars:
        disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        enable_progress_bar()


@contextmanager
def reading(folder: str, part: str, advice: str = ""):
    """Read a part of a checkpoint. A damaged file may raise anything; it becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        fault = f"its {part} cannot be loaded{advice}: {first_line(error):.200}"
        if not Path(folder).is_dir():
            fault = f"no such folder, and on the hub {fault}"
        refuse(folder, fault)


def read_config(folder: str):
    """The config of a checkpoint, of a folder or hub name. Raises DataError."""
    from transformers import AutoConfig

    with quiet(), reading(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        families = ", ".join(FAMILIES)
        refuse(folder, f"a model of type {config.model_type}; expected one of {families}")
    return config


def meta_model(config, settings: dict):
    """A model of this config whose weights have shapes and no memory."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, **settings)


def load_parts(folder: str, device, dtype, max_pixels: int, sharded: bool):
    """Model (in eval mode), tokenizer and image processor of a checkpoint. Raises DataError.

    dtype: bfloat16 on a GPU and float32 on a CPU, unless given. max_pixels: of an image, at most,
    as the model sees it. sharded: process 0 reads the weights into main memory, and the others hold
    none.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn")
    attention = {"text_config": "sdpa", "vision_config": "flash_attention_2" if flash else "sdpa"}
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = dict(dtype=dtype or usual, attn_implementation=attention)
    config = read_config(folder)
    with quiet(bars=not Path(folder).is_dir()):  # a download is slow, and shows its bar
        with reading(folder, "tokenizer", SOURCE):
            tokenizer = AutoTokenizer.from_pretrained(folder)
        with reading(folder, "chat template", SOURCE):
            check_words(folder, config, tokenizer)
        with reading(folder, "preprocessor_config.json", SOURCE):
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            processor.get_number_of_image_patches(56, 56)  # one of another kind has no such method
        with reading(folder, "model"):
            if sharded and rank() > 0:
                model = meta_model(config, settings)
            else:
                model = load_whole(folder, settings)
                model.to("cpu" if sharded else device)
    processor.size["longest_edge"] = min(processor.size["longest_edge"], max_pixels)
    return model.eval(), tokenizer, processor


def check_words(folder: str, config, tokenizer) -> None:
    """Raises DataError where tokenizer, chat template and model do not fit together."""
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in SPECIAL if token not in vocabulary]
    if lacking:
        refuse(folder, f"its tokenizer lacks {', '.join(lacking)}{SOURCE}")
    if max(vocabulary.values()) >= config.get_text_config().vocab_size:
        refuse(folder, f"its tokenizer knows more tokens than its model{SOURCE}")
    if not tokenizer.chat_template:
        refuse(folder, f"it has no chat template{SOURCE}")
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    ids = encode(tokenizer, [{"role": "user", "content": content}], after_action=True)
    if ids.count(config.image_token_id) != 1:
        refuse(folder, f"its chat template does not show images as its model expects{SOURCE}")


def load_whole(folder: str, settings: dict):
    """The model of a checkpoint that holds every tensor, and no other. Raises DataError."""
    from transformers import AutoModelForImageTextToText

    for file in sorted(Path(folder).glob("*.safetensors")):
        with reading(folder, file.name, "; copy it again"), safe_open(file, "pt"):
            pass  # its header says how long it must be
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, report[f"{kind}_keys"]))
        if keys:
            faults.append(f"{len(keys)} {kind} tensors, such as {', '.join(keys[:2])}")
    if faults:
        refuse(folder, "; ".join(faults))
    return model


# ---------------------------------------------------------------------------------------- writing
def save_policy(policy, folder) -> None:
    """Write a Hugging Face checkpoint, gathered from all processes; process 0 writes.

    Adapters are merged into it.
    """
    weights = merged(full_weights(policy.model))
    if rank() == 0:
        with quiet():
            policy.model.save_pretrained(Path(folder), state_dict=weights)
        policy.tokenizer.save_pretrained(folder)
        policy.image_processor.save_pretrained(folder)


PROGRESS = ("step", "position", "rows")  # of train.Run: plain values


def save_state(run) -> None:
    """Write step_N/ and state/step_N.pt; only the newest --keep stay. All processes call it.

    Raises FullDisk.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    policy = run.policy
    out = run.out
    name = f"step_{run.step}"
    aside = out / "unfinished"
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    progress = {field: getattr(run, field) for field in PROGRESS}
    state = dict(
        progress,
        adapters=adapters(policy.model),
        optimizer=get_optimizer_state_dict(policy.model, run.optimizer, options=whole),
        generators=gather([policy.generator.get_state()]),
    )
    try:
        if rank() == 0:
            discard(aside)
            (out / "state").mkdir(exist_ok=True)
        save_policy(policy, aside / name)
        if rank() == 0:
            torch.save(state, aside / "state.pt")
            for path in aside.rglob("*"):
                sync(path)
            discard(out / name)
            (aside / name).rename(out / name)
            (aside / "state.pt").rename(out / "state" / f"{name}.pt")
            discard(aside)
            for old in complete(out)[: -run.config.keep]:
                old.unlink()
                discard(out / old.stem)
    except (OSError, RuntimeError, SafetensorError) as error:
        if rank() > 0:  # not of this process's writing
            raise
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(out).free / 2**20
        why = first_line(error)[:120]
        raise FullDisk(
            f"{name} could not be written ({why}); {free:.0f} MiB are free in {out}; "
            "earlier checkpoints are whole (--resume)"
        ) from None


def load_state(file: Path, run) -> None:
    """Put a run back to where it was: also its random state, on as many processes as before."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state = torch.load(file, mmap=True, weights_only=True)
    policy = run.policy
    optimizer = run.optimizer
    load_adapters(policy.model, state.get("adapters", {}))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weight_decay = optimizer.param_groups[0]["weight_decay"]  # may be another one now
    set_optimizer_state_dict(policy.model, optimizer, state["optimizer"], options=whole)
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    generators = state["generators"]
    if len(generators) == world():
        policy.generator.set_state(generators[rank()])
    for field in PROGRESS:
        setattr(run, field, state[field])


def state_to_resume(config) -> Path | None:
    """The newest complete state in --out, which --resume goes on with. Raises DataError."""
    states = complete(Path(config.out))
    if states and not config.resume:
        raise DataError(f"{config.out} holds a run: go on with --resume, or give another --out")
    if config.resume and not states:
        raise DataError(f"--resume: no complete checkpoint in {config.out}; start without it")
    return states[-1] if states else None


def complete(out: Path) -> list[Path]:
    """The files state/step_N.pt, oldest first, whose step_N is there too."""
    files = [file for file in out.glob("state/step_*.pt") if (out / file.stem).exists()]
    return numbered(files)


def numbered(paths) -> list[Path]:
    """Those that are named step_N, by N; people make copies, such as step_20_old."""
    steps = {path: path.stem.removeprefix("step_") for path in paths}
    return sorted((path for path, n in steps.items() if n.isdecimal()), key=lambda p: int(steps[p]))


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file)


def discard(folder: Path) -> None:
    """Remove a folder; a kill on the way leaves nothing that looks like a checkpoint."""
    trash = folder.with_name("discarded")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        folder.rename(trash)
        shutil.rmtree(trash)
