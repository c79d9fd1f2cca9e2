"""How processes divide the model: the choices of ``TrainConfig.distributed``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.train import distributed, sharding
from flamingo_kernels.train.checkpoints import whole
from flamingo_kernels.train.checkpoints.contents import Trained
from flamingo_kernels.train.optimizer import MasterWeights


class Strategy(Protocol):
    """How a model is prepared, saved and loaded; all processes call each method."""

    def prepare(
        self, model: FlamingoModel, compute: torch.dtype
    ) -> tuple[MasterWeights, nn.Module]:
        """Prepare ``model`` in place, with the first process's trainable values everywhere.

        Returns
        -------
        tuple
            The float32 parameters to optimise, and the module to call for the loss.
        """

    def save(self, output: Path, trained: Trained, state: dict[str, Any], *, keep: int) -> Path:
        """Write a checkpoint; see :func:`flamingo_kernels.train.checkpoints.whole.save`."""

    def load(self, folder: Path, trained: Trained) -> None:
        """Read a checkpoint; see :func:`flamingo_kernels.train.checkpoints.whole.load`."""


class Replicated:
    """Every process, or the only one, holds a whole model (DDP)."""

    save = staticmethod(whole.save)
    load = staticmethod(whole.load)

    def prepare(
        self, model: FlamingoModel, compute: torch.dtype
    ) -> tuple[MasterWeights, nn.Module]:
        masters = MasterWeights(model.trainable_parameters(), compute)
        distributed.broadcast(masters.parameters.values())
        masters.publish()
        return masters, distributed.wrap(model)


class FullySharded:
    """Every process holds a shard of each parameter (FSDP2).

    Raises
    ------
    ValueError
        There is no process group.
    ImportError
        This torch cannot write sharded checkpoints.
    """

    def __init__(self) -> None:
        if not distributed.active():
            raise ValueError("distributed: fsdp shards over the processes that torchrun starts")
        from flamingo_kernels.train.checkpoints import sharded  # needs torch 2.9

        self.save, self.load = sharded.save, sharded.load

    def prepare(
        self, model: FlamingoModel, compute: torch.dtype
    ) -> tuple[MasterWeights, nn.Module]:
        trainable = model.trainable_parameters()
        for parameter in trainable.values():
            parameter.data = parameter.data.to(torch.float32)
        distributed.broadcast(trainable.values())
        sharding.shard(model, compute)
        return MasterWeights(model.trainable_parameters(), torch.float32), model


def build_strategy(name: str) -> Strategy:
    """Return the strategy of a name in ``config.STRATEGIES``."""
    strategies: dict[str, Callable[[], Strategy]] = {"ddp": Replicated, "fsdp": FullySharded}
    return strategies[name]()
