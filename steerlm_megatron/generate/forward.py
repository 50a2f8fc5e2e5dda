"""One forward pass over cached sequences on one rank: its part of the model, and the messages between stages.

Owns: the choice between the two ways to compute a stage, receiving and sending hidden states. Does not own: which
tokens are fed and where their keys and values go (``runner.py``, ``label_writer.py``), the cache. Invariant: every rank
of the replica makes the same passes in the same order.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from steerlm_megatron.errors import UserError
from steerlm_megatron.generate.group import ModelGroup
from steerlm_megatron.model.inference import InferencePath
from steerlm_megatron.model.packed_tokens import CacheShape, PackedTokens


class CachedForward:
    """This rank's part of a model, to be called with tokens whose attention goes through ``PackedTokens.kv``."""

    def __init__(self, model: torch.nn.Module, group: ModelGroup) -> None:
        """``model`` says by ``cache_shape()`` what its keys and values take.

        Raises:
            UserError: the model splits sequences over its ranks.
        """
        config = getattr(model, "config", None)
        if getattr(config, "sequence_parallel", False):
            raise UserError(
                "parallel.sequence=true cannot generate: a step has one token per sequence; use parallel.sequence=false"
            )
        self.model = cast(Any, model)
        self.model.eval()
        self.group = group
        self.shape: CacheShape = self.model.cache_shape()
        self.device, self.dtype = next(model.parameters()).device, self.shape.dtype
        self._path = InferencePath(model) if InferencePath.takes(model) else None
        # Whether weights are bound once, so that a pass is a fixed list of operations for a number of tokens.
        self.bound = self._path is not None
        self._hidden_size: int = getattr(config, "hidden_size", 0)

    def __call__(self, ids_T: torch.Tensor, packed: PackedTokens) -> torch.Tensor | None:
        """Return logits [K, V] of the wanted tokens on the last stage, None on the others. Collective over the
        replica.
        """
        hidden_T1D = None
        if not self.group.is_first_stage:
            hidden_T1D = self.group.receive_hidden((len(ids_T), 1, self._hidden_size), self.dtype, self.device)
        output = self._compute(ids_T, packed, hidden_T1D)
        if self.group.is_last_stage:
            return output
        self.group.send_hidden(output)
        return None

    def _compute(self, ids_T: torch.Tensor, packed: PackedTokens, hidden_T1D: torch.Tensor | None) -> torch.Tensor:
        """Logits [K, V] on the last stage, hidden states [T, 1, D] on the others."""
        if self._path is not None:
            return self._path(ids_T, packed, hidden_T1D)
        if hidden_T1D is not None:
            self.model.set_input_tensor(hidden_T1D)
        assert packed.positions_T is not None
        output: torch.Tensor = self.model(
            input_ids=ids_T[None],
            position_ids=packed.positions_T[None],
            attention_mask=None,
            labels=None,
            packed_seq_params=packed,
        )
        return output[0] if self.group.is_last_stage else output
