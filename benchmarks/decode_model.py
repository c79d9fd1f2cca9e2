"""Decoding of a whole few-shot prompt beside open-flamingo's own ``generate``.

Both run the same GPT-NeoX with the same random weights and cross-attention before every block, and
decode greedily by transformers' ``generate``. The vision tower is a single convolution. Both must
give the same tokens before anything is measured. A step is the time between two tokens.

    python -m benchmarks.decode_model                    # 12 layers, width 768, 32 shots
    python -m benchmarks.decode_model --threads 1 --new-tokens 40 --output /elsewhere

The figures are printed and written to ``<output>/<device>/decode_model.json``. ``publish`` puts
them into README.md and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import results, tables
from benchmarks.measure import keep_freed_memory, summary
from flamingo_kernels.convert import load_open_flamingo
from flamingo_kernels.vision import wrap_vision_encoder
from testing.peers import open_flamingo_model

VOCAB, IMAGE, END_OF_CHUNK = 50_280, 50_278, 50_277
VISION_DIM, IMAGE_SIZE, PATCH = 1024, 32, 2  # 256 patches of 1024 channels, as CLIP ViT-L/14
ROUNDS = 5
GATE = 0.5


class Tower(nn.Module):
    """A vision tower of one convolution over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, VISION_DIM, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).flatten(2).transpose(1, 2)


class Clock:
    """A streamer that notes when the tokens of each step came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def steps(self) -> list[float]:
        """Seconds between tokens, without the prompt and the first token."""
        later = self.times[1:]
        return [b - a for a, b in itertools.pairwise(later)]


def prompt(images: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return ids [1, tokens] with evenly spaced images, and pixels [1, images, 1, 3, H, W]."""
    generator = torch.Generator().manual_seed(images)
    ids = torch.randint(0, END_OF_CHUNK, (1, tokens), generator=generator)
    ids[0, 1 + torch.arange(images) * (tokens - 1) // images] = IMAGE
    return ids, torch.randn(1, images, 1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def build(layers: int, width: int) -> tuple[nn.Module, nn.Module]:
    """Build our model and open-flamingo's, with the same weights and open gates."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def language_model() -> nn.Module:
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )
        return GPTNeoXForCausalLM(config).eval()

    tower = Tower().eval()
    tower.config = type("Config", (), {"hidden_size": VISION_DIM})
    peer = open_flamingo_model(tower, language_model(), 1, IMAGE, END_OF_CHUNK)
    peer.vision_encoder.forward = lambda images: (None, tower(images))
    for name, parameter in peer.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(GATE)
    state = {n: t for n, t in peer.state_dict().items() if not n.startswith("vision_encoder.")}
    ours = load_open_flamingo(
        state,
        wrap_vision_encoder(tower, output_dim=VISION_DIM, image_size=IMAGE_SIZE),
        language_model(),
        image_token_id=IMAGE,
        end_of_chunk_token_id=END_OF_CHUNK,
    )
    return ours, peer.requires_grad_(False)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_model", description=__doc__)
    for name, default in (("layers", 12), ("width", 768), ("shots", 32), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=results.RESULTS)
    options = parser.parse_args()
    environment = results.clean_environment(options.output)
    if options.threads:
        torch.set_num_threads(options.threads)
    environment["threads"] = torch.get_num_threads()
    environment["allocator"] = keep_freed_memory()
    ours, peer = build(options.layers, options.width)
    many, one = options.shots + 1, 1
    calls: dict[str, Callable[[Clock | None], Tensor]] = {}
    length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
    for images in (many, one):
        ids, pixels = prompt(images, options.tokens)
        # One token of padding: open-flamingo needs a mask, and transformers drops one of ones.
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        shared = {**length, "attention_mask": mask}
        calls[f"flamingo_kernels, {images} images"] = (
            lambda clock, ids=ids, pixels=pixels, shared=shared: ours.generate(
                ids, pixels, streamer=clock, stop_token_ids=[END_OF_CHUNK], **shared
            )
        )
        calls[f"open-flamingo, {images} images"] = (
            lambda clock, ids=ids, pixels=pixels, shared=shared: peer.generate(
                pixels,
                ids,
                streamer=clock,
                do_sample=False,
                suppress_tokens=[IMAGE],
                pad_token_id=0,
                **shared,
            )
        )
    names = list(calls)
    for mine, theirs in zip(names[::2], names[1::2], strict=True):
        if not torch.equal(calls[mine](None), calls[theirs](None)):
            raise SystemExit(f"{mine} and {theirs} give different tokens: nothing is measured")
    steps: dict[str, list[float]] = {name: [] for name in names}
    totals: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS):
        for name in names[number:] + names[:number]:
            clock, start = Clock(), time.perf_counter()
            calls[name](clock)
            totals[name].append(time.perf_counter() - start)
            steps[name] += clock.steps
    figures = {
        name: summary(steps[name]) | {"with_prompt_s": summary(totals[name])["median_s"]}
        for name in names
    }
    record = environment | {
        "setting": f"{options.layers} layers, width {options.width}, {options.tokens} prompt "
        f"tokens, {options.new_tokens} new ones, {ROUNDS} rounds",
        "images": many,
        "figures": figures,
        "times_as_fast": figures[names[1]]["median_s"] / figures[names[0]]["median_s"],
        "many_images_over_one": figures[names[0]]["median_s"] / figures[names[2]]["median_s"],
    }
    path = results.write_beside(tables.DECODING_FILE, record, options.output)
    print("\n".join([*tables.decoding_lines(record), str(path)]))


if __name__ == "__main__":
    main()
