"""The command ``flamingo-kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flamingo_kernels.shipped import FAST_BINDING


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for wrong use, 1 for a reported error)."""
    parser = argparse.ArgumentParser(prog="flamingo-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="kernels available here, or the size of a config")
    info.add_argument("--config", metavar="NAME", help="parameter counts of this configuration")

    demo = commands.add_parser(
        "demo", help="new pictures named from examples, beside the reference"
    )
    demo.add_argument("--kernel", default="auto", help="auto, triton, cpp or torch")
    demo.add_argument("--shots", type=int, default=2, help="examples in the prompt")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the PNG")

    generate = commands.add_parser("generate", help="text for images, by a saved model")
    generate.add_argument(
        "--model", type=Path, default=FAST_BINDING, help="folder; default: the shipped model"
    )
    generate.add_argument("--image", type=Path, action="append", default=[], help="repeatable")
    generate.add_argument("--text", required=True, help="prompt; <image> marks each image's place")
    generate.add_argument("--language-model", type=Path, help="folder, if the checkpoint has none")
    generate.add_argument("--vision-encoder", type=Path, help="folder, if the checkpoint has none")
    generate.add_argument("--tokenizer", type=Path, help="folder; default: the language model's")
    generate.add_argument("--kernel", default="auto", help="auto, triton, cpp or torch")
    generate.add_argument("--max-new-tokens", type=int, default=20)
    generate.add_argument("--num-beams", type=int, default=1)
    generate.add_argument(
        "--fit", choices=("pad", "crop"), default="pad", help="pad, or crop as CLIP does"
    )

    convert = commands.add_parser("convert", help="another project's checkpoint to safetensors")
    convert.add_argument("layout", choices=("open-flamingo", "idefics"))
    convert.add_argument("checkpoint", type=Path, metavar="CKPT")
    convert.add_argument("output", type=Path, metavar="OUT", help="folder")
    convert.add_argument("--config", help="name or JSON file; default: told by the sizes")

    train = commands.add_parser("train", help="train as a YAML file says, or continue to")
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see README.md")

    export = commands.add_parser("export", help="one file of what a run has trained")
    export.add_argument("run", type=Path, metavar="RUN", help="output of a run, or a checkpoint")
    export.add_argument("output", type=Path, metavar="OUT", help="folder")

    plan = commands.add_parser("plan", help="memory per GPU of training, and what fits")
    plan.add_argument("--config", required=True, help="name or JSON file")
    plan.add_argument("--gpus", type=int, required=True)
    plan.add_argument("--memory", type=float, required=True, help="GiB of each GPU")
    plan.add_argument("--batch-size", type=int, default=8, help="rows per GPU")
    plan.add_argument("--tokens", type=int, default=256, help="of a row")
    plan.add_argument("--images", type=int, default=5, help="of a row")
    plan.add_argument("--compute", choices=("float32", "bfloat16"), default="bfloat16")
    plan.add_argument("--keep-activations", action="store_true", help="do not checkpoint them")

    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            _info(options.config)
        elif options.command == "generate":
            from flamingo_kernels.cli import generate as command

            return command.run(
                options.model,
                options.image,
                options.text,
                language_model=options.language_model,
                vision_encoder=options.vision_encoder,
                tokenizer_path=options.tokenizer,
                kernel=options.kernel,
                max_new_tokens=options.max_new_tokens,
                num_beams=options.num_beams,
                fit=options.fit,
            )
        elif options.command == "convert":
            from flamingo_kernels.cli import convert as command

            return command.run(options.layout, options.checkpoint, options.output, options.config)
        elif options.command == "train":
            from flamingo_kernels.cli import train as command

            return command.run(options.config)
        elif options.command == "export":
            from flamingo_kernels.train.checkpoints.export import export

            print(export(options.run, options.output))
        elif options.command == "plan":
            from flamingo_kernels.cli import plan as command

            return command.run(
                options.config,
                options.gpus,
                options.memory,
                batch_size=options.batch_size,
                tokens=options.tokens,
                images=options.images,
                compute=options.compute,
                keep_activations=options.keep_activations,
            )
        else:
            from flamingo_kernels.cli.demo import run

            return run(options.kernel, options.shots, options.output)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        print(f"flamingo-kernels {options.command}: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"flamingo-kernels {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _info(config: str | None) -> None:
    from flamingo_kernels import info

    for line in info.config_lines(config) if config else info.kernel_lines():
        print(line)
