"""Opening pictures of strangers: formats, and nothing else that a file may ask for."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flamingo_kernels.data.decode import FORMATS
from flamingo_kernels.data.formats import SkipRecordError
from flamingo_kernels.data.images import load_frames, load_image
from flamingo_kernels.data.shards import read_shard
from testing.shard_files import builder, picture_bytes, write_lines, write_tar

Image = pytest.importorskip("PIL.Image")

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n%%Page: 1 1\n"
    b"(hello) show\nshowpage\n%%EOF\n"
)
# The same behind the header of a DOS file, which Pillow takes for EPS too.
DOS_EPS = b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + bytes(24) + EPS


def saved(form: str, image=None) -> bytes:
    file = io.BytesIO()
    (image or Image.new("RGB", (8, 6), (200, 30, 30))).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_formats_that_are_read(form: str, tmp_path: Path) -> None:
    (picture,) = load_frames(saved(form), 1)
    assert picture.mode == "RGB" and picture.size == (8, 6) and picture.getpixel((3, 3))[0] > 150
    (tmp_path / "a.dat").write_bytes(saved(form))
    assert load_image(tmp_path / "a.dat").tobytes() == picture.tobytes()


@pytest.mark.parametrize("form", ["EPS", "TGA", "ICO", "PCX", "SGI", "DDS", "PDF"])
def test_formats_that_are_not(form: str) -> None:
    with pytest.raises(ValueError, match=r"image a\.png: it is none of BMP, GIF, JPEG, PNG, PPM, "):
        load_frames(saved(form), 1, "a.png")


@pytest.fixture
def ghostscript(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls of Pillow's function that starts Ghostscript."""
    import PIL.EpsImagePlugin

    calls: list[object] = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *args, **_: calls.append(args))
    return calls


@pytest.mark.parametrize("data", [EPS, DOS_EPS], ids=["eps", "dos"])
def test_no_program_is_started_whatever_the_record_is(
    data: bytes, ghostscript: list[object], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "a.eps").write_bytes(data)
    encoded = base64.b64encode(data).decode()
    lines = write_lines(
        tmp_path / "a.jsonl",
        [
            {"image": "a.png", "caption": "a"},
            {"image": "a.eps", "caption": "a"},
            {"video": "a.png", "text": "a"},
            {"frames": ["a.png", "a.png"], "text": "a"},
            {"texts": [None, "a"], "images": ["a.png", None]},
            {
                "text_list": ["a"],
                "image_info": [{"image_base64": encoded, "matched_text_index": 0}],
            },
        ],
    )
    shard = write_tar(tmp_path / "a.tar", {"0.jpg": data, "0.txt": b"a", "1.gif": data})
    tried = 0
    for path, kinds in ((lines, "pairs video interleaved"), (shard, "pairs video")):
        for kind in kinds.split():
            for record in read_shard(path):
                with pytest.raises(SkipRecordError):
                    builder(kind)(record, np.random.default_rng(0), Counter())
                tried += 1
    for source in (data, tmp_path / "a.png", str(tmp_path / "a.eps")):
        with pytest.raises(ValueError, match="it is none of"):
            load_frames(source, 1)
    assert tried == 22 and ghostscript == []
    assert load_frames(picture_bytes(10), 1)[0].size == (8, 8)
