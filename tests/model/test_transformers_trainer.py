"""FlamingoModel in the Trainer of transformers: training, evaluation, checkpoints, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from flamingo_kernels import FlamingoModel
from testing.backbones import IMAGE, VOCAB, clip, language_model, open_gates

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from flamingo_kernels.train.huggingface import FlamingoTrainer  # noqa: E402


def trainer(cls: type, folder: Path, tied: bool = True, **options: Any) -> transformers.Trainer:
    """Return a Trainer of four steps that evaluates and saves after two, on rows of one image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (8, 6), generator=generator)
    ids[:, 1] = IMAGE
    pixels = torch.randn(8, 1, 1, 3, 16, 16, generator=generator)
    rows = [
        {"input_ids": tokens, "labels": tokens, "pixel_values": media}
        for tokens, media in zip(ids, pixels, strict=True)
    ]
    torch.manual_seed(3)
    model = FlamingoModel.from_backbones(clip(), language_model("llama", tie_word_embeddings=tied))
    defaults = {
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_strategy": "steps",
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return cls(
        model=open_gates(model),
        args=transformers.TrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=rows,
        eval_dataset=rows[:2],
        compute_metrics=lambda given: {"values": given.predictions.size},
    )


def trained(run: transformers.Trainer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in run.model.trainable_parameters().items()}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (transformers.Trainer, {"tied": False}),
        (FlamingoTrainer, {"load_best_model_at_end": True}),
        (FlamingoTrainer, {"bf16": True, "gradient_accumulation_steps": 2}),
        (FlamingoTrainer, {"gradient_checkpointing": True}),
    ],
    ids=["Trainer", "tied", "bf16", "checkpointing"],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_transformers_trainer(cls: type, options: dict, tmp_path: Path) -> None:
    run = trainer(cls, tmp_path, **options)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[1] < losses[0]
    assert run.evaluate()["eval_values"] == 2 * 6 * VOCAB
    resumed = trainer(cls, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, trained(resumed).values(), trained(run).values()))
    if cls is not FlamingoTrainer:
        return
    base = language_model("llama", tie_word_embeddings=True)
    parts = {"vision_encoder": clip(), "language_model": base}
    loaded = FlamingoModel.from_pretrained(tmp_path / "checkpoint-4", **parts)
    assert all(map(torch.equal, loaded.trainable_parameters().values(), trained(run).values()))
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in run.eval_dataset]
    assert run.predict(rows).predictions.shape == (2, 6, VOCAB)


@pytest.mark.parametrize("cls", [transformers.Trainer, FlamingoTrainer])
def test_a_tokenizer_with_other_special_tokens_changes_no_id_of_the_model(
    cls: type, tmp_path: Path
) -> None:
    """Chat models end turns with another token than texts; the Trainer tells the model's config."""
    run = trainer(cls, tmp_path, tied=False, max_steps=1)
    before = run.model.config
    tokenizer = Tokenizer(WordLevel({"a": 0, "end of turn": before.eos_token_id + 5}))
    run.processing_class = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="end of turn"
    )
    run.train()
    assert run.model.config == before


def test_what_a_trainer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer(FlamingoTrainer, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(IndexError, match="label_smoothing_factor"):
        trainer(transformers.Trainer, tmp_path, label_smoothing_factor=0.1).train()
    run = trainer(FlamingoTrainer, tmp_path)
    run.save_model()
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("perceiver.latents")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"another model: .* 1 are missing \['perceiver\.latents'\]"
    ):
        run._load_from_checkpoint(str(tmp_path))
