"""Sampling parameters on their way between the API's request bodies and the engine, and results on their way back.

Owns: which field of a body is which parameter of ``SamplingParams``, in both directions, and how a client reads a
choice. Does not own: the parameters' ranges (``api.py``, ``protocol.py``), how a server shows a choice
(``service.py``). Invariant: what :func:`fields_of` makes of parameters, :func:`params_of` makes the same parameters of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from steerlm_megatron.config.schema import SamplingConfig
from steerlm_megatron.generate.protocol import Request, Result, SamplingParams, Top
from steerlm_megatron.serve.api import ChatBody, CompletionBody

# These have the same name in a body, where they are lists or an object, and in ``SamplingParams``.
_SAME = (
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
)
_TOKEN = "token_id:"  # the name of a token begins with this where ids are asked for
_SEQUENCES = ("stop", "stop_token_ids", "allowed_token_ids", "logit_bias")


def params_of(body: ChatBody | CompletionBody, defaults: SamplingConfig, max_tokens: int, seed: int) -> SamplingParams:
    """Return the parameters that a body asks for; ``defaults`` are those of what it leaves open."""

    def given(name: str) -> Any:
        value = getattr(body, name)
        return getattr(defaults, name) if value is None else value

    sequences: dict[str, Any] = {name: getattr(body, name) for name in _SEQUENCES}
    sequences = {name: value if value is None else tuple(dict.fromkeys(value)) for name, value in sequences.items()}
    echo = isinstance(body, CompletionBody) and body.echo
    return SamplingParams(
        temperature=given("temperature"),
        top_k=max(0, given("top_k")),
        top_p=given("top_p"),
        max_tokens=max_tokens,
        seed=seed,
        logprobs=body.wants_logprobs,
        top_logprobs=body.likely,
        prompt_logprobs=body.likely if echo and body.wants_logprobs else None,
        **{name: getattr(body, name) for name in _SAME},
        **sequences,
    )


def fields_of(params: SamplingParams) -> dict[str, Any]:
    """Return the fields of a completion's body that ask for ``params``; a field that asks for nothing is left out, so
    that servers which lack the parameter can be asked too.
    """
    body: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "seed": params.seed,
    }
    neutral = {field.name: field.default for field in fields(SamplingParams)}
    for name in (*_SAME, *_SEQUENCES):
        value = getattr(params, name)
        if value != neutral[name]:
            body[name] = list(value) if isinstance(value, tuple) else value
    if params.logit_bias:
        body["logit_bias"] = {str(i): bias for i, bias in params.logit_bias}
    if params.logprobs or params.top_logprobs or params.prompt_logprobs is not None:
        body["logprobs"] = max(params.top_logprobs, params.prompt_logprobs or 0)
    if params.top_logprobs or params.prompt_logprobs:
        body["return_tokens_as_token_ids"] = True
    if params.prompt_logprobs is not None:
        body["echo"] = True
    return body


def result_of(request: Request, choice: Mapping[str, Any], usage: Mapping[str, Any]) -> Result:
    """Return the result of a request whose :func:`fields_of` a server was asked for, with ``return_token_ids``.

    Raises KeyError, IndexError, TypeError, ValueError if the server does not answer as ours does."""
    params, text = request.params, choice["text"]
    shown = choice.get("logprobs") or {}
    echoed = len(request.prompt_ids) if params.prompt_logprobs is not None else 0
    if echoed:
        text = text[shown["text_offset"][echoed] :]
    text = text.removeprefix(request.text_prefix)  # servers give all of a completion's text
    return Result(
        id=request.id,
        token_ids=tuple(choice["token_ids"]),
        text=text,
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        logprobs=tuple(shown["token_logprobs"][echoed:]) if params.logprobs else None,
        top_logprobs=(
            tuple(_top(names, params.top_logprobs) for names in shown["top_logprobs"][echoed:])
            if params.top_logprobs
            else None
        ),
        stop_reason=choice.get("stop_reason"),
        prompt_logprobs=tuple(shown["token_logprobs"][:echoed]) if echoed else None,
        prompt_top_logprobs=(
            (None, *(_top(names, params.prompt_logprobs or 0) for names in _places(shown, echoed))) if echoed else None
        ),
    )


def _places(shown: Mapping[str, Any], echoed: int) -> list[Any]:
    return [{}] * (echoed - 1) if shown["top_logprobs"] is None else shown["top_logprobs"][1:echoed]


def _top(names: Mapping[str, float], count: int) -> Top:
    """Return the most likely of a place's tokens, without the chosen one that is shown besides."""
    pairs = sorted(names.items(), key=lambda pair: -pair[1])[:count]
    return tuple((int(name.removeprefix(_TOKEN)), value) for name, value in pairs)
