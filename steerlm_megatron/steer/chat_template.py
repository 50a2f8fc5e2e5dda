"""A prompt template as a Jinja chat template, in which the attributes of a response are variables.

Owns: the Jinja source, which other systems (``transformers``, vLLM, SGLang, llama.cpp) render without our code. Does
not own: the format (``templates.py``), tokenizer files. Invariant: what it renders is, as text, what
``Template.prefix`` gives for the same messages and levels; tests compare both.

``tokenizer.apply_chat_template(messages, add_generation_prompt=True, quality=9, humor=0)`` asks for levels. An
attribute that is not named has its default, one that is none is left out of the label line. An assistant message may
have a mapping ``attributes`` of values on the schema's scale, as in our records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date

from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.jinja_template import JinjaTemplate
from steerlm_megatron.steer.templates import Template

_HEAD = """\
{%- set state = namespace(system=@SYSTEM@, turns=messages, text='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set state.system = messages[0]['content'] -%}{%- set state.turns = messages[1:] -%}
{%- endif -%}
"""
# Rounding is half to even, as that of ``AttributeSchema``, by arithmetic: llama.cpp's Jinja has no filter ``round``.
_LABEL = """\
{%- set requested = {@REQUESTED@} -%}
{%- macro label(values) -%}
{%- set found = namespace(text='', value=0, level=0, rest=0) -%}
{%- for name in @NAMES@ -%}
{%- if values and values[name] is defined and values[name] is not none -%}
{%- set found.value = values[name] | float(-1) -%}
{%- set found.level = found.value | int -%}
{%- set found.rest = found.value - found.level -%}
{%- if found.rest > 0.5 or (found.rest == 0.5 and found.level % 2 == 1) -%}
{%- set found.level = found.level + 1 -%}
{%- endif -%}
{%- if found.value < -0.5 or found.level > @MAX@ -%}
{{- raise_exception(name + ' must be a number from 0 to @MAX@') -}}
{%- endif -%}
{%- set found.text = found.text + (',' if found.text else '') + name + ':' + (found.level | string) -%}
{%- endif -%}
{%- endfor -%}
{%- if found.text -%}{{- @MARKER@ + found.text + '\\n' -}}{%- endif -%}
{%- endmacro -%}
"""
_NO_LABEL = """\
{%- set requested = none -%}
{%- macro label(values) -%}{%- endmacro -%}
"""
_BODIES = {
    "steerlm": """\
{{- '<extra_id_0>System\\n' + state.system + @SUFFIX@ -}}
{%- for message in state.turns -%}
{%- if message['role'] == 'user' -%}
{{- '<extra_id_1>User\\n' + message['content'] + '\\n' -}}
{%- elif message['role'] != 'assistant' -%}
{{- raise_exception('a message is of user or assistant; system stands first') -}}
{%- else -%}
{{- '<extra_id_1>Assistant\\n' + label(message.get('attributes')) + message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<extra_id_1>Assistant\\n' + label(requested) -}}
{%- elif state.turns and state.turns[-1]['role'] == 'assistant' -%}
{{- '<extra_id_1>' -}}
{%- endif -%}
""",
    "llama2": """\
{%- for message in state.turns -%}
{%- if message['role'] == 'user' -%}
{{- '<s>[INST]' -}}
{%- if state.system -%}
{{- ' <<SYS>>\\n' + state.system + '\\n<</SYS>>\\n\\n' + message['content'] + ' ' -}}
{%- else -%}
{{- ' ' + message['content'] + ' ' -}}
{%- endif -%}
{%- set state.system = '' -%}
{{- '[/INST]' -}}
{%- elif message['role'] != 'assistant' -%}
{{- raise_exception('a message is of user or assistant; system stands first') -}}
{%- else -%}
{{- ' ' + label(message.get('attributes')) + message['content'] + ' </s>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ' + label(requested) -}}{%- endif -%}
""",
    "chatml": """\
{%- if state.system -%}{{- '<|im_start|>system\\n' + state.system + '<|im_end|>\\n' -}}{%- endif -%}
{%- for message in state.turns -%}
{%- if message['role'] == 'user' -%}
{{- '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- elif message['role'] != 'assistant' -%}
{{- raise_exception('a message is of user or assistant; system stands first') -}}
{%- else -%}
{{- '<|im_start|>assistant\\n' + label(message.get('attributes')) + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' + label(requested) -}}{%- endif -%}
""",
}

# What an attribute-prediction model reads (the view ``ap``): no label lines, a label marker after each response and
# what closes it, and nothing after the last marker, at which the values are read.
_SCORED_BODIES = {
    "steerlm": """\
{{- '<extra_id_0>System\\n' + state.system + @SUFFIX@ -}}
{%- for message in state.turns -%}
{%- if message['role'] == 'user' -%}
{{- '<extra_id_1>User\\n' + message['content'] + '\\n' -}}
{%- elif message['role'] != 'assistant' -%}
{{- raise_exception('a message is of user or assistant; system stands first') -}}
{%- else -%}
{{- '<extra_id_1>Assistant\\n' + message['content'] + '\\n' + @MARKER@ -}}
{%- endif -%}
{%- endfor -%}
""",
    "llama2": """\
{%- for message in state.turns -%}
{%- if message['role'] == 'user' -%}
{{- '<s>[INST]' -}}
{%- if state.system -%}
{{- ' <<SYS>>\\n' + state.system + '\\n<</SYS>>\\n\\n' + message['content'] + ' ' -}}
{%- else -%}
{{- ' ' + message['content'] + ' ' -}}
{%- endif -%}
{%- set state.system = '' -%}
{{- '[/INST]' -}}
{%- elif message['role'] != 'assistant' -%}
{{- raise_exception('a message is of user or assistant; system stands first') -}}
{%- else -%}
{{- ' ' + message['content'] + ' ' + @MARKER@ + ('' if loop.last else '</s>') -}}
{%- endif -%}
{%- endfor -%}
""",
    "chatml": """\
{%- if state.system -%}{{- '<|im_start|>system\\n' + state.system + '<|im_end|>\\n' -}}{%- endif -%}
{%- for message in state.turns -%}
{%- if message['role'] == 'user' -%}
{{- '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- elif message['role'] != 'assistant' -%}
{{- raise_exception('a message is of user or assistant; system stands first') -}}
{%- else -%}
{{- '<|im_start|>assistant\\n' + message['content'] + @MARKER@ + ('' if loop.last else '<|im_end|>\\n') -}}
{%- endif -%}
{%- endfor -%}
""",
}
_SCORED_LAST = """\
{%- if not state.turns or state.turns[-1]['role'] != 'assistant' -%}
{{- raise_exception('the last message is the one that is scored, and must be of the assistant') -}}
{%- endif -%}
"""

# What these names mean in Jinja, in our template, or as parameters of ``apply_chat_template``.
_TAKEN = frozenset(
    "and as block break call continue do elif else endfor endif false False filter for from if import in include "
    "is loop macro none None not or recursive self set true True with without caller range dict lipsum cycler "
    "joiner namespace raise_exception strftime_now messages message state requested label found name values "
    "tools documents add_generation_prompt conversation chat_template continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs bos_token "
    "eos_token pad_token unk_token".split()
)


def variable(name: str) -> str:
    """Return the Jinja variable of an attribute: the name, with an underscore for what no variable may have."""
    found = re.sub(r"\W", "_", name)
    return f"_{found}" if found[:1].isdigit() else found


# A chat template of the model's own, around which ours is: it takes messages whose texts have the label lines in them.
_FOREIGN = """\
{%- macro strftime_now(form) -%}{{- @DAYS@[form] -}}{%- endmacro -%}
{%- if state.system and not (messages and messages[0]['role'] == 'system') -%}
{%- set state.turns = [{'role': 'system', 'content': state.system}] + messages -%}
{%- else -%}
{%- set state.turns = messages -%}
{%- endif -%}
{%- set labelled = namespace(turns=[], lines=[], text='') -%}
{%- for message in state.turns -%}
@PLACE@
{%- set labelled.turns = labelled.turns + [dict(message, content=text)] -%}
{%- endfor -%}
{%- set messages = labelled.turns -%}
"""
_PLACES = {
    "response": """\
{%- set text -%}
{%- if message['role'] == 'assistant' -%}{{- label(message.get('attributes')) -}}{%- endif -%}
{{- message['content'] -}}
{%- endset -%}""",
    "user": """\
{%- set following = none if loop.last else loop.nextitem -%}
{%- set text -%}
{{- message['content']@BLANKS@ if message['role'] == 'user' else message['content'] -}}
{%- if message['role'] == 'user' and loop.last and add_generation_prompt -%}
{{- label(requested) -}}
{%- elif message['role'] == 'user' and following and following['role'] == 'assistant' -%}
{{- label(following.get('attributes')) -}}
{%- endif -%}
{%- endset -%}""",
}
# Of a chat template that writes a prefix before a response: a label line comes before that prefix, which belongs to the
# response's first token. It is put there in what the chat template has written.
_PREFIXED = """\
{%- set line -%}
{%- if message['role'] == 'assistant' -%}{{- label(message.get('attributes')) -}}{%- endif -%}
{%- endset -%}
{%- if line and line not in labelled.lines -%}{%- set labelled.lines = labelled.lines + [line] -%}{%- endif -%}
{%- set text = line + message['content'] -%}"""
_MOVED = """\
{%- set written -%}@SOURCE@{%- endset -%}
{%- set labelled.text = written -%}
{%- for line in labelled.lines -%}
{%- set labelled.text = labelled.text.replace(@PREFIX@ + line, line + @PREFIX@) -%}
{%- endfor -%}
{{- labelled.text -}}"""
_FORMATS = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def _foreign(template: JinjaTemplate) -> str:
    """Return a chat template of a model's own between the Jinja that puts label lines into its texts."""
    # Where the chat template takes away blanks around texts, the label line follows what is left of a user's.
    blanks = template.blanks.get("user")
    place = _PLACES[template.label_at].replace("@BLANKS@", f".{blanks}()" if blanks else "")
    if template.label_at == "user":
        return _foreign_head(template, place) + template.source
    last = "{%- if add_generation_prompt -%}{{- label(requested) -}}{%- endif -%}"
    if not template.response_prefix:
        return _foreign_head(template, place) + template.source + last
    moved = _MOVED.replace("@PREFIX@", _quoted(template.response_prefix)).replace("@SOURCE@", template.source)
    return _foreign_head(template, _PREFIXED) + moved + last


def _foreign_head(template: JinjaTemplate, place: str) -> str:
    """Return what stands before a chat template of a model's own: ``place`` makes the ``text`` of a ``message``."""
    day = date.fromisoformat(template.day)
    days = {form: day.strftime(form) for _, form in _FORMATS.findall(template.source)}
    return _FOREIGN.replace("@DAYS@", json.dumps(days, ensure_ascii=False)).replace("@PLACE@", place)


_SCORED_PLACE = """\
{%- set text -%}
{{- message['content'] -}}{%- if message['role'] == 'assistant' -%}{{- @MARKER@ -}}{%- endif -%}
{%- endset -%}"""


def _scored_foreign(template: JinjaTemplate) -> str:
    """Return a chat template of a model's own with a label marker after each response, cut off after the last one."""
    if template.response_suffix:
        raise UserError(
            f"template=auto: the chat template puts {template.response_suffix!r} between a response and what closes "
            "it, and has no form that marks where values are read; take template=chatml or template=steerlm"
        )
    marker = _quoted(template.label_marker)
    place = _SCORED_PLACE.replace("@MARKER@", marker)
    written = f"{{%- set written -%}}{template.source}{{%- endset -%}}"
    cut = f"{{{{- written.split({marker})[:-1] | join({marker}) + {marker} -}}}}"
    return _foreign_head(template, place) + written + cut


def chat_template(template: Template, schema: AttributeSchema | None, defaults: Mapping[str, int]) -> str:
    """Return the Jinja source of ``template``.

    Args:
        schema: of a model that is conditioned on attributes; None for any other.
        defaults: levels of attributes that a request does not name; an attribute without one is then left out.

    Raises:
        UserError: two attributes have one variable, or the name of one that chat templates have.
    """
    label = _NO_LABEL
    if schema is not None and schema.seen:
        variables = [variable(name) for name in schema.seen]
        taken = sorted({*variables} & _TAKEN)
        if len({*variables}) < len(variables) or taken:
            raise UserError(
                f"attributes {' '.join(schema.names)}: a chat template needs a variable of its own for each; rename "
                + (
                    f"{' '.join(taken)}, which mean something else there"
                    if taken
                    else "those that differ in signs alone"
                )
            )
        requested = ", ".join(
            f"{_quoted(name)}: {v} if {v} is defined else {defaults.get(name, 'none')}"
            for name, v in zip(schema.seen, variables, strict=True)
        )
        label = _LABEL.replace("@REQUESTED@", requested).replace("@MARKER@", _quoted(template.label_marker))
        if isinstance(template, JinjaTemplate) and template.label_at == "user":
            label = label.replace(" + '\\n'", "")
        label = label.replace("@MAX@", str(schema.max_level)).replace(
            "@NAMES@", f"[{', '.join(map(_quoted, schema.seen))}]"
        )
    if isinstance(template, JinjaTemplate):
        return _HEAD.replace("@SYSTEM@", _quoted(template.system)).strip() + label.strip() + _foreign(template)
    body = _BODIES[template.name].replace("@SUFFIX@", _quoted(template.system_suffix))
    return (_HEAD.replace("@SYSTEM@", _quoted(template.system)) + label + body).strip()


def scored_template(template: Template) -> str:
    """Return the Jinja source of what an attribute-prediction model reads of a conversation that ends with a response.

    The last token is the one at which the values of the last response are read, so that a classifier of
    ``transformers`` reads them where our model does. ``add_generation_prompt`` has no meaning in it.

    Raises:
        UserError: a chat template of the model's own puts text between a response and what closes it.
    """
    if isinstance(template, JinjaTemplate):
        head = _HEAD.replace("@SYSTEM@", _quoted(template.system)).strip() + _SCORED_LAST.strip()
        return head + _scored_foreign(template)
    body = _SCORED_BODIES[template.name].replace("@SUFFIX@", _quoted(template.system_suffix))
    head = _HEAD.replace("@SYSTEM@", _quoted(template.system))
    return (head + _SCORED_LAST + body.replace("@MARKER@", _quoted(template.label_marker))).strip()


def _quoted(text: str) -> str:
    """Return ``text`` as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)
