"""The commands ``generate`` and ``convert``: text, files, and errors in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.cli import main
from flamingo_kernels.convert import load_open_flamingo
from flamingo_kernels.language import add_media_tokens
from testing.backbones import (
    END_OF_CHUNK,
    IMAGE,
    clip,
    language_model,
    open_gates,
    word_tokenizer,
)
from testing.originals import idefics, open_flamingo, released

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    file = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 30, 90)).save(file)
    return str(file)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = open_gates(FlamingoModel(FlamingoConfig.from_name("tiny")))
    model.save_pretrained(tmp_path / "tiny", include_frozen=True)
    return str(tmp_path / "tiny")


def test_generate(tiny: str, picture: str, capsys) -> None:
    short = ["--max-new-tokens", "4"]
    images = ["--image", picture, "--image", picture]
    assert main(["generate", "--model", tiny, *images, "--text", "Output:", *short]) == 0
    first = capsys.readouterr()
    assert "11 tokens" not in first.out and "10 tokens, 2 image(s)" in first.err
    marked = "<image><image>Output:"
    assert main(["generate", "--model", tiny, *images, "--text", marked, *short]) == 0
    assert capsys.readouterr().out == first.out
    assert main(["generate", "--model", tiny, "--text", "no image", *short]) == 0
    beams = [*images, "--text", "Output:", "--num-beams", "2"]
    assert main(["generate", "--model", tiny, *beams, *short]) == 0
    with pytest.raises(SystemExit):
        main(["generate", "--model", tiny, "--text", "x", "--fit", "stretch"])
    assert "invalid choice: 'stretch' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [True, False])
def test_generate_with_a_hugging_face_model(whole: bool, tmp_path, picture, capsys) -> None:
    tokenizer = word_tokenizer("a", "cat")
    lm = language_model("llama", vocab_size=3)
    add_media_tokens(tokenizer, lm)
    open_gates(FlamingoModel.from_backbones(clip(), lm)).save_pretrained(tmp_path / "m", whole)
    tokenizer.save_pretrained(tmp_path / ("m" if whole else "lm"))
    lm.save_pretrained(tmp_path / "lm")
    clip().save_pretrained(tmp_path / "vision")
    command = ["generate", "--model", str(tmp_path / "m"), "--image", picture, "--text", " a cat"]
    command += ["--num-beams", "2", "--max-new-tokens", "3", "--fit", "crop"]
    if not whole:
        assert main(command) == 1
        assert "holds no vision_encoder; pass vision_encoder=" in capsys.readouterr().err
        command += ["--language-model", str(tmp_path / "lm")]
        command += ["--vision-encoder", str(tmp_path / "vision")]
    assert main(command) == 0
    # Without the media tokens, but with a word of that id.
    word_tokenizer("a", "cat", "dog", "emu", "fox").save_pretrained(tmp_path / "other")
    assert main([*command, "--tokenizer", str(tmp_path / "other")]) == 1
    assert "has no token for images with id 4" in capsys.readouterr().err


def test_generate_errors(tiny: str, picture: str, tmp_path, capsys) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(picture).read_bytes()[:50])
    config = dataclasses.replace(
        FlamingoConfig.from_name("tiny"), image_token_id=7, pad_token_id=None
    )
    FlamingoModel(config).save_pretrained(tmp_path / "other", include_frozen=True)
    word_tokenizer("a").save_pretrained(tmp_path / "other")
    for arguments, message in (
        (["--model", tiny, "--image", str(broken)], "cannot decode the image"),
        (["--model", tiny, "--image", str(tmp_path / "none.jpg")], "No such file"),
        (["--model", tiny, "--text", "<image><image>", "--image", picture], "2 <image> marker(s)"),
        (["--model", str(tmp_path)], "no model.safetensors in"),
        (["--model", tiny, "--num-beams", "0"], "num_beams must be at least 1, got 0"),
        (["--model", tiny, "--num-beams", "-3"], "num_beams must be at least 1, got -3"),
        (["--model", str(tmp_path / "other")], "has no token for images with id 7"),
    ):
        command = ["generate", *arguments]
        if "--text" not in arguments:
            command += ["--text", "x"]
        assert main(command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("flamingo-kernels generate: ") and message in error


def test_convert_open_flamingo(tmp_path, capsys) -> None:
    """The file alone, without a backbone; then loaded with the backbones."""
    peer = open_flamingo("gpt_neox", 2)
    torch.save(released(peer), tmp_path / "checkpoint.pt")
    expected = load_open_flamingo(released(peer), clip(), language_model("gpt_neox"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(expected.config.to_dict()))
    paths = [str(tmp_path / "checkpoint.pt"), str(tmp_path / "out")]
    assert main(["convert", "open-flamingo", *paths, "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert f"{len(released(peer))} tensors used; load it" in out and out.count("\n") == 1
    parts = {"vision_encoder": clip(), "language_model": language_model("gpt_neox")}
    loaded = FlamingoModel.from_pretrained(tmp_path / "out", **parts)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_a_converted_checkpoint(
    dtype: torch.dtype, tmp_path, picture, capsys
) -> None:
    """Its embeddings are in fp32; the published language model may be in bf16."""
    state = released(open_flamingo("gpt_neox", 1))
    model = load_open_flamingo(state, clip(), language_model("gpt_neox"))
    torch.save(state, tmp_path / "checkpoint.pt")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(model.config.to_dict()))
    paths = [str(tmp_path / "checkpoint.pt"), str(tmp_path / "out")]
    assert main(["convert", "open-flamingo", *paths, "--config", str(config)]) == 0
    tokenizer = word_tokenizer(*(f"w{i}" for i in range(IMAGE - 1)))
    tokenizer.add_tokens(["<image>", "<|endofchunk|>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<|endofchunk|>"]) == [IMAGE, END_OF_CHUNK]
    tokenizer.save_pretrained(tmp_path / "lm")
    language_model("gpt_neox").to(dtype).save_pretrained(tmp_path / "lm")
    clip().save_pretrained(tmp_path / "vision")
    command = ["generate", "--model", paths[1], "--text", "w1 w2", "--max-new-tokens", "3"]
    command += ["--language-model", str(tmp_path / "lm"), "--image", picture]
    command += ["--vision-encoder", str(tmp_path / "vision")]
    assert main(command) == 0, capsys.readouterr().err


def test_convert_errors_leave_nothing(tmp_path, capsys) -> None:
    torch.save(released(open_flamingo("gpt_neox", 2)), tmp_path / "small.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "small.pt").read_bytes()[:1000])
    torch.save({"model": print}, tmp_path / "code.pt")
    torch.save({0: torch.ones(1)}, tmp_path / "numbers.pt")
    for name, message in (
        ("small.pt", "width 32, cross-attention before blocks [1]) is none of open-flamingo-3b"),
        ("cut.pt", "is truncated or not a file of torch.save"),
        ("code.pt", "holds more than tensors and was not read"),
        ("numbers.pt", "holds no tensors by name: 0 is not a name"),
        ("none.pt", "no checkpoint"),
    ):
        paths = [str(tmp_path / name), str(tmp_path / "out")]
        assert main(["convert", "open-flamingo", *paths]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 2 and message in error[1]
    assert not (tmp_path / "out").exists()


def test_bad_files_of_others_are_one_line(tmp_path, picture, capsys) -> None:
    """Files of the language model, of its tokenizer, and of configurations are damaged."""
    tokenizer, lm = word_tokenizer("a", "cat"), language_model("llama", vocab_size=3)
    add_media_tokens(tokenizer, lm)
    FlamingoModel.from_backbones(clip(), lm).save_pretrained(tmp_path / "m")
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    clip().save_pretrained(tmp_path / "vision")

    def damaged(name: str, file: str, content: bytes) -> str:
        shutil.copytree(tmp_path / "lm", tmp_path / name)
        (tmp_path / name / file).write_bytes(content)
        return str(tmp_path / name)

    whole = (tmp_path / "lm" / "model.safetensors").read_bytes()
    command = ["generate", "--model", str(tmp_path / "m"), "--image", picture, "--text", " a cat"]
    command += ["--max-new-tokens", "2"]
    vision, good = str(tmp_path / "vision"), str(tmp_path / "lm")
    for language, encoder, message in (
        (damaged("cut", "model.safetensors", whole[:-100]), vision, "load a language model from"),
        (damaged("config", "config.json", b"{"), vision, "cannot load a language model from"),
        (damaged("tokens", "tokenizer.json", b"{}"), vision, "cannot load a tokenizer from"),
        (vision, vision, "cannot load a language model from"),
        (good, good, "vision_encoder.output_dim is 32, the config says 16"),
    ):
        assert main([*command, "--language-model", language, "--vision-encoder", encoder]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("flamingo-kernels generate: ") and message in error
        assert len(error) < 500 + len(str(tmp_path))
    torch.save(released(open_flamingo("gpt_neox", 2)), tmp_path / "ok.pt")
    paths = [str(tmp_path / "ok.pt"), str(tmp_path / "out")]
    for name, content in (
        ("list.json", "[]"),
        ("broken.json", "{"),
        ("half.json", '{"name": "x"}'),
        ("wrong.json", '{"vision": 3, "language": 4, "resampler": 5, "cross_attention": 6}'),
    ):
        (tmp_path / name).write_text(content)
        config = ["--config", str(tmp_path / name)]
        assert main(["convert", "open-flamingo", *paths, *config]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{name} is not one of flamingo_kernels" in error
    assert not (tmp_path / "out").exists()


def test_released_models_are_recognised_by_their_sizes() -> None:
    from flamingo_kernels.convert.open_flamingo import _released_config

    for name in ("open-flamingo-3b", "open-flamingo-4b", "open-flamingo-9b"):
        config = FlamingoConfig.from_name(name)
        tensors = {
            f"lang_encoder.x.{block}.gated_cross_attn_layer.attn.norm.weight": torch.empty(
                config.language.dim, device="meta"
            )
            for block in config.cross_attention_blocks
        }
        assert _released_config(tensors) == config


def test_convert_idefics(tmp_path, capsys) -> None:
    idefics().save_pretrained(tmp_path / "theirs")
    paths = [str(tmp_path / "theirs"), str(tmp_path / "out")]
    assert main(["convert", "idefics", *paths]) == 0
    assert FlamingoModel.from_pretrained(tmp_path / "out").config.name == "idefics"
    assert main(["convert", "idefics", *paths, "--config", "tiny"]) == 1
    assert "has its own config.json" in capsys.readouterr().err
