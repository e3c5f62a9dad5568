"""LoRA: instead of all weights, train small adapters on the language model's linear layers.

peft puts them in, so this computes what everybody's LoRA does: W x + ALPHA / R * B A x, where A has
R rows and B begins at 0. The model's own weights are frozen, so they need neither gradients nor
optimizer, nor fp32: they are held as they are computed with. The adapters are fp32 master weights.

What a reader may rely on: the module tree of the model stays as it is, apart from the linear
layers, so that everything else works as without adapters. A checkpoint holds the merged weights in
fp32, whatever the model is held in, and names no adapter. The adapters alone go where --resume
looks, because B A cannot be had back from W + B A.
"""

import importlib.util

import torch

from data import DataError

ALPHA = 32  # with a fixed one, the best learning rate hardly depends on the rank
BASE = "base_layer."  # what peft puts into the name of a layer's own weight
ADAPTER = ".lora_"  # and what is in the name of an adapter's


def check_adapters(rank: int) -> None:
    """Adapters need peft. Raises DataError."""
    if rank and importlib.util.find_spec("peft") is None:
        raise DataError("--lora_rank needs peft, which is not installed: pip install peft")


def add_adapters(model, rank: int, seed: int, dtype: torch.dtype) -> None:
    """Freeze a model, and put adapters on every linear layer of its language model.

    seed: of the adapters. dtype: that the frozen weights are then held in.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import

    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    names = []
    for name, layer in model.model.language_model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            names.append(f"model.language_model.{name}")
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=names), model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def merged(weights: dict) -> dict:
    """A state dict with adapters -> that of the model in which they are added to the weights."""
    found = {}
    for name, weight in weights.items():
        if ADAPTER in name:
            continue
        layer = name.removesuffix(f"{BASE}weight")
        if layer != name:
            down = weights[f"{layer}lora_A.default.weight"]
            up = weights[f"{layer}lora_B.default.weight"]
            weight = weight + ALPHA / len(down) * (up @ down)  # in fp32, as the adapters are
        found[name.replace(BASE, "")] = weight.float()
    return found


def adapters(model) -> dict:
    """The adapters' part of a state dict, whole, on process 0. All processes call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if all(weight.requires_grad for weight in model.parameters()):
        return {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def load_adapters(model, weights: dict) -> None:
    """Put adapters back into a model that has some of the same rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, weights, options=options)
