"""Model cards, export.json and Modelfile: their metadata is YAML whatever a folder is called, and no path leaves."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from qlora import shown
from qlora.events import Recorder
from qlora.export import ollama
from qlora.export.cards import adapter_card, fenced, file_name, merged_card, without_tags
from qlora.model.resolve import resolve
from qlora.recipe.reading import recipe_of_base
from tests.export.cases import KINDS, merge_of, trained
from tests.families import make_base
from tests.runs import run_dir, train, write_recipe

ODD = "x: y #1"


def metadata(card: str) -> dict[str, Any]:
    opening, header, _ = card.split("---\n", 2)
    assert opening == ""
    return dict(yaml.safe_load(header))


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("bases") / ODD)


def test_a_base_in_a_folder_with_yamls_own_signs_is_named_by_every_card(tmp_path: Path, odd_base: Path) -> None:
    base = resolve(str(odd_base), "main", Recorder())
    card = adapter_card(base, recipe_of_base(str(odd_base)), {"optimizer steps": "3"})
    assert metadata(card) == {"base_model": ODD, "library_name": "peft", "tags": ["lora", "qlora"]}
    assert f"# LoRA adapter for {ODD}" in card and "| revision | a local folder |\n| optimizer steps | 3 |\n" in card
    trained(odd_base, tmp_path / "adapter", KINDS["plain"])
    card = merged_card(merge_of(odd_base, tmp_path / "adapter"), "")
    assert metadata(card) == {"base_model": ODD, "library_name": "transformers", "tags": ["qlora", "merged"]}


NASTY = (
    *(
        ODD,
        "- a",
        '"q"',
        "'",
        "---",
        "a\n---\nb: c",
        "{a: b}",
        "*a",
        "&a",
        "!!python/name:os.system",
        "null",
        "1.0",
        "~",
    ),
    *(
        "a | b",
        "`c`",
        "```",
        "~~~",
        "<script>alert(1)</script>",
        "[x](javascript:alert(1))",
        "![i](http://t/p.png)",
        "_a_",
    ),
    *(
        "&lt;b&gt;",
        "$(touch x)",
        "; touch x",
        "\x1b]0;t\x07",
        "\x85\u2028x",
        "\u202ereversed",
        "%",
        "@a",
        "a\\",
        "---\n",
    ),
)


class Page(HTMLParser):
    """What a page of Markdown holds, once it is HTML: its tags, and the text that is seen."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.seen = ""
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag: str, _attributes: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.seen += data


@pytest.mark.parametrize("name", NASTY)
def test_a_base_of_any_name_is_text_in_a_card(llama: Path, name: str) -> None:
    base = replace(resolve(str(llama), "main", Recorder()), name=name, commit="ab12")
    card = adapter_card(base, recipe_of_base("meta/tiny"), {"optimizer steps": "3"})
    shown_as = shown.one_line(name)
    assert metadata(card)["base_model"] == shown_as
    page = Page(card.split("---\n", 2)[2])
    assert page.tags <= {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}
    assert f"base\n{shown_as.strip()}\n" in page.seen and "optimizer steps\n3\n" in page.seen
    assert not any(unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") for letter in card.replace("\n", ""))


def test_a_recipe_cannot_leave_its_block(llama: Path) -> None:
    base = resolve(str(llama), "main", Recorder())
    recipe = recipe_of_base("meta/tiny", ['model.revision="a```b````<script>"'])
    page = Page(adapter_card(base, recipe, {}).split("---\n", 2)[2])
    assert "script" not in page.tags and "a```b````<script>" in page.seen
    assert fenced("```\n<script>", "toml").startswith("````toml\n") and fenced("x", "").startswith("```\n")


def test_html_of_an_adapters_card_is_text_in_the_merged_ones() -> None:
    text = "<script>a</script> `<b>` </div>\n```\n<i>\n```\n<!-- c --> 1 < 2 <\n~~~~\n```\n<u>\n"
    written = without_tags(text)
    assert written == (
        "&lt;script>a&lt;/script> `<b>` &lt;/div>\n```\n<i>\n```\n&lt;!-- c --> 1 < 2 <\n~~~~\n```\n<u>\n\n~~~~"
    )
    assert Page(written).tags <= {"p", "code", "pre"}


@pytest.mark.parametrize("name", NASTY)
def test_a_file_has_a_name_that_shells_and_modelfiles_hold(name: str) -> None:
    file = f"{file_name(name)}-q8_0.gguf"
    assert not re.search(r"[\\/\"'`$\x00-\x1f\x7f-\x9f]", file) and not file.startswith("-")
    text = ollama.modelfile(ollama.OllamaModel(name, file, (), None, adapter=file))
    found = [line for line in text.splitlines() if line.startswith(("FROM", "ADAPTER"))]
    assert [line.split(" ", 1)[1].strip('"') for line in found] == [f"./{file}"] * 2


def test_a_merged_card_has_the_adapters_own_text_below_the_measurement(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    (tmp_path / "adapter" / "README.md").write_text("---\nlibrary_name: peft\n---\n# Trained on lamps\n\n---\n\nrule\n")
    merge = merge_of(llama, tmp_path / "adapter")
    card = merged_card(merge, "## Fidelity\n\n| a | b |")
    assert "its original weights, and 14 trained modules" in card
    assert card.index("## Fidelity") < card.index("# Trained on lamps") < card.index("---\n\nrule")
    assert "library_name: peft" not in card and "Fidelity" not in merged_card(merge, "")


def test_an_adapter_card_of_an_earlier_version_loses_its_paths_on_the_way(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    old = f'| base | {llama} |\n\n[model]\nbase = "{llama}"\n[[data.train]]\npath = "/home/lovelace/lamps/rows.jsonl"\n'
    windows = 'dir = "C:\\\\Users\\\\lovelace\\\\runs"\nprompt = "</s> /think"\nurl = "https://example.org/a/b"\n'
    (tmp_path / "adapter" / "README.md").write_text(f"---\nbase_model: {llama}\n---\n```toml\n{old}{windows}```\n")
    card = merged_card(merge_of(llama, tmp_path / "adapter"), "")
    assert str(llama.parent) not in card and "lovelace" not in card
    assert f'| base | {llama.name} |\n\n[model]\nbase = "{llama.name}"\n' in card
    assert 'path = "rows.jsonl"\ndir = "runs"\nprompt = "</s> /think"\nurl = "https://example.org/a/b"' in card


def test_a_hub_base_is_named_whole_and_its_recipe_keeps_hub_names(llama: Path) -> None:
    base = replace(resolve(str(llama), "main", Recorder()), name="meta/tiny", commit="ab12")
    rows = [
        "data.train=[{path='hub:lamps/rows@main:train'}, {path='/home/lovelace/*.jsonl'}]",
        "output.dir='~/lovelace/runs'",
    ]
    card = adapter_card(base, recipe_of_base("meta/tiny", rows), {})
    assert metadata(card)["base_model"] == "meta/tiny" and "| revision | ab12 |" in card
    assert 'base = "meta/tiny"' in card and 'path = "hub:lamps/rows@main:train"' in card
    assert 'path = "*.jsonl"' in card and 'dir = "runs"' in card and "lovelace" not in card


def test_nothing_that_leaves_the_machine_names_the_folders_above_it(tmp_path: Path, llama: Path) -> None:
    place = tmp_path / "home-of-lovelace"
    base = place / "bases" / "lamp"
    shutil.copytree(llama, base)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**content, key: str(base)}))  # as transformers 4 saved them
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    recipe = write_recipe(place / "work", base)
    formats = 'export.formats=["hf", "gguf:f32", "adapter-gguf"]'
    train(recipe, "train.max_steps=2", "train.batch_size=4", "data.eval_fraction=0.2", formats)
    run = run_dir(recipe)
    exported = [path for path in (run / "export").rglob("*") if path.is_file()]
    kinds = {path.name if path.suffix != ".gguf" else path.suffix for path in exported}
    assert {"README.md", "export.json", "Modelfile", "config.json", "tokenizer_config.json", ".gguf"} <= kinds
    for file in (run / "adapter" / "README.md", *exported):
        assert b"home-of-lovelace" not in file.read_bytes(), file.relative_to(run)
    assert "| base | lamp |" in (run / "adapter" / "README.md").read_text()
    assert json.loads((run / "export" / "hf" / "export.json").read_text())["base"] == "lamp"
    # What programs open again keeps its path.
    assert str(base) in (run / "recipe.toml").read_text()
    for name in ("qlora.json", "adapter_config.json"):
        assert str(base) in (run / "adapter" / name).read_text()
