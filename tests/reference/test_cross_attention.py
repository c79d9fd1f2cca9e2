"""Gated cross-attention block: formula, gates, visibility, and padded media."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reference import GatedCrossAttentionBlock
from testing.budgets import assert_close_to_reference


@pytest.fixture
def make_block(make_config, scrambled):
    def make(**changes):
        config = make_config(**changes).cross_attention
        return scrambled(GatedCrossAttentionBlock(config, 12, 6))

    return make


FIRST = torch.tensor([[0, 0, 0, 1]])
LAST = torch.tensor([[-1, 0, 1, 1]])


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("media_norm", [True, False])
def test_block_is_its_formula(make_block, random64, gate, media_norm):
    block = make_block(gate=gate, media_norm=media_norm)
    x, media = random64(1, 4, 12), random64(1, 2, 3, 6)

    def norm(layer, y):
        return F.layer_norm(y, y.shape[-1:], layer.weight, layer.bias)

    def heads(y):
        return y.unflatten(-1, (2, 8)).transpose(0, 1)

    keys = media[0].flatten(0, 1)
    if media_norm:
        keys = norm(block.attn.norm_media, keys)
    item = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = (FIRST[0, 1:, None] <= item) & (item <= LAST[0, 1:, None])
    mixed = F.scaled_dot_product_attention(
        heads(norm(block.attn.norm, x[0, 1:]) @ block.attn.to_q.weight.T),
        heads(keys @ block.attn.to_kv.weight[:16].T),
        heads(keys @ block.attn.to_kv.weight[16:].T),
        attn_mask=mask,
    )
    attended = torch.zeros(4, 12, dtype=torch.float64)
    attended[1:] = mixed.transpose(0, 1).flatten(1) @ block.attn.to_out.weight.T
    y = x[0] + block.attn_gate.tanh() * attended
    hidden = F.relu(norm(block.ff[0], y) @ block.ff[1].weight.T) ** 2
    expected = y + block.ff_gate.tanh() * (hidden @ block.ff[3].weight.T)
    assert_close_to_reference(block(x, media, FIRST, LAST)[0], expected, torch.float64)


def test_gates_start_at_zero_and_then_nothing_changes(make_config, random64):
    for gate, size in (("scalar", 1), ("vector", 12)):
        config = make_config(gate=gate).cross_attention
        block = GatedCrossAttentionBlock(config, 12, 6).double()
        assert block.attn_gate.shape == block.ff_gate.shape == (size,)
        x = random64(1, 4, 12)
        assert torch.equal(block(x, random64(1, 2, 3, 6), FIRST, LAST), x)


def test_tokens_without_media(make_block, random64):
    x, media = random64(1, 4, 12), random64(1, 2, 3, 6)
    block = make_block(feed_forward_without_media=False)
    assert torch.equal(block(x, media, FIRST, LAST)[:, 0], x[:, 0])
    block.feed_forward_without_media = True
    out = block(x, media, FIRST, LAST)
    dense = x + block.ff_gate.tanh() * block.ff(x)
    assert_close_to_reference(out[:, 0], dense[:, 0], torch.float64)


def test_no_leak(make_block, random64):
    block = make_block()
    x, media = random64(1, 4, 12), random64(1, 2, 3, 6)
    jacobian = torch.autograd.functional.jacobian(lambda m: block(x, m, FIRST, LAST), media)
    for token in range(4):
        for item in range(2):
            influence = jacobian[0, token, :, 0, item]
            visible = bool(FIRST[0, token] <= item <= LAST[0, token])
            assert bool(influence.any()) == visible


@pytest.mark.parametrize("media_norm", [True, False])
def test_nan_in_unseen_media_changes_no_bit(make_block, random64, media_norm):
    block = make_block(media_norm=media_norm)
    x, media, upstream = random64(2, 4, 12), random64(2, 3, 3, 6), random64(2, 4, 12)
    first = torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]])
    last = torch.tensor([[-1, 0, 1, 1], [1, 2, 2, 2]])

    def run(media):
        out = block(x, media, first, last)
        return out, *torch.autograd.grad((out * upstream).sum(), list(block.parameters()))

    poisoned = media.clone()
    poisoned[0, 2] = poisoned[1, :2] = float("nan")
    for a, b in zip(run(media), run(poisoned), strict=True):
        assert torch.equal(a, b)


def test_no_media_at_all(make_block, random64):
    block, x = make_block(), random64(1, 4, 12)
    nowhere = torch.full((1, 4), -1)
    out = block(x, random64(1, 0, 3, 6), torch.zeros_like(nowhere), nowhere)
    dense = x + block.ff_gate.tanh() * block.ff(x)
    assert_close_to_reference(out, dense, torch.float64)


def test_parameter_names_and_shapes(make_block):
    shapes = {k: tuple(v.shape) for k, v in make_block().state_dict().items()}
    assert shapes == {
        "attn_gate": (1,),
        "ff_gate": (1,),
        "attn.norm.weight": (12,),
        "attn.norm.bias": (12,),
        "attn.norm_media.weight": (6,),
        "attn.norm_media.bias": (6,),
        "attn.to_q.weight": (16, 12),
        "attn.to_kv.weight": (32, 6),
        "attn.to_out.weight": (12, 16),
        "ff.0.weight": (12,),
        "ff.0.bias": (12,),
        "ff.1.weight": (24, 12),
        "ff.3.weight": (12, 24),
    }
    without = set(make_block(media_norm=False).state_dict())
    assert set(shapes) - without == {"attn.norm_media.weight", "attn.norm_media.bias"}


def test_gradients(make_block, random64):
    block = make_block(gate="vector")
    x, media = random64(1, 4, 12).requires_grad_(), random64(1, 2, 3, 6).requires_grad_()

    def run(x, media):
        return block(x, media, FIRST, LAST)

    assert torch.autograd.gradcheck(run, (x, media), fast_mode=True)


def test_unknown_gate(make_block):
    with pytest.raises(ValueError, match="gate is 'matrix', not scalar or vector"):
        make_block(gate="matrix")
