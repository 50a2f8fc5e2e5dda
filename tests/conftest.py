"""What all tests share: one thread per process, spawning tests one at a time, GPU tests skipped without a GPU."""

from __future__ import annotations

import os

import pytest

# Before anything imports torch: several test processes share few cores, and more threads than cores make them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# First, so that pytest-xdist, which reads the groups in this same hook, finds them.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``-n 2 --dist loadgroup`` tests that start processes of their own run one by one, on one worker."""
    for item in items:
        if item.get_closest_marker("distributed") or item.get_closest_marker("integration"):
            item.add_marker(pytest.mark.xdist_group("starts_processes"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch finds none"))
