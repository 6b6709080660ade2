"""What every table of a recipe is made of."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from qlora.recipe_values import Section, Share, Text


class Table(Section):
    share: Share = 0.5
    text: Text = "x"


@pytest.mark.parametrize(
    "values", [{"share": 1.0}, {"share": float("nan")}, {"text": "a\0b"}, {"text": ""}, {"other": 1}]
)
def test_what_no_table_may_hold(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Table.model_validate(values)


def test_a_table_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Table().share = 0.1  # type: ignore[misc]
