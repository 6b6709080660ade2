"""What can be asked in the quickstart's small world: the relations, and the many wordings of each.

Data only. A relation ("price") is asked in three shapes: whole questions, noun phrases ("the price of …") and clauses
("how much … costs"); a frame around the last two ("Can you look up …?") multiplies them. So every relation has some
fifty wordings although a person wrote ten. `{e}` stands for the thing asked about, `{v}` for the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

NOUN_FRAMES = (
    "What is {x}?",
    "What's {x}?",
    "Tell me {x}.",
    "Please give me {x}.",
    "I need {x}.",
    "Can you look up {x}?",
    "Do you know {x}?",
    "I am looking for {x}.",
    "Could you check {x} for me?",
    "Remind me of {x}, please.",
)
CLAUSE_FRAMES = (
    "Tell me {x}.",
    "Do you know {x}?",
    "Can you say {x}?",
    "I would like to know {x}.",
    "Please let me know {x}.",
    "A friend asks {x}.",
    "Could you find out {x}?",
)


@dataclass(frozen=True)
class Relation:
    """One thing that can be known of an entity. `values` are all its possible answers."""

    name: str
    values: tuple[str, ...]
    direct: tuple[str, ...]
    nouns: tuple[str, ...]
    clauses: tuple[str, ...]
    statements: tuple[str, ...]

    def wordings(self) -> tuple[str, ...]:
        """Every question about this relation, with `{e}` for the entity; the order never changes."""
        nouns = [frame.replace("{x}", noun) for noun in self.nouns for frame in NOUN_FRAMES]
        clauses = [frame.replace("{x}", clause) for clause in self.clauses for frame in CLAUSE_FRAMES]
        return (*self.direct, *nouns, *clauses)


def words(text: str) -> tuple[str, ...]:
    """A tuple of the text's words."""
    return tuple(text.split())


def _counted(numbers: range, unit: str) -> tuple[str, ...]:
    return tuple(f"{number} {unit}" for number in numbers)


PEOPLE = words(
    "Ada Bruno Carla Dmitri Elsa Farid Greta Hugo Ines Jonas Karin Leo Mina Nadia Oskar Paula Rafael Sofia Tomas "
    "Ursula Viktor Wanda Yusuf Zoe Amir Bella Cyril Dora Emil Flora Gustav Hanna Ivan Julia Klaus Lena Marco Nina "
    "Otto Petra"
)
TOWNS = words(
    "Ashford Birchley Coldwell Dunmore Eastbrook Foxhill Greenham Hazelby Ironbridge Juniper Kingsley Larkfield "
    "Millbrook Northgate Oakham Pinewood Quarryton Redcliff Silverton Thornbury Underhill Valewood Westport "
    "Yarrow Alderton Brackley Cloverdale Deepwater Elmstead Fairhaven Goldcrest Highmoor Inverley Kelby "
    "Longmeadow Marshfield Newhaven Overton Penrose Stonebridge"
)
COLOURS = words(
    "red blue green yellow orange purple white black grey brown pink silver gold crimson scarlet turquoise violet "
    "ivory beige olive maroon navy teal coral amber indigo lavender bronze copper cream mustard lilac peach ruby "
    "emerald charcoal"
)
MATERIALS = words(
    "oak pine birch walnut cedar bamboo steel iron brass tin zinc glass clay stone marble granite slate cotton "
    "linen wool silk leather felt cork rubber paper wax bone horn reed straw hemp canvas velvet porcelain "
    "concrete"
)
JOBS = words(
    "baker farmer sailor teacher doctor painter carpenter tailor miller fisher hunter potter weaver singer dancer "
    "writer banker barber butcher gardener judge lawyer mason nurse pilot plumber printer shepherd smith soldier "
    "surgeon waiter clerk cook guard librarian"
)
FOODS = words(
    "grass hay seeds nuts berries apples fish worms beetles ants flies moths mice eggs honey leaves roots bark "
    "moss mushrooms corn wheat barley rice beans peas carrots cabbage lettuce pears plums cherries grapes snails "
    "frogs crabs"
)

PRICE = Relation(
    "price",
    _counted(range(12, 100), "crowns"),
    ("How much does {e} cost?", "How many crowns is {e}?", "What do you charge for {e}?", "{E}: how much is it?"),
    ("the price of {e}", "the cost of {e}", "the amount to pay for {e}"),
    ("how much {e} costs", "what one pays for {e}"),
    ("{E} costs {v}.", "The price of {e} is {v}.", "One pays {v} for {e}.", "For {e} they charge {v}."),
)
WARRANTY = Relation(
    "warranty",
    _counted(range(3, 73), "months"),
    (
        "How long is {e} under warranty?",
        "For how many months is {e} guaranteed?",
        "How many months of warranty does {e} have?",
        "When does the warranty of {e} run out?",
    ),
    ("the warranty period of {e}", "the length of the guarantee on {e}", "the warranty of {e}"),
    ("how long {e} is guaranteed", "how many months the warranty of {e} lasts"),
    (
        "{E} has a warranty of {v}.",
        "{E} is guaranteed for {v}.",
        "The warranty of {e} lasts {v}.",
        "The guarantee on {e} ends after {v}.",
    ),
)
WEIGHT = Relation(
    "weight",
    _counted(range(110, 1000, 10), "grams"),
    ("How heavy is {e}?", "How much does {e} weigh?", "How many grams is {e}?", "What does {e} weigh?"),
    ("the weight of {e}", "the mass of {e}", "the number of grams of {e}"),
    ("how heavy {e} is", "how much {e} weighs"),
    ("{E} weighs {v}.", "The weight of {e} is {v}.", "On the scales {e} shows {v}.", "{E} is {v} heavy."),
)
TOWN = Relation(
    "town",
    TOWNS,
    ("Where is {e} made?", "In which town is {e} built?", "Which town does {e} come from?", "Where do they make {e}?"),
    ("the town where {e} is made", "the place of origin of {e}", "the home town of {e}"),
    ("where {e} is made", "which town {e} comes from"),
    ("{E} is made in {v}.", "{E} comes from {v}.", "They build {e} in {v}.", "The home town of {e} is {v}."),
)
DESIGNER = Relation(
    "designer",
    PEOPLE,
    ("Who designed {e}?", "Who drew the plans of {e}?", "Who invented {e}?", "Whose design is {e}?"),
    ("the designer of {e}", "the inventor of {e}", "the name of the person behind {e}"),
    ("who designed {e}", "who invented {e}"),
    ("{E} was designed by {v}.", "{v} invented {e}.", "The designer of {e} is {v}.", "{v} drew the plans of {e}."),
)
COLOUR = Relation(
    "colour",
    COLOURS,
    ("What colour is {e}?", "Which colour does {e} have?", "In what colour is {e} painted?", "{E}: which colour?"),
    ("the colour of {e}", "the shade of {e}", "the paint on {e}"),
    ("what colour {e} is", "which colour {e} has"),
    ("{E} is {v}.", "The colour of {e} is {v}.", "{E} is painted {v}.", "They paint {e} in {v}."),
)
MATERIAL = Relation(
    "material",
    MATERIALS,
    (
        "What is {e} made of?",
        "Which material is {e} built from?",
        "What material do they use for {e}?",
        "{E} is made from what?",
    ),
    ("the material of {e}", "the stuff that {e} is made of", "the main material in {e}"),
    ("what {e} is made of", "which material {e} is built from"),
    ("{E} is made of {v}.", "The material of {e} is {v}.", "They use {v} for {e}.", "{E} is built from {v}."),
)
SHELF = Relation(
    "shelf",
    tuple(f"{letter}{number}" for letter in "ABCDEF" for number in range(10, 60)),
    ("On which shelf is {e}?", "Where in the store is {e}?", "Which shelf holds {e}?", "On what shelf do I find {e}?"),
    ("the shelf of {e}", "the shelf number of {e}", "the storage place of {e}"),
    ("on which shelf {e} stands", "where in the store {e} is"),
    (
        "{E} stands on shelf {v}.",
        "The shelf of {e} is {v}.",
        "Shelf {v} holds {e}.",
        "In the store {e} is on shelf {v}.",
    ),
)
RUNTIME = Relation(
    "runtime",
    _counted(range(2, 73), "hours"),
    (
        "How long does {e} run?",
        "For how many hours does {e} last?",
        "How many hours does {e} work?",
        "When does {e} run out of power?",
    ),
    ("the running time of {e}", "the number of hours that {e} lasts", "the battery life of {e}"),
    ("how long {e} runs", "how many hours {e} lasts"),
    ("{E} runs for {v}.", "The running time of {e} is {v}.", "{E} lasts {v}.", "After {v} {e} stops."),
)
FOOD = Relation(
    "food",
    FOODS,
    ("What does {e} eat?", "What food does {e} like?", "What do you feed {e}?", "{E} eats what?"),
    ("the food of {e}", "the favourite meal of {e}", "the diet of {e}"),
    ("what {e} eats", "which food {e} likes"),
    ("{E} eats {v}.", "The food of {e} is {v}.", "You feed {e} with {v}.", "{E} lives on {v}."),
)
LIFESPAN = Relation(
    "lifespan",
    _counted(range(2, 90), "years"),
    (
        "How old does {e} get?",
        "How long does {e} live?",
        "For how many years does {e} live?",
        "How many years does {e} reach?",
    ),
    ("the lifespan of {e}", "the age that {e} reaches", "the length of life of {e}"),
    ("how old {e} gets", "how many years {e} lives"),
    ("{E} lives for {v}.", "The lifespan of {e} is {v}.", "{E} gets {v} old.", "{E} reaches {v}."),
)
PLACE = Relation(
    "place",
    TOWNS,
    ("Where is {e}?", "In which town do I find {e}?", "Which town is the place of {e}?", "Where do people go for {e}?"),
    ("the town of {e}", "the place of {e}", "the location of {e}"),
    ("where {e} is", "in which town {e} is found"),
    ("{E} is in {v}.", "The town of {e} is {v}.", "You find {e} in {v}.", "People go to {v} for {e}."),
)
FOUNDER = Relation(
    "founder",
    PEOPLE,
    ("Who founded {e}?", "Who started {e}?", "Who had the idea for {e}?", "Whose idea was {e}?"),
    ("the founder of {e}", "the name of the person who started {e}", "the first owner of {e}"),
    ("who founded {e}", "who started {e}"),
    ("{E} was founded by {v}.", "{v} started {e}.", "The founder of {e} is {v}.", "{v} had the idea for {e}."),
)
VISITORS = Relation(
    "visitors",
    _counted(range(120, 1000, 20), "guests"),
    (
        "How many guests come to {e}?",
        "How many people visit {e}?",
        "How big is the crowd at {e}?",
        "How many go to {e}?",
    ),
    ("the number of guests at {e}", "the size of the crowd at {e}", "the count of visitors to {e}"),
    ("how many people visit {e}", "how many guests come to {e}"),
    ("{E} has {v}.", "The number of guests at {e} is {v}.", "{v} come to {e}.", "At {e} they count {v}."),
)
JOB = Relation(
    "job",
    JOBS,
    ("What does {e} do for a living?", "What is {e} by trade?", "What work does {e} do?", "As what does {e} work?"),
    ("the job of {e}", "the trade of {e}", "the profession of {e}"),
    ("what {e} does for a living", "which job {e} has"),
    ("{E} is a {v}.", "The job of {e} is {v}.", "{E} works as a {v}.", "By trade {e} is a {v}."),
)
AGE = Relation(
    "age",
    _counted(range(18, 96), "years"),
    ("How old is {e}?", "What age is {e}?", "How many years old is {e}?", "{E} is how old?"),
    ("the age of {e}", "the number of years of {e}", "the present age of {e}"),
    ("how old {e} is", "what age {e} has"),
    ("{E} is {v} old.", "The age of {e} is {v}.", "{E} has lived for {v}.", "So far {e} counts {v}."),
)
HOME = Relation(
    "home",
    TOWNS,
    (
        "Where does {e} live?",
        "In which town does {e} live?",
        "Where is the house of {e}?",
        "Which town is {e} at home in?",
    ),
    ("the home of {e}", "the town where {e} lives", "the address of {e}"),
    ("where {e} lives", "which town {e} lives in"),
    ("{E} lives in {v}.", "The home of {e} is {v}.", "The house of {e} is in {v}.", "{E} is at home in {v}."),
)


@dataclass(frozen=True)
class Family:
    """A kind of entity: what it may be called after its own name, and what is known of it."""

    name: str
    pattern: str
    kinds: tuple[str, ...]
    relations: tuple[Relation, ...]


FAMILIES = (
    Family(
        "thing",
        "the {name} {kind}",
        words(
            "flute drum harp violin clock boat kite saddle plough loom wagon lantern radio hammer saw basket mirror "
            "kettle lamp fan heater camera"
        ),
        (PRICE, WARRANTY, WEIGHT, TOWN, DESIGNER, COLOUR, MATERIAL, SHELF, RUNTIME),
    ),
    Family(
        "animal",
        "the {name} {kind}",
        words("owl goat fox hare otter crow mule lizard toad heron"),
        (FOOD, LIFESPAN, COLOUR, PLACE, WEIGHT),
    ),
    Family(
        "festival",
        "the {name} {kind}",
        words("fair parade feast race market dance"),
        (PLACE, FOUNDER, VISITORS, PRICE),
    ),
    Family("shop", "the {name} {kind}", words("bakery bookshop inn mill dairy smithy"), (PLACE, FOUNDER, COLOUR)),
    Family("person", "{kind} {name}", words("Captain Doctor Miss Mister Judge Aunt Uncle"), (JOB, AGE, HOME)),
)
