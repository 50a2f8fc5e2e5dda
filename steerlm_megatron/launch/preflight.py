"""The check of a job's nodes before its work (``cluster.preflight``): ``python -m steerlm_megatron.launch.preflight``.

Owns: what is looked at, on which node a fault is. Does not own: when it runs, what follows (``launch/slurm/job.sh``).
Every rank runs it. What a node can tell by itself stands in a file of its own before ranks talk to each other, so that
the node on which nothing starts is named as well. Invariant: exit code 0, or 3 with the bad nodes in the file that the
first argument names, one a line, as far as they are known.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from steerlm_megatron.files import write_json_atomic, write_text_atomic
from steerlm_megatron.observe.runfolder import versions
from steerlm_megatron.runtime import launcher

FAILED = 3
_TIMEOUT_SEC = 60
_CLOCK_SEC = 2.0  # clocks that differ by more confuse SLURM, make and whoever reads logs
_BYTES = 64 << 20  # of the network's measurement
_GPU_FAULTS = (
    "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure",
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What nodes have to have: ``gpus``, GB/s of the network and GB of free space at least, paths that are readable."""

    run_dir: Path
    gpus: int
    min_gbs: float
    min_free_gb: float
    paths: tuple[str, ...] = ()


@dataclass
class Node:
    """What a node says of itself."""

    name: str
    problems: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    clock: float = 0.0


def node_name() -> str:
    """Return the node's name in SLURM, by which it can be excluded; elsewhere the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look(expected: Expected) -> Node:
    """Return what this node is like by itself: devices, file system, versions."""
    problems = [
        *_gpu_problems(expected.gpus),
        *file_system_problems(expected.run_dir, expected.min_free_gb),
        *(f"{path} cannot be read: {why}" for path in expected.paths if (why := _unreadable(Path(path)))),
    ]
    return Node(node_name(), problems, versions() | _driver())


def _gpu_problems(expected: int) -> list[str]:
    """Return what is wrong with the GPUs: too few, errors of their memory, faults that the driver logged."""
    if expected == 0:
        return []
    import torch

    found = torch.cuda.device_count()
    problems = [] if found >= expected else [f"{found} GPUs instead of {expected}"]
    for line in _output("nvidia-smi", f"--query-gpu=index,{','.join(_GPU_FAULTS)}", "--format=csv,noheader,nounits"):
        index, *values = (value.strip() for value in line.split(","))
        for name, value in zip(_GPU_FAULTS, values, strict=False):
            if value not in ("0", "No", "[N/A]", "N/A", "[Not Supported]"):
                problems.append(f"GPU {index}: {name} is {value}")
    xids = [line for line in _output("dmesg") if "NVRM: Xid" in line]  # readable for root, and for all on some systems
    return problems + ([f"the driver logged {len(xids)} Xid faults, the last: {xids[-1].strip()}"] if xids else [])


def _driver() -> dict[str, str]:
    found = {}
    if lines := _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        found["NVIDIA driver"] = lines[0]
        import torch

        if torch.cuda.is_available():
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _output(*command: str) -> list[str]:
    """Return the lines that a program prints; none if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def file_system_problems(folder: Path, min_free_gb: float) -> list[str]:
    """Return what is wrong with a shared folder from here: writing, locks, free space."""
    problems = []
    probe = folder / f".preflight-{node_name()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "w", encoding="ascii") as file, open(probe, encoding="ascii") as other:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    problems.append(f"{folder}: flock does not keep a second process out")
                except BlockingIOError:
                    pass  # as it should be
            except OSError as error:
                problems.append(f"{folder}: flock does not work ({error.strerror}); mount it with locks")
        free = shutil.disk_usage(folder).free / 1e9
        if free < min_free_gb:
            problems.append(f"{folder}: {free:.0f} GB are free, less than cluster.min_free_gb={min_free_gb:g}")
    except OSError as error:
        problems.append(f"{folder} cannot be written: {error.strerror}")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return problems


def _unreadable(path: Path) -> str | None:
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            with open(path, "rb") as file:
                file.read(1)
    except OSError as error:
        return error.strerror
    return None


def compared(nodes: Sequence[Node]) -> dict[str, list[str]]:
    """Return the problems of each node by name: its own, versions that most others lack, a clock that differs."""
    found: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        found[node.name] += node.problems
    for package in sorted({package for node in nodes for package in node.versions}):
        usual = Counter(node.versions.get(package, "absent") for node in nodes).most_common(1)[0][0]
        for node in nodes:
            if (own := node.versions.get(package, "absent")) != usual:
                found[node.name].append(f"{package} is {own}, and {usual} on other nodes")
    middle = statistics.median(node.clock for node in nodes)
    for node in nodes:
        if abs(node.clock - middle) > _CLOCK_SEC:
            found[node.name].append(f"its clock differs by {node.clock - middle:+.1f} s")
    return {name: problems for name, problems in found.items() if problems}


def slow_nodes(names: Sequence[str], links: Mapping[int, float], least: float) -> dict[str, list[str]]:
    """Return the nodes all of whose links are slower than ``least`` GB/s. ``links[i]`` is between node ``i`` and the
    next one, the last being followed by the first.
    """
    count = len(names)
    found = {}
    for i, name in enumerate(names):
        speeds = [links[j] for j in {(i - 1) % count, i} if j in links]
        if speeds and max(speeds) < least:
            found[name] = [f"its links have {max(speeds):.2f} GB/s, less than cluster.min_bandwidth_gbs={least:g}"]
    return found


def main(arguments: Sequence[str]) -> int:
    """Check the nodes and return the exit code. Collective over all ranks of the step."""
    bad_file, run_dir, gpus, min_gbs, min_free_gb, *paths = arguments
    expected = Expected(Path(run_dir), int(gpus), float(min_gbs), float(min_free_gb), tuple(paths))
    os.environ.pop("STEERLM_RANKS_PER_NODE", None)  # here every process of the step is a rank
    rank, world, first_here = launcher.global_rank(), launcher.world_size(), launcher.local_rank() == 0
    # The attempt's own folder, so that files of an attempt before do not count.
    attempt = f"{os.environ.get('SLURM_JOB_ID', 'local')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    folder = Path(bad_file).parent / f"{Path(bad_file).stem}-{attempt}"
    node = look(expected) if first_here else Node(node_name())
    if first_here:
        with contextlib.suppress(OSError):  # a folder that cannot be written is among the node's problems
            write_json_atomic(folder / f"{node.name}.json", asdict(node))
    if world == 1:
        node.clock = time.time()
        return _report(compared([node]), Path(bad_file), [node.name], "")
    import torch.distributed as dist

    from steerlm_megatron.runtime import device

    launcher.set_torch_variables()
    try:
        if device.has_cuda():
            import torch

            torch.cuda.set_device(device.device())
        dist.init_process_group(device.backend(), timeout=timedelta(seconds=_TIMEOUT_SEC))
        dist.barrier()
        node.clock = time.time()
        everybody: list[Any] = [None] * world
        dist.all_gather_object(everybody, (node, first_here))
        nodes = [one for one, is_first in everybody if is_first]
        problems = compared(nodes)
        text, links = measure(world, [i for i, (_, is_first) in enumerate(everybody) if is_first])
        for name, more in slow_nodes([one.name for one in nodes], links, expected.min_gbs).items():
            problems.setdefault(name, []).extend(more)
        code = _report(problems, Path(bad_file), [one.name for one in nodes], text) if rank == 0 else 0
        verdict = [code]
        dist.broadcast_object_list(verdict, src=0)
        dist.destroy_process_group()
        return int(verdict[0])
    except (RuntimeError, ValueError) as error:  # torch's errors of connections, time limits and collectives
        if rank == 0:
            silent = sorted(set(_all_nodes()) - {path.stem for path in folder.glob("*.json")})
            said = {name: ["nothing started there"] for name in silent}
            for path in folder.glob("*.json"):
                if own := json.loads(path.read_text(encoding="utf-8"))["problems"]:
                    said[path.stem] = own
            first = str(error).splitlines()[0]
            _report(said or {"": [f"the ranks cannot talk to each other: {first}"]}, Path(bad_file), [], "")
        return FAILED


def _all_nodes() -> list[str]:
    return _output("scontrol", "show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")) or []


def measure(world: int, firsts: Sequence[int]) -> tuple[str, dict[int, float]]:
    """Return the bandwidths of an all-reduce and an all-to-all in words, and GB/s of each link from a node's first rank
    (``firsts``) to the next node's. Collective over the world.
    """
    import torch
    import torch.distributed as dist

    from steerlm_megatron.runtime import device

    where = device.device()
    data = torch.ones(_BYTES // 4, device=where)

    def seconds(work: Any) -> float:
        work()
        _synchronize()
        dist.barrier()
        start = time.perf_counter()
        work()
        _synchronize()
        return time.perf_counter() - start

    spent = seconds(lambda: dist.all_reduce(data))
    # The bytes that each rank has to send at least, over the time: (n-1)/n of its data twice, and once.
    said = [f"all-reduce {2 * (world - 1) / world * _BYTES / spent / 1e9:.2f} GB/s"]
    parts = data[: len(data) // world * world]
    into = torch.empty_like(parts)
    try:
        spent = seconds(lambda: dist.all_to_all_single(into, parts))
        said.append(f"all-to-all {(world - 1) / world * _BYTES / spent / 1e9:.2f} GB/s")
    except RuntimeError as error:
        said.append(f"all-to-all is not there ({str(error).splitlines()[0]})")
    own: dict[int, float] = {}
    rank = dist.get_rank()
    for link in range(len(firsts) if len(firsts) > 2 else len(firsts) - 1):
        source, target = firsts[link], firsts[(link + 1) % len(firsts)]
        dist.barrier()
        start = time.perf_counter()
        if rank == source:
            dist.send(data, target)
        elif rank == target:
            dist.recv(data, source)
            _synchronize()
            own[link] = _BYTES / (time.perf_counter() - start) / 1e9
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, own)
    return ", ".join(said), {link: speed for one in gathered for link, speed in one.items()}


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _report(problems: Mapping[str, Sequence[str]], bad_file: Path, names: Sequence[str], text: str) -> int:
    """Print what was found, write the names of bad nodes, and return the exit code."""
    for name, found in sorted(problems.items()):
        for problem in found:
            print(f"steerlm: preflight: {name + ': ' if name else ''}{problem}", file=sys.stderr)
    if problems:
        write_text_atomic(bad_file, "".join(f"{name}\n" for name in sorted(problems) if name))
        named = " ".join(sorted(name for name in problems if name))
        print(f"steerlm: preflight: bad nodes: {named or 'not known'}", file=sys.stderr)
        return FAILED
    print(f"steerlm: preflight: {len(names)} node{'s' if len(names) > 1 else ''} fine{f'; {text}' if text else ''}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
