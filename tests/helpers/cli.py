"""Run commands in this process, which is faster than starting a process, for tests that do not depend on one."""

from __future__ import annotations

from unittest import mock

import pytest

from steerlm_megatron import cli


def run_here(*arguments: str) -> int:
    """Run a command in this process and return its exit code; the process's signal handlers are restored afterwards."""
    with mock.patch("steerlm_megatron.runtime.signals.listen"), pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)
