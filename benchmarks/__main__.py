"""``python -m benchmarks run | report | publish | compare``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.cases import OPS


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n") from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure and append to a result file")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument("--suite", choices=("quick", "full"), default="quick")
    _add_selection(run)
    run.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N")
    run.add_argument(
        "--patience", type=float, help="leave out peers whose call takes more seconds (CPU)"
    )
    run.add_argument("--output", type=Path, help="folder; default benchmarks/results")
    run.add_argument("--fresh", action="store_true", help="repeat what the file already has")
    run.add_argument("--allow-dirty", action="store_true", help="mark results of a changed tree")
    run.add_argument("--list", action="store_true", help="print the selected cases and stop")

    report = commands.add_parser("report", help="tables, plots and a page from result files")
    report.add_argument("--results", type=Path, nargs="+", help="files or folders of .jsonl")
    report.add_argument("--output", type=Path, default=Path("build/benchmarks"))

    commands.add_parser("publish", help="the newest reports beside their results, README and docs")

    compare = commands.add_parser("compare", help="this tree against another git revision")
    compare.add_argument("ref", metavar="REF")
    compare.add_argument("--device", choices=("cpu", "cuda"))
    compare.add_argument("--suite", choices=("quick", "full"), default="quick")
    _add_selection(compare)
    compare.add_argument(
        "--threshold", type=float, default=0.05, help="smallest change that is no noise, as a share"
    )
    return top


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ops", nargs="+", default=[], help=", ".join(OPS))
    command.add_argument("--cases", default="", metavar="REGEX", help="of op/shape/dtype")
    command.add_argument("--peers", nargs="+", default=[])
    command.add_argument("--budget-minutes", type=float)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, 1 for regressions, or 2 for wrong options."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "report":
            from benchmarks import report

            for page in report.write(options.results, options.output):
                print(page)
            return 0
        if options.command == "publish":
            from benchmarks import publish, results

            for page in publish.publish(results.ROOT):
                print(page)
            return 0
        if options.command == "compare":
            from benchmarks import compare

            return compare.main(options)
        return _run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    import torch

    from benchmarks import run

    chosen = run.Options(
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        suite=options.suite,
        ops=tuple(options.ops),
        cases=options.cases,
        peers=tuple(options.peers),
        shard=options.shard,
        budget_minutes=options.budget_minutes,
        output=options.output,
        patience=options.patience,
        fresh=options.fresh,
        allow_dirty=options.allow_dirty,
    )
    if options.list:
        for case in run.selected(chosen):
            print(case.key)
        return 0
    print(run.run(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
