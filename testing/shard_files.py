"""Writers of small shards in every layout."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.samples import SampleBuilder, TextEncoding
from flamingo_kernels.language import ByteTokenizer

TOKENS = ByteTokenizer()
ENCODING = TextEncoding(
    encode=TOKENS.encode,
    image_token_id=TOKENS.image_token_id,
    end_of_chunk_token_id=TOKENS.end_of_chunk_token_id,
    bos_token_id=TOKENS.bos_token_id,
    eos_token_id=TOKENS.eos_token_id,
    pad_token_id=TOKENS.pad_token_id,
)


def builder(kind: str = "interleaved", **changes: Any) -> SampleBuilder:
    """Return a builder without randomness: previous image, no leading space, 8 pixel pictures."""
    options = {"p_next": 0.0, "leading_space": 0.0, "frames": 3, **changes}
    return SampleBuilder(kind, ENCODING, ImagePreparation(8), **options)


def picture_bytes(shade: int = 0, frames: int = 1) -> bytes:
    """Return a PNG of one grey or, for several frames, a GIF of increasing greys."""
    from PIL import Image

    images = [Image.new("L", (8, 8), shade + 40 * i) for i in range(frames)]
    file = io.BytesIO()
    if frames == 1:
        images[0].convert("RGB").save(file, "PNG")
    else:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> str:
    """Write a tar file of the members; return its path."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    """Write the records as JSON lines; return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered_pairs(folder: Path, shards: int, records: int) -> list[str]:
    """Write tar shards of pairs whose text is "shard.record"; return their paths."""
    return [
        write_tar(
            folder / f"{shard}.tar",
            {
                name: data
                for record in range(records)
                for name, data in (
                    (f"{record:03}.png", picture_bytes(record)),
                    (f"{record:03}.txt", f"{shard}.{record}".encode()),
                )
            },
        )
        for shard in range(shards)
    ]


def shade(tensor: Any) -> int:
    """Return the grey of a prepared picture or frame."""
    from flamingo_kernels.data.images import IMAGE_MEAN, IMAGE_STD

    return round(float(tensor.flatten()[0] * np.float32(IMAGE_STD[0]) + IMAGE_MEAN[0]) * 255)
