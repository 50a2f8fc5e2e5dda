"""Changes to logits before a token is drawn: allowed ids, ``min_tokens``, ``logit_bias`` and penalties.

Owns: these changes, and how often each token has appeared in the sequences that penalties look at. Does not own: what
draws from the changed logits (``sampling.py``). Invariants: the logits of a row that asks for none of this are neither
read nor written; counts stay on the device and follow the tokens that were drawn there, so that the host need not have
read them before the next step.

Definitions and their order are those of vLLM, https://docs.vllm.ai/en/latest/api/vllm/sampling_params/ and
https://docs.vllm.ai/en/latest/api/vllm/v1/sample/sampler/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class History:
    """The sequence of a row with penalties. ``key`` is unique among the sequences of a replica.

    ``output_ids`` are tokens of the response that were drawn before the sampler first saw this key, as after a
    sequence was taken out of the batch and put into it again; later ones the sampler counts itself.
    """

    key: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...] = ()


class AdjustedRow(Protocol):
    """The part of ``sampling.RowParams`` that concerns logits."""

    @property
    def repetition_penalty(self) -> float: ...

    @property
    def presence_penalty(self) -> float: ...

    @property
    def frequency_penalty(self) -> float: ...

    @property
    def logit_bias(self) -> tuple[tuple[int, float], ...]: ...

    @property
    def allowed_ids(self) -> tuple[int, ...] | None: ...

    @property
    def min_tokens(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def history(self) -> History | None: ...


class _Cells:
    """Cells of the logits [B, V], as a list of (row, id)."""

    def __init__(self, cells: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.rows = torch.tensor([row for row, _ in cells], dtype=torch.int64).to(device)
        self.ids = torch.tensor([i for _, i in cells], dtype=torch.int64).to(device)

    def read(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return logits_BV[self.rows, self.ids]

    def write(self, logits_BV: torch.Tensor, values: torch.Tensor) -> None:
        logits_BV.index_put_((self.rows, self.ids), values)


class _Penalties:
    """The rows with penalties: their places in the batch and among the counts, and their factors."""

    def __init__(self, rows: Sequence[AdjustedRow], members: Sequence[int], slots: Sequence[int], at: torch.device):
        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32).unsqueeze(1).to(at)

        self.index_P = torch.tensor(members, dtype=torch.int64).to(at)
        self.slot_P = torch.tensor(slots, dtype=torch.int64).to(at)
        self.repetition_P1 = column([rows[i].repetition_penalty for i in members])
        self.presence_P1 = column([rows[i].presence_penalty for i in members])
        self.frequency_P1 = column([rows[i].frequency_penalty for i in members])


class Adjustments:
    """The changes that the rows of a batch ask for; false if they ask for none."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._slots: dict[str, int] = {}  # key of a history -> its row in the two tensors
        self._in_prompt_SV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._count_SV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # in the response so far
        self._rows: Sequence[AdjustedRow] = ()
        self._any = False
        self._allowed_rows: torch.Tensor | None = None
        self._allowed: _Cells | None = None
        self._biased: tuple[_Cells, torch.Tensor] | None = None
        self._early: list[int] = []  # rows with min_tokens
        self._too_early: tuple[list[int], _Cells] = ([], _Cells([], device))  # of these rows, for the present step
        self._penalties: _Penalties | None = None

    def __bool__(self) -> bool:
        return self._any

    def remember(self, histories: Sequence[History]) -> None:
        """Begin to count for keys that are new, and forget those that ``histories`` lack."""
        keys = {history.key for history in histories}
        for key in [key for key in self._slots if key not in keys]:
            del self._slots[key]
        new = [history for history in histories if history.key not in self._slots]
        if not new:
            return
        used = set(self._slots.values())
        free = [slot for slot in range(len(used) + len(new)) if slot not in used]
        missing = max(free[: len(new)]) + 1 - self._count_SV.shape[0]
        if missing > 0:
            more = max(missing, self._count_SV.shape[0])  # doubling, so that slots are seldom copied
            for name in ("_in_prompt_SV", "_count_SV"):
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, old.new_zeros((more, self.vocab_size))]))
        for slot, history in zip(free, new, strict=False):
            prompt, output = (
                torch.tensor(ids, dtype=torch.int64).to(self.device) for ids in (history.prompt_ids, history.output_ids)
            )
            self._in_prompt_SV[slot] = False
            self._in_prompt_SV[slot].index_fill_(0, prompt, True)
            # torch.bincount would wait for the device, to look for the largest id.
            self._count_SV[slot].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
            self._slots[history.key] = slot

    def set_rows(self, rows: Sequence[AdjustedRow]) -> None:
        """Set the rows of the batch, in order. The histories among them are remembered already."""
        self._rows = rows
        limited = [i for i, row in enumerate(rows) if row.allowed_ids is not None]
        self._allowed = self._allowed_rows = self._biased = self._penalties = None
        if limited:
            self._allowed_rows = torch.tensor(limited, dtype=torch.int64).to(self.device)
            self._allowed = _Cells([(i, id_) for i in limited for id_ in rows[i].allowed_ids or ()], self.device)
        biased = [(i, id_, bias) for i, row in enumerate(rows) for id_, bias in row.logit_bias]
        if biased:
            values = torch.tensor([bias for *_, bias in biased], dtype=torch.float32).to(self.device)
            self._biased = _Cells([(i, id_) for i, id_, _ in biased], self.device), values
        self._early = [i for i, row in enumerate(rows) if row.min_tokens]
        self._too_early = ([], _Cells([], self.device))
        penalised = [i for i, row in enumerate(rows) if row.history is not None]
        if penalised:
            slots = [self._slots[row.history.key] for row in rows if row.history is not None]
            self._penalties = _Penalties(rows, penalised, slots, self.device)
        self._any = bool(limited or biased or self._early or penalised)

    def apply(self, logits_BV: torch.Tensor, indices: Sequence[int]) -> None:
        """Change float32 logits [B, V] in place. ``indices``: how many tokens each row has drawn before."""
        if self._allowed is not None:
            assert self._allowed_rows is not None
            kept = self._allowed.read(logits_BV)
            logits_BV.index_fill_(0, self._allowed_rows, float("-inf"))
            self._allowed.write(logits_BV, kept)
        early = [i for i in self._early if indices[i] < self._rows[i].min_tokens]
        if early:
            if early != self._too_early[0]:
                self._too_early = (
                    early,
                    _Cells([(i, id_) for i in early for id_ in self._rows[i].stop_ids], self.device),
                )
            cells = self._too_early[1]
            cells.write(logits_BV, logits_BV.new_full((), float("-inf")))
        if self._biased is not None:
            cells, values = self._biased
            cells.write(logits_BV, cells.read(logits_BV) + values)
        if self._penalties is not None:
            self._penalise(logits_BV, self._penalties)

    def _penalise(self, logits_BV: torch.Tensor, rows: _Penalties) -> None:
        """Apply the repetition penalty (arXiv 1909.05858 §4.1) to tokens of prompt and response, then subtract
        frequency × count and presence, which concern the response alone.
        """
        logits_PV = logits_BV.index_select(0, rows.index_P)
        count_PV = self._count_SV.index_select(0, rows.slot_P)
        drawn_PV = count_PV > 0
        seen_PV = self._in_prompt_SV.index_select(0, rows.slot_P) | drawn_PV
        repeated_PV = torch.where(logits_PV > 0, logits_PV / rows.repetition_P1, logits_PV * rows.repetition_P1)
        logits_PV = torch.where(seen_PV, repeated_PV, logits_PV)
        logits_PV = logits_PV - rows.frequency_P1 * count_PV
        logits_PV = logits_PV - rows.presence_P1 * drawn_PV
        logits_BV.index_copy_(0, rows.index_P, logits_PV.clamp(max=torch.finfo(torch.float32).max))

    def count(self, ids_B: torch.Tensor) -> None:
        """Take the tokens that were drawn into account; a negative id (no token) counts for nothing."""
        if self._penalties is not None:
            ids_P = ids_B.index_select(0, self._penalties.index_P)
            cells = (self._penalties.slot_P, ids_P.clamp(min=0))
            self._count_SV.index_put_(cells, (ids_P >= 0).int(), accumulate=True)
