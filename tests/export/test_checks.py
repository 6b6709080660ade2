"""Each artifact inspected before it gets its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.gguf.plan import GgufPlan, Tokens, plan
from qlora.export.llama_cpp import runtime
from qlora.export.verify import checks
from qlora.model.adapter_folder import read_adapter
from qlora.model.resolve import resolve
from tests.export.cases import KINDS, export, line, trained


def test_without_a_runtime_the_weights_are_measured_by_transformers(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "find_runtime", lambda: None)
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    report = export(tmp_path / "adapter", "gguf", quants=("q8_0",), out=tmp_path / "out")
    assert line(report, "gguf-q8_0").measured_by.startswith("transformers") and line(report, "gguf-q8_0").kl < 0.01
    assert any(check == "llama.cpp" and "pip install" in detail for _, check, _, detail in report.checks)


@pytest.fixture(scope="module")
def adapter_file(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, GgufPlan]:
    """An adapter's folder, its file, and the plan of its base."""
    folder = tmp_path_factory.mktemp("adapter")
    trained(llama, folder / "adapter", KINDS["plain"])
    export(folder / "adapter", "adapter-gguf", out=folder / "out", verify=False)
    planned = plan(resolve(str(llama), "main", Recorder()), None, Tokens(), ())
    return folder / "adapter", folder / "out" / "adapter-LoRA.gguf", planned


def test_an_adapter_file_holds_every_matrix_as_trained(adapter_file: tuple[Path, Path, GgufPlan]) -> None:
    adapter, file, planned = adapter_file
    inspection = checks.inspect_adapter(read_adapter(adapter), planned, file)
    assert [check.detail for check in inspection.checks] == ["28 matrices as trained"] and inspection.fidelity is None


def one_value(data: np.ndarray) -> None:
    data.reshape(-1)[3] *= 1.001


def not_finite(data: np.ndarray) -> None:
    data.reshape(-1)[3] = np.nan


@pytest.mark.parametrize("damage", [one_value, not_finite])
def test_a_matrix_that_is_another_is_named(
    adapter_file: tuple[Path, Path, GgufPlan], tmp_path: Path, damage: Callable[[np.ndarray], None]
) -> None:
    adapter, file, planned = adapter_file
    broken = tmp_path / file.name
    broken.write_bytes(file.read_bytes())
    entry = next(e for e in gguf.GGUFReader(broken, "r+").tensors if e.name == "blk.1.ffn_down.weight.lora_b")
    damage(entry.data)
    entry.data.base.flush() if hasattr(entry.data.base, "flush") else None
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_down\.weight\.lora_b is missing, damaged or not finite"):
        checks.inspect_adapter(read_adapter(adapter), planned, broken)


def test_matrices_of_another_adapter_do_not_belong_in_it(
    llama: Path, adapter_file: tuple[Path, Path, GgufPlan], tmp_path: Path
) -> None:
    """The file has more than the adapter that it is said to be."""
    adapter, file, planned = adapter_file
    less = read_adapter(adapter)
    some = {name: module for name, module in less.lora.items() if "layers.0" in name}
    with pytest.raises(ExportError, match="holds 28 tensors, not 14"):
        checks.inspect_adapter(replace(less, lora=some), planned, file)
