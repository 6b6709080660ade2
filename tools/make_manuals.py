"""Writes the handbook of an invented company: five documents about pumps, lamps, errors, people, sites and plans.

    python tools/make_manuals.py --out recipes/manuals

Forty sections of about six sentences; each sentence says one fact. No name of it stands in the tiny reading base's
pre-training text, and its sentences have forms of their own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manuals_relations import FAMILIES, Family, Relation
from manuals_values import MAKERS, handbook_names
from write_documents import WRITERS

from qlora.data.documents.markdown import markdown_blocks

SEED = 11
COMPANY = "Tarvell"
# {e} the thing, {v} the value, as in manuals_relations.py; none of these forms stands there.
FORMS = {
    "price": ("Anyone who buys {e} pays {v} for it.", "Our list shows {e} at a price of {v}."),
    "warranty": ("Should {e} fail within {v}, the warranty pays.", "Our warranty on {e} runs for {v}."),
    "weight": ("Put on a scale, {e} comes to {v}.", "Its makers give the weight of {e} as {v}."),
    "power": ("Switched on, {e} takes {v} from the mains.", "Plan {v} of power for {e}."),
    "battery": ("A charged battery lets {e} work for {v}.", "The battery inside {e} is good for {v}."),
    "delivery": ("Delivery of {e} is done in {v}.", "Buyers get {e} delivered after {v}."),
    "maker": ("All {e} units leave our plant at {v}.", "Workers in {v} build {e}."),
    "designer": ("The plans for {e} were drawn by {v}.", "{v} is the inventor behind {e}."),
    "colour": ("You will know {e} by its {v} colour.", "Every {e} leaves us painted {v}."),
    "material": ("The housing of every {e} consists of {v}.", "We chose {v} as material for {e}."),
    "shelf": ("Pick {e} from shelf {v}.", "Our storekeeper keeps {e} on shelf {v}."),
    "order": ("Write {v} on the form to order {e}.", "Our order desk lists {e} as number {v}."),
    "parts": ("Unpack {e} and you will find {v}.", "Packed together with {e} are {v}."),
    "reset": ("A reset of {e} is done so: {v}.", "If {e} hangs, reset it: {v}."),
    "cleaning": ("Take {v} whenever you clean {e}.", "Only {v} is right for cleaning {e}."),
    "contact": ("Please send questions about {e} to {v}.", "{v} is the contact person for {e}."),
    "cause": ("The display shows {e} because of {v}.", "Whenever {e} appears, the cause is {v}."),
    "remedy": ("Should the display show {e}, please {v}.", "Our technicians clear {e} like this: {v}."),
    "job": ("{e} joined us as {v}.", "On our payroll {e} is listed as {v}."),
    "office": ("The desk of {e} stands in {v}.", "Visit {e} at our office in {v}."),
    "phone": ("Reach {e} by dialling {v}.", "Our telephone list gives {v} for {e}."),
    "opened": ("The {e} site opened its doors in {v}.", "It was in {v} that {e} was opened."),
    "head": ("Everyone at {e} reports to {v}, who leads it.", "The person in charge at {e} is {v}."),
    "staff": ("The {e} site gives work to {v}.", "In all, {v} have a job at {e}."),
    "fee": ("Customers on {e} pay a fee of {v}.", "We collect a monthly fee of {v} for {e}."),
    "notice": ("Whoever leaves {e} gives notice, {v} before.", "A notice of {v} ends {e}."),
}
# Document, format, title, family, sections, things of a section.
DOCUMENTS = (
    ("pumps", "md", "Pumps", "product", 10, 1),
    ("lamps", "docx", "Lamps", "product", 10, 1),
    ("service", "html", "Error codes", "error", 8, 3),
    ("people", "md", "People", "person", 6, 2),
    ("sites-and-plans", "pdf", "Sites", "site", 3, 2),
    ("sites-and-plans", "pdf", "Service plans", "plan", 3, 2),
)
FACTS_OF_A_PRODUCT = 6


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
            return f"{next(self._names)} {next(self._names)}"
        if maker == "town":
            return next(self._towns)
        while True:
            value = f"G{rng.randint(10, 999)}" if maker == "error" else MAKERS[maker](rng, ())
            if (maker, value) not in self.given:
                self.given.add((maker, value))
                return value


def handbook() -> Iterator[tuple[str, str, str, list[tuple[str, list[Said]]]]]:
    """(document, format, title, sections) in order; a section is its heading and what it says."""
    rng = random.Random(f"handbook {SEED}")
    names = _Names()
    families = {family.name: family for family in FAMILIES}
    for document, format_, title, family, sections, things in DOCUMENTS:
        made = [_section(rng, names, families[family], number, things) for number in range(1, sections + 1)]
        yield document, format_, title, made


def _section(rng: random.Random, names: _Names, family: Family, number: int, things: int) -> tuple[str, list[Said]]:
    entities = [names.of(family.value, rng) for _ in range(things)]
    said = []
    for entity in entities:
        relations = family.relations
        if len(relations) > FACTS_OF_A_PRODUCT:
            relations = tuple(rng.sample(relations, FACTS_OF_A_PRODUCT))
        for relation in relations:
            value = names.of(relation.value, rng)
            sentence = rng.choice(FORMS[relation.name]).replace("{e}", entity).replace("{v}", value)
            said.append(Said(entity, relation, value, sentence[0].upper() + sentence[1:]))
    return entities[0] if things == 1 else f"Part {number}", said


def sources() -> dict[str, tuple[str, str]]:
    """For each document its format and its text as Markdown."""
    texts: dict[str, tuple[str, list[str]]] = {}
    for document, format_, title, sections in handbook():
        _, lines = texts.setdefault(document, (format_, []))
        lines.append(f"# {COMPANY} {title.lower()}")
        for heading, said in sections:
            lines += [f"## {heading}", " ".join(fact.sentence for fact in said)]
    return {name: (format_, "\n\n".join(lines) + "\n") for name, (format_, lines) in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/manuals"), help="folder for the five documents")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, (format_, text) in sources().items():
        (out / f"{name}.{format_}").write_bytes(WRITERS[format_](markdown_blocks(text), text.splitlines()[0].lstrip("# ")))


if __name__ == "__main__":
    main()
