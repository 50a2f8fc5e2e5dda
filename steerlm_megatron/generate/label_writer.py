"""Forced-format decoding of label strings: the probability of every level of every attribute, by a language model.

Owns: the passes over many conversations side by side, their key/value cache, the tree of the levels' tokens. Does not
own: a label's tokens (``data/label_tokens.py``), which conversations share a batch and what becomes of probabilities
(``stages/scoring.py``). Invariants: the text of a label is forced, and only levels are chosen, so that each string is
whole and has its attributes in order; the chosen level of an attribute stands before the next one, and all labels of a
conversation before the next of its labels; what a conversation gets does not depend on the others in its batch.

It is Eq. 2 of the SteerLM paper (arXiv 2310.05344 §3.2), v_t = argmax P(v_t | x, y, v_<t), with v_t a level rather than
a token. The released annotator of the paper forces the format in the same way, one token per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from steerlm_megatron.data.label_tokens import Ids, LabelTokens
from steerlm_megatron.generate.forward import CachedForward
from steerlm_megatron.generate.group import LocalGroup, ModelGroup
from steerlm_megatron.generate.kv_cache import BlockTables, KVCache, Span
from steerlm_megatron.model.packed_tokens import PackedTokens
from steerlm_megatron.runtime.device import to_device

_BLOCK_TOKENS = 16
Probabilities = npt.NDArray[np.float64]


class NotFinite(Exception):
    """The model's logits for conversation number ``args[0]`` of a batch are NaN."""


class LevelTree:
    """The tokens of the levels as a tree: where levels have several tokens, a prefix of some is an inner node.

    The probability of a level is that of its tokens one after the other. Where the tokens of one level go on as another
    one (``1`` and ``10`` of a tokenizer that takes digits apart), the token after the level is a part of its string,
    because it says that the level has ended. So no string is the beginning of another one.

    Attributes:
        inner: the prefixes that some level goes on from, the empty one first. They are sorted, so that a prefix stands
            after each shorter one that it begins with, and no other prefix of that length stands between the two.
        paths: of each level the steps (number among ``inner``, token); the token is None for what follows the level.
    """

    def __init__(self, levels: Sequence[Ids]) -> None:
        self.inner: list[Ids] = sorted({ids[:depth] for ids in levels for depth in range(len(ids))})
        number_of = {prefix: number for number, prefix in enumerate(self.inner)}
        self.paths: list[list[tuple[int, int | None]]] = []
        for ids in levels:
            path: list[tuple[int, int | None]] = [(number_of[ids[:at]], token) for at, token in enumerate(ids)]
            if ids in number_of:
                path.append((number_of[ids], None))
            self.paths.append(path)


@dataclass
class _Row:
    """A conversation of a batch."""

    number: int  # its row in the cache's tables
    contexts: Sequence[Sequence[int]]
    found: list[list[Probabilities]]  # by turn, then attribute
    pending: list[int]  # tokens to be fed before the next level
    length: int = 0  # tokens in the cache
    attribute: int = field(default=0)  # number of the next one among those that are written

    @property
    def turn(self) -> int:
        return len(self.found) - 1


class LabelWriter:
    """Writes the labels of conversations side by side. Every rank of the replica makes the same calls."""

    def __init__(
        self,
        model: torch.nn.Module,
        labels: LabelTokens,
        attributes: Sequence[int],
        words: int,
        group: ModelGroup | None = None,
    ) -> None:
        """``model`` gives full-vocabulary logits on every rank of its last stage.

        Args:
            attributes: what is written, as indices in schema order.
            words: how many of the model's columns are of the vocabulary; the others pad it.
            group: None for a replica of one process.
        """
        self.group = group or LocalGroup()
        self.labels, self.attributes, self.words = labels, list(attributes), words
        self.tree = LevelTree(labels.levels)
        self._compute = CachedForward(model, self.group)
        self._cache: KVCache | None = None

    def tokens_of(self, contexts: Sequence[Sequence[int]]) -> int:
        """Return how many tokens of the cache a conversation takes at most."""
        return sum(map(len, contexts)) + len(contexts) * (self.labels.longest(self.attributes) - 1)

    @torch.inference_mode()
    def write(self, conversations: Sequence[Sequence[Sequence[int]]]) -> list[list[list[Probabilities]]]:
        """Return for each conversation, turn and attribute the probabilities of the levels, float64 [L].

        It takes one pass of the model for each turn and attribute, and one more for each inner node of the tree but the
        root, whatever the number of conversations. All passes together compute each token of a conversation once.
        Collective over the replica.

        Args:
            conversations: of each the tokens that come before its labels: up to and with the marker of the first
                response's label, then from the end of that label up to and with the marker of the second, and so on.

        Raises:
            NotFinite: the model's logits are NaN.
        """
        tables = self._reserve([self.tokens_of(contexts) for contexts in conversations])
        start = self.labels.first[self.attributes[0]]
        rows = [
            _Row(number, contexts, [[]], [*contexts[0], *start])
            for number, contexts in enumerate(conversations)
            if len(contexts)
        ]
        done: list[_Row] = []
        while rows:
            for row, probabilities in zip(rows, self._levels(rows, tables), strict=True):
                self._choose(row, probabilities)
            done += [row for row in rows if not row.pending]
            rows = [row for row in rows if row.pending]
        found: list[list[list[Probabilities]]] = [[] for _ in conversations]
        for row in done:
            found[row.number] = row.found
        return found

    def _choose(self, row: _Row, probabilities: Probabilities) -> None:
        """Note the next attribute's probabilities, and what is fed after its likeliest level; nothing after the last
        one.
        """
        labels, names = self.labels, self.attributes
        row.found[-1].append(probabilities)
        row.attribute += 1
        row.pending = list(labels.levels[int(probabilities.argmax())])
        if row.attribute < len(names):
            row.pending += labels.later[names[row.attribute]]
        elif row.turn + 1 < len(row.contexts):
            row.pending += (*labels.end, *row.contexts[row.turn + 1], *labels.first[names[0]])
            row.attribute = 0
            row.found.append([])
        else:
            row.pending = []

    def _levels(self, rows: Sequence[_Row], tables: BlockTables) -> Probabilities:
        """Feed what is pending, and return the probabilities of the levels that may follow, float64 [R, L]."""
        logits = [self._feed(tables, [Span(row.number, row.length, len(row.pending)) for row in rows],
                             [row.pending for row in rows])]  # fmt: skip
        for row in rows:
            row.length += len(row.pending)
        for prefix in self.tree.inner[1:]:  # a node overwrites what another one of its depth left in the cache
            spans = [Span(row.number, row.length + len(prefix) - 1, 1) for row in rows]
            logits.append(self._feed(tables, spans, [prefix[-1:]] * len(rows)))
        scores_RL = torch.zeros((len(rows), len(self.labels.levels)), dtype=torch.float64)
        if self.group.is_sampler:
            scores_RL = self._scores(logits, [self._after_level(row) for row in rows])
        if self.group.size > 1:
            scores_RL = self.group.broadcast_sampled(scores_RL.contiguous())
        found: Probabilities = torch.softmax(scores_RL, -1).numpy()
        if np.isnan(found).any():
            self._cache = None  # what it holds may be NaN, and must not reach others
            raise NotFinite(rows[int(np.isnan(found).any(axis=1).argmax())].number)
        return found

    def _after_level(self, row: _Row) -> int:
        """Return the token that follows the next level in the label string."""
        names = self.attributes
        last = row.attribute + 1 == len(names)
        return self.labels.end[0] if last else self.labels.later[names[row.attribute + 1]][0]

    def _scores(self, logits: Sequence[torch.Tensor | None], after: Sequence[int]) -> torch.Tensor:
        """Return the log-probability of each level's string, up to a number per row, float64 [R, L] on the host."""
        after_R = to_device(np.array(after, np.int64), self._compute.device)
        of_node: list[torch.Tensor] = []
        for logits_RV in logits:
            assert logits_RV is not None
            words_RW = logits_RV[:, : self.words]
            wide = words_RW.to(torch.promote_types(words_RW.dtype, torch.float32))
            # Of one node, the sum over the vocabulary is the same for all levels.
            of_node.append(wide if len(logits) == 1 else torch.log_softmax(wide, -1))
        columns = []
        for path in self.tree.paths:
            parts = [
                of_node[node].gather(1, after_R[:, None])[:, 0] if token is None else of_node[node][:, token]
                for node, token in path
            ]
            columns.append(torch.stack(parts).sum(0))
        return torch.stack(columns, 1).double().cpu()

    def _feed(self, tables: BlockTables, spans: Sequence[Span], tokens: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Feed each row its tokens; return the logits after them, [R, V] in the order of ``spans``, on the last
        stage.
        """
        assert self._cache is not None
        order = sorted(range(len(spans)), key=lambda number: spans[number].count > 1)
        ordered = [spans[number] for number in order]
        ids_T = np.concatenate([np.asarray(tokens[number], np.int64) for number in order])
        singles = [span for span in ordered if span.count == 1]
        positions_T = self._cache.begin(tables, singles, ordered[len(singles) :])
        ends_R = np.empty(len(spans), np.int64)
        ends_R[order] = np.cumsum([span.count for span in ordered]) - 1
        packed = PackedTokens(
            positions_T=positions_T, kv=self._cache, output_index_K=to_device(ends_R, self._compute.device)
        )
        return self._compute(to_device(ids_T, self._compute.device), packed)

    def _reserve(self, sizes: Sequence[int]) -> BlockTables:
        """Give each conversation blocks for so many tokens; the cache grows where it has too few."""
        counts = [max(1, -(-size // _BLOCK_TOKENS)) for size in sizes]
        needed = sum(counts)
        if self._cache is None or self._cache.blocks < needed:
            self._cache = None  # its memory is free before more is asked for
            self._cache = KVCache(self._compute.shape, needed, _BLOCK_TOKENS, self._compute.device)
        tables, first = BlockTables(max(1, len(counts)), max(counts, default=1)), 0
        for count in counts:
            tables.add(range(first, first + count))
            first += count
        return tables
