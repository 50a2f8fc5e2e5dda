"""Services that get the metrics besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

Owns: one small class per service, their imports (only when a service is switched on), and the ids by which a resumed
run goes on in the same entry. Does not own: which numbers there are. Invariant: a service that cannot be set up is a
UserError before training starts; one that fails later is logged once and never ends a run, since ``metrics.jsonl`` has
all numbers.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from steerlm_megatron.config.schema import TrackingConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.files import write_json_atomic
from steerlm_megatron.observe.log import get_logger

_IDS = "tracking.json"


class Sink(ABC):
    """A service that gets the scalars of logged steps. The constructor checks its package; the first write opens it."""

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the finite ``values`` of ``step``. Steps do not go back, except after :meth:`resume`."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left. A later write opens the service again."""

    @abstractmethod
    def resume(self, step: int) -> None:
        """Prepare to go on after ``step``: values of later steps are dropped, where the service can do that."""


def sinks_of(tracking: TrackingConfig, run_dir: Path, config: Mapping[str, Any]) -> list[Sink]:
    """Return the services that are switched on. ``config`` is the resolved configuration, which they show beside the
    curves.

    Raises:
        UserError: a package is not installed, or the service refuses.
    """
    sinks: list[Sink] = []
    if tracking.tensorboard:
        sinks.append(TensorBoard(run_dir))
    if tracking.wandb:
        sinks.append(WandB(tracking, run_dir, config))
    if tracking.mlflow:
        sinks.append(MLflow(tracking, run_dir, config))
    return sinks


class TensorBoard(Sink):
    """Event files in ``run_dir/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
        self._class = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer: Any = None
        self._purge_step: int | None = None

    def resume(self, step: int) -> None:
        self._purge_step = step + 1

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._class(str(self._folder), purge_step=self._purge_step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(Sink):
    """A run of Weights & Biases. Offline with ``WANDB_MODE=offline``, to be sent by ``wandb sync`` later."""

    def __init__(self, tracking: TrackingConfig, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._wandb = _import("wandb", "wandb")
        self._ids = _Ids(run_dir)
        self._options = {"project": tracking.project, "name": _name(tracking, run_dir), "dir": str(run_dir)}
        self._config = dict(config)
        self._run: Any = None
        self._open()

    def _open(self) -> None:
        known = self._ids.get("wandb")
        try:
            self._run = self._wandb.init(**self._options, config=self._config, id=known, resume="allow")
        except self._wandb.errors.Error as error:
            raise UserError(
                f"tracking.wandb=true: {_first_line(error)}; wandb login (or WANDB_API_KEY), or WANDB_MODE=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")
        self._ids.put("wandb", self._run.id)

    def resume(self, step: int) -> None:
        """Do nothing: W&B keeps what it has, and later values of the same ``step`` are drawn beside it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is None:
            self._open()
        # W&B's own step only increases, and a resumed run may go back, so the step is logged as a value that is the
        # axis.
        self._run.log({**values, "step": step})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class MLflow(Sink):
    """A run of MLflow, at ``tracking.mlflow_uri`` or where ``MLFLOW_TRACKING_URI`` says."""

    def __init__(self, tracking: TrackingConfig, run_dir: Path, config: Mapping[str, Any]) -> None:
        mlflow = _import("mlflow", "mlflow-skinny")
        self._entities = import_module("mlflow.entities")
        self._error: type[Exception] = import_module("mlflow.exceptions").MlflowException
        try:
            self._client = mlflow.MlflowClient(tracking.mlflow_uri)
            self._id = self._run(tracking, run_dir, config)
        except (self._error, OSError) as error:
            where = tracking.mlflow_uri or "MLFLOW_TRACKING_URI"
            raise UserError(f"tracking.mlflow=true: {_first_line(error)}; is {where} right?") from error
        self._failed = False

    def _run(self, tracking: TrackingConfig, run_dir: Path, config: Mapping[str, Any]) -> str:
        ids = _Ids(run_dir)
        if known := ids.get("mlflow"):
            self._client.update_run(known, status="RUNNING")
            return known
        experiment = self._client.get_experiment_by_name(tracking.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(tracking.project)
        run: str = self._client.create_run(number, run_name=_name(tracking, run_dir)).info.run_id
        params = [self._entities.Param(key, str(value)[:500]) for key, value in _flat(config).items()]
        for start in range(0, len(params), 100):  # a request may carry 100 parameters
            self._client.log_batch(run, params=params[start : start + 100])
        ids.put("mlflow", run)
        return run

    def resume(self, step: int) -> None:
        """Do nothing: MLflow keeps what it has, and shows the last value of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, float(value), now, step) for name, value in values.items()]
        try:
            self._client.log_batch(self._id, metrics=metrics)
        except self._error as error:
            if not self._failed:
                get_logger(__name__).warning("mlflow: %s; metrics.jsonl has every line", _first_line(error))
            self._failed = True

    def close(self) -> None:
        try:
            self._client.set_terminated(self._id)
        except self._error as error:
            get_logger(__name__).warning("mlflow: %s", _first_line(error))


class _Ids:
    """The file ``run_dir/tracking.json`` with the id of this run in each service."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / _IDS

    def _all(self) -> dict[str, str]:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}

    def get(self, service: str) -> str | None:
        return self._all().get(service)

    def put(self, service: str, value: str) -> None:
        write_json_atomic(self._path, {**self._all(), service: value})


def _name(tracking: TrackingConfig, run_dir: Path) -> str:
    return tracking.name or "/".join(run_dir.resolve().parts[-2:])


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        name = package.removesuffix("-skinny")
        raise UserError(
            f"tracking.{name}=true needs the package {package}; pip install 'steerlm_megatron[tracking]' or set "
            f"tracking.{name}=false"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
