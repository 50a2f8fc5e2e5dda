"""The server's request and response bodies: OpenAI's shapes, plus ``attributes``, ``top_k`` and ``return_token_ids``.

Owns: which parameters exist, their ranges, and the errors that name them. Invariant: no parameter is silently
ignored: one that is unknown, or asks for what the server cannot do, is refused with HTTP 400 and its name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from steerlm_megatron.generate.protocol import MAX_SEED, Result


class ApiError(Exception):
    """An error with OpenAI's body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool = False


class _Sampling(_Body):
    """Parameters of both completion endpoints. ``None`` takes the server's default."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None  # not in OpenAI's API; 0: off
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # a label of the client's own
    return_token_ids: bool = False  # not in OpenAI's API: choices carry ``token_ids``
    # Known, and accepted at the values that change nothing.
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(stop):
            raise ApiError(400, "stop must hold non-empty strings", "stop")
        return stop


class CompletionBody(_Sampling):
    """``POST /v1/completions``. A prompt is text, which never becomes control tokens, or token ids."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None  # 0: of the chosen tokens
    echo: Literal[False] = False
    best_of: int | None = None
    suffix: None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not prompt:
            raise ApiError(400, "prompt is empty", "prompt")
        return prompt


class TextPart(_Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message; ``attributes`` on assistant messages only."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    attributes: dict[str, Any] | None = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Sampling):
    """``POST /v1/chat/completions``. ``attributes``: requested levels; what is not named takes the schema's best."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    attributes: dict[str, Any] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


def validation_error(errors: Sequence[Any]) -> ApiError:
    """pydantic's first complaint as an API error that names the parameter."""
    error = errors[0]
    where = [str(part) for part in error["loc"] if part != "body"]
    # Members of a union (str, list[str], ...) appear in the location; the parameter is its first part.
    param = where[0] if where else None
    if error["type"] == "extra_forbidden":
        name = ".".join(where)
        return ApiError(400, f"unknown parameter: {name}", name, code="unknown_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"missing parameter: {'.'.join(where)}", param, code="missing_required_parameter")
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", None)
    given = repr(error.get("input"))
    shown = given if len(given) <= 100 else given[:100] + "…"
    return ApiError(400, f"{'.'.join(where) or 'body'}={shown}: {error['msg']}", param)


def usage(results: Sequence[Result], prompts: int) -> dict[str, int]:
    """Token counts; the prompt of several choices (``len(results) / prompts`` each) counts once."""
    choices = max(1, len(results) // max(1, prompts))
    prompt_tokens = sum(r.prompt_tokens for r in results[::choices])
    completion_tokens = sum(r.completion_tokens for r in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def envelope(kind: str, request_id: str, model: str, created: int | None = None) -> dict[str, Any]:
    """What every response body begins with."""
    return {"id": request_id, "object": kind, "created": created or int(time.time()), "model": model}
