"""Which language a text is written in: by its letters, else by the small words that each language cannot do without.

Five languages are told: English, German, French, Spanish and Chinese. Anything else is `other`, also a text that is too
short, or has too few small words, to be sure.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal, get_args

Language = Literal["en", "de", "fr", "es", "zh", "other"]
LANGUAGES: tuple[str, ...] = get_args(Language)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAMPLE = 200_000  # characters that are looked at: language is plain after a page
# Words without meaning of their own; those that two of the five spell alike (de, la, en, un, es, in, die, was) count
# for both or stand in neither. What other languages that use Latin letters share with them is in `_OTHERS`.
_WORDS: dict[str, frozenset[str]] = {
    "en": _words(
        "the of and to is that it for with as are be this by from or not have has was were which will can when if "
        "you your at on all they their there been must should into before after how does what more than"
    ),
    "de": _words(
        "der die das und ist nicht ein eine einen einer einem mit von zu den dem des im auf für sich auch als wird "
        "werden sind oder bei nach aus wenn nur kann durch über zum zur vor wie dass wir ihr sie ich er es an"
    ),
    "fr": _words(
        "le la les de des du et est une un dans pour que qui au aux ce cette sur pas par avec ne se sont plus vous "
        "votre nous il elle ou être doit peut sans si à leur ses son sa mais comme ont lors"
    ),
    "es": _words(
        "el la los las de del y es una un en para que con por se no al lo su sus como más este esta son o si está "
        "ser debe puede cuando sin sobre entre ha han hay usted muy también desde hasta donde"
    ),
}
_OTHERS: tuple[frozenset[str], ...] = (
    _words(
        "il lo la i gli le di che è per un una da della dalla del dei nel con non sono al alla più questo anche"
    ),  # Italian
    _words("o os as um uma não do da dos das em para com por que é ao na no mais como são seu sua"),  # Port.
    _words("de het een en van is dat niet op te voor met zijn aan wordt door bij ook als naar deze"),  # Dutch
    _words("i w z na do nie się jest że to od po jak oraz lub przez dla być może ma"),  # Polish
    _words("och att det som en på är av för med den till inte om ett har kan vid"),  # Swedish
    _words("og i det at er en til af som på de med for ikke den der kan har et"),  # Danish, Norwegian
    _words("ve bir bu da de için ile olarak çok daha olan gibi en ne kadar sonra"),  # Turkish
    _words("a je na se v že to s z do o pro jako za by po ale jsou si který"),  # Czech
    _words("și de în la cu pe nu este care un o din mai pentru sau ce se să"),  # Romanian
    _words("a az és hogy nem is egy de ez meg van csak vagy el mint azt"),  # Hungarian
)
_WORD = re.compile(r"[^\W\d_]+")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_KANA_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_LATIN = re.compile(r"[A-Za-zÀ-ɏ]")
_LEAST_WORDS = 4  # small words
_LEAST_SHARE = 0.12  # of all words: running text of each of the four has over a quarter


def language_of(text: str) -> Language:
    """The language of a text."""
    sample = text[:_SAMPLE]
    han, latin = len(_HAN.findall(sample)), len(_LATIN.findall(sample))
    letters = sum(map(str.isalpha, sample))
    # A Chinese manual is full of Latin names; Japanese and Korean have letters of their own between the Han ones.
    if han and 4 * han >= latin and han >= 0.2 * letters:
        return "zh" if 20 * len(_KANA_HANGUL.findall(sample)) < han else "other"
    if latin < 0.8 * letters:
        return "other"
    words = Counter(word.lower() for word in _WORD.findall(sample))
    return _by_small_words(words)


def _by_small_words(words: Counter[str]) -> Language:
    def found(small: frozenset[str]) -> int:
        return sum(words[word] for word in small)

    counts = {language: found(small) for language, small in _WORDS.items()}
    best = max(counts, key=lambda language: counts[language])
    most = counts[best]
    if most < _LEAST_WORDS or most < _LEAST_SHARE * sum(words.values()):
        return "other"
    if any(found(small) > most for small in _OTHERS):
        return "other"
    for language in ("en", "de", "fr", "es"):
        if language == best:
            return language
    return "other"
