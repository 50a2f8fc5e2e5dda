"""Every command in a separate process, on a pipeline small enough to run in seconds."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from steerlm_megatron.config.compose import conf_dir
from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.demo_corpus import DEMO_ATTRIBUTES
from steerlm_megatron.stages.export import check_target
from steerlm_megatron.steer.records import read_records
from tests.helpers.cli import run_here
from tests.helpers.commands import TINY, kill, losses, start, steerlm, summary, terminate

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
pytestmark = pytest.mark.integration
_OF_OTHERS = ("bootstrap.", "evaluate.", "sampling.")  # keys that a training command does not read
ONE_STEP = ("experiment=quickstart", *(a for a in TINY[1:] if not a.startswith(_OF_OTHERS)))


def test_the_pipeline_ends_in_a_report(work: Path) -> None:
    said = (work / "output.txt").read_text()
    assert "step 1/12 data" in said and "step 12/12 report" in said and "report.html" in said
    report = json.loads((work / "run/12-report/report.json").read_text())
    assert set(report["quality"]) == {"sft", "acsft", "bootstrapped"} and set(report["steering"]) == set(report["ap"])
    cost, steps = summary(work / "run")["cost"], report["cost"]["steps"]
    assert list(steps) == list(cost["steps"])[:-1], "the report's own step goes on while the report is written"
    assert all(one["devices"] == 2 and one["device_sec"] > one["work_device_sec"] for one in steps.values())
    assert steps["bootstrap"]["tokens"]["drawn"] > 0 and steps["annotate"]["tokens"]["scored"] > 0
    assert steps["bootstrap"]["latency_sec"]["requests"] == 24 and steps["acsft"]["flops_per_device_sec"] > 0
    assert cost["device_sec"] > sum(one["device_sec"] for one in cost["steps"].values()) and cost["flops"] > 0
    assert not list((work / "run").rglob("cost")), "accounts of ranks are in the summaries"
    html = (work / "run/12-report/report.html").read_text()
    assert "data:image/svg+xml" in html and not re.search(r"""(?:src|href)=["']?https?:""", html)
    assert not list((work / "run").glob("*/journal-*")), "what was drawn and scored is in the steps' outputs"
    assert "Traceback" not in said and said.count("\n") < 150
    command = shlex.split((work / "run/command.txt").read_text().splitlines()[0])
    assert command == ["steerlm", "run", *TINY, "run_dir=run", "parallel.data=2", "run_dir=run"], "to be typed again"


def test_complete_steps_are_skipped_and_changed_ones_run_again(work: Path) -> None:
    checkpoints = {p: p.stat().st_mtime_ns for p in work.glob("run/*/summary.json")}
    again = steerlm("run", *TINY, "run_dir=run", "parallel.data=2", cwd=work)
    assert again.stderr.count("complete, skipped") == 12
    assert all(p.stat().st_mtime_ns == when for p, when in checkpoints.items())
    changed = steerlm("run", *TINY, "run_dir=run", "parallel.data=2", "evaluate.max_prompts=1", cwd=work)
    assert changed.stderr.count("complete, skipped") == 10
    assert json.loads((work / "run/12-report/report.json").read_text())["quality_detail"]["acsft"]["n"] == 1


LAYOUTS = {
    "one": (),
    "four": ("parallel.tensor=2", "parallel.pipeline=2"),
    "rows in two": ("parallel.context=2",),
}


def test_losses_do_not_depend_on_the_layout(work: Path) -> None:
    """The losses are the same, whichever ranks compute them."""
    expected = None
    for name, layout in LAYOUTS.items():
        steerlm("train_sft", *ONE_STEP, "train.steps=6", f"run_dir={name}", *layout, cwd=work)
        found = losses(work / name)
        assert len(found) == 6
        expected = expected or found
        assert found == pytest.approx(expected, abs=1e-4)
        spent = summary(work / name)["timings"]
        assert min(spent[f"{part}_sec"] for part in ("data", "forward_backward", "optimizer", "validation", "save")) > 0


@pytest.mark.parametrize("engine", [(), ("engine=deepspeed", "engine.zero_stage=3", "engine.offload=all")], ids=len)
def test_twenty_steps_are_ten_a_kill_and_ten(engine: tuple[str, ...], tmp_path: Path) -> None:
    """The runs are bitwise equal, with dropout. One process is used, since a launcher would set variables that engines
    read.
    """
    command = (
        "train_sft", *ONE_STEP, *engine, "train.steps=20", "train.save_every_steps=4", "model.dropout=0.1",
        "data.train=data",
    )  # fmt: skip
    steerlm("preprocess", *ONE_STEP[:3], "data.output_dir=data", "data.valid_fraction=0", cwd=tmp_path)
    steerlm(*command, "run_dir=whole", cwd=tmp_path)
    process = start(*command, "run_dir=killed", cwd=tmp_path, launcher=(str(HELPERS / "kill_command.py"), "14"))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, output
    assert summary(tmp_path / "killed")["status"] == "running" and len(losses(tmp_path / "killed")) == 13
    said = steerlm(*command, "run_dir=killed", cwd=tmp_path).stderr
    assert re.search(r"resuming from \S+ at step (4|8|12) of 20", said), said
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 20
    weights = [tmp_path / run / "checkpoints/step_00000020" for run in ("whole", "killed")]
    parts = [{file.name: file.read_bytes() for file in folder.glob("*.distcp")} for folder in weights]
    assert parts[0].keys() == parts[1].keys() and len(parts[0]) > 0
    assert all(parts[0][name] == parts[1][name] for name in parts[0])


def test_plain_sft_trains_on_the_same_labelled_shards(work: Path) -> None:
    steerlm("train_sft", *ONE_STEP, "attributes=none", "run_dir=plain", cwd=work)
    assert summary(work / "plain")["status"] == "complete"


def test_the_embedded_schema_is_the_configured_one() -> None:
    stored = yaml.safe_load((conf_dir() / "attributes" / "demo.yaml").read_text())
    assert stored == {
        "name": DEMO_ATTRIBUTES.name, "names": DEMO_ATTRIBUTES.names, "max_level": DEMO_ATTRIBUTES.max_level,
        "quality": DEMO_ATTRIBUTES.quality, "best": DEMO_ATTRIBUTES.best,
    }  # fmt: skip


def test_a_killed_annotation_goes_on_and_loses_nothing(work: Path) -> None:
    """Annotate resumes after a kill, and never loses or repeats a record."""
    records = work / "many.jsonl"
    lines = (work / "run/01-data/records/train.jsonl").read_text().splitlines()
    with records.open("w") as file:
        for index in range(6000):
            file.write(json.dumps({**json.loads(lines[index % len(lines)]), "id": f"r{index}"}) + "\n")
    common = ("annotate", "checkpoint=run/03-train_ap", "input=many.jsonl", "run_dir=annotate")
    process = start(*common, "output=killed.jsonl", cwd=work, launcher=(str(HELPERS / "hold_command.py"), "0"))
    journal = work / "annotate" / "journal-killed.jsonl"
    try:
        _wait_for(lambda: any(part.stat().st_size for part in journal.glob("part-*")), process)
    finally:
        kill(process)
    part = next(journal.glob("part-*"))
    done = len(part.read_bytes().splitlines())
    assert done == 512 and not (work / "killed.jsonl").exists()
    part.write_bytes(part.read_bytes() + b'{"i": 5')  # a line torn by the kill
    again = steerlm(*common, "output=killed.jsonl", cwd=work)
    assert f"resuming: {done} of 6000" in again.stderr
    steerlm(*common[:-1], "run_dir=whole", "output=whole.jsonl", "parallel.context=2", cwd=work)
    killed, whole = list(read_records(work / "killed.jsonl")), list(read_records(work / "whole.jsonl"))
    assert [r.id for r in killed] == [f"r{i}" for i in range(6000)] == [r.id for r in whole]
    for one, other in zip(killed, whole, strict=True):
        for mine, theirs in zip(one.messages, other.messages, strict=True):
            assert (mine.attributes or {}) == pytest.approx(theirs.attributes or {}, abs=1e-4)


def _drawn(journal: Path) -> dict[int, list[object]]:
    lines = [line for part in journal.glob("part-*") for line in part.read_bytes().splitlines(keepends=True)]
    return {entry["i"]: entry["v"] for entry in map(json.loads, (line for line in lines if line.endswith(b"\n")))}


def test_what_was_drawn_is_not_drawn_again(work: Path) -> None:
    """After kill -9 to two ranks, and SIGTERM to one process, each replica's responses are in the journal for any
    layout.
    """
    prompts = work / "prompts.jsonl"
    with prompts.open("w") as file:
        for index in range(400):
            message = {"role": "user", "content": f"Tell me about {index % 70}."}
            file.write(
                json.dumps({"id": f"p{index // 2}", "messages": [message]}) + "\n"
            )  # ids repeat, so the journal must not use them as keys
    command = ("generate", "checkpoint=run/07-acsft", "input=prompts.jsonl", "output=drawn.jsonl", "run_dir=drawn",
               "sampling.max_tokens=24", "generation.max_batch=8")  # fmt: skip
    journal, held = work / "drawn/journal-drawn.jsonl", (str(HELPERS / "hold_command.py"), "40")
    before: dict[int, list[object]] = {}
    for ranks, stop in ((2, kill), (1, terminate)):
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2") if ranks == 2 else ()
        process = start(*command, f"parallel.data={ranks}", cwd=work, launcher=(*torchrun, *held))
        known = len(before) + 40 * ranks
        try:
            _wait_for(lambda known=known: journal.exists() and len(_drawn(journal)) == known, process)
            stop(process)
        finally:
            kill(process)
        assert before.items() <= _drawn(journal).items(), "what was noted stays"
        before = _drawn(journal)
        assert len(before) == known and not (work / "drawn.jsonl").exists()
        part = next(journal.glob("part-*"))
        part.write_bytes(part.read_bytes() + b'{"i": 5')  # a line torn by the kill
    assert process.returncode == 75
    said = steerlm(*command, "parallel.data=2", cwd=work).stderr
    assert "resuming: 120 of 400 responses" in said
    responses = [json.loads(line) for line in (work / "drawn.jsonl").read_text().splitlines()]
    assert [r["id"] for r in responses] == [f"p{index // 2}" for index in range(400)]
    assert all(responses[index]["messages"][-1]["content"] == values[0] for index, values in before.items())
    assert not journal.exists() and summary(work / "drawn")["counts"] == {
        "in": 400, "out": 400, "skipped": {}, "empty_replies": sum(not r["messages"][-1]["content"] for r in responses)
    }  # fmt: skip


def test_an_export_is_the_model_alone(work: Path) -> None:
    """An export scores like its checkpoint, can start a run, and is never mistaken for a run."""
    (work / "ap.tmp").mkdir()
    (work / "ap.tmp/mine").touch()
    (work / ".ap.steerlm/old").mkdir(parents=True)  # left by an export that was killed
    steerlm("export", "checkpoint=run/03-train_ap", "output=ap", "parallel.tensor=2", cwd=work)
    assert (work / "ap.tmp/mine").exists() and not (work / ".ap.steerlm").exists()
    steerlm("export", "checkpoint=run/07-acsft", "output=lm", "export.precision=bf16", cwd=work)
    checkpoint = next((work / "run/07-acsft/checkpoints").glob("step_*"))

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.distcp"))

    # An export has 2 bytes per parameter, and the checkpoint weights, main weights and two moments of 4 bytes each.
    assert size(work / "lm") < size(checkpoint) / 5

    for name, source in {"of_the_run": "run/03-train_ap", "of_the_export": "ap"}.items():
        steerlm("annotate", f"checkpoint={source}", "input=run/01-data/records/valid.jsonl", f"output={name}.jsonl",
                f"run_dir={name}", cwd=work)  # fmt: skip
    ours, theirs = (list(read_records(work / f"{name}.jsonl")) for name in ("of_the_run", "of_the_export"))
    assert ours == theirs and len(ours) > 0

    steerlm("train_sft", *ONE_STEP, "init_from=lm", "run_dir=from_export", cwd=work)
    assert summary(work / "from_export")["status"] == "complete"
    (work / "resumed/checkpoints").mkdir(parents=True)
    shutil.copytree(work / "lm", work / "resumed/checkpoints/step_00000001")
    refused = steerlm("train_sft", *ONE_STEP, "run_dir=resumed", cwd=work, code=2)
    assert "is an export" in refused.stderr and "init_from=" in refused.stderr

    torn = next((work / "ap").glob("*.distcp"))
    torn.write_bytes(torn.read_bytes()[:-1] + bytes([torn.read_bytes()[-1] ^ 1]))
    said = steerlm("export", "checkpoint=ap", "output=copy", cwd=work, code=2).stderr
    assert "SHA-256 differs" in said and "Traceback" not in said
    assert not (work / "copy").exists()


def test_an_export_replaces_nothing_unasked(tmp_path: Path) -> None:
    source, empty, full = (tmp_path / name for name in ("source", "empty", "full"))
    for folder in (source, empty, full):
        folder.mkdir()
    (source / "meta.json").write_text("{}")
    (full / "thesis.tex").write_text("years of work")
    check_target(tmp_path / "new" / "deep", source, overwrite=False)
    check_target(empty, source, overwrite=False)
    for target, overwrite, words in (
        (source, True, "in the checkpoint itself"),
        (source / "in", True, "in the checkpoint itself"),
        (full, True, "not a checkpoint"),
        (full / "thesis.tex", True, "not a checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            check_target(target, source, overwrite)
    other = shutil.copytree(source, tmp_path / "other")
    with pytest.raises(UserError, match="overwrite=true"):
        check_target(other, source, overwrite=False)
    check_target(other, source, overwrite=True)
    assert (full / "thesis.tex").exists()


def test_generate_answers_every_prompt(work: Path) -> None:
    steerlm(
        "generate", "checkpoint=run/07-acsft", "input=run/01-data/records/prompts.jsonl", "output=answers.jsonl",
        "sampling.max_tokens=4", "parallel.pipeline=2", cwd=work,
    )  # fmt: skip
    prompts = list(read_records(work / "run/01-data/records/prompts.jsonl", require_response=False))
    # An untrained model may answer with nothing.
    answers = list(read_records(work / "answers.jsonl", require_response=False))
    assert [a.id for a in answers] == [p.id for p in prompts]
    assert all(a.messages[-1].role == "assistant" for a in answers)


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",)], ids=["1 rank", "TP2"])
def test_the_openai_client_is_served(work: Path, layout: tuple[str, ...]) -> None:
    """The server answers sixteen concurrent chats with different attribute values, scores them beside, and ends cleanly
    on SIGTERM.
    """
    openai = pytest.importorskip("openai", reason="needs the openai client (pip install -e '.[dev]')")
    models = ("checkpoint=run/10-bootstrapped", "ap_checkpoint=run/03-train_ap")
    server = start("serve", *models, "server.port=0", *layout, cwd=work)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(server.stdout.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        deadline, url = time.monotonic() + 600, None
        while url is None and time.monotonic() < deadline and server.poll() is None:
            url = next((m.group(0) for line in lines if (m := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
            time.sleep(0.1)
        assert url, "".join(lines)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        assert [m.id for m in client.models.list()] == ["steerlm"]

        def chat(index: int) -> str:
            reply = client.chat.completions.create(
                model="steerlm", max_tokens=8, seed=index, messages=[{"role": "user", "content": f"Question {index}?"}],
                # A small top_k, since the rounding of another batch could move a boundary between tokens
                # (docs/numerics.md)
                extra_body={"attributes": {"quality": index % 5, "toxicity": index // 5 % 5}, "top_k": 4},
            )  # fmt: skip
            assert reply.usage.completion_tokens <= 8
            return str(reply.choices[0].message.content)

        def values(_: int) -> dict[str, float]:
            turns = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "An answer."}]
            (one,) = client.post("/score", cast_to=object, body={"messages": turns})["data"]  # type: ignore[index]
            return dict(one["values"][0]["attributes"])

        with ThreadPoolExecutor(16) as pool:
            scored = pool.map(values, range(3))
            together = list(pool.map(chat, range(16)))
        first, *others = scored
        assert set(first) == {"quality", "helpfulness", "verbosity", "humor", "toxicity"} and others == [first, first]
        assert together == [chat(index) for index in range(16)], "a response depends on what else is in the batch"
        with pytest.raises(openai.BadRequestError, match="qualty"):
            client.chat.completions.create(
                model="steerlm", messages=[{"role": "user", "content": "?"}], extra_body={"attributes": {"qualty": 1}}
            )
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0, "".join(lines)
    finally:
        kill(server)
    assert not any("Traceback" in line for line in lines), "".join(lines)


def test_a_server_that_was_stopped_starts_again(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerlm_megatron.serve.server.uvicorn.Server.run", lambda *_, **__: None)
    for _ in range(2):
        arguments = (f"checkpoint={work}/run/07-acsft", "server.port=0", f"run_dir={tmp_path}/served")
        assert run_here("serve", *arguments) == 0
        assert json.loads((tmp_path / "served" / "summary.json").read_text())["status"] == "interrupted"


def test_one_run_works_in_a_folder_and_ranks_end_with_their_launcher(work: Path) -> None:
    """Ranks whose launcher was killed save and stop. Until then no other run may write into the folder."""
    command = ("train_sft", *ONE_STEP, "train.steps=100000", "run_dir=shared", "parallel.data=2")
    launcher = start(*command, cwd=work)
    try:
        _wait_for(lambda: (work / "shared/metrics.jsonl").exists() and len(losses(work / "shared")) > 2, launcher)
        refused = steerlm(
            *command, cwd=work, code=75
        ).stderr  # it has two ranks as well, so that no data is read before the folder is locked
        assert "run_dir=shared is in use by pid" in refused and "Traceback" not in refused
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        launcher.wait()
        _, alive = psutil.wait_procs(ranks, timeout=600)
        assert not alive
        assert summary(work / "shared")["status"] == "interrupted" and list(work.glob("shared/checkpoints/step_*"))
    finally:
        kill(launcher)


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended before that\n{process.communicate()[0]}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("by", ["steerlm", "torchrun"])
def test_a_rank_killed_with_9_is_started_again(by: str, tmp_path: Path) -> None:
    """With ``train.max_restarts`` or torchrun's ``--max-restarts`` all ranks resume from the last checkpoint, and no
    step is lost or repeated in the metrics.
    """
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1")
    process = start(
        "train_sft", *ONE_STEP, "train.steps=200", "train.save_every_steps=20", "train.validate_every_steps=1000",
        f"train.max_restarts={int(by == 'steerlm')}", "parallel.data=2", "run_dir=run", cwd=tmp_path,
        launcher=torchrun if by == "torchrun" else (),
    )  # fmt: skip
    try:
        # The pattern excludes a checkpoint that is being written: step_00000020.tmp has a meta.json, too.
        _wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("step_????????/meta.json")), process)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert ranks and process.poll() is None, "it ended before it was killed"
        ranks[-1].send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=600)
    finally:
        kill(process)
    assert process.returncode == 0, output
    again = "starting all ranks again from the last checkpoint (train.max_restarts: 1 of 1)"
    assert (again in output) == (by == "steerlm") and "resuming from" in output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 201))


def test_a_multirun_starts_ranks_for_each_of_its_jobs(work: Path) -> None:
    steerlm(
        "train_sft", *ONE_STEP, "--multirun", "train.steps=1,2", "parallel.data=2",
        "run_dir=many/${train.steps}", cwd=work,
    )  # fmt: skip
    assert [len(losses(work / "many" / steps)) for steps in "12"] == [1, 2]


def test_another_seed_makes_another_embedded_corpus(work: Path, tmp_path: Path) -> None:
    """The embedded corpus is drawn with train.seed, so the step that makes it must run again."""
    shutil.copytree(work / "run", tmp_path / "run", symlinks=True)
    before = (tmp_path / "run/01-data/records/train.jsonl").read_bytes()
    # Only the first step matters here, so an impossible second step ends the run.
    steerlm("run", *TINY, "run_dir=run", "train.seed=77", "pipeline.base.init_from=nowhere", cwd=tmp_path, code=2)
    assert (tmp_path / "run/01-data/records/train.jsonl").read_bytes() != before
