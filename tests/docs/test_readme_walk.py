"""The README's way from training to text, walked as it is written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from flamingo_kernels import FlamingoModel
from flamingo_kernels.cli import main
from flamingo_kernels.data.images import load_image, stack_media, to_pixel_values
from flamingo_kernels.language import ByteTokenizer, encode_prompt
from testing.folders import write_language_model, write_vision_encoder
from testing.markdown import ROOT, Block, blocks, commands
from testing.shard_files import picture_bytes, write_lines

yaml = pytest.importorskip("yaml")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL.Image")
STEPS = 2  # in place of the README's, which would take minutes


def the_way() -> tuple[dict, list[list[str]]]:
    """The configuration of the README, and the commands of the block after it."""
    found: list[Block] = list(blocks(ROOT / "README.md"))
    (place,) = (i for i, block in enumerate(found) if block.language == "yaml")
    assert found[place + 1].language == "sh"
    return yaml.safe_load(found[place].text), commands(found[place + 1])


def prepare(values: dict, file: str) -> None:
    """Write what a user has: the file of the configuration, folders, captioned pictures."""
    Path(file).write_text(yaml.safe_dump(values))
    write_language_model("lm")
    write_vision_encoder("clip")
    Path("a.png").write_bytes(picture_bytes())
    pairs = [{"image": "a.png", "caption": caption} for caption in ("a cat", "two of it?") * 8]
    (name,) = values["datasets"][0]["shards"]
    write_lines(Path(name), pairs)


@pytest.mark.parametrize("model", ["as written", {"config": "tiny"}], ids=["backbones", "tiny"])
def test_from_training_to_text(model, tmp_path: Path, monkeypatch, capsys) -> None:
    """Each command works after those before it, and Python says what the command says."""
    monkeypatch.chdir(tmp_path)
    values, steps = the_way()
    assert [words[:2] for words in steps] == [
        ["flamingo-kernels", name] for name in ("train", "export", "generate")
    ]
    chosen = values["model"] if model == "as written" else model
    prepare({**values, "model": chosen, "steps": STEPS}, steps[0][2])
    for words in steps:
        capsys.readouterr()
        assert main(words[1:]) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
    said = capsys.readouterr().out.removesuffix("\n")

    arguments = dict(zip(steps[-1][2::2], steps[-1][3::2], strict=True))
    trained = FlamingoModel.from_pretrained(arguments["--model"]).eval()
    size, text = trained.vision_encoder.image_size, arguments["--text"]
    encoder = trained.vision_encoder
    picture = to_pixel_values(
        load_image(arguments["--image"]), size, mean=encoder.image_mean, std=encoder.image_std
    )
    if model == "as written":
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments["--model"])
        ids = encode_prompt(tokenizer, text)
    else:
        tokenizer = ByteTokenizer()
        ids = tokenizer.encode(text, add_bos=True)
    out = trained.generate(torch.tensor([ids]), **stack_media([[picture]]), max_new_tokens=20)
    assert tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True) == said
    with Path(values["output"], "log.jsonl").open() as log:
        assert [json.loads(line)["step"] for line in log][-1] == STEPS
