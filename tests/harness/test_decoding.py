"""Images of every kind are decoded as timm decodes them, and what is no image is refused."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from forms import (
    CHOSEN,
    SYNSETS,
    opened,
)
from PIL import Image
from timm.data import create_dataset

from dhtm.harness.data.splits import UnreadableError


def odd(kind):
    """An image of a kind that ImageNet has, or that users have; as a file named .JPEG."""
    rng = np.random.default_rng(7)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((60, 45))
    file, options = io.BytesIO(), {}
    if kind == "CMYK":  # ILSVRC2012_val_00019877 and others
        image = image.convert("CMYK")
    elif kind == "grey":
        image = image.convert("L")
    elif kind == "PNG named JPEG":  # n02105855_2933.JPEG
        options = {"format": "PNG"}
    elif kind == "16 bits":
        image, options = Image.fromarray(rng.integers(0, 2**16, (45, 60), dtype=np.uint16)), {"format": "PNG"}
    elif kind == "palette with transparency":
        image, options = image.convert("P"), {"format": "PNG", "transparency": bytes(range(256))}
    elif kind == "grey with alpha":
        image, options = image.convert("LA"), {"format": "PNG"}
    elif kind == "1 bit":
        image, options = image.convert("1"), {"format": "PNG"}
    elif kind == "turned by EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    elif kind == "broken EXIF":
        options = {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02\x01\x12\x00\x03"}
    elif kind == "progressive":
        options = {"progressive": True}
    image.save(file, **({"format": "JPEG"} | options))
    return file.getvalue()


KINDS = [
    "CMYK", "grey", "PNG named JPEG", "16 bits", "palette with transparency", "grey with alpha", "1 bit", "turned by EXIF",
    "broken EXIF", "progressive",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images_are_read_as_timm_reads_them(kind, tmp_path):
    content = odd(kind)
    (tmp_path / "val" / CHOSEN[0]).mkdir(parents=True)
    (tmp_path / "val" / CHOSEN[0] / "odd.JPEG").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timms, _ = create_dataset("", str(tmp_path / "val"))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, label = opened(tmp_path, lambda image: image, class_map="synsets").dataset[0]
    assert label == SYNSETS.index(CHOSEN[0])
    assert ours.mode == timms.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(timms))


def bomb(width, height):
    """The beginning of a PNG that claims to be large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = zlib.compress(b"")
    parts = [struct.pack(">I", len(header)), chunk, struct.pack(">I", zlib.crc32(chunk))]
    parts += [struct.pack(">I", len(data)), b"IDAT", data, struct.pack(">I", zlib.crc32(b"IDAT" + data))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "size", [(10_000, 10_000), (60_000, 60_000), (1, 60_000)]
)  # PIL warns of the first, and refuses the second
def test_decompression_bombs_are_refused(size, tmp_path):
    """PIL would warn of the first, and open the third, of which a resized copy takes gigabytes."""
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    (tmp_path / "labels.csv").write_text("bomb.png,0\n")
    split = opened(tmp_path, labels=f"{tmp_path}/labels.csv")
    with pytest.raises(UnreadableError, match=r"bomb\.png: .* pixels.*decompression bomb"):
        split.dataset[0]
