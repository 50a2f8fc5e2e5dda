"""The key/value cache takes what memory is left; too little is refused with the number needed."""

from __future__ import annotations

import pytest
import torch

from steerlm_megatron.config.inference import GenerationConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate import cache_size
from steerlm_megatron.generate.group import LocalGroup
from steerlm_megatron.generate.protocol import Limits
from steerlm_megatron.model.packed_tokens import CacheShape

SHAPE = CacheShape((1, 2, 3, 4), 2, 16, torch.float32)  # 1 KiB a token
MIB = 2**20


def limits(free: int, monkeypatch: pytest.MonkeyPatch, longest: int = 1024, **keys: object) -> Limits:
    monkeypatch.setattr(cache_size, "free_memory", lambda device: free)
    wanted = GenerationConfig(**{"max_sequence_tokens": 4096, **keys})  # type: ignore[arg-type]
    return cache_size.limits_for(wanted, longest, SHAPE, torch.device("cpu"), LocalGroup())


def test_what_every_sequence_could_need_or_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SHAPE.token_bytes == 1024
    ample = limits(10**12, monkeypatch, max_batch=8)
    assert (ample.max_cache_tokens, ample.max_sequence_tokens) == (8 * 1024, 1024), "no more than all could use"
    tight = limits(4 * MIB, monkeypatch, max_batch=8, memory_fraction=0.5)
    assert tight.max_cache_tokens == 2048 and tight.blocks == 128
    assert not tight.reserve and limits(4 * MIB, monkeypatch, admission="reserve").reserve


def test_too_little_is_refused_with_the_number_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"1024 tokens needs 1 MiB.*max_sequence_tokens \(to 400 or less\)"):
        limits(512 * 1024, monkeypatch, memory_fraction=0.8)
    with pytest.raises(UserError, match=r"is less: raise generation.memory_fraction, or spread"):
        limits(4 * MIB, monkeypatch, memory_fraction=0.0)
    with pytest.raises(UserError, match="max_cache_tokens=8192: 512 blocks of 16 tokens take 8 MiB"):
        limits(4 * MIB, monkeypatch, max_cache_tokens=8192)
    assert limits(4 * MIB, monkeypatch, max_cache_tokens=100).max_cache_tokens == 1024, "one sequence always fits"


def test_ranks_share_the_memory_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = cache_size.free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cache_size.free_memory(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)
