"""Parameters of OpenAI's and vLLM's APIs that this server does not have, at the values that ask for nothing.

Owns: the names and values that clients send by default (the fields of openai's request types, and vLLM's extra sampling
parameters), and what becomes of null. Does not own: the parameters that the server has (``api.py``).
Invariant: what is taken away changes no response; a value that asks for something is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from steerlm_megatron.serve.errors import shown


class _Label:
    """Any value will do: it is a note of the client's own, or a hint about caches that changes no response."""

    def __repr__(self) -> str:
        return "any value"


LABEL: Final = _Label()
Values = tuple[Any, ...] | _Label

# Name -> the values, besides null, that ask for nothing.
COMMON: Mapping[str, Values] = {
    # OpenAI
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "metadata": LABEL,
    "presence_penalty": (0,),
    "prompt_cache_key": LABEL,
    "prompt_cache_options": LABEL,
    "prompt_cache_retention": LABEL,
    "response_format": ({"type": "text"},),
    "safety_identifier": LABEL,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "user": LABEL,
    # vLLM, sampling
    "allowed_token_ids": (),
    "bad_words": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # there are none in a text
    "stop_token_ids": ([],),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),  # nothing is truncated
    "use_beam_search": (False,),
    "watermarking": (False,),
    # vLLM, the rest
    "add_special_tokens": (True, False),  # tokenizers here have none to add
    "cache_salt": LABEL,
    "ec_transfer_params": ({},),
    "echo": (False,),
    "guided_choice": (),
    "guided_decoding_backend": LABEL,  # nothing is guided
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": LABEL,
    "kv_transfer_params": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "request_id": LABEL,
    "return_mm_kwargs": (True, False),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "session_id": LABEL,
    "stream_interval": (1,),
    "structured_outputs": (),
    "vllm_xargs": ({},),
}
CHAT: Mapping[str, Values] = {
    **COMMON,
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True, False),  # there is none
    "media_io_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # there are no tools
    "prediction": (),
    "reasoning_effort": ("none",),
    "return_prompt_text": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION: Mapping[str, Values] = {**COMMON, "prompt_embeds": (), "suffix": ("",)}
STREAM_OPTIONS: Mapping[str, Values] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
# What servers and their clients put into an assistant's message that has text alone, and names of participants, of
# which no template here makes use.
MESSAGE: Mapping[str, Values] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": LABEL,
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_calls": ([],),
}
TEXT_PART: Mapping[str, Values] = {"cache_control": LABEL, "prompt_cache_breakpoint": LABEL}


def without_nulls(value: Any) -> Any:
    """JSON without the keys whose value is null, at any depth: null is absent. A null in a list stays."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def problem(name: str, value: Any, table: Mapping[str, Values]) -> str | None:
    """Return why the parameter ``name`` of ``table`` cannot have this value, or None where it asks for nothing."""
    legal = table[name]
    if isinstance(legal, _Label) or any(same_json(without_nulls(value), one) for one in legal):
        return None
    remedy = "".join(f" or set it to {one!r}" for one in legal)
    return f"{shown(value)} is not supported by this server; leave it out{remedy}"


def same_json(value: Any, neutral: Any) -> bool:
    """Equality of JSON: true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
