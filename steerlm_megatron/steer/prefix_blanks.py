"""The blank that a tokenizer puts before a text, written into a chat template.

Tokenizers of the kind of Llama 2's read every stretch of text between two special tokens as if a blank stood before it.
Ours encodes text as it is, so that the parts of a conversation can be encoded one by one. A chat template that writes
those blanks itself gives the same tokens with it.

Owns: the Jinja that does so. Does not own: which rule a tokenizer has (``data/text/hugging_face.py``), whether the
tokens are the same (``stages/prompt_tokens.py``, which compares them).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

# Of Unicode's private use: where a blank may have to stand, and the end of the text.
_BLANK, _END = "\ue002", "\ue003"

ALWAYS, UNLESS_BLANK, FIRST = "always", "unless_blank", "first"


def with_blanks(source: str, controls: Sequence[str], rule: str) -> str:
    """Return the Jinja source of a chat template that writes what ``source`` writes, and the blanks.

    Args:
        source: a chat template.
        controls: the strings between which the tokenizer puts blanks; none is a part of another.
        rule: ``always``: before each stretch of text; ``unless_blank``: before each that does not start with a blank;
            ``first``: as ``unless_blank``, at the start of the whole text alone.
    """
    steps = [] if rule == FIRST else [(text, text + _BLANK) for text in controls]
    steps += [(_BLANK + text, text) for text in controls]  # nothing stands before this control string
    steps += [(_BLANK + _END, _END)] + ([] if rule == ALWAYS else [(_BLANK + " ", " ")])
    steps += [(_BLANK, " "), (_END, "")]
    filters = "".join(f" | replace({_quoted(old)}, {_quoted(new)})" for old, new in steps)
    # Jinja drops one line break at the end of a template, which is not the end here.
    source = source.removesuffix("\n")
    text = f"({_quoted(_BLANK)} ~ unblanked ~ {_quoted(_END)})"
    return f"{{% set unblanked %}}{source}{{% endset %}}{{{{- {text}{filters} -}}}}"


def are_apart(controls: Sequence[str]) -> bool:
    """Return whether none of the strings is a part of another."""
    return not any(one != other and one in other for one in controls for other in controls)


def _quoted(text: str) -> str:
    return json.dumps(text)
