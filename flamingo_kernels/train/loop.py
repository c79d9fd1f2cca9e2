"""The training loop: one batch of every dataset, accumulated gradients, one update."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.nn.utils import get_total_norm as total_norm

from flamingo_kernels.data.samples import IGNORED_LABEL
from flamingo_kernels.data.stream import BatchLoader
from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.model.loss import ignore_text_before_first_image
from flamingo_kernels.train import distributed, sharding
from flamingo_kernels.train.checkpoints.contents import Trained, check_values
from flamingo_kernels.train.checkpoints.folder import (
    STATE_FILE,
    is_sharded,
    list_checkpoints,
    newest_checkpoint,
    step_of,
    unreadable,
)
from flamingo_kernels.train.checkpoints.settings import compare
from flamingo_kernels.train.checkpoints.state import check_base_model, fingerprints, read_state
from flamingo_kernels.train.config import DatasetSection, TrainConfig
from flamingo_kernels.train.log import RunLog
from flamingo_kernels.train.optimizer import build_optimizer, warm_up
from flamingo_kernels.train.strategies import build_strategy
from flamingo_kernels.vision import VisionEncoder

logger = logging.getLogger(__name__)
# A dataset whose first batches leave no label is refused at this one: windows of long documents may
# have none for a while.
_BARREN_BATCHES = 100


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and which checkpoint is good."""


class _Totals(NamedTuple):
    """Sums and means over one dataset's batches at all processes."""

    loss: float
    labels: int
    tokens: int
    images: int


@dataclass
class _Labels:
    """What one dataset gave to the loss since training began or continued."""

    batches: int = 0
    counted: int = 0
    tokens: int = 0


def _first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of a tensor that is not finite at any process; None if all are finite."""
    bad = [name for name, t in tensors.items() if not sharding.local(t).isfinite().all()]
    return next((name for names in distributed.gather(bad) for name in names), None)


class Trainer:
    """Train a model's trainable parameters on the datasets of a configuration.

    Parameters
    ----------
    model : FlamingoModel
        On the device to train on, or on the host to be sharded (``config.distributed``), which
        happens here, in place. Its frozen parts are cast to the compute dtype. In a process group
        every process gives a model, and their frozen parts must be the same.
    loaders : dict of str to BatchLoader
        A loader for every dataset of ``config``, by the dataset's name.
    config : TrainConfig

    Attributes
    ----------
    step_number : int
        Updates done so far.
    masters : MasterWeights
        The float32 parameters that ``optimizer`` updates.
    stopped : bool
        Whether :meth:`stop` was called.
    changed_settings : list of str
        What the configuration changes of the run that :meth:`resume` continues, in words.

    Raises
    ------
    ValueError
        The frozen parts differ between processes, or there is nothing to shard the model over.
    """

    def __init__(
        self, model: FlamingoModel, loaders: dict[str, BatchLoader], config: TrainConfig
    ) -> None:
        self.model = model.train()
        self.loaders = loaders
        self.config = config
        self.output = Path(config.output)
        self.step_number = 0
        self.stopped = False
        self.changed_settings: list[str] = []
        self.base_model = fingerprints(model)
        for other, found in enumerate(distributed.gather(self.base_model)):
            if found != self.base_model:
                raise ValueError(f"process {other} has another base model than this one")
        compute = getattr(torch, config.model.compute)
        for part in (model.vision_encoder, model.language_model):
            for parameter in part.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(compute)
        if config.model.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self._strategy = build_strategy(config.distributed)
        self.masters, self._network = self._strategy.prepare(model, compute)
        self.optimizer = build_optimizer(self.masters.parameters, config.optimizer)
        self._labels = {section.name: _Labels() for section in config.datasets}
        self._trained = Trained(model, self.masters, self.optimizer)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def resume(self) -> bool:
        """Continue from the newest checkpoint in the output folder; return whether there is one.

        Raises
        ------
        ValueError
            The checkpoint is damaged, of another base model, or of settings that cannot change.
        """
        newest = newest_checkpoint(self.output)
        if newest is None:
            return False
        self._restore(newest)
        return True

    def _restore(self, folder: Path) -> None:
        state = read_state(folder)
        positions = state["data"]
        if len(positions) != distributed.world_size():
            raise ValueError(
                f"{folder} was saved by {len(positions)} process(es), now there are "
                f"{distributed.world_size()}: data positions are those of each process"
            )
        position = positions[distributed.rank()]
        if set(position) != set(self.loaders):
            raise ValueError(
                f"{folder} was trained on the datasets {sorted(position)}, the "
                f"configuration has {sorted(self.loaders)}"
            )
        if is_sharded(folder) != (self.config.distributed == "fsdp"):
            raise ValueError(
                f"{folder} was saved with another value of distributed: continue with that, or "
                "start a new run from what flamingo-kernels export writes"
            )
        self.changed_settings = compare(folder, state["settings"], self._settings())
        check_base_model(folder, state, self.base_model)
        if state["step"] != step_of(folder):
            raise unreadable(folder, f"the step in its {STATE_FILE} is {state['step']}")
        for fault in distributed.gather(self._fault_of_loading(folder, state["step"], position)):
            if fault is not None:
                raise unreadable(folder, fault)
        self.masters.publish()
        self.step_number = state["step"]

    def _fault_of_loading(self, folder: Path, step: int, position: dict[str, Any]) -> str | None:
        """Load a checkpoint; return what is wrong with it for this process."""
        try:
            self._strategy.load(folder, self._trained)
            check_values(self._trained, step)
            for name, data in position.items():
                self.loaders[name].load_state_dict(data)
        except ValueError as error:
            return str(error)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # of a loader
            return repr(error)
        return None

    def _settings(self) -> dict[str, Any]:
        """Return the configuration for ``state.json``, which may move with its folder."""
        settings = self.config.to_dict()
        del settings["output"]
        return settings

    def save(self) -> Path:
        """Write a checkpoint, and return its folder. All processes of a group must call it.

        Raises
        ------
        OSError
            It cannot be written.
        TrainingError
            A parameter is not finite; the checkpoint before stays the last good one.
        """
        bad = _first_not_finite(self.masters.parameters)
        if bad is not None:
            raise self._failure(f"the parameter {bad} is not finite after step {self.step_number}")
        position = {name: loader.state_dict() for name, loader in self.loaders.items()}
        state = {
            "step": self.step_number,
            "base_model": self.base_model,
            "settings": self._settings(),
            "data": distributed.gather(position),
        }
        return self._strategy.save(self.output, self._trained, state, keep=self.config.keep)

    def step(self) -> dict[str, Any]:
        """Make one update from one batch of every dataset.

        Returns
        -------
        dict
            The fields of a line of the log, and ``tokens`` and ``images`` of all processes.

        Raises
        ------
        TrainingError
            A loss or a gradient is not finite, or a dataset leaves no label to train on. No
            parameter has been changed.
        """
        number = self.step_number + 1
        self.optimizer.zero_grad(set_to_none=True)
        losses, tokens, images = {}, 0, 0
        for section in self.config.datasets:
            loader = self.loaders[section.name]
            batch = self._prepare(next(loader), section)
            loss = self._network(**batch, return_logits=False).loss
            factor, totals = self._loss_factor(loss, batch)
            losses[section.name] = totals.loss
            if not math.isfinite(totals.loss):
                where = distributed.gather(None if math.isfinite(loss.item()) else loader.keys)
                process, keys = next((i, k) for i, k in enumerate(where) if k is not None)
                raise self._failure(
                    f"the loss of {section.name} is {totals.loss} at step {number}, process "
                    f"{process}, samples {', '.join(keys[:3])}{', ...' if keys[3:] else ''}"
                )
            self._check_labels(section, totals, number)
            (section.weight * factor * loss).backward()
            self.masters.collect_gradients()
            tokens += totals.tokens
            images += totals.images
        parameters = self.masters.parameters
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        norm = sharding.whole(total_norm(list(gradients.values())))
        if not torch.isfinite(norm):
            bad = _first_not_finite(gradients)
            raise self._failure(f"the gradient of {bad} is not finite at step {number}")
        clip_grads_with_norm_(parameters.values(), self.config.optimizer.clip, norm)
        rate = warm_up(self.config.optimizer, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak_lr"]
        self.optimizer.step()
        self.masters.publish()
        self.step_number = number
        return {
            "step": number,
            "loss": sum(s.weight * losses[s.name] for s in self.config.datasets),
            "losses": losses,
            "learning_rate": rate * self.config.optimizer.lr,
            "gradient_norm": norm.item(),
            "tokens": tokens,
            "images": images,
        }

    def stop(self) -> None:
        """Let :meth:`run` save and return after the step that it is in; a signal handler may call.

        In a process group one process is enough.
        """
        self.stopped = True

    def run(self) -> None:
        """Train up to ``config.steps``, log and save; call :meth:`resume` before to continue.

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
            stopping = False
            while self.step_number < self.config.steps and not stopping:
                report = self.step()
                if log is not None:
                    log.show(self.step_number)
                tokens += report.pop("tokens")
                images += report.pop("images")
                stopping = distributed.sum_over_ranks([self.stopped], self.device)[0] > 0
                last = stopping or self.step_number == self.config.steps
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
        """Return tanh of every layer's gates, by layer; the mean magnitude of vector gates.

        All processes of a group must call it.
        """
        values = {
            f"{kind}.{layer}": sharding.whole(getattr(module, kind).detach()).float().tanh()
            for kind in ("attn_gate", "ff_gate")
            for layer, module in enumerate(self.model.gated_cross_attn_layers)
        }
        return {n: (v.abs().mean() if len(v) > 1 else v).item() for n, v in values.items()}

    def skipped(self) -> dict[str, int]:
        """Return the numbers of shards, records and images that were skipped so far.

        They are sums over all processes, by dataset and reason.
        """
        own = Counter(
            {
                f"{name}: {reason}": count
                for name, loader in self.loaders.items()
                for reason, count in loader.skipped.items()
            }
        )
        return dict(sorted(sum(distributed.gather(own), Counter()).items()))

    def _loss_factor(self, loss: Tensor, batch: dict[str, Any]) -> tuple[float, _Totals]:
        """Return the factor of this process's mean loss, and the totals of all processes.

        The loss is the mean over the tokens of all processes, but gradients are averaged over
        processes: the factor corrects for their different numbers of tokens.
        """
        tokens = int(batch["attention_mask"].sum())
        images = int(batch["num_images"].sum())
        size = distributed.world_size()
        labels = self.model.mask_labels(batch["labels"], batch["attention_mask"] != 0)
        counted = int((labels[:, 1:] != IGNORED_LABEL).sum())
        if size == 1:
            return 1.0, _Totals(loss.item(), counted, tokens, images)
        total, everyone, all_tokens, all_images = distributed.sum_over_ranks(
            [loss.item() * counted, counted, tokens, images], self.device
        )
        mean = total / max(1, everyone)
        totals = _Totals(mean, int(everyone), int(all_tokens), int(all_images))
        return size * counted / max(1, everyone), totals

    def _check_labels(self, section: DatasetSection, totals: _Totals, number: int) -> None:
        """Warn of a dataset that begins without labels, and stop if it goes on so."""
        seen = self._labels[section.name]
        seen.batches += 1
        seen.counted += totals.labels
        seen.tokens += totals.tokens
        if seen.counted:
            return
        what = (
            f"0 of {seen.tokens} labels of {section.name} are left in {seen.batches} batch(es) up "
            f"to step {number}, so that nothing is learned from it: with max_tokens "
            f"{section.max_tokens} and loss_before_first_image "
            f"{str(section.loss_before_first_image).lower()} its samples hold no text that counts"
        )
        if seen.batches == _BARREN_BATCHES or seen.batches == number == self.config.steps:
            raise self._failure(what)
        if seen.batches == 1 and distributed.rank() == 0:
            logger.warning("%s", what)

    def _prepare(self, batch: dict[str, Any], section: DatasetSection) -> dict[str, Any]:
        if not section.loss_before_first_image:
            batch["labels"] = ignore_text_before_first_image(
                batch["labels"], batch["input_ids"], self.model.config.image_token_id
            )
        if "pixel_values" not in batch:
            batch |= self._unused_slot(len(batch["input_ids"]))
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _unused_slot(self, rows: int) -> dict[str, Tensor]:
        """Return the media of a batch without images: one slot that no row fills.

        All processes run all modules, so that none waits for the others' shards or gradients.
        """
        encoder = cast(VisionEncoder, self.model.vision_encoder)
        size = encoder.image_size
        shape = (1, encoder.output_dim) if size is None else (3, size, size)
        none = torch.zeros(rows, dtype=torch.int64)
        return {"pixel_values": torch.zeros(rows, 1, 1, *shape), "num_images": none}

    def _failure(self, what: str) -> TrainingError:
        self.optimizer.zero_grad(set_to_none=True)
        found = list_checkpoints(self.output)
        left = (
            f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was saved yet"
        )
        return TrainingError(f"{what}; {left}")
