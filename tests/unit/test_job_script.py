"""The script of a job as SLURM runs it, with stand-ins for its commands: exit codes and signals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from steerlm_megatron.config.cluster import ClusterConfig
from steerlm_megatron.launch import record
from steerlm_megatron.launch.script import Job, launch_files, render, sbatch_lines, variables
from tests.unit.test_launch import ROOT, calls
from tests.unit.test_launch import programs as programs


def a_job(**more: object) -> Job:
    cluster = ClusterConfig(gpus_per_node=8, cpus_per_task=7, memory="0", exclusive=True, nccl={"IB_HCA": "mlx5"})
    job = Job(
        name="x", arguments=("train_sft",), cluster=cluster, launch_dir=Path("/r/launch"), launch_id="1",
        code=Path("/code"), work_dir=Path("/w"), command_line="steerlm launch x", python="python",
    )  # fmt: skip
    return replace(job, **more)  # type: ignore[arg-type]


def test_lines_and_variables_of_a_gpu_cluster() -> None:
    lines = sbatch_lines(a_job())
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=7", "--mem=0", "--exclusive"} <= set(lines)
    assert variables(a_job())["NCCL_IB_HCA"] == "mlx5"
    off = replace(a_job().cluster, requeue="off", sbatch_lines=["--constraint=a"])
    assert {"--no-requeue", "--constraint=a"} <= set(sbatch_lines(a_job(cluster=off)))


RANKS = """case "$*" in *steerlm_megatron*) ;; *) exit 0 ;; esac
n=$(cat tries 2>/dev/null || echo 0); echo $((n + 1)) > tries
[ ! -e checkpoint-$n ] || { mkdir -p r/checkpoints; touch r/checkpoints/$n; }
exit $(sed -n "$((n + 1))p" codes)"""


@pytest.fixture
def job(
    programs: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Return a function that runs a rendered script as SLURM would, again after each requeue, and gives the decisions.
    srun ends with one of ``codes`` after the other.
    """
    programs("srun", RANKS)
    programs("scontrol", f"[ $1 != requeue ] || touch {tmp_path}/requeued; echo JobState=$(cat state)")
    programs("sbatch", "touch requeued; echo 9")
    programs("squeue", "echo '7 afterok:5(unfulfilled)'")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NAME", "steerlm-x")

    def run_job(
        codes: list[int], state: str = "RUNNING", starts: int = 9, unit: str = "x", **settings: object
    ) -> list[str]:
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "state").write_text(state)
        cluster = replace(ClusterConfig(gpus_per_node=0), **settings)  # type: ignore[arg-type]
        arguments = ("train_sft", f"run_dir={tmp_path}/r")
        here = a_job(cluster=cluster, launch_dir=tmp_path / "r" / "launch", arguments=arguments)
        (tmp_path / "script").write_text(render(here))
        for _ in range(starts):
            (tmp_path / "requeued").unlink(missing_ok=True)
            subprocess.run(["bash", "script"], cwd=tmp_path, check=False, capture_output=True, timeout=60)
            if not (tmp_path / "requeued").exists():
                break
        events = record.history(tmp_path / "r", "x", "1")[unit]
        return [f"{event['code']} {event['decision']}: {event['reason']}" for event in events if "decision" in event]

    return run_job


@pytest.mark.parametrize(
    ("codes", "settings", "decisions"),
    [
        ([0], {}, ["0 done: "]),
        ([2], {}, ["2 stop: an input error is not requeued"]),
        ([75, 0], {}, ["75 requeue: saved and stopped", "0 done: "]),
        ([137, 0], {}, ["137 requeue: a fault, exit code 137", "0 done: "]),
        ([1, 1], {}, ["1 requeue: a fault", "1 stop: the second fault without a new checkpoint between them"]),
        ([75, 75], {"max_requeues": 1}, ["75 requeue", "75 stop: saved and stopped; cluster.max_requeues=1 is"]),
        ([75], {"max_requeues": 0}, ["75 stop: saved and stopped; cluster.max_requeues=0 is reached"]),
        ([75], {"requeue": "off"}, ["75 stop: saved and stopped; cluster.requeue=off"]),
        ([75], {"state": "CANCELLED"}, ["75 requeue", "75 stop: the job was cancelled"]),
        ([75], {"state": "COMPLETING Restarts=0"}, ["75 requeue", "75 stop: the job was cancelled"]),
        ([75], {"state": "COMPLETING Restarts=1"}, ["75 requeue: saved and stopped"]),
        ([75, 0], {"state": "COMPLETING Reason=TimeLimit"}, ["75 requeue: saved and stopped", "0 done: "]),
        ([75], {"state": "PENDING"}, ["75 requeue: saved and stopped"]),
        ([75], {"state": "RUNNING Restarts=4"}, ["75 requeue: saved and stopped"]),
    ],
)
def test_what_follows_an_exit_code(
    job: Callable[..., list[str]], codes: list[int], settings: dict[str, object], decisions: list[str]
) -> None:
    found = job(codes, **settings)
    assert len(found) == len(decisions) and all(map(str.startswith, found, decisions)), found


def test_a_fault_after_a_new_checkpoint_is_another_fault(job: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").touch()
    assert [one.split(":")[0] for one in job([1, 1, 0])] == ["1 requeue", "1 requeue", "0 done"]


def test_ranks_that_were_stopped_do_not_hide_a_fault_or_an_input_error(
    job: Callable[..., list[str]], programs: Callable[[str, str], None]
) -> None:
    programs("srun", "echo 75 > $STEERLM_EXITS/0; echo 2 > $STEERLM_EXITS/1; exit 75")
    assert job([]) == ["2 stop: an input error is not requeued"]


def test_an_attempt_that_ends_without_a_word_counts(job: Callable[..., list[str]], tmp_path: Path) -> None:
    history = tmp_path / "r" / "launch" / "history"
    history.mkdir(parents=True)
    entry = {"event": "start", "launch": "1", "job": "5", "attempt": 0, "nodes": "n1"}
    (history / "steerlm-x.jsonl").write_text(json.dumps(entry, separators=(",", ":")) + "\n")
    assert job([0], max_requeues=0) == ["1 stop: cluster.max_requeues=0 is reached"]
    assert "lost" in (history / "steerlm-x.jsonl").read_text()
    ended = entry | {"event": "end", "ran": 5, "code": 75, "decision": "requeue", "reason": ""}
    (history / "steerlm-x.jsonl").write_text(json.dumps(ended, separators=(",", ":")) + "\n")
    assert job([0], max_hours=0.001)[1:] == ["1 stop: cluster.max_hours=0.001 are used up"]


def test_where_requeue_is_off_a_new_job_goes_on_and_those_that_wait_follow(
    job: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert job([75, 0], requeue="dependent")[0] == "75 requeue: saved and stopped"
    said = calls(tmp_path)
    assert any(call.startswith("sbatch --parsable --dependency=afterany:5 ") for call in said)
    assert "scontrol update JobId=7 Dependency=afterok:9" in said


@pytest.mark.parametrize(
    ("others", "waits"),
    [
        ({}, "afterok:4_1,afterok:4_2,afterok:9"),
        ({1: [("end", ',"decision":"done"')]}, "afterok:4_2,afterok:9"),
        (
            {2: [("moved", ""), ("start", "")]},
            "afterok:4_1,afterok:9",
        ),  # it has been put in the place of task 2 already
        ({1: [("end", ',"decision":"stop"')], 2: [("start", "")]}, "afterok:4_1,afterok:4_2,afterok:9"),
    ],
    ids=["all at work", "one is done", "one has moved", "one has failed"],
)
def test_what_waits_for_an_array_waits_for_a_tasks_successor_and_the_other_tasks(
    job: Callable[..., list[str]],
    programs: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    others: dict[int, list[tuple[str, str]]],
    waits: str,
) -> None:
    for name, value in (("JOB_ID", 4), ("TASK_ID", 0), ("TASK_MIN", 0), ("TASK_MAX", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))
    programs("squeue", "echo '7 afterok:4_*(unfulfilled),afterany:3(unfulfilled)'; echo '8 afterok:44_*(unfulfilled)'")
    history = tmp_path / "r" / "launch" / "history"
    history.mkdir(parents=True)
    for task, events in others.items():
        lines = [f'{{"event":"{event}","launch":"1","job":"6"{more}}}\n' for event, more in events]
        (history / f"steerlm-x-{task}.jsonl").write_text("".join(lines))
    assert job([75], starts=1, requeue="dependent", unit="x-0") == ["75 requeue: saved and stopped"]
    said = calls(tmp_path)
    assert any(call.startswith("sbatch --parsable --dependency=afterany:4_0 --array=0 ") for call in said)
    updates = [call for call in said if call.startswith("scontrol update")]
    assert updates == [f"scontrol update JobId=7 Dependency={waits},afterany:3"]
    (events,) = (one for unit, one in record.history(tmp_path / "r", "x", "1").items() if unit == "x-0")
    assert (events[-1]["event"], events[-1]["reason"]) == ("moved", "job 9 goes on")


def test_a_bad_node_is_left_out(
    job: Callable[..., list[str]], programs: Callable[[str, str], None], tmp_path: Path
) -> None:
    programs(
        "srun",
        f'case "$*" in *preflight*) [ -e {tmp_path}/seen ] || {{ touch {tmp_path}/seen; '
        f"echo n2 > {tmp_path}/r/launch/preflight/steerlm-x.bad; exit 3; }} ;; esac; exit 0",
    )
    found = job([], preflight=True, exclude_bad_nodes=True)
    assert found == [
        "3 requeue: the check of the nodes failed: n2; see " + f"{tmp_path}/r/launch/preflight",
        "0 done: ",
    ]
    assert any("sbatch --parsable --dependency=afterany:5 --exclude=n2 " in call for call in calls(tmp_path))


def test_servers_of_an_array_have_a_folder_each_and_end_with_their_job(
    programs: Callable[[str, str], None], tmp_path: Path
) -> None:
    programs("srun", "trap 'echo ended >> ends; exit 0' TERM; for i in {1..100}; do sleep 0.1; done")
    served = tmp_path / "servers"
    served.mkdir()
    here = a_job(
        name="servers", arguments=("serve",), launch_dir=tmp_path / "r" / "launch", serves=served, tasks=2,
        cluster=ClusterConfig(gpus_per_node=0),
    )  # fmt: skip
    (tmp_path / "script").write_text(render(here))
    for task in ("0", "1"):
        environment = {**os.environ, "SLURM_JOB_ID": task, "SLURM_JOB_NAME": "steerlm-servers"}
        environment["SLURM_ARRAY_TASK_ID"] = task
        job = subprocess.Popen(["bash", "script"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not any(f"job-1-{task}" in call for call in (calls(tmp_path) if (tmp_path / "calls").exists() else [])):
            assert time.monotonic() < end, "no server"
            time.sleep(0.05)
        (served / "done").touch()
        assert job.wait(60) == 0
        (served / "done").unlink()
    assert (tmp_path / "ends").read_text().split() == ["ended", "ended"]
    assert all("server.host=0.0.0.0 server.port=0" in call for call in calls(tmp_path) if "serve" in call)


def test_signals_reach_the_ranks(
    job: Callable[..., list[str]], programs: Callable[[str, str], None], tmp_path: Path
) -> None:
    programs("srun", "trap 'exit 75' USR1; kill -USR1 $PPID; for i in {1..100}; do sleep 0.1; done; exit 9")
    assert job([], starts=1) == ["75 requeue: saved and stopped"]
    programs("srun", "kill -USR1 $PPID; sleep 20; exit 9")  # it does not listen yet
    assert job([], starts=1)[1:] == ["75 requeue: saved and stopped"]


def test_a_signal_that_comes_at_once_is_passed_on(tmp_path: Path) -> None:
    """Each command of the shell takes a moment here, so that the signal comes before the next one."""
    source = (ROOT / "launch" / "slurm" / "job.sh").read_text()
    supervise = source[source.index("supervise() {") :].partition("\n}\n")[0] + "\n}\n"
    program = (
        "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: os._exit(75)); "
        "os.kill(os.getppid(), signal.SIGUSR1); time.sleep(20)"
    )
    script = (
        f"say() {{ :; }}; stay_alive() {{ :; }}\n{supervise}set -T; trap 'sleep 0.1' DEBUG\n"
        f"supervise {sys.executable} -c '{program}'\necho $code $stopped\n"
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() in (["75", "USR1"], ["138", "USR1"]), done


def test_the_script_for_one_machine_starts_again(tmp_path: Path, programs: Callable[[str, str], None]) -> None:
    programs("python", RANKS)
    (tmp_path / "codes").write_text("75\n1\n0\n")
    environment = {**os.environ, "PYTHON": "python"}
    done = subprocess.run(
        ["bash", str(launch_files() / "local.sh"), "train_sft", "run_dir=r"],
        env=environment, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("attempt ") == 3 and done.stdout.count("comes back") == 2
