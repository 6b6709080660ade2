"""The trained model as the reference: loaded where it is needed, and refused where it cannot be measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import ExportError
from qlora.model import load
from tests.export.cases import KINDS, export, name_the_base, of_peft, trained


def test_without_verification_nothing_is_loaded(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("the trained model was loaded"))
    report = export(tmp_path / "adapter", "gguf", quants=("bf16",), out=tmp_path / "out", verify=False)
    assert report.merge_base == "nf4" and report.fidelity == () and report.checks == ()
    assert (tmp_path / "out" / "adapter-BF16.gguf").is_file()


def test_a_model_with_fewer_rows_than_tokens_is_refused(tmp_path: Path, llama: Path) -> None:
    of_peft(llama, tmp_path / "adapter", resize=300)
    name_the_base(tmp_path / "adapter", llama)
    with pytest.raises(ExportError, match=r"beyond the model's 300 rows"):
        export(tmp_path / "adapter", "hf", out=tmp_path / "out")


def test_an_importance_matrix_without_rows_is_refused_before_the_model_is_loaded(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="K-quants need llama.cpp's encoder")
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("the trained model was loaded"))
    with pytest.raises(ExportError, match="`imatrix` needs the rows"):
        export(tmp_path / "adapter", "gguf", quants=("q4_k_m",), imatrix=True, out=tmp_path / "out")
