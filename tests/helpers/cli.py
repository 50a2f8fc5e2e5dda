"""Commands in this process: quicker than in processes of their own, for what does not depend on those."""

from __future__ import annotations

from unittest import mock

import pytest

from steerlm_megatron import cli


def run_here(*arguments: str) -> int:
    """Return the exit code of a command that runs in this process, which does not start to listen to signals for good."""
    with mock.patch("steerlm_megatron.runtime.signals.listen"), pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)
