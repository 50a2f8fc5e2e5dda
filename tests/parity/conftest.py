"""Print the parity tests' measurements as a table at the end of the run."""

from __future__ import annotations

import pytest

COLUMNS = "measured"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print rows that tests left with ``record_property("measured", …)``. Reports carry them, also from workers."""
    rows = [
        row
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for key, row in getattr(report, "user_properties", [])
        if key == COLUMNS and report.when == "call"
    ]
    if not rows:
        return
    terminalreporter.section("parity: largest differences from the plain-torch reference (float64)")
    width = max(len(row[0]) for row in rows)
    for name, values in rows:
        terminalreporter.write_line(f"{name:<{width}}  " + "  ".join(f"{k} {v:.1e}" for k, v in values.items()))
