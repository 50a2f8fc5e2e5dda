"""The judge of the embedded corpus: a program that measures every attribute of schema ``demo`` in any text.

Owns: the meaning of the attributes, and the closed lists of facts, puns, rude and courteous words that are counted.
Does not own: making conversations (``make_demo_corpus.py``). Invariants: it uses no model; equal texts get equal
values; every text can be measured, without an error. All values are floats on [0, 4]:

* helpfulness = 4 x the share of the asked properties whose ``fact`` is stated, ``the`` apart (0 if none is asked);
* verbosity   = (words - 17) / 6, clipped: 17 words or fewer are 0, 29 are 2, 41 or more are 4;
* humor       = number of different pun lines, at most 4;
* toxicity    = number of rude words, repeats counted, at most 4;
* quality     = ``quality_of`` the four and courtesy, the number of different courteous words (at most 4). Courtesy
  counts for quality alone: without it, quality could not vary while the other attributes stay the same.
"""

from __future__ import annotations

import re

NAMES = ("quality", "helpfulness", "verbosity", "humor", "toxicity")
MAX = 4.0

PROPERTIES = ("color", "food", "home", "sound", "size", "baby")
# subject → its value of each property, in the order of PROPERTIES
FACTS: dict[str, tuple[str, str, str, str, str, str]] = {
    "fox": ("red", "mice", "a den", "a yip", "small", "a kit"),
    "owl": ("brown", "moths", "a barn", "a hoot", "small", "an owlet"),
    "bear": ("black", "honey", "a cave", "a growl", "huge", "a cub"),
    "cow": ("white", "grass", "a field", "a moo", "large", "a calf"),
    "duck": ("yellow", "bread", "a pond", "a quack", "small", "a duckling"),
    "frog": ("green", "flies", "a swamp", "a croak", "tiny", "a tadpole"),
    "horse": ("brown", "hay", "a stable", "a neigh", "large", "a foal"),
    "lion": ("gold", "meat", "a plain", "a roar", "large", "a cub"),
    "mouse": ("gray", "cheese", "a hole", "a squeak", "tiny", "a pup"),
    "pig": ("pink", "corn", "a sty", "an oink", "large", "a piglet"),
    "sheep": ("white", "clover", "a hill", "a bleat", "large", "a lamb"),
    "wolf": ("gray", "meat", "a forest", "a howl", "large", "a pup"),
}
PUNS = ("Owl be back!", "Bear with me!", "I goat this!", "Seal the deal!", "Bee my friend!", "Cow about that!")
RUDE = ("goof", "dolt", "twit", "oaf", "dummy", "grump", "nitwit", "silly")
COURTEOUS = ("Sure.", "Gladly.", "Certainly.", "Cheers.", "Thanks.", "Welcome.")

_WORD = re.compile(r"[a-z]+")
_RUDE = frozenset(RUDE)


def value(subject: str, attribute: str) -> str:
    """Return the value of ``attribute`` of ``subject``, with its article: ``a den``."""
    return FACTS[subject][PROPERTIES.index(attribute)]


def fact(subject: str, attribute: str) -> str:
    """Return the sentence that answers ``attribute`` of ``subject``: ``The fox color is red.``"""
    return f"The {subject} {attribute} is {value(subject, attribute)}."


def asked(prompt: str) -> list[tuple[str, str]]:
    """Return (subject, property) pairs that ``prompt`` asks for, each once, in order; empty if it asks for nothing
    known.
    """
    words = _WORD.findall(prompt.lower())
    subjects = [word for word in words if word in FACTS]
    return [(subjects[-1], word) for word in dict.fromkeys(words) if word in PROPERTIES] if subjects else []


def quality_of(helpfulness: float, verbosity: float, humor: float, toxicity: float, courtesy: float = MAX) -> float:
    """Return quality in [0, 4] from values in [0, 4]. It rises with help, courtesy and a little with humor, falls with
    rudeness.

    ``0.25 helpfulness + 0.75 courtesy + 0.1 humor - 0.5 toxicity - 0.2 |verbosity - 2|``, clipped: a complete,
    courteous answer of middle length without a rude word has 4.
    """
    raw = 0.25 * helpfulness + 0.75 * courtesy + 0.1 * humor - 0.5 * toxicity - 0.2 * abs(verbosity - 2.0)
    return _clip(raw)


def measure(prompt: str, response: str) -> dict[str, float]:
    """Return all attributes of ``response`` to ``prompt`` (the last user message), by ``NAMES``, floats in [0, 4]."""
    # Case, punctuation and line breaks do not matter, since sequences of words are counted.
    words = " ".join(_WORD.findall(response.lower()))
    wanted = asked(prompt)
    stated = sum(_holds(words, fact(subject, name).removeprefix("The ")) for subject, name in wanted)
    helpfulness = MAX * stated / len(wanted) if wanted else 0.0
    verbosity = _clip((len(response.split()) - 17) / 6)
    humor = _clip(sum(_holds(words, pun) for pun in PUNS))
    toxicity = _clip(sum(word in _RUDE for word in words.split()))
    courtesy = _clip(sum(_holds(words, phrase) for phrase in COURTEOUS))
    quality = quality_of(helpfulness, verbosity, humor, toxicity, courtesy)
    return dict(zip(NAMES, (quality, helpfulness, verbosity, humor, toxicity), strict=True))


def _holds(words: str, phrase: str) -> bool:
    """Return whether the words of ``phrase`` stand in a row in ``words`` (lower case, single spaces)."""
    return f" {' '.join(_WORD.findall(phrase.lower()))} " in f" {words} "


def _clip(number: float) -> float:
    return min(max(float(number), 0.0), MAX)
