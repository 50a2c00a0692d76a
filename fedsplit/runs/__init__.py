"""The files of a run: its folder, checkpoints, metrics and result, and comparisons of runs."""
