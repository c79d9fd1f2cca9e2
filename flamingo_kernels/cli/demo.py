"""Name new pictures from examples with the shipped model, beside the reference."""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flamingo_kernels import FlamingoModel
from flamingo_kernels.data.decode import open_picture
from flamingo_kernels.data.images import to_pixel_values
from flamingo_kernels.language.byte_tokenizer import ByteTokenizer
from flamingo_kernels.ops import dispatch
from flamingo_kernels.shipped import FAST_BINDING, FAST_BINDING_GLYPHS

if TYPE_CHECKING:
    from PIL.Image import Image

# Invented names, none of which the model was trained on.
NAMES = ("kip", "zov")
QUERIES = 8
ROUNDS = 5
# Bounds of the error against the reference in fp64, over the error of the reference in fp32.
BOUNDS = {"loss": 2, "logits": 2, "gradients": 3}


@dataclass(frozen=True)
class Prompts:
    """Prompts with the same examples before each of several pictures to name.

    Attributes
    ----------
    examples, queries : list of PIL.Image.Image
    right : list of str
        The right name of each query.
    input_ids : Tensor
        int64 [queries, T].
    pixel_values : Tensor
        fp32 [queries, examples + 1, 1, 3, H, W].
    """

    examples: list[Image]
    queries: list[Image]
    right: list[str]
    input_ids: Tensor
    pixel_values: Tensor


@dataclass(frozen=True)
class Run:
    """What one implementation computed, its median time, and its peak memory over the inputs."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    seconds: float
    peak_bytes: int | None


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--kernel", default="auto", help="auto, triton, cpp or torch")
    parser.add_argument("--shots", type=int, default=2, help="examples in the prompt")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for the PNG"
    )


def run(options: Namespace) -> int:
    """Run the demo; return 0 if the package agrees with the reference, 1 otherwise."""
    kernel, shots = options.kernel, options.shots
    if not 1 <= shots <= 32:
        raise ValueError(f"--shots must be in 1..32, got {shots}")
    dispatch.check_kernel_name(kernel)
    missing = [name for name in ("PIL", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'the demo needs {", ".join(missing)}: pip install "flamingo_kernels[demo]"'
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = FlamingoModel.from_pretrained(FAST_BINDING, kernel).to(device)
    tokenizer = ByteTokenizer()

    _heading("Prompt")
    prompts = _build_prompts(model, tokenizer, shots)
    text = tokenizer.decode(prompts.input_ids[0], skip_special_tokens=False)
    print(f"{text}   ({len(prompts.queries)} prompts, each with another last image)")
    print("the model has seen neither these classes of glyphs nor their names")

    _heading("Kernels")
    for line in _kernel_lines(kernel, device.type):
        print(line)

    oracle = _reference(model, device)
    _heading("Names")
    same = _name(model, oracle, prompts, tokenizer, options.output / "names.png")

    _heading("Forward and backward")
    ours = _measure("flamingo_kernels", model, model.trainable_parameters(), prompts, device)
    agree = oracle is None or _agrees_with(oracle, prompts, ours, device)
    return 0 if agree and same else 1


def _build_prompts(model: FlamingoModel, tokenizer: ByteTokenizer, shots: int) -> Prompts:
    side = model.vision_encoder.image_size
    with open_picture(FAST_BINDING_GLYPHS) as sheet:
        drawn = {
            name: [
                sheet.crop((left, row * side, left + side, (row + 1) * side))
                for left in range(0, sheet.width, side)
            ]
            for row, name in enumerate(NAMES)
        }
    names = [NAMES[i % len(NAMES)] for i in range(shots)]
    examples = [drawn[name].pop(0) for name in names]
    right = [NAMES[i % len(NAMES)] for i in range(QUERIES)]
    queries = [drawn[name].pop(0) for name in right]
    text = "".join(f"<image>{name}<EOC>" for name in names) + "<image>"
    device, encoder = model.device, model.vision_encoder

    def pixels(picture: Image) -> Tensor:
        constants = {"mean": encoder.image_mean, "std": encoder.image_std}
        return to_pixel_values(picture, encoder.image_size, **constants)

    rows = [torch.stack([pixels(p) for p in (*examples, query)]) for query in queries]
    ids = torch.tensor([tokenizer.encode(text, add_bos=True)], device=device)
    return Prompts(
        examples,
        queries,
        right,
        ids.expand(QUERIES, -1),
        torch.stack(rows)[:, :, None].to(device),
    )


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


def _reference(model: FlamingoModel, device: torch.device) -> torch.nn.Module | None:
    """Return the reference with the model's weights; None where the repository is not there."""
    if find_spec("reference") is None:
        print("  reference/ is not here: run the demo from a checkout to compare with it")
        return None
    from reference import Flamingo

    oracle = Flamingo(model.config).to(device)
    oracle.load_state_dict(model.state_dict())
    return oracle


def _name(
    model: FlamingoModel,
    oracle: torch.nn.Module | None,
    prompts: Prompts,
    tokenizer: ByteTokenizer,
    picture: Path,
) -> bool:
    """Print the name of each picture; return whether package and reference agree on them."""
    longest = max(map(len, NAMES))

    def by_package() -> Tensor:
        ids = model.generate(
            prompts.input_ids, prompts.pixel_values, max_new_tokens=longest, stop_token_ids=[]
        )
        assert isinstance(ids, Tensor)  # a pair only with return_cache
        return ids

    @torch.no_grad()
    def by_reference() -> Tensor:
        assert oracle is not None
        ids = prompts.input_ids
        for _ in range(longest):
            logits = oracle(ids, prompts.pixel_values).logits[:, -1]
            logits[:, model.config.image_token_id] = float("-inf")
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        return ids

    ways = {"flamingo_kernels": by_package}
    if oracle is not None:
        ways["reference"] = by_reference
    said = {}
    for who, generate in ways.items():
        new = generate()[:, prompts.input_ids.shape[1] :]
        said[who] = [tokenizer.decode(row) for row in new]
        count = sum(a == b for a, b in zip(said[who], prompts.right, strict=True))
        print(f"  {who:<18} {' '.join(said[who])}   {count} of {len(new)} right")
    print(f"  {'right':<18} {' '.join(prompts.right)}")
    _draw(prompts, said["flamingo_kernels"], picture)
    print(f"  picture: {picture}")
    return len(set(map(tuple, said.values()))) == 1


def _measure(
    what: str,
    model: torch.nn.Module,
    parameters: dict[str, torch.nn.Parameter],
    prompts: Prompts,
    device: torch.device,
) -> Run:
    """Compute loss, logits and gradients of a model; measure forward and backward together."""

    def step() -> tuple[Tensor, Tensor]:
        for parameter in parameters.values():
            parameter.grad = None
        # The language model's self-attention is torch's; its fused one rounds more on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            out = model(prompts.input_ids, prompts.pixel_values, labels=prompts.input_ids)
            out.loss.backward()
        return out.loss, out.logits

    step()  # warm up: allocator, thread pool, compilation
    before = _reset_peak(device)
    step()
    after = _peak(device)
    peak = None if before is None or after is None else after - before
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        loss, logits = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    result = Run(
        loss.detach(),
        logits.detach(),
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


def _agrees_with(
    oracle: torch.nn.Module, prompts: Prompts, ours: Run, device: torch.device
) -> bool:
    """Return whether the error of the package is within BOUNDS."""
    named = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    theirs = _measure("reference", oracle, named, prompts, device)
    print(f"  the package takes {ours.seconds / theirs.seconds:.2f} x the reference's time")
    exact = _exact(oracle, prompts)
    agree = True
    for (what, bound), error, usual in zip(
        BOUNDS.items(), _errors(ours, exact), _errors(theirs, exact), strict=True
    ):
        within = error <= bound * usual + torch.finfo(torch.float32).eps
        agree = agree and within
        print(
            f"  {what:<10} error {error:.1e} of the largest value, the reference's {usual:.1e}: "
            f"{'agrees' if within else 'DISAGREES'}"
        )
    return agree


def _exact(oracle: torch.nn.Module, prompts: Prompts) -> Run:
    """Return what the reference computes in fp64."""
    wide = copy.deepcopy(oracle).double()
    out = wide(prompts.input_ids, prompts.pixel_values.double(), labels=prompts.input_ids)
    wide.zero_grad()
    out.loss.backward()
    gradients = {n: p.grad for n, p in wide.named_parameters() if p.requires_grad}
    return Run(out.loss.detach(), out.logits.detach(), gradients, 0.0, None)


def _errors(run: Run, exact: Run) -> tuple[float, float, float]:
    """Return the errors of loss, logits and gradients, each over its largest value."""
    return (
        _relative_error(run.loss, exact.loss),
        _relative_error(run.logits, exact.logits),
        max(_relative_error(g, exact.gradients[name]) for name, g in run.gradients.items()),
    )


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def _reset_peak(device: torch.device) -> int | None:
    """Reset the peak of memory use; return the bytes in use now, or None if not known here."""
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


def _draw(prompts: Prompts, said: list[str], file: Path) -> None:
    """Draw the examples with their names, and the queries with the names the model gave them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shots = len(prompts.examples)
    given = [NAMES[i % len(NAMES)] for i in range(shots)]
    rows = ((prompts.examples, given, "0.2"), (prompts.queries, said, "tab:blue"))
    widest = max(shots, len(said))
    figure, axes = pyplot.subplots(2, widest, figsize=(1.1 * widest, 3.2), layout="constrained")
    for row, (pictures, names, colour) in zip(axes, rows, strict=True):
        for axis in row:
            axis.axis("off")
        for axis, picture, name in zip(row, pictures, names, strict=False):
            axis.imshow(picture, cmap="gray")
            axis.set_title(name, color=colour)
    figure.suptitle("examples with their names (above), new pictures as the model calls them")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _heading(title: str) -> None:
    print(f"\n== {title}")
    sys.stdout.flush()
