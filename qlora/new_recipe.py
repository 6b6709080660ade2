"""The first recipe: base and rows are looked at, and what is written fits this machine, as a check would find it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import api, files, recipe_file
from qlora.errors import DoesNotFit, ModelError, QloraError
from qlora.events import Sink, Sinks
from qlora.recipe.reading import Recipe, looks_like_folder, recipe_of_table
from qlora.training import setup
from qlora.units import GIB

if TYPE_CHECKING:
    from qlora.model.base_folder import BaseFolder

SHORTEST, LONGEST = 256, 8192  # of data.max_length: below, packs hold little; above, a first run takes very long
FEW_ROWS = 20  # of fewer, a twentieth is no row to evaluate on
RANK = 16


@dataclass(frozen=True)
class FirstRecipe:
    """A recipe that was written, and lines that say what was looked at."""

    path: Path
    said: tuple[str, ...]


def first_recipe(name: str | Path, base: str, rows: str, *, sink: Sink | None = None) -> FirstRecipe:
    """Write the recipe `name` for a base (a hub name or a folder) and a source of rows, its schema beside it.

    Raises UserError where something is there already and for a path that cannot be, DataError for rows that cannot be
    read, ModelError for a folder that is no base, DoesNotFit where no setting fits. A base of the hub that cannot be
    reached is said, not refused.
    """
    shared = Sinks(sink) if sink is not None else Sinks()
    path = recipe_file.target_of(name)
    source = rows if rows.startswith("hub:") else _from_here(rows)
    table = _table(_placed(base), source)
    found, why = _base(_recipe(table, path), shared)
    if found is None:
        head = [f"A first recipe. The base was not looked at: {why}", "data.max_length is a guess."]
        notes = {"data.max_length": "tokens of the longest row"}
    else:
        table, head, notes = _looked_at(table, path, found, shared)
    recipe_file.write(path, table, head, notes)
    return FirstRecipe(path, tuple(head))


def _from_here(rows: str) -> str:
    """The rows' path, absolute, its links left as they are: a link's own name says what kind of file it is."""
    files.user_path(rows, "the rows")
    return str(Path.cwd() / Path(rows).expanduser())


def _placed(base: str) -> str:
    folder = files.user_path(base, "the base")
    if looks_like_folder(base) and not folder.is_dir():
        raise ModelError(f"{base}: no such folder", "name a folder with config.json and safetensors, or a hub name")
    return str(folder) if folder.is_dir() else base


def _table(base: str, source: str) -> dict[str, Any]:
    return {
        "model": {"base": base},
        "lora": {"r": RANK, "alpha": 2 * RANK},
        "data": {"max_length": 2048, "eval_fraction": 0.05, "train": [{"path": source}]},
        "train": {"epochs": 3, "micro_batch_size": "auto", "learning_rate": 2e-4},
        "eval": {"every_steps": 50, "samples": 3},
    }


def _recipe(table: Mapping[str, Any], path: Path) -> Recipe:
    return recipe_of_table({key: dict(value) for key, value in table.items()}, path, "")


def _base(recipe: Recipe, sink: Sink) -> tuple[BaseFolder | None, str]:
    """The base, after a look at the rows' files; or why it cannot be read, where it is one of the hub."""
    from qlora.data.hub_rows import localize
    from qlora.data.prepare import check_files
    from qlora.model.resolve import resolve

    check_files(localize(recipe.data, sink).local)
    try:
        return resolve(recipe.model.base, recipe.model.revision, sink), ""
    except QloraError as error:
        if Path(recipe.model.base).is_dir():
            raise
        return None, error.what


def _looked_at(
    table: dict[str, Any], path: Path, base: BaseFolder, sink: Sink
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """The table with what rows and machine ask for; what to say at its top, and behind its keys."""
    lengths = _lengths(_recipe(table, path), base, sink)
    longest = max(lengths, default=1)
    wanted = _length_for(longest, base)
    if len(lengths) < FEW_ROWS:
        table["data"]["eval_fraction"] = 0.0
    over = _hold(table, lengths, wanted)
    try:
        checked = api.check(_recipe(table, path), sink=sink)
    except DoesNotFit:
        over = _hold(table, lengths, _shrink(table, path, sink))
        checked = api.check(_recipe(table, path), sink=sink)
    limit = table["data"]["max_length"]
    head = [f"A first recipe: {len(lengths):,} rows, the longest of {longest:,} tokens, {sum(lengths):,} in all."]
    if checked.memory is not None:
        memory = checked.memory
        peak, most = memory.peak_bytes / GIB, memory.limit_bytes / GIB
        head.append(f"Planned for this machine: {peak:.2f} GiB at its peak, of {most:.2f} GiB.")
    notes = {
        "data.max_length": f"{over:,} rows are longer and cut to it" if over else "tokens; no row is longer",
        "data.eval_fraction": "held out, to see whether it learns" if len(lengths) >= FEW_ROWS else "too few rows",
        "lora.r": "rank of the trained matrices: more can hold more",
        "lora.alpha": "how strongly they act: alpha / r",
        "train.micro_batch_size": "the fastest that fits, decided when a run begins",
        "train.epochs": "passes over the rows",
    }
    if limit < wanted:
        notes["data.max_length"] += f"; {wanted:,} does not fit here"
    return table, head, notes


def _lengths(recipe: Recipe, base: BaseFolder, sink: Sink) -> Sequence[int]:
    """Tokens of every row, none cut or left out."""
    from qlora.model.chat_template import chosen
    from qlora.model.tokenizer_files import read_files

    whole = recipe.data.model_copy(update={"max_length": 1 << 20, "eval_fraction": 0.0})
    tokenizer = chosen(read_files(base.path), recipe.model, base.name, sink)
    return setup.prepare_rows(recipe.model_copy(update={"data": whole}), tokenizer, Sinks())[1].train.lengths


def _length_for(longest: int, base: BaseFolder) -> int:
    """The power of two that holds the longest row, within what the base has positions for."""
    from qlora.model.meta_model import has_head, text_config

    text, _ = text_config(base.config, base.name, has_head(base))
    positions = int(getattr(text, "max_position_embeddings", LONGEST) or LONGEST)
    return min(max(SHORTEST, 1 << (longest - 1).bit_length()), LONGEST, positions)


def _hold(table: dict[str, Any], lengths: Sequence[int], length: int) -> int:
    """Have rows be of `length` tokens at most; how many are longer, which are cut then and not left out."""
    table["data"]["max_length"] = length
    over = sum(tokens > length for tokens in lengths)
    if over:
        table["data"]["truncation"] = "cut"
    return over


def _shrink(table: dict[str, Any], path: Path, sink: Sink) -> int:
    """The length of rows that fits, with a smaller rank where that is needed too, as the planner finds them.

    Raises DoesNotFit where nothing is enough.
    """
    question = api.question(_recipe(table, path), sink=sink)
    if not (plans := question.search()):
        raise question.does_not_fit()
    best = plans[0].recipe
    if best.lora.r != table["lora"]["r"]:
        table["lora"] = {"r": best.lora.r, "alpha": 2 * best.lora.r}
    return int(best.data.max_length)
