"""What a Hugging Face ``tokenizer.json`` cannot keep of a text, by the setting that loses it.

Each part of the file is tried on a sample of what text is made of; a part whose effect a sample cannot show (a pattern)
is named in any case. So a file of which nothing is said keeps every text.

Owns: the walk through a file's parts, the sample. Does not own: what is done about a loss (``tokenizer.py`` warns of it
once, and the shards' manifest keeps it). Invariant: nothing is changed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

# Case, composed and decomposed accents, ligatures and other compatibility forms, punctuation, digits, blanks of several
# kinds and runs of them, control and invisible characters, scripts without blanks, an emoji of several characters.
SAMPLE = (
    "  Aa Zz  \u00e9 e\u0301 \u0130 \ufb01 \u2460 \uff21 \u212b \u1e9b\u0323 it's don't (x), [y]. \"z\"! "
    "``w'' 1,234.5 a-b_c \t\n\r\n\u00a0\u3000\u2028\u200b\u200d\ufeff\u00ad\x00\x07\x7f "
    "\u65e5\u672c\u8a9e \ud55c\uae00 \u1112\u1161\u11ab \u0645\u064e \u0928\u093f "
    "\U0001f468\u200d\U0001f469 </x> {a} @#$%^&*+=~|\\/ \u2581\u0120  "
)
_KEEPS_TEXT = {
    "normalizer": {"ByteLevel", "Prepend"},
    "pre_tokenizer": {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"},
}


def losses_of_file(raw: dict[str, Any], tokenizer: Any, has_bytes: bool) -> list[str]:
    """What is lost, each as ``part Type: what``, in the order of the parts.

    Args:
        raw: the file's content, as ``tokenizer`` was made from it.
        tokenizer: of the library ``tokenizers``.
        has_bytes: whether the vocabulary has every byte.
    """
    back = {_replaces(part) for part in text_parts(raw, "decoder")}
    found = [
        f"normalizer {part['type']}: {loss}"
        for part in text_parts(raw, "normalizer")
        if (loss := _normalizer_loss(part, back))
    ]
    found += _pre_tokenizer_losses(raw)
    found += _not_undone(raw, back)
    model = raw["model"].get("type", "BPE")
    if model in ("WordPiece", "WordLevel"):
        found.append(f"model {model}: blanks between words are not part of the vocabulary")
    elif not has_bytes:
        found.append(f"model {model}: it has no bytes for characters that its vocabulary lacks")
    if not found and (joined := _joined(tokenizer, has_bytes)):
        found.append(f"decoder {_types(raw.get('decoder'))}: {joined}")
    return list(dict.fromkeys(found))


def _normalizer_loss(part: dict[str, Any], back: set[tuple[str, str] | None]) -> str:
    """What a normaliser loses; ``back``: what the decoder replaces by what."""
    import tokenizers

    if part["type"] in _KEEPS_TEXT["normalizer"]:
        return ""
    sample = SAMPLE
    if part["type"] == "Replace":
        replaced = _replaces(part)
        if replaced is None:
            return f"what its pattern {json.dumps(part.get('pattern'))} finds is replaced by {part.get('content')!r}"
        if replaced[::-1] in back:
            return ""
        sample = replaced[0]
    normalize = tokenizers.Tokenizer.from_str(_file_of("normalizer", part)).normalizer.normalize_str
    for size in (1, 2, 3, len(sample)):
        for at in range(len(sample) - size + 1):
            text = sample[at : at + size]
            if (made := normalize(text)) != text:
                return f"{text!a} becomes {made!a}"
    return "it may change text"


def _file_of(name: str, part: dict[str, Any]) -> str:
    """A file that has one part alone."""
    import tokenizers

    return json.dumps(json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()) | {name: part})


def _pre_tokenizer_losses(raw: dict[str, Any]) -> Iterator[str]:
    """What pre-tokenizers leave out between the pieces that they make."""
    import tokenizers

    for part in text_parts(raw, "pre_tokenizer"):
        if part["type"] in _KEEPS_TEXT["pre_tokenizer"]:
            continue
        if part["type"] == "CharDelimiterSplit":
            yield f"pre_tokenizer CharDelimiterSplit: {part.get('delimiter')!r} is left out"
            continue
        if part.get("behavior") == "Removed" and part["type"] == "Split" and not part.get("invert"):
            yield f"pre_tokenizer Split: what its pattern {json.dumps(part.get('pattern'))} finds is left out"
            continue
        split = tokenizers.Tokenizer.from_str(_file_of("pre_tokenizer", part)).pre_tokenizer
        kept: set[int] = set()
        for _, (start, end) in split.pre_tokenize_str(SAMPLE):
            kept.update(range(start, end))
        missing = sorted({char for at, char in enumerate(SAMPLE) if at not in kept})
        if missing:
            yield f"pre_tokenizer {part['type']}: {''.join(missing[:4])!r} is left out"


def _not_undone(raw: dict[str, Any], back: set[tuple[str, str] | None]) -> Iterator[str]:
    """Other letters that ``ByteLevel`` or ``Metaspace`` writes, and that the decoder leaves as they are."""
    undone = {part["type"] for part in text_parts(raw, "decoder")}
    for part in text_parts(raw):
        if part["type"] == "ByteLevel" and "ByteLevel" not in undone:
            yield f"decoder {_types(raw.get('decoder'))}: the letters of ByteLevel do not come back as bytes"
        elif part["type"] == "Metaspace" and _replaces(part) not in back:
            yield f"decoder {_types(raw.get('decoder'))}: the sign for a blank does not come back as one"


def _joined(tokenizer: Any, has_bytes: bool) -> str:
    """How pieces come back joined, if not as they were."""
    known = [char for char in dict.fromkeys(SAMPLE) if has_bytes or _back(tokenizer, char) == char]
    text = "".join(known)
    for sample in (text, *(a + b for a, b in zip(known, known[1:], strict=False)), *(char + char for char in known)):
        if (back := _back(tokenizer, sample)) != sample and "\u2581" not in sample:
            return f"{sample[:40]!r} comes back as {back[:40]!r}"
    return ""


def _back(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=True))


def _replaces(part: dict[str, Any]) -> tuple[str, str] | None:
    """What a component puts in the place of what; None if that is a pattern, or nothing."""
    if part["type"] == "Metaspace":
        return part.get("replacement", "\u2581"), " "
    pattern = part.get("pattern")
    if part["type"] != "Replace" or not isinstance(pattern, dict) or not pattern.get("String"):
        return None
    return pattern["String"], part.get("content", "")


def text_parts(raw: dict[str, Any], *names: str) -> Iterator[dict[str, Any]]:
    """The members of a file's normaliser and pre-tokenizer (or of the parts named), out of their sequences."""
    for name in names or ("normalizer", "pre_tokenizer"):
        yield from _members(raw.get(name))


def _members(part: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(part, dict):
        return
    inner = [part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part]
    if not inner:
        yield part
    for parts in inner:
        for member in parts:
            yield from _members(member)


def _types(part: Any) -> str:
    return "+".join(member["type"] for member in _members(part)) or "null"
