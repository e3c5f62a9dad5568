"""FastPolicy: the two methods of a Policy, with every token through the model once.

It wraps a Policy and computes the same, token for token and log-prob for log-prob (tested). What
makes it fast, and why it is so:
  - Sequences are packed: a forward takes the real tokens of all of them as one row, so that no
    matmul sees padding. Attention is told where they begin and end (engine/attention.py).
  - A prompt runs once for its group. In generation its keys and values are kept once, and all rows
    of the group look at them together. In training the replies of the group look at one packed
    copy, and gradients flow back through it.
  - The cache lives across turns: ids are only ever appended to a trajectory, so `act` feeds what
    was added since the last call. Rows that stop swap places with live ones, so that the live rows
    are always a slice of the cache, and a row that has stopped costs nothing.
  - Log-probs are taken at action positions only, in chunks that backward computes again.
  - Equal pictures are prepared once and seen once by the vision tower, in each forward.

What a reader may rely on without reading on: the cache holds the trajectories of the last call of
`act`. A call with others starts a new one. `logprobs` drops it, because the weights change next.

Shapes: B sequences, T tokens, N packed tokens, A action tokens, V vocabulary, G group size, P
prompts, Hk key heads, D head size.
"""

import ctypes
import functools
import types
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import Action
from engine.attention import CAUSAL, EVERYTHING, merge, register, varlen_attention
from engine.parallel import sharded

HEAD_LOGITS = 2**26  # logits that exist at a time in training: 440 tokens of V = 152k
FEED_TOKENS = 8_192  # tokens of one forward in generation
M_TRIM_THRESHOLD = -1  # options of the C library's mallopt
M_MMAP_MAX = -4
ROOM = 64  # tokens that a cache has to spare, and half of what it had, when it grows


def keep_memory():
    """Let the C library keep the memory of freed tensors for the next ones.

    It gives large ones back, and new pages took an eighth of an update on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not every C library has it
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ------------------------------------------------------------------------- how packed tokens attend
class Lengths:
    """Of packed sequences: counts, where they begin and end (B + 1,), and the longest."""

    def __init__(self, counts: list, device):
        self.counts = counts
        self.longest = max(counts)
        bounds = [0, *accumulate(counts)]
        self.cumulative = torch.tensor(bounds, dtype=torch.int32, device=device)
        self.each = self.cumulative.diff()


class Cache:
    """Keys and values of sequences, (rows, capacity, Hk, D) each, in every layer."""

    def __init__(self, rows: int):
        self.used = [0] * rows  # tokens of each row
        self.layers = {}

    def write(self, layer, key, value, row, slot, longest):
        """Token i of key and value (N, Hk, D) goes to [row[i], slot[i]]."""
        if layer not in self.layers:
            empty = key.new_zeros(len(self.used), 0, *key.shape[1:])
            self.layers[layer] = [empty, empty]
        kept = self.layers[layer]
        capacity = kept[0].shape[1]
        if capacity < longest:
            more = longest - capacity + capacity // 2 + ROOM
            behind = (0, 0, 0, 0, 0, more)
            kept = [F.pad(x, behind) for x in kept]
            self.layers[layer] = kept
        kept[0][row, slot] = key
        kept[1][row, slot] = value

    def look(self, layer, query, queries, rows, used, window, scale):
        """Sequences of queries (N, H, D), one a row -> output (H, N, D), log-sum-exp (H, N)."""
        from torch.nn.attention.varlen import AuxRequest  # slow to import

        key, value = (kept[rows] for kept in self.layers[layer])
        count, capacity = key.shape[:2]
        out, lse = varlen_attention(
            query,
            key.flatten(0, 1),
            value.flatten(0, 1),
            queries.cumulative,
            even(count, capacity, query.device),
            queries.longest,
            used.longest,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=window,
            enable_gqa=True,
            seqused_k=used.each,
        )
        return out.transpose(0, 1), lse

    def swap(self, a: list, b: list):
        """Exchange the rows a[i] and b[i]."""
        for pair in self.layers.values():
            for kept in pair:
                kept[a + b] = kept[b + a]
        swap(self.used, a, b)


@functools.lru_cache(4)  # attention knows what it has seen by the tensor
def even(count: int, length: int, device):
    """Bounds (count + 1,) of sequences of equal length."""
    return torch.arange(count + 1, dtype=torch.int32, device=device) * length


def swap(items: list, a: list, b: list):
    """Exchange items[a[i]] and items[b[i]]."""
    for i, j in zip(a, b, strict=True):
        items[i], items[j] = items[j], items[i]


class Cached:
    """For generation: counts[i] new tokens of row lo + i of a cache see that row, causally.

    prompts: another cache. The tokens also see its row owner[i], all tokens of a group together.
    """

    def __init__(
        self,
        cache: Cache,
        lo: int,
        counts: list,
        device,
        prompts: Cache | None = None,
        owner: list = (),
    ):
        self.cache = cache
        self.prompts = prompts
        self.rows = slice(lo, lo + len(counts))
        before = cache.used[self.rows]
        cache.used[self.rows] = [a + b for a, b in zip(before, counts, strict=True)]
        self.queries = Lengths(counts, device)
        self.used = Lengths(cache.used[self.rows], device)
        number = torch.arange(len(counts), device=device)
        number = number.repeat_interleave(torch.tensor(counts, device=device))  # (N,)
        first = torch.tensor(before, device=device) - self.queries.cumulative[:-1]
        order = torch.arange(len(number), device=device)
        self.slot = order + first[number]
        self.row = number + lo
        if prompts is not None:
            owner = torch.tensor(owner, device=device)[number]
            groups = owner.bincount(minlength=len(prompts.used))
            self.groups = Lengths(groups.tolist(), device)
            self.known = Lengths(prompts.used, device)
            self.order = owner.argsort(stable=True)
            self.back = self.order.argsort()

    def attend(self, layer, query, key, value, scale):
        """(N, H, D) and twice (N, Hk, D) -> (N, H, D)."""
        self.cache.write(layer, key, value, self.row, self.slot, self.used.longest)
        own = (self.queries, self.rows, self.used, CAUSAL, scale)
        seen = self.cache.look(layer, query, *own)
        if self.prompts is not None:
            theirs = (self.groups, slice(None), self.known, EVERYTHING, scale)
            out, lse = self.prompts.look(layer, query[self.order], *theirs)
            seen = merge(seen, (out[:, self.back], lse[:, self.back]))
        return seen[0].transpose(0, 1)


@dataclass
class Grouped:
    """For training: prompts see themselves, then replies see their prompt and themselves."""

    prompts: Lengths
    replies: Lengths
    keys: Lengths  # of each reply, its prompt's included
    index: torch.Tensor  # (Nk,) these keys among the packed tokens

    def attend(self, layer, query, key, value, scale):
        """(N, H, D) and twice (N, Hk, D) -> (N, H, D)."""
        n = sum(self.prompts.counts)
        own = (query[:n], key[:n], value[:n])
        prompts = causal(*own, self.prompts, self.prompts, scale)
        key = key.index_select(0, self.index)
        value = value.index_select(0, self.index)
        replies = causal(query[n:], key, value, self.replies, self.keys, scale)
        return torch.cat([prompts, replies])


def causal(query, key, value, queries, keys, scale):
    """Each of the packed sequences sees itself, up to the token that looks."""
    bounds = (queries.cumulative, keys.cumulative, queries.longest, keys.longest)
    settings = dict(scale=scale, window_size=CAUSAL, enable_gqa=True)
    return varlen_attention(query, key, value, *bounds, **settings)


# ------------------------------------------------------------------------------------ packed inputs
@dataclass
class Piece:
    """Ids that follow each other in a packed row, with the images among them."""

    ids: list
    images: list
    start: int = 0  # rotary position of the first id
    after: "Piece | None" = None  # the piece that it continues, where that is in the same row
    end: int = 0  # rotary position of what follows


class Inputs:
    """Pieces as one packed row: ids (N,), positions (3, N), and the distinct pictures among them.

    pixels: (patches, features) or None. grid: (pictures, 3). picture: which one each image is.
    """

    def __init__(self, policy, pieces: list):
        images = [image for piece in pieces for image in piece.images]
        pictures, self.picture = distinct(images, pixels_of)
        self.pixels, self.grid = policy.pixels(pictures)
        counts = [len(piece.images) for piece in pieces]
        grids = self.grid[self.picture].split(counts)
        positions = []
        for piece, grid in zip(pieces, grids, strict=True):
            start = piece.after.end if piece.after else piece.start
            own = policy.positions(piece.ids, grid) + start
            piece.end = int(own.max()) + 1 if piece.ids else start
            positions.append(own)
        ids = [i for piece in pieces for i in piece.ids]
        self.ids = torch.tensor(ids, device=policy.device)
        self.positions = torch.cat(positions, 1).to(policy.device)


def distinct(items: list, key):
    """The items that differ in key(item); and for each item, which of these it equals."""
    found = {}
    numbers = []
    for item in items:
        number, _ = found.setdefault(key(item), (len(found), item))
        numbers.append(number)
    return [item for _, item in found.values()], numbers


def prompt_of(t):
    """What trajectories must have in common to share a prompt."""
    return id(t.sample), tuple(t.tokens[: t.prompt_length])


def pixels_of(image):
    """What tells two pictures apart: their size and their bytes."""
    return image.size, image.tobytes()


def chunks(pieces: list):
    """Consecutive ranges (lo, hi) of pieces with at most FEED_TOKENS tokens together."""
    lo = total = 0
    for hi, piece in enumerate(pieces):
        if total and total + len(piece.ids) > FEED_TOKENS:
            yield lo, hi
            lo, total = hi, 0
        total += len(piece.ids)
    yield lo, len(pieces)


# ----------------------------------------------------------------------------- methods of the model
def hidden(model, ids, positions, packed, images=None, last=None, vision=False):
    """Packed ids (N,) at positions (3, N) -> states (N, hidden), or logits (len(last), V) at last.

    images: Inputs with the pictures. vision: the vision tower runs without pictures too, because
    other processes may have some, and in FSDP all wait for each other.
    """
    seen = None
    nothing = 0.0
    if images is not None and images.pixels is not None:
        seen, deeper = see(model, images.pixels, images.grid, ids.device)
        seen.pooler_output = [seen.pooler_output[i] for i in images.picture]
        if deeper:
            seen.deepstack_features = [[layer[i] for i in images.picture] for layer in deeper]
    elif vision:
        config = model.config.vision_config
        side = config.spatial_merge_size
        size = 3 * config.temporal_patch_size * config.patch_size**2
        grid = torch.tensor([[1, side, side]])
        blank, deeper = see(model, torch.zeros(side * side, size), grid, ids.device)
        for layer in (blank.pooler_output, *deeper):
            nothing = nothing + 0.0 * layer[0].sum()
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # or a mask is built
    out = model.model(
        input_ids=ids[None],
        position_ids=positions[:, None],
        attention_mask=unused,
        mm_encoder_outputs={"image": seen},
        packed=packed,
        use_cache=False,
    )
    states = out[0][0] + nothing
    return states if last is None else model.lm_head(states[last])


def see(model, pixels, grid, device):
    """What the vision tower makes of pictures: its output, and (Qwen3-VL) features by layer."""
    pixels = pixels.to(device, model.dtype)
    seen = model.model.get_image_features(pixels, grid.to(device), return_dict=True)
    return seen, getattr(seen, "deepstack_features", None) or []


def score(model, inputs, packed, select, targets, ban, temperature):
    """Log-probs (A,) of targets (A,) at packed positions select (A,), and entropies (A,)."""

    def head(states, targets):
        logits = model.lm_head(states).float()  # (chunk, V)
        logprobs = torch.add(ban, logits, alpha=1 / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
        # FSDP does not want views from a forward, and a sum is none.
        return logprobs.gather(1, targets[:, None]).sum(1), entropy

    row = (inputs.ids, inputs.positions, packed, inputs)
    states = hidden(model, *row, vision=sharded(model))[select]
    size = max(1, HEAD_LOGITS // len(ban))
    if len(states) <= size:
        return head(states, targets)  # one chunk: nothing to compute again
    pairs = zip(states.split(size), targets.split(size), strict=True)
    parts = [checkpoint(head, *pair, use_reentrant=False) for pair in pairs]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


# --------------------------------------------------------------------------------------- the policy
@dataclass
class Row:
    """A trajectory under way. Its place among FastPolicy.rows is its row in the cache."""

    trajectory: object
    prompt: int  # the row of its prompt in the cache of prompts
    images: int  # that the model has seen
    position: int  # rotary position of the next token
    place: int = 0  # in the call of `act`, and so which random numbers are its own
    budget: int = 0  # new tokens that it may have in this call
    action: Action | None = None


class FastPolicy:
    """A Policy with faster `act` and `logprobs`; all else is the policy's own.

    A policy that is to be sharded must be sharded before it is wrapped.
    """

    def __init__(self, policy):
        self.policy = policy
        self.tokens_fed = 0  # by `act`, in all: tests hold that no token is fed twice
        self.images_fed = 0
        self.forget()
        if policy.device.type == "cpu":
            keep_memory()
        # The two functions above become methods of the model here and nowhere else. FSDP gathers a
        # module's own parameters (embedding, norm, head) only around methods that it knows of.
        register()
        policy.model.set_attn_implementation({"text_config": "packed"})
        policy.model.hidden = types.MethodType(hidden, policy.model)
        policy.model.score = types.MethodType(score, policy.model)
        if sharded(policy.model):
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(policy.model, "hidden")
            register_fsdp_forward_method(policy.model, "score")

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def forget(self):
        """Drop the cache."""
        self.rows = []
        self.cache = self.prompts = self.prompt_logits = None

    @torch.no_grad()
    def act(self, trajectories: list, limits, on_action) -> None:
        """Sample one turn for each trajectory, as Policy.act does."""
        places = {id(t): place for place, t in enumerate(trajectories)}
        if places.keys() - {id(row.trajectory) for row in self.rows}:
            self.prefill(trajectories)
        called = [id(row.trajectory) in places for row in self.rows]
        self.bring_forward([i for i, here in enumerate(called) if here])
        del self.rows[len(places) :]
        for row in self.rows:
            row.place = places[id(row.trajectory)]
            row.budget = limits.new_tokens(row.trajectory)
            row.action = Action([], [])
        logits = self.read()
        live = len(self.rows)
        while live:
            uniform = torch.rand(len(places), generator=self.generator, device=self.device)
            own = [row.place for row in self.rows[:live]]
            tokens, logprobs = self.policy.sample(logits, limits, uniform[own])
            going = self.take(tokens.tolist(), logprobs.tolist(), on_action)
            self.bring_forward(going)
            live = len(going)
            if live:
                logits = self.step(live)

    def prefill(self, trajectories: list):
        """Start a new cache with the prompts, each once for its group."""
        self.forget()
        firsts, owner = distinct(trajectories, prompt_of)
        pieces = []
        for t in firsts:
            ids = t.tokens[: t.prompt_length]
            pieces.append(Piece(ids, t.images[: t.prompt_images]))
        self.prompts = Cache(len(firsts))
        self.cache = Cache(len(trajectories))
        self.prompt_logits = self.feed(self.prompts, pieces)  # (P, V)
        for t, prompt in zip(trajectories, owner, strict=True):
            self.rows.append(Row(t, prompt, t.prompt_images, pieces[prompt].end))

    def read(self):
        """Feed what the trajectories got since the last call -> logits (B, V) of what follows."""
        logits = self.prompt_logits[[row.prompt for row in self.rows]]  # if it is the prompt's end
        pieces = []
        for row, used in zip(self.rows, self.cache.used, strict=False):
            t = row.trajectory
            ids = t.tokens[t.prompt_length + used :]
            images = t.images[row.images :]
            pieces.append(Piece(ids, images, row.position))
            row.images = len(t.images)
        longer = [i for i, piece in enumerate(pieces) if piece.ids]
        if longer:
            logits[longer] = self.feed(self.cache, pieces, self.prompts)
            for row, piece in zip(self.rows, pieces, strict=True):
                row.position = piece.end
        return logits

    def feed(self, cache, pieces: list, prompts=None):
        """Append pieces[i] to row i of a cache -> logits after the last id of each that has any."""
        logits = []
        for lo, hi in chunks(pieces):
            counts = [len(piece.ids) for piece in pieces[lo:hi]]
            owner = [row.prompt for row in self.rows[lo:hi]]
            packed = Cached(cache, lo, counts, self.device, prompts, owner)
            inputs = Inputs(self.policy, pieces[lo:hi])
            self.images_fed += len(inputs.grid)
            logits.append(self.forward(packed, inputs.ids, inputs.positions, inputs))
        return torch.cat(logits)

    def step(self, live: int):
        """Feed the tokens that the first `live` rows have just sampled -> logits (live, V)."""
        rows = self.rows[:live]
        owner = [row.prompt for row in rows]
        packed = Cached(self.cache, 0, [1] * live, self.device, self.prompts, owner)
        ids = [row.action.ids[-1] for row in rows]
        ids = torch.tensor(ids, device=self.device)
        positions = [row.position for row in rows]
        positions = torch.tensor(positions, device=self.device)
        for row in rows:
            row.position += 1
        return self.forward(packed, ids, positions.expand(3, -1))

    def forward(self, packed, ids, positions, images=None):
        """One forward of packed ids -> logits (B, V) after the last token of each sequence."""
        self.tokens_fed += len(ids)
        ends = packed.queries.cumulative
        last = ends[1:][ends.diff() > 0] - 1
        return self.model.hidden(ids, positions, packed, images, last)

    def take(self, tokens: list, logprobs: list, on_action) -> list:
        """Append the sampled tokens to the actions of the first rows; which of these go on."""
        going = []
        for i, token in enumerate(tokens):
            row = self.rows[i]
            action = row.action
            action.ids.append(token)
            action.logprobs.append(logprobs[i])
            action.complete = self.policy.stops(action.ids)
            if action.complete or len(action.ids) >= row.budget:
                on_action(row.trajectory, action)
            else:
                going.append(i)
        return going

    def bring_forward(self, keep: list):
        """Swap rows so that those in `keep` (ascending) come first."""
        holes = sorted(set(range(len(keep))) - set(keep))
        movers = [i for i in keep if i >= len(keep)]
        if holes:
            self.cache.swap(holes, movers)
            swap(self.rows, holes, movers)

    def logprobs(self, trajectories: list, temperature: float = 1.0):
        """Log-probs (A,) of all action tokens, in order, with gradients; and entropies (A,).

        Packed are first the prompts, each once and without its last token, and then the replies.
        That token opens every reply of the group, because it predicts its first token.
        """
        self.forget()
        firsts, owner = distinct(trajectories, prompt_of)
        prompts, replies = [], []
        for t in firsts:
            ids = t.tokens[: t.prompt_length - 1]
            prompts.append(Piece(ids, t.images[: t.prompt_images]))
        for t, prompt in zip(trajectories, owner, strict=True):
            ids = t.tokens[t.prompt_length - 1 : -1]
            images = t.images[t.prompt_images :]
            replies.append(Piece(ids, images, after=prompts[prompt]))
        inputs = Inputs(self.policy, prompts + replies)
        heads = [len(piece.ids) for piece in prompts]
        tails = [len(piece.ids) for piece in replies]
        ranges = torch.arange(len(inputs.ids), device=self.device)
        ranges = ranges.split(heads + tails)
        keys = []
        totals = []
        for prompt, own in zip(owner, ranges[len(prompts) :], strict=True):
            keys += [ranges[prompt], own]
            totals.append(len(ranges[prompt]) + len(own))
        lengths = [Lengths(counts, self.device) for counts in (heads, tails, totals)]
        packed = Grouped(*lengths, torch.cat(keys))
        sampled, targets = [], []
        for t in trajectories:
            sampled += t.action_mask[t.prompt_length :]
            targets += t.tokens[t.prompt_length :]
        sampled = torch.tensor(sampled, device=self.device)
        targets = torch.tensor(targets, device=self.device)[sampled]
        select = sampled.nonzero()[:, 0] + sum(heads)
        return self.model.score(inputs, packed, select, targets, self.ban, temperature)
