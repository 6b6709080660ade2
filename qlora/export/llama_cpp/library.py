"""Where llama.cpp's libraries lie, and its own block encoders, called by ctypes.

K- and IQ-quants are searches for the best scales, thousands of lines of C that change now and then; bytes equal to
llama.cpp's come only from ggml itself. Both packages that ship it export its C functions: xllamacpp in its extension
module, llama-cpp-python in `lib/`. Only the file is found and opened, neither package is imported: that would start
its backends. A call goes without the GIL, so that threads encode blocks of rows side by side.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qlora.errors import ExportError

Place = tuple[str, str, tuple[str, ...]]  # package, folder in it, file names on Linux, macOS and Windows
_XLLAMACPP: Place = ("xllamacpp", ".", ("xllamacpp*.so", "xllamacpp*.pyd"))
# The first that opens serves. Before ggml was split in parts (November 2024), llama-cpp-python had all of it in one
# libggml.
_PLACES: tuple[Place, ...] = (
    _XLLAMACPP,
    ("llama_cpp", "lib", ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll")),
    ("llama_cpp", "lib", ("libggml.so", "libggml.dylib", "ggml.dll", "libggml.dll")),
)
# What holds llama.cpp's own C functions, those that load and run models.
_LLAMA_PLACES: tuple[Place, ...] = (
    _XLLAMACPP,
    ("llama_cpp", "lib", ("libllama.so", "libllama.dylib", "llama.dll", "libllama.dll")),
)
_INSTALL = 'pip install "qlora[gguf]"'


@dataclass(frozen=True)
class Ggml:
    """An opened ggml: where it was found, and its functions."""

    path: Path
    functions: Any  # ctypes.CDLL with argument types set

    def quantize(
        self, kind: GGMLQuantizationType, rows_RC: np.ndarray, out_RB: np.ndarray, importance_C: np.ndarray | None
    ) -> bool:
        """Encode float32 rows into `out_RB` (uint8, rows × bytes a row). False: the blocks hold scales that overflow.

        All arrays are C-contiguous. `importance_C` (float32) weighs the squared error of each column.
        """
        rows, columns = rows_RC.shape
        pointer = None if importance_C is None else importance_C.ctypes.data
        written = self.functions.ggml_quantize_chunk(
            kind.value, rows_RC.ctypes.data, out_RB.ctypes.data, 0, rows, columns, pointer
        )
        assert written == out_RB.nbytes, f"{written} bytes written, {out_RB.nbytes} expected"
        return bool(self.functions.ggml_validate_row_data(kind.value, out_RB.ctypes.data, out_RB.nbytes))


def find_library() -> Ggml:
    """The ggml of an installed xllamacpp or llama-cpp-python. Raises ExportError, with the command, without one."""
    reasons = []
    for _, path in _files(_PLACES):
        try:
            return open_library(path)
        except ExportError as error:
            reasons.append(error.what)
    what = "K- and IQ-quants need llama.cpp's encoders, and neither xllamacpp nor llama-cpp-python is installed"
    raise ExportError("; ".join(reasons) or what, f"{_INSTALL}, or choose f16, bf16 or q8_0")


def open_library(path: Path) -> Ggml:
    """Open the shared library `path`. Raises ExportError when it cannot be loaded or is no ggml that we can use."""
    try:
        functions = ctypes.CDLL(str(path))
        _declare(functions)
    except (OSError, AttributeError) as error:  # AttributeError: ctypes' word for a missing function
        raise ExportError(f"{path}: not a usable ggml ({error})", _INSTALL) from error
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.IQ4_XS):
        block, size = GGML_QUANT_SIZES[kind]
        if functions.ggml_row_size(kind.value, block) != size:
            raise ExportError(f"{path}: its {kind.name} blocks are not of {size} bytes", f"{_INSTALL} --upgrade")
    return Ggml(path, functions)


def find_llama() -> tuple[str, Path] | None:
    """The package of an installed llama.cpp (xllamacpp or llama_cpp) and its library; None without one."""
    return next(_files(_LLAMA_PLACES), None)


def _files(places: Iterable[Place]) -> Iterator[tuple[str, Path]]:
    """Package and path of every library in `places`."""
    for package, folder, patterns in places:
        spec = importlib.util.find_spec(package)  # looks for the package, does not run it
        for root in spec.submodule_search_locations or () if spec else ():
            for pattern in patterns:
                yield from ((package, path) for path in sorted((Path(root) / folder).glob(pattern)))


def _declare(functions: Any) -> None:
    """Argument types as in ggml.h; an `enum ggml_type` is an int."""
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    functions.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, integer, integer, integer, pointer)
    functions.ggml_quantize_chunk.restype = size
    functions.ggml_row_size.argtypes = (ctypes.c_int, integer)
    functions.ggml_row_size.restype = size
    functions.ggml_validate_row_data.argtypes = (ctypes.c_int, pointer, size)
    functions.ggml_validate_row_data.restype = ctypes.c_bool
