"""How pixels are normalised: by architecture, by a folder, as recorded, or not known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flamingo_kernels import FlamingoModel
from flamingo_kernels.cli import main
from flamingo_kernels.cli.loading import read_backbone
from flamingo_kernels.vision import (
    HuggingFaceVisionConfig,
    read_vision_encoder,
    wrap_vision_encoder,
)
from flamingo_kernels.vision.pixel_statistics import read_preprocessing
from testing.backbones import clip, language_model

pytest.importorskip("transformers")
CLIP, HALF, IMAGENET = (0.4815, 0.4578, 0.4082), (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def tower(model_type: str):
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(model_type, **SIZES)).eval()


def folder_with(path: Path, values: object, name: str = "preprocessor_config.json") -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("model_type", "mean"),
    [
        ("clip_vision_model", CLIP),
        ("chinese_clip_vision_model", CLIP),
        ("aimv2_vision_model", CLIP),
        ("siglip_vision_model", HALF),
        ("vit", HALF),
        ("beit", HALF),
        ("idefics3_vision", HALF),
        ("deit", IMAGENET),
        ("vit_mae", IMAGENET),
    ],
)
def test_of_an_architecture(model_type: str, mean: tuple[float, ...]) -> None:
    encoder = wrap_vision_encoder(tower(model_type))
    assert encoder.image_mean == pytest.approx(mean, abs=1e-4)
    assert encoder.config.image_mean == encoder.image_mean


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        (
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 0.5, 0.25]},
            (0.1, 0.2, 0.3),
            (1, 0.5, 0.25),
        ),
        ({"image_mean": 0.5, "image_std": 0.25}, (0.5,) * 3, (0.25,) * 3),
        ({"do_normalize": False}, (0,) * 3, (1,) * 3),
        ({"do_normalize": False, "do_rescale": False}, (0,) * 3, (1 / 255,) * 3),
        (
            {"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False},
            (0.5,) * 3,
            (0.2,) * 3,
        ),
        (
            {"do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True},
            (0.5,) * 3,
            (0.5,) * 3,
        ),
        (
            {
                "rescale_factor": 0.00392156862745098,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            },
            (0.5,) * 3,
            (0.5,) * 3,
        ),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_of_a_folder(values, mean, std, nested: bool, tmp_path) -> None:
    if nested:
        folder_with(tmp_path, {"image_processor": values}, "processor_config.json")
    else:
        folder_with(tmp_path, values)
    statistics = read_preprocessing(tmp_path).statistics
    assert statistics.mean == pytest.approx(mean) and statistics.std == pytest.approx(std)


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"size": 24}, 24),
        ({"size": {"height": 24, "width": 24}}, 24),
        ({"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}, 24),
        ({"size": {"shortest_edge": 30}, "crop_size": 24, "do_center_crop": False}, 30),
        ({"size": {"height": 24, "width": 30}}, None),
        ({}, None),
    ],
)
def test_sizes_of_a_folder(values, size, tmp_path) -> None:
    assert read_preprocessing(folder_with(tmp_path, values)) == (None, size)
    assert read_preprocessing(tmp_path / "none") == (None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must hold a JSON object, not a list"),
        (" " * (2**20 + 1), "has more than 1048576 bytes"),
        ({"image_mean": [0.5], "image_std": [0.5] * 3}, "image_mean must be three numbers"),
        ({"image_mean": "abc", "image_std": [0.5] * 3}, "image_mean must be three numbers"),
        ({"image_mean": [True] * 3, "image_std": [0.5] * 3}, "image_mean must be three numbers"),
        ({"image_mean": [float("nan")] * 3, "image_std": [0.5] * 3}, "image_mean must be finite"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5, 0, 0.5]}, "image_std must be finite and po"),
        ({"image_mean": [10**400] * 3, "image_std": [0.5] * 3}, "int too large"),
        ({"image_mean": [123.7] * 3, "image_std": [58.4] * 3}, r"not those of pixels in 0\.\.1"),
        ({"do_normalize": "no"}, "do_normalize must be true or false"),
        ({"do_normalize": False, "rescale_factor": 0}, "rescale_factor must be a positive number"),
        ({"do_normalize": False, "rescale_factor": 5e-324}, "not those of pixels|must be finite"),
        ({"do_flip_channel_order": True}, "BGR are not supported"),
        ({"size": 10**9}, r"size must be in 1\.\.16384, got 1000000000"),
    ],
)
def test_what_a_folder_cannot_mean(values, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json.*({message})"):
        read_preprocessing(folder_with(tmp_path, values))


@pytest.mark.parametrize("model_type", ["vit", "clip"])
def test_a_folder_goes_before_the_architecture(model_type: str, tmp_path) -> None:
    """Also the folder of a model of two towers."""
    if model_type == "clip":
        from transformers import CLIPConfig, CLIPModel

        text = {k: v for k, v in SIZES.items() if k not in ("image_size", "patch_size")}
        model = CLIPModel(CLIPConfig(vision_config=SIZES, text_config=text))
    else:
        model = tower(model_type)
    model.save_pretrained(tmp_path)
    folder_with(tmp_path, {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "size": 99})
    for read in (read_vision_encoder(tmp_path), read_backbone("AutoModel", tmp_path)):
        encoder = wrap_vision_encoder(read)
        assert (encoder.image_mean, encoder.image_std) == ((0.4,) * 3, (0.3,) * 3)
        assert encoder.image_size == 16  # which its positions are made for


@pytest.mark.parametrize("include_frozen", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_what_was_trained_with_is_recorded(include_frozen, with_config, tmp_path) -> None:
    given = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)}
    config = None
    if with_config:
        config = FlamingoModel.from_backbones(clip(), language_model("llama")).config
        values = config.to_dict()
        values["vision"] |= {"image_mean": None, "image_std": None}
        config = type(config).from_dict(values)
    encoder = wrap_vision_encoder(clip(), **given)
    model = FlamingoModel.from_backbones(encoder, language_model("llama"), config)
    model.save_pretrained(tmp_path, include_frozen)
    parts = {}
    if not include_frozen:
        parts = {"vision_encoder": clip(), "language_model": language_model("llama")}
    loaded = FlamingoModel.from_pretrained(tmp_path, **parts)
    for name, value in given.items():
        assert getattr(loaded.vision_encoder, name) == value
    other = wrap_vision_encoder(clip(), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    message = r"has image_mean=\(0.5, 0.5, 0.5\), but the config says image_mean=\(0.1, 0.2, 0.3\)"
    with pytest.raises(ValueError, match=message):
        FlamingoModel.from_pretrained(tmp_path, **{**parts, "vision_encoder": other})


def test_statistics_are_checked() -> None:
    for wrong in ({"image_mean": (0.5,) * 3}, {"image_mean": (0.5,) * 3, "image_std": (0.0,) * 3}):
        with pytest.raises(ValueError, match="image_std"):
            wrap_vision_encoder(clip(), **wrong)
        with pytest.raises(ValueError, match="image_std"):
            HuggingFaceVisionConfig(
                model_type="x", image_size=1, output_dim=1, drop_class_token=None, **wrong
            )


def test_the_commands_name_an_unknown_architecture(tmp_path, capsys) -> None:
    """Until its folder tells."""
    image = pytest.importorskip("PIL.Image")
    from flamingo_kernels.language import add_media_tokens
    from testing.backbones import word_tokenizer

    unknown = tower("ijepa")
    assert wrap_vision_encoder(unknown).image_mean is None
    unknown.save_pretrained(tmp_path / "vision")
    tokenizer, lm = word_tokenizer("a", "cat"), language_model("llama", vocab_size=3)
    add_media_tokens(tokenizer, lm)
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    FlamingoModel.from_backbones(unknown, lm).save_pretrained(tmp_path / "m")
    image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    command = ["generate", "--text", "a", "--max-new-tokens", "1"]
    for name, value in (("image", "a.png"), ("vision-encoder", "vision"), ("model", "m")):
        command += [f"--{name}", str(tmp_path / value)]
    command += ["--language-model", str(tmp_path / "lm")]
    assert main(command) == 1
    assert "put a preprocessor_config.json" in capsys.readouterr().err.splitlines()[-1]
    folder_with(tmp_path / "vision", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert main(command) == 0
