"""A Hugging Face tokenizer as the keys under `tokenizer.*` of a GGUF file, so that llama.cpp tokenizes as transformers.

Read is what transformers makes of the folder, not its tokenizer.json: the two differ for some classes, and the model
was trained on the former. What llama.cpp cannot express raises ExportError, what it does a little differently stands in
`Vocab.warnings`; only the tokenizer's files and the configurations are read, so both can be had before training. A
missing key is never harmless in GGUF (a wrong BOS or EOS id, text split in another way, all in silence): every key
that llama.cpp has a default for is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import ExportError, foreign_failures
from qlora.export.gguf import pretokenizer, special, spm
from qlora.export.gguf.metadata import Entry, entries
from qlora.export.gguf.probes import Limit
from qlora.export.gguf.rope import Key
from qlora.model.tokenizer import PROBE
from qlora.model.tokenizer_check import check_tokenizer
from qlora.third_party import unprinted_panics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# llama.h, enum llama_token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Special tokens of Gemma 4 that a reader of its answers looks for: llama.cpp shows no control token in an answer
# (conversion/gemma.py).
VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
PAD_SCORE = -10000.0  # llama.cpp's converter gives it to rows of the embedding without a token


@dataclass(frozen=True)
class Vocab:
    """Everything that stands under `tokenizer.*` in a GGUF file, and what must be known beside it.

    `model`: "gpt2" (byte-level BPE, with `merges`) or "llama" (SentencePiece, with `scores`). `special_ids`: key of
    `tokenizer.ggml.<key>_token_id` -> id. `limits`: known differences, whose texts stand in `warnings` too; under them
    `probes.comparable` gives what must be tokenized equally all the same, from `specials`. `strips_after_specials`:
    white space after special tokens is dropped as Phi-3's tokenizer does; llama.cpp does so if and only if
    `general.name` contains "phi-3" or "phi3".
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    named_templates: Mapping[str, str] = field(default_factory=dict)
    strips_after_specials: bool = False
    limits: tuple[Limit, ...] = ()
    specials: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def by_type(self, *kinds: int) -> set[str]:
        """The texts of the tokens of these types."""
        return {text for text, kind in zip(self.tokens, self.types, strict=True) if kind in kinds}


@dataclass(frozen=True)
class _Source:
    """A tokenizer as transformers loads it, the same as the content of a tokenizer.json, and what it has to fit."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    content: Mapping[str, Any]
    rows: int
    conversation: special.Conversation

    @property
    def added(self) -> list[Mapping[str, Any]]:
        return list(self.content.get("added_tokens") or ())


def read_vocab(folder: Path, embedding_rows: int, *, pre: str | None = None, template: str | None = None) -> Vocab:
    """The vocabulary of a model's folder, padded to the rows of its embedding.

    `pre` is llama.cpp's name of a pre-tokenizer to take without looking at the structure; `template` the chat template
    in use, where the folder has another one or none. Raises ExportError for what llama.cpp cannot express: a tokenizer
    that is no BPE, an unknown way of splitting, two tokens of one text, more tokens than rows, no end token.
    """
    tokenizer = _load(folder)
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_model(content["model"], folder)
    templates = special.chat_templates(folder, tokenizer)
    own_template = templates.pop("default", None)
    default = template or own_template
    source = _Source(folder, tokenizer, content, embedding_rows, special.conversation(folder, tokenizer, default))
    vocab = _read_spm(source, pre) if spm.is_spm(content) else _read_byte_level(source, pre)
    _check_texts(vocab.tokens, folder)

    ids, about_ids = special.special_ids(folder, tokenizer, embedding_rows, source.conversation.turn_ends)
    before, after, written = special.added_bos_eos(folder, tokenizer, source.conversation.opening)
    limits = (*vocab.limits, Limit.OPENING) if written else vocab.limits
    if before:
        ids["bos"] = before[0]
    if after and after != [ids["eos"]]:
        text = vocab.tokens[after[0]]
        what = f"{folder}: the tokenizer puts {text!r} after every text, llama.cpp can only put EOS there"
        raise ExportError(what, "change the post_processor in tokenizer.json")
    strips, about_tokens = special.whitespace_stripping(source.added, vocab.by_type(CONTROL, UNKNOWN, USER_DEFINED))
    about_stops = special.accidental_eog(vocab.by_type(NORMAL))
    return replace(
        vocab,
        special_ids=ids,
        limits=limits,
        add_bos=bool(before),
        add_eos=bool(after),
        chat_template=default,
        named_templates=templates,
        strips_after_specials=strips,
        specials=tuple(dict.fromkeys([vocab.tokens[ids["bos"]], *(str(token["content"]) for token in source.added)])),
        warnings=(*(limit.value for limit in limits), *vocab.warnings, *about_ids, *about_tokens, *about_stops),
    )


def metadata(vocab: Vocab) -> list[Entry]:
    """The keys to write, none of them empty: GGUF's writer drops an empty string and refuses an empty list.

    Key names: llama.cpp, src/llama-arch.cpp, and for several chat templates gguf-py's add_chat_template.
    """
    keys: list[Key] = [
        ("ggml.model", vocab.model),
        ("ggml.pre", vocab.pre),
        ("ggml.tokens", list(vocab.tokens)),
        ("ggml.token_type", list(vocab.types)),
    ]
    if vocab.scores is not None:
        keys.append(("ggml.scores", list(vocab.scores)))
    if vocab.merges is not None:
        keys.append(("ggml.merges", list(vocab.merges)))
    keys += [(f"ggml.{name}_token_id", value) for name, value in vocab.special_ids.items()]
    keys += [
        ("ggml.add_bos_token", vocab.add_bos),
        ("ggml.add_eos_token", vocab.add_eos),
        ("ggml.add_space_prefix", vocab.add_space_prefix),
    ]
    if vocab.chat_template:
        keys.append(("chat_template", vocab.chat_template))
    if vocab.named_templates:
        named = {re.sub("[^a-zA-Z0-9]", "_", name): text for name, text in vocab.named_templates.items()}
        keys.append(("chat_templates", list(named)))
        keys += [(f"chat_template.{name}", text) for name, text in named.items()]
    return entries([(f"tokenizer.{key}", value) for key, value in keys])


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    check_tokenizer(folder, str(folder))
    with foreign_failures() as failure, unprinted_panics():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer(PROBE)
    if failure.error:
        what = f"{folder}: its tokenizer cannot be opened ({failure.reason})"
        raise ExportError(what, "it needs tokenizer.json") from failure.error
    if not hasattr(tokenizer, "backend_tokenizer"):
        name = type(tokenizer).__name__
        raise ExportError(f"{folder}: its tokenizer is {name}, written in Python", "use a base with tokenizer.json")
    return tokenizer


def _check_model(model: Mapping[str, Any], folder: Path) -> None:
    """A BPE, without the options of it that llama.cpp has not."""
    hint = "only byte-level BPE and SentencePiece-like BPE go into GGUF: export to safetensors instead"
    if model["type"] != "BPE":
        raise ExportError(f"{folder}: a tokenizer of the kind {model['type']} cannot be written as GGUF", hint)
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise ExportError(f"{folder}: llama.cpp has no {option} ({model[option]!r}) in its BPE", hint)
    if not model["merges"]:
        raise ExportError(f"{folder}: its BPE has no merges, llama.cpp refuses such a vocabulary", hint)


def _read_byte_level(source: _Source, pre: str | None) -> Vocab:
    """The vocabulary without what is found in the same way for both kinds."""
    found = pretokenizer.Match(pre) if pre else pretokenizer.match(source.content, source.folder)
    tokens, types = _tokens_and_types(source)
    # llama.cpp splits a merge at its first space: a space inside is written as byte-level BPE writes spaces.
    merges = tuple(
        " ".join(part.replace(" ", "Ġ") for part in pair) for pair in pretokenizer.merge_pairs(source.content["model"])
    )
    return Vocab("gpt2", found.pre, tokens, types, merges=merges, limits=found.limits)


def _read_spm(source: _Source, pre: str | None) -> Vocab:
    """The vocabulary without what is found in the same way for both kinds."""
    if pre not in (None, "default"):
        what = f"{source.folder}: `tokenizer_pre` {pre} is for byte-level tokenizers, this one is SentencePiece-like"
        raise ExportError(what, "leave `tokenizer_pre` out")
    tokens, types = _tokens_and_types(source)
    prefix, limits = _space_prefix(source)
    if any(spm.SPACE in token["content"] for token in source.added):
        limits.append(Limit.SPACE_MARKS)
    scores, unused, about_scores = _scores(source, tokens)
    types = tuple(UNUSED if number in unused and kind == NORMAL else kind for number, kind in enumerate(types))
    if missing := spm.missing_merges(source.content):
        shown = ", ".join(map(repr, missing[:3]))
        about_scores.append(f"llama.cpp joins {len(missing)} tokens in more ways than the tokenizer does ({shown} …)")
    return Vocab(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=tuple(scores),
        add_space_prefix=prefix,
        limits=tuple(limits),
        warnings=tuple(about_scores),
    )


def _space_prefix(source: _Source) -> tuple[bool, list[Limit]]:
    """Whether llama.cpp is to put a space before each piece of text between special tokens, and what then differs.

    "Before the text's beginning only" it cannot do. A conversation that begins with a special token gets no space then,
    and conversations are what the model is for.
    """
    spaces = spm.spaces(source.content, source.folder)
    if spaces.prefix == "first" and source.conversation.begins_special:
        return False, [Limit.PLAIN_TEXT]
    limits = [Limit.AFTER_SPECIAL] if spaces.prefix == "first" else []
    return spaces.prefix != "never", limits + ([Limit.LEADING_SPACE] if spaces.unless_there else [])


def _scores(source: _Source, tokens: Sequence[str]) -> tuple[list[float], set[int], list[str]]:
    """Scores by id, the ids that the SentencePiece model calls unused, and a warning when its file is another's."""
    added = {token["id"] for token in source.added}
    real = max(source.tokenizer.get_vocab().values()) + 1
    ranks, lowest = spm.rank_scores(source.content), -float(len(source.content["model"]["merges"]))
    scores = [ranks.get(text, lowest) for text in tokens[:real]] + [PAD_SCORE] * (len(tokens) - real)
    unused: set[int] = set()
    warnings = []
    file = source.folder / "tokenizer.model"
    if file.is_file():
        pieces = spm.read_pieces(file)
        pairs = enumerate(zip(pieces, tokens, strict=False))
        same = [number in added or piece.text == text for number, (piece, text) in pairs]
        if all(same):
            scores[: len(pieces)] = [piece.score for piece in pieces[:real]]
            unused = {number for number, piece in enumerate(pieces) if piece.kind == spm.UNUSED_PIECE}
        else:
            differing = same.count(False)
            warnings.append(f"tokenizer.model is of another vocabulary ({differing} tokens differ) and is not used")
    for number in added:
        scores[number] = spm.ADDED_SCORE
    return scores, unused, warnings


def _tokens_and_types(source: _Source) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and types by id, free rows filled up. Raises ExportError for an id beyond the rows or given twice."""
    by_id: dict[int, str] = {}
    for text, number in source.content["model"]["vocab"].items():
        if number in by_id:
            raise ExportError(f"{source.folder}: {by_id[number]!r} and {text!r} share the id {number}", "repair it")
        by_id[number] = text
    added = {token["id"]: token for token in source.added}
    top = max(*by_id, *added, 0)
    if top >= source.rows:
        text = added[top]["content"] if top in added else by_id[top]
        raise ExportError(
            f"{source.folder}: the token {text!r} has the id {top}, but the embedding has {source.rows} rows",
            "remove the tokens that the model has no rows for from tokenizer.json and tokenizer_config.json",
        )
    taken = set(by_id.values()) | {token["content"] for token in added.values()}
    tokens, types = [], []
    for number in range(source.rows):
        if number in added:
            text, kind = _added_token(added[number], source)
        elif number in by_id:
            text = by_id[number]
            kind = BYTE if text in _BYTES and spm.is_spm(source.content) else NORMAL
        else:
            text, kind = f"[PAD{number}]", UNUSED
            while text in taken:
                text = f"[{text}]"
        tokens.append(text)
        types.append(kind)
    return tuple(tokens), tuple(types)


_BYTES = frozenset(spm.BYTE_TOKENS)


def _added_token(token: Mapping[str, Any], source: _Source) -> tuple[str, int]:
    """Text and type of an added token, as llama.cpp's converter has them.

    Its rule (conversion/base.py, does_token_look_special): some bases do not mark their control tokens as special. The
    mark for a space becomes one in the text of other tokens, since llama.cpp looks for them before it marks spaces.
    """
    text = str(token["content"])
    if spm.is_spm(source.content) and text == source.tokenizer.unk_token:
        return text, UNKNOWN
    looks_special = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    looks_special |= text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or (text[:7] == "<unused" and text[-1:] == ">")
    if text in VISIBLE:
        return text, USER_DEFINED
    if token.get("special") or looks_special:
        return text, CONTROL
    return text.replace(spm.SPACE, " "), USER_DEFINED


def _check_texts(tokens: Sequence[str], folder: Path) -> None:
    """No two tokens of one text, as llama.cpp reads it (up to a NUL): they abort the process that opens the file."""
    seen: dict[str, int] = {}
    for number, text in enumerate(tokens):
        read = text.partition("\0")[0] or f"[EMPTY_{number}]"
        if read in seen:
            raise ExportError(
                f"{folder}: the tokens {seen[read]} and {number} have the same text {read!r}, llama.cpp would abort",
                "remove one of them from tokenizer.json",
            )
        seen[read] = number
