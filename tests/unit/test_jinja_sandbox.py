"""A chat template is a stranger's program: it reaches nothing, ends, and makes nothing huge."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer import jinja_sandbox
from steerlm_megatron.steer.jinja_sandbox import render_chat_template
from steerlm_megatron.steer.jinja_template import JinjaTemplate

DAY = date(2026, 2, 1)
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are seconds of work, and the tests have many programs."""
    monkeypatch.setattr(jinja_sandbox, "_MOST_STEPS", 1 << 13)
    monkeypatch.setattr(jinja_sandbox, "_MOST_WORK", 1 << 22)
    monkeypatch.setattr(jinja_sandbox, "_LONGEST", 1 << 18)


def render(source: str, **more: Any) -> str:
    return render_chat_template(source, MESSAGES, more, True, DAY)


def refused(source: str) -> str:
    with pytest.raises(UserError) as caught:
        render(source)
    return str(caught.value)


# How a text, a list or a number n.x becomes larger, each in another way.
GROWTH = [
    "n.x + n.x", "n.x ~ n.x", "[n.x, n.x] | join", "n.x.replace('a', 'aa')", "n.x | replace('a', 'aa')",
    "'{0}{0}'.format(n.x)", "'%s%s' % (n.x, n.x)", "'%s%s' | format(n.x, n.x)", "n.x * 2", "n.x.join('abc')",
    "n.x.translate({97: n.x})", "n.x | indent(n.x | length, true)", "n.x | center((n.x | length) * 2)",
    "n.x.ljust(2 * n.x | length)", "[n.x, n.x]", "{'a': n.x, 'b': n.x}", "(n.x, n.x)", "dict(a=n.x, b=n.x)",
    "namespace(a=n.x, b=n.x)", "[n.x] * 2", "[n.x, n.x] | tojson", "(n.x ~ '') | tojson", "doubled(n.x)",
]  # fmt: skip
PRINTED = ["{{ n.x }}", "{{ n.x | string }}", "{{ n.x | pprint | length }}", "{{ n.x == [n.x] }}"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(GROWTH), min_size=1, max_size=3), st.sampled_from(PRINTED))
def test_whatever_doubles_itself_is_refused(steps: list[str], printed: str) -> None:
    body = "".join(f"{{% set n.x = {step} %}}" for step in steps)
    source = (
        "{% macro doubled(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='aa') %}"
        "{% for i in range(200) %}" + body + "{% endfor %}" + printed
    )
    refused(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999) | map('abs') | sum %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace() %}{% set n.x = n %}{{ [n] }}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set x = [1] * 999999999 %}",
        "{% set x = messages | length * 10 %}{{ x ** (x ** x) }}",
        "{{ 'a'.center(999999999) }}{{ 'a' | center(999999999) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=999999999) }}",
        "{{ [1, 2] | tojson(indent=999999999) }}",
        "{{ [1] | batch(999999999, 'x') | list | length }}",
        "{{ lipsum(n=100000) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_what_does_not_end_or_is_huge_is_refused(source: str) -> None:
    assert "chat template" in refused(source)
    with pytest.raises(UserError):
        JinjaTemplate.of(source + "{{ messages[0].content }}<|im_end|>", {}, ["<|im_end|>"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ cycler.__init__.__globals__.os.system('touch @') }}",
        "{{ strftime_now.__self__ }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ '{m.__class__}'.format_map({'m': messages}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self._TemplateReference__context.environment.from_string('x') }}",
        "{{ messages.append(1) }}",
        "{{ [1] | tojson(cls=cycler) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
    ],
)
def test_it_reaches_nothing(source: str, tmp_path: Path) -> None:
    try:
        shown = render(source.replace("@", str(tmp_path / "made")))
    except UserError:
        shown = ""
    assert shown in ("", "[Undefined]") and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 1 ~ none ~ 'a' }}{{ nothing }}{{ none }}{{ true }}{{ [1, 'a'] }}", "1NoneaNoneTrue[1, 'a']"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ loop.last }}{% endfor %}", "0True"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}"
         "{% else %}none{% endfor %}", "02"),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller else '' }}{% endmacro %}"
         "{{ f(1) }}{% call f(1, b=3) %}!{% endcall %}", "1213!"),
        ("{% set environment = 1 %}{% set step = 2 %}{% for m in messages %}{{ m.content ~ step }}{% endfor %}", "x2"),
        ("{{ {'b': 1, 'a': 'é'} | tojson }}{{ [1] | tojson(indent=1) }}", '{"b": 1, "a": "é"}[\n 1\n]'),
        ("{% generation %}{{ strftime_now('%d %b %Y') }}{% endgeneration %}", "01 Feb 2026"),
        ("{% set a, b = (1, 2) %}{{ a + b }}{{ 2 * 3 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ '%02d' % 7 }}", "368307"),
    ],
)  # fmt: skip
def test_what_formats_use_works_as_in_jinja(source: str, expected: str) -> None:
    assert render(source) == expected


def test_bounds_are_for_one_rendering() -> None:
    source = "{% for i in range(3000) %}{{ i }}{% endfor %}"
    assert len({render(source) for _ in range(5)}) == 1


def test_a_refusal_says_one_short_line() -> None:
    assert refused("{{ raise_exception('one\ntwo') }}") == "the chat template refuses the conversation: one"
    assert len(refused("{{ raise_exception('a' * 5000) }}")) < 400
