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

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CAUSAL = (-1, 0)  # the window_size of causal attention
EVERYTHING = (-1, -1)
HALF = (torch.float16, torch.bfloat16)
SHORT = 2**14  # queries times keys: sequences up to it share one call of the kernel, padded
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
    if query.is_cuda and query.dtype in HALF:
        return varlen_attn(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            return_aux=return_aux,
            scale=scale,
            window_size=window_size,
            enable_gqa=enable_gqa,
            seqused_k=seqused_k,
        )
    causal = tuple(window_size) == CAUSAL
    stride = regular_stride(cu_seq_k) if seqused_k is not None else max_k
    if 0 < max_q * max_k <= SHORT and stride and not query.is_cuda:
        inputs = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k)
        out, lse = padded_attention(*inputs, stride, causal, scale)
    else:
        pairs = sequences(cu_seq_q, cu_seq_k, seqused_k, causal)
        attend = plain_attention if query.is_cuda else flash_attention
        out, lse = attend(query, key, value, pairs, causal, scale)
    return (out, lse) if return_aux is not None and return_aux.lse else out


def regular_stride(cu_seq):
    """The length that all sequences have in common, or 0."""
    lengths = set(cu_seq.diff().tolist())
    return lengths.pop() if len(lengths) == 1 else 0


def sequences(cu_seq_q, cu_seq_k, seqused_k, causal):
    """The slices (queries, keys) of every sequence, without queries that see no key."""
    starts_q, ends_q = cu_seq_q[:-1], cu_seq_q[1:]
    starts_k, ends_k = cu_seq_k[:-1], cu_seq_k[1:]
    if seqused_k is not None:
        ends_k = starts_k + seqused_k
    if causal:
        starts_q = torch.maximum(starts_q, ends_q - (ends_k - starts_k))
    bounds = torch.stack([starts_q, ends_q, starts_k, ends_k], 1)
    pairs = [(slice(*bound[:2]), slice(*bound[2:])) for bound in bounds.tolist()]
    return [(q, k) for q, k in pairs if q.start < q.stop and k.start < k.stop]


def heads_first(x):
    """(T, H, D) -> (1, H, T, D), as the kernel wants it. Nothing is copied."""
    return x.transpose(0, 1)[None]


def merge(first, second):
    """Attention to two disjoint sets of keys, (out, log-sum-exp) each -> attention to both."""
    total = torch.logaddexp(first[1], second[1])
    share = (second[1] - total).exp()  # (H, Tq)
    share = share.nan_to_num(0.0)  # a query that sees nothing at all: -inf less -inf
    weight = share.t()[..., None].to(first[0].dtype)
    return torch.lerp(first[0], second[0], weight), total


def nothing_seen(query):
    """The output and the log-sum-exp of queries that have seen no key yet."""
    exact = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[1::-1], -torch.inf, dtype=exact)
    return torch.zeros_like(query), lse


def plain_attention(query, key, value, pairs, causal, scale):
    """By the definition, with T x T scores: where no kernel is at hand (float32 on a GPU)."""
    shared = query.shape[1] // key.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out, lse = nothing_seen(query)
    for queries, keys in pairs:
        k = heads_first(key[keys]).repeat_interleave(shared, 1)
        v = heads_first(value[keys]).repeat_interleave(shared, 1)
        scores = heads_first(query[queries]) @ k.transpose(2, 3) * scale
        if causal:
            before = k.shape[2] - scores.shape[2]
            ahead = torch.ones_like(scores, dtype=torch.bool).triu(1 + before)
            scores = scores.masked_fill(ahead, -torch.inf)
        seen = scores.softmax(-1) @ v
        out[queries] = seen[0].transpose(0, 1)
        lse[:, queries] = scores.detach().logsumexp(-1)[0]
    return out, lse


def flash_attention(query, key, value, pairs, causal, scale):
    """By torch's flash kernel for CPUs, which takes one sequence and aligns causal at its start.

    A causal sequence with more keys than queries is therefore two calls: one for the keys before
    its queries, all of which are seen, and one for the keys of the queries themselves.
    """
    before, own = [], []
    for queries, keys in pairs:
        length = queries.stop - queries.start if causal else 0
        middle = keys.stop - length
        if keys.start < middle:
            before.append((queries, slice(keys.start, middle)))
        if length:
            own.append((queries, slice(middle, keys.stop)))
    return FlashOnCPU.apply(query, key, value, before, own, scale)


class FlashOnCPU(torch.autograd.Function):
    """Attention of `before`, pairs whose keys are all seen, merged with `own`, which are causal.

    The kernel's backward wants the output and log-sum-exp over all keys that the queries have seen.
    Given these, it is exact for each part of the keys by itself.
    """

    @staticmethod
    def forward(ctx, query, key, value, before, own, scale):
        seen = []
        for causal, pairs in ((False, before), (True, own)):
            out, lse = nothing_seen(query)
            for queries, keys in pairs:
                inputs = map(heads_first, (query[queries], key[keys], value[keys]))
                part, part_lse = FLASH(*inputs, 0.0, causal, scale=scale)
                out[queries] = part[0].transpose(0, 1)
                lse[:, queries] = part_lse[0]
            if pairs:
                seen.append((out, lse))
        if len(seen) == 2:
            out, lse = merge(*seen)
        elif seen:
            out, lse = seen[0]
        ctx.before, ctx.own, ctx.scale = before, own, scale
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        for causal, pairs in ((False, ctx.before), (True, ctx.own)):
            for queries, keys in pairs:
                inputs = (grad[queries], query[queries], key[keys], value[keys], out[queries])
                total = lse[None, :, queries]
                parts = FLASH_BACKWARD(
                    *map(heads_first, inputs), total, 0.0, causal, scale=ctx.scale
                )
                for whole, place, part in zip(grads, (queries, keys, keys), parts, strict=True):
                    whole[place] += part[0].transpose(0, 1)
        return *grads, None, None, None


def padded_attention(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, used, stride, causal, scale
):
    """Short sequences, padded to (B, H, max_q, D) and (B, Hk, max_k, D): one call for all.

    Their mask is small, and a call for each sequence would take longer than what padding adds.
    """
    key_heads = key.shape[1]
    shared = query.shape[1] // key_heads
    lengths = cu_seq_q.diff()[:, None]
    real = torch.arange(max_q) < lengths  # (B, max_q)
    if used is None:
        used = cu_seq_k.diff()
        real_keys = torch.arange(max_k) < used[:, None]
        key, value = pad(key, real_keys), pad(value, real_keys)
    else:
        key = key.unflatten(0, (-1, stride))[:, :max_k]
        value = value.unflatten(0, (-1, stride))[:, :max_k]
    last = used[:, None] - 1  # (B, max_q or 1): the last key that a query sees
    if causal:
        last = torch.minimum(last, last + 1 - lengths + torch.arange(max_q))
    ahead = torch.arange(max_k) > last[..., None]
    bias = query.new_zeros(ahead.shape).masked_fill_(ahead, -torch.inf)
    if causal:
        bias = bias.repeat_interleave(shared, 1)
    # The heads that share a key head become queries of it, so that each key is read once.
    queries = pad(query, real).unflatten(2, (key_heads, shared)).transpose(1, 2).flatten(2, 3)
    out, lse = FLASH(
        queries, key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias[:, None], scale=scale
    )
    out = out.unflatten(2, (max_q, shared)).transpose(1, 2).flatten(2, 3)  # (B, max_q, H, D)
    lse = lse.unflatten(2, (max_q, shared)).transpose(1, 2).flatten(2, 3)
    lse = lse.masked_fill(last[..., None] < 0, -torch.inf)
    return unpad(out, real), unpad(lse, real).t()


def pad(x, real):
    """Packed (N, ...) -> (B, T, ...), zero where not real (B, T)."""
    place = real.flatten().nonzero()[:, 0]
    padded = x.new_zeros(real.numel(), *x.shape[1:])
    return padded.index_copy_(0, place, x).unflatten(0, real.shape)


def unpad(x, real):
    """(B, T, ...) -> packed (N, ...)."""
    return x.flatten(0, 1).index_select(0, real.flatten().nonzero()[:, 0])


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, packed=None, **kwargs
):
    """What transformers calls in every layer, with a packed row: (1, H, N, D) and (1, Hk, N, D).

    `packed` says how its tokens attend (engine/fast.py). Without it this is transformers' sdpa.
    """
    if packed is None:
        inputs = (module, query, key, value, attention_mask)
        return sdpa_attention_forward(*inputs, scaling=scaling, **kwargs)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed.attend(module.layer_idx, query, key, value, scaling)[None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)
