"""Convert another project's checkpoint to safetensors."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from flamingo_kernels import FlamingoConfig
from flamingo_kernels.cli.loading import check_output, progress
from flamingo_kernels.convert import convert_open_flamingo_file, load_idefics


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("layout", choices=("open-flamingo", "idefics"))
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model in OUT")
    parser.add_argument("--config", help="name or JSON file; default: recognised by the sizes")


def run(options: Namespace) -> int:
    """Convert, and print in one line what was used; return 0."""
    if options.layout == "idefics" and options.config is not None:
        raise ValueError("an IDEFICS checkpoint has its own config.json: leave --config out")
    check_output(options.output, options.overwrite)
    progress(f"reading {options.checkpoint}")
    if options.layout == "idefics":
        load_idefics(options.checkpoint).save_pretrained(options.output, include_frozen=True)
        print(f"{options.output}: the whole model")
        return 0
    config = None if options.config is None else FlamingoConfig.from_name_or_file(options.config)
    report = convert_open_flamingo_file(options.checkpoint, options.output, config).report
    print(f"{options.output}: {report}; load it with the backbones it was trained with")
    return 0
