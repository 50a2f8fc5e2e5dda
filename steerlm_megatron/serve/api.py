"""The server's request bodies: those of OpenAI, plus ``attributes`` and the sampling parameters of vLLM.

Owns: which parameters exist, their ranges, and the errors that name them. Does not own: parameters that are accepted
only at neutral values (``neutral.py``). Invariant: no parameter is silently ignored: one that is unknown, or that asks
for something that the server cannot do, is refused with HTTP 400 and its name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from steerlm_megatron.generate.protocol import MAX_SEED, MAX_TOP_LOGPROBS, MIN_REPETITION, Result
from steerlm_megatron.serve import neutral
from steerlm_megatron.serve.errors import ApiError, shown, writable

_MAX_STOPS = 16
_MAX_STOP_CHARS = 1000
_INT64 = 2**63 - 1
_UNSUPPORTED, _UNKNOWN = "unsupported_value", "unknown_parameter"


def _number(value: Any) -> Any:
    """Refuse a boolean where a number belongs, since pydantic would take true for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number, not a boolean")
    return value


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > _MAX_STOPS:
        raise PydanticCustomError("stop", f"has {len(stops)} strings; at most {_MAX_STOPS} are looked for")
    if not all(stops):
        raise PydanticCustomError("stop", "must hold non-empty strings")
    longest = max(map(len, stops), default=0)
    if longest > _MAX_STOP_CHARS:
        message = f"has a string of {longest} characters; at most {_MAX_STOP_CHARS} are looked for"
        raise PydanticCustomError("stop", message)
    return stops


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Return ``{"id": number}``, with ids as strings since JSON has no other keys, as pairs."""
    if isinstance(value, tuple):  # the default
        return value
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object of token ids and numbers, such as {'50': -100}")
    pairs: dict[int, float] = {}
    for name, bias in value.items():
        if not (isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) < 20):
            raise PydanticCustomError("logit_bias", "has the key {name}, which is no token id", {"name": shown(name)})
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            message = "has {bias} for the token id {name}; it must be a number in [-100, 100]"
            raise PydanticCustomError("logit_bias", message, {"bias": shown(bias), "name": name})
        pairs[int(name)] = float(bias)
    return tuple(pairs.items())


def token_ids(value: Any) -> list[int]:
    """Return a list of token ids, or refuse it."""
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i <= _INT64 for i in value):
        raise PydanticCustomError("ids", "must be a list of token ids")
    return value


def _some_ids(value: Any) -> list[int]:
    if not (ids := token_ids(value)):
        raise PydanticCustomError("ids", "is empty; it must name at least one token id, or be left out")
    return ids


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Return a prompt in any of OpenAI's four forms as a list of texts, or of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt", "must be a string, a list of strings, or token ids, one list or several")
    if not value:
        raise PydanticCustomError("prompt", "is empty; it must be text or token ids")
    if all(isinstance(item, str) for item in value):
        return value
    many = value if isinstance(value[0], list) else [value]
    for ids in many:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise PydanticCustomError("prompt", "must be all strings, all token ids, or all lists of token ids")
    return many


def _parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Attributes = Annotated[dict[str, Any], BeforeValidator(neutral.without_nulls)]
TokenCount = Annotated[Integer, Field(ge=1, le=_INT64)]


class Body(BaseModel):
    """A JSON object of a request, of which every field is known."""

    model_config = ConfigDict(extra="forbid")
    ignorable: ClassVar[
        Mapping[str, neutral.Values]
    ] = {}  # parameters that the body lacks, with the neutral values that are accepted

    @model_validator(mode="before")
    @classmethod
    def _what_is_asked_for(cls, data: Any) -> Any:
        """Drop nulls and parameters at neutral values; the rest must be parameters of this body."""
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        for name, value in given.items():
            if name in cls.ignorable:
                if problem := neutral.problem(name, value, cls.ignorable):
                    raise PydanticCustomError(_UNSUPPORTED, "{problem}", {"name": name, "problem": problem})
            elif name not in cls.model_fields:
                raise PydanticCustomError(_UNKNOWN, "unknown", {"name": writable(name)})
        return {name: value for name, value in given.items() if name not in cls.ignorable}


class StreamOptions(Body):
    """Options for the end of a stream."""

    ignorable = neutral.STREAM_OPTIONS
    include_usage: bool = False


class _Sampling(Body):
    """Parameters of both completion endpoints. An absent one takes the server's default."""

    model: str | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1)] | None = (
        None  # not in OpenAI's API; 0 means off, and so does -1, as in vLLM
    )
    n: Annotated[Integer, Field(ge=1, le=128)] = 1
    seed: Annotated[Integer, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    stop: Annotated[list[str], PlainValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_biases)] = ()
    # Of vLLM's API, https://docs.vllm.ai/en/latest/serving/openai_compatible_server/:
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(ge=MIN_REPETITION, le=1 / MIN_REPETITION)] = 1.0
    allowed_token_ids: Annotated[list[int], PlainValidator(_some_ids)] | None = None
    stop_token_ids: Annotated[list[int], PlainValidator(token_ids)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[Integer, Field(ge=0, le=_INT64)] = 0
    return_token_ids: bool = False  # choices then carry ``token_ids``
    return_tokens_as_token_ids: bool = False  # log-probabilities then name tokens ``token_id:5``

    def seed_from(self, drawn: int) -> int:
        """Return the requested seed in [0, 2^63), or ``drawn``. Negative seeds, which OpenAI's API allows, are taken
        modulo 2^63.
        """
        return drawn if self.seed is None else self.seed & MAX_SEED


class CompletionBody(_Sampling):
    """The body of ``POST /v1/completions``. A prompt is text, which never becomes control tokens, or token ids."""

    ignorable = neutral.COMPLETION
    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    max_tokens: Annotated[Integer, Field(ge=0, le=_INT64)] | None = None  # 0 with ``echo``: the prompt alone
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None  # 0: of the chosen tokens alone
    echo: bool = False  # the response begins with the prompt, and log-probabilities with those of its tokens
    best_of: Annotated[Integer, Field(ge=1)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.logprobs is not None

    @property
    def likely(self) -> int:
        """The number of most likely tokens whose log-probabilities are asked for."""
        return self.logprobs or 0


class TextPart(Body):
    """A text part of a message's content."""

    ignorable = neutral.TEXT_PART
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message. Only assistant messages have ``attributes``. ``developer`` is OpenAI's newer name for ``system``."""

    ignorable = neutral.MESSAGE
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts)] | None = None
    attributes: Attributes | None = None

    @property
    def speaker(self) -> Literal["system", "user", "assistant"]:
        """The role in the terms of templates."""
        return "system" if self.role == "developer" else self.role

    def text(self) -> str:
        """Return the content as one string."""
        return "".join(part.text for part in self.content or ())


class ChatBody(_Sampling):
    """The body of ``POST /v1/chat/completions``. ``attributes`` not named in it take the schema's best level."""

    ignorable = neutral.CHAT
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    attributes: Attributes | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.logprobs

    @property
    def likely(self) -> int:
        """The number of most likely tokens whose log-probabilities are asked for."""
        return self.top_logprobs


_B = TypeVar("_B", bound=Body)


def read(kind: type[_B], data: Mapping[str, Any]) -> _B:
    """Return a request's body. ApiError names the parameter that is wrong."""
    try:
        return kind.model_validate(data)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None


def validation_error(errors: Sequence[Any]) -> ApiError:
    """Return pydantic's first complaint as an API error that names the parameter."""
    error = errors[0]
    kind, where = error["type"], [str(part) for part in error["loc"]]
    param = where[0] if where else None
    if kind in (_UNSUPPORTED, _UNKNOWN):
        name = ".".join([*where, error["ctx"]["name"]])
        told = f"unknown parameter: {name}" if kind == _UNKNOWN else f"{name}={error['msg']}"
        return ApiError(400, told, name, code=kind)
    if kind == "missing":
        return ApiError(400, f"missing parameter: {'.'.join(where)}", param, code="missing_required_parameter")
    return ApiError(400, f"{'.'.join(where)}={shown(error.get('input'))}: {error['msg']}", param)


def usage(results: Sequence[Result], prompts: int) -> dict[str, int]:
    """Return token counts; the prompt of several choices (``len(results) / prompts`` each) counts once."""
    choices = max(1, len(results) // max(1, prompts))
    prompt_tokens = sum(r.prompt_tokens for r in results[::choices])
    completion_tokens = sum(r.completion_tokens for r in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def envelope(kind: str, request_id: str, model: str, created: int | None = None) -> dict[str, Any]:
    """Return the fields that every response body begins with."""
    return {"id": request_id, "object": kind, "created": created or int(time.time()), "model": model}
