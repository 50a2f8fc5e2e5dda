"""Hugging Face ``transformers`` as a contestant, in its best configurations, with the same weights and documents.

Owns: copying our weights into ``LlamaForCausalLM`` / ``LlamaForSequenceClassification``, its micro-batches
(length-sorted padding, pack-512, packed with one SDPA call per document), its training step. Invariant: every
configuration consumes the same tokens of the same documents in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.data.feed.packing import pack
from steerlm_megatron.model.gpt import PackedGPTModel

IGNORED = -100


@dataclass(frozen=True)
class Doc:
    """A document: ``tokens`` int64 [T]; ``target`` bool [T], True for tokens with loss; ``ends`` int64 [P], the ends of
    its scored responses, with ``values`` float32 [P, A].
    """

    tokens: torch.Tensor
    target: torch.Tensor
    ends: torch.Tensor
    values: torch.Tensor


def unrolled(docs: Sequence[Doc]) -> list[Doc]:
    """Return one document per scored response, as a sequence classifier takes them; the prompt is repeated for each."""
    return [
        Doc(doc.tokens[: end + 1], doc.target[: end + 1], doc.ends[i : i + 1], doc.values[i : i + 1])
        for doc in docs
        for i, end in enumerate(doc.ends.tolist())
    ]


Batch = dict[str, Any]


def per_document_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention of one packed row [1, N, T, H] by a causal SDPA call per document (``steerlm_bounds``)."""
    out = []
    for start, end in kwargs["steerlm_bounds"]:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("per_document_sdpa", per_document_sdpa)


def llama(model: ModelConfig, vocab: int, attention: str, labels: int | None = None) -> torch.nn.Module:
    """Return an untrained model of our shape: with an LM head, or ``labels`` regression outputs."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_query_groups or model.num_heads, rms_norm_eps=model.norm_epsilon,
        max_position_embeddings=model.max_position, rope_theta=model.rotary_base, tie_word_embeddings=False,
        attention_bias=False, use_cache=False, pad_token_id=0, attn_implementation=attention,
        **({"num_labels": labels, "problem_type": "regression"} if labels else {}),
    )  # fmt: skip
    return LlamaForSequenceClassification(config) if labels else LlamaForCausalLM(config)


@torch.no_grad()
def copy_weights(ours: PackedGPTModel, theirs: torch.nn.Module, model: ModelConfig) -> None:
    """Copy our weights (one rank, fp32) into theirs. Megatron-Core interleaves query, key and value rows per group."""
    mine = dict(ours.named_parameters())
    groups = model.num_query_groups or model.num_heads
    dim, per = model.hidden_size // model.num_heads, model.num_heads // groups
    state = {"model.embed_tokens.weight": mine["embedding.word_embeddings.weight"],
             "model.norm.weight": mine["decoder.final_layernorm.weight"]}  # fmt: skip
    for i in range(model.num_layers):
        a, b = f"decoder.layers.{i}.", f"model.layers.{i}."
        qkv = mine[a + "self_attention.linear_qkv.weight"].view(groups, per + 2, dim, model.hidden_size)
        for name, part in (("q", qkv[:, :per]), ("k", qkv[:, per : per + 1]), ("v", qkv[:, per + 1 :])):
            state[f"{b}self_attn.{name}_proj.weight"] = part.reshape(-1, model.hidden_size)
        state[b + "self_attn.o_proj.weight"] = mine[a + "self_attention.linear_proj.weight"]
        gate, up = mine[a + "mlp.linear_fc1.weight"].chunk(2)
        state |= {b + "mlp.gate_proj.weight": gate, b + "mlp.up_proj.weight": up}
        state[b + "mlp.down_proj.weight"] = mine[a + "mlp.linear_fc2.weight"]
        state[b + "input_layernorm.weight"] = mine[a + "input_layernorm.weight"]
        state[b + "post_attention_layernorm.weight"] = mine[a + "pre_mlp_layernorm.weight"]
    if "output_layer.weight" in mine:
        state["lm_head.weight"] = mine["output_layer.weight"]
    else:
        state["score.weight"] = mine["output_layer.regression.weight"]
    target = dict(theirs.named_parameters())
    assert set(state) == set(target), set(state) ^ set(target)
    for name, tensor in state.items():
        target[name].copy_(tensor[: target[name].shape[0]])


def sorted_padding(docs: Sequence[Doc], slots: int, regression: bool) -> Iterator[Batch]:
    """Yield batches of like lengths, of at most ``slots`` tokens with padding (and at least one document)."""
    ordered = sorted(docs, key=lambda doc: len(doc.tokens))
    group: list[Doc] = []
    for doc in [*ordered, None]:
        if group and (doc is None or len(doc.tokens) * (len(group) + 1) > slots):
            yield _padded(group, regression)
            group = []
        if doc is not None:
            group.append(doc)


def _padded(docs: Sequence[Doc], regression: bool) -> Batch:
    width = max(len(doc.tokens) for doc in docs)
    ids = torch.zeros(len(docs), width, dtype=torch.int64)
    mask = torch.zeros(len(docs), width, dtype=torch.int64)
    labels = torch.full((len(docs), width), IGNORED)
    for i, doc in enumerate(docs):
        size = len(doc.tokens)
        ids[i, :size], mask[i, :size] = doc.tokens, 1
        labels[i, :size] = torch.where(doc.target, doc.tokens, IGNORED)
    if regression:
        ends = mask.sum(1) - 1
        return {"input_ids": ids, "attention_mask": mask, "ends": ends, "values": torch.cat([d.values for d in docs])}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def chopped(docs: Sequence[Doc], width: int, slots: int) -> Iterator[Batch]:
    """Make pack-``width`` batches: documents end to end, cut into rows of ``width`` tokens that attend across
    documents.
    """
    tokens = torch.cat([doc.tokens for doc in docs])
    labels = torch.cat([_first_masked(doc) for doc in docs])
    rows = -(-len(tokens) // width)
    ids = torch.zeros(rows * width, dtype=torch.int64)
    out = torch.full((rows * width,), IGNORED)
    ids[: len(tokens)], out[: len(tokens)] = tokens, labels
    for start in range(0, rows, max(1, slots // width)):
        part = slice(start, start + max(1, slots // width))
        yield {"input_ids": ids.view(rows, width)[part], "labels": out.view(rows, width)[part]}


def packed(docs: Sequence[Doc], width: int) -> Iterator[Batch]:
    """Pack complete documents into rows of ``width`` (best fit), with positions that restart and document bounds."""
    lengths = np.array([len(doc.tokens) for doc in docs])
    offsets, order = pack(lengths, width, seed=0)
    for a, b in zip(offsets, offsets[1:], strict=False):
        row = [docs[i] for i in order[a:b]]
        ends = np.cumsum([len(doc.tokens) for doc in row]).tolist()
        yield {
            "input_ids": torch.cat([doc.tokens for doc in row])[None],
            "labels": torch.cat([_first_masked(doc) for doc in row])[None],
            "position_ids": torch.cat([torch.arange(len(doc.tokens)) for doc in row])[None],
            "steerlm_bounds": list(zip([0, *ends], ends, strict=False)),
        }


def _first_masked(doc: Doc) -> torch.Tensor:
    labels = torch.where(doc.target, doc.tokens, IGNORED)
    labels[0] = IGNORED  # the first token of a document is not predicted
    return labels


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], clip: float
) -> Callable[[], float]:
    """Return a function that takes one optimizer step over all ``batches`` and returns the loss, normalised over all.

    For language modelling it is the model's loss function with ``num_items_in_batch``, as transformers' Trainer calls
    it; for regression the squared error at each response's end, as in ours.
    """
    regression = "values" in batches[0]
    items = (
        sum(b["values"].numel() for b in batches)
        if regression
        else sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches)
    )

    def step() -> float:
        total = 0.0
        for batch in batches:
            if regression:
                loss = _squared_error(model, batch) / items
            else:
                loss = model(**batch, num_items_in_batch=torch.tensor(items, device=batch["labels"].device)).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _squared_error(model: Any, batch: Batch) -> torch.Tensor:
    hidden_BSD = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    pooled_BD = hidden_BSD[torch.arange(len(hidden_BSD), device=hidden_BSD.device), batch["ends"]]
    return (model.score(pooled_BD).float() - batch["values"]).square().sum()
