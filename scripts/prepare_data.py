"""Fill the cache of images for a backbone ahead of a sweep: `python scripts/prepare_data.py --help`."""

import logging

import hydra
from omegaconf import DictConfig
from timm.data import resolve_data_config

from dhtm.harness.core.errors import UserError, command, require_number
from dhtm.harness.data.cache import Pixels
from dhtm.harness.data.loading import from_cache, load_data, on_error
from dhtm.harness.models.backbones import bare_backbone

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
@command(goes_on=True)
def main(config: DictConfig) -> None:
    """Decode what the cache lacks; an evaluation with the same data and backbone does so by itself."""
    if config.cache_dir is None:
        raise UserError("cache_dir=null: there is no cache to fill; give a folder")
    require_number(config, "num_workers", integer=True, optional=True)
    preprocessing = resolve_data_config(model=bare_backbone(config.backbone.architecture, config.backbone.num_classes))
    split = load_data(config.data, config.data.split, preprocessing, config.backbone.num_classes)
    if split.in_memory:
        log.info("%s needs no cache", config.data.name)
        return
    images = from_cache(split, config, preprocessing).dataset
    if not isinstance(images, Pixels):
        raise UserError(f"cache_dir={config.cache_dir}: no cache was made; images will be decoded anew for every run")
    size = images.images.nbytes / 1e9
    log.info("%s for %s: %d images, %.1f GB", config.data.name, config.backbone.name, len(images), size)
    for unreadable in images.failed.values():
        log.warning("%s", unreadable)
    if images.failed and on_error(config.data) != "skip":
        raise UserError(
            f"{len(images.failed)} images cannot be read; mend them, or leave them out by data.on_error=skip"
        )


if __name__ == "__main__":
    main()
