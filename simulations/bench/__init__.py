"""Benchmarks of speed, bytes and memory, one file for each: `python -m simulations.bench`."""
