"""Benchmarks of keven_core: `python -m benchmarks` runs all of them; docs/performance.md says what they measure."""
