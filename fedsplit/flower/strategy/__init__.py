"""The base class of the Flower strategies that train a split model, and its parts."""

from fedsplit.flower.strategy.base import SplitStrategy
from fedsplit.flower.strategy.baseline import Unsplit

__all__ = ["SplitStrategy", "Unsplit"]
