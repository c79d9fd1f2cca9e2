"""What several commands share: lines about progress, backbones, and folders to write into."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from flamingo_kernels.model.saving import WEIGHTS_FILE
from flamingo_kernels.transformers_models import read_folder
from flamingo_kernels.vision import read_vision_encoder


def progress(text: str) -> None:
    """Print a line about what is going on to stderr, apart from the output."""
    print(text, file=sys.stderr, flush=True)


def read_backbone(auto_class: str, folder: str | Path | None) -> nn.Module | None:
    """Return the backbone in a folder of transformers' files; None for no folder.

    A vision model has the statistics that its folder tells; see
    :func:`flamingo_kernels.vision.read_vision_encoder`, and
    :func:`flamingo_kernels.transformers_models.read_folder` for ``auto_class`` and errors.
    """
    if folder is None:
        return None
    if Path(folder).is_dir():
        progress(f"loading {folder}")
    if auto_class == "AutoModel":
        return read_vision_encoder(folder)
    return read_folder(auto_class, Path(folder))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError if ``folder`` holds a model that may not be replaced."""
    if (folder / WEIGHTS_FILE).exists() and not overwrite:
        raise FileExistsError(
            f"{folder / WEIGHTS_FILE} exists: give another folder, or --overwrite"
        )
