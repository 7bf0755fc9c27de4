"""Photographs in every supported form: images and classes are the same, and unreadable data is reported."""

import io
import itertools
import json
import pkgutil
import sys
import tarfile
import warnings
from pathlib import Path

import forms
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_dataset
from torchvision.transforms import PILToTensor

from dhtm.harness.core.errors import UserError
from dhtm.harness.data import photographs as module
from dhtm.harness.data.photographs import Images, Photographs
from dhtm.harness.data.splits import UnreadableError, load
from dhtm.harness.runs.directory import predictions


@pytest.fixture(autouse=True)
def no_cached_lists():
    module._list.cache_clear()


@pytest.fixture(scope="session")
def images():
    """Return twelve validation images: file name → (content, synset)."""
    rng = np.random.default_rng(1)
    files = {}
    for number in range(1, 13):
        content = io.BytesIO()
        pixels = rng.integers(0, 256, (5, 4 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(content, "JPEG")
        files[f"ILSVRC2012_val_{number:08d}.JPEG"] = content.getvalue(), forms.CHOSEN[number * 7 % 4]
    return files


@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_has_the_same_images_in_the_same_classes(form, images, tmp_path):
    split = forms.opened_as(form, tmp_path, images)
    assert (len(split.dataset), split.n_classes, split.channels) == (12, 1000, 3)
    found = []
    for batch in load(split.dataset, [range(5), range(5, 7), range(7, 12)], num_workers=2):
        assert not batch.failed
        labels = batch.labels.tolist()
        found += [(image.numpy().tobytes(), label) for image, label in zip(batch.images, labels, strict=True)]
    expected = [
        (PILToTensor()(Image.open(io.BytesIO(content))).numpy().tobytes(), forms.SYNSETS.index(synset))
        for content, synset in images.values()
    ]
    if "class_folders" in form.__name__:  # files are sorted by folder
        found, expected = sorted(found), sorted(expected)
    assert found == expected


@pytest.mark.parametrize("form", [forms.flat_with_devkit, forms.parquet])
def test_fingerprint_changes_with_content_and_classes(form, images, tmp_path):
    third = "ILSVRC2012_val_00000003.JPEG"
    content, synset = images[third]
    changed = [{third: (content + b"more", synset)}, {third: (content, forms.CHOSEN[3])}]
    versions = [images, images, *(images | change for change in changed)]
    splits = [forms.opened_as(form, tmp_path / str(i), version) for i, version in enumerate(versions)]
    assert len({split.fingerprint for split in splits}) == 3


SMALLEST = "test_vit"  # timm's smallest ViT, for images of 160×160


@pytest.fixture
def run(evaluated, tmp_path):
    """Return a function that evaluates a small ViT on a data root and returns the metrics and the predictions."""
    save_file(timm.create_model(SMALLEST).state_dict(), tmp_path / "weights.safetensors")
    options = [
        "backbone=deit_tiny", f"backbone.architecture={SMALLEST}", f"backbone.checkpoint={tmp_path}/weights.safetensors",
        "data=imagenet", "batch_size=4", "method.layers=[2,4]", "method.k=20",
    ]  # fmt: skip

    def run_on(root, *overrides):
        metrics = evaluated(*options, f"data.root='{root}'", *overrides)
        return metrics, predictions(tmp_path / "runs" / metrics["run_id"])

    return run_on


def test_predictions_do_not_depend_on_form_cache_or_workers(run, images, tmp_path):
    forms.flat_with_devkit(tmp_path / "flat", images)
    _, uncached = run(tmp_path / "flat", "cache_dir=null", "num_workers=0")
    for form, option in ((forms.shards, "num_workers=0"), (forms.parquet, "num_workers=2")):
        root = tmp_path / form.__name__
        settings = form(root, images) or {}
        pd.testing.assert_frame_equal(run(settings.get("root", root), option)[1], uncached)
    assert len(list((tmp_path / "cache").glob("*/00000.npy"))) == 2


def test_unreadable_images_are_reported_or_skipped(run, images, tmp_path, caplog):
    unmerged = ("method=unmerged", "method.k=0", "method.layers=all")  # every other run would evaluate it first
    forms.flat_with_devkit(tmp_path / "root", images)
    files = sorted((tmp_path / "root" / "val").iterdir())
    broken = [files[1], files[8]]
    for file in broken:
        file.write_bytes(file.read_bytes()[:300])
    message = rf"image 1 cannot be read: {broken[0]}: .* and 1 more, listed in .*failed.csv"
    for options in ([], ["cache_dir=null"]):  # the second time, all other predictions are already stored
        with pytest.raises(UserError, match=message):
            run(tmp_path / "root", *unmerged, "num_workers=0", *options)
        assert all(str(file) in caplog.text for file in broken), "must log every unreadable file"
        caplog.clear()
    (folder,) = [file.parent for file in (tmp_path / "runs").glob("*/failed.csv")]
    listed = pd.read_csv(folder / "failed.csv")
    assert listed["index"].tolist() == [1, 8] and listed.file.tolist() == [str(file) for file in broken]
    assert not (folder / "metrics.json").exists()
    metrics, rows = run(tmp_path / "root", *unmerged, "data.on_error=skip")
    assert metrics["images_per_s"] is None, "all predictions were already stored"
    assert rows.index.tolist() == [0, *range(2, 8), 9, 10, 11]
    for options in (["cache_dir=null"], ["num_workers=0"]):
        metrics, again = run(tmp_path / "root", *unmerged, "data.on_error=skip", "force=true", *options)
        assert (metrics["n_images"], metrics["n_failed"]) == (10, 2)
        assert metrics["top1"] == pytest.approx(10 * sum(rows.class_1 == rows.label))
        pd.testing.assert_frame_equal(again, rows)
    with pytest.raises(UserError, match=r"finished with data\.on_error=skip, without the 2 images"):
        run(tmp_path / "root", *unmerged)
    for file in files:
        file.write_bytes(b"nothing")
    module._list.cache_clear()
    with pytest.raises(UserError, match=r"none of its 12 images can be read; image 0 cannot be read"):
        run(tmp_path / "root", *unmerged, "data.on_error=skip", "num_workers=0")


@pytest.mark.parametrize(("kind", "split"), [(Images, "all"), (Photographs, "val")])
def test_links_are_followed_and_broken_links_are_unreadable(kind, split, photos, tmp_path):
    (folder := tmp_path / "fish").mkdir()
    (folder / "linked").symlink_to(photos / "val" / "n01440764")
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    dataset = kind("links", str(tmp_path)).open(split, PILToTensor()).dataset
    assert len(dataset) == 4 and "gone.jpg" in dataset.names()[0]
    with pytest.raises(UnreadableError, match=r"fish/gone\.jpg: .*No such file"):
        dataset[0]


def test_disk_that_disappears_ends_loading_at_once(images, tmp_path):
    forms.flat_with_devkit(tmp_path / "mounted", images)
    split = forms.opened(tmp_path / "mounted", class_map="synsets")
    batches = load(split.dataset, [[index] for index in range(12)], num_workers=2)
    next(batches)
    (tmp_path / "mounted/val").rename(tmp_path / "elsewhere")
    (tmp_path / "mounted/val").mkdir()  # as the empty mount point of an unmounted disk
    with pytest.raises(UserError, match=r"data\.root=.*/mounted/val: it disappeared, or is empty now"):
        list(batches)


def test_class_map_numbers_the_classes_of_a_subset(images, tmp_path):
    forms.in_class_folders(tmp_path, images)

    def labels(**options):
        split = forms.opened(tmp_path, **options)
        return sorted({int(label) for _, label in split.dataset}), split.n_classes

    synsets = sorted(forms.CHOSEN)
    assert labels() == ([0, 1, 2, 3], 4)
    assert labels(class_map="synsets") == (sorted(forms.SYNSETS.index(synset) for synset in synsets), 1000)
    (tmp_path / "map.txt").write_text("\n".join(["other", *reversed(synsets)]) + "\n")
    assert labels(class_map=f"{tmp_path}/map.txt") == ([1, 2, 3, 4], 5)
    for i, synset in enumerate(synsets):  # ImageNet-V2's folders are numbers, which sort as 0, 1, 10, 2
        (tmp_path / "val" / synset).rename(tmp_path / "val" / ["0", "2", "10", "999"][i])
    module._list.cache_clear()
    assert labels(class_map="numbers") == ([0, 2, 10, 999], 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_map": "synsets"}, r"the class zebra \(1 such\) is not one of class_map=synsets"),
        ({"class_map": "/no/map.txt"}, r"data\.class_map=/no/map\.txt: cannot be read \(.*No such file"),
        ({"class_map": "{}/twice.txt"}, r"data\.class_map=.*twice\.txt: zebra is in it 2 times; give it once"),
        ({"class_map": "numbers"}, r"class_map=numbers, but its classes are not numbers"),
        (
            {"root": "{}/flat"},
            r"its images, .*1\.JPEG for example, are not in class folders; give .* data\.labels=FILE",
        ),
        ({"root": "{}/nothing"}, r"neither images nor folders of images"),
        ({"root": "{}/empty.tar"}, r"data\.root: there are no images in .*empty\.tar"),
        ({"root": "{}/unknown.parquet"}, r"row 0 .* has no class; choose another split"),
        ({"labels": "{}/twice.csv"}, r"cannot be read as labels \(a file has two lines"),
        ({"real_labels": True}, r"data\.real_labels: it numbers classes as .*; set data\.class_map=synsets too"),
        ({"labels": "{}/half.csv"}, r"data\.labels=.*half\.csv: it has no label for the image \('ILSVRC2012_val_0"),
        ({"labels": "{}/broken.tar.gz"}, r"data\.labels=.*broken\.tar\.gz: cannot be read as labels"),
        ({"root": "{}/broken.tar"}, r"data\.root: .*broken\.tar: not a tar file, or damaged"),
        ({"root": "{}/shard-{{0..3}}.tar"}, r"data\.root: .*shard-0\.tar: .*No such file"),
        ({"root": "{}/broken.json"}, r"neither a folder nor a \.tar, \.parquet or \.arrow file"),
        ({"root": "{}/labels.parquet"}, r"data\.root=.*: no column of images and one of labels in label"),
        ({"root": "hf://datasets/ILSVRC/imagenet-1k"}, r"data\.root=hf://.*: cannot be read \(.*"),
    ],
)
def test_error_for_unreadable_data_is_one_line(options, message, images, tmp_path):
    forms.in_class_folders(tmp_path, images)
    forms.write(tmp_path / "val/zebra/a.JPEG", b"")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "nothing").mkdir()
    forms.write(tmp_path / "flat/val/1.JPEG", b"")
    forms.write_tar(tmp_path / "empty.tar", {"a.txt": b""})
    unknown = {"image": [{"bytes": b"", "path": "1.JPEG"}], "label": [-1]}
    pd.DataFrame(unknown).to_parquet(tmp_path / "unknown.parquet")
    (tmp_path / "twice.txt").write_text("zebra\nzebra\n")
    (tmp_path / "twice.csv").write_text("1.JPEG,0\n1.JPEG,1\n")
    (tmp_path / "half.csv").write_text("ILSVRC2012_val_00000007,n01440764\n")
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b nothing")
    (tmp_path / "broken.tar").write_bytes(b"nothing" * 1000)
    pd.DataFrame({"label": [1]}).to_parquet(tmp_path / "labels.parquet")
    options = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError, match=message) as error:
        forms.opened(**({"root": tmp_path} | options))
    assert "\n" not in str(error.value)


def test_tables_with_reordered_or_missing_classes_are_refused(images, tmp_path):
    """Otherwise, correct predictions would count as wrong."""
    for name, names in {"sorted": sorted(forms.WORDS), "few": forms.WORDS[:999]}.items():
        (root := tmp_path / name).mkdir()
        forms.table(images, names).to_parquet(root / "validation.parquet")
        with pytest.raises(UserError, match=r"the class \w+.* is not one of class_map=synsets"):
            forms.opened(root, class_map="synsets")


def test_tables_may_list_synsets_in_any_order(images, tmp_path):
    forms.table(images, forms.SYNSETS[::-1]).to_parquet(tmp_path / "validation.parquet")
    split = forms.opened(tmp_path, class_map="synsets")
    expected = [999 - forms.SYNSETS.index(synset) for _, synset in images.values()]
    assert [label for _, label in split.dataset] == expected


def test_class_numbers_out_of_range_are_refused(images, tmp_path):
    forms.write_shards(tmp_path, images, lambda synset: {"cls": 997 + forms.CHOSEN.index(synset)})
    with pytest.raises(UserError, match="has class 1000, the last is 999"):
        forms.opened(tmp_path, class_map="synsets")


def test_damaged_tar_file_is_refused(images, tmp_path):
    """``tarfile`` itself would list the members before the damage, without an error."""
    forms.original_tar(tmp_path, images)
    file = tmp_path / "ILSVRC2012_img_val.tar"
    with tarfile.open(file) as tar:
        offset = tar.getmembers()[5].offset
    content = file.read_bytes()
    for damaged in (content[:offset] + b"x" * 512 + content[offset + 512 :], content[:offset], content[: offset + 521]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"ILSVRC2012_img_val\.tar: not a tar file, or damaged"):
            forms.opened(tmp_path, class_map="synsets")


def test_hub_dataset_opens_the_requested_split(images, tmp_path, monkeypatch):
    """A local folder stands in for the hub, whose files are listed and read in the same way."""
    forms.parquet(tmp_path, images)
    monkeypatch.chdir(tmp_path.parent)
    split = forms.opened(f"hf://datasets/{tmp_path.name}", class_map="synsets")
    assert [label for _, label in split.dataset] == [forms.SYNSETS.index(synset) for _, synset in images.values()]
    with pytest.raises(UserError, match=r"data\.split=test: hf://datasets/.* has train, validation"):
        Photographs("x", f"hf://datasets/{tmp_path.name}").open("test", None)


def test_accuracy_among_present_classes_and_by_reassessed_labels(run, images, tmp_path):
    """Check ``data.among=present`` and ``data.real_labels=true`` against plain arithmetic on the model's logits."""
    forms.in_class_folders(tmp_path / "data", images)
    metrics, rows = run(tmp_path / "data", "data.among=present", "data.real_labels=true", "method.k=0", "num_workers=0")
    model = timm.create_model(SMALLEST, checkpoint_path=str(tmp_path / "weights.safetensors")).eval()
    present = [forms.SYNSETS.index(synset) for synset in forms.CHOSEN]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    real_labels = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    correct = []  # for the images that have reassessed labels
    for row, file in zip(rows.itertuples(), sorted((tmp_path / "data" / "val").glob("*/*")), strict=True):
        with torch.inference_mode():
            logits = model(transform(Image.open(file))[None])[0]
        best = max(present, key=lambda output: logits[output])
        assert row.class_1 == best and {row.class_1, row.class_2, row.class_3, row.class_4} == set(present)
        if labels := real_labels[int(file.stem[-8:]) - 1]:
            correct.append(best in labels)
    assert (metrics["n_images_real"], metrics["top1_real"]) == (len(correct), 100 * np.mean(correct))


def test_error_without_datasets_names_the_extra(images, tmp_path, monkeypatch):
    forms.parquet(tmp_path, images)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]'"):
        forms.opened(tmp_path)


def test_holdout_keeps_images_of_each_class_out_of_training(photos):
    """Check that ``holdout=2`` takes every second image of each class, and leaves the validation images alone."""

    def names(split, holdout=2):
        return Photographs("photos", str(photos), holdout=holdout).open(split, PILToTensor()).dataset.names()

    training, held_out, everything = names("train"), names("holdout"), names("train", holdout=None)
    assert sorted(training + held_out) == everything and not set(training) & set(held_out)
    by_class = itertools.groupby(everything, key=lambda name: Path(name).parent)
    assert held_out == [name for _, names_of_class in by_class for name in list(names_of_class)[::2]]
    assert names("val") == names("val", holdout=None)


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
KINDS = {  # found in ImageNet or in users' data; all are saved as .JPEG: mode, and options of saving
    "CMYK": ("CMYK", {}),  # ILSVRC2012_val_00019877 and others
    "PNG of 16 bits": ("I;16", {"format": "PNG"}),
    "palette with transparency": ("P", {"format": "PNG", "transparency": bytes(range(256))}),
    "grey with alpha": ("LA", {"format": "PNG"}),
    "rotated by EXIF": ("RGB", {"exif": ROTATED}),
    "broken EXIF": ("RGB", {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02\x01\x12\x00\x03"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images_are_read_as_timm_reads_them(kind, tmp_path):
    mode, options = KINDS[kind]
    rng = np.random.default_rng(7)
    image = Image.fromarray(rng.integers(0, 256, (45, 60, 3), dtype=np.uint8))
    sixteen_bits = Image.fromarray(rng.integers(0, 2**16, (45, 60), dtype=np.uint16))
    image = sixteen_bits if mode == "I;16" else image.convert(mode)
    (tmp_path / "val" / forms.CHOSEN[0]).mkdir(parents=True)
    image.save(tmp_path / "val" / forms.CHOSEN[0] / "odd.JPEG", **({"format": "JPEG"} | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timms, _ = create_dataset("", str(tmp_path / "val"))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, label = forms.opened(tmp_path, lambda image: image, class_map="synsets").dataset[0]
    assert label == forms.SYNSETS.index(forms.CHOSEN[0])
    assert ours.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(timms))


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    """PIL itself would only warn."""
    Image.new("L", (12, 10)).save(tmp_path / "bomb.png")
    (tmp_path / "labels.csv").write_text("bomb.png,0\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableError, match=r"bomb\.png: .*120 pixels.*decompression bomb"):
        forms.opened(tmp_path, labels=f"{tmp_path}/labels.csv").dataset[0]
