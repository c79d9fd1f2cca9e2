"""The training loop: one batch per dataset, gradients accumulated, one update."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.nn.utils import get_total_norm as total_norm

from flamingo_kernels.data.samples import IGNORED_LABEL
from flamingo_kernels.data.stream import BatchLoader
from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.model.loss import ignore_text_before_first_image
from flamingo_kernels.train import checkpoint, distributed
from flamingo_kernels.train.config import DatasetSection, TrainConfig
from flamingo_kernels.train.log import RunLog
from flamingo_kernels.train.optimizer import MasterWeights, build_optimizer, learning_rate


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what is left."""


class _Totals(NamedTuple):
    """Of one dataset's batches at all processes."""

    loss: float
    tokens: int
    images: int


class Trainer:
    """Trains a model's trainable parameters on the datasets of a configuration.

    Parameters
    ----------
    model : FlamingoModel
        On the device to train on; its frozen parts are cast to the compute dtype. In a process
        group every process has one, and the frozen parts must be the same.
    loaders : for every dataset of ``config``, by name.
    config : TrainConfig

    Attributes
    ----------
    step_number : updates done.

    Raises
    ------
    ValueError
        The frozen parts differ between processes.
    """

    def __init__(
        self, model: FlamingoModel, loaders: dict[str, BatchLoader], config: TrainConfig
    ) -> None:
        self.model = model.train()
        self.loaders = loaders
        self.config = config
        self.output = Path(config.output)
        self.base_model = checkpoint.fingerprints(model)
        for other, found in enumerate(distributed.gather(self.base_model)):
            if found != self.base_model:
                raise ValueError(f"process {other} has another base model than this one")
        self.step_number = 0
        dtype = getattr(torch, config.model.compute)
        self.masters = MasterWeights(model.trainable_parameters(), dtype)
        for part in (model.vision_encoder, model.language_model):
            frozen = {n: p for n, p in part.named_parameters() if not p.requires_grad}
            for parameter in frozen.values():
                parameter.data = parameter.data.to(dtype)
        if config.model.activation_checkpointing:
            model.gradient_checkpointing_enable()
        distributed.broadcast(self.masters.parameters.values())
        self.masters.publish()
        self.optimizer = build_optimizer(self.masters.parameters, config.optimizer)
        self._parallel = distributed.wrap(model)

    @property
    def device(self) -> torch.device:
        return self.model.perceiver.latents.device

    def resume(self) -> bool:
        """Continue from the newest checkpoint in the output folder; False if there is none.

        Raises
        ------
        ValueError
            The checkpoint is damaged, of another base model or of other datasets.
        """
        found = checkpoint.list_checkpoints(self.output)
        if not found:
            return False
        saved = checkpoint.load(found[-1], self.base_model)
        positions = saved.state["data"]
        if len(positions) != distributed.world_size():
            raise ValueError(
                f"{found[-1]} was saved by {len(positions)} process(es), now there are "
                f"{distributed.world_size()}: data positions are those of each process"
            )
        position = positions[distributed.rank()]
        if set(position) != set(self.loaders):
            raise ValueError(
                f"{found[-1]} was trained on the datasets {sorted(position)}, the "
                f"configuration has {sorted(self.loaders)}"
            )
        frozen = self.model.saved_frozen
        self.masters.load({n: t for n, t in saved.tensors.items() if n not in frozen})
        for name, moments in saved.moments.items():
            parameter = self.masters.parameters[name]
            self.optimizer.state[parameter] = {
                # AdamW keeps its count of steps on the host.
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in moments.items()
            }
        for name, state in position.items():
            self.loaders[name].load_state_dict(state)
        torch.set_rng_state(saved.random_states["cpu"])
        if "cuda" in saved.random_states and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved.random_states["cuda"])
        self.step_number = saved.step
        return True

    def save(self) -> Path:
        """Write a checkpoint of this moment; OSError if it cannot be written.

        To be called by all processes of a group; the first one writes.
        """
        position = {name: loader.state_dict() for name, loader in self.loaders.items()}
        state = {
            "step": self.step_number,
            "base_model": self.base_model,
            "data": distributed.gather(position),
        }
        parameters, keep = self.masters.parameters, self.config.keep
        return distributed.on_first_rank(
            lambda: checkpoint.save(
                self.output, self.model, parameters, self.optimizer, state, keep=keep
            )
        )

    def step(self) -> dict[str, Any]:
        """One update from one batch of every dataset; what a line of the log says of it.

        Raises
        ------
        TrainingError
            A loss or a gradient is not finite. No parameter has been changed.
        """
        number = self.step_number + 1
        self.optimizer.zero_grad(set_to_none=True)
        losses, tokens, images = {}, 0, 0
        for section in self.config.datasets:
            loader = self.loaders[section.name]
            batch = self._prepare(next(loader), section)
            loss = self._parallel(**batch, return_logits=False).loss
            share, totals = self._share(loss, batch)
            losses[section.name] = totals.loss
            if not math.isfinite(totals.loss):
                raise self._failure(
                    f"the loss of {section.name} is {totals.loss} at step {number}, "
                    f"samples {', '.join(loader.keys[:3])}{', ...' if loader.keys[3:] else ''}"
                )
            (section.weight * share * loss).backward()
            self.masters.collect_gradients()
            tokens += totals.tokens
            images += totals.images
        parameters = self.masters.parameters
        norm = total_norm([p.grad for p in parameters.values() if p.grad is not None])
        if not torch.isfinite(norm):
            bad = next(
                name
                for name, p in parameters.items()
                if p.grad is not None and not torch.isfinite(p.grad).all()
            )
            raise self._failure(f"the gradient of {bad} is not finite at step {number}")
        clip_grads_with_norm_(parameters.values(), self.config.optimizer.clip, norm)
        rate = learning_rate(self.config.optimizer, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.masters.publish()
        self.step_number = number
        return {
            "step": number,
            "loss": sum(s.weight * losses[s.name] for s in self.config.datasets),
            "losses": losses,
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "tokens": tokens,
            "images": images,
        }

    def run(self) -> None:
        """Train up to ``config.steps``, log and save; ``resume`` first to continue.

        Raises
        ------
        TrainingError, OSError
            See :meth:`step` and :meth:`save`.
        """
        log = None
        if distributed.rank() == 0:
            log = RunLog(self.output, self.step_number, self.config.steps)
        try:
            started, tokens, images = time.perf_counter(), 0, 0
            while self.step_number < self.config.steps:
                report = self.step()
                tokens += report.pop("tokens")
                images += report.pop("images")
                last = self.step_number == self.config.steps
                if last or self.step_number % self.config.log_every == 0:
                    seconds = time.perf_counter() - started
                    report["tokens_per_second"] = tokens / seconds
                    report["images_per_second"] = images / seconds
                    report["gates"] = self.gates()
                    report["skipped"] = self.skipped()
                    if log is not None:
                        log.write(report)
                    started, tokens, images = time.perf_counter(), 0, 0
                if last or self.step_number % self.config.save_every == 0:
                    self.save()
        finally:
            if log is not None:
                log.close()

    def gates(self) -> dict[str, float]:
        """tanh of every layer's gates, by layer; the mean magnitude of vector gates."""
        return {
            f"{kind}.{layer}": torch.tanh(gate.detach().float()).abs().mean().item()
            if gate.numel() > 1
            else torch.tanh(gate.detach().float()).item()
            for kind in ("attn_gate", "ff_gate")
            for layer, module in enumerate(self.model.gated_cross_attn_layers)
            for gate in [getattr(module, kind)]
        }

    def skipped(self) -> dict[str, int]:
        """Shards, records and images skipped so far by all processes, by dataset and reason."""
        own = Counter(
            {
                f"{name}: {reason}": count
                for name, loader in self.loaders.items()
                for reason, count in loader.skipped.items()
            }
        )
        return dict(sorted(sum(distributed.gather(own), Counter()).items()))

    def _share(self, loss: Tensor, batch: dict[str, Any]) -> tuple[float, _Totals]:
        """What to multiply this process's mean loss with, and figures of all processes.

        DDP averages gradients over processes; the loss is a mean over the tokens of all of them.
        """
        tokens = int(batch["attention_mask"].sum())
        images = int(batch["num_images"].sum()) if "num_images" in batch else 0
        size = distributed.world_size()
        if size == 1:
            return 1.0, _Totals(loss.item(), tokens, images)
        labels = self.model.counted_labels(batch["labels"], batch["attention_mask"] != 0)
        counted = int((labels[:, 1:] != IGNORED_LABEL).sum())
        total, everyone, tokens, images = distributed.sum_over_ranks(
            [loss.item() * counted, counted, tokens, images], self.device
        )
        mean = total / max(1, everyone)
        return size * counted / max(1, everyone), _Totals(mean, int(tokens), int(images))

    def _prepare(self, batch: dict[str, Any], section: DatasetSection) -> dict[str, Any]:
        if not section.loss_before_first_image:
            batch["labels"] = ignore_text_before_first_image(
                batch["labels"], batch["input_ids"], self.model.config.image_token_id
            )
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _failure(self, what: str) -> TrainingError:
        self.optimizer.zero_grad(set_to_none=True)
        found = checkpoint.list_checkpoints(self.output)
        left = (
            f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was saved yet"
        )
        return TrainingError(f"{what}; {left}")
