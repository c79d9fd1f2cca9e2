"""Norms and the feed-forward; LayerNorm and activations run on the pointwise ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.bare_modules import is_bare, is_plain_product
from flamingo_kernels.fields import is_integer
from flamingo_kernels.ops import (
    gated_activation,
    gated_activation_linear,
    layer_norm,
    layer_norm_linear,
)
from flamingo_kernels.ops.dispatch import check_kernel_name
from flamingo_kernels.ops.gated_activation import ACTIVATIONS
from flamingo_kernels.precision import accumulator

# Of the first half of the expansion; the second half is multiplied with it.
_GATED = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
FEED_FORWARDS = (*ACTIVATIONS, *_GATED)
LAYER_NORM_EPS = 1e-5  # as in OpenFlamingo, the default of torch.nn.LayerNorm


def require_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if not (is_integer(size) and size >= 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension, computed by the selected kernel."""

    def __init__(self, dim: int, kernel: str = "auto") -> None:
        check_kernel_name(kernel)
        require_sizes(dim=dim)
        super().__init__(dim, LAYER_NORM_EPS)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., dim]."""
        return layer_norm(x, self.weight, self.bias, self.eps, kernel=self.kernel)

    def is_plain(self) -> bool:
        """Whether calling this module is the norm by its weight and bias, and nothing else."""
        return type(self).forward is LayerNorm.forward and is_bare(self)

    def project_normed(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Return ``linear(self(x))`` without saving the normalised values for the backward."""
        if not (self.is_plain() and is_plain_product(linear)):
            return linear(self(x))
        return layer_norm_linear(
            x, self.weight, self.bias, linear.weight, self.eps, kernel=self.kernel
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in at least fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = accumulator(x.dtype)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)

    def project_normed(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Return ``linear(self(x))``."""
        return linear(self(x))


def project_normed(norm: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """Return ``linear(norm(x))``; adapters may stand in place of either."""
    if hasattr(norm, "project_normed"):
        return norm.project_normed(linear, x)
    return linear(norm(x))


def build_norm(dim: int, kernel: str, rms_norm_eps: float | None) -> nn.Module:
    """Return an RMSNorm if an eps is given, otherwise a LayerNorm."""
    return LayerNorm(dim, kernel) if rms_norm_eps is None else RMSNorm(dim, rms_norm_eps)


class _Activation(nn.Module):
    """``tanh(gate) * activation(x)``; index 2 of the Sequential, as in OpenFlamingo."""

    def __init__(self, activation: str, kernel: str) -> None:
        super().__init__()
        if activation not in FEED_FORWARDS:
            known = ", ".join(FEED_FORWARDS)
            raise ValueError(f"unknown activation {activation!r}; known: {known}")
        self.activation = activation
        self.kernel = kernel

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if self.activation in _GATED:
            inner, linear = x.chunk(2, dim=-1)
            out = _GATED[self.activation](inner) * linear
            return out if gate is None else out * gate.tanh().to(out.dtype)
        return gated_activation(x, gate, self.activation, kernel=self.kernel)

    def project_activated(self, linear: nn.Module, x: Tensor, gate: Tensor | None) -> Tensor:
        """Return ``linear(self(x, gate))`` without saving the activated values for the backward."""
        if self.activation in _GATED or not (is_bare(self) and is_plain_product(linear)):
            return linear(self(x, gate))
        return gated_activation_linear(x, linear.weight, gate, self.activation, kernel=self.kernel)


class FeedForward(nn.Sequential):
    """Norm, expansion, activation, projection, without biases (state-dict keys 0, 1 and 3).

    Parameters
    ----------
    dim : int
        Width.
    mult : int
        Hidden width over ``dim``.
    activation : {"gelu", "squared_relu", "relu", "swiglu", "geglu", "reglu"}
        OpenFlamingo uses GELU, the paper squared ReLU (appendix A.1.4), and the cross-attention of
        IDEFICS SwiGLU, whose expansion is twice as wide with its first half inside SiLU. GEGLU and
        ReGLU have GELU and ReLU there.
    kernel : str
        Kernel of the norm and the activation.
    hidden : int, optional
        Hidden width, in place of ``mult``.
    rms_norm_eps : float, optional
        RMSNorm with this eps in place of LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        mult: int = 4,
        activation: str = "gelu",
        kernel: str = "auto",
        *,
        hidden: int | None = None,
        rms_norm_eps: float | None = None,
    ) -> None:
        require_sizes(mult=mult)
        hidden = dim * mult if hidden is None else hidden
        require_sizes(hidden=hidden)
        super().__init__(
            build_norm(dim, kernel, rms_norm_eps),
            nn.Linear(dim, 2 * hidden if activation in _GATED else hidden, bias=False),
            _Activation(activation, kernel),
            nn.Linear(hidden, dim, bias=False),
        )

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map ``x`` [..., dim] to [..., dim], times ``tanh(gate)`` if a scalar gate is given."""
        norm, expand, activation, project = self
        return activation.project_activated(project, project_normed(norm, expand, x), gate)
