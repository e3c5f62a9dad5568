"""Attention over packed sequences, described by cumulative lengths.

The sequences of a batch lie one after another in one long row, without padding. `cu_seq_q` says
where the queries of each begin and end, `cu_seq_k` where its keys do. `varlen_attention` has the
signature of torch.nn.attention.varlen.varlen_attn. On a GPU with half precision it is that
function; on a CPU it calls torch's flash kernel for CPUs. Neither builds a mask of T x T, so memory
grows with the number of tokens and not with its square.

What a reader may rely on without reading on:
  - Causal sequences are aligned at their ends: the last query sees every key of its sequence.
  - A sequence without queries or without keys is allowed. What sees no key is 0.
  - The gradient is exact, also where a sequence has more keys than queries.
  - With `seqused_k` (a cache) and for the log-sum-exp there is no gradient.

Shapes: B sequences, Tq and Tk packed queries and keys, H heads, Hk key heads, D head size.
"""

import functools
from typing import NamedTuple

import torch

# torch's varlen_attn and transformers are imported where they are used: together they take two
# seconds, in which a command should have said what it is going to do.

CAUSAL = (-1, 0)  # the window_size of causal attention
EVERYTHING = (-1, -1)
HALF = (torch.float16, torch.bfloat16)
SHORT = 2**13  # queries times keys: sequences up to it share one call of the kernel, padded
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def varlen_attention(
    query: torch.Tensor,  # (Tq, H, D)
    key: torch.Tensor,  # (Tk, Hk, D)
    value: torch.Tensor,  # (Tk, Hk, D)
    cu_seq_q: torch.Tensor,  # (B + 1,) int32
    cu_seq_k: torch.Tensor,  # (B + 1,) int32
    max_q: int,
    max_k: int,
    *,
    return_aux=None,
    scale: float | None = None,
    window_size: tuple = EVERYTHING,
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,  # (B,) int32
):
    """Attention (Tq, H, D) of every sequence by itself, as torch's varlen_attn computes it.

    With return_aux=AuxRequest(lse=True) also the log-sum-exp (H, Tq) of the scores, in float32.
    seqused_k: how many of each sequence's keys are in use. The window is EVERYTHING or CAUSAL.
    """
    given = locals()  # the arguments by name, which are also those of torch's function
    if query.is_cuda and query.dtype in HALF:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(**given)
    causal = tuple(window_size) == CAUSAL
    if query.is_cuda or 0 < max_q * max_k <= SHORT:
        shared = query.shape[1] // key.shape[1]
        lengths = (cu_seq_q, cu_seq_k, max_q, max_k, seqused_k)
        known = padding(*lengths, causal, shared, query.dtype)
        out, lse = padded_attention(query, key, value, known, scale)
    else:
        calls = kernel_calls(cu_seq_q, cu_seq_k, seqused_k, causal)
        inputs = (x.transpose(0, 1)[None] for x in (query, key, value))
        out, lse = FlashOnCPU.apply(*inputs, calls, scale)
        out = out[0].transpose(0, 1)
        lse = lse[0]
    return (out, lse) if return_aux is not None and return_aux.lse else out


def merge(first, second):
    """Attention to two disjoint sets of keys -> to both. Each is out (…, D) and log-sum-exp (…)."""
    total = torch.logaddexp(first[1], second[1])
    share = (second[1] - total).exp()
    share = share.nan_to_num(0.0)  # a query that sees nothing at all: -inf less -inf
    weight = share[..., None].to(first[0].dtype)
    return torch.lerp(first[0], second[0], weight), total


# ---------------------------------------------------------------- long sequences: one call for each
@functools.lru_cache(4)  # all layers of a forward give the same tensors
def kernel_calls(cu_seq_q, cu_seq_k, seqused_k, causal) -> list:
    """The calls that the CPU's kernel needs: (causal, queries, keys), the latter two as slices.

    It aligns causal attention at the start. A causal sequence with more keys than queries is
    therefore two calls: the keys before its queries, all of which are seen, and its own.
    """
    calls = []
    used = cu_seq_k.diff() if seqused_k is None else seqused_k
    starts = cu_seq_q[:-1]
    ends = cu_seq_q[1:]
    bounds = torch.stack([starts, ends, cu_seq_k[:-1], used], 1)
    for start, end, first, count in bounds.tolist():
        last = middle = first + count
        if causal:
            start = max(start, end - count)  # queries before that see no key
            middle = last - (end - start)
        queries = slice(start, end)
        if start < end and first < middle:
            calls.append((False, queries, slice(first, middle)))
        if start < end and middle < last:
            calls.append((True, queries, slice(middle, last)))
    return calls


class FlashOnCPU(torch.autograd.Function):
    """The calls of the kernel, merged where a query is in two of them.

    Query is (1, H, Tq, D), key and value are (1, Hk, Tk, D). The kernel's backward wants the output
    and log-sum-exp over all keys that its queries have seen, and is then exact for each call alone.
    """

    @staticmethod
    def forward(ctx, query, key, value, calls, scale):
        exact = torch.promote_types(query.dtype, torch.float32)
        outs = [torch.zeros_like(query), torch.zeros_like(query)]  # not causal, causal
        lses = query.new_full((2, *query.shape[:3]), -torch.inf, dtype=exact)
        for causal, queries, keys in calls:
            own = query[:, :, queries]
            seen = (key[:, :, keys], value[:, :, keys])
            out, lse = FLASH(own, *seen, 0.0, causal, scale=scale)
            outs[causal][:, :, queries] = out
            lses[int(causal), :, :, queries] = lse
        out, lse = merge(*zip(outs, lses, strict=True))
        ctx.calls = calls
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        for causal, queries, keys in ctx.calls:
            inputs = (
                grad[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
            )
            parts = FLASH_BACKWARD(*inputs, 0.0, causal, scale=ctx.scale)
            grads[0][:, :, queries] += parts[0]
            grads[1][:, :, keys] += parts[1]
            grads[2][:, :, keys] += parts[2]
        return *grads, None, None


# -------------------------------------------------------- short sequences: one call for all of them
class Padding(NamedTuple):
    """Where packed tokens lie when they are padded, and what is masked. None: where they are."""

    queries: torch.Tensor | None  # (B * max_q,) places of queries among the packed ones
    keys: torch.Tensor | None  # (B * max_k,), likewise; behind a shorter one is what lies there
    real: torch.Tensor | None  # (Tq,) places of the packed queries among the padded ones
    bias: torch.Tensor  # (B, 1, 1 or max_q * H / Hk, max_k): 0, or -inf where a key is not seen
    blind: torch.Tensor | None  # (B, 1, 1 or max_q * H / Hk): who sees no key; None: nobody


@functools.lru_cache(4)  # all layers of a forward give the same tensors
def padding(cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, causal, shared, dtype) -> Padding:
    """What padded_attention needs to know about lengths. shared: heads of one key head."""
    used = cu_seq_k.diff() if seqused_k is None else seqused_k
    column = torch.arange(max(max_q, max_k), device=used.device)
    lengths = cu_seq_q.diff()[:, None]
    last = used[:, None] - 1  # (B, 1 or max_q): the last key that a query sees
    if causal:
        last = torch.minimum(last, last + 1 - lengths + column[:max_q])
        last = last.repeat_interleave(shared, 1)
    ahead = column[:max_k] > last[..., None]
    bias = torch.zeros(ahead.shape, dtype=dtype, device=used.device)
    bias.masked_fill_(ahead, -torch.inf)
    real = column[:max_q] < lengths
    blind = last[:, None] < 0
    return Padding(
        queries=places_of(cu_seq_q, max_q),
        keys=places_of(cu_seq_k, max_k),
        real=None if real.all() else real.flatten().nonzero()[:, 0],
        bias=bias[:, None],
        blind=blind if blind.any() else None,
    )


def places_of(cu_seq, length):
    """Places (B * length,) of the first `length` of each sequence; None: they lie evenly."""
    strides = set(cu_seq.diff().tolist())
    if len(strides) == 1 and max(strides) >= length:
        return None
    place = cu_seq[:-1, None] + torch.arange(length, device=cu_seq.device)
    return place.clamp(max=cu_seq[-1] - 1).flatten()


def pick(x, places):
    """x at these places of its first dimension; None: as it is."""
    return x if places is None else x.index_select(0, places)


def padded_attention(query, key, value, padding, scale):
    """Sequences padded to (B, H, max_q, D) and (B, Hk, max_k, D), with a mask.

    The mask is small where sequences are short, and padding then takes less time than a call for
    each of them. On a GPU this is what float32 gets, at any length.
    """
    count = len(padding.bias)
    longest = padding.bias.shape[-1]
    # The heads that share a key head become queries of it, so that each key is read once.
    heads = (key.shape[1], -1)
    queries = pick(query, padding.queries).unflatten(1, heads).unflatten(0, (count, -1))
    _, most, _, shared, _ = queries.shape
    queries = queries.transpose(1, 2).flatten(2, 3)  # (B, Hk, max_q * H / Hk, D)
    seen = []
    for x in (key, value):
        x = pick(x, padding.keys).unflatten(0, (count, -1))
        seen.append(x[:, :longest].transpose(1, 2))
    kernel = plain_kernel if query.is_cuda else FLASH
    out, lse = kernel(queries, *seen, attn_mask=padding.bias, scale=scale)
    if padding.blind is not None:
        lse = lse.masked_fill(padding.blind, -torch.inf)
    packed = []
    for x in (out, lse):
        x = x.unflatten(2, (most, shared)).transpose(1, 2)
        x = pick(x.flatten(0, 1), padding.real)  # (Tq, Hk, H / Hk, ...)
        packed.append(x.flatten(1, 2))
    return packed[0], packed[1].t()


def plain_kernel(query, key, value, attn_mask, scale):
    """What FLASH computes, written out, with all scores at a time."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(2, 3) * scale + attn_mask
    scores = scores.clamp(min=-1e30)  # the gradient of a query that sees nothing is 0
    weights = scores.softmax(-1) * (attn_mask == 0)
    return weights @ value, scores.logsumexp(-1)


# ------------------------------------------------------------------------------- where it is called
def packed_attention(
    module, query, key, value, attention_mask, scaling=None, packed=None, **kwargs
):
    """What transformers calls in every layer, with a packed row: (1, H, N, D) and (1, Hk, N, D).

    `packed` says how its tokens attend (engine/fast.py). Without it this is transformers' sdpa.
    """
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        inputs = (module, query, key, value, attention_mask)
        return sdpa_attention_forward(*inputs, scaling=scaling, **kwargs)
    query = query[0].transpose(0, 1)
    key = key[0].transpose(0, 1)
    value = value[0].transpose(0, 1)
    out = packed.attend(module.layer_idx, query, key, value, scaling)
    return out[None], None


def register() -> None:
    """Let a model of transformers choose "packed" as its attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)
