"""Images of every kind are decoded as timm decodes them, and decompression bombs are refused."""

import warnings

import numpy as np
import pytest
from forms import CHOSEN, SYNSETS, opened
from PIL import Image
from timm.data import create_dataset

from dhtm.harness.data.splits import UnreadableError

TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = {  # that ImageNet has, or that users have; as files named .JPEG: mode, and options of saving
    "CMYK": ("CMYK", {}),  # ILSVRC2012_val_00019877 and others
    "PNG of 16 bits": ("I;16", {"format": "PNG"}),
    "palette with transparency": ("P", {"format": "PNG", "transparency": bytes(range(256))}),
    "grey with alpha": ("LA", {"format": "PNG"}),
    "turned by EXIF": ("RGB", {"exif": TURNED}),
    "broken EXIF": ("RGB", {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02\x01\x12\x00\x03"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images_are_read_as_timm_reads_them(kind, tmp_path):
    mode, options = KINDS[kind]
    rng = np.random.default_rng(7)
    image = Image.fromarray(rng.integers(0, 256, (45, 60, 3), dtype=np.uint8))
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
    assert ours.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(timms))


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    """PIL would only warn."""
    Image.new("L", (12, 10)).save(tmp_path / "bomb.png")
    (tmp_path / "labels.csv").write_text("bomb.png,0\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableError, match=r"bomb\.png: .*120 pixels.*decompression bomb"):
        opened(tmp_path, labels=f"{tmp_path}/labels.csv").dataset[0]
