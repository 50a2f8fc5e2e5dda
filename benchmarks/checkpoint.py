"""Measure how long a step waits for a checkpoint that is saved asynchronously, and for one that is saved in place.

    [torchrun --nproc-per-node 2 -m | python -m] benchmarks.checkpoint [--shape 27m] [--rounds 9] [--dir DIR]

Both save the same engine (fp32 weights, AdamW's moments) through the store of a training run, in turns, in DIR, whose
disk is measured. "blocked" is the time in which no step can be made: all of a save in place; the call and the later
commit of an asynchronous save. Before a save in place starts, the asynchronous one has ended, and removals have been
done.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Spread, commit, machine, markdown, ratio
from benchmarks.train_packed import OPTIM, SHAPES
from steerlm_megatron.config.schema import EngineConfig, ParallelConfig
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.model.gpt import build_model
from steerlm_megatron.model.weights import initialize
from steerlm_megatron.runtime import parallel
from steerlm_megatron.runtime.collectives import broadcast_object
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.train.checkpoint import CheckpointStore
from steerlm_megatron.train.engine_mcore import MegatronEngine
from steerlm_megatron.train.meta import CheckpointMeta
from steerlm_megatron.train.objective import TokenObjective
from steerlm_megatron.train.sharded import ShardedWriter, Write


@dataclass
class Times:
    """Seconds of each round: the save in place; the call, the commit and the end of the asynchronous save."""

    in_place: list[float] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)
    committed: list[float] = field(default_factory=list)
    on_disk: list[float] = field(default_factory=list)

    @property
    def blocked(self) -> list[float]:
        return [a + b for a, b in zip(self.begun, self.committed, strict=True)]


def measure(args: argparse.Namespace, root: Path) -> Times:
    """Measure ``args.rounds`` saves of each kind. Collective over the world."""
    config = EngineConfig()
    shape = SHAPES[args.shape]
    model = initialize(build_model(shape, ParallelConfig(), config, args.vocab), shape, args.vocab, seed=1)
    engine = MegatronEngine([model], TokenObjective(), OPTIM, config, steps=10)
    engine.optimizer.step()  # a step creates the moments
    store = CheckpointStore(root, keep_last=1, keep_best=False)
    tokenizer = Tokenizer.from_path("bytes", ())
    writer, found, step = ShardedWriter(), Times(), 0

    def save(background: bool) -> None:
        nonlocal step
        step += 1
        meta = CheckpointMeta(step, "lm", {}, args.vocab, None, {}, "")

        def begin(folder: Path) -> Write:
            live = engine.live_tensors() if background else None
            return writer.begin(engine.checkpoint_state(), folder, live)

        store.save(meta, begin, tokenizer.save, background=background)

    for number in range(-3, args.rounds):  # three rounds are not measured, since they make plans and buffers
        start = time.perf_counter()
        save(background=False)
        in_place = time.perf_counter() - start
        store.wait()
        start = time.perf_counter()
        save(background=True)
        begun = time.perf_counter() - start
        while True:  # poll as the training loop does between steps
            time.sleep(0.01)
            before = time.perf_counter()
            if store.poll():
                break
        end = time.perf_counter()
        store.wait()  # wait for removals in the background
        if number >= 0:
            found.in_place.append(in_place)
            found.begun.append(begun)
            found.committed.append(end - before)
            found.on_disk.append(end - start)
    return found


def report(args: argparse.Namespace, found: Times, size: int) -> str:
    """Return the section of ``checkpoint.md``."""
    ranks = layout().world_size
    rows = [
        ["saved in place", Spread.of(found.in_place).text(3), "1", ""],
        [
            "beside training",
            Spread.of(found.blocked).text(3),
            ratio(found.in_place, found.blocked).text(3),
            Spread.of(found.on_disk).text(2),
        ],
    ]
    header = ["", "a step waits, s (quartiles)", "share of in place", "on disk after, s"]
    return (
        f"### {args.shape}, {ranks} rank{'s' * (ranks > 1)}, {args.vocab:,} tokens\n\n`benchmarks.checkpoint "
        f"--shape {args.shape} --vocab {args.vocab} --rounds {args.rounds}` at {commit()}; {machine()}; "
        f"{size / 1e6:,.0f} MB a checkpoint.\n\n{markdown(header, rows)}\n\n"
        f"Of the wait beside training: {Spread.of(found.begun).text(3)} s for planning and copies, "
        f"{Spread.of(found.committed).text(3)} s for the commit.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="27m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dir", help="folder on the disk that counts; without it, the temporary folder's")
    parser.add_argument("--output", help="append the report to this file")
    args = parser.parse_args()
    parallel.initialize(ParallelConfig(), seed=0)
    folder = broadcast_object(tempfile.mkdtemp(dir=args.dir) if layout().is_main else "")
    try:
        found = measure(args, Path(folder))
        if layout().is_main:
            (saved,) = Path(folder).glob("step_*")
            text = report(args, found, sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()))
            print(text)
            if args.output:
                with open(args.output, "a", encoding="utf-8") as file:
                    file.write(text + "\n")
    finally:
        if layout().is_main:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
