"""Routes beside completions: ``/tokenize``, ``/detokenize``, ``/tokenizer_info`` and ``/v1/score``.

Owns: their bodies and responses. Does not own: how a chat becomes tokens (``service.py``), the scoring of conversations
(``scoring.py``). Invariant: what ``/tokenize`` says of a prompt is what a completion of it would be drawn after.

The first three have the shapes of vLLM's server, https://docs.vllm.ai/en/latest/serving/openai_compatible_server/, by
which lm-eval asks a server for its tokenizer.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field, PlainValidator

from steerlm_megatron.serve.api import Attributes, Body, ChatMessage, read, token_ids
from steerlm_megatron.serve.completions import CLIENT_LEFT, REFUSALS, api_error
from steerlm_megatron.serve.errors import ApiError
from steerlm_megatron.serve.gate import error_response
from steerlm_megatron.serve.neutral import TOKENIZE
from steerlm_megatron.serve.read_request import ClientGone, disconnected, parse_json, read_body
from steerlm_megatron.serve.scoring import ScoreQueue, responses_of
from steerlm_megatron.serve.service import Service
from steerlm_megatron.steer.records import Conversation, Message

_Work = Callable[[dict[str, Any]], Coroutine[Any, Any, Any]]
_MOST_CONTEXT = 4  # times ``server.max_body_bytes``: characters of all texts that responses to score follow


class TokenizeBody(Body):
    """The body of ``POST /tokenize``: a text, or the messages of a chat with the attributes of the response."""

    ignorable = TOKENIZE
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    attributes: Attributes | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(token_ids)]


class ScoredConversation(Body):
    """A conversation of ``POST /v1/score``, whose every assistant message gets values."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class ScoreBody(Body):
    """The body of ``POST /v1/score``: the messages of one conversation, or several conversations."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    conversations: Annotated[list[ScoredConversation], Field(min_length=1)] | None = None


class MoreRoutes:
    """What the routes do, apart from HTTP."""

    def __init__(self, service: Service, scores: ScoreQueue | None) -> None:
        """``scores`` is None where no attribute-prediction model is served beside."""
        self.service, self.scores = service, scores

    def tokenize(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the tokens of a text or of a chat's prompt. Raises ApiError."""
        body = read(TokenizeBody, data)
        self.service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt, which is text, or messages, one of the two", "prompt")
        if body.messages is not None:
            ids = self.service.chat_prompt(body.messages, body.attributes)
        elif body.attributes is not None:
            raise ApiError(400, "attributes belong to messages; a prompt is taken as it is", "attributes")
        else:
            assert body.prompt is not None
            ids = self.service.tokenizer.encode(body.prompt)
        limit = self.service.generator.limits.max_sequence_tokens
        names = [self.service.texts.name(i, as_id=False) for i in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names}

    def detokenize(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the text of tokens. Raises ApiError."""
        body = read(DetokenizeBody, data)
        self.service.check_model(body.model)
        size = self.service.tokenizer.vocab_size
        for i in body.tokens:
            if i >= size:
                raise ApiError(400, f"tokens: the token id {i} is outside [0, {size})", "tokens")
        return {"prompt": self.service.tokenizer.decode(body.tokens)}

    def tokenizer_info(self) -> dict[str, Any]:
        """Return what clients ask of a tokenizer. The tokens that end a response are a template's control tokens, which
        no text contains, so there is no ``eos_token`` that a client could write.
        """
        tokenizer = self.service.tokenizer
        return {
            "tokenizer_class": "steerlm_megatron",
            "kind": tokenizer.model_kind,
            "vocab_size": tokenizer.vocab_size,
            "hash": tokenizer.hash,
            "control_tokens": tokenizer.controls,
            "stop_token_ids": sorted(self.service.generator.vocabulary.stop_ids),
            "eos_token": None,
            "bos_token": None,
            "pad_token": None,
            "chat_template": None,
        }

    def to_score(self, data: dict[str, Any]) -> list[Conversation]:
        """Return the conversations of a body. Raises ApiError."""
        scores = self._scores()
        body = read(ScoreBody, data)
        self.service.check_model(body.model)
        if (body.messages is None) == (body.conversations is None):
            raise ApiError(400, "give messages, of one conversation, or conversations, one of the two", "messages")
        if body.conversations is None:
            assert body.messages is not None
            asked, where = [body.messages], "messages"
        else:
            asked, where = [one.messages for one in body.conversations], "conversations"
        conversations = [_conversation(messages, str(i), where) for i, messages in enumerate(asked)]
        if (count := responses_of(conversations)) > scores.max_waiting:
            message = f"{count} responses are more than can ever wait, server.max_queue={scores.max_waiting}"
            raise ApiError(400, f"{message}; send several requests", where, code="too_many_responses")
        # A conversation that is too long for the model is scored response by response, each after the text before it.
        most = _MOST_CONTEXT * self.service.server.max_body_bytes
        if (chars := sum(map(_context_chars, conversations))) > most:
            message = f"the texts that responses follow have {chars} characters together, more than {most}"
            raise ApiError(400, f"{message}; send fewer responses of a conversation at a time", where)
        return conversations

    def _scores(self) -> ScoreQueue:
        if self.scores is None:
            message = "this server scores nothing; start it with ap_checkpoint=<an attribute-prediction model>"
            raise ApiError(404, message, code="not_served")
        return self.scores

    async def score(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """Return values of every assistant message. Raises ApiError, QueueFull, ShuttingDown, RequestFailed."""
        found = await asyncio.wrap_future(self._scores().submit(conversations))
        data = [
            {
                "index": i,
                "object": "score",
                "values": [{"message": at, "attributes": dict(values[at])} for at in sorted(values)],
            }
            for i, values in enumerate(found)
        ]
        head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return {**head, "model": self.service.server.model_name, "data": data}


def _context_chars(conversation: Conversation) -> int:
    """Return the sum of the lengths, in characters, of the texts up to each response."""
    total = before = 0
    for message in conversation.messages:
        before += len(message.content)
        total += before if message.role == "assistant" else 0
    return total


def _conversation(messages: Sequence[ChatMessage], name: str, where: str) -> Conversation:
    place = where if where == "messages" else f"{where}[{name}].messages"
    turns = []
    for i, message in enumerate(messages):
        if message.speaker == "system" and i > 0:
            raise ApiError(400, f"{place}[{i}]: a {message.role} message must come first", where)
        if message.attributes is not None:
            raise ApiError(400, f"{place}[{i}]: attributes are what is computed here; leave them out", where)
        text = message.text()
        if not text.strip() and message.role == "assistant":
            raise ApiError(400, f"{place}[{i}]: an assistant message without text has no values", where)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ApiError(400, f"{place}[{i}]: the content is not valid Unicode", where) from None
        turns.append(Message(message.speaker, text))
    if not any(turn.role == "assistant" for turn in turns):
        raise ApiError(400, f"{place}: there is no assistant message to score", where)
    return Conversation(name, tuple(turns))


async def _unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Any]) -> Response:
    """Return the response with what ``work`` gives, which is cancelled when the client leaves. Raises ClientGone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(http))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return JSONResponse(task.result())
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


def add_routes(
    app: FastAPI, service: Service, scores: ScoreQueue | None, count: Callable[[str, int], None]
) -> MoreRoutes:
    """Add the routes to ``app``. ``count`` is called with the path and the status of each answer."""
    routes = MoreRoutes(service, scores)

    async def answer(
        http: HttpRequest, path: str, work: Callable[[dict[str, Any]], Coroutine[Any, Any, Any]]
    ) -> Response:
        server = service.server
        response: Response
        try:
            body = await read_body(http, server.max_body_bytes, server.read_timeout_sec)
            response = await _unless_gone(http, work(await asyncio.to_thread(parse_json, body)))
        except ClientGone:
            response = Response(status_code=CLIENT_LEFT)
        except REFUSALS as e:
            response = error_response(api_error(e), getattr(e, "retry_after_sec", None))
        count(path, response.status_code)
        return response

    @app.post("/tokenize")
    async def tokenize(http: HttpRequest) -> Response:
        return await answer(http, "/tokenize", lambda data: asyncio.to_thread(routes.tokenize, data))

    @app.post("/detokenize")
    async def detokenize(http: HttpRequest) -> Response:
        return await answer(http, "/detokenize", lambda data: asyncio.to_thread(routes.detokenize, data))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return routes.tokenizer_info()

    @app.post("/v1/score")
    async def score(http: HttpRequest) -> Response:
        async def work(data: dict[str, Any]) -> dict[str, Any]:
            return await routes.score(await asyncio.to_thread(routes.to_score, data))

        return await answer(http, "/v1/score", work)

    return routes
