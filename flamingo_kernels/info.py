"""Reports: which kernels are available, and how many parameters a configuration has."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch

from flamingo_kernels import __version__
from flamingo_kernels._cpp import library
from flamingo_kernels.model import FlamingoConfig, FlamingoModel
from flamingo_kernels.ops import dispatch

COMPONENTS = ("language_model", "vision_encoder", "gated_cross_attn_layers", "connector")

# Flamingo, table 5, in millions of parameters.
PAPER_COUNTS = {
    "flamingo-3b": (1_400, 435, 1_200, 194),
    "flamingo-9b": (7_100, 435, 1_600, 194),
    "flamingo-80b": (70_000, 435, 10_000, 194),
}
# Relative differences above this are explained in the report.
EXPLAIN_ABOVE = 0.02
_WHY = {
    "language_model": (
        "rotary positions have no parameters; Chinchilla's relative ones add one dim x dim "
        "projection per block, and 13 instead of 12 dim^2 per block is what the table fits"
    ),
    "gated_cross_attn_layers": (
        "keys and values are projected from the resampler's 1536 channels; the table fits a "
        "projection from the language model's width (12 dim^2 per block) and is rounded"
    ),
}
_REMARKS = {
    "flamingo-9b": (
        "32 LM blocks and 8 cross-attention blocks, which is what table 5's counts fit; table 4 "
        "says 40 and 10."
    ),
}
_RESAMPLER_REMARK = (
    "The resampler's 194M fits 16 heads of 128 behind a 3072 -> 1536 projection; heads of 96 "
    "(appendix A.1.4 of v2) would give 175M."
)


def kernel_lines() -> Iterator[str]:
    """Yield a line per op and kernel: that it runs fp32 on this machine, or why it does not."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    python = platform.python_version()
    yield f"flamingo_kernels {__version__}, Python {python}, torch {torch.__version__}"
    yield f"device {device_type}, {torch.get_num_threads()} CPU threads"
    missing = library.unavailable_reason()
    if missing:
        yield f"native library: {missing}"
    else:
        yield (
            f"native library {library.version()}: runs {library.selected_instruction_set()}, "
            f"built for {', '.join(library.usable_instruction_sets())}, "
            f"processor has {', '.join(library.instruction_sets())}"
        )
    yield ""
    yield f"{'op':<24}{'kernel':<9}available for fp32 on {device_type}"
    for op in dispatch.OPS:
        for kernel in dispatch.KERNELS:
            inference, training = (
                dispatch.unsupported_reasons(
                    op, kernel, dispatch.Call(device_type, torch.float32, needs_grad)
                )
                for needs_grad in (False, True)
            )
            if inference:
                verdict = "no: " + "; ".join(inference)
            elif training:
                verdict = "inference only: " + "; ".join(training)
            else:
                verdict = f"yes ({dispatch.CAPABILITIES[op, kernel].limits()})"
            yield f"{op:<24}{kernel:<9}{verdict}"


def parameter_counts(config: FlamingoConfig) -> dict[str, int]:
    """Return the parameters of each component; tied ones count once.

    The model is built on the meta device.
    """
    with torch.device("meta"):
        model = FlamingoModel(config)
    return {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in COMPONENTS}


def config_lines(name: str) -> Iterator[str]:
    """Yield the counts of a named configuration beside those of table 5 of the paper.

    Differences above ``EXPLAIN_ABOVE`` are explained.
    """
    config = FlamingoConfig.from_name(name)
    counts = parameter_counts(config)
    paper = dict(zip(COMPONENTS, PAPER_COUNTS.get(name, ()), strict=False))
    blocks = config.cross_attention_blocks
    yield (
        f"{name}: {config.language.depth} LM blocks of width {config.language.dim}, "
        f"cross-attention before blocks {', '.join(map(str, blocks[:4]))}"
        f"{', ...' if len(blocks) > 4 else ''} ({len(blocks)})"
    )
    yield f"{'component':<26}{'parameters':>16}{'table 5':>12}{'difference':>12}"
    reasons = []
    for component, count in counts.items():
        line = f"{component:<26}{count:>16,}"
        if component in paper:
            difference = count / (paper[component] * 1e6) - 1
            line += f"{paper[component]:>11,}M{difference:>+12.1%}"
            if abs(difference) > EXPLAIN_ABOVE:
                reasons.append(f"{component}: {_WHY[component]}.")
        yield line
    yield f"{'total':<26}{sum(counts.values()):>16,}"
    trainable = counts["gated_cross_attn_layers"] + counts["connector"]
    yield f"{'trainable':<26}{trainable:>16,}"
    if paper:
        reasons += [_REMARKS[name]] if name in _REMARKS else []
        reasons.append(_RESAMPLER_REMARK)
    yield from reasons
