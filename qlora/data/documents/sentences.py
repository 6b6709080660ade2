"""A paragraph to sentences, in English, German, French, Spanish and Chinese; other languages by the common rules.

A stop ends a sentence unless what stands before it is an abbreviation, an initial or an ordinal (`3. Mai`), or what
follows goes on in small letters. Nothing is lost: the sentences joined by blanks are the paragraph.
"""

from __future__ import annotations

import re

_STOP = re.compile(r"""(?:[.!?…]+["'”’»)\]]*(?=\s)|[。！？]+[”’」』）》〉】"']*|\n)""")
_LAST = re.compile(r"\S+$")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# In small letters and without the stop. Those that end sentences as well ("etc.") are in none.
_ALWAYS = _words("e.g i.e cf vs dr mr mrs ms prof st approx ca resp incl excl max min tel ext dept est inc ltd co corp")
_ABBREVIATIONS = {
    "en": _words("jr sr gen col sgt capt lt rev hon gov sen rep jan feb mar apr jun jul aug sep sept oct nov dec"),
    "de": _words(
        "bzw z.b d.h u.a o.ä s.o s.u u.u i.d.r z.t zzgl inkl exkl ggf evtl vgl sog str hr fr dipl ing mind höchst "
        "geb gest jh jhd jan feb mär apr jun jul aug sep sept okt nov dez allg bspw einschl entspr gem lt nachf stk "
        "std urspr verf zt zb usf i.a i.v m.e m.w v.a u.ä abs betr bes ehem engl franz lfd mio mrd"
    ),
    "fr": _words("m mm mme mmes mlle me mgr av bd env p.ex c.-à-d janv févr avr juil sept oct nov déc hab ste"),
    "es": _words("sr sra srta sres d dña ud uds vd vds p.ej av avda dcha izq aprox ee.uu máx mín ene feb abr ago sept"),
}
# Before a number only: "No. 5", "Nr. 5", "S. 12"; else they are words that end a sentence, or letters.
_BEFORE_NUMBERS = _words(
    "no nr nos fig figs art p pp vol ch sec eq ref s abb tab kap bd ziff pos rn n núm pág págs cap lám chap ann éd ed"
)
_MONTHS = _words(
    "januar februar märz april mai juni juli august september oktober november dezember jänner jahrhundert auflage "
    "stock etage klasse generation quartal halbjahr kapitel abschnitt schritt stufe platz tag woche monat jahr"
)
# Words that begin a German sentence and follow no ordinal: nouns, which do, begin with capitals as well.
_STARTS = _words(
    "der die das ein eine einen einem einer es er sie wir ihr ich man dies diese dieser dieses bei beim wenn dann "
    "danach in im am an auf für mit nach vor von zu zur zum aus als wie so nur auch bitte alle jede jeder jedes kein "
    "keine nicht sollte falls damit dabei dazu hier dort nun jetzt anschließend außerdem zusätzlich daher deshalb"
)


def sentences_of(text: str, language: str) -> list[str]:
    """The sentences of a text in order, without blanks around them. A line break always ends one."""
    found = []
    start = 0
    for stop in _STOP.finditer(text):
        if stop[0] == "\n" or _ends(text, start, stop, language):
            found.append(text[start : stop.end()].strip())
            start = stop.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def _ends(text: str, start: int, stop: re.Match[str], language: str) -> bool:
    """Whether a sentence ends at this sign."""
    if stop[0][0] in "。！？":
        return True
    after = re.match(r"""\s*["'“‘«(\[¿¡„‚»]*""", text[stop.end() :])
    place = stop.end() + (after.end() if after else 0)
    follows = text[place : place + 40]
    if follows[:1].islower():
        return False
    last = _LAST.search(text, start, stop.start())
    if stop[0][0] != "." or stop[0].startswith("..") or last is None:
        return bool(text[start : stop.start()].strip())
    word = last[0].lstrip("\"'“‘«(„‚[¿¡").lower()
    known = _ALWAYS | _ABBREVIATIONS.get(language, frozenset())
    if word in known or re.search(r"(?:^|[-/])[^\W\d_](?:\.[^\W\d_])*$", word):
        return False  # an abbreviation, an initial, or letters with stops between them (U.S., z.B.)
    if follows[:1].isdigit() and word in _BEFORE_NUMBERS:
        return False
    if re.fullmatch(r"\d{1,3}|[ivxlc]{1,6}", word):
        number_of_item = not text[start : last.start()].strip()
        return not (number_of_item or (language == "de" and _is_ordinal(word, follows)))
    return True


def _is_ordinal(number: str, follows: str) -> bool:
    """Whether a German number with a stop is one: `3. Mai`, `2. Auflage`, `Karl V. von`, but not `3. Danach`."""
    following = re.match(r"[^\W\d_]+", follows)
    if following is None:
        return False
    word = following[0].lower()
    return word in _MONTHS or (word not in _STARTS and (not number.isdigit() or int(number) <= 100))
