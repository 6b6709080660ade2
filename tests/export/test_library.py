"""llama.cpp's libraries: the one that is found, and those that are passed over or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.errors import ExportError
from qlora.export.llama_cpp import library
from qlora.export.llama_cpp.runtime import find_runtime


def test_without_a_library_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_PLACES", (("no_such_package_at_all", ".", ("*.so",)),))
    with pytest.raises(ExportError, match="neither xllamacpp nor llama-cpp-python") as caught:
        library.find_library()
    assert 'pip install "qlora[gguf]"' in caught.value.hint


def test_a_library_that_is_none_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "half_a_llama"
    package.mkdir()
    (package / "half.so").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "_PLACES", (("half_a_llama", ".", ("*.so",)),))
    with pytest.raises(ExportError, match=r"half\.so: not a usable ggml"):
        library.find_library()


def test_a_library_without_ggml_is_refused() -> None:
    file = torch._C.__file__
    with pytest.raises(ExportError, match="not a usable ggml"):
        library.open_library(Path(file))


def test_without_a_package_there_is_no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_LLAMA_PLACES", ())
    assert find_runtime() is None
