"""SentencePiece-like vocabularies (Llama 2, Mistral, Gemma, Phi-3): how spaces are marked, and each token's score.

llama.cpp merges the pair of neighbours whose union has the highest score, whichever pair it is; transformers merges by
a list of pairs. Both agree when the list holds every pair that makes a token and is sorted by the token's score, as
transformers writes it from a `tokenizer.model`. Scores come from that file when it is there, else they are minus the
rank of the first merge that makes the token (0 differences in 2,460 paragraphs on real vocabularies; with all scores
equal half of the texts were tokenized wrongly).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora import files
from qlora.errors import ExportError
from qlora.export.gguf.pretokenizer import flat, merge_pairs
from qlora.model.tokenizer_check import MAX_BYTES

SPACE = "▁"
ADDED_SCORE = -1000.0  # llama.cpp's converter gives it to tokens outside the SentencePiece model
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
UNUSED_PIECE = 5  # sentencepiece_model.proto, ModelProto.SentencePiece.Type

_HINT = "use a base with Llama 2's, Mistral's, Gemma's or Phi-3's kind of tokenizer, or export to safetensors"

Prefix = Literal["always", "first", "never"]

_MARK = ("Replace", " ", SPACE)
_PREPEND = ("Prepend", SPACE)


@dataclass(frozen=True)
class Spaces:
    """Where a mark for a space is put that the text does not have: before every piece between special tokens, before
    the text only, or nowhere. `unless_there`: not where the piece begins with a space already."""

    prefix: Prefix
    unless_there: bool = False


@dataclass(frozen=True)
class Piece:
    """One entry of a SentencePiece model. `kind`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""

    text: str
    score: float
    kind: int


def is_spm(tokenizer: Mapping[str, Any]) -> bool:
    """Whether this is a BPE that writes what it doesn't know as byte tokens, so not a byte-level one."""
    return tokenizer["model"].get("byte_fallback") is True


def spaces(tokenizer: Mapping[str, Any], folder: Path) -> Spaces:
    """How this tokenizer marks spaces. Raises ExportError for a structure that llama.cpp's "llama" model is not."""
    if missing := [token for token in BYTE_TOKENS if token not in tokenizer["model"]["vocab"]]:
        raise ExportError(
            f"{folder}: {len(missing)} of the 256 byte tokens are missing ({missing[0]} …), llama.cpp needs them all",
            "use a base whose tokenizer has them",
        )
    if tokenizer["model"].get("ignore_merges"):
        raise ExportError(f"{folder}: a SentencePiece-like tokenizer with ignore_merges is not in llama.cpp", _HINT)
    replacing = flat(tokenizer.get("normalizer"), "normalizers")
    normalizers = [_normalizer(part) for part in replacing]
    steps = [part for part in flat(tokenizer.get("pre_tokenizer"), "pretokenizers") if not _cuts_at_spaces(part)]
    if len(steps) == 1 and steps[0]["type"] == "Metaspace" and not normalizers:
        return _metaspace(steps[0], tokenizer, folder)
    if not steps and normalizers == [_MARK]:
        return Spaces("never")
    if not steps and normalizers == [_PREPEND, _MARK]:
        return Spaces("always")
    shown = ", ".join(part["type"] for part in [*replacing, *steps])
    raise ExportError(f"{folder}: llama.cpp cannot mark spaces as this tokenizer does ({shown})", _HINT)


def _normalizer(part: Mapping[str, Any]) -> tuple[str, ...]:
    if part["type"] == "Replace":
        return "Replace", str(part["pattern"].get("String")), str(part["content"])
    return (str(part["type"]), str(part.get("prepend", "")))


def _cuts_at_spaces(part: Mapping[str, Any]) -> bool:
    """Gemma's pre-tokenizer splits at spaces, of which its normalizer leaves none."""
    return (part["type"], part.get("pattern")) == ("Split", {"String": " "})


def _metaspace(step: Mapping[str, Any], tokenizer: Mapping[str, Any], folder: Path) -> Spaces:
    inner = [token for token in tokenizer["model"]["vocab"] if SPACE in token[1:]]
    if step.get("split", True) and inner:
        what = f"the text is cut at each space although {len(inner)} tokens go across one, as {inner[0]!r}"
        raise ExportError(f"{folder}: {what}", _HINT)
    if (mark := step.get("replacement")) != SPACE:
        raise ExportError(f"{folder}: spaces are marked by {mark!r}, llama.cpp writes {SPACE}", _HINT)
    prefix: Prefix = step.get("prepend_scheme", "always")
    return Spaces(prefix, unless_there=prefix != "never")


def missing_merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """Tokens that two others make up without a merge for it: llama.cpp would join them, transformers not."""
    vocab = tokenizer["model"]["vocab"]
    known = set(merge_pairs(tokenizer["model"]))
    apart = {token["content"] for token in tokenizer.get("added_tokens") or ()} | set(BYTE_TOKENS)
    joined = vocab.keys() - apart  # the others are cut out of the text before it comes to merges

    def cuts(token: str) -> Iterator[tuple[str, str]]:
        return ((token[:at], token[at:]) for at in range(1, len(token)))

    return [token for token in joined if any(pair not in known and joined.issuperset(pair) for pair in cuts(token))]


def rank_scores(tokenizer: Mapping[str, Any]) -> dict[str, float]:
    """Minus the rank of the first merge that makes each token; tokens that no merge makes are not there."""
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merge_pairs(tokenizer["model"])):
        scores.setdefault(left + right, -float(rank))
    return scores


def read_pieces(file: Path) -> list[Piece]:
    """The pieces of a `tokenizer.model`, which is a protocol buffer (sentencepiece_model.proto: ModelProto.pieces is
    field 1; of a piece, `piece` is field 1, `score` 2, `type` 3). Raises ExportError when it is none."""
    try:
        fields = _fields(files.read_bytes(files.inside(file.parent, file.name), MAX_BYTES))
        return [_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes)]
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ExportError(f"{file}: is no SentencePiece model ({error})", "download the base again") from error


def _piece(blob: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(blob):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _fields(blob: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one message in protobuf's wire format: varints as int, all else as bytes."""
    at = 0
    while at < len(blob):
        tag, at = _varint(blob, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(blob, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(blob, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > len(blob):
            raise ValueError(f"it ends inside a field at byte {at}")
        yield tag >> 3, blob[at : at + length]
        at += length


def _varint(blob: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = blob[at]
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
