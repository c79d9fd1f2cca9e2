"""latent_attention inside the resamplers of transformers, in place of their own attention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.evolla.modeling_evolla import EvollaSequenceCompressorResampler
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from flamingo_kernels.ops import key_lengths, latent_attention
from testing.budgets import assert_close_to_reference, assert_gradients_close
from testing.cases import kernels_for

KERNELS = [k for k, dtype in kernels_for("latent_attention", True) if dtype == torch.float32]


def idefics2() -> nn.Module:
    config = Idefics2PerceiverConfig(
        hidden_size=24,
        resampler_n_latents=5,
        resampler_depth=2,
        resampler_n_heads=6,
        resampler_head_dim=8,
        num_key_value_heads=2,
    )
    return Idefics2PerceiverResampler(config)


def evolla() -> nn.Module:
    config = SimpleNamespace(
        protein_encoder_config=SimpleNamespace(hidden_size=24),
        hidden_size=20,
        resampler_num_latents=5,
        resampler_depth=2,
        resampler_dim_head=8,
        resampler_heads=3,
        resampler_ff_mult=2,
    )
    return EvollaSequenceCompressorResampler(config)


class OurIdefics2Attention(nn.Module):
    """Called as Idefics2PerceiverAttention, whose projections it shares."""

    def __init__(self, theirs: nn.Module, lengths: Tensor, kernel: str) -> None:
        super().__init__()
        self.theirs, self.lengths, self.kernel = theirs, lengths, kernel

    def forward(self, latents: Tensor, context: Tensor, **_: object) -> tuple[Tensor, None]:
        theirs = self.theirs
        out = latent_attention(
            *(
                project(x).unflatten(-1, (-1, theirs.head_dim))
                for x, project in (
                    (latents, theirs.q_proj),
                    (context, theirs.k_proj),
                    (context, theirs.v_proj),
                    (latents, theirs.k_proj),
                    (latents, theirs.v_proj),
                )
            ),
            self.lengths,
            kernel=self.kernel,
        )
        return theirs.o_proj(out.flatten(-2)), None


class OurEvollaAttention(nn.Module):
    """Called as EvollaSequenceCompressorAttention, whose norms and projections it shares."""

    def __init__(self, theirs: nn.Module, lengths: Tensor, kernel: str) -> None:
        super().__init__()
        self.theirs, self.lengths, self.kernel = theirs, lengths, kernel

    def forward(self, features: Tensor, latents: Tensor, _: Tensor) -> Tensor:
        theirs = self.theirs
        features, latents = theirs.norm_media(features), theirs.norm_latents(latents)
        q = theirs.to_q(latents).unflatten(-1, (theirs.heads, -1))
        of_media, of_latents = (
            theirs.to_kv(x).unflatten(-1, (2, theirs.heads, -1)).unbind(-3)
            for x in (features, latents)
        )
        out = latent_attention(q, *of_media, *of_latents, self.lengths, kernel=self.kernel)
        return theirs.to_out(out.flatten(-2))


def swap_attention(resampler: nn.Module, lengths: Tensor, kernel: str) -> None:
    for layer in resampler.layers:
        if isinstance(layer, nn.ModuleList):
            layer[0] = OurEvollaAttention(layer[0], lengths, kernel)
        else:
            layer.self_attn = OurIdefics2Attention(layer.self_attn, lengths, kernel)


def run(resampler: nn.Module, features: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradients of the features and of all parameters."""
    features = features.clone().requires_grad_()
    out = resampler(features, mask)
    named = {
        name.replace("theirs.", ""): parameter for name, parameter in resampler.named_parameters()
    }
    named["features"] = features
    seed = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return out, dict(zip(named, torch.autograd.grad(out, list(named.values()), seed), strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "evolla"])
def test_a_padded_batch(attention: str, kernel: str) -> None:
    resampler = evolla() if attention == "evolla" else idefics2()
    if attention != "evolla":
        resampler.set_attn_implementation(attention)
    for parameter in resampler.parameters():
        nn.init.normal_(parameter, std=0.3)
    features = torch.randn(4, 9, 24)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 0])[:, None]
    expected, gradients = run(resampler, features, mask if attention != "evolla" else mask.float())
    swap_attention(resampler, key_lengths(mask), kernel)
    out, ours = run(resampler, features, mask)
    assert_close_to_reference(out, expected, torch.float32)
    assert_gradients_close(ours, gradients, torch.float32)
    with torch.no_grad():
        poisoned = features.masked_fill(~mask[..., None], float("nan"))
        assert torch.equal(resampler(poisoned, mask), out)


@pytest.mark.parametrize("kernel", KERNELS)
def test_patches_of_images_of_different_widths(kernel: str) -> None:
    """The valid patches of a narrow image are no prefix: a stable sort makes them one."""
    resampler = idefics2()
    features = torch.randn(2, 12, 24)
    grid = torch.zeros(2, 3, 4, dtype=torch.bool)
    grid[0, :2, :4] = grid[1, :3, :2] = True
    mask = grid.flatten(1)
    expected, gradients = run(resampler, features, mask)
    with pytest.raises(ValueError, match="item 1 has the valid key 4 after padding at 3"):
        key_lengths(mask)
    order = (~mask).sort(dim=1, stable=True).indices
    rows = torch.arange(2)[:, None]
    swap_attention(resampler, key_lengths(mask[rows, order]), kernel)
    out, ours = run(resampler, features[rows, order], mask)
    assert_close_to_reference(out, expected, torch.float32)
    gradients["features"] = gradients["features"][rows, order]
    assert_gradients_close(ours, gradients, torch.float32)
