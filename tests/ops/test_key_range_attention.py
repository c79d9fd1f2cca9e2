"""media_cross_attention on a flat list of keys: other forms of the same keys, and its errors.

Values and gradients against the reference are in ``test_media_attention.py``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flamingo_kernels.ops import (
    KeyRanges,
    MediaSpans,
    media_cross_attention,
    plan_media_attention,
)
from testing.budgets import assert_gradients_close
from testing.cases import MediaCase, kernels_for, media_case
from testing.compiled import GraphCounter
from testing.key_ranges import range_case
from testing.media_attention import NAMES, gradients

KERNELS = kernels_for("media_cross_attention", needs_grad=True)
all_kernels = pytest.mark.parametrize(("kernel", "dtype"), KERNELS)


def results(case: MediaCase, kernel: str, d_out: Tensor) -> dict[str, Tensor]:
    """Return output and gradients by name."""
    case.require_grad()
    out = media_cross_attention(case.q, case.k, case.v, case.spans, case.gate, kernel=kernel)
    return {"out": out, **dict(zip(NAMES, gradients(out, case, d_out), strict=False))}


@all_kernels
@pytest.mark.parametrize("attend", ["last", "last_group", "previous"])
def test_equal_items_are_key_ranges(kernel: str, dtype: torch.dtype, attend: str) -> None:
    case = media_case(dtype, attend=attend, tokens=23, latents=7)
    d_out = torch.randn_like(case.q)
    items = results(case, kernel, d_out)
    batch, slots, latents = case.k.shape[:3]
    ranges = KeyRanges.from_items(case.spans, torch.full((batch, slots), latents))
    assert torch.equal(ranges.visible(slots * latents), case.visible.repeat_interleave(latents, 2))
    flat = replace(
        case.to(dtype),
        k=case.k.detach().flatten(1, 2),
        v=case.v.detach().flatten(1, 2),
        spans=ranges,
    )
    keys = results(flat, kernel, d_out)
    for name in ("dk", "dv"):
        keys[name] = keys[name].unflatten(1, (slots, latents))
    assert_gradients_close(keys, items, dtype)


@all_kernels
def test_packed_documents_equal_each_alone(kernel: str, dtype: torch.dtype) -> None:
    """To rounding; the C++ forward to the bit, from 17 tokens on (semantics, point 19)."""
    sizes = [(17, 5), (40, 130), (64, 0), (300, 324)]
    kinds = ("window", "any order", "prefix", "items")
    alone = [
        range_case(dtype, batch=1, tokens=tokens, keys=keys, ranges=kind, gated=False, seed=seed)
        for seed, ((tokens, keys), kind) in enumerate(zip(sizes, kinds, strict=True))
    ]
    tensors = [torch.cat([getattr(case, name) for case in alone], 1) for name in "qkv"]
    ranges = KeyRanges.packed([case.spans for case in alone], [keys for _, keys in sizes])
    d_out = torch.randn_like(tensors[0])
    packed = results(MediaCase(*tensors, ranges, None), kernel, d_out)
    parts = d_out.split([tokens for tokens, _ in sizes], 1)
    each = [results(case, kernel, part) for case, part in zip(alone, parts, strict=True)]
    whole = {name: torch.cat([one[name] for one in each], 1) for name in packed}
    assert_gradients_close(packed, whole, dtype)
    if kernel == "cpp":
        assert torch.equal(packed["out"], whole["out"])


@all_kernels
def test_ranges_are_clipped_to_the_keys(kernel: str, dtype: torch.dtype) -> None:
    """Also at the ends of int32, where a sum would wrap around."""
    case = range_case(dtype, tokens=6, keys=9, nan=False)
    least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    outside = [[least, most], [4, most], [least, 3], [most, most], [least, least], [9, 12]]
    clipped = [[0, 9], [4, 9], [0, 3], [0, 0], [0, 0], [0, 0]]
    outcomes, d_out = [], torch.randn_like(case.q)
    for bounds in (outside, clipped):
        start, stop = torch.tensor(bounds).int().T[:, None].expand(2, 2, -1)
        ranges = KeyRanges(start, stop)
        outcomes.append(results(replace(case.to(dtype), spans=ranges), kernel, d_out))
    for name, expected in outcomes[1].items():
        assert torch.equal(outcomes[0][name], expected), name


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _ in KERNELS}))
def test_a_key_in_the_forms_of_an_item_and_of_a_list(kernel: str) -> None:
    """Calls of one signature but for the form."""
    case = range_case(torch.float32)
    items = MediaSpans(case.spans.start, case.spans.stop - 1)
    for _ in range(2):
        flat = media_cross_attention(case.q, case.k, case.v, case.spans, kernel=kernel)
        one = (case.k[:, :, None], case.v[:, :, None])
        assert torch.equal(flat, media_cross_attention(case.q, *one, items, kernel=kernel))


def test_a_plan_of_key_ranges(stand_in_kernels: list[str]) -> None:
    case = range_case(torch.float32).require_grad()
    for kernel in ("cpp", "torch"):
        assert plan_media_attention(case.spans, case.k, kernel) is case.spans
    planned = plan_media_attention(case.spans, case.k, "triton")
    assert isinstance(planned, KeyRanges) and planned.spans.segments is not None
    media_cross_attention(case.q, case.k, case.v, planned, kernel="triton").sum().backward()
    assert stand_in_kernels.count("media_attention_segments") == 1
    with pytest.raises(ValueError, match=r"planned for S=23, Hkv=2; k has S=22, Hkv=2"):
        media_cross_attention(case.q, case.k[:, 1:], case.v[:, 1:], planned, kernel="triton")
    with torch.no_grad():
        assert plan_media_attention(case.spans, case.k, "triton") is case.spans


@pytest.mark.slow
def test_at_most_two_graphs_of_triton_over_many_lengths(stand_in_kernels: list[str]) -> None:
    """Also where keys begin to share entries of the segment table."""

    def attend(q: Tensor, k: Tensor, v: Tensor, boundary: Tensor) -> Tensor:
        ranges = plan_media_attention(KeyRanges.from_boundary(boundary), k, "triton")
        return media_cross_attention(q, k, v, ranges, kernel="triton")

    counter = GraphCounter()
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for tokens, keys in ((2, 30), (3, 700), (5, 1023), (8, 1024), (13, 3000), (21, 50_000)):
        case = range_case(torch.float32, tokens=tokens, keys=keys).require_grad()
        compiled(case.q, case.k, case.v, case.spans.stop).sum().backward()
    assert counter.graphs <= 2
    assert stand_in_kernels.count("media_attention_segments") == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: {"k": c.k[:, :, None]}, ValueError, r"k must be \[B, S, Hkv, D\], .* 1, 2, 8"),
        (lambda c: {"v": c.v[0]}, ValueError, r"v must be .*, got shape \(23, 2, 8\)"),
        (lambda c: {"k": c.k[:1]}, ValueError, r"k has shape \(1, 23, 2, 8\), expected \(2, 23, 2"),
        (lambda c: {"v": c.v[:, 1:]}, ValueError, r"v has shape \(2, 22, 2, 8\), .*\(2, 23, 2, 8"),
        (lambda c: {"k": c.k.float()}, TypeError, "one dtype"),
        (lambda c: {"k": None}, TypeError, "k must be a floating point tensor, got NoneType"),
        (lambda c: {"spans": c.spans.newest(3)}, ValueError, r"\(2, 3\), expected \(2, 11\)"),
        (lambda c: {"spans": c.spans.spans}, ValueError, r"k must be \[B, I, R, Hkv, D\], got"),
        (
            lambda c: {"spans": KeyRanges.everything(2, 11, 23, torch.device("meta"))},
            ValueError,
            "spans are on meta, q on cpu",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(change, error: type[Exception], message: str) -> None:
    case = range_case()
    arguments = {"q": case.q, "k": case.k, "v": case.v, "spans": case.spans, **change(case)}
    with pytest.raises(error, match=message):
        media_cross_attention(**arguments)
