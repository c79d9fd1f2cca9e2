"""What tuning chooses and writes, with a timer that measures nothing; reading it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels.ops import tiles
from flamingo_kernels.ops.tiles import Key
from flamingo_kernels.tools import tune
from testing.targets import HAS_GPU

KEY: Key = ("media_forward", 64, 64, 2)
SHIPPED = tiles.shipped("sm_90")[KEY]


def active() -> LaunchConfig:
    kernel, head_dim, keys, itemsize = KEY
    return tiles.lookup(kernel, head_dim, itemsize, "sm_90", keys)


def chosen(times: dict[tuple[int, int, int], float]) -> tuple[int, int, int]:
    """The choice where the active tile takes its time in ``times``, and the others 10."""

    def timer(call) -> float:
        config = active()
        tile = (config.rows, config.num_warps, config.num_stages)
        if times.get(tile, 10.0) < 0:
            raise RuntimeError("out of resource: shared memory")
        return times.get(tile, 10.0)

    return tune.best_tile(KEY, "sm_90", SHIPPED, lambda: None, timer)[0]


def test_a_clear_win_replaces_the_shipped_tile() -> None:
    assert chosen({SHIPPED: 2.0, (32, 4, 1): 1.5, (128, 8, 1): 1.9}) == (32, 4, 1)


def test_noise_does_not() -> None:
    assert chosen({SHIPPED: 2.0, (32, 4, 1): 1.97}) == SHIPPED


def test_what_cannot_run_is_passed_over() -> None:
    assert chosen({SHIPPED: 2.0, (128, 8, 3): -1.0, (32, 8, 1): 1.0}) == (32, 8, 1)
    with pytest.raises(RuntimeError, match="out of resource"):
        chosen({SHIPPED: -1.0})


def test_nothing_stays_behind() -> None:
    before = active()
    chosen({SHIPPED: 2.0, (32, 4, 1): 1.5})
    assert active() == before and before.reason != tiles._MEASURED


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_shipped_tile_is_tuned(architecture: str) -> None:
    tuned = list(tune.tune(architecture, lambda call: 1.0, calls=lambda key: lambda: None))
    assert [key for key, *_ in tuned] == sorted(tiles.shipped(architecture))
    assert all(current == tile for _, current, tile, *_ in tuned)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_each_call_launches_its_kernel(architecture: str) -> None:
    """With the config of its key, on tensors without memory."""
    from flamingo_kernels._triton.launch import recording

    for key in tiles.shipped(architecture):
        with recording(architecture), tiles.trying(key, architecture, (16, 2, 7)):
            call = tune.call_of(key, device="meta")
            with recording(architecture) as recorder:
                call()
        used = [x.kernel.fn.__name__ for x in recorder.launches if x.config.num_stages == 7]
        assert used == [f"{key[0].replace('_shares', '')}_kernel"], key


def test_what_is_written_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configs.json"
    written = {KEY: {"sm_90": (32, 4, 1)}, ("latent_backward", 128, 16, 4): {"gfx942": (16, 4, 1)}}
    tiles.write(path, written)
    assert tiles.read(path) == written
    monkeypatch.setenv("FLAMINGO_TRITON_CONFIGS", str(path))
    tiles._measured.cache_clear()
    try:
        assert active() == LaunchConfig(32, 64, 4, 1, tiles._MEASURED)
        other = tiles.lookup("media_forward", 64, 2, "sm_80")
        assert other.reason != tiles._MEASURED
    finally:
        monkeypatch.undo()
        tiles._measured.cache_clear()
    assert active().reason != tiles._MEASURED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the whole file"),
        ("[]", "the whole file"),
        (json.dumps({"attention 64 64 2": {}}), "attention 64 64 2: unknown kernel"),
        (json.dumps({"media_forward 64": {}}), "media_forward 64: not enough values"),
        (json.dumps({"media_forward 64 64 2": {"sm_90": [64, 4]}}), "64 2: not enough values"),
        (json.dumps({"media_forward 64 64 2": {"sm_90": [60, 4, 1]}}), "power of two"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"configs\.json holds no launch conf.*{message}"):
        tiles.read(path)


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_tuning_is_refused_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune._triton, "unavailable_reason", lambda device_type: None)
    output = tmp_path / "configs.json"
    with pytest.raises(SystemExit) as caught:
        tune.main([str(output)])
    assert caught.value.code == 2 and not output.exists()
    assert "tuning measures on a GPU: torch finds none" in capsys.readouterr().err
    assert not torch.cuda.is_available()
