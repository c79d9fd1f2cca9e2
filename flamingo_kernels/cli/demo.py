"""The main job on real pictures: a few-shot prompt, run by the best kernel and by the reference."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flamingo_kernels import FlamingoConfig, FlamingoModel, MediaSpans
from flamingo_kernels.data.images import to_pixel_values
from flamingo_kernels.language.byte_tokenizer import ByteTokenizer
from flamingo_kernels.ops import dispatch

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 0
GATE = 0.5
ROUNDS = 5
NEW_TOKENS = 16
# Parity bound of SEMANTICS point 7, relative to the largest value.
PARITY = 1e-5


@dataclass(frozen=True)
class Prompt:
    """An interleaved prompt: pictures, token ids [1, T] and pixel values [1, I, 1, 3, H, W]."""

    pictures: list[Image]
    captions: list[str]
    input_ids: Tensor
    pixel_values: Tensor


@dataclass(frozen=True)
class Run:
    """What one implementation computed, its median time and its peak memory over the inputs."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    seconds: float
    peak_bytes: int | None


def run(kernel: str, shots: int, output: Path) -> int:
    """Run the demo; 0 if the package agrees with the reference, 1 otherwise."""
    if not 0 <= shots <= 32:
        raise ValueError(f"--shots must be in 0..32, got {shots}")
    dispatch.check_kernel_name(kernel)
    missing = [name for name in ("sklearn", "PIL", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'the demo needs {", ".join(missing)}: pip install "flamingo_kernels[demo]"'
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = FlamingoConfig.from_name("tiny")
    tokenizer = ByteTokenizer()

    _heading("Prompt")
    prompt = _build_prompt(config, tokenizer, shots, device)
    for line in _describe(prompt, config, tokenizer):
        print(line)

    _heading("Kernels")
    for line in _kernel_lines(kernel, device.type):
        print(line)

    torch.manual_seed(SEED)
    model = FlamingoModel(config, kernel=kernel).to(device)
    for name, parameter in model.trainable_parameters().items():
        if name.endswith("_gate"):
            parameter.data.fill_(GATE)
    _heading("Forward and backward")
    print(f"config 'tiny', random weights, every gate opened to {GATE} so that the images matter")
    ours = _measure(
        "flamingo_kernels",
        lambda: model(prompt.input_ids, prompt.pixel_values, labels=prompt.input_ids),
        model.trainable_parameters(),
        device,
    )
    oracle = _reference(model, device)
    agree = oracle is None or _agrees_with(oracle, prompt, ours, device)

    _heading("Generation")
    same = _generate(model, oracle, prompt, tokenizer, device)

    picture = output / "attention_pattern.png"
    _draw(prompt, config, tokenizer, picture)
    _heading("Picture")
    print(f"which text sees which image: {picture}")
    return 0 if agree and same else 1


def _build_prompt(
    config: FlamingoConfig, tokenizer: ByteTokenizer, shots: int, device: torch.device
) -> Prompt:
    from PIL import Image
    from sklearn.datasets import load_digits, load_sample_images

    photographs = load_sample_images()
    captions = {"china.jpg": "a temple in China.", "flower.jpg": "a dahlia in bloom."}
    digits = load_digits()
    pool = [
        (Image.fromarray(pixels), captions[Path(name).name])
        for name, pixels in zip(photographs.filenames, photographs.images, strict=True)
    ]
    pool += [
        (
            Image.fromarray((digits.images[i] * 15.9).astype("uint8")),
            f"the digit {digits.target[i]}.",
        )
        for i in range(shots)
    ]
    examples, query = pool[:shots], pool[shots]
    text = "".join(f"<image>Output: {caption}<EOC>" for _, caption in examples)
    ids = tokenizer.encode(text + "<image>Output:", add_bos=True)
    pictures = [picture for picture, _ in (*examples, query)]
    size = config.vision.image_size
    pixels = torch.stack([to_pixel_values(picture, size) for picture in pictures])
    return Prompt(
        pictures,
        [caption for _, caption in (*examples, query)],
        torch.tensor([ids], device=device),
        pixels[None, :, None].to(device),
    )


def _segments(prompt: Prompt, config: FlamingoConfig) -> Iterator[tuple[int, list[int]]]:
    """(media index or -1, token positions) of each stretch of text that sees the same image."""
    spans = MediaSpans.from_tokens(
        prompt.input_ids, config.image_token_id, config.cross_attention.attend
    )
    seen = spans.last[0].tolist()
    start = 0
    for position in range(1, len(seen) + 1):
        if position == len(seen) or seen[position] != seen[start]:
            yield seen[start], list(range(start, position))
            start = position


def _describe(prompt: Prompt, config: FlamingoConfig, tokenizer: ByteTokenizer) -> Iterator[str]:
    yield f"{len(prompt.pictures)} pictures, {prompt.input_ids.shape[1]} tokens (bytes)"
    for media, positions in _segments(prompt, config):
        text = tokenizer.decode(prompt.input_ids[0, positions], skip_special_tokens=False)
        if media < 0:
            yield f"  sees nothing  {text}"
        else:
            width, height = prompt.pictures[media].size
            yield f"  sees image {media:<2} {text:<40} ({width}x{height} px)"


def _kernel_lines(kernel: str, device_type: str) -> Iterator[str]:
    yield f"kernel={kernel!r} on {device_type}, fp32"
    for op in dispatch.OPS:
        chosen = {
            job: dispatch.choose(op, kernel, dispatch.Call(device_type, torch.float32, needs_grad))
            for job, needs_grad in (("training", True), ("inference", False))
        }
        yield f"  {op:<24}" + ", ".join(f"{job}: {name}" for job, name in chosen.items())
        for name in dispatch.KERNELS if kernel == "auto" else ():
            if name == chosen["training"]:
                break
            call = dispatch.Call(device_type, torch.float32, needs_grad=True)
            reasons = dispatch.unsupported_reasons(op, name, call)
            yield f"    not {name} in training: {'; '.join(reasons)}"


def _measure(
    what: str,
    forward: Callable[[], object],
    parameters: dict[str, torch.nn.Parameter],
    device: torch.device,
) -> Run:
    """Loss, logits and gradients of ``forward``, and its cost with the backward pass."""

    def step() -> object:
        for parameter in parameters.values():
            parameter.grad = None
        out = forward()
        out.loss.backward()
        return out

    step()  # warm up: allocator, thread pool, compilation
    before = _reset_peak(device)
    step()
    after = _peak(device)
    peak = None if before is None or after is None else after - before
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        out = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    result = Run(
        out.loss.detach(),
        out.logits.detach(),
        {name: p.grad.clone() for name, p in parameters.items()},
        statistics.median(times),
        peak,
    )
    memory = "not measured on this system" if peak is None else f"{peak / 2**20:.1f} MiB"
    print(
        f"  {what:<18} loss {result.loss.item():.6f}   {result.seconds * 1e3:8.1f} ms "
        f"(median of {ROUNDS})   peak memory over the resident model {memory}"
    )
    return result


def _reference(model: FlamingoModel, device: torch.device) -> torch.nn.Module | None:
    """The oracle with the model's weights; it ships with the repository, not with the package."""
    if find_spec("reference") is None:
        print("  reference/ is not here: run the demo from a checkout to compare with it")
        return None
    from reference import Flamingo

    oracle = Flamingo(model.config).to(device)
    oracle.load_state_dict(model.state_dict())
    return oracle


def _agrees_with(oracle: torch.nn.Module, prompt: Prompt, ours: Run, device: torch.device) -> bool:
    named = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    theirs = _measure(
        "reference",
        lambda: oracle(prompt.input_ids, prompt.pixel_values, labels=prompt.input_ids),
        named,
        device,
    )
    print(f"  the package takes {ours.seconds / theirs.seconds:.2f} x the reference's time")
    errors = {
        "loss": _relative_error(ours.loss, theirs.loss),
        "logits": _relative_error(ours.logits, theirs.logits),
        "gradients": max(
            _relative_error(gradient, theirs.gradients[name])
            for name, gradient in ours.gradients.items()
        ),
    }
    for what, error in errors.items():
        verdict = "agrees" if error <= PARITY else "DISAGREES"
        print(f"  {what:<10} largest difference {error:.1e} of the largest value: {verdict}")
    return all(error <= PARITY for error in errors.values())


def _generate(
    model: FlamingoModel,
    oracle: torch.nn.Module | None,
    prompt: Prompt,
    tokenizer: ByteTokenizer,
    device: torch.device,
) -> bool:
    """Greedy tokens: ours with the cache, ours and the reference's by recomputation."""

    def by_reference() -> Tensor:
        ids = prompt.input_ids
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                logits = oracle(ids, prompt.pixel_values).logits[:, -1]
                logits[:, model.config.image_token_id] = float("-inf")
                ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        return ids

    def by_package(use_cache: bool) -> Tensor:
        return model.generate(
            prompt.input_ids,
            prompt.pixel_values,
            max_new_tokens=NEW_TOKENS,
            stop_token_ids=[],
            use_cache=use_cache,
        )

    ways: dict[str, Callable[[], Tensor]] = {
        "flamingo_kernels": lambda: by_package(True),
        "  without cache": lambda: by_package(False),
    }
    if oracle is not None:
        ways["reference"] = by_reference
    results = []
    for name, generate in ways.items():
        before = _reset_peak(device)
        start = time.perf_counter()
        results.append(generate())
        seconds = time.perf_counter() - start
        after = _peak(device)
        peak = "" if before is None else f"   peak memory {(after - before) / 2**20:.1f} MiB"
        same = _yes(torch.equal(results[-1], results[0]))
        print(f"  {name:<18} {seconds * 1e3:8.1f} ms{peak}   same {NEW_TOKENS} tokens: {same}")
    new = results[0][0, prompt.input_ids.shape[1] :]
    print(f"  continuation: {tokenizer.decode(new, skip_special_tokens=False)!r}")
    print(f"  as bytes: {new.tolist()}")
    print("  (the weights are random: this text means nothing)")
    return all(torch.equal(result, results[0]) for result in results)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def _reset_peak(device: torch.device) -> int | None:
    """Forget the peak of memory use so far; what is in use now, in bytes. None: not known here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what earlier steps freed must not hide a new peak
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark
    except (AttributeError, OSError):
        return None
    return _peak(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def _draw(prompt: Prompt, config: FlamingoConfig, tokenizer: ByteTokenizer, file: Path) -> None:
    """Text by media: one row per image, the text that sees it coloured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = pyplot.get_cmap("tab20")
    count, tokens = len(prompt.pictures), prompt.input_ids.shape[1]
    figure, (images, grid) = pyplot.subplots(
        1,
        2,
        figsize=(14, 1.5 + 0.8 * count),
        gridspec_kw={"width_ratios": [1, 14]},
        layout="constrained",
    )
    for media, picture in enumerate(prompt.pictures):
        images.imshow(picture.convert("RGB"), extent=(0, 0.9, media + 0.45, media - 0.45))
    images.set(xlim=(0, 0.9), ylim=(count - 0.5, -0.5), aspect="auto")
    images.axis("off")
    for media, positions in _segments(prompt, config):
        text = tokenizer.decode(prompt.input_ids[0, positions], skip_special_tokens=False)
        if media < 0:
            grid.axvspan(positions[0] - 0.5, positions[-1] + 0.5, color="0.85")
            continue
        grid.barh(media, len(positions), left=positions[0] - 0.5, height=0.9, color=colours(media))
        label = text.replace("<image>", "", 1)
        inside = positions[0] + len(positions) / 2 < tokens / 2
        x, align = (positions[-1] + 1, "left") if inside else (positions[0] - 1, "right")
        grid.text(x, media, label, va="center", ha=align, fontsize=9)
    grid.set(
        xlim=(-0.5, tokens - 0.5),
        ylim=(count - 0.5, -0.5),
        yticks=range(count),
        xlabel="text token (byte)",
        ylabel="media item",
        title="Which image each token sees (coloured); grey: text before the first image sees none",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _heading(title: str) -> None:
    print(f"\n== {title}")
    sys.stdout.flush()


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
