"""Log lines: one logger for the package, on the console and in ``run_dir/log/rank_N.log``.

Owns: the destinations and the layout of log lines. Does not own: metrics (``metrics.py``) and bars (``progress.py``).
Invariant: nothing is printed before ``setup_logging``, and a second call replaces the handlers instead of doubling
them.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
from functools import cache
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.logging import RichHandler

ROOT_NAME = "steerlm"
_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
_fatal: IO[str] | None = None
_warned: set[str] = set()  # by the command that logs now


class _StderrHandler(logging.StreamHandler):
    """Write each line to the current ``sys.stderr``, since tests and launchers replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@cache
def console() -> Console:
    """Return the one rich console of this process (standard error). Bars and log lines share it, so that they do not
    garble each other.
    """
    return Console(stderr=True)


def get_logger(name: str = "") -> logging.Logger:
    """Return the package's logger, or the child ``name`` of it, which may be the ``__name__`` of a module of the
    package.
    """
    name = name.removeprefix("steerlm_megatron").strip(".")
    return logging.getLogger(f"{ROOT_NAME}.{name}" if name else ROOT_NAME)


def warn_once(name: str, message: str) -> None:
    """Log a warning that a command would give several times: opening a model to check it, and again to use it, is one
    opening to whoever reads the log.
    """
    if message not in _warned:
        _warned.add(message)
        get_logger(name).warning("%s", message)


def setup_logging(
    run_dir: str | Path | None = None, rank: int = 0, *, level: str = "INFO", terminal: bool | None = None
) -> logging.Logger:
    """Send the package's log lines to the console and, with ``run_dir``, append them to
    ``run_dir/log/rank_<rank>.log``.

    On the console rank 0 shows ``level`` and above, and other ranks show warnings and above, marked with their rank.
    Each rank's file has ``level`` and above. With ``terminal`` None, rich is used where standard error is a terminal,
    and plain lines with time stamps elsewhere.
    """
    logger = logging.getLogger(ROOT_NAME)
    close_logging()
    _warned.clear()
    logger.setLevel(level)
    for name, known in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == ROOT_NAME and isinstance(known, logging.Logger):
            known.disabled = False  # Hydra's logging configuration disables the loggers that it finds
    logger.propagate = False  # Hydra and torch add handlers to the root logger

    use_rich = console().is_terminal if terminal is None else terminal
    mark = "" if rank == 0 else f"[rank {rank}] "
    if use_rich:
        handler: logging.Handler = RichHandler(
            console=console(), show_path=False, markup=False, highlighter=None, log_time_format="[%H:%M:%S]"
        )
        handler.setFormatter(logging.Formatter(f"{mark}%(message)s"))
    else:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter(_FORMAT.replace("%(message)s", f"{mark}%(message)s"), _DATE_FORMAT))
    handler.setLevel(level if rank == 0 else logging.WARNING)
    logger.addHandler(handler)

    if run_dir is not None:
        path = Path(run_dir) / "log" / f"rank_{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file_handler = logging.FileHandler(path, encoding="utf-8")
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", _DATE_FORMAT))
        logger.addHandler(file_handler)
        _log_fatal_signals(path)
    return logger


def _log_fatal_signals(path: Path) -> None:
    """Make a fault below Python (SIGSEGV in a library, SIGBUS from a file that was cut) write the Python stack into the
    log. If faulthandler is enabled already, it stays as it is.
    """
    global _fatal
    if _fatal is None and faulthandler.is_enabled():
        return
    previous, _fatal = (
        _fatal,
        path.open("a", encoding="utf-8"),
    )  # it stays open, since a fault may come until the process ends
    faulthandler.enable(_fatal)
    if previous is not None:
        previous.close()


def close_logging() -> None:
    """Flush, close and remove the handlers that ``setup_logging`` added."""
    logger = logging.getLogger(ROOT_NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
