"""NFNet weights of timm (``dm_nfnet_f0`` to ``f6``), whose names ``NFNet`` shares."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike

from torch import Tensor

from flamingo_kernels.convert.files import read_tensors
from flamingo_kernels.convert.table import Rule, convert, load_into
from flamingo_kernels.vision import NFNet, NFNetConfig

_log = logging.getLogger(__name__)

TABLE = (
    Rule(r"head\.fc\.(weight|bias)", reason="classifier"),
    Rule(r"(.+)", r"\1"),
)


def load_timm_nfnet(
    checkpoint: str | PathLike | Mapping[str, Tensor], config: NFNetConfig
) -> NFNet:
    """Build an encoder with the weights of a timm model.

    Parameters
    ----------
    checkpoint : str, PathLike or mapping
        File of the model, or ``timm_model.state_dict()``; see ``read_tensors``.
    config : NFNetConfig
        ``NFNetConfig.from_variant("F6")`` for ``dm_nfnet_f6.dm_in1k``, and so on.

    Raises
    ------
    FileNotFoundError, ValueError
        As ``read_tensors``, or weights of another variant.
    """
    encoder = NFNet(config)
    converted = convert(read_tensors(checkpoint), TABLE, "a timm NFNet")
    load_into(encoder, converted.tensors, set(encoder.state_dict()), "the NFNet checkpoint")
    _log.info("%s", converted.report)
    return encoder.eval()
