"""Images of every kind are decoded as timm decodes them, and what is no image is refused."""

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

PNG = {"format": "PNG"}
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = {  # that ImageNet has, or that users have; as files named .JPEG: mode, and options of saving
    "CMYK": ("CMYK", {}),  # ILSVRC2012_val_00019877 and others
    "grey": ("L", {}),
    "PNG named JPEG": ("RGB", PNG),  # n02105855_2933.JPEG
    "16 bits": ("I;16", PNG),
    "palette with transparency": ("P", PNG | {"transparency": bytes(range(256))}),
    "grey with alpha": ("LA", PNG),
    "1 bit": ("1", PNG),
    "turned by EXIF": ("RGB", {"exif": TURNED}),
    "broken EXIF": ("RGB", {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02\x01\x12\x00\x03"}),
    "progressive": ("RGB", {"progressive": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images_are_read_as_timm_reads_them(kind, tmp_path):
    mode, options = KINDS[kind]
    rng = np.random.default_rng(7)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((60, 45))
    sixteen_bits = Image.fromarray(rng.integers(0, 2**16, (45, 60), dtype=np.uint16))
    image = sixteen_bits if mode == "I;16" else image.convert(mode)
    (tmp_path / "val" / CHOSEN[0]).mkdir(parents=True)
    image.save(tmp_path / "val" / CHOSEN[0] / "odd.JPEG", **({"format": "JPEG"} | options))
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
