"""A step of ``steerlm run``, and the run that it is part of.

Owns: what a step is, where its folder is, and which configuration it gets. Does not own: which steps there are
(``pipeline_steps.py``, ``ablation_steps.py``), what they do (``step_work.py``), running them and skipping complete ones
(``pipeline.py``). Invariants: all properties of a step are in its :class:`Step`; a step reads nothing of another step
but its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm_megatron.config import compose
from steerlm_megatron.config.commands import affects_result
from steerlm_megatron.config.load import finalize, value_at, with_overrides
from steerlm_megatron.config.schema import KEYS, Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.stages.session import Session

# The kinds of steps. A step's position among these is the number of its folder, so that folders of an earlier run are
# found (a new kind comes last), and that steps of one kind stand beside each other.
KINDS = (
    "data", "base", "train_ap", "annotate", "annotated_data", "sft", "acsft", "bootstrap", "bootstrapped_data",
    "bootstrapped", "evaluate", "report", "steerlm2_samples", "steerlm2_weights", "steerlm2_data", "steerlm2",
)  # fmt: skip


def refuse_unknown(key: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse names in ``key`` that no step has.

    Raises:
        UserError: names that are not ``known``, with the nearest one that is.
    """
    if unknown := sorted(set(names) - set(known)):
        meant = compose.nearest(unknown[0], known)
        raise UserError(f"{key}: {' '.join(unknown)} unknown; legal: {' '.join(known)}{meant}")


@dataclass
class Run:
    """The state of a ``steerlm run``: configuration, folder and steps, and what is known of the steps so far."""

    config: Config
    here: Session
    steps: Mapping[str, Step]
    keys: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def does(self, step: str) -> bool:
        """Return whether this process does the step; each of several jobs does some (``steps``)."""
        return not self.config.steps or step in self.config.steps

    def folder(self, step: str) -> Path:
        """Return the run folder of a step, such as ``03-train_ap``. The number is that of its kind, so that a step of a
        later round, such as ``08-bootstrap_2``, stands beside that of the first.
        """
        return self.here.folder / f"{KINDS.index(self.steps[step].kind) + 1:02d}-{step}"

    def path(self, step: str, name: str) -> str:
        return str(self.folder(step) / name)


def _no_wiring(run: Run) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Step:
    """One step of ``steerlm run``.

    Attributes:
        name: the name in its folder, and its key in ``pipeline`` for overrides of this step.
        title: a description for its header line.
        after: the steps on whose results it depends.
        body: the work of the step in its session. Collective over the world.
        wiring: inputs from earlier steps, as overrides of the configuration.
        command: the command that the step runs, whose rules hold and whose keys decide the result.
        round: which round of bootstrapping it belongs to.
        kind: one of ``KINDS``: the name of the step that does this in the first round of a run without an ablation.
        variant: in an ablation the name of this kind of step without its seed, such as ``acsft_shuffled``.
        reads: keys on which the result depends beside those that the command reads.
    """

    name: str
    title: str
    after: tuple[str, ...]
    body: Callable[[Run, Session], None]
    wiring: Callable[[Run], dict[str, Any]] = _no_wiring
    command: str = "train_sft"
    round: int = 1
    kind: str = ""
    variant: str = ""
    reads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", self.name)

    @property
    def overridden_by(self) -> tuple[str, ...]:
        """The keys of ``pipeline`` whose overrides hold for this step, the last one first in rank."""
        return tuple(dict.fromkeys(name for name in (self.kind, self.variant, self.name) if name))

    def depends_on(self, config: Config) -> dict[str, Any]:
        """Return the keys of ``config`` whose change runs the step again, with their values."""
        keys = [key for key in KEYS if affects_result(self.command, key) or key in self.reads]
        if config.data.source != "demo" and self.command == "preprocess":
            keys.remove(
                "train.seed"
            )  # only the embedded corpus depends on it; others would be converted again for nothing
        return {key: value_at(config, key) for key in keys}

    def config(self, run: Run) -> Config:
        """Return the run's configuration with the step's inputs from earlier steps, and the overrides of this step.
        Overrides of a step of the first round hold in later rounds too, where those of the later step come on top.
        """
        config = with_overrides(run.config, self.wiring(run))
        try:
            for name in self.overridden_by:
                if overrides := run.config.pipeline.get(name):
                    config = with_overrides(config, overrides)
            config.pipeline, config.steps = {}, []
            config.command = self.command
            config.run_dir, config.overwrite = str(run.folder(self.name)), False
            return finalize(config, run.here.layout.world_size if run.does(self.name) else None)
        except UserError as error:
            lines = str(error).splitlines()
            raise UserError("\n".join(f"pipeline.{self.name}: {line}" for line in lines)) from None
