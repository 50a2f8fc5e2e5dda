"""The tokens of a label string that a generative attribute-prediction model writes after a response.

Owns: the parts of the label line (marker, ``name:``, level, newline) as tokens, for training and for scoring alike.
Does not own: the label string's text (``steer/attributes.py``), where it stands (``views.py``), choosing levels
(``generate/label_writer.py``). Invariants: the parts are encoded one by one, so that the tokens of a level are the same
wherever it stands, and the label string may be forced part by part at scoring; and the tokens of no two levels are the
same.

The line is what ``Template`` puts before a response in attribute-conditioned SFT: ``<extra_id_2>quality:6,toxicity:0``
and a newline (the SteerLM paper, arXiv 2310.05344, appendix A.1, has it after the response). Tokenizers that separate
digits from punctuation, as those of language models do, make the same tokens of it as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from steerlm_megatron.errors import UserError

if TYPE_CHECKING:
    from steerlm_megatron.data.text.tokenizer import Tokenizer
    from steerlm_megatron.steer.attributes import AttributeSchema

Ids = tuple[int, ...]


@dataclass(frozen=True)
class LabelTokens:
    """Token ids of the parts of a label line of A attributes and L levels.

    Args:
        marker: the control token that begins the line.
        first: ``name:`` of each attribute, where it is the first of the string.
        later: ``,name:`` of each attribute, where another one comes before it.
        levels: the digits of each level.
        end: the newline that ends the line.
    """

    marker: int
    first: tuple[Ids, ...]
    later: tuple[Ids, ...]
    levels: tuple[Ids, ...]
    end: Ids

    @classmethod
    def of(cls, schema: AttributeSchema, tokenizer: Tokenizer, marker: str) -> LabelTokens:
        """Encode the parts of the label lines of ``schema``; ``marker`` is the template's control string.

        Raises:
            UserError: the tokenizer makes the same tokens of two levels (it lacks digits), or none of a newline.
        """

        def encoded(texts: list[str]) -> tuple[Ids, ...]:
            return tuple(map(tuple, tokenizer.encode_batch(texts)))

        found = cls(
            tokenizer.control_id(marker),
            first=encoded([f"{name}:" for name in schema.names]),
            later=encoded([f",{name}:" for name in schema.names]),
            levels=encoded([str(level) for level in range(schema.max_level + 1)]),
            end=tuple(tokenizer.encode("\n")),
        )
        seen: dict[Ids, int] = {}
        for level, ids in enumerate(found.levels):
            other = seen.setdefault(ids, level)
            if other != level or not ids:
                raise UserError(
                    f"the tokenizer makes the same tokens of the levels {other} and {level} of "
                    f"attributes={schema.name}, so a model could not write them; take another tokenizer, or predict "
                    "attributes with ap.kind=regression"
                )
        if not found.end:
            raise UserError(
                "the tokenizer makes no token of a newline, which ends a label string; take another tokenizer, or "
                "predict attributes with ap.kind=regression"
            )
        return found

    def line(self, values_A: npt.NDArray[Any]) -> Ids:
        """Return the label line of a response: the marker, each attribute that has a value with its level, a newline.

        Args:
            values_A: values on the schema's scale, NaN where the response has no label, which is then left out. A value
                is rounded half to even, as ``AttributeSchema.level`` rounds it.
        """
        parts: list[int] = [self.marker]
        names = self.first
        for index in np.flatnonzero(~np.isnan(values_A)).tolist():
            parts += (*names[index], *self.levels[self._level(values_A[index])])
            names = self.later
        return (*parts, *self.end)

    def sizes(self, values_NA: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the number of tokens of the label line of each response, int64 [N]; 0 for one without a value."""
        values_NA = np.asarray(values_NA)
        present_NA = ~np.isnan(values_NA)
        level_NA = np.where(present_NA, self._level(np.nan_to_num(values_NA)), 0).astype(np.int64)
        size_NA = np.array([len(ids) for ids in self.later], np.int64) + self._level_sizes[level_NA]
        size_N = np.where(present_NA, size_NA, 0).sum(axis=1, dtype=np.int64)
        labelled_N = present_NA.any(axis=1)
        shorter_A = np.array([len(b) - len(a) for a, b in zip(self.first, self.later, strict=True)], np.int64)
        size_N -= shorter_A[present_NA.argmax(axis=1)] if len(shorter_A) else 0
        return np.where(labelled_N, size_N + 1 + len(self.end), 0)

    def longest(self, attributes: Sequence[int]) -> int:
        """Return the number of tokens of the longest label line with these attributes (indices in schema order)."""
        names = sum(len(self.later[index]) for index in attributes[1:]) + len(self.first[attributes[0]])
        return 1 + names + len(attributes) * max(self._level_sizes.tolist()) + len(self.end)

    @cached_property
    def _level_sizes(self) -> npt.NDArray[np.int64]:
        return np.array([len(ids) for ids in self.levels], np.int64)

    def _level(self, values: Any) -> Any:
        """Return the level of a value, or of an array of them."""
        levels = np.rint(np.clip(values, 0, len(self.levels) - 1))
        return levels if isinstance(values, np.ndarray) else int(levels)
