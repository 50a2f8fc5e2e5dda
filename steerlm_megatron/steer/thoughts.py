"""Chat templates that open a model's thoughts before every response, made ones that do not.

Models that reason (DeepSeek-R1 and its distillates, Qwen3's of the thinking kind) are asked with a prompt that ends in
``<think>``, and earlier responses stand in the history without their thoughts. What is in front of a response then
depends on whether it is generated or remembered. Responses in corpora of conversations have no thoughts, so a model
that is trained on them is asked as the history is written.

Owns: the Jinja that does so. Does not own: when that is wanted (``stages/base.py``: in training, never for a model as
it came).
"""

from __future__ import annotations

import json
import re

_OPENED = re.compile(r"<think>\s*\Z")


def opened_thoughts(prompt: str) -> str:
    """Return what of a prompt's end opens thoughts; nothing for a prompt that does not."""
    found = _OPENED.search(prompt)
    return "" if found is None else found[0]


def without_opened_thoughts(source: str, opened: str) -> str:
    """Return the Jinja source of a chat template that writes what ``source`` writes, but for ``opened`` at the end of a
    prompt.
    """
    # Jinja drops one line break at the end of a template, which is not the end here.
    source = source.removesuffix("\n")
    ends = f"add_generation_prompt and thinking.endswith({json.dumps(opened)})"
    return f"{{% set thinking %}}{source}{{% endset %}}{{{{- thinking[:-{len(opened)}] if {ends} else thinking -}}}}"
