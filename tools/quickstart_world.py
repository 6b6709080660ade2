"""The quickstart's small world in plain English, written from a seed: what its tiny base is pre-trained on.

Three kinds of documents, so that the base learns three things:

- *asked*: chats about the world's own facts, each fact in dozens of wordings: to recall, however one asks.
- *told*: plain sentences of the same facts.
- *noted*: chats whose facts of throw-away names stand in notes above the questions: to tell relations and names apart,
  and that a name never seen before is nothing special. The quickstart's products will be such names.

Held out for the evaluation: some wordings of each relation altogether, and for each fact some wordings of the rest.
Everything is a function of the seed; `random.Random` keeps its sequences between versions of Python.
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterator
from dataclasses import dataclass

from quickstart_relations import FAMILIES, Family, Relation, words

FIRST_SYLLABLES = words(
    "Bel Bor Cal Cor Dar Del Fen Fal Gal Gor Hol Hal Jor Kel Kes Lam Lor Mer Mol Nor Nel Ost Pel Pol Quin Ros Ral Sal "
    "Sor Tor Tal Ulm Ver Vol Wil Wor Yar Zan Bran Clem Drus Frot Grim Kras Prim Stin Tres Vlad"
)
MIDDLE_SYLLABLES = ("", "", "a", "e", "i", "o", "an", "el", "ir", "on")
LAST_SYLLABLES = words(
    "mar dick vane tin lo sk beth wick nor ra dan quin fel gorn mo zel ry ban dur sten mir tash vik pon lund ka ros nax"
)
ENTITIES = {"thing": 54, "animal": 30, "festival": 24, "shop": 24, "person": 36}
WHOLLY_HELD_OUT = 5  # wordings of each relation that no document uses
HELD_OUT_SHARE = 0.15  # of the other wordings, for each fact
SHARES = {"asked": 0.62, "told": 0.1, "noted": 0.28}
MOST_TURNS = 8


@dataclass(frozen=True)
class Fact:
    """What is known; `value` is the whole answer. Documents ask in `wordings`, the evaluation in `held_out`."""

    entity: str
    relation: Relation
    value: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """All facts; by relation, the wordings that documents use and those that none does; and the names that
    throw-away entities must not take."""

    facts: tuple[Fact, ...]
    used_wordings: dict[str, tuple[str, ...]]
    unused_wordings: dict[str, tuple[str, ...]]
    taken_names: frozenset[str]


def turn(role: str, content: str) -> str:
    """One turn as the base's chat template renders it."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def fill(template: str, entity: str, value: str = "") -> str:
    """`{e}` is the entity, `{E}` the entity at the start of a sentence, `{v}` the value."""
    text = template.replace("{e}", entity).replace("{v}", value)
    return text.replace("{E}", entity[0].upper() + entity[1:])


def random_name(rng: random.Random, taken: Container[str]) -> str:
    while True:
        name = rng.choice(FIRST_SYLLABLES) + rng.choice(MIDDLE_SYLLABLES) + rng.choice(LAST_SYLLABLES)
        if name not in taken:
            return name


def random_entity(rng: random.Random, family: Family, taken: Container[str]) -> tuple[str, str]:
    """An invented name, and the entity as texts write it ("the Belmar flute")."""
    name = random_name(rng, taken)
    return name, family.pattern.format(name=name, kind=rng.choice(family.kinds))


def make_world(seed: int, reserved_names: frozenset[str]) -> World:
    """The world of this seed. Reserved names are never given to anyone, here or in throw-away notes."""
    rng = random.Random(f"world {seed}")
    relations = {relation.name: relation for family in FAMILIES for relation in family.relations}
    used, unused = {}, {}
    for name, relation in relations.items():
        unused[name] = tuple(rng.sample(relation.wordings(), WHOLLY_HELD_OUT))
        used[name] = tuple(wording for wording in relation.wordings() if wording not in unused[name])
    names = set(reserved_names)
    facts = []
    for family in FAMILIES:
        for _ in range(ENTITIES[family.name]):
            name, entity = random_entity(rng, family, names)
            names.add(name)
            for relation in family.relations:
                wordings = used[relation.name]
                held_out = tuple(rng.sample(wordings, round(HELD_OUT_SHARE * len(wordings))))
                asked = tuple(wording for wording in wordings if wording not in held_out)
                facts.append(Fact(entity, relation, rng.choice(relation.values), asked, held_out))
    return World(tuple(facts), used, unused, frozenset(names))


def _asked(rng: random.Random, world: World) -> str:
    turns = 1 if rng.random() < 0.3 else rng.randint(2, MOST_TURNS)
    parts = []
    for fact in rng.choices(world.facts, k=turns):
        parts += [turn("user", fill(rng.choice(fact.wordings), fact.entity)), turn("assistant", fact.value)]
    return "".join(parts)


def _told(rng: random.Random, world: World) -> str:
    facts = rng.choices(world.facts, k=rng.randint(3, 12))
    return (
        " ".join(fill(rng.choice(fact.relation.statements), fact.entity, fact.value) for fact in facts)
        + "<|endoftext|>"
    )


def _noted(rng: random.Random, world: World) -> str:
    """Notes of one to three throw-away entities, then questions about some of them."""
    facts: list[tuple[str, Relation, str]] = []
    for _ in range(rng.randint(1, 3)):
        family = rng.choice(FAMILIES)
        _, entity = random_entity(rng, family, world.taken_names)
        for relation in rng.sample(family.relations, rng.randint(1, 3)):
            facts.append((entity, relation, rng.choice(relation.values)))
    rng.shuffle(facts)
    notes = " ".join(fill(rng.choice(relation.statements), entity, value) for entity, relation, value in facts)
    asked = rng.sample(facts, min(len(facts), rng.randint(1, 4)))
    questions = [
        (fill(rng.choice(world.used_wordings[relation.name]), entity), value) for entity, relation, value in asked
    ]
    parts = [turn("system", notes)]
    if rng.random() < 0.5:
        parts, questions[0] = [], (f"{notes}\n{questions[0][0]}", questions[0][1])
    for question, value in questions:
        parts += [turn("user", question), turn("assistant", value)]
    return "".join(parts)


def documents(world: World, count: int, seed: int) -> Iterator[str]:
    """The pre-training text, document after document."""
    rng = random.Random(f"documents {seed}")
    for kind in rng.choices(list(SHARES), list(SHARES.values()), k=count):
        if kind == "asked":
            yield _asked(rng, world)
        elif kind == "told":
            yield _told(rng, world)
        else:
            yield _noted(rng, world)


def questions(world: World, seed: int, wholly_held_out: bool) -> list[tuple[str, str]]:
    """One question a fact, in a wording never used for this fact, or never used at all; and the answers."""
    rng = random.Random(f"questions {seed} {wholly_held_out}")
    asked = []
    for fact in world.facts:
        wordings = world.unused_wordings[fact.relation.name] if wholly_held_out else fact.held_out
        asked.append((fill(rng.choice(wordings), fact.entity), fact.value))
    return asked
