"""SentencePiece-like vocabularies: their scores, the pieces of a tokenizer.model, and how spaces are marked."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.errors import ExportError
from qlora.export.gguf import spm
from qlora.export.gguf.vocab import Vocab, metadata
from tests import tokenizers
from tests.export.gguf.asked import changed, differing, read
from tests.export.gguf.awkward_texts import PROBES


def test_trap_flat_scores_mistokenize(tmp_path: Path) -> None:
    folder = tokenizers.llama2(tmp_path)
    found = read(folder)
    assert found.scores is not None
    flat = replace(found, scores=(0.0,) * len(found.scores))
    assert len(differing(folder, metadata(flat), PROBES)) > 15


def test_missing_byte_tokens_are_refused(tmp_path: Path) -> None:
    """llama.cpp throws at the first character that needs one."""
    folder = tokenizers.llama2(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["other"] = content["model"]["vocab"].pop("<0x41>")
    changed(folder, "tokenizer.json", **content)
    with pytest.raises(ExportError, match="<0x41>"):
        read(folder)


def test_scores_come_from_the_model_file_when_it_fits(tmp_path: Path) -> None:
    folder = tokenizers.gemma(tmp_path, model_file=True)
    pieces = spm.read_pieces(folder / "tokenizer.model")
    found = read(folder)
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    assert found.scores is not None
    assert found.scores[ids["▁the"]] == pieces[ids["▁the"]].score < 0
    assert found.scores[ids["<bos>"]] == spm.ADDED_SCORE
    assert (pieces[ids["<0x00>"]].kind, pieces[ids["\n\n"]].kind, pieces[ids["<unk>"]].kind) == (6, 4, 2)
    other = tokenizers.llama2(tmp_path / "other", model_file=True)
    (folder / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes())
    foreign = read(folder)
    assert any("tokenizer.model" in warning for warning in foreign.warnings)
    assert foreign.scores == read_without_model_file(folder).scores


def read_without_model_file(folder: Path) -> Vocab:
    (folder / "tokenizer.model").unlink()
    return read(folder)


def test_the_reader_of_protobuf_agrees_with_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the other reader")
    folder = tokenizers.llama2(tmp_path, model_file=True)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for number, piece in enumerate(spm.read_pieces(folder / "tokenizer.model")):
        assert (piece.text, piece.score) == (theirs.id_to_piece(number), theirs.get_score(number))


DAMAGE = [b"\x0a\xff", b"\x0f", b"not protobuf at all", b"\x0a\x04\x15\x00\x00\x00", b"\x08" + b"\xff" * 1000 + b"\x01"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_file_is_refused(damage: bytes, tmp_path: Path) -> None:
    folder = tokenizers.llama2(tmp_path, model_file=True)
    with (folder / "tokenizer.model").open("ab") as file:
        file.write(damage)
    with pytest.raises(ExportError, match=r"tokenizer\.model"):
        read(folder)


def test_absent_fields_of_a_piece_are_protobufs_defaults(tmp_path: Path) -> None:
    text = b"\x0a\x01a"
    score = b"\x15" + struct.pack("<f", -2.5)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x03" + text + b"\x0a\x08" + text + score)
    assert spm.read_pieces(tmp_path / "tokenizer.model") == [spm.Piece("a", 0.0, 1), spm.Piece("a", -2.5, 1)]


def test_merges_that_are_missing_are_warned_of(tmp_path: Path) -> None:
    """llama.cpp joins any two tokens that make a third; a BPE that was not made from SentencePiece may not."""
    folder = tokenizers.llama2(tmp_path)
    assert read(folder).warnings == ()
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "▁the"]
    changed(folder, "tokenizer.json", **content)
    assert any("'▁the'" in warning for warning in read(folder).warnings)


def test_a_model_file_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match="is a link out of the folder"):
        spm.read_pieces(tmp_path / "base" / "tokenizer.model")
