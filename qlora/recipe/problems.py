"""What makes a recipe's errors useful: the line of a key, the nearest valid key, other trainers' names for ours.

TOML parsers do not keep positions, so a small scanner finds the line of each key. It only serves messages: when it
is wrong about an exotic layout, the message lacks a line and the recipe is read all the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora import windows_paths
from qlora.errors import Problem
from qlora.foreign_toml import ForeignTomlError, parse

Location = tuple[int | str, ...]

# Our keys, each with the names that axolotl, LLaMA-Factory, TRL, unsloth and peft give it.
_FOREIGN = {
    "model.base": ("base_model", "model_name_or_path", "model_name"),
    "model.attention": ("attn_implementation", "flash_attention", "flash_attn"),
    'quantization.type = "nf4"': ("load_in_4bit", "load_in_8bit", "quantization_bit"),
    "quantization.type": ("bnb_4bit_quant_type",),
    "quantization.double_quant": ("bnb_4bit_use_double_quant", "double_quantization"),
    "lora.r": ("lora_r", "lora_rank", "rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.target_modules": ("lora_target", "lora_target_modules"),
    'lora.target_modules = "all-linear"': ("lora_target_linear",),
    "lora.modules_to_save": ("lora_modules_to_save",),
    "lora.experts": ("target_parameters", "lora_target_parameters"),
    "lora.init": ("init_lora_weights",),
    "lora.use_dora": ("peft_use_dora",),
    "lora.use_rslora": ("peft_use_rslora",),
    "[[data.train]]": ("datasets", "dataset", "train_file"),
    "[[data.eval]]": ("test_datasets",),
    "data.max_length": ("sequence_len", "cutoff_len", "max_seq_length", "max_seq_len"),
    "data.packing": ("sample_packing",),
    'data.loss_on ("all" or "assistant")': ("train_on_inputs", "train_on_prompt"),
    'data.loss_on = "assistant"': ("assistant_only_loss", "completion_only_loss"),
    "data.eval_fraction": ("val_set_size", "val_size"),
    "data.truncation": ("excess_length_strategy",),
    "train.epochs": ("num_epochs", "num_train_epochs"),
    "train.micro_batch_size": ("per_device_train_batch_size",),
    "train.batch_size (rows per step, all micro-batches together)": (
        "gradient_accumulation_steps",
        "accumulation_steps",
    ),
    "train.learning_rate": ("lr",),
    "train.lr_scheduler": ("lr_scheduler_type",),
    "train.warmup_ratio": ("warmup_steps",),
    "train.optimizer": ("optim",),
    "train.max_grad_norm": ("gradient_clipping",),
    "train.gradient_checkpointing": ("use_gradient_checkpointing",),
    "train.neftune_alpha": ("neftune_noise_alpha", "noisy_embedding_alpha"),
    'train.micro_batch_size = "auto"': ("auto_find_batch_size",),
    "memory.limit": ("max_memory",),
    "train.seed": ("random_state",),
    "checkpoint.every_steps": ("save_steps", "saves_per_epoch"),
    "checkpoint.keep": ("save_total_limit",),
    "eval.every_steps": ("eval_steps", "evals_per_epoch"),
    "output.dir": ("output_dir", "logging_dir"),
    "report.sinks": ("report_to",),
}
FOREIGN_NAMES = {name: ours for ours, names in _FOREIGN.items() for name in names}
REFUSED_NAMES = {
    "trust_remote_code": "code from a model's folder is never run here; take the key out",
    **dict.fromkeys(("bf16", "fp16", "torch_dtype"), 'the key is model.dtype, and "auto" chooses; take this one out'),
}
_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = re.compile(rf"\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*=")
# What opens or closes something: a fence, a bracket, a string (one without its end takes the line), a comment.
_NESTING = r"""\"{3}|'{3}|"(?:\\.|[^"\\])*"?|'[^']*'?|[\[\]{}#]"""
_SHOWN = 100  # characters of a key or value in a message
_DEEPEST = 5  # parts of a key: data.train.0.columns.prompt
_TABLE = re.compile(rf"\s*(\[\[?)\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*\]")


class LineIndex:
    """Line numbers of the keys of one recipe."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines: dict[Location, int] = {}
        self.overrides: dict[Location, str] = {}
        self._scan(text)

    def where(self, location: Location) -> str:
        """`file:line` of a key, or of the nearest table above it that has a line, or the file alone."""
        if (override := self.overrides.get(location)) is not None:
            return f"`overrides` {override}"
        for end in range(len(location), 0, -1):
            if line := self.lines.get(location[:end]):
                return f"{self.path}:{line}"
        return str(self.path)

    def order(self, where: str) -> int:
        """Sort key of a `where`: its line, files without one last."""
        tail = where.rpartition(":")[2]
        return int(tail) if tail.isdigit() else 1 << 30

    def _scan(self, text: str) -> None:
        table: Location = ()
        counts: dict[Location, int] = {}
        depth, fence = 0, ""
        for number, line in enumerate(text.split("\n"), 1):
            if not fence and depth == 0:
                if match := _TABLE.match(line):
                    table = _split(match[2])
                    if match[1] == "[[":
                        counts[table] = counts.get(table, -1) + 1
                        table = (*table, counts[table])
                    self.lines.setdefault(table, number)
                    continue
                if match := _DOTTED.match(line):
                    self.lines.setdefault((*table, *_split(match[1])), number)
            depth, fence = _nesting(line, depth, fence)


def _split(dotted: str) -> Location:
    return tuple(part.strip("\"' ") for part in re.findall(_KEY, dotted))


def _nesting(line: str, depth: int, fence: str) -> tuple[int, str]:
    """Open brackets and the open triple quote at the end of a line, given those at its start."""
    position = 0
    while match := re.compile(fence or _NESTING).search(line, position):
        position, token = match.end(), match[0]
        if fence:
            fence = ""
        elif token in ('"""', "'''"):
            fence = token
        elif token == "#":
            break
        else:
            depth += (token in "[{") - (token in "]}")
    return max(depth, 0), fence


def toml_problem(path: Path, text: str, error: ForeignTomlError) -> Problem:
    """A TOML syntax error with its line (the parser says none for the last one)."""
    lines = text.rstrip("\n").split("\n")
    line = error.line or len(lines)
    hint = 'strings need quotes, lists need brackets: base = "owner/name", formats = ["hf"]'
    hint = windows_paths.in_single_quotes(lines[line - 1] if line <= len(lines) else "") or hint
    return Problem(f"{path}:{line}", f"not valid TOML: {error}", hint)


def short(text: object) -> str:
    """The text, cut to what fits into a message."""
    return text if len(text := str(text)) <= _SHOWN else f"{text[:_SHOWN]}…"


def explain_unknown_key(location: Location, known: Sequence[str], index: LineIndex) -> Problem:
    """An unknown key, with the nearest valid one or what another trainer's name is called here."""
    dotted = ".".join(str(part) for part in location)
    last = str(location[-1])
    plain = ".".join(str(part) for part in location if not isinstance(part, int))
    hint = _suggestion(plain[:_SHOWN], last[:_SHOWN], known)
    return Problem(index.where(location), f"unknown key {short(dotted)}", hint)


def _suggestion(dotted: str, last: str, known: Sequence[str]) -> str:
    if last in REFUSED_NAMES:
        return REFUSED_NAMES[last]
    if last in FOREIGN_NAMES:
        return f"here this is called {FOREIGN_NAMES[last]}"
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    tables = {name.split(".")[0] for name in known}
    if "." not in dotted and (near := difflib.get_close_matches(dotted, tables, 1, 0.6)):
        return f"did you mean [{near[0]}]?"
    table = dotted.rpartition(".")[0]
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == table}
    for choices in (siblings, {name.rpartition(".")[2]: name for name in known}):
        if near := difflib.get_close_matches(last, choices, 1, 0.6):
            return f"did you mean {choices[near[0]]}?"
    return f"keys of [{table}]: {', '.join(siblings)}" if siblings else f"tables: {', '.join(sorted(tables))}"


def apply_override(raw: dict[str, Any], item: str, index: LineIndex) -> Problem | None:
    """Put one `table.key=value` into the parsed recipe. Values are TOML; what is no TOML is a string."""
    where = f"`overrides` {short(item)}"
    name, separator, text = item.partition("=")
    *tables, key = keys = name.strip().split(".")
    if not separator or not tables or not all(keys) or len(keys) > _DEEPEST:
        return Problem(where, "is not table.key=value", "for example `overrides` train.learning_rate=1e-4")
    try:
        parsed = parse(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text.strip()
    except ForeignTomlError:
        value = text.strip()
    place: Any = raw
    for step in tables:
        if isinstance(place, dict):
            place = place.setdefault(step, {})
        elif isinstance(number := _number(step), int) and number < len(place):
            place = place[number]
        else:
            numbers = f"entries are numbered 0 to {len(place) - 1}"
            return Problem(where, f"there is no entry {short(step)!r}", numbers)
        if not isinstance(place, (dict, list)):
            what = f"{short(step)} is a value, not a table"
            return Problem(where, what, "for example `overrides` train.max_steps=20")
    if isinstance(place, list):
        return Problem(where, "names a whole list entry", "for example `overrides` data.train.0.path=rows.jsonl")
    place[key] = value
    # An override replaces its alternative, so that --set train.max_steps=20 works on a recipe with epochs.
    if alternative := {"train.epochs": "max_steps", "train.max_steps": "epochs"}.get(name.strip()):
        place.pop(alternative, None)
    index.overrides[tuple(map(_number, keys))] = short(item)
    return None


def _number(step: str) -> int | str:
    return int(step) if step.isdecimal() and len(step) < 10 else step
