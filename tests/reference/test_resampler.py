"""Resampler: temporal interpolation, clip lengths, names, and its formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reference import PerceiverResampler
from reference.resampler import frame_embedding
from testing.budgets import assert_close_to_reference


@pytest.fixture
def resampler(make_config, scrambled):
    return scrambled(PerceiverResampler(make_config().resampler))


def test_temporal_table_at_its_trained_length_is_read_unchanged(random64):
    table = random64(8, 4)
    read = torch.stack([frame_embedding(table, f, 8) for f in range(8)])
    assert torch.equal(read, table)


def test_temporal_interpolation_by_hand():
    table = torch.tensor([[0.0], [10.0], [40.0]], dtype=torch.float64)
    five = [frame_embedding(table, f, 5).item() for f in range(5)]
    assert five == [0.0, 5.0, 10.0, 25.0, 40.0]
    assert [frame_embedding(table, f, 2).item() for f in range(2)] == [0.0, 40.0]
    assert frame_embedding(table, 0, 1).item() == 0.0
    assert frame_embedding(table[:1], 3, 4).item() == 0.0


@pytest.mark.parametrize("frames", [2, 8, 30])
def test_temporal_interpolation_equals_torch(random64, frames):
    table = random64(8, 4)
    read = torch.stack([frame_embedding(table, f, frames) for f in range(frames)])
    expected = F.interpolate(table.T[None], frames, mode="linear", align_corners=True)[0].T
    assert_close_to_reference(read, expected, torch.float64)


def test_one_layer_is_its_formula(make_config, scrambled, random64):
    config = make_config().resampler
    config.depth, config.final_norm = 1, True
    model = scrambled(PerceiverResampler(config))
    features = random64(1, 2, 3, 128)
    attention, ff = model.layers[0]

    def norm(layer, x):
        return F.layer_norm(x, (32,), layer.weight, layer.bias)

    def heads(x):
        return x.unflatten(-1, (2, 16)).transpose(0, 1)

    x = features[0] @ model.input_projection.weight.T + model.frame_embs[[0, 2]][:, None]
    x, latents = norm(attention.norm_media, x.flatten(0, 1)), model.latents
    query = norm(attention.norm_latents, latents)
    keys = torch.cat([x, query]) @ attention.to_kv.weight[:32].T
    values = torch.cat([x, query]) @ attention.to_kv.weight[32:].T
    mixed = F.scaled_dot_product_attention(
        heads(query @ attention.to_q.weight.T), heads(keys), heads(values)
    )
    latents = latents + mixed.transpose(0, 1).flatten(1) @ attention.to_out.weight.T
    hidden = F.relu(norm(ff[0], latents) @ ff[1].weight.T) ** 2
    expected = norm(model.norm, latents + hidden @ ff[3].weight.T)
    assert_close_to_reference(model(features)[0], expected, torch.float64)


def test_shorter_clip_equals_the_clip_alone_and_ignores_nan(resampler, random64):
    features = random64(2, 3, 2, 128)
    features[1, 2:] = float("nan")
    together = resampler(features, torch.tensor([3, 2]))
    assert torch.equal(together[:1], resampler(features[:1]))
    assert torch.equal(together[1:], resampler(features[1:, :2]))
    for gradient in torch.autograd.grad(together.sum(), list(resampler.parameters())):
        assert gradient.isfinite().all()


def test_frame_order_matters_only_with_temporal_embeddings(make_config, scrambled, random64):
    config = make_config().resampler
    features = random64(1, 3, 2, 128)
    model = scrambled(PerceiverResampler(config))
    assert not torch.allclose(model(features), model(features.flip(1)))
    config.max_num_frames = None
    model = scrambled(PerceiverResampler(config))
    assert_close_to_reference(model(features.flip(1)), model(features), torch.float64)


def test_any_number_of_frames(resampler, random64):
    for frames in (1, 2, 3, 7):
        assert resampler(random64(2, frames, 2, 128)).shape == (2, 4, 32)
    assert resampler(random64(0, 1, 2, 128)).shape == (0, 4, 32)


def test_parameter_names_and_shapes(make_config):
    config = make_config().resampler
    config.depth, config.final_norm = 1, True
    shapes = {k: tuple(v.shape) for k, v in PerceiverResampler(config).state_dict().items()}
    vector = (32,)
    assert shapes == {
        "latents": (4, 32),
        "frame_embs": (3, 32),
        "input_projection.weight": (32, 128),
        "layers.0.0.norm_media.weight": vector,
        "layers.0.0.norm_media.bias": vector,
        "layers.0.0.norm_latents.weight": vector,
        "layers.0.0.norm_latents.bias": vector,
        "layers.0.0.to_q.weight": (32, 32),
        "layers.0.0.to_kv.weight": (64, 32),
        "layers.0.0.to_out.weight": (32, 32),
        "layers.0.1.0.weight": vector,
        "layers.0.1.0.bias": vector,
        "layers.0.1.1.weight": (64, 32),
        "layers.0.1.3.weight": (32, 64),
        "norm.weight": vector,
        "norm.bias": vector,
    }
    config.max_num_frames = config.input_dim = None
    config.final_norm = False
    optional = {"frame_embs", "input_projection.weight", "norm.weight", "norm.bias"}
    assert set(PerceiverResampler(config).state_dict()) == set(shapes) - optional


def test_gradients(make_config, scrambled, random64):
    config = make_config().resampler
    config.dim = config.input_dim = config.head_dim = 4
    config.depth = 1
    model = scrambled(PerceiverResampler(config))
    assert torch.autograd.gradcheck(model, random64(1, 2, 2, 4).requires_grad_())


@pytest.mark.parametrize("frames", [0, 4])
def test_frame_count_out_of_range(resampler, random64, frames):
    with pytest.raises(ValueError, match=rf"num_frames\[0\] is {frames}, outside \[1, 3\]"):
        resampler(random64(1, 3, 2, 128), torch.tensor([frames]))
