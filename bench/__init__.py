"""Benchmarks: no speed figure without a check of the same result in the same run."""
