"""Translate request bodies into generator requests, and results into response bodies.

Owns: prompts of chats (through the template alone), default parameters, response bodies. Does not own: HTTP
(``server.py``), the fields of request bodies (``api.py``). Invariant: text that a client sends never becomes a control
token.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.protocol import Delta, Request, Result, SamplingParams, derive_seed
from steerlm_megatron.serve.api import ChatBody, ChatMessage, CompletionBody, envelope, usage
from steerlm_megatron.serve.errors import ApiError
from steerlm_megatron.serve.logprobs import Pending, Scored, TokenTexts
from steerlm_megatron.serve.sampling_fields import params_of
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import Template

_DEFAULTS = ("temperature", "top_k", "top_p", "max_tokens")  # the model's description says what an absent one means


@dataclass
class Ask:
    """An HTTP request after parsing: ``n`` generator requests for each of ``prompts`` prompts.

    ``echoed``: the texts of the prompts, where responses begin with them. ``pending``: what a stream has not yet shown
    of each choice's log-probabilities.
    """

    id: str
    kind: str  # the ``object`` of the response
    body: ChatBody | CompletionBody
    requests: list[Request]
    prompts: int
    created: int
    echoed: Sequence[str] = ()
    pending: dict[int, Pending] = field(default_factory=dict)

    @property
    def prompt_alone(self) -> bool:
        """Whether the response is to be the prompt, and the token that is drawn after it left out."""
        return isinstance(self.body, CompletionBody) and self.body.max_tokens == 0

    @property
    def is_chat(self) -> bool:
        return isinstance(self.body, ChatBody)


class Service:
    """Translate between the API and a generator."""

    def __init__(
        self,
        generator: Engine,
        schema: AttributeSchema | None,
        server: ServerConfig,
        sampling: SamplingConfig,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """With ``schema`` None the model has no attribute conditioning, and asking for attributes is an error.
        ``identity`` says which checkpoint is served.
        """
        self.scored_attributes: Sequence[str] = ()  # those of which ``/v1/score`` gives values
        self.scored_max_level: int | None = None  # the highest level on the scale of these values
        self.generator, self.identity = generator, identity
        self.schema = schema if schema is not None and schema.names else None
        self.server, self.sampling = server, sampling
        self.started = int(time.time())
        tokenizer, template = generator.tokenizer, generator.template
        assert isinstance(template, Template)
        self.template: Template = template
        self.tokenizer: Tokenizer = tokenizer  # type: ignore[assignment]  # the generator's protocol has fewer methods
        self.texts = TokenTexts(self.tokenizer)

    # ---- in ----

    def chat(self, body: ChatBody) -> Ask:
        """Turn a chat body into requests. Raises ApiError."""
        self.check_model(body.model)
        if body.max_completion_tokens not in (None, body.max_tokens) and body.max_tokens is not None:
            raise ApiError(400, "max_tokens and max_completion_tokens are the same thing; give one", "max_tokens")
        self._check_choices(1, body.n)
        self._check_tokens(len(body.messages), "messages", "at least ")  # a message has one token or more
        self._check_chars(sum(len(part.text) for m in body.messages for part in m.content or ()), "messages")
        try:
            prompt_ids = self.chat_prompt(body.messages, body.attributes)
        except UserError as e:
            raise ApiError(400, str(e), "messages") from e
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, f"top_logprobs={body.top_logprobs} needs logprobs=true", "top_logprobs")
        max_tokens = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
        return self._ask("chatcmpl", "chat.completion", body, [prompt_ids], max_tokens)

    def chat_prompt(self, given: Sequence[ChatMessage], attributes: Mapping[str, Any] | None) -> list[int]:
        """Return the token ids of a chat up to where the response, of these attributes, starts. Raises ApiError,
        UserError.
        """
        messages = []
        for i, message in enumerate(given):
            where = f"messages[{i}]"
            if message.speaker == "system" and i > 0:
                raise ApiError(400, f"{where}: a {message.role} message must come first", "messages")
            if message.content is None and message.role != "assistant":
                missing = f"missing parameter: messages.{i}.content"
                raise ApiError(400, missing, "messages", code="missing_required_parameter")
            if message.attributes is not None and message.role != "assistant":
                raise ApiError(400, f"{where}: attributes belong to assistant messages", "messages")
            values = self._values(message.attributes, f"{where}.attributes")
            messages.append(Message(message.speaker, message.text(), values))
        if messages[-1].role != "user":
            raise ApiError(400, "the last of messages must be the user's; the response follows it", "messages")
        if (refusal := self.template.refusal(messages)) is not None:
            raise ApiError(400, refusal, "messages")
        levels = None
        if self.schema is not None:
            try:
                levels = self.schema.complete(attributes)
            except UserError as e:
                raise ApiError(400, f"attributes: {e}", "attributes") from e
        elif attributes:
            self._values(attributes, "attributes")
        return self.tokenizer.encode_segments(self.template.prefix(messages, self.schema, levels))[0]

    def _values(self, values: Mapping[str, Any] | None, where: str) -> Mapping[str, float] | None:
        if not values:
            return None
        param = where if where == "attributes" else "messages"
        if self.schema is None:
            names = ", ".join(values)
            raise ApiError(400, f"{where}: {names}: this model was trained without attributes; leave them out", param)
        try:
            self.schema.check_values(values)
        except UserError as e:
            raise ApiError(400, f"{where}: {e}", param) from e
        return values

    def completion(self, body: CompletionBody) -> Ask:
        """Turn a completion body into requests. Raises ApiError."""
        self.check_model(body.model)
        if body.best_of is not None and body.best_of != body.n:
            raise ApiError(400, f"best_of={body.best_of} must equal n={body.n}: choices are not ranked", "best_of")
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens=0 draws nothing; ask for one token or more, or set echo=true", "max_tokens")
        if body.echo and body.logprobs is not None and body.stream:
            message = "echo=true with logprobs is not available with stream=true; drop one of them"
            raise ApiError(400, message, "echo", code="unsupported_value")
        self._check_choices(len(body.prompt), body.n)
        for prompt in body.prompt:
            if not prompt:
                raise ApiError(400, "the prompt is empty; it needs at least one token", "prompt", code="empty_prompt")
            if isinstance(prompt, str):
                self._check_chars(len(prompt), "prompt")
            else:
                self._check_tokens(len(prompt), "prompt")
        prompts = []
        for prompt in body.prompt:
            try:
                prompts.append(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
            except UserError as e:
                raise ApiError(400, str(e), "prompt") from e
        ask = self._ask("cmpl", "text_completion", body, prompts, body.max_tokens)
        if body.echo:
            ask.echoed = [text if isinstance(text, str) else self.tokenizer.decode(text) for text in body.prompt]
        return ask

    def check_model(self, model: str | None) -> None:
        """Raise ApiError (404) for a model that is not served; None stands for the served one."""
        if model is not None and model != self.server.model_name:
            message = f"model {model!r} is not served here; this is {self.server.model_name!r} (server.model_name)"
            raise ApiError(404, message, "model", code="model_not_found")

    def _check_choices(self, prompts: int, n: int) -> None:
        """Refuse more choices than the queue could ever hold, before any work is done."""
        limit = self.server.max_queue + self.generator.limits.max_batch
        if prompts * n > limit:
            message = (
                f"{prompts * n} choices ({prompts} prompts, n={n}) are more than this server can ever queue, "
                f"{limit} (server.max_queue={self.server.max_queue} + "
                f"generation.max_batch={self.generator.limits.max_batch}); send several requests"
            )
            raise ApiError(400, message, "n" if prompts == 1 else "prompt", code="too_many_choices")

    def _check_chars(self, chars: int, param: str) -> None:
        """Refuse a text that is too long however it is tokenised, before it is tokenised."""
        self._check_tokens(-(-chars // self.generator.vocabulary.longest_token_chars), param, "at least ")

    def _check_tokens(self, tokens: int, param: str, about: str = "") -> None:
        limit = self.generator.limits.max_sequence_tokens
        if tokens >= limit:
            message = (
                f"the prompt has {about}{tokens} tokens, which leaves none for a response within "
                f"generation.max_sequence_tokens={limit}; shorten the prompt"
            )
            raise ApiError(400, message, param, code="context_length_exceeded")

    def _ask(
        self,
        prefix: str,
        kind: str,
        body: ChatBody | CompletionBody,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
    ) -> Ask:
        if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
            raise ApiError(400, "stream_options needs stream=true", "stream_options")
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        base_seed = body.seed_from(drawn=random.SystemRandom().getrandbits(62))
        is_chat = prefix == "chatcmpl"
        param, text_prefix = ("messages", self.template.response_prefix) if is_chat else ("prompt", "")
        defaults = self.sampling
        requests: list[Request] = []
        for p, ids in enumerate(prompts):
            room = self.generator.limits.max_sequence_tokens - len(ids)
            wanted = max(1, max_tokens if max_tokens is not None else min(defaults.max_tokens, room))
            problem = self.generator.problem(len(ids), wanted)
            if problem:
                raise ApiError(400, problem, param, code="context_length_exceeded")
            prompt_ids = tuple(ids)
            for choice in range(body.n):
                # Equal prompts of a list get different seeds; each request is reproducible from its seed.
                params = params_of(body, defaults, wanted, derive_seed(base_seed, p * body.n + choice))
                if not requests:
                    self._check_params(body, params)
                requests.append(Request(f"{request_id}-{p}-{choice}", prompt_ids, params, text_prefix))
        return Ask(request_id, kind, body, requests, len(prompts), int(time.time()))

    def _check_params(self, body: ChatBody | CompletionBody, params: SamplingParams) -> None:
        """Refuse parameters that contradict each other or name tokens that the model lacks."""
        if params.min_tokens > params.max_tokens:
            message = f"min_tokens={params.min_tokens} is more than max_tokens={params.max_tokens}"
            raise ApiError(400, message, "min_tokens")
        problem = self.generator.vocabulary.problem(params)
        if problem is not None:
            raise ApiError(400, problem, problem.partition(" ")[0].rstrip(":"))

    # ---- out ----

    def response(self, ask: Ask, results: Sequence[Result]) -> dict[str, Any]:
        """Return the complete response body."""
        choices = []
        for i, result in enumerate(results):
            choice: dict[str, Any] = {"index": i, "finish_reason": result.finish_reason, "logprobs": None}
            choice["stop_reason"] = result.stop_reason
            if ask.is_chat:
                choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
            else:
                text = self._echo(ask, i) + ("" if ask.prompt_alone else result.text)
                choice["text"] = text
            if ask.body.wants_logprobs:
                choice["logprobs"] = self._logprobs(ask, i, result)
            if ask.body.return_token_ids:
                choice["token_ids"] = [] if ask.prompt_alone else list(result.token_ids)
            choices.append(choice)
        return {**self._head(ask), "choices": choices, "usage": self._usage(ask, results)}

    def _head(self, ask: Ask, chunk: bool = False) -> dict[str, Any]:
        kind = "chat.completion.chunk" if ask.is_chat and chunk else ask.kind
        return envelope(kind, ask.id, self.server.model_name, ask.created)

    def _usage(self, ask: Ask, results: Sequence[Result]) -> dict[str, int]:
        counts = usage(results, ask.prompts)
        if ask.prompt_alone:
            return {**counts, "completion_tokens": 0, "total_tokens": counts["prompt_tokens"]}
        return counts

    def _echo(self, ask: Ask, index: int) -> str:
        """Return the text of the prompt that a choice's text begins with."""
        return ask.echoed[index // ask.body.n] if ask.echoed else ""

    def _silent(self, ask: Ask) -> Set[int]:
        """Return the tokens that are no text of a response."""
        stops: list[int] = [] if ask.body.include_stop_str_in_output else ask.body.stop_token_ids
        return self.generator.vocabulary.stop_ids | set(stops)

    def _logprobs(self, ask: Ask, index: int, result: Result) -> dict[str, Any]:
        pieces = [] if ask.prompt_alone else [self._scored(ask, index, result)]
        if ask.echoed:
            for piece in pieces:
                piece.offsets = [at + len(self._echo(ask, index)) for at in piece.offsets]
            pieces.insert(0, self.texts.of_prompt(ask.requests[index].prompt_ids, result))
        return self._shown(ask, pieces)

    def _scored(self, ask: Ask, index: int, result: Result) -> Scored:
        return self.texts.of_result(result, self._silent(ask), ask.requests[index].text_prefix)

    def _shown(self, ask: Ask, pieces: Sequence[Scored]) -> dict[str, Any]:
        body = ask.body
        if ask.is_chat:
            return self.texts.chat(pieces[0], body.likely, body.return_tokens_as_token_ids)
        return self.texts.completion(pieces, body.likely, body.return_tokens_as_token_ids)

    def take(self, ask: Ask, index: int, delta: Delta) -> None:
        """Take in the log-probabilities of a choice's delta; :meth:`chunk` shows them when their text is shown."""
        if ask.body.wants_logprobs:
            ask.pending.setdefault(index, Pending()).add(delta)

    def chunk(
        self,
        ask: Ask,
        index: int,
        text: str | None,
        ids: Sequence[int],
        reason: str | None = None,
        first: bool = False,
        whole: bool = True,
        result: Result | None = None,
    ) -> dict[str, Any]:
        """Return one chunk of a stream. With ``text`` None it is the last one of a choice, whose ``result`` is given;
        ``whole``: with this chunk the client has the text of all tokens so far.
        """
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if result is not None:
            choice["stop_reason"] = result.stop_reason
        echo = self._echo(ask, index) if first else ""
        if ask.prompt_alone:
            text, ids, whole = text and "", (), False
        if ask.is_chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if text is not None:
                delta["content"] = text
            choice["delta"] = delta
        else:
            choice["text"] = echo + (text or "")
        if index in ask.pending:
            choice["logprobs"] = self._chunk_logprobs(ask, index, text or "", whole, result)
        if ask.body.return_token_ids:
            choice["token_ids"] = list(ids)
        return {**self._head(ask, chunk=True), "choices": [choice]}

    def _chunk_logprobs(
        self, ask: Ask, index: int, text: str, whole: bool, result: Result | None
    ) -> dict[str, Any] | None:
        pending, scored = ask.pending[index], None
        if result is not None:
            scored = self._scored(ask, index, result).after(pending.shown)
        elif whole:
            scored = self.texts.of_stream(pending, self._silent(ask), ask.requests[index].text_prefix)
        pending.take(text)
        return self._shown(ask, [scored]) if scored is not None and scored.ids else None

    def usage_chunk(self, ask: Ask, results: Sequence[Result]) -> dict[str, Any]:
        """Return the last chunk of a stream that asked for token counts."""
        return {**self._head(ask, chunk=True), "choices": [], "usage": self._usage(ask, results)}

    def models(self) -> dict[str, Any]:
        """Return the body of ``GET /v1/models``."""
        return {"object": "list", "data": [self._model()]}

    def model(self, name: str) -> dict[str, Any]:
        """Return the body of ``GET /v1/models/{name}``. Raises ApiError (404) for a model that is not served."""
        self.check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.server.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "steerlm_megatron",
            "max_model_len": self.generator.limits.max_sequence_tokens,
            "attributes": None if self.schema is None else self.schema.to_dict(),
            "scored_attributes": list(self.scored_attributes),
            "scored_max_level": self.scored_max_level,
            "sampling": {name: getattr(self.sampling, name) for name in _DEFAULTS},
            "checkpoint": None if self.identity is None else dict(self.identity),
        }
