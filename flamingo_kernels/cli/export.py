"""Write the trained tensors of a run as one file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from flamingo_kernels.train.checkpoints.export import export


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="output of a run, or a checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder")


def run(options: Namespace) -> int:
    """Print the name of the file that was written; return 0."""
    print(export(options.folder, options.output))
    return 0
