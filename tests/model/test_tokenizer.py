"""A tokenizer is opened without its folder's code, has a padding token, and an adapter's own one goes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import TokenizerError
from qlora.model import tokenizer as module
from qlora.model.tokenizer import open_tokenizer
from tests.families import make_base, make_tokenizer


def test_a_padding_token_is_given_where_there_is_none(tmp_path: Path) -> None:
    folder = make_base("llama", tmp_path / "base")
    tokenizer = open_tokenizer(folder, "base")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")
    without_pad = make_tokenizer()
    without_pad.pad_token = None
    without_pad.save_pretrained(folder)
    assert open_tokenizer(folder, "base").pad_token == "<|im_end|>"


def test_code_of_the_folder_is_never_run(tmp_path: Path) -> None:
    folder = make_base("llama", tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    (folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    with pytest.raises(TokenizerError, match="base: its tokenizer cannot be opened"):
        open_tokenizer(folder, "base")


@pytest.mark.parametrize(
    ("content", "installed", "what", "hint"),
    [
        (b"\n\x0e\n\x05<unk>", (), "lacks sentencepiece and protobuf", "pip install sentencepiece protobuf, or use"),
        (b"\n\x0e\n\x05<unk>", ("sentencepiece",), "lacks protobuf", "pip install protobuf, or use"),
        (b"AA== 0\nAQ== 1\n", ("sentencepiece",), "lacks tiktoken", "pip install tiktoken, or use"),
        (b"\n\x0e\n\x05<unk>", ("sentencepiece", "google.protobuf"), r"cannot be opened \(", "needs tokenizer.json"),
    ],
)
def test_a_package_that_a_vocabulary_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, installed: tuple[str, ...], what: str, hint: str
) -> None:
    """Only what the file needs, whatever transformers asks for; what is installed is not asked for."""
    folder = make_base("llama", tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(module, "_is_installed", lambda name: name in installed)
    with pytest.raises(TokenizerError, match=what) as caught:
        open_tokenizer(folder, "base")
    assert hint in caught.value.hint


def test_what_is_installed_is_found() -> None:
    assert [module._is_installed(name) for name in ("json", "google.nothing", "nothing.at.all")] == [True, False, False]
