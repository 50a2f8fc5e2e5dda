"""TensorBoard, Weights & Biases and MLflow: the real services where they are installed, and our calls to them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from steerlm_megatron.config.schema import TrackingConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.metrics import MetricsWriter, read_metrics
from steerlm_megatron.observe.sinks import sinks_of

CONFIG = {"command": "train_sft", "optim": {"lr": 0.1}}


def write(run_dir: Path, tracking: TrackingConfig, *steps: int, resume: int | None = None) -> None:
    """Log ``steps`` as a new run, or as one that resumes after step ``resume``."""
    with MetricsWriter(run_dir, sinks=sinks_of(tracking, run_dir, CONFIG)) as writer:
        writer.truncate_after(resume or 0)
        for step in steps:
            writer.write(step, loss=step / 10, note="text is left out", ok=True, bad=math.nan)


# ---- TensorBoard


def scalars(run_dir: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    return [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]


def test_tensorboard_gets_the_scalars_and_a_resumed_run_replaces_its_own(tmp_path: Path) -> None:
    write(tmp_path, TrackingConfig(tensorboard=True), 1, 2, 3)
    assert scalars(tmp_path) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    write(tmp_path, TrackingConfig(tensorboard=True), 2, 3, resume=1)
    assert scalars(tmp_path) == [(1, 0.1), (2, 0.2), (3, 0.3)]


# ---- stand-ins, which record our calls


class StandIn:
    """A stand-in for both services; ``calls`` records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.error: type[Exception] = type("Error", (Exception,), {})
        self.down = False

    def init(self, **options: Any) -> Any:
        self.calls.append(("init", options))
        if self.down:
            raise self.error("no API key configured\nmore")
        return SimpleNamespace(
            id=options["id"] or "w1",
            define_metric=lambda name, step_metric: self.calls.append(("axis", (name, step_metric))),
            log=lambda values: self.calls.append(("log", values)),
            finish=lambda: self.calls.append(("finish", None)),
        )

    def client(self, uri: str | None) -> Any:
        self.calls.append(("client", uri))
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        self.calls.append(("experiment", name))
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("run", (experiment, run_name)))
        return SimpleNamespace(info=SimpleNamespace(run_id="m1"))

    def update_run(self, run: str, status: str) -> None:
        self.calls.append(("again", (run, status)))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        if self.down:
            raise self.error("connection refused")
        self.calls.append(("batch", (run, [(m.key, m.value, m.step) for m in metrics], [tuple(p) for p in params])))

    def set_terminated(self, run: str) -> None:
        self.calls.append(("end", run))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    services = StandIn()

    def module(name: str, **contents: Any) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    module("wandb", init=services.init, errors=SimpleNamespace(Error=services.error))
    module("mlflow", MlflowClient=services.client)
    metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)  # noqa: E731
    module("mlflow.entities", Metric=metric, Param=lambda key, value: (key, value))
    module("mlflow.exceptions", MlflowException=services.error)
    yield services


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, stand_in: StandIn) -> None:
    tracking = TrackingConfig(wandb=True, project="p", name="n")
    write(tmp_path, tracking, 1)
    write(tmp_path, tracking, 2, resume=1)
    options = {"project": "p", "name": "n", "dir": str(tmp_path), "config": CONFIG, "resume": "allow"}
    assert stand_in.calls == [
        ("init", {**options, "id": None}), ("axis", ("*", "step")), ("log", {"loss": 0.1, "step": 1}), ("finish", None),
        ("init", {**options, "id": "w1"}), ("axis", ("*", "step")), ("log", {"loss": 0.2, "step": 2}), ("finish", None),
    ]  # fmt: skip


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, stand_in: StandIn) -> None:
    tracking = TrackingConfig(mlflow=True, mlflow_uri="http://x", project="p", name="n")
    write(tmp_path, tracking, 1)
    write(tmp_path, tracking, 2, resume=1)
    assert stand_in.calls == [
        ("client", "http://x"), ("experiment", "p"), ("run", ("7", "n")),
        ("batch", ("m1", [], [("command", "train_sft"), ("optim.lr", "0.1")])),
        ("batch", ("m1", [("loss", 0.1, 1)], [])), ("end", "m1"),
        ("client", "http://x"), ("again", ("m1", "RUNNING")), ("batch", ("m1", [("loss", 0.2, 2)], [])), ("end", "m1"),
    ]  # fmt: skip


def test_a_server_that_goes_away_does_not_end_training(
    tmp_path: Path, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = TrackingConfig(mlflow=True)
    with MetricsWriter(tmp_path, sinks=sinks_of(tracking, tmp_path, CONFIG)) as writer:
        stand_in.down = True
        caplog.set_level("WARNING", logger="steerlm")
        for step in (1, 2):
            writer.write(step, loss=1.0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert len([line for line in caplog.messages if "connection refused" in line]) <= 1


def test_tensorboard_on_a_full_disk_does_not_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MetricsWriter(tmp_path, sinks=sinks_of(TrackingConfig(tensorboard=True), tmp_path, CONFIG)) as writer:
        (tmp_path / "tensorboard").write_text("a file where its folder should be")
        for step in (1, 2):
            writer.write(step, loss=1.0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    (line,) = [line for line in caplog.messages if line.startswith("TensorBoard")]
    assert line.startswith("TensorBoard gets no more numbers of this run: ") and "metrics.jsonl has every line" in line


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_service_that_refuses_is_an_error_before_training(tmp_path: Path, stand_in: StandIn, service: str) -> None:
    stand_in.down = True
    with pytest.raises(UserError, match=rf"tracking\.{service}=true: (no API key configured|connection refused);"):
        sinks_of(TrackingConfig(**{service: True}), tmp_path, CONFIG)


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_missing_package_is_named(tmp_path: Path, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(UserError, match=rf"tracking\.{service}=true needs the package {service}.*\[tracking\]"):
        sinks_of(TrackingConfig(**{service: True}), tmp_path, CONFIG)


# ---- the real ones


def test_real_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (pip install mlflow-skinny)")
    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # MLflow's opt-in for files; sqlite would need the full mlflow package
    uri = (tmp_path / "server").as_uri()
    tracking = TrackingConfig(mlflow=True, mlflow_uri=uri, project="p", name="n")
    write(tmp_path / "run", tracking, 1, 2)
    write(tmp_path / "run", tracking, 3, resume=2)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.data.params == {"command": "train_sft", "optim.lr": "0.1"} and run.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 0.1), (2, 0.2), (3, 0.3)
    ]  # fmt: skip


def test_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracking = TrackingConfig(wandb=True, project="p")
    write(tmp_path, tracking, 1, 2)
    first = json.loads((tmp_path / "tracking.json").read_text())
    write(tmp_path, tracking, 3, resume=2)
    assert json.loads((tmp_path / "tracking.json").read_text()) == first
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and all(first["wandb"] in file.name and file.stat().st_size > 0 for file in files)
