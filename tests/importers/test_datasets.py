"""Sources of rows: what is here is a path, what is not is the hub's or is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.importers import datasets
from tests.importers.cases import draft, left


def test_a_path_that_is_here_is_local_and_a_name_is_the_hubs(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "rows").mkdir()
    made = draft(tmp_path)
    assert datasets.source(made, "d", "owner/rows")["path"] == str(tmp_path / "owner/rows")
    assert datasets.source(made, "d", "owner/rows", "validation")["path"] == f"{tmp_path / 'owner/rows'}:validation"
    assert datasets.source(made, "d", "owner/other", "train", "v2")["path"] == "hub:owner/other@v2:train"
    assert not left(made)
    assert datasets.source(made, "d", "gone.jsonl")["path"] == "gone.jsonl"
    assert datasets.source(made, "d", "a/b", "train[:10%]")["path"] == "hub:a/b:train"
    assert set(left(made)) == {"d.path", "d.split"}


@pytest.mark.parametrize(
    ("entry", "table", "lost"),
    [
        ({"path": "a/b", "type": "chat_template"}, {"format": "messages"}, set()),
        ({"path": "a/b", "type": "sharegpt"}, {"format": "sharegpt"}, set()),
        ({"path": "a/b", "type": "sharegpt", "field_messages": "dialog"},
         {"format": "sharegpt", "columns": {"conversations": "dialog"}}, set()),
        ({"path": "a/b", "type": "chat_template", "message_field_role": "from", "message_field_content": "value"},
         {"format": "sharegpt", "columns": {"conversations": "messages"}}, set()),
        ({"path": "a/b", "type": "alpaca:phi"}, {"format": "alpaca"}, {"datasets.type"}),
        ({"path": "a/b", "type": "jeopardy"}, {}, {"datasets.type"}),
        ({"path": "a/b", "type": {"field_instruction": "q", "field_output": "a", "format": "{instruction}"}},
         {"format": "alpaca", "columns": {"instruction": "q", "output": "a"}}, {"datasets.type"}),
        ({"path": "a/b", "type": "completion", "shards": 4, "name": "en"}, {"format": "text"},
         {"datasets.shards", "datasets.name"}),
        ({"path": "a/b", "type": "chat_template", "message_property_mappings": {"role": "who", "content": "what"}}, {},
         {"datasets.message_property_mappings"}),
        ({"path": "a/b", "type": "chat_template", "roles_to_train": ["user"]}, {"format": "messages"},
         {"datasets.roles_to_train"}),
    ],
)  # fmt: skip
def test_axolotls_entries(entry: dict[str, object], table: dict[str, object], lost: set[str]) -> None:
    made = draft()
    datasets.axolotl(made, "datasets", [entry])
    assert made.sources == [{"path": "hub:a/b", **table}] and set(left(made)) == lost


def test_entries_without_a_path_are_said() -> None:
    made = draft()
    datasets.axolotl(made, "datasets", [{"type": "alpaca"}, 3, "a/b"])
    assert len(made.sources) == 1 and set(left(made)) == {"datasets.0", "datasets.1", "datasets.2.type"}


def test_an_adapter_to_begin_with_is_one_that_is_here(tmp_path: Path) -> None:
    made = draft(tmp_path)
    for value in ("before", 3, "gone"):
        (tmp_path / "before").mkdir(exist_ok=True)
        datasets.adapter(made, f"k{value}", value)
    assert made.values == {"lora.from": str(tmp_path / "before")} and set(left(made)) == {"k3", "kgone"}
