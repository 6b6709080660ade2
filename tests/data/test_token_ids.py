"""Tokens without an embedding: refused before a weight is read, by file and line; padding never needs one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora import api
from qlora.errors import ModelError, TokenizerError
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe
from tests.families import make_base
from tests.runs import hashes, run_dir, train, write_recipe, write_rows

SHORT = ("train.max_steps=2", "train.batch_size=4", "train.micro_batch_size=2", "eval.samples=1", "data.packing=false")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base("llama", tmp_path / "base")


def add_tokens(base: Path, *tokens: str, pad: str | None = None) -> None:
    """Tokens beyond the embedding, as community models have them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<filler {number}>" for number in range(len(tokenizer), rows)])
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if pad is not None:
        tokenizer.pad_token = pad
    tokenizer.save_pretrained(base)


def said(sink: Recorder) -> list[str]:
    return [event.as_dict()["message"] for event in sink.of("notice") if event.as_dict()["topic"] == "tokenizer"]


def test_a_token_of_a_row_is_named_with_its_line_before_a_weight_is_read(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    add_tokens(base, "<new>", "<newer>")
    api.check(load_recipe(recipe))  # tokens that no row has are no harm
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace("euros", "<newer> euros")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    token = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<newer>")
    assert token >= rows
    what = f"rows.jsonl:8: the token '<newer>' ({token}) has no embedding in {base}, which has {rows}"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(TokenizerError) as caught:
            api.check(load_recipe(recipe))
        assert caught.value.what == what


def test_the_stored_embedding_counts_and_not_what_config_json_says(base: Path, tmp_path: Path) -> None:
    """A config.json of another model is refused as such, not by a row's token."""
    recipe = write_recipe(tmp_path, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(ModelError, match=r"is \[384, 64\], but the configuration makes .* \[300, 64\]"):
        api.check(load_recipe(recipe))


def test_a_token_of_the_rows_to_evaluate_on_is_named_too(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    add_tokens(base, "<new>")
    write_rows(tmp_path / "held.jsonl", 5)
    (tmp_path / "held.jsonl").write_text((tmp_path / "held.jsonl").read_text().replace("lamp 3", "<new>"))
    recipe.write_text(recipe.read_text() + '[[data.eval]]\npath = "held.jsonl"\n')
    with pytest.raises(TokenizerError, match=r"held\.jsonl:4: the token '<new>'"):
        api.check(load_recipe(recipe))


def test_a_token_that_only_the_prompt_has_is_named(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    add_tokens(base, "<think>")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}<think>{% endif %}")
    with pytest.raises(TokenizerError, match=r"the token '<think>' \(\d+\) has no embedding"):
        api.check(load_recipe(recipe))


def test_padding_needs_no_row_of_its_own(base: Path, tmp_path: Path) -> None:
    """A pad token beyond the embedding, none at all, or one of the config's: the same numbers to the bit."""
    recipes = {name: write_recipe(tmp_path / name, base, name) for name in ("usual", "beyond", "none")}
    train(recipes["usual"], *SHORT)
    add_tokens(base, "[PAD]", pad="[PAD]")
    sink = train(recipes["beyond"], *SHORT, 'export.formats=["hf"]')
    (message,) = said(sink)
    assert message.startswith("the pad token '[PAD]' (")
    assert "training pads with another; whoever serves the model in batches sets pad_token" in message
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    assert not said(train(recipes["none"], *SHORT))
    assert hashes(recipes["usual"], 2) == hashes(recipes["beyond"], 2) == hashes(recipes["none"], 2)


def test_an_export_of_a_config_with_padding_beyond_the_embedding_opens(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("config.json", "generation_config.json"):
        content = json.loads((base / name).read_text()) if (base / name).is_file() else {}
        (base / name).write_text(json.dumps({**content, "pad_token_id": 32_000}))
    recipe = write_recipe(tmp_path, base)
    train(recipe, *SHORT, 'export.formats=["hf"]')
    folder = run_dir(recipe) / "export" / "hf"
    assert AutoModelForCausalLM.from_pretrained(folder).config.pad_token_id is None
    assert "pad_token_id" not in json.loads((folder / "generation_config.json").read_text())
