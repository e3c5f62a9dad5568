"""step_N/ for everybody and state/step_N.pt for --resume."""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from data import DataError
from engine.parallel import rank

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


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
        return str(max(steps, key=lambda step: int(step.name[5:])))
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise DataError(f"{name} is not a checkpoint: it has no readable config.json") from None
    if "model_type" not in config:
        raise DataError(f"{name} is not a checkpoint: no step_N in it, no model in its config.json")
    return str(name)


def load_parts(folder: str, device, dtype, sharded: bool):
    """Model (in eval mode), tokenizer and image processor of a checkpoint. Raises DataError."""
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
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0][:200]
        raise DataError(f"{folder} is not a checkpoint that can be loaded: {why}") from None
    return model.eval(), tokenizer, processor


def load_whole(folder: str, settings: dict):
    """The model of a checkpoint that holds every tensor, and no other. Raises DataError."""
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, **settings
    )
    for fault in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, report[f"{fault}_keys"]))
        if keys:
            some = ", ".join(keys[:3])
            raise DataError(f"{folder}: {len(keys)} {fault} tensors, such as {some}")
    return model
