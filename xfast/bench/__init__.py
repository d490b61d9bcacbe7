"""Benchmarks that run on the user's machine: ``xfast bench swap``, ``xfast bench engine``."""
