"""What is asked of the runs of an experiment: one file, one question, by `sweep.kind`."""
