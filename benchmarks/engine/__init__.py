"""Measuring by pytest-benchmark: options, clocks, rows of results, where they came from."""
