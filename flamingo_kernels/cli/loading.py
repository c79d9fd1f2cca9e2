"""What several commands share: lines about progress, backbones, and folders to write into."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from flamingo_kernels.model.saving import WEIGHTS_FILE
from flamingo_kernels.transformers_models import read_folder


def progress(text: str) -> None:
    """Print a line about what is going on to stderr, apart from the output."""
    print(text, file=sys.stderr, flush=True)


def read_backbone(auto_class: str, folder: str | Path | None) -> nn.Module | None:
    """Return the backbone in a folder of transformers' files; None for no folder.

    See :func:`flamingo_kernels.transformers_models.read_folder` for ``auto_class`` and errors.
    """
    if folder is None:
        return None
    if Path(folder).is_dir():
        progress(f"loading {folder}")
    return read_folder(auto_class, Path(folder))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError if ``folder`` holds a model that may not be replaced."""
    if (folder / WEIGHTS_FILE).exists() and not overwrite:
        raise FileExistsError(
            f"{folder / WEIGHTS_FILE} exists: give another folder, or --overwrite"
        )
