"""Train everything from nothing and report: ``python -m examples.fast_binding``.

Every stage that is finished is kept in the output folder and not repeated; training proper also
continues from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.results import environment
from examples.fast_binding import documents, evaluate, images, report, text, vision
from examples.fast_binding.documents import DrawnBatches, Gallery
from examples.fast_binding.evaluate import SHOTS, Accuracy
from examples.fast_binding.model import ABLATIONS, BASELINE, CONFIG, Variant
from examples.fast_binding.progress import Progress
from examples.fast_binding.text import Documents
from flamingo_kernels import FlamingoModel
from flamingo_kernels.language.decoder import Decoder
from flamingo_kernels.model.checkpoint import WEIGHTS_FILE
from flamingo_kernels.model.loss import next_token_loss
from flamingo_kernels.models import FAST_BINDING_NEW_DIGITS
from flamingo_kernels.train import TrainConfig
from flamingo_kernels.train.config import DatasetSection, ModelSection, OptimizerSection
from flamingo_kernels.vision import NFNet

SEED = 0
WAYS = (2, 5)
Cell = tuple[int, int]  # ways, examples per class
# What ablations are compared at.
COMPARED: tuple[Cell, ...] = ((2, 1), (2, 4), (2, 16), (5, 4))
HELD_OUT = ("glyphs", "digits")
BATCH_SIZE = 32
WEIGHTS = {"documents": 1.0, "pairs": 0.2}  # the paper's lambdas of M3W and of its pairs
# What the loss on text is measured on.
TEXT = Documents(most_things=6, tokens=161, rows=64)
OPTIMIZER = OptimizerSection(lr=1e-3, warmup_steps=100)


@dataclass(frozen=True)
class Sizes:
    """How much of everything; ``updates`` is a multiple of ``ablation_updates``."""

    glyphs: int = 1200
    drawings: int = 10
    held_out_glyphs: int = 100
    vision_updates: int = 500
    language_updates: int = 9000
    updates: int = 2400
    ablation_updates: int = 800
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.fast_binding", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("fast_binding_output"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to try it")
    options = parser.parse_args()
    output: Path = options.output / "quick" if options.quick else options.output
    Experiment(output, QUICK if options.quick else Sizes()).run()


class Experiment:
    """All stages; what they make is in ``output``."""

    def __init__(self, output: Path, sizes: Sizes) -> None:
        self.output, self.sizes = output, sizes
        self.encoder, self.language_model = NFNet(vision.CONFIG), Decoder(text.CONFIG)
        self.galleries: dict[str, Gallery] = {}

    def run(self) -> None:
        """Every stage that is not done yet, and the report."""
        sizes = self.sizes
        pictures = self._tensors(
            "pictures",
            lambda: {
                "glyphs": images.training_glyphs(sizes.glyphs, sizes.drawings, SEED),
                "digits": images.digits(images.TRAINING_DIGITS),
                "held_out_glyphs": images.held_out_glyphs(sizes.held_out_glyphs, SEED),
                "held_out_digits": images.digits(FAST_BINDING_NEW_DIGITS),
            },
        )
        seen = [pictures["glyphs"], pictures["digits"]]
        self._frozen(
            "vision", self.encoder, lambda: vision.train_encoder(seen, sizes.vision_updates, SEED)
        )
        self._frozen(
            "language",
            self.language_model,
            lambda: text.train_language_model(sizes.language_updates, SEED),
        )
        self.galleries = {
            kind: Gallery(vision.features_of(self.encoder, drawn), documents.letters_of(drawn))
            for kind, drawn in pictures.items()
        }
        every = [(ways, shots) for ways in WAYS for shots in SHOTS]
        model = BASELINE.build(self.encoder, self.language_model, SEED)
        self._stage("text-before", lambda: [self._text_loss(model)])
        self._train("baseline", BASELINE, model, sizes.updates)
        self._stage("text-after", lambda: [self._text_loss(model)])
        self._stage("baseline", lambda: self._accuracies(model, every))
        self._stage("class-means", self._class_means)
        model.save_pretrained(self.output / "model", include_frozen=True)

        early = self.output / "baseline" / f"step_{sizes.ablation_updates:08}" / WEIGHTS_FILE
        model.load_state_dict(load_file(early), strict=False)
        self._stage("baseline-short", lambda: self._accuracies(model, COMPARED))
        for name, variant in ABLATIONS.items():
            model = variant.build(self.encoder, self.language_model, SEED)
            self._train(name, variant, model, sizes.ablation_updates)
            self._stage(name, lambda model=model: self._accuracies(model, COMPARED))
        report.write(self.output)

    def _train(self, name: str, variant: Variant, model: FlamingoModel, updates: int) -> None:
        """Train ``model``, continue, or load what is trained."""
        kinds = {
            "documents": ("interleaved", documents.interleaved),
            "pairs": ("pairs", documents.pairs),
        }
        galleries = [self.galleries["glyphs"], self.galleries["digits"]]
        sections, loaders = [], {}
        for number, dataset in enumerate(variant.datasets):
            kind, draw = kinds[dataset]
            loaders[dataset] = DrawnBatches(
                functools.partial(draw, galleries, BATCH_SIZE), seed=SEED + 1 + number
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
            print(f"training: {variant.title}", file=sys.stderr)
            trainer.run()
            return []

        self._stage(f"train-{name}", train)
        model.eval()

    def _accuracies(self, model: FlamingoModel, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        def of(gallery: Gallery, ways: int, shots: int, seed: int) -> Accuracy:
            return evaluate.accuracy(model, gallery, ways, shots, self.sizes.episodes, seed)

        return self._each(of, cells)

    def _class_means(self) -> list[dict[str, Any]]:
        def of(gallery: Gallery, ways: int, shots: int, seed: int) -> Accuracy:
            return evaluate.class_means(gallery, ways, shots, self.sizes.episodes, seed)

        return self._each(of, [(ways, shots) for ways in WAYS for shots in SHOTS if shots])

    def _each(
        self,
        measure: Callable[[Gallery, int, int, int], Accuracy],
        cells: Sequence[Cell],
    ) -> list[dict[str, Any]]:
        lines = []
        cases = [(kind, *cell) for kind in HELD_OUT for cell in cells]
        progress = Progress("accuracy", len(cases))
        for number in progress:
            kind, ways, shots = cases[number - 1]
            gallery = self.galleries[f"held_out_{kind}"]
            found = measure(gallery, ways, shots, HELD_OUT.index(kind))
            progress.note = f"{kind}, {ways}-way, {shots} shots per class: {found.value:.3f}"
            lines.append({"kind": kind, "ways": ways, "shots": shots, **asdict(found)})
        return lines

    def _text_loss(self, model: FlamingoModel) -> dict[str, Any]:
        """On documents without a picture: the language model alone, and with what was added."""
        ids = TEXT.draw(np.random.default_rng(SEED))
        with torch.no_grad():
            alone = next_token_loss(self.language_model(ids).logits, ids)
            added = model(ids, labels=ids).loss
        return {"alone": alone.item(), "added": added.item()}

    def _stage(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> None:
        """Keep the lines that ``make`` gives and how long it took, unless they are there."""
        path = self.output / "stages" / f"{name}.json"
        if path.exists():
            return
        print(f"== {name}", file=sys.stderr)
        started = time.monotonic()
        lines = make()
        stage = {"lines": lines, "seconds": round(time.monotonic() - started, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".incomplete")
        temporary.write_text(json.dumps({"stage": name, **stage, **environment("cpu")}))
        os.replace(temporary, path)

    def _tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, kept in a file."""
        path = self.output / f"{name}.safetensors"

        def write() -> list[dict[str, Any]]:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(make(), path)
            return []

        self._stage(name, write)
        return load_file(path)

    def _frozen(self, name: str, module: nn.Module, train: Callable[[], nn.Module]) -> None:
        """Give ``module`` the weights that ``train`` gives, kept in a file, and freeze it."""
        module.load_state_dict(self._tensors(name, lambda: train().state_dict()))
        module.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
