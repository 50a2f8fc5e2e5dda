"""Parameters of OpenAI's and vLLM's APIs that this server lacks, with their neutral values, which ask for nothing.

Owns: the names and values that clients send by default (the fields of openai's request types, and vLLM's extra sampling
parameters), and the treatment of null. Does not own: the parameters that the server has (``api.py``). Invariant:
dropping a neutral value changes no response; any other value is refused by the parameter's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from steerlm_megatron.serve.errors import shown


class _Label:
    """Marks parameters whose values are all neutral: notes of the client, or hints about caches."""

    def __repr__(self) -> str:
        return "any value"


LABEL: Final = _Label()
Values = tuple[Any, ...] | _Label

# Name of a parameter -> its neutral values besides null.
COMMON: Mapping[str, Values] = {
    # OpenAI
    "metadata": LABEL,
    "prompt_cache_key": LABEL,
    "prompt_cache_options": LABEL,
    "prompt_cache_retention": LABEL,
    "response_format": ({"type": "text"},),
    "safety_identifier": LABEL,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "user": LABEL,
    # vLLM, sampling
    "bad_words": ([],),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # texts contain no special tokens
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),  # nothing is truncated
    "use_beam_search": (False,),
    "watermarking": (False,),
    # vLLM, the rest
    "add_special_tokens": (True, False),  # tokenizers here add no special tokens
    "cache_salt": LABEL,
    "ec_transfer_params": ({},),
    "guided_choice": (),
    "guided_decoding_backend": LABEL,  # there is no guided decoding
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
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True, False),  # there is no reasoning
    "media_io_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # there are no tools
    "prediction": (),
    "reasoning_effort": ("none",),
    "return_prompt_text": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION: Mapping[str, Values] = {**COMMON, "prompt_embeds": (), "suffix": ("",)}
TOKENIZE: Mapping[str, Values] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True, False),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "tools": ([],),
}
STREAM_OPTIONS: Mapping[str, Values] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
# Fields that servers and clients put into an assistant's message that has only text, and names of participants, which
# no template here uses.
MESSAGE: Mapping[str, Values] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "images": ([],),
    "name": LABEL,
    "provider_specific_fields": ({},),  # of litellm
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "thinking_blocks": ([],),  # of litellm
    "tool_calls": ([],),
}
TEXT_PART: Mapping[str, Values] = {"cache_control": LABEL, "prompt_cache_breakpoint": LABEL}


def without_nulls(value: Any) -> Any:
    """Return JSON without the keys whose value is null, at any depth. A null in a list stays."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def problem(name: str, value: Any, table: Mapping[str, Values]) -> str | None:
    """Return why the parameter ``name`` of ``table`` cannot have this value, or None if the value is neutral."""
    legal = table[name]
    if isinstance(legal, _Label) or any(same_json(without_nulls(value), one) for one in legal):
        return None
    remedy = "".join(f" or set it to {one!r}" for one in legal)
    return f"{shown(value)} is not supported by this server; leave it out{remedy}"


def same_json(value: Any, neutral: Any) -> bool:
    """Return whether two JSON values are equal; unlike in Python, true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
