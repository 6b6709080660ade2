"""recipes/README.md is what `qlora-train --keys` prints, and says what is true of recipes, formats and options."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qlora.cli import data, doctor, estimate, exam, export, train
from qlora.cli.keys import page
from qlora.data.column_words import FORMAT_COLUMNS
from qlora.recipe.reading import key_names

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "recipes"
COMMANDS = {"qlora-train": train.train, "qlora-export": export.export, "qlora-estimate": estimate.estimate}
COMMANDS |= {"qlora-data": data.data, "qlora-exam": exam.exam, "qlora-doctor": doctor.doctor}


def test_the_shipped_page_is_the_current_one() -> None:
    """After a change of a key or an option: qlora-train --keys > recipes/README.md"""
    code = (
        "import sys\nsys.argv = ['qlora-train', '--keys']\nfrom qlora.cli.train import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (RECIPES / "README.md").read_text(encoding="utf-8")


def test_every_key_stands_in_the_table_of_its_section() -> None:
    tables = dict(re.findall(r"### (.+)\n([^#]+)", page(COMMANDS)))
    for name in key_names():
        section, _, key = name.rpartition(".")
        sources = "`[[data.train]]`, `[[data.eval]]`"
        double = sources if section in ("data.train", "data.eval") else f"`[[{section.replace('own', 'questions')}]]`"
        title = f"`[{section}]`" if "." not in section else double
        assert f"| `{key}` |" in tables[title], name


def test_every_row_has_three_cells_and_a_meaning() -> None:
    for line in page(COMMANDS).splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) in (2, 3) and cells[-1], line


def test_every_option_is_there() -> None:
    text = page(COMMANDS)
    for command in ("train", "export", "estimate", "data", "exam"):
        shown = subprocess.run(
            [sys.executable, "-m", f"qlora.cli.{command}", "--help"], capture_output=True, text=True, cwd=ROOT
        ).stdout
        for option in re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE):
            assert option == "--help" or f"| `{option}" in text, option


def test_every_format_of_rows_and_every_recipe_is_listed() -> None:
    text = page(COMMANDS)
    for name in FORMAT_COLUMNS:
        assert f"| `{name}` |" in text
    for file in RECIPES.glob("*.toml"):
        assert f"`{file.name}`" in text
        base = tomllib.loads(file.read_text())["model"]["base"]
        words = re.sub(r"^Meta-", "", base.split("/")[-1]).replace("-", " ").lower()
        assert base in ("quickstart/base", "manuals/base") or words in text.replace("-", " ").lower(), base


@pytest.mark.parametrize("text", ["<run>/export", "a | b"])
def test_what_looks_like_markup_stays_text(text: str) -> None:
    from qlora.cli import keys

    assert keys._text(text) == text.replace("<", "\\<").replace("|", "\\|")
    assert keys._text(f"`{text}`".replace("|", "/")) == f"`{text}`".replace("|", "/")
