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

import types
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.attention.varlen import AuxRequest
from torch.utils.checkpoint import checkpoint

from data import Action
from engine.attention import CAUSAL, EVERYTHING, merge, varlen_attention

HEAD_LOGITS = 2**26  # logits that exist at a time in training: 440 tokens of V = 152k
FEED_TOKENS = 8_192  # tokens of one forward in generation
ROOM = 16  # tokens for which a cache has room at first


# ------------------------------------------------------------------------------------------ attention
class Lengths:
    """Of packed sequences: where they begin and end, (B + 1,), and the longest."""

    def __init__(self, counts: list, device):
        self.counts = counts
        self.longest = max(counts)
        self.cumulative = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)


class Cache:
    """Keys and values of `rows` sequences: (rows, capacity, Hk, D) each, in every layer."""

    def __init__(self, rows: int, needed: int):
        self.rows = rows
        self.needed = needed  # tokens of the longest sequence
        self.layers = {}

    def write(self, layer, key, value, row, slot):
        """Token i of key and value (N, Hk, D) goes to [row[i], slot[i]]."""
        if layer not in self.layers:
            shape = (self.rows, self.needed, *key.shape[1:])
            self.layers[layer] = [key.new_zeros(shape), key.new_zeros(shape)]
        missing = self.needed - self.layers[layer][0].shape[1]
        if missing > 0:
            more = (0, 0, 0, 0, 0, missing + self.needed // 2)
            self.layers[layer] = [F.pad(kept, more) for kept in self.layers[layer]]
        for kept, new in zip(self.layers[layer], (key, value), strict=True):
            kept[row, slot] = new

    def swap(self, a: list, b: list):
        """Exchange the rows a[i] and b[i]."""
        for pair in self.layers.values():
            for kept in pair:
                kept[a + b] = kept[b + a]


@dataclass
class Packed:
    """Each sequence of a packed row sees itself, causally: prompts, and training.

    index: (Nk,) the packed tokens that are keys, where a sequence also sees others before its own.
    """

    queries: Lengths
    keys: Lengths
    index: torch.Tensor | None = None
    cache: Cache | None = None  # that keeps keys and values, token i at [row[i], slot[i]]
    row: torch.Tensor | None = None
    slot: torch.Tensor | None = None

    def attend(self, layer, query, key, value, scale):
        """(N, H, D) and twice (N, Hk, D) -> (N, H, D)."""
        if self.cache is not None:
            self.cache.write(layer, key, value, self.row, self.slot)
        if self.index is not None:
            key = key[self.index]
            value = value[self.index]
        return varlen_attention(
            query,
            key,
            value,
            self.queries.cumulative,
            self.keys.cumulative,
            self.queries.longest,
            self.keys.longest,
            scale=scale,
            window_size=CAUSAL,
            enable_gqa=True,
        )


@dataclass
class Look:
    """Packed sequences of queries look at rows of a cache, one each."""

    cache: Cache
    rows: slice
    queries: Lengths
    used: Lengths
    window: tuple

    def attend(self, layer, query, scale):
        """(N, H, D) -> output (N, H, D) and log-sum-exp (H, N)."""
        key, value = (kept[self.rows] for kept in self.cache.layers[layer])
        count, capacity = key.shape[:2]
        starts = torch.arange(count + 1, dtype=torch.int32, device=query.device) * capacity
        return varlen_attention(
            query,
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.queries.cumulative,
            starts,
            self.queries.longest,
            self.used.longest,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=self.window,
            enable_gqa=True,
            seqused_k=self.used.cumulative.diff(),
        )


@dataclass
class Cached:
    """Each new token sees its own row of the cache, causally, and its prompt: generation."""

    own: Look
    prompt: Look  # all tokens of a group are one sequence
    order: torch.Tensor  # (N,) packed tokens, sorted by prompt
    row: torch.Tensor  # (N,) where the cache keeps them
    slot: torch.Tensor

    def attend(self, layer, query, key, value, scale):
        """(N, H, D) and twice (N, Hk, D) -> (N, H, D)."""
        self.own.cache.write(layer, key, value, self.row, self.slot)
        seen = self.own.attend(layer, query, scale)
        out, lse = self.prompt.attend(layer, query[self.order], scale)
        back = self.order.argsort()
        return merge(seen, (out[back], lse[:, back]))[0]


# -------------------------------------------------------------------------------------- packed inputs
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

    pixels: (patches, features) or None, grid: (pictures, 3). picture: which one each image is.
    """

    def __init__(self, policy, pieces: list):
        images = [image for piece in pieces for image in piece.images]
        pictures = {(image.size, image.tobytes()): image for image in images}
        number = {key: i for i, key in enumerate(pictures)}
        self.picture = [number[image.size, image.tobytes()] for image in images]
        self.pixels, self.grid = policy.pixels(list(pictures.values()))
        grids = self.grid[self.picture].split([len(piece.images) for piece in pieces])
        positions = []
        for piece, grid in zip(pieces, grids, strict=True):
            start = piece.after.end if piece.after else piece.start
            own = policy.positions(piece.ids, grid) + start
            piece.end = int(own.max()) + 1 if piece.ids else start
            positions.append(own)
        ids = [i for piece in pieces for i in piece.ids]
        self.ids = torch.tensor(ids, device=policy.device)
        self.positions = torch.cat(positions, 1).to(policy.device)


def by_prompt(trajectories: list):
    """One trajectory for each distinct prompt, and for each trajectory which of these is its own."""
    firsts, owner, known = [], [], {}
    for t in trajectories:
        key = (id(t.sample), tuple(t.tokens[: t.prompt_length]))
        if key not in known:
            known[key] = len(firsts)
            firsts.append(t)
        owner.append(known[key])
    return firsts, owner


def chunks(pieces: list):
    """Consecutive ranges (lo, hi) of pieces with at most FEED_TOKENS tokens together."""
    lo = total = 0
    for hi, piece in enumerate(pieces):
        if total and total + len(piece.ids) > FEED_TOKENS:
            yield lo, hi
            lo, total = hi, 0
        total += len(piece.ids)
    yield lo, len(pieces)


# ------------------------------------------------------------------------------ methods of the model
def hidden(model, ids, positions, packed, images=None, last=None, vision=False):
    """Packed ids (N,) at positions (3, N) -> states (N, hidden), or logits (len(last), V) at `last`.

    images: Inputs with pictures. vision: run the vision tower also without any, because other
    processes do, and FSDP has them wait for each other.
    """
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # so that no mask is built
    nothing = 0.0
    seen = None
    if images is not None and images.pixels is not None:
        seen, features = look(model, images.pixels, images.grid)
        seen.pooler_output = [features[0][i] for i in images.picture]
        if len(features) > 1:  # Qwen3-VL: what some of its layers get
            seen.deepstack_features = [[f[i] for i in images.picture] for f in features[1:]]
        seen = {"image": seen}
    elif vision:
        config = model.config.vision_config
        side = config.spatial_merge_size
        size = 3 * config.temporal_patch_size * config.patch_size**2
        grid = torch.tensor([[1, side, side]])
        _, features = look(model, torch.zeros(side * side, size), grid)
        nothing = 0.0 * sum(part.sum() for parts in features for part in parts)
    out = model.model(
        input_ids=ids[None],
        position_ids=positions[:, None],
        attention_mask=unused,
        mm_encoder_outputs=seen,
        packed=packed,
        use_cache=False,
    )
    states = out[0][0] + nothing
    return states if last is None else model.lm_head(states[last])


def look(model, pixels, grid):
    """What the vision tower returns, and its features by layer and picture, the last layer first."""
    pixels = pixels.to(model.device, model.dtype)
    seen = model.model.get_image_features(pixels, grid.to(model.device), return_dict=True)
    deeper = getattr(seen, "deepstack_features", None) or []
    return seen, [seen.pooler_output, *deeper]


def score(model, inputs, packed, select, targets, ban, temperature):
    """Log-probs (A,) of targets (A,) at packed positions select (A,); entropies (A,), no gradient."""

    def head(states, targets):
        logits = model.lm_head(states).float() / temperature
        logprobs = (logits + ban).log_softmax(-1)  # (chunk, V)
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
        # FSDP does not want views from a forward: a sum is none.
        return logprobs.gather(1, targets[:, None]).sum(1), entropy

    vision = isinstance(model, FSDPModule)
    states = hidden(model, inputs.ids, inputs.positions, packed, inputs, vision=vision)[select]
    size = max(1, HEAD_LOGITS // len(ban))
    if len(states) <= size:
        return head(states, targets)  # one chunk: nothing to compute again
    parts = [
        checkpoint(head, *chunk, use_reentrant=False)
        for chunk in zip(states.split(size), targets.split(size), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


# ----------------------------------------------------------------------------------------- the policy
@dataclass
class Row:
    """A trajectory under way. Its place in FastPolicy.rows is its row in the cache."""

    trajectory: object
    prompt: int  # row of its prompt in the cache of prompts
    fed: int  # tokens of the trajectory that the model has seen, the prompt included
    images: int  # images that it has seen
    position: int  # rotary position of the next token
    turn: int = 0  # place in the present call of `act`, which numbers its random numbers
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
        # The two functions above become methods of the model here, and nowhere else. FSDP gathers a
        # module's own parameters (embedding, norm, head) only around methods that it knows of.
        policy.model.set_attn_implementation({"text_config": "packed"})
        for function in (hidden, score):
            setattr(policy.model, function.__name__, types.MethodType(function, policy.model))
            if isinstance(policy.model, FSDPModule):
                register_fsdp_forward_method(policy.model, function.__name__)

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def forget(self):
        """Drop the cache."""
        self.rows = []
        self.cache = self.prompts = self.prompt_lengths = self.prompt_logits = None

    @torch.no_grad()
    def act(self, trajectories: list, limits, on_action) -> None:
        """Sample one turn for each trajectory, as Policy.act does."""
        turns = {id(t): turn for turn, t in enumerate(trajectories)}
        if turns.keys() - {id(row.trajectory) for row in self.rows}:
            self.prefill(trajectories)
        self.bring_forward([i for i, row in enumerate(self.rows) if id(row.trajectory) in turns])
        del self.rows[len(trajectories) :]
        for row in self.rows:
            row.turn = turns[id(row.trajectory)]
            row.budget = limits.new_tokens(row.trajectory)
            row.action = Action([], [])
        logits = self.read()
        live = len(self.rows)
        while live:
            uniform = torch.rand(len(turns), generator=self.generator, device=self.device)
            uniform = uniform[[row.turn for row in self.rows[:live]]]
            tokens, logprobs = self.policy.sample(logits, limits, uniform)
            going = self.take(tokens.tolist(), logprobs.tolist(), on_action)
            self.bring_forward(going)
            live = len(going)
            if live:
                logits = self.step(live)

    def take(self, tokens: list, logprobs: list, on_action) -> list:
        """Append the sampled tokens to the actions of the first rows; the rows that go on."""
        going = []
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            row = self.rows[i]
            action = row.action
            action.ids.append(token)
            action.logprobs.append(logprob)
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
        for a, b in zip(holes, movers, strict=True):
            self.rows[a], self.rows[b] = self.rows[b], self.rows[a]

    def prefill(self, trajectories: list):
        """Start a new cache with the prompts, each once for its group."""
        self.forget()
        firsts, owner = by_prompt(trajectories)
        pieces = [Piece(t.tokens[: t.prompt_length], t.images[: t.prompt_images]) for t in firsts]
        self.prompt_lengths = [len(piece.ids) for piece in pieces]
        self.prompts = Cache(len(pieces), max(self.prompt_lengths))
        self.cache = Cache(len(trajectories), ROOM)
        logits = []
        for lo, hi in chunks(pieces):
            inputs = Inputs(self.policy, pieces[lo:hi])
            lengths = Lengths(self.prompt_lengths[lo:hi], self.device)
            row, slot = self.places(lengths, [0] * (hi - lo), lo)
            packed = Packed(lengths, lengths, None, self.prompts, row, slot)
            logits.append(self.forward(lengths, packed, inputs.ids, inputs.positions, inputs))
        self.prompt_logits = torch.cat(logits)  # (P, V)
        for t, prompt in zip(trajectories, owner, strict=True):
            position = pieces[prompt].end
            self.rows.append(Row(t, prompt, t.prompt_length, t.prompt_images, position))

    def read(self):
        """Feed what the trajectories got since the last call -> logits (B, V) of their next tokens."""
        logits = self.prompt_logits[[row.prompt for row in self.rows]]  # where nothing follows it
        pieces = []
        for row in self.rows:
            t = row.trajectory
            pieces.append(Piece(t.tokens[row.fed :], t.images[row.images :], row.position))
            row.images = len(t.images)
        for lo, hi in chunks(pieces):
            longer = [i for i in range(lo, hi) if pieces[i].ids]
            if longer:
                inputs = Inputs(self.policy, pieces[lo:hi])
                counts = [len(piece.ids) for piece in pieces[lo:hi]]
                logits[longer] = self.feed(lo, counts, inputs.ids, inputs.positions, inputs)
        for row, piece in zip(self.rows, pieces, strict=True):
            row.position = max(row.position, piece.end)
        return logits

    def step(self, live: int):
        """Feed the tokens that the first `live` rows have just sampled -> logits (live, V)."""
        rows = self.rows[:live]
        ids = torch.tensor([row.action.ids[-1] for row in rows], device=self.device)
        positions = torch.tensor([row.position for row in rows], device=self.device)
        for row in rows:
            row.position += 1
        return self.feed(0, [1] * live, ids, positions.expand(3, -1))

    def feed(self, lo: int, counts: list, ids, positions, images=None):
        """Feed counts[i] packed ids to row lo + i -> logits after the last of each that has any."""
        rows = self.rows[lo : lo + len(counts)]
        before = [row.fed - row.trajectory.prompt_length for row in rows]
        for row, count in zip(rows, counts, strict=True):
            row.fed += count
        lengths = Lengths(counts, self.device)
        used = Lengths([a + b for a, b in zip(before, counts, strict=True)], self.device)
        self.cache.needed = max(self.cache.needed, used.longest)
        own = Look(self.cache, slice(lo, lo + len(rows)), lengths, used, CAUSAL)
        row, slot = self.places(lengths, before, lo)
        prompt = torch.tensor([row.prompt for row in rows], device=self.device)[row - lo]  # (N,)
        groups = prompt.bincount(minlength=len(self.prompt_lengths))
        groups = Lengths(groups.tolist(), self.device)
        known = Lengths(self.prompt_lengths, self.device)
        shared = Look(self.prompts, slice(None), groups, known, EVERYTHING)
        packed = Cached(own, shared, prompt.argsort(stable=True), row, slot)
        return self.forward(lengths, packed, ids, positions, images)

    def places(self, lengths, before: list, lo: int):
        """Row (N,) and slot (N,) in the cache of packed tokens: row lo + i has `before[i]` already."""
        counts = torch.tensor(lengths.counts, device=self.device)
        row = torch.arange(len(before), device=self.device).repeat_interleave(counts)
        first = torch.tensor(before, device=self.device) - lengths.cumulative[:-1]
        return row + lo, torch.arange(len(row), device=self.device) + first[row]

    def forward(self, lengths, packed, ids, positions, images=None):
        """One forward of packed sequences -> logits after the last token of each that has any."""
        self.tokens_fed += len(ids)
        self.images_fed += 0 if images is None else len(images.grid)
        ends = lengths.cumulative[1:][lengths.cumulative.diff() > 0]
        return self.model.hidden(ids, positions, packed, images, ends - 1)

    def logprobs(self, trajectories: list, temperature: float = 1.0):
        """Log-probs (A,) of all action tokens, in order, with gradients; and entropies (A,).

        Packed are first the prompts, each once and without its last token, and then the replies.
        That token opens each reply, since it predicts its first. A reply sees its prompt and itself.
        """
        self.forget()
        firsts, owner = by_prompt(trajectories)
        prompts, replies = [], []
        for t in firsts:
            ids = t.tokens[: t.prompt_length - 1]
            prompts.append(Piece(ids, t.images[: t.prompt_images]))
        for t, prompt in zip(trajectories, owner, strict=True):
            ids = t.tokens[t.prompt_length - 1 : -1]
            replies.append(Piece(ids, t.images[t.prompt_images :], after=prompts[prompt]))
        pieces = prompts + replies
        inputs = Inputs(self.policy, pieces)
        queries = Lengths([len(piece.ids) for piece in pieces], self.device)
        ranges = torch.arange(len(inputs.ids), device=self.device).split(queries.counts)
        keys = list(ranges[: len(prompts)])
        for prompt, own in zip(owner, ranges[len(prompts) :], strict=True):
            keys.append(torch.cat([ranges[prompt], own]))
        lengths = Lengths([len(part) for part in keys], self.device)
        packed = Packed(queries, lengths, torch.cat(keys))
        sampled = [m for t in trajectories for m in t.action_mask[t.prompt_length :]]
        targets = [i for t in trajectories for i in t.tokens[t.prompt_length :]]
        sampled = torch.tensor(sampled, device=self.device)
        targets = torch.tensor(targets, device=self.device)[sampled]
        select = sampled.nonzero()[:, 0] + len(inputs.ids) - len(sampled)
        return self.model.score(inputs, packed, select, targets, self.ban, temperature)
