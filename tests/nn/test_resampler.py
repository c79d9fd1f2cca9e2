"""What the resampler and its layers refuse, and the frame counts they take."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import reference
from flamingo_kernels.nn import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_kernels.nn import layers as layers_module
from flamingo_kernels.nn import resampler as resampler_module
from flamingo_kernels.nn.layers import FeedForward, LayerNorm
from flamingo_kernels.ops import layer_norm
from testing.budgets import assert_close_to_reference, assert_within_budget

FEATURES = torch.zeros(1, 2, 3, 4, 8)


def small(**options) -> PerceiverResampler:
    return PerceiverResampler(8, **{"depth": 1, "dim_head": 4, "heads": 2, **options})


@pytest.mark.parametrize(
    ("features", "num_frames", "error", "message"),
    [
        ([1.0], None, TypeError, "features must be a floating point tensor, got list"),
        (FEATURES[0], None, ValueError, r"\[B, I, F, S, D\], got shape \(2, 3, 4, 8\)"),
        (FEATURES[:, :, :0], None, ValueError, r"no frames: shape \(1, 2, 0, 4, 8\)"),
        (FEATURES, [[3, 3]], TypeError, "num_frames must be an integer tensor, got list"),
        (FEATURES, torch.ones(1, 2), TypeError, "integer tensor, got torch.float32"),
        (FEATURES, torch.ones(1, 2).bool(), TypeError, "integer tensor, got torch.bool"),
        (FEATURES, torch.ones(2).long(), ValueError, r"must have shape \(1, 2\), got \(2,\)"),
        (FEATURES, torch.tensor([[3, 0]]), ValueError, r"num_frames holds 0, outside 1\.\.3"),
        (FEATURES, torch.tensor([[4, 3]]), ValueError, r"num_frames holds 4, outside 1\.\.3"),
        (FEATURES, torch.ones(1, 2, device="meta").int(), ValueError, "on meta, the input on cpu"),
    ],
)
def test_bad_arguments(features, num_frames, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(features, num_frames)


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
@pytest.mark.parametrize(
    "name",
    "depth dim_head heads num_latents ff_mult max_num_media max_num_frames input_dim".split(),
)
def test_sizes(name: str, value: object) -> None:
    shown = name.removeprefix("ff_")
    with pytest.raises(
        ValueError, match=f"{shown} must be an integer of at least 1, got {value!r}"
    ):
        small(**{name: value})


@pytest.mark.parametrize(
    "build",
    [
        lambda: LayerNorm(8, "cuda"),
        lambda: FeedForward(8, kernel="cuda"),
        lambda: small(kernel="cuda"),
    ],
)
def test_unknown_kernel(build) -> None:
    with pytest.raises(ValueError, match="unknown kernel 'cuda'; known: auto, triton"):
        build()


def test_counts_of_one_byte_do_not_overflow() -> None:
    """3 frames of 100 positions are 300 keys."""
    resampler = small(max_num_frames=3)
    x = torch.randn(1, 2, 3, 100, 8)
    counts = torch.tensor([[3, 1]])
    assert torch.equal(resampler(x, counts.byte()), resampler(x, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_normalised_features_within_budget(dtype: torch.dtype) -> None:
    """Folding a layer's scale and bias into its projection keeps the budget and gradients."""
    options = {"num_latents": 4, "ff_mult": 2, "final_norm": True, "activation": "gelu"}
    ours = PerceiverResampler(16, depth=3, dim_head=8, heads=2, **options)
    for parameter in ours.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0)
    config = SimpleNamespace(
        dim=16, depth=3, heads=2, head_dim=8, max_num_frames=None, input_dim=None, **options
    )
    x = (torch.randn(1, 3, 1, 20, 16) * 2 + 1).to(dtype)
    seed = torch.randn(1, 3, 4, 16).to(dtype)
    results = []
    for module, precision in (
        (ours, dtype),
        (reference.PerceiverResampler(config), dtype),
        (reference.PerceiverResampler(config), torch.float64),
    ):
        rounded = {name: t.to(dtype) for name, t in ours.state_dict().items()}
        module = module.to(precision)
        module.load_state_dict(rounded, strict=True)
        features = x.to(precision).detach().clone().requires_grad_()
        given = features if isinstance(module, PerceiverResampler) else features[0]
        out = module(given)
        out.backward(seed.to(precision).reshape(out.shape))
        gradients = {name: p.grad for name, p in module.named_parameters()}
        results.append({"out": out.reshape(seed.shape), "features": features.grad, **gradients})
    terms = float(seed.double().norm())
    for name, exact in results[2].items():
        assert_within_budget(
            results[0][name],
            results[1][name],
            exact,
            dtype,
            gradient=name != "out",
            terms=terms,
            what=name,
        )
    assert results[0]["layers.2.0.norm_media.bias"].any()


def test_features_are_normalised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of layers."""
    shapes = []

    def counting(x, *arguments, **options):
        shapes.append(tuple(x.shape))
        return layer_norm(x, *arguments, **options)

    for module in (resampler_module, layers_module):
        monkeypatch.setattr(module, "layer_norm", counting)
    small(depth=4, num_latents=3)(FEATURES)
    assert shapes.count((2, 12, 8)) == 1


def test_a_hooked_or_replaced_projection_is_called() -> None:
    """Adapters wrap a Linear or hook into it: scaling its weight would pass them by."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    resampler = small(depth=2).double()
    for parameter in resampler.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    expected = copy.deepcopy(resampler)
    for attention, feed_forward in expected.layers:
        for linear in (attention.to_kv, feed_forward[1], feed_forward[3]):
            linear.weight.data *= 2
    for attention, feed_forward in resampler.layers:
        attention.to_kv.__class__ = Doubled
        feed_forward[1].__class__ = Doubled
        feed_forward[3].register_forward_hook(lambda module, given, out: 2 * out)
    x = torch.randn(1, 2, 1, 4, 8, dtype=torch.float64)
    assert_close_to_reference(resampler(x), expected(x), torch.float64)


class Twice(nn.Module):
    """An adapter in place of a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return 2 * self.norm(x)


class TwiceByClass(LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("how", ["replaced", "hooked", "subclass"])
def test_norms_are_called_where_calling_does_more(how: str) -> None:
    resampler = small(depth=2).double()
    block = GatedCrossAttentionBlock(8, 8, 4, 2, media_norm=True).double()
    for parameter in (*resampler.parameters(), *block.parameters()):
        parameter.data.normal_()
    x, media = torch.randn(1, 2, 1, 4, 8).double(), torch.randn(1, 2, 3, 8).double()
    expected = copy.deepcopy((resampler, block))
    for norm in [m for part in expected for m in part.modules() if isinstance(m, LayerNorm)]:
        norm.weight.data *= 2
        norm.bias.data *= 2
    for part in (resampler, block):
        names = [name for name, m in part.named_modules() if isinstance(m, LayerNorm)]
        for name in names:
            norm = part.get_submodule(name)
            if how == "replaced":
                part.set_submodule(name, Twice(norm))
            elif how == "hooked":
                norm.register_forward_hook(lambda module, given, out: 2 * out)
            else:
                norm.__class__ = TwiceByClass
    assert_close_to_reference(resampler(x), expected[0](x), torch.float64)
    text = torch.randn(1, 5, 8).double()
    assert_close_to_reference(block(text, media), expected[1](text, media), torch.float64)


def test_hooks_and_replaced_forwards_run() -> None:
    """Those of the modules whose work is joined with a projection, too."""
    feed_forward, called = FeedForward(8), []
    for place in (0, 2):
        feed_forward[place].register_forward_hook(lambda m, given, out: called.append(type(m)))
    forward = feed_forward[3].forward
    feed_forward[3].forward = lambda x: called.append("replaced") or forward(x)
    feed_forward(torch.randn(2, 8))
    assert [*called[:1], *called[2:]] == [type(feed_forward[0]), "replaced"] and len(called) == 3

    called.clear()
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(type(m)))
    try:
        FeedForward(8)(torch.randn(2, 8))
    finally:
        hook.remove()
    assert called.count(nn.Linear) == 2 and len(called) == 5
