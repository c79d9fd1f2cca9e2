"""Memory that training a configuration needs on each GPU, without allocating any of it.

Parameters are counted on the meta device, in the units that ``sharding`` gathers. What autograd
keeps is counted with fake tensors, of one language model block at a time, and by the shapes that a
cross-attention block keeps. The loss is that of torch 2.13, which makes no whole logits. Left out:
the vision encoder's working memory (it builds no graph), fragments and the CUDA context.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_kernels.fields import check_positive
from flamingo_kernels.language import DecoderConfig, build_language_model
from flamingo_kernels.model import FlamingoConfig, FlamingoModel
from flamingo_kernels.model.flamingo import build_resampler
from flamingo_kernels.train.config import STRATEGIES
from flamingo_kernels.train.sharding import units

GIB = 2**30
_MASTER, _MOMENTS = 4, 8  # bytes of a trainable value: float32, and AdamW's two
# Of a unit that computes FSDP2 has the parameters and, until the next one is there, the buffer they
# were gathered in; then the buffer of the next.
_GATHERED_UNITS = 3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One GPU's batch: rows of ``tokens`` with ``images`` of ``frames`` each."""

    batch_size: int = 8
    tokens: int = 256
    images: int = 5
    frames: int = 1
    dtype: torch.dtype = torch.bfloat16
    activation_checkpointing: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "tokens", "images", "frames")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. ``media`` is what the keys and values of all images take, in all layers."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    media: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Sizes:
    """Values in a model's parameters, tied ones once.

    ``resident``: those that FSDP gathers once per step; ``largest_unit`` and
    ``largest_trainable_unit``: of the parts that it gathers as they run.
    """

    frozen: int
    trainable: int
    resident: int
    largest_unit: int
    largest_trainable_unit: int


def parameter_sizes(config: FlamingoConfig) -> Sizes:
    """Counted on the meta device."""
    model = _on_meta(config)
    trainable = _numel(model.trainable_parameters().values())
    everything = _numel(model.parameters())
    gathered, earlier = [], set()
    for unit in units(model):
        own = [p for part in unit for p in part.parameters() if p not in earlier]
        gathered.append(own)
        earlier.update(own)
    return Sizes(
        everything - trainable,
        trainable,
        everything - sum(map(_numel, gathered)),
        max(map(_numel, gathered)),
        max(_numel(unit) for unit in gathered if unit[0].requires_grad),
    )


def shard_sizes(config: FlamingoConfig, gpus: int) -> tuple[int, int]:
    """Frozen and trainable values that FSDP keeps on each GPU.

    Parameters are divided along their first dimension, and all shares are as long as the longest.
    """
    model = _on_meta(config)
    shares = {True: 0, False: 0}
    for parameter in model.parameters():
        rows = parameter.shape[0] if parameter.ndim else 1
        share = math.ceil(rows / gpus) * (parameter.numel() // rows)
        shares[parameter.requires_grad] += share
    return shares[False], shares[True]


def plan(config: FlamingoConfig, gpus: int, work: Workload) -> dict[str, Memory]:
    """Memory per GPU under each strategy, by the names that a configuration of training has.

    Raises
    ------
    ValueError
        No GPU, or a language model that is not the package's own decoder.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if not isinstance(config.language, DecoderConfig):
        raise ValueError(
            f"{config.name} has a language model of kind {config.language.kind!r}: plan counts "
            "what the package's own decoder keeps"
        )
    sizes = parameter_sizes(config)
    narrow = work.dtype.itemsize
    copy = 0 if work.dtype == torch.float32 else narrow  # beside the float32 masters
    activations, media = activation_bytes(config, work), media_bytes(config, work)
    frozen, trainable = shard_sizes(config, gpus)
    strategies = (
        (
            sizes.frozen * narrow + sizes.trainable * (_MASTER + copy),
            # The masters', the model's own where it has any, and DDP's buckets.
            sizes.trainable * (_MASTER + copy + narrow),
            sizes.trainable * _MOMENTS,
        ),
        (
            frozen * narrow
            + trainable * _MASTER
            + (sizes.resident + _GATHERED_UNITS * sizes.largest_unit) * narrow,
            # The masters' shares, a unit's own, and the float32 in which those are averaged.
            trainable * _MASTER + sizes.largest_trainable_unit * (narrow + _MASTER),
            trainable * _MOMENTS,
        ),
    )
    return {
        name: Memory(*of_parameters, activations, media)
        for name, of_parameters in zip(STRATEGIES, strategies, strict=True)
    }


def plan_lines(
    config: FlamingoConfig, gpus: int, memory_gib: float, work: Workload
) -> Iterator[str]:
    """A table of :func:`plan`, and which strategies fit into ``memory_gib`` on each GPU."""
    if not 0 < memory_gib < math.inf:
        raise ValueError(f"memory must be GiB of each GPU, got {memory_gib:g}")
    memories = plan(config, gpus, work)
    sizes = parameter_sizes(config)
    yield (
        f"{config.name} on {gpus} GPU(s) of {memory_gib:g} GiB: {sizes.frozen / 1e9:.2f}B frozen "
        f"and {sizes.trainable / 1e9:.2f}B trainable parameters"
    )
    yield (
        f"{work.batch_size} rows per GPU of {work.tokens} tokens and {work.images} image(s), "
        f"{str(work.dtype).removeprefix('torch.')}, activations "
        f"{'checkpointed' if work.activation_checkpointing else 'kept'}; GiB per GPU"
    )
    columns = [field.name for field in dataclasses.fields(Memory)]
    yield f"{'distributed':<12}" + "".join(f"{name:>13}" for name in (*columns, "total")) + "  fits"
    for name, memory in memories.items():
        values = (*dataclasses.astuple(memory), memory.total)
        fits = "yes" if memory.total <= memory_gib * GIB else "no"
        yield f"{name:<12}" + "".join(f"{v / GIB:>13.1f}" for v in values) + f"  {fits}"


def media_bytes(config: FlamingoConfig, work: Workload) -> int:
    """Keys and values of every image in every cross-attention layer, kept for the backward."""
    latents = work.batch_size * work.images * config.resampler.num_latents
    cross = config.cross_attention
    layers = len(config.cross_attention_blocks)
    return layers * latents * 2 * cross.heads * cross.head_dim * work.dtype.itemsize


def activation_bytes(config: FlamingoConfig, work: Workload) -> int:
    """What autograd keeps of one batch, or of one block at a time and all blocks' inputs."""
    block, head = language_bytes(config.language, work.batch_size, work.tokens, work.dtype)
    cross = cross_attention_bytes(config, work)
    blocks, layers = config.language.depth, len(config.cross_attention_blocks)
    once = head + resampler_bytes(config, work)
    if not work.activation_checkpointing:
        return once + blocks * block + layers * cross
    stream = work.batch_size * work.tokens * config.language.dim * work.dtype.itemsize
    return once + (blocks + layers) * stream + max(block, cross)


def cross_attention_bytes(config: FlamingoConfig, work: Workload) -> int:
    """Of one layer, keys and values left out.

    The inputs of both halves, the queries, the attention's output and the hidden layer; the media's
    latents behind their norm.
    """
    cross, dim = config.cross_attention, config.language.dim
    text = 2 * dim + 2 * cross.heads * cross.head_dim + (cross.ff_dim or cross.ff_mult * dim)
    latents = work.images * config.resampler.num_latents * config.resampler.dim
    return work.batch_size * (work.tokens * text + latents) * work.dtype.itemsize


def language_bytes(
    config: DecoderConfig, batch_size: int, tokens: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Of one frozen block, and of embeddings, last norm and loss.

    The loss keeps the hidden states. In the backward it has their gradient beside a chunk of the
    logits, which is chosen to have no more values than they: in float32 and in their dtype.
    """
    one, two = (
        _kept_by_decoder(dataclasses.replace(config, depth=depth), batch_size, tokens, dtype)
        for depth in (1, 2)
    )
    hidden = batch_size * tokens * config.dim
    return two - one, 2 * one - two + hidden * (3 * dtype.itemsize + torch.float32.itemsize)


def resampler_bytes(config: FlamingoConfig, work: Workload) -> int:
    """Of the resampler, with the features it reads."""
    vision = config.vision
    # NFNet halves the side in the stem twice and in every stage but the first.
    side = math.ceil(vision.image_size / 2 ** (1 + len(vision.depths)))
    with FakeTensorMode(), _default_dtype(work.dtype):
        module = build_resampler(config.resampler, kernel="torch")
        shape = (work.batch_size, work.images, work.frames, side * side, vision.output_dim)
        features = torch.empty(shape)
        return kept_bytes(module, lambda: module(features))


def kept_bytes(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in ``run``, parameters left out."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # an address is told apart only while its storage lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(run())
    return sum(kept.values())


def _kept_by_decoder(
    config: DecoderConfig, batch_size: int, tokens: int, dtype: torch.dtype
) -> int:
    with FakeTensorMode(), _default_dtype(dtype):
        model = build_language_model(config).requires_grad_(False)
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64)

        def trained(block: int, hidden: Tensor) -> Tensor:
            """As behind a cross-attention layer: gradients flow through all blocks."""
            return hidden if hidden.requires_grad else hidden.detach().requires_grad_()

        return kept_bytes(
            model,
            lambda: model(ids, before_block=trained, head=lambda hidden, *_: hidden).head_output,
        )


class _default_dtype:  # noqa: N801
    """Modules of fake tensors cannot be converted: they are made in their dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def _on_meta(config: FlamingoConfig) -> FlamingoModel:
    with torch.device("meta"):
        return FlamingoModel(config)


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
