"""save_pretrained and from_pretrained: round trip, atomic writes, bad files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.language import HuggingFaceLanguageModel
from flamingo_kernels.language.config import HuggingFaceLanguageConfig
from flamingo_kernels.model import saving
from testing.backbones import language_model
from testing.tiny_model import TINY, make_model, ragged_batch


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["mpt", "gpt_neox"])
def test_round_trip_of_hugging_face_parts(tmp_path: Path, model_type: str, tied: bool) -> None:
    sizes = {
        "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
        "gpt_neox": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    }[model_type]
    language = HuggingFaceLanguageConfig(
        model_type=model_type,
        options={**sizes, "vocab_size": 264, "tie_word_embeddings": tied},
        dim=32,
        depth=2,
        vocab_size=264,
    )
    model = FlamingoModel(replace(TINY, language=language)).eval()
    model.save_pretrained(tmp_path, include_frozen=True)
    loaded = FlamingoModel.from_pretrained(tmp_path).eval()
    ids, pixels = torch.tensor([[TINY.image_token_id, 5, 6]]), torch.randn(1, 1, 1, 3, 32, 32)
    assert torch.equal(loaded(ids, pixels).logits, model(ids, pixels).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path, include_frozen=True)
    loaded = FlamingoModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    make_model().save_pretrained(tmp_path, include_frozen=True)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors: dict, file: Path, metadata: dict) -> None:
        Path(file).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make_model(attend="previous").save_pretrained(tmp_path, include_frozen=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert FlamingoModel.from_pretrained(tmp_path).config == TINY


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


def rewrite(folder: Path, change, config: object = None) -> None:
    """Change the tensors of a checkpoint, and its config text where one is given."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    change(tensors)
    if config is not None:
        metadata[saving.CONFIG_KEY] = config
    save_file(tensors, file, metadata)


def test_foreign_and_missing_tensors(saved: Path) -> None:
    def change(tensors: dict) -> None:
        tensors["head.weight"] = tensors.pop("perceiver.latents")
        tensors["gated_cross_attn_layers.0.attn_gate"] = torch.zeros(2)
        tensors["gated_cross_attn_layers.1.attn_gate"] = torch.zeros(1).long()

    rewrite(saved, change)
    with pytest.raises(ValueError) as caught:
        FlamingoModel.from_pretrained(saved)
    message = str(caught.value)
    assert "1 missing (perceiver.latents)" in message
    assert "1 unknown (head.weight)" in message
    assert (
        "1 of another shape (gated_cross_attn_layers.0.attn_gate (2,) instead of (1,))" in message
    )
    assert "1 of another kind (gated_cross_attn_layers.1.attn_gate torch.int64" in message


def test_options_that_transformers_refuses(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = FlamingoModel.from_backbones(16, language_model("llama"))
    model.save_pretrained(tmp_path, include_frozen=True)
    config = model.config.to_dict()
    config["language"]["options"]["num_attention_heads"] = []
    rewrite(tmp_path, lambda tensors: None, json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot build the model that .* describes"):
        FlamingoModel.from_pretrained(tmp_path)


def test_a_pickle_is_refused(saved: Path) -> None:
    torch.save({"a": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="corrupt or not a safetensors file"):
        FlamingoModel.from_pretrained(saved)


def test_another_projects_safetensors_are_refused(saved: Path) -> None:
    save_file({"a": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="not written by flamingo_kernels"):
        FlamingoModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        json.dumps({"model_type": "llama"}),
        json.dumps({**FlamingoConfig.from_name("tiny").to_dict(), "image_token_id": "x"}),
    ],
)
def test_bad_config(saved: Path, config: str) -> None:
    rewrite(saved, lambda tensors: None, config)
    with pytest.raises(ValueError, match=r"the config in .* is not one of flamingo_kernels"):
        FlamingoModel.from_pretrained(saved)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors in .*nowhere"):
        FlamingoModel.from_pretrained(tmp_path / "nowhere")


def test_unknown_kernel(saved: Path) -> None:
    with pytest.raises(ValueError, match="unknown kernel 'cudnn'; known: auto, triton, cpp, torch"):
        FlamingoModel.from_pretrained(saved, kernel="cudnn")


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ({"vision_encoder": "clip"}, TypeError, "vision_encoder must be a module .* got str"),
        ({"language_model": torch.nn.Linear(1, 1)}, TypeError, "attributes dim, num_blocks"),
    ],
)
def test_foreign_parts(part: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlamingoModel(TINY, **part)


def test_parts_of_another_size() -> None:
    config = replace(TINY, language=replace(TINY.language, depth=1))
    shallow = FlamingoModel(config).language_model
    with pytest.raises(ValueError, match=r"language_model.num_blocks is 1, the config says 4"):
        FlamingoModel(TINY, language_model=shallow)


ABSURD = 10**9


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("language", {"depth": ABSURD}),
        ("language", {"depth": 10**30}),
        ("language", {"dim": 10**7}),
        ("language", {"vocab_size": 10**12}),
        ("language", {"ff_mult": ABSURD}),
        ("resampler", {"depth": ABSURD}),
        ("resampler", {"num_latents": 10**11}),
        ("vision", {"depths": [ABSURD, 1]}),
        ("vision", {"image_size": ABSURD}),
        ("cross_attention", {"ff_mult": 10**8}),
        ("cross_attention", {"heads": 10**8}),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    section: str, changes: dict, saved: Path, monkeypatch
) -> None:
    config = TINY.to_dict()
    config[section] |= changes
    rewrite(saved, lambda tensors: None, json.dumps(config))
    monkeypatch.setattr(FlamingoModel, "__init__", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=r"model\.safetensors.* config"):
        FlamingoModel.from_pretrained(saved)


LLAMA = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def with_llama(saved: Path, **options: object) -> None:
    """Give a checkpoint a language model of transformers, in its header alone."""
    config = TINY.to_dict()
    config["language"] = {
        "kind": "huggingface",
        "model_type": options.pop("model_type", "llama"),
        "options": {**LLAMA, **options},
        **{"dim": 32, "depth": 2, "vocab_size": 300},
    }
    rewrite(saved, lambda tensors: None, json.dumps(config))


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "evil/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"auto_map": {"AutoModelForCausalLM": "evil/code--modeling.Evil"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"use_kernels": True},
        {"trust_remote_code": True},
        {"dtype": "load"},
        {"torch_dtype": "float16"},
        {"hidden_act": "evil/kernel"},
        {"hidden_act": {"name": "evil:kernel"}},
        {"layer_types": ["full_attention", "../evil"]},
        {"rope_parameters": {"attn_implementation": "evil"}},
        {"text_config": {"attn_implementation": "evil"}},
        {"anything": "word"},
        {"tokenizer_class": "Evil"},
        {"model_type": "evil"},
        {"model_type": "timm_backbone", "backbone": "resnet18"},
        {"num_hidden_layers": ABSURD},
        {"n_layer": ABSURD},
        {"layer_types": ["full_attention"] * 3, "num_hidden_layers": ABSURD},
        {"hidden_size": 2**40},
    ],
)
def test_options_of_transformers_are_plain(options: dict, saved: Path, monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    with_llama(saved, **options)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_config",
        lambda *_, **__: pytest.fail("it was built"),
    )
    if options == {"hidden_size": 2**40}:
        monkeypatch.undo()
    with pytest.raises(ValueError, match=r"options|model_type|config has|describes"):
        FlamingoModel.from_pretrained(saved)


@pytest.mark.parametrize("model_type", ["gpt_neox", "mpt", "opt", "llama", "gpt2"])
def test_what_is_saved_can_be_read(model_type: str) -> None:
    """Every option that a configuration writes is one that is taken back."""
    pytest.importorskip("transformers")
    model = language_model(model_type)
    model.config.tokenizer_class, model.config.note = "Evil", "any text / at all"
    config = HuggingFaceLanguageModel(model).config
    assert config.options and not {"tokenizer_class", "note"} & config.options.keys()
    again = HuggingFaceLanguageModel.from_config(config)
    assert again.config == config
