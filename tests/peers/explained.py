"""Tests of the peers that a split model fails for a reason that is no defect, by name."""

EXPLAINED: dict[str, str] = {}
