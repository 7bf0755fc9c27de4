"""The methods that the paper compares DHTM with, one file each, named as their papers name them."""

from baselines.dpc_knn import DPCKNN
from baselines.k_medoids import KMedoids
from baselines.lotm import LoTM
from baselines.patch_merger import PatchMerger
from baselines.random_merge import RandomMerge
from baselines.sinkhorn import Sinkhorn
from baselines.sit import SiT
from baselines.token_mergence import TokenMergence
from baselines.tome import ToMe

__all__ = [
    "DPCKNN",
    "KMedoids",
    "LoTM",
    "PatchMerger",
    "RandomMerge",
    "SiT",
    "Sinkhorn",
    "ToMe",
    "TokenMergence",
]
