"""Token ids of words that were met before: a text is cut where its tokens part for certain, and each word is encoded
once.

Nine words of ten in a row have stood in an earlier one, and the engine would read each of them again: more than half of
the time that rows took to be made. Here a text is cut before single spaces, and only what is new goes to the engine.
That is the same as the whole text to the engine, by the tokenizer's structure, where `cuts_at_spaces` says so:

- No part of the patterns that cut text (`_PARTS`) holds a space behind another sign, and none looks back. So what was
  matched ends before each space that follows a sign which is none, and what is matched from there on depends on what
  follows alone. A look ahead (`\\s+(?!\\S)`) sees a sign of its own part: only the last one ends in white space.
- In the same way what was matched ends behind a single line break before a letter or digit.
- Merges happen inside of what was cut. Composing letters (NFC) never joins a space to what stands before it.
- Added tokens are cut out first. None of them takes white space around it, or holds any.

And it is tried: the first texts are done both ways, and one difference ends it.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from operator import add
from typing import Any, NamedTuple

TRIED = 64  # texts that are done both ways
KEPT_CHARS = 512 << 10  # of words: some 60,000 English ones; with ids and places some 30 MiB
MAX_WORD = 64  # characters; what is longer is no word that comes again
_CONTRACTIONS = (
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    *("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)", "(?i:'[sdmt]|'ll|'ve|'re)", "'(?:[sdmt]|ll|ve|re)"),
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
)
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_LINE_BREAK = r"(?<=[!-~]\n)(?=[A-Za-z0-9])"  # a single one: of several the last is cut apart where a letter follows
_ANYWHERE = r"\s+"  # matches every space that nothing else does
# What patterns of real tokenizers are made of. In each a space can stand at the beginning alone, and none looks back.
_PARTS = frozenset(
    {
        *_CONTRACTIONS,
        *(f"{word}{end}" for word in (_CAPITALS, _SMALL) for end in ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")),
        *(r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"),
        *(r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1}", r"\p{N}{1,3}"),
        *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),
        *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", _ANYWHERE),
    }
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def cuts_at_spaces(engine: Mapping[str, Any]) -> bool:
    """Whether a tokenizer, given as the content of its tokenizer.json, reads each part of a text that begins with a
    space behind another sign as it reads the whole: a byte-level BPE whose patterns are known."""
    model = engine["model"]
    if model.get("type") != "BPE" or model.get("dropout") or not _places_as_they_are(engine.get("post_processor")):
        return False
    for token in engine.get("added_tokens") or ():
        if token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\s", token["content"]):
            return False
    steps = _flat(engine.get("pre_tokenizer"), "pretokenizers")
    plain = {one["type"] for one in _flat(engine.get("normalizer"), "normalizers")} <= {"NFC"}
    return plain and any(step["type"] == "ByteLevel" for step in steps) and _patterns_cut(steps)


def _patterns_cut(steps: Sequence[Mapping[str, Any]]) -> bool:
    patterns = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [_GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Split" and (step.get("behavior"), bool(step.get("invert"))) in (
            ("Isolated", False),
            ("Removed", True),
        ):
            patterns.append(str(step["pattern"].get("Regex", "")))
        elif step["type"] == "Digits":
            patterns.append(r"\p{N}")
        else:
            return False
    parts = [_alternatives(pattern.replace("\r", r"\r").replace("\n", r"\n")) for pattern in patterns]
    return all(_PARTS.issuperset(each) for each in parts) and any(_ANYWHERE in each for each in parts)


def _places_as_they_are(processor: Mapping[str, Any] | None) -> bool:
    """Whether nothing is done to places in the text that depends on what stands before a part."""
    for step in _flat(processor, "processors"):
        trims = step.get("trim_offsets") and step.get("add_prefix_space")
        if step["type"] not in ("TemplateProcessing", "ByteLevel") or trims:
            return False
    return True


def _flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return [part] if part["type"] != "Sequence" else [step for member in part[inner] for step in _flat(member, inner)]


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a pattern, those inside of groups left together."""
    found, depth, start, at = [], 0, 0, 0
    while at < len(pattern):
        sign = pattern[at]
        depth += (sign in "([") - (sign in ")]")
        if sign == "|" and not depth:
            found.append(pattern[start:at])
            start = at + 1
        at += 2 if sign == "\\" else 1
    return [*found, pattern[start:]]


class Encoded(NamedTuple):
    """`ids` of a part of a text; `places`: of each the characters from and to, behind each other."""

    ids: tuple[int, ...]
    places: array[int]

    @classmethod
    def of(cls, encoding: Any) -> Encoded:
        return cls(tuple(encoding.ids), array("I", chain.from_iterable(encoding.offsets)))

    @classmethod
    def joined(cls, pieces: Sequence[tuple[str, Encoded]]) -> Encoded:
        """Pieces of one part, each with its text."""
        if len(pieces) == 1:
            return pieces[0][1]
        places, start = array("I"), 0
        for text, one in pieces:
            places.extend([start + place for place in one.places])
            start += len(text)
        return cls(tuple(chain.from_iterable(one.ids for _, one in pieces)), places)


_Known = Mapping[str, Encoded]


class Places(Sequence[tuple[int, int]]):
    """Characters from and to of each token, made when they are asked for: of a row's hundreds some ten are.

    `parts`: of the text, without the space that stands before each but the first; `ids` of each. `new`: of parts as
    they are encoded; `kept`: of the others.
    """

    def __init__(self, parts: Sequence[str], ids: Sequence[tuple[int, ...]], new: _Known, kept: _Known) -> None:
        self._parts, self._new, self._kept = parts, new, kept
        self._firsts = list(accumulate(map(len, ids), initial=0))
        ends = accumulate(map(len, parts))
        self._starts = [0, *map(add, ends, range(len(parts) - 1))]  # in the text, with the space before it

    def __len__(self) -> int:
        return self._firsts[-1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number, start in enumerate(self._starts):
            places = self._places(number)
            for at in range(0, len(places), 2):
                yield start + places[at], start + places[at + 1]

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return list(self)[at]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        number = bisect_right(self._firsts, at) - 1
        start, places, inside = self._starts[number], self._places(number), 2 * (at - self._firsts[number])
        return start + places[inside], start + places[inside + 1]

    def ended_at(self, place: int) -> int:
        """How many tokens have ended at a place in the text: of the parts before the one around it, all."""
        number = max(0, bisect_right(self._starts, place) - 1)
        inside = place - self._starts[number]
        return self._firsts[number] + sum(1 for end in self._places(number)[1::2] if end <= inside)

    def first_near(self, place: int) -> int:
        """A token that begins before a place in the text, as all before it do, or the first; its part is the last such
        one."""
        return self._firsts[max(0, bisect_left(self._starts, place) - 1)]

    def _places(self, number: int) -> array[int]:
        part = _as_encoded(self._parts, number)
        return (self._new.get(part) or self._kept[part]).places


class KnownWords:
    """Encodes texts with an engine of the library tokenizers, each word once. `content`: its tokenizer.json."""

    def __init__(self, engine: Any, content: str) -> None:
        described = json.loads(content)
        self._engine = engine
        self._works = cuts_at_spaces(described) and not engine.encode_special_tokens
        added = (token["content"] for token in described.get("added_tokens") or () if not token["normalized"])
        longest_first = sorted((re.escape(token) for token in added), key=len, reverse=True)
        self._seams = re.compile("|".join([f"({'|'.join(longest_first)})"] * bool(longest_first) + [_LINE_BREAK]))
        self._words: dict[str, tuple[int, ...]] = {}  # ids of words, without the space that stands before each
        self._kept: dict[str, Encoded] = {}
        self._chars = 0
        self._tried = 0

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[Places]] | None:
        """Ids and places of each text's tokens, without special tokens around it; None where the tokenizer does not
        allow it, and from the first text on that came out otherwise than with the engine alone."""
        if not self._works:
            return None
        if self._chars > KEPT_CHARS:  # rows that were made hold on to what they need of them
            self._words, self._kept, self._chars = {}, {}, 0
        cut = [_parts(text, self._words) for text in texts]
        new = self._encoded(dict.fromkeys(_as_encoded(parts, at) for parts, _, missing in cut for at in missing))
        rows, places = [], []
        for parts, ids, missing in cut:
            for at in missing:
                ids[at] = new[_as_encoded(parts, at)].ids
            rows.append(list(chain.from_iterable(ids)))
            places.append(Places(parts, ids, new, self._kept))
        return (rows, places) if self._tried >= TRIED or self._came_out(texts, rows, places) else None

    def _encoded(self, parts: Iterable[str]) -> dict[str, Encoded]:
        """Parts of texts, cut once more at added tokens and single line breaks, of which most are known too."""
        pieces = {part: [piece for piece in self._seams.split(part) if piece] for part in parts}
        unknown = list({piece: None for of_part in pieces.values() for piece in of_part if piece not in self._kept})
        encoded = self._engine.encode_batch(unknown, add_special_tokens=False)
        fresh = {piece: Encoded.of(one) for piece, one in zip(unknown, encoded, strict=True)}
        found = {
            part: Encoded.joined([(piece, fresh.get(piece) or self._kept[piece]) for piece in of_part])
            for part, of_part in pieces.items()
        }
        for piece, one in fresh.items():
            if len(piece) <= MAX_WORD:
                self._kept[piece] = one
                self._chars += len(piece)
                if piece[0] == " " and " " not in piece[1:] and _ends_well(piece):
                    self._words[piece[1:]] = one.ids
        return found

    def _came_out(self, texts: Sequence[str], rows: Sequence[list[int]], places: Sequence[Places]) -> bool:
        """Whether the first texts came out as with the engine alone."""
        tried = self._engine.encode_batch(list(texts[: TRIED - self._tried]), add_special_tokens=False)
        self._tried += len(tried)
        same = zip(tried, rows, places, strict=False)
        self._works = all(one.ids == ids and one.offsets == list(where) for one, ids, where in same)
        return self._works


def _parts(text: str, known: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[Any], list[int]]:
    """A text cut before single spaces, the ids of its parts as far as they are known, and which are not."""
    words = text.split(" ")
    ids: list[Any] = list(map(known.get, words))
    ids[0] = None  # no space stands before it
    missing = [at for at, found in enumerate(ids) if found is None]
    if not all(_ends_well(words[at]) for at in missing if at + 1 < len(words)):
        runs = [[words[0]]]
        for before, word in pairwise(words):
            if _ends_well(before):
                runs.append([word])
            else:
                runs[-1].append(word)
        words = [" ".join(run) for run in runs]
        ids = list(map(known.get, words))
        ids[0] = None
        missing = [at for at, found in enumerate(ids) if found is None]
    return words, ids, missing


def _as_encoded(parts: Sequence[str], number: int) -> str:
    return f" {parts[number]}" if number else parts[0]


def _ends_well(part: str) -> bool:
    """Whether what follows behind a space is read apart: it ends in a sign that is certainly no white space."""
    return bool(part) and ("!" <= part[-1] <= "~" or part[-1].isalnum())
