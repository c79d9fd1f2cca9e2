"""Reading others' files: nothing in them runs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from flamingo_kernels.convert import load_timm_nfnet, read_tensors
from flamingo_kernels.vision import NFNet, NFNetConfig


class Bomb:
    def __reduce__(self):
        raise_on_load = "raise SystemExit('code of the file ran')"
        return exec, (raise_on_load,)


def test_a_pickle_with_code_is_refused(tmp_path) -> None:
    file = tmp_path / "bad.pt"
    torch.save({"weight": torch.zeros(1), "bomb": Bomb()}, file)
    with pytest.raises(ValueError, match=r"bad\.pt holds more than tensors and was not read"):
        read_tensors(file)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_files(suffix: str, tmp_path) -> None:
    file = tmp_path / f"cut.{suffix}"
    tensors = {"weight": torch.randn(100)}
    if suffix == "pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    assert torch.equal(read_tensors(file)["weight"], tensors["weight"])
    whole = file.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"cut\.{suffix} (is truncated or not|holds more)"):
            read_tensors(file)


def test_other_contents(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_tensors(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no model"):
        read_tensors(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list, not tensors by name"):
        read_tensors(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no tensors by name: 'epoch' is a int"):
        read_tensors({"epoch": 3})
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../w"}}')
    with pytest.raises(ValueError, match=r"'\.\./w', which is not a file of its own directory"):
        read_tensors(tmp_path)


def test_timm_nfnet() -> None:
    config = NFNetConfig(
        image_size=32, widths=(32, 64), depths=(1, 1), stem_width=16, group_width=16
    )
    encoder = NFNet(config)
    state = {**encoder.state_dict(), "head.fc.weight": torch.zeros(10, 128)}
    loaded = load_timm_nfnet(state, config)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(images), encoder.eval()(images))
    state.pop("final_conv.weight")
    with pytest.raises(
        ValueError, match=r"NFNet checkpoint does not fit .* final_conv\.weight mis"
    ):
        load_timm_nfnet(state, config)
