"""AdamW over float32 master weights, in the paper's parameter groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flamingo_kernels.model.network import NEW_TOKENS
from flamingo_kernels.train.config import OptimizerSection

_WITHOUT_DECAY = ("perceiver.", NEW_TOKENS)
_GATES = (".attn_gate", ".ff_gate")


class MasterWeights:
    """Float32 parameters that are optimised, beside the model's own, which compute.

    For float32 compute they are the same objects. For bfloat16 compute the model's parameters
    become bfloat16 copies: activations and their gradients are bfloat16, while sums of gradients
    and updates are float32 (Flamingo, appendix B.1.2).

    Parameters
    ----------
    parameters : dict of str to Parameter
        The model's trainable parameters by name, converted to ``compute`` in place.
    compute : torch.dtype

    Attributes
    ----------
    parameters : dict of str to Parameter
        The masters, by the same names.
    computing : dict of str to Parameter
        The model's own.
    shared : bool
        Whether the two are the same objects.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], compute: torch.dtype) -> None:
        self.computing = parameters
        self.parameters = parameters
        self.shared = all(p.dtype == compute == torch.float32 for p in parameters.values())
        if self.shared:
            return
        self.parameters = {
            name: nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            for name, parameter in parameters.items()
        }
        for parameter in parameters.values():
            parameter.data = parameter.data.to(compute)

    def collect_gradients(self) -> None:
        """Add the model's gradients to those of the masters, and release them."""
        if self.shared:
            return
        for name, parameter in self.computing.items():
            if parameter.grad is None:
                continue
            master = self.parameters[name]
            wide = parameter.grad.to(torch.float32)
            master.grad = wide if master.grad is None else master.grad.add_(wide)
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters' values to the model."""
        if not self.shared:
            for name, parameter in self.computing.items():
                parameter.copy_(self.parameters[name])

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set all masters by name, and publish them.

        Raises
        ------
        ValueError
            The names or shapes are not those of the masters.
        """
        self.check({name: tensor.shape for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)
        self.publish()

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Raise ValueError unless these are the names and shapes of the masters."""
        own = {name: parameter.shape for name, parameter in self.parameters.items()}
        different = {name for name, _ in shapes.items() ^ own.items()}
        if different:
            raise ValueError(
                f"{len(different)} trainable tensor(s) are not those of this model, such as "
                f"{min(different)}"
            )


def build_optimizer(
    parameters: dict[str, nn.Parameter], section: OptimizerSection
) -> torch.optim.AdamW:
    """Return AdamW without weight decay on the resampler (appendix B.1.2) and new tokens.

    Each group has a ``peak_lr``, which the loop scales by :func:`warm_up` into ``lr``.
    """
    undecayed, gates, others = [], [], []
    for name, parameter in parameters.items():
        if name.startswith(_WITHOUT_DECAY):
            undecayed.append(parameter)
        elif name.endswith(_GATES):
            gates.append(parameter)
        else:
            others.append(parameter)
    gate_lr = section.lr if section.gate_lr is None else section.gate_lr
    decay = section.weight_decay
    groups = [
        {"params": undecayed, "weight_decay": 0.0, "peak_lr": section.lr},
        {"params": gates, "weight_decay": decay, "peak_lr": gate_lr},
        {"params": others, "weight_decay": decay, "peak_lr": section.lr},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=tuple(section.betas),
        eps=section.eps,
    )


def warm_up(section: OptimizerSection, step: int) -> float:
    """Return the factor of the learning rate at update ``step``, counted from 1.

    It grows linearly to 1 over ``warmup_steps``, and stays.
    """
    return min(1.0, step / max(1, section.warmup_steps))
