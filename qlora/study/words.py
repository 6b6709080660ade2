"""Words of questions and answers: how a text becomes tokens that can be compared, in five languages.

Numbers are kept exact: 3.5 stays one token, 1,200 and 1 200 are 1200 (1.200 in German, French and Spanish), a number
word is its number ("seven years" is "7 years"), and a unit beside a number is a token of its own ("7kW" is "7 kW",
"€49" is "49 €"). Languages without blanks are taken by characters. Data stands in `words.toml`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files as resources

from qlora import foreign_toml

LANGUAGES = ("en", "de", "fr", "es", "zh")
# Scripts written without blanks: Hiragana, Katakana, Han (also rare ones), and their compatibility forms.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = re.compile(f"[{UNSPACED}]")
_COMMA_DECIMAL = ("de", "fr", "es")
# A minus counts where nothing stands before it: 5-10 is a range, TX-200 a name.
_NUMBER = r"(?<![\w.,-])[-−]?\d[\d.,]*\d|(?<![\w.,-])[-−]?\d|\d[\d.,]*\d|\d"
_SIGN = r"[%‰€$£¥₹]|°[a-z]?"
# A code (E41, TX-200, v2) is letters and digits together, letters first; digits before letters are a number and a unit.
_TOKEN = re.compile(
    rf"[{UNSPACED}]|[^\W\d_{UNSPACED}]+(?:[-./]?\d[^\W_{UNSPACED}]*)+|{_NUMBER}|{_SIGN}|[^\W\d_{UNSPACED}]+(?:['’][^\W\d_{UNSPACED}]+)*"
)
_POSSESSIVE = re.compile(r"(?<=\w)['’]s\b")
_CURRENCY_FIRST = re.compile(r"([€$£¥₹])\s?(\d[\d.,  ]*\d|\d)")
_GROUPED = re.compile(r"(?<![\w.,])(\d{1,3})((?:[ \u00a0\u202f']\d{3})+)(?!\d)")
_CHINESE_COUNT = re.compile("([零一二两三四五六七八九十])(?=[年月日天周个小时分钟度元米公千斤克吨升次层台件倍岁号页])")


@dataclass(frozen=True)
class Words:
    """The words of one language: see `words.toml`."""

    language: str
    articles: frozenset[str]
    stop: frozenset[str]
    joined: frozenset[str]
    numbers: dict[str, int]
    units: dict[tuple[str, ...], str]
    refusals: tuple[str, ...]
    self_reference: re.Pattern[str]

    @cached_property
    def joined_numbers(self) -> dict[str, int]:
        """Numbers that are written as one word, unit first: einundzwanzig."""
        if self.language != "de":
            return {}
        units = {**{word: value for word, value in self.numbers.items() if 1 < value < 10}, "ein": 1}
        tens = {word: value for word, value in self.numbers.items() if value >= 20}
        return {f"{unit}und{ten}": tens[ten] + units[unit] for unit in units for ten in tens}


def words_of(language: str) -> Words:
    """The words of a language ("de-AT" too); English ones for any other."""
    code = language.lower().replace("_", "-").split("-")[0]
    return _all()[code if code in LANGUAGES else "en"]


def tokens(text: str, language: str) -> list[str]:
    """The text as comparable tokens: casefolded, without punctuation, numbers and units exact, articles kept."""
    words = words_of(language)
    plain = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    plain = _POSSESSIVE.sub("", plain)
    if words.language == "zh":
        plain = _CHINESE_COUNT.sub(lambda sign: str(words.numbers[sign[1]]), plain)
    plain = _GROUPED.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), plain)
    plain = _CURRENCY_FIRST.sub(r"\2 \1 ", plain)
    found: list[str] = []
    for token in _TOKEN.findall(plain):
        if token[0].isdigit() or (token[0] == "-" and len(token) > 1):
            found.append(_number(token, words.language))
        elif "'" in token or "’" in token:
            # SQuAD's script joins what an apostrophe parts; in French and Spanish it ends an article or a preposition.
            parts = re.split("['’]", token)
            found.extend(parts if words.language in ("fr", "es") else ["".join(parts)])
        else:
            found.append(token)
    return _with_units(_with_numbers(found, words), words)


def normalized(text: str, language: str) -> list[str]:
    """Tokens without articles; with them where nothing else is left."""
    found = tokens(text, language)
    articles = words_of(language).articles
    return [token for token in found if token not in articles] or found


def content(text: str, language: str) -> list[str]:
    """Tokens that say something: no articles, pronouns, prepositions, auxiliaries."""
    stop = words_of(language).stop
    return [token for token in tokens(text, language) if token not in stop]


def numbers(found: Iterable[str]) -> list[str]:
    """Of tokens those that have a digit: numbers and codes, in order."""
    return [token for token in found if any(sign.isdigit() for sign in token)]


def names(text: str, language: str) -> list[str]:
    """Words that are written as a name: with a capital that neither a sentence's beginning nor the language asks for.

    In German, which writes every noun so, only words with a second capital count.
    """
    found = []
    opening = True
    for match in re.finditer(r"[^\W_]+(?:[-'’][^\W_]+)*|[.!?:;¿¡\n„“\"(]", _UNSPACED.sub(" ", text)):
        word = _POSSESSIVE.sub("", match[0])
        if not word[0].isalnum():
            opening = True
            continue
        inner = any(sign.isupper() for sign in word[1:])
        capital = word[0].isupper() and not opening and words_of(language).language != "de"
        if (inner or capital) and word.casefold() not in words_of(language).stop:
            found.append(word)
        opening = False
    return found


def anchors(text: str, language: str) -> frozenset[str]:
    """What a text is about whatever its wording: its numbers, codes and names. Two texts that differ here say two
    things, however alike they are."""
    return frozenset([*numbers(tokens(text, language)), *(name.casefold() for name in names(text, language))])


def grams(text: str, size: int = 5) -> frozenset[str]:
    """Runs of `size` characters of the casefolded text, blanks as one; the text itself where it is shorter.

    Characters, not words: a question of ten words has six runs of five words, and one other word breaks five of them.
    """
    plain = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
    return frozenset(plain[at : at + size] for at in range(max(1, len(plain) - size + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of what two sets share by size of both together; 0 of two empty ones."""
    return len(one & other) / len(one | other) if one or other else 0.0


def length(text: str) -> int:
    """Words, and characters where there are no blanks between words."""
    bare = _UNSPACED.sub(" ", text)
    return len(_UNSPACED.findall(text)) + len(re.findall(r"[^\W_]+(?:[-'’.,][^\W_]+)*", bare))


def in_language(text: str, language: str) -> bool:
    """Whether a text may be of a language: by its script, and by words that only one language has.

    A text without such a word is let pass, and so is any in a language that we have no words of, where only
    the script is looked at.
    """
    letters = sum(map(str.isalpha, text))
    unspaced = len(_UNSPACED.findall(text))
    code = language.lower().split("-")[0]
    if code == "zh":
        return unspaced * 4 >= letters
    if code not in LANGUAGES:
        return True
    if unspaced * 4 > letters:
        return False
    found = set(re.findall(r"[^\W\d_]+", text.casefold()))
    hits = {name: len(found & own) for name, own in _telling().items()}
    strongest = max(hits.values())
    return hits[code] * 2 >= strongest


def refuses(text: str, language: str) -> bool:
    """Whether an answer says that it knows none: one of the language's phrases (`refusals`), or an English one."""
    plain = " ".join(re.findall(r"\w+", text.casefold().replace("'", "").replace("’", "")))
    phrases = dict.fromkeys([*words_of(language).refusals, *words_of("en").refusals])
    if _UNSPACED.search(plain):
        return any(phrase in plain for phrase in phrases)
    return any(f" {phrase} " in f" {plain} " for phrase in phrases)


def _number(token: str, language: str) -> str:
    """Digits as written, without signs of grouping, with a decimal point.

    A dot in German, French and Spanish (a comma elsewhere) groups where three digits follow each; a version such as
    3.10.2 keeps its dots.
    """
    sign, digits = ("-", token[1:]) if token[0] == "-" else ("", token)
    group, decimal = (".", ",") if language in _COMMA_DECIMAL else (",", ".")
    whole, _, part = digits.partition(decimal)
    if re.fullmatch(rf"\d{{1,3}}(?:\{group}\d{{3}})+", whole):
        whole = whole.replace(group, "")
    return sign + ".".join(filter(None, [whole.replace(",", "."), part.replace(",", ".")]))


def _with_numbers(found: Sequence[str], words: Words) -> list[str]:
    """Number words as numbers; a ten and a unit behind it as one."""
    result: list[str] = []
    at = 0
    while at < len(found):
        token = found[at]
        value = words.numbers.get(token, words.joined_numbers.get(token))
        if value is None or words.language == "zh":
            result.append(token)
        else:
            if value >= 20 and value % 10 == 0:
                skip = 2 if at + 1 < len(found) and found[at + 1] in words.joined else 1
                following = found[at + skip] if at + skip < len(found) else ""
                one = skip == 2 and following in words.articles and following.startswith("un")  # vingt et un, y una
                unit = 1 if one else words.numbers.get(following, 0)
                if 0 < unit < 10:
                    value, at = value + unit, at + skip
            result.append(str(value))
        at += 1
    return result


def _with_units(found: Sequence[str], words: Words) -> list[str]:
    """Words for a sign as the sign."""
    result: list[str] = []
    at = 0
    while at < len(found):
        size = next((n for n in (3, 2, 1) if tuple(found[at : at + n]) in words.units), 0)
        result.append(words.units[tuple(found[at : at + size])] if size else found[at])
        at += size or 1
    return result


@cache
def _all() -> dict[str, Words]:
    table = foreign_toml.parse((resources("qlora.study") / "words.toml").read_text(encoding="utf-8"))
    return {language: _words(language, table[language]) for language in LANGUAGES}


def _words(language: str, table: dict[str, object]) -> Words:
    def listed(name: str) -> list[str]:
        value = table[name]
        return [word.casefold() for word in (value.split() if isinstance(value, str) else value)]  # type: ignore[attr-defined]

    units: dict[str, str] = table["units"]  # type: ignore[assignment]
    parted = {tuple(word) if language == "zh" else tuple(word.split()): sign for word, sign in units.items()}
    return Words(
        language,
        frozenset(listed("articles")),
        frozenset(listed("stop")),
        frozenset(listed("joined")),
        {word.casefold(): value for word, value in table["numbers"].items()},  # type: ignore[attr-defined]
        parted,
        tuple(listed("refusals")),
        re.compile(str(table["self_reference"])),
    )


@cache
def _telling() -> dict[str, frozenset[str]]:
    """By language the stop words that no other language has."""
    spaced = {name: words.stop for name, words in _all().items() if name != "zh"}
    return {
        name: own - frozenset().union(*(other for language, other in spaced.items() if language != name))
        for name, own in spaced.items()
    }
