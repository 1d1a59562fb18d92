"""Benchmarks: fair tables, per-op suites (pytest-benchmark), results as JSON."""
