"""A tokenizer's files are looked at before a library opens them: what real ones have passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.errors import TokenizerError
from qlora.export.gguf.vocab import read_vocab
from qlora.model import tokenizer_check
from qlora.model.tokenizer import open_tokenizer
from qlora.model.tokenizer_check import check_tokenizer
from tests.tokenizers import added, byte_level, gemma, phi3

ADDED = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
# Keys as the tokenizers of Llama 3, Mistral, Gemma, T5 and of transformers 5 itself have them.
REAL = {
    "added_tokens_decoder": {"0": {**ADDED, "special": True}, "128255": {**ADDED, "content": "<x>", "special": False}},
    "additional_special_tokens": ["<s>", {"__type": "AddedToken", **ADDED}],
    "extra_special_tokens": {"image_token": "<image>", "boi_token": {**ADDED}},
    "bos_token": {"__type": "AddedToken", **ADDED, "id": None},
    "eos_token": "</s>",
    "pad_token": None,
    "model_max_length": 1000000000000000019884624838656,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
    "chat_template": [{"name": "default", "template": "{{ x }}"}, {"name": "tool_use", "template": "{{ y }}"}],
    "sp_model_kwargs": {},
    "special_tokens_map_file": "/admin/home/x/special_tokens_map.json",
    "tokenizer_file": None,
    "add_prefix_space": None,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "backend": "tokenizers",
    "is_local": True,
    "padding_side": "left",
}


@pytest.mark.parametrize("make", [byte_level, gemma, phi3], ids=lambda make: make.__name__)
def test_what_real_ones_have_passes(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    folder = make(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(REAL))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": ADDED, "eos_token": "</s>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 128255}))
    check_tokenizer(folder, "base")


def test_a_refusal_names_whose_it_is_file_key_and_value(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": "x"}')
    with pytest.raises(TokenizerError) as caught:
        check_tokenizer(folder, "org/model")
    assert caught.value.what == (
        "org/model: tokenizer_config.json: model_max_length is wrong: is no length (it is 'x')"
    )
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a", "eos_token": "b"}')
    with pytest.raises(TokenizerError, match=r"^org/model: tokenizer_config.json: .*'eos_token' stands twice"):
        check_tokenizer(folder, "org/model")


def test_counts_are_bounded_before_a_library_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    monkeypatch.setattr(tokenizer_check, "MAX_VOCAB", len(content["model"]["vocab"]))
    monkeypatch.setattr(tokenizer_check, "MAX_MERGES", len(content["model"]["merges"]))
    check_tokenizer(folder, "base")
    monkeypatch.setattr(tokenizer_check, "MAX_MERGES", len(content["model"]["merges"]) - 1)
    with pytest.raises(TokenizerError, match=r"model\.merges is wrong: is no list of at most"):
        check_tokenizer(folder, "base")
    monkeypatch.setattr(tokenizer_check, "MAX_VOCAB", len(content["model"]["vocab"]) - 1)
    with pytest.raises(TokenizerError, match=r"model\.vocab is wrong: has .* tokens, at most"):
        check_tokenizer(folder, "base")
    monkeypatch.setattr(tokenizer_check, "MAX_SPECIAL", 2)
    (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": ["a", "b", "c"]}')
    with pytest.raises(TokenizerError, match="additional_special_tokens is wrong: has 3 tokens, at most 2"):
        check_tokenizer(folder, "base")
    (folder / "special_tokens_map.json").unlink()
    content["added_tokens"].append(added("<x>", -4))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    monkeypatch.undo()
    with pytest.raises(TokenizerError, match=r"added_tokens\.3\.id is wrong: .*\(it is -4\)"):
        check_tokenizer(folder, "base")


def test_both_doors_look_at_the_files_first(tmp_path: Path) -> None:
    """The trainer's, and that of an export to GGUF: transformers itself opens this one."""
    folder = byte_level(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text('{"errors": 5, "eos_token": "<|im_end|>"}')
    for open_it in (lambda: open_tokenizer(folder, "base"), lambda: read_vocab(folder, 3000)):
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: errors is wrong"):
            open_it()
