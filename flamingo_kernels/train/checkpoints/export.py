"""One file of the trained tensors of a checkpoint of either kind."""

from __future__ import annotations

from pathlib import Path

from flamingo_kernels.model import FlamingoConfig
from flamingo_kernels.model import saving as weights
from flamingo_kernels.train.checkpoints.folder import STATE_FILE, is_sharded, list_checkpoints
from flamingo_kernels.train.checkpoints.state import read_state


def export(folder: Path, output: Path) -> Path:
    """Write the trained tensors of a checkpoint as ``save_pretrained`` does.

    Parameters
    ----------
    folder : Path
        A checkpoint, or the output of a run, whose newest checkpoint is taken.
    output : Path
        Folder to write into.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no checkpoint, or it is damaged.
    OSError
        The file could not be written.
    """
    found = [folder] if (folder / STATE_FILE).is_file() else list_checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"no checkpoint of a training run in {folder}")
    if is_sharded(found[-1]):
        from flamingo_kernels.train.checkpoints.sharded import whole_tensors  # needs torch 2.9

        config = FlamingoConfig.from_dict(read_state(found[-1], "config")["config"])
        tensors = whole_tensors(found[-1])
    else:
        config, tensors = weights.read(found[-1] / weights.WEIGHTS_FILE)
    weights.write(tensors, config, output)
    return output / weights.WEIGHTS_FILE
