"""Several processes as one: join them, share lists, shard the model with FSDP2, gather it again.

What a reader may rely on: with one process on a CPU that computes in fp32, every function here does
nothing, or the obvious. With several, `gather` returns the same list on every process. A sharded
model holds 1 / W of the fp32 weights on each of W processes, computes in bf16 or fp32, and sums
gradients in fp32. One process that computes in bf16 is a group too, on a CPU as on a GPU: so there
is one way to do it, and a laptop can test it. All processes must call `shard`, `whole`, `gather`
and `full_weights` together.
"""

import functools
import os
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.lora import add_adapters

# FSDP2 is imported where it is used: it takes most of a second, and a laptop does without.


def prepare() -> None:
    """Choose this process's device, and how many threads compute."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif "OMP_NUM_THREADS" not in os.environ:
        # Threads that wait spin, and the sandboxes need cores.
        torch.set_num_threads(max(1, os.cpu_count() // 2))


def compute_dtype(name: str = "") -> torch.dtype:
    """What --dtype means; none: bfloat16 on a GPU, float32 on a CPU."""
    usual = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, name or usual)


def join(dtype: str = "") -> None:
    """Join torchrun's processes. One alone that computes in bf16 is a group too."""
    cuda = torch.cuda.is_available()
    half = compute_dtype(dtype) is torch.bfloat16
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    launched = "WORLD_SIZE" in os.environ
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    patience = timedelta(days=30)  # one process may sample far longer than the others
    if several or (half and launched):
        dist.init_process_group(backend, timeout=patience)
    elif half:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def gather(items: list) -> list:
    """The lists of all processes, joined in the order of their ranks, on every process."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def layers_of(model) -> list:
    """Decoder layers and vision blocks."""
    return [*model.model.language_model.layers, *model.model.visual.blocks]


def checkpoint_layers(model) -> None:
    """Let each layer run again in backward instead of keeping what it made."""
    from torch.utils.checkpoint import checkpoint

    for layer in layers_of(model):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def make_trainable(policy, config) -> None:
    """Adapters, recomputed activations, sharding: what the settings ask for."""
    dtype = compute_dtype(config.dtype)
    if config.lora_rank:
        add_adapters(policy.model, config.lora_rank, config.seed, dtype)
    if config.checkpoint_activations:
        checkpoint_layers(policy.model)
    if dist.is_initialized():
        shard(policy, dtype, config.offload)


def shard(policy, dtype: torch.dtype = torch.float32, offload: bool = False) -> None:
    """Shard a policy's model with FSDP2. A unit is a decoder layer, a vision block, or the rest.

    The weights and buffers are those of process 0. dtype: of what is computed. offload: parameters
    and optimizer live in main memory.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method as register

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    model = policy.model
    settings = dict(mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=policy.device.type == "cuda")
    weights = model.state_dict() if rank() == 0 else {}
    buffers = dict(model.named_buffers())
    model.to("meta")
    for unit in [*layers_of(model), model]:
        fully_shard(unit, **settings)
    register(model, "generate")  # it calls parts of the model before the model itself
    model.to_empty(device="cpu" if offload else policy.device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
    set_model_state_dict(model, weights, options=options)
    for name, buffer in model.named_buffers():  # such as rotary frequencies
        buffer.data = buffer.data.to(policy.device)
        if rank() == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)


def clip_gradients(model, most: float) -> float:
    """Scale the gradients down to a norm of at most `most` -> the norm before."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        if weight.grad is None:  # no image here; other processes may have one, and all step alike
            weight.grad = torch.zeros_like(weight)
    norm = torch.nn.utils.clip_grad_norm_(weights, most)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def sharded(model) -> bool:
    """Is the model sharded with FSDP2?"""
    return hasattr(model, "unshard")


def full_weights(model) -> dict:
    """The whole state dict of a model; where it is sharded, on process 0 alone."""
    if not sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


@contextmanager
def whole(model):
    """Every process holds all parameters, so that each may generate at its own pace."""
    units = [module for module in model.modules() if sharded(module)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()
