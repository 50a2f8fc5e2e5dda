"""Ranks are read from torchrun's or SLURM's variables, and a batch script is no rank."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_megatron.errors import UserError
from steerlm_megatron.runtime import launcher

# SLURM 22.05 sets these variables for a job of two nodes; in a step, srun adds others.
_JOB = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "node[1-2]",
}  # fmt: skip
_STEP = _JOB | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
}  # fmt: skip
_TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.fixture
def environment() -> Iterator[Callable[[dict[str, str]], None]]:
    """Yield a function that replaces this process's launcher variables, which are restored after the test."""

    def use(variables: dict[str, str]) -> None:
        for name in [n for n in os.environ if n.startswith(("SLURM_", "MASTER_", "RANK", "WORLD_", "LOCAL_"))]:
            del os.environ[name]
        os.environ.update(variables)

    with mock.patch.dict(os.environ):
        yield use


@pytest.mark.parametrize(
    ("variables", "is_rank", "rank", "world", "local"),
    [
        ({}, False, 0, 1, 0),
        (_JOB, False, 0, 1, 0),  # a batch script
        (_STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False, 0, 1, 0),  # srun -n1 in a larger job
        (_STEP, True, 3, 4, 0),
        (_TORCHRUN, True, 5, 8, 1),
        (_STEP | _TORCHRUN, True, 5, 8, 1),  # torchrun, one per node, under srun
    ],
)
def test_who_this_process_is(
    environment: Any, variables: dict[str, str], is_rank: bool, rank: int, world: int, local: int
) -> None:
    environment(variables)
    assert launcher.is_rank() is is_rank
    assert (launcher.global_rank(), launcher.world_size(), launcher.local_rank()) == (rank, world, local)


def test_a_slurm_step_gets_the_variables_of_torchrun(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(_STEP)
    monkeypatch.setattr(launcher.socket, "getaddrinfo", lambda host, port: [host])
    launcher.set_torch_variables()
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert found == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node1"
    }  # fmt: skip
    assert 1024 < int(os.environ["MASTER_PORT"]) < 32768


@pytest.mark.parametrize("variables", [{}, _JOB, _TORCHRUN])
def test_elsewhere_the_environment_stays_as_it_is(environment: Any, variables: dict[str, str]) -> None:
    environment(variables)
    before = dict(os.environ)
    launcher.set_torch_variables()
    assert dict(os.environ) == before


def test_an_address_and_a_port_that_are_set_are_kept(environment: Any) -> None:
    environment(_STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29501"})
    launcher.set_torch_variables()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "29501")


def test_a_name_that_only_slurm_knows_is_asked_of_slurm(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(_STEP | {"SLURM_STEP_NODELIST": "no-such-host.invalid"})
    said = "NodeName=no-such-host Arch=x86_64\n   NodeAddr=10.2.3.4 NodeHostName=h Version=22.05\n"
    monkeypatch.setattr(
        launcher.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, said, "")
    )
    launcher.set_torch_variables()
    assert os.environ["MASTER_ADDR"] == "10.2.3.4"


def test_a_node_without_an_address_is_an_error_that_says_what_to_set(environment: Any) -> None:
    environment(_STEP | {"SLURM_STEP_NODELIST": "no-such-host.invalid", "PATH": ""})
    with pytest.raises(UserError, match=r"MASTER_ADDR is not set.*'no-such-host.invalid'.*set MASTER_ADDR"):
        launcher.set_torch_variables()


@given(job=st.integers(1, 2**31), step=st.integers(0, 20))
def test_the_ports_of_neighbouring_jobs_and_steps_differ(job: int, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def port(job: int, step: int) -> int:
            patch.setenv("SLURM_JOB_ID", str(job))
            patch.setenv("SLURM_STEP_ID", str(step))
            return launcher.step_port()

        ports = {port(job + more, step) for more in range(20)} | {port(job, step + 1)}
        assert len(ports) == 21
        assert all(1024 < number < 32768 for number in ports)


@given(
    prefix=st.text("abcxyz-", min_size=1).filter(lambda s: not s.startswith("-")),
    numbers=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=3),
    width=st.integers(1, 4),
    more=st.sampled_from(["", ",other", ",x[1-3,7]"]),
)
def test_first_host_of_a_bracketed_list(prefix: str, numbers: list[tuple[int, int]], width: int, more: str) -> None:
    ranges = ",".join(f"{low:0{width}}-{low + span:0{width}}" if span else f"{low:0{width}}" for low, span in numbers)
    assert launcher.first_host(f"{prefix}[{ranges}]{more}") == f"{prefix}{numbers[0][0]:0{width}}"
    assert launcher.first_host(f"{prefix}{more}") == prefix


@given(st.lists(st.integers(1, 16), min_size=1, max_size=12))
def test_tasks_per_node_reads_the_short_form(counts: list[int]) -> None:
    short: list[list[int]] = []
    for count in counts:
        if short and short[-1][0] == count:
            short[-1][1] += 1
        else:
            short.append([count, 1])
    text = ",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in short)
    assert launcher.tasks_per_node(text) == counts


def test_an_agent_of_a_node_is_no_rank(environment: Any) -> None:
    environment(_STEP | {"STEERLM_RANKS_PER_NODE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "7"})
    assert not launcher.is_rank() and launcher.ranks_of_agent() == 8 and launcher.world_size() == 32
    assert launcher.agents() == (4, "a:7", "steerlm-4711-2")
    os.environ.update(_TORCHRUN)  # a rank that an agent started
    assert launcher.is_rank() and launcher.ranks_of_agent() is None and launcher.world_size() == 8
    environment({"STEERLM_RANKS_PER_NODE": "8"})  # outside of a step
    assert launcher.ranks_of_agent() is None and launcher.agents()[:2] == (1, "127.0.0.1:0")
    del os.environ["STEERLM_RANKS_PER_NODE"]


@pytest.mark.parametrize("variables", [_STEP, _TORCHRUN, _STEP | _TORCHRUN, _STEP | {"STEERLM_RANKS_PER_NODE": "8"}])
def test_without_the_variables_of_a_rank_a_process_is_alone(environment: Any, variables: dict[str, str]) -> None:
    environment({name: value for name, value in variables.items() if name not in launcher.OF_A_RANK})
    assert not launcher.is_rank() and launcher.world_size() == 1 and launcher.ranks_of_agent() is None
    launcher.set_torch_variables()
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ


def test_exit_codes_are_left_for_the_jobs_script(
    environment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(_STEP | {"STEERLM_EXITS": str(tmp_path)})
    for code in (None, 0, 75, "text"):
        launcher.note_exit(code)
    assert (tmp_path / "3").read_text() == "75\n1\n"
    os.environ["STEERLM_EXITS"] = str(tmp_path / "gone")
    launcher.note_exit(2)
    assert "No such file" in capsys.readouterr().err
    del os.environ["STEERLM_EXITS"]
    launcher.note_exit(2)
