"""Tiles of the Triton attention kernels, as data.

A key is kernel, padded head dim, keys, bytes of a value; an entry has one tile per architecture.
No tile has been measured on a GPU. Each is the first of its kernel's candidates, in the order of
preference that ``_ORDER`` explains, that compiles without a spill and within the shared memory
(``make aot`` checks all of them). ``python -m flamingo_kernels.tools.tune`` measures on a GPU and
writes a file that takes their place through FLAMINGO_TRITON_CONFIGS.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flamingo_kernels import env
from flamingo_kernels._triton.configs import INTERPRETER, LaunchConfig

Tile = tuple[int, int, int]  # rows, warps, stages
Key = tuple[str, int, int, int]  # kernel, head dim, keys, bytes of a value
Tiles = dict[Key, dict[str, Tile]]  # by architecture


# Without entries of its own, an architecture uses those of one with no more shared memory.
_FAMILIES = {
    "sm_80": "sm_80",
    "sm_87": "sm_80",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    INTERPRETER: "sm_90",
}

_ORDER = {
    "media_forward": "memory-bound: 64 rows, then as many programs at once as registers allow",
    "media_backward": "64 rows over four warps; 128 over eight where a tile of 64 spills",
    "media_rows_backward": "64 rows, two stages: a row loops over many keys",
    "media_keys_backward": "64 rows, two stages: a block of keys loops over many rows",
    "latent_forward": "all 64 latents in one tile, so each key is read once; most stages that fit",
    "latent_backward": "all 64 latents in one tile, so dK and dV are final; then larger key blocks",
    "latent_shares_backward": "larger key blocks, then as many warps at once as registers allow",
}

# A kernel without an entry takes the tiles of another: only some architectures need their own.
_OTHERWISE = {"latent_shares_backward": "latent_backward"}

_TILES: Tiles = {
    ("media_forward", 64, 64, 2): {
        "sm_80": (64, 4, 2), "sm_86": (64, 4, 2), "sm_90": (64, 4, 2), "sm_100": (64, 4, 2),
        "gfx942": (64, 4, 2),
    },
    ("media_forward", 64, 128, 2): {
        "sm_80": (64, 4, 2), "sm_86": (64, 4, 2), "sm_90": (64, 4, 2), "sm_100": (64, 4, 2),
        "gfx942": (64, 4, 2),
    },
    ("media_forward", 128, 64, 2): {
        "sm_80": (64, 8, 2), "sm_86": (64, 8, 2), "sm_90": (64, 4, 2), "sm_100": (64, 4, 2),
        "gfx942": (64, 4, 2),
    },
    ("media_forward", 128, 128, 2): {
        "sm_80": (32, 4, 2), "sm_86": (32, 4, 2), "sm_90": (64, 8, 2), "sm_100": (64, 4, 1),
        "gfx942": (64, 4, 1),
    },
    ("media_backward", 64, 64, 2): {
        "sm_80": (64, 4, 2), "sm_86": (64, 4, 2), "sm_90": (64, 4, 2), "sm_100": (64, 4, 2),
        "gfx942": (64, 4, 2),
    },
    ("media_backward", 64, 128, 2): {
        "sm_80": (128, 8, 1), "sm_86": (64, 8, 1), "sm_90": (32, 4, 1), "sm_100": (64, 4, 2),
        "gfx942": (64, 4, 2),
    },
    ("media_backward", 128, 64, 2): {
        "sm_80": (64, 8, 1), "sm_86": (64, 8, 1), "sm_90": (128, 8, 1), "sm_100": (64, 4, 2),
        "gfx942": (64, 4, 2),
    },
    # Not on sm_86 and gfx942, whose shared memory or registers are too few.
    ("media_backward", 128, 128, 2): {
        "sm_80": (64, 8, 1), "sm_90": (32, 8, 1), "sm_100": (32, 8, 1),
    },
    ("media_rows_backward", 64, 64, 2): {
        "sm_80": (64, 4, 2), "sm_86": (64, 4, 2), "sm_90": (64, 4, 2), "sm_100": (64, 4, 2),
        "gfx942": (64, 4, 2),
    },
    ("media_rows_backward", 128, 64, 2): {
        "sm_80": (32, 4, 1), "sm_86": (32, 4, 1), "sm_90": (64, 4, 2), "sm_100": (64, 4, 2),
        "gfx942": (64, 4, 2),
    },
    ("media_keys_backward", 64, 64, 2): {
        "sm_80": (32, 4, 2), "sm_86": (32, 4, 2), "sm_90": (64, 4, 2), "sm_100": (64, 4, 2),
        "gfx942": (32, 4, 1),
    },
    ("media_keys_backward", 128, 64, 2): {
        "sm_80": (64, 8, 1),
        "sm_86": (64, 8, 1),
        "sm_90": (64, 8, 2),
        "sm_100": (64, 4, 2),
        "gfx942": (32, 4, 1),
    },
    ("latent_forward", 64, 64, 2): {
        "sm_80": (64, 4, 3), "sm_86": (64, 4, 3), "sm_90": (64, 4, 3), "sm_100": (64, 4, 3),
        "gfx942": (64, 4, 3),
    },
    ("latent_forward", 128, 64, 2): {
        "sm_80": (64, 8, 3), "sm_86": (64, 8, 2), "sm_90": (64, 4, 3), "sm_100": (64, 4, 3),
        "gfx942": (64, 8, 2),
    },
    ("latent_backward", 64, 64, 2): {
        "sm_80": (64, 8, 1),
        "sm_90": (64, 4, 2),
        "gfx942": (64, 4, 1),
    },
    ("latent_backward", 64, 32, 2): {
        "sm_86": (64, 8, 1),
        "sm_100": (64, 4, 2),
    },
    ("latent_shares_backward", 64, 64, 2): {"sm_80": (32, 8, 1), "sm_86": (32, 8, 1)},
    ("latent_backward", 128, 64, 2): {"sm_80": (64, 8, 2), "sm_100": (64, 8, 2)},
    ("latent_backward", 128, 32, 2): {
        "sm_86": (64, 8, 1), "sm_90": (64, 8, 2), "gfx942": (64, 4, 1),
    },

    # fp32: products of three TF32 ones on NVIDIA need room for both halves of each value.
    ("media_forward", 128, 64, 4): {
        "sm_80": (16, 8, 1),
        "sm_86": (16, 8, 1),
        "sm_90": (16, 8, 1),
        "sm_100": (16, 8, 1),
        "gfx942": (16, 4, 1),
    },
    ("media_backward", 64, 64, 4): {
        "sm_80": (32, 8, 1),
        "sm_90": (32, 4, 1),
        "sm_100": (16, 8, 1),
        "gfx942": (32, 4, 1),
    },
    ("media_backward", 128, 64, 4): {"sm_90": (16, 8, 1)},
    ("latent_forward", 128, 32, 4): {
        "sm_80": (32, 8, 1),
        "sm_86": (32, 8, 1),
        "sm_90": (32, 8, 1),
        "sm_100": (32, 8, 1),
        "gfx942": (32, 4, 1),
    },
    ("latent_backward", 128, 16, 4): {
        "sm_80": (32, 8, 1),
        "sm_86": (16, 8, 1),
        "sm_90": (32, 8, 1),
        "sm_100": (32, 8, 1),
        "gfx942": (16, 4, 1),
    },
    ("media_keys_backward", 32, 64, 2): {
        "sm_80": (64, 4, 1),
        "sm_86": (64, 4, 1),
    },
    ("media_rows_backward", 64, 64, 4): {
        "sm_80": (32, 8, 1),
        "sm_86": (32, 8, 1),
        "sm_90": (32, 8, 1),
        "sm_100": (32, 8, 1),
        "gfx942": (32, 4, 1),
    },
    ("media_rows_backward", 128, 64, 4): {
        "sm_80": (16, 8, 1),
        "sm_86": (16, 8, 1),
        "sm_90": (16, 8, 1),
        "gfx942": (16, 4, 1),
    },
    ("media_keys_backward", 128, 16, 4): {
        "sm_80": (32, 8, 1),
        "sm_86": (32, 8, 1),
        "sm_90": (32, 8, 1),
        "sm_100": (32, 8, 1),
        "gfx942": (16, 4, 1),
    },
    ("media_forward", 16, 128, 2): {"sm_80": (64, 8, 1), "sm_86": (64, 8, 1)},
    ("media_keys_backward", 64, 64, 4): {
        "sm_90": (32, 8, 1), "sm_100": (32, 8, 1), "gfx942": (16, 4, 1),
    },
    ("media_keys_backward", 64, 32, 4): {
        "sm_80": (32, 8, 1), "sm_86": (32, 8, 1),
    },
    ("latent_backward", 64, 32, 4): {
        "sm_80": (32, 4, 1), "gfx942": (32, 4, 1),
    },
    ("latent_shares_backward", 64, 32, 4): {"sm_80": (32, 8, 1)},
    ("latent_backward", 64, 16, 4): {
        "sm_86": (32, 8, 1), "sm_90": (64, 8, 1), "sm_100": (64, 8, 1),
    },
    ("media_forward", 64, 64, 4): {
        "sm_80": (32, 4, 1), "sm_86": (32, 4, 1), "sm_90": (32, 4, 1), "sm_100": (32, 4, 1),
        "gfx942": (32, 4, 1),
    },
    ("latent_forward", 64, 32, 4): {
        "sm_80": (32, 8, 1), "sm_86": (32, 8, 1), "sm_90": (64, 4, 2), "sm_100": (32, 8, 1),
        "gfx942": (64, 4, 1),
    },
    ("media_rows_backward", 32, 64, 2): {
        "sm_100": (64, 4, 1),
    },
    ("media_rows_backward", 128, 32, 4): {"sm_100": (16, 8, 1)},
}  # fmt: skip


_MEASURED = "measured on this device"
_trial: Tiles = {}  # what trying() puts first


def shipped(architecture: str) -> dict[Key, Tile]:
    """Return the shipped tiles that ``architecture`` uses, its own or those of its family."""
    name = family(architecture)
    return {key: tiles[name] for key, tiles in _TILES.items() if name in tiles}


@contextmanager
def trying(key: Key, architecture: str, tile: Tile) -> Iterator[None]:
    """Make :func:`lookup` return ``tile`` for ``key``, to measure it. Not thread-safe."""
    _trial[key] = {architecture: tile}
    try:
        yield
    finally:
        del _trial[key]


def write(path: Path, tiles: Mapping[Key, Mapping[str, Tile]]) -> None:
    """Write tiles in the format of :func:`read`, one line per key."""
    lines = [
        f"{json.dumps(' '.join(map(str, key)))}: {json.dumps(dict(sorted(by.items())))}"
        for key, by in sorted(tiles.items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(path: Path) -> Tiles:
    """Read tiles from a file.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no such file, or it holds something else; the message names file and entry.
    """
    entry = "the whole file"
    try:
        tiles: Tiles = {}
        for entry, by_architecture in json.loads(path.read_text()).items():
            kernel, *sizes = entry.split(" ")
            head_dim, keys, itemsize = map(int, sizes)
            if kernel not in _ORDER:
                raise ValueError("unknown kernel")
            tiles[kernel, head_dim, keys, itemsize] = {}
            for architecture, (rows, warps, stages) in by_architecture.items():
                if {type(rows), type(warps), type(stages)} != {int} or rows & (rows - 1):
                    raise ValueError("not [rows, warps, stages], rows a power of two")
                tiles[kernel, head_dim, keys, itemsize][architecture] = (rows, warps, stages)
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no launch configurations: {entry}: {error}") from error
    return tiles


@functools.cache
def _measured() -> Tiles:
    path = env.triton_configs_path()
    return {} if path is None else read(path)


def family(architecture: str) -> str:
    """Return the architecture whose entries ``architecture`` uses."""
    if architecture.startswith("gfx"):
        return "gfx942"
    return _FAMILIES.get(architecture, "sm_86")


def lookup(
    kernel: str, head_dim: int, itemsize: int, architecture: str, keys: int = 64
) -> LaunchConfig | None:
    """Return the config of a kernel, or None if a tile of ``keys`` keys does not fit.

    Parameters
    ----------
    kernel : str
        Name less ``_kernel``; ``latent_shares_backward`` is ``latent_backward`` where its rows fill
        several tiles.
    head_dim : int
        Padded to a power of two; without an entry, that of the next larger one is used.
    itemsize : int
        Bytes of a value: 2 or 4. The interpreter takes the tiles of 2 for every dtype.
    architecture : str
        ``"sm_90"``, ``"gfx942"``, ``"interpreter"``.
    keys : int
        The padded number of latents of an item, for the kernels whose tile may hold one: up to
        64, or up to 128. The others loop over the largest key block that there is an entry for.
    """
    if architecture == INTERPRETER:
        itemsize = 2
    holds_item = kernel in ("media_forward", "media_backward")
    sizes = (64 if keys <= 64 else 128,) if holds_item else (64, 32, 16)
    dims = (dim for dim in (16, 32, 64, 128) if dim >= head_dim)
    for dim, size in itertools.product(dims, sizes):
        key = (kernel, dim, size, itemsize)
        for tiles, name, reason in (
            (_trial, architecture, _MEASURED),
            (_measured(), architecture, _MEASURED),
            (_TILES, family(architecture), _ORDER[kernel]),
        ):
            tile = tiles.get(key, {}).get(name)
            if tile is not None:
                rows, warps, stages = tile
                return LaunchConfig(rows, size, warps, stages, reason)
    if kernel in _OTHERWISE:
        return lookup(_OTHERWISE[kernel], head_dim, itemsize, architecture, keys)
    return None
