"""The training loop, the same for attribute prediction, SFT and language modelling, and for every engine.

Owns: cadence (log, validate, save), resuming, stopping on a signal, what goes into ``metrics.jsonl``. Does not own:
mathematics (engine, objective), files (checkpoint, observe), order of data (loader).
Invariant: train 2N steps = train N, stop, resume N.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerlm_megatron.config.schema import TrainConfig
from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.data.feed.loader import StepLoader
from steerlm_megatron.errors import Interrupted
from steerlm_megatron.observe.cost import CostMeter
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.metrics import MetricsWriter, Throughput
from steerlm_megatron.observe.profiler import StepProfiler
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.runtime.collectives import any_rank, gather_objects, sum_over_data_parallel
from steerlm_megatron.runtime.device import peak_memory_gib
from steerlm_megatron.runtime.signals import StopRequest
from steerlm_megatron.runtime.watch import Watch
from steerlm_megatron.train.checkpoint import CheckpointStore
from steerlm_megatron.train.engine import Engine, StepGivenUp, StepResult
from steerlm_megatron.train.meta import CheckpointMeta
from steerlm_megatron.train.sharded import ShardedWriter, Write
from steerlm_megatron.train.stragglers import Stragglers


@dataclass
class TrainResult:
    """How a run ended. ``valid`` is of the last validation, ``best_valid_loss`` of the checkpoint marked best,
    ``seconds`` what this rank spent on each part of this attempt.
    """

    steps: int
    loss: float
    valid: dict[str, float]
    best_valid_loss: float | None
    checkpoint: Path
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One run. Construct on every rank; :meth:`fit` is collective over the world."""

    def __init__(
        self,
        train: TrainConfig,
        engine: Engine,
        loader: StepLoader,
        valid: StepLoader | None,
        store: CheckpointStore,
        meta: CheckpointMeta,
        save_tokenizer: Callable[[Path], None],
        metrics: MetricsWriter,
        steps: int,
        throughput: Throughput,
        profiler: StepProfiler,
        watch: Watch,
        cost: CostMeter | None = None,
        forward_flops: Callable[[int, float], float] | None = None,
    ) -> None:
        """``meta``: template of the metadata of every checkpoint; its ``step`` is where the engine stands already.
        ``cost``: the account of the run; ``forward_flops(tokens, sum_squared_lengths)``: of validation.
        """
        self.cost, self.forward_flops = cost or CostMeter(), forward_flops or (lambda tokens, squares: 0.0)
        self.train, self.engine, self.loader, self.valid = train, engine, loader, valid
        self.store, self.meta, self.save_tokenizer = store, meta, save_tokenizer
        self.metrics, self.steps, self.throughput = metrics, steps, throughput
        self.step = meta.step
        self.position = loader.state()  # of the data, after the last whole step
        throughput.total_tokens = meta.loader.get("tokens", 0)
        self.is_main = engine.layout.is_main
        self.best = store.best_metric()
        self.last_valid: dict[str, float] = {}
        self.last_saved: Path | None = None
        self.counts = [0.0, 0.0, 0.0, 0.0]  # useful, target, slot tokens and Σ s² since the last log line
        self.counted_steps = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)  # of this rank since the last log line, by part
        self.total_seconds: defaultdict[str, float] = defaultdict(float)  # of this attempt
        self.profiler, self.watch = profiler, watch
        self.writer = ShardedWriter()
        self.stragglers = Stragglers(engine.layout)
        self.skipped_steps = self.skipped_in_a_row = 0
        self.stop = StopRequest()  # of no time; fit() has its own
        self.unvalidated = False  # asked to stop within the last validation

    def fit(self) -> TrainResult:
        """Train to ``steps``. Raises Interrupted after saving if a signal or the time limit asked any rank for it."""
        loss = math.nan
        if self.step >= self.steps and self.is_main:  # nothing is left to do: what the summary says was said before
            before = self.metrics.at(self.step)
            loss = math.nan if before.get("loss") is None else before["loss"]
            self.last_valid = {k.removeprefix("valid/"): v for k, v in before.items() if k.startswith("valid/")}
        with StopRequest(self.train.max_minutes) as self.stop:
            with (
                Progress(self.steps, "train", initial=self.step, enabled=self.is_main) as bar,
                self.watch,
                self.cost.work(),
            ):
                if self._validation_was_cut_short():
                    self._validate()
                    self._stop_if_asked()
                while self.step < self.steps:
                    self.watch.beat(self.step + 1, "reading data")
                    waiting, before = time.perf_counter(), self.loader.state()
                    batches = next(self.loader)
                    self.seconds["data"] += time.perf_counter() - waiting
                    self.watch.beat(self.step + 1, "computing")
                    with self.profiler.step(self.step + 1):
                        try:
                            result = self.engine.train_step(batches, self._is_to_stop)
                        except StepGivenUp:
                            self.position = before
                            self._stop_if_asked()
                            raise AssertionError("a step is given up only where the run is to stop") from None
                    self.step += 1
                    self.position = self.loader.state()
                    for part, seconds in result.seconds.items():
                        self.seconds[part] += seconds
                    loss = result.loss
                    self._count(batches)
                    self._count_cost(batches)
                    self._look_at_nonfinite(result, batches)
                    bar.advance(1, **self._after_step(result))
                    self.store.poll()
                    self._stop_if_asked()
            checkpoint = self._finish()  # a signal that comes now is not obeyed: this is what it asks for
        best = self.best if math.isfinite(self.best) else None
        self._add_up_seconds()
        tokens, spent = int(self.throughput.total_tokens), dict(self.total_seconds)
        return TrainResult(self.step, loss, self.last_valid, best, checkpoint, tokens, spent)

    def _is_to_stop(self) -> bool:
        """Whether any rank was asked to. Collective over the world."""
        return any_rank(self.stop.requested)

    def _stop_if_asked(self) -> None:
        """Collective over the world."""
        if not self._is_to_stop() or (self.step == self.steps and not self.unvalidated):
            return
        asked = gather_objects(self.stop.reason)
        rank, reason = next((rank, reason) for rank, reason in enumerate(asked) if reason is not None)
        new = self.step > self.meta.step  # else the checkpoint that this attempt started from, if any, stands
        if new or self.unvalidated:
            self._save_now()
        if self.is_main:  # which may be the one that nobody asked
            where = f" (rank {rank})" if asked.count(None) else ""
            saved = "saved, run again to go on" if new or self.step else "nothing to save yet, run again"
            get_logger(__name__).warning("stopped by %s%s after step %d; %s", reason, where, self.step, saved)
        raise Interrupted

    def _after_step(self, result: StepResult) -> dict[str, Any]:
        """Log, validate and save where it is time. Returns what the progress bar shows."""
        train = self.train
        shown: dict[str, Any] = {"loss": result.loss}
        if self.step % train.log_every_steps == 0 or self.step == self.steps:
            shown |= self._log(result)
        with self.throughput.paused():
            if self._validation_is_due():
                self._validate()
                if not self.unvalidated:
                    shown["valid"] = self.last_valid["loss"]
            if self.step % train.save_every_steps == 0 and self.step < self.steps:
                self._save()
        return shown

    def _validation_is_due(self) -> bool:
        due = self.step % self.train.validate_every_steps == 0 or self.step == self.steps
        return self.valid is not None and due

    def _validation_was_cut_short(self) -> bool:
        """Whether the run was stopped inside the validation of the step that it goes on from. Collective over the
        world.
        """
        if self.step == 0 or not self._validation_is_due():
            return False
        return any_rank(self.is_main and "valid/loss" not in self.metrics.at(self.step))

    def _count(self, batches: Sequence[RowBatch]) -> None:
        self.counted_steps += 1
        for batch in batches:
            self.counts[0] += batch.useful_tokens
            self.counts[1] += batch.target_tokens
            self.counts[2] += batch.row_tokens
            self.counts[3] += batch.squared_tokens

    def _count_cost(self, batches: Sequence[RowBatch]) -> None:
        useful = sum(batch.useful_tokens for batch in batches)
        flops = self.throughput.flops(useful, sum(batch.squared_tokens for batch in batches))
        self.cost.add(flops, trained=useful, padding=sum(batch.row_tokens for batch in batches) - useful)

    def _log(self, result: StepResult) -> dict[str, Any]:
        useful, target, slots, squares = sum_over_data_parallel(self.counts)
        self.counts = [0.0, 0.0, 0.0, 0.0]
        steps, self.counted_steps = max(1, self.counted_steps), 0
        self.throughput.add(
            int(useful), target_tokens=int(target), slot_tokens=int(slots), sum_squared_lengths=squares, steps=steps
        )
        rates = self.throughput.take()
        row = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, **result.metrics, **rates}
        own = self.seconds.pop("own", 0.0)
        row |= {f"sec/{part}": seconds / steps for part, seconds in self.seconds.items()}
        row |= self.stragglers.look(self.step, (own + self.seconds["data"]) / steps, rates["step_sec"])
        row["peak_memory_gib"] = peak_memory_gib()
        self._add_up_seconds()
        row |= {"epoch": self.loader.epoch, "samples": self.loader.consumed_samples}
        if self.is_main:
            self.metrics.write(self.step, row)
        return {"lr": result.lr, "tok/s": rates.get("tokens_per_sec")}

    def _add_up_seconds(self) -> None:
        for part, seconds in self.seconds.items():
            self.total_seconds[part] += seconds
        self.seconds.clear()

    def _look_at_nonfinite(self, result: StepResult, batches: Sequence[RowBatch]) -> None:
        """``train.nonfinite`` for a step that was not applied. Collective over the world if it was not."""
        if not result.skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        by_rank = gather_objects([name for number in result.bad_batches for name in batches[number].sample_ids])
        names = list(dict.fromkeys(name for rank in by_rank for name in rank))
        if not names:  # the losses are finite, the gradients are not: any sample of the step may be the cause
            by_rank = gather_objects([name for batch in batches for name in batch.sample_ids])
            names = list(dict.fromkeys(name for rank in by_rank for name in rank))
        what = (
            f"step {self.step}: loss {result.loss}, gradient norm {result.grad_norm}; nothing was updated. "
            f"Samples: {' '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
        )
        if self.train.nonfinite == "raise":
            self.store.wait()
            raise FloatingPointError(f"{what}. train.nonfinite=skip goes on without such steps")
        if self.skipped_in_a_row > self.train.nonfinite_in_a_row:
            self.store.wait()
            raise FloatingPointError(
                f"{what}. {self.skipped_in_a_row} steps in a row, above train.nonfinite_in_a_row="
                f"{self.train.nonfinite_in_a_row}: this is no single bad sample; the last checkpoint stands"
            )
        if self.is_main:
            get_logger(__name__).warning("%s. Skipped (%d so far)", what, self.skipped_steps)
            self.metrics.write(self.step, {"skipped_steps": self.skipped_steps})

    def _validate(self) -> None:
        """Into ``last_valid``, ``metrics.jsonl`` and, if it is the best, a checkpoint; or, asked to stop meanwhile,
        nothing: ``unvalidated`` tells which. Collective over the world.
        """
        assert self.valid is not None

        def batches(valid: StepLoader) -> Iterator[Sequence[RowBatch]]:
            for number, step in enumerate(valid.eval_batches(self.train.validate_rows), start=1):
                self.watch.beat(self.step, f"validating (batch {number})")
                yield step
                useful = sum(batch.useful_tokens for batch in step)
                flops = self.forward_flops(useful, sum(batch.squared_tokens for batch in step))
                self.cost.add(flops, validated=useful)
                self.unvalidated = any_rank(self.stop.requested)
                if self.unvalidated:
                    return

        self.unvalidated = False
        start = time.perf_counter()
        found = self.engine.evaluate(batches(self.valid))
        self.seconds["validation"] += time.perf_counter() - start
        self.watch.beat(self.step, "validated")
        if self.unvalidated:
            return
        self.last_valid, loss = found, found["loss"]
        if self.is_main:
            self.metrics.write(self.step, {f"valid/{k}": v for k, v in self.last_valid.items()})
        if loss < self.best:
            self.best = loss
            if self.train.keep_best:
                self._save(best=True)

    def _save(self, best: bool = False, background: bool = True) -> Path:
        if self.last_saved is not None and self.last_saved.name == f"step_{self.step:08d}":
            return self.last_saved
        self.watch.beat(self.step, "saving")
        metric = self.last_valid.get("loss")
        tokens = self.throughput.total_tokens + int(sum_over_data_parallel(self.counts)[0])
        loader = {**self.position, "tokens": tokens}
        meta = replace(self.meta, step=self.step, loader=loader, metric=metric)
        start = time.perf_counter()
        background = background and self.train.async_save
        live = self.engine.live_tensors() if background else None

        def begin(folder: Path) -> Write:
            return self.writer.begin(self.engine.checkpoint_state(), folder, live)

        self.last_saved = self.store.save(meta, begin, self.save_tokenizer, best, background)
        self.seconds["save"] += time.perf_counter() - start
        return self.last_saved

    def _save_now(self) -> Path:
        """Save, and come back when it stands."""
        folder = self._save(background=False)
        self.store.wait()
        return folder

    def _finish(self) -> Path:
        if self.last_saved is None and self.step == self.meta.step:  # nothing was left to do
            latest = self.store.latest()
            assert latest is not None
            return latest
        return self._save_now()
