"""The command ``flamingo-kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for wrong use, 1 for a reported error)."""
    parser = argparse.ArgumentParser(prog="flamingo-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="kernels available here, or the size of a config")
    info.add_argument("--config", metavar="NAME", help="parameter counts of this configuration")

    demo = commands.add_parser(
        "demo", help="few-shot prompt over real pictures: forward, backward, generation"
    )
    demo.add_argument("--kernel", default="auto", help="auto, triton, cpp or torch")
    demo.add_argument("--shots", type=int, default=4, help="examples in the prompt")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the PNG")

    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            _info(options.config)
        else:
            from flamingo_kernels.cli.demo import run

            return run(options.kernel, options.shots, options.output)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"flamingo-kernels {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _info(config: str | None) -> None:
    from flamingo_kernels import info

    for line in info.config_lines(config) if config else info.kernel_lines():
        print(line)
