"""Triton's media attention against the fp64 reference, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flamingo_kernels.ops import MediaSpans
from flamingo_kernels.ops.media_attention.api import _MediaCrossAttention
from flamingo_kernels.ops.spans import SegmentTable
from testing.budgets import assert_within_budget, attention_terms
from testing.cases import MediaCase, media_case
from testing.key_ranges import RANGES, range_case
from testing.media_attention import NAMES, exact, gradients, plain_pytorch
from testing.targets import HAS_GPU, ONE_TARGET, TARGETS, float64_products, gpu

# latents, head dim, query and key/value heads: tiles full and not, both backwards, grouped queries.
SHAPES = [
    {"latents": 1, "head_dim": 16, "heads": 2, "kv_heads": 2},
    {"latents": 7, "head_dim": 24, "heads": 4, "kv_heads": 1},
    {"latents": 64, "head_dim": 64, "heads": 2, "kv_heads": 1},
    {"latents": 65, "head_dim": 40, "heads": 2, "kv_heads": 2},
    {"latents": 130, "head_dim": 96, "heads": 1, "kv_heads": 1},
    {"latents": 64, "head_dim": 128, "heads": 1, "kv_heads": 1, "gated": False},
]


def key_case(dtype: torch.dtype, **options: Any) -> MediaCase:
    """Draw a ``range_case``, and return it in items of one key each, as the kernels take it."""
    case = range_case(dtype, **options)
    return replace(case, k=case.k[:, :, None], v=case.v[:, :, None], spans=case.spans.spans)


@pytest.fixture
def implementation(monkeypatch: pytest.MonkeyPatch):
    """The launchers, as for many tokens and items: short chunks, and entries for several items."""
    from flamingo_kernels.ops.media_attention import segment_sizes
    from flamingo_kernels.ops.media_attention.impl_triton import media_segments

    monkeypatch.setattr(segment_sizes, "SHORTEST_CHUNK", 16)
    monkeypatch.setattr(segment_sizes, "MOST_ITEMS_ALONE", 16)
    monkeypatch.setattr(media_segments, "LONGEST_CHUNK", 16)
    return media_segments


def on(device: str, case: MediaCase) -> MediaCase:
    spans = replace(case.spans, first=case.spans.first.to(device), last=case.spans.last.to(device))
    gate = None if case.gate is None else case.gate.detach().to(device)
    q, k, v = (t.detach().to(device) for t in (case.q, case.k, case.v))
    return MediaCase(q, k, v, spans, gate)


def run(case: MediaCase) -> Tensor:
    """The op past its dispatch, which knows nothing of the interpreter of this process."""
    gate = case.gate
    if gate is not None:
        gate = gate.to(torch.promote_types(case.q.dtype, torch.float32))
    spans = case.spans
    scale = case.q.shape[-1] ** -0.5
    return _MediaCrossAttention.apply(
        spans.segments and spans.segments.table,
        case.q,
        case.k,
        case.v,
        spans.first,
        spans.last,
        gate,
        scale,
        spans.single_item,
        "triton",
    )


def check(case: MediaCase, dtype: torch.dtype) -> None:
    """Output and all gradients within budget, exact zeros for empty ranges (semantics, point 3)."""
    case.require_grad()
    seed = torch.randn(case.q.shape).to(case.q.device)
    out = run(case)
    ours = gradients(out, case, seed)
    plain_case = case.to(dtype).require_grad()
    plain_out = plain_pytorch(plain_case)
    plain = gradients(plain_out, plain_case, seed)
    exact_case = on("cpu", case).to(torch.float64).require_grad()
    exact_out = exact(exact_case)
    true = gradients(exact_out, exact_case, seed.cpu())

    terms = attention_terms(case.q, case.k, case.v, case.q.shape[-1] ** -0.5, seed)
    assert_within_budget(out, plain_out, exact_out, dtype, terms=terms["out"])
    for name, *triple in zip(NAMES, ours, plain, true, strict=False):
        assert_within_budget(*triple, dtype, gradient=True, terms=terms[name], what=name)
    visible = case.spans.visible(case.k.shape[1])
    sees_nothing, unseen = ~visible.any(-1), ~visible.any(1)
    assert not out[sees_nothing].any() and not ours[0][sees_nothing].any()
    assert not ours[1][unseen].any() and not ours[2][unseen].any()


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("attend", ["last", "previous", "last_group"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"R{s['latents']}-D{s['head_dim']}")
@pytest.mark.usefixtures("nan_filled_memory")
def test_within_budget(implementation, shape: dict, attend: str, device: str, dtype: torch.dtype):
    """Unseen slots and fresh memory hold NaN (semantics, points 3, 5 and 17)."""
    check(on(device, media_case(dtype, tokens=37, attend=attend, **shape)), dtype)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.usefixtures("nan_filled_memory")
def test_key_ranges(implementation, ranges: str, device: str, dtype: torch.dtype) -> None:
    """Tiles of rows that see different keys, blocks of keys that rows see in part."""
    shape = {"tokens": 90, "keys": 150, "heads": 2, "kv_heads": 1, "head_dim": 24}
    check(on(device, key_case(dtype, ranges=ranges, **shape)), dtype)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("shape", [{"tokens": 1}, {"tokens": 20, "heads": 6, "kv_heads": 1}])
@pytest.mark.parametrize("ranges", ["any order", "gaps"])
@pytest.mark.usefixtures("nan_filled_memory")
def test_many_keys_are_divided(
    implementation, ranges: str, shape: dict, device: str, dtype: torch.dtype
) -> None:
    """Shares of many keys, some of which a row, or every row, sees nothing of."""
    case = key_case(dtype, ranges=ranges, keys=1300, head_dim=16, **shape)
    assert shares(case) == 5
    check(on(device, case), dtype)


def shares(case: MediaCase) -> int:
    """The number of programs that the forward divides a tile's keys among."""
    from flamingo_kernels._triton.launch import recording
    from flamingo_kernels.ops.media_attention.arguments import Arguments
    from flamingo_kernels.ops.media_attention.impl_triton import forward

    spans = case.spans
    with recording("interpreter") as recorder:
        forward(Arguments(*case.tensors()[:3], spans.first, spans.last, None, 1.0, False))
    return recorder.launches[0].grid[1]


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.usefixtures("nan_filled_memory")
def test_many_items_are_divided(implementation, device: str, dtype: torch.dtype) -> None:
    """A decoding step that sees nine images in one row of the batch, and two in the other."""
    case = media_case(dtype, tokens=1, media=9, latents=65, head_dim=16, nan=False)
    last = torch.tensor([[8], [1]], dtype=torch.int32)
    case.spans = MediaSpans(last * 0, last)
    case.k[1, 2:] = case.v[1, 2:] = float("nan")
    assert shares(case) == 2
    check(on(device, case), dtype)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("single_item", [True, False])
@pytest.mark.usefixtures("nan_filled_memory")
def test_ranges_in_any_order(implementation, single_item: bool, device: str, dtype: torch.dtype):
    """Interleaved items overflow the chunk list that increasing ranges need; gaps hold NaN."""
    case = media_case(dtype, tokens=40, media=7, latents=5, heads=2, head_dim=8, nan=False)
    first = torch.randint(-2, 8, case.spans.shape, dtype=torch.int32)
    first[first == 4] = 3  # nothing sees item 4
    last = first if single_item else first + torch.randint(0, 2, first.shape, dtype=torch.int32)
    last = torch.where((first == 3) & (last == 4), 3, last)
    case.spans = MediaSpans(first, last, single_item)
    unseen = ~case.spans.visible(7).any(1)
    assert unseen[:, 4].all()
    case.k[unseen] = case.v[unseen] = float("nan")
    check(on(device, case), dtype)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("single_item", [True, False])
@pytest.mark.parametrize("shape", [{"tokens": 0}, {"batch": 0}, {"media": 0}])
@pytest.mark.usefixtures("nan_filled_memory")
def test_sizes_of_zero(shape: dict, single_item: bool, device: str, dtype: torch.dtype) -> None:
    case = on(device, media_case(dtype, **shape))
    case.spans = replace(case.spans, single_item=single_item)
    case.require_grad()
    out = run(case)
    assert out.shape == case.q.shape and not out.any()
    for gradient in gradients(out, case, torch.ones_like(out)):
        assert not gradient.any()


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
@pytest.mark.parametrize("draw", [media_case, key_case, partial(key_case, tokens=20, keys=600)])
def test_strides(
    implementation, draw: Callable[..., MediaCase], device: str, dtype: torch.dtype
) -> None:
    """Views of one projection, and of a wider buffer, give the same bits; so do copies."""
    case = on(device, draw(dtype, kv_heads=4, nan=False))
    fused = torch.stack((case.k, case.v), 3)  # [B, I, R, 2, H, D]
    wide = torch.full((*case.q.shape[:3], 16), float("nan"), dtype=dtype, device=device)
    wide[..., 4:12] = case.q
    keys = fused[:, :, :, 0].transpose(3, 4).contiguous().transpose(3, 4)
    strided = MediaCase(wide[..., 4:12], keys, fused[:, :, :, 1], case.spans, case.gate)
    assert strided.q.stride(-1) == 1 and strided.k.stride(-1) != 1
    seed = torch.randn(case.q.shape).to(device)
    results = []
    swapped = seed.transpose(0, 1).contiguous().transpose(0, 1)
    for one, one_seed in ((case, seed), (strided, swapped)):
        one.require_grad()
        out = run(one)
        results.append([out, *gradients(out, one, one_seed)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
@pytest.mark.parametrize("draw", [media_case, key_case, partial(key_case, keys=1000)])
def test_row_bits_do_not_depend_on_the_batch(
    draw: Callable[..., MediaCase], device: str, dtype: torch.dtype
) -> None:
    case = on(device, draw(dtype, batch=3, nan=False))
    together = run(case)
    for row in range(3):
        bounds = (bound[row : row + 1] for bound in (case.spans.first, case.spans.last))
        spans = MediaSpans(*bounds, case.spans.single_item)
        q, k, v = (t[row : row + 1] for t in (case.q, case.k, case.v))
        assert torch.equal(run(MediaCase(q, k, v, spans, case.gate)), together[row : row + 1])


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("draw", [media_case, key_case, partial(key_case, keys=1000)])
def test_same_bits_twice(
    implementation, draw: Callable[..., MediaCase], device: str, dtype: torch.dtype
) -> None:
    case = on(device, draw(dtype, tokens=40, heads=2, kv_heads=1)).require_grad()
    seed = torch.randn(case.q.shape).to(device)
    first, second = ([run(case), *gradients(run(case), case, seed)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(HAS_GPU, reason="fp64 is for the interpreter")
@float64_products
@pytest.mark.parametrize("attend", ["last", "previous"])
def test_gradcheck(attend: str) -> None:
    case = media_case(
        tokens=4, media=2, latents=2, heads=2, head_dim=2, attend=attend, nan=False, seed=3
    )
    case.require_grad()
    assert torch.autograd.gradcheck(
        lambda q, k, v, gate: run(MediaCase(q, k, v, case.spans, gate)),
        case.tensors(),
        fast_mode=True,
    )


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
@pytest.mark.parametrize("value", [0.0, 1e-4, 20.0])
def test_gates_at_the_ends(value: float, device: str, dtype: torch.dtype) -> None:
    """tanh keeps its relative precision near 0, and a gate of 0 has a gradient."""
    case = media_case(dtype, nan=False)
    case.gate = torch.full((1,), value, dtype=dtype)
    check(on(device, case), dtype)


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
def test_chunks_cover_each_token_once(implementation, device: str, dtype: torch.dtype) -> None:
    tokens, media, chunk = 70, 4, 16
    index = torch.tensor([-1] * 5 + [0] * 40 + [2] * 16 + [3] * 9, dtype=torch.int32)
    spans = MediaSpans.from_media_index(index[None].to(device))
    assert implementation.chunking(1, tokens, media, 1)[0] == chunk
    plan = implementation.segments(spans.first, spans.last, media, 1, True)[0].tolist()
    items, chunks = plan[: media + 1], plan[media + 1 :]
    assert [item[:2] for item in items] == [[5, 45], [70, 0], [45, 61], [61, 70], [0, 5]]
    assert items[0][2:] == [0, 3] and [item[3] for item in items] == [3, 0, 0, 0, 0]
    used = [entry for entry in chunks if entry[0] >= 0]
    assert used == [
        [0, 5, 21, 0], [0, 21, 37, 1], [0, 37, 45, 2], [1, 70, 0, -1], [2, 45, 61, -1],
        [3, 61, 70, -1], [4, 0, 5, -1],
    ]  # fmt: skip


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
@pytest.mark.parametrize("attend", ["last", "previous", "keys"])
def test_a_shared_plan_gives_the_same_bits(
    implementation, monkeypatch: pytest.MonkeyPatch, attend: str, device: str, dtype: torch.dtype
) -> None:
    """Also where it is larger than its kernels' blocks: 40 media slots, or entries of 47 keys."""
    shape = {"batch": 1, "tokens": 50, "heads": 1, "kv_heads": 1}
    if attend == "keys":
        case = key_case(dtype, keys=750, **shape)
    else:
        case = media_case(dtype, attend=attend, media=40, **shape)
    case = on(device, case).require_grad()
    media, kv_heads = case.k.shape[1], case.k.shape[3]
    seed = torch.randn(case.q.shape).to(device)
    alone = gradients(run(case), case, seed)
    table = implementation.segments(
        case.spans.first, case.spans.last, media, kv_heads, case.spans.single_item
    )
    assert attend != "keys" or table.shape == (1, 17, 4)
    case.spans = case.spans.with_segments(SegmentTable(table, media, kv_heads))
    monkeypatch.delattr(implementation, "segments")  # nothing is derived again
    shared = gradients(run(case), case, seed)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.skipif(HAS_GPU, reason="one is enough, without 4 GiB of GPU memory")
def test_offsets_past_32_bits() -> None:
    """Strides of tokens and keys of over 2**31 elements; untouched pages cost no memory."""
    case = media_case(
        torch.float16, batch=1, tokens=2, media=2, latents=1, attend="previous", heads=2,
        head_dim=16, nan=False,
    )  # fmt: skip
    stride = 2**31 + 32

    def far(x: Tensor) -> Tensor:
        spread = torch.empty(stride + 32, dtype=torch.float16)
        strides = (0, stride, *x.stride()[2:])
        return spread.as_strided(x.shape, strides).copy_(x)

    spread = MediaCase(far(case.q), far(case.k), case.v, case.spans, case.gate)
    assert torch.equal(run(spread), run(case))
    seed = torch.randn(case.q.shape)
    pairs = (gradients(run(c.require_grad()), c, seed) for c in (case, spread))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize("attend", ["last", "previous"])
def test_graph_capture_and_streams(attend: str, dtype: torch.dtype) -> None:
    """No host synchronisation: forward and backward replay from a captured graph."""
    case = on("cuda", media_case(dtype, tokens=300, latents=64, head_dim=64, attend=attend))
    case.require_grad()
    seed = torch.randn(case.q.shape, device="cuda")
    expected = [run(case), *gradients(run(case), case, seed)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = [run(case), *gradients(run(case), case, seed)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [run(case), *gradients(run(case), case, seed)]
    graph.replay()
    torch.cuda.synchronize()
    for results in (aside, captured):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
