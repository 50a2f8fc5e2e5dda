"""The judges that can be named in ``evaluate.judge`` and ``evaluate.judges``.

Owns: the registry, and opening several judges. Does not own: drawing responses. Invariant: what a judge lacks is said
before any model is loaded. A new judge needs a :class:`JudgeKind` here and its name in ``config/inference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_tools import demo_judge
from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.lexical import LEXICAL
from steerlm_megatron.evaluate.protocol import Judge, JudgeContext, JudgeKind, Measured
from steerlm_megatron.steer.attributes import nearest
from steerlm_megatron.steer.records import Conversation, Message


class ApJudge:
    """The attribute-prediction model. It has a say in training, too: what it measures is what models learned to please.
    That is why other judges stand beside it.
    """

    name = "ap"

    def __init__(self, context: JudgeContext) -> None:
        assert context.schema is not None and context.score is not None, "see lacking"
        self.words = context.ap
        self.measured: tuple[str, ...] = context.schema.seen
        self._score = context.score

    def measure(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> list[Measured]:
        """See :class:`Judge`."""
        full = [
            Conversation(f"{i}", (*p.messages, Message("assistant", r)))
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
        return [values[len(c.messages) - 1] for c, values in zip(full, self._score(full), strict=True)]


class DemoJudge:
    """The program that made the embedded corpus, which counts what the corpus was made of."""

    name = "demo"
    words = "demo_judge, a program independent of the models"
    measured: tuple[str, ...] = demo_judge.NAMES

    def measure(self, prompts: Sequence[Conversation], responses: Sequence[str]) -> list[Measured]:
        """See :class:`Judge`."""
        return [demo_judge.measure(p.messages[-1].content, r) for p, r in zip(prompts, responses, strict=True)]


def _no_ap(config: Config) -> str | None:
    return None if config.ap_checkpoint else "ap_checkpoint is not set; it is what the judge ap measures with"


JUDGES: dict[str, JudgeKind] = {
    kind.name: kind
    for kind in (
        JudgeKind("ap", ApJudge, _no_ap),
        JudgeKind("demo", lambda context: DemoJudge(), lambda config: None),
        *LEXICAL,
    )
}


def judges_of(config: Config) -> list[str]:
    """Return the names of the judges that measure: ``evaluate.judge``, then those of ``evaluate.judges``, each once."""
    return list(dict.fromkeys([config.evaluate.judge, *config.evaluate.judges]))


def lacking(config: Config) -> list[str]:
    """Return what the configured judges lack, a sentence each."""
    return [said for name in judges_of(config) if (said := JUDGES[name].lacking(config)) is not None]


def open_judges(context: JudgeContext, quality: str) -> dict[str, Judge]:
    """Open the configured judges, that of ``evaluate.judge`` first.

    Raises:
        UserError: the first one cannot measure ``quality``, by which models are compared; ``evaluate.judge_attributes``
            names what no judge measures.
    """
    judges = {name: JUDGES[name].open(context) for name in judges_of(context.config)}
    measured = [name for judge in judges.values() for name in judge.measured]
    for name in context.config.evaluate.judge_attributes:
        if name not in measured:
            raise UserError(
                f"evaluate.judge_attributes: no judge of evaluate.judges measures {name}{nearest(name, measured)}; "
                f"they measure: {' '.join(measured)}"
            )
    first = next(iter(judges.values()))
    if quality not in first.measured:
        raise UserError(
            f"evaluate.judge={first.name} cannot measure {quality}, by which models are compared: it has "
            f"values of {' '.join(first.measured)}"
        )
    return judges
