"""Sampling parameters on their way between the API's request bodies and the engine.

Owns: which field of a body is which parameter of ``SamplingParams``, in both directions. Does not own: their ranges
(``api.py``, ``protocol.py``). Invariant: what :func:`fields_of` makes of parameters, :func:`params_of` makes the same
parameters of.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from steerlm_megatron.config.schema import SamplingConfig
from steerlm_megatron.generate.protocol import SamplingParams
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
_SEQUENCES = ("stop", "stop_token_ids", "allowed_token_ids", "logit_bias")


def params_of(body: ChatBody | CompletionBody, defaults: SamplingConfig, max_tokens: int, seed: int) -> SamplingParams:
    """Return the parameters that a body asks for; ``defaults`` are those of what it leaves open."""

    def given(name: str) -> Any:
        value = getattr(body, name)
        return getattr(defaults, name) if value is None else value

    sequences = {name: getattr(body, name) for name in _SEQUENCES}
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
        **{name: value if value is None else tuple(dict.fromkeys(value)) for name, value in sequences.items()},
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
    if params.prompt_logprobs is not None:
        body["echo"] = True
    return body
