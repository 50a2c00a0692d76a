"""The tables of experiments, one file for each `sweep.kind`."""
