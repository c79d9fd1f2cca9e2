"""Estimate the memory that training a configuration needs on each GPU, without allocating it.

Parameters are counted on the meta device, in the units that ``sharding`` gathers. What autograd
saves is counted with fake tensors for one block of the language model and for the connector, and
from shapes for a cross-attention block. The loss is that of torch 2.13, which does not materialise
all logits. The vision encoder's working memory (it builds no graph), fragmentation and the CUDA
context are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_kernels.fields import check_positive
from flamingo_kernels.language import DecoderConfig, build_language_model
from flamingo_kernels.model import FlamingoConfig, FlamingoModel
from flamingo_kernels.model.bridge import build_connector
from flamingo_kernels.saved_tensors import saved_bytes
from flamingo_kernels.train.sharding import units
from flamingo_kernels.vision import NFNetConfig

GIB = 2**30
_MASTER, _MOMENTS = 4, 8  # bytes of a trainable value: its float32 master, AdamW's two moments
# FSDP2 holds the parameters of the unit that computes, the buffer that they were gathered in, and
# the buffer of the next unit.
_GATHERED_UNITS = 3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One GPU's batch: rows of ``tokens``, each with ``images`` of ``frames``."""

    batch_size: int = 8
    tokens: int = 256
    images: int = 5
    frames: int = 1
    dtype: torch.dtype = torch.bfloat16
    activation_checkpointing: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "tokens", "images", "frames")


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one GPU; ``media`` is the keys and values of all images in all layers."""

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
    """Numbers of values in a model's parameters; tied parameters count once.

    Attributes
    ----------
    frozen, trainable : int
    resident : int
        Values that FSDP gathers once per step and keeps.
    largest_unit, largest_trainable_unit : int
        Values of the largest unit that FSDP gathers as it runs.
    """

    frozen: int
    trainable: int
    resident: int
    largest_unit: int
    largest_trainable_unit: int


def parameter_sizes(config: FlamingoConfig) -> Sizes:
    """Return the sizes of the model's parameters, counted on the meta device."""
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
    """Return the numbers of frozen and of trainable values that FSDP keeps on each GPU.

    Parameters are divided along their first dimension, and every shard is as long as the longest.
    """
    model = _on_meta(config)
    values = {True: 0, False: 0}
    for parameter in model.parameters():
        rows = parameter.shape[0] if parameter.ndim else 1
        shard = math.ceil(rows / gpus) * (parameter.numel() // rows)
        values[parameter.requires_grad] += shard
    return values[False], values[True]


def estimate(config: FlamingoConfig, gpus: int, work: Workload) -> dict[str, MemoryEstimate]:
    """Return the memory per GPU under each strategy, by the names of ``TrainConfig.distributed``.

    Raises
    ------
    ValueError
        ``gpus`` is below 1, or a backbone is not the package's own decoder or NFNet.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if not isinstance(config.language, DecoderConfig):
        raise ValueError(
            f"{config.name} has a language model of kind {config.language.kind!r}: memory is "
            "estimated for the package's own decoder"
        )
    if not isinstance(config.vision, NFNetConfig):
        raise ValueError(
            f"{config.name} has a vision encoder of kind {config.vision.kind!r}: memory is "
            "estimated for the package's own NFNet"
        )
    sizes = parameter_sizes(config)
    frozen, trainable = shard_sizes(config, gpus)
    narrow = work.dtype.itemsize
    copy = 0 if work.dtype == torch.float32 else narrow  # beside the float32 masters
    activations, media = activation_bytes(config, work), media_bytes(config, work)
    gathered = sizes.resident + _GATHERED_UNITS * sizes.largest_unit
    return {
        "ddp": MemoryEstimate(
            parameters=sizes.frozen * narrow + sizes.trainable * (_MASTER + copy),
            # The masters', the model's own where it has any, and DDP's buckets.
            gradients=sizes.trainable * (_MASTER + copy + narrow),
            optimizer=sizes.trainable * _MOMENTS,
            activations=activations,
            media=media,
        ),
        "fsdp": MemoryEstimate(
            parameters=(frozen + gathered) * narrow + trainable * _MASTER,
            # The masters' shards, one unit's own, and the float32 in which those are averaged.
            gradients=trainable * _MASTER + sizes.largest_trainable_unit * (narrow + _MASTER),
            optimizer=trainable * _MOMENTS,
            activations=activations,
            media=media,
        ),
    }


def report(config: FlamingoConfig, gpus: int, memory_gib: float, work: Workload) -> Iterator[str]:
    """Yield the lines of a table of :func:`estimate`, and what fits ``memory_gib`` on each GPU.

    Raises
    ------
    ValueError
        As :func:`estimate`, or ``memory_gib`` is not positive and finite.
    """
    if not 0 < memory_gib < math.inf:
        raise ValueError(f"memory must be GiB of each GPU, got {memory_gib:g}")
    estimates = estimate(config, gpus, work)
    sizes = parameter_sizes(config)
    yield (
        f"{config.name} on {gpus} GPU(s) of {memory_gib:g} GiB: {sizes.frozen / 1e9:.2f}B frozen "
        f"and {sizes.trainable / 1e9:.2f}B trainable parameters"
    )
    yield (
        f"{work.batch_size} rows per GPU of {work.tokens} tokens and {work.images} image(s) of "
        f"{work.frames} frame(s), "
        f"{str(work.dtype).removeprefix('torch.')}, activations "
        f"{'checkpointed' if work.activation_checkpointing else 'kept'}; GiB per GPU"
    )
    columns = [field.name for field in dataclasses.fields(MemoryEstimate)]
    yield f"{'distributed':<12}" + "".join(f"{name:>13}" for name in (*columns, "total")) + "  fits"
    for name, memory in estimates.items():
        values = (*dataclasses.astuple(memory), memory.total)
        fits = "yes" if memory.total <= memory_gib * GIB else "no"
        yield f"{name:<12}" + "".join(f"{v / GIB:>13.1f}" for v in values) + f"  {fits}"


def media_bytes(config: FlamingoConfig, work: Workload) -> int:
    """Return the bytes of all images' keys and values in all cross-attention layers."""
    keys = work.batch_size * work.images * keys_of_image(config, work)
    cross = config.cross_attention
    layers, kv_heads = len(config.cross_attention_blocks), cross.kv_heads or cross.heads
    return layers * keys * 2 * kv_heads * cross.head_dim * work.dtype.itemsize


def keys_of_image(config: FlamingoConfig, work: Workload) -> int:
    """Return the number of keys of an image: latents, or the projected features of all frames."""
    if config.resampler is not None:
        return config.resampler.num_latents
    return work.frames * _features_of_frame(config.vision)


def _features_of_frame(vision: NFNetConfig) -> int:
    # NFNet halves the side in the stem twice and in every stage but the first.
    return math.ceil(vision.image_size / 2 ** (1 + len(vision.depths))) ** 2


def activation_bytes(config: FlamingoConfig, work: Workload) -> int:
    """Return the bytes that autograd saves of a batch.

    With activation checkpointing that is the input of every block, and one block at a time.
    """
    block, head = language_bytes(config.language, work.batch_size, work.tokens, work.dtype)
    cross = cross_attention_bytes(config, work)
    blocks, layers = config.language.depth, len(config.cross_attention_blocks)
    once = head + connector_bytes(config, work)
    if not work.activation_checkpointing:
        return once + blocks * block + layers * cross
    stream = work.batch_size * work.tokens * config.language.dim * work.dtype.itemsize
    return once + (blocks + layers) * stream + max(block, cross)


def cross_attention_bytes(config: FlamingoConfig, work: Workload) -> int:
    """Return the bytes that one cross-attention layer saves, without keys and values.

    It saves the inputs of both halves, the queries, the attention's output, the hidden layer, and
    the normalised latents of the media.
    """
    cross, dim = config.cross_attention, config.language.dim
    text = 2 * dim + 2 * cross.heads * cross.head_dim + (cross.ff_dim or cross.ff_mult * dim)
    latents = work.images * keys_of_image(config, work) * config.media_dim
    return work.batch_size * (work.tokens * text + latents) * work.dtype.itemsize


def language_bytes(
    config: DecoderConfig, batch_size: int, tokens: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Return the bytes that one frozen block saves, and those of embeddings, last norm and loss.

    The loss saves the hidden states. Its backward holds their gradient and a chunk of the logits,
    in float32 and in their dtype; the chunk has at most as many values as the hidden states.
    """
    one, two = (
        _decoder_bytes(dataclasses.replace(config, depth=depth), batch_size, tokens, dtype)
        for depth in (1, 2)
    )
    hidden = batch_size * tokens * config.dim
    return two - one, 2 * one - two + hidden * (3 * dtype.itemsize + torch.float32.itemsize)


def connector_bytes(config: FlamingoConfig, work: Workload) -> int:
    """Return the bytes that the connector saves, with the features that it reads."""
    vision = config.vision
    with FakeTensorMode(), _default_dtype(work.dtype):
        module = build_connector(config, kernel="torch")
        shape = (work.batch_size, work.images, work.frames, _features_of_frame(vision))
        features = torch.empty(*shape, vision.output_dim)
        return saved_bytes(lambda: module(features), module.parameters())


def _decoder_bytes(config: DecoderConfig, batch_size: int, tokens: int, dtype: torch.dtype) -> int:
    with FakeTensorMode(), _default_dtype(dtype):
        model = build_language_model(config).requires_grad_(False)
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64)

        def trained(block: int, hidden: Tensor) -> Tensor:
            """Behave as a cross-attention layer: gradients flow through all later blocks."""
            return hidden if hidden.requires_grad else hidden.detach().requires_grad_()

        return saved_bytes(
            lambda: model(ids, before_block=trained, head=lambda hidden, *_: hidden).head_output,
            model.parameters(),
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in ``dtype``: modules of fake tensors cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _on_meta(config: FlamingoConfig) -> FlamingoModel:
    with torch.device("meta"):
        return FlamingoModel(config)


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
