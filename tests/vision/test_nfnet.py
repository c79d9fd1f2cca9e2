from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from flamingo_kernels.vision import (
    NFNET_VARIANTS,
    NFNet,
    NFNetConfig,
    VisionEncoder,
    build_vision_encoder,
)
from flamingo_kernels.vision.config import ACTIVATION_GAINS
from flamingo_kernels.vision.nfnet import ScaledActivation, ScaledStdConv2d, SqueezeExcite
from testing.budgets import assert_close_to_reference

SMALL = {"image_size": 32, "widths": (16, 32), "depths": (2, 1), "stem_width": 16, "group_width": 8}


def small(**changes) -> NFNetConfig:
    return NFNetConfig(**{**SMALL, **changes})


def open_encoder(dtype: torch.dtype = torch.float32, **changes) -> NFNet:
    """A small encoder whose residual branches, closed at initialisation, take part."""
    torch.manual_seed(0)
    encoder = NFNet(small(**changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("skipinit_gain"):
                parameter.fill_(0.7)
            elif name.endswith(("gain", "bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def test_f6_has_the_paper_count_and_features():
    with torch.device("meta"):
        encoder = NFNet(NFNetConfig.from_variant("F6", image_size=320))
        features = encoder(torch.empty(2, 3, 320, 320))
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == 435.3
    assert features.shape == (2, 100, 3072)


@pytest.mark.parametrize("variant", NFNET_VARIANTS)
def test_variant_depths_are_multiples_of_f0(variant):
    factor = int(variant[1:]) + 1
    config = NFNetConfig.from_variant(variant)
    assert config.depths == tuple(factor * depth for depth in NFNET_VARIANTS["F0"].depths)
    assert config.image_size == NFNET_VARIANTS[variant].train_size
    assert config.output_dim == 3072


def test_names_are_those_of_timm():
    names = set(dict(open_encoder().named_parameters()))
    for prefix in (
        *(f"stem.conv{i}" for i in range(1, 5)),
        *(f"stages.1.0.{conv}" for conv in ("downsample.conv", "conv1", "conv2", "conv2b")),
        "stages.1.0.conv3",
        "final_conv",
    ):
        for parameter in ("weight", "bias", "gain"):
            names.discard(f"{prefix}.{parameter}")
            assert f"{prefix}.{parameter}" in dict(open_encoder().named_parameters())
    assert {"stages.0.1.skipinit_gain", "stages.0.1.attn_last.fc1.weight"} <= names
    assert not any(name.startswith(("head", "stages.0.1.downsample")) for name in names)


@pytest.mark.parametrize("side, grid", [(32, 4), (33, 5), (40, 5), (7, 1)])
def test_output_grid_rounds_up(side, grid):
    encoder = open_encoder()
    assert encoder(torch.randn(1, 3, side, 2 * side)).shape == (
        1,
        grid * math.ceil(2 * side / 8),
        encoder.output_dim,
    )


def test_four_stages_have_stride_32():
    encoder = NFNet(small(widths=(16, 16, 32, 32), depths=(1, 1, 1, 1)))
    assert encoder(torch.randn(2, 3, 64, 96)).shape == (2, 2 * 3, 64)


def test_features_are_the_grid_row_by_row():
    encoder = open_encoder().eval()
    images = torch.randn(1, 3, 32, 48)
    grid = encoder.final_act(encoder.final_conv(encoder.stages(encoder.stem(images))))
    row, column = 2, 3
    assert torch.equal(encoder(images)[0, row * 6 + column], grid[0, :, row, column])


def test_standardised_weight():
    convolution = ScaledStdConv2d(6, 4, 3, groups=2).double()
    with torch.no_grad():
        convolution.weight.add_(1.0)
        convolution.gain.copy_(torch.tensor([1.0, 2.0, 0.5, 0.0]).view(4, 1, 1, 1))
    applied = convolution.standardised_weight().flatten(1)
    raw = convolution.weight.detach().flatten(1)
    fan_in = 3 * 3 * 3
    for gain, weight, result in zip((1.0, 2.0, 0.5, 0.0), raw, applied, strict=True):
        variance = ((weight - weight.mean()) ** 2).mean()
        expected = gain * (weight - weight.mean()) / ((variance + 1e-5) * fan_in).sqrt()
        assert_close_to_reference(result, expected, torch.float64, "filter")


def test_same_padding_puts_the_odd_pixel_right_and_below():
    convolution = ScaledStdConv2d(1, 1, 3, stride=2)
    even, odd = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 5, 5)
    even[0, 0, 0, 0] = odd[0, 0, 0, 0] = 1.0
    weight = convolution.standardised_weight()[0, 0]
    # On even sizes the first window starts at the first pixel, on odd ones a pixel before it.
    assert torch.equal(convolution(even)[0, 0, 0, 0], weight[0, 0])
    assert torch.equal(convolution(odd)[0, 0, 0, 0], weight[1, 1])


@pytest.mark.parametrize("name", ACTIVATION_GAINS)
def test_activations_keep_unit_variance(name):
    # Trapezoidal rule over the normal density, in place of samples.
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    y = ScaledActivation(name)(z)
    mean = torch.trapezoid(y * density, z)
    variance = torch.trapezoid((y - mean) ** 2 * density, z)
    # The constants were estimated from samples by NFNet's authors, hence one digit in a hundred.
    assert round(variance.item(), 2) == 1.0


def test_squeeze_excite_width_is_rounded_to_8():
    assert SqueezeExcite(16, 0.5).fc1.out_channels == 8
    assert SqueezeExcite(8, 0.25).fc1.out_channels == 8
    assert SqueezeExcite(40, 0.5).fc1.out_channels == 24


def test_closed_gains_leave_only_the_shortcut():
    encoder = NFNet(small()).eval()
    block = encoder.stages[0][1]
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x), x)


def test_gradients_reach_every_parameter():
    encoder = open_encoder(torch.float64)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    encoder(images).square().sum().backward()
    assert images.grad.abs().max() > 0
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradcheck():
    encoder = open_encoder(torch.float64, widths=(8,), depths=(1,), group_width=4, stem_width=8)
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(encoder, images, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_given_dtype(dtype):
    features = open_encoder(dtype).eval()(torch.randn(1, 3, 32, 32, dtype=dtype))
    assert features.dtype == dtype
    assert features.isfinite().all()


def test_fp32_is_close_to_fp64():
    images = torch.randn(2, 3, 32, 32)
    exact = open_encoder(torch.float32).double().eval()(images.double())
    assert_close_to_reference(
        open_encoder(torch.float32).eval()(images), exact, torch.float32, "features"
    )


def test_no_hidden_state():
    encoder = open_encoder().eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    first = encoder(images)
    assert torch.equal(encoder(images), first)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with torch.no_grad():
        encoder.stem.conv1.weight[0].neg_()
    assert not torch.equal(encoder(images), first)


def test_stochastic_depth_grows_linearly_and_only_in_training():
    encoder = open_encoder(stochastic_depth=0.6)
    rates = [block.drop_rate for stage in encoder.stages for block in stage]
    assert rates == [0.6 * block / 3 for block in (1, 2, 3)]
    images = torch.randn(2, 3, 32, 32)
    plain = open_encoder()
    assert torch.equal(encoder.eval()(images), plain.eval()(images))


def test_stochastic_depth_drops_whole_samples_and_rescales():
    encoder = open_encoder(stochastic_depth=0.75).train()
    block = encoder.stages[1][0]
    keep = 1.0 - block.drop_rate
    x = torch.randn(1, 16, 8, 8).expand(64, -1, -1, -1)
    dropped = block.downsample(block.act1(x))
    kept = dropped + (block.eval()(x) - dropped) / keep
    out = block.train()(x)
    was_kept = (out != dropped).flatten(1).any(1)
    assert 0 < was_kept.sum() < 64
    assert_close_to_reference(out[was_kept], kept[was_kept], torch.float32, "kept samples")


def test_config_round_trips_through_json():
    config = small(stochastic_depth=0.1)
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert values.pop("kind") == "nfnet"
    assert NFNetConfig(**values) == config


def test_build_dispatches_on_kind():
    encoder = build_vision_encoder(small())
    assert isinstance(encoder, NFNet)
    assert isinstance(encoder, VisionEncoder)
    assert (encoder.output_dim, encoder.image_size) == (64, 32)


def test_build_refuses_an_unknown_kind():
    class Unknown:
        kind = "vit"

    with pytest.raises(ValueError, match="unknown vision kind 'vit'; known: nfnet, huggingface"):
        build_vision_encoder(Unknown())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depths": (1,)}, r"got widths=\(16, 32\) and depths=\(1,\)"),
        ({"depths": (0, 1)}, r"depths\[0\] must be positive, got 0"),
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"stem_width": 12}, "stem_width must be a multiple of 8, got 12"),
        ({"group_width": 5}, "width 16 .* = 8 inner .* multiple of group_width 5"),
        ({"stochastic_depth": 1.0}, r"stochastic_depth must be in \[0, 1\), got 1.0"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; known: gelu, relu, silu"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_unknown_variant():
    with pytest.raises(ValueError, match="unknown NFNet variant 'F9'; known: F0, F1"):
        NFNetConfig.from_variant("F9")


def test_image_errors():
    encoder = NFNet(small())
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got shape \(3, 32, 32\)"):
        encoder(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match=r"got shape \(1, 1, 32, 32\)"):
        encoder(torch.randn(1, 1, 32, 32))
    with pytest.raises(TypeError, match=r"floating-point values, got torch.uint8"):
        encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_matches_timm_where_it_is_installed():
    """timm's own model with the same weights; needs timm, which nothing here depends on."""
    nfnet = pytest.importorskip("timm.models.nfnet")
    config = small(widths=(16, 32, 32, 64), depths=(1, 2, 1, 1))
    theirs = nfnet.NormFreeNet(
        nfnet._dm_nfnet_cfg(depths=config.depths, channels=config.widths),
        stem_chs=config.stem_width,
        group_size=config.group_width,
        num_classes=0,
    ).double()
    ours = open_encoder(torch.float64, widths=config.widths, depths=config.depths)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for side in (64, 71):
        images = torch.randn(2, 3, side, side, dtype=torch.float64)
        expected = theirs.eval().forward_features(images).flatten(2).transpose(1, 2)
        assert_close_to_reference(ours.eval()(images), expected, torch.float64, "features")
