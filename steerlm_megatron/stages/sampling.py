"""Drawing responses for many prompts: in this process, or from servers.

Owns: prompts → requests, sharding requests over data-parallel replicas, one call for both kinds of sampler. Does not
own: drawing (``generate``). Invariant: a response is a function of (model, prompt, levels, seed), not of how many
ranks drew it, as far as logits are the same to the last bit (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from steerlm_megatron.config.schema import Config, SamplingConfig
from steerlm_megatron.data.tokenizer import Tokenizer
from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.client import SamplingClient
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.group import model_group
from steerlm_megatron.generate.protocol import Request, Result, Sampler, SamplingParams, derive_seed
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.runtime.collectives import broadcast_object, gather_objects
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.stages.session import LoadedModel
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Message
from steerlm_megatron.steer.templates import Template


@dataclass(frozen=True)
class Prompt:
    """What a response is drawn for: the messages so far, and the levels asked for (None: unconditioned)."""

    id: str
    messages: tuple[Message, ...]
    levels: Mapping[str, int] | None


def open_generator(config: Config, loaded: LoadedModel) -> Generator:
    """The in-process sampler over a language model. Collective over the replica."""
    limits = replace(
        config.server, max_sequence_tokens=min(config.server.max_sequence_tokens, loaded.model_config.max_position)
    )
    limits.max_cache_tokens = max(limits.max_cache_tokens, limits.max_sequence_tokens)
    return Generator(loaded.model, loaded.tokenizer, loaded.template, limits, model_group(config.engine.timeout_sec))


def requests_for(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    template: Template,
    schema: AttributeSchema | None,
    sampling: SamplingConfig,
    max_sequence_tokens: int,
) -> list[Request]:
    """One request per prompt, each with a seed of its own. Prompts too long for the model lose their oldest
    messages.
    """
    requests = []
    room = max_sequence_tokens - sampling.max_tokens
    if room < 1:
        raise UserError(
            f"sampling.max_tokens={sampling.max_tokens} leaves no room for a prompt in "
            f"{max_sequence_tokens} tokens; lower it"
        )
    for index, prompt in enumerate(prompts):
        params = SamplingParams.from_config(sampling, seed=derive_seed(sampling.seed, index))
        ids, messages = _encode(prompt, prompt.messages, tokenizer, template, schema), prompt.messages
        while len(ids) > room:
            rest = _without_oldest(messages)
            if rest is None:
                raise UserError(
                    f"prompt {prompt.id} has {len(ids)} tokens; with "
                    f"sampling.max_tokens={sampling.max_tokens} only {room} fit"
                )
            messages = rest
            ids = _encode(prompt, messages, tokenizer, template, schema)
        requests.append(Request(prompt.id, tuple(ids), params))
    return requests


def _encode(
    prompt: Prompt,
    messages: tuple[Message, ...],
    tokenizer: Tokenizer,
    template: Template,
    schema: AttributeSchema | None,
) -> list[int]:
    used = schema if prompt.levels is not None else None
    return list(tokenizer.encode_segments(template.prefix(messages, used, prompt.levels))[0])


def _without_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """Without the oldest user turn and its answer, the system message kept; None if only one user turn is left."""
    head = messages[:1] if messages and messages[0].role == "system" else ()
    users = [i for i, m in enumerate(messages) if m.role == "user"]
    return None if len(users) < 2 else head + messages[users[1] :]


def sample_all(sampler: Sampler, requests: Sequence[Request], label: str) -> list[Result]:
    """Results in the order of ``requests``, on every rank. Collective over the world."""
    at = layout()
    with Progress(len(requests), label, unit="response", enabled=at.is_main) as bar:
        finished = tokens = 0

        def show(result: Result) -> None:
            nonlocal finished, tokens
            finished, tokens = finished + at.dp_size, tokens + result.completion_tokens
            bar.set(min(finished, len(requests)), tokens=tokens)

        if isinstance(sampler, SamplingClient):
            results = sampler.generate(requests, show) if at.is_main else None
            received = broadcast_object(results)
            assert received is not None
            return received
        mine = list(requests[at.dp_rank :: at.dp_size])
        own = sampler.generate(mine, show) if mine else []
    if at.dp_size == 1:
        return own
    out: dict[str, Result] = {}
    for part in gather_objects(own):
        out.update({result.id: result for result in part})
    return [out[request.id] for request in requests]
