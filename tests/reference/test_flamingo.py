"""The whole model: frozen parts, gates, padding, raggedness, video and loss."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import reference
from reference import Flamingo, media_spans
from testing.budgets import assert_close_to_reference

IMAGE, PAD, EOS = 60, 0, 2
ROWS = [
    [1, 5, IMAGE, 6, 7, IMAGE, 8, 9],  # two images
    [1, 10, 11, 12],  # none
    [IMAGE, 13, 14, 15, 2],  # one
]
IMAGES = [2, 0, 1]


@pytest.fixture
def pixels(random64):
    return random64(3, 2, 2, 3, 32, 32)


def batch(left: bool = False):
    """The rows padded to one length, and the mask."""
    width = max(map(len, ROWS))
    ids, mask = [], []
    for row in ROWS:
        padding = [0] * (width - len(row))
        ids.append(padding + row if left else row + padding)
        mask.append(padding + [1] * len(row) if left else [1] * len(row) + padding)
    return torch.tensor(ids), torch.tensor(mask)


def test_projected_tiles_are_keys_of_their_image(make_config, scrambled, random64):
    """The gated blocks get the keys of real tiles end to end, and ranges of these."""
    config = make_config(attend="previous", kv_heads=1)
    config.resampler, config.projector = None, SimpleNamespace(dim=32, bias=True)
    model = scrambled(Flamingo(config))
    pixels = random64(2, 2, 2, 3, 32, 32)
    pixels[0, 0, 1] = pixels[1, 1] = float("nan")
    given = []
    model.gated_cross_attn_layers[0].register_forward_pre_hook(lambda _, x: given.extend(x))
    ids = torch.tensor([[1, IMAGE, 5, IMAGE], [1, 2, IMAGE, 7]])
    logits = model(ids, pixels, torch.tensor([2, 1]), torch.tensor([[1, 2], [2, 0]])).logits
    assert logits.isfinite().all()
    _, media, first, last = given
    tiles = [
        [pixels[0, 0, 0], pixels[0, 1, 0], pixels[0, 1, 1]],
        [pixels[1, 0, 0], pixels[1, 0, 1]],
    ]
    for row, of_row in enumerate(tiles):
        keys = model.projector(model.vision_encoder(torch.stack(of_row))).flatten(0, 1)
        assert_close_to_reference(media[row, : len(keys), 0], keys, torch.float64)
        assert not media[row, len(keys) :].any()
    size = media.shape[1] // 3
    assert first.tolist() == [[0] * 4, [0] * 4]
    assert last.tolist() == [[-1, size - 1, size - 1, 3 * size - 1], [-1, -1, *[2 * size - 1] * 2]]


def gradients(model, loss):
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trainable, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trainable, found, strict=True)]


def test_imports_are_torch_and_the_standard_library():
    for path in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                root = name.split(".")[0]
                assert root == "torch" or root in sys.stdlib_module_names, f"{path.name}: {name}"


@pytest.mark.parametrize("every", [1, 2])
def test_zero_gates_leave_the_decoder_bit_identical(make_model, pixels, every):
    model = make_model(every=every)
    with torch.no_grad():
        for layer in model.gated_cross_attn_layers:
            layer.attn_gate.zero_()
            layer.ff_gate.zero_()
    input_ids, mask = batch()
    logits = model(input_ids, pixels, torch.tensor(IMAGES), attention_mask=mask).logits
    assert torch.equal(logits, model.language_model(input_ids, mask))


def test_a_new_model_is_its_decoder(make_config, pixels):
    model = Flamingo(make_config()).double()
    input_ids, _ = batch()
    logits = model(input_ids, pixels, torch.tensor(IMAGES)).logits
    assert torch.equal(logits, model.language_model(input_ids))


@pytest.mark.parametrize(
    ("every", "offset", "blocks"),
    [(1, 0, [0, 1, 2, 3]), (2, 0, [0, 2]), (2, 1, [1, 3]), (3, 0, [0, 3])],
)
def test_insertion(make_config, every, offset, blocks):
    config = make_config(every=every, offset=offset)
    config.language.depth = 4
    model = Flamingo(config)
    assert model.insertions == blocks
    assert len(model.gated_cross_attn_layers) == len(blocks)


def test_forward_is_the_composition_of_its_parts(make_model, pixels):
    model = make_model(every=2, offset=1, attend="previous")
    input_ids = torch.tensor([ROWS[0]])
    mask = torch.ones_like(input_ids)
    media = model.perceiver(
        torch.stack([model.vision_encoder(pixels[0, item]) for item in range(2)])
    )[None]
    lm = model.language_model
    x = lm.blocks[0](lm.token_embedding(input_ids), mask)
    x = model.gated_cross_attn_layers[0](x, media, *media_spans(input_ids, IMAGE, "previous"))
    expected = lm.to_logits(lm.blocks[1](x, mask))
    assert_close_to_reference(model(input_ids, pixels[:1]).logits, expected, torch.float64)


def test_frozen_parts(make_model, pixels):
    model = make_model().train()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    roots = {name.split(".")[0] for name in frozen}
    assert roots == {"vision_encoder", "language_model"}
    assert len(frozen) == sum(
        len(list(part.parameters())) for part in (model.vision_encoder, model.language_model)
    )
    assert model.training and not model.vision_encoder.training
    pixels.requires_grad_()
    input_ids, _ = batch()
    loss = model(input_ids, pixels, torch.tensor(IMAGES), labels=input_ids).loss
    loss.backward()
    assert pixels.grad is None
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("left", [False, True])
def test_ragged_equals_alone(make_model, pixels, left):
    model = make_model()
    input_ids, mask = batch(left)
    out = model(input_ids, pixels, torch.tensor(IMAGES), attention_mask=mask, labels=input_ids)
    summed, terms = 0.0, 0
    for row, tokens in enumerate(ROWS):
        alone_ids = torch.tensor([tokens])
        alone = model(alone_ids, pixels[row : row + 1, : IMAGES[row]], labels=alone_ids)
        real = out.logits[row][mask[row].bool()]
        assert_close_to_reference(real, alone.logits[0], torch.float64, f"row {row}")
        kept = sum(token != IMAGE for token in tokens[1:])
        summed, terms = summed + kept * alone.loss, terms + kept
    assert_close_to_reference(out.loss, summed / terms, torch.float64, "loss")
    # As one vector: what reaches a small gradient was rounded at the size of the large ones.
    together, apart = (
        torch.cat([g.flatten() for g in gradients(model, loss)])
        for loss in (out.loss, summed / terms)
    )
    assert_close_to_reference(together, apart, torch.float64, "gradient")


def test_padded_slots_and_frames_are_never_read(make_model, pixels):
    model = make_model()
    input_ids, mask = batch()
    num_frames = torch.tensor([[2, 1], [2, 2], [1, 2]])
    poisoned = pixels.clone()
    poisoned[0, 1, 1:] = poisoned[1] = poisoned[2, 0, 1:] = poisoned[2, 1] = float("nan")
    results = []
    for values in (pixels, poisoned):
        out = model(input_ids, values, torch.tensor(IMAGES), num_frames, mask, input_ids)
        results.append([out.loss, out.logits, *gradients(model, out.loss)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_text_only(make_model, pixels):
    text = torch.tensor([ROWS[1]])
    model = make_model()
    none = model(text, labels=text)
    no_slots = model(text, pixels[:1, :0])
    unused = model(text, pixels[:1], torch.tensor([0]))
    assert none.loss.isfinite()
    assert torch.equal(none.logits, no_slots.logits) and torch.equal(none.logits, unused.logits)
    assert not torch.equal(none.logits, model.language_model(text))

    without = make_model(feed_forward_without_media=False)
    assert torch.equal(without(text).logits, without.language_model(text))


@pytest.mark.parametrize("frames", [1, 3, 5])  # an image; as trained; interpolated
def test_video_reads_every_frame(make_model, random64, frames):
    model = make_model()
    input_ids = torch.tensor([ROWS[2]])
    pixels = random64(1, 1, frames, 3, 32, 32)
    logits = model(input_ids, pixels).logits
    assert logits.isfinite().all()
    for frame in range(frames):
        changed = pixels.clone()
        changed[:, :, frame] += 1.0
        assert not torch.equal(model(input_ids, changed).logits, logits)


def test_clips_of_two_lengths_equal_each_alone(make_model, pixels):
    model = make_model()
    input_ids = torch.tensor([ROWS[0]])
    short = torch.tensor([[1, 2]])
    logits = model(input_ids, pixels[:1], num_frames=short).logits
    first_chunk = model(torch.tensor([ROWS[0][:5]]), pixels[:1, :1, :1]).logits
    assert_close_to_reference(logits[:, :5], first_chunk, torch.float64)


def test_next_assignment(make_model, pixels):
    model = make_model()
    input_ids = torch.tensor([ROWS[0]])
    changed = pixels[:1].clone()
    changed[:, 0] += 1.0

    def difference(assign):
        a, b = (model(input_ids, p, assign=assign).logits[0] for p in (pixels[:1], changed))
        return (a != b).any(-1).tolist()

    # Causal self-attention carries image 0 on from the first token that sees it.
    assert difference("previous") == [False, False] + [True] * 6
    assert difference("next") == [True] * 8


def test_loss_is_the_mean_over_what_is_kept(make_model, pixels):
    model = make_model()
    input_ids, mask = batch()
    labels = input_ids.clone()
    labels[0, 3] = -100
    out = model(input_ids, pixels, torch.tensor(IMAGES), attention_mask=mask, labels=labels)
    targets = labels[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    targets = targets.masked_fill(targets == IMAGE, -100)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets.flatten())
    assert_close_to_reference(out.loss, expected, torch.float64)


def test_pad_labels_are_ignored_unless_pad_ends_texts_or_a_mask_says_what_is_real(make_model):
    model = make_model()
    logits = torch.zeros(1, 3, 64, dtype=torch.float64)
    logits[0, 1, PAD] = 5.0
    labels, mask = torch.tensor([[4, 5, PAD]]), torch.ones(1, 3, dtype=torch.long)
    uniform = torch.tensor(64.0, dtype=torch.float64).log()
    assert_close_to_reference(model.next_token_loss(logits, labels, None), uniform, torch.float64)
    assert model.next_token_loss(logits, labels, mask) < uniform
    for end in ("eos_token_id", "end_of_chunk_token_id"):
        changed = make_model()
        setattr(changed.config, end, PAD)
        assert changed.next_token_loss(logits, labels, None) < uniform


def test_all_labels_ignored(make_model, pixels):
    model = make_model()
    input_ids = torch.tensor([ROWS[0]])
    labels = torch.full_like(input_ids, -100)
    loss = model(input_ids, pixels[:1], labels=labels).loss
    assert torch.equal(loss, torch.zeros((), dtype=torch.float64))
    for gradient in gradients(model, loss):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_labels_no_loss(make_model):
    assert make_model()(torch.tensor([ROWS[1]])).loss is None


def test_count_mismatch(make_model, pixels):
    model = make_model()
    input_ids, _ = batch()
    with pytest.raises(ValueError, match="row 1 has 0 <image> tokens but 2 images"):
        model(input_ids, pixels)
    with pytest.raises(ValueError, match="row 0 has 2 <image> tokens but 1 images"):
        model(input_ids, pixels, torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="row 0 has 2 <image> tokens but 0 images"):
        model(input_ids)
    with pytest.raises(ValueError, match=r"num_images\[2\] is 3, outside \[0, 2\]"):
        model(input_ids, pixels, torch.tensor([2, 0, 3]))
    with pytest.raises(ValueError, match=r"num_frames\[0, 1\] is 3, outside \[1, 2\]"):
        frames = torch.tensor([[2, 3], [2, 2], [2, 2]])
        model(input_ids, pixels, torch.tensor(IMAGES), frames)


def test_other_backbones_are_refused(make_config):
    config = make_config()
    config.vision.kind = "huggingface"
    with pytest.raises(ValueError, match="backbones are 'huggingface' and 'decoder'"):
        Flamingo(config)


def test_fp32_agrees_with_fp64(make_model, pixels):
    model = make_model()
    input_ids = torch.tensor([ROWS[0]])
    exact = model(input_ids, pixels[:1], labels=input_ids)
    single = model.float()(input_ids, pixels[:1].float(), labels=input_ids)
    assert single.logits.dtype == single.loss.dtype == torch.float32
    assert_close_to_reference(single.logits, exact.logits, torch.float32)
    assert_close_to_reference(single.loss, exact.loss, torch.float32)
