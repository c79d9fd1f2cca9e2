"""Train everything from nothing and report: ``python -m examples.fast_binding``.

A finished stage is kept in the output folder and not repeated. The training of the bridge also
continues from its newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from examples.fast_binding.experiment import QUICK, Experiment, Sizes


def main() -> None:
    """Run the experiment that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m examples.fast_binding", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("fast_binding_output"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to try it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.quick:
        Experiment(options.output / "quick", QUICK, options.device).run()
    else:
        Experiment(options.output, Sizes(), options.device).run()


if __name__ == "__main__":
    main()
