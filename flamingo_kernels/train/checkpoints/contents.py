"""Names of the tensors in a checkpoint, and their way in and out of a run.

A trained tensor has its name in the model's state dict, a moment of the optimiser is
``<parameter>/<moment>``, and the state of a random generator ``/random/<device>``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.train.optimizer import MasterWeights

_RANDOM = "/random/"


class Trained(NamedTuple):
    """What a checkpoint saves of a run and gives back to it."""

    model: FlamingoModel
    masters: MasterWeights
    optimizer: Optimizer


def trained_tensors(trained: Trained) -> dict[str, Tensor]:
    """Return the masters, and the frozen tensors that the model's own checkpoint held."""
    model = trained.model
    frozen = model.state_dict() if model.saved_frozen else {}
    return {
        **{name: frozen[name] for name in sorted(model.saved_frozen)},
        **{name: parameter.detach() for name, parameter in trained.masters.parameters.items()},
    }


def is_trained_tensor(name: str) -> bool:
    """Return whether a name in a checkpoint is one of :func:`trained_tensors`."""
    return "/" not in name


def owner_of_moment(name: str, masters: MasterWeights) -> str | None:
    """Return the parameter whose moment has this name; None for what is no moment."""
    owner = name.rpartition("/")[0]
    return owner if owner in masters.parameters else None


def moments(trained: Trained) -> dict[str, Tensor]:
    """Return the optimiser's tensors by name."""
    names = {id(parameter): name for name, parameter in trained.masters.parameters.items()}
    return {
        f"{names[id(parameter)]}/{key}": value.detach().contiguous()
        for parameter, of_parameter in trained.optimizer.state.items()
        for key, value in of_parameter.items()
    }


def set_moments(trained: Trained, values: dict[str, Tensor]) -> None:
    """Give the optimiser the tensors that :func:`moments` returned."""
    for name, value in values.items():
        owner, _, key = name.rpartition("/")
        trained.optimizer.state[trained.masters.parameters[owner]][key] = value


def random_states() -> dict[str, Tensor]:
    """Return the states of this process's random generators by name."""
    states = {f"{_RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set the generators to :func:`random_states`; without a GPU, its state is ignored."""
    torch.set_rng_state(states[f"{_RANDOM}cpu"])
    if f"{_RANDOM}cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{_RANDOM}cuda"])
