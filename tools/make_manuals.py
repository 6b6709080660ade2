"""Writes the handbook of an invented company: five documents about products, sites and plans.

    python tools/make_manuals.py --out recipes/manuals/documents

Forty sections, each about one thing; each sentence says one fact. No name of it stands in the tiny reading base's
pre-training text, and its sentences have forms of their own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manuals_relations import FAMILIES, Family, Relation
from manuals_values import MAKERS, TITLES, handbook_names
from quickstart_relations import words
from write_documents import WRITERS

from qlora.data.documents.markdown import markdown_blocks

SEED = 11
COMPANY = "Tarvell"
# Shelves that no question of the base's text names: "What is kept on shelf B15?" is six words.
SHELVES = words(
    "A12 A47 B15 B63 C18 C72 D31 D94 E25 E87 F33 F85 G21 G67 H26 H75 K34 K87 L27 L73 M31 M86 N24 N68 P42 P91 R36 R78 "
    "S27 S73 T36 T81 V28 V74 W33 W83 X26 X75 Z37 Z81"
)
# {e} the thing, {v} the value, as in manuals_relations.py; none of these forms stands there.
FORMS = {
    "price": ("Anyone who buys {e} pays {v} for it.", "Our list shows {e} at a price of {v}."),
    "warranty": ("Should {e} fail within {v}, the warranty pays.", "Our warranty on {e} runs for {v}."),
    "weight": ("Put on a scale, {e} comes to {v}.", "Its makers give the weight of {e} as {v}."),
    "power": ("Switched on, {e} takes {v} from the mains.", "Plan {v} of power for {e}."),
    "battery": ("A charged battery lets {e} work for {v}.", "The battery inside {e} is good for {v}."),
    "delivery": ("Delivery of {e} is done in {v}.", "Buyers get {e} delivered after {v}."),
    "designer": ("The plans for {e} were drawn by {v}.", "{v} is the inventor behind {e}."),
    "shelf": ("Pick {e} from {v}.", "Our storekeeper has {e} on {v}."),
    "contact": ("Please send questions about {e} to {v}.", "{v} is the contact person for {e}."),
    "opened": ("The {e} site opened its doors in {v}.", "It was in {v} that {e} was opened."),
    "head": ("Everyone at {e} reports to {v}, who leads it.", "The person in charge at {e} is {v}."),
    "staff": ("The {e} site gives work to {v}.", "In all, {v} have a job at {e}."),
    "fee": ("Customers on {e} pay a fee of {v}.", "We collect a monthly fee of {v} for {e}."),
    "notice": ("Whoever leaves {e} gives notice, {v} before.", "A notice of {v} ends {e}."),
}
# Document, format, title, family, sections: each is about one thing.
DOCUMENTS = (
    ("pumps", "md", "Pumps", "product", 8),
    ("lamps", "docx", "Lamps", "product", 8),
    ("heaters", "html", "Heaters", "product", 8),
    ("valves", "md", "Valves", "product", 6),
    ("sites-and-plans", "pdf", "Sites", "site", 5),
    ("sites-and-plans", "pdf", "Service plans", "plan", 5),
)


@dataclass(frozen=True)
class Said:
    """One fact, and the sentence that says it."""

    entity: str
    relation: Relation
    value: str
    sentence: str


class _Names:
    """Hands out the reserved names, each once."""

    def __init__(self) -> None:
        names, towns = handbook_names()
        self._names, self._towns = iter(names), iter(towns)
        self.given: set[tuple[str, str]] = set()

    def of(self, maker: str, rng: random.Random) -> str:
        """A name, a person, a town, or a value that no other fact of this kind has."""
        if maker == "product":
            return next(self._names)
        if maker == "person":
            return f"{rng.choice(TITLES)} {next(self._names)}"
        if maker == "town":
            return next(self._towns)
        while True:
            value = f"shelf {rng.choice(SHELVES)}" if maker == "shelf" else MAKERS[maker](rng, ())
            if (maker, value) not in self.given:
                self.given.add((maker, value))
                return value


def handbook() -> Iterator[tuple[str, str, str, list[tuple[str, list[Said]]]]]:
    """(document, format, title, sections) in order; a section is its heading and what it says."""
    rng = random.Random(f"handbook {SEED}")
    names = _Names()
    families = {family.name: family for family in FAMILIES}
    for document, format_, title, family, sections in DOCUMENTS:
        made = [_section(rng, names, families[family]) for _ in range(sections)]
        yield document, format_, title, made


def _section(rng: random.Random, names: _Names, family: Family) -> tuple[str, list[Said]]:
    """One thing, and all that is known of it, in any order."""
    entity = names.of(family.value, rng)
    said = []
    for relation in rng.sample(family.relations, len(family.relations)):
        value = names.of(relation.value, rng)
        sentence = rng.choice(FORMS[relation.name]).replace("{e}", entity).replace("{v}", value)
        said.append(Said(entity, relation, value, sentence[0].upper() + sentence[1:]))
    return entity, said


def sources() -> dict[str, tuple[str, str]]:
    """For each document its format and its text as Markdown."""
    texts: dict[str, tuple[str, list[str]]] = {}
    for document, format_, title, sections in handbook():
        _, lines = texts.setdefault(document, (format_, []))
        lines.append(f"# {COMPANY} {title.lower()}")
        for heading, said in sections:
            lines += [f"## {heading}", " ".join(fact.sentence for fact in said)]
    return {name: (format_, "\n\n".join(lines) + "\n") for name, (format_, lines) in texts.items()}


def write(out: Path) -> None:
    """The five documents, as files of `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (format_, text) in sources().items():
        blocks = markdown_blocks(text)
        (out / f"{name}.{format_}").write_bytes(WRITERS[format_](blocks, blocks[0].text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("recipes/manuals/documents")
    parser.add_argument("--out", type=Path, default=default, help="folder for the five documents")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
