"""The results of an evaluation as ``report.json``, as one HTML page and as a short table for the terminal."""
