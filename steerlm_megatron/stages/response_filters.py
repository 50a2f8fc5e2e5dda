"""Which drawn responses bootstrapping keeps, and why it leaves the others out.

Owns: the filters (``bootstrap.*``), their order, the names of their reasons. Does not own: drawing (``sampling.py``),
scoring (``scoring.py``), the measures of text (``observe/diversity.py``). Invariant: a response that is left out has
exactly one reason, that of the first filter which it fails; and the decisions follow from all prompts and responses in
their order, whichever ranks, servers or jobs drew them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from data_tools.filters import label_rules
from steerlm_megatron.config.schema import BootstrapConfig
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.diversity import normalised, repetition
from steerlm_megatron.stages.sampling import Drawn, Prompt
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.records import Conversation, content_hash

Reasons = list[str | None]  # per response: why it is left out; None: it is kept
UNFINISHED, EMPTY, REPETITIVE, DUPLICATE, IN_INPUT = "unfinished", "empty", "repetitive", "duplicate", "in_input"
OFF_TARGET, NOT_BEST = "off_target", "not_best"


@dataclass(frozen=True)
class ResponseFilters:
    """The filters of one run, in the order in which they are asked.

    Args:
        drop_truncated: whether a response that reached ``sampling.max_tokens`` is left out.
        max_repetition: the largest repetition (``observe.diversity.repetition``) over ``repetition_ngram``-grams.
        drop_duplicates: ``none``, ``prompt`` or ``all``; see ``by_text``.
        rules: of ``bootstrap.labels``: the reason for which a response is left out, attribute, comparison, bound.
        max_distance: attribute → the largest difference of its measured value and the level asked for.
        keep_best: how many responses to a prompt are kept; None: all.
        best_by: attribute → its weight in the value by which ``keep_best`` chooses.
    """

    drop_truncated: bool = True
    max_repetition: float | None = None
    repetition_ngram: int = 4
    drop_duplicates: str = "none"
    rules: tuple[tuple[str, str, Callable[[float, float], bool], float], ...] = ()
    max_distance: Mapping[str, float] = field(default_factory=dict)
    keep_best: int | None = None
    best_by: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_config(cls, b: BootstrapConfig, schema: AttributeSchema) -> ResponseFilters:
        """Return the filters of ``bootstrap.*`` for responses with values of ``schema.seen``.

        Raises:
            UserError: with a line for each key that names an attribute of which there are no values.
        """
        problems: list[str] = []
        parsed = []
        try:
            parsed = label_rules(b.labels, None, "bootstrap.labels")
        except UserError as error:
            problems.append(str(error))
        best_by = dict(b.best_by) or {schema.quality: 1.0}
        named = {
            "labels": [name for name, _, _ in parsed],
            "max_distance": list(b.max_distance),
            "best_by": list(best_by) if b.keep_best is not None else [],
        }
        for key, names in named.items():
            if unknown := [name for name in names if name not in schema.seen]:
                problems.append(
                    f"bootstrap.{key}: the models have no values of {' '.join(unknown)}; they have: "
                    f"{' '.join(schema.seen)}"
                )
        if problems:
            raise UserError("\n".join(problems))
        rules = tuple((f"not {text}", *rule) for text, rule in zip(b.labels, parsed, strict=True))
        return cls(
            b.drop_truncated, b.max_repetition, b.repetition_ngram, b.drop_duplicates, rules, dict(b.max_distance),
            b.keep_best, best_by,
        )  # fmt: skip

    @property
    def reasons(self) -> tuple[str, ...]:
        """All reasons in the order in which the filters are asked."""
        named = (rule[0] for rule in self.rules)
        return (UNFINISHED, EMPTY, REPETITIVE, DUPLICATE, IN_INPUT, *named, OFF_TARGET, NOT_BEST)

    def by_text(
        self, prompts: Sequence[Prompt], responses: Sequence[Drawn], source: Iterable[Conversation] = ()
    ) -> Reasons:
        """Return the reasons of filters that need no values. A response without text is always left out.

        With ``drop_duplicates=prompt`` a response is left out if it equals an earlier kept one to the same prompt
        (``duplicate``), or what ``source`` answers to that prompt (``in_input``); with ``all``, to any prompt. Texts
        are equal that differ in case, white space or the form of characters alone (``observe.diversity.normalised``).
        """
        seen: set[bytes] = set()
        known = self._answers(source) if self.drop_duplicates != "none" else frozenset()
        reasons: Reasons = []
        for prompt, response in zip(prompts, responses, strict=True):
            reason = self._of_text(response)
            if reason is None and self.drop_duplicates != "none":
                one = self._identity(prompt.messages, response.text)
                reason = DUPLICATE if one in seen else IN_INPUT if one in known else None
                if reason is None:
                    seen.add(one)
            reasons.append(reason)
        return reasons

    def by_values(self, prompts: Sequence[Prompt], values: Sequence[Mapping[str, float]]) -> Reasons:
        """Return the reasons of filters that need the measured values. ``best_by`` chooses among responses that pass
        all others; of equally good ones the earlier is kept.
        """
        reasons = [self._of_values(p, v) for p, v in zip(prompts, values, strict=True)]
        if self.keep_best is None:
            return reasons
        of_prompt: dict[str, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            if reasons[index] is None:
                of_prompt[prompt_key(prompt.messages)].append(index)
        for indices in of_prompt.values():
            ranked = sorted(indices, key=lambda i: -sum(w * values[i][name] for name, w in self.best_by.items()))
            for index in ranked[self.keep_best :]:
                reasons[index] = NOT_BEST
        return reasons

    def _of_text(self, response: Drawn) -> str | None:
        if response.finish_reason != "stop" and (self.drop_truncated or response.finish_reason != "length"):
            return UNFINISHED
        if not response.text.strip():
            return EMPTY
        if self.max_repetition is not None and repetition(response.text, self.repetition_ngram) > self.max_repetition:
            return REPETITIVE
        return None

    def _of_values(self, prompt: Prompt, values: Mapping[str, float]) -> str | None:
        for reason, name, compare, bound in self.rules:
            if not compare(values[name], bound):
                return reason
        asked = prompt.levels or {}
        if any(abs(values[name] - asked[name]) > most for name, most in self.max_distance.items()):
            return OFF_TARGET
        return None

    def _answers(self, source: Iterable[Conversation]) -> frozenset[bytes]:
        """Return what identifies each response of ``source``."""
        return frozenset(
            self._identity(record.messages[:at], message.content)
            for record in source
            for at, message in enumerate(record.messages)
            if message.role == "assistant"
        )

    def _identity(self, messages: Sequence[Message], text: str) -> bytes:
        """Return a hash of a response, and of its prompt where only answers to one prompt are compared."""
        prompt = "" if self.drop_duplicates == "all" else prompt_key(messages)
        return hashlib.blake2b(f"{prompt}:{normalised(text)}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def prompt_key(messages: Sequence[Message]) -> str:
    """Return a hash of a prompt's roles and contents: the same for the same prompt in whichever record it stands."""
    return content_hash(Conversation("", tuple(messages)))
