"""Flower strategies that train a split model: one method, one file."""

from strategies.local_loss import LocalLoss
from strategies.mu_splitfed import MUSplitFed
from strategies.sequential import Sequential
from strategies.splitfed_v1 import SplitFedV1
from strategies.splitfed_v2 import SplitFedV2

__all__ = ["LocalLoss", "MUSplitFed", "Sequential", "SplitFedV1", "SplitFedV2"]
