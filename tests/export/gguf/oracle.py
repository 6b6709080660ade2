"""llama.cpp's own tokenizer, asked through the C functions that xllamacpp's library exports.

It runs in a child process: llama.cpp aborts the process on some files. A file with the vocabulary alone is enough
(`vocab_only`). Structures and enumerations are those of llama.h (2026-10).
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
CONTROL_ATTRIBUTE = 8  # llama.h, LLAMA_TOKEN_ATTR_CONTROL


class ModelParams(ctypes.Structure):
    """llama.h, struct llama_model_params."""

    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("load_mtp", ctypes.c_bool),
    ]


def write_vocab_only(file: Path, entries: Sequence[Sequence[Any]], name: str = "tiny") -> Path:
    """A GGUF file without tensors that holds `entries` (key, value, type[, type of the members])."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_name(name)
    for entry in entries:
        writer.add_key_value(*entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def ask(file: Path, texts: Sequence[str], *, add_special: bool = True) -> Mapping[str, Any]:
    """What llama.cpp makes of a file: `ids` of each text (special tokens in it parsed), `bos`, `eos`, `eot`,
    `add_bos`, `add_eos`, `ends` (all ids at which it stops), `control` (all control tokens).

    Raises RuntimeError with its last words when it refuses the file or aborts.
    """
    question = json.dumps({"file": str(file), "texts": list(texts), "add_special": add_special})
    command = [sys.executable, "-m", "tests.export.gguf.oracle"]
    done = subprocess.run(command, input=question.encode(), capture_output=True, cwd=ROOT, timeout=120)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-2000:].decode(errors='replace')}")
    answer: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _library() -> ctypes.CDLL:
    import xllamacpp

    folder = Path(xllamacpp.__file__).parent
    library = ctypes.CDLL(str(next(path for path in folder.iterdir() if ".so" in path.name or path.suffix == ".pyd")))
    library.llama_model_default_params.restype = ModelParams
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParams]
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    for name in ("bos", "eos", "eot", "get_add_bos", "get_add_eos", "n_tokens"):
        getattr(library, f"llama_vocab_{name}").argtypes = [ctypes.c_void_p]
    for name in ("get_attr", "is_eog"):
        getattr(library, f"llama_vocab_{name}").argtypes = [ctypes.c_void_p, ctypes.c_int32]
    for name in ("get_add_bos", "get_add_eos", "is_eog"):
        getattr(library, f"llama_vocab_{name}").restype = ctypes.c_bool
    return library


def _tokenize(library: ctypes.CDLL, vocab: int, text: str, add_special: bool) -> list[int]:
    data = text.encode("utf-8")
    room = (ctypes.c_int32 * (len(data) + 8))()
    count = library.llama_tokenize(vocab, data, len(data), room, len(room), add_special, True)
    assert count >= 0, (text, count)
    return list(room[:count])


def main() -> None:
    question = json.loads(sys.stdin.buffer.read())
    library = _library()
    params = library.llama_model_default_params()
    params.vocab_only = True
    model = library.llama_model_load_from_file(question["file"].encode(), params)
    if not model:
        sys.exit(3)
    vocab = library.llama_model_get_vocab(model)
    count = range(library.llama_vocab_n_tokens(vocab))
    answer: dict[str, Any] = {
        name: getattr(library, f"llama_vocab_{'get_' if name.startswith('add') else ''}{name}")(vocab)
        for name in ("bos", "eos", "eot", "add_bos", "add_eos")
    }
    answer["ends"] = [number for number in count if library.llama_vocab_is_eog(vocab, number)]
    answer["control"] = [n for n in count if library.llama_vocab_get_attr(vocab, n) & CONTROL_ATTRIBUTE]
    answer["ids"] = [_tokenize(library, vocab, text, question["add_special"]) for text in question["texts"]]
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
