"""The recipe: TOML, read once into frozen sections that mirror the modules. No torch here.

The keys stand in `sections.py`. Every problem of a recipe is found before any is reported, each with its line and the
nearest valid key (see `problems.py`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qlora.errors import Problem, RecipeError
from qlora.recipe import sections
from qlora.recipe.problems import LineIndex, apply_override, explain_unknown_key, toml_problem


class Recipe(sections.Section):
    """A whole recipe. `[model]` alone is enough to look at memory; training needs `[[data.train]]` too."""

    model: sections.ModelSection
    quantization: sections.QuantizationSection = sections.QuantizationSection()
    lora: sections.LoraSection = sections.LoraSection()
    data: sections.DataSection = sections.DataSection()
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


# Sections that cannot change what is learned: a resumed run may differ in them.
FREE_SECTIONS = ("report", "output", "checkpoint", "export", "memory")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """See `Recipe.from_file`."""
    text = _read(path)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([toml_problem(path, text, error)]) from None
    return _absolute(_checked(raw, overrides, LineIndex(path, text)), path.parent.resolve())


def recipe_of_base(base: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that names a base (hub name, or a folder relative to the current one) and nothing else."""
    raw = {"model": {"base": base}}
    return _absolute(_checked(raw, overrides, LineIndex(Path(base), "")), Path.cwd())


def _checked(raw: dict[str, Any], overrides: Sequence[str], index: LineIndex) -> Recipe:
    """The recipe of parsed TOML. Raises RecipeError with every problem."""
    problems = [problem for item in overrides if (problem := apply_override(raw, item, index))]
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(problems + _problems(error, raw, index)) from None
    if problems := problems + _cross_checks(recipe, index):
        raise RecipeError(problems)
    return recipe


def recipe_toml(recipe: Recipe, header: str = "") -> str:
    """The recipe with every default written out, as TOML that reads back to an equal recipe."""
    return header + tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors; `recipes/recipe.schema.json` is this."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def differing_keys(ours: Recipe, theirs: Recipe) -> list[str]:
    """`table.key` of all that could change the result and is not the same in both."""
    left, right = ours.model_dump(mode="json"), theirs.model_dump(mode="json")
    return [
        f"{section}.{key}"
        for section in left
        if section not in FREE_SECTIONS
        for key in left[section]
        if left[section][key] != right[section][key]
    ]


def key_names() -> list[str]:
    """Every `table.key` of the schema."""
    return list(_fields())


def _fields() -> dict[str, FieldInfo]:
    """The keys by their names; those of a source as `data.train.key` and `data.eval.key`."""
    found: dict[str, FieldInfo] = {}
    for table, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, sections.Section)
        for key, entry in section.model_fields.items():
            if table == "data" and key in ("train", "eval"):
                found |= {f"data.{key}.{name}": inner for name, inner in sections.SourceSection.model_fields.items()}
            else:
                found[f"{table}.{key}"] = entry
    return found


def _read(path: Path) -> str:
    if path.is_dir():
        raise RecipeError([Problem(str(path), "is a folder, not a recipe", "name the .toml file itself")])
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.toml"))[:5] if path.parent.is_dir() else []
        hint = f"recipes in that folder: {', '.join(near)}" if near else "check the path; examples are in recipes/"
        raise RecipeError([Problem(str(path), "no such recipe", hint)]) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError([Problem(str(path), f"cannot be read: {reason}", "save it as UTF-8 text")]) from None


def _problems(error: ValidationError, raw: Mapping[str, Any], index: LineIndex) -> list[Problem]:
    found: dict[str, Problem] = {}
    for item in error.errors():
        # Union branches repeat a location with the branch's name appended: keep keys and indexes that exist.
        location = _real_location(item["loc"], raw)
        dotted = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            found[dotted] = explain_unknown_key(location, key_names(), index)
        elif dotted not in found:
            found[dotted] = Problem(index.where(location), f"{dotted} {_message(item)}", _hint(dotted, item))
    return sorted(found.values(), key=lambda problem: index.order(problem.where))


def _real_location(location: tuple[int | str, ...], raw: Mapping[str, Any]) -> tuple[int | str, ...]:
    place: Any = raw
    kept: list[int | str] = []
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
    message = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    shown = "" if isinstance(given, (dict, list)) else f" (it is {given!r})"
    return f"is wrong: {message[0].lower()}{message[1:]}{shown}"


def _hint(dotted: str, item: Any) -> str:
    key = ".".join(part for part in dotted.split(".") if not part.isdigit())
    if field := _fields().get(key):
        return f"{key}: {field.description}"
    if item["type"] == "missing":
        return 'the smallest recipe is [model] with base = "..." and [[data.train]] with path = "..."'
    return "see the recipe's keys in the README, or `qlora-train --schema`"


def _cross_checks(recipe: Recipe, index: LineIndex) -> list[Problem]:
    """What no single key shows, and keys of [export] that would do nothing; found now, not when training has ended."""
    train, data, lora, export = recipe.train, recipe.data, recipe.lora, recipe.export
    batch, micro = train.batch_size, train.micro_batch_size
    wants_eval_rows = recipe.eval.exact_match_rows or recipe.eval.early_stopping_patience
    rounded_plainly = ("hf", "adapter-gguf", "gguf:f32", "gguf:f16", "gguf:bf16", "gguf:q8_0")
    checks = (
        (
            isinstance(batch, int) and isinstance(micro, int) and batch < micro,
            "train.micro_batch_size",
            f"train.micro_batch_size ({micro}) is more than train.batch_size ({batch})",
            "a step of batch_size rows runs micro_batch_size rows at a time: lower micro_batch_size",
        ),
        (
            wants_eval_rows and not data.eval and data.eval_fraction == 0,
            "data.eval_fraction",
            "[eval] asks for evaluation rows, but data.eval_fraction is 0 and there is no [[data.eval]]",
            "set data.eval_fraction = 0.05 or add [[data.eval]] with a path",
        ),
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
            "adapter-gguf" in export.formats and (lora.use_dora or lora.modules_to_save),
            "export.formats",
            "adapter-gguf cannot hold what lora.use_dora and lora.modules_to_save train",
            'merge it instead: formats = ["gguf:q8_0"]',
        ),
        (
            lora.use_dora and lora.init == "eva",
            "lora.init",
            'lora.init = "eva" and lora.use_dora cannot go together (DoRA starts from the plain LoRA product)',
            "use one of them",
        ),
    )
    return [Problem(index.where(tuple(key.split("."))), what, hint) for wrong, key, what, hint in checks if wrong]


def looks_like_folder(base: str) -> bool:
    """Whether a base's name can only be a path: hub names are `owner/name` or `name`."""
    return base.startswith((".", "/", "~", "\\")) or base.count("/") > 1 or ":" in base or "\\" in base


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the base and the sources that are local as absolute paths, from `folder` on."""
    model, data = recipe.model, recipe.data
    base = Path(model.base).expanduser()
    if looks_like_folder(model.base) or (folder / base).is_dir():
        model = model.model_copy(update={"base": str((folder / base).resolve())})

    def local(source: sections.SourceSection) -> sections.SourceSection:
        if source.path.startswith("hub:"):
            return source
        # Not resolve(): a glob's pattern must stay as it is.
        return source.model_copy(update={"path": str(folder / Path(source.path).expanduser())})

    data = data.model_copy(update={"train": tuple(map(local, data.train)), "eval": tuple(map(local, data.eval))})
    return recipe.model_copy(update={"model": model, "data": data})
