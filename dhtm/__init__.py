"""Dynamic Hierarchical Token Merging for Vision Transformers, as a library."""

import sys
import types

from timm.models.vision_transformer import VisionTransformer

from dhtm import vit
from dhtm.flops import count_flops, count_flops_of_images
from dhtm.huggingface import to_timm
from dhtm.merge import DHTM, DHTMPlus, hierarchical_merge
from dhtm.reducer import Reducer
from dhtm.regions import Regions
from dhtm.thresholds import find_thresholds
from dhtm.vit import patch, unpatch

__all__ = [
    "DHTM", "DHTMPlus", "Reducer", "Regions", "count_flops", "count_flops_of_images", "find_thresholds",
    "hierarchical_merge", "patch", "regions", "to_timm", "unpatch",
]  # fmt: skip


class _RegionsModule(types.ModuleType):
    """The module ``dhtm.regions``, which is also a function."""

    def __call__(self, model: VisionTransformer, layer: int | None = None) -> Regions:
        """See :func:`dhtm.vit.regions`."""
        return vit.regions(model, layer)


regions = sys.modules["dhtm.regions"]
regions.__class__ = _RegionsModule
