"""What can be said and asked in the tiny reading base's world: the relations, and the wordings of each. Data only.

`{e}` stands for the thing that is asked about, `{v}` for the answer. Every name is a word of its own, without an
article, and at most five other words stand beside it: what the base asks about new names is then a run of words that
its text does not contain (runs of six words are compared).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One thing that can be known. `value` names the maker of its values in `manuals_values.py`.

    `asked` are whole questions, `nouns` and `clauses` are put into frames; `case` are questions about "it" after a
    small story; `backward` asks for the thing when the value is known (empty: values are no names).
    """

    name: str
    value: str
    statements: tuple[str, ...]
    asked: tuple[str, ...]
    nouns: tuple[str, ...]
    clauses: tuple[str, ...] = ()
    case: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()


NOUN_FRAMES = ("What is {x}?", "What's {x}?", "Tell me {x}?", "Name {x}?", "Know {x}?", "{X}?", "State {x}?")
CLAUSE_FRAMES = ("Tell me {x}?", "Know {x}?", "Who knows {x}?", "Say {x}?")
STORIES = ("Ana asks about {e}:", "A caller names {e}:", "Someone has {e}.", "I own {e}.", "We use {e}.")

PRICE = Relation(
    "price",
    "crowns",
    (
        "{e} costs {v}.",
        "The price of {e} is {v}.",
        "One pays {v} for {e}.",
        "For {e} we charge {v}.",
        "{e} is sold for {v}.",
        "We sell {e} at {v}.",
        "{e} has a price of {v}.",
        "Shops ask {v} for {e}.",
        "{v} is what {e} costs.",
        "The cost of {e} is set at {v}.",
    ),
    ("How much does {e} cost?", "What does {e} cost?", "How much is {e}?", "What do we charge for {e}?"),
    ("the price of {e}", "the cost of {e}", "the charge for {e}"),
    ("how much {e} costs", "what {e} costs"),
    ("how much does it cost?", "what is the price?"),
)
WARRANTY = Relation(
    "warranty",
    "months",
    (
        "{e} has a warranty of {v}.",
        "{e} is guaranteed for {v}.",
        "The warranty of {e} lasts {v}.",
        "The guarantee on {e} ends after {v}.",
        "We guarantee {e} for {v}.",
        "{e} comes with {v} of warranty.",
        "For {v} the warranty covers {e}.",
        "The warranty period of {e} is {v}.",
    ),
    ("How long is {e} guaranteed?", "How long is {e} under warranty?", "What warranty does {e} have?"),
    ("the warranty of {e}", "the guarantee on {e}", "{e}'s warranty period"),
    ("how long {e} is guaranteed",),
    ("how long is the warranty?", "what guarantee is there?"),
)
WEIGHT = Relation(
    "weight",
    "kilograms",
    (
        "{e} weighs {v}.",
        "The weight of {e} is {v}.",
        "On the scales {e} shows {v}.",
        "{e} is {v} heavy.",
        "{e} has a weight of {v}.",
        "With {v} of weight {e} is sent.",
        "The scales say {v} for {e}.",
    ),
    ("How heavy is {e}?", "How much does {e} weigh?", "What does {e} weigh?"),
    ("the weight of {e}", "the mass of {e}"),
    ("how heavy {e} is", "what {e} weighs"),
    ("how heavy is it?", "what does it weigh?"),
)
POWER = Relation(
    "power",
    "watts",
    (
        "{e} draws {v}.",
        "The power of {e} is {v}.",
        "{e} needs {v} of power.",
        "{e} runs on {v}.",
        "A power of {v} is drawn by {e}.",
        "At full power {e} takes {v}.",
        "The power draw of {e} is {v}.",
    ),
    ("How much power does {e} need?", "How many watts does {e} draw?", "What power has {e}?"),
    ("the power of {e}", "{e}'s power draw"),
    ("how much power {e} needs",),
    ("how much power is needed?", "how many watts?"),
)
BATTERY = Relation(
    "battery",
    "hours",
    (
        "The battery of {e} lasts {v}.",
        "{e} has a battery for {v}.",
        "After {v} the battery of {e} is empty.",
        "{e} works {v} on its battery.",
        "One battery keeps {e} going for {v}.",
        "The battery life of {e} is {v}.",
    ),
    ("How long lasts {e} on battery?", "What battery life has {e}?", "When is the battery of {e} empty?"),
    ("{e}'s battery life",),
    ("how long {e} works on battery",),
    ("how long lasts the battery?", "what is the battery life?"),
)
DELIVERY = Relation(
    "delivery",
    "days",
    (
        "{e} is delivered within {v}.",
        "The delivery of {e} takes {v}.",
        "We deliver {e} in {v}.",
        "Delivery time for {e} is {v}.",
        "{e} reaches the buyer after {v} of delivery.",
        "Wait {v} for the delivery of {e}.",
    ),
    ("How fast is {e} delivered?", "How long takes delivery of {e}?", "When is {e} delivered?"),
    ("{e}'s delivery time", "the delivery of {e}"),
    ("how fast {e} is delivered",),
    ("how long does delivery take?", "what is the delivery time?"),
)
DESIGNER = Relation(
    "designer",
    "person",
    (
        "{e} was designed by {v}.",
        "{v} invented {e}.",
        "The designer of {e} is {v}.",
        "{v} drew the plans of {e}.",
        "{e} is a design of {v}.",
        "We owe {e} to the designer {v}.",
        "It was {v} who designed {e}.",
        "{v} had the idea for {e}.",
    ),
    ("Who designed {e}?", "Who invented {e}?", "Who drew the plans of {e}?", "Whose design is {e}?"),
    ("the designer of {e}", "the inventor of {e}"),
    ("who designed {e}", "who invented {e}"),
    ("who designed it?", "who had the idea?"),
    ("What did {v} design?", "Which product did {v} invent?", "What was designed by {v}?", "Which product is by {v}?"),
)
SHELF = Relation(
    "shelf",
    "shelf",
    (
        "{e} stands on {v}.",
        "The place of {e} is {v}.",
        "{v} holds {e}.",
        "In the store {e} is on {v}.",
        "{e} is kept on {v}.",
        "Look for {e} on {v}.",
        "We keep {e} on {v}.",
    ),
    ("Where is {e} kept?", "On which shelf is {e}?", "Which shelf holds {e}?", "Where do I find {e}?"),
    ("the shelf of {e}", "the place of {e}"),
    ("where {e} is kept", "which shelf holds {e}"),
    ("where is it kept?", "which shelf holds it?"),
    ("What is on {v}?", "What is kept on {v}?", "Which product is on {v}?", "What stands on {v}?"),
)
ROOM = Relation(
    "room",
    "room",
    (
        "{e} sits in {v}.",
        "The office of {e} is {v}.",
        "You meet {e} in {v}.",
        "{e} works in {v}.",
        "In {v} you find {e}.",
        "{v} is the office of {e}.",
    ),
    ("Where does {e} work?", "Where is the office of {e}?", "Which room has {e}?", "Where do I meet {e}?"),
    ("the office of {e}", "the room of {e}"),
    ("where {e} works", "where {e} sits"),
    ("where is the office?", "which room is it?"),
    ("Who works in {v}?", "Who sits in {v}?", "Whose office is {v}?", "Whom do I meet in {v}?"),
)
CAUSE = Relation(
    "cause",
    "trouble",
    (
        "{e} means {v}.",
        "The cause of {e} is {v}.",
        "{e} is caused by {v}.",
        "{e} stands for {v}.",
        "Behind {e} is {v}.",
        "{v} is the reason for {e}.",
        "{v} leads to {e}.",
    ),
    ("What does {e} mean?", "What causes {e}?", "What is behind {e}?", "Why does {e} show?"),
    ("the cause of {e}", "the meaning of {e}", "the reason for {e}"),
    ("what {e} means", "what causes {e}"),
    ("what does it mean?", "what is the cause?"),
)
PHONE = Relation(
    "phone",
    "number",
    (
        "{e} has the extension {v}.",
        "The extension of {e} is {v}.",
        "Call {e} at {v}.",
        "Dial {v} for {e}.",
        "{e} answers at extension {v}.",
        "By phone {e} is at {v}.",
        "The phone of {e} is {v}.",
    ),
    ("How do I call {e}?", "Which extension has {e}?", "What do I dial for {e}?", "At what number is {e}?"),
    ("the extension of {e}", "the phone of {e}", "the number of {e}"),
    ("how to call {e}", "which extension {e} has"),
    ("what is the extension?", "which number do I dial?"),
)
OPENED = Relation(
    "opened",
    "year",
    (
        "{e} was opened in {v}.",
        "{e} opened in {v}.",
        "The opening year of {e} is {v}.",
        "Since {v} we have {e}.",
        "In {v} we opened {e}.",
        "{e} has been open since {v}.",
    ),
    ("When was {e} opened?", "When did {e} open?", "Since when is {e} open?", "In what year opened {e}?"),
    ("{e}'s opening year", "the opening of {e}"),
    ("when {e} was opened", "since when {e} is open"),
    ("when was it opened?", "what is the opening year?"),
)
HEAD = Relation(
    "head",
    "person",
    (
        "{e} is led by {v}.",
        "The head of {e} is {v}.",
        "{v} leads {e}.",
        "{v} is in charge of {e}.",
        "At the head of {e} is {v}.",
        "{v} runs {e}.",
    ),
    ("Who leads {e}?", "Who runs {e}?", "Who is in charge of {e}?", "Who is head of {e}?"),
    ("the head of {e}", "the leader of {e}"),
    ("who leads {e}", "who runs {e}"),
    ("who is in charge?", "who leads it?"),
    ("What does {v} lead?", "What is led by {v}?", "Which site does {v} run?", "What does {v} run?"),
)
STAFF = Relation(
    "staff",
    "people",
    (
        "{e} has {v}.",
        "{v} work at {e}.",
        "At {e} there are {v}.",
        "The staff of {e} is {v}.",
        "We employ {v} at {e}.",
        "{e} counts {v}.",
    ),
    ("How many work at {e}?", "How many people has {e}?", "How large is {e}?", "How many are at {e}?"),
    ("the staff of {e}", "the size of {e}"),
    ("how many {e} employs",),
    ("how many people work there?", "how large is the staff?"),
)
FEE = Relation(
    "fee",
    "crowns",
    (
        "{e} costs {v} a month.",
        "The fee for {e} is {v}.",
        "The monthly fee of {e} is {v}.",
        "Each month {e} costs {v}.",
        "{e} has a fee of {v}.",
        "For {e} we bill {v} monthly.",
    ),
    ("What fee has {e}?", "How much a month is {e}?", "What do we bill for {e}?"),
    ("the fee for {e}", "the fee of {e}", "{e}'s monthly fee"),
    ("what fee {e} has",),
    ("what is the fee?", "how much a month?"),
)
NOTICE = Relation(
    "notice",
    "weeks",
    (
        "{e} can be ended with {v} of notice.",
        "The notice for {e} is {v}.",
        "To end {e}, give {v} of notice.",
        "{e} has a notice of {v}.",
        "End {e} with a notice of {v}.",
        "The notice period of {e} is {v}.",
    ),
    ("What notice has {e}?", "How is {e} ended?", "How long is notice for {e}?"),
    ("the notice for {e}", "{e}'s notice period"),
    ("what notice {e} has",),
    ("what is the notice?", "how long is the notice?"),
)
CONTACT = Relation(
    "contact",
    "person",
    (
        "For {e} ask {v}.",
        "Questions on {e} go to {v}.",
        "{v} answers questions about {e}.",
        "The contact for {e} is {v}.",
        "{v} looks after {e}.",
        "{e} is looked after by {v}.",
    ),
    ("Who looks after {e}?", "Whom do I ask about {e}?", "Who answers questions on {e}?"),
    ("the contact for {e}",),
    ("who looks after {e}", "who explains {e}"),
    ("who is the contact?", "whom do I ask?"),
    ("What does {v} look after?", "For what is {v} the contact?", "What is looked after by {v}?"),
)


@dataclass(frozen=True)
class Family:
    """A kind of thing: how its names are made, what a heading over it says, and what is known of it."""

    name: str
    value: str
    headings: tuple[str, ...]
    relations: tuple[Relation, ...]


FAMILIES = (
    Family(
        "product",
        "product",
        ("Products", "Pumps", "Lamps", "Heaters", "Devices", "Tools", "Catalogue", "Machines", "Meters", "Valves"),
        (PRICE, WARRANTY, WEIGHT, POWER, BATTERY, DELIVERY, DESIGNER, SHELF),
    ),
    Family("error", "error", ("Errors", "Messages", "Trouble", "Codes", "Faults"), (CAUSE,)),
    Family("person", "person", ("People", "Staff", "Team", "Phone book"), (ROOM, PHONE)),
    Family("site", "town", ("Sites", "Plants", "Places", "Offices"), (OPENED, HEAD, STAFF)),
    Family("plan", "product", ("Plans", "Contracts", "Services", "Service plans"), (FEE, NOTICE, CONTACT)),
)
