"""What a README.md says of a folder's files: nothing new where their names say the same, else it is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.data.hub_rows import localize
from qlora.data.sources import read_rows
from qlora.errors import DataError
from qlora.events import Notice, Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.cases import lines

SPLIT = (
    "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n  - split: test\n    path: {}\n"
)
SORTED = (  # as a writer that sorts the keys has it
    "configs:\n  - data_files:\n      - path:\n          - {}\n        split: train\n"
    "      - path: {}\n        split: test\n    config_name: default\n  - data_files: gone.jsonl\n    config_name: a\n"
)


def folder_of(folder: Path, card: str, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(lines([{"text": name}]))
    (folder / "README.md").write_text(card)
    return folder


def trained(folder: Path) -> list[str]:
    found = localize(DataSection(train=(SourceSection(path=str(folder)),)), Recorder()).local
    return [row.row["text"] for row in read_rows(found.train[0]) if isinstance(row.row, dict)]


@pytest.mark.parametrize(
    ("card", "names"),
    [
        (SPLIT.format("data/train-*", "data/test-*"), ["data/test-0.jsonl", "data/train-0.jsonl"]),
        (SPLIT.format('"train.jsonl"', "'test.jsonl'  # held back"), ["test.jsonl", "train.jsonl"]),
        ('configs:\n- config_name: default\n  data_files: "*.jsonl"\n', ["a.jsonl", "b.jsonl"]),
        ("configs:\n  - config_name: all\n    data_files:\n      - a.jsonl\n      - b.jsonl\n", ["a.jsonl", "b.jsonl"]),
        (
            "configs:\n- config_name: x\n  data_files:\n  - split: full\n    path: [a.jsonl, b.jsonl]\n",
            ["a.jsonl", "b.jsonl"],
        ),
        (
            f"{SPLIT.format('train.jsonl', 'dev.jsonl')}  - split: eval\n    path: eval.jsonl\n".replace("test", "dev"),
            ["dev.jsonl", "eval.jsonl", "train.jsonl"],
        ),
        (SPLIT.format("full.jsonl", "test.jsonl").replace("train", "full"), ["full.jsonl", "test.jsonl"]),
        (
            SPLIT.format("train_sft-*", "test_sft-*").replace("train\n", "train_sft\n").replace("test\n", "test_sft\n"),
            ["test_sft-0.jsonl", "train_sft-0.jsonl"],
        ),
        (SORTED.format("train.jsonl", "test.jsonl"), ["test.jsonl", "train.jsonl"]),
        ("configs:\n- config_name: en\n  data_files: x.jsonl\n- config_name: de\n  data_files: b.jsonl\n", ["b.jsonl"]),
        ("configs:\n- config_name: en\n  data_dir: en\n- config_name: de\n  data_dir: de\n", ["en/a.jsonl"]),
        (
            SPLIT.format("train*", "test*").replace("  data_files", "  data_dir: ./data/\n  data_files"),
            ["data/test.jsonl", "data/train.jsonl"],
        ),
        (
            "configs:\n- config_name: en\n  data_files: a.jsonl\n- config_name: all\n  default: True\n"
            '  data_files: "{a,{b,c}}.{json,json}{l,}"\n',
            ["a.jsonl", "b.jsonl", "c.jsonl"],
        ),
        ("license: mit\n", ["a.jsonl", "test.jsonl"]),
        ("configs: &a [*a, *a]\n", ["a.jsonl"]),
        ("dataset_info:\n- config_name: en\n  splits:\n  - name: train\n- config_name: de\n", ["a.jsonl"]),
        ("configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: gone/*\n", ["a.jsonl"]),
    ],
)
def test_a_card_that_says_what_the_names_say(card: str, names: list[str], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", f"---\n{card}---\n# Rows\n", *names)
    held_back = ("test", "dev", "eval")
    assert trained(folder) == [name for name in names if not any(word in name for word in held_back)]


@pytest.mark.parametrize(
    ("card", "what", "hint"),
    [
        (SPLIT.format("a.jsonl", "b.jsonl"), "train is a.jsonl, test is b.jsonl", 'path = "rows/a.jsonl"'),
        (SPLIT.format("a.jsonl", "b.jsonl").replace("train", "eng"), "eng is a.jsonl", 'path = "rows/a.jsonl"'),
        (SPLIT.format("test/*.jsonl", "*.jsonl"), "train is test/*.jsonl", 'path = "rows/test/*.jsonl"'),
        (
            "configs:\n- config_name: en\n  data_files: a.jsonl\n- config_name: de\n  data_files: b.jsonl\n",
            "the files are 2 sets: en, de",
            'path = "rows/a.jsonl"',
        ),
        ("configs:\n- data_files: '{a,c}.jsonl'\n", "train is a.jsonl", 'path = "rows/a.jsonl"'),
        ("configs:\n- data_files: ['{a,c}.jsonl', x]\n", "train is a.jsonl", 'path = "rows/a.jsonl"'),
        ("configs:\n- data_dir: test\n  data_files: c.*\n", "train is c.*", 'path = "rows/test/c.*"'),
        ("configs:\n- data_dir: test\n", "they are those in test", 'path = "rows/test"'),
        (SORTED.format("a.jsonl", "b.jsonl"), "train is a.jsonl, test is b.jsonl", 'path = "rows/a.jsonl"'),
        (
            "configs:\n- config_name: en\n  data_dir: en\n- config_name: de\n  data_dir: de\n",
            "2 sets",
            'path = "rows/en"',
        ),
        (
            "configs:\n- data_files: a.jsonl\n- config_name: de\n  default: true\n  data_files: b.jsonl\n",
            "otherwise than their names do: train is b.jsonl",
            'path = "rows/b.jsonl"',
        ),
    ],
)
def test_a_card_that_says_otherwise_is_refused(card: str, what: str, hint: str, tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "rows", f"---\n{card}---\n", "a.jsonl", "b.jsonl", "test/c.jsonl", "en/d.jsonl", "de/e.jsonl"
    )
    for section in ("train", "eval"):
        sources = {
            "train": (SourceSection(path=str(tmp_path / "x.jsonl")),),
            section: (SourceSection(path=str(folder)),),
        }
        with pytest.raises(DataError) as caught:
            localize(DataSection(**sources), Recorder())
        assert what in caught.value.what and hint in caught.value.hint
    assert len(list(read_rows(SourceSection(path=f"{folder}/*.jsonl")))) == 2


@pytest.mark.parametrize("split", ["test", "validation", "eval", "test_sft"])
def test_what_the_card_calls_a_test_is_not_trained(split: str, tmp_path: Path) -> None:
    card = f"---\nconfigs:\n- data_files:\n  - split: {split}\n    path: '*.jsonl'\n---\n"
    with pytest.raises(DataError, match=rf"otherwise than their names do: {split} is \*\.jsonl"):
        trained(folder_of(tmp_path / "rows", card, "a.jsonl", "b.jsonl"))


def test_a_card_is_bounded_and_no_link(tmp_path: Path) -> None:
    braces = f"---\nconfigs:\n- data_files: '{'{a,b}' * 1_000}'\n---\n"
    assert trained(folder_of(tmp_path / "braces", braces, "a.jsonl")) == ["a.jsonl"]
    card = f"---\n{SPLIT.format('a.jsonl', 'b.jsonl')}---\n"
    folder = folder_of(tmp_path / "rows", card + "x" * (1 << 20), "a.jsonl", "b.jsonl")
    assert trained(folder) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "card.md").write_text(card)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "card.md")
    assert trained(folder) == ["a.jsonl", "b.jsonl"]


def test_a_saved_dictionary_without_a_split_is_said(tmp_path: Path) -> None:
    import datasets

    sets = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("english", "german")}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "dict")
    sink = Recorder()
    localize(DataSection(train=(SourceSection(path=str(tmp_path / "dict")),)), sink)
    (notice,) = [event for event in sink.events if isinstance(event, Notice)]
    assert notice.topic == "split" and notice.count == 2
    assert notice.message == (
        "dict: 2 sets of rows, none of which is called train, are all taken: english, german "
        '(path = "dict:english" names one)'
    )
    assert [row.row for row in read_rows(SourceSection(path=f"{tmp_path / 'dict'}:english"))] == [{"text": "english"}]
    datasets.DatasetDict({"rows": sets["german"]}).save_to_disk(tmp_path / "one")
    quiet = Recorder()
    localize(DataSection(train=(SourceSection(path=str(tmp_path / "one")),)), quiet)
    assert not quiet.events
