"""What every table of a recipe is made of: the base class of its sections, and kinds of values with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def without_nul(text: str) -> str:
    """The text. Raises ValueError for one that no path or prompt may hold."""
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


def once_each(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names. Raises ValueError where one stands twice."""
    if len(set(names)) < len(names):
        raise ValueError("names one of them twice")
    return names


def or_auto(annotation: Any) -> str:
    """'true, false or "auto": ' before what a key says of itself, where that is what it takes; "" for others."""
    return 'true, false or "auto": ' if {*get_args(annotation)} == {bool, Literal["auto"]} else ""


# Bounds are far beyond any use: they keep what a recipe can ask for from filling the memory before it is refused.
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Rows = Annotated[int, Field(ge=1, le=65_536)]
Minutes = Annotated[float, Field(gt=0, le=1_000_000)]  # two years
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(without_nul)]
Names = Annotated[tuple[Text, ...], Field(max_length=4096)]
Name = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SinkName = Literal["console", "jsonl", "html", "tensorboard", "wandb", "mlflow", "trackio"]
Sinks = Annotated[tuple[SinkName, ...], Field(max_length=7), AfterValidator(once_each)]
MAX_MEMORY = 1 << 50


class Section(BaseModel):
    """A table: frozen, and of no other keys than its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, serialize_by_alias=True)
