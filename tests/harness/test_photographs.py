"""ImageNet in every form that it is kept in: the same images, in the same classes, as timm reads them; and what is no image."""

import io
import json
import pkgutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from forms import (
    CHOSEN,
    FORMS,
    SYNSETS,
    WORDS,
    flat_with_devkit,
    in_class_folders,
    opened,
    opened_as,
    original_tar,
    parquet,
    shards,
    table,
    write_shards,
)
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import PILToTensor

from dhtm.harness.core.errors import UserError
from dhtm.harness.data import photographs as module
from dhtm.harness.data.photographs import Photographs
from dhtm.harness.data.splits import load
from dhtm.harness.runs.directory import predictions


@pytest.fixture(autouse=True)
def forgotten():
    module._list.cache_clear()


@pytest.fixture(scope="session")
def images():
    """File name and content of twelve validation images, and the synset of each."""
    rng = np.random.default_rng(1)
    found = {}
    for number in range(1, 13):
        content = io.BytesIO()
        pixels = rng.integers(0, 256, (5, 4 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(content, "JPEG")
        found[f"ILSVRC2012_val_{number:08d}.JPEG"] = content.getvalue(), CHOSEN[number * 7 % 4]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_images_in_the_same_classes(form, images, tmp_path):
    split = opened_as(form, tmp_path, images)
    assert (len(split.dataset), split.n_classes, split.channels) == (12, 1000, 3)
    found = {}
    for batch in load(split.dataset, [range(5), range(5, 7), range(7, 12)], num_workers=2):
        assert not batch.failed
        for index, image, label in zip(batch.ids.tolist(), batch.images, batch.labels.tolist(), strict=True):
            found[index] = image.numpy().tobytes(), label
    assert list(found) == list(range(12))
    expected = [
        (np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1).tobytes(), SYNSETS.index(synset))
        for content, synset in images.values()
    ]
    assert sorted(found.values()) == sorted(expected)
    if "class_folders" not in form.__name__:  # where files are in the order of their folders
        assert list(found.values()) == expected


@pytest.mark.parametrize("form", [flat_with_devkit, parquet])
def test_what_identifies_the_data_changes_with_it(form, images, tmp_path):
    fingerprints = set()
    other = dict(images)
    other["ILSVRC2012_val_00000003.JPEG"] = (images["ILSVRC2012_val_00000003.JPEG"][0] + b"more", CHOSEN[0])
    renamed = dict(images)
    renamed["ILSVRC2012_val_00000003.JPEG"] = (images["ILSVRC2012_val_00000003.JPEG"][0], CHOSEN[3])
    for i, version in enumerate([images, images, other, renamed]):
        (tmp_path / str(i)).mkdir()
        fingerprints.add(opened_as(form, tmp_path / str(i), version).fingerprint)
    assert len(fingerprints) == 3


SMALLEST = "test_vit"  # timm's, for images of 160×160


@pytest.fixture
def run(evaluated, tmp_path):
    """Evaluate a small ViT on photographs; returns the metrics and the predictions."""
    save_file(timm.create_model(SMALLEST).state_dict(), tmp_path / "weights.safetensors")
    options = [
        "backbone=deit_tiny", f"backbone.architecture={SMALLEST}", f"backbone.checkpoint={tmp_path}/weights.safetensors",
        "data=imagenet", "batch_size=4", "method.layers=[2,4]", "method.k=20",
    ]  # fmt: skip

    def run_on(root, *overrides):
        metrics = evaluated(*options, f"data.root='{root}'", *overrides)
        return metrics, predictions(tmp_path / "runs" / metrics["run_id"])

    return run_on


def test_an_evaluation_is_the_same_whatever_the_form_and_how_it_is_read(run, images, tmp_path):
    flat_with_devkit(made(tmp_path / "flat"), images)
    _, direct = run(tmp_path / "flat", "cache_dir=null", "num_workers=0")
    for form, option in ((shards, "num_workers=0"), (parquet, "cache_dir=null"), (parquet, "num_workers=2")):
        root = tmp_path / f"{form.__name__} {option}"
        given = {"root": root} | form(made(root), images)
        pd.testing.assert_frame_equal(run(given["root"], option, "force=true")[1], direct)
    assert len(list((tmp_path / "cache").glob("*/00000.npy"))) == 2


def made(folder):
    folder.mkdir()
    return folder


def test_images_that_cannot_be_read_are_named_and_counted_or_skipped(run, images, tmp_path, caplog):
    unmerged = ("method=unmerged", "method.k=0", "method.layers=all")  # which other runs would carry out first
    flat_with_devkit(made(tmp_path / "root"), images)
    files = sorted((tmp_path / "root" / "val").iterdir())
    broken = [files[1], files[8]]
    for file in broken:
        file.write_bytes(file.read_bytes()[:300])
    message = rf"image 1 cannot be read: {broken[0]}: .* and 1 more, listed in .*failed.csv"
    for options in ([], ["cache_dir=null"]):  # the second time without the predictions that are stored
        with pytest.raises(UserError, match=message):
            run(tmp_path / "root", *unmerged, "num_workers=0", *options)
        assert all(str(file) in caplog.text for file in broken), "each is named"
        caplog.clear()
        (folder,) = [file.parent for file in (tmp_path / "runs").glob("*/failed.csv")]
        listed = pd.read_csv(folder / "failed.csv")
        assert listed["index"].tolist() == [1, 8] and listed.file.tolist() == [str(file) for file in broken]
        stored = pd.concat(map(pd.read_parquet, (folder / "shards").glob("*.parquet")))
        assert sorted(stored["index"]) == [0, *range(2, 8), 9, 10, 11] and not (folder / "metrics.json").exists()
    metrics, rows = run(tmp_path / "root", *unmerged, "data.on_error=skip")
    assert metrics["images_per_s"] is None, "none was predicted this time"
    for options in ([], ["force=true", "cache_dir=null"], ["force=true", "num_workers=0"]):
        metrics, again = run(tmp_path / "root", *unmerged, "data.on_error=skip", *options)
        assert (metrics["n_images"], metrics["n_failed"]) == (10, 2)
        assert metrics["top1"] == pytest.approx(10 * sum(rows.class_1 == rows.label))
        pd.testing.assert_frame_equal(again, rows)
    assert rows.index.tolist() == [0, *range(2, 8), 9, 10, 11]
    with pytest.raises(UserError, match=r"finished with data\.on_error=skip, without the 2 images"):
        run(tmp_path / "root", *unmerged)
    for file in files:
        file.write_bytes(b"nothing")
    module._list.cache_clear()
    with pytest.raises(UserError, match=r"none of its 12 images can be read; image 0 cannot be read"):
        run(tmp_path / "root", *unmerged, "data.on_error=skip", "num_workers=0")


@pytest.mark.parametrize(("num_workers", "empty"), [(0, True), (2, False)])
def test_a_disk_that_goes_away_ends_the_run_at_once(images, tmp_path, num_workers, empty):
    root = tmp_path / "mounted"
    root.mkdir()
    flat_with_devkit(root, images)
    split = opened(root, class_map="synsets")
    batches = load(split.dataset, [[index] for index in range(12)], num_workers)
    next(batches)
    (root / "val").rename(tmp_path / "elsewhere")
    if empty:
        (root / "val").mkdir()
    with pytest.raises(UserError, match=r"data\.root=.*/mounted/val: it disappeared, or is empty now"):
        list(batches)


def test_classes_of_a_subset_are_numbered_by_a_map(images, tmp_path):
    in_class_folders(tmp_path, images)

    def labels(**options):
        split = opened(tmp_path, **options)
        return sorted({int(label) for _, label in split.dataset}), split.n_classes

    synsets = sorted(CHOSEN)
    assert labels() == ([0, 1, 2, 3], 4)
    assert labels(class_map="synsets") == (sorted(SYNSETS.index(synset) for synset in synsets), 1000)
    (tmp_path / "map.txt").write_text("\n".join(["other", *reversed(synsets)]) + "\n")
    assert labels(class_map=f"{tmp_path}/map.txt") == ([1, 2, 3, 4], 5)
    (tmp_path / "map.json").write_text(json.dumps({synset: 10 * i for i, synset in enumerate(synsets)}))
    assert labels(class_map=f"{tmp_path}/map.json") == ([0, 10, 20, 30], 31)
    for i, synset in enumerate(synsets):  # ImageNet-V2's folders are numbers, which sort as 0, 1, 10, 2
        (tmp_path / "val" / synset).rename(tmp_path / "val" / ["0", "2", "10", "999"][i])
    module._list.cache_clear()
    assert labels(class_map="numbers") == ([0, 2, 10, 999], 1000)
    split = opened(tmp_path, class_map="numbers", among="present")
    assert split.among == (0, 2, 10, 999)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_map": "synsets"}, r"the class zebra \(1 such\) is not one of class_map=synsets"),
        ({"class_map": "/no/map.txt"}, r"data\.class_map=/no/map\.txt: cannot be read \(.*No such file"),
        (
            {"real_labels": True},
            r"data\.real_labels: it numbers classes as ImageNet-1K does; set data\.class_map=synsets too",
        ),
        (
            {"labels": "{}/half.csv"},
            r"data\.labels=.*half\.csv: it has no label for the image \('ILSVRC2012_val_0000000\d'\)",
        ),
        ({"labels": "{}/broken.tar.gz"}, r"data\.labels=.*broken\.tar\.gz: cannot be read as labels"),
        ({"root": "{}/broken.tar"}, r"data\.root: .*broken\.tar: not a tar file, or damaged"),
        ({"root": "{}/shard-{{0..3}}.tar"}, r"data\.root: .*shard-0\.tar: .*No such file"),
        ({"root": "{}/broken.json"}, r"neither a folder nor a \.tar, \.parquet or \.arrow file"),
        ({"root": "{}/labels.parquet"}, r"data\.root=.*: none of its columns label has images"),
        ({"root": "hf://datasets/ILSVRC/imagenet-1k"}, r"data\.root=hf://.*: cannot be read \(.*"),
    ],
)
def test_what_cannot_be_read_as_data_is_one_line(options, message, images, tmp_path):
    in_class_folders(tmp_path, images)
    (tmp_path / "val" / "zebra").mkdir()
    (tmp_path / "val" / "zebra" / "a.JPEG").write_bytes(b"")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "half.csv").write_text("ILSVRC2012_val_00000007,n01440764\n")
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b nothing")
    (tmp_path / "broken.tar").write_bytes(b"nothing" * 1000)
    pd.DataFrame({"label": [1]}).to_parquet(tmp_path / "labels.parquet")
    options = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError, match=message) as error:
        opened(**({"root": tmp_path} | options))
    assert "\n" not in str(error.value)


def test_tables_with_classes_in_another_order_are_refused(images, tmp_path):
    """By which every prediction would count as wrong."""
    orders = {
        "sorted": (sorted(WORDS), "its 1000 classes are not ImageNet-1K's in their order"),
        "turned": (WORDS[::-1], "its 1000 classes are not ImageNet-1K's in their order"),
        "few": (WORDS[:999], "its 999 classes are not ImageNet-1K's in their order"),
    }
    for name, (names, message) in orders.items():
        (tmp_path / name).mkdir()
        table(images, names).to_parquet(tmp_path / name / "validation.parquet")
        with pytest.raises(UserError, match=message):
            opened(tmp_path / name, class_map="synsets")


def test_tables_with_synsets_for_names_may_have_them_in_any_order(images, tmp_path):
    table(images, SYNSETS[::-1]).to_parquet(tmp_path / "validation.parquet")
    split = opened(tmp_path, class_map="synsets")
    expected = [999 - SYNSETS.index(synset) for _, synset in images.values()]
    assert [label for _, label in split.dataset] == expected


def test_numbers_of_classes_are_checked(images, tmp_path):
    write_shards(tmp_path, images, lambda synset: {"cls": 997 + CHOSEN.index(synset)})
    with pytest.raises(UserError, match="has class 1000, the last is 999"):
        opened(tmp_path, class_map="synsets")


@pytest.mark.parametrize("damage", ["a header", "half a file", "the end of a file"])
def test_a_tar_file_that_is_not_whole_is_refused(images, tmp_path, damage):
    """``tarfile`` by itself would list what comes before the damage."""
    original_tar(tmp_path, images)
    file = tmp_path / "ILSVRC2012_img_val.tar"
    with tarfile.open(file) as tar:
        members = tar.getmembers()
    content = bytearray(file.read_bytes())
    if damage == "a header":
        content[members[5].offset : members[5].offset + 512] = b"x" * 512
    cut = {"half a file": members[5].offset_data + 9, "the end of a file": members[7].offset}
    file.write_bytes(content[: cut.get(damage)])
    with pytest.raises(UserError, match=r"ILSVRC2012_img_val\.tar: not a tar file, or damaged"):
        opened(tmp_path, class_map="synsets")


def test_of_the_hub_one_split_is_taken(images, tmp_path, monkeypatch):
    """A local folder stands for the hub, whose files are listed and read in the same way."""
    parquet(tmp_path, images)
    monkeypatch.chdir(tmp_path.parent)
    split = opened(f"hf://datasets/{tmp_path.name}", class_map="synsets")
    assert [label for _, label in split.dataset] == [SYNSETS.index(synset) for _, synset in images.values()]
    with pytest.raises(UserError, match=r"data\.split=test: hf://datasets/.* has train, validation"):
        Photographs("x", f"hf://datasets/{tmp_path.name}").open("test", None)


def test_asked_among_the_present_classes_and_by_the_reassessed_labels(run, images, tmp_path):
    """Both against plain arithmetic on the model's own logits."""
    in_class_folders(made(tmp_path / "data"), images)
    metrics, rows = run(tmp_path / "data", "data.among=present", "data.real_labels=true", "method.k=0", "num_workers=0")
    model = timm.create_model(SMALLEST, checkpoint_path=str(tmp_path / "weights.safetensors")).eval()
    present = [SYNSETS.index(synset) for synset in CHOSEN]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    real = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    right, counted = 0, 0
    for row, file in zip(rows.itertuples(), sorted((tmp_path / "data" / "val").glob("*/*")), strict=True):
        with torch.inference_mode():
            logits = model(transform(Image.open(file))[None])[0]
        best = max(present, key=lambda output: logits[output])
        assert row.class_1 == best and {row.class_1, row.class_2, row.class_3, row.class_4} == set(present)
        labels = real[int(file.stem[-8:]) - 1]
        counted += bool(labels)
        right += best in labels
    assert (metrics["n_images_real"], metrics["top1_real"]) == (counted, 100 * right / counted)


def test_without_datasets_the_remedy_is_named(images, tmp_path, monkeypatch):
    parquet(tmp_path, images)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]'"):
        opened(tmp_path)


def test_images_are_kept_out_of_the_training(photos):
    """Every second image of each class, the same in every run; the validation images are not touched."""

    def names(split, holdout=2):
        dataset = Photographs("photos", str(photos), holdout=holdout).open(split, PILToTensor()).dataset
        assert all(dataset[i][1] == dataset.labels[i] for i in range(len(dataset)))
        return [dataset.source.name(i) for i in range(len(dataset))]

    training, kept_out, everything = names("train"), names("holdout"), names("train", holdout=None)
    assert sorted(training + kept_out) == everything and not set(training) & set(kept_out)
    classes = [Path(name).parent.name for name in everything]
    assert [Path(name).parent.name for name in kept_out] == [
        name for name in sorted(set(classes)) for _ in range(-(-classes.count(name) // 2))
    ]
    assert names("val") == names("val", holdout=None)
