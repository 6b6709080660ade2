"""llama.cpp through its C functions, in a process of its own.

A file that llama.cpp cannot read may abort the process that loads it, so nothing of this runs in the parent; and
neither package of llama.cpp is imported, only its library is opened. Why not the packages' own interfaces: xllamacpp's
hands out log-probabilities as JSON text, a position a request, and listens on a port meanwhile; llama-cpp-python's are
another set again. The C functions are the same in both.

Two structures of parameters go to llama.cpp by value, and their layout changes between versions. They are therefore
never declared here: the library fills them with its defaults into room that is larger than they are, and the few fields
that we change are found by their known defaults. Where those are not found exactly once, the child stops and says so;
what was set is asked back from the context.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora.export import child

# Larger than any version's parameters (llama_context_params: 160 bytes in October 2026). A structure over 16 bytes is
# handed over in memory by the conventions of x86-64 (System V), arm64 and Windows, and what follows it is not read.
_ROOM = 1024
_F16, _F32 = 1, 0  # ggml.h, enum ggml_type
# llama_context_default_params() in llama.cpp's src/llama-context.cpp: n_ctx, n_batch, n_ubatch, n_seq_max.
_SIZES = struct.pack("<4I", 512, 2048, 512, 1)
# The same: cb_eval and its data are NULL, then type_k and type_v are F16, then abort_callback and its data are NULL.
_CACHE_TYPES = struct.pack("<QQiiQQ", 0, 0, _F16, _F16, 0, 0)
# The same: rope_scaling_type, pooling_type, attention_type and flash_attn_type are unset (-1), rope_freq_base and its
# scale 0 (from the file), yarn_ext_factor -1. 0 turns flash attention off.
_FLASH = struct.pack("<4i3f", -1, -1, -1, -1, 0.0, 0.0, -1.0)
_NO_FLASH = struct.pack("<4i3f", -1, -1, -1, 0, 0.0, 0.0, -1.0)
_VALUE_BYTES = 1 << 12  # of a value of a file's header: numbers and names
_BATCH = 512  # tokens of a row computed at a time
NO_MEMORY = "llama.cpp has no memory"
_OUTPUT_BYTES = 64 << 20  # fp32 logits that llama.cpp holds at a time


class Failed(Exception):
    """What the parent reports in words."""


class _Opaque(ctypes.Structure):
    _fields_ = (("room", ctypes.c_uint8 * _ROOM),)


class _Batch(ctypes.Structure):
    """llama.h, llama_batch: seven members, unchanged since 2023."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def open_llama(path: Path) -> Any:
    """The library with argument types set, as llama.h declares them."""
    pointer, integer, boolean = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "llama_backend_init": (None, ()),
        "llama_model_default_params": (_Opaque, ()),
        "llama_context_default_params": (_Opaque, ()),
        "llama_model_load_from_file": (pointer, (ctypes.c_char_p, _Opaque)),
        "llama_model_get_vocab": (pointer, (pointer,)),
        "llama_model_meta_val_str": (integer, (pointer, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)),
        "llama_model_chat_template": (ctypes.c_char_p, (pointer, ctypes.c_char_p)),
        "llama_init_from_model": (pointer, (pointer, _Opaque)),
        "llama_n_ctx": (ctypes.c_uint32, (pointer,)),
        "llama_n_batch": (ctypes.c_uint32, (pointer,)),
        "llama_n_seq_max": (ctypes.c_uint32, (pointer,)),
        "llama_get_memory": (pointer, (pointer,)),
        "llama_memory_clear": (None, (pointer, boolean)),
        "llama_set_n_threads": (None, (pointer, integer, integer)),
        "llama_batch_init": (_Batch, (integer, integer, integer)),
        "llama_decode": (integer, (pointer, _Batch)),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (pointer, integer)),
        "llama_vocab_n_tokens": (integer, (pointer,)),
        "llama_vocab_is_eog": (boolean, (pointer, integer)),
        "llama_tokenize": (
            integer,
            (pointer, ctypes.c_char_p, integer, ctypes.POINTER(integer), integer, boolean, boolean),
        ),
    }
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:  # AttributeError: ctypes' word for a missing function
        raise Failed(f"{path.name} is of another version ({error})") from error
    return library


@dataclass(frozen=True)
class Model:
    """A loaded file."""

    library: Any
    model: int
    vocabulary: int  # llama.cpp's pointer

    @classmethod
    def load(cls, library: Any, file: Path) -> Model:
        library.llama_backend_init()
        model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
        if not model:
            raise Failed("llama.cpp cannot load it")
        return cls(library, model, library.llama_model_get_vocab(model))

    @property
    def tokens(self) -> int:
        return int(self.library.llama_vocab_n_tokens(self.vocabulary))

    def describe(self) -> dict[str, Any]:
        """What llama.cpp has understood of tokens and template."""
        llama, template = self.library, self.library.llama_model_chat_template(self.model, None)
        return {
            "tokens": self.tokens,
            "end_ids": [at for at in range(self.tokens) if llama.llama_vocab_is_eog(self.vocabulary, at)],
            "chat_template": None if template is None else template.decode("utf-8", "replace"),
        }

    def value(self, key: str) -> str | None:
        """A key of the file's header as text; None where it has none."""
        room = ctypes.create_string_buffer(_VALUE_BYTES)
        found = self.library.llama_model_meta_val_str(self.model, key.encode(), room, _VALUE_BYTES)
        return room.value.decode("utf-8", "replace") if found >= 0 else None

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """The ids of `text`, special tokens in it as such; `add_special`: with what the file says to add around it."""
        encoded = text.encode()
        room = len(encoded) + 8
        ids = (ctypes.c_int32 * room)()
        count = self.library.llama_tokenize(self.vocabulary, encoded, len(encoded), ids, room, add_special, True)
        if count < 0:
            raise Failed(f"llama.cpp makes {-count} tokens of {len(encoded)} bytes")
        return list(ids[:count])


@dataclass(frozen=True)
class Context:
    """A loaded model with its F32 cache, for one row of tokens at a time."""

    model: Model
    context: int
    batch: _Batch

    @classmethod
    def open(cls, model: Model, longest: int, threads: int) -> Context:
        library = model.library
        parameters = context_parameters(library.llama_context_default_params(), longest)
        context = library.llama_init_from_model(model.model, parameters)
        if not context:
            raise Failed(f"{NO_MEMORY} for {longest} tokens")
        got = (library.llama_n_ctx(context), library.llama_n_batch(context), library.llama_n_seq_max(context))
        if got[0] < longest or got[1:] != (_BATCH, 1):
            raise Failed(f"this llama.cpp understands its parameters otherwise (context, batch, rows: {got})")
        library.llama_set_n_threads(context, threads, threads)
        batch = library.llama_batch_init(_BATCH, 0, 1)
        if batch.n_tokens != 0 or batch.embd or not (batch.token and batch.pos and batch.logits):
            raise Failed("this llama.cpp has another kind of batch")
        for place in range(_BATCH):  # all tokens are of one row, number 0
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
        return cls(model, context, batch)

    def restart(self) -> None:
        """Forget the row."""
        self.model.library.llama_memory_clear(self.model.library.llama_get_memory(self.context), True)

    def logits(self, ids: Sequence[int], start: int, wanted: frozenset[int]) -> Iterator[NDArray[np.float32]]:
        """Compute tokens at places `start`, … of the row, giving the logits (V,) at those in `wanted`, in order.

        An array is llama.cpp's own memory: valid until the next is asked for.
        """
        width, library = self.model.tokens, self.model.library
        most_outputs = max(1, _OUTPUT_BYTES // (4 * width))
        at = 0
        while at < len(ids):
            outputs: list[int] = []
            count, batch = 0, self.batch
            for token in ids[at : at + _BATCH]:
                position = start + at + count
                wants = position in wanted
                if wants and len(outputs) == most_outputs:
                    break
                if wants:
                    outputs.append(count)
                batch.token[count], batch.pos[count], batch.logits[count] = token, position, wants
                count += 1
            batch.n_tokens = count
            if library.llama_decode(self.context, batch) != 0:
                raise Failed(f"llama.cpp cannot compute tokens {start + at} to {start + at + count} of a row")
            for place in outputs:
                yield np.ctypeslib.as_array(library.llama_get_logits_ith(self.context, place), (width,))
            at += count

    def greedy(self, ids: Sequence[int], ends: frozenset[int], limit: int) -> list[int]:
        """The likeliest continuation of a row's tokens, without the token of `ends` that ends it."""
        self.restart()
        written: list[int] = []
        start, following = 0, list(ids)
        while len(written) < limit:
            last = start + len(following) - 1
            (token,) = (int(logits_V.argmax()) for logits_V in self.logits(following, start, frozenset((last,))))
            if token in ends:
                break
            written.append(token)
            start, following = last + 1, [token]
        return written


def context_parameters(defaults: _Opaque, longest: int) -> _Opaque:
    """The library's default parameters with room for `longest` tokens, batches of our size, and attention in F32."""
    raw = bytes(defaults.room)
    if not raw.startswith(_SIZES) or raw.count(_CACHE_TYPES) != 1 or raw.count(_FLASH) != 1:
        raise Failed("the parameters of this llama.cpp are laid out otherwise than known")
    # Both defaults cost exactness on a CPU, measured on the quickstart's base: the cache in F16 5e-4 in the
    # log-probabilities, flash attention up to 2e-2 even with an F32 cache (without either: 6e-5).
    types = struct.pack("<QQiiQQ", 0, 0, _F32, _F32, 0, 0)
    raw = raw.replace(_CACHE_TYPES, types).replace(_FLASH, _NO_FLASH)
    raw = struct.pack("<4I", max(longest, _BATCH), _BATCH, _BATCH, 1) + raw[len(_SIZES) :]
    changed = _Opaque()
    ctypes.memmove(changed.room, raw, _ROOM)
    return changed


def log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities, summed in fp64."""
    wide = logits_V.astype(np.float64)
    wide -= wide.max()
    result: NDArray[np.float32] = (wide - np.log(np.exp(wide).sum())).astype(np.float32)
    return result


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that the request asks of one file; log-probabilities go into `folder`/logprobs.f32."""
    model = Model.load(open_llama(Path(request["library"])), Path(request["file"]))
    tokenized = [model.tokenize(text, request["add_special"]) for text in request["texts"]]
    if rows := request["rows"]:
        context = Context.open(model, max(len(ids) for ids, _ in rows), request["threads"])
        with (folder / "logprobs.f32").open("wb") as file:
            for ids, positions in rows:
                context.restart()
                for logits_V in context.logits(ids, 0, frozenset(positions)):
                    file.write(log_softmax(logits_V).data)
    about = model.describe()
    values = {key: value for key in request["keys"] if (value := model.value(key)) is not None}
    written = _written(model, request, frozenset(about["end_ids"]))
    return {**about, "values": values, "tokenized": tokenized, "written": written}


def _written(model: Model, request: dict[str, Any], ends: frozenset[int]) -> list[list[int]]:
    """The greedy answer to each prompt of the request."""
    prompts, limit = request["prompts"], request["max_new_tokens"]
    if not prompts:
        return []
    context = Context.open(model, max(map(len, prompts)) + limit, request["threads"])
    return [context.greedy(ids, ends | frozenset(request["more_ends"]), limit) for ids in prompts]


def main(request_file: Path) -> int:
    """Answer a request. Exit code 3 with the reason in answer.json when llama.cpp says no; it may also just die."""
    try:
        found, code = answer(child.read_request(request_file), request_file.parent), 0
    except Failed as failed:
        found, code = {"failed": str(failed)}, 3
    child.write_answer(request_file, found)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
