"""FSDP2: every process holds a shard of each parameter, and gathers a unit while it runs."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor, nn

from flamingo_kernels.language import LanguageModel
from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.train import distributed


def units(model: FlamingoModel) -> list[list[nn.Module]]:
    """Return the units: lists of modules whose parameters are gathered together, as they run.

    A parameter belongs to the first unit that has it. The keys and values of the media are
    projected for all layers before any layer runs, so the projections of a layer are a unit apart
    from its rest. The language model's embeddings and last norm are in no unit and stay gathered.
    """
    layers = model.gated_cross_attn_layers
    projections = [[a.norm_media, a.to_kv, a.norm_k] for a in (layer.attn for layer in layers)]
    blocks = cast(LanguageModel, model.language_model).blocks
    alone = [model.vision_encoder, model.connector, *blocks, *layers]
    found = [*projections, *([module] for module in alone)]
    found = [[module for module in unit if module is not None] for unit in found]
    return [unit for unit in found if any(any(True for _ in m.parameters()) for m in unit)]


def shard(model: FlamingoModel, compute: torch.dtype) -> None:
    """Shard ``model`` in place over all processes, on this process's device.

    Its trainable parameters must be float32, with equal values in all processes. FSDP2 keeps
    float32 master shards, gathers parameters in the ``compute`` dtype, and averages gradients in
    float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device, mesh = distributed.device(), distributed.mesh()
    scalars = {p for p in model.parameters() if p.ndim == 0 and not p.requires_grad}
    for parameter in scalars:  # FSDP does not shard scalars: each process keeps its own
        parameter.data = parameter.data.to(device)
    every: list[list[nn.Module]] = [*units(model), [model]]
    for unit in every:
        # The vision features have the dtype of the masters, so the connector casts its inputs. The
        # units behind it get the inputs that they would get without sharding.
        cast_inputs = unit == [model.connector]
        policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=cast_inputs)
        modules = unit[0] if len(unit) == 1 else unit
        fully_shard(modules, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    # By default the backward of a unit gathers the unit that ran before it. For the connector that
    # is the vision encoder, which has no backward while it is frozen. The model's own parameters
    # are gathered already.
    model.connector.set_modules_to_backward_prefetch([model])
    # The warning is about writes in place to the connector's output; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered from all processes; any other tensor as it is.

    All processes of the group must call it.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
