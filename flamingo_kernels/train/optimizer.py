"""AdamW over float32 master weights, in the paper's parameter groups."""

from __future__ import annotations

import torch
from torch import nn

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


def build_optimizer(
    parameters: dict[str, nn.Parameter], section: OptimizerSection
) -> torch.optim.AdamW:
    """Return AdamW without weight decay on the resampler (appendix B.1.2) and new tokens.

    Each group has a ``peak_lr``, which the loop scales by :func:`warm_up` into ``lr``. Its state is
    there from the start, as AdamW would make it, so that a checkpoint has all of it or is damaged.
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
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=tuple(section.betas),
        eps=section.eps,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            **{
                name: torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                for name in ("exp_avg", "exp_avg_sq")
            },
        }
    return optimizer


def warm_up(section: OptimizerSection, step: int) -> float:
    """Return the factor of the learning rate at update ``step``, counted from 1.

    It grows linearly to 1 over ``warmup_steps``, and stays.
    """
    return min(1.0, step / max(1, section.warmup_steps))
