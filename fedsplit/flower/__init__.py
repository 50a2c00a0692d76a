"""Flower's apps and strategies: the only package of fedsplit that imports flwr."""
