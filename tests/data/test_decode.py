"""Opening pictures of strangers: formats, and nothing else that a file may ask for."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from flamingo_kernels.data.decode import FORMATS
from flamingo_kernels.data.formats import SkipRecordError
from flamingo_kernels.data.images import load_frames, load_image
from flamingo_kernels.data.shards import read_shard
from testing.shard_files import builder, picture_bytes, write_lines, write_tar

PIL = pytest.importorskip("PIL")
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


def oriented(form: str, exif: bytes | None, **options) -> bytes:
    """Return a picture that is red on the left and blue on the right."""
    image = Image.new("RGB", (40, 20), (250, 0, 0))
    image.paste((0, 0, 250), (20, 0, 40, 20))
    file = io.BytesIO()
    image.save(file, form, **({} if exif is None else {"exif": exif}), **options)
    return file.getvalue()


TURNED = {
    1: "left",
    2: "right",
    3: "right",
    4: "left",
    5: "top",
    6: "top",
    7: "bottom",
    8: "bottom",
}


@pytest.mark.parametrize("value", [*TURNED, 0, 9, 65535])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_turned_as_exif_says(form: str, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    (picture,) = load_frames(oriented(form, exif.tobytes()), 1)
    side = TURNED.get(value, "left")
    assert picture.size == ((40, 20) if side in ("left", "right") else (20, 40))
    width, height = picture.size
    x, y = {"left": (2, 9), "right": (width - 3, 9), "top": (9, 2), "bottom": (9, height - 3)}[side]
    red, _, blue = picture.getpixel((x, y))
    assert red > 150 > 100 > blue


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [b"", b"II", b"garbage, longer than a header", b"MM\0*\0\0\0\x08\0\x01\x01\x12", b"\xff" * 64],
)
def test_exif_that_cannot_be_read_turns_nothing(form: str, exif: bytes) -> None:
    (picture,) = load_frames(oriented(form, b"Exif\0\0" + exif), 1)
    assert picture.size == (40, 20) and picture.getpixel((2, 9))[0] > 150


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("form", ["MPO", "TIFF"])
def test_the_first_of_several_pictures(form: str, damaged: bool, frames: int) -> None:
    if form == "MPO" and Version(PIL.__version__) < Version("11.3"):
        pytest.skip("before 11.3, Pillow writes MPO files that nothing reads")
    more = [Image.new("RGB", (16, 12), (0, 250, 0)) for _ in range(2)]
    data = bytearray(oriented(form, None, save_all=True, append_images=more))
    if damaged and form == "MPO":
        second = data.index(b"\xff\xd8\xff", 2)
        data[second:] = bytes(len(data) - second)
    pictures = load_frames(bytes(data), frames)
    assert [p.size for p in pictures] == [(40, 20)] * frames
    assert pictures[0].getpixel((2, 9))[0] > 150
