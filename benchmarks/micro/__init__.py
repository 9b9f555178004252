"""Micro benchmarks: `pytest benchmarks/micro`. Each is a ratio to plain Python on the same work in the same run."""
