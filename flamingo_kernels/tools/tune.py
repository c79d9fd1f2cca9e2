"""Measure launch configurations on the GPU of this machine and write the best ones.

``python -m flamingo_kernels.tools.tune tiles.json`` goes through the shipped tiles of the
attention kernels for this architecture, times each beside its alternatives, and writes those that
beat it. Setting ``FLAMINGO_TRITON_CONFIGS=tiles.json`` uses them. Nothing is keyed on batch or
length, so a file holds for all shapes. Results keep within the error budgets; their bits may change
with the tiles.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flamingo_kernels import _triton
from flamingo_kernels.ops import tiles
from flamingo_kernels.ops.latent_attention.arguments import Arguments as LatentArguments
from flamingo_kernels.ops.media_attention.arguments import Arguments as MediaArguments
from flamingo_kernels.ops.tiles import Key, Tile

# A config is replaced by one that takes at most this share of its time: less is noise.
WORTHWHILE = 0.97
CANDIDATES: list[Tile] = list(itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3)))
DTYPES = {2: torch.bfloat16, 4: torch.float32}

# Takes a function to measure, returns milliseconds; raises RuntimeError for what cannot run.
Timer = Callable[[Callable[[], object]], float]


def call_of(key: Key, device: str = "cuda") -> Callable[[], object]:
    """A call of the op that launches the kernel of ``key`` with it, on IDEFICS-like sizes."""
    kernel, head_dim, keys, itemsize = key
    dtype = DTYPES[itemsize]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    scale = head_dim**-0.5
    if kernel.startswith("media"):
        from flamingo_kernels.ops.media_attention import impl_triton as media

        q, d_out = random(4, 2048, 16, head_dim), random(4, 2048, 16, head_dim)
        k, v = random(2, 4, 8, keys if keys > 64 else 64, 16, head_dim)
        last = (torch.arange(2048, device=device, dtype=torch.int32) // 256).repeat(4, 1)
        single_item = kernel in ("media_forward", "media_backward")
        of_media = MediaArguments(q, k, v, last, last, None, scale, single_item)
        if kernel == "media_forward":
            return lambda: media.forward(of_media)
        table = media.segments(last, last, 8, 16, single_item)
        return lambda: media.backward(d_out, table, of_media)
    from flamingo_kernels.ops.latent_attention import impl_triton as latent

    latents = 256 if kernel == "latent_shares_backward" else 64
    q, k_latents, v_latents, d_out = (random(64, latents, 16, head_dim) for _ in range(4))
    k, v = random(2, 64, 256, 16, head_dim)
    of_latents = LatentArguments(q, k, v, k_latents, v_latents, None, scale)
    if kernel == "latent_forward":
        return lambda: latent.forward(of_latents)
    out, lse = latent.forward(of_latents)
    return lambda: latent.backward(d_out, of_latents, out, lse)


def best_tile(
    key: Key, architecture: str, current: Tile, call: Callable[[], object], timer: Timer
) -> tuple[Tile, float, float]:
    """The tile to use, its time and that of ``current``, which only a clear win replaces."""
    times: dict[Tile, float] = {}
    for tile in [current, *(tile for tile in CANDIDATES if tile != current)]:
        with tiles.trying(key, architecture, tile):
            try:
                times[tile] = timer(call)
            except RuntimeError:  # too much shared memory, or too few registers
                if tile == current:
                    raise
    best = min(times, key=times.__getitem__)
    if times[best] > WORTHWHILE * times[current]:
        best = current
    return best, times[best], times[current]


def tune(
    architecture: str, timer: Timer, calls: Callable[[Key], Callable[[], object]] = call_of
) -> Iterator[tuple[Key, Tile, Tile, float, float]]:
    """Key, shipped and best tile, their times, for every shipped tile of ``architecture``."""
    for key, current in sorted(tiles.shipped(architecture).items()):
        tile, time, before = best_tile(key, architecture, current, calls(key), timer)
        yield key, current, tile, before, time


def cuda_timer(call: Callable[[], object], repeats: int = 50) -> float:
    """Median milliseconds of a call, with a cold L2 cache."""
    # Triton's own errors of resources are no RuntimeErrors in every version.
    from triton.runtime.errors import OutOfResources

    try:
        for _ in range(5):
            call()
    except OutOfResources as error:
        raise RuntimeError(str(error)) from error
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main(arguments: list[str] | None = None, timer: Timer = cuda_timer) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m flamingo_kernels.tools.tune")
    parser.add_argument("output", type=Path, help="file of launch configurations; kept, extended")
    options = parser.parse_args(arguments)
    reason = _triton.unavailable_reason("cuda")
    if reason is None and not torch.cuda.is_available():
        reason = "torch finds none on this machine"
    if reason:
        parser.error(f"tuning measures on a GPU: {reason}")
    from flamingo_kernels._triton.launch import architecture as architecture_of

    architecture = architecture_of(torch.empty(0, device="cuda"))
    best = tiles.read(options.output) if options.output.exists() else {}
    for key, current, tile, before, time in tune(architecture, timer):
        print(f"{' '.join(map(str, key))}: {current} {before:.4f} ms, {tile} {time:.4f} ms")
        best.setdefault(key, {})[architecture] = tile
        tiles.write(options.output, best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
