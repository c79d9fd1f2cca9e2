"""FSDP2: every process holds a share of each parameter, and gathers a unit while it runs."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.train import distributed


def units(model: FlamingoModel) -> list[list[nn.Module]]:
    """Modules whose parameters are gathered together, as they run; the others stay gathered.

    A parameter belongs to the first unit that has it. The media's keys and values are projected for
    all layers before any of them runs: what does that is a unit beside the rest of its layer. What
    stays gathered are the language model's embeddings and last norm.
    """
    layers = model.gated_cross_attn_layers
    projections = [[a.norm_media, a.to_kv, a.norm_k] for a in (layer.attn for layer in layers)]
    alone = [model.vision_encoder, model.perceiver, *model.language_model.blocks, *layers]
    found = [*projections, *([module] for module in alone)]
    found = [[module for module in unit if module is not None] for unit in found]
    return [unit for unit in found if any(any(True for _ in m.parameters()) for m in unit)]


def shard(model: FlamingoModel, compute: torch.dtype) -> None:
    """Shard ``model`` in place over all processes, on this process's device.

    Its trainable parameters must be float32 and the same everywhere. They stay float32 where they
    are optimised, are gathered in ``compute``, and their gradients are averaged in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device, mesh = distributed.device(), distributed.mesh()
    scalars = {p for p in model.parameters() if p.ndim == 0 and not p.requires_grad}
    for parameter in scalars:  # FSDP takes none: each process keeps its own
        parameter.data = parameter.data.to(device)
    for unit in [*units(model), [model]]:
        # The features come in the dtype of the parameters that are optimised; what follows them
        # is given what it would be without sharding.
        cast = unit == [model.perceiver]
        policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=cast)
        modules = unit[0] if len(unit) == 1 else unit
        fully_shard(modules, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    # By default the backward of a unit gathers the one that ran before it: here the vision
    # encoder, which has no backward. The whole model's own parameters are there already.
    model.perceiver.set_modules_to_backward_prefetch([model])
    # The resampler's output, to which nothing writes.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which must all ask for it; others as is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
