"""The steps of ``steerlm run`` with ``ablation.rows``: models that differ in one thing each, over several seeds.

Owns: the rows of an ablation, and the steps that each needs. Does not own: what a step does (``step_work.py``), the
table (``ablation_report.py``). Invariants: the corpus and the model that all start from are made once; what rows of one
seed share (a model of attributes, annotated records) is made once per seed; a row depends on no other row but those
that it goes on from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

from steerlm_megatron.config.ablation import ROWS
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages import ablation_report
from steerlm_megatron.stages import step_work as work
from steerlm_megatron.stages.label_controls import partial_labels, shuffled_labels
from steerlm_megatron.stages.pipeline_run import Run, Step
from steerlm_megatron.stages.session import Session
from steerlm_megatron.steer.records import read_records, write_records

_PREDICTED = ("predicted", "bootstrapped", "shuffled", "partial")  # rows with labels of the regression model
JUDGE = "train_ap_judge"


def ablation_steps(config: Config) -> dict[str, Step]:
    """Return the steps by name and in order.

    Raises:
        UserError: no seed, or one given twice.
    """
    asked, seeds = config.ablation.rows, config.ablation.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"ablation.seeds={seeds}: give at least one, each once, none below 0")
    steps = [
        Step("data", "labelled conversations → shards", after=(), body=work.data, command="preprocess"),
        Step("base", "a base model from scratch", after=("data",), wiring=work.base, body=work.training),
    ]
    judge = JUDGE if config.evaluate.judge == "ap" else None
    if judge is not None:
        other = next(number for number in count(1) if number not in seeds)
        steps.append(_Seed(other, config, None).trained_ap(JUDGE, "the judge, of another seed", "regression", JUDGE))
    for seed in seeds:
        steps += _Seed(seed, config, judge).steps([row for row in ROWS if row in asked])
    steps.append(
        Step(
            "report",
            "the table of the ablation",
            after=tuple(step.name for step in steps),
            body=partial(ablation_report.write, rows=rows_of(config), seeds=tuple(seeds)),
            command="report",
        )
    )
    return {step.name: step for step in steps}


def overridable(config: Config) -> list[str]:
    """Return the names that ``pipeline`` may have: of an ablation also those of rows that it leaves out, so that one
    configuration fits any choice of rows.
    """
    every = replace(config, ablation=replace(config.ablation, rows=list(ROWS)))
    return list(dict.fromkeys(name for step in ablation_steps(every).values() for name in step.overridden_by))


def rows_of(config: Config) -> tuple[str, ...]:
    """Return the rows of the table in its order: a row for each round of bootstrapping (``bootstrapped_2``, …)."""
    rows: list[str] = []
    for row in ROWS:
        if row in config.ablation.rows:
            later = range(2, config.bootstrap.rounds + 1) if row == "bootstrapped" else ()
            rows += [row, *(f"{row}_{number}" for number in later)]
    return tuple(rows)


@dataclass
class _Seed:
    """The steps of one seed."""

    seed: int
    config: Config
    judge: str | None

    def named(self, variant: str) -> str:
        return f"{variant}_seed{self.seed}"

    def step(
        self,
        kind: str,
        variant: str,
        title: str,
        after: tuple[str, ...],
        body: Callable[[Run, Session], None],
        wiring: Callable[[Run], dict[str, Any]],
        command: str = "train_sft",
        number: int = 1,
    ) -> Step:
        """Return a step whose name ends with the seed, and which draws by it what is drawn at random."""
        return Step(
            self.named(variant), f"{title} (seed {self.seed})", after, body,
            partial(_seeded, wiring=wiring, seed=self.seed, number=number), command, number, kind, variant,
        )  # fmt: skip

    def steps(self, rows: list[str]) -> list[Step]:
        """Return all steps that the rows need, each after those that it takes something from."""
        found: list[Step] = []
        if any(row in _PREDICTED for row in rows):
            found += self._labels("", "regression")
        if "generative" in rows:
            found += self._labels("generative", "generative")
        if "shuffled" in rows:
            found.append(self._control("shuffled", "labels dealt out again at random"))
        if "partial" in rows:
            found.append(self._control("partial", f"{self.config.ablation.partial:.0%} of the labels"))
        for row in rows:
            found += self._row(row)
        return found

    def trained_ap(self, variant: str, title: str, kind: str, name: str | None = None) -> Step:
        """Return the training of an attribute-prediction model of ``kind``."""
        return Step(
            name or self.named(variant), f"{title} (seed {self.seed})", ("data", "base"), work.training,
            partial(_seeded, wiring=partial(_ap_of_kind, ap=kind), seed=self.seed), "train_ap", kind="train_ap",
            variant=variant,
        )  # fmt: skip

    def _labels(self, end: str, kind: str) -> list[Step]:
        """Return the steps that train a model of attributes of ``kind``, measure it, and label the corpus by it."""
        ap, annotated, shards, measured = (
            f"{name}_{end}" if end else name for name in ("train_ap", "annotate", "annotated_data", "evaluate_ap")
        )
        trained, written = self.named(ap), self.named(annotated)
        return [
            self.trained_ap(ap, f"attribute-prediction model, {kind}", kind),
            self.step(
                "evaluate", measured, f"attribute prediction, {kind}", ("data", trained), work.evaluation,
                partial(_only_ap, ap=trained), "evaluate",
            ),
            self.step(
                "annotate", annotated, f"score every response, {kind}", ("data", trained), work.annotation,
                partial(work.annotating, ap=trained), "annotate",
            ),
            self._data(shards, f"conversations with labels of the {kind} model → shards", written,
                       partial(work.annotated_data, annotated=written)),
        ]  # fmt: skip

    def _control(self, row: str, title: str) -> Step:
        annotated = self.named("annotate")
        body = partial(_controlled_data, annotated=annotated, row=row, seed=self.seed)
        reads = ("ablation.partial",) if row == "partial" else ()
        return self._data(f"annotated_data_{row}", f"{title} → shards", annotated, body, reads)

    def _data(
        self, variant: str, title: str, after: str, body: Callable[[Run, Session], None], reads: tuple[str, ...] = ()
    ) -> Step:
        return Step(
            self.named(variant), f"{title} (seed {self.seed})", ("data", after), body, command="preprocess",
            kind="annotated_data", variant=variant, reads=reads,
        )  # fmt: skip

    def _row(self, row: str) -> list[Step]:
        """Return the training and the evaluation of a row's model, of each round where it has several."""
        if row == "bootstrapped":
            rounds = range(1, self.config.bootstrap.rounds + 1)
            return [step for number in rounds for step in self._round(number)]
        model = row if row == "sft" else f"acsft_{row}"
        data = {
            "sft": "data", "human": "data", "predicted": self.named("annotated_data"),
        }.get(row) or self.named(f"annotated_data_{row}")  # fmt: skip
        kind, wiring = ("sft", work.sft) if row == "sft" else ("acsft", work.acsft)
        trained = self.step(
            kind, model, TITLES[row], (data, "base"), work.training, partial(wiring, data=data)
        )  # fmt: skip
        return [trained, self._measured(row, trained.name)]

    def _round(self, number: int) -> list[Step]:
        end = f"_{number}" if number > 1 else ""
        words = f", round {number}" if number > 1 else ""
        sampled, shards, trained = (
            self.named(f"{kind}{end}") for kind in ("bootstrap", "bootstrapped_data", "bootstrapped")
        )
        before = self.named("acsft_predicted" if number == 1 else f"bootstrapped{_end(number - 1)}")
        ap, annotated, others = (self.named(name) for name in ("train_ap", "annotate", "annotated_data"))
        first: list[Step] = []
        if number == 1 and "predicted" not in self.config.ablation.rows:
            first = self._row("predicted")[:1]
        sample = self.step(
            "bootstrap", f"bootstrap{end}", f"sample at the best attribute values, score{words}",
            (ap, annotated, before),
            work.sampling,
            partial(work.bootstrapping, step=sampled, model=before, ap=ap, annotated=annotated, number=number),
            "bootstrap", number,
        )  # fmt: skip
        made = Step(
            shards, f"sampled conversations → shards{words} (seed {self.seed})", ("data", sampled),
            partial(work.bootstrapped_data, sampled=sampled), command="preprocess", round=number,
            kind="bootstrapped_data", variant=f"bootstrapped_data{end}",
        )  # fmt: skip
        train = self.step(
            "bootstrapped", f"bootstrapped{end}", f"attribute-conditioned SFT on sampled responses{words}",
            (shards, others, before), work.training,
            partial(work.bootstrapped, model=before, sampled=shards, annotated=others), number=number,
        )  # fmt: skip
        return [*first, sample, made, train, self._measured(f"bootstrapped{end}", trained)]

    def _measured(self, row: str, model: str) -> Step:
        after = ("data", model) if self.judge is None else ("data", model, self.judge)
        return self.step(
            "evaluate", f"evaluate_{row}", f"measure: {row}", after, partial(work.evaluation, labelled=False),
            partial(_one_model, model=model, judge=self.judge, plain=row == "sft"), "evaluate",
        )  # fmt: skip


def _end(number: int) -> str:
    return f"_{number}" if number > 1 else ""


TITLES: Mapping[str, str] = {
    "sft": "plain SFT",
    "human": "conditioned on human labels",
    "predicted": "conditioned on labels of the attribute-prediction model",
    "bootstrapped": "and bootstrapping",
    "generative": "conditioned on labels of the generative model",
    "shuffled": "conditioned on shuffled labels (control)",
    "partial": "conditioned on a part of the labels",
}


# ---- wiring


def _seeded(run: Run, wiring: Callable[[Run], dict[str, Any]], seed: int, number: int = 1) -> dict[str, Any]:
    """Return a step's inputs with the seed of its training, and that of what it draws: another one in each round."""
    found = wiring(run)
    return found | {
        "train": {**found.get("train", {}), "seed": seed},
        "sampling": {**found.get("sampling", {}), "seed": 1000 * seed + number - 1},
    }


def _ap_of_kind(run: Run, ap: str) -> dict[str, Any]:
    found = {**work.train_ap(run), "ap": {"kind": ap}}
    if ap == "generative":  # it has no head, to which these belong
        found |= {"train": {"label_weights": {}}, "optim": {"head_lr": None}}
    return found


def _only_ap(run: Run, ap: str) -> dict[str, Any]:
    return {"ap_checkpoint": str(run.folder(ap))}


def _one_model(run: Run, model: str, judge: str | None, plain: bool) -> dict[str, Any]:
    models = {"sft" if plain else "acsft": str(run.folder(model))}
    return {
        "ap_checkpoint": str(run.folder(judge)) if judge is not None else None,
        "evaluate": {"models": models},
    }


# ---- bodies


def _controlled_data(run: Run, here: Session, annotated: str, row: str, seed: int) -> None:
    """Make shards of annotated records with shuffled labels, or with a part of them."""

    def make() -> None:
        files: dict[str, list[str]] = {}
        for split in work.SPLITS:
            if not work.records_of(run, split):
                continue
            records = list(read_records(run.path(annotated, f"{split}.jsonl")))
            if row == "shuffled":
                records = shuffled_labels(records, seed)
            else:
                records = partial_labels(records, here.config.ablation.partial, seed)
            path = here.folder / "records" / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_records(path, records)
            files[split] = [str(path)]
        work.reshard(run, here, files)

    on_main(make)
