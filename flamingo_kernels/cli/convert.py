"""Other projects' checkpoints to ``model.safetensors``."""

from __future__ import annotations

import sys
from pathlib import Path

from flamingo_kernels import FlamingoConfig
from flamingo_kernels.convert import convert_open_flamingo_file, load_idefics
from flamingo_kernels.convert.files import read_json


def run(layout: str, checkpoint: Path, output: Path, config: str | None) -> int:
    """Convert and say in one line what was used; 0."""
    print(f"reading {checkpoint}", file=sys.stderr, flush=True)
    if layout == "idefics":
        if config is not None:
            raise ValueError("an IDEFICS checkpoint has its own config.json: leave --config out")
        load_idefics(checkpoint).save_pretrained(output, include_frozen=True)
        print(f"{output}: the whole model")
        return 0
    chosen = None if config is None else read_config(config)
    report = convert_open_flamingo_file(checkpoint, output, chosen).report
    print(f"{output}: {report}; load it with the backbones it was trained with")
    return 0


def read_config(name: str) -> FlamingoConfig:
    """A named configuration, or one in a JSON file."""
    if not name.endswith(".json"):
        return FlamingoConfig.from_name(name)
    try:
        return FlamingoConfig.from_dict(read_json(name))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the config in {name} is not one of flamingo_kernels: {error}") from error
