"""The two attention ops against hand-worked cases and an independent formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from reference import key_range_attention, latent_attention, media_cross_attention
from reference.attention import softmax
from testing.budgets import assert_close_to_reference


def spans(*ranges):
    """One row of ranges, as first and last ``[1, T]``."""
    first, last = zip(*ranges, strict=True)
    return torch.tensor([first]), torch.tensor([last])


def test_softmax_of_known_scores():
    scores = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    expected = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert_close_to_reference(softmax(scores), expected, torch.float64)


def test_softmax_without_a_visible_key_is_zero_with_zero_gradient(random64):
    scores = random64(2, 3).requires_grad_()
    visible = torch.tensor([[False, False, False], [True, False, False]])
    weights = softmax(scores, visible)
    assert torch.equal(weights, torch.tensor([[0.0, 0, 0], [1, 0, 0]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad((weights * random64(2, 3)).sum(), scores)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_one_key_returns_its_value_exactly(random64):
    q, k, v = random64(1, 2, 2, 4), random64(1, 1, 1, 2, 4), random64(1, 1, 1, 2, 4)
    out = media_cross_attention(q, k, v, *spans((0, 0), (0, 0)))
    assert torch.equal(out, v[:, 0].expand(1, 2, 2, 4))


def test_equal_keys_average_their_values(random64):
    q = random64(1, 1, 1, 4)
    k = random64(1, 1, 1, 1, 4).expand(1, 2, 1, 1, 4)
    v = torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 4)
    out = media_cross_attention(q, k, v, *spans((0, 1)))
    assert torch.equal(out, torch.full_like(out, 2.0))


def test_hand_worked_weights_scale_and_gate():
    # Scores 0 and ln 3 weigh the values 4 and 8 by 1/4 and 3/4: 7; tanh(ln 2) = 3/5.
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, 2.0 * math.log(3.0)], dtype=torch.float64).reshape(1, 1, 2, 1, 1)
    v = torch.tensor([4.0, 8.0], dtype=torch.float64).reshape(1, 1, 2, 1, 1)
    gate = torch.tensor(math.log(2.0), dtype=torch.float64)
    out = media_cross_attention(q, k, v, *spans((0, 0)), gate=gate, scale=0.5)
    expected = torch.tensor(7.0 * 3.0 / 5.0, dtype=torch.float64).reshape(1, 1, 1, 1)
    assert_close_to_reference(out, expected, torch.float64)


def test_default_scale_is_the_inverse_root_of_the_head_dim(random64):
    q, k, v = random64(1, 3, 2, 16), random64(1, 1, 5, 2, 16), random64(1, 1, 5, 2, 16)
    ranges = spans((0, 0), (0, 0), (0, 0))
    out = media_cross_attention(q, k, v, *ranges)
    assert torch.equal(out, media_cross_attention(q, k, v, *ranges, scale=0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_media_attention_equals_masked_sdpa(random64, dtype, kv_heads):
    items, latents, heads = 3, 5, 4
    q, k, v = (
        random64(*shape).to(dtype)
        for shape in ((2, 6, heads, 8), *[(2, items, latents, kv_heads, 8)] * 2)
    )
    first = torch.tensor([[0, 0, 1, 1, 0, -2], [2, 2, 0, 1, 0, 1]])
    last = torch.tensor([[0, 1, 1, 2, 2, 0], [2, 5, 0, 2, 1, 1]])
    out = media_cross_attention(q, k, v, first, last)

    item = torch.arange(items).repeat_interleave(latents)
    mask = (first[..., None] <= item) & (item <= last[..., None])
    expanded = [
        x.flatten(1, 2).repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for x in (k, v)
    ]
    expected = scaled_dot_product_attention(q.transpose(1, 2), *expanded, attn_mask=mask[:, None])
    assert_close_to_reference(out, expected.transpose(1, 2), dtype)


def test_ranges_are_clipped(random64):
    q, k, v = random64(1, 3, 1, 4), random64(1, 2, 3, 1, 4), random64(1, 2, 3, 1, 4)
    out = media_cross_attention(q, k, v, *spans((-3, 0), (1, 9), (2, 9)))
    expected = media_cross_attention(q, k, v, *spans((0, 0), (1, 1), (0, -1)))
    assert torch.equal(out, expected)
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))


def test_empty_ranges_give_exact_zeros_and_zero_gradients(random64):
    q, k, v, gate = (
        x.requires_grad_() for x in (random64(1, 2, 2, 4), *random64(2, 1, 2, 3, 2, 4), random64(1))
    )
    upstream = random64(1, 2, 2, 4)
    upstream[:, 0] = float("nan")
    out = media_cross_attention(q, k, v, *spans((0, -1), (1, 1)), gate=gate)
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
    d_q, d_k, d_v, d_gate = torch.autograd.grad((out * upstream).sum(), (q, k, v, gate))
    for gradient in (d_q[:, 0], d_k[:, 0], d_v[:, 0]):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    for gradient in (d_q[:, 1], d_k[:, 1], d_v[:, 1], d_gate):
        assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("shape", [(1, 0, 3, 1, 4), (1, 2, 0, 1, 4), (1, 2, 3, 1, 4)])
def test_nothing_visible_at_all_still_has_gradients(random64, shape):
    inputs = [
        x.requires_grad_() for x in (random64(1, 2, 1, 4), random64(*shape), random64(*shape))
    ]
    first, last = spans((0, -1), (0, -1)) if shape[2] == 3 else spans((0, 0), (0, 1))
    out = media_cross_attention(*inputs, first, last, gate=torch.ones(()))
    assert torch.equal(out, torch.zeros_like(out))
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_nan_in_unseen_media_changes_no_bit(random64):
    q, k, v, upstream = random64(2, 3, 2, 4), *random64(2, 2, 3, 5, 2, 4), random64(2, 3, 2, 4)
    first = torch.tensor([[0, 0, 0], [2, 2, 2]])
    last = torch.tensor([[-1, 0, 1], [2, 2, 1]])
    unseen = torch.zeros(2, 3, 5, 2, 4, dtype=torch.bool)
    unseen[0, 2] = unseen[1, :2] = True

    def run(keys, values):
        inputs = [x.clone().requires_grad_() for x in (q, keys, values)]
        out = media_cross_attention(*inputs, first, last)
        return out, *torch.autograd.grad((out * upstream).sum(), inputs)

    poison = float("nan")
    clean = run(k, v)
    poisoned = run(k.masked_fill(unseen, poison), v.masked_fill(unseen, poison))
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


def test_media_attention_gradients(random64):
    inputs = [
        x.requires_grad_()
        for x in (
            random64(1, 3, 2, 2),
            random64(1, 2, 2, 1, 2),
            random64(1, 2, 2, 1, 2),
            random64(1),
        )
    ]
    ranges = spans((0, -1), (0, 0), (0, 1))

    def op(q, k, v, gate):
        return media_cross_attention(q, k, v, *ranges, gate=gate)

    assert torch.autograd.gradcheck(op, inputs)


def test_key_ranges_equal_masked_sdpa(random64):
    """Falling, overlapping, clipped and empty ranges, and keys with NaN (semantics, point 19)."""
    q, k, v, upstream = random64(1, 7, 4, 8), *random64(2, 1, 9, 2, 8), random64(1, 7, 4, 8)
    start = torch.tensor([[6, 0, -2, 1, 4, 7, 9]])
    stop = torch.tensor([[12, 3, 2, 3, 4, 5, 12]])
    key = torch.arange(9)
    mask = (start[..., None] <= key) & (key < stop[..., None])  # none sees keys 3 to 5
    results = []
    for poison in (float("nan"), 0.0):
        k[:, 3:6] = v[:, 3:6] = poison
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if poison == 0:
            query, keys, values = (x.transpose(1, 2) for x in inputs)
            expanded = [x.repeat_interleave(2, 1) for x in (keys, values)]
            sdpa = scaled_dot_product_attention(query, *expanded, attn_mask=mask[:, None])
            out = sdpa.transpose(1, 2).masked_fill(~mask.any(-1)[..., None, None], 0)
        else:
            out = key_range_attention(*inputs, start, stop)
            assert not out[:, 4:].any()
        results.append((out, *torch.autograd.grad((out * upstream).sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        assert_close_to_reference(actual, expected, torch.float64)


def test_items_are_ranges_of_their_keys_and_documents_can_be_packed(random64):
    q, k, v = random64(1, 4, 2, 8), *random64(2, 1, 3, 5, 2, 8)
    ranges = (torch.tensor([[0, 1, 0, 2]]), torch.tensor([[0, 2, -1, 2]]))
    items = media_cross_attention(q, k, v, *ranges)
    keys = [x.flatten(1, 2) for x in (k, v)]
    start, stop = torch.tensor([[0, 5, 0, 10]]), torch.tensor([[5, 15, 0, 15]])
    assert torch.equal(key_range_attention(q, *keys, start, stop), items)
    twice = [torch.cat((x, x), 1) for x in (q, *keys, start, stop)]
    for bound in twice[3:]:
        bound[:, 4:] += 15
    assert torch.equal(key_range_attention(*twice), torch.cat((items, items), 1))


def test_heads_must_divide(random64):
    with pytest.raises(ValueError, match="2 key/value heads do not divide 3 query heads"):
        media_cross_attention(
            random64(1, 1, 3, 4), random64(1, 1, 1, 2, 4), random64(1, 1, 1, 2, 4), *spans((0, 0))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latent_attention_equals_sdpa_on_the_concatenation(random64, dtype):
    N, L, M, H, D = 3, 4, 6, 2, 8
    q, k_latents, v_latents = random64(3, N, L, H, D).to(dtype)
    k_media, v_media = random64(2, N, M, H, D).to(dtype)
    lengths = torch.tensor([6, 0, 3])
    out = latent_attention(q, k_media, v_media, k_latents, v_latents, lengths)
    visible = torch.ones(N, M + L, dtype=torch.bool)
    for n, length in enumerate(lengths.tolist()):
        visible[n, length:M] = False
    expected = scaled_dot_product_attention(
        q.transpose(1, 2),
        torch.cat([k_media, k_latents], 1).transpose(1, 2),
        torch.cat([v_media, v_latents], 1).transpose(1, 2),
        attn_mask=visible[:, None, None],
    ).transpose(1, 2)
    assert_close_to_reference(out, expected, dtype)


def test_latent_attention_on_one_latent_and_no_media_is_its_value(random64):
    q, k_latents, v_latents = random64(3, 2, 1, 2, 4)
    k_media, v_media = random64(2, 2, 3, 2, 4)
    lengths = torch.zeros(2, dtype=torch.int32)
    assert torch.equal(
        latent_attention(q, k_media, v_media, k_latents, v_latents, lengths), v_latents
    )


def test_nan_past_the_length_changes_no_bit(random64):
    q, k_latents, v_latents, upstream = random64(4, 2, 3, 2, 4)
    k_media, v_media = random64(2, 2, 5, 2, 4)
    lengths = torch.tensor([2, 5])
    beyond = torch.zeros(2, 5, 2, 4, dtype=torch.bool)
    beyond[0, 2:] = True

    def run(keys, values):
        inputs = [x.clone().requires_grad_() for x in (q, keys, values, k_latents, v_latents)]
        out = latent_attention(*inputs, lengths)
        return out, *torch.autograd.grad((out * upstream).sum(), inputs)

    poison = float("nan")
    clean = run(k_media, v_media)
    poisoned = run(k_media.masked_fill(beyond, poison), v_media.masked_fill(beyond, poison))
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


def test_latent_attention_gradients(random64):
    inputs = [x.requires_grad_() for x in (random64(2, 2, 1, 2), *random64(2, 2, 3, 1, 2))]
    inputs += [x.requires_grad_() for x in random64(2, 2, 2, 1, 2)]
    lengths = torch.tensor([3, 1])
    assert torch.autograd.gradcheck(lambda *x: latent_attention(*x, lengths), inputs)


def test_latent_attention_of_no_items(random64):
    latents, media = random64(0, 2, 1, 4), random64(0, 3, 1, 4)
    assert latent_attention(latents, media, media, latents, latents).shape == (0, 2, 1, 4)


@pytest.mark.parametrize("length", [-1, 4])
def test_length_out_of_range(random64, length):
    latents, media = random64(1, 2, 1, 4), random64(1, 3, 1, 4)
    with pytest.raises(ValueError, match=rf"lengths\[0\] is {length}, outside \[0, 3\]"):
        latent_attention(latents, media, media, latents, latents, torch.tensor([length]))
