"""What is asked about the device of a process, and said of it."""

from __future__ import annotations

import pytest
import torch

from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime import device
from steerlm_megatron.stages import session


@pytest.mark.parametrize(("capability", "gpu", "slow"), [("AVX2", False, True), ("DEFAULT", False, True),
                                                         ("AVX512", False, False), ("AVX2", True, False)])  # fmt: skip
def test_bf16_is_slow_on_a_cpu_without_instructions_for_it(
    capability: str, gpu: bool, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(device, "has_cuda", lambda: gpu)
    assert device.emulates_bf16() is slow


@pytest.mark.parametrize("slow", [True, False])
def test_slow_bf16_is_told_once(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    monkeypatch.setattr(get_logger("steerlm_megatron.stages.session"), "warning", recorded.append)
    monkeypatch.setattr(session, "emulates_bf16", lambda: slow)
    session.warn_of_slow_bf16.cache_clear()
    session.warn_of_slow_bf16()
    session.warn_of_slow_bf16()
    session.warn_of_slow_bf16.cache_clear()
    assert ["engine.precision=fp32" in text for text in recorded] == [True] * slow
