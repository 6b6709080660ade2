"""Conversions of values: exact, or an error that says why."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import pytest

from qlora.importers import values
from qlora.recipe.sections import TrainSection
from tests.importers.cases import draft, imported, told


@pytest.mark.parametrize(
    ("convert", "given", "wanted"),
    [
        (values.number, "2e-4", 2e-4), (values.whole, 3.0, 3), (values.switch, "yes", True), (values.switch, 0, False),
        (values.modules, "all", "all-linear"), (values.modules, "q_proj, v_proj", ["q_proj", "v_proj"]),
        (values.optimizer, "adamw_torch_fused", "adamw"), (values.init, True, "default"), (values.share, 0.1, 0.1),
    ],
)  # fmt: skip
def test_values_are_converted(convert: Callable[[Any], Any], given: Any, wanted: Any) -> None:
    assert convert(given) == wanted


@pytest.mark.parametrize(
    ("convert", "given"),
    [
        (values.number, True), (values.number, "x"), (values.number, None), (values.whole, 1.5), (values.positive, 0),
        (values.switch, 2), (values.switch, "maybe"), (values.share, 100), (values.names, [1]), (values.text, " "),
        (values.optimizer, "muon"), (values.schedule, "rex"), (values.init, "pissa"), (values.whole, 1e300),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error(convert: Callable[[Any], Any], given: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        convert(given)


def test_names_of_ours_exist() -> None:
    fields = TrainSection.model_fields
    assert set(values.OPTIMIZERS.values()) <= set(get_args(fields["optimizer"].annotation))
    assert set(values.SCHEDULES.values()) <= set(get_args(fields["lr_scheduler"].annotation))


@pytest.mark.parametrize(
    ("steps", "max_steps", "ratio"), [(10, 100, 0.1), (0, None, 0.0), (0.05, None, 0.05), (9, None, None)]
)
def test_steps_of_warmup_are_a_part_of_known_steps(steps: float, max_steps: int | None, ratio: float | None) -> None:
    made = draft()
    if max_steps:
        made.values["train.max_steps"] = max_steps
    values.warmup_steps(made, "warmup_steps", steps)
    assert made.values.get("train.warmup_ratio") == ratio


@pytest.mark.parametrize(
    ("keys", "ratio"),
    [
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, 0.1),
        ({"warmup_steps": 20, "warmup_ratio": 0.1, "max_steps": 100}, 0.2),
        ({"warmup_steps": 20, "warmup_ratio": 0.1}, None),  # steps of unknown many: told, and no ratio instead
        ({"warmup_steps": "x", "warmup_ratio": 0.1}, 0.1),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, 0.0),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5, "max_steps": 50}, 0.0),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}, 0.1),
    ],
)
def test_what_decides_the_warmup_does_not_hang_on_the_order(
    tmp_path: Path, keys: dict[str, Any], ratio: float | None
) -> None:
    for order in permutations(keys):
        text = "".join(f"{key}: {keys[key]}\n" for key in order)
        found = imported(tmp_path, f"model_name_or_path: a/b\ndataset_name: a/c\nmax_length: 9\n{text}")
        assert found.table["train"].get("warmup_ratio") == ratio, order
        assert set(keys) <= told(found)
        assert sum("train.warmup_ratio = " in account.said for account in found.accounts) <= 1
