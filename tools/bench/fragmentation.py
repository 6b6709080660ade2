"""What the caching allocator reserves beyond what is live: its replay over whole steps of several shapes and lengths.

    python tools/bench/fragmentation.py

`qlora/memory/overheads.py` holds the line that is fitted to this. Takes ten minutes on two cores; needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from qlora.memory import overheads
from qlora.memory.simulate import ModelSpec, Simulator, Workload
from qlora.recipe.sections import LoraSection, QuantizationSection

SHAPES = {"1B": (2048, 8192, 16, 32, 64), "3B": (3072, 8192, 28, 24, 128), "8B": (4096, 14336, 32, 32, 128)}
LENGTHS = (512, 2048, 8192)
GIB, MIB = 1 << 30, 1 << 20


def text_of(shape: str) -> Any:
    from transformers import AutoConfig

    hidden, inner, layers, heads, width = SHAPES[shape]
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=width,
        vocab_size=128256,
        tie_word_embeddings=shape != "8B",
    )


def main() -> None:
    print(f"{'shape':6}{'tokens':>7}{'recompute':>11}{'live GiB':>10}{'beyond MiB':>12}{'fitted MiB':>12}{'off':>8}")
    for shape in SHAPES:
        for length in LENGTHS:
            for recompute in (True, False):
                spec = ModelSpec(text_of(shape), shape, LoraSection(), QuantizationSection())
                done = Simulator(spec, whole=True).run(Workload(1, length, gradient_checkpointing=recompute))
                worst = done.worst
                live = worst.total + worst.slack
                found = max(peak.reserved for peak in done.phases.values()) - live
                part = (worst.total - worst.parts["weights"]) * overheads.FRAGMENTATION_SHARE
                fitted = overheads.FRAGMENTATION_BASE_BYTES + part
                print(
                    f"{shape:6}{length:>7}{recompute!s:>11}{live / GIB:>10.2f}{found / MIB:>12.0f}"
                    f"{fitted / MIB:>12.0f}{(fitted - found) / (live + found):>8.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
