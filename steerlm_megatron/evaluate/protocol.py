"""What a measure is, what a judge is, and what both are given.

Owns: the protocols :class:`Measure` and :class:`Judge`, the needs of measures, and :class:`Material`, which
``stages/evaluate.py`` collects: labelled responses with predicted values, and drawn responses with measured values.
Does not own: the measures (``measures.py`` lists them), the judges (``judges.py``), loading and drawing (``stages``).
Invariant: a measure computes from its material alone; it loads no model and draws no response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from steerlm_megatron.config.schema import Config
from steerlm_megatron.evaluate.intervals import Floats
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation

Levels = Mapping[str, int]
Measured = dict[str, float]  # name of what was measured → value; a value that a judge could not give is absent
Section = dict[str, Any]
Scored = Callable[[Sequence[Conversation]], list[dict[int, dict[str, float]]]]  # → per message index, its values


@dataclass(frozen=True)
class Inputs:
    """What reading the inputs has shown, before any model is loaded: how many responses have single annotations."""

    annotated: int


@dataclass(frozen=True)
class Need:
    """Something that a measure computes from.

    Args:
        words: what it is, as an error names it.
        lacking: says what is missing and which key to set, None if nothing is. Its second argument is None as long as
            the inputs have not been read; what only they can show is not missing then.
    """

    words: str
    lacking: Callable[[Config, Inputs | None], str | None]


class Measure(Protocol):
    """One kind of figures. A measure is registered in ``measures.py``."""

    name: str  # in evaluate.measures, and the key of its section in evaluation.json
    version: int  # is raised when the same material gives other figures, or when the section's form changes
    needs: tuple[Need, ...]

    def run(self, material: Material) -> Section:
        """Return the section, plain data for JSON.

        It has ``title``, any ``words`` (sentences that say how to read it), any ``tables``, any ``summary`` (pairs of
        words and a cell, for one line of the terminal), and whatever else the measure finds; ``version`` is added by
        :func:`steerlm_megatron.evaluate.measures.run`. A table has ``title``, ``columns``, ``rows`` (cells are texts,
        numbers, None, or figures as ``intervals.figure`` makes them), any ``words`` and ``folded`` (true: the page
        folds it away). The report renders every table.

        It is called on the main rank alone, and must not enter a collective; the others wait as long as it lives.
        """
        ...


class Judge(Protocol):
    """Measures responses."""

    name: str  # in evaluate.judge and evaluate.judges
    words: str  # what a report calls it
    measured: tuple[str, ...]  # names of what it measures

    def measure(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> list[Measured]:
        """Return what was measured of each response to its prompt, the same on every rank. Collective over the world.

        A prompt ends with a user's message.
        """
        ...


@dataclass(frozen=True)
class JudgeContext:
    """What a judge is opened with: the configuration, the run folder (for a cache), and the schema and scores of the
    attribute-prediction model, None without ``ap_checkpoint``; ``ap`` is what a report calls that model.
    """

    config: Config
    folder: Path
    schema: AttributeSchema | None = None
    score: Scored | None = None
    ap: str = "the attribute-prediction model"


@dataclass(frozen=True)
class JudgeKind:
    """How a judge is opened. A kind is registered in ``judges.py``.

    Args:
        name: in ``evaluate.judge`` and ``evaluate.judges``.
        open: returns the judge; called on every rank once the attribute-prediction model is loaded.
        lacking: says what is missing (a key, a library) and what to do, None if nothing is; called before any model is
            loaded.
    """

    name: str
    open: Callable[[JudgeContext], Judge]
    lacking: Callable[[Config], str | None]


@dataclass(frozen=True)
class Labelled:
    """Held-out responses with labels, and what the attribute-prediction model predicts of them.

    Args:
        names: the A attributes of which the model has seen labels; columns of the arrays.
        predicted_PA: [responses, attributes], on the schema's scale; ``wanted_PA`` are the labels, NaN where there is
            none; ``constants_A`` the means of the training labels.
        lengths_P: characters of each response.
        groups_P: what responses are alike in: the first user message of their conversation, which a tree shares.
        facets: of each response its language, source and turn, where records have them: ``{"language": [...]}``.
        annotations: of each response the values of its single annotators; an empty list where there are none.
    """

    schema: AttributeSchema
    names: tuple[str, ...]
    predicted_PA: Floats
    wanted_PA: Floats
    constants_A: Floats
    lengths_P: Floats
    groups_P: Sequence[str]
    facets: Mapping[str, Sequence[str]]
    annotations: Sequence[Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Preferences:
    """Pairs of responses of which people chose one, with the values that the attribute-prediction model predicts.

    Args:
        chosen_PA, rejected_PA: [pairs, attributes]; ``names`` are the columns.
        lengths_P2: [pairs, 2] characters of the chosen and of the rejected response.
        groups_P: the first user message of each pair.
    """

    schema: AttributeSchema
    names: tuple[str, ...]
    chosen_PA: Floats
    rejected_PA: Floats
    lengths_P2: Floats
    groups_P: Sequence[str]


@dataclass(frozen=True)
class Answers:
    """One model's responses to all prompts, at its best levels.

    Args:
        levels: what it was asked for; None for a model without conditioning.
        texts: one response per prompt; ``tokens`` and ``cut`` (it reached ``sampling.max_tokens``) are of each.
        measured: judge → what it measured of each response.
        later: its responses to the follow-ups of the prompts, [turns][prompts]; empty texts where a prompt has none.
    """

    levels: Levels | None
    texts: Sequence[str]
    tokens: Sequence[int]
    cut: Sequence[bool]
    measured: Mapping[str, Sequence[Measured]]
    later: Sequence[Sequence[str]] = ()

    def turns(self, prompt: int) -> list[str]:
        """Return the responses to a prompt and to its follow-ups."""
        return [self.texts[prompt], *(texts[prompt] for texts in self.later)]


@dataclass(frozen=True)
class Steered:
    """One model's responses to all prompts at many requests.

    Args:
        model: its name in ``evaluate.models``.
        best: its best levels, the first of ``asks``; ``asks`` are all requests.
        curves: attribute → the places in ``asks`` of its levels in ascending order, the others at their best.
        combinations: the places in ``asks`` of ``evaluate.combinations``.
        texts: [requests][prompts]; ``measured`` is judge → [requests][prompts].
    """

    model: str
    schema: AttributeSchema
    best: Levels
    asks: Sequence[Levels]
    curves: Mapping[str, Sequence[int]]
    combinations: Sequence[int]
    texts: Sequence[Sequence[str]]
    measured: Mapping[str, Sequence[Sequence[Measured]]]


@dataclass(frozen=True)
class Samples:
    """One model's responses for best-of-n: [n][prompts], with the attribute-prediction model's quality of each."""

    texts: Sequence[Sequence[str]]
    tokens: Sequence[Sequence[int]]
    scores_NP: Floats
    measured: Mapping[str, Sequence[Sequence[Measured]]]  # judge → [n][prompts]


@dataclass(frozen=True)
class Shift:
    """Responses that a model drew at temperature 1, and what two models give them.

    Args:
        before: the name of the model that its training went on from.
        logprob_SP, before_SP: [samples, prompts] log-probability of each response under the model, and under the one
            before, natural logarithm; NaN where a response was cut.
        tokens_SP: [samples, prompts] tokens of each response.
    """

    before: str
    logprob_SP: Floats
    before_SP: Floats
    tokens_SP: Floats


@dataclass(frozen=True)
class Material:
    """All that measures compute from; a part that the configuration does not ask for is None or empty.

    Args:
        folder: the run folder, in which a measure may keep a cache.
        quality: the attribute by which models are compared.
        ap_model: the kind of the attribute-prediction model in words.
        judges: the judges, that of ``evaluate.judge`` first; empty without models.
        prompts: what the models answered, each up to its last user message.
        answers: model → its responses at its best levels, in the order of training.
        samples: model → its responses for best-of-n.
        shifts: model → its responses for the divergence from the model before.
        outside: name → answers from files (``evaluate.llm_judge.answers``), which LLM judges compare with the others.
    """

    config: Config
    folder: Path
    quality: str
    ap_model: str | None = None
    labelled: Labelled | None = None
    preferences: Preferences | None = None
    judges: Mapping[str, Judge] = field(default_factory=dict)
    prompts: Sequence[Conversation] = ()
    answers: Mapping[str, Answers] = field(default_factory=dict)
    steered: Steered | None = None
    samples: Mapping[str, Samples] = field(default_factory=dict)
    shifts: Mapping[str, Shift] = field(default_factory=dict)
    outside: Mapping[str, Answers] = field(default_factory=dict)

    @property
    def judge(self) -> str:
        """The name of the judge by which models are compared."""
        return next(iter(self.judges))
