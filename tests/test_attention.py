"""Attention by cumulative lengths equals the definition, whatever the lengths are."""

import inspect
import itertools

import pytest
import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from engine import attention
from engine.attention import CAUSAL, EVERYTHING, varlen_attention

LSE = AuxRequest(lse=True)
HEADS, KEY_HEADS, SIZE = 4, 2, 24
LENGTHS = {  # (queries, keys) of every sequence
    "ragged": [(5, 5), (17, 17), (2, 2), (300, 300)],
    "one token": [(1, 1)],
    "one query each": [(1, 9), (1, 1), (1, 30)],
    "empty sequences": [(0, 4), (3, 0), (6, 6), (0, 0), (2, 2)],
    "all empty": [(3, 0), (2, 0)],
    "more keys than queries": [(4, 9), (40, 41), (1, 70), (130, 300)],
    "more queries than keys": [(9, 4), (3, 3), (50, 1)],
    "some have more keys": [(6, 6), (5, 11), (0, 3), (8, 8)],
}


@pytest.fixture(params=LENGTHS)
def lengths(request):
    return LENGTHS[request.param]


@pytest.fixture(params=["padded", "one by one", "written out"])
def way(request, monkeypatch):
    """Every way of our own: the two of a CPU, and what a GPU does with float32."""
    monkeypatch.setattr(attention, "SHORT", 0 if request.param == "one by one" else 2**20)
    if request.param == "written out":
        monkeypatch.setattr(attention, "FLASH", attention.plain_kernel)


@pytest.fixture(params=[EVERYTHING, CAUSAL], ids=["everything", "causal"])
def window(request):
    return request.param


def cumulative(counts):
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def inputs(lengths, key_heads=KEY_HEADS, dtype=torch.float64, seed=0):
    """Query, key, value, cumulative lengths of both, longest of both: arguments of the function."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = zip(*lengths, strict=True)
    shapes = [(sum(queries), HEADS, SIZE), *[(sum(keys), key_heads, SIZE)] * 2]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    bounds = [cumulative(queries), cumulative(keys), max(queries), max(keys)]
    return [*[x.to(dtype) for x in tensors], *bounds]


def definition(query, key, value, lengths, causal, scale=SIZE**-0.5):
    """Softmax over the keys that each single query of each head may see. -> (out, log-sum-exp)."""
    out = torch.zeros_like(query)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=query.dtype)
    first_query = first_key = 0
    for queries, keys in lengths:
        for i, head in itertools.product(range(queries), range(HEADS)):
            visible = max(0, keys - (queries - 1 - i)) if causal else keys
            group = head * key.shape[1] // HEADS
            seen = slice(first_key, first_key + visible)
            scores = key[seen, group] @ query[first_query + i, head] * scale
            if visible:
                out[first_query + i, head] = scores.softmax(0) @ value[seen, group]
                lse[first_query + i, head] = scores.logsumexp(0)
        first_query, first_key = first_query + queries, first_key + keys
    return out, lse.t()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_it_is_attention_over_ragged_lengths(lengths, window, key_heads, way):
    given = inputs(lengths, key_heads)
    out, lse = varlen_attention(
        *given, return_aux=LSE, window_size=window, enable_gqa=True, scale=0.3
    )
    expected, expected_lse = definition(*given[:3], lengths, window == CAUSAL, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_the_scale_is_the_usual_one_where_none_is_given():
    lengths = LENGTHS["ragged"]
    given = inputs(lengths)
    out = varlen_attention(*given, enable_gqa=True)
    torch.testing.assert_close(out, definition(*given[:3], lengths, False)[0])


def gradients(function, tensors, weights):
    """The gradients of a weighted sum of the output with respect to query, key and value."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = (function(*leaves) * weights).sum()
    return torch.autograd.grad(loss, leaves)


def test_gradients_are_those_of_the_definition(lengths, window, way):
    *tensors, cu_q, cu_k, max_q, max_k = inputs(lengths)
    weights = torch.randn_like(tensors[0])

    def packed(*tensors):
        bounds = (cu_q, cu_k, max_q, max_k)
        return varlen_attention(*tensors, *bounds, window_size=window, enable_gqa=True)

    def plain(query, key, value):
        return definition(query, key, value, lengths, window == CAUSAL)[0]

    if plain(*tensors).any():
        for a, b in zip(*(gradients(f, tensors, weights) for f in (packed, plain)), strict=True):
            torch.testing.assert_close(a, b)


def test_keys_that_are_gathered_get_the_gradients_of_all_who_looked(way):
    """As in training: the replies of a group look at one copy of their prompt."""
    query, key, value, *_ = inputs([(7, 7)])
    cu_q, cu_k = cumulative([3, 2, 2]), cumulative([3, 5, 5])
    index = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6])

    def gathered(query, key, value):
        bounds = (cu_q, cu_k, 3, 5)
        return varlen_attention(
            query, key[index], value[index], *bounds, window_size=CAUSAL, enable_gqa=True
        )

    def masked(query, key, value):
        visible = torch.ones(7, 7, dtype=torch.bool).tril()
        visible[5:, 3:5] = False
        heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=visible, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    weights = torch.randn_like(query)
    tensors = (query, key, value)
    torch.testing.assert_close(gathered(*tensors), masked(*tensors))
    for a, b in zip(*(gradients(f, tensors, weights) for f in (gathered, masked)), strict=True):
        torch.testing.assert_close(a, b)


def in_a_cache(x, used, capacity):
    """Packed keys or values -> a cache (B * capacity, Hk, D), with garbage behind `used`."""
    cache = torch.full((len(used), capacity, *x.shape[1:]), 1e3, dtype=x.dtype)
    for row, part in enumerate(x.split(used)):
        cache[row, : used[row]] = part
    return cache.flatten(0, 1)


@pytest.mark.parametrize("queries", [[1, 1, 1, 1], [3, 0, 1, 2], [40, 2, 1, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("used", [[30, 1, 12, 5], [30, 1, 12, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("capacity", [30, 64])
def test_a_cache_longer_than_used(queries, used, capacity, window, way):
    lengths = list(zip(queries, used, strict=True))
    query, key, value, cu_q, _, max_q, max_k = inputs(lengths)
    out, lse = varlen_attention(
        query,
        in_a_cache(key, used, capacity),
        in_a_cache(value, used, capacity),
        cu_q,
        cumulative([capacity] * len(used)),
        max_q,
        max_k,
        return_aux=LSE,
        window_size=window,
        enable_gqa=True,
        seqused_k=torch.tensor(used, dtype=torch.int32),
    )
    expected, expected_lse = definition(query, key, value, lengths, window == CAUSAL)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_two_passes_merged_are_one_over_all_keys(way):
    """As in generation: the prompt, then the row itself. Some queries see nothing in one pass."""
    lengths = [(3, 8), (2, 5), (4, 4)]
    query, key, value, *_ = inputs(lengths)
    owner = torch.tensor([0] * 8 + [1] * 5 + [2] * 4)
    first = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    seen = []
    for part in (first, ~first):
        counts = owner[part].bincount(minlength=3).tolist()
        bounds = (cumulative([3, 2, 4]), cumulative(counts), 4, max(counts))
        out, lse = varlen_attention(
            query, key[part], value[part], *bounds, return_aux=LSE, enable_gqa=True
        )
        seen.append((out.transpose(0, 1), lse))
    out, lse = attention.merge(*seen)
    out = out.transpose(0, 1)
    expected, expected_lse = definition(query, key, value, lengths, False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("short, made", [(0, "kernel_calls"), (2**20, "padding")])
def test_lengths_are_looked_at_once_for_all_layers(short, made, monkeypatch):
    """The same tensors again are the next layer; others are another forward, if equal or not."""
    monkeypatch.setattr(attention, "SHORT", short)
    known = getattr(attention, made)
    known.cache_clear()
    given = inputs(LENGTHS["some have more keys"])
    for _ in range(3):
        varlen_attention(*given, window_size=CAUSAL, enable_gqa=True)
    assert known.cache_info().misses == 1
    for name in ("some have more keys", "ragged"):
        given = inputs(LENGTHS[name])
        out = varlen_attention(*given, window_size=CAUSAL, enable_gqa=True)
        torch.testing.assert_close(out, definition(*given[:3], LENGTHS[name], True)[0])
    assert known.cache_info().misses == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("short", [0, 2**20])
def test_lower_precisions(dtype, window, short, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", short)
    lengths = LENGTHS["some have more keys"]
    given = inputs(lengths, dtype=dtype)
    given[0].requires_grad_()
    out, lse = varlen_attention(*given, return_aux=LSE, window_size=window, enable_gqa=True)
    out.sum().backward()
    expected, _ = definition(*(x.double() for x in given[:3]), lengths, window == CAUSAL)
    assert out.dtype == given[0].grad.dtype == dtype and lse.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def peak_bytes(work):
    """The most that is allocated at a time while work() runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    """One sequence of 4,096 tokens needs what eight of 512 need; its scores alone are 256 MiB."""

    def work(count, length):
        lengths = [(length, length + 64)] * count
        *tensors, cu_q, cu_k, max_q, max_k = inputs(lengths, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in tensors]
        bounds = (cu_q, cu_k, max_q, max_k)
        out = varlen_attention(*leaves, *bounds, window_size=CAUSAL, enable_gqa=True)
        out.sum().backward()

    short, long = peak_bytes(lambda: work(8, 512)), peak_bytes(lambda: work(1, 4096))
    assert long < 2 * short and long < 64 * 2**20


def test_without_a_packed_row_it_is_transformers_own():
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS
    module.is_causal = True
    query, key, value = (x.transpose(0, 1)[None] for x in inputs([(6, 6)])[:3])
    out, _ = attention.packed_attention(module, query, key, value, None, scaling=SIZE**-0.5)
    expected, _ = definition(*inputs([(6, 6)])[:3], [(6, 6)], True)
    torch.testing.assert_close(out[0], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_flash_kernel_of_a_gpu_gives_the_same(window):
    """Ragged lengths, more keys than queries, gradients, and a cache longer than used."""
    lengths = [(5, 5), (17, 40), (1, 300), (130, 300)]
    *tensors, cu_q, cu_k, max_q, max_k = inputs(lengths, dtype=torch.bfloat16)
    weights = torch.randn_like(tensors[0])

    def run(device, tensors, **settings):
        bounds = (cu_q.to(device), cu_k.to(device), max_q, max_k)
        settings = dict(window_size=window, enable_gqa=True, return_aux=LSE, **settings)
        return varlen_attention(*(x.to(device) for x in tensors), *bounds, **settings)

    for a, b in zip(run("cpu", tensors), run("cuda", tensors), strict=True):
        torch.testing.assert_close(a.float(), b.float().cpu(), atol=0.02, rtol=0.02)
    on_cpu = gradients(lambda *x: run("cpu", x)[0], tensors, weights)
    on_gpu = gradients(lambda *x: run("cuda", x)[0].cpu(), tensors, weights)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=0.05, rtol=0.05)
    used = torch.tensor([3, 40, 150, 290], dtype=torch.int32)
    with torch.no_grad():
        on_cpu = run("cpu", tensors, seqused_k=used)
        on_gpu = run("cuda", tensors, seqused_k=used.cuda())
    seen = on_cpu[1].isfinite().t()
    torch.testing.assert_close(
        on_cpu[0][seen].float(), on_gpu[0].cpu()[seen].float(), atol=0.02, rtol=0.02
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float32_on_a_gpu(window):
    lengths = LENGTHS["some have more keys"]
    *tensors, cu_q, cu_k, max_q, max_k = inputs(lengths, dtype=torch.float32)
    given = [x.cuda() for x in (*tensors, cu_q, cu_k)]
    out = varlen_attention(*given, max_q, max_k, window_size=window, enable_gqa=True)
    expected, _ = definition(*tensors, lengths, window == CAUSAL)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_the_signature_is_torch_s():
    """Whatever our function takes, torch's takes under the same name and in the same order."""
    ours = list(inspect.signature(varlen_attention).parameters.values())
    torchs = inspect.signature(varlen_attn).parameters
    assert [p.name for p in ours] == [name for name in torchs if name in {p.name for p in ours}]
    assert all(p.kind == torchs[p.name].kind and p.default == torchs[p.name].default for p in ours)
