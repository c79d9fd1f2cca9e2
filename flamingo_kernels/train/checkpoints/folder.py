"""Folders of checkpoints: each appears complete, in one rename, and disappears in one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flamingo_kernels.train import distributed

STATE_FILE = "state.json"
SHARDS = "shard-*.safetensors"
FORMAT = 1
_LOCK_FILE = ".lock"
_FOLDER = re.compile(r"step_(\d{8,})")


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    complete = (path for path in _step_folders(output) if (path / STATE_FILE).is_file())
    return sorted(complete, key=step_of)


def _step_folders(output: Path) -> list[Path]:
    found = [path for path in output.glob("step_*") if _FOLDER.fullmatch(path.name)]
    return [path for path in found if path.is_dir()]


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint; None if there is none.

    Raises
    ------
    ValueError
        Its ``state.json`` is missing, as after a copy that was cut off. What it holds is not passed
        over in silence.
    """
    folders = [path for path in _step_folders(output) if any(path.iterdir())]
    newest = max(folders, key=step_of, default=None)
    if newest is not None and not (newest / STATE_FILE).is_file():
        raise unreadable(newest, f"{STATE_FILE}: it is missing; copy the folder again or remove it")
    return newest


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


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


def unreadable(folder: Path, why: object) -> ValueError:
    """Return the error to raise for a checkpoint that is damaged."""
    return ValueError(f"cannot read the checkpoint {folder}: {why}")


def failed(temporary: Path, why: object) -> OSError:
    """Remove ``temporary``; return the error to raise, which names the last good checkpoint."""
    shutil.rmtree(temporary, ignore_errors=True)
    earlier = list_checkpoints(temporary.parent)
    last = f"the last good one is {earlier[-1]}" if earlier else "there is no earlier one"
    return OSError(f"cannot write the checkpoint {_folder_of(temporary)}: {why}; {last}")


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Let no other process train into ``output`` at the same time.

    The lock is the kernel's, on a file that stays: it ends with this process, however that ends.

    Raises
    ------
    OSError
        On all processes of the group: another run holds the lock, or the folder cannot be written.
    """
    held: list[IO[str]] = []

    def lock() -> None:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / _LOCK_FILE).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise OSError(
                f"another run is training into {output}: wait for it, or give another output"
            ) from error
        held.append(file)

    distributed.on_first_rank(lock)
    try:
        yield
    finally:
        for file in held:
            file.close()


def _folder_of(temporary: Path) -> Path:
    return temporary.parent / temporary.name.removeprefix(".").removesuffix(".incomplete")


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
