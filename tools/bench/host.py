"""Resident memory of a process that has imported what training imports, before it holds anything of a run.

    python tools/bench/host.py

`qlora/memory/overheads.py` holds the figure.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss) / (1 << 20)


def main() -> None:
    print(f"python {resident_mib():.0f} MiB")
    from transformers.models.llama import modeling_llama

    print(f"torch and transformers ({modeling_llama.LlamaModel.__name__}) {resident_mib():.0f} MiB")
    from peft import LoraConfig

    from qlora.third_party import import_bitsandbytes
    from qlora.training import loop, memory_plan

    import_bitsandbytes()
    named = [LoraConfig.__name__, loop.__name__, memory_plan.__name__]
    print(f"peft, bitsandbytes and ours {resident_mib():.0f} MiB ({', '.join(named)})")
    from qlora.model.tokenizer import open_tokenizer

    open_tokenizer(ROOT / "recipes/quickstart/base", "quickstart")
    print(f"a tokenizer {resident_mib():.0f} MiB")


if __name__ == "__main__":
    main()
