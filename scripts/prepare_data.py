"""Fill the cache of images for a backbone ahead of a sweep; the settings are those of scripts/evaluate.py."""

import logging

from omegaconf import DictConfig
from timm.data import resolve_data_config

from dhtm.harness import config as door
from dhtm.harness.core.command import start
from dhtm.harness.core.errors import UserError
from dhtm.harness.data.cache import decode_once
from dhtm.harness.data.splits import open_split

log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
    """Decode the images that the cache lacks; an evaluation with the same data and backbone does this by itself."""
    evaluation = door.evaluation(config)
    data, backbone = evaluation.data, evaluation.backbone
    if evaluation.cache_dir is None:
        raise UserError("cache_dir=null: there is no cache to fill; give a folder")
    preprocessing = resolve_data_config(model=backbone.bare())
    split = open_split(data, data.split, preprocessing, backbone.num_classes)
    found = decode_once(data, split, preprocessing, evaluation.cache_dir, evaluation.num_workers)
    if found is split:
        log.info("%s needs no cache", data.name)
        return
    log.info("%s for %s: %d images in %s", data.name, backbone.name, len(split.dataset), found.dataset.folder)
    for unreadable in found.dataset.failed:
        log.warning("%s", unreadable)
    if found.dataset.failed and data.on_error != "skip":
        raise UserError(f"images that cannot be read: {len(found.dataset.failed)}; fix them, or set data.on_error=skip")


if __name__ == "__main__":
    start(main, "evaluate", resumes=True)
