"""Run a chat template, which is a program of whoever made the model, within bounds.

Owns: the Jinja environment that ``transformers`` gives chat templates, and the bounds of time and memory. Does not own:
what is made of the rendered text (``jinja_template.py``). Invariants: a chat template reaches nothing but what it is
given (Jinja's sandbox); one that loops or calls itself without end, or makes a huge text or number, is refused after
some seconds at most.

Jinja's sandbox bounds attributes, not work. Here each pass of a loop, each call and each filter is a step, and each
text or list that an operator, a filter, a call or an output makes costs its length. Results whose size is the product
of two operands are refused before they are made.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime, time
from functools import cache, lru_cache
from typing import Any

from steerlm_megatron.errors import UserError

_MOST_STEPS = 1 << 18  # passes of loops, calls and filters; formats in use need some ten for each message
_MOST_WORK = 1 << 28  # characters and items that all operations together may make
_LONGEST = 1 << 24  # characters or items of one value
_MOST_BITS = 1 << 12  # of an integer
_MOST_INDENT = 64  # of JSON
_ITEM_WORK = 1024  # to look at an item takes as long as to copy so many characters
_WIDE = re.compile(r"\d{6}")  # in a text that sets how wide a number is written


class _Left(threading.local):
    """What a rendering may still use, in the thread that does it."""

    steps = _MOST_STEPS
    work = _MOST_WORK


_left = _Left()


class _TooMuch(Exception):
    """The chat template wants more than any format needs."""


@contextmanager
def _within_bounds() -> Iterator[None]:
    _left.steps, _left.work = _MOST_STEPS, _MOST_WORK
    yield


def render_chat_template(
    source: str, messages: Iterable[Mapping[str, Any]], tokens: Mapping[str, str], generate: bool, day: date
) -> str:
    """Return what a chat template makes of ``messages``, as ``transformers`` renders it.

    Args:
        source: the Jinja source. It is run in Jinja's sandbox, within bounds.
        messages: ``role`` and ``content``, and whatever else the source reads.
        tokens: variables such as ``bos_token``.
        generate: whether a response is to follow (``add_generation_prompt``).
        day: what ``strftime_now`` tells.

    Raises:
        UserError: the chat template refuses the conversation, is no Jinja, or does not end.
    """
    try:
        with _within_bounds():
            return str(
                _compiled(source).render(
                    messages=list(messages),
                    add_generation_prompt=generate,
                    tools=None,
                    documents=None,
                    strftime_now=datetime.combine(day, time()).strftime,
                    **tokens,
                )
            )
    except _TooMuch as error:
        raise UserError(f"the chat template does not end, or makes {error}: no format needs that much") from None
    except Exception as error:  # a stranger's program may raise anything
        raise UserError(f"the chat template refuses the conversation: {_short(error)}") from None


def _short(error: Exception) -> str:
    """Return the first line of what a stranger's program has to say."""
    text = (str(error) or type(error).__name__).partition("\n")[0]
    return text if len(text) <= 300 else text[:300] + "…"


@lru_cache(64)
def _compiled(source: str) -> Any:
    """Return the compiled Jinja of a chat template."""
    environment = _environment()
    # transformers has a block that marks what an assistant wrote.
    source = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", source)
    source = re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", source)
    tree = _counted(environment.parse(source))
    tree.set_environment(environment)
    return environment.from_string(tree)


def _counted(tree: Any) -> Any:
    """Put a step into each loop and macro of a parsed chat template, and have ``~`` counted like other operators."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def call(name: str, arguments: list[Any], line: int) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), arguments, [], None, None, lineno=line)

    class Count(NodeTransformer):
        def visit_For(self, node: nodes.For) -> nodes.For:
            if node.test is not None:
                node.test = nodes.And(call("step", [], node.lineno), node.test, lineno=node.lineno)
            return self._body(node)

        def _body(self, node: Any) -> Any:
            self.generic_visit(node)
            node.body.insert(0, nodes.ExprStmt(call("step", [], node.lineno), lineno=node.lineno))
            return node

        visit_Macro = visit_CallBlock = _body

        def _contained(self, node: Any) -> Any:
            self.generic_visit(node)
            return call("contain", [node], node.lineno) if any(node.find_all(nodes.Name)) else node

        def visit_List(self, node: nodes.List) -> Any:
            return self._contained(node)

        def visit_Dict(self, node: nodes.Dict) -> Any:
            return self._contained(node)

        def visit_Tuple(self, node: nodes.Tuple) -> Any:
            return self._contained(node) if node.ctx == "load" else node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
            self.generic_visit(node)
            return call("concatenate", node.nodes, node.lineno)

    return Count().visit(tree)


@cache
def _environment() -> Any:
    """Return the environment in which all chat templates run: with the functions and filters of ``transformers``."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def step(self) -> bool:
            return True  # calling it is what counts

        def contain(self, value: Any) -> Any:
            _bound_contents(value)
            return value

        def concatenate(self, *values: Any) -> str:
            texts = [str(value) for value in values]
            _bound(sum(map(len, texts)))
            return "".join(texts)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            result = _counted_result(super().call_binop(context, operator, left, right))
            if operator == "*":
                _bound_contents(result)
            return result

        # Arguments of a chat template may have any name.
        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            _step()
            method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
            of = getattr(method, "__self__", None)
            if isinstance(of, str):
                _check_arguments([of, *args, *kwargs.values()], written=getattr(method, "__name__", "") == "format")
            elif __obj in (dict, Namespace):
                _bound_contents([*args, *kwargs.values()])
            return _counted_result(super().call(__context, __obj, *args, **kwargs))

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        if isinstance(indent, str | int) and _size(indent) > _MOST_INDENT:
            raise _TooMuch("a huge text")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_printed)
    environment.filters["tojson"] = to_json
    environment.filters = {name: _bounded_filter(name, found) for name, found in environment.filters.items()}
    environment.globals["raise_exception"] = refuse
    del environment.globals["lipsum"]  # it makes text of any length
    return environment


def _step() -> None:
    _left.steps -= 1
    if _left.steps < 0:
        raise _TooMuch(f"more than {_MOST_STEPS} steps")


def _printed(value: Any) -> str:
    """Return a printed value as text, which costs its length."""
    text = value if isinstance(value, str) else str(value)
    _bound(len(text))
    return text


def _bounded_filter(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose arguments and results are bounded."""

    @functools.wraps(found)  # what the filter wants to be given stands in its attributes
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _step()
        _check_arguments([*args, *kwargs.values()], written=name == "format")
        return _counted_result(found(*args, **kwargs))

    return bounded


def _size(value: Any) -> int:
    """Return how much a value can add to what is made of it: characters, items with their characters, or a number."""
    if isinstance(value, bool):
        return 1
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple | dict):
        items = value.values() if isinstance(value, dict) else value
        return len(value) + sum(len(item) if isinstance(item, str) else 1 for item in items)
    return len(value) if isinstance(value, range) else 1


def _check_arguments(values: Iterable[Any], written: bool) -> None:
    """Refuse arguments of a filter or a method of text from which a huge text could be made."""
    product, total = 1, 0
    for value in values:
        size = _size(value)
        product *= max(1, size)
        total += 0 if isinstance(value, int) else size
        if written and isinstance(value, str) and _WIDE.search(value):
            raise _TooMuch("a very wide number")
    _bound(total)
    if product > _MOST_WORK:
        raise _TooMuch("a huge text")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse operands that make a huge text, list or number."""
    if operator == "*":
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if not numbers and max(1, _size(left)) * max(1, _size(right)) > _LONGEST:
            raise _TooMuch("a huge text")
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > _MOST_BITS:
            raise _TooMuch("a huge number")
    elif operator == "%" and isinstance(left, str):
        _check_arguments([left, *(right if isinstance(right, tuple) else [right])], written=True)


def _counted_result(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _bound(len(value))
    elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _TooMuch("a huge number")
    return value


def _bound(size: int) -> None:
    """Count the characters or items of a value."""
    _left.work -= size
    if size > _LONGEST or _left.work < 0:
        raise _TooMuch("a huge text")


def _bound_contents(value: Any) -> None:
    """Count all that is inside a list, mapping or namespace, as often as it would be printed: lists that hold a list
    twice, which holds another twice, and so on, are small in memory only.
    """
    characters = 0
    stack = [value]
    while stack:
        item = stack.pop()
        _left.work -= _ITEM_WORK
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, list | tuple):
            stack += item
        elif isinstance(item, dict):
            stack += item.values()
        elif hasattr(item, "_Namespace__attrs"):
            stack += item._Namespace__attrs.values()
        if _left.work < 0 or characters > _LONGEST or len(stack) > _LONGEST:
            raise _TooMuch("a huge value")
    _bound(characters)
