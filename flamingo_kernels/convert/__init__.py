"""Conversion of other projects' checkpoints; the tables in the modules list every key."""

from flamingo_kernels.convert.files import read_tensors
from flamingo_kernels.convert.idefics import load_idefics
from flamingo_kernels.convert.nfnet import load_timm_nfnet
from flamingo_kernels.convert.open_flamingo import (
    convert_open_flamingo,
    convert_open_flamingo_file,
    load_open_flamingo,
    to_open_flamingo,
)
from flamingo_kernels.convert.table import Conversion

__all__ = [
    "Conversion",
    "convert_open_flamingo",
    "convert_open_flamingo_file",
    "load_idefics",
    "load_open_flamingo",
    "load_timm_nfnet",
    "read_tensors",
    "to_open_flamingo",
]
