"""Benchmarks of the jobs that take most time, each against a peer: ``python -m benchmarks.NAME --help``."""
