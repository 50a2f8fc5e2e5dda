"""The model card of a Hugging Face folder: Markdown, with a header that the hub reads.

Owns: the card's structure (``templates/model_card.md.j2``) and what is escaped in it. Does not own: what the card says
(``stages/model_card.py``). Invariant: a text from outside does not change the structure: it has no line breaks, and no
bars that would make cells of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"
_AS_IT_IS = ("header", "code")  # our own YAML and Python


def render_card(card: Mapping[str, Any]) -> str:
    """Return the Markdown of a card.

    ``card`` has: name, summary, facts [(key, value)], header (YAML with its last line break, or ""), scores (whether
    it predicts attributes), max_level, attributes [{name, level, labels, meaning}], attributes_are, code (Python with
    its last line break), usage, tables [{title, words, columns, rows}], training, licences, limits ([sentence]).
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # it is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    plain = {key: value if key in _AS_IT_IS else _one_line(value) for key, value in card.items()}
    return environment.get_template("model_card.md.j2").render(plain)


def _one_line(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split()).replace("|", "\\|")
    if isinstance(value, Mapping):
        return {key: _one_line(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_one_line(inside) for inside in value]
    return value
