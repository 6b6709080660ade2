"""The recipe: TOML, read once into frozen sections that mirror the modules. No torch here.

The keys stand in `sections.py`. Every problem of a recipe is found before any is reported, each with its line and the
nearest valid key (see `problems.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qlora import document_keys, files, foreign_json, foreign_toml, grpo_keys, memory_keys, objective_keys
from qlora.errors import Problem, RecipeError, UserError
from qlora.recipe import sections
from qlora.recipe.problems import LineIndex, Location, apply_override, explain_unknown_key, short, toml_problem
from qlora.recipe_values import Section, or_auto


class Recipe(Section):
    """A whole recipe. `[model]` alone is enough to look at memory; training needs rows or documents too."""

    model: sections.ModelSection
    quantization: sections.QuantizationSection = sections.QuantizationSection()
    lora: sections.LoraSection = sections.LoraSection()
    data: sections.DataSection = sections.DataSection()
    study: document_keys.StudySection = document_keys.StudySection()
    exam: document_keys.ExamSection = document_keys.ExamSection()
    train: sections.TrainSection = sections.TrainSection()
    memory: sections.MemorySection = sections.MemorySection()
    checkpoint: sections.CheckpointSection = sections.CheckpointSection()
    eval: sections.EvalSection = sections.EvalSection()
    report: sections.ReportSection = sections.ReportSection()
    export: sections.ExportSection = sections.ExportSection()
    output: sections.OutputSection = sections.OutputSection()

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read, override and check a recipe file; paths in it become absolute.

        `overrides` are `table.key=value` strings, values in TOML. Raises RecipeError with every problem.
        """
        return load_recipe(Path(path), overrides)


MOST_PROBLEMS = 20  # of one recipe, in messages
# Sections that cannot change what is learned: a resumed run may differ in them.
FREE_SECTIONS = ("report", "output", "checkpoint", "export", "memory")
# Keys that are tables of their own, each of which names files by its `path`.
TABLES: dict[str, type[sections.SourceSection | document_keys.DocumentsSection | document_keys.QuestionsSection]] = {
    "data.train": sections.SourceSection,
    "data.eval": sections.SourceSection,
    "data.documents": document_keys.DocumentsSection,
    "exam.own": document_keys.QuestionsSection,
}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """See `Recipe.from_file`."""
    text, raw = read_table(path)
    return recipe_of_table(raw, path, text, overrides)


def recipe_of_table(raw: dict[str, Any], path: Path, text: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a table that stands in the text of a file. Raises RecipeError."""
    index = LineIndex(path, text)
    return _absolute(_checked(raw, overrides, index), path.parent.resolve(), index)


def recipe_of_base(base: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that names a base (hub name, or a folder relative to the current one) and nothing else."""
    raw = {"model": {"base": base}}
    index = LineIndex(Path(short(base)), "")
    return _absolute(_checked(raw, overrides, index), Path.cwd(), index)


def _checked(raw: dict[str, Any], overrides: Sequence[str], index: LineIndex) -> Recipe:
    """The recipe of parsed TOML. Raises RecipeError with every problem."""
    problems = [problem for item in overrides if (problem := apply_override(raw, item, index))]
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(problems + _problems(error, raw, index)) from None
    for table in ("study", "exam"):
        if table in raw and not recipe.data.documents:
            what = f"[{table}] without [[data.documents]]: there is nothing to study"
            hint = 'add [[data.documents]] with path = "manuals", or take it out'
            problems.append(Problem(index.where((table,)), what, hint))
    if problems := problems + cross_checks(recipe, index):
        raise RecipeError(problems)
    return objective_keys.settled(recipe)


def recipe_toml(recipe: Recipe, header: str = "") -> str:
    """The recipe with every default written out, as TOML that reads back to an equal recipe."""
    return header + tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True, exclude=grpo_keys.idle(recipe)))


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors; `recipes/recipe.schema.json` is this."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def key_names() -> list[str]:
    """Every `table.key` of the schema."""
    return list(_fields())


def _fields() -> dict[str, FieldInfo]:
    """The keys by their names; those of a source as `data.train.key`, `data.eval.key` and so on."""
    found: dict[str, FieldInfo] = {}
    for table, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        for key, entry in section.model_fields.items():
            if inner := TABLES.get(f"{table}.{key}"):
                found |= {f"{table}.{key}.{name}": field for name, field in inner.model_fields.items()}
            else:
                found[f"{table}.{entry.alias or key}"] = entry
    return found


def read_table(path: Path) -> tuple[str, dict[str, Any]]:
    """A recipe's text and its table, unchecked. Raises RecipeError for what is no TOML in a regular file."""
    try:
        text = foreign_toml.read_text(path)
    except FileNotFoundError:
        near = foreign_toml.beside(path)
        hint = f"recipes in that folder: {', '.join(near)}" if near else "check the path; examples are in recipes/"
        raise RecipeError([Problem(str(path), "no such recipe", hint)]) from None
    except foreign_toml.ForeignTomlError as error:
        hint = "name a .toml file of UTF-8 text; a run is named after it"
        raise RecipeError([Problem(short(path), str(error), hint)]) from None
    try:
        return text, foreign_toml.parse(text)
    except foreign_toml.ForeignTomlError as error:
        raise RecipeError([toml_problem(path, text, error)]) from None


def _problems(error: ValidationError, raw: Mapping[str, Any], index: LineIndex) -> list[Problem]:
    """What is wrong, in the order of the file; of very many problems the first ones, and how many more there are."""
    found: dict[Location, Any] = {}
    for item in (one for one in error.errors() if one["type"] != "default_factory_not_called"):
        # Union branches repeat a location with the branch's name appended: keep keys and indexes that exist.
        location = _real_location(item["loc"], raw)
        text_wanted = location in found and found[location]["type"] == "literal_error"
        if location not in found or item["type"] == "extra_forbidden" or (text_wanted and item["type"] == "too_long"):
            found[location] = item
    known, problems = key_names(), []
    order = sorted(found, key=lambda location: index.order(index.where(location)))
    for location in order[:MOST_PROBLEMS]:
        item, dotted = found[location], ".".join(map(str, location))
        if item["type"] == "extra_forbidden":
            problems.append(explain_unknown_key(location, known, index))
        else:
            problems.append(Problem(index.where(location), f"{short(dotted)} {_message(item)}", _hint(dotted, item)))
    if more := len(order) - len(problems):
        problems.append(Problem(str(index.path), f"{more:,} more problems", "mend the first ones, then run it again"))
    return problems


def _real_location(location: tuple[int | str, ...], raw: Mapping[str, Any]) -> tuple[int | str, ...]:
    place: Any = raw
    kept: list[int | str] = []
    if location[:2] == ("exam", "own") and "own" not in raw["exam"]:
        location = "exam", "questions", *location[2:]
    for part in location:
        if isinstance(place, Mapping) and isinstance(part, str):
            kept.append(part)
            place = place.get(part)
        elif isinstance(place, list) and isinstance(part, int):
            kept.append(part)
            place = place[part] if part < len(place) else None
        else:
            break
    return tuple(kept)


def _message(item: Any) -> str:
    if item["type"] == "missing":
        return "is missing"
    message = foreign_json.reason(item, "a table")
    return f"is wrong: {message[0].lower()}{message[1:]}{foreign_json.shown(item)}"


def _hint(dotted: str, item: Any) -> str:
    key = ".".join(part for part in dotted.split(".") if not part.isdigit())
    if field := _fields().get(key):
        return f"{key}: {or_auto(field.annotation)}{field.description}"
    if item["type"] == "missing" or key in ("data.train", "data.eval"):
        return 'the smallest recipe is [model] with base = "..." and [[data.train]] with path = "..."'
    return "see the recipe's keys in the README, or `qlora-train --schema`"


def cross_checks(recipe: Recipe, index: LineIndex) -> list[Problem]:
    """What no single key shows, and keys of [export] that would do nothing; found now, not when training has ended."""
    train, data, lora = recipe.train, recipe.data, recipe.lora
    batch, micro = train.batch_size, train.micro_batch_size
    wants_eval_rows = recipe.eval.exact_match_rows or recipe.eval.early_stopping_patience
    checks = (
        (
            isinstance(batch, int) and isinstance(micro, int) and batch * train.answers_per_row < micro,
            "train.micro_batch_size",
            f"train.micro_batch_size ({micro}) is more than train.batch_size ({batch})",
            "a step of batch_size rows runs micro_batch_size rows at a time: lower micro_batch_size",
        ),
        *memory_keys.checks(recipe.memory, train.gradient_checkpointing),
        (
            wants_eval_rows and not data.eval and data.eval_fraction == 0,
            "data.eval_fraction",
            "[eval] asks for evaluation rows, but data.eval_fraction is 0 and there is no [[data.eval]]",
            "set data.eval_fraction = 0.05 or add [[data.eval]] with a path",
        ),
        *_of_export(recipe),
        (
            lora.experts and (lora.dropout > 0 or lora.use_dora or lora.init == "eva"),
            "lora.experts",
            f"lora.experts = true and {_not_with_experts(lora)} cannot go together",
            "adapters on experts are plain products of two matrices: take one of the two lines out",
        ),
        (
            lora.use_dora and lora.init == "eva",
            "lora.init",
            'lora.init = "eva" and lora.use_dora cannot go together (DoRA starts from the plain LoRA product)',
            "use one of them",
        ),
        *objective_keys.cross_checks(recipe),
    )
    found = [(key.split("."), what, hint) for wrong, key, what, hint in checks if wrong]
    places = (tuple(int(part) if part.isdigit() else part for part in parts) for parts, _, _ in found)
    return [Problem(index.where(place), what, hint) for place, (_, what, hint) in zip(places, found, strict=True)]


def _of_export(recipe: Recipe) -> tuple[memory_keys.Check, ...]:
    """Keys of [export] that would do nothing, and forms that cannot hold what is trained."""
    export, lora = recipe.export, recipe.lora
    rounded_plainly = ("hf", "adapter-gguf", "gguf:f32", "gguf:f16", "gguf:bf16", "gguf:q8_0")
    return (
        (
            export.imatrix and set(export.formats) <= set(rounded_plainly),
            "export.imatrix",
            "export.imatrix weighs the rounding of K- and IQ-quants, and export.formats names none",
            'add "gguf:q4_k_m", say, or take it out',
        ),
        (
            export.max_kl is not None and set(export.formats) <= {"adapter-gguf"},
            "export.max_kl",
            "export.max_kl is for merged models, and export.formats names none",
            'add "hf" or "gguf:q8_0", or take it out',
        ),
        (
            "adapter-gguf" in export.formats and (lora.use_dora or bool(lora.modules_to_save)),
            "export.formats",
            "adapter-gguf cannot hold what lora.use_dora and lora.modules_to_save train",
            'merge it instead: formats = ["gguf:q8_0"]',
        ),
        (
            lora.experts and "adapter-gguf" in export.formats,
            "export.formats",
            "adapter-gguf cannot hold adapters on experts (lora.experts)",
            'merge it instead: formats = ["hf"]',
        ),
    )


def _not_with_experts(lora: sections.LoraSection) -> str:
    return "lora.dropout" if lora.dropout else "lora.use_dora = true" if lora.use_dora else f'lora.init = "{lora.init}"'


def looks_like_folder(base: str) -> bool:
    """Whether a base's name can only be a path: hub names are `owner/name` or `name`."""
    return base.startswith((".", "/", "~", "\\")) or base.count("/") > 1 or ":" in base or "\\" in base


def _absolute(recipe: Recipe, folder: Path, index: LineIndex) -> Recipe:
    """The recipe with the base and the sources that are local as absolute paths, from `folder` on."""
    model, lora = recipe.model, recipe.lora
    problems: list[Problem] = []
    base = _local(model.base, folder, ("model", "base"), index, problems)
    if looks_like_folder(model.base) or os.path.isdir(base):
        model = model.model_copy(update={"base": str(base.resolve())})
    if model.chat_template not in ("auto", "chatml"):
        template = str(_local(model.chat_template, folder, ("model", "chat_template"), index, problems))
        model = model.model_copy(update={"chat_template": template})
    if lora.from_adapter is not None:
        start = str(_local(lora.from_adapter, folder, ("lora", "from"), index, problems))
        lora = lora.model_copy(update={"from_adapter": start})

    def absolute(path: str, key: Location) -> str:
        # Not resolve(): a glob's pattern must stay as it is.
        return path if path.startswith("hub:") else str(_local(path, folder, key, index, problems))

    placed = with_paths(recipe, absolute)
    _local(recipe.output.dir, Path.cwd(), ("output", "dir"), index, problems)
    if problems:
        raise RecipeError(problems)
    return placed.model_copy(update={"model": model, "lora": lora})


def with_paths(recipe: Recipe, placed: Callable[[str, Location], str]) -> Recipe:
    """The recipe with each source's path as `placed(path, key)`; what the recipe does not set stays unset."""
    changed: dict[str, dict[str, Any]] = {"data": {}, "exam": {}}
    for table, _, key in (name.partition(".") for name in TABLES):
        entries = getattr(getattr(recipe, table), key)
        paths = (placed(entry.path, (table, key, number, "path")) for number, entry in enumerate(entries))
        if entries:
            pairs = zip(entries, paths, strict=True)
            changed[table][key] = tuple(entry.model_copy(update={"path": path}) for entry, path in pairs)
    tables = {table: getattr(recipe, table).model_copy(update=new) for table, new in changed.items() if new}
    return recipe.model_copy(update=tables | grpo_keys.with_paths(recipe.train, placed))


def _local(text: str, folder: Path, key: Location, index: LineIndex, problems: list[Problem]) -> Path:
    """A path of the recipe, from `folder` on; one that no system could open is added to `problems`."""
    try:
        place = folder / Path(text).expanduser()
        files.user_path(place)
        str(place).encode()
    except RuntimeError:
        reason = "there is no such home folder"
    except UserError as error:
        reason = error.what.removeprefix("the path: ")
    except UnicodeEncodeError:
        reason = "its folder's name is not UTF-8, as recipes are"
    else:
        return place
    what = f"{'.'.join(map(str, key))}: {short(text)}: {reason}"
    problems.append(Problem(index.where(key), what, "write out the path of a file or folder"))
    return folder
