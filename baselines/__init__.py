"""The methods that the paper compares DHTM with, one file each, named as their papers name them."""

from baselines.random_merge import RandomMerge

__all__ = ["RandomMerge"]
