"""Which trainer a file is of, and that nothing of it is lost or guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import UserError
from qlora.importers import read as reading
from qlora.importers.draft import Draft
from tests.importers.cases import imported, left, recipe_of, told


@pytest.mark.parametrize(
    "text",
    [
        "", "a: 1", "model: a/b", "compute_environment: LOCAL\nnum_processes: 2\n",
        "base_model: x\nmodel_name_or_path: y\n", "- 1", "base_model: !!python/name:os.system x",
    ],
)  # fmt: skip
def test_an_unknown_file_is_refused_in_two_lines(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as error:
        imported(tmp_path, text)
    assert "theirs.yml" in error.value.what and "YAML or JSON" in error.value.hint and "\n" not in error.value.what


def test_a_base_is_needed_and_one_that_is_here_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no base"):
        imported(tmp_path, "sequence_len: 5\nadapter: lora\nnum_epochs: 1\n")
    (tmp_path / "base").mkdir()
    found = imported(tmp_path, "base_model: base\nsequence_len: 64\nadapter: lora\n")
    assert recipe_of(found).model.base == str(tmp_path / "base")


def test_very_many_keys_are_counted(tmp_path: Path) -> None:
    keys = "".join(f"key{n}: {n}\n" for n in range(600))
    found = imported(tmp_path, f"base_model: a/b\nsequence_len: 64\nadapter: lora\n{keys}")
    assert len(found.accounts) < 560 and any("more keys" in key for key in left(found))


def test_every_rule_of_every_trainer_stands_any_value(tmp_path: Path) -> None:
    """Whatever a key holds, it is carried, ours or left: no rule ends in a fault, and no value makes a bad recipe."""
    values: list[object] = [True, False, 0, -3, 7, 1.5, 1e300, "", "x", "a/b", "1e-4", [], ["q"], [1], {}, {"a": 1}]
    values += [[{"path": "a/b"}], [{"path": 3}], [[]], "\x1b[31m", "none", "train", 10**400]
    for trainer in reading.TRAINERS:
        base = next(key for key in ("base_model", "model_name_or_path", "model") if key in trainer.rules)
        for key in trainer.rules:
            for value in values:
                draft = Draft(trainer.name, tmp_path)
                table = {base: "a/b", key: value} if key != base else {base: "a/b"}
                try:
                    reading._account(draft, trainer, table)
                    reading._checked(draft)
                except UserError as error:
                    assert "another goal" in error.what or "base" in error.what, (trainer.name, key, value)
                    continue
                assert any(one == key or one.startswith(f"{key}.") for one in told(draft)), (trainer.name, key, value)
