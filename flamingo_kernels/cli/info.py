"""List the kernels that are available here, or the size of a configuration."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from flamingo_kernels import info


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config", metavar="NAME", help="parameter counts of this configuration")


def run(options: Namespace) -> int:
    """Print the lines; return 0."""
    for line in info.config_lines(options.config) if options.config else info.kernel_lines():
        print(line)
    return 0
