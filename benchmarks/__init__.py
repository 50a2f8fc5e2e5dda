"""One script per hot job, each against its peer. ``python -m benchmarks.NAME --help``."""
