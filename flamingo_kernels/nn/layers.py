"""LayerNorm and feed-forward on the pointwise ops."""

from __future__ import annotations

from torch import Tensor, nn

from flamingo_kernels.fields import is_integer
from flamingo_kernels.ops import (
    gated_activation,
    gated_activation_linear,
    layer_norm,
    layer_norm_linear,
)
from flamingo_kernels.ops.dispatch import check_kernel_name
from flamingo_kernels.ops.pointwise import ACTIVATIONS


def require_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if not (is_integer(size) and size >= 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` is the product with its weight and nothing else.

    Adapters and sharding wrap or replace a Linear, or hook into it: those have to be called.
    """
    return (
        type(module) is nn.Linear
        and module.bias is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension, run by the selected kernel."""

    def __init__(self, dim: int, kernel: str = "auto") -> None:
        check_kernel_name(kernel)
        require_sizes(dim=dim)
        super().__init__(dim)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return layer_norm(x, self.weight, self.bias, self.eps, kernel=self.kernel)

    def then(self, linear: nn.Module, x: Tensor) -> Tensor:
        """``linear(self(x))``, without keeping the normalised values for the backward."""
        if not is_plain_linear(linear):
            return linear(self(x))
        return layer_norm_linear(
            x, self.weight, self.bias, linear.weight, self.eps, kernel=self.kernel
        )


class _Activation(nn.Module):
    """``tanh(gate) * activation(x)``; holds place 2 of OpenFlamingo's feed-forward Sequential."""

    def __init__(self, activation: str, kernel: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.kernel = kernel

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return gated_activation(x, gate, self.activation, kernel=self.kernel)

    def then(self, linear: nn.Module, x: Tensor, gate: Tensor | None) -> Tensor:
        """``linear(self(x, gate))``, without keeping the activated values for the backward."""
        if not is_plain_linear(linear):
            return linear(self(x, gate))
        return gated_activation_linear(x, linear.weight, gate, self.activation, kernel=self.kernel)


class FeedForward(nn.Sequential):
    """LayerNorm, expansion, activation, projection, without biases (state-dict keys 0, 1 and 3).

    Parameters
    ----------
    dim : int
        Width.
    mult : int
        Hidden width over ``dim``.
    activation : {"gelu", "squared_relu", "relu"}
        GELU is OpenFlamingo's, squared ReLU the paper's (appendix A.1.4).
    kernel : str
        Kernel of the norm and the activation.
    """

    def __init__(
        self, dim: int, mult: int = 4, activation: str = "gelu", kernel: str = "auto"
    ) -> None:
        require_sizes(mult=mult)
        super().__init__(
            LayerNorm(dim, kernel),
            nn.Linear(dim, dim * mult, bias=False),
            _Activation(activation, kernel),
            nn.Linear(dim * mult, dim, bias=False),
        )

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """[..., dim] -> [..., dim], multiplied by ``tanh(gate)`` when a scalar gate is given."""
        norm, expand, activation, project = self
        return activation.then(project, norm.then(expand, x), gate)
