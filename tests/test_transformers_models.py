"""Folders of transformers' files: what their configuration may not ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flamingo_kernels.convert import load_idefics
from flamingo_kernels.transformers_models import read_folder
from testing.backbones import language_model
from testing.originals import idefics

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 10**9},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"text_config": {"experts_implementation": "evil/kernel:Function"}},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1000},
    ],
)
def test_hostile_folders_are_refused(changes: dict, tmp_path: Path) -> None:
    language_model("llama").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    assert read_folder("AutoModelForCausalLM", tmp_path)
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ValueError, match=r"cannot load a language model .*(could load|holds \d+)"):
        read_folder("AutoModelForCausalLM", tmp_path)


@pytest.mark.parametrize("count", ["num_hidden_layers", "num_labels"])
def test_a_tokenizer_reads_no_hostile_configuration_of_a_model(count: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", count: 10**9}))
    with pytest.raises(ValueError, match=f"cannot load a tokenizer .* config has {count}=10{{9}}"):
        read_folder("AutoTokenizer", tmp_path)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (None, {"num_hidden_layers": 10**9}),
        (None, {"hidden_act": "evil/kernel"}),
        ("vision_config", {"num_hidden_layers": 10**9}),
        ("vision_config", {"image_size": 10**9}),
        ("perceiver_config", {"resampler_depth": 10**9}),
        ("perceiver_config", {"resampler_n_latents": 10**12}),
    ],
)
def test_absurd_idefics_are_refused(section: str | None, changes: dict, tmp_path: Path) -> None:
    idefics().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    (values if section is None else values[section]).update(changes)
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config|options"):
        load_idefics(tmp_path)
