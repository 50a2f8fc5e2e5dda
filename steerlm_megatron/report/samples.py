"""The responses that a page embeds for its browser: which ones, and in which form.

Owns: grouping responses by prompt and requested levels, their disagreements, the choice where there are too many, and
the JSON in the page. Does not own: searching and showing them (``templates/samples.js``, ``report.html.j2``).
Invariants: the same responses give the same choice; the strongest disagreements are always in it; the JSON cannot end
the element that it stands in.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steerlm_megatron.files import to_strict_json
from steerlm_megatron.report.words import is_number, model_title

MOST_RESPONSES = 2000
MOST_CHARACTERS = 2_000_000  # of the JSON in the page
MOST_OF_A_TEXT = 4000  # characters of a prompt or a response
STATIC = 6  # groups that the page shows without JavaScript, and in print
_STRONGEST = 0.25  # the share of the responses that each kind of disagreement chooses
Group = dict[str, Any]


def embedded_json(value: Any) -> str:
    """Return JSON for a ``<script type="application/json">``: no ``<`` in it, which alone could end the element or
    begin a comment (https://html.spec.whatwg.org/multipage/scripting.html#restrictions-for-contents-of-script-elements).
    """
    text = json.dumps(to_strict_json(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate is written as its escape
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def disagreement(asked: Mapping[str, float] | None, judges: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Return how far what was measured of a response is from what was asked for, and how far judges are from each
    other: the largest distance over attributes, on the schema's scale; −1 where nothing can be compared.
    """
    names = dict.fromkeys(name for values in judges.values() for name in values)
    found = {name: [v[name] for v in judges.values() if is_number(v.get(name))] for name in names}
    wanted = asked or {}
    from_asked = [abs(value - wanted[name]) for name in found if name in wanted for value in found[name]]
    between = [max(values) - min(values) for values in found.values() if len(values) > 1]
    return max(from_asked, default=-1.0), max(between, default=-1.0)


def samples(
    responses: Sequence[Mapping[str, Any]],
    texts: Mapping[Any, str],
    most: int = MOST_RESPONSES,
    characters: int = MOST_CHARACTERS,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Return what the page's browser of responses shows, None without responses.

    Args:
        responses: lines as ``responses.jsonl`` has them; ``run`` names the run in a comparison.
        texts: the prompts' texts by id, or by (run, id) in a comparison; a prompt without one is shown by its id.
        most, characters: how many responses, and characters of JSON, are chosen at most. Of more, those with the
            strongest disagreements are taken first, a quarter by each kind, and then others at random (``seed``).

    Returns:
        ``judges`` [{name, measured: [attribute]}], ``models`` [title], ``attributes`` (that requests vary), ``prompts``
        [text], ``asks`` [levels], ``groups``: ``p`` (place in prompts), ``b`` (whether it is at the best levels), ``x``
        (the attributes that are off their best levels), ``r``: per response ``m`` (place in models), ``a`` (place in
        asks, None for a model without attributes), ``t`` (text), ``v`` (values of each judge). ``shown``, ``of``: how
        many responses of how many; ``cut``: how many texts are cut.
    """
    if not responses:
        return None
    table = _Table()
    groups = table.groups(responses, texts)
    chosen = _chosen(groups, most, characters, seed)
    shown = sum(len(group["r"]) for group in chosen)
    varied = dict.fromkeys(name for group in groups for name in group["x"])
    return {
        "judges": [{"name": name, "measured": list(found)} for name, found in table.judges.items()],
        "models": list(table.models),
        "attributes": list(varied),
        **table.compact(chosen),
        "shown": shown,
        "of": len(responses),
    }


class _Table:
    """What responses have in common, and the groups that they are in."""

    def __init__(self) -> None:
        self.models: dict[str, int] = {}
        self.judges: dict[str, dict[str, int]] = {}

    def groups(self, responses: Sequence[Mapping[str, Any]], texts: Mapping[Any, str]) -> list[Group]:
        """Return the responses by prompt and levels, in the order of prompts; those at a model's best levels, and
        those of models without attributes, are together. Prompts of two runs are one where they have the same text.
        """
        best = {_model(line): line["asked"] for line in responses if line["best"] and line["asked"]}
        found: dict[tuple[Any, Any], Group] = {}
        order: dict[Any, int] = {}
        seen: dict[tuple[Any, str], tuple[str, int]] = {}  # (run, id) → text, and how many of the run have it before
        repeated: Counter[tuple[Any, str]] = Counter()
        for line in responses:
            run, prompt = line.get("run"), line["prompt"]
            if (run, prompt) not in seen:
                text = texts.get(prompt if run is None else (run, prompt)) or f"[{prompt}]"
                seen[run, prompt] = text, repeated[run, text]
                repeated[run, text] += 1
            same = seen[run, prompt]
            asked = line["asked"]
            key = None if line["best"] or not asked else tuple(sorted(asked.items()))
            order.setdefault(same, len(order))
            levels = best.get(_model(line)) or {}
            varied = [] if key is None else [name for name in asked if asked[name] != levels.get(name)]
            group = found.setdefault((same, key), {"prompt": same, "b": key is None, "x": varied, "r": []})
            judges = {name: dict(v) for name, v in (line.get("judges") or {"measured": line["measured"]}).items()}
            for name, values in judges.items():
                known = self.judges.setdefault(name, {})
                known.update({one: len(known) for one in values if one not in known})
            distances = disagreement(asked, judges)
            response = {"model": _model(line), "asked": asked, "text": line["text"], "judges": judges}
            group["r"].append(response | {"distances": distances})
            self.models.setdefault(response["model"], len(self.models))
        by_prompt = sorted(found.items(), key=lambda item: order[item[0][0]])
        return [group for _, group in by_prompt]

    def compact(self, groups: Iterable[Group]) -> dict[str, Any]:
        """Return groups as the page has them: what occurs many times is written once."""
        prompts: dict[tuple[str, int], int] = {}
        asks: dict[str, int] = {}
        cut, out = 0, []
        for group in groups:
            place = prompts.setdefault(group["prompt"], len(prompts))
            rows = []
            for one in group["r"]:
                asked = one["asked"] and asks.setdefault(json.dumps(one["asked"]), len(asks))
                values = [
                    [_rounded(one["judges"].get(judge, {}).get(name)) for name in names]
                    for judge, names in self.judges.items()
                ]
                cut += len(one["text"]) > MOST_OF_A_TEXT
                rows.append({"m": self.models[one["model"]], "a": asked, "t": _short(one["text"]), "v": values})
            out.append({"p": place, "b": group["b"], "x": group["x"], "r": rows})
        return {
            "prompts": [_short(text) for text, _ in prompts],
            "asks": [json.loads(text) for text in asks],
            "groups": out,
            "cut": cut + sum(len(text) > MOST_OF_A_TEXT for text, _ in prompts),
        }


def _model(line: Mapping[str, Any]) -> str:
    title = model_title(line["model"])
    return f"{line['run']}: {title}" if "run" in line else title


def _rounded(value: Any) -> float | None:
    return round(float(value), 3) if is_number(value) else None


def _short(text: str) -> str:
    more = len(text) - MOST_OF_A_TEXT
    return text if more <= 0 else f"{text[:MOST_OF_A_TEXT]} … [{more} more characters]"


def _size(group: Group) -> int:
    """Return about how many characters a group takes in the page."""
    texts = [group["prompt"][0], *(one["text"] for one in group["r"])]
    of_texts = sum(min(len(text), MOST_OF_A_TEXT) for text in texts)
    of_values = sum(60 + 9 * sum(len(values) for values in one["judges"].values()) for one in group["r"])
    return 60 + of_texts + of_values


def _chosen(groups: Sequence[Group], most: int, characters: int, seed: int) -> list[Group]:
    """Return the groups that fit, in their order."""
    strongest = [
        sorted(range(len(groups)), key=lambda i: -max(one["distances"][kind] for one in groups[i]["r"]))
        for kind in (0, 1)
    ]
    others = list(range(len(groups)))
    random.Random(seed).shuffle(others)
    kept: set[int] = set()
    left, room = most, characters
    for places, share in ((strongest[0], _STRONGEST), (strongest[1], _STRONGEST), (others, 1.0)):
        part = share * most
        for place in places:
            if place in kept:
                continue
            size = len(groups[place]["r"])
            if size > min(left, part) or _size(groups[place]) > room:
                break
            kept.add(place)
            left, part, room = left - size, part - size, room - _size(groups[place])
    if not kept:  # a group is larger than all that fits
        first = groups[strongest[0][0]]
        return [first | {"r": first["r"][:most]}]
    return [groups[place] for place in sorted(kept)]


def first_page(found: Mapping[str, Any], count: int = STATIC) -> list[dict[str, Any]]:
    """Return the first groups as the template shows them where no script runs."""
    out = []
    for group in found["groups"][:count]:
        responses = []
        for one in group["r"]:
            by_judge = [
                (judge["name"], {name: v for name, v in zip(judge["measured"], values, strict=True) if v is not None})
                for judge, values in zip(found["judges"], one["v"], strict=True)
            ]
            responses.append(
                {
                    "model": found["models"][one["m"]],
                    "asked": {} if one["a"] is None else found["asks"][one["a"]],
                    "text": one["t"],
                    "judges": [(name, values) for name, values in by_judge if values],
                }
            )
        title = f"Prompt {group['p'] + 1}, {asked_in_words(group, found)}"
        out.append({"title": title, "prompt": found["prompts"][group["p"]], "responses": responses})
    return out


def asked_in_words(group: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return what a group's requests ask for: the levels that are not the best ones."""
    if group["b"]:
        return "at the best levels"
    levels = found["asks"][group["r"][0]["a"]]
    return ", ".join(f"{name} {levels[name]}" for name in group["x"]) or "at other levels"
