"""Estimate the memory per GPU of training a configuration, and list what fits."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch

from flamingo_kernels import FlamingoConfig
from flamingo_kernels.train.config import COMPUTE_DTYPES
from flamingo_kernels.train.memory_estimate import Workload, report


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config", required=True, help="name or JSON file")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--memory", type=float, required=True, help="GiB of each GPU")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per GPU")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--images", type=int, default=5, help="of a row")
    parser.add_argument("--frames", type=int, default=1, help="of an image, or its tiles")
    parser.add_argument("--compute", choices=COMPUTE_DTYPES, default="bfloat16")
    parser.add_argument("--keep-activations", action="store_true", help="do not checkpoint them")


def run(options: Namespace) -> int:
    """Print the table; return 0."""
    work = Workload(
        batch_size=options.batch_size,
        tokens=options.tokens,
        images=options.images,
        frames=options.frames,
        dtype=getattr(torch, options.compute),
        activation_checkpointing=not options.keep_activations,
    )
    config = FlamingoConfig.from_name_or_file(options.config)
    for line in report(config, options.gpus, options.memory, work):
        print(line)
    return 0
