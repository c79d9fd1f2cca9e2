"""Train everything from nothing and report: ``python -m examples.fast_binding``.

Every stage that is finished is kept in the output folder and not repeated; the training of the
bridge also continues from its newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.fast_binding.experiment import QUICK, Experiment, Sizes

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.fast_binding", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("fast_binding_output"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to try it")
    options = parser.parse_args()
    if options.quick:
        Experiment(options.output / "quick", QUICK).run()
    else:
        Experiment(options.output, Sizes()).run()
