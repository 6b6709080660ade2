"""Invented names and values of the tiny reading base's world, from endless sets: only copying can give them."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Sequence

from quickstart_relations import words

ONSETS = words("B C D F G H J K L M N P R S T V W Z Br Cl Dr Fr Gr Kr Pl St Tr Sk Vl Ch Sh Th")
VOWELS = words("a e i o u ai ea ou")
CODAS = words("l m n r s t k p x sh nd rt st lk")
ENDS = words("o a is en um el ar ix on et us in or ay")
TOWN_ENDS = words("ham ford ley wick burg ton stead mouth field gate")
PARTS = words(
    "cable hose bolt spring filter brush key manual bag lamp screw belt lid tray sieve plug fuse strap clip ring "
    "wrench nozzle handle hook charger needle pad tube cup sensor"
)
WRONG = words("worn loose wet cold hot broken blocked missing dirty wrong dusty bent torn frozen")
LETTERS = "ABCDEFGHKLMNPRSTVWXZ"

TITLES = ("Mr", "Ms", "Dr")

Taken = Container[str]


def invented(rng: random.Random, ends: Sequence[str], syllables: int) -> str:
    """A name of one or two syllables and an ending: "Trouvix", "Kelmarton"."""
    syllable = [rng.choice(ONSETS), rng.choice(VOWELS), rng.choice(CODAS)]
    for _ in range(syllables - 1):
        syllable += [rng.choice(ONSETS).lower(), rng.choice(VOWELS)]
    return "".join(syllable) + rng.choice(ends)


def new_name(rng: random.Random, taken: Taken, ends: Sequence[str] = ENDS) -> str:
    while True:
        name = invented(rng, ends, 1 if rng.random() < 0.7 else 2)
        if name not in taken:
            return name


def person(rng: random.Random, taken: Taken) -> str:
    return f"{rng.choice(TITLES)} {new_name(rng, taken)}"


def town(rng: random.Random, taken: Taken) -> str:
    return new_name(rng, taken, TOWN_ENDS)


def trouble(rng: random.Random, taken: Taken) -> str:
    return f"a {rng.choice(WRONG)} {rng.choice(PARTS)}"


def counted(unit: str, least: int, most: int) -> Callable[[random.Random, Taken], str]:
    return lambda rng, taken: f"{rng.randint(least, most)} {unit}"


MAKERS: dict[str, Callable[[random.Random, Taken], str]] = {
    "product": new_name,
    "person": person,
    "town": town,
    "error": lambda rng, taken: f"{rng.choice('EFHW')}{rng.randint(10, 999)}",
    "shelf": lambda rng, taken: f"shelf {rng.choice(LETTERS)}{rng.randint(10, 99)}",
    "room": lambda rng, taken: f"room {rng.randint(10, 999)}",
    "number": lambda rng, taken: str(rng.randint(100, 9999)),
    "year": lambda rng, taken: str(rng.randint(1901, 2025)),
    "trouble": trouble,
    "crowns": counted("crowns", 11, 990),
    "months": counted("months", 5, 99),
    "kilograms": counted("kilograms", 2, 399),
    "watts": counted("watts", 12, 990),
    "hours": counted("hours", 2, 99),
    "days": counted("days", 2, 99),
    "weeks": counted("weeks", 2, 60),
    "people": counted("people", 12, 900),
}


def handbook_names() -> tuple[list[str], list[str]]:
    """Names and towns of the handbook, which the pre-training text must not use."""
    rng = random.Random("handbook names")
    names: list[str] = []
    while len(names) < 260:
        names.append(new_name(rng, names))
    towns: list[str] = []
    while len(towns) < 40:
        towns.append(new_name(rng, towns, TOWN_ENDS))
    return names, towns
