"""The implementations that are measured, ours and the baselines.

A peer is a function ``setup(problem) -> Implementation``. Where it cannot run a problem it raises
:class:`UnavailableError` with the reason, which the report shows. The report also shows any other
error of the setup or the check as the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Leaves, Problem


class UnavailableError(Exception):
    """This peer cannot run this problem; the message is the reason."""


@dataclass
class Implementation:
    """A peer ready to be called.

    Attributes
    ----------
    forward : callable
        The measured call; it records a graph when grad mode is on.
    leaves : dict
        Tensors that the backward gives gradients for.
    backend : str
        What really runs, as far as that can be found out.
    no_backward : str
        Why there is no backward; empty where there is one.
    prepare : callable, optional
        Work that is done once per step rather than per layer (a block mask); timed apart.
    before : callable, optional
        Runs untimed before every forward.
    rename : callable, optional
        Names gradients as the problem does rather than as ``leaves`` does, for the gate only.
    exact : callable, optional
        The gate's truth, where this peer computes another function than the reference.
    ours : bool
        Whether it is this library's, and so held to the test suite's budget.
    """

    forward: Callable[[], Tensor]
    leaves: Leaves
    backend: str = ""
    no_backward: str = ""
    prepare: Callable[[], object] | None = None
    before: Callable[[], object] | None = None
    rename: Callable[[Leaves], Leaves] | None = None
    exact: Callable[[], Any] | None = None
    ours: bool = False

    def backward(self, out: Tensor, seed: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the leaves, and free the graph."""
        return torch.autograd.grad(out, tuple(self.leaves.values()), seed, allow_unused=True)

    def results(self, problem: Problem) -> Leaves:
        """Return ``out`` and, where there is a backward, all gradients."""
        if self.before:
            self.before()
        if self.no_backward or not problem.case.training:
            with torch.no_grad():
                return {"out": self.forward()}
        out = self.forward()
        found = zip(self.leaves, self.backward(out, problem.seed), strict=True)
        gradients = {name: value for name, value in found if value is not None}
        return {"out": out.detach(), **(self.rename(gradients) if self.rename else gradients)}


@dataclass(frozen=True)
class Peer:
    """An implementation that is measured: its name, what it is, and how to set it up.

    Attributes
    ----------
    name : str
        As in tables and on the command line.
    description : str
        What it computes with, in one sentence; published with the figures.
    ops : tuple of str
        The ops and modules that it is compared on.
    setup : callable
        Problem -> implementation; raises :class:`UnavailableError` with the reason.
    devices : tuple of str
        Kinds of device that it can run on.
    compiled : bool
        Whether it compiles for every shape, which takes seconds: left out of sweeps.
    quick : bool
        Whether it is part of the quick suite.
    """

    name: str
    description: str
    ops: tuple[str, ...]
    setup: Callable[[Problem], Implementation]
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False
    quick: bool = True


REGISTRY: dict[str, Peer] = {}
_MODULES = ("ours", "attention", "segments", "modules", "models")


def peer(name: str, description: str, *ops: str, **options: Any) -> Callable:
    """Register the decorated ``setup`` as a :class:`Peer`."""

    def register(setup: Callable[[Problem], Implementation]) -> Callable:
        assert name not in REGISTRY, name
        REGISTRY[name] = Peer(name, description, ops, setup, **options)
        return setup

    return register


@functools.cache
def load_all() -> dict[str, Peer]:
    """Return all peers by name, the library's own first."""
    for module in _MODULES:
        importlib.import_module(f"benchmarks.peers.{module}")
    return REGISTRY


def peers_for(op: str, device: str, names: list[str] | None = None) -> list[Peer]:
    """Return the peers of an op on a kind of device; an unknown name is a ValueError."""
    known = load_all()
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"unknown peers {', '.join(unknown)}; known: {', '.join(known)}")
    return [
        p
        for p in known.values()
        if op in p.ops and device in p.devices and (not names or p.name in names)
    ]


def require(module: str, package: str | None = None) -> Any:
    """Import an optional package, or raise :class:`UnavailableError`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{package or module} is not installed ({error})") from None
