"""What one runs: drivers, comparisons and benchmarks on top of fedsplit."""
