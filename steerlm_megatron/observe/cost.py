"""What a run cost: seconds of devices, tokens, FLOPs, memory, latency of requests.

Owns: a rank's account (:class:`CostMeter`), which survives a killed attempt, and adding accounts up to the section
``cost`` of ``summary.json``. Does not own: formulas of FLOPs (``model/arithmetic.py``), who counts what (``train``,
``stages``). Invariants: each rank writes its own account, so that nothing has to be sent between ranks to know what an
interrupted attempt cost; tokens and FLOPs are counted by one rank of each replica, seconds and memory by every rank.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm_megatron.files import write_json_atomic
from steerlm_megatron.observe.log import get_logger

FOLDER = "cost"  # in a run folder, as long as the run is not complete: one file per attempt and rank
KEEP_SEC = 30.0  # a killed attempt forgets at most this much
TOKENS = ("trained", "validated", "scored", "prompt", "drawn", "cached", "padding")
_GROWTH = 1.02  # of a latency's bucket to the next, so that a quantile is right to one percent

Share = Mapping[str, Any]
_process_began: float | None = None  # seconds since the epoch


def process_began(when: float) -> None:
    """Say when this process began (seconds since the epoch), so that its first session counts the imports before it."""
    global _process_began
    _process_began = when


def _age_of_process() -> float:
    """Return the seconds since this process began, once; 0 where nobody said when, or somebody has asked before."""
    global _process_began
    began, _process_began = _process_began, None
    return 0.0 if began is None else max(0.0, time.time() - began)


@dataclass
class Latencies:
    """Seconds of many requests, in buckets that grow by two percent: any number of them in little memory."""

    buckets: Counter[int] = field(default_factory=Counter)
    sum_sec: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one request."""
        self.buckets[math.floor(math.log(max(seconds, 1e-6)) / math.log(_GROWTH))] += 1
        self.sum_sec += seconds

    @property
    def count(self) -> int:
        """How many requests there were."""
        return self.buckets.total()

    def quantile(self, share: float) -> float:
        """Return the seconds within which ``share`` of the requests were answered, to one percent."""
        wanted, seen = share * self.count, 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return _GROWTH ** (bucket + 0.5)
        raise ValueError("there was no request")

    def merge(self, other: Latencies) -> None:
        """Add the requests of ``other``."""
        self.buckets.update(other.buckets)
        self.sum_sec += other.sum_sec

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"buckets": {str(bucket): count for bucket, count in self.buckets.items()}, "sum_sec": self.sum_sec}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Latencies:
        """Return what :meth:`to_dict` gave."""
        return cls(Counter({int(bucket): count for bucket, count in found["buckets"].items()}), found["sum_sec"])


@dataclass
class _Span:
    """A kind of seconds: ``depth`` of its spans are open, the first ``since`` then; others have ended."""

    depth: int = 0
    since: float = 0.0
    ended_sec: float = 0.0

    def seconds(self, now: float) -> float:
        return self.ended_sec + (now - self.since if self.depth else 0.0)


class CostMeter:
    """The account of one rank in one attempt of a run. Any thread may add to it.

    Without a folder it counts and writes nothing, which suits whoever is not part of a run.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        attempt: int = 1,
        rank: int = 0,
        ranks: int = 1,
        counts: bool = True,
        device: str = "cpu",
        peak_memory_gib: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``folder``: the run folder. ``counts``: whether this rank speaks for its replica, and its tokens and FLOPs
        count; those that other ranks of the replica add are left out.
        """
        self.folder, self.attempt, self.rank, self.ranks = folder, attempt, rank, ranks
        self.counts, self.device = counts, device
        self._peak_memory_gib, self._clock = peak_memory_gib, clock
        self.steps: dict[str, dict[str, Any]] = {}  # costs of the steps of this run, each by its own account
        self._began = clock() - _age_of_process()
        self._work, self._away = _Span(), _Span()
        self._tokens: Counter[str] = Counter()
        self._flops = 0.0
        self._latencies = Latencies()
        self._lock = threading.RLock()
        self._kept = -math.inf
        self.keep()

    def add(self, flops: float = 0.0, **tokens: int) -> None:
        """Add FLOPs, and tokens by their kind, one of ``TOKENS``."""
        if unknown := set(tokens) - set(TOKENS):
            raise ValueError(f"no kind of tokens: {' '.join(sorted(unknown))}")
        with self._lock:
            if self.counts:
                self._tokens.update(tokens)
                self._flops += flops
        self.keep(KEEP_SEC)

    def request(self, prompt: int, drawn: int, seconds: float | None, flops: float) -> None:
        """Add a response: the tokens of its prompt, those that were drawn, and its latency where that is known."""
        with self._lock:
            if self.counts and seconds is not None:
                self._latencies.add(seconds)
        self.add(flops, prompt=prompt, drawn=drawn)

    def work(self) -> AbstractContextManager[None]:
        """Return a context manager: the seconds inside are work, and those outside start-up and the like. Several may
        be open at a time, which counts once.
        """
        return self._measured(self._work)

    def away(self) -> AbstractContextManager[None]:
        """Return a context manager: the seconds inside are on another account, that of a step of this run."""
        return self._measured(self._away)

    @contextmanager
    def _measured(self, span: _Span) -> Iterator[None]:
        with self._lock:
            if span.depth == 0:
                span.since = self._clock()
            span.depth += 1
        try:
            yield
        finally:
            with self._lock:
                span.depth -= 1
                if span.depth == 0:
                    span.ended_sec += self._clock() - span.since
            self.keep(KEEP_SEC)

    def share(self) -> dict[str, Any]:
        """Return this rank's account so far, as plain data."""
        with self._lock:
            now = self._clock()
            return {
                "attempt": self.attempt,
                "rank": self.rank,
                "ranks": self.ranks,
                "device": self.device,
                "wall_sec": now - self._began - self._away.seconds(now),
                "work_sec": self._work.seconds(now),
                "peak_memory_gib": self._peak_memory_gib(),
                "tokens": dict(self._tokens),
                "flops": self._flops,
                "latencies": self._latencies.to_dict(),
            }

    def keep(self, every_sec: float = 0.0) -> None:
        """Write the account, unless that was done in the last ``every_sec`` seconds."""
        if self.folder is None:
            return
        with self._lock:
            now = self._clock()
            if now - self._kept < every_sec:
                return
            self._kept = now
            folder = self.folder / FOLDER
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json_atomic(folder / f"{self.attempt:04d}-{self.rank:05d}.json", self.share())
            except OSError as error:  # what a run computes is worth more than what is known of its cost
                get_logger(__name__).warning("%s: the run's cost is not kept: %s", folder, error.strerror)


def read_shares(run_dir: Path) -> list[dict[str, Any]]:
    """Return the accounts in a run folder, of all ranks and attempts. A file that is no account is left out: it was
    torn by a file system, and a cost is no reason to refuse a run.
    """
    shares = []
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and {"attempt", "rank", "wall_sec"} <= found.keys():
            shares.append(found)
    return shares


def remove_shares(run_dir: Path) -> None:
    """Remove the accounts of a run whose summary has their sum."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def total(shares: Sequence[Share]) -> dict[str, Any]:
    """Return the section ``cost`` of a summary: what all ``shares``, accounts of ranks and attempts, add up to.

    Seconds of attempts add up, since one follows the other; ``wall_sec`` and ``work_sec`` of an attempt are those of
    its longest rank, ``device_sec`` and ``work_device_sec`` those of all its ranks together. A rank whose account is
    lost counts as the mean of the others.
    """
    attempts: defaultdict[int, list[Share]] = defaultdict(list)
    for share in shares:
        attempts[share["attempt"]].append(share)
    sums: defaultdict[str, float] = defaultdict(float)
    for found in attempts.values():
        missing = max(one["ranks"] for one in found) / len(found)
        for name in ("wall", "work"):
            seconds = [one[f"{name}_sec"] for one in found]
            sums[name] += max(seconds)
            sums[f"{name} of devices"] += sum(seconds) * missing
    tokens, latencies = Counter[str](), Latencies()
    for share in shares:
        tokens.update(share["tokens"])
        latencies.merge(Latencies.from_dict(share["latencies"]))
    last = attempts[max(attempts)] if attempts else []
    block = {
        "attempts": len(attempts),
        "devices": max((one["ranks"] for one in last), default=0),
        "device": ", ".join(sorted({one["device"] for one in last})),
        "wall_sec": sums["wall"],
        "work_sec": sums["work"],
        "device_sec": sums["wall of devices"],
        "work_device_sec": sums["work of devices"],
        "tokens": {kind: tokens[kind] for kind in TOKENS if tokens[kind]},
        "flops": sum(one["flops"] for one in shares),
        "peak_memory_gib": max((one["peak_memory_gib"] for one in shares), default=0.0),
        "peak_memory_gib_by_rank": [one["peak_memory_gib"] for one in sorted(last, key=lambda one: one["rank"])],
        "latency_sec": None,
    }
    if latencies.count:
        block["latency_sec"] = {
            "requests": latencies.count, "mean": latencies.sum_sec / latencies.count,
            "p50": latencies.quantile(0.5), "p95": latencies.quantile(0.95),
        }  # fmt: skip
    return _with_derived(block)


def combined(costs: Sequence[Mapping[str, Any]], at_once: bool = False) -> dict[str, Any]:
    """Return the cost of several runs together, of what :func:`total` gave of each.

    ``at_once``: they ran beside each other, as the jobs of an array do, so that the longest one's wall time counts;
    otherwise one after the other. Quantiles of latency are those of one run, and are left out.
    """
    add = max if at_once else sum
    tokens: Counter[str] = Counter()
    for one in costs:
        tokens.update(one["tokens"])
    block: dict[str, Any] = {
        "attempts": max((one["attempts"] for one in costs), default=0),
        "devices": (sum if at_once else max)([one["devices"] for one in costs] or [0]),
        "device": ", ".join(sorted({one["device"] for one in costs if one["device"]})),
        **{name: add([one[name] for one in costs] or [0.0]) for name in ("wall_sec", "work_sec")},
        **{name: sum(one[name] for one in costs) for name in ("device_sec", "work_device_sec", "flops")},
        "tokens": {kind: tokens[kind] for kind in TOKENS if tokens[kind]},
        "peak_memory_gib": max((one["peak_memory_gib"] for one in costs), default=0.0),
        "latency_sec": None,
    }
    timed = [one["latency_sec"] for one in costs if one["latency_sec"]]
    if len(timed) == 1:
        block["latency_sec"] = timed[0]
    elif timed:
        requests = sum(one["requests"] for one in timed)
        mean = sum(one["requests"] * one["mean"] for one in timed) / requests
        block["latency_sec"] = {"requests": requests, "mean": mean, "p50": None, "p95": None}
    return _with_derived(block)


def _with_derived(block: dict[str, Any]) -> dict[str, Any]:
    """Return a cost with what follows from its sums, and seconds rounded to milliseconds."""
    tokens = block["tokens"]
    computed = sum(tokens.get(kind, 0) for kind in ("trained", "validated", "scored", "prompt", "drawn"))
    block["useful_tokens"] = computed - tokens.get("cached", 0)
    block["overhead_sec"] = max(0.0, block["wall_sec"] - block["work_sec"])
    spent = block["work_device_sec"]
    block["flops_per_device_sec"] = block["flops"] / spent if block["flops"] and spent > 0 else None
    for name in ("wall_sec", "work_sec", "overhead_sec", "device_sec", "work_device_sec"):
        block[name] = round(block[name], 3)
    return block
