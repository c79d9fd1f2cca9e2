"""media_cross_attention: every kernel against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from flamingo_kernels.ops import (
    KeyRanges,
    MediaSpans,
    media_cross_attention,
    plan_media_attention,
)
from flamingo_kernels.ops.spans import SegmentTable
from testing.budgets import assert_close_to_reference, assert_within_budget, attention_terms
from testing.cases import MediaCase, kernels_for, media_case, media_shapes
from testing.key_ranges import RANGES, range_case, range_shapes
from testing.media_attention import NAMES, exact, gradients, plain_pytorch

OP = "media_cross_attention"
FORWARD = kernels_for(OP)
TRAINING = kernels_for(OP, needs_grad=True)
FORMS = {"items": (media_case, media_shapes), "keys": (range_case, range_shapes)}
any_form = pytest.mark.parametrize("form", FORMS)


def run(case: MediaCase, kernel: str) -> torch.Tensor:
    return media_cross_attention(case.q, case.k, case.v, case.spans, case.gate, kernel=kernel)


@pytest.mark.parametrize(("kernel", "dtype"), FORWARD)
@any_form
@pytest.mark.usefixtures("nan_filled_memory")
def test_forward_within_budget(form: str, kernel: str, dtype: torch.dtype) -> None:
    """Nothing to see is exactly zero, the unseen never read (semantics, points 3, 5, 17, 19)."""
    make, shapes = FORMS[form]

    @given(shapes)
    def check(shape: dict) -> None:
        case = make(dtype, **shape)
        out = run(case, kernel)
        assert out.dtype == dtype
        empty = ~case.visible.any(-1)
        assert torch.equal(out[empty], torch.zeros_like(out[empty]))
        terms = attention_terms(case.q, case.k, case.v, case.q.shape[-1] ** -0.5)
        assert_within_budget(
            out, plain_pytorch(case), exact(case.to(torch.float64)), dtype, terms=terms["out"]
        )

    check()


@pytest.mark.parametrize(("kernel", "dtype"), TRAINING)
@any_form
@pytest.mark.usefixtures("nan_filled_memory")
def test_gradients_within_budget(form: str, kernel: str, dtype: torch.dtype) -> None:
    """dq, dk, dv and dgate; the unseen is never read (semantics, points 3, 5, 17 and 19)."""
    make, shapes = FORMS[form]

    @given(shapes)
    def check(shape: dict) -> None:
        case = make(dtype, **shape).require_grad()
        seed = torch.randn(case.q.shape)
        ours = gradients(run(case, kernel), case, seed)
        plain_case = case.to(dtype).require_grad()
        plain = gradients(plain_pytorch(plain_case), plain_case, seed)
        exact_case = case.to(torch.float64).require_grad()
        true = gradients(exact(exact_case), exact_case, seed)
        terms = attention_terms(case.q, case.k, case.v, case.q.shape[-1] ** -0.5, seed)
        for name, *triple in zip(NAMES, ours, plain, true, strict=False):
            assert_within_budget(*triple, dtype, gradient=True, terms=terms[name], what=name)
        empty, unseen = ~case.visible.any(-1), ~case.visible.any(1)
        assert not ours[0][empty].any()
        assert not ours[1][unseen].any() and not ours[2][unseen].any()

    check()


@pytest.mark.parametrize(("kernel", "dtype"), FORWARD)
@any_form
def test_strides(form: str, kernel: str, dtype: torch.dtype) -> None:
    """Views of one projection, transposed heads and rows of a wider buffer give the same bits."""
    case = FORMS[form][0](dtype, heads=4, kv_heads=4, head_dim=8)
    fused = torch.stack((case.k, case.v), -3)  # [B, I, R, 2, H, D] or [B, S, 2, H, D]
    wide = torch.full((*case.q.shape[:3], 16), float("nan"), dtype=dtype)
    wide[..., 4:12] = case.q
    strided = MediaCase(wide[..., 4:12], *fused.unbind(-3), case.spans, case.gate)
    assert not strided.k.is_contiguous() and not strided.q.is_contiguous()
    assert torch.equal(run(strided, kernel), run(case, kernel))


@pytest.mark.parametrize(
    ("form", "kernel", "dtype"),
    [(form, *pair) for form in FORMS for pair in FORWARD if form == "items" or pair[0] != "torch"],
)
def test_row_bits_do_not_depend_on_the_batch(form: str, kernel: str, dtype: torch.dtype) -> None:
    """A row gives the same bits alone and in a batch (semantics, point 18).

    With several threads, stock PyTorch keeps this for items alone.
    """
    case = FORMS[form][0](dtype, batch=3)
    whole = run(case, kernel)
    assert torch.equal(whole, run(case, kernel))
    for row in range(3):
        assert torch.equal(run(case.rows(slice(row, row + 1)), kernel)[0], whole[row])


@pytest.mark.parametrize(("kernel", "dtype"), FORWARD)
@pytest.mark.parametrize(("tokens", "segment"), [(400, 51), (512, 65), (1024, 130)])
def test_row_bits_where_the_batch_moves_the_cuts_of_segments(
    kernel: str, dtype: torch.dtype, tokens: int, segment: int
) -> None:
    """A cut may leave a piece of one or two tokens, with any batch (semantics, point 18)."""
    torch.manual_seed(0)
    index = torch.arange(tokens) // segment
    media = int(index[-1]) + 1
    q = torch.randn(8, tokens, 8, 16).to(dtype)
    k, v = torch.randn(2, 8, media, 8, 8, 16).to(dtype)
    spans = MediaSpans.from_media_index(index.expand(8, -1))
    together = media_cross_attention(q, k, v, spans, kernel=kernel)
    alone = MediaSpans.from_media_index(index[None])
    assert torch.equal(
        media_cross_attention(q[:1], k[:1], v[:1], alone, kernel=kernel)[0], together[0]
    )


@pytest.mark.parametrize(("kernel", "dtype"), FORWARD)
def test_an_item_with_scores_of_minus_infinity_has_no_weight(
    kernel: str, dtype: torch.dtype
) -> None:
    q = torch.ones(1, 4, 1, 16, dtype=dtype)
    k = torch.ones(1, 2, 3, 1, 16, dtype=dtype)
    k[:, 0] = float("-inf")
    v = torch.randn(1, 2, 3, 1, 16).to(dtype)
    spans = MediaSpans.everything(1, 4, 2, q.device)
    out = media_cross_attention(q, k, v, spans, kernel=kernel)
    one = MediaSpans.everything(1, 4, 1, q.device)
    expected = media_cross_attention(q, k[:, 1:], v[:, 1:], one, kernel=kernel)
    assert_close_to_reference(out, expected, dtype)


def test_a_changed_copy_of_spans_has_no_plan() -> None:
    spans = MediaSpans.from_media_index(torch.tensor([[0, 0, 1]]))
    planned = spans.with_segments(SegmentTable(torch.zeros(1), 2, 1))
    assert planned.segments is not None
    assert replace(planned, last=planned.last + 1).segments is None
    assert planned.newest(2).segments is None


@pytest.mark.parametrize("sees", ["last", "last_group", "previous", "any order", "window"])
@pytest.mark.parametrize("kernel", [k for k, dtype in TRAINING if dtype == torch.float64])
def test_gradcheck(kernel: str, sees: str) -> None:
    if sees in RANGES:
        case = range_case(ranges=sees, tokens=5, keys=6, head_dim=3, nan=False)
    else:
        case = media_case(attend=sees, tokens=5, media=3, latents=2, head_dim=3, nan=False)
    case.require_grad()
    assert torch.autograd.gradcheck(
        lambda q, k, v, gate: media_cross_attention(q, k, v, case.spans, gate, kernel=kernel),
        case.tensors(),
    )


@pytest.mark.parametrize(("kernel", "dtype"), FORWARD)
@pytest.mark.parametrize("shape", [{"tokens": 0}, {"batch": 0}, {"media": 0}, {"keys": 0}])
def test_sizes_of_zero(kernel: str, dtype: torch.dtype, shape: dict) -> None:
    forms = [media_case] * ("keys" not in shape) + [range_case] * ("media" not in shape)
    for case in (make(dtype, **shape) for make in forms):
        out = run(case, kernel)
        assert out.shape == case.q.shape
        assert not out.any()


@pytest.mark.parametrize(("kernel", "dtype"), FORWARD)
def test_ranges_are_clipped_to_the_slots(kernel: str, dtype: torch.dtype) -> None:
    case = media_case(dtype, media=2, nan=False)
    first = torch.tensor([[-3, 1, 2, 0]], dtype=torch.int32).expand(2, -1)
    last = torch.tensor([[0, 7, 5, -1]], dtype=torch.int32).expand(2, -1)
    clipped = MediaSpans(
        torch.tensor([[0, 1, 0, 0]], dtype=torch.int32).expand(2, -1),
        torch.tensor([[0, 1, -1, -1]], dtype=torch.int32).expand(2, -1),
    )
    case.q = case.q[:, :4]
    case.spans = MediaSpans(first, last)
    outside = run(case, kernel)
    case.spans = clipped
    assert torch.equal(outside, run(case, kernel))


@pytest.mark.parametrize(("kernel", "dtype"), FORWARD)
def test_a_decoding_step_beyond_the_slots_sees_nothing(kernel: str, dtype: torch.dtype) -> None:
    case = media_case(dtype, tokens=1, media=2, nan=False)
    beyond = torch.full((2, 1), 2, dtype=torch.int32)
    case.spans = MediaSpans(beyond, beyond, single_item=True)
    out = run(case, kernel)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("kernel", sorted({k for k, _ in FORWARD} - {"torch"}))
def test_opcheck(kernel: str) -> None:
    case = media_case(torch.float32)
    op = torch.ops.flamingo_kernels.media_attention_forward
    spans = case.spans
    arguments = (case.q, case.k, case.v, spans.first, spans.last, case.gate, 0.3, False, kernel)
    torch.library.opcheck(op.default, arguments)


@pytest.mark.slow
@any_form
@pytest.mark.parametrize("kernel", sorted({k for k, _ in TRAINING}))
def test_compile_fullgraph(kernel: str, form: str) -> None:
    """Forward and backward in one graph each, at most two over many lengths."""
    from torch._dynamo.testing import CompileCounterWithBackend  # imports Triton

    counter = CompileCounterWithBackend("aot_eager")

    def run_both(function, tokens: int) -> list[torch.Tensor]:
        case = media_case(torch.float32, tokens=tokens, nan=False, kv_heads=4).require_grad()
        ids = torch.randint(7, 10, case.q.shape[:2], generator=torch.Generator().manual_seed(0))
        out = function(case.q, case.k, case.v, ids, case.gate)
        return [out, *gradients(out, case, torch.ones_like(out))]

    def attend(q, k, v, ids, gate):
        spans = MediaSpans.from_tokens(ids, 9)
        if form == "keys":
            lengths = ids[:, :1] % 3 + torch.arange(k.shape[1])  # unequal items
            k, v = k.flatten(1, 2), v.flatten(1, 2)
            spans = plan_media_attention(KeyRanges.from_items(spans, lengths), k, kernel)
        return media_cross_attention(q, k, v, spans, gate, kernel=kernel)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for tokens in (2, 3, 5, 8, 13, 21):
        for ours, eager in zip(run_both(compiled, tokens), run_both(attend, tokens), strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: {"q": c.q[0]}, ValueError, r"q must be \[B, T, H, D\], got shape \(11, 4, 8\)"),
        (lambda c: {"k": c.k[:, :, 0]}, ValueError, r"k must be \[B, I, R, Hkv, D\]"),
        (lambda c: {"q": c.q.long()}, TypeError, "q must be .* tensor, got torch.int64"),
        (lambda c: {"k": c.k.float()}, TypeError, "one dtype, got torch.float64, torch.float32"),
        (lambda c: {"k": c.k.to("meta")}, ValueError, "one device, got cpu, meta"),
        (lambda c: {"q": c.q[:, :, :3]}, ValueError, "H=3, Hkv=2"),
        (lambda c: {"k": c.k[..., :4]}, ValueError, r"k has shape \(2, 3, 5, 2, 4\), expected"),
        (lambda c: {"v": c.v[:, :2]}, ValueError, r"v has shape \(2, 2, 5, 2, 8\), expected"),
        (lambda c: {"q": c.q[:, :7]}, ValueError, r"spans has shape \(2, 11\), expected \(2, 7\)"),
        (
            lambda c: {"spans": c.spans.first},
            TypeError,
            "spans must be MediaSpans or KeyRanges, got Ten",
        ),
        (lambda c: {"gate": torch.zeros(3)}, ValueError, r"gate must have 1 element"),
        (lambda c: {"gate": torch.zeros(1).long()}, TypeError, "gate must be .* got torch.int64"),
        (lambda c: {"gate": 0.5}, TypeError, "gate must be a floating point tensor, got float"),
        (lambda c: {"k": c.k[:, :, :0], "v": c.v[:, :, :0]}, ValueError, "latents R must be at"),
        (lambda c: {"kernel": "cuda"}, ValueError, "unknown kernel 'cuda'; known: auto, triton"),
        (lambda c: {"q": None}, TypeError, "q must be a floating point tensor, got None"),
        (lambda c: {"k": c.k.to_sparse()}, TypeError, r"k must be .* got layout torch\.sparse_coo"),
    ],
)
def test_bad_arguments(change, error: type[Exception], message: str) -> None:
    case = media_case()
    arguments = {"q": case.q, "k": case.k, "v": case.v, "spans": case.spans, **change(case)}
    with pytest.raises(error, match=message):
        media_cross_attention(**arguments)
