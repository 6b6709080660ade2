"""Another trainer's file to a recipe: which trainer's it is, each key by its rule, and the table that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora import files, foreign_yaml
from qlora.errors import UserError
from qlora.foreign_json import ForeignFileError
from qlora.importers import axolotl, datasets, llama_factory, trl, unsloth
from qlora.importers.draft import Account, Draft, Fate, Rules, as_shown
from qlora.importers.values import warmup
from qlora.recipe.reading import Recipe


@dataclass(frozen=True)
class Trainer:
    """How one trainer's file is told (`marks` are keys), and read. `settle` takes keys that say something together."""

    name: str
    marks: tuple[str, ...]
    rules: Rules
    defaults: Mapping[str, Any]
    settle: Callable[[Draft, dict[str, Any]], None]
    nulls: Mapping[str, str] = field(default_factory=dict)  # keys whose null says something that is not carried: what


TRAINERS = (
    Trainer(axolotl.NAME, axolotl.MARKS, axolotl.RULES, axolotl.DEFAULTS, axolotl.settle),
    Trainer(llama_factory.NAME, llama_factory.MARKS, llama_factory.RULES, llama_factory.DEFAULTS, llama_factory.settle),
    Trainer(unsloth.NAME, unsloth.MARKS, unsloth.RULES, unsloth.DEFAULTS, unsloth.settle),
    Trainer(trl.NAME, trl.MARKS, trl.RULES, trl.DEFAULTS, trl.settle, trl.NULLS),
)
TABLES = ("data", "training", "lora", "logging")  # whose keys are looked at one by one
FEWEST_MARKS = 2
MOST_LEFT = 500  # keys of a file that are told one by one


@dataclass(frozen=True)
class Imported:
    """A recipe's table, what became of each key of the file, and by our keys the notes that stand behind them."""

    trainer: str
    file: Path
    table: dict[str, Any]
    accounts: tuple[Account, ...]
    notes: Mapping[str, str]

    def of(self, fate: Fate) -> list[Account]:
        return [account for account in self.accounts if account.fate == fate]

    def head(self) -> list[str]:
        """What stands at the top of the recipe: where it comes from, and what is not in it."""
        lines = [
            f"From {self.file.name}, a configuration of {self.trainer}; behind each key, the name that it has there."
        ]
        left = self.of("left")
        lines += ["Not carried, and why:"] if left else []
        return lines + [f"  {account.key}: {account.said}" for account in left]


def read(file: str | Path) -> Imported:
    """Raises UserError for a file that cannot be read, is no known trainer's, or asks for another goal."""
    path = files.user_path(file, "the configuration")
    if not path.is_file():
        raise UserError(f"{path}: no such file", "name the YAML or JSON that the other trainer was given")
    try:
        raw = foreign_yaml.load_table(path, str(path))
    except ForeignFileError as error:
        raise UserError(str(error), "name the YAML or JSON that the other trainer was given, or mend it") from error
    table = _flat(raw)
    trainer = _trainer_of(table, path)
    draft = Draft(trainer.name, path.parent)
    _account(draft, trainer, table)
    return Imported(trainer.name, path, _checked(draft), tuple(draft.accounts), draft.notes)


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, those of the known tables as `table.key`."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if key in TABLES and isinstance(value, Mapping):
            found |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            found[key] = value
    return found


def _trainer_of(table: Mapping[str, Any], path: Path) -> Trainer:
    keys = {*table, *(key.partition(".")[0] for key in table)}
    scores = sorted(((sum(mark in keys for mark in one.marks), one.name) for one in TRAINERS), reverse=True)
    best = next(one for one in TRAINERS if one.name == scores[0][1])
    if scores[0][0] < FEWEST_MARKS or scores[0][0] == scores[1][0]:
        names = ", ".join(one.name for one in TRAINERS)
        few = ", ".join(as_shown("", key) for key in list(table)[:5]) or "none"
        raise UserError(
            f"{path}: which trainer's configuration it is, its keys do not tell (they begin {few})",
            f"what can be imported is the YAML or JSON of {names}",
        )
    return best


def _account(draft: Draft, trainer: Trainer, table: dict[str, Any]) -> None:
    unset = [key for key, value in table.items() if value is None or value in ("", [], {})]
    nulls = [key for key in unset if table[key] is None and key in trainer.nulls]
    for key in nulls:
        draft.leave(key, "null", trainer.nulls[key])
    table = {key: value for key, value in table.items() if key not in unset}
    if isinstance(folder := table.get("dataset_dir"), str):
        draft.values["dataset_dir"] = folder
    trainer.settle(draft, table)
    warmup(draft, table)
    _others(draft, trainer, table)
    draft.of_defaults = True
    for key, value in trainer.defaults.items():
        steps_decide = key in ("num_epochs", "num_train_epochs") and "train.max_steps" in draft.values
        has_warmup = key == "warmup_ratio" and "warmup_steps" in table
        if key not in table and key not in nulls and not steps_decide and not has_warmup:
            trainer.rules[key](draft, key, value)
    draft.of_defaults = False
    if "train.max_steps" in draft.values:
        draft.values.pop("train.epochs", None)
    if empty := [key for key in unset if key not in nulls]:
        draft.ours(", ".join(empty), "no value")
    draft.values.pop("dataset_dir", None)


def _others(draft: Draft, trainer: Trainer, table: Mapping[str, Any]) -> None:
    """Each key by its rule, `max_steps` first: what is a number of steps is a part of them."""
    in_order = sorted(table, key=lambda key: not key.endswith("max_steps"))
    for number, key in enumerate(in_order):
        if number >= MOST_LEFT:
            draft.leave(f"{len(in_order) - number:,} more keys", "…", "not looked at")
            break
        if (rule := trainer.rules.get(key)) is not None:
            rule(draft, key, table[key])
        else:
            draft.leave(key, table[key], "not known here")


def _checked(draft: Draft) -> dict[str, Any]:
    """The recipe's table. A value that our own bounds refuse is taken back, and told; the base is needed."""
    if "model.base" not in draft.values:
        raise UserError(f"{draft.trainer}: the configuration names no base model", "add it, then import again")
    if (folder := datasets.local(draft, draft.values["model.base"])) is not None and folder.is_dir():
        draft.values["model.base"] = str(folder)
    while True:
        table = _nested(draft)
        try:
            recipe = Recipe.model_validate(table)
        except ValidationError as error:
            refused = {".".join(map(str, item["loc"][:2])): str(item["msg"]) for item in error.errors()}
            if not (known := [key for key in refused if key in draft.values]) or "model.base" in refused:
                first = next(iter(refused.items()))
                raise UserError(f"{first[0]}: {first[1]}", "mend the configuration, then import again") from None
        else:
            if not (refused := _together(recipe)):
                return table
            known = [key for key in refused if key in draft.values]
        for key in known:
            draft.leave(key, draft.values.pop(key), f"not possible here ({refused[key]}): our default is taken")


def _together(recipe: Recipe) -> dict[str, str]:
    """Keys that cannot go with others, with the reason: what `recipe.reading.cross_checks` would refuse."""
    refused = {}
    if recipe.eval.early_stopping_patience and not recipe.data.eval and recipe.data.eval_fraction == 0:
        refused["eval.early_stopping_patience"] = "there are no rows to evaluate on"
    if recipe.lora.use_dora and recipe.lora.init == "eva":
        refused["lora.init"] = "DoRA starts from the plain product"
    return refused


def _nested(draft: Draft) -> dict[str, Any]:
    table: dict[str, Any] = {}
    order = list(Recipe.model_fields)
    for name, value in sorted(draft.values.items(), key=lambda item: order.index(item[0].partition(".")[0])):
        section, _, key = name.partition(".")
        table.setdefault(section, {})[key] = value
    for key, entries in (("train", draft.sources), ("eval", draft.eval_sources)):
        if entries:
            table.setdefault("data", {})[key] = entries
    return table
