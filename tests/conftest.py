"""Settings for all tests: one thread per process, tests of several ranks alone, GPU tests only with a GPU."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hypothesis
import pytest

# This is set before torch is imported: test processes share few cores, and more threads than cores slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A machine that does other work too is slow at times, and an example that was slow is no wrong result.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


# A lock is used instead of pytest-xdist's --dist loadgroup: xdist 3.8 marks groups by setting item._nodeid, which
# pytest 9.2 no longer reads, so groups would be silently ignored. tryfirst makes this the outermost wrapper, so that
# waiting does not count towards a time limit.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test of several ranks, or of a SLURM, be the only one that starts processes. Tests of whole commands, which
    mostly have one process, run beside each other, but for those that work in one folder (``work``).
    """
    alone = _is_alone(item)
    if not (alone or _starts_ranks(item) or item.get_closest_marker("integration")):
        return (yield)
    folder = item.config.rootpath / ".pytest_cache"
    folder.mkdir(exist_ok=True)
    with ExitStack() as locks:
        if "work" in getattr(item, "fixturenames", ()):
            kind = fcntl.LOCK_SH if item.get_closest_marker("reads_work") else fcntl.LOCK_EX
            locks.enter_context(_locked(folder / "work.lock", kind))
        locks.enter_context(_locked(folder / "starts_processes.lock", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


def _is_alone(item: pytest.Item) -> bool:
    """Return whether a test is the only one that starts processes."""
    return _starts_ranks(item) and not item.get_closest_marker("beside")


def _starts_ranks(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("distributed", "slurm"))


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, kind)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # unlocked explicitly, since a forked child may still hold the file open


@pytest.fixture(autouse=True)
def _loggers_as_at_the_start() -> None:
    """Undo what commands that earlier tests ran in this process changed of logging: ``caplog`` reads at the root, whose
    level Hydra raises, and Hydra disables all loggers that it finds.
    """
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("steerlm_megatron").propagate = True
    for name in logging.root.manager.loggerDict:
        if name.startswith("steerlm_megatron"):
            logging.getLogger(name).disabled = False
    if "absl.logging" in sys.modules:
        # Hydra closes all handlers that it finds, and absl's closes its stream. That was made in a test: it is the
        # file in which pytest captures.
        sys.modules["absl.logging"].get_absl_handler().python_handler.stream = sys.__stderr__


def _gpu_tests_asked_for(config: pytest.Config) -> bool:
    expression = config.option.markexpr
    return "gpu" in expression and "not gpu" not in expression


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those marked ``gpu``, so that the CPU path is tested on any machine."""
    if not _gpu_tests_asked_for(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)  # after pytest has brought together what shares a fixture
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let tests that are alone come first, then others of several ranks, then those of commands in the shared folder,
    then other commands. A worker that runs the first leaves one processor to the other, which starts at the other end:
    at tests that start no processes; when these are done, it takes commands outside the shared folder, beside which all
    kinds but the first can run. Skip ``gpu`` tests where there is no GPU; torch is imported only if there are such
    tests.
    """

    def place(item: pytest.Item) -> int:
        if _starts_ranks(item):
            return 0 if _is_alone(item) else 1
        if not item.get_closest_marker("integration"):
            return 5
        if "work" not in getattr(item, "fixturenames", ()):
            return 4
        return 3 if item.get_closest_marker("reads_work") else 2

    items.sort(key=place)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            reason = "torch finds none" if _gpu_tests_asked_for(config) else "run them with: pytest -m gpu"
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU; {reason}"))
