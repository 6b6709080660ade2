"""The text that the tiny reading base is pre-trained on, written from a seed.

- *read*: passages of throw-away worlds in view, and questions about them, answered from the passage: copying.
- *picked*: the same with several passages, of which one has the answer.
- *asked*: a passage, one of its sentences and a kind in view; the questions that this sentence answers.
- *known*: questions about the base's own world without any passage, in many wordings: it learns that one fact is
  asked in many ways, which is what fine-tuning builds on.
- *told*: plain passages.
- *repeated*: nonsense that comes twice, from which copying is learnt soonest.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import manuals_frames as frames
from manuals_relations import CLAUSE_FRAMES, FAMILIES, NOUN_FRAMES, STORIES, Family, Relation
from manuals_values import MAKERS, new_name
from quickstart_relations import words

from qlora.data.documents.chunks import Passage
from qlora.study.prompts import KINDS, Wording

SHARES = {"read": 0.5, "picked": 0.07, "asked": 0.24, "known": 0.15, "told": 0.02, "repeated": 0.02}
MOST_TURNS = 14
# Few things of its own, so that each fact is met often enough to be remembered, however one asks.
THINGS = {"product": 24, "error": 10, "person": 16, "site": 12, "plan": 10}
OPENINGS = (
    "Please note: ", "As always, ", "Today ", "By the way, ", "This year ", "In short: ", "For now ", "As a rule, ",
    "Remember: ", "Of course ", "Again, ", "Note that ", "By now ", "In general ", "Important: ", "Usually ",
)  # fmt: skip
ENDINGS = (
    ", as always", " this year", ", says the list", " at present", ", no more and no less", " everywhere",
    " by default",
    ", as agreed", " for now", " today", " as a rule", ", and that is final", " in all shops", " since spring",
)  # fmt: skip
FILLERS = (
    "Read this page before you begin.", "Ask us when in doubt.", "The list is checked once a year.",
    "All figures are for new devices.", "Keep this page.", "Older editions are void.", "Thank you for reading.",
    "More is said on the next page.", "Our team wishes you much success.", "See also the other pages.",
)  # fmt: skip
# Put anywhere into sentences, so that an ordinary word, wherever it stands, is not taken for a name or a value.
ORDINARY = words(
    "a about above after again against all almost along already also always among and another any anyone are "
    "around as at away back be because been before behind being below beside best better between both bought but "
    "buyers by called can charged checks clearly comes common could customers day delivered desk display does "
    "done doors down draws during each early easy either else end enough even ever every everyone exactly fail "
    "far few figure first for found from full gave gets give given gives go goes good had half hands has have her "
    "here high his home hour how if in inside instead into is it its job just keep kept known large last late "
    "leaves lets level like line list little long lower made mains makers makes many may measured might more most "
    "much must named near need never new next no normal not nothing now of off office often old on once one only "
    "open or order other our out over own page part pay pays people per pick place plan plans please put quite "
    "ran reach read really reports rest right room runs safe said same scale seen send several shall she should "
    "shows side since site small so some soon stands still storekeeper such sure switched take takes team "
    "telephone than that the their them then there these they this those through time to together told too under "
    "until up upon us use used user usual very visit want was way we well went were when where whether which "
    "while who whoever whole why will with within without work worker worth would year yes yet you your"
)
ABOUTS = ("handbook", "manuals", "price lists", "papers", "catalogue", "rules", "notes", "service pages")


PLAIN = ("{e}: {h} {v}.", "{H} for {e}: {v}.", "Name: {e} | {H}: {v}", "{e}, {h}: {v}", "{H} ({e}): {v}.")
JOINTS = (" ", " ", "\n", "\n- ")


@dataclass(frozen=True)
class Fact:
    """What one sentence says."""

    entity: str
    relation: Relation
    value: str


@dataclass(frozen=True)
class Written:
    """A passage and, for each of its sentences, the fact that it says (none: a filler)."""

    passage: Passage
    facts: tuple[Fact | None, ...]


def fill(template: str, entity: str, value: str = "") -> str:
    text = template.replace("{e}", entity).replace("{v}", value)
    return text[0].upper() + text[1:]


def make_fact(rng: random.Random, family: Family, entity: str, relation: Relation, taken: frozenset[str]) -> Fact:
    return Fact(entity, relation, MAKERS[relation.value](rng, taken))


def plain_form(rng: random.Random, relation: Relation) -> str:
    """A statement without a verb, as lists and tables have them."""
    head = re.sub(r"^the |^\{e\}'s | (of|for|on) \{e\}$", "", rng.choice(relation.nouns))
    return rng.choice(PLAIN).replace("{h}", head).replace("{H}", head[0].upper() + head[1:])


def loosened(rng: random.Random, form: str) -> str:
    """A statement with ordinary words put between its own, in one or two places."""
    parts = form.split(" ")
    if parts[0][0] != "{":
        parts[0] = parts[0][0].lower() + parts[0][1:]
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.choice((0, rng.randrange(len(parts))))
        parts[place:place] = rng.choices(ORDINARY, k=rng.choice((1, 1, 2, 3, 4)))
    return " ".join(parts)


def sentence(rng: random.Random, fact: Fact) -> str:
    """A statement, sometimes with words before or after it that say nothing."""
    plain = rng.random() < 0.12
    form = plain_form(rng, fact.relation) if plain else rng.choice(fact.relation.statements)
    if not plain and rng.random() < 0.5:
        form = loosened(rng, form)
    said = form.replace("{e}", fact.entity).replace("{v}", fact.value)
    if plain:
        return said
    if rng.random() < 0.2:
        said = rng.choice(OPENINGS) + (said if form[0] == "{" else said[0].lower() + said[1:])
    if rng.random() < 0.2:
        said = said[:-1] + rng.choice(ENDINGS) + "."
    return said[0].upper() + said[1:]


def split_wordings(wordings: tuple[str, ...], wording: Wording | None) -> list[str]:
    """Of the wordings, those of a study's questions or those of its exam: each third one. All of them without."""
    if wording is None or len(wordings) < 2:
        return list(wordings)
    return [text for place, text in enumerate(wordings) if (place % 3 == 1) == (wording == "ask_exam")]


def fact_wordings(rng: random.Random, relation: Relation) -> tuple[str, ...]:
    """Ways to ask for the value: whole questions in half of the cases, else a phrase in a frame."""
    way = rng.random()
    if way < 0.5:
        return relation.asked
    if way < 0.7 and relation.clauses:
        return tuple(frame.replace("{x}", clause) for clause in relation.clauses for frame in CLAUSE_FRAMES)
    return tuple(
        frame.replace("{x}", noun).replace("{X}", noun[0].upper() + noun[1:])
        for noun in relation.nouns
        for frame in NOUN_FRAMES
    )


def case_wordings(relation: Relation) -> tuple[str, ...]:
    """The same, told as a case."""
    return tuple(
        f"{story} {wording if story.endswith(':') else wording[0].upper() + wording[1:]}"
        for story in STORIES
        for wording in relation.case
    )


def question_of(rng: random.Random, fact: Fact, kind: str, wording: Wording | None = None) -> tuple[str, str]:
    """(question, answer) of the kind; a fact that has no such side is asked for plainly."""
    if kind == "backward" and fact.relation.backward:
        return fill(rng.choice(split_wordings(fact.relation.backward, wording)), "", fact.value), fact.entity
    made = case_wordings(fact.relation) if kind == "case" and fact.relation.case else fact_wordings(rng, fact.relation)
    return fill(rng.choice(split_wordings(made, wording)), fact.entity), fact.value


def write_passage(rng: random.Random, taken: frozenset[str], company: str, about: str) -> Written:
    """One thing of a family, seldom two, and what is known of them."""
    family = rng.choice((FAMILIES[0], FAMILIES[0], FAMILIES[0], *FAMILIES[1:]))
    things = rng.choice((1,) * 9 + (2,))
    names: list[str] = []
    facts: list[Fact | None] = []
    for _ in range(things):
        name = MAKERS[family.value](rng, taken)
        if name in names:
            continue
        names.append(name)
        most = max(1, 9 // things)
        for relation in rng.sample(family.relations, min(len(family.relations), rng.randint(1, most))):
            facts.append(make_fact(rng, family, name, relation, taken))
    if rng.random() < 0.5:
        rng.shuffle(facts)
    if rng.random() < 0.4:
        facts.insert(rng.randint(0, len(facts)), None)
    sentences = tuple(rng.choice(FILLERS) if fact is None else sentence(rng, fact) for fact in facts)
    headings: tuple[str, ...] = (f"{company} {rng.choice(ABOUTS)}", rng.choice(family.headings))
    if things == 1 and rng.random() < 0.6:
        headings += (names[0],)
    headings = headings[rng.choice((0, 0, 0, 1)) :]
    text = f"{' › '.join(headings)}\n\n{rng.choice(JOINTS).join(sentences)}"
    return Written(Passage("", headings, sentences, text, about, "en"), tuple(facts))


class Writer:
    """Writes documents; all that a document needs."""

    def __init__(self, seed: int, reserved: frozenset[str]) -> None:
        self.taken = reserved
        self.own = self._own_world(random.Random(f"world {seed}"))

    def _own_world(self, rng: random.Random) -> list[Fact]:
        facts, names = [], set(self.taken)
        for family in FAMILIES:
            for _ in range(THINGS[family.name]):
                name = MAKERS[family.value](rng, frozenset(names))
                if name in names:
                    continue
                names.add(name)
                facts += [make_fact(rng, family, name, relation, self.taken) for relation in family.relations]
        self.taken = frozenset(names)
        return facts

    def company(self, rng: random.Random) -> tuple[str, str]:
        name = new_name(rng, self.taken)
        return name, f"{rng.choice(ABOUTS)} of {name}"

    def passage(self, rng: random.Random) -> Written:
        name, about = self.company(rng)
        return write_passage(rng, self.taken, name, about)

    def read(self, rng: random.Random) -> str:
        written = self.passage(rng)
        if rng.random() < 0.1:
            place = rng.choice([place for place, fact in enumerate(written.facts) if fact])
            said = written.passage.sentences[place]
            return frames.answered_from_sentence(written.passage, said, self._turns(rng, [written.facts[place]])[0])
        return frames.answered([written.passage], self._turns(rng, written.facts))

    def picked(self, rng: random.Random) -> str:
        name, about = self.company(rng)
        several = [write_passage(rng, self.taken, name, about) for _ in range(rng.choice((2, 3, 3)))]
        facts = [fact for written in several for fact in written.facts]
        return frames.answered([written.passage for written in several], self._turns(rng, facts))

    def _turns(self, rng: random.Random, said: Sequence[Fact | None]) -> frames.Turns:
        facts = [fact for fact in said if fact]
        most = rng.randint(2, MOST_TURNS)
        chosen = rng.sample(facts * (1 + (most > 7)), min(len(facts) * (1 + (most > 7)), most))
        return [question_of(rng, fact, rng.choice(("fact", "fact", "backward", "case"))) for fact in chosen]

    def asked(self, rng: random.Random) -> str:
        written = self.passage(rng)
        facts = [(place, fact) for place, fact in enumerate(written.facts) if fact]
        asks: list[tuple[str, str, Wording, str]] = []
        for place, fact in rng.sample(facts, min(len(facts), 5)):
            kind = rng.choice(KINDS)
            wording: Wording = rng.choice(("ask", "ask_exam"))
            question, _ = question_of(rng, fact, kind, wording)
            asks.append((written.passage.sentences[place], kind, wording, question))
        return frames.asked(written.passage, asks)

    def known(self, rng: random.Random) -> str:
        facts = rng.sample(self.own, rng.randint(3, 8))
        return frames.known(
            [question_of(rng, fact, rng.choice(("fact", "fact", "backward", "case"))) for fact in facts]
        )

    def told(self, rng: random.Random) -> str:
        return self.passage(rng).passage.text + "<|endoftext|>"

    def repeated(self, rng: random.Random) -> str:
        said = []
        for _ in range(rng.randint(12, 40)):
            make = MAKERS[rng.choice(list(MAKERS))]
            said.append(make(rng, self.taken))
        return " ".join(said) + "\n" + " ".join(said) + "<|endoftext|>"

    def makers(self) -> dict[str, Callable[[random.Random], str]]:
        """What writes a document of each kind."""
        return {
            "read": self.read,
            "picked": self.picked,
            "asked": self.asked,
            "known": self.known,
            "told": self.told,
            "repeated": self.repeated,
        }

    def documents(self, count: int, seed: int) -> Iterator[str]:
        """The pre-training text, document after document."""
        rng = random.Random(f"documents {seed}")
        makers = self.makers()
        for kind in rng.choices(list(SHARES), list(SHARES.values()), k=count):
            yield makers[kind](rng)
