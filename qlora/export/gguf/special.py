"""The special tokens of a vocabulary as GGUF has them: ids, stops, what is added to a text, templates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import files, foreign_json
from qlora.data.row_json import RowError
from qlora.data.template import PLACEHOLDERS, ChatTemplate
from qlora.errors import ExportError, TokenizerError
from qlora.events import Sinks
from qlora.foreign_json import ForeignFileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# llama.cpp stops at every token with one of these texts, whatever its type (src/llama-vocab.cpp, special_eog_ids).
STOP_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)
# Tokens for filling in the middle, by their texts in Qwen, StarCoder and Granite, DeepSeek, and CodeLlama.
_FILL_IN = {
    "fim_pre": ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<｜fim▁begin｜>", "▁<PRE>"),
    "fim_suf": ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<｜fim▁hole｜>", "▁<SUF>"),
    "fim_mid": ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<｜fim▁end｜>", "▁<MID>"),
    "fim_pad": ("<|fim_pad|>", "<fim_pad>", "<fim-pad>"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# GGUF's names of the other special tokens (the spelling of "seperator" is the format's), and transformers'.
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}
# llama.cpp strips no white space after these, even where it does so after all others, and fails without them.
_NEVER_STRIPPED = frozenset(("<unk>", "<s>", "<|endoftext|>"))
_ALWAYS_STRIPPED = "</s>"

_PROBE = "probe 1"
_OPENING = 500  # characters of a conversation that are looked at for what a tokenizer puts before a text


def special_ids(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int, turn_ends: Sequence[str]
) -> tuple[dict[str, int], list[str]]:
    """Ids by GGUF's name, and warnings. `rows` of the embedding bound them, `turn_ends` is what the template ends with.

    BOS, EOS and the end of a turn (eot) are always there: llama.cpp's defaults for them are ids of another model or the
    first token that looks like one. All of generation_config.json's ends are written, as eos, eot or eom. Raises
    ExportError when there is no end at all.
    """
    configs = [_read_json(folder / name) for name in ("generation_config.json", "config.json")]
    ids: dict[str, int] = {}
    for ours, theirs in _NAMES.items():
        found = [getattr(tokenizer, f"{theirs}_token_id", None), *_configured(configs, f"{theirs}_token_id")]
        if usable := [number for number in found if type(number) is int and 0 <= number < rows]:
            ids[ours] = usable[0]
    vocab = tokenizer.get_vocab()
    ends = [vocab[text] for text in turn_ends if text in vocab]
    if "eos" not in ids:
        if not ends:
            raise ExportError(
                f"{folder}: no token ends an answer, llama.cpp would take one of its own choice for it",
                "set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
            )
        ids["eos"] = ends[0]
    ids.setdefault("bos", ids["eos"])
    ids["eot"] = ends[0] if ends else ids["eos"]
    stops = [number for number in _configured(configs[:1], "eos_token_id") if 0 <= number < rows]
    more = [number for number in dict.fromkeys([*ends, *stops]) if number not in (ids["eos"], ids["eot"])]
    more = [number for number in more if tokenizer.convert_ids_to_tokens(number) not in STOP_TEXTS]
    if more:
        ids["eom"] = more[0]
    elif "<|eom_id|>" in vocab:
        ids["eom"] = vocab["<|eom_id|>"]
    for name, texts in _FILL_IN.items():
        if present := [vocab[text] for text in texts if text in vocab]:
            ids[name] = present[0]
    left = [str(tokenizer.convert_ids_to_tokens(number)) for number in more[1:]]
    return ids, [f"llama.cpp will not stop at {_some(left)}: it takes three ends only"] if left else []


def _configured(configs: Sequence[Mapping[str, Any]], key: str) -> list[int]:
    """The ids under `key` in these configurations, lists flattened; of multimodal ones the text part's too."""
    found: list[int] = []
    for config in configs:
        for place in (config, config.get("text_config")):
            value = place.get(key) if isinstance(place, Mapping) else None
            found += [v for v in (value if isinstance(value, list) else [value]) if type(v) is int]
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        path = files.inside(file.parent, file.name)
        return foreign_json.load_object(path) if path.exists() else {}
    except (ForeignFileError, files.UnsafePathError) as error:
        raise ExportError(f"{file}: cannot be read ({error})", "download the base again") from error


def added_bos_eos(folder: Path, tokenizer: PreTrainedTokenizerBase, opening: str) -> tuple[list[int], list[int], bool]:
    """The ids that the tokenizer puts before and after every text, found by a probe: at most one on either side; and
    whether it puts more before one, which a conversation (its beginning is `opening`) has of its own, as GLM-4's.

    Raises ExportError for more than llama.cpp can add.
    """
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_PROBE)["input_ids"])
    added = len(whole) - len(plain)
    start = next((at for at in range(added + 1) if whole[at : at + len(plain)] == plain), None)
    if start is not None and start > 1 and added == start:
        texts = [str(tokenizer.convert_ids_to_tokens(number)) for number in whole[:start]]
        if opening.startswith("".join(texts)):
            return [], [], True
    if start is None or start > 1 or added - start > 1:
        raise ExportError(
            f"{folder}: the tokenizer adds {added} tokens around a text, llama.cpp one before and one after at most",
            "change the post_processor in tokenizer.json",
        )
    return whole[:start], whole[start + len(plain) :], False


def chat_templates(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Name -> template; "default" is the nameless one. An empty one is none (GGUF's writer drops it in silence).

    transformers reads chat_template.jinja with additional_chat_templates/ and tokenizer_config.json for a tokenizer;
    chat_template.json, where multimodal models have theirs, only for a processor.
    """
    stored = tokenizer.chat_template
    if not stored:
        stored = _read_json(folder / "chat_template.json").get("chat_template")
    templates = stored if isinstance(stored, dict) else {"default": stored}
    return {name: str(text) for name, text in templates.items() if text}


@dataclass(frozen=True)
class Conversation:
    """What the chat template in use does: the tokens that end a turn, whether a special one begins it all, and the
    first characters of all."""

    turn_ends: tuple[str, ...] = ()
    begins_special: bool = False
    opening: str = ""


def conversation(folder: Path, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Conversation:
    """Seen from small conversations rendered by `template`. Raises ExportError when it renders none."""
    if template is None:
        return Conversation()
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        chat = ChatTemplate(tokenizer, Sinks())
        text = chat.render([{"role": "user", "content": PLACEHOLDERS[0]}], None, add_generation_prompt=True)
    except TokenizerError as error:
        raise ExportError(f"{folder}: {error.what}", error.hint) from None
    except RowError as error:
        raise ExportError(f"{folder}: {error.reason}", "use a base whose chat template renders one question") from None
    finally:
        tokenizer.chat_template = kept
    added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    return Conversation(tuple(chat.end_tokens) if chat.writes_end else (), text.startswith(added), text[:_OPENING])


def whitespace_stripping(added: Sequence[Mapping[str, Any]], special: Collection[str]) -> tuple[bool, list[str]]:
    """Whether white space after added tokens is dropped just as llama.cpp does for Phi-3; warnings for other ways.

    `added` are tokenizer.json's added tokens, `special` the texts of all control, unknown and user-defined tokens.
    """
    right = {token["content"] for token in added if token.get("rstrip")}
    left = {token["content"] for token in added if token.get("lstrip")}
    whole = {token["content"] for token in added if token.get("single_word")}
    as_phi3 = (frozenset(special) | {_ALWAYS_STRIPPED}) - _NEVER_STRIPPED
    is_phi3 = bool(right) and right == as_phi3 and (_NEVER_STRIPPED | {_ALWAYS_STRIPPED}) <= frozenset(special)
    warnings = []
    if right and not is_phi3:
        warnings.append(f"llama.cpp keeps white space after {_some(right)}, which the tokenizer drops")
    if left:
        warnings.append(f"llama.cpp keeps white space before {_some(left)}, which the tokenizer drops")
    if whole:
        warnings.append(f"llama.cpp finds {_some(whole)} inside words too")
    return is_phi3, warnings


def accidental_eog(ordinary: Collection[str]) -> list[str]:
    """A warning for each ordinary token that llama.cpp takes for an end because of its text."""
    return [f"llama.cpp ends an answer at the ordinary token {text!r}" for text in sorted(STOP_TEXTS & set(ordinary))]


def _some(texts: Collection[str]) -> str:
    shown = ", ".join(repr(text) for text in sorted(texts)[:3])
    return shown if len(texts) <= 3 else f"{shown} and {len(texts) - 3} more"
