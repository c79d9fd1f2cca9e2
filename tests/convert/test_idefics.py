"""transformers' IDEFICS, converted: same logits, same tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from flamingo_kernels.convert import load_idefics
from testing.budgets import assert_parity
from testing.originals import IDEFICS_EOS, IDEFICS_IMAGE, IDEFICS_VOCAB, idefics

transformers = pytest.importorskip("transformers")
SETTINGS = [
    {"qk_layer_norms": True, "qk_layer_norms_perceiver": True},
    {"alpha_type": "vector", "qk_layer_norms": True},
    {"cross_layer_interval": 2, "qk_layer_norms_perceiver": True},
    {"tie_word_embeddings": True},
]
# Every other setting that changes its logits.
OTHERS = [
    {"hidden_act": "gelu"},
    {"hidden_act": "relu"},
    {"rms_norm_eps": 0.3, "qk_layer_norms": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 20.0, "factor": 4.0}},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 20.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
    {"vision_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 0.3}},
    {"vision_config": {"patch_size": 4}},
]


def prompt() -> dict[str, Tensor]:
    """Left padding, text before the first image, rows of one and of three images."""
    ids = torch.randint(3, IDEFICS_VOCAB, (2, 12))
    ids[0, :4] = 0
    ids[0, 6] = IDEFICS_IMAGE
    ids[1, [2, 6, 7]] = IDEFICS_IMAGE
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    pixels = torch.randn(2, 3, 1, 3, 16, 16)
    pixels[0, 1:] = 0
    counts = torch.tensor([1, 3])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "num_images": counts,
    }


def image_mask(ids: Tensor, images: int) -> Tensor:
    """By the processor's own functions."""
    module = transformers.models.idefics.processing_idefics
    tokenizer = SimpleNamespace(
        convert_tokens_to_ids=lambda token: IDEFICS_IMAGE, eos_token_id=IDEFICS_EOS
    )
    mask, _ = module.image_attention_mask_for_packed_input_ids(ids, tokenizer, return_tensors="pt")
    return module.incremental_to_binary_attention_mask(mask, "pt", num_classes=images)


def theirs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels = batch["pixel_values"][:, :, 0]
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "pixel_values": pixels,
        "image_attention_mask": image_mask(batch["input_ids"], pixels.shape[1]),
    }


@pytest.mark.parametrize("settings", [*SETTINGS, *OTHERS])
def test_parity(settings: dict) -> None:
    if "rope_parameters" in settings and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("this transformers ignores the rope_parameters of IDEFICS")
    peer = idefics(**settings)
    model = load_idefics(peer)
    batch = prompt()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, expected = model(**batch).logits, peer(**theirs(batch)).logits
        assert_parity(ours[real], expected[real])
        batch["pixel_values"] = batch["pixel_values"] + 1
        assert (model(**batch).logits - ours)[real].abs().max() > 100 * 1e-4


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_tokens(settings: dict) -> None:
    peer = idefics(**settings)
    model = load_idefics(peer)
    batch = prompt()
    expected = peer.generate(
        **theirs(batch), max_new_tokens=8, do_sample=False, suppress_tokens=[IDEFICS_IMAGE]
    )
    ours = model.generate(**batch, max_new_tokens=8, stop_token_ids=[IDEFICS_EOS])
    assert torch.equal(ours, expected)


def test_after_the_end_of_text_is_where_we_differ() -> None:
    """The processor hides the image from text after </s>; here text keeps its image."""
    peer = idefics()
    model = load_idefics(peer)
    batch = prompt()
    batch["input_ids"][1, 9] = IDEFICS_EOS
    with torch.no_grad():
        difference = (model(**batch).logits - peer(**theirs(batch)).logits).abs().amax(-1)
    real = batch["attention_mask"].bool()
    assert_parity(difference[0][real[0]], torch.zeros(8))
    assert_parity(difference[1, :10], torch.zeros(10))
    assert (difference[1, 10:] > 1e-3).all()


def test_from_a_directory(tmp_path) -> None:
    peer = idefics(**SETTINGS[0])
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_idefics(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**prompt_of(0)).logits, load_idefics(peer)(**prompt_of(0)).logits)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"hidden_act": "gelu"', '"hidden_act": "none"'))
    with pytest.raises(ValueError, match=r"cannot build the model that .*config\.json describes"):
        load_idefics(tmp_path)
    config.write_text(text)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-.*\.safetensors, which is missing"):
        load_idefics(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "gelu_new"}, {"hidden_act": "tanh"}, {"alpha_type": "x"}, {"head_dim": 4}],
)
def test_settings_that_change_the_logits_are_refused(changes: dict) -> None:
    peer = idefics()
    for name, value in changes.items():
        setattr(peer.config, name, value)
        with pytest.raises(ValueError, match=f"Idefics.*: {name} '?{value}'? is not supported"):
            load_idefics(peer)


def test_dropout_is_named(caplog) -> None:
    load_idefics(idefics(dropout=0.1))
    assert "dropout is not applied in training" in caplog.text


def prompt_of(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return prompt()


def test_saved_whole_and_loaded(tmp_path) -> None:
    from flamingo_kernels import FlamingoModel

    model = load_idefics(idefics(**SETTINGS[1]))
    model.save_pretrained(tmp_path, include_frozen=True)
    loaded = FlamingoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**prompt_of(0)).logits, model(**prompt_of(0)).logits)


def test_bad_checkpoints(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        load_idefics(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="not an IDEFICS checkpoint: its model_type is 'llama'"):
        load_idefics(tmp_path)
    for text, message in (
        ("[]", "config.json must hold a JSON object, not a list"),
        ("{", "config.json is not JSON: "),
        ('{"use_resampler": true, "vision_config": 3}', "config.* IDEFICS: "),
        ('{"use_resampler": true, "hidden_size": "a"}', "config.* IDEFICS: "),
    ):
        text = text.replace("{", '{"model_type": "idefics", ') if len(text) > 2 else text
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_idefics(tmp_path)
    with pytest.raises(ValueError, match="Linear is not an IDEFICS checkpoint"):
        load_idefics(nn.Linear(1, 1))
    peer = idefics()
    peer.config.use_resampler = False
    with pytest.raises(ValueError, match=r"without a resampler \(use_resampler=False\)"):
        load_idefics(peer)
    peer = idefics()
    del peer.model.gated_cross_attn_layers[1].mlp.gate_proj
    with pytest.raises(ValueError, match=r"parts are missing of gated_cross_attn_layers\.1\.ff\.1"):
        load_idefics(peer)
    peer = idefics()
    peer.model.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"not an IDEFICS checkpoint: model\.extra\.bias, model"):
        load_idefics(peer)
