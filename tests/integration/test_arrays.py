"""Jobs that share a command's records, or the steps of a pipeline, give what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerlm_megatron.errors import TryLater
from steerlm_megatron.serve.server import Running
from steerlm_megatron.stages.sampling import find_servers
from steerlm_megatron.stages.serve import announced
from tests.helpers.cli import run_here
from tests.helpers.commands import TINY, summary

pytestmark = pytest.mark.integration
COMMANDS = {
    "annotate": ("checkpoint=run/03-train_ap",),
    "generate": ("checkpoint=run/07-acsft", "sampling.max_tokens=4"),
    "bootstrap": ("checkpoint=run/07-acsft", "ap_checkpoint=run/03-train_ap", "sampling.max_tokens=64",
                  "sampling.temperature=9"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parts_of_an_array_are_the_records_of_one_process(
    command: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").symlink_to(work / "run")
    monkeypatch.chdir(tmp_path)
    records = (work / "run/04-annotate/train.jsonl").read_text().splitlines()[:9]
    Path("some.jsonl").write_text("\n".join(records) + "\n")
    shared = (command, "input=some.jsonl", *COMMANDS[command])
    assert run_here(*shared, "output=one.jsonl", "run_dir=one") == 0
    for task in (1, 0):  # in whatever order
        part = (f"array.task={task}", "array.tasks=2")
        assert run_here(*shared, "output=parts.jsonl", "run_dir=parts", *part) == 0
        assert summary(Path("parts/array") / str(task))["status"] == "complete"
    assert not Path("parts.jsonl").exists()
    entries = [len(part.read_text().splitlines()) for part in sorted(Path("parts").glob("journal-*/part-*.jsonl"))]
    assert entries == [5, 4], "each job does its part"
    monkeypatch.setattr("steerlm_megatron.generate.generator.Generator.generate", None)  # nothing is left to draw
    assert run_here(*shared, "output=parts.jsonl", "run_dir=parts") == 0
    assert Path("parts.jsonl").read_bytes() == Path("one.jsonl").read_bytes()
    assert not list(Path("parts").glob("journal-*"))


def test_each_step_of_the_pipeline_can_be_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ("run", *TINY, "run_dir=r")
    assert run_here(*run, "steps=[data]") == 0
    assert run_here(*run, "steps=[acsft]") == 2
    assert "steps=acsft needs base annotated_data, not complete" in capsys.readouterr().err
    assert run_here(*run, "steps=[base]") == 0
    assert summary(Path("r/02-base"))["status"] == "complete"
    assert sorted(path.name for path in Path("r").iterdir()) == ["01-data", "02-base"], "nobody owns the whole yet"
    assert run_here(*run, "steps=[bsae]") == 2
    assert "steps: bsae unknown; legal: data base" in capsys.readouterr().err
    assert run_here("annotate", "input=a", "output=b", "checkpoint=c", "array.task=2", "array.tasks=2") == 2
    assert "array.task=2 must be below array.tasks=2" in capsys.readouterr().err


def test_servers_are_found_by_the_addresses_that_they_write(tmp_path: Path) -> None:
    from steerlm_megatron.config.schema import ServerConfig

    with pytest.raises(TryLater, match="0 of server.count=1 servers have written"):
        find_servers(tmp_path, 1, timeout_sec=0.0)
    with announced(ServerConfig(folder=str(tmp_path))) as ready:
        ready(Running("http://0.0.0.0:8123", lambda: None))
        (url,) = find_servers(tmp_path, 1)
        assert url.startswith("http://") and url.endswith(":8123") and "0.0.0.0" not in url
    assert not list(tmp_path.iterdir())
    with announced(ServerConfig()) as ready:
        ready(Running("http://127.0.0.1:1", lambda: None))
