"""Folders of checkpoints: each appears complete, in one rename, and disappears in one."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

STATE_FILE = "state.json"
SHARDS = "shard-*.safetensors"
FORMAT = 1
_FOLDER = re.compile(r"step_(\d{8,})")


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    found = [path for path in output.glob("step_*") if _FOLDER.fullmatch(path.name)]
    found = [path for path in found if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def is_sharded(folder: Path) -> bool:
    """Return whether several processes hold the tensors of a checkpoint in shards."""
    return any(folder.glob(SHARDS))


def begin(output: Path, step: int) -> Path:
    """Return an empty folder to write into; it becomes a checkpoint in :func:`finish`."""
    temporary = output / f".step_{step:08}.incomplete"
    try:
        output.mkdir(parents=True, exist_ok=True)
        for leftover in output.glob(".step_*"):  # of a run that was killed in here
            shutil.rmtree(leftover)
        temporary.mkdir()
    except OSError as error:
        raise failed(temporary, error) from error
    return temporary


def finish(temporary: Path, state: dict[str, Any], keep: int) -> Path:
    """Make a checkpoint of the files in ``temporary``, and remove all but the newest ``keep``."""
    output, folder = temporary.parent, _folder_of(temporary)
    replaced = output / f".{folder.name}.replaced"
    try:
        (temporary / STATE_FILE).write_text(json.dumps({"format": FORMAT, **state}))
        for path in (*temporary.iterdir(), temporary):
            _synchronise(path)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        _synchronise(output)
    except OSError as error:
        raise failed(temporary, error) from error
    shutil.rmtree(replaced, ignore_errors=True)
    for old in list_checkpoints(output)[:-keep]:
        removed = output / f".{old.name}.removed"
        os.replace(old, removed)  # a checkpoint disappears at once, as it appeared
        shutil.rmtree(removed)
    return folder


def failed(temporary: Path, why: object) -> OSError:
    """Remove ``temporary``; return the error to raise, which names the last good checkpoint."""
    shutil.rmtree(temporary, ignore_errors=True)
    earlier = list_checkpoints(temporary.parent)
    last = f"the last good one is {earlier[-1]}" if earlier else "there is no earlier one"
    return OSError(f"cannot write the checkpoint {_folder_of(temporary)}: {why}; {last}")


def _folder_of(temporary: Path) -> Path:
    return temporary.parent / temporary.name.removeprefix(".").removesuffix(".incomplete")


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
