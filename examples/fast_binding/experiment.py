"""The stages of the experiment; finished ones are kept in the output folder and not repeated."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.fast_binding import documents, evaluate, images, report, text, vision
from examples.fast_binding.documents import DrawnBatches, Gallery
from examples.fast_binding.evaluate import SHOTS, Accuracy
from examples.fast_binding.model import ABLATIONS, BASELINE, CONFIG, Variant
from examples.fast_binding.progress import Progress
from examples.fast_binding.text import Documents
from flamingo_kernels import FlamingoModel
from flamingo_kernels.language.decoder import Decoder
from flamingo_kernels.model.loss import next_token_loss
from flamingo_kernels.model.saving import WEIGHTS_FILE
from flamingo_kernels.shipped import FAST_BINDING_GLYPHS
from flamingo_kernels.train import TrainConfig
from flamingo_kernels.train.config import DatasetSection, ModelSection, OptimizerSection
from flamingo_kernels.vision import NFNet
from testing.provenance import environment

SEED = 0
WAYS = (2, 5)
Cell = tuple[int, int]  # ways, examples per class
# The cells at which ablations are compared.
COMPARED: tuple[Cell, ...] = ((2, 1), (2, 4), (2, 16), (5, 4))
HELD_OUT = ("glyphs", "digits")
BATCH_SIZE = 32
# The paper's lambda for M3W. Its 0.2 for pairs makes captions come first and binding late here.
WEIGHTS = {"documents": 1.0, "pairs": 0.03}
# The documents on which the loss on text is measured.
TEXT = Documents(most_things=6, tokens=161, rows=64)
_PROCESSES = 2
OPTIMIZER = OptimizerSection(lr=3e-3, gate_lr=3e-2, warmup_steps=100)


@dataclass(frozen=True)
class Sizes:
    """Numbers of classes, updates and episodes; ``ablation_updates`` divides ``updates``."""

    glyphs: int = 1200
    drawings: int = 10
    held_out_glyphs: int = 100
    vision_updates: int = 500
    language_updates: int = 1200
    updates: int = 3000
    ablation_updates: int = 1000
    episodes: int = 1000


QUICK = Sizes(
    glyphs=20,
    held_out_glyphs=6,
    vision_updates=3,
    language_updates=10,
    updates=6,
    ablation_updates=3,
    episodes=4,
)


class Experiment:
    """All stages, which write to the folder ``output`` and train models on ``device``."""

    def __init__(self, output: Path, sizes: Sizes, device: str = "cpu") -> None:
        self.output, self.sizes, self.device = output, sizes, device

    def run(self) -> None:
        """Run every stage that is not finished, and write the report."""
        (self.output / "stages").mkdir(parents=True, exist_ok=True)
        self._stage("pictures", self._pictures)
        self._together([("_vision",), ("_language",)])
        self._together([("_baseline",), *(("_ablation", name) for name in ABLATIONS)])
        report.write(self.output)

    def _together(self, jobs: Sequence[Sequence[str]]) -> None:
        """Run methods with their arguments, each in a process with one thread.

        Models this small would leave a second thread of one process idle.
        """
        context = get_context("spawn")
        with ProcessPoolExecutor(_PROCESSES, context, torch.set_num_threads, (1,)) as pool:
            for job in [pool.submit(_run_job, self, *job) for job in jobs]:
                job.result()

    def _pictures(self) -> list[dict[str, Any]]:
        sizes = self.sizes
        pictures = {
            "glyphs": images.training_glyphs(sizes.glyphs, sizes.drawings, SEED),
            "digits": images.training_digits(),
            "held_out_glyphs": images.held_out_glyphs(sizes.held_out_glyphs, SEED),
            "held_out_digits": images.digits(images.HELD_OUT_DIGITS),
        }
        return self._keep("pictures", pictures)

    def _vision(self) -> None:
        def train() -> list[dict[str, Any]]:
            pictures = load_file(self._file("pictures"))
            seen = [pictures["glyphs"], pictures["digits"]]
            encoder = vision.train_encoder(seen, self.sizes.vision_updates, SEED, self.device)
            return self._keep("vision", encoder.state_dict())

        self._stage("vision", train)

    def _language(self) -> None:
        def train() -> list[dict[str, Any]]:
            model = text.train_language_model(self.sizes.language_updates, SEED, self.device)
            return self._keep("language", model.state_dict())

        self._stage("language", train)

    def _file(self, name: str) -> Path:
        return self.output / f"{name}.safetensors"

    def _keep(self, name: str, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        save_file(tensors, self._file(name))
        return []

    def _parts(self) -> tuple[NFNet, Decoder, dict[str, Gallery]]:
        """Load the frozen parts, and encode the pictures."""
        encoder, language_model = NFNet(vision.CONFIG), Decoder(text.CONFIG)
        encoder.load_state_dict(load_file(self._file("vision")))
        language_model.load_state_dict(load_file(self._file("language")))
        pictures = load_file(self._file("pictures"))
        galleries = {kind: Gallery.of(encoder.eval(), drawn) for kind, drawn in pictures.items()}
        return encoder, language_model.eval(), galleries

    def _baseline(self) -> None:
        encoder, language_model, galleries = self._parts()
        model = BASELINE.build(encoder, language_model, SEED).to(self.device)
        self._stage("text-before", lambda: [_text_loss(model)])
        self._train("baseline", BASELINE, model, galleries, self.sizes.updates)
        self._stage("text-after", lambda: [_text_loss(model)])
        model.save_pretrained(self.output / "model", include_frozen=True)
        unseen = load_file(self._file("pictures"))["held_out_glyphs"]
        images.save_sheet(unseen, self.output / "model" / FAST_BINDING_GLYPHS.name)
        every = [(ways, shots) for ways in WAYS for shots in SHOTS]
        self._stage("baseline", lambda: self._accuracies(model, galleries, every))
        self._stage("class-means", lambda: self._class_means(galleries))
        short = f"step_{self.sizes.ablation_updates:08}"
        early = load_file(self.output / "baseline" / short / WEIGHTS_FILE)
        model.load_state_dict(early, strict=False)
        self._stage("baseline-short", lambda: self._accuracies(model, galleries, COMPARED))

    def _ablation(self, name: str) -> None:
        encoder, language_model, galleries = self._parts()
        variant = ABLATIONS[name]
        model = variant.build(encoder, language_model, SEED).to(self.device)
        self._train(name, variant, model, galleries, self.sizes.ablation_updates)
        self._stage(name, lambda: self._accuracies(model, galleries, COMPARED))

    def _train(
        self,
        name: str,
        variant: Variant,
        model: FlamingoModel,
        galleries: dict[str, Gallery],
        updates: int,
    ) -> None:
        """Train ``model``: from the start, from its newest checkpoint, or load the finished one."""
        kinds = {
            "documents": ("interleaved", documents.interleaved),
            "pairs": ("pairs", documents.pairs),
        }
        seen = [galleries["glyphs"], galleries["digits"]]
        sections, loaders = [], {}
        for number, dataset in enumerate(variant.datasets):
            kind, draw = kinds[dataset]
            loaders[dataset] = DrawnBatches(
                functools.partial(draw, seen, BATCH_SIZE), seed=SEED + 1 + number
            )
            sections.append(
                DatasetSection(
                    name=dataset,
                    kind=kind,
                    shards=("drawn, not read",),
                    batch_size=BATCH_SIZE,
                    weight=WEIGHTS[dataset],
                )
            )
        config = TrainConfig(
            model=ModelSection(config=CONFIG.name),
            datasets=tuple(sections),
            steps=updates,
            output=str(self.output / name),
            optimizer=OPTIMIZER,
            log_every=20,
            save_every=self.sizes.ablation_updates,
            keep=updates // self.sizes.ablation_updates,
        )
        trainer = variant.trainer(model, loaders, config)
        trainer.resume()

        def train() -> list[dict[str, Any]]:
            trainer.run()
            return []

        self._stage(f"train-{name}", train)
        model.eval()

    def _accuracies(
        self, model: FlamingoModel, galleries: dict[str, Gallery], cells: Sequence[Cell]
    ) -> list[dict[str, Any]]:
        def of(gallery: Gallery, ways: int, shots: int, seed: int) -> Accuracy:
            return evaluate.accuracy(model, gallery, ways, shots, self.sizes.episodes, seed)

        return _each(of, galleries, cells)

    def _class_means(self, galleries: dict[str, Gallery]) -> list[dict[str, Any]]:
        def of(gallery: Gallery, ways: int, shots: int, seed: int) -> Accuracy:
            return evaluate.class_means(gallery, ways, shots, self.sizes.episodes, seed)

        return _each(of, galleries, [(w, shots) for w in WAYS for shots in SHOTS if shots])

    def _stage(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> None:
        """Write the lines that ``make`` returns and its time, unless the stage is finished."""
        path = self.output / "stages" / f"{name}.json"
        if path.exists():
            return
        print(f"== {name}", file=sys.stderr)
        started = time.monotonic()
        lines = make()
        stage = {"lines": lines, "seconds": round(time.monotonic() - started, 1)}
        temporary = path.with_suffix(".incomplete")
        temporary.write_text(json.dumps({"stage": name, **stage, **environment(self.device)}))
        os.replace(temporary, path)


def _each(
    measure: Callable[[Gallery, int, int, int], Accuracy],
    galleries: dict[str, Gallery],
    cells: Sequence[Cell],
) -> list[dict[str, Any]]:
    """Measure each held-out kind at each cell; return one line for each."""
    lines = []
    cases = [(kind, *cell) for kind in HELD_OUT for cell in cells]
    progress = Progress("accuracy", len(cases))
    for number in progress:
        kind, ways, shots = cases[number - 1]
        found = measure(galleries[f"held_out_{kind}"], ways, shots, HELD_OUT.index(kind))
        progress.note = f"{kind}, {ways}-way, {shots} shots per class: {found.value:.3f}"
        lines.append({"kind": kind, "ways": ways, "shots": shots, **asdict(found)})
    return lines


@torch.no_grad()
def _text_loss(model: FlamingoModel) -> dict[str, float]:
    """Return the loss on documents without a picture, without and with the gated layers."""
    ids = TEXT.draw(np.random.default_rng(SEED)).to(model.perceiver.latents.device)
    alone = next_token_loss(model.language_model(ids).logits, ids)
    return {"alone": alone.item(), "added": model(ids, labels=ids).loss.item()}


def _run_job(experiment: Experiment, method: str, *arguments: str) -> None:
    sys.stderr = _Lines((*arguments, method.strip("_"))[0])
    getattr(experiment, method)(*arguments)


class _Lines(io.TextIOBase):
    """Standard error of one of several processes: whole lines, prefixed with its name."""

    def __init__(self, name: str) -> None:
        self._name, self._rest = name, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            sys.__stderr__.write(f"{self._name}: {line}\n")
        return len(text)
