from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_kernels.language import (
    Decoder,
    DecoderCache,
    DecoderConfig,
    LanguageModel,
    LanguageModelCache,
    build_language_model,
)
from flamingo_kernels.language.decoder import RMSNorm, RotaryAngles, _visible_keys
from testing.budgets import assert_close_to_reference

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def small(**changes) -> DecoderConfig:
    values = {"vocab_size": 50, "dim": 24, "depth": 3, "heads": 2, "head_dim": 8}
    return DecoderConfig(**{**values, **changes})


def build(dtype: torch.dtype = torch.float64) -> Decoder:
    """A decoder with weights large enough that every part shows in the logits."""
    torch.manual_seed(0)
    decoder = Decoder(small())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.4)
    return decoder.to(dtype).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = tokens(len(rows), longest, seed=99)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_have_the_compute_dtype(dtype):
    output = build(dtype)(tokens(2, 5))
    assert output.logits.shape == (2, 5, 50)
    assert output.logits.dtype == dtype
    assert output.cache is None


def test_names_shapes_and_count_on_meta():
    config = small()
    with torch.device("meta"):
        decoder = build_language_model(config)
        assert decoder(torch.zeros(2, 5, dtype=torch.int64)).logits.shape == (2, 5, 50)
    block = {
        "attention_norm.weight": (24,),
        **{f"attention.to_{part}.weight": (16, 24) for part in "qkv"},
        "attention.to_out.weight": (24, 16),
        "feed_forward_norm.weight": (24,),
        "feed_forward.0.weight": (96, 24),
        "feed_forward.2.weight": (24, 96),
    }
    expected = {"token_embedding.weight": (50, 24), "final_norm.weight": (24,)}
    expected |= {f"blocks.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    assert {name: tuple(p.shape) for name, p in decoder.state_dict().items()} == expected
    assert isinstance(decoder, LanguageModel)
    assert (decoder.dim, decoder.num_blocks, decoder.vocab_size) == (24, 3, 50)


@pytest.mark.parametrize(
    "dim, depth, heads, billions",
    [(2048, 24, 16, 1.27), (4096, 32, 32, 6.57), (8192, 80, 64, 64.69)],
)
def test_chinchilla_counts(dim, depth, heads, billions):
    """12 dim^2 a block: one dim^2 less than Chinchilla's, whose positions have a projection."""
    with torch.device("meta"):
        decoder = Decoder(
            DecoderConfig(vocab_size=32000, dim=dim, depth=depth, heads=heads, head_dim=128)
        )
    count = sum(p.numel() for p in decoder.parameters())
    assert count == 12 * dim**2 * depth + 32000 * dim + (2 * depth + 1) * dim
    assert round(count / 1e9, 2) == billions


def test_one_token_by_hand():
    """A single token sees itself alone: attention is the identity on v, and rotation drops out."""
    decoder = build()
    token = 7
    x = decoder.token_embedding.weight[token]

    def norm(weight, x):
        return x * weight / (x.square().mean() + 1e-6).sqrt()

    for block in decoder.blocks:
        attention = block.attention
        attended = norm(block.attention_norm.weight, x)
        x = x + attention.to_out.weight @ (attention.to_v.weight @ attended)
        hidden = block.feed_forward[0].weight @ norm(block.feed_forward_norm.weight, x)
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + block.feed_forward[2].weight @ hidden
    expected = decoder.token_embedding.weight @ norm(decoder.final_norm.weight, x)
    assert_close_to_reference(
        decoder(torch.tensor([[token]])).logits[0, 0], expected, torch.float64, "logits"
    )


def test_attention_by_hand():
    """Rotation of half-split pairs, causal softmax, scale head_dim ** -0.5."""
    decoder = build()
    attention = decoder.blocks[0].attention
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    angles = RotaryAngles(torch.arange(4)[None], 8, 10000.0, torch.float64)
    actual = attention(x, angles, None, None, 0)
    query, key, value = (p(x)[0] for p in (attention.to_q, attention.to_k, attention.to_v))
    heads = []
    for head in range(2):
        columns = slice(8 * head, 8 * head + 8)
        pairs = [
            torch.complex(part[:, columns][:, :4], part[:, columns][:, 4:]) for part in (query, key)
        ]
        rates = 10000.0 ** (-2 * torch.arange(4, dtype=torch.float64) / 8)
        turn = torch.polar(torch.ones(4, 4).double(), torch.arange(4.0).double()[:, None] * rates)
        query_pairs, key_pairs = (part * turn for part in pairs)
        scores = (query_pairs @ key_pairs.conj().T).real / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ value[:, columns])
    expected = torch.cat(heads, dim=-1) @ attention.to_out.weight.T
    assert_close_to_reference(actual[0], expected, torch.float64, "attention")


def test_causal():
    decoder = build()
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 50
    first, second = decoder(ids).logits, decoder(changed).logits
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5:], second[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_rotation_are_computed_wide(dtype):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(1, 2, 6, 8).to(dtype)
    norm = RMSNorm(8, 1e-6).to(dtype)
    by_hand = x.to(wide) * (x.to(wide).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert_close_to_reference(norm(x).to(wide), by_hand.to(dtype).to(wide), wide, "norm")
    angles = RotaryAngles(torch.arange(1000, 1006)[None], 8, 10000.0, wide)
    rotated = angles.rotate(x)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, angles.rotate(x.to(wide)).to(dtype))


def test_fp32_is_close_to_fp64():
    ids = tokens(2, 12)
    decoder = build(torch.float32)
    logits = decoder(ids).logits
    assert_close_to_reference(logits, decoder.double()(ids).logits, torch.float32, "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_row_equals_the_row_alone(dtype, side):
    decoder = build(dtype)
    rows = [tokens(n, seed=n) for n in (9, 4, 1)]
    ids, mask = padded(rows, side)
    logits = decoder(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        alone = decoder(row[None]).logits[0]
        assert_close_to_reference(logits[i][mask[i].bool()], alone, dtype, f"row {i}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_any_token_are_finite(dtype):
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    decoder = build(dtype).requires_grad_(True)
    logits = decoder(tokens(2, 3), attention_mask=mask).logits
    assert logits.isfinite().all()
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_every_token_sees_at_least_itself():
    """Attention backends differ in what they give for a row without any key."""
    visible = _visible_keys(torch.arange(4), 1, torch.tensor([[0, 0, 0, 1], [1, 0, 1, 1]]))
    assert visible[:, 0].int().tolist() == [
        [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_other_rows_hold_changes_no_bit(dtype):
    decoder = build(dtype)
    ids, mask = padded([tokens(n, seed=n) for n in (7, 5, 6)], "left")
    first = decoder(ids, attention_mask=mask).logits
    other_ids, other_mask = padded([tokens(n, seed=n + 10) for n in (3, 7, 1)], "left")
    other_ids[1], other_mask[1] = ids[1], mask[1]
    second = decoder(other_ids, attention_mask=other_mask).logits
    assert torch.equal(first[1], second[1])


def test_padding_content_changes_no_bit():
    decoder = build()
    ids, mask = padded([tokens(4), tokens(7)], "left")
    changed = torch.where(mask.bool(), ids, (ids + 1) % 50)
    real = mask.bool()
    assert torch.equal(decoder(ids, mask).logits[real], decoder(changed, mask).logits[real])


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right", None]),
    cuts=st.sets(st.integers(1, 8)),
)
def test_chunks_with_a_cache_equal_one_shot(lengths, side, cuts):
    decoder = build()
    if side is None:
        ids, mask = tokens(len(lengths), max(lengths)), None
    else:
        ids, mask = padded([tokens(n, seed=n) for n in lengths], side)
    expected = decoder(ids, attention_mask=mask).logits
    edges = [0, *sorted(cut for cut in cuts if cut < ids.shape[1]), ids.shape[1]]
    cache, chunks = None, []
    with torch.no_grad():
        for start, end in itertools.pairwise(edges):
            output = decoder(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                cache=cache,
                use_cache=True,
            )
            cache = output.cache
            chunks.append(output.logits)
    assert cache.length == ids.shape[1]
    real = slice(None) if mask is None else mask.bool()
    assert_close_to_reference(torch.cat(chunks, 1)[real], expected[real], torch.float64, "logits")


def test_cache_is_the_same_object_extended_in_place():
    decoder = build()
    cache = decoder(tokens(2, 3), use_cache=True).cache
    assert isinstance(cache, DecoderCache)
    assert isinstance(cache, LanguageModelCache)
    assert decoder(tokens(2, 2), cache=cache).cache is cache
    assert cache.length == 5


def test_cache_grows_by_doubling():
    decoder = build()
    cache = None
    capacities = []
    with torch.no_grad():
        for _ in range(20):
            cache = decoder(tokens(1, 1), cache=cache, use_cache=True).cache
            capacities.append(cache._blocks[0][0].shape[2])
    assert capacities == [1, 2] + [4] * 2 + [8] * 4 + [16] * 8 + [32] * 4


def test_gradients_flow_through_a_cache():
    decoder = build()
    ids = tokens(2, 6)
    decoder(ids).logits.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    first = decoder(ids[:, :4], use_cache=True)
    second = decoder(ids[:, 4:], cache=first.cache)
    (first.logits.square().sum() + second.logits.square().sum()).backward()
    for name, parameter in decoder.named_parameters():
        assert_close_to_reference(parameter.grad, expected[name], torch.float64, name)


def test_index_select_forks_the_cache():
    decoder = build()
    ids = tokens(3, 5)
    rows = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        cache = decoder(ids, use_cache=True).cache
        decoder(tokens(3, 1), cache=cache)  # leaves spare room in the buffers
        held = decoder(ids, use_cache=True).cache
        for source, prefix in ((cache, torch.cat((ids, tokens(3, 1)), 1)), (held, ids)):
            fork = source.index_select(rows)
            new = tokens(4, 2, seed=5)
            logits = decoder(new, cache=fork).logits
            expected = decoder(torch.cat((prefix[rows], new), 1)).logits[:, -2:]
            assert_close_to_reference(logits, expected, torch.float64, "fork")
            assert source.length == prefix.shape[1]
            more = tokens(3, 2, seed=6)
            logits = decoder(more, cache=source).logits
            expected = decoder(torch.cat((prefix, more), 1)).logits[:, -2:]
            assert_close_to_reference(logits, expected, torch.float64, "original")


def test_a_failed_forward_leaves_the_cache_usable():
    decoder = build()
    ids, new = tokens(2, 4), tokens(2, 2, seed=1)

    def fail(i, hidden):
        if i == 2:
            raise KeyboardInterrupt
        return hidden

    with torch.no_grad():
        cache = decoder(ids, use_cache=True).cache
        with pytest.raises(KeyboardInterrupt):
            decoder(tokens(2, 3, seed=2), cache=cache, before_block=fail)
        assert cache.length == 4
        logits = decoder(new, cache=cache).logits
    expected = decoder(torch.cat((ids, new), 1)).logits[:, 4:]
    assert_close_to_reference(logits, expected, torch.float64, "logits")


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_before_block_changes_no_bit(dtype):
    decoder = build(dtype)
    seen = []

    def identity(i, hidden):
        seen.append((i, tuple(hidden.shape)))
        return hidden

    ids, mask = padded([tokens(5), tokens(3)], "left")
    plain = decoder(ids, attention_mask=mask).logits
    hooked = decoder(ids, attention_mask=mask, before_block=identity).logits
    assert torch.equal(plain, hooked)
    assert seen == [(i, (2, 5, 24)) for i in range(3)]


def test_before_block_replaces_the_input_of_its_block():
    decoder = build()
    ids = tokens(1, 4)
    other = tokens(1, 4, seed=1)
    logits = decoder(
        ids, before_block=lambda i, x: decoder.token_embedding(other) if i == 0 else x
    ).logits
    assert torch.equal(logits, decoder(other).logits)


def test_gradcheck_through_before_block():
    decoder = build()
    delta = torch.randn(1, 3, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 1]])

    def logits(delta):
        return decoder(
            tokens(1, 3), attention_mask=mask, before_block=lambda i, x: x + delta
        ).logits

    assert torch.autograd.gradcheck(logits, delta, fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_inputs(shape):
    decoder = build()
    output = decoder(tokens(*shape), use_cache=True)
    assert output.logits.shape == (*shape, 50)
    mask = torch.ones(shape, dtype=torch.int64)
    assert decoder(tokens(*shape), attention_mask=mask).logits.shape == (*shape, 50)


def test_an_empty_chunk_leaves_the_cache_alone():
    decoder = build()
    with torch.no_grad():
        cache = decoder(tokens(2, 3), use_cache=True).cache
        assert decoder(tokens(2, 0), cache=cache).logits.shape == (2, 0, 50)
    assert cache.length == 3


def test_errors():
    decoder = build()
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], got shape \(3,\)"):
        decoder(tokens(3))
    with pytest.raises(TypeError, match=r"input_ids must be int64 or int32, got torch.float32"):
        decoder(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"= \(2, 3\), got shape \(2, 4\)"):
        decoder(tokens(2, 3), attention_mask=torch.ones(2, 4))
    cache = decoder(tokens(2, 3), attention_mask=torch.ones(2, 3), use_cache=True).cache
    with pytest.raises(ValueError, match=r"3 tokens read under an attention_mask: .* the 1 new"):
        decoder(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, input_ids has 4"):
        decoder(tokens(4, 1), attention_mask=torch.ones(4, 4), cache=cache)


def test_config_round_trips_through_json():
    values = json.loads(json.dumps(dataclasses.asdict(small())))
    assert values.pop("kind") == "decoder"
    assert DecoderConfig(**values) == small()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
        ({"norm_eps": -1.0}, "norm_eps must be positive, got -1.0"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_build_refuses_an_unknown_kind():
    class Unknown:
        kind = "rnn"

    with pytest.raises(ValueError, match="unknown language kind 'rnn'; known: decoder, hugg"):
        build_language_model(Unknown())
