"""The public latent attention op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flamingo_kernels.ops import checks, dispatch
from flamingo_kernels.ops.latent_attention import impl_cpp, impl_torch, operators
from flamingo_kernels.ops.latent_attention.arguments import Arguments
from flamingo_kernels.ops.signature import is_eager, remembered


def latent_attention(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of a Perceiver Resampler layer: keys and values from [features; latents].

    Equivalent to ``softmax(q @ cat([k_media, k_latents]).T * scale) @ cat([v_media, v_latents])``
    per item and head (Flamingo, figure 5), without the concatenation.

    Parameters
    ----------
    q : Tensor
        Floating point [N, L, H, D], N media items with L latents.
    k_media, v_media : Tensor
        [N, M, Hkv, D], dtype and device of ``q``; M may be 0. Hkv divides H: query head h reads
        key/value head ``h // (H // Hkv)``.
    k_latents, v_latents : Tensor
        [N, L, Hkv, D].
    lengths : Tensor, optional
        Integer [N], number of valid media keys per item, 0 for none; keys past it are never read
        into a result, and their gradients are zero. Default: all M. ``key_lengths`` reads them
        from a padding mask.
    scale : float, optional
        Score multiplier, default ``D ** -0.5``.
    kernel : {"auto", "triton", "cpp", "torch"}
        ``"auto"`` takes the best available; an explicit kernel never falls back.

    Returns
    -------
    Tensor
        [N, L, H, D], dtype of ``q``. Softmax and sums are in fp32 (fp64 for fp64 inputs).

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit together; the message names the values.
    KernelUnavailableError
        The kernel asked for cannot run this call; the message lists the reasons.
    """
    inputs = (q, k_media, v_media, k_latents, v_latents, lengths)
    run = _runner(*inputs, None if scale is None else float(scale), kernel)
    if lengths is not None:
        checks.require_within("latent_attention", "lengths", lengths, 0, k_media.shape[1])
    return run(*inputs)


@remembered
def _runner(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
    scale: float | None,
    kernel: str,
) -> Callable[..., Tensor]:
    """Check the arguments and return what runs calls of this signature, of the six tensors."""
    tensors = (q, k_media, v_media, k_latents, v_latents)
    checks.latent_attention(tensors, lengths)
    chosen, saves = dispatch.choose_for("latent_attention", kernel, *tensors, head_dim=q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "torch":
        return lambda *inputs: impl_torch.forward(Arguments(*(*inputs, scale)))
    if saves:
        return lambda *inputs: _LatentAttention.apply(*inputs, scale, chosen)
    if not is_eager(q):
        return lambda *inputs: operators.forward(*(*inputs, scale, chosen))[0]
    if chosen == "cpp":
        return impl_cpp.bind_forward(tensors, scale)
    from flamingo_kernels.ops.latent_attention import impl_triton

    return lambda *inputs: impl_triton.forward(Arguments(*(*inputs, scale)))[0]


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments: Any) -> Tensor:
        output = operators.forward(*arguments)
        operators.save(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return operators.gradients(ctx, d_out)
