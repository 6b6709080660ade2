"""Special tokens as llama.cpp is told of them: ends, fallbacks, fill-in tokens, flags, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.errors import ExportError
from qlora.export.gguf.vocab import metadata
from tests import tokenizers
from tests.export.gguf.asked import changed, load, read, with_added
from tests.export.gguf.oracle import ask, write_vocab_only


def test_every_end_of_the_generation_config_is_told(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp's ends are asked")
    folder = tokenizers.phi3(tmp_path)
    found = read(folder)
    ids = load(folder).get_vocab()
    assert [found.special_ids[name] for name in ("eos", "eot", "eom")] == [
        ids[text] for text in ("<|endoftext|>", "<|end|>", "<|assistant|>")
    ]
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) <= set(ask(write_vocab_only(folder / "vocab.gguf", metadata(found)), [])["ends"])
    changed(folder, "generation_config.json", eos_token_id=[*stops, ids["<|user|>"], 10**6])
    assert any("'<|user|>'" in warning for warning in read(folder).warnings)


def test_a_turn_may_end_where_the_next_begins(tmp_path: Path) -> None:
    """GLM-4 has three ends, none of them written at the end of its answers."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's ends are asked")
    folder = tokenizers.glm4(tmp_path)
    found = read(folder)
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert [found.special_ids[name] for name in ("eos", "eot", "eom")] == stops
    assert set(stops) <= set(ask(write_vocab_only(folder / "vocab.gguf", metadata(found)), [])["ends"])


def test_the_turns_end_comes_from_the_template(tmp_path: Path) -> None:
    found = read(tokenizers.gemma(tmp_path))
    ends = {name: found.tokens[found.special_ids[name]] for name in ("bos", "eos", "eot", "unknown", "padding")}
    expected = {"bos": "<bos>", "eos": "<eos>", "eot": "<end_of_turn>", "unknown": "<unk>", "padding": "<pad>"}
    assert ends == expected
    other = "{% for m in messages %}<start_of_turn>{{ m['content'] }}<eos>{% endfor %}"
    assert read(tmp_path, template=other).special_ids["eot"] == found.special_ids["eos"]
    assert read(tmp_path, template=other).chat_template == other


def test_ids_fall_back_to_the_configurations(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path)
    changed(folder, "tokenizer_config.json", eos_token=None, pad_token=None)
    changed(folder, "config.json", bos_token_id=0, model_type="llama", text_config={"pad_token_id": 1})
    changed(folder, "generation_config.json", eos_token_id=[2, 0])
    ids = read(folder).special_ids
    assert (ids["bos"], ids["eos"], ids["padding"]) == (0, 2, 1)


def test_fill_in_tokens_are_told(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path, "qwen2")
    top = len(load(folder))
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|eom_id|>")
    extra = [tokenizers.added(text, top + number) for number, text in enumerate(names)]
    with_added(folder, *extra)
    ids = read(folder).special_ids
    assert [ids[name] for name in ("fim_pre", "fim_suf", "fim_mid", "eom")] == [top, top + 1, top + 2, top + 3]


def test_an_ordinary_token_with_an_ends_text_is_warned_of(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["</s>"] = len(content["model"]["vocab"])
    changed(folder, "tokenizer.json", **content)
    assert any("'</s>'" in warning for warning in read(folder).warnings)


def test_flags_of_added_tokens_that_cannot_be_expressed_are_warned_of(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path)
    top = len(load(folder))
    flags: list[dict[str, bool]] = [{"rstrip": True}, {"lstrip": True}, {"single_word": True}]
    extra = [tokenizers.added(f"<{number}>", top + number, **flag) for number, flag in enumerate(flags)]
    with_added(folder, *extra)
    warnings = read(folder).warnings
    assert ["'<0>'" in warnings[0], "'<1>'" in warnings[1], "'<2>'" in warnings[2]] == [True] * 3


def test_templates_of_all_places_are_found(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool use.jinja").write_text(tokenizers.CHATML + "tools")
    entries = {entry.key: entry.value for entry in metadata(read(folder))}
    assert entries["tokenizer.chat_template"] == tokenizers.CHATML
    assert entries["tokenizer.chat_template.tool_use"] == tokenizers.CHATML + "tools"
    assert entries["tokenizer.chat_templates"] == ["tool_use"]
    (folder / "additional_chat_templates" / "tool use.jinja").unlink()
    (folder / "chat_template.jinja").unlink()
    changed(folder, "chat_template.json", chat_template=tokenizers.CHATML + "of a processor")
    assert read(folder).chat_template == tokenizers.CHATML + "of a processor"
    changed(folder, "tokenizer_config.json", chat_template=tokenizers.CHATML + "of the config")
    assert read(folder).chat_template == tokenizers.CHATML + "of the config"


def test_a_template_that_fails_is_an_error_of_two_lines(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(ExportError, match="chat template"):
        read(folder)


@pytest.mark.parametrize("text", ["[1]", "{", '{"eos_token_id": ' + "9" * 10_000 + "}", "[" * 100_000, ""])
def test_a_generation_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = tokenizers.phi3(tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ExportError, match=r"generation_config\.json: cannot be read"):
        read(folder)


@pytest.mark.parametrize("value", [True, "3", [None, "x", True], -5, 10**9, {"a": 1}])
def test_ends_that_are_no_ids_are_not_taken(tmp_path: Path, value: object) -> None:
    folder = tokenizers.phi3(tmp_path)
    usual = read(folder).special_ids
    changed(folder, "generation_config.json", eos_token_id=value)
    assert read(folder).special_ids["eos"] == usual["eos"]
