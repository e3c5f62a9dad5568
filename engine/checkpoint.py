"""Checkpoints: reading one that somebody made, and writing ours so that a kill loses nothing.

What a reader may rely on: `step_N/` is a Hugging Face folder, and `state/step_N.pt` holds what
--resume needs besides. Both are written aside, synced and renamed, so that a kill at any moment
leaves checkpoints that are complete or absent. A checkpoint that lacks a tensor, or holds one of
another name, is refused: transformers would fill in random numbers and go on.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from data import DataError
from engine.parallel import full_weights, gather, rank, world

# transformers' classes and torch's state dicts are imported where they are used: together they take
# two seconds, in which a command should have said what it is going to do.

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


class FullDisk(RuntimeError):
    """A checkpoint could not be written; the earlier ones are whole."""


# ---------------------------------------------------------------------------------------- reading
def checkpoint_folder(name) -> str:
    """What --model names -> a folder with a model, or a hub name.

    A run's folder stands for its newest step_N. Raises DataError for anything else.
    """
    folder = Path(name)
    if not folder.is_dir():
        if str(name).count("/") == 1 and not str(name).startswith((".", "/")):
            return str(name)
        raise DataError(
            f"{name}: no such folder, and not a hub name such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    steps = [step for step in folder.glob("step_*") if (step / "config.json").exists()]
    if steps:
        return str(max(steps, key=number))
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise DataError(f"{name} is not a checkpoint: it has no readable config.json") from None
    if "model_type" not in config:
        raise DataError(f"{name} is not a checkpoint: no step_N in it, no model in its config.json")
    return str(name)


def load_parts(folder: str, device, dtype, sharded: bool):
    """Model (in eval mode), tokenizer and image processor of a checkpoint. Raises DataError.

    sharded: process 0 reads the weights into main memory, the others hold none.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn")
    attention = {"text_config": "sdpa", "vision_config": "flash_attention_2" if flash else "sdpa"}
    settings = dict(dtype=dtype, attn_implementation=attention)
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in FAMILIES:
            families = ", ".join(FAMILIES)
            raise DataError(f"{folder} is a {config.model_type}; expected one of {families}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        if not tokenizer.chat_template:
            raise DataError(f"{folder} has no chat template: copy it from the model it was made of")
        if sharded and rank() > 0:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config, **settings)
        else:
            model = load_whole(folder, settings)
            model.to("cpu" if sharded else device)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise DataError(f"{folder} is not a checkpoint that can be loaded: {why}") from None
    return model.eval(), tokenizer, processor


def load_whole(folder: str, settings: dict):
    """The model of a checkpoint that holds every tensor, and no other. Raises DataError."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, **settings
    )
    for fault in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, report[f"{fault}_keys"]))
        if keys:
            some = ", ".join(keys[:3])
            raise DataError(f"{folder}: {len(keys)} {fault} tensors, such as {some}")
    return model


# ---------------------------------------------------------------------------------------- writing
def save_policy(policy, folder) -> None:
    """Write a Hugging Face checkpoint, gathered from all processes; process 0 writes."""
    weights = full_weights(policy.model)
    if rank() == 0:
        policy.model.save_pretrained(Path(folder), state_dict=weights)
        policy.tokenizer.save_pretrained(folder)
        policy.image_processor.save_pretrained(folder)


def save_state(out: Path, step: int, policy, optimizer, progress: dict, keep: int) -> None:
    """Write step_N/ and state/step_N.pt; only the newest `keep` stay. All processes call it.

    progress: what else --resume needs, plain values. Raises FullDisk.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    name = f"step_{step}"
    aside = out / "unfinished"
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dict(
        progress,
        optimizer=get_optimizer_state_dict(policy.model, optimizer, options=whole),
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
            for old in complete(out)[:-keep]:
                old.unlink()
                discard(out / old.stem)
    except (OSError, RuntimeError, SafetensorError) as error:
        if rank() > 0:  # not of this process's writing
            raise
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(out).free / 2**20
        why = str(error).splitlines()[0][:120]
        raise FullDisk(
            f"{name} could not be written ({why}); {free:.0f} MiB are free in {out}; "
            "earlier checkpoints are whole (--resume)"
        ) from None


def load_state(file: Path, policy, optimizer) -> dict:
    """Put the optimizer and, on as many processes as before, the random state back -> progress."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state = torch.load(file, mmap=True, weights_only=True)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    set_optimizer_state_dict(policy.model, optimizer, state.pop("optimizer"), options=whole)
    generators = state.pop("generators")
    if len(generators) == world():
        policy.generator.set_state(generators[rank()])
    return state


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
    return sorted(files, key=number)


def number(path: Path) -> int:
    """N of step_N."""
    return int(path.stem.removeprefix("step_"))


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
