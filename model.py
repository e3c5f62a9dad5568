"""The policy: load it, generate a turn, score its tokens, shard it, save it.

Any Qwen2.5-VL or Qwen3-VL checkpoint is a policy; `tiny_policy` is the same architecture at 0.8 M parameters.
What makes it fast, and why it is so:
  - Everything is packed: a forward takes the real tokens of all sequences in one row (1, N), no matmul sees padding;
    only attention gathers (sequence, position) tables, as `Block`s say. Prefill, observations, decoding and training
    share this one path.
  - A prompt runs once for its group. In generation its keys and values are kept once, and all rows of the group look at
    them together; in training the group's responses attend to one packed copy, and gradients flow back through it.
  - The cache lives across turns and is written in place at each row's own length. Rows that stop swap places with
    live ones, so the live rows are always a slice and a stopped row costs nothing.
  - Log-probs and entropy are taken at action positions only, in chunks that backward recomputes.

Shapes: B sequences, T tokens, N packed tokens, A action tokens, V vocabulary, G group size, P prompts, H heads,
D head size.
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
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, set_model_state_dict)
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.utils.checkpoint import checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoImageProcessor,
                          AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import DataError, encode

CLOSING_TAGS = ("</code>", "</answer>")   # an action ends where one of these is complete
HEAD_LOGITS = 2 ** 26                     # logits that exist at a time in training: 440 tokens of V = 152k
FEED_TOKENS = 8_192                       # tokens of one forward in generation
SEGMENT = 128                             # queries of a sequence that attend at a time
NEVER = -1e9                              # added to the logits of ids that are not to be sampled
CHAT_TEMPLATE = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


# ------------------------------------------------------------------------------------------------ attention
@dataclass
class Block:
    """R sequences that attend alike. queries (R, Q) index packed tokens, where real (R, Q); keys: packed tokens (R, S),
    or a slice of a Store; allowed (R, Q, S), or (R, 1, S): True where a query may look."""
    queries: torch.Tensor
    real: torch.Tensor
    keys: object
    allowed: torch.Tensor


class Layout:
    """How the N tokens of a forward attend. passes: lists of blocks; each pass holds every token once, and what a token
    sees in several passes is merged. store, row, slot: where the keys and values of the tokens are written."""

    def __init__(self, passes, store=None, row=None, slot=None):
        self.store, self.row, self.slot, self.passes = store, row, slot, []
        for blocks in passes:
            token, real = (torch.cat([getattr(b, name).flatten() for b in blocks]) for name in ("queries", "real"))
            place = torch.empty_like(token[real]).index_put((token[real],), real.nonzero()[:, 0])   # (N,) among R * Q
            self.passes.append((blocks, place))


def packed_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention of a packed row (1, H, N, D) as the Layout says; without one it is transformers' own sdpa."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if layout.store is not None:
        layout.store.write(module.layer_idx, key[0], value[0], layout.row, layout.slot)
    merged, parts = len(layout.passes) > 1, []

    def look(block):
        """What the queries see (R * Q, H, D), and the log of the sum over which their softmax goes."""
        cached, total = not isinstance(block.keys, torch.Tensor), None
        k, v = block.keys(module.layer_idx) if cached else (x[0][:, block.keys].transpose(0, 1) for x in (key, value))
        q = query[0][:, block.queries].transpose(0, 1)                          # (R, H, Q, D)
        (rows, heads, length, size), shared = q.shape, q.shape[1] // k.shape[1]
        if merged:              # the heads that share a key head are one matmul, in which no key is copied
            q = q.reshape(rows, -1, shared * length, size) * scaling
            scores = (q @ k.transpose(2, 3)).float()
            scores.view(rows, -1, shared, length, k.shape[2]).masked_fill_(~block.allowed[:, None, None], -torch.inf)
            top = scores.amax(-1, keepdim=True)
            total = scores.sub_(top).exp_().sum(-1, keepdim=True)
            out, total = scores.to(v.dtype) @ v / total.to(v.dtype), total.log() + top
        else:
            grouped = q.device.type == "cpu"        # on a GPU no fast kernel takes a mask and shares key heads
            k, v = (k, v) if grouped else (x.repeat_interleave(shared, 1) for x in (k, v))
            mask = block.allowed[:, None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)
        return [x.reshape(rows, heads, length, -1).transpose(1, 2).flatten(0, 1) for x in (out, total) if x is not None]
    for blocks, place in layout.passes:
        parts.append([(torch.cat(x) if len(x) > 1 else x[0])[place] for x in zip(*map(look, blocks))])
    if not merged:
        return parts[0][0][None], None
    seen, totals = map(torch.stack, zip(*parts))                                # (passes, N, H, D or 1)
    return (seen * totals.softmax(0).to(seen.dtype)).sum(0)[None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def ragged(lengths, device, start=0):
    """Packed indices (R, max length) of consecutive sequences from `start`, and which of the entries are real."""
    lengths = torch.as_tensor(lengths, device=device)
    column = torch.arange(int(lengths.max()), device=device)
    real = column < lengths[:, None]
    return torch.where(real, (start + lengths.cumsum(0) - lengths)[:, None] + column, start), real


def causal(table, real, before=None, seen=None):
    """Blocks of sequences table (R, T) that look at all of before (R, S) where `seen`, then at themselves causally; cut
    along T, so that little is computed ahead of the diagonal and nothing for sequences that have ended."""
    before, seen = (table[:, :0], real[:, :0]) if before is None else (before, seen)
    size = max(SEGMENT, -(-table.shape[1] // 8))
    for start in range(0, table.shape[1], size):
        rows, end = real[:, start].nonzero()[:, 0], min(start + size, table.shape[1])
        position = torch.arange(end, device=table.device)
        own = (position <= position[start:, None]).expand(len(rows), -1, -1)                    # (R, Q, end)
        allowed = torch.cat([seen[rows, None].expand(-1, end - start, -1), own], 2)
        keys = torch.cat([before[rows], table[rows, :end]], 1)
        yield Block(table[rows, start:end], real[rows, start:end], keys, allowed)


class Store:
    """Keys and values of `rows` sequences by layer, (rows, H, capacity, D) each, written in place; limit: longest."""
    spare = 0.5                                         # room that a store gets when it grows, as a part of its length

    def __init__(self, rows, capacity=0):
        self.rows, self.limit, self.layers = rows, capacity, {}

    def write(self, layer, key, value, row, slot):
        """Token i of key and value (H, N, D) goes to [row[i], slot[i]]."""
        old = self.layers.get(layer)
        if old is None or old[0].shape[2] < self.limit:
            capacity = self.limit if old is None else int(self.limit * (1 + self.spare))
            self.layers[layer] = [x.new_zeros(self.rows, x.shape[0], capacity, x.shape[2]) for x in (key, value)]
            for x, y in zip(self.layers[layer], old or ()):
                x[:, :, :y.shape[2]] = y
        for x, new in zip(self.layers[layer], (key, value)):
            x[row, :, slot] = new.transpose(0, 1)

    def read(self, rows, limit):
        """Function of a layer -> the first `limit` keys and values of `rows`, a slice or a tensor."""
        return lambda layer: [x[rows, :, :limit] for x in self.layers[layer]]

    def swap(self, a, b):
        """Exchange rows a[i] and b[i]."""
        for x in (x for pair in self.layers.values() for x in pair):
            x[a + b] = x[b + a]


# ------------------------------------------------------------------------------------------------ records
@dataclass
class Encoded:
    """Token ids with their images: pixels (patches, features) or None, grid (images, 3) in patches (t, h, w)."""
    ids: list
    pixels: torch.Tensor | None
    grid: torch.Tensor


@dataclass
class Action:
    """One sampled turn: ids and their log-probs under the sampling temperature; complete if a tag or eos ended it."""
    ids: list
    logprobs: list
    complete: bool = False


class State:
    """Rows under generation, G to a prompt. Slot i holds row order[i] of prompt owner[i]: length[i] tokens behind the
    prompt are in the cache, the next has rotary position position[i]; pending[i] is sampled and not fed yet; logits
    (slots, V) predict the next token. prompts, own: the cache; shown (P, 1, Tp): where a prompt is, not padding."""

    def __init__(self, lengths, group_size, device):
        n = len(lengths) * group_size
        self.prompts, self.own = Store(len(lengths), max(lengths)), Store(n)
        self.shown = ragged(lengths, device)[1][:, None]
        self.order, self.owner = [*range(n)], [i for i in range(len(lengths)) for _ in range(group_size)]
        self.length, self.position, self.pending, self.logits = [0] * n, [0] * n, [[]] * n, None

    def behind(self, lo, new, table, real, start):
        """Blocks of tokens (R, T), new[i] of them for slot lo + i, that look at their own rows, where they come after
        start (R,) others; cut along T, so that one long observation is not everybody's."""
        begin, end = 0, sorted(new)[len(new) // 2]
        while rows := [i for i, n in enumerate(new) if n > begin]:
            limit = max(self.length[lo + i] - max(0, new[i] - end) for i in rows)
            position = start[rows, None] + torch.arange(begin, min(end, table.shape[1]), device=table.device)
            allowed = torch.arange(limit, device=table.device) <= position[..., None]           # (rows, Q, limit)
            slots = torch.tensor(rows) + lo if len(rows) < len(new) else slice(lo, lo + len(new))
            yield Block(table[rows, begin:end], real[rows, begin:end], self.own.read(slots, limit), allowed)
            begin, end = end, 2 * end

    def front(self, keep, drop=False):
        """Bring the slots `keep` (ascending) to the front by swaps with slots that are not kept; drop these."""
        n, columns = len(keep), (self.order, self.owner, self.length, self.position, self.pending)
        holes, movers = sorted(set(range(n)) - set(keep)), [slot for slot in keep if slot >= n]
        if holes:
            self.own.swap(holes, movers)
        for column in columns:
            for a, b in zip(holes, movers):
                column[a], column[b] = column[b], column[a]
            del column[n if drop else len(column):]


class Policy:
    """A vision-language model with its tokenizer and image processor. `ban` (V,) keeps it from sampling image and video
    placeholders (they would need pixels) and ids that the tokenizer does not know."""

    def __init__(self, model, tokenizer, image_processor, device=None):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.device = device or model.device
        text, ids = model.config.get_text_config(), tokenizer.convert_tokens_to_ids
        self.image_token, self.end = model.config.image_token_id, ids("<|im_end|>")
        self.ends = {self.end, ids("<|endoftext|>")}
        self.ban = torch.zeros(text.vocab_size, device=self.device)
        self.ban[ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])] = NEVER
        self.ban[len(tokenizer):] = NEVER
        self.closing = {i for token, i in tokenizer.get_vocab().items() if ">" in token}
        self.generator, self.sharded, self.in_step = torch.Generator(self.device), False, False
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
        """Run each Encoded prompt once, for all G rows of its group: a State of prompt-major rows."""
        lengths = [len(prompt.ids) for prompt in prompts]
        state, logits = State(lengths, group_size, self.device), []
        places = [self.positions(prompt.ids, prompt.grid) for prompt in prompts]
        for lo, hi in chunks(lengths):
            table, real = ragged(lengths[lo:hi], self.device)
            row, slot = real.nonzero().T
            layout = Layout([[*causal(table, real)]], state.prompts, row + lo, slot)
            ids = [prompt.ids for prompt in prompts[lo:hi]]
            logits.append(self.forward(ids, torch.cat(places[lo:hi], 1), layout, prompts[lo:hi]))
        state.logits = torch.cat(logits).repeat_interleave(group_size, 0)
        state.position = [int(places[i].max()) + 1 for i in state.owner]
        return state

    @torch.no_grad()
    def extend(self, state, observations):
        """{row: Encoded}: these rows go on with their pending token and their observation, all others leave."""
        state.front([slot for slot, row in enumerate(state.order) if row in observations], drop=True)
        items, logits = [observations[row] for row in state.order], []
        ids = [pending + item.ids for pending, item in zip(state.pending, items)]
        places = [self.positions(i, item.grid) + first for i, item, first in zip(ids, items, state.position)]
        for lo, hi in chunks([len(i) for i in ids]):
            logits.append(self.forward_rows(state, lo, hi, ids[lo:hi], torch.cat(places[lo:hi], 1), items[lo:hi]))
        state.logits, state.position = torch.cat(logits), [int(place.max()) + 1 for place in places]
        return state

    def forward_rows(self, state, lo, hi, ids, positions, items=()):
        """Feed the list ids[i] to slot lo + i at rotary positions (3, N) -> logits (hi - lo, V) after its last token.
        Each token looks at its prompt, together with all others of the same, and at its own row."""
        new = [len(i) for i in ids]
        table, real = ragged(new, self.device)                                  # (R, Q)
        row, slot = real.nonzero().T
        start = torch.tensor(state.length[lo:hi], device=self.device)
        state.length[lo:hi] = [n + more for n, more in zip(state.length[lo:hi], new)]
        state.own.limit = max(state.length[lo:hi])
        owner = torch.tensor(state.owner[lo:hi], device=self.device)[row]       # (N,)
        group, live = ragged(owner.bincount(minlength=state.prompts.rows), self.device)         # (P, its tokens)
        prompts = state.prompts.read(slice(None), state.prompts.limit)
        shared = Block(owner.argsort(stable=True)[group], live, prompts, state.shown)
        passes = [shared], [*state.behind(lo, new, table, real, start)]
        layout = Layout(passes, state.own, row + lo, slot + start[row])
        return self.forward(ids, positions, layout, items)

    def forward(self, ids, positions, layout, items=(), running=True):
        """One forward of packed lists of ids -> logits (len(ids), V) after the last of each. Where processes keep in
        step, any that runs makes all run, and the vision tower too if one has images; None: no process runs."""
        pixels, grid = gather_images(items)
        flat = torch.tensor([i for row in ids for i in row], device=self.device)
        self.tokens_fed, self.images_fed = self.tokens_fed + len(flat), self.images_fed + len(grid)
        last = torch.tensor([len(row) for row in ids]).cumsum(0) - 1
        anywhere = torch.tensor([running, self.in_step and pixels is not None], dtype=torch.int, device=self.device)
        if self.in_step:
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return self.model.hidden(flat, positions, layout, pixels, grid, last, anywhere[1]) if anywhere[0] else None

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
    def whole(self, gather=True):
        """Within it every process may generate at its own pace; no-op when not sharded. gather: every process holds all
        parameters. Otherwise they stay sharded, and processes that are done make forwards until all are."""
        units = [m for m in self.model.modules() if isinstance(m, FSDPModule)] if self.sharded and gather else []
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        self.in_step = self.sharded and not gather
        try:
            yield
            table, real = ragged([1], self.device)
            one = Layout([[*causal(table, real)]])
            with torch.no_grad():
                while self.in_step and self.forward([[self.end]], table.expand(3, -1), one, running=False) is not None:
                    pass
        finally:
            self.in_step = False
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
        places = {id(t): self.positions(t.tokens, grid) for t, grid in zip(trajectories, grids)}
        parts = [(t, 0, t.prompt_length - 1) for t in first.values()]
        parts += [(t, t.prompt_length - 1, len(t.tokens) - 1) for t in trajectories]
        ids = torch.tensor([x for t, lo, hi in parts for x in t.tokens[lo:hi]], device=self.device)
        positions = torch.cat([places[id(t)][:, lo:hi] for t, lo, hi in parts], 1)
        heads, tails = ([hi - lo for _, lo, hi in part] for part in (parts[:len(first)], parts[len(first):]))
        prompt, prompt_real = ragged(heads, self.device)                        # (P, Tp)
        reply, real = ragged(tails, self.device, sum(heads))                    # (B, Tr)
        owner = torch.tensor([index[id(t.sample)] for t in trajectories], device=self.device)
        blocks = [*causal(prompt, prompt_real), *causal(reply, real, prompt[owner], prompt_real[owner])]
        picked = torch.tensor([m for t in trajectories for m in t.action_mask[t.prompt_length:]], device=self.device)
        select, layout = sum(heads) + picked.nonzero()[:, 0], Layout([blocks])
        targets = torch.tensor([x for t in trajectories for x, m in zip(t.tokens, t.action_mask) if m])
        images = gather_images([*shown.values(), *seen])
        return self.model.score(ids, positions, layout, *images, select, targets.to(self.device), self.ban, temperature)


def chunks(lengths):
    """Consecutive ranges (lo, hi) of sequences that have at most FEED_TOKENS tokens together."""
    lo = 0
    for hi in range(1, len(lengths) + 1):
        if hi == len(lengths) or sum(lengths[lo:hi + 1]) > FEED_TOKENS:
            yield lo, hi
            lo = hi


def gather_images(items):
    """[Encoded] -> pixels (patches, features) or None and grid (images, 3), in the order of the packed row."""
    pixels = [item.pixels for item in items if item.pixels is not None]
    return (torch.cat(pixels) if pixels else None), torch.cat([i.grid for i in items]) if items else ()


def hidden(model, ids, positions, layout, pixels, grid, last=None, vision=False):
    """Packed ids (N,) at positions (3, N) -> hidden states (N, hidden), or the logits (len(last), V) at `last`.
    vision: run the vision tower also without pixels, because other processes do, and as they do, before the rest."""
    unused, empty = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device), 0.0    # so that no mask is built
    images = {}
    if pixels is not None:
        images = dict(pixel_values=pixels.to(ids.device, model.dtype), image_grid_thw=grid.to(ids.device))
    elif vision:
        config = model.config.vision_config
        side, size = config.spatial_merge_size, config.temporal_patch_size * config.patch_size ** 2 * 3
        grid = torch.tensor([[1, side, side]], device=ids.device)
        seen = model.model.visual(torch.zeros(side * side, size, device=ids.device, dtype=model.dtype), grid_thw=grid)
        empty = 0.0 * sum(x.sum() for x in (seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())))
    out = model.model(input_ids=ids[None], position_ids=positions.to(ids.device)[:, None], attention_mask=unused,
                      layout=layout, use_cache=False, **images)[0][0] + empty
    return out if last is None else model.lm_head(out[last.to(ids.device)])


def score(model, ids, positions, layout, pixels, grid, select, targets, ban, temperature):
    """Log-probs (A,) of targets (A,) at the packed positions select (A,), and entropies (A,) without gradient."""
    def head(x, target):
        logprobs = torch.add(ban, model.lm_head(x), alpha=1 / temperature).log_softmax(-1)      # (chunk, V)
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
        return logprobs.gather(1, target[:, None])[:, 0], entropy
    x = hidden(model, ids, positions, layout, pixels, grid, vision=isinstance(model, FSDPModule))[select]
    if len(x) * len(ban) <= HEAD_LOGITS:
        return head(x, targets)                                                 # one chunk: nothing to recompute
    size = HEAD_LOGITS // len(ban)
    parts = [checkpoint(head, *chunk, use_reentrant=False) for chunk in zip(x.split(size), targets.split(size))]
    return tuple(torch.cat(column) for column in zip(*parts))


# ------------------------------------------------------------------------------------------------ load and save
def load_policy(name, device=None, dtype=None, max_pixels=2_000_000, sharded=False):
    """A checkpoint folder or hub name -> Policy in eval mode. dtype: default bfloat16 on a GPU, float32 on a CPU.
    sharded: only process 0 reads the weights, into its main memory; shard_policy must follow and hands them out."""
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")):
        raise DataError(f"{name} is not a checkpoint: it has no config.json")
    if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise DataError(f"{name}: no such folder, and not a hub name such as Qwen/Qwen2.5-VL-7B-Instruct")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention = {"text_config": "packed", "vision_config": "flash_attention_2" if flash else "sdpa"}
    settings = dict(dtype=dtype, attn_implementation=attention)
    try:
        if sharded and dist.get_rank() > 0:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name), **settings)
        else:
            model = AutoModelForImageTextToText.from_pretrained(name, **settings).to("cpu" if sharded else device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        try:
            processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        except ImportError:                             # older transformers want torchvision for the Auto class alone
            processor = Qwen2VLImageProcessorPil.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name} is not a checkpoint that can be loaded: {str(error).splitlines()[0]}") from None
    smallest, largest = processor.size["shortest_edge"], min(processor.size["longest_edge"], max_pixels)
    processor.size = {"shortest_edge": smallest, "longest_edge": largest}
    return Policy(model.eval(), tokenizer, processor, device)


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
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                         initializer_range=0.08, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id,
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
    GPU, fp32 gradient reduction. Weights and buffers are those of process 0."""
    model, cuda = policy.model, policy.device.type == "cuda"
    layers = [*model.model.language_model.layers, *model.model.visual.blocks]
    if checkpoint_activations:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    settings = dict(mp_policy=MixedPrecisionPolicy(torch.bfloat16 if cuda else None, torch.float32))
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=cuda)
    weights, buffers = model.state_dict() if dist.get_rank() == 0 else {}, dict(model.named_buffers())
    model.to("meta")
    for unit in [*layers, model]:
        fully_shard(unit, **settings)
    model.to_empty(device="cpu" if offload else policy.device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
    set_model_state_dict(model, weights, options=options)
    for name, buffer in model.named_buffers():                                  # such as rotary frequencies
        buffer.data = buffer.data.to(policy.device)
        if dist.get_rank() == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    for method in ("score", "hidden"):
        register_fsdp_forward_method(model, method)
    policy.sharded = True
