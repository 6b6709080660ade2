"""Whether an export is what was meant: reopened, every weight compared, and how it reads texts and when it stops.

Weights are compared in a child process (`weights_child`), all files of an export in one pass over the base. What a
model needs beside its weights is checked here: configuration, tokenizer, template, end tokens; of a GGUF file through
llama.cpp, where one is installed (`runtime.ask` gives the `Answer`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora import child_process
from qlora.errors import DoesNotFit, ExportError
from qlora.export import child
from qlora.export.gguf.metadata import Entry
from qlora.export.hf import DTYPE_NAMES, patched_config, patched_tokenizer_config
from qlora.export.llama_cpp.runtime import Answer
from qlora.export.merge.merge import Merge
from qlora.model.tensors import load_json, total_bytes
from qlora.model.tokenizer_files import TOKENIZER_FILES, read_files

_CHILD = "qlora.export.verify.weights_child"
_MEMORY_HINT = "end other programs that hold memory, or use verify=False to keep the files"
_HINT = "export again; if it happens again, report it with this line, and use verify=False to keep the files"
# The child imports torch and transformers, then reads, quantizes and compares at 10 MB/s or better on a slow laptop.
_START_SECONDS = 300.0
_BYTES_PER_SECOND = 1e7


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was found."""

    name: str
    ok: bool
    detail: str


def require(path: Path, checks: Iterable[Check]) -> None:
    """Raises ExportError naming the first of the checks of `path` that failed."""
    for check in checks:
        if not check.ok:
            raise ExportError(f"{path}: {check.name}: {check.detail}", _HINT)


@dataclass(frozen=True)
class Target:
    """What is to be reopened.

    path     a folder of safetensors, or a GGUF file
    dtype    of safetensors: BF16, F16 or F32; "" for GGUF
    types    of a GGUF file: the name of each tensor's type (GgufPlan.choices)
    keys     of a GGUF file: what must stand in its header; of a list {"length": n}
    """

    path: Path
    dtype: str = ""
    types: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)


def folder_target(folder: Path, dtype: torch.dtype) -> Target:
    """A written folder of safetensors."""
    return Target(folder, dtype=DTYPE_NAMES[dtype][0])


def gguf_target(file: Path, types: Mapping[str, Any], entries: Sequence[Entry]) -> Target:
    """A written GGUF file: type by tensor (gguf's enumeration), and the keys of its header."""
    keys = {
        entry.key: {"length": len(entry.value)} if isinstance(entry.value, (list, tuple)) else entry.value
        for entry in entries
    }
    return Target(file, types={name: kind.name for name, kind in types.items()}, keys=keys)


def reopen(merge: Merge, targets: Mapping[str, Target], limit_seconds: float | None = None) -> dict[str, list[Check]]:
    """Compare every weight of `targets` with what `merge` says must stand in them, in a child process.

    Raises ExportError when the child dies, or takes longer than `limit_seconds` (by default by the size of the base);
    DoesNotFit where it had no memory.
    """
    request = {
        "base": str(merge.base.path),
        "adapter": str(merge.adapter.folder),
        "merge_base": merge.merge_base,
        "quantization": merge.quantization.model_dump(mode="json"),
        "device": str(merge.device),
        "targets": [{**asdict(target), "path": str(target.path)} for target in targets.values()],
    }
    seconds = limit_seconds or _START_SECONDS + total_bytes(merge.base.tensors.values()) / _BYTES_PER_SECOND
    with tempfile.TemporaryDirectory(prefix="qlora-verify-") as name:
        done = child.run(_CHILD, request, Path(name), seconds)
    if "results" not in done.answer:  # with them, how the process then ended changes nothing
        raise _failure(done, seconds)
    found = zip(targets, done.answer["results"], strict=True)
    return {key: [Check(*result) for result in results] for key, results in found}


def _failure(done: child.Outcome, seconds: float) -> ExportError | DoesNotFit:
    if done.code is None:
        return ExportError(f"verification did not end within {seconds:.0f} s", _HINT)
    if done.ran_out_of_memory:
        return DoesNotFit("out of memory while verifying the export's weights", _MEMORY_HINT)
    reason = done.answer.get("failed") or done.last_line() or "no message"
    return ExportError(f"verification failed: {reason} ({child_process.how_it_ended(done.code)})", _HINT)


def check_companions(merge: Merge, folder: Path, end_ids: Sequence[int]) -> list[Check]:
    """Configuration, tokenizer and template of a folder of safetensors, and that it stops where training does.

    `end_ids` are the trained template's end tokens, the turn's own end first; transformers stops at those of
    generation_config.json, or without it of config.json.
    """
    source = merge.adapter.folder
    if not (source / "tokenizer_config.json").is_file():
        source = merge.base.path
    config, kept = folder / "config.json", "the base's, but for what merging changes"
    same_config = config.is_file() and config.read_text(encoding="utf-8") == patched_config(merge)
    same_tokenizer = all(_same_file(folder / name, source / name) for name in TOKENIZER_FILES)
    tokenizer = "the files of the training" if same_tokenizer else f"differs from the one of the training in {source}"
    checks = [
        Check("config", same_config, kept if same_config else "config.json differs"),
        Check("tokenizer", same_tokenizer, tokenizer),
    ]
    if read_files(source).has_template:
        there = read_files(folder).has_template
        checks.append(Check("chat template", there, "there" if there else "the training had one, the export has none"))
    if end_ids:
        checks.append(_stops(_stop_ids(folder), end_ids, "transformers"))
    return checks


def _same_file(written: Path, own: Path) -> bool:
    """Byte for byte, but for what tokenizer_config.json says in a way that transformers 4 does not know."""
    if not (written.is_file() and own.is_file()):
        return written.is_file() == own.is_file()
    wanted = patched_tokenizer_config(own).encode() if own.name == "tokenizer_config.json" else own.read_bytes()
    return written.read_bytes() == wanted


def check_answer(answer: Answer, end_ids: Sequence[int], template: str | None) -> list[Check]:
    """What llama.cpp has understood of a GGUF file's end tokens and chat template."""
    checks = [_stops(answer.end_ids, end_ids, "llama.cpp")] if end_ids else []
    if template is not None:
        same = answer.chat_template == template
        checks.append(Check("chat template", same, "there" if same else "missing, or another than the training's"))
    return checks


def check_tokens(answer: Answer, texts: Sequence[str], tokenizer: Any, add_special: bool = True) -> Check:
    """Whether llama.cpp makes of each text, the request's `texts`, the tokens that training's tokenizer makes."""
    wrong = [
        text
        for text, ids in zip(texts, answer.tokenized, strict=True)
        if list(ids) != list(tokenizer(text, add_special_tokens=add_special)["input_ids"])
    ]
    if wrong:
        return Check("tokenization", False, f"{len(wrong)} of {len(texts)} texts become other tokens, {wrong[0]!r:.60}")
    return Check("tokenization", True, f"{len(texts)} texts")


def _stops(stops: Collection[int], end_ids: Sequence[int], runtime: str) -> Check:
    """Answers were trained to end with the first, the turn's own end; a runtime need not know the others."""
    if end_ids[0] in stops:
        return Check("end tokens", True, f"{runtime} stops at {end_ids[0]}")
    return Check("end tokens", False, f"{runtime} does not stop at {end_ids[0]}, only at {sorted(stops)}")


def _stop_ids(folder: Path) -> set[int]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = load_json(folder / name).get("eos_token_id")
            if ids is not None:
                return {ids} if isinstance(ids, int) else set(ids)
    return set()
