"""`qlora-data` as a user types it: a table, JSON, a page, and two lines for whatever is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.cli import data
from tests.cli.cases import expect_two_lines, run
from tests.report.pages import judged

Answer = tuple[int, str, str]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command in this process, without a terminal."""

    def command(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["qlora-data", *arguments])
        with pytest.raises(SystemExit) as end:
            data.app()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return command


def write(folder: Path, base: Path, rows: str, more: str = "") -> str:
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    recipe = folder / "mine.toml"
    recipe.write_text(f'[model]\nbase = "{base}"\n{more}\n[[data.train]]\npath = "rows.jsonl"\n')
    return str(recipe)


def row(number: int, answer: str = "") -> str:
    turns = [("user", f"What is {number}?"), ("assistant", answer or f"It is {number}, and {'so ' * (number % 9)}on.")]
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


@pytest.fixture
def small(llama: Path, tmp_path: Path) -> Path:
    """A base without weights: its configuration and its tokenizer."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in llama.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_rows_are_shown_without_weights(small: Path, tmp_path: Path, look: Callable[..., Answer]) -> None:
    recipe = write(tmp_path, small, "".join(map(row, range(60))))
    code, out, err = look(recipe, "--rows", "2")
    assert (code, err) == (0, "") and out.count("«It is ") == 2
    assert "rows.jsonl (train)" in out and "data.max_length = " in out and "prompt as served" in out


def test_json_and_page_say_the_same(small: Path, tmp_path: Path, look: Callable[..., Answer]) -> None:
    recipe = write(tmp_path, small, "".join(map(row, range(20))) + "broken\n" + row(1), "[data]\nmax_bad_rows = 1")
    page = tmp_path / "page.html"
    code, out, _ = look(recipe, "--json", "--html", str(page))
    answer = json.loads(out)["rows"]
    assert code == 0 and answer["sources"][0]["rejected"] == 1 and answer["train"]["copies"]["count"] >= 0
    assert answer["sources"][0]["reasons"][0]["examples"] == ["rows.jsonl:21"]
    levels = [one["level"] for one in answer["warnings"]]
    assert levels == sorted(levels, key=("wrong", "harm", "note").index) and all(
        one["fix"] for one in answer["warnings"]
    )
    text = judged(page.read_text(encoding="utf-8")).text
    assert all(one["what"] in text and one["fix"] in text for one in answer["warnings"])
    assert str(tmp_path) not in page.read_text(encoding="utf-8")
    assert look(recipe, "--json", "--html", str(page))[0] == 0  # a page of ours is made anew


def test_documents_are_shown(small: Path, tmp_path: Path, look: Callable[..., Answer]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Lamps\n\nThe lamp costs 7 crowns. It is red.\n")
    (tmp_path / "docs" / "b.txt").write_text("  \n")
    recipe = tmp_path / "docs.toml"
    recipe.write_text(f'[model]\nbase = "{small}"\n[[data.documents]]\npath = "docs"\n')
    code, out, err = look(str(recipe), "--json", "--html", str(tmp_path / "page.html"))
    answer = json.loads(out)
    assert (code, err) == (0, "") and answer["rows"] is None
    (file,) = answer["documents"]["files"]
    assert (file["path"], file["pages"], file["passages"]) == ("docs/a.md", 1, 1) and answer["documents"][
        "sentences"
    ] == 2
    assert "keys and values of" in answer["documents"]["takes"] and "MiB on the disk" in answer["documents"]["takes"]
    assert "a.md" in judged((tmp_path / "page.html").read_text()).text and "b.txt" in answer["documents"]["left_out"][0]


def test_what_is_no_page_of_ours_stays(small: Path, tmp_path: Path, look: Callable[..., Answer]) -> None:
    recipe = write(tmp_path, small, row(1))
    (tmp_path / "thesis.html").write_text("my thesis")
    (tmp_path / "link.html").symlink_to(tmp_path / "thesis.html")
    for name, why in (("thesis.html", "no page of ours"), ("link.html", "a link"), ("no/page.html", "no such folder")):
        code, _, err = look(recipe, "--html", str(tmp_path / name))
        expect_two_lines((code, "", err, 0.0), f"--html: .*{why}")
    assert (tmp_path / "thesis.html").read_text() == "my thesis"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "rows.jsonl: the file is empty"),
        ("broken\n" + row(1), "rows.jsonl:1: "),
        (json.dumps({"chosen": "a", "rejected": "b", "prompt": "c"}) + "\n", "preference rows"),
    ],
)
def test_wrong_rows_end_in_two_lines(
    rows: str, message: str, small: Path, tmp_path: Path, look: Callable[..., Answer]
) -> None:
    code, out, err = look(write(tmp_path, small, rows))
    expect_two_lines((code, out, err, 0.0), message)


def test_a_base_that_is_not_there(tmp_path: Path, look: Callable[..., Answer]) -> None:
    code, out, err = look(write(tmp_path, tmp_path / "none", row(1)))
    expect_two_lines((code, out, err, 0.0), "no config.json")


def test_strangers_text_steers_no_terminal(small: Path, tmp_path: Path, look: Callable[..., Answer]) -> None:
    recipe = write(tmp_path, small, row(1, "\x1b]0;title\x07 [bold]x[/] \u202e 日本語"))
    _, out, _ = look(recipe)
    assert "\x1b" not in out and "\u202e" not in out and "␛]0;title" in out and "[bold]x[/]" in out and "日本語" in out


@pytest.mark.slow
def test_a_console_of_few_letters_and_60_columns(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path, small, row(1, "日本 é " * 60))
    for name, value in (("PYTHONIOENCODING", "ascii"), ("COLUMNS", "60"), ("NO_COLOR", "1"), ("PYTHONUTF8", "0")):
        monkeypatch.setenv(name, value)
    code, out, error, _ = run(recipe, cwd=Path.cwd(), module="data")
    assert code == 0 and not error and "\x1b" not in out and "[??" in out
    assert max(map(len, out.splitlines())) <= 60
