"""What becomes of a training job that SLURM or a fault interrupts: ``python -m benchmarks.slurm_faults [NAME …]``.

A SLURM is started on this machine (``tests/helpers/slurm.py``: slurmctld and three slurmd). A small model is trained on
two of its nodes, once undisturbed and once for each fault. Every run that comes back has to end with the undisturbed
run's final checkpoint, bit for bit, and the others with a clear reason. ``benchmarks/slurm_faults.md`` has the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from steerlm_megatron.launch import record
from tests.helpers.slurm import Slurm

STEPS = 60
MODEL = (
    "experiment=quickstart", "data.demo_conversations=120", "tokenizer.vocab_size=500", "model.num_layers=2",
    "model.hidden_size=32", "model.ffn_hidden_size=64", "train.row_tokens=512", "train.validate_rows=2",
    "train.log_every_steps=1", f"train.steps={STEPS}", "train.save_every_steps=10", "train.validate_every_steps=1000",
    "train.keep_best=false", "train.global_batch_samples=64", "train.micro_batch_rows=1", "data.output_dir=data",
    "engine.timeout_sec=60",
)  # fmt: skip
CLUSTER = ("cluster=local_slurm", "cluster.nodes=2", "cluster.max_requeues=3")


class Bench:
    """Runs of one SLURM in one folder."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder

    def steerlm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "steerlm_megatron", *arguments], cwd=self.folder, text=True, capture_output=True,
            env={**self.slurm.environment, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}, check=False,
        )  # fmt: skip

    def launch(self, name: str, *more: str) -> str:
        """Submit a training run and return its job."""
        said = self.steerlm("launch", "train_sft", *MODEL, *CLUSTER, *more, f"run_dir={name}")
        assert said.returncode == 0, said.stderr
        return said.stdout.split()[1].rstrip(":")

    def step(self, name: str) -> int:
        """Return the last step in the run's metrics."""
        path = self.folder / name / "metrics.jsonl"
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def until_step(self, name: str, step: int, timeout: float = 400.0) -> None:
        self.slurm.wait(lambda: self.step(name) >= step, timeout, f"{name} is at step {self.step(name)}, not {step}")

    def until_end(self, name: str, timeout: float = 900.0) -> list[dict[str, Any]]:
        """Wait until no job of the run is left, and return its history."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def over() -> bool:
            jobs = {event["job"] for event in self.history(name)}
            jobs |= {job.job for job in record.submitted(self.folder / name)}
            return all(self.slurm.state(job) in ended for job in jobs) and self.last(name).get("decision") in (
                "done",
                "stop",
            )

        self.slurm.wait(over, timeout, f"{name} does not end: {self.history(name)}")
        return self.history(name)

    def history(self, name: str) -> list[dict[str, Any]]:
        launch = record.submitted(self.folder / name)[-1].launch
        found = record.history(self.folder / name, "train_sft", launch)
        return next(iter(found.values()), [])

    def starts(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.history(name) if event["event"] == "start"]

    def until_start(self, name: str, attempt: int) -> None:
        """Wait until the ranks of an attempt, the first being 1, are there."""
        self.slurm.wait(
            lambda: len(self.starts(name)) == attempt and len(self.ranks(name)) == 2, 900, f"no attempt {attempt}"
        )

    def last(self, name: str) -> dict[str, Any]:
        events = self.history(name)
        return events[-1] if events else {}

    def ranks(self, name: str) -> list[psutil.Process]:
        """Return the processes of the run's ranks on this machine."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            arguments = process.info["cmdline"] or []
            if f"run_dir={self.folder / name}" in arguments and "SLURM_PROCID" in (process.info["environ"] or {}):
                if "python" in Path(arguments[0]).name:
                    found.append(process)
        return found

    def weights(self, name: str, steps: int) -> dict[str, Any]:
        """Return everything in the run's final checkpoint."""
        checkpoint = self.folder / name / "checkpoints" / f"step_{steps:08d}"
        with tempfile.TemporaryDirectory() as folder:
            dcp_to_torch_save(checkpoint, f"{folder}/all.pt")
            loaded: dict[str, Any] = torch.load(f"{folder}/all.pt", weights_only=False)
        return loaded


def equal(one: Any, other: Any) -> bool:
    """Return whether two states hold the same bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "getvalue"):  # a stream of bytes
        return bool(one.getvalue() == other.getvalue())
    return bool(one == other)


# ---- faults: each gets a run that is at work, and its job


def requeue(bench: Bench, name: str, job: str) -> None:
    bench.slurm.run("scontrol", "requeue", job)


def time_limit(bench: Bench, name: str, job: str) -> None:
    """Send what SLURM sends some time before a job's limit (a limit has a resolution of a minute)."""
    bench.slurm.run("scancel", "--batch", "--signal=USR1", job)


def cancel_term(bench: Bench, name: str, job: str) -> None:
    bench.slurm.run("scancel", "--signal=TERM", job)


def kill_rank(bench: Bench, name: str, job: str) -> None:
    bench.ranks(name)[-1].send_signal(signal.SIGKILL)


def kill_slurmd(bench: Bench, name: str, job: str) -> None:
    """Kill the second node's slurmd and, as its power would, all that the node ran."""
    nodes = bench.slurm.run("scontrol", "show", "hostnames", bench.history(name)[-1]["nodes"]).split()
    bench.slurm.kill_node(nodes[-1])
    for process in psutil.process_iter(["environ"]):
        environment = process.info["environ"] or {}
        if environment.get("SLURM_JOB_ID") == job and environment.get("SLURMD_NODENAME") == nodes[-1]:
            process.kill()


def kill_slurmd_alone(bench: Bench, name: str, job: str) -> None:
    """Kill the first node's slurmd, which has the batch script. What it started goes on; SLURM takes it for lost."""
    nodes = bench.slurm.run("scontrol", "show", "hostnames", bench.history(name)[-1]["nodes"]).split()
    bench.slurm.kill_node(nodes[0])


def preempt(bench: Bench, name: str, job: str) -> None:
    bench.slurm.run("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")


FAULTS: dict[str, tuple[Callable[[Bench, str, str], None], tuple[str, ...]]] = {
    "requeue": (requeue, ()),
    "usr1": (time_limit, ()),
    "term": (cancel_term, ()),
    "kill_rank": (kill_rank, ()),
    "kill_slurmd": (kill_slurmd, ()),
    # The ranks go on until SLURM takes the node for lost: 60 steps were over before, on a fast machine.
    "kill_slurmd_of_the_batch_script": (kill_slurmd_alone, ("train.steps=1200", "train.save_every_steps=400")),
    "preempted": (preempt, ()),
    "dependent": (time_limit, ("cluster.requeue=dependent",)),
    "torchrun": (time_limit, ("cluster.starter=torchrun",)),
    "torchrun_kill_rank": (kill_rank, ("cluster.starter=torchrun",)),
}


def events_in_words(events: list[dict[str, Any]]) -> str:
    words = []
    for event in events:
        if event["event"] == "start":
            words.append(f"start on {event['nodes']}")
        elif event["event"] == "lost":
            words.append("lost")
        else:
            why = f" ({event['reason']})" if event["reason"] else ""
            words.append(f"exit {event['code']} → {event['decision']}{why}")
    return "; ".join(words)


def comes_back(bench: Bench, name: str, reference: dict[str, Any]) -> str:
    fault, more = FAULTS[name]
    start = time.monotonic()
    steps = next((int(one.partition("=")[2]) for one in more if one.startswith("train.steps=")), STEPS)
    if steps != STEPS:
        bench.launch(f"{name}_undisturbed", *more)
        bench.until_end(f"{name}_undisturbed")
        reference = bench.weights(f"{name}_undisturbed", steps)
    job = bench.launch(name, *more)
    bench.until_step(name, 15)
    at = bench.step(name)
    fault(bench, name, job)
    events = bench.until_end(name)
    for node in bench.slurm.nodes:
        if node not in bench.slurm.processes:
            bench.slurm.start_node(node)
    same = equal(bench.weights(name, steps), reference)
    rows = [json.loads(line) for line in (bench.folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1)), "steps"
    assert same, f"{name}: another checkpoint"
    assert len([event for event in events if event["event"] == "start"]) > 1, f"{name} was not disturbed: {events}"
    return f"| {name} | {at} | {events_in_words(events)} | same bits | {time.monotonic() - start:.0f} s |"


def input_error(bench: Bench) -> list[str]:
    """A job whose ranks end with exit code 2."""
    bench.launch("input_error", "data.train=nowhere")
    events = bench.until_end("input_error")
    assert [event["event"] for event in events] == ["start", "end"] and events[-1]["code"] == 2, events
    return [f"| input error (exit 2) | {events_in_words(events)} |"]


def too_often(bench: Bench) -> list[str]:
    """A job that is stopped more often than ``cluster.max_requeues`` allows."""
    job = bench.launch("too_often", "cluster.max_requeues=1")
    for attempt in (1, 2):
        bench.until_start("too_often", attempt)
        bench.until_step("too_often", bench.step("too_often") + 5)
        cancel_term(bench, "too_often", job)
    events = bench.until_end("too_often")
    assert "max_requeues=1 is reached" in events[-1]["reason"], events
    return [f"| max_requeues=1, stopped twice | {events_in_words(events)} |"]


def same_fault(bench: Bench) -> list[str]:
    """A rank is killed twice without a new checkpoint in between."""
    bench.launch("same_fault", "train.save_every_steps=1000")
    for attempt in (1, 2):
        bench.until_start("same_fault", attempt)
        kill_rank(bench, "same_fault", "")
    events = bench.until_end("same_fault")
    assert "second fault" in events[-1]["reason"], events
    return [f"| the same fault twice | {events_in_words(events)} |"]


def cancelled(bench: Bench) -> list[str]:
    """A job that its user ends."""
    job = bench.launch("cancelled")
    bench.until_step("cancelled", 10)
    said = bench.steerlm("cancel", "cancelled")
    assert said.returncode == 0, said.stderr
    events = bench.until_end("cancelled")
    assert events[-1]["decision"] != "requeue" and bench.slurm.state(job) == "CANCELLED", events
    return [f"| steerlm cancel | {events_in_words(events)} |"]


def chain(bench: Bench) -> list[str]:
    """All steps as a chain of jobs, with arrays and servers, against one process: records and report."""
    run = (
        "run", *(one for one in MODEL if not one.startswith(("train.save", "train.steps", "data.output_dir"))),
        "train.steps=3", "sampling.max_tokens=24", "bootstrap.prompts=24", "evaluate.max_prompts=4",
        "evaluate.levels=[0,4]", "evaluate.examples=1",
    )  # fmt: skip
    start = time.monotonic()
    said = bench.steerlm("launch", *run, "cluster=local_slurm", "cluster.nodes=2", "cluster.array=2",
                         "cluster.servers=2", "cluster.steps.sft.nodes=1", "run_dir=chain")  # fmt: skip
    assert said.returncode == 0, said.stderr
    alone = bench.steerlm(*run, "run_dir=chain_alone")
    assert alone.returncode == 0, alone.stderr
    jobs = record.submitted(bench.folder / "chain")
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    bench.slurm.wait(
        lambda: all(set(bench.slurm.state(job.job).split()) <= set(ended) for job in jobs),
        1800,
        "the chain does not end",
    )
    print(bench.steerlm("status", "chain").stdout, flush=True)
    rows = []
    for name in ("04-annotate/train.jsonl", "04-annotate/valid.jsonl", "08-bootstrap/bootstrap.jsonl"):
        one, other = ((bench.folder / run_dir / name).read_bytes() for run_dir in ("chain", "chain_alone"))
        rows.append(f"| {name} | {len(one.splitlines())} records | {'same bytes' if one == other else 'OTHER bytes'} |")
    reports = [json.loads((bench.folder / d / "12-report/report.json").read_text()) for d in ("chain", "chain_alone")]
    for report in reports:  # what the run did is another account of a chain of jobs; what was measured is not
        for section in OF_THE_RUN:
            report.pop(section, None)
    places = [set(numbers(report)) for report in reports]
    rows += [f"| report.json {'.'.join(map(str, keys))} | in one of both | |" for keys in places[0] ^ places[1]]
    both = sorted(places[0] & places[1], key=str)
    for keys in both:
        here, there = (at(report, keys) for report in reports)
        if not math.isclose(here, there, rel_tol=1e-3, abs_tol=1e-3):
            rows.append(f"| report.json {'.'.join(map(str, keys))} | {here:.6g} | {there:.6g} |")
    rows.append(f"| report.json | {len(both)} numbers compared | those that differ by more than 1e-3 are above |")
    rows.append(f"| chain of {len(jobs)} jobs | {time.monotonic() - start:.0f} s | |")
    return rows


def numbers(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where the numbers of nested data are."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(one, (*keys, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield keys


def at(value: Any, keys: tuple[Any, ...]) -> float:
    for key in keys:
        value = value[key]
    return float(value)


OF_THE_RUN = ("lineage", "training", "timings", "cost", "versions", "responses", "command")

ENDS: dict[str, Callable[[Bench], list[str]]] = {
    "input_error": input_error, "too_often": too_often, "same_fault": same_fault, "cancelled": cancelled,
    "chain": chain,
}  # fmt: skip
ALONE = ("kill_slurmd", "kill_slurmd_of_the_batch_script", "preempted")  # these disturb whatever else runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help=f"of {' '.join([*FAULTS, *ENDS])}; none: all")
    parser.add_argument("--at-once", type=int, default=1, help="runs at once, but for those that disturb others")
    arguments = parser.parse_args()
    names = arguments.names or [*FAULTS, *ENDS]
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        slurm = Slurm(Path(folder) / "s", nodes=3).start()
        try:
            bench = Bench(slurm, Path(folder))
            reference: dict[str, Any] = {}
            if set(names) & set(FAULTS):
                bench.launch("undisturbed")
                events = bench.until_end("undisturbed")
                assert events[-1]["code"] == 0, events
                reference = bench.weights("undisturbed", STEPS)

            def one(name: str) -> None:
                try:
                    said = comes_back(bench, name, reference) if name in FAULTS else "\n".join(ENDS[name](bench))
                    print(said, flush=True)
                except AssertionError as error:
                    print(f"FAILED {name}: {error}", flush=True)
                    for log in (bench.folder / name / "launch").glob("slurm-*.out"):
                        print(log.read_text(), flush=True)

            with ThreadPoolExecutor(arguments.at_once) as pool:
                list(pool.map(one, [name for name in names if name not in ALONE]))
            for name in names:
                if name in ALONE:
                    one(name)
        finally:
            slurm.close()


if __name__ == "__main__":
    main()
