"""The policy: load it, generate a turn, score its tokens, shard it, save it.

Any Qwen2.5-VL or Qwen3-VL checkpoint is a policy; `tiny_policy` is the same architecture at 0.6 M parameters.
What makes it fast, and why it is so:
  - Everything is packed: a forward takes the real tokens of all sequences in one row (1, N), no matmul sees padding;
    only attention gathers (sequence, position) tables, as `Block`s say. Prefill, observations, decoding and training
    share this one path.
  - A prompt runs once for its group: generation copies its keys and values to the group's rows; in training the
    group's responses attend to one packed copy of it, and gradients flow back through it.
  - The cache lives across turns and is written in place at each row's own length. Rows that stop swap places with
    live ones, so the live rows are always a slice and a stopped row costs nothing.
  - Log-probs and entropy are taken at action positions only, in chunks that backward recomputes.

Shapes: B sequences, T tokens, N packed tokens, A action tokens, V vocabulary, G group size, H heads, D head size.
"""
import functools
import importlib.util
import os
import types
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.utils.checkpoint import checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AttentionInterface, AttentionMaskInterface, AutoImageProcessor, AutoModelForImageTextToText,
                          AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                          Qwen2VLImageProcessorPil)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import DataError, encode

CLOSING_TAGS = ("</code>", "</answer>")   # an action ends where one of these is complete
HEAD_CHUNK = 256                          # action tokens whose logits exist at a time
FEED_TOKENS = 16_384                      # tokens of one prefill forward
CHAT_TEMPLATE = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass
class Block:
    """R sequences that attend alike. queries (R, Q) and keys (R, S) index packed tokens (keys None: the cache's rows);
    mask (R, 1, g * Q, S) is True where a query of one of the g heads that share a key head may look; real (R, Q)."""
    queries: torch.Tensor
    keys: torch.Tensor | None
    mask: torch.Tensor
    real: torch.Tensor


def packed_attention(module, query, key, value, attention_mask, scaling=None, blocks=None, **kwargs):
    """Attention over a packed row (1, H, N, D), block by block; without blocks it is transformers' own sdpa."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    outputs = []
    for block in blocks:
        q = query[0][:, block.queries].transpose(0, 1)                          # (R, H, Q, D)
        k, v = (x if block.keys is None else x[0][:, block.keys].transpose(0, 1) for x in (key, value))
        (rows, heads, length, size), kv_heads = q.shape, k.shape[1]
        q = q.reshape(rows, kv_heads, -1, size)     # the heads that share a key head become queries: no repeated keys
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask, scale=scaling)
        outputs.append(out.reshape(rows, heads, length, size).transpose(1, 2)[block.real])    # (n, H, D)
    return torch.cat(outputs)[None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def ragged(lengths, device, start=0):
    """Packed indices (R, max length) of consecutive sequences from `start`, and which of the entries are real."""
    lengths = torch.tensor(lengths, device=device)
    column = torch.arange(int(lengths.max()), device=device)
    real = column < lengths[:, None]
    return torch.where(real, (start + lengths.cumsum(0) - lengths)[:, None] + column, start), real


class RowCache:
    """Keys and values of `rows` rows, written in place: token i of a forward goes to [row[i], slot[i]]."""

    def __init__(self, n_layers, rows):
        self.rows, self.store = rows, [[None] * n_layers, [None] * n_layers]    # (rows, H, capacity, D) each

    def plan(self, row, slot, lo, hi, limit):
        """For the next forward: where tokens are written; rows lo:hi are read up to `limit`."""
        self.row, self.slot, self.lo, self.hi, self.limit = row, slot, lo, hi, limit

    def update(self, key, value, layer, *args, **kwargs):
        """Called by each attention layer: stores (1, H, N, D), returns the planned rows' (hi - lo, H, limit, D)."""
        for store, new in zip(self.store, (key, value)):
            old = store[layer]
            if old is None or old.shape[2] < self.limit:
                capacity = self.limit + max(128, self.limit // 4)
                store[layer] = new.new_zeros(self.rows, new.shape[1], capacity, new.shape[3])
                if old is not None:
                    store[layer][:, :, :old.shape[2]] = old
            store[layer][self.row, :, self.slot] = new[0].transpose(0, 1)
        return [store[layer][self.lo:self.hi, :, :self.limit] for store in self.store]

    def repeat(self, times):
        """Copy every row to `times` adjacent rows: a prompt to its group."""
        self.rows *= times
        self.store = [[x.repeat_interleave(times, 0) for x in store] for store in self.store]

    def swap(self, a, b):
        """Exchange rows a[i] and b[i]."""
        for x in (x for store in self.store for x in store):
            x[a + b] = x[b + a]


@dataclass
class Encoded:
    """Token ids with their images: pixels (patches, features) or None, grid (images, 3) in patches (t, h, w)."""
    ids: list
    pixels: torch.Tensor | None
    grid: torch.Tensor


class State:
    """Rows under generation. Slot i of the cache holds row order[i], which has length[i] tokens in the cache, its next
    at rotary position position[i]; pending[i] is sampled and not fed yet; logits (slots, V) predict the next token."""

    def __init__(self, cache):
        n = cache.rows
        self.cache, self.order, self.logits = cache, [*range(n)], None
        self.length, self.position, self.pending = [0] * n, [0] * n, [[]] * n

    def columns(self):
        return self.order, self.length, self.position, self.pending

    def front(self, keep):
        """Bring the slots `keep` (ascending) to the front by swaps with slots that are not kept."""
        n = len(keep)
        holes, movers = sorted(set(range(n)) - set(keep)), [slot for slot in keep if slot >= n]
        if holes:
            self.cache.swap(holes, movers)
        for a, b in zip(holes, movers):
            for column in self.columns():
                column[a], column[b] = column[b], column[a]


@dataclass
class Action:
    """One sampled turn: ids and their log-probs under the sampling temperature; complete if a tag or eos ended it."""
    ids: list
    logprobs: list
    complete: bool = False


class Policy:
    """A vision-language model with its tokenizer and image processor. `ban` (V,) keeps it from sampling image and video
    placeholders (they would need pixels) and ids that the tokenizer does not know."""

    def __init__(self, model, tokenizer, image_processor):
        self.model, self.tokenizer, self.image_processor, self.device = model, tokenizer, image_processor, model.device
        text, ids = model.config.get_text_config(), tokenizer.convert_tokens_to_ids
        self.kv_groups, self.n_layers = text.num_attention_heads // text.num_key_value_heads, text.num_hidden_layers
        self.image_token, self.end = model.config.image_token_id, ids("<|im_end|>")
        self.ends = {self.end, ids("<|endoftext|>")}
        self.ban = torch.zeros(text.vocab_size, device=self.device)
        self.ban[ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])] = -torch.inf
        self.ban[len(tokenizer):] = -torch.inf
        self.closing = {i for token, i in tokenizer.get_vocab().items() if ">" in token}
        self.generator, self.sharded = torch.Generator(self.device), False
        self.tokens_fed = self.images_fed = 0                                  # what generation put through the model
        for function in (hidden, score):                                       # methods of the model, for FSDP's hooks
            setattr(model, function.__name__, types.MethodType(function, model))

    def encode(self, messages, images=(), after_action=False):
        """Chat messages -> Encoded (data.encode), each image placeholder repeated to its image's token count."""
        ids, (pixels, grid) = encode(self.tokenizer, messages, after_action), self.pixels(images)
        counts = iter((grid.prod(1) // self.image_processor.merge_size ** 2).tolist())
        return Encoded([i for t in ids for i in ([t] * next(counts) if t == self.image_token else [t])], pixels, grid)

    def pixels(self, images):
        """PIL images -> (patches, features) or None, grid (images, 3)."""
        if not images:
            return None, torch.zeros(0, 3, dtype=torch.long)
        out = self.image_processor(images=list(images), return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def positions(self, ids, grid):
        """Multimodal rotary positions (3, T) of one sequence, as the model itself counts them."""
        if not len(grid):
            return torch.arange(len(ids)).expand(3, -1)
        ids = torch.tensor([ids])
        kinds = (ids == self.image_token).int()
        return self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0][:, 0]

    # ------------------------------------------------------------------------------------------------ generation
    @torch.no_grad()
    def prefill(self, prompts, group_size):
        """Run each Encoded prompt once and copy it to its group: a State of prompt-major rows, G to a prompt."""
        state = State(RowCache(self.n_layers, len(prompts)))
        self.feed(state, prompts)
        state.cache.repeat(group_size)
        for column in state.columns():
            column[:] = [x for x in column for _ in range(group_size)]
        state.order, state.logits = [*range(state.cache.rows)], state.logits.repeat_interleave(group_size, 0)
        return state

    @torch.no_grad()
    def extend(self, state, observations):
        """{row: Encoded}: these rows go on with their observation, all others leave."""
        state.front([slot for slot, row in enumerate(state.order) if row in observations])
        for column in state.columns():
            del column[len(observations):]
        self.feed(state, [observations[row] for row in state.order])
        return state

    def feed(self, state, items):
        """Put the pending token and items[i] through the model for slot i, at most FEED_TOKENS at a time."""
        lo, logits = 0, []
        while lo < len(items):
            hi, n = lo + 1, len(items[lo].ids)
            while hi < len(items) and n + len(items[hi].ids) < FEED_TOKENS:
                n, hi = n + len(items[hi].ids) + 1, hi + 1
            ids = [state.pending[slot] + items[slot].ids for slot in range(lo, hi)]
            places = [self.positions(i, item.grid) for i, item in zip(ids, items[lo:hi])]
            places = [place + first for place, first in zip(places, state.position[lo:hi])]
            logits.append(self.forward_rows(state, lo, hi, ids, torch.cat(places, 1), items[lo:hi]))
            for slot in range(lo, hi):
                state.position[slot], state.pending[slot] = int(places[slot - lo].max()) + 1, []
            lo = hi
        state.logits = torch.cat(logits)

    def forward_rows(self, state, lo, hi, ids, positions, items=()):
        """Feed the list ids[i] to slot lo + i at rotary positions (3, N) -> logits (hi - lo, V) after its last token."""
        counts = [len(i) for i in ids]
        queries, real = ragged(counts, self.device)                                             # (R, Q)
        slots = torch.tensor(state.length[lo:hi], device=self.device)[:, None]
        slots = slots + torch.arange(queries.shape[1], device=self.device)                      # (R, Q)
        state.length[lo:hi] = [a + b for a, b in zip(state.length[lo:hi], counts)]
        limit = max(state.length[lo:hi])
        rows = torch.arange(lo, hi, device=self.device)[:, None].expand_as(slots)
        state.cache.plan(rows[real], slots[real], lo, hi, limit)
        mask = torch.arange(limit, device=self.device) <= slots[:, :, None]                     # (R, Q, S)
        block = Block(queries, None, mask.repeat(1, self.kv_groups, 1)[:, None], real)
        pixels, grid = gather_images(items)
        flat = torch.tensor([i for row in ids for i in row], device=self.device)
        self.tokens_fed, self.images_fed = self.tokens_fed + len(flat), self.images_fed + len(grid)
        last = torch.tensor(counts).cumsum(0) - 1
        return self.model.hidden(flat, positions, [block], pixels, grid, cache=state.cache, last=last)

    def sample(self, logits, temperature, top_p, top_k):
        """(B, V) -> tokens (B,) and their log-probs under the temperature (B,). Temperature 0 is greedy."""
        logits = logits.float() + self.ban
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            kept, index = logprobs.exp(), None
            if top_k or top_p < 1:
                kept, index = kept.topk(min(top_k or kept.shape[1], kept.shape[1]))
                kept = kept * (kept.cumsum(-1) - kept < top_p * kept.sum(-1, keepdim=True))
            total = kept.cumsum(-1)        # inverse of the distribution: 20 times cheaper than multinomial at V = 152k
            draw = torch.rand(len(total), 1, generator=self.generator, device=self.device) * total[:, -1:] * (1 - 1e-6)
            token = torch.searchsorted(total, draw, right=True)
            token = token if index is None else index.gather(1, token)
        return token[:, 0], logprobs.gather(1, token)[:, 0]

    def stops(self, ids):
        """Does the last id end the action: an end-of-turn token, or the token that completes a closing tag?"""
        tail = self.tokenizer.decode(ids[-16:]) if ids[-1] in self.closing else ""
        return ids[-1] in self.ends or any(tag in tail for tag in CLOSING_TAGS)

    @torch.no_grad()
    def generate(self, state, budget, temperature=1.0, top_p=1.0, top_k=0, on_stop=None):
        """One turn for every row of the state: {row: Action}. budget: {row: new tokens at most}; on_stop(row, action)
        is called as soon as a row stops, while the others go on. Equal to `model.generate` token for token (tested)."""
        actions, logits = {row: Action([], []) for row in state.order}, state.logits
        live = len(actions)
        while live:
            tokens, logprobs = (x.tolist() for x in self.sample(logits, temperature, top_p, top_k))
            keep = []
            for slot, row in enumerate(state.order[:live]):
                action = actions[row]
                action.ids.append(tokens[slot])
                action.logprobs.append(logprobs[slot])
                state.pending[slot], action.complete = [tokens[slot]], self.stops(action.ids)
                if not action.complete and len(action.ids) < budget[row]:
                    keep.append(slot)
                elif on_stop:
                    on_stop(row, action)
            live = len(keep)
            if live:
                state.front(keep)
                positions = torch.tensor(state.position[:live], device=self.device).expand(3, -1)
                logits = self.forward_rows(state, 0, live, state.pending[:live], positions)
                state.position[:live] = [p + 1 for p in state.position[:live]]
        return actions

    @contextmanager
    def whole(self, unshard=True):
        """Within it every process holds all parameters and may generate at its own pace; no-op when not sharded."""
        units = [m for m in self.model.modules() if isinstance(m, FSDPModule)] if self.sharded and unshard else []
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(unit is not self.model, recurse=False)
                unit.reshard()

    # -------------------------------------------------------------------------------------------------- training
    def logprobs(self, trajectories, temperature=1.0):
        """Log-probs (A,) under the temperature, with gradients, and entropies (A,) of all action tokens, in order.

        Packed as [prompts | responses]: every prompt once (less its last token, which opens each response), and every
        response attending to its prompt and itself.
        """
        first = {id(t.sample): t for t in reversed(trajectories)}               # one trajectory for each prompt
        index = {key: i for i, key in enumerate(first)}
        shown = {key: Encoded([], *self.pixels(t.images[:t.prompt_images])) for key, t in first.items()}
        seen = [Encoded([], *self.pixels(t.images[t.prompt_images:])) for t in trajectories]
        grids = [torch.cat([shown[id(t.sample)].grid, own.grid]) for t, own in zip(trajectories, seen)]
        places = [self.positions(t.tokens, grid) for t, grid in zip(trajectories, grids)]
        heads = [t.prompt_length - 1 for t in first.values()]
        tails = [len(t.tokens) - t.prompt_length for t in trajectories]
        owner = [index[id(t.sample)] for t in trajectories]
        where = {id(t): place for t, place in zip(trajectories, places)}
        ids = [x for t, n in zip(first.values(), heads) for x in t.tokens[:n]]
        ids = torch.tensor(ids + [x for t in trajectories for x in t.tokens[t.prompt_length - 1:-1]])
        positions = [where[id(t)][:, :n] for t, n in zip(first.values(), heads)]
        positions = torch.cat(positions + [p[:, t.prompt_length - 1:-1] for t, p in zip(trajectories, places)], 1)
        blocks = pack_blocks(heads, tails, owner, self.kv_groups, self.device)
        picked = [m for t in trajectories for m in t.action_mask[t.prompt_length:]]
        select = sum(heads) + torch.tensor(picked).nonzero()[:, 0]
        targets = torch.tensor([x for t in trajectories for x, m in zip(t.tokens, t.action_mask) if m])
        images = gather_images([*shown.values(), *seen])
        return self.model.score(ids.to(self.device), positions.to(self.device), blocks, *images,
                                select.to(self.device), targets.to(self.device), self.ban, temperature)


def gather_images(items):
    """[Encoded] -> pixels (patches, features) or None and grid (images, 3), in the order of the packed row."""
    pixels = [item.pixels for item in items if item.pixels is not None]
    return (torch.cat(pixels) if pixels else None), torch.cat([i.grid for i in items]) if items else ()


def pack_blocks(heads, tails, owner, kv_groups, device):
    """Blocks of [prompts | responses]: causal prompts; response i sees all of prompt owner[i], then itself causally."""
    prompt, prompt_real = ragged(heads, device)                                 # (P, Tp)
    reply, reply_real = ragged(tails, device, sum(heads))                       # (B, Tr)
    causal = [torch.ones(n, n, dtype=torch.bool, device=device).tril() for n in (prompt.shape[1], reply.shape[1])]
    owned = prompt_real[owner][:, None].expand(-1, reply.shape[1], -1)          # (B, Tr, Tp)
    own = torch.cat([owned, causal[1].expand(len(owner), -1, -1)], 2)           # (B, Tr, Tp + Tr)
    masks = causal[0].expand(len(prompt), -1, -1), own
    masks = [mask.repeat(1, kv_groups, 1)[:, None] for mask in masks]
    keys = torch.cat([prompt[owner], reply], 1)
    return [Block(prompt, prompt, masks[0], prompt_real), Block(reply, keys, masks[1], reply_real)]


def hidden(model, ids, positions, blocks, pixels, grid, cache=None, last=None):
    """Packed ids (N,) at positions (3, N) -> hidden states (N, hidden), or the logits (len(last), V) at `last`."""
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # so that transformers builds no mask
    if pixels is not None:
        pixels, grid = pixels.to(ids.device, model.dtype), grid.to(ids.device)
    out = model.model(input_ids=ids[None], position_ids=positions.to(ids.device)[:, None], attention_mask=unused,
                      blocks=blocks, past_key_values=cache, use_cache=cache is not None, pixel_values=pixels,
                      image_grid_thw=grid if pixels is not None else None)[0][0]
    return out if last is None else model.lm_head(out[last.to(ids.device)])


def score(model, ids, positions, blocks, pixels, grid, select, targets, ban, temperature):
    """Log-probs (A,) of targets (A,) at the packed positions select (A,), and entropies (A,) without gradient."""
    def head(x, target):
        logprobs = (model.lm_head(x).float() / temperature + ban).log_softmax(-1)       # (chunk, V)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs.clamp_min(-1e4)).sum(-1)
        return logprobs.gather(1, target[:, None])[:, 0], entropy
    x = hidden(model, ids, positions, blocks, pixels, grid)[select]
    if pixels is None and isinstance(model, FSDPModule):                        # all processes must run the vision tower
        vision, config = model.model.visual, model.config.vision_config
        side, size = config.spatial_merge_size, config.temporal_patch_size * config.patch_size ** 2 * 3
        seen = vision(x.new_zeros(side * side, size), grid_thw=torch.tensor([[1, side, side]], device=x.device))
        x = x + 0.0 * sum(part.sum() for part in (seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())))
    chunks = zip(x.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
    parts = [checkpoint(head, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(column) for column in zip(*parts))


# ------------------------------------------------------------------------------------------------ load and save
def load_policy(name, device=None, dtype=None, max_pixels=2_000_000):
    """A checkpoint folder or hub name -> Policy in eval mode. dtype: default bfloat16 on a GPU, float32 on a CPU."""
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")):
        raise DataError(f"{name} is not a checkpoint: it has no config.json")
    if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise DataError(f"{name}: no such folder, and not a hub name such as Qwen/Qwen2.5-VL-7B-Instruct")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention = {"text_config": "packed", "vision_config": "flash_attention_2" if flash else "sdpa"}
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation=attention)
        tokenizer = AutoTokenizer.from_pretrained(name)
        try:
            processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        except ImportError:                             # older transformers want torchvision for the Auto class alone
            processor = Qwen2VLImageProcessorPil.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name} is not a checkpoint that can be loaded: {str(error).splitlines()[0]}") from None
    smallest, largest = processor.size["shortest_edge"], min(processor.size["longest_edge"], max_pixels)
    processor.size = {"shortest_edge": smallest, "longest_edge": largest}
    return Policy(model.to(device).eval(), tokenizer, processor)


def tiny_policy(folder, texts, seed=0, vocabulary=1024):
    """Write a policy of about 0.8 M parameters to `folder` and load it: Qwen2.5-VL's architecture, special tokens and
    chat format, with a byte-level BPE trained on `texts` and split only where these are: code is boilerplate, and few
    tokens a turn are what makes a laptop fast enough."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    special = [f"<|{name}|>" for name in special]
    chat = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * len(texts)
    tokenizer.train_from_iterator([*texts, *chat], trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=special[1:], chat_template=CHAT_TEMPLATE)
    start, end, image, video = tokenizer.convert_tokens_to_ids(special[3:])
    config = Qwen2_5_VLConfig(
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=False,
        text_config=dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.08,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}),
        vision_config=dict(hidden_size=64, depth=2, num_heads=4, intermediate_size=128, out_hidden_size=96,
                           fullatt_block_indexes=[0, 1], initializer_range=0.08))
    torch.manual_seed(seed)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56).save_pretrained(folder)
    return load_policy(folder)


def save_policy(policy, folder):
    """Write a Hugging Face checkpoint (weights, config, tokenizer, processor), gathered from all processes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy.model, options=options) if policy.sharded else policy.model.state_dict()
    if not dist.is_initialized() or dist.get_rank() == 0:
        policy.model.save_pretrained(folder, state_dict=state)
        policy.tokenizer.save_pretrained(folder)
        policy.image_processor.save_pretrained(folder)


def shard_policy(policy, offload=False, checkpoint_activations=False):
    """FSDP2: every decoder layer, every vision block and the rest is a unit; fp32 master weights, bf16 compute on a
    GPU, fp32 gradient reduction."""
    model, cuda = policy.model, policy.device.type == "cuda"
    layers = [*model.model.language_model.layers, *model.model.visual.blocks]
    if checkpoint_activations:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    settings = dict(mp_policy=MixedPrecisionPolicy(torch.bfloat16 if cuda else None, torch.float32))
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=cuda)
    for unit in [*layers, model]:
        fully_shard(unit, **settings)
    for method in ("score", "hidden"):
        register_fsdp_forward_method(model, method)
    policy.sharded = True
