"""The recipe: TOML, read once into frozen sections that mirror the modules. No torch here.

The keys stand in `recipe_sections.py`. Every problem of a recipe is found before any is reported, each with its line
(see `recipe_text.py`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from qlora.errors import Problem, RecipeError
from qlora.recipe.problems import LineIndex, apply_override, explain_unknown_key, toml_problem
from qlora.recipe.sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    ExportSection,
    LoraSection,
    MemorySection,
    ModelSection,
    OutputSection,
    QuantizationSection,
    ReportSection,
    Section,
    SourceSection,
    TrainSection,
)


class Recipe(Section):
    """A whole recipe. `[model]` alone is enough to look at memory; training needs `[[data.train]]` too."""

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    memory: MemorySection = MemorySection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    report: ReportSection = ReportSection()
    export: ExportSection = ExportSection()
    output: OutputSection = OutputSection()

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
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += _problems(error, raw, index)
    if recipe is not None:
        problems += _cross_checks(recipe, index)
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def recipe_toml(recipe: Recipe, header: str = "") -> str:
    """The recipe with every default written out, as TOML that reads back to an equal recipe."""
    body = tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
    return header + body


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
    return [name for name, _ in _walk_keys()]


def _walk_keys() -> Iterator[tuple[str, Any]]:
    for table, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        for key, entry in section.model_fields.items():
            if table == "data" and key in ("train", "eval"):
                for inner, inner_entry in SourceSection.model_fields.items():
                    yield f"data.{key}.{inner}", inner_entry
            else:
                yield f"{table}.{key}", entry


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
    generic = ".".join(part for part in dotted.split(".") if not part.isdigit())
    for name, field in _walk_keys():
        if name == generic and field.description:
            return f"{generic}: {field.description}"
    if item["type"] == "missing":
        return 'the smallest recipe is [model] with base = "..." and [[data.train]] with path = "..."'
    return "see the recipe's keys in the README, or `qlora-train --schema`"


def _cross_checks(recipe: Recipe, index: LineIndex) -> list[Problem]:
    """What no single key can tell. Reported together with nothing else, since all keys are right by themselves."""
    problems = []
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch_size
    if isinstance(batch, int) and isinstance(micro, int) and batch < micro:
        problems.append(
            Problem(
                index.where(("train", "micro_batch_size")),
                f"train.micro_batch_size ({micro}) is more than train.batch_size ({batch})",
                "a step of batch_size rows runs micro_batch_size rows at a time: lower micro_batch_size",
            )
        )
    wants_eval_rows = recipe.eval.exact_match_rows or recipe.eval.early_stopping_patience
    if wants_eval_rows and not recipe.data.eval and recipe.data.eval_fraction == 0:
        problems.append(
            Problem(
                index.where(("data", "eval_fraction")),
                "[eval] asks for evaluation rows, but data.eval_fraction is 0 and there is no [[data.eval]]",
                "set data.eval_fraction = 0.05 or add [[data.eval]] with a path",
            )
        )
    problems += _export_checks(recipe.export, index)
    if "adapter-gguf" in recipe.export.formats and (recipe.lora.use_dora or recipe.lora.modules_to_save):
        problems.append(
            Problem(
                index.where(("export", "formats")),
                "adapter-gguf cannot hold what lora.use_dora and lora.modules_to_save train",
                'merge it instead: formats = ["gguf:q8_0"]',
            )
        )
    if recipe.lora.use_dora and recipe.lora.init == "eva":
        problems.append(
            Problem(
                index.where(("lora", "init")),
                'lora.init = "eva" and lora.use_dora cannot go together (DoRA starts from the plain LoRA product)',
                "use one of them",
            )
        )
    return problems


def _export_checks(export: ExportSection, index: LineIndex) -> list[Problem]:
    """Keys of [export] that would do nothing: found now, not when training has ended."""
    problems = []
    plain = ("hf", "adapter-gguf", "gguf:f32", "gguf:f16", "gguf:bf16", "gguf:q8_0")
    if export.imatrix and all(name in plain for name in export.formats):
        what = "export.imatrix weighs the rounding of K- and IQ-quants, and export.formats names none"
        problems.append(Problem(index.where(("export", "imatrix")), what, 'add "gguf:q4_k_m", say, or take it out'))
    if export.max_kl is not None and not set(export.formats) - {"adapter-gguf"}:
        what = "export.max_kl is for merged models, and export.formats names none"
        problems.append(Problem(index.where(("export", "max_kl")), what, 'add "hf" or "gguf:q8_0", or take it out'))
    return problems


def looks_like_folder(base: str) -> bool:
    """Whether a base's name can only be a path: hub names are `owner/name` or `name`."""
    return base.startswith((".", "/", "~", "\\")) or base.count("/") > 1 or ":" in base or "\\" in base


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    base = Path(recipe.model.base).expanduser()
    if looks_like_folder(recipe.model.base) or (folder / base).is_dir():
        recipe = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"base": str((folder / base).resolve())})}
        )

    def source(section: SourceSection) -> SourceSection:
        if section.path.startswith("hub:"):
            return section
        # Not resolve(): a glob's pattern must stay as it is.
        path = folder / Path(section.path).expanduser()
        return section.model_copy(update={"path": str(path)})

    data = recipe.data.model_copy(
        update={"train": tuple(map(source, recipe.data.train)), "eval": tuple(map(source, recipe.data.eval))}
    )
    return recipe.model_copy(update={"data": data})
