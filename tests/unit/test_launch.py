"""``steerlm launch`` up to SLURM's commands, which small programs stand in for: checks, scripts, chains, the tables."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from steerlm_megatron.errors import UserError
from steerlm_megatron.launch import preflight, record, slurm, status
from tests.helpers.cli import run_here as run

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("train_sft", "experiment=quickstart")
HERE = ("cluster=local_slurm", "cluster.nodes=2", "run_dir=r")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that puts a shell program first on PATH; the test's folder is the working directory. Each call
    of a program is a line of ``calls``.
    """
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def put(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{text}\n')
        path.chmod(0o755)

    return put


@pytest.fixture
def cluster(programs: Callable[[str, str], None], tmp_path: Path) -> Callable[[str, str], None]:
    """Stand in for a SLURM that takes every job, with ids from 1, and knows none."""
    programs("sbatch", f"echo $(grep -c '^sbatch' {tmp_path}/calls)")
    programs("squeue", "")
    programs("scancel", "")
    return programs


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


# ---- launch


def test_a_dry_run_prints_a_script_that_bash_understands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("cluster.partition=gpu", "cluster.starter=torchrun", "cluster.environment.A=b c", "cluster.modules=[cuda]")
    assert run("launch", *TRAIN, *HERE, *more, "data.train=[a b]", "--dry-run") == 0
    text = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --partition=gpu", "#SBATCH --signal=B:USR1@60",
        "#SBATCH --requeue", "module load cuda", "export A='b c'", "STARTER=torchrun", "export GLOO_SOCKET_IFNAME=lo",
    ):  # fmt: skip
        assert f"\n{line}\n" in text, line
    assert "  'data.train=[a b]' \\\n" in text and "cluster" not in text.partition("\nsteerlm_job ")[2]
    assert "source " not in text, "the script is complete by itself"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*TRAIN, "cluster=nowhere"), "cluster=nowhere: no such option; legal: dgx generic local_slurm"),
        ((*TRAIN, "cluster.partitoin=a"), "cluster.partitoin: no such key; did you mean cluster.partition?"),
        ((*TRAIN, "cluster.nodes=0"), "cluster.nodes=0 must be at least 1"),
        ((*TRAIN, "cluster.time=tomorrow"), "cluster.time=tomorrow is no time of SLURM"),
        ((*TRAIN, "cluster.container=pyxis"), "cluster.container=pyxis needs cluster.image"),
        ((*TRAIN, "cluster.array=2"), "train_sft does not split over an array; annotate, generate, bootstrap"),
        ((*TRAIN, "cluster.exclude_bad_nodes=true"), "needs cluster.preflight=true"),
        ((*TRAIN, "parallel.tensor=3"), "parallel.tensor=3 must divide model.num_heads=4"),
        ((*TRAIN, "cluster.gpus_per_node=4", "parallel.data=3"), "4 ranks were started, parallel.* asks for 3"),
        ((*TRAIN, "init_from=nowhere"), "init_from=nowhere: no such folder"),
        (("train_sfd",), "launch train_sfd: no such command; did you mean train_sft?"),
        ((*TRAIN, "cluster=/nowhere/mine.yaml"), "cluster=/nowhere/mine.yaml cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_any_job_exists(
    arguments: tuple[str, ...], said: str, cluster: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("launch", *arguments, "run_dir=r") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "calls").exists() and not (tmp_path / "r").exists()


def test_commands_by_themselves_do_not_take_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TRAIN, "cluster.nodes=2") == 2
    assert "cluster.nodes: train_sft does not read it; launch does" in capsys.readouterr().err


def test_without_sbatch_there_is_one_line(programs: object, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["PATH"] = f"{os.getcwd()}/bin"
    assert run("launch", *TRAIN, *HERE) == 2
    assert capsys.readouterr().err.startswith("steerlm: error: sbatch is not found: launch from a login node")


def test_a_refusal_of_sbatch_names_the_key_and_the_partitions(
    cluster: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = "sbatch: error: invalid partition specified: gpuu\nsbatch: error: Batch job submission failed: Invalid"
    cluster("sbatch", f"echo '{refusal}' >&2; exit 1")
    cluster("sinfo", "echo 'debug* high'")
    assert run("launch", *TRAIN, *HERE, "cluster.partition=gpuu") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "invalid partition specified: gpuu" in line and "cluster.partition=gpuu" in line and "debug high" in line


def test_a_launch_leaves_scripts_code_and_a_list_of_jobs(
    cluster: Callable[[str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("defaults: [local_slurm]\naccount: me\nnodes: 2\n")
    assert run("launch", *TRAIN, f"cluster={own}", "run_dir=r") == 0
    out = capsys.readouterr().out
    assert "job 1: train_sft on 2 nodes x 1 rank" in out and "steerlm cancel r" in out and "slurm-1.out" in out
    (job,) = record.submitted(tmp_path / "r")
    folder = tmp_path / "r" / "launch" / job.launch
    script = (folder / "train_sft.sbatch").read_text()
    assert "#SBATCH --account=me" in script and f"export PYTHONPATH={folder}/code" in script
    for name in ("steerlm_megatron/cli.py", "conf/train_sft.yaml", "data_tools/__init__.py", "launch/slurm/job.sh"):
        assert (folder / "code" / name).is_file(), name
    assert "account: me" in (folder / "config.yaml").read_text()
    cluster("squeue", "echo '1|RUNNING|None|0:01|1:00|n1|steerlm-train_sft'")
    assert run("launch", *TRAIN, f"cluster={own}", "run_dir=r") == 2
    assert "r has jobs: 1 (running); wait for them, or steerlm cancel" in capsys.readouterr().err


def test_a_multirun_is_one_array(cluster: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("launch", *TRAIN, *HERE, "optim.lr=1e-2,1e-3", "train.seed=1,2", "--multirun") == 0
    assert "x 4 tasks" in capsys.readouterr().out
    (job,) = record.submitted(tmp_path / "r")
    arguments = tmp_path / "r" / "launch" / job.launch / "arguments"
    lines = [(arguments / str(i)).read_text().splitlines() for i in range(4)]
    assert [line[1:3] for line in lines] == [
        ["optim.lr=0.01", "train.seed=1"], ["optim.lr=0.01", "train.seed=2"],
        ["optim.lr=0.001", "train.seed=1"], ["optim.lr=0.001", "train.seed=2"],
    ]  # fmt: skip
    assert [line[-1] for line in lines] == [f"run_dir={tmp_path}/r/{i}" for i in range(4)]
    assert "#SBATCH --array=0-3" in (arguments.parent / "train_sft.sbatch").read_text()


def test_a_command_that_shares_records_is_an_array_and_a_job_after_it(cluster: object, tmp_path: Path) -> None:
    arguments = ("annotate", "input=a.jsonl", "output=b.jsonl", "checkpoint=c", *HERE, "cluster.nodes=1")
    assert run("launch", *arguments, "cluster.array=3") == 0
    first, second = [call for call in calls(tmp_path) if call.startswith("sbatch")]
    assert "annotate-array.sbatch" in first and "--dependency=afterok:1" in second
    array, last = record.submitted(tmp_path / "r")
    assert (array.kind, array.tasks, last.after) == ("records", 3, ("1",))


def test_the_steps_are_a_chain(cluster: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("cluster.array=2", "cluster.servers=2", "cluster.steps.acsft.nodes=4", "cluster.steps.annotate.array=3")
    assert run("launch", "run", "experiment=quickstart", *HERE, *sizes) == 0
    jobs = {job.name: job for job in record.submitted(tmp_path / "r")}
    names = {job.job: name for name, job in jobs.items()}
    after = {name: {names[one] for one in job.after} for name, job in jobs.items()}
    assert after["train_ap"] == {"data", "base"} and after["annotate"] == {"data", "train_ap", "annotate-array"}
    assert after["servers"] == {"acsft"} and after["bootstrap"] >= {"bootstrap-array", "acsft"}
    assert after["report"] >= {"evaluate", "bootstrapped"} and after["data"] == set()
    assert {name: job.ranks for name, job in jobs.items() if job.ranks != "1x1"} == {
        "base": "2x1", "train_ap": "2x1", "sft": "2x1", "acsft": "4x1", "bootstrapped": "2x1",
    }  # fmt: skip
    assert (jobs["annotate-array"].tasks, jobs["bootstrap-array"].tasks, jobs["servers"].tasks) == (3, 2, 2)
    folder = tmp_path / "r" / "launch" / jobs["data"].launch
    drawing = (folder / "bootstrap-array.sbatch").read_text()
    assert f"server.folder={folder}/servers" in drawing and "server.count=2" in drawing and "ARRAY=records" in drawing
    assert (folder / "servers" / "clients").read_text().split() == [jobs["bootstrap"].job, jobs["bootstrap-array"].job]
    server = (folder / "servers.sbatch").read_text()
    assert "checkpoint=" + str(tmp_path / "r" / "07-acsft") in server and "--signal" not in server.partition("# ---")[0]
    two = ("steps=[train_ap,acsft]", "cluster.steps.acsft.nodse=4", "pipeline.train_ap.parallel.data=3")
    assert run("launch", "run", "experiment=quickstart", *HERE, *two) == 2
    said = capsys.readouterr().err
    assert "nodse" in said and "pipeline.train_ap: 2 ranks were started" in said, "all problems are said at once"
    assert run("launch", "run", "experiment=quickstart", *HERE, "cluster.steps.other.nodes=1") == 2
    assert "cluster.steps: other unknown; legal: data base" in capsys.readouterr().err


def test_later_rounds_are_jobs_after_the_first(
    cluster: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("cluster.array=2", "cluster.servers=2", "cluster.steps.bootstrap.array=3", "bootstrap.rounds=2",
             "cluster.steps.bootstrapped_2.nodes=4", "cluster.steps.servers_2.memory=9G")  # fmt: skip
    assert run("launch", "run", "experiment=quickstart", *HERE, *sizes) == 0
    jobs = {job.name: job for job in record.submitted(tmp_path / "r")}
    names = {job.job: name for name, job in jobs.items()}
    after = {name: {names[one] for one in job.after} for name, job in jobs.items()}
    assert after["servers"] == {"acsft"} and after["servers_2"] == {"bootstrapped"}
    assert after["bootstrap_2"] >= {"bootstrap_2-array", "bootstrapped"} and after["bootstrapped_2"] >= {"bootstrapped"}
    assert after["evaluate"] >= {"bootstrapped", "bootstrapped_2"} and after["report"] >= {"bootstrap_2", "evaluate"}
    assert (jobs["bootstrap-array"].tasks, jobs["bootstrap_2-array"].tasks) == (3, 3), "as the first round"
    assert (jobs["bootstrapped"].ranks, jobs["bootstrapped_2"].ranks) == ("2x1", "4x1")
    folder = tmp_path / "r" / "launch" / jobs["data"].launch
    drawing, server = (folder / "bootstrap_2-array.sbatch").read_text(), (folder / "servers_2.sbatch").read_text()
    assert f"server.folder={folder}/servers_2" in drawing and "steps=[bootstrap_2]" in drawing
    assert "checkpoint=" + str(tmp_path / "r" / "10-bootstrapped") in server and "#SBATCH --mem=9G" in server
    assert "#SBATCH --mem" not in (folder / "servers.sbatch").read_text()
    clients = (folder / "servers_2" / "clients").read_text().split()
    assert clients == [jobs["bootstrap_2"].job, jobs["bootstrap_2-array"].job]
    assert run("launch", "run", "experiment=quickstart", *HERE, "cluster.steps.bootstrap_2.nodes=1") == 2
    assert "cluster.steps: bootstrap_2 unknown; legal: data base" in capsys.readouterr().err


# ---- status, cancel, logs


@pytest.fixture
def a_run(cluster: Callable[[str, str], None], tmp_path: Path) -> Path:
    """Return a run folder of two jobs: one that runs, after a lost attempt, and one that waits."""
    folder = tmp_path / "runs" / "r"
    (folder / "launch" / "history").mkdir(parents=True)
    (folder / "log").mkdir()
    for job, name in (("11", "train_sft"), ("12", "report")):
        record.note(folder / "launch", record.Submitted(job, name, "L", str(folder), "log", "2x8"))
    events = [{"event": "start"}, {"event": "lost", "ran": 5}, {"event": "start"}]
    lines = [json.dumps({**event, "launch": "L", "job": "11", "nodes": "n[1-2]"}) for event in events]
    (folder / "launch" / "history" / "steerlm-train_sft.jsonl").write_text("\n".join(lines) + "\n")
    row = {"step": 40, "loss": 1.25, "tokens_per_sec": 12345.6, "step_sec": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "summary.json").write_text(json.dumps({"status": "running", "plan": {"steps": 100}}))
    cluster(
        "squeue",
        "echo '11|RUNNING|None|1:00|2:00|n[1-2]|steerlm-train_sft'\n"
        "echo '12|PENDING|Dependency|0:00|2:00||steerlm-report'",
    )
    return folder


def test_the_table_of_a_run(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status") == 0
    name, head, *rows = capsys.readouterr().out.splitlines()
    assert name == "runs/r" and head.split() == "job step size state reason at left tok/s loss starts".split()
    assert rows[0].split() == "11 train_sft 2x8 RUNNING n[1-2] 40/100 2:00 12,346 1.25 2".split()
    assert rows[1].split()[:5] == "12 report 2x8 PENDING Dependency".split()
    os.environ["PATH"] = f"{a_run}"  # no SLURM: what the folder knows is shown
    assert run("status", str(a_run)) == 0
    assert "unknown" in capsys.readouterr().out


def test_jobs_are_cancelled_those_that_wait_first(
    a_run: Path, tmp_path: Path, cluster: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("cancel", "runs/r") == 0
    assert calls(tmp_path)[-1] == "scancel 12 11"
    cluster("squeue", "")
    assert run("cancel", "runs/r") == 0
    assert "no job runs or waits" in capsys.readouterr().out


def test_logs_of_jobs_and_ranks(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (a_run / "launch" / "slurm-11.out").write_text("from the job\n")
    (a_run / "log" / "rank_3.log").write_text("from the rank\n")
    assert run("logs", "runs/r") == 0
    assert "from the job" in capsys.readouterr().out
    assert run("logs", "runs/r", "--rank", "3") == 0
    assert "from the rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("logs", "runs/r", "--rank", "9"), "rank 9 has written no log yet"),
        (("logs",), "logs: name one run folder"),
        (("cancel",), "cancel: name the run folder"),
        (("cancel", "nowhere"), "nowhere has no launch/jobs.jsonl"),
        (("status", "--wacth"), "status --wacth: no such option; legal: --watch"),
    ],
)
def test_wrong_names_of_runs(
    a_run: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


def test_without_runs_status_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run folder with jobs below runs"):
        status.status([])
    assert slurm.queue([]) == []


# ---- preflight


def node(name: str, **more: object) -> preflight.Node:
    return replace(preflight.Node(name, versions={"torch": "2"}, clock=100.0), **more)  # type: ignore[arg-type]


def test_the_node_that_differs_is_named() -> None:
    nodes = [node("a"), node("b", versions={"torch": "1"}), node("c", clock=103.0), node("d", problems=["GPU 1: lost"])]
    assert preflight.compared(nodes) == {
        "b": ["torch is 1, and 2 on other nodes"], "c": ["its clock differs by +3.0 s"], "d": ["GPU 1: lost"],
    }  # fmt: skip
    assert preflight.compared([node("a"), node("b")]) == {}


def test_the_node_all_of_whose_links_are_slow_is_named() -> None:
    assert list(preflight.slow_nodes("abcd", {0: 9.0, 1: 1.0, 2: 1.5, 3: 9.0}, 5.0)) == ["c"]
    assert list(preflight.slow_nodes("ab", {0: 1.0}, 5.0)) == ["a", "b"]
    assert preflight.slow_nodes("a", {}, 5.0) == {}


def test_a_file_system_without_locks_or_space_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.file_system_problems(tmp_path, 0.0) == [] and not list(tmp_path.iterdir())
    (space,) = preflight.file_system_problems(tmp_path, 1e9)
    assert "less than cluster.min_free_gb=1e+09" in space

    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (locks,) = preflight.file_system_problems(tmp_path, 0.0)
    assert "flock does not work (Operation not supported); mount it with locks" in locks
    (tmp_path / "file").touch()
    assert "cannot be written" in preflight.file_system_problems(tmp_path / "file" / "x", 0.0)[0]


def test_a_single_process_checks_its_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert preflight.main([str(tmp_path / "bad"), str(tmp_path), "0", "0", "0", str(tmp_path)]) == 0
    assert "1 node fine" in capsys.readouterr().out and time.monotonic() - start < 30
    assert preflight.main([str(tmp_path / "bad"), str(tmp_path), "0", "0", "0", "/nowhere"]) == preflight.FAILED
    assert (tmp_path / "bad").read_text().strip() == preflight.node_name()
    assert "/nowhere cannot be read: No such file or directory" in capsys.readouterr().err
