"""What is measured: shapes as data. Nothing here allocates a tensor.

B rows, T text tokens, I images, H heads, D head dim, R latents per image, N media items, S keys.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

DTYPES = ("float32", "bfloat16", "float16")
RANGES = "key_ranges"  # the op media_cross_attention, with KeyRanges
LAYOUTS = ("even", "uneven", "late", "decode")


@dataclass(frozen=True)
class MediaShape:
    """Sizes of ``media_cross_attention``; ``layout`` says where the <image> tokens are.

    ``even``: equal segments; ``uneven``: random places, the first at 0; ``late``: equal segments
    after a first half that sees no image; ``decode``: one token after all images. With
    ``last_group`` images come in adjacent pairs.
    """

    batch: int = 1
    tokens: int = 2048
    images: int = 8
    heads: int = 8
    head_dim: int = 64
    latents: int = 64
    attend: str = "last"
    layout: str = "even"

    @property
    def label(self) -> str:
        text = (
            f"B{self.batch} T{self.tokens} I{self.images} H{self.heads} D{self.head_dim} "
            f"R{self.latents}"
        )
        extra = [self.attend] if self.attend != "last" else []
        extra += [self.layout] if self.layout != "even" else []
        return " ".join([text, *extra])


@dataclass(frozen=True)
class RangeShape:
    """Sizes of ``media_cross_attention`` with key ranges, in one row.

    Attributes
    ----------
    name : str
        The model whose sizes these are.
    lengths : tuple of int
        Keys of each image or frame. The tokens are divided evenly among them.
    sees : str
        ``own``: a token sees the keys of its image; ``prefix``: those before them too; ``window``:
        the last ``window`` keys of all.
    """

    name: str
    tokens: int
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    sees: str = "own"
    window: int = 0

    @property
    def keys(self) -> int:
        return sum(self.lengths)

    @property
    def label(self) -> str:
        heads = f"H{self.heads}/{self.kv_heads} D{self.head_dim}"
        return f"{self.name} T{self.tokens} S{self.keys} {heads}"


@dataclass(frozen=True)
class LatentShape:
    """Sizes of ``latent_attention``: N items, M features and L latents of each."""

    items: int = 1
    features: int = 256
    heads: int = 8
    head_dim: int = 64
    latents: int = 64

    @property
    def label(self) -> str:
        return f"N{self.items} M{self.features} H{self.heads} D{self.head_dim} L{self.latents}"


@dataclass(frozen=True)
class PointwiseShape:
    """Rows and channels; ``activation`` is for ``gated_activation`` only."""

    rows: int = 2048
    channels: int = 2048
    activation: str = ""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (f"{self.rows}x{self.channels}", self.activation)))


@dataclass(frozen=True)
class BlockShape:
    """One gated cross-attention block; a decode step has ``tokens=1`` and ``layout="decode"``."""

    media: MediaShape
    dim: int = 2048
    dim_visual: int = 1024

    @property
    def label(self) -> str:
        return f"{self.media.label} dim{self.dim}/{self.dim_visual}"


@dataclass(frozen=True)
class ResamplerShape:
    """A Perceiver Resampler with OpenFlamingo's options on N images or clips."""

    items: int = 1
    frames: int = 1
    positions: int = 256
    dim: int = 1024
    depth: int = 6
    heads: int = 8
    head_dim: int = 64

    @property
    def label(self) -> str:
        return (
            f"N{self.items} F{self.frames} S{self.positions} H{self.heads} D{self.head_dim} "
            f"dim{self.dim} depth{self.depth}"
        )


@dataclass(frozen=True)
class ModelShape:
    """The whole model: a training step, or the decode step after a prompt with ``images``."""

    model: str = "tiny"
    batch: int = 1
    tokens: int = 256
    images: int = 5

    @property
    def label(self) -> str:
        return f"{self.model} B{self.batch} T{self.tokens} I{self.images}"


Shape = (
    MediaShape
    | RangeShape
    | LatentShape
    | PointwiseShape
    | BlockShape
    | ResamplerShape
    | ModelShape
)


@dataclass(frozen=True)
class Case:
    """One row of a table. Cases of one ``group`` are measured in the same alternated rounds."""

    op: str
    shape: Shape
    dtype: str = "float32"
    quick: bool = False
    training: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    sweeps: tuple[str, ...] = ()  # the log-log plots this case is a point of
    group: str = ""
    only_in_sweeps: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """Unique name: op/shape/dtype."""
        return f"{self.op}/{self.shape.label}/{self.dtype}"


def _media() -> Iterator[Case]:
    op = "media_cross_attention"
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 4):
            for images in (8, 32):
                quick = batch == 1 and (images == 8 or dtype == "float32")
                yield Case(op, MediaShape(batch, images=images), dtype, quick)
        yield Case(op, MediaShape(8, 256, 5), dtype)
        yield Case(op, MediaShape(1, heads=32, head_dim=128), dtype, devices=("cpu",))
    for shape in (  # OpenFlamingo in training, IDEFICS-9B, Flamingo-80B
        MediaShape(32, 256, 5),
        MediaShape(8, heads=32, head_dim=128),
        MediaShape(4, images=16, heads=64, head_dim=128),
    ):
        yield Case(op, shape, "bfloat16", quick=shape.batch == 32, devices=("cuda",))
    for dtype in ("float32", "bfloat16"):
        base = MediaShape()
        for shape in (
            replace(base, layout="uneven"),
            replace(base, layout="late"),
            replace(base, attend="last_group"),
            replace(base, attend="previous"),
        ):
            yield Case(op, shape, dtype)
        for images in (1, 8, 33):
            shape = MediaShape(tokens=1, images=images, layout="decode")
            yield Case(op, shape, dtype, training=False, group=f"{op} decode {dtype}")
    # Next to nothing to compute: the cost of a call.
    yield Case(op, MediaShape(1, 1, 1, 1, 8, 1, layout="decode"), quick=True, training=False)


def _media_sweeps() -> Iterator[Case]:
    op = "media_cross_attention"
    points = {
        "tokens": [MediaShape(tokens=t) for t in (256, 512, 1024, 2048, 4096, 8192)],
        "images": [MediaShape(images=i) for i in (1, 2, 4, 8, 16, 32, 64)],
        "batch": [MediaShape(batch=b) for b in (1, 2, 4, 8)],
    }
    yield from _sweep(op, points)


def _ranges() -> Iterator[Case]:
    """Models whose images have unequal numbers of keys, or thousands of them."""
    tile, frame, draw = 1601, 257, random.Random(0)
    casa = tuple(draw.randint(324, 1156) for _ in range(20))
    shapes = (
        RangeShape("mllama-4tiles", 512, (4 * tile,) * 2, 32, 8, 128),
        RangeShape("mllama-ragged", 512, (tile, 4 * tile), 32, 8, 128),
        RangeShape("moss-64f", 1024, (frame,) * 64, 32, 8, 128, "prefix"),
        RangeShape("moss-realtime", 1, (256,) * 272, 32, 8, 128, "window", 65_536),
        RangeShape("casa-pack", 2048, casa, 20, 20, 128),
        RangeShape("opentslm", 512, (64,) * 12, 8, 8, 64),
    )
    for shape in shapes:
        training = shape.sees != "window"
        for dtype in ("float32", "bfloat16"):
            yield Case(RANGES, shape, dtype, training=training)
        yield Case(RANGES, _scaled_down(shape), quick=True, training=training)


def _scaled_down(shape: RangeShape) -> RangeShape:
    """Return an eighth of the tokens, keys and heads."""
    return replace(
        shape,
        tokens=-(-shape.tokens // 8),
        lengths=tuple(length // 8 for length in shape.lengths),
        heads=shape.heads // (4 if shape.heads % 8 else 8),
        kv_heads=max(1, shape.kv_heads // (4 if shape.heads % 8 else 8)),
        window=shape.window // 8,
    )


def _latent() -> Iterator[Case]:
    op = "latent_attention"
    for dtype in ("float32", "bfloat16"):
        for features in (256, 1024, 8192):
            for heads, head_dim in ((8, 64), (16, 96)):
                quick = features == 1024 and heads == 8 and dtype == "float32"
                yield Case(op, LatentShape(1, features, heads, head_dim), dtype, quick)
        yield Case(op, LatentShape(8, 256), dtype)
    for shape in (
        LatentShape(160, 256),
        LatentShape(64, 257, 16, 96),
        LatentShape(4, 2048, 16, 96),
        LatentShape(4, 8192, 16, 96),
    ):
        yield Case(op, shape, "bfloat16", quick=shape.items == 160, devices=("cuda",))
    yield Case(op, LatentShape(1, 1, 1, 8, 1), training=False)  # the cost of a call
    points = {
        "frames": [LatentShape(features=256 * f) for f in (1, 2, 4, 8, 16, 32)],
        "batch": [LatentShape(items=n) for n in (1, 2, 4, 8, 16)],
    }
    yield from _sweep(op, points)


def _sweep(op: str, points: dict[str, list[Shape]]) -> Iterator[Case]:
    for sweep, shapes in points.items():
        for shape in shapes:
            for dtype, device in (("float32", "cpu"), ("bfloat16", "cuda")):
                yield Case(
                    op, shape, dtype, sweeps=(sweep,), devices=(device,), only_in_sweeps=True
                )


def _pointwise() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        yield Case("layer_norm", PointwiseShape(2048, 2048), dtype, quick=dtype == "float32")
        yield Case("gated_residual", PointwiseShape(2048, 2048), dtype)
        for activation in ("gelu", "squared_relu", "relu"):
            yield Case("gated_activation", PointwiseShape(2048, 8192, activation), dtype)
    # The cost of a call.
    for op, activation in (
        ("layer_norm", ""),
        ("gated_residual", ""),
        ("gated_activation", "gelu"),
    ):
        yield Case(op, PointwiseShape(1, 8, activation), training=False)


def _modules() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for images in (1, 8, 33):
            yield Case(
                "block",
                BlockShape(MediaShape(tokens=1, images=images, layout="decode")),
                dtype,
                quick=dtype == "float32" and images != 8,
                training=False,
                group=f"block decode {dtype}",
            )
        yield Case("block", BlockShape(MediaShape(tokens=512, images=5)), dtype)
        # Text and media as wide as heads x head dim, which every peer can do.
        square = MediaShape(tokens=512, images=8, heads=16)
        yield Case("block", BlockShape(square, 1024, 1024), dtype)
        yield Case("resampler", ResamplerShape(items=4), dtype)
        yield Case("resampler", ResamplerShape(frames=8), dtype)


def _models() -> Iterator[Case]:
    for model in ("tiny", "medium"):
        yield Case("model_training", ModelShape(model, 2, 256, 5))
        for images in (1, 8, 33):
            yield Case(
                "model_decode",
                ModelShape(model, 1, 128, images),
                quick=model == "tiny" and images != 8,
                training=False,
                group=f"model decode {model}",
            )


def _merge(cases: Iterable[Case]) -> list[Case]:
    """Merge cases of one key: a shape that is listed and in sweeps is measured once."""
    merged: dict[str, Case] = {}
    for case in cases:
        known = merged.get(case.key)
        if known is None:
            merged[case.key] = case
        else:
            merged[case.key] = replace(
                known,
                quick=known.quick or case.quick,
                devices=tuple(dict.fromkeys(known.devices + case.devices)),
                sweeps=tuple(dict.fromkeys(known.sweeps + case.sweeps)),
                only_in_sweeps=known.only_in_sweeps and case.only_in_sweeps,
            )
    return list(merged.values())


CASES = _merge(
    [
        *_media(),
        *_ranges(),
        *_latent(),
        *_modules(),
        *_models(),
        *_pointwise(),
        *_media_sweeps(),
    ]
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))
SWEEPS = tuple(dict.fromkeys(sweep for case in CASES for sweep in case.sweeps))
