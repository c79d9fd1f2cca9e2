"""Exact, fast, trainable kernels for Flamingo-style vision-language models.

Importing this package touches no GPU, loads no optional package and no native library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flamingo_kernels.model import FlamingoConfig, FlamingoModel
    from flamingo_kernels.ops import MediaSpans, media_cross_attention

    # From ops itself, mypy takes this name for that of the module.
    from flamingo_kernels.ops.latent_attention import latent_attention

_HOMES = {
    "FlamingoConfig": "flamingo_kernels.model",
    "FlamingoModel": "flamingo_kernels.model",
    "MediaSpans": "flamingo_kernels.ops",
    "latent_attention": "flamingo_kernels.ops",
    "media_cross_attention": "flamingo_kernels.ops",
}

__all__ = [
    "FlamingoConfig",
    "FlamingoModel",
    "MediaSpans",
    "__version__",
    "latent_attention",
    "media_cross_attention",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
