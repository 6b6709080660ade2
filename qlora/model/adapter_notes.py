"""What a stranger's adapter says of how its base was held in training: in 4 bit, or in 16.

peft writes nothing of it. It shows where the adapter names a base that is stored in 4 bit, as Unsloth's do, and in the
papers beside it: model cards of peft's and axolotl's list the quantization, LLaMA-Factory keeps its own arguments.
Where nothing says it, the base was held in 16 bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qlora import files
from qlora.recipe.sections import QuantizationSection

MAX_NOTES_BYTES = 1_000_000  # a model card has 5 kB
_PAPERS = ("README.md", "training_args.yaml", "llamaboard_config.yaml", "axolotl_config.yml")
# bitsandbytes' 4-bit weights by the names that they go by; GPTQ's, AWQ's and MLX's are others.
_NAME_IN_4BIT = re.compile(r"(?i)bnb[-_.]?(?:nf)?4[-_.]?bits?\b|(?<![a-z0-9])(?:nf4|fp4|4[-_]?bit)(?![a-z0-9])")
_OTHER_KINDS = re.compile(r"(?i)gptq|awq|mlx|gguf|ggml|exl[23]|hqq|aqlm|quanto|int4|w4a16")
_LINE = r"(?im)^[\s\-*>|`]*{}`?\s*[:=|]\s*`?{}\b"
_IN_4BIT = re.compile(
    "|".join(
        _LINE.format(key, value).removeprefix("(?im)")
        for key, value in (("load_in_4bit", "true"), ("quantization_bit", "4"), ("adapter", "qlora"))
    ),
    re.IGNORECASE | re.MULTILINE,
)
_KIND = re.compile(_LINE.format("bnb_4bit_quant_type", "(nf4|fp4)"))
_SINGLE = re.compile(_LINE.format("bnb_4bit_use_double_quant", "false"))


@dataclass(frozen=True)
class TrainedOn:
    """How the base was held in training, and what says it; `why` is None where nothing does."""

    quantization: QuantizationSection
    why: str | None


def trained_on(folder: Path, base_name: str) -> TrainedOn:
    """Of an adapter that is not ours and names `base_name`."""
    last = Path(base_name).name
    if _NAME_IN_4BIT.search(last) and not _OTHER_KINDS.search(last):
        return TrainedOn(QuantizationSection(), "it names a base that is stored in 4 bit")
    for name in _PAPERS:
        try:
            text = files.read_bytes(files.inside(folder, name), MAX_NOTES_BYTES).decode("utf-8", "replace")
        except (OSError, files.UnsafePathError):
            continue
        if _IN_4BIT.search(text):
            kind = _KIND.search(text)
            section = QuantizationSection(
                type=kind[1].lower() if kind else "nf4", double_quant=not _SINGLE.search(text)
            )  # type: ignore[arg-type]
            return TrainedOn(section, f"its {name} says so")
    return TrainedOn(QuantizationSection(type="none"), None)
