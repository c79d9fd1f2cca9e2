"""The command line of flamingo_kernels."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flamingo_kernels.cli import convert, demo, export, generate, info, plan, train
from flamingo_kernels.train import distributed

# Each module adds its arguments to a parser and runs on what was parsed. Its docstring is the help.
COMMANDS = {
    "info": info,
    "demo": demo,
    "generate": generate,
    "convert": convert,
    "train": train,
    "export": export,
    "plan": plan,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status.

    It is 0 for success, 1 for an error or a disagreement that was reported, 2 for wrong usage, and
    130 for an interrupt. As the command of a process that torchrun started it ends the process.
    """
    status = _run(arguments)
    if arguments is None and distributed.of_torchrun():
        # Threads of torch.distributed that wait for the interpreter while it exits abort it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="flamingo-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        command.add(own)
        own.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        print(f"flamingo-kernels {options.command}: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"flamingo-kernels {options.command}: interrupted", file=sys.stderr)
        return 130
