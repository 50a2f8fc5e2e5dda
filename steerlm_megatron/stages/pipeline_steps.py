"""The steps of ``steerlm run`` in their order, and what each takes from earlier ones.

Owns: the steps of a run without an ablation. Does not own: those of an ablation (``ablation_steps.py``), what a step is
(``pipeline_run.py``) and does (``step_work.py``), running them (``pipeline.py``). Invariant: the folders of a run of
one round have the same names in a run of several (``bootstrap.rounds``), whose later rounds stand beside them.
"""

from __future__ import annotations

from functools import cache, partial

from steerlm_megatron.config.schema import Config
from steerlm_megatron.stages import ablation_steps
from steerlm_megatron.stages import step_work as work
from steerlm_megatron.stages.pipeline_run import Step

_FIRST = (
    Step("data", "labelled conversations → shards", after=(), body=work.data, command="preprocess"),
    Step(
        "base",
        "a base model from scratch (language modelling)",
        after=("data",),
        wiring=work.base,
        body=work.training,
    ),
    Step(
        "train_ap",
        "attribute-prediction model",
        after=("data", "base"),
        wiring=work.train_ap,
        body=work.training,
        command="train_ap",
    ),
    Step(
        "annotate",
        "score every response",
        after=("data", "train_ap"),
        wiring=partial(work.annotating, ap="train_ap"),
        body=work.annotation,
        command="annotate",
    ),
    Step(
        "annotated_data",
        "annotated conversations → shards",
        after=("data", "annotate"),
        body=partial(work.annotated_data, annotated="annotate"),
        command="preprocess",
    ),
    Step(
        "sft",
        "plain SFT, the baseline",
        after=("annotated_data", "base"),
        wiring=partial(work.sft, data="annotated_data"),
        body=work.training,
    ),
    Step(
        "acsft",
        "attribute-conditioned SFT",
        after=("annotated_data", "base"),
        wiring=partial(work.acsft, data="annotated_data"),
        body=work.training,
    ),
)


def of_round(kind: str, number: int) -> str:
    """Return the name of a step of round ``number``: ``bootstrap``, ``bootstrap_2``, ``bootstrap_3``, …"""
    return kind if number == 1 else f"{kind}_{number}"


def _round(number: int) -> tuple[Step, ...]:
    """Return the steps of one round of bootstrapping: sample and score, make shards, train."""
    kinds = ("bootstrap", "bootstrapped_data", "bootstrapped")
    sampled, shards, trained = (of_round(kind, number) for kind in kinds)
    words = f" (round {number})" if number > 1 else ""
    before = "acsft" if number == 1 else of_round("bootstrapped", number - 1)  # what a round samples from, and trains
    return (
        Step(
            sampled,
            f"sample at the best attribute values, score{words}",
            after=("annotate", before),
            wiring=partial(
                work.bootstrapping, step=sampled, model=before, ap="train_ap", annotated="annotate", number=number
            ),
            body=work.sampling,
            command="bootstrap",
            round=number,
            kind=kinds[0],
        ),
        Step(
            shards,
            f"sampled conversations → shards{words}",
            after=("data", sampled),
            body=partial(work.bootstrapped_data, sampled=sampled),
            command="preprocess",
            round=number,
            kind=kinds[1],
        ),
        Step(
            trained,
            f"{'second round of attribute-conditioned SFT' if number == 1 else 'attribute-conditioned SFT'}{words}",
            after=(shards, "annotated_data", before),
            wiring=partial(work.bootstrapped, model=before, sampled=shards, annotated="annotated_data"),
            body=work.training,
            round=number,
            kind=kinds[2],
        ),
    )


def _iteration(number: int) -> tuple[Step, ...]:
    """Return the steps of one iteration of SteerLM 2.0: sample and measure, weigh, make shards, train."""
    kinds = ("steerlm2_samples", "steerlm2_weights", "steerlm2_data", "steerlm2")
    sampled, weighed, shards, trained = (of_round(kind, number) for kind in kinds)
    words = f" (iteration {number})" if number > 1 else ""
    before = "acsft" if number == 1 else of_round("steerlm2", number - 1)
    return (
        Step(
            sampled,
            f"SteerLM 2.0: sample several responses to each prompt, score{words}",
            after=("annotate", before),
            wiring=partial(
                work.sampling_groups, step=sampled, model=before, ap="train_ap", annotated="annotate", number=number
            ),
            body=work.sampling,
            command="bootstrap",
            round=number,
            kind=kinds[0],
        ),
        Step(
            weighed,
            f"SteerLM 2.0: weigh the responses{words}",
            after=(sampled, before, "sft"),
            wiring=partial(work.weighing, step=weighed, model=before, base="sft", sampled=sampled),
            body=work.weights,
            command="weigh",
            round=number,
            kind=kinds[1],
        ),
        Step(
            shards,
            f"SteerLM 2.0: weighed responses → shards{words}",
            after=("data", weighed),
            body=partial(work.weighed_data, weighed=weighed),
            command="preprocess",
            round=number,
            kind=kinds[2],
        ),
        Step(
            trained,
            f"SteerLM 2.0: training on weighed responses{words}",
            after=(shards, weighed, before),
            wiring=partial(work.steerlm2, model=before, weighed=weighed, data=shards),
            body=work.training,
            round=number,
            kind=kinds[3],
        ),
    )


def steps_of(config: Config) -> dict[str, Step]:
    """Return the steps of a run by name and in order: those of an ablation where it has rows (``ablation.rows``)."""
    if config.ablation.rows:
        return ablation_steps.ablation_steps(config)
    return _four_steps(config.bootstrap.rounds, config.steerlm2.iterations)


def overridable(config: Config) -> list[str]:
    """Return the names of steps, kinds and rows that ``pipeline`` may have overrides of."""
    if config.ablation.rows:
        return ablation_steps.overridable(config)
    return list(dict.fromkeys(name for step in steps_of(config).values() for name in step.overridden_by))


@cache
def _four_steps(rounds: int, iterations: int) -> dict[str, Step]:
    """Return the four steps of SteerLM, the last of them so many times, with what they need, iterations of SteerLM 2.0,
    and the report.
    """
    trained = tuple(of_round("bootstrapped", number) for number in range(1, rounds + 1))
    trained += tuple(of_round("steerlm2", number) for number in range(1, iterations + 1))
    steps = [*_FIRST, *(step for number in range(1, rounds + 1) for step in _round(number))]
    steps += [step for number in range(1, iterations + 1) for step in _iteration(number)]
    steps.append(
        Step(
            "evaluate",
            "attribute prediction, steering, quality",
            after=("data", "train_ap", "sft", "acsft", *trained),
            wiring=partial(work.evaluating, ap="train_ap", rounds=rounds, iterations=iterations),
            body=work.evaluation,
            command="evaluate",
        )
    )
    steps.append(
        Step(
            "report",
            "report.html, report.json",
            after=tuple(step.name for step in steps),
            body=work.report,
            command="report",
        )
    )
    return {step.name: step for step in steps}
