"""Write the model of a training run, for generate and from_pretrained."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from flamingo_kernels.cli.loading import check_output
from flamingo_kernels.train.checkpoints.export import export


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="output of a run, or a checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder")
    parser.add_argument(
        "--trained-only", action="store_true", help="leave out the frozen parts and the tokenizer"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model in OUT")


def run(options: Namespace) -> int:
    """Print the name of the file that was written; return 0."""
    check_output(options.output, options.overwrite)
    print(export(options.folder, options.output, trained_only=options.trained_only))
    return 0
