"""What the command lines of this folder have in common: a report on standard output, a user's error on the other.

Owns: the exit codes and where what is printed. Does not own: arguments, and the work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from steerlm_megatron.errors import UserError


def print_report(work: Callable[[], Any]) -> int:
    """Do ``work`` and print what it returns as JSON. Returns the exit code: 0, or 2 after a user's error."""
    try:
        report = work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2, ensure_ascii=False))
    return 0
