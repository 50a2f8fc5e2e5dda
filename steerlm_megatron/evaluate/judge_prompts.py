"""The prompts of an LLM judge: Jinja2 files, ours or the user's.

Owns: the three prompts in ``prompts/``, reading a user's file, and what a prompt is given. Does not own: how a verdict
is read (``verdicts.py``): a prompt of the user's has to ask for the form of its protocol. Invariants: a prompt that
leaves out what is to be judged is refused before anything is asked; a prompt runs in Jinja's sandbox, and an undefined
name in it is an error.

A file has the blocks ``system`` (optional) and ``user``; one without blocks is the user's message as a whole. It is
given ``turns`` (a list with ``question``, ``reference`` and, for pairs, ``answer_a`` and ``answer_b``, for grades
``answer``), and the same names for the last turn alone. An absent reference is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steerlm_megatron.errors import UserError

FOLDER = Path(__file__).parent / "prompts"
PAIR = ("answer_a", "answer_b")
GRADE = ("answer",)

Turn = Mapping[str, str]


class JudgePrompt:
    """One prompt. ``answers`` are the names of the answers that it has to show (``PAIR`` or ``GRADE``)."""

    def __init__(self, path: str | Path, answers: Sequence[str], key: str) -> None:
        """``key`` is the configuration's, which errors name.

        Raises:
            UserError: the file cannot be read, is no Jinja2, or does not show the question or an answer.
        """
        self.path, self._key = Path(path), key
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
        )
        try:
            source = self.path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{key}={path} cannot be read: {error}") from None
        try:
            used = meta.find_undeclared_variables(environment.parse(source))
            self._template: Template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{key}={path} is no Jinja2: {error}") from None
        if "turns" not in used and (absent := [name for name in ("question", *answers) if name not in used]):
            raise UserError(f"{key}={path} does not show {' and '.join(absent)}; write {{{{ {absent[0]} }}}} into it")

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        """Return the conversation that asks for a verdict on the last of ``turns``.

        Raises:
            UserError: the prompt uses a name that there is not, or fails in another way.
        """
        values: dict[str, Any] = {"turns": list(turns), **turns[-1]}
        blocks = self._template.blocks
        try:
            if "user" not in blocks:
                return [{"role": "user", "content": self._template.render(values).strip()}]
            context = self._template.new_context(values)
            texts = {name: "".join(blocks[name](context)).strip() for name in ("system", "user") if name in blocks}
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(f"{self._key}={self.path}: {error}") from None
        return [{"role": role, "content": text} for role, text in texts.items() if text]


def own_prompt(name: str, answers: Sequence[str]) -> JudgePrompt:
    """Return one of the prompts in ``prompts/``: ``mt_bench_pair``, ``mt_bench_grade`` or ``vicuna_pair``."""
    return JudgePrompt(FOLDER / f"{name}.j2", answers, "prompt")
