"""llama.cpp tokenizes as transformers does, told by the keys that we write; each silent trap is sprung on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ExportError
from qlora.export.gguf import vocab
from qlora.export.gguf.pretokenizer import KNOWN
from qlora.export.gguf.probes import PROBE_TEXTS, Limit, comparable
from qlora.export.gguf.vocab import metadata, read_vocab
from tests import tokenizers
from tests.export.gguf.asked import changed, differing, load, read, with_added, without
from tests.export.gguf.awkward_texts import PROBES
from tests.export.gguf.oracle import ask, write_vocab_only

BYTE_LEVEL: dict[str, Callable[[Path], Path]] = {
    known.pre: lambda folder, pre=known.pre: tokenizers.byte_level(folder, pre)  # type: ignore[misc]
    for known in KNOWN
}
KINDS: dict[str, Callable[[Path], Path]] = {
    **BYTE_LEVEL,
    "qwen2 with NFC": lambda folder: tokenizers.byte_level(folder, "qwen2", normalizer="NFC"),
    "llama-bpe with BOS": lambda folder: tokenizers.byte_level(folder, "llama-bpe", bos="<|endoftext|>"),
    "llama2": tokenizers.llama2,
    "llama2 with tokenizer.model": lambda folder: tokenizers.llama2(folder, model_file=True),
    "llama2, space first": lambda folder: tokenizers.llama2(folder, scheme="first"),
    "llama2, space always": lambda folder: tokenizers.llama2(folder, scheme="always"),
    "llama2, transformers' own class": lambda folder: tokenizers.llama2(folder, backend=False),
    "gemma": tokenizers.gemma,
    "gemma with tokenizer.model": lambda folder: tokenizers.gemma(folder, model_file=True),
    "phi3": tokenizers.phi3,
}
# Where llama.cpp differs whatever the file says: how many of the probe texts show it.
LIMITED = {
    "tekken": (Limit.LETTER_CASE,),
    "gpt-4o": (Limit.LETTER_CASE,),
    "qwen2 with NFC": (Limit.COMPOSITION,),
    "llama2, space first": (Limit.PLAIN_TEXT,),
    "llama2, transformers' own class": (Limit.PLAIN_TEXT,),
    "llama2, space always": (Limit.LEADING_SPACE,),
    "gemma": (Limit.SPACE_MARKS,),
    "gemma with tokenizer.model": (Limit.SPACE_MARKS,),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_probe_texts_are_tokenized_alike(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path)
    found = read(folder)
    texts = comparable(PROBES, found.limits, found.specials)
    assert len(texts) > 450
    assert found.limits == LIMITED.get(kind, ())
    name = "a phi-3 model" if found.strips_after_specials else "tiny"
    assert differing(folder, metadata(found), texts, name=name) == []


@pytest.mark.parametrize("kind", LIMITED)
def test_known_limits_are_real(kind: str, tmp_path: Path) -> None:
    """A limit that no probe text shows would hide differences for nothing."""
    folder = KINDS[kind](tmp_path)
    found = read(folder)
    assert differing(folder, metadata(found), PROBES)
    assert all(limit.value in found.warnings for limit in found.limits)


def test_a_conversation_is_tokenized_alike_where_plain_text_is_not(tmp_path: Path) -> None:
    folder = tokenizers.llama2(tmp_path, scheme="first")
    chat = [{"role": "user", "content": "Hello  world"}, {"role": "assistant", "content": "ok"}] * 2
    text = load(folder).apply_chat_template(chat, tokenize=False)
    found = read(folder)
    assert not found.add_space_prefix
    assert differing(folder, metadata(found), [text], add_special=False) == []
    spaced = replace(found, add_space_prefix=True)
    assert differing(folder, metadata(spaced), [text], add_special=False) == [text]
    # Without a template that begins with a special token, plain text is all there is to get right.
    (folder / "chat_template.jinja").unlink()
    assert read(folder).limits == (Limit.AFTER_SPECIAL, Limit.LEADING_SPACE)


# The traps: what loads without an error and is wrong.


def test_trap_a_missing_pre_tokenizer_changes_ids(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path, "llama-bpe")
    assert len(differing(folder, without(metadata(read(folder)), "pre"), PROBES)) > 50


@pytest.mark.parametrize("wrong", ["gpt-2", "qwen2", "default"])
def test_trap_another_pre_tokenizer_changes_ids(wrong: str, tmp_path: Path) -> None:
    """The probe texts tell llama.cpp's pre-tokenizers apart, so that their agreement means something."""
    folder = tokenizers.byte_level(tmp_path, "llama-bpe")
    assert len(differing(folder, metadata(read(folder, pre=wrong)), PROBE_TEXTS)) >= 3


def test_trap_missing_special_ids_are_another_models(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp's tokenizer is asked")
    entries = metadata(read(tokenizers.byte_level(tmp_path)))
    told = ask(write_vocab_only(tmp_path / "told.gguf", entries), [])
    assert (told["bos"], told["eos"], told["eot"]) == (2, 2, 2)
    bare = ask(write_vocab_only(tmp_path / "bare.gguf", without(entries, "bos_token_id", "eos_token_id")), [])
    assert (bare["bos"], bare["eos"]) == (11, 11)


def test_trap_without_add_bos_it_depends_on_the_kind(tmp_path: Path) -> None:
    """llama-bpe adds BOS by default and gpt-2 none: both wrong here, and `add_bos` is asked of the tokenizer."""
    for number, (pre, bos) in enumerate([("llama-bpe", None), ("gpt-2", "<|endoftext|>")]):
        folder = tokenizers.byte_level(tmp_path / str(number), pre, bos=bos)
        found = read(folder)
        assert found.add_bos == (bos is not None)
        assert differing(folder, metadata(found), ["Hello"]) == []
        assert differing(folder, without(metadata(found), "add_bos_token"), ["Hello"]) == ["Hello"]


def test_trap_the_shortcut_for_whole_words(tmp_path: Path) -> None:
    """llama-bpe takes a word that is a token as it is; without `ignore_merges` a tokenizer may not reach it."""
    folder = tokenizers.byte_level(tmp_path, "smaug-bpe")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["qzqz"] = len(content["model"]["vocab"])
    path.write_text(json.dumps(content), encoding="utf-8")
    assert differing(folder, metadata(read(folder)), ["qzqz"]) == []
    assert differing(folder, metadata(read(folder, pre="llama-bpe")), ["qzqz"]) == ["qzqz"]


def test_trap_a_missing_space_prefix(tmp_path: Path) -> None:
    folder = tokenizers.gemma(tmp_path)
    assert differing(folder, without(metadata(read(folder)), "add_space_prefix"), ["Hello"]) == ["Hello"]


def test_trap_the_name_phi_3_switches_white_space(tmp_path: Path) -> None:
    folder = tokenizers.phi3(tmp_path / "phi")
    found = read(folder)
    text = "<|user|>\nHello<|end|>\n"
    assert found.strips_after_specials
    assert differing(folder, metadata(found), [text], name="tiny") == [text]
    other = tokenizers.byte_level(tmp_path / "other")
    assert not read(other).strips_after_specials


def test_trap_empty_values_are_not_written(tmp_path: Path) -> None:
    """GGUF's writer drops an empty string in silence."""
    folder = tokenizers.byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text("")
    entries = metadata(read(folder))
    assert all(entry.value != "" and entry.value != [] for entry in entries)
    assert "tokenizer.chat_template" not in {entry.key for entry in entries}


def test_trap_two_tokens_of_one_text_abort_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is seen to abort")
    folder = tokenizers.byte_level(tmp_path)
    found = read(folder)
    twice = replace(found, tokens=(*found.tokens[:-1], "Ġthe"))
    assert found.tokens.count("Ġthe") == 1
    with pytest.raises(RuntimeError, match="exit -"):
        ask(write_vocab_only(tmp_path / "twice.gguf", metadata(twice)), [])


def test_a_template_that_writes_what_the_tokenizer_puts_before_a_text(tmp_path: Path) -> None:
    """GLM-4 puts two tokens before a text, llama.cpp one at most: conversations have them of their own."""
    folder = tokenizers.glm4(tmp_path)
    found = read(folder)
    assert found.limits == (Limit.OPENING,) and not found.add_bos and found.pre == "smaug-bpe"
    chat = [{"role": "user", "content": "Hello  world"}, {"role": "assistant", "content": "ok"}] * 2
    text = load(folder).apply_chat_template(chat, tokenize=False)
    assert load(folder)(text, add_special_tokens=False)["input_ids"][:2] == load(folder)("")["input_ids"]
    assert differing(folder, metadata(found), [text, *PROBES], add_special=False) == []
    (folder / "chat_template.jinja").write_text(tokenizers.CHATML)
    with pytest.raises(ExportError, match="adds 2 tokens"):
        read(folder)


def test_what_a_reader_of_answers_looks_for_is_shown(tmp_path: Path) -> None:
    """Gemma 4 marks its thoughts and calls by special tokens, which llama.cpp leaves out of an answer."""
    folder = tokenizers.gemma(tmp_path)
    top = len(load(folder))
    names = ("<|channel>", "<channel|>", "<turn|>")
    with_added(folder, *(tokenizers.added(name, top + number) for number, name in enumerate(names)))
    found = read(folder)
    assert [found.types[top + number] for number in range(3)] == [vocab.USER_DEFINED, vocab.USER_DEFINED, vocab.CONTROL]
    assert differing(folder, metadata(found), ["a<|channel>thought\n<channel|>b<turn|>\n"]) == []


# Refused before anything is written.


def test_two_tokens_of_one_text_are_refused(tmp_path: Path) -> None:
    """A user-defined token's mark for a space becomes a space, which another token may be."""
    folder = tokenizers.gemma(tmp_path)
    with_added(folder, tokenizers.added("  ", len(load(folder)), special=False))
    with pytest.raises(ExportError, match="have the same text '  '"):
        read(folder)


def test_texts_that_differ_after_a_nul_only_are_refused(tmp_path: Path) -> None:
    folder = tokenizers.llama2(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["▁the\0"] = len(content["model"]["vocab"])
    changed(folder, "tokenizer.json", **content)
    assert "▁the" in content["model"]["vocab"]
    with pytest.raises(ExportError, match="have the same text '▁the'"):
        read(folder)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path)
    tokens = len(load(folder))
    assert len(read_vocab(folder, tokens).tokens) == tokens
    with pytest.raises(ExportError, match=f"the embedding has {tokens - 1} rows"):
        read_vocab(folder, tokens - 1)


def test_a_missing_row_is_padded_with_an_unused_token(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path)
    tokens = len(load(folder))
    found = read_vocab(folder, tokens + 3)
    assert found.tokens[tokens:] == tuple(f"[PAD{tokens + number}]" for number in range(3))
    assert found.types[tokens:] == (vocab.UNUSED,) * 3


@pytest.mark.parametrize(
    "change",
    [
        {"type": "Unigram", "vocab": [["a", -1.0], ["<unk>", 0.0]], "unk_id": 1},
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "a",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 9,
        },
        {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    ],
    ids=["Unigram", "WordPiece", "no merges"],
)
def test_other_models_are_refused(change: Mapping[str, Any], tmp_path: Path) -> None:
    folder = changed(tokenizers.byte_level(tmp_path), "tokenizer.json", model=change, added_tokens=[])
    with pytest.raises(ExportError, match=r"cannot be written as GGUF|has no merges"):
        read_vocab(folder, 100)


def test_unknown_space_marks_and_added_ends_are_refused(tmp_path: Path) -> None:
    folder = changed(tokenizers.llama2(tmp_path / "a"), "tokenizer.json", normalizer={"type": "NFKC"})
    with pytest.raises(ExportError, match="NFKC"):
        read(folder)
    with pytest.raises(ExportError, match="byte-level"):
        read(tokenizers.llama2(tmp_path / "b"), pre="qwen2")
    processor = tokenizers.template_processor("<|endoftext|>", 0)
    processor["single"] = [*processor["single"][::-1]]
    folder = changed(tokenizers.byte_level(tmp_path / "c"), "tokenizer.json", post_processor=processor)
    with pytest.raises(ExportError, match="after every text"):
        read(folder)
    processor["single"] = [processor["single"][1]] * 2 + [processor["single"][0]]
    changed(folder, "tokenizer.json", post_processor=processor)
    with pytest.raises(ExportError, match="adds 2 tokens"):
        read(folder)


def test_a_folder_without_tokenizer_or_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be opened"):
        read_vocab(tmp_path, 100)
    folder = tokenizers.byte_level(tmp_path / "a")
    changed(folder, "tokenizer_config.json", eos_token=None)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ExportError, match="no token ends an answer"):
        read(folder)


# Types and scores.


def test_types_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    found = read(tokenizers.gemma(tmp_path))
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert [kinds[text] for text in ("<bos>", "<unk>", "<0x00>", "▁the", "▁")] == [3, 2, 6, 1, 1]
    # Not marked as special in the file, but it looks like one; a run of marks becomes a run of spaces.
    assert [kinds[text] for text in ("<mask>", "<unused0>", "\n\n", "  ", "        ")] == [3, 3, 4, 4, 4]
    assert "▁▁" not in kinds


def test_added_tokens_of_byte_level_are_control_or_user_defined(tmp_path: Path) -> None:
    folder = tokenizers.byte_level(tmp_path, "qwen2")
    top = len(load(folder))
    names = ("<tool_call>", "<|box|>", "    ")
    extra = [tokenizers.added(text, top + number, special=False) for number, text in enumerate(names)]
    with_added(folder, *extra)
    found = read(folder)
    assert found.types[:4] == (3, 3, 3, 1)
    assert found.types[top : top + 4] == (4, 3, 4, 5)
    texts = ["a <tool_call> b", "<|box|>\n", "if x:\n        y", "<tool_call", *PROBE_TEXTS]
    assert differing(folder, metadata(found), texts) == []
