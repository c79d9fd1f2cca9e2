"""A :class:`FlamingoModel` in the Trainer of transformers; importing it imports transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor


class FlamingoTrainer(transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` whose checkpoints are those of ``FlamingoModel.save_pretrained``.

    The Trainer itself trains and evaluates a :class:`~flamingo_kernels.FlamingoModel` too. But its
    checkpoints hold the frozen parts, and ``FlamingoModel.from_pretrained`` cannot read them. It
    cannot save a language model that ties its embeddings.

    Raises
    ------
    ValueError
        ``label_smoothing_factor``, FSDP, DeepSpeed, several GPUs in one process, or a checkpoint of
        another model on resuming.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor takes the labels from the model, and would compare each "
                "token with itself, not with the next one: use 0"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process has {self.args.n_gpu} GPUs, over which the Trainer would copy the "
                "model in each step: start one process per GPU with torchrun"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed shard what a checkpoint holds: use flamingo-kernels train with "
                "distributed: fsdp"
            )

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return loss, logits and labels of a batch; inputs without labels have logits alone."""
        if inputs.get("labels") is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**self._prepare_inputs(inputs)).logits
        return None, None if prediction_loss_only else logits, None

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        directory = self.args.output_dir if output_dir is None else output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise unless the file held all that is trained, and nothing unknown."""
        model = self.accelerator.unwrap_model(self.model)
        missing = sorted(model.trainable_parameters().keys() & set(load_result.missing_keys))
        unknown = sorted(load_result.unexpected_keys)
        if missing or unknown:
            raise ValueError(
                "the checkpoint is of another model: of its tensors "
                f"{len(missing)} are missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
            )
