"""Reading others' files: nothing in them runs."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from safetensors.torch import save_file

from flamingo_kernels.convert import load_timm_nfnet, read_tensors
from flamingo_kernels.convert.table import Rule, convert
from flamingo_kernels.vision import NFNet, NFNetConfig


class Bomb:
    def __reduce__(self):
        raise_on_load = "raise SystemExit('code of the file ran')"
        return exec, (raise_on_load,)


def test_a_pickle_with_code_is_refused(tmp_path) -> None:
    file = tmp_path / "bad.pt"
    torch.save({"weight": torch.zeros(1), "bomb": Bomb()}, file)
    message = r"bad\.pt holds more than tensors and was not read, .* run its (\w+\.)?exec \("
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(file)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"not a checkpoint at all", b"", b"PK\x03\x04junk", b"\x80\x02junk", bytes(1000)]
)
def test_garbage_is_called_garbage(content: bytes, tmp_path) -> None:
    file = tmp_path / "bad.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_tensors(file)
    assert str(caught.value) == f"{file} is truncated or not a file of torch.save"


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_pickles_raise_value_errors_alone(legacy: bool, tmp_path) -> None:
    file, draw = tmp_path / "damaged.pt", random.Random(0)
    tensors = {"model_state_dict": {"module.a": torch.randn(4, 4), "b": torch.ones(3)}, "epoch": 3}
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    whole, refused = file.read_bytes(), 0
    for number in range(300):
        damaged = bytearray(whole)
        if number % 3 == 0:
            damaged = damaged[: draw.randrange(len(whole))]
        for _ in range(draw.randrange(1, 5)):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            read_tensors(file)
        except ValueError:
            refused += 1
    assert refused > 100


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
    with pytest.raises(ValueError, match="no tensors by name: 0 is not a name"):
        read_tensors({0: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"holds 'a' twice, with and without 'module\.'"):
        read_tensors({"module.a": torch.zeros(1), "a": torch.zeros(1)})
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        (b"[]", "index.json must hold a JSON object, not a list"),
        (b"{", "index.json is not JSON: "),
        (b"\xff\xfe\x00", "index.json is not JSON: "),
        (b'{"weight_map": {"a": 1}}', "its weight_map is wrong"),
        (b'{"weight_map": []}', "its weight_map is wrong"),
        (b"{}", "its weight_map is wrong"),
    ):
        index.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            read_tensors(tmp_path)
    index.write_text('{"weight_map": {"w": "../w"}}')
    with pytest.raises(ValueError, match=r"'\.\./w', which is not a file of its own directory"):
        read_tensors(tmp_path)


def test_timm_nfnet(caplog) -> None:
    config = NFNetConfig(
        image_size=32, widths=(32, 64), depths=(1, 1), stem_width=16, group_width=16
    )
    encoder = NFNet(config)
    state = {**encoder.state_dict(), "head.fc.weight": torch.zeros(10, 128)}
    with caplog.at_level(logging.INFO, "flamingo_kernels"):
        loaded = load_timm_nfnet(state, config)
    assert caplog.messages == [f"{len(state) - 1} tensors used, 1 left out (classifier)"]
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(images), encoder.eval()(images))
    state.pop("final_conv.weight")
    with pytest.raises(
        ValueError, match=r"NFNet checkpoint does not fit .* final_conv\.weight mis"
    ):
        load_timm_nfnet(state, config)


def test_tables_are_strict() -> None:
    table = (
        Rule("a|b", "x"),
        Rule("c", "y", part=0),
        Rule("d", "y", part=1),
        Rule("e", reason="-"),
    )
    one = torch.ones(1)
    assert convert({"a": one, "c": one, "d": one, "e": one.int()}, table, "it").used == 3
    for tensors, message in (
        ({"a": one, "b": one}, "it: two keys for one tensor: b for x"),
        ({"a": one.to(torch.int8)}, r"floating-point tensors: a \(torch\.int8, torch\.strided\)"),
        ({"a": one.to(torch.complex64)}, r"floating-point tensors: a \(torch\.complex64, "),
        ({"a": torch.eye(3).to_sparse()}, r"floating-point tensors: a \(torch\.float32, .*sparse"),
        ({"c": one, "d": one, "f": one}, "not it: f not in its layout"),
        ({"d": one}, "it: parts are missing of y"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tensors, table, "it")
