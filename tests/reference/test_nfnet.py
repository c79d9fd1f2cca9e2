"""NFNet: published sizes, the standardised filters, and a block worked from its formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reference import NFNet
from reference.nfnet import (
    GAMMA,
    STANDARDISATION_EPS,
    Block,
    ScaledStdConv,
    drop_samples,
    standardise,
    variant,
)
from testing.budgets import assert_close_to_reference

# Millions of parameters of dm_nfnet_f0 ... f6 in timm's results tables, and in arXiv 2102.06171
# to one digit less; with the classifier.
PUBLISHED = {
    "F0": 71.49,
    "F1": 132.63,
    "F2": 193.78,
    "F3": 254.92,
    "F4": 316.07,
    "F5": 377.21,
    "F6": 438.36,
}
CLASSIFIER = 3072 * 1000 + 1000


def millions(count: int, digits: int) -> float:
    return round(count / 10**6, digits)


def on_meta(name: str) -> NFNet:
    with torch.device("meta"):
        return NFNet(variant(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    count = sum(parameter.numel() for parameter in on_meta(name).parameters())
    assert millions(count + CLASSIFIER, 2) == PUBLISHED[name]


def test_f6_is_the_encoder_of_flamingo():
    encoder = on_meta("F6")
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert millions(count, 1) == 435.3
    with torch.device("meta"):
        features = encoder(torch.empty(2, 3, 320, 288))
    assert features.shape == (2, 320 // 32 * (288 // 32), 3072)


def test_parameter_names(make_config):
    names = set(NFNet(make_config().vision).state_dict())
    convolutions = [f"stem.conv{n}" for n in (1, 2, 3, 4)] + ["final_conv"]
    others = []
    for block in ("stages.0.0", "stages.1.0"):
        convolutions += [
            f"{block}.{conv}" for conv in ("downsample.conv", "conv1", "conv2", "conv2b", "conv3")
        ]
        others += [
            f"{block}.attn_last.{fc}.{p}" for fc in ("fc1", "fc2") for p in ("weight", "bias")
        ]
        others.append(f"{block}.skipinit_gain")
    expected = {f"{conv}.{p}" for conv in convolutions for p in ("weight", "bias", "gain")}
    assert names == expected | set(others)


def test_standardised_filters_have_mean_zero_and_variance_one_over_fan_in(random64):
    weight = 3.0 + 2.0 * random64(5, 4, 3, 3)
    filters = standardise(weight, torch.ones(5, 1, 1, 1, dtype=torch.float64)).flatten(1)
    # A mean of zero is a sum that cancels: add it to the filters, which set its scale.
    mean = filters.mean(1, keepdim=True)
    assert_close_to_reference(filters + mean, filters, torch.float64)
    spread = weight.flatten(1).var(1, correction=0)
    expected = spread / (spread + STANDARDISATION_EPS) / (4 * 3 * 3)
    assert_close_to_reference(filters.var(1, correction=0), expected, torch.float64)


def test_standardisation_ignores_shift_and_follows_gain(random64):
    weight, gain = random64(2, 3, 1, 1), torch.tensor([2.0, 0.0], dtype=torch.float64)
    ones = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    plain = standardise(weight, ones)
    assert_close_to_reference(standardise(weight + 7.0, ones), plain, torch.float64)
    scaled = standardise(weight, gain.reshape(2, 1, 1, 1))
    assert torch.equal(scaled[0], 2.0 * plain[0])
    assert torch.equal(scaled[1], torch.zeros_like(plain[1]))


@pytest.mark.parametrize(("size", "stride", "outputs"), [(8, 1, 8), (8, 2, 4), (7, 2, 4)])
def test_convolution_output_sizes(size, stride, outputs):
    assert (
        ScaledStdConv(3, 4, 3, stride)(torch.zeros(1, 3, size, size)).shape[-2:] == (outputs,) * 2
    )


def test_even_size_with_stride_pads_after(random64):
    conv = ScaledStdConv(1, 1, 3, 2).double()
    x = random64(1, 1, 4, 4)
    weight = standardise(conv.weight, conv.gain)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, conv.bias, 2)
    assert torch.equal(conv(x), expected)


def test_gelu_gamma_restores_unit_variance():
    # The variance of gelu(z), z standard normal, by the midpoint rule over its quantiles.
    count = 1 << 18
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    activated = F.gelu(torch.special.ndtri(quantiles))
    assert round((GAMMA["gelu"] ** 2 * activated.var(correction=0)).item(), 2) == 1.0


def test_residual_branch_vanishes_at_initialisation(make_config, random64):
    block = Block(make_config().vision, 32, 32, 1, 1.0, 0.0).double()
    x = random64(2, 32, 4, 4)
    assert torch.equal(block(x), x)


def test_block_is_its_formula(make_config, random64, scrambled):
    config = make_config().vision
    block = scrambled(Block(config, 32, 64, 2, 0.9, 0.0))
    x = random64(2, 32, 6, 6)

    def act(y):
        return GAMMA["gelu"] * F.gelu(y)

    def conv(name, y, stride=1, groups=1):
        layer = block.get_submodule(name)
        flat = layer.weight.flatten(1)
        unit = F.layer_norm(flat, flat.shape[1:], eps=STANDARDISATION_EPS)
        weight = unit.view_as(layer.weight) * layer.gain / flat.shape[1] ** 0.5
        if layer.weight.shape[-1] == 3:
            y = F.pad(y, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        return F.conv2d(y, weight, layer.bias, stride, groups=groups)

    y = 0.9 * act(x)
    shortcut = conv("downsample.conv", F.avg_pool2d(y, 2))
    y = conv("conv3", act(conv("conv2b", act(conv("conv2", act(conv("conv1", y)), 2, 2)), 1, 2)))
    squeezed = F.relu(block.attn_last.fc1(y.mean((2, 3), keepdim=True)))
    y = 2.0 * y * block.attn_last.fc2(squeezed).sigmoid()
    expected = shortcut + 0.2 * block.skipinit_gain * y
    assert_close_to_reference(block(x), expected, torch.float64)


def test_beta_follows_the_expected_variance():
    with torch.device("meta"):
        stages = NFNet(variant("F1")).stages
    squares = [[block.beta**-2 for block in stage] for stage in stages]
    for stage, values in enumerate(squares):
        # A stage starts from what the last one left, restarts at 1, and gains alpha^2 = 0.04.
        entry = 1.0 if stage == 0 else 1.0 + 0.04 * len(squares[stage - 1])
        expected = [entry] + [1.0 + 0.04 * index for index in range(1, len(values))]
        assert_close_to_reference(torch.tensor(values), torch.tensor(expected), torch.float32)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean(make_config):
    torch.manual_seed(0)
    dropped = drop_samples(torch.ones(64, 2, 3, 3), 0.5)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped, dropped[:, :1, :1, :1].expand_as(dropped))
    config = make_config().vision
    config.stochastic_depth = 0.3
    assert [stage[0].drop_rate for stage in NFNet(config).stages] == [0.0, 0.3]


def test_features_are_row_major(make_config, scrambled, random64):
    encoder = scrambled(NFNet(make_config().vision)).eval()
    x = random64(1, 3, 32, 48)
    grid = encoder(x).unflatten(1, (4, 6))
    # The average of squeeze-excite does not care, so transposing image and filters transposes all.
    for parameter in encoder.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.transpose(2, 3).contiguous()
    transposed = encoder(x.transpose(2, 3)).unflatten(1, (6, 4))
    assert_close_to_reference(transposed.transpose(1, 2), grid, torch.float64)


def test_gradients(make_config, scrambled, random64):
    config = make_config().vision
    config.group_width = 4
    block = scrambled(Block(config, 8, 8, 2, 1.0, 0.0))
    assert torch.autograd.gradcheck(block, random64(1, 8, 4, 4).requires_grad_())


def test_bad_configurations(make_config):
    config = make_config().vision
    config.group_width = 128
    with pytest.raises(ValueError, match="bottleneck of width 32 holds no group of 128"):
        NFNet(config)
    config.activation = "swish"
    with pytest.raises(ValueError, match="activation is 'swish'"):
        NFNet(config)
