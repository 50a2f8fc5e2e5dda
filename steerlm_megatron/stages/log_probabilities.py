"""The log-probability that a language model gives to responses.

Owns: rendering conversations as training does, batches, distribution to replicas. Does not own: the forward pass
(``model/predict.py``), what is made of it (``weigh.py``, ``evaluate_shift.py``). Invariant: a response's tokens are
those that ``train_sft`` would train: its text and what ends its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steerlm_megatron.data.feed.collate import collate
from steerlm_megatron.data.views import Sample, View, build_documents, make_sample
from steerlm_megatron.model.arithmetic import forward_flops, squares
from steerlm_megatron.model.predict import sum_log_probabilities
from steerlm_megatron.observe.cost import CostMeter
from steerlm_megatron.runtime.collectives import broadcast_in_replica, gather_objects
from steerlm_megatron.runtime.independent_work import independent_work
from steerlm_megatron.runtime.parallel import layout
from steerlm_megatron.stages.scoring import default_batch_tokens, rows_by_length
from steerlm_megatron.stages.session import LoadedModel
from steerlm_megatron.steer.records import Conversation


def log_probabilities(
    loaded: LoadedModel, conversations: Sequence[Conversation], view: View, batch_tokens: int | None, cost: CostMeter
) -> list[float | None]:
    """Return the sum of log P(token) over the trained tokens of each conversation, natural logarithm; None where a
    conversation is longer than the model's positions. Collective over the replica.

    Args:
        view: ``acsft``, with the label lines of the conversation's attributes, or ``sft``, without.
        batch_tokens: packed tokens of a forward pass; None suits the device.
        cost: the account of what is computed.
    """
    schema = loaded.conditioned_on if view == "acsft" else None
    if schema is None:
        conversations = [
            replace(one, messages=tuple(replace(m, attributes=None) for m in one.messages)) for one in conversations
        ]
    documents = build_documents(conversations, loaded.tokenizer, loaded.template, schema)
    samples = [make_sample(one, view, loaded.model_config.max_position, "drop") for one in documents]
    there: list[tuple[int, Sample]] = [(i, sample) for i, sample in enumerate(samples) if sample is not None]
    out: list[float | None] = [None] * len(samples)
    for row in rows_by_length([len(one.tokens_T) for _, one in there], max(batch_tokens or default_batch_tokens(), 8)):
        members = [there[i][1] for i in row]
        lengths = [len(sample.tokens_T) for sample in members]
        with cost.work():
            batch = collate([members], sum(lengths))
            sums = sum_log_probabilities(loaded.model, batch)
            values = broadcast_in_replica(None if sums is None else sums.numpy())
        model, rows = loaded.model_config, loaded.meta.vocab_size
        flops = forward_flops(model, rows, sum(lengths), squares(lengths), batch.target_tokens)
        cost.add(flops, scored=sum(lengths))
        assert values is not None and len(values) == len(members)
        for i, value in zip(row, values.tolist(), strict=True):
            out[there[i][0]] = value
    return out


def log_probabilities_of_all(
    loaded: LoadedModel, conversations: Sequence[Conversation], view: View, batch_tokens: int | None, cost: CostMeter
) -> list[float | None]:
    """Do :func:`log_probabilities` with conversations distributed to data-parallel replicas. Collective over the
    world.
    """
    at = layout()
    if at.dp_size == 1:
        return log_probabilities(loaded, conversations, view, batch_tokens, cost)
    with independent_work():
        own = log_probabilities(loaded, conversations[at.dp_rank :: at.dp_size], view, batch_tokens, cost)
    parts = dict(gather_objects((at.dp_rank, own)))
    return [parts[i % at.dp_size][i // at.dp_size] for i in range(len(conversations))]
