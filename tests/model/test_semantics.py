"""The points of docs/semantics.md at the level of the model; each test names its point."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import reference
from flamingo_kernels import FlamingoConfig, FlamingoModel, MediaSpans
from flamingo_kernels.model.loss import ignore_text_before_first_image
from flamingo_kernels.ops.spans import ATTEND_MODES
from testing.budgets import assert_close_to_reference, assert_gradients_close
from testing.tiny_model import TINY, make_model, ragged_batch

IMAGE, PAD = TINY.image_token_id, TINY.pad_token_id


def trainable_gradients(model: FlamingoModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.trainable_parameters().items()}


def with_reference(model: FlamingoModel) -> tuple[FlamingoModel, reference.Flamingo]:
    oracle = reference.Flamingo(model.config).to(next(model.parameters()).dtype)
    oracle.load_state_dict(model.state_dict(), strict=True)
    return model, oracle


@pytest.mark.parametrize("side", ["left", "right"])
def test_point_1_media_index_ignores_padding(side: str) -> None:
    batch = ragged_batch(side)
    spans = MediaSpans.from_tokens(batch.input_ids, IMAGE)
    for row, ids in enumerate(batch.rows):
        alone = MediaSpans.from_tokens(torch.tensor([ids]), IMAGE)
        assert torch.equal(spans.last[row, batch.positions(row)], alone.last[0])


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
@pytest.mark.parametrize("assign", ["previous", "next"])
@pytest.mark.parametrize("attend", ATTEND_MODES)
def test_points_2_and_13_whole_model_equals_reference(
    attend: str, assign: str, kernel: str
) -> None:
    """Loss, logits and every gradient, in every attend mode and both training assignments."""
    model, oracle = with_reference(make_model(kernel, attend=attend).double())
    batch = ragged_batch("left")
    arguments = {**batch.arguments(), "labels": batch.input_ids, "assign": assign}
    arguments["pixel_values"] = arguments["pixel_values"].double()
    out, expected = model(**arguments), oracle(**arguments)
    real = batch.attention_mask.bool()
    assert_close_to_reference(out.logits[real], expected.logits[real], torch.float64, "logits")
    assert_close_to_reference(out.loss, expected.loss, torch.float64, "loss")
    out.loss.backward()
    expected.loss.backward()
    truth = {n: p.grad for n, p in oracle.named_parameters() if p.requires_grad}
    assert_gradients_close(trainable_gradients(model), truth, torch.float64)


@pytest.mark.parametrize("attend", ATTEND_MODES)
def test_point_3_tokens_without_media_get_exactly_nothing(attend: str) -> None:
    """Text before the first image: the same logits whatever the images hold."""
    model = make_model(attend=attend)
    ids = torch.tensor([[10, 20, 30, IMAGE, 40]])
    first, second = (
        model(ids, torch.randn(1, 1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(s)))
        for s in (1, 2)
    )
    assert torch.equal(first.logits[:, :3], second.logits[:, :3])
    assert not torch.equal(first.logits[:, 3:], second.logits[:, 3:])


@pytest.mark.parametrize("attend", ATTEND_MODES)
def test_point_4_jacobian_outside_the_range_is_zero(attend: str) -> None:
    """Through one whole block: d token / d media is exactly 0 outside the range, and not inside."""
    block = make_model(attend=attend).double().gated_cross_attn_layers[0]
    ids = torch.tensor([[1, IMAGE, 2, IMAGE, IMAGE, 3]])
    spans = MediaSpans.from_tokens(ids, IMAGE, attend)
    x = torch.randn(1, 6, 64, dtype=torch.float64)
    media = torch.randn(1, 3, 16, 64, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda m: block(x, m, spans=spans)[0].sum(-1), media
    )  # [T, 1, I, R, D]
    reached = jacobian[:, 0].abs().amax((-2, -1)) > 0
    assert torch.equal(reached, spans.visible(3)[0])


def test_point_5_padded_slots_are_never_read() -> None:
    """NaN, Inf or zeros in padded image slots and frames: the same bits everywhere."""
    model = make_model()
    batch = ragged_batch()
    frames = torch.where(torch.arange(5) % 2 == 0, 2, 1).expand(3, 5)
    results = []
    for filling in (float("nan"), float("inf"), 0.0):
        pixels = torch.randn(3, 5, 2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        for row, count in enumerate(batch.num_images.tolist()):
            pixels[row, count:] = filling
        pixels[:, 1::2, 1] = filling
        model.zero_grad()
        arguments = {**batch.arguments(), "pixel_values": pixels, "num_frames": frames}
        out = model(**arguments, labels=batch.input_ids)
        out.loss.backward()
        results.append({"logits": out.logits, **trainable_gradients(model)})
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_point_6_count_mismatch_names_the_row() -> None:
    model = make_model()
    batch = ragged_batch()
    arguments = batch.arguments()
    arguments["num_images"] = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match=r"row 1 has 1 <image> token\(s\) but 2 image\(s\)"):
        model(**arguments)
    with pytest.raises(ValueError, match=r"row 0 has 0 <image> token\(s\) but 5 image\(s\)"):
        model(batch.input_ids, batch.pixel_values)
    with pytest.raises(ValueError, match=r"row 1 has 1 <image> token\(s\) but 0 image\(s\)"):
        model(batch.input_ids)


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("attend", ATTEND_MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_point_7_ragged_equals_alone(side: str, attend: str, kernel: str) -> None:
    """Logits, loss and gradients of rows with 0, 1 and 5 images equal those of each row alone."""
    model = make_model(kernel, attend=attend)
    batch = ragged_batch(side)
    out = model(**batch.arguments(), labels=batch.input_ids)
    out.loss.backward()
    together = trainable_gradients(model)
    model.zero_grad()
    losses, counts = [], []
    for row in range(3):
        arguments = batch.alone(row)
        alone = model(**arguments, labels=arguments["input_ids"])
        assert_close_to_reference(
            out.logits[row, batch.positions(row)], alone.logits[0], torch.float32, f"row {row}"
        )
        losses.append(alone.loss)
        counts.append(int((arguments["input_ids"][:, 1:] != IMAGE).sum()))
    weighted = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert_close_to_reference(out.loss, weighted, torch.float32, "loss")
    weighted.backward()
    assert_gradients_close(together, trainable_gradients(model), torch.float32)


def test_point_7_a_batch_without_images_runs_and_trains() -> None:
    model = make_model()
    ids = torch.randint(0, 256, (2, 7))
    for pixels in (None, torch.zeros(2, 0, 1, 3, 32, 32)):
        model.zero_grad()
        out = model(ids, pixels, labels=ids)
        out.loss.backward()
        # Every trainable parameter of the blocks has a gradient, so that data-parallel ranks agree.
        for name, parameter in model.gated_cross_attn_layers.named_parameters():
            assert parameter.grad is not None, name
            if ".attn." in f".{name}":
                assert not parameter.grad.any(), name
    _, oracle = with_reference(model)
    assert_close_to_reference(out.logits, oracle(ids).logits, torch.float32)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_point_8_zero_gates_are_bit_identical_to_the_language_model(gate: str, kernel: str) -> None:
    model = make_model(kernel, open_gates=False, gate=gate)
    batch = ragged_batch("left")
    bare = model.language_model(batch.input_ids, attention_mask=batch.attention_mask).logits
    with torch.no_grad():
        assert torch.equal(model(**batch.arguments()).logits, bare)
    assert torch.equal(model(**batch.arguments()).logits, bare)
    assert all(
        p.shape == ((1,) if gate == "scalar" else (64,))
        for n, p in model.trainable_parameters().items()
        if n.endswith("_gate")
    )


def test_point_9_feed_forward_without_media() -> None:
    ids = torch.randint(0, 256, (1, 8))
    frozen = make_model(feed_forward_without_media=False)
    bare = frozen.language_model(ids).logits
    assert torch.equal(frozen(ids).logits, bare)
    assert not torch.equal(make_model()(ids).logits, bare)


def test_point_10_norms_and_activations_are_in_tests_nn() -> None:
    """Their values are checked in tests/nn/test_blocks.py; here: the named configs choose them."""
    paper, open_flamingo = (
        FlamingoConfig.from_name(name) for name in ("flamingo-3b", "open-flamingo-9b")
    )
    assert paper.cross_attention.media_norm and not open_flamingo.cross_attention.media_norm
    assert not paper.resampler.final_norm and open_flamingo.resampler.final_norm
    assert paper.resampler.activation == "squared_relu"
    assert open_flamingo.resampler.activation == "gelu"
    assert not any(
        name.endswith("bias") and "norm" not in name and ".ff.0" not in name
        for name in make_model().gated_cross_attn_layers.state_dict()
    )


@pytest.mark.parametrize(
    ("every", "offset", "blocks"), [(2, 0, (0, 2)), (2, 1, (1, 3)), (4, 3, (3,))]
)
def test_point_11_insertion(every: int, offset: int, blocks: tuple[int, ...]) -> None:
    model, oracle = with_reference(make_model(every=every, offset=offset))
    assert model.config.cross_attention_blocks == blocks
    batch = ragged_batch(counts=(1, 2))
    assert_close_to_reference(
        model(**batch.arguments()).logits[1], oracle(**batch.arguments()).logits[1], torch.float32
    )


def test_point_12_clips_of_different_length_equal_the_clip_alone() -> None:
    model = make_model()
    ids = torch.tensor([[IMAGE, 1, IMAGE, 2], [IMAGE, 3, IMAGE, 4]])
    frames = torch.tensor([[1, 3], [12, 8]])
    pixels = torch.full((2, 2, 12, 3, 32, 32), float("nan"))
    for row in range(2):
        for slot in range(2):
            count = int(frames[row, slot])
            pixels[row, slot, :count] = torch.randn(count, 3, 32, 32)
    out = model(ids, pixels, num_frames=frames).logits
    _, oracle = with_reference(model)
    assert_close_to_reference(out, oracle(ids, pixels, num_frames=frames).logits, torch.float32)
    one = torch.tensor([[IMAGE, 5]])
    for row in range(2):
        count = int(frames[row, 0])
        clip = pixels[row : row + 1, :1]
        padded = model(one, clip, num_frames=frames[row : row + 1, :1]).logits
        assert_close_to_reference(padded, model(one, clip[:, :, :count]).logits, torch.float32)


def test_point_13_each_document_draws_its_own_assignment() -> None:
    model = make_model()
    batch = ragged_batch("left", counts=(2, 2, 2))
    together = model(**batch.arguments(), assign=["previous", "next", "previous"]).logits
    for row, assign in enumerate(("previous", "next", "previous")):
        alone = model(**batch.alone(row), assign=assign).logits[0]
        assert_close_to_reference(together[row, batch.positions(row)], alone, torch.float32)
    with pytest.raises(ValueError, match="assign names 2 rows, input_ids has 3"):
        model(**batch.arguments(), assign=["next", "next"])


def test_point_14_padding_is_ignored_whatever_ids_it_holds() -> None:
    model = make_model()
    batch = ragged_batch("left")
    padded = batch.input_ids.masked_fill(batch.attention_mask == 0, 7)
    losses = [
        model(**{**batch.arguments(), "input_ids": ids}, labels=ids).loss
        for ids in (batch.input_ids, padded)
    ]
    assert_close_to_reference(losses[1], losses[0], torch.float32)


def test_a_mask_means_nonzero() -> None:
    model = make_model()
    batch = ragged_batch("left")
    expected = model(**batch.arguments()).logits
    for mask in (batch.attention_mask * 2, batch.attention_mask * 0.5, batch.attention_mask > 0):
        arguments = {**batch.arguments(), "attention_mask": mask}
        assert torch.equal(model(**arguments).logits, expected)


def test_point_7_slots_that_no_row_fills_are_as_none() -> None:
    """The encoder is given no empty batch; the resampler's gradients are zero, not absent."""
    model = make_model()
    encoded: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    ids = torch.randint(0, 256, (2, 9))
    slots = {"pixel_values": torch.full((2, 1, 1, 3, 32, 32), float("nan"))}
    out = model(ids, **slots, num_images=torch.zeros(2, dtype=torch.int64), labels=ids)
    assert encoded == [1]
    assert torch.equal(out.logits, model(ids).logits)
    out.loss.backward()
    for parameter in model.perceiver.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_point_14_loss_ignores_images_padding_and_labels_of_minus_100() -> None:
    model = make_model()
    ids = torch.tensor([[5, IMAGE, 6, 7, 8]])
    pixels = torch.randn(1, 1, 1, 3, 32, 32)
    out = model(ids, pixels, labels=ids)
    log_probability = out.logits.log_softmax(-1)
    expected = -torch.stack([log_probability[0, t, ids[0, t + 1]] for t in (1, 2, 3)]).mean()
    assert_close_to_reference(out.loss, expected, torch.float32)
    some = ids.clone()
    some[0, 3] = -100
    expected = -torch.stack([log_probability[0, t, ids[0, t + 1]] for t in (1, 3)]).mean()
    assert_close_to_reference(model(ids, pixels, labels=some).loss, expected, torch.float32)


@pytest.mark.parametrize(
    ("mask", "counted"),
    [
        (None, [5, PAD, 7, 8, PAD]),
        ([1, 1, 1, 1, 1, 1], [5, PAD, 7, 8, PAD]),
        ([1, 1, 1, 1, 1, 0], [5, PAD, 7, 8]),
        ([0, 1, 1, 1, 1, 1], [PAD, 7, 8, PAD]),  # nothing predicts the first token
        ([1, 1, 0, 1, 1, 1], [5, 8, PAD]),
    ],
)
@pytest.mark.parametrize("ends", [(), (PAD,), (3, PAD)])
def test_point_14_a_mask_and_not_the_id_says_what_padding_is(mask, counted, ends) -> None:
    """Padding tokens may end turns: with a mask they count, and without one if they end texts."""
    model = make_model()
    model.language_model.eos_token_ids = ends
    labels = torch.tensor([[4, 5, PAD, 7, 8, PAD]])
    if mask is None and not ends:
        counted = [5, 7, 8]
    real = None if mask is None else torch.tensor([mask])
    targets = model.mask_labels(labels, None if real is None else real != 0)[:, 1:]
    assert targets[targets != -100].tolist() == counted
    loss = model(labels, attention_mask=real, labels=labels).loss
    logits = model(labels, attention_mask=real).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    assert_close_to_reference(loss, expected, torch.float32)


@pytest.mark.parametrize("role", ["eos_token_id", "end_of_chunk_token_id"])
def test_point_14_a_padding_token_that_ends_texts_counts(role: str) -> None:
    model = make_model()
    model.config = replace(TINY, **{role: PAD})
    labels = torch.tensor([[4, 5, PAD]])
    assert torch.equal(model.mask_labels(labels), labels)


def test_point_14_all_labels_ignored_is_a_finite_zero_with_zero_gradients() -> None:
    model = make_model()
    ids = torch.tensor([[5, IMAGE, 6]])
    out = model(ids, torch.randn(1, 1, 1, 3, 32, 32), labels=torch.full_like(ids, -100))
    assert out.loss.item() == 0
    out.loss.backward()
    assert not any(gradient.any() for gradient in trainable_gradients(model).values())


def test_point_14_text_before_the_first_image_can_be_ignored() -> None:
    ids = torch.tensor([[1, 2, IMAGE, 3], [1, 2, 3, 4]])
    assert ignore_text_before_first_image(ids, ids, IMAGE).tolist() == [
        [-100, -100, IMAGE, 3],
        [-100] * 4,
    ]


# Point 15, cached decoding, is in test_generation.py.


def test_point_16_frozen_means_frozen() -> None:
    model = make_model().train()
    assert not model.vision_encoder.training and not model.language_model.training
    batch = ragged_batch()
    model(**batch.arguments(), labels=batch.input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        frozen = name.split(".")[0] in ("vision_encoder", "language_model")
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
    # The gradient of a lower block reaches it through the frozen language model.
    assert model.gated_cross_attn_layers[0].attn_gate.grad.any()


def test_point_16_the_vision_encoder_builds_no_graph() -> None:
    model = make_model()
    seen = []
    model.vision_encoder.register_forward_hook(lambda m, i, out: seen.append(out.requires_grad))
    arguments = ragged_batch().arguments()
    arguments["pixel_values"].requires_grad_()
    model(**arguments)
    assert seen == [False]


def test_point_17_bf16_and_autocast_run_close_to_fp32() -> None:
    model = make_model()
    batch = ragged_batch()
    real = batch.attention_mask.bool()
    exact = model(**batch.arguments()).logits[real]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**batch.arguments()).logits[real]
    assert_close_to_reference(mixed, exact, torch.bfloat16, "autocast")
    half = model.bfloat16()(**batch.arguments()).logits[real]
    assert half.dtype == torch.bfloat16
    assert_close_to_reference(half, exact, torch.bfloat16, "bf16")


def test_point_18_same_inputs_same_bits() -> None:
    model = make_model()
    batch = ragged_batch()
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model(**batch.arguments(), labels=batch.input_ids)
        out.loss.backward()
        results.append({"logits": out.logits, **trainable_gradients(model)})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_vector_gates_equal_reference() -> None:
    model, oracle = with_reference(make_model(gate="vector"))
    batch = ragged_batch(counts=(1, 3))
    out, expected = model(**batch.arguments()).logits, oracle(**batch.arguments()).logits
    real = batch.attention_mask.bool()
    assert_close_to_reference(out[real], expected[real], torch.float32)


def test_config_change_is_honoured_without_a_resampler_projection() -> None:
    resampler = replace(TINY.resampler, dim=128, input_dim=None, max_num_frames=None)
    model, oracle = with_reference(FlamingoModel(replace(TINY, resampler=resampler)).eval())
    ids, pixels = torch.tensor([[IMAGE, 4]]), torch.randn(1, 1, 2, 3, 32, 32)
    assert_close_to_reference(model(ids, pixels).logits, oracle(ids, pixels).logits, torch.float32)
