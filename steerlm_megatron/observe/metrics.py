"""Numbers over time: ``metrics.jsonl``, forwarding to other services (``sinks.py``), throughput.

Owns: the file's format and the definition of the rates. Does not own: which numbers a stage logs.
Invariant: every line of ``metrics.jsonl`` that ends in a newline is one strict-JSON object; a step occurs at most once
per run, resumed or not, when the caller says where it resumed (``truncate_after``).
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from steerlm_megatron.errors import UserError
from steerlm_megatron.files import atomic_path, to_strict_json
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.sinks import Sink

FILE_NAME = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics file, in order. A last line without newline that does not parse is a torn write
    and is left out.

    Raises:
        UserError: any other line is not a JSON object.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not JSON ({error}); delete the line to go on with this run") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; delete the line to go on with this run")
        rows.append(row)
    return rows


class MetricsWriter:
    """Append one JSON object per logged step to ``run_dir/metrics.jsonl``, flushed line by line.

    Non-finite numbers are written as null and their names are listed under ``nonfinite``, so that the file stays strict
    JSON and a NaN loss stays visible. With ``active=False`` (ranks other than 0) nothing is opened or written.
    """

    def __init__(self, run_dir: str | Path, *, sinks: Sequence[Sink] = (), active: bool = True) -> None:
        """Open the file for appending, without the torn last line of a killed run. ``sinks`` get all scalars."""
        self.path = Path(run_dir) / FILE_NAME
        self.active = active
        self._stream: TextIO | None = None
        self._sinks = list(sinks) if active else []
        if active and self.path.exists():
            self._rewrite(lambda row: True)

    def truncate_after(self, step: int) -> int:
        """Drop the lines of steps after ``step``, from which training resumes, and return how many were dropped."""
        if not self.active:
            return 0
        self._close_file()
        for sink in self._sinks:
            sink.resume(step)
        return self._rewrite(lambda row: row.get("step", step) <= step) if self.path.exists() else 0

    def at(self, step: int) -> dict[str, Any]:
        """Return all values written for ``step``, by this process or an earlier one."""
        rows = read_metrics(self.path) if self.path.exists() else []
        return {name: value for row in rows if row.get("step") == step for name, value in row.items()}

    def _rewrite(self, keep: Callable[[Mapping[str, Any]], bool]) -> int:
        rows = read_metrics(self.path)
        kept = [row for row in rows if keep(row)]
        if len(kept) == len(rows) and self.path.read_bytes()[-1:] in (b"", b"\n"):
            return 0
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in kept), encoding="utf-8")
        return len(rows) - len(kept)

    def write(self, step: int, values: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """Append ``{"step": step, **values, **more}``; numpy and torch scalars become numbers.

        Returns the object as written (also where the writer is not active).
        """
        raw = {**(values or {}), **more}
        row: dict[str, Any] = {"step": int(step), **to_strict_json(raw)}
        nonfinite = sorted(name for name, value in raw.items() if _has_nonfinite(value))
        if nonfinite:
            row["nonfinite"] = nonfinite
        if not self.active:
            return row
        try:
            stream = self._open()
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): mend that, start the same command again"
            ) from error
        scalars = {
            name: value
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for sink in self._sinks:
            self._send(sink, row["step"], scalars)
        return row

    def _open(self) -> TextIO:
        """Return the open file. If somebody deleted it, it is created again, since lines would be lost otherwise."""
        if self._stream is not None:
            try:
                there = os.path.samestat(os.fstat(self._stream.fileno()), self.path.stat())
            except FileNotFoundError:
                there = False
            if not there:
                get_logger(__name__).warning(
                    "%s was removed or replaced while the run writes it; going on in a new one", self.path
                )
                self._close_file()
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("a", encoding="utf-8")
        return self._stream

    def _send(self, sink: Sink, step: int, scalars: Mapping[str, float]) -> None:
        """Write to a service. An error there (a full disk, a server that is gone) is logged once, and the service is
        dropped.
        """
        try:
            sink.write(step, scalars)
        except Exception as error:
            self._sinks = [one for one in self._sinks if one is not sink]
            get_logger(__name__).warning(
                "%s gets no more numbers of this run: %s: %s; metrics.jsonl has every line",
                type(sink).__name__, type(error).__name__, error,
            )  # fmt: skip

    def close(self) -> None:
        """Close the file and the sinks; a later ``write`` opens them again."""
        self._close_file()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                get_logger(__name__).warning("%s: %s: %s", type(sink).__name__, type(error).__name__, error)

    def _close_file(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with suppress(OSError):  # on a full disk the write before has raised already
                stream.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _has_nonfinite(value: Any) -> bool:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(_has_nonfinite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_has_nonfinite(item) for item in value)
    return False


# Dense BF16 TFLOP/s of GPUs from their data sheets, by parts of the name that torch gives (H200 = H100 SXM, see
# numerics.md).
_PEAK_BF16_TFLOPS = {"GB200": 2500.0, "B200": 2250.0, "GH200": 989.0, "H200 NVL": 835.0, "H200": 989.0,
                     "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10G": 70.0,
                     "A10": 125.0}  # fmt: skip


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device of this name in ``precision``; None if it is unknown."""
    if precision != "bf16":
        return None
    found = (peak for name, peak in _PEAK_BF16_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    return next((1e12 * peak for peak in found), None)


class Throughput:
    """Rates since the last ``take``: useful tokens per second of working time.

    Useful tokens are those of documents; padding counts only in ``fill``. Time inside ``paused()`` (validation, saving)
    is left out. The rates are global if the sums that are added are global.
    """

    def __init__(
        self,
        *,
        flops_of: Callable[[int, float], float] | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``flops_of(tokens, sum_squared_lengths)`` gives model FLOPs (``model/arithmetic.py``); ``peak_flops`` (all
        devices, FLOP/s) gives ``mfu``.
        """
        self._flops_of = flops_of
        self._peak_flops = peak_flops
        self._clock = clock
        self.total_tokens = 0
        self._reset()

    def flops(self, tokens: int, sum_squared_lengths: float) -> float:
        """Return the model FLOPs of so many tokens by ``flops_of``; 0 where there is no formula."""
        return 0.0 if self._flops_of is None else self._flops_of(tokens, sum_squared_lengths)

    def _reset(self) -> None:
        self._since = self._clock()
        self._paused_sec = 0.0
        self._steps = 0
        self._tokens = 0
        self._target_tokens = 0
        self._slots = 0
        self._squares = 0.0

    def add(
        self,
        useful_tokens: int,
        *,
        target_tokens: int = 0,
        slot_tokens: int = 0,
        sum_squared_lengths: float = 0.0,
        steps: int = 1,
    ) -> None:
        """Add the counts of ``steps`` steps. ``slot_tokens`` is the capacity of the rows, padding included."""
        self._steps += steps
        self._tokens += useful_tokens
        self._target_tokens += target_tokens
        self._slots += slot_tokens
        self._squares += sum_squared_lengths
        self.total_tokens += useful_tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the ``with`` from the rates."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_sec += self._clock() - start

    def take(self) -> dict[str, float]:
        """Return the rates since the last call, and reset them.

        Keys: ``tokens`` (useful, since the start), ``tokens_per_sec``, ``target_tokens_per_sec``, ``step_sec``;
        ``fill`` if slots were counted; ``flops_per_sec`` and ``mfu`` where they are known.
        """
        seconds = max(self._clock() - self._since - self._paused_sec, 1e-9)
        rates: dict[str, float] = {
            "tokens": self.total_tokens,
            "tokens_per_sec": self._tokens / seconds,
            "target_tokens_per_sec": self._target_tokens / seconds,
            "step_sec": seconds / max(self._steps, 1),
        }
        if self._slots:
            rates["fill"] = self._tokens / self._slots
        if self._flops_of is not None:
            rates["flops_per_sec"] = self._flops_of(self._tokens, self._squares) / seconds
            if self._peak_flops:
                rates["mfu"] = rates["flops_per_sec"] / self._peak_flops
        self._reset()
        return rates
