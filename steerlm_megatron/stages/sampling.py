"""Draw responses for many prompts, in this process or from servers.

Owns: turning prompts into requests, distributing requests to data-parallel replicas, one interface for both kinds of
sampler, and resuming from the responses of a killed attempt. Does not own: drawing (``generate``). Invariant: a
response is a function of (model, prompt, levels, seed) and not of the number of ranks, as far as logits are the same to
the last bit (docs/numerics.md).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from steerlm_megatron.config.commands import COMMANDS
from steerlm_megatron.config.load import job_of_array
from steerlm_megatron.config.schema import Config, GenerationConfig, SamplingConfig
from steerlm_megatron.errors import TryLater, UserError
from steerlm_megatron.generate.cache_size import limits_for
from steerlm_megatron.generate.engine import Engine
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.group import model_group
from steerlm_megatron.generate.protocol import Request, Result, Sampler, SamplingParams, derive_seed
from steerlm_megatron.generate.vocabulary import stop_ids_of
from steerlm_megatron.model.arithmetic import forward_flops
from steerlm_megatron.observe.cost import CostMeter
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.observe.progress import Progress
from steerlm_megatron.observe.runfolder import JOURNAL, remove_journal
from steerlm_megatron.runtime.collectives import gather_objects
from steerlm_megatron.runtime.device import device
from steerlm_megatron.runtime.independent_work import independent_work
from steerlm_megatron.serve.client import Expected, SamplingClient, ServerFailure
from steerlm_megatron.serve.gate import read_keys
from steerlm_megatron.stages.journal import open_journal
from steerlm_megatron.stages.record_reader import REJECTED_FILE, RecordReader
from steerlm_megatron.stages.session import LoadedModel, OpenedCheckpoint, Session, load_model, open_checkpoint
from steerlm_megatron.stages.vllm import open_vllm, remove_exported
from steerlm_megatron.steer.records import Conversation, Message

ADDRESS = ".url"  # end of the name of a file with a server's address
_NOTE_SEC = 2.0  # seconds between two writes of the journal


@dataclass(frozen=True)
class Prompt:
    """A prompt for a response: the messages so far, the requested levels (None without conditioning), and the record's
    ``file:line``.
    """

    id: str
    messages: tuple[Message, ...]
    levels: Mapping[str, int] | None
    where: str


@dataclass(frozen=True)
class Drawn:
    """A response: its text, why it ended (``stop``, ``length``), and how many tokens were drawn for it."""

    text: str
    finish_reason: str
    tokens: int


def open_drawing(config: Config, checkpoint: str | None = None, key: str = "checkpoint") -> OpenedCheckpoint:
    """Open ``checkpoint`` (null: that of the configuration; ``key`` names it) to draw from it: with its weights, unless
    servers or vLLM have these. Collective over the world.
    """
    checkpoint = checkpoint or str(config.checkpoint)
    if _has_servers(config) or config.generation.engine == "vllm":
        return open_checkpoint(checkpoint, key, head="lm")
    return load_model(checkpoint, config, key, head="lm", gather_logits=True)


def _has_servers(config: Config) -> bool:
    reads = COMMANDS[config.command].reads_key("server.urls")  # ``serve`` has server.folder for its address
    return reads and bool(config.server.urls or config.server.folder)


@contextmanager
def opened_sampler(here: Session, opened: OpenedCheckpoint) -> Iterator[Sampler]:
    """Yield the sampler over what :func:`open_drawing` returned: a client of ``server.urls``, or an engine that this
    process has. Collective over the world.
    """
    config = here.config
    if _has_servers(config):
        urls = config.server.urls or find_servers(Path(config.server.folder or ""), config.server.count)
        keys = read_keys(config.server.api_keys, config.server.api_key_file)
        client = SamplingClient(
            urls,
            config.generation.concurrency,
            expected=expected_of(opened),
            api_key=keys[0] if keys else None,
            wait_sec=config.server.wait_sec,
        )
        client.check()
        yield client
        return
    engine = open_engine(here, opened)
    try:
        yield engine
    finally:
        if engine.group.is_leader:
            engine.close()


def identity(opened: OpenedCheckpoint) -> dict[str, Any]:
    """Return what tells the model of one checkpoint from that of another: the step, the tokenizer's hash, and a hash of
    what the checkpoint says of the run that trained it. An export has the identity of its checkpoint.
    """
    meta = opened.meta
    trained = {
        "model": meta.model, "task": meta.task, "schema": meta.schema, "template": meta.template,
        "metric": meta.metric, "label_mean": meta.label_mean, "label_counts": meta.label_counts, "base": meta.base,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True, default=str).encode()).hexdigest()
    return {"step": meta.step, "tokenizer": opened.tokenizer.hash, "training": digest}


def expected_of(opened: OpenedCheckpoint) -> Expected:
    """Return what servers of this checkpoint's model, ours or others, have to agree with."""
    template, tokenizer = opened.template, opened.tokenizer
    return Expected(
        identity(opened),
        tokenizer,
        frozenset(stop_ids_of(tokenizer, template)),
        tuple(template.stop_strings),
        template.response_suffix,
    )


def find_servers(folder: Path, count: int, timeout_sec: float = 1800.0) -> list[str]:
    """Wait until ``count`` servers have written their addresses into ``folder`` (``server.folder``); return these.

    Raises:
        TryLater: they have not after ``timeout_sec``.
    """
    end = time.monotonic() + timeout_sec
    while True:
        urls = sorted(path.read_text(encoding="utf-8").strip() for path in folder.glob(f"*{ADDRESS}"))
        if len(urls) >= count:
            return urls
        if time.monotonic() > end:
            raise TryLater(
                f"server.folder={folder}: {len(urls)} of server.count={count} servers have written their addresses "
                f"within {timeout_sec:g} s; see the logs of their jobs"
            )
        time.sleep(1.0)


def open_engine(here: Session, opened: OpenedCheckpoint, max_queue: int | None = None) -> Engine:
    """Return the engine that ``generation.engine`` names, over what :func:`open_drawing` returned. ``max_queue`` is set
    for a server. Collective over the world.
    """
    config = here.config
    if config.generation.engine == "vllm":
        return open_vllm(here, opened, max_queue)
    assert isinstance(opened, LoadedModel), "a generator in this process needs the weights"
    return open_generator(config, opened, max_queue)


def open_generator(config: Config, loaded: LoadedModel, max_queue: int | None = None) -> Generator:
    """Return the generator over a language model in this process. ``max_queue`` is set for a server. Collective over
    the replica.
    """
    group, shape = model_group(config.engine.timeout_sec), loaded.model.cache_shape()
    limits = limits_for(config.generation, loaded.model_config.max_position, shape, device(), group)
    if max_queue is not None:
        limits = replace(limits, max_queue=max_queue)
    return Generator(loaded.model, loaded.tokenizer, loaded.template, limits, group)


class PromptRefused(UserError):
    """The model cannot be asked this prompt; ``reason`` is what the accounting calls that."""

    reason = "prompt_refused"


class PromptTooLong(PromptRefused):
    """A prompt does not fit, not even without its earlier turns; the message says which key to change."""

    reason = "prompt_too_long"


def request_for(
    index: int, prompt: Prompt, opened: OpenedCheckpoint, sampling: SamplingConfig, limits: GenerationConfig
) -> Request:
    """Return the request for the ``index``-th response of a command, with a seed derived from the index. A prompt that
    is too long for the model loses its oldest turns.

    Raises:
        PromptRefused: the model's chat template cannot write it.
        PromptTooLong: its last turn alone is too long.
    """
    if (refusal := opened.template.refusal(prompt.messages)) is not None:
        raise PromptRefused(f"{prompt.where}: {refusal}; data.on_error=skip leaves such prompts out")
    most, longest = limits.max_sequence_tokens, opened.model_config.max_position
    room = min(most, longest) - sampling.max_tokens
    ids, messages = _encode(prompt, prompt.messages, opened), prompt.messages
    while len(ids) > room:
        rest = _without_oldest(messages)
        if rest is None:
            limit, raised = f"generation.max_sequence_tokens={most}", "raise that, "
            if longest <= most:
                limit, raised = f"the model's max_position={longest}", ""
            raise PromptTooLong(
                f"{prompt.where}: the last turn of the prompt {prompt.id} has {len(ids)} tokens; with "
                f"sampling.max_tokens={sampling.max_tokens}, {max(0, room)} fit into {limit}: shorten it, {raised}"
                "lower sampling.max_tokens, or set data.on_error=skip to leave such prompts out"
            )
        messages = rest
        ids = _encode(prompt, messages, opened)
    params = SamplingParams.from_config(sampling, seed=derive_seed(sampling.seed, index))
    return Request(prompt.id, tuple(ids), params, opened.template.response_prefix)


def requests_for(
    prompts: Sequence[Prompt], opened: OpenedCheckpoint, config: Config, reader: RecordReader, part: str
) -> tuple[list[Prompt], list[Request]]:
    """Return the prompts that fit, and a request for each. One that does not fit is skipped and counted in ``part`` of
    ``reader`` or, with ``data.on_error=error``, raised as an error. Collective over the world.
    """
    check_room(opened, config)
    kept: list[Prompt] = []
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        try:
            requests.append(request_for(index, prompt, opened, config.sampling, config.generation))
        except PromptRefused as error:
            skip_prompt(prompt, error, reader, part)
        else:
            kept.append(prompt)
    reader.list_rejected()
    if not kept:
        raise UserError(f"none of the {len(prompts)} prompts fits; see {REJECTED_FILE} in the run folder")
    return kept, requests


def check_room(opened: OpenedCheckpoint, config: Config) -> None:
    """Refuse a ``sampling.max_tokens`` that leaves no room for any prompt."""
    limit = min(config.generation.max_sequence_tokens, opened.model_config.max_position)
    if config.sampling.max_tokens >= limit:
        raise UserError(
            f"sampling.max_tokens={config.sampling.max_tokens} leaves no room for a prompt in {limit} tokens; lower it"
        )


def skip_prompt(prompt: Prompt, error: PromptRefused, reader: RecordReader, part: str) -> None:
    """Skip a prompt under ``data.on_error=skip``; otherwise raise ``error``."""
    if reader.on_error != "skip":
        raise error
    record = Conversation(prompt.id, prompt.messages)
    reader.skip(part, error.reason, prompt.where, str(error).removeprefix(f"{prompt.where}: "), record)


def _encode(prompt: Prompt, messages: tuple[Message, ...], opened: OpenedCheckpoint) -> list[int]:
    used = opened.schema if prompt.levels is not None else None
    return list(opened.tokenizer.encode_segments(opened.template.prefix(messages, used, prompt.levels))[0])


def _without_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """Return ``messages`` without the oldest user turn and its answer; None if only one user turn is left. The system
    message stays.
    """
    head = messages[:1] if messages and messages[0].role == "system" else ()
    users = [i for i, m in enumerate(messages) if m.role == "user"]
    return None if len(users) < 2 else head + messages[users[1] :]


def draw(
    here: Session, loaded: OpenedCheckpoint, sampler: Sampler, requests: Sequence[Request], name: str, label: str
) -> list[Drawn]:
    """Draw responses and return them in the order of ``requests``, on every rank. Collective over the world.

    Each replica writes its responses into the run's journal ``name`` every two seconds, and the next attempt resumes
    from there. A job of an array draws its part of them, and returns what is drawn so far. The servers are assumed to
    serve the model ``loaded`` in both attempts. ``label`` is for the progress bar.

    Raises:
        TryLater: servers failed; what was drawn is in the journal.
    """
    at = here.layout
    asked = [(request.id, request.prompt_ids, asdict(request.params)) for request in requests]
    drawn_by = {} if here.config.generation.engine == "megatron" else {"engine": here.config.generation.engine}
    journal, found = open_journal(here, _journal(name), loaded, {"requests": asked, **drawn_by})
    done = {index: Drawn(*values) for index, values in found.items()}
    if done:
        get_logger(__name__).info("resuming: %d of %d responses are drawn", len(done), len(requests))
    # Two records may have the same id, so the index makes ids unique.
    task, tasks = job_of_array(here.config)
    left = [i for i in range(len(requests)) if i not in done and (task is None or i % tasks == task)]
    todo = [replace(requests[i], id=f"{i}:{requests[i].id}") for i in left]
    remote = isinstance(sampler, SamplingClient)
    mine = todo if remote else todo[at.dp_rank :: at.dp_size]
    new: dict[int, Drawn] = {}
    finished, tokens = len(done), 0
    progress = Progress(len(requests), label, unit="response", initial=len(done), enabled=at.is_main)
    with independent_work(), progress as bar, journal.recorder(_NOTE_SEC) as note:

        def take(result: Result) -> None:  # runs on the first rank of the replica
            nonlocal finished, tokens
            count_response(here.cost, result, None if remote else loaded)
            index = int(result.id.split(":", 1)[0])
            new[index] = Drawn(result.text, result.finish_reason, result.completion_tokens)
            note(index, astuple(new[index]))
            finished, tokens = finished + (1 if remote else at.dp_size), tokens + result.completion_tokens
            bar.set(min(finished, len(requests)), tokens=tokens)

        if mine and (at.is_main or not remote):
            shared = sampler.shared_prompt_tokens if isinstance(sampler, Engine) else 0
            try:
                with here.cost.work():
                    sampler.generate(mine, take)
            except ServerFailure as error:
                told = "start the same command again: the responses drawn so far are kept"
                raise TryLater(f"server.urls: {error}; {told}") from error
            finally:
                if isinstance(sampler, Engine):
                    count_shared(here.cost, sampler.shared_prompt_tokens - shared, loaded)
    for part in gather_objects(new):
        done.update(part)
    return [done[index] for index in range(len(requests)) if index in done]


def count_response(cost: CostMeter, result: Result, opened: OpenedCheckpoint | None) -> None:
    """Add a response to the account of a run; ``opened`` is the model that drew it here, None if a server did. Its
    prompt is counted as if no other one shared its start (:func:`count_shared`).
    """
    flops, drawn = 0.0, result.completion_tokens
    if opened is not None:
        computed = max(0, result.prompt_tokens + drawn - 1)  # nothing follows the last token
        flops = forward_flops(opened.model_config, opened.meta.vocab_size, computed, computed**2, drawn)
    cost.request(result.prompt_tokens, drawn, result.seconds, flops)


def count_shared(cost: CostMeter, tokens: int, opened: OpenedCheckpoint) -> None:
    """Take what was not computed off the account of a run: ``tokens`` of prompts that the cache had already. The work
    of attention among these tokens stays counted, since their lengths are not known; it is a small part.
    """
    cost.add(-forward_flops(opened.model_config, opened.meta.vocab_size, tokens, 0, 0), cached=tokens)


def _journal(name: str) -> str:
    return f"{JOURNAL}{name}"


def forget(here: Session, names: Iterable[str]) -> None:
    """Remove the run's journals of these ``names``, and models that were written for vLLM, once the responses are in
    the output. Only the main rank calls it.
    """
    for name in names:
        remove_journal(here.folder / _journal(name))
    remove_exported(here)
