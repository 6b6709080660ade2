"""What no tensor shows: disk that checkpoints take, and libraries' own memory by kind of card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.memory import hardware, overheads
from qlora.model.base_cache import places
from qlora.model.identity import Fingerprints
from qlora.recipe.sections import MemorySection
from qlora.step.optimizer import AdapterOptimizer
from qlora.training import checkpoint
from qlora.training.checkpoint import RunState
from qlora.units import MIB
from tests.training.cases import ABOUT


def test_checkpoints_take_the_disk_that_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at when a new one gets its name: the old ones go only afterwards."""
    weight = torch.nn.Parameter(torch.randn(512, 256).bfloat16())
    optimizer = AdapterOptimizer({"l.lora_A.default.weight": weight}, "adamw", 0.0)
    for key, master in optimizer.masters.items():
        optimizer.add_gradient(key, torch.randn_like(master))
    optimizer.gradient_norm()
    optimizer.step(1e-3)
    real, taken = os.rename, [0]

    def rename(*arguments: object, **named: object) -> None:
        real(*arguments, **named)  # type: ignore[arg-type]
        taken.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))

    monkeypatch.setattr(os, "rename", rename)
    kept = 2
    for step in range(1, 6):
        checkpoint.snapshot(tmp_path, RunState(step=step), optimizer, Fingerprints("b", "d"), kept, ABOUT)()
    state = sum(tensor.nbytes for tensor in optimizer.state()[0].values())
    delivered = weight.nbytes  # the folder `adapter/` is not written here
    foreseen = overheads.disk_bytes(weight.nbytes, state, kept, merged=0) - delivered
    assert foreseen <= max(taken) < foreseen * 1.01


@pytest.mark.parametrize("cache", ["auto", True, False])
def test_a_kept_base_takes_the_disk_that_is_foreseen(cache: Any) -> None:
    def kept(values: int, quantization: str = "nf4") -> int:
        return overheads.kept_base_bytes(MemorySection(cache=cache), quantization, 700, values)

    assert kept(places.LEAST_BYTES // 2) == (700 if cache else 0)
    assert kept(places.LEAST_BYTES // 2 - 1) == (700 if cache is True else 0)
    assert kept(1 << 40, "none") == 0


def test_a_copy_of_the_state_takes_what_a_checkpoint_does(tmp_path: Path) -> None:
    """In pageable memory its bytes; in pinned memory the power of two above each block."""
    weight = torch.nn.Parameter(torch.randn(384, 256).bfloat16())
    optimizer = AdapterOptimizer({"l.lora_A.default.weight": weight}, "adamw_8bit", 0.0)
    copied = sum(flat.nbytes for flat in (optimizer.state()[0]["master/l.lora_A.default.weight"], weight))
    kept = weight.nbytes, optimizer.kept_bytes
    assert copied + optimizer.moments.buffer.nbytes == overheads.snapshot_bytes(*kept, pinned=False)
    moments = 1 << (optimizer.moments.buffer.nbytes - 1).bit_length()
    assert overheads.snapshot_bytes(*kept, pinned=True) == 2 * weight.nbytes + 512 * 1024 + moments


@pytest.mark.parametrize(
    ("card", "mebibytes"), [("RTX 4090", 2 * (8.125 + 1)), ("H100", 2 * (32 + 32)), ("RTX 5090", 2 * (8.125 + 1))]
)
def test_cublas_takes_its_workspaces_once_a_thread(card: str, mebibytes: float) -> None:
    capability = hardware.find(card).capability
    assert overheads.workspace_terms(capability) == {"cublas_workspace": mebibytes * MIB}
    fixed = overheads.workspace_terms(capability, deterministic=True)["cublas_workspace"]
    assert fixed >= 2 * 33 * MIB  # CUBLAS_WORKSPACE_CONFIG=:4096:8
