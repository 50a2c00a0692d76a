"""Flower strategies that train a split model: one method, one file."""

from strategies.splitfed_v2 import SplitFedV2

__all__ = ["SplitFedV2"]
