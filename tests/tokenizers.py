"""Tiny tokenizers of every kind that goes into GGUF, each a folder as a person would download it.

Byte-level BPE is trained under the split of each of llama.cpp's pre-tokenizers. The SentencePiece-like ones are made as
transformers makes them from a `tokenizer.model`: pieces sorted by score, and a merge for every pair that makes a piece.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.export.gguf.pretokenizer import BYTES, GPT2, KNOWN, Known
from tests.export.gguf.awkward_texts import PROBES
from tests.families import CHATML

_TEXTS = (
    "The quick brown fox asks the assistant a question, its answer isn't long. It'll do; we've 1234 of it.",
    "Straße naïve café привет мир 日本語 한국어 2024-05-17 costs $99.99 (50%) I'm you're THEY'LL DON'T",
    'def f(x):\n    return x ** 2  # square\n\n\nfor(int i=0;i<10;++i){\n\t\tprintf("%d\\n", i);\n}\r\n',
    "Hello world! Hello   world. ok    ok        ok\n\nhttps://example.org/path/to?query=1&x=20 3.14 123456 12345678",
    "🚀🚀 👍🏽 ------====== ...... !!!!!! iPhone McDonald's ÄÖÜ ÉcoLe Это обычное предложение I'd he's",
)
# The probes too: only where whole words are tokens does it show that a text was cut elsewhere.
TEXTS = (*_TEXTS, *PROBES)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + "
    "'\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GLM4_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def added(text: str, number: int, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added tokens."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **plain, **flags, "special": special}


def pre_tokenizer(known: Known) -> dict[str, Any]:
    """The pre-tokenizer of a tokenizer.json that has these steps."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts: list[dict[str, Any]] = []
    for step in known.steps:
        if step == BYTES:
            parts.append({**byte_level, "use_regex": parts[-1:] == [{"GPT2": True}]})
            parts = [part for part in parts if part != {"GPT2": True}]
        elif step == GPT2:
            parts.append({"GPT2": True})
        elif step == r"\p{N}":
            parts.append({"type": "Digits", "individual_digits": True})
        elif step == r"\p{N}+":
            parts.append({"type": "Digits", "individual_digits": False})
        elif step == "punctuation":
            parts.append({"type": "Punctuation", "behavior": "Contiguous"})
        else:
            parts.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": parts}


def byte_level(
    folder: Path, pre: str = "gpt-2", *, vocab: int = 3000, normalizer: str | None = None, bos: str | None = None
) -> Path:
    """A byte-level BPE with the structure behind llama.cpp's name `pre`; special tokens have the ids 0 to 2.

    `normalizer`: a type of tokenizer.json, as "NFC". `bos`: a special token that is put before every text.
    """
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    known = next(known for known in KNOWN if known.pre == pre)
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": pre_tokenizer(known),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": known.ignore_merges},
    }
    core = Tokenizer.from_str(json.dumps(content))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    content = json.loads(core.to_str())
    content["model"]["ignore_merges"] = known.ignore_merges
    if bos:
        content["post_processor"] = template_processor(bos, SPECIAL_TOKENS.index(bos))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return write(folder, content, {**config, "bos_token": bos}, CHATML)


def template_processor(bos: str, number: int) -> dict[str, Any]:
    """A post-processor that puts one token before every text."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def glm4(folder: Path) -> Path:
    """As GLM-4's: two tokens before every text, which its template writes too; the next turn ends an answer."""
    byte_level(folder, "smaug-bpe")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = ("[gMASK]", "<sop>", "<|user|>", "<|observation|>", "<|assistant|>")
    top = len(content["model"]["vocab"])
    content["added_tokens"] += [added(name, top + number) for number, name in enumerate(names)]
    processor = template_processor("[gMASK]", top)
    second = {"SpecialToken": {"id": "<sop>", "type_id": 0}}
    for part in ("single", "pair"):
        processor[part] = [processor[part][0], second, *processor[part][1:]]
    processor["special_tokens"]["<sop>"] = {"id": "<sop>", "ids": [top + 1], "tokens": ["<sop>"]}
    content["post_processor"] = processor
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, top + 2, top + 3]}))
    return write(folder, content, config, GLM4_TEMPLATE)


def pieces(leading: Sequence[str], runs: Sequence[str] = (), first: Sequence[str] = ()) -> list[tuple[str, float]]:
    """SentencePiece pieces and scores: `leading` ones, bytes, `runs` (score 0), `first` and merged ones, characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts = [text.replace("\0", "") for text in TEXTS]  # SentencePiece has no piece with a NUL
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2500, show_progress=False))
    ids = core.get_vocab()
    by_rank = sorted((text for text in ids if len(text) > 1 and text not in runs), key=lambda text: ids[text])
    single = sorted(text for text in ids if len(text) == 1)
    fixed = [(text, 0.0) for text in [*leading, *(f"<0x{byte:02X}>" for byte in range(256)), *runs]]
    ranked = [(text, -float(rank)) for rank, text in enumerate([*first, *by_rank, *single])]
    return fixed + ranked


def spm_content(found: Sequence[tuple[str, float]], special: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json without ways of marking spaces: merges made from scores by transformers' own function."""
    from transformers.tokenization_utils_base import generate_merges

    ids = {text: number for number, (text, _) in enumerate(found)}
    scores = dict(found)
    merges = generate_merges(ids, scores, skip_tokens=set(special))
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    decoder = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "added_tokens": [added(text, ids[text]) for text in special],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": {**model, "vocab": ids, "merges": [list(pair) for pair in merges]},
    }


_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _MARK]}


LLAMA2_RUNS = tuple("▁" * count for count in (2, 4, 8, 16))


def llama2(folder: Path, *, model_file: bool = False, scheme: str | None = None, backend: bool = True) -> Path:
    """As Llama 2's and Mistral's: BOS, a space before each piece. `model_file` writes tokenizer.model too; `scheme` is
    Metaspace's way of putting the space, where that does it; without `backend` the class is LlamaTokenizer."""
    special = ("<unk>", "<s>", "</s>")
    found = pieces(special, first=LLAMA2_RUNS)
    content = spm_content(found, special)
    if scheme is None:
        content["normalizer"] = _PREPEND
    else:
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    content["post_processor"] = template_processor("<s>", 1)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = "PreTrainedTokenizerFast" if backend else "LlamaTokenizer"
    write(folder, content, {**config, "tokenizer_class": kind}, LLAMA2_TEMPLATE)
    if model_file:
        kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
        write_model_file(folder / "tokenizer.model", found, kinds)
    return folder


def gemma(folder: Path, *, model_file: bool = False) -> Path:
    """As Gemma's: no space put before, runs of line breaks and of spaces as tokens that are added but not special."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    runs = tuple(mark * count for mark in ("\n", "▁") for count in range(2, 9))
    found = pieces(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>"), runs
    )
    content = spm_content(found, special)
    ids = content["model"]["vocab"]
    plain = [added(text, ids[text], special=False) for text in ("<mask>", "<unused0>", *runs)]
    content["added_tokens"] = sorted(content["added_tokens"] + plain, key=lambda token: token["id"])
    content["normalizer"] = _MARK
    space = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    content["pre_tokenizer"] = space
    content["post_processor"] = template_processor("<bos>", 2)
    config = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    write(folder, content, {**config, "tokenizer_class": "PreTrainedTokenizerFast"}, GEMMA_TEMPLATE)
    if model_file:
        kinds = {"<unk>": 2, "<pad>": 3, "<eos>": 3, "<bos>": 3, **dict.fromkeys(runs, 4)}
        write_model_file(folder / "tokenizer.model", found, kinds)
    return folder


def phi3(folder: Path) -> Path:
    """As Phi-3's: Llama 2's with special tokens at the end, of which most swallow the white space after them."""
    special = ("<unk>", "<s>", "</s>")
    content = spm_content(pieces(special, first=LLAMA2_RUNS), special)
    content["added_tokens"][2]["rstrip"] = True
    top = len(content["model"]["vocab"])
    names = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    content["added_tokens"] += [
        added(name, top + number, rstrip=name != "<|endoftext|>") for number, name in enumerate(names)
    ]
    content["normalizer"] = _PREPEND
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    write(folder, content, {**config, "tokenizer_class": "PreTrainedTokenizerFast"}, PHI3_TEMPLATE)
    ends = {"eos_token_id": [top, top + 1, top + 3]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def write(folder: Path, content: Mapping[str, Any], config: Mapping[str, Any], template: str | None) -> Path:
    """A tokenizer's folder as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_model_file(file: Path, found: Sequence[tuple[str, float]], kinds: Mapping[str, int]) -> None:
    """A SentencePiece `tokenizer.model` with these pieces: ModelProto in protobuf's wire format."""
    blob = b""
    for text, score in found:
        kind = kinds.get(text, 6 if text.startswith("<0x") else 1)
        data = text.encode()
        piece = b"\x0a" + _varint(len(data)) + data + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        blob += b"\x0a" + _varint(len(piece)) + piece
    trainer = b"\x18\x02\x98\x02\x01"  # trainer_spec: model_type = BPE, byte_fallback (fields 3 and 35)
    file.write_bytes(blob + b"\x12" + _varint(len(trainer)) + trainer)


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])
