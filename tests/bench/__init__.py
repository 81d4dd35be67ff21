"""Benchmarks: scripts that assert their answers and report shares of a ceiling measured in the same run."""
