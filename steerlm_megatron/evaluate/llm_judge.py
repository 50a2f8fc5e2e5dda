"""A language model as a judge, behind any endpoint with OpenAI's chat API.

Owns: the judge's requests (each asked once, in whatever run of the command), a second and third try at a verdict that
cannot be read, and the account of all that. Does not own: HTTP (``serve/chat_endpoint.py``), the forms of verdicts
(``verdicts.py``), prompts (``judge_prompts.py``), which answers are compared (``wins.py``, ``grades.py``). Invariants:
an answer is on the disk before the next request of its worker; a verdict that cannot be read is counted and never
replaced by a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.evaluate.answer_cache import FOLDER, Answer, AnswerCache, key_of
from steerlm_megatron.evaluate.judge_prompts import GRADE, PAIR, JudgePrompt, own_prompt
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.serve.chat_endpoint import Ask, ChatEndpoint, ChatLimits, ChatMessage

SECTION = "evaluate.llm_judge"
V = TypeVar("V")

_AGAIN = (
    "I cannot find your verdict in that. Write only the verdict now, in exactly the form that I asked for, and nothing "
    "else."
)


@dataclass(frozen=True)
class Decision(Generic[V]):
    """What became of one request for a verdict: the verdict, or None with the reason ``malformed`` or ``refused``.

    ``text`` is what the judge wrote last (or why it was refused).
    """

    verdict: V | None
    reason: str
    text: str


@dataclass
class Account:
    """What judging took. Tokens and seconds are those of all answers that verdicts rest on, also of answers that an
    earlier run of the command had got; ``requests`` are those of this run.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0  # answers whose tokens the server did not count
    seconds: float = 0.0
    reasked: int = 0  # requests for a verdict that could not be read
    malformed: int = 0  # verdicts that could not be read at last
    refused: int = 0  # conversations that the endpoint would not answer
    identical: int = 0  # pairs of equal answers, which are ties without a question
    refusals: dict[str, int] = field(default_factory=dict)

    def add(self, answer: Answer) -> None:
        """Count an answer's tokens and seconds."""
        self.seconds += answer.seconds
        if answer.prompt_tokens is None or answer.completion_tokens is None:
            self.unmetered += 1
        self.prompt_tokens += answer.prompt_tokens or 0
        self.completion_tokens += answer.completion_tokens or 0

    def money(self, price_per_million: Sequence[float]) -> float | None:
        """Return what the tokens cost at prices per million of prompt and of completion tokens; None without prices,
        or if the server did not count all tokens.
        """
        if not price_per_million or self.unmetered:
            return None
        per_prompt, per_completion = price_per_million
        return (self.prompt_tokens * per_prompt + self.completion_tokens * per_completion) / 1e6


class LLMJudge:
    """The judge of ``evaluate.llm_judge``, with its cache in a run folder."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Raises UserError as :func:`problems` tells, and if the endpoint does not work."""
        self.config = config.evaluate.llm_judge
        if said := problems(config):
            raise UserError("; ".join(said))
        self.pair_prompt, self.grade_prompt = _prompts(config)
        self.endpoint = open_endpoint(config)
        self.model = self.endpoint.check()
        self.account = Account()
        self._cache = AnswerCache(folder / FOLDER)
        self._settings = {"temperature": self.config.temperature, "max_tokens": self.config.max_tokens}

    def decide(
        self, asks: Sequence[Sequence[ChatMessage]], read: Callable[[str], V | None], label: str
    ) -> list[Decision[V]]:
        """Return the decision for each conversation of ``asks``, in order; equal conversations are asked once.

        ``read`` returns the verdict in a text, or None. ``label`` is for the progress bar.

        Raises:
            UserError: the endpoint ends the work (see :meth:`ChatEndpoint.run`). Answers so far are kept, so the same
                command goes on from there.
        """
        keys = [self._key(messages) for messages in asks]
        unique = dict(zip(keys, asks, strict=True))
        with Progress(len(unique), label, unit="verdict") as bar:

            def job(messages: Sequence[ChatMessage]) -> Callable[[Ask], Coroutine[Any, Any, Decision[V]]]:
                async def decided(ask: Ask) -> Decision[V]:
                    decision = await self._decide(ask, messages, read)
                    bar.advance(1)
                    return decision

                return decided

            try:
                found = self.endpoint.run([job(messages) for messages in unique.values()])
            except UserError as error:
                kept = f"{len(self._cache)} answers of the judge are kept in {self._cache.path}"
                raise type(error)(f"{error}; {kept}: the same command goes on from there") from error
        by_key = dict(zip(unique, found, strict=True))
        return [by_key[key] for key in keys]

    def _key(self, messages: Sequence[ChatMessage]) -> str:
        return key_of(self.model, messages, self._settings)

    async def _decide(self, ask: Ask, messages: Sequence[ChatMessage], read: Callable[[str], V | None]) -> Decision[V]:
        """Ask for one verdict. One that cannot be read is asked for again in the same conversation: at temperature 0
        the same question would get the same answer.
        """
        said, text = list(messages), ""
        for number in range(self.config.verdict_tries):
            answer, refused = await self._answer(ask, said)
            if answer is None:
                self.account.refused += 1
                self.account.refusals[refused] = self.account.refusals.get(refused, 0) + 1
                return Decision(None, "refused", refused)
            text = answer.text
            if (verdict := read(text)) is not None:
                return Decision(verdict, "", text)
            self.account.reasked += number + 1 < self.config.verdict_tries
            said += [{"role": "assistant", "content": text}, {"role": "user", "content": _AGAIN}]
        self.account.malformed += 1
        return Decision(None, "malformed", text)

    async def _answer(self, ask: Ask, messages: Sequence[ChatMessage]) -> tuple[Answer | None, str]:
        """Return the answer to ``messages`` from the cache or the endpoint; None and the reason if it is refused."""
        key = self._key(messages)
        answer = self._cache.get(key)
        if answer is None:
            reply = await ask(messages)
            self.account.requests += 1
            if reply.refused is not None:
                return None, reply.refused
            answer = Answer(reply.text, reply.prompt_tokens, reply.completion_tokens, round(reply.seconds, 3))
            self._cache.put(key, answer)
        else:
            self.account.cached += 1
        self.account.add(answer)
        return answer, ""


def open_endpoint(config: Config) -> ChatEndpoint:
    """Return the endpoint of ``evaluate.llm_judge``. Raises UserError for an address that is none."""
    judge = config.evaluate.llm_judge
    return ChatEndpoint(
        judge.url or "",
        judge.model,
        SECTION,
        api_key_env=judge.api_key_env,
        temperature=judge.temperature,
        max_tokens=judge.max_tokens,
        limits=ChatLimits(judge.concurrency, judge.timeout_sec, judge.max_tries),
    )


def _prompts(config: Config) -> tuple[JudgePrompt, JudgePrompt]:
    """Return the prompts for pairs and for grades. Raises UserError for a file of the user's that does not work."""
    judge = config.evaluate.llm_judge
    pair, grade = (
        JudgePrompt(path, names, f"{SECTION}.{key}") if path else own_prompt(own, names)
        for path, names, key, own in (
            (judge.pair_prompt, PAIR, "pair_prompt", f"{judge.protocol}_pair"),
            (judge.grade_prompt, GRADE, "grade_prompt", "mt_bench_grade"),
        )
    )
    return pair, grade


def problems(config: Config) -> list[str]:
    """Return what is wrong with ``evaluate.llm_judge``, as far as that can be said without asking the endpoint."""
    judge, found = config.evaluate.llm_judge, []
    if judge.url is None:
        return [f"set {SECTION}.url, the address of the judge"]
    for look in (open_endpoint, _prompts):
        try:
            look(config)
        except UserError as error:
            found.append(str(error))
    if len(judge.price_per_million) not in (0, 2) or any(not price >= 0 for price in judge.price_per_million):
        found.append(
            f"{SECTION}.price_per_million={judge.price_per_million} must be two prices, of a million prompt tokens and "
            "of a million completion tokens"
        )
    return found
