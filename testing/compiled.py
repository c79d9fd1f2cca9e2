"""``torch.compile`` on the ops: its graphs are counted, its results compared with eager ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flamingo_kernels.nn import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_kernels.ops import MediaSpans, plan_media_attention
from testing.cases import IMAGE

# Batch, tokens, images. The second shape differs from the first in every size, and its sizes differ
# from each other and from the model's: torch gives equal sizes one symbol, and a size of 1 none.
SHAPES = [(2, 9, 4), (5, 11, 7), *((2 + i % 2, 3 + i, 2 + i % 3) for i in range(18))]


class GraphCounter:
    """A backend of ``torch.compile`` that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class Bridge(nn.Module):
    """Resampler and two gated blocks on one plan: every op of the package and its backward."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        options = {"dim_head": 8, "heads": 2, "ff_mult": 2, "kernel": kernel}
        self.resampler = PerceiverResampler(16, depth=2, num_latents=3, **options)
        self.blocks = nn.ModuleList(
            GatedCrossAttentionBlock(24, 16, gate=gate, **options) for gate in ("scalar", "vector")
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, features: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
        """Map features [B, I, 1, S, 16], ids [B, T] and hidden [B, T, 24] to [B, T, 24]."""
        media = self.resampler(features)
        media_kv = [block.project_media(media) for block in self.blocks]
        spans = MediaSpans.from_tokens(ids, IMAGE)
        spans = plan_media_attention(spans, media_kv[0].key, self.blocks[0].kernel)
        for block, kv in zip(self.blocks, media_kv, strict=True):
            hidden = block(hidden, spans=spans, media_kv=kv)
        return hidden


def check_graphs(kernel: str, shapes: list[tuple[int, int, int]] = SHAPES) -> None:
    """Assert at most two graphs over the shapes, and eager execution's bits on each fifth."""
    torch.compiler.reset()
    bridge, counter = Bridge(kernel), GraphCounter()
    compiled = torch.compile(bridge, fullgraph=True, backend=counter)
    for place, (batch, tokens, images) in enumerate(shapes):
        features = torch.randn(batch, images, 1, 4, 16, requires_grad=True)
        hidden = torch.randn(batch, tokens, 24, requires_grad=True)
        ids = torch.randint(0, IMAGE + 1, (batch, tokens))
        leaves = [features, hidden, *bridge.parameters()]
        results = []
        for function in (compiled, bridge) if place % 5 == 1 else (compiled,):
            out = function(features, ids, hidden)
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    assert counter.graphs <= 2
