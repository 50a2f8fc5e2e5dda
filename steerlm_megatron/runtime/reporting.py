"""What a rank says of the error or stop that ends it, and with which exit code.

Owns: the words on standard error, which rank of many prints them, exit codes of errors. Does not own: errors
(``errors.py``), what a signal does (``signals.py``). Invariant: one rank prints an error that all of them find.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable

from steerlm_megatron.errors import Interrupted, ReportedElsewhere, UserError
from steerlm_megatron.runtime import launcher, signals

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def guarded(run: Callable[[], None]) -> None:
    """Call ``run()`` and turn what it raises into a message and an exit code."""
    try:
        run()
    except UserError as error:
        print_error(error)
        raise SystemExit(error.code) from None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            traceback.print_exc()
            raise SystemExit(1) from None
        where = f"{error.filename}: " if error.filename else ""
        print_error(UserError(f"{where}{error.strerror}; make room there, then start the same command again"))
        raise SystemExit(UserError.code) from None
    except Exception as error:
        if signals.leaving():  # other ranks have left already, so this error is a consequence of the stop
            raise Interrupted(f"a signal ({type(error).__name__} while leaving)") from None
        traceback.print_exc()
        raise SystemExit(1) from None


def prefix() -> str:
    """Return what a line on standard error begins with."""
    rank = launcher.global_rank()
    return f"steerlm: rank {rank}: " if rank else "steerlm: "


def _is_first_to_report(text: str) -> bool:
    """Return whether this rank is to print ``text``. Every rank finds what is wrong with an input, and one prints it;
    before the ranks are connected, one rank of each host does.
    """
    if "steerlm_megatron.runtime.parallel" not in sys.modules:
        return launcher.local_rank() == 0
    from steerlm_megatron.runtime.collectives import first_to_report

    return first_to_report(text)


def print_error(error: UserError) -> None:
    """Print an error, a line each problem, unless another rank or process does."""
    if not isinstance(error, ReportedElsewhere) and _is_first_to_report(f"{error}"):
        for line in str(error).splitlines():
            print(f"{prefix()}error: {line}", file=sys.stderr)
