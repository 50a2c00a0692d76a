"""Programs on top of fedsplit: runs, experiments, comparisons and benchmarks."""
