"""Dynamic Hierarchical Token Merging for Vision Transformers, as a library."""

from dhtm.flops import count_flops
from dhtm.merge import DHTM, hierarchical_merge
from dhtm.reducer import Reducer
from dhtm.regions import Regions
from dhtm.vit import patch, regions, unpatch

__all__ = ["DHTM", "Reducer", "Regions", "count_flops", "hierarchical_merge", "patch", "regions", "unpatch"]
