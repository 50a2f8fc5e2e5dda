"""The loss of SteerLM 2.0: the model's shares of the responses of a group become the target shares.

Responses y_i to a prompt x were drawn from Q'(y | a, x). Their target shares are (arXiv 2406.08673, Eq. 6 and 7)

    w_i = P(a | y_i, x) P(y_i | x) / Q'(y_i | a, x),    w'_i = w_i / Σ_j w_j,

and those of the model that is trained are b'_i = b_i / Σ_j b_j with b_i = Q_θ(y_i | a, x) / Q'(y_i | a, x). The loss of
a group is their divergence Σ_i w'_i log(w'_i / b'_i) (Eq. 12), whose gradient is −Σ_i (w'_i − b'_i) ∇ log Q_θ(y_i | a,
x) (Eq. 11). It needs no gradient of b': a forward pass gives log Q_θ of all responses of the group, and each token's
loss is then weighted with w'_i − b'_i.

Owns: that loss. Does not own: the targets (``stages/weigh.py``), putting groups together (``data/groups.py``).
Invariant: a group's weights w'_i − b'_i sum to 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steerlm_megatron.data.batch import RowBatch
from steerlm_megatron.runtime.collectives import sum_over_context
from steerlm_megatron.train.objective import TokenObjective

_SMALLEST = 1e-38  # a share of 0 counts as this in a logarithm


class GroupObjective(TokenObjective):
    """Σ over groups of the divergence between target and model shares. A term is a group.

    The batches are of ``Groups.attach``. Each context-parallel rank has the gradient of its own tokens; the log-
    probabilities of responses are summed over these ranks first.
    """

    metric_names = ("loss", "groups", "target_responses", "model_responses")

    def terms(self, batch: RowBatch) -> int:
        return batch.groups if _counts(batch) else 0

    def loss(self, output: torch.Tensor, batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.sample_K is not None and batch.group_S is not None and batch.logprob_S is not None
        assert batch.weight_S is not None and batch.scale_S is not None, "batches come from Groups.attach"
        loss_K = output.float().squeeze(0)[: len(batch.sample_K)]  # a row without targets asks for one position
        logprob_S = torch.zeros_like(batch.logprob_S)
        logprob_S.index_add_(0, batch.sample_K, -loss_K.detach().double())
        if batch.chunks:
            sum_over_context(logprob_S)
        share_S = group_softmax(logprob_S - batch.logprob_S, batch.group_S, batch.groups)
        weight_S = (batch.weight_S - share_S) * batch.scale_S
        total = (loss_K * weight_S[batch.sample_K].float()).sum() + output.float().sum() * 0.0
        if not _counts(batch):
            return total, torch.zeros(len(self.metric_names), dtype=torch.float64, device=total.device)
        log_target_S, log_share_S = (one_S.clamp(min=_SMALLEST).log() for one_S in (batch.weight_S, share_S))
        count = torch.full((), float(batch.groups), dtype=torch.float64, device=total.device)
        distance = (batch.weight_S * (log_target_S - log_share_S)).sum()
        sums = [distance, count, *(effective(s, batch.group_S, batch.groups) for s in (batch.weight_S, share_S))]
        return total, torch.stack(sums)

    def means(self, sums_M: Sequence[float]) -> dict[str, float]:
        """``loss`` is the mean divergence; ``target_responses`` and ``model_responses`` are how many responses of a
        group count: 1 / Σ shares², from 1 (one has all) to their number (all alike).
        """
        groups = max(sums_M[1], 1.0)
        names = (self.metric_names[0], *self.metric_names[2:])
        return dict(zip(names, (value / groups for value in (sums_M[0], *sums_M[2:])), strict=True))


def _counts(batch: RowBatch) -> bool:
    """Return whether this rank counts the groups: the first of those that share their tokens does."""
    return not batch.chunks or batch.chunks[0].start == 0


def group_softmax(score_S: torch.Tensor, group_S: torch.Tensor, groups: int) -> torch.Tensor:
    """Return exp(s_i) / Σ_j exp(s_j) over the j of the group of i, float64 [S]."""
    most_G = torch.full((groups,), -torch.inf, dtype=score_S.dtype, device=score_S.device)
    most_G = most_G.scatter_reduce(0, group_S, score_S, "amax")
    raised_S = (score_S - most_G[group_S]).exp()
    return raised_S / torch.zeros_like(most_G).index_add_(0, group_S, raised_S)[group_S]


def effective(share_S: torch.Tensor, group_S: torch.Tensor, groups: int) -> torch.Tensor:
    """Return Σ over groups of 1 / Σ shares² (Kish's effective sample size), a float64 scalar."""
    squares_G = torch.zeros(groups, dtype=share_S.dtype, device=share_S.device)
    return (1.0 / squares_G.index_add_(0, group_S, share_S.square())).sum()
