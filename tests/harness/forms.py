"""Write a few images in each form in which ImageNet is stored, and open them."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import scipy.io
import webdataset
from timm.data import ImageNetInfo
from torchvision.transforms import PILToTensor

from dhtm.harness.data.photographs import Photographs

IMAGENET = ImageNetInfo("imagenet-1k")
SYNSETS = IMAGENET.label_names()
# Class names have to be unique, and two synsets are called "crane".
WORDS = [f"{IMAGENET.index_to_description(i)}, {synset}" for i, synset in enumerate(SYNSETS)]
CHOSEN = ["n01440764", "n02102040", "n02979186", "n03000684"]  # four classes of Imagenette


def in_class_folders(root, images):
    for name, (content, synset) in images.items():
        write(root / "val" / synset / name, content)


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def flat(root, images):
    for name, (content, _) in images.items():
        write(root / "val" / name, content)


def devkit(root, images):
    """Write a devkit. As in the real one, ids are not in the order of the synsets, and some belong to ancestors of classes."""
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    order = [*SYNSETS[500:], *SYNSETS[:500], "n00000001"]
    entries = np.zeros((len(order), 1), dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for i, synset in enumerate(order):
        entries[i, 0] = (np.array([[i + 1]]), synset, "words")
    scipy.io.savemat(folder / "meta.mat", {"synsets": entries})
    ground_truth = "".join(f"{order.index(synset) + 1}\n" for _, synset in images.values())
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(ground_truth)
    return folder.parent


def flat_with_devkit(root, images):
    flat(root, images)
    devkit(root, images)


def flat_with_packed_devkit(root, images):
    flat(root, images)
    archive = root / "kit" / "ILSVRC2012_devkit_t12.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(devkit(archive.parent, images), "ILSVRC2012_devkit_t12")
    return {"labels": str(archive)}


def flat_with_kaggles_csv(root, images):
    flat(root, images)
    lines = [f"{Path(name).stem},{synset} 85 1 499 272 " for name, (_, synset) in reversed(images.items())]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]))


def flat_with_numbers(root, images):
    flat(root, images)
    lines = [f"{name} {SYNSETS.index(synset)}\n" for name, (_, synset) in images.items()]
    (root / "val.txt").write_text("".join(lines))
    return {"labels": f"{root}/val.txt"}


def original_tar(root, images):
    write_tar(root / "ILSVRC2012_img_val.tar", {name: content for name, (content, _) in images.items()})
    devkit(root, images)


def tar_of_class_folders(root, images):
    contents = {f"./val/{synset}/{name}": content for name, (content, synset) in images.items()}
    write_tar(root / "some.tar", contents)
    return {"root": f"{root}/some.tar"}


def write_tar(file, contents):
    with tarfile.open(file, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def shards(root, images):
    write_shards(root, images, lambda synset: {"cls": SYNSETS.index(synset)})
    return {"root": f"{root}/imagenet-val-{{000..002}}.tar"}


def shards_with_json(root, images):
    write_shards(root, images, lambda synset: {"json": {"label": SYNSETS.index(synset), "width": 40}})


def write_shards(root, images, label):
    root.mkdir(exist_ok=True)
    with webdataset.ShardWriter(f"{root}/imagenet-val-%03d.tar", maxcount=5, verbose=0) as writer:
        for name, (content, synset) in images.items():
            writer.write({"__key__": Path(name).stem, "JPEG": content, **label(synset)})


def table(images, names=WORDS):
    rows = {
        "image": [{"bytes": content, "path": name} for name, (content, _) in images.items()],
        "label": [SYNSETS.index(synset) for _, synset in images.values()],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(rows, features)


def parquet(root, images):
    """Write the validation split in two files and a train split in one, named as on the Hugging Face Hub."""
    (root / "data").mkdir(parents=True)
    for i in range(2):
        table(images).shard(2, i, contiguous=True).to_parquet(root / "data" / f"validation-0000{i}-of-00002.parquet")
    table(dict(list(images.items())[:1])).to_parquet(root / "data" / "train-00000-of-00001.parquet")


def arrow_saved(root, images):
    datasets.DatasetDict({"validation": table(images)}).save_to_disk(root)


def arrow_files(root, images):
    table(images).save_to_disk(root / "saved")
    (root / "val").mkdir()
    for file in (root / "saved").glob("*.arrow"):
        file.rename(root / "val" / file.name)


FORMS = [
    in_class_folders, flat_with_devkit, flat_with_packed_devkit, flat_with_kaggles_csv, flat_with_numbers, original_tar,
    tar_of_class_folders, shards, shards_with_json, parquet, arrow_saved, arrow_files,
]  # fmt: skip


def opened(root, transform=None, **options):
    """Open the validation split of photographs; images are uint8 tensors by default."""
    return Photographs("photographs", str(root), **options).open("val", transform or PILToTensor())


def opened_as(form, root, images, **options):
    """Write images in a form, and open them with ImageNet-1K's class numbers."""
    return opened(**({"root": root, "class_map": "synsets"} | (form(root, images) or {}) | options))
