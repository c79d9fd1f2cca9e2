"""save_pretrained and from_pretrained: round trip, atomic writes, bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flamingo_kernels import FlamingoModel
from flamingo_kernels.model import checkpoint
from tests.model.conftest import make_model, ragged_batch


def test_round_trip_of_everything(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "all", include_frozen=True)
    loaded = FlamingoModel.from_pretrained(tmp_path / "all").eval()
    batch = ragged_batch()
    assert torch.equal(loaded(**batch.arguments()).logits, model(**batch.arguments()).logits)
    assert loaded.config == model.config


def test_round_trip_of_the_trainable_tensors(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    trainable = sum(p.numel() * p.element_size() for p in model.trainable_parameters().values())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert trainable <= size < trainable * 1.05  # the header of so small a file is 2 %
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.trainable_parameters())
    with pytest.raises(ValueError, match="holds no vision_encoder; pass vision_encoder="):
        FlamingoModel.from_pretrained(tmp_path)
    loaded = FlamingoModel.from_pretrained(
        tmp_path,
        "torch",
        vision_encoder=model.vision_encoder,
        language_model=model.language_model,
    )
    assert loaded.kernel == "torch"
    for name, parameter in loaded.trainable_parameters().items():
        assert torch.equal(parameter, model.trainable_parameters()[name])


def test_bf16_tensors_stay_bf16(tmp_path: Path) -> None:
    make_model().bfloat16().save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors: dict, file: Path, metadata: dict) -> None:
        Path(file).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path, include_frozen=True)
    return tmp_path


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_file(saved: Path, kept: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is corrupt or not a safetensors"):
        FlamingoModel.from_pretrained(saved)


def test_foreign_and_missing_tensors(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    tensors["head.weight"] = tensors.pop("perceiver.latents")
    tensors["gated_cross_attn_layers.0.attn_gate"] = torch.zeros(2)
    save_file(tensors, file)
    with pytest.raises(ValueError) as caught:
        FlamingoModel.from_pretrained(saved)
    message = str(caught.value)
    assert "1 missing (perceiver.latents)" in message
    assert "1 unknown (head.weight)" in message
    assert (
        "1 of another shape (gated_cross_attn_layers.0.attn_gate (2,) instead of (1,))" in message
    )


def test_a_pickle_is_refused(saved: Path) -> None:
    torch.save({"a": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="corrupt or not a safetensors file"):
        FlamingoModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list, expected an object"),
        (json.dumps({"model_type": "llama"}), "is not a flamingo_kernels config: .*no section"),
    ],
)
def test_bad_config(saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        FlamingoModel.from_pretrained(saved)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*nowhere"):
        FlamingoModel.from_pretrained(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        FlamingoModel.from_pretrained(saved)


def test_unknown_kernel(saved: Path) -> None:
    with pytest.raises(ValueError, match="unknown kernel 'cudnn'; known: auto, triton, cpp, torch"):
        FlamingoModel.from_pretrained(saved, kernel="cudnn")
