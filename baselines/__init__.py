"""The methods that DHTM is compared with, one file each, named as their papers name them."""

from baselines.atc import ATC
from baselines.dpc_knn import DPCKNN
from baselines.k_medoids import KMedoids
from baselines.lotm import LoTM
from baselines.patch_merger import PatchMerger
from baselines.pitome import PiToMe
from baselines.random_merge import RandomMerge
from baselines.sinkhorn import Sinkhorn
from baselines.sit import SiT
from baselines.token_mergence import TokenMergence
from baselines.tome import ToMe

__all__ = [
    "ATC",
    "DPCKNN",
    "KMedoids",
    "LoTM",
    "PatchMerger",
    "PiToMe",
    "RandomMerge",
    "SiT",
    "Sinkhorn",
    "ToMe",
    "TokenMergence",
]
