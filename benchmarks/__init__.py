"""Benchmarks of stopfast against the published programs' way of computing the same numbers."""
