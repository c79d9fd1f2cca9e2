"""Imports Triton and the kernels for this process: interpreted where there is no GPU.

Triton decides at import, so the variable is set for the import alone: it must reach neither the
ahead-of-time compilation, which runs in its own process, nor what ``dispatch`` reports to others.
"""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules and type(sys.modules["triton.language"].sum).__name__ != (
        "InterpretedFunction"
    ):
        raise RuntimeError("triton was imported before tests/triton: run this folder by itself")
    from flamingo_kernels.ops.gated_activation import impl_triton
    from flamingo_kernels.ops.gated_residual import impl_triton as _residual  # noqa: F401
    from flamingo_kernels.ops.latent_attention import impl_triton as _latent  # noqa: F401
    from flamingo_kernels.ops.layer_norm import impl_triton as _norm  # noqa: F401
    from flamingo_kernels.ops.media_attention import impl_triton as _media  # noqa: F401

    # Triton loads the rest of itself at the first launch.
    impl_triton.forward(torch.ones(1), None, "relu")

    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before
