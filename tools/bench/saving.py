"""How long a run stands still for a save: for the copy of its state, and for all of it where no thread wrote.

    python tools/bench/saving.py --folder DIR              # adapters of Llama 3.1 8B's shape, rank 16: 42 M values
    python tools/bench/saving.py --folder DIR --rank 64

The state is one after an update, on the CPU; DIR is on the disk that is measured. Each save is timed in its two parts:
`copy` is what training waits for, `write` what the thread does meanwhile (files, their hashes, flush, rename). Seconds,
medians; the machine's load stands beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from this_machine import hardware  # noqa: E402

from qlora.model.identity import Fingerprints  # noqa: E402
from qlora.step.optimizer import AdapterOptimizer  # noqa: E402
from qlora.training import checkpoint  # noqa: E402

# Rows and columns of the seven products of a layer of Llama 3.1 8B (its config.json: 4,096 wide, 14,336 between, 1,024
# for keys and for values).
LAYERS = 32
PRODUCTS = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}


def trained(layers: int, products: Mapping[str, tuple[int, int]], rank: int) -> AdapterOptimizer:
    """The adapters of so many layers after one update, with the moments that a run has."""
    parameters = {}
    for layer in range(layers):
        for name, (rows, columns) in products.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            parameters[f"{prefix}.lora_A.weight"] = torch.nn.Parameter(torch.randn(rank, columns).bfloat16())
            parameters[f"{prefix}.lora_B.weight"] = torch.nn.Parameter(torch.randn(rows, rank).bfloat16())
    optimizer = AdapterOptimizer(parameters, "paged_adamw_8bit", 0.0)
    for key, parameter in parameters.items():
        optimizer.add_gradient(key, torch.randn(parameter.shape) * 1e-3)
    optimizer.gradient_norm()
    optimizer.step(1e-4)
    return optimizer


def measure(optimizer: AdapterOptimizer, folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of the copy and of the writing of a state, medians, and its bytes."""
    copies, writings, size = [], [], 0
    for step in range(1, repeats + 1):
        began = time.perf_counter()
        publish = checkpoint.snapshot(folder, checkpoint.RunState(step=step), optimizer, Fingerprints("b", "d"), 2, {})
        copied = time.perf_counter()
        size = publish().bytes
        copies.append(copied - began)
        writings.append(time.perf_counter() - copied)
    return {"copy": statistics.median(copies), "write": statistics.median(writings), "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    optimizer = trained(LAYERS, PRODUCTS, options.rank)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(optimizer, Path(folder), options.repeats)
    stands = found["copy"] / (found["copy"] + found["write"])
    print(f"{hardware()['cpu']}, load {before:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(f"{found['bytes'] / 2**20:.0f} MiB: copy {found['copy']:.3f} s, write {found['write']:.3f} s")
    print(f"training waits for {stands:.1%} of a save")


if __name__ == "__main__":
    main()
