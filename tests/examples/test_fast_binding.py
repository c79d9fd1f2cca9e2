"""The in-context learning example: its data, its stages, and the model that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.fast_binding import documents, experiment, images, report, text, vision
from examples.fast_binding.documents import DrawnBatches, Gallery
from examples.fast_binding.evaluate import Accuracy, accuracy, draw_episodes
from examples.fast_binding.model import ABLATIONS, BASELINE
from examples.fast_binding.text import TOKENS
from flamingo_kernels import FlamingoModel
from flamingo_kernels.cli import demo
from flamingo_kernels.language.decoder import Decoder
from flamingo_kernels.shipped import FAST_BINDING, FAST_BINDING_GLYPHS
from flamingo_kernels.vision import NFNet

RESULTS = Path(report.__file__).parent / "results"
SHIPPED_BYTES = 8 * 10**6


@pytest.fixture
def gallery() -> Gallery:
    """Six classes of twelve drawings; each feature is the number of its drawing."""
    features = torch.arange(6 * 12).reshape(6, 12, 1, 1).expand(-1, -1, 16, 64).float()
    return Gallery(features, torch.randint(9, (6, 12)))


def test_a_glyph_is_drawn_again_the_same_and_each_drawing_differs() -> None:
    glyphs = np.array([3, 3, 5])
    first, again = (images.draw_glyphs(glyphs, np.random.default_rng(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert first.shape == (3, images.SIZE, images.SIZE) and 0 <= first.min() < first.max() <= 1


def test_training_and_evaluation_share_no_class_and_no_name() -> None:
    assert not set(images.TRAINING_DIGITS) & set(images.HELD_OUT_DIGITS)
    assert experiment.Sizes().glyphs < images.FIRST_HELD_OUT_GLYPH
    names = [set(map(tuple, names)) for names in (text.TRAINING_NAMES, text.HELD_OUT_NAMES)]
    assert names[0] and names[1] and not names[0] & names[1]
    assert {tuple(name.encode()) for name in demo.NAMES} <= names[1]


def test_text_binds_each_thing_to_one_name() -> None:
    ids = text.Documents(most_things=6, tokens=151, rows=4).draw(np.random.default_rng(0))
    assert ids.shape == (4, 151)
    for row in ids[:, 1:].unflatten(1, (-1, text.CHUNK_TOKENS)).tolist():
        bound = {}
        for thing, *name, end in row:
            assert bound.setdefault(thing, name) == name
            assert end == TOKENS.end_of_chunk_token_id
        assert 2 <= len(bound) <= 6


def test_a_caption_names_the_cell_with_most_ink() -> None:
    pictures = torch.zeros(2, 1, 30, 30)
    pictures[0, :, 20:, :10] = 1
    pictures[1, :, :10, 10:20] = 1
    gallery = Gallery.of(NFNet(vision.CONFIG), pictures)
    assert gallery.inkiest.tolist() == [[6], [1]]
    batch = documents.pairs([gallery] * 2, 16, np.random.default_rng(0))
    captions = {0: set(), 1: set()}
    for ids, seen in zip(batch["input_ids"].tolist(), batch["pixel_values"], strict=True):
        captions[int(torch.equal(seen[0, 0], gallery.features[1, 0]))].add(tuple(ids[2:5]))
    assert len(captions[0]) == len(captions[1]) == 1 and captions[0] != captions[1]


def test_no_two_classes_of_digits_are_the_same_turned() -> None:
    pictures = images.training_digits()
    assert len({tuple(drawn.flatten().tolist()) for drawn in pictures[:, 0]}) == len(pictures)


def test_an_episode_shows_every_class_as_often_and_no_picture_twice(gallery: Gallery) -> None:
    episodes = draw_episodes(gallery, 2, 4, rows=20, generator=np.random.default_rng(0))
    pictures = episodes.features[:, :, 0, 0, 0]
    for ids, shown, answer in zip(
        episodes.input_ids, pictures.tolist(), episodes.answers, strict=True
    ):
        assert len(set(shown)) == 9
        *classes, asked = [int(number) // 12 for number in shown]
        assert sorted(map(classes.count, set(classes))) == [4, 4]
        named = ids[1:-1].unflatten(0, (8, 5))[:, 1:4].tolist()
        assert named[classes.index(asked)] == episodes.names[answer].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_training_document_has_five_images_under_names_of_their_classes(
    seed: int, gallery: Gallery
) -> None:
    batch = documents.interleaved([gallery, gallery], 8, np.random.default_rng(seed))
    assert batch["pixel_values"].shape == (8, 5, 1, 16, 64)
    for ids, features in zip(batch["input_ids"], batch["pixel_values"], strict=True):
        shown = ids[1:].unflatten(0, (-1, text.CHUNK_TOKENS)).tolist()
        assert len(shown) == 5 and all(chunk[0] == TOKENS.image_token_id for chunk in shown)
        classes = [int(number) // 12 for number in features[:, 0, 0, 0]]
        names = {c: {tuple(shown[i][1:4]) for i in range(5) if classes[i] == c} for c in classes}
        assert all(len(of_class) == 1 for of_class in names.values())


def test_batches_continue_where_they_were(gallery: Gallery) -> None:
    def draw(generator: np.random.Generator) -> dict[str, torch.Tensor]:
        return documents.pairs([gallery, gallery], 4, generator)

    batches = DrawnBatches(draw, seed=1)
    next(batches)
    position = batches.state_dict()
    expected = next(batches)
    resumed = DrawnBatches(draw, seed=1)
    resumed.load_state_dict(position)
    assert torch.equal(next(resumed)["pixel_values"], expected["pixel_values"])


def test_wilson_interval() -> None:
    """8 of 10: the worked example of Wilson's interval, 0.4902 to 0.9433."""
    low, high = Accuracy(8, 10).interval
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_is_another_model_that_runs(name: str, gallery: Gallery) -> None:
    parts = NFNet(vision.CONFIG), Decoder(text.CONFIG)
    batch = documents.interleaved([gallery, gallery], 2, np.random.default_rng(0))
    variant = ABLATIONS[name]
    changed = variant.build(*parts, seed=0)
    loss = changed(**batch).loss
    loss.backward()
    baseline = BASELINE.build(*parts, seed=0)
    same_model = (
        changed.config == baseline.config
        and changed.state_dict().keys() == baseline.state_dict().keys()
        and all(torch.equal(t, baseline.state_dict()[n]) for n, t in changed.state_dict().items())
    )
    same_training = (variant.datasets, variant.trainer) == (BASELINE.datasets, BASELINE.trainer)
    assert torch.isfinite(loss) and not (same_model and same_training)


@pytest.mark.slow
def test_all_stages_run_and_are_not_repeated(tmp_path: Path) -> None:
    experiment.Experiment(tmp_path, experiment.QUICK).run()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    before = json.loads((tmp_path / "stages" / "text-before.json").read_text())["lines"][0]
    assert before["alone"] == before["added"]
    table = (tmp_path / "results" / "report.md").read_text()
    assert all(variant.title in table for variant in ABLATIONS.values())
    FlamingoModel.from_pretrained(tmp_path / "model")
    experiment.Experiment(tmp_path, experiment.QUICK).run()
    trained = {path: time for path, time in written.items() if path.parent.name != "model"}
    assert {path: path.stat().st_mtime_ns for path in trained} == trained


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """The results of the run that made the shipped model, by stage."""
    lines = map(json.loads, (RESULTS / report.RESULTS_FILE).read_text().splitlines())
    return {line["stage"]: line for line in lines}


def test_the_page_shows_the_results(results: dict[str, Any]) -> None:
    assert report.accuracy_table(results) in (RESULTS.parents[2] / "docs/examples.md").read_text()


@pytest.fixture(scope="module")
def held_out() -> dict[str, torch.Tensor]:
    """Pictures of the classes to evaluate on."""
    glyphs = images.held_out_glyphs(experiment.Sizes().held_out_glyphs, experiment.SEED)
    return {"glyphs": glyphs, "digits": images.digits(images.HELD_OUT_DIGITS)}


@pytest.mark.parametrize("kind", experiment.HELD_OUT)
def test_the_shipped_model_is_as_good_as_the_results_say(
    kind: str, held_out: dict[str, torch.Tensor], results: dict[str, Any]
) -> None:
    """The episodes are those of the report; rounding may flip a few."""
    reported = report.cells(results["baseline"])[kind, 2, 4]
    model = FlamingoModel.from_pretrained(FAST_BINDING).eval()
    gallery = Gallery.of(model.vision_encoder, held_out[kind])
    seed = experiment.HELD_OUT.index(kind)
    found = accuracy(model, gallery, 2, 4, reported.episodes, seed)
    low, high = reported.interval
    assert low <= found.value <= high


def test_the_shipped_glyphs_are_held_out(held_out: dict[str, torch.Tensor], tmp_path: Path) -> None:
    images.save_sheet(held_out["glyphs"], tmp_path / "glyphs.png")
    with Image.open(tmp_path / "glyphs.png") as drawn, Image.open(FAST_BINDING_GLYPHS) as shipped:
        assert np.array_equal(np.asarray(drawn), np.asarray(shipped))


def test_the_shipped_model_is_small() -> None:
    assert sum(path.stat().st_size for path in FAST_BINDING.iterdir()) <= SHIPPED_BYTES
