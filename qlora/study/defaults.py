"""What a run with documents takes for keys that the recipe does not set: by the size of what is to be learnt.

Rank grows with the corpus and the rate with the rank: 84.2 % of the facts at a rank that fits, while rank 64 fell from
71 to 50 % as documents were added and 128 brought it back (2607.21861). Rates of 1e-3 at rank 1 to 32 in three of five
studies of facts in LoRA (2503.08727, 2502.14502, 2506.10943); 5e-4 leaves room for larger bases.
"""

from __future__ import annotations

from typing import Any

from qlora.events import Notice, Sink
from qlora.recipe.reading import Recipe

RANKS = ((3000, 128), (500, 64), (0, 32))  # above so many pages: this rank
LEARNING_RATE = 5e-4
# Facts are known after about ten meetings, in the same or in other words (2502.14502, figures: one epoch of ten
# paraphrases is ten epochs of one).
MEETINGS = 10
FEWEST_EPOCHS, MOST_EPOCHS = 2.0, 10.0


def of_corpus(recipe: Recipe, pages: int) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with what it does not set as `pages` ask for, and `table.key = value` of each of those keys.

    No row of a study is held out: the exam measures what was learnt, in other words, and the last adapter is delivered.
    """
    rank = next(rank for above, rank in RANKS if pages > above or not above)
    lora = _unset(recipe.lora, r=rank)
    lora |= _unset(recipe.lora, alpha=2.0 * lora.get("r", recipe.lora.r))
    derived = {"lora": lora, "train": _unset(recipe.train, learning_rate=LEARNING_RATE)}
    if not recipe.data.eval:
        derived["data"] = _unset(recipe.data, eval_fraction=0.0)
    tables = {name: getattr(recipe, name).model_copy(update=values) for name, values in derived.items() if values}
    said = (f"{table}.{key} = {value:g}" for table, values in derived.items() for key, value in values.items())
    return recipe.model_copy(update=tables), tuple(said)


def unread(recipe: Recipe, sink: Sink) -> Recipe:
    """The recipe for an estimate, which reads no document: as few pages ask for, said where that decides anything."""
    if not recipe.data.documents:
        return recipe
    derived, said = of_corpus(recipe, 0)
    if said:
        most = RANKS[-2][0]
        sink.emit(
            Notice("documents", f"as for up to {most} pages: {', '.join(said)}; the study asks and answers as well")
        )
    return derived


def epochs(rows: int, sentences: int) -> float:
    """Passes over `rows` questions about `sentences` sentences, so that each is met about MEETINGS times."""
    asked = rows / max(sentences, 1)
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, float(round(MEETINGS / max(asked, 1e-9)))))


def has_length(recipe: Recipe) -> bool:
    """Whether the recipe itself says how long it trains."""
    return bool(recipe.train.model_fields_set & {"epochs", "max_steps"})


def _unset(section: Any, **values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in section.model_fields_set}
