"""The recipe: TOML, read once into frozen sections that mirror the modules. No torch here.

Every key is declared once, with its default, its bounds and the sentence that editors and `--schema` show.
Every problem of a recipe is found before any is reported, each with its line (see `recipe_text.py`).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qlora.errors import Problem, RecipeError
from qlora.recipe_text import LineIndex, apply_override, explain_unknown_key, toml_problem

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]

# What [export] formats may name. The quants are those of qlora.export.gguf.mix (a test compares the two).
GGUF_QUANTS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m", "iq4_xs")
EXPORT_FORMATS = ("hf", "adapter-gguf", *(f"gguf:{quant}" for quant in GGUF_QUANTS))

SOURCE_FORMATS = ("auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelSection(Section):
    """The frozen base."""

    base: str = Field(min_length=1, description="Hub name (owner/name) or folder of the base model")
    revision: str = Field("main", min_length=1, description="Hub branch, tag or commit; the run records the commit")
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="auto is sdpa, but eager for Gemma 2, whose softcap sdpa lacks"
    )


class QuantizationSection(Section):
    """How the frozen base is held."""

    type: Literal["nf4", "fp4", "none"] = Field("nf4", description="4-bit data type; none keeps bf16")
    double_quant: bool = Field(True, description="Quantize the block constants too: saves 0.37 bits a weight")


class LoraSection(Section):
    """The trained low-rank matrices."""

    r: Positive = Field(16, description="Rank")
    alpha: float = Field(32.0, gt=0, description="Scale: the adapter's output is multiplied by alpha / r")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="all-linear (every linear layer but the head) or a list of module names"
    )
    init: Literal["default", "gaussian", "eva"] = Field(
        "default", description="Start of the A matrices; eva takes them from the data's activations"
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = Field(False, description="Train a magnitude per output row as well (slower)")
    modules_to_save: tuple[str, ...] = Field((), description="Modules trained and saved whole, such as lm_head")


class SourceSection(Section):
    """One source of rows."""

    path: str = Field(min_length=1, description="File, glob, folder, or hub:NAME[@revision][:split]")
    format: Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text"] = Field(
        "auto", description="How a row is read; auto tells by the columns"
    )
    weight: float = Field(1.0, gt=0, le=100, description="Times each row is seen in an epoch; 0.5 draws half of them")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Your column's name by the format's own: {instruction = 'question'}"
    )


class DataSection(Section):
    """What the model learns from."""

    train: tuple[SourceSection, ...] = Field((), description="Training sources")
    eval: tuple[SourceSection, ...] = Field(
        (), description="Evaluation sources; without them eval_fraction is held out"
    )
    max_length: int = Field(2048, ge=16, le=1 << 20, description="Longest row, and length of a pack, in tokens")
    packing: bool = Field(True, description="Several short documents share a row, isolated from each other")
    loss_on: Literal["assistant", "all"] = Field("assistant", description="Which tokens are trained")
    eval_fraction: Share = Field(0.05, description="Share of the training rows held out when there is no [[data.eval]]")
    truncation: Literal["drop", "cut", "error"] = Field("drop", description="What becomes of rows over max_length")
    max_bad_rows: Count = Field(0, description="Broken rows to leave out before giving up")


class TrainSection(Section):
    """The optimization."""

    epochs: float | None = Field(None, gt=0, description="Passes over the training rows (3 unless max_steps is given)")
    max_steps: Positive | None = Field(None, description="Optimizer steps, instead of epochs")
    max_minutes: float | None = Field(None, gt=0, description="Time limit; the schedule ends with it")
    batch_size: Positive | Literal["auto"] = Field(
        "auto", description="Rows (packs when packing) per optimizer step; auto: up to 16, leaving at least 100 steps"
    )
    micro_batch_size: Positive | Literal["auto"] = Field(
        1, description="Rows per forward pass; auto: the fastest that fits in memory.limit"
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field("cosine", description="Course after the warm-up")
    warmup_ratio: Share = Field(0.03, description="Share of the steps that ramp the rate up from 0")
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw", "lion_8bit"] = Field(
        "paged_adamw_8bit", description="Paged ones keep their state where the driver can move it to host memory"
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay of the adapters")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0 is off")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        True, description="Recompute activations in the backward pass to save memory; auto: only when it must be"
    )
    neftune_alpha: float = Field(0.0, ge=0, description="Noise on the embeddings while training (5 is usual); 0 is off")
    seed: int = Field(42, ge=0, lt=1 << 32, description="Decides order, split, initial adapters and dropout")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps both set the length of the run: give one of them")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 3.0)  # frozen for callers, not while it is made
        return self


class MemorySection(Section):
    """How much memory a run may take."""

    limit: str = Field("auto", description="auto: what the GPU has free (without one: available RAM); or a size: 6GiB")

    @field_validator("limit")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if value != "auto" and parse_bytes(value) is None:
            raise ValueError('a size such as "6GiB" or "7.5 GiB", or "auto"')
        return value


class CheckpointSection(Section):
    """What a killed run continues from."""

    every_steps: Positive = Field(50, description="Optimizer steps between checkpoints")
    every_minutes: float = Field(10.0, gt=0, description="... or minutes, whichever comes first")
    keep: Positive = Field(2, description="Checkpoints kept")


class EvalSection(Section):
    """What is measured on the evaluation rows."""

    every_steps: Positive = Field(50, description="Optimizer steps between evaluations (one more at the end)")
    early_stopping_patience: Count = Field(0, description="Evaluations without improvement before stopping; 0 is off")
    samples: Count = Field(3, description="Evaluation prompts answered by base and tuned model, side by side")
    exact_match_rows: Count = Field(0, description="Evaluation rows answered greedily and compared, before and after")


class ReportSection(Section):
    """Where events go."""

    sinks: tuple[Literal["console", "jsonl"], ...] = Field(
        ("console", "jsonl"), description="console draws, jsonl keeps events.jsonl in the run's folder"
    )


class ExportSection(Section):
    """What is made of the adapter when training ends."""

    formats: tuple[str, ...] = Field(
        (),
        description="hf (safetensors), gguf:q4_k_m and its like, adapter-gguf; each a folder in <run>/export",
        json_schema_extra={"items": {"type": "string", "enum": list(EXPORT_FORMATS)}},
    )
    base: Literal["auto", "nf4", "full"] = Field(
        "auto", description="Merge into the dequantized base, the original weights, or whichever is measured nearer"
    )
    max_kl: float | None = Field(None, gt=0, description="Mean KL in nats beyond which an export is an error")
    imatrix: bool = Field(False, description="Weigh the errors of K- and IQ-quants by your rows' activations")

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        for name in formats:
            if name not in EXPORT_FORMATS:
                near = difflib.get_close_matches(name, EXPORT_FORMATS, 1, 0.4)
                meant = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(EXPORT_FORMATS)}"
                raise ValueError(f"unknown format {name!r}{meant}")
        return formats


class OutputSection(Section):
    """Where the run's folder is made."""

    dir: str = Field("runs", min_length=1, description="Parent of the run's folder; relative to the current folder")


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


def parse_bytes(text: str) -> int | None:
    """ "6GiB", "7.5 GiB", "8GB", "900MiB" as bytes; None for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if match is None:
        return None
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


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
