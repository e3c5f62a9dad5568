"""What a run needs on each GPU, before one rents any: `python train.py --plan --model NAME …`.

It reads a config and no weights. Parameters are counted on a model without memory (torch's meta
device), and what a layer keeps for backward is measured there too: the layer runs as it will run,
and the bytes of the tensors that stay alive are added up. So the figures follow transformers, peft
and engine/fast.py, and not a table of formulas.

What a reader may rely on: the plan is of the worst case that the settings allow. Each row of a
rollout is as long as --max_context; a micro-batch holds a trajectory of that length, full of images
of --max_pixels. GB are 10^9 bytes: a card of "80 GB" has 5 % more, which CUDA and fragments take.
On GPUs the shares and phases are arithmetic and not measured.
"""

import functools
import importlib.util
import math
import weakref
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from data import DataError
from engine.checkpoint import checkpoint_folder, meta_model, read_config
from engine.fast import FEED_TOKENS, HEAD_LOGITS, Cache
from engine.lora import add_adapters
from engine.parallel import compute_dtype, layers_of
from engine.run import say

GB = 1e9
TRACED = 256  # tokens of a traced layer; all that it makes grows with them
LOGIT = 16  # bytes of a logit at the peak: four tensors in fp32
FP32 = 4
RANK = 32  # of adapters, where the plan proposes some
WORTH = 0.97  # a change that leaves more than this is not worth a flag


# ----------------------------------------------------------------------------- what is alive, when
class Memory(TorchDispatchMode):
    """Bytes of the tensors that were made and are alive, and the most there were at a time."""

    def __init__(self, known):
        """known: tensors that were there before, such as weights."""
        super().__init__()
        self.now = self.most = 0
        self.alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, made)
        return made

    def note(self, tensor) -> None:
        """Count a tensor's memory, once and until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size) -> None:
        """It is gone."""
        self.alive.discard(key)
        self.now -= size


def attend(module, query, key, value, attention_mask=None, scaling=None, **_):
    """Attention that keeps what engine/attention.py keeps: its inputs, and its output twice."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = kernel(query, key, value, scale=scaling)
    return out.transpose(1, 2).clone(), None


@dataclass
class Layer:
    """Bytes a token: kept until backward, at the peak of backward, and of a forward alone."""

    kept: float
    peak: float
    alone: float
    given: float  # its input


def trace(layer, shape, head: int = 0) -> Layer:
    """What a layer takes for an input of this shape on the meta device. head: of rotary angles."""
    weights = list(layer.parameters())
    dtype = weights[0].dtype
    settings = {}
    states = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    known = [states, *weights]
    if head:
        angles = torch.empty(*shape[:-1], head, dtype=dtype, device="meta")
        known.append(angles)
        settings["position_embeddings"] = (angles, angles)
        if len(shape) == 2:  # of the vision tower
            settings["cu_seqlens"] = torch.tensor([0, shape[0]])
    with Memory(known) as memory, torch.no_grad():
        layer(states, **settings)
    alone = memory.most
    with Memory(known) as memory:
        out = layer(states, **settings)
        kept = memory.now
        torch.autograd.grad(out, states, torch.empty_like(out))
    found = (kept, memory.most, alone, states.nbytes)
    return Layer(*(size / TRACED for size in found))


# ---------------------------------------------------------------------------------------- the model
class Shape:
    """A model without memory: its parameters, and what its layers take for a token or a patch."""

    def __init__(self, folder: str, dtype: torch.dtype, rank: int = 0):
        """folder: or hub name, with a config.json. rank: of adapters, 0 for none."""
        from transformers import AttentionInterface

        AttentionInterface.register("planned", attend)
        config = read_config(folder)
        model = meta_model(config, dict(dtype=dtype, attn_implementation="planned"))
        if rank:
            add_adapters(model, rank, 0, dtype)
        text = config.get_text_config()
        vision = config.vision_config
        tower = model.model.visual
        decoder = model.model.language_model
        units = [count(unit.parameters()) for unit in layers_of(model)]
        self.parameters = count(model.parameters())
        self.trained = count(w for w in model.parameters() if w.requires_grad)
        self.largest = max(units)  # parameters of a layer
        self.rest = self.parameters - sum(units)  # and of what is in none
        self.dtype = dtype
        self.whole_tower = rank == 0  # does it train?
        self.depth = len(decoder.layers)
        self.blocks = len(tower.blocks)
        self.vocabulary = text.vocab_size
        self.key_heads = text.num_key_value_heads
        self.merged = vision.spatial_merge_size**2  # patches of an image token
        self.side = vision.patch_size
        self.patch = dtype.itemsize * tower.patch_embed.proj.weight[0].numel()
        model.to(dtype)  # as the adapters are gathered, too
        width = len(decoder.norm.weight)
        self.head = getattr(text, "head_dim", None) or width // text.num_attention_heads
        self.layer = trace(decoder.layers[0], (1, TRACED, width), self.head)
        self.norm = trace(decoder.norm, (1, TRACED, width))
        width = len(tower.blocks[0].norm1.weight)
        self.block = trace(tower.blocks[0], (TRACED, width), width // vision.num_heads)
        self.merger = trace(tower.merger, (TRACED, width))

    def activations(self, tokens: int, patches: int, recompute: bool) -> float:
        """Bytes at the peak of forward and backward of packed tokens, logits left out.

        recompute: as --checkpoint_activations.
        """
        layer = kept(self.layer, recompute)
        block = kept(self.block, recompute)
        around = self.norm.kept + 2 * self.layer.given  # embedded, and then with the pictures
        text = tokens * (self.depth * layer + around + self.layer.peak)
        text -= 0 if recompute else tokens * layer  # the last one's is in its peak
        if not self.whole_tower:  # it keeps nothing, and ends before the layers begin
            return max(text, patches * self.block.alone)
        tower = patches * (self.blocks * block + self.merger.kept + self.patch)
        return tower + max(text, patches * (self.block.peak - (0 if recompute else block)))

    def cache(self, rows: int, tokens: int) -> int:
        """Bytes of engine/fast.py's cache, once its rows have grown to so many tokens."""
        token = torch.empty(1, self.key_heads, self.head, dtype=self.dtype, device="meta")
        cache = Cache(rows)
        length = 0
        while length < tokens:
            cache.write(0, token, token, 0, length, length + 1)
            length = cache.layers[0][0].shape[1]
        return self.depth * sum(tensor.nbytes for tensor in cache.layers[0])

    def logits(self, tokens: int) -> float:
        """Bytes at the peak of so many tokens' log-probs, of which a chunk exists at a time."""
        return LOGIT * min(HEAD_LOGITS, tokens * self.vocabulary)


def count(weights) -> int:
    """Numbers in tensors."""
    return sum(weight.numel() for weight in weights)


def kept(layer: Layer, recompute: bool) -> float:
    """Bytes a token that a layer keeps until backward."""
    return layer.given if recompute else layer.kept


shape_of = functools.cache(Shape)


# -------------------------------------------------------------------------------------- the figures
class Needs:
    """Bytes on each GPU, by what takes them. `most` is at the peak of the hungriest phase."""

    def __init__(self, config):
        dtype = compute_dtype(config.dtype or "bfloat16")
        shape = shape_of(config.model, dtype, config.lora_rank)
        frozen = shape.parameters - shape.trained
        share = FP32 * shape.trained / config.gpus
        held = share + dtype.itemsize * frozen / config.gpus
        self.shape = shape
        self.measure(config)
        self.main_memory = held + 3 * share if config.offload else 0.0
        self.weights = 0.0 if config.offload else held
        self.gradients = 0.0 if config.offload else share
        self.optimizer = 2 * self.gradients
        self.copy = dtype.itemsize * shape.parameters
        self.gathered = 2 * dtype.itemsize * (shape.rest + 2 * shape.largest)
        self.cache = shape.cache(self.rows, config.max_context)
        self.activations = self.of_activations(config.checkpoint_activations)
        self.logits = shape.logits(self.tokens)
        reading = FEED_TOKENS * shape.layer.alone
        lasting = self.weights + self.optimizer
        update = self.gradients + self.gathered + self.activations + self.logits
        self.phases = {
            "rollout": lasting + self.copy + self.cache + max(reading, shape.logits(self.rows)),
            "update": lasting + update,
            "optimizer's step": lasting + 2 * self.gradients,
        }
        self.most = max(self.phases.values())

    def measure(self, config) -> None:
        """How much is sampled at a time, and what the largest micro-batch holds."""
        prompts = round(config.oversample * config.batch_size)
        self.rows = math.ceil(prompts / config.gpus) * config.group_size
        self.tokens = max(config.tokens_per_microbatch, config.max_context)
        patches = config.max_pixels // self.shape.side**2
        trajectories = math.ceil(self.tokens / config.max_context)
        fitting = self.tokens * self.shape.merged // patches
        self.images = min(trajectories * config.max_images, fitting)
        self.patches = self.images * patches

    def of_activations(self, recompute: bool) -> float:
        """Bytes of the largest micro-batch's activations."""
        return self.shape.activations(self.tokens, self.patches, recompute)


def changes(config) -> dict:
    """What may be changed to need less; what costs least comes first."""
    possible = dict(
        checkpoint_activations=True,
        oversample=1.0,
        offload=True,
        batch_size=lower(config.batch_size, 4),
        max_context=lower(config.max_context, 8_192),
        max_pixels=lower(config.max_pixels, 500_000),
        lora_rank=config.lora_rank or RANK,
    )
    if importlib.util.find_spec("peft") is None:
        del possible["lora_rank"]
    return {name: value for name, value in possible.items() if value != getattr(config, name)}


def lower(value: int, least: int) -> int:
    """Half of it, but not less than the least that a run makes sense with."""
    return max(value // 2, min(value, least))


def advise(config) -> list[str]:
    """Does a run fit, or which flags make it fit: one line a flag."""
    memory = config.gpu_memory * GB
    need = Needs(config).most
    lines = []
    while need > memory:
        found = []
        for name, value in changes(config).items():
            changed = replace(config, **{name: value})
            less = Needs(changed).most
            # Offloading makes every step slower, so it comes last, unless it is enough.
            last = name == "offload" and less > memory
            if less < WORTH * need:
                found.append((less > memory, last, len(found), name, value))
        if not found:
            return [*lines, "does not fit: take more GPUs (--gpus), or larger ones"]
        *_, name, value = min(found)
        changed = replace(config, **{name: value})
        less = Needs(changed).most
        flag = f"--{name}" if value is True else f"--{name} {value}"
        lines.append(f"too much; {flag} saves {(need - less) / GB:.1f}: {less / GB:.1f}")
        config = changed
        need = less
    return [*lines, f"fits, and leaves {(memory - need) / GB:.1f}"]


def plan(config) -> None:
    """Say what a run with these settings needs on each GPU. Raises DataError."""
    if not config.model:
        raise DataError("--plan needs --model; without one the tiny policy trains on any laptop")
    config = replace(config, model=checkpoint_folder(config.model))
    needs = Needs(config)
    shape = needs.shape
    lines = {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "optimizer": needs.optimizer,
        "main memory, with --offload": needs.main_memory,
        "gathered copy, for rollouts": needs.copy,
        f"cache, {needs.rows} rows of {config.max_context:,} tokens": needs.cache,
        "gathered layers and their gradients, in the update": needs.gathered,
    }
    ranks = {config.lora_rank: ""}
    if "lora_rank" in changes(config):
        ranks[RANK] = f", --lora_rank {RANK}"
    for rank, words in ranks.items():
        for recompute in (False, True):
            other = Needs(replace(config, lora_rank=rank))
            flag = ", --checkpoint_activations" if recompute else ""
            lines[f"activations of the largest micro-batch{flag}{words}"] = other.of_activations(
                recompute
            )
    lines["logits"] = needs.logits
    for phase, most in needs.phases.items():
        lines[f"most, in the {phase}"] = most
    about = f"{shape.parameters / GB:.2f} G parameters, {shape.trained / GB:.2f} G of them train"
    say(f"{config.model}: {about}; GPUs: {config.gpus} of {config.gpu_memory:.0f} GB")
    say(f"largest micro-batch: {needs.tokens:,} tokens, {needs.images} images of them")
    for words, figure in lines.items():
        if figure:
            say(f"{figure / GB:10.1f} GB  {words}")
    say("\n".join(advise(config)))
