"""Decoder: rotary positions, causality, padding, tied embedding."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from reference import Decoder
from reference.decoder import DecoderBlock, rotary, token_positions
from testing.budgets import assert_close_to_reference


@pytest.fixture
def decoder(make_config, scrambled):
    return scrambled(Decoder(make_config().language))


TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5]])


def test_rotary_by_hand():
    # D = 2 is one pair turned by its position; at pi/2 the pair (1, 2) becomes (-2, 1).
    x = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 2).expand(1, 2, 1, 2)
    out = rotary(x, torch.tensor([[0, 1]]), 10000.0)[0, :, 0]
    cos, sin = math.cos(1.0), math.sin(1.0)
    expected = [[1.0, 2.0], [cos - 2.0 * sin, 2.0 * cos + sin]]
    assert_close_to_reference(out, torch.tensor(expected, dtype=torch.float64), torch.float64)


def test_rotary_pairs_halves_with_falling_frequencies():
    # Unit i turns into itself and unit i + D/2, by the angle position * theta ** (-2 i / D).
    position, theta, dim = 3, 100.0, 4
    for i, frequency in enumerate((1.0, 0.1)):
        x = torch.zeros(1, 1, 1, dim, dtype=torch.float64)
        x[..., i] = 1.0
        expected = torch.zeros(dim, dtype=torch.float64)
        expected[i] = math.cos(position * frequency)
        expected[i + dim // 2] = math.sin(position * frequency)
        out = rotary(x, torch.tensor([[position]]), theta)[0, 0, 0]
        assert_close_to_reference(out, expected, torch.float64)


def test_rotary_scores_depend_on_distance_only(random64):
    q, k = random64(2, 1, 1, 2, 16)

    def score(at_q, at_k):
        turned = [rotary(x, torch.tensor([[at]]), 10000.0) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum(-1)

    assert_close_to_reference(score(12, 7), score(5, 0), torch.float64)
    assert not torch.allclose(score(12, 7), score(6, 0))


def test_positions_skip_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert token_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_block_is_its_formula(make_config, scrambled, random64):
    config = make_config().language
    block = scrambled(DecoderBlock(config))
    x = random64(1, 5, 32)
    attention = block.attention
    normed = F.rms_norm(x, (32,), block.attention_norm.weight, 1e-6)
    angles = torch.arange(5, dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(0, 16, 2, dtype=torch.float64) / 16
    )
    turn = torch.polar(torch.ones_like(angles), angles)

    def heads(weight, rotate):
        y = (normed @ weight.T).unflatten(-1, (2, 16)).transpose(1, 2)
        if rotate:
            y = torch.complex(y[..., :8].contiguous(), y[..., 8:].contiguous()) * turn
            y = torch.cat([y.real, y.imag], -1)
        return y

    mixed = F.scaled_dot_product_attention(
        heads(attention.to_q.weight, True),
        heads(attention.to_k.weight, True),
        heads(attention.to_v.weight, False),
        is_causal=True,
    )
    y = x + mixed.transpose(1, 2).flatten(2) @ attention.to_out.weight.T
    hidden = F.rms_norm(y, (32,), block.feed_forward_norm.weight, 1e-6)
    hidden = F.gelu(hidden @ block.feed_forward[0].weight.T)
    expected = y + hidden @ block.feed_forward[2].weight.T
    mask = torch.ones(1, 5, dtype=torch.long)
    assert_close_to_reference(block(x, mask), expected, torch.float64)


def test_causal(decoder):
    changed = TOKENS.clone()
    changed[0, 4:] = 7
    assert torch.equal(decoder(changed)[:, :4], decoder(TOKENS)[:, :4])


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(decoder, left):
    padding = torch.zeros(1, 3, dtype=torch.long)
    ones = torch.ones_like(TOKENS)
    order = (lambda a, b: (a, b)) if left else (lambda a, b: (b, a))
    input_ids = torch.cat(order(padding, TOKENS), 1)
    mask = torch.cat(order(padding, ones), 1)
    logits = decoder(input_ids, mask)
    assert logits.isfinite().all()
    real = logits[:, 3:] if left else logits[:, :6]
    assert_close_to_reference(real, decoder(TOKENS), torch.float64)


def test_embedding_is_tied(decoder):
    names = set(decoder.state_dict())
    assert "token_embedding.weight" in names
    assert not any("bias" in name or "head" in name for name in names)
    x = decoder.token_embedding(TOKENS)
    for block in decoder.blocks:
        x = block(x, torch.ones_like(TOKENS))
    normed = F.rms_norm(x, (32,), decoder.final_norm.weight, 1e-6)
    expected = F.linear(normed, decoder.token_embedding.weight)
    assert_close_to_reference(decoder(TOKENS), expected, torch.float64)


def test_parameter_names(make_config):
    config = make_config().language
    config.depth = 1
    assert set(Decoder(config).state_dict()) == {
        "token_embedding.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.to_q.weight",
        "blocks.0.attention.to_k.weight",
        "blocks.0.attention.to_v.weight",
        "blocks.0.attention.to_out.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward.0.weight",
        "blocks.0.feed_forward.2.weight",
        "final_norm.weight",
    }


def test_gradients(make_config, scrambled, random64):
    config = make_config().language
    config.dim, config.head_dim = 6, 4
    block = scrambled(DecoderBlock(config))
    mask = torch.tensor([[0, 1, 1]])
    x = random64(1, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block(x, mask), x)
