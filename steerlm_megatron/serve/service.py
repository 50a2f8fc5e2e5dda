"""Translate request bodies into generator requests, and results into response bodies.

Owns: prompts of chats (through the template alone), default parameters, response bodies. Does not own: HTTP
(``server.py``), the fields of request bodies (``api.py``). Invariant: text that a client sends never becomes a control
token.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerlm_megatron.config.schema import SamplingConfig, ServerConfig
from steerlm_megatron.data.text.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import Request, Result, SamplingParams, derive_seed
from steerlm_megatron.generate.text import character_of_each_byte
from steerlm_megatron.serve.api import ChatBody, CompletionBody, envelope, usage
from steerlm_megatron.serve.errors import ApiError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import Template


@dataclass
class Ask:
    """An HTTP request after parsing: ``choices`` generator requests for each of ``prompts`` prompts."""

    id: str
    kind: str  # the ``object`` of the response
    body: ChatBody | CompletionBody
    requests: list[Request]
    prompts: int
    created: int

    @property
    def is_chat(self) -> bool:
        return isinstance(self.body, ChatBody)


class Service:
    """Translate between the API and a generator."""

    def __init__(
        self,
        generator: Generator,
        schema: AttributeSchema | None,
        server: ServerConfig,
        sampling: SamplingConfig,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """With ``schema`` None the model has no attribute conditioning, and asking for attributes is an error.
        ``identity`` says which checkpoint is served.
        """
        self.generator, self.identity = generator, identity
        self.schema = schema if schema is not None and schema.names else None
        self.server, self.sampling = server, sampling
        self.started = int(time.time())
        tokenizer, template = generator.tokenizer, generator.template
        assert isinstance(template, Template)
        self.template: Template = template
        self.tokenizer: Tokenizer = tokenizer  # type: ignore[assignment]  # the generator's protocol has fewer methods
        # The tokens of a tokenizer that does not know their bytes are taken to be complete characters.
        self._token_bytes: Callable[[int], bytes] = getattr(
            tokenizer, "token_bytes", lambda i: tokenizer.decode([i]).encode()
        )

    # ---- in ----

    def chat(self, body: ChatBody) -> Ask:
        """Turn a chat body into requests. Raises ApiError."""
        self._check_model(body.model)
        if body.max_completion_tokens not in (None, body.max_tokens) and body.max_tokens is not None:
            raise ApiError(400, "max_tokens and max_completion_tokens are the same thing; give one", "max_tokens")
        self._check_choices(1, body.n)
        self._check_tokens(len(body.messages), "messages", "at least ")  # a message has one token or more
        self._check_chars(sum(len(part.text) for m in body.messages for part in m.content or ()), "messages")
        try:
            prompt_ids = self.chat_prompt(body)
        except UserError as e:
            raise ApiError(400, str(e), "messages") from e
        max_tokens = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
        return self._ask("chatcmpl", "chat.completion", body, [prompt_ids], max_tokens, bool(body.logprobs))

    def chat_prompt(self, body: ChatBody) -> list[int]:
        """Return the token ids of a chat up to where the response starts."""
        messages = []
        for i, message in enumerate(body.messages):
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
                levels = self.schema.complete(body.attributes)
            except UserError as e:
                raise ApiError(400, f"attributes: {e}", "attributes") from e
        elif body.attributes:
            self._values(body.attributes, "attributes")
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
        self._check_model(body.model)
        if body.best_of is not None and body.best_of != body.n:
            raise ApiError(400, f"best_of={body.best_of} must equal n={body.n}: choices are not ranked", "best_of")
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
        return self._ask("cmpl", "text_completion", body, prompts, body.max_tokens, body.logprobs is not None)

    def _check_model(self, model: str | None) -> None:
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
        self._check_tokens(-(-chars // self.generator.longest_token_chars), param, "at least ")

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
        logprobs: bool,
    ) -> Ask:
        if logprobs and body.stream:
            raise ApiError(400, "logprobs are not available with stream=true; drop one of them", "logprobs")
        if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
            raise ApiError(400, "stream_options needs stream=true", "stream_options")
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        base_seed = body.seed_from(drawn=random.SystemRandom().getrandbits(62))
        param = "messages" if prefix == "chatcmpl" else "prompt"
        defaults = self.sampling
        requests: list[Request] = []
        for p, ids in enumerate(prompts):
            room = self.generator.limits.max_sequence_tokens - len(ids)
            wanted = max_tokens if max_tokens is not None else max(1, min(defaults.max_tokens, room))
            problem = self.generator.problem(len(ids), wanted)
            if problem:
                raise ApiError(400, problem, param, code="context_length_exceeded")
            prompt_ids = tuple(ids)
            for choice in range(body.n):
                params = SamplingParams(
                    temperature=_or(body.temperature, defaults.temperature),
                    top_k=max(0, _or(body.top_k, defaults.top_k)),
                    top_p=_or(body.top_p, defaults.top_p),
                    max_tokens=wanted,
                    # Equal prompts of a list get different seeds; each request is reproducible from its seed.
                    seed=derive_seed(base_seed, p * body.n + choice),
                    stop=tuple(body.stop),
                    logprobs=logprobs,
                )
                requests.append(Request(f"{request_id}-{p}-{choice}", prompt_ids, params))
        return Ask(request_id, kind, body, requests, len(prompts), int(time.time()))

    # ---- out ----

    def response(self, ask: Ask, results: Sequence[Result]) -> dict[str, Any]:
        """Return the complete response body."""
        choices = []
        for i, result in enumerate(results):
            choice: dict[str, Any] = {"index": i, "finish_reason": result.finish_reason, "logprobs": None}
            if ask.is_chat:
                choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
            else:
                choice["text"] = result.text
            if result.logprobs is not None:
                choice["logprobs"] = self._logprobs(ask, result)
            if ask.body.return_token_ids:
                choice["token_ids"] = list(result.token_ids)
            choices.append(choice)
        head = envelope(ask.kind, ask.id, self.server.model_name, ask.created)
        return {**head, "choices": choices, "usage": usage(results, ask.prompts)}

    def _logprobs(self, ask: Ask, result: Result) -> dict[str, Any]:
        assert result.logprobs is not None
        tokens = [self.tokenizer.decode([i]) for i in result.token_ids]
        parts, offsets = self._parts(result)
        if ask.is_chat:
            content = [
                {"token": token, "logprob": logprob, "bytes": list(part), "top_logprobs": []}
                for token, part, logprob in zip(tokens, parts, result.logprobs, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": tokens,
            "token_logprobs": list(result.logprobs),
            "top_logprobs": None,
            "text_offset": offsets,
        }

    def _parts(self, result: Result) -> tuple[list[bytes], list[int]]:
        """Return the bytes that each token contributes to the text, and the index of the character where it begins.

        Joined, the bytes are those of the text. Tokens that ended the response (a stop token, the template's suffix, a
        stop string) contribute none.
        """
        ended = result.token_ids[-1:] and result.token_ids[-1] in self.generator.stop_ids
        content = result.token_ids[:-1] if ended else result.token_ids
        parts = [self._token_bytes(i) for i in content]
        text = self.tokenizer.decode(content)
        characters = character_of_each_byte(b"".join(parts), text)
        count = characters[-1] + 1 if characters else 0
        # Counted from the end of the text, where it was cut off.
        kept = count - (len(text) - len(result.text)) if text.startswith(result.text) else count
        offsets: list[int] = []
        at = 0
        for i, part in enumerate(parts):
            own = characters[at : at + len(part)]
            offsets.append(own[0] if own else offsets[-1] if offsets else 0)
            parts[i] = bytes(byte for byte, of in zip(part, own, strict=True) if of < kept)
            at += len(part)
        return (parts, offsets) if not ended else ([*parts, b""], [*offsets, count])

    def chunk(
        self, ask: Ask, index: int, text: str | None, ids: Sequence[int], reason: str | None = None, first: bool = False
    ) -> dict[str, Any]:
        """Return one chunk of a stream. With ``text`` None it has the finish reason alone."""
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if ask.is_chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if text is not None:
                delta["content"] = text
            choice["delta"] = delta
        else:
            choice["text"] = text or ""
        if ask.body.return_token_ids:
            choice["token_ids"] = list(ids)
        kind = "chat.completion.chunk" if ask.is_chat else ask.kind
        return {**envelope(kind, ask.id, self.server.model_name, ask.created), "choices": [choice]}

    def usage_chunk(self, ask: Ask, results: Sequence[Result]) -> dict[str, Any]:
        """Return the last chunk of a stream that asked for token counts."""
        kind = "chat.completion.chunk" if ask.is_chat else ask.kind
        head = envelope(kind, ask.id, self.server.model_name, ask.created)
        return {**head, "choices": [], "usage": usage(results, ask.prompts)}

    def models(self) -> dict[str, Any]:
        """Return the body of ``GET /v1/models``."""
        return {"object": "list", "data": [self._model()]}

    def model(self, name: str) -> dict[str, Any]:
        """Return the body of ``GET /v1/models/{name}``. Raises ApiError (404) for a model that is not served."""
        self._check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.server.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "steerlm_megatron",
            "max_model_len": self.generator.limits.max_sequence_tokens,
            "attributes": None if self.schema is None else self.schema.to_dict(),
            "checkpoint": None if self.identity is None else dict(self.identity),
        }


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
