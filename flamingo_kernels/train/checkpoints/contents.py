"""Names of the tensors in a checkpoint, and their way in and out of a run.

A trained tensor has its name in the model's state dict, a moment of the optimiser is
``<parameter>/<moment>``, and the state of a random generator ``/random/<device>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.model.saving import described, misfits
from flamingo_kernels.train import sharding
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


def moments(trained: Trained) -> dict[str, Tensor]:
    """Return the optimiser's own tensors by name."""
    names = {id(parameter): name for name, parameter in trained.masters.parameters.items()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, of_parameter in trained.optimizer.state.items()
        for key, value in of_parameter.items()
    }


def resumed_tensors(trained: Trained) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint sets, by name: the masters and the moments."""
    masters = {name: p.detach() for name, p in trained.masters.parameters.items()}
    return {**masters, **moments(trained)}


def check_headers(stored: Mapping[str, Tensor], trained: Trained) -> None:
    """Raise ValueError unless ``stored`` has the names, shapes and dtypes of what it sets.

    Random states and frozen tensors are not looked at. The tensors may be on the meta device.
    """
    frozen = trained.model.saved_frozen
    found = {n: t for n, t in stored.items() if n not in frozen and not n.startswith(_RANDOM)}
    expected = resumed_tensors(trained)
    faults = misfits(found, expected, expected.keys())
    faults["of another dtype"] = sorted(
        f"{name} {tensor.dtype} instead of {expected[name].dtype}"
        for name, tensor in found.items()
        if name in expected and tensor.dtype != expected[name].dtype
    )
    if problems := described(faults):
        raise ValueError(f"tensors {problems}")


def check_values(trained: Trained, step: int) -> None:
    """Raise ValueError unless this process's values can be those after ``step``."""
    counts = []
    for name, tensor in resumed_tensors(trained).items():
        values = sharding.local(tensor)
        if not values.isfinite().all():
            raise ValueError(f"{name} is not finite")
        if name.endswith("/exp_avg_sq") and (values < 0).any():
            raise ValueError(f"{name} is negative")
        if name.endswith("/step"):
            counts.append(values.item())
            if counts[-1] not in range(step + 1):
                raise ValueError(f"{name} is {counts[-1]:g} after step {step}")
    if max(counts, default=step) != step:
        raise ValueError(f"the optimiser is at step {max(counts):g}, the checkpoint at {step}")


def random_states() -> dict[str, Tensor]:
    """Return the states of this process's random generators by name."""
    states = {f"{_RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set the generators to :func:`random_states`; without a GPU, its state is ignored.

    Raises
    ------
    ValueError
        A state is missing, or is none of this generator.
    """
    try:
        torch.set_rng_state(states[f"{_RANDOM}cpu"])
        if f"{_RANDOM}cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[f"{_RANDOM}cuda"])
    except KeyError as error:
        raise ValueError(f"the random state {error} is missing") from error
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"a random state is wrong: {error}") from error
