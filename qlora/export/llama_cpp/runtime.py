"""A GGUF file opened by llama.cpp itself, in a child process, and asked what it makes of texts and tokens.

The child loads a file that may be broken: it may abort, hang, or eat memory. Here that becomes an ExportError of two
lines. What goes there and back is JSON, but for log-probabilities, which come as raw fp32 in a file that is mapped.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlora import child_process
from qlora.errors import DoesNotFit, ExportError
from qlora.export import child
from qlora.export.llama_cpp.library import find_llama

_CHILD = "qlora.export.llama_cpp.runtime_child"
_DISTRIBUTIONS = {"xllamacpp": "xllamacpp", "llama_cpp": "llama-cpp-python"}
# A file of 5 GB at 4 tokens a second, the slowest laptop that anyone would wait for, is 2e10 byte-tokens a second.
BYTE_TOKENS_PER_SECOND = 2e10
START_SECONDS = 120.0  # opening the library and a large file from a cold disk


@dataclass(frozen=True)
class Runtime:
    """An installed llama.cpp: the package's name with its version, and the library in it."""

    name: str
    library: Path


@dataclass(frozen=True)
class Request:
    """What is asked of one file.

    texts        to be tokenized, special tokens in them as such
    add_special  with the file's BOS and EOS
    rows         token ids of a row, and the positions in it whose log-probabilities are wanted (each row alone)
    prompts      token ids that are to be continued greedily, each alone, by `max_new_tokens` at most
    more_ends    what ends an answer beside the file's own end tokens
    keys         of the file's header, whose values are wanted as text
    """

    texts: tuple[str, ...] = ()
    add_special: bool = True
    rows: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    prompts: Sequence[Sequence[int]] = ()
    max_new_tokens: int = 0
    more_ends: Sequence[int] = ()
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What llama.cpp has understood of a file, and computed with it.

    end_ids        what ends a generation; control tokens that it takes for such by their text too
    chat_template  None where the file has none
    tokenized      ids of each of the request's texts
    written        ids of the answer to each of the request's prompts, without what ended it
    logprobs_NV    fp32, a position of a row after the other; valid inside the `with` block alone
    values         of the keys that the file has
    """

    end_ids: Sequence[int]
    chat_template: str | None
    tokenized: Sequence[Sequence[int]]
    written: Sequence[Sequence[int]]
    logprobs_NV: NDArray[np.float32]
    values: Mapping[str, str]


def find_runtime() -> Runtime | None:
    """The installed xllamacpp, else llama-cpp-python, else None."""
    found = find_llama()
    if found is None:
        return None
    package, library = found
    distribution = _DISTRIBUTIONS[package]
    return Runtime(f"{distribution} {importlib.metadata.version(distribution)}", library)


@contextmanager
def ask(runtime: Runtime, file: Path, request: Request, limit_seconds: float | None = None) -> Iterator[Answer]:
    """llama.cpp's answer about a GGUF file. One process, one load of the file, whatever is asked.

    Raises ExportError when the process dies, says no, or takes longer than `limit_seconds` (by default by the work).
    """
    tokens = sum(len(ids) for ids, _ in request.rows)
    tokens += sum(len(ids) + request.max_new_tokens for ids in request.prompts)
    seconds = limit_seconds or START_SECONDS + tokens * file.stat().st_size / BYTE_TOKENS_PER_SECOND
    with tempfile.TemporaryDirectory(prefix="qlora-runtime-") as name:
        folder = Path(name)
        asked = {**asdict(request), "library": str(runtime.library), "file": str(file), "threads": threads()}
        answer = _answer_of_child(file, child.run(_CHILD, asked, folder, seconds), seconds)
        count = sum(len(positions) for _, positions in request.rows)
        logprobs_NV = _mapped(file, folder / "logprobs.f32", (count, answer["tokens"]))
        template, tokenized = answer["chat_template"], answer["tokenized"]
        yield Answer(answer["end_ids"], template, tokenized, answer["written"], logprobs_NV, answer["values"])


def threads() -> int:
    """Threads for llama.cpp: half the processors, and no more than torch takes.

    Its threads wait for each other by spinning: on two processors that others use too, two took 15 times as long as
    one (quickstart's base, 1,200 positions: 37 and 2.4 s).
    """
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) // 2))


def _answer_of_child(file: Path, done: child.Outcome, seconds: float) -> Mapping[str, Any]:
    hint = "export again; if it happens again, use verify=False and report the file's quant and base"
    if "tokens" in done.answer:  # the last that is written: how the libraries then end their process changes nothing
        return done.answer
    if done.code is None:
        raise ExportError(f"{file}: llama.cpp did not answer within {seconds:.0f} s", hint)
    if done.ran_out_of_memory:
        what = f"{file}: out of memory while llama.cpp read it"
        raise DoesNotFit(what, "end other programs that hold memory, or use verify=False to keep the file")
    complaint = done.last_line("error", "assert", "invalid")
    reason = ": ".join(part for part in (done.answer.get("failed"), complaint) if part)
    raise ExportError(f"{file}: {reason or 'llama.cpp crashed'} ({child_process.how_it_ended(done.code)})", hint)


def _mapped(file: Path, path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    if shape[0] == 0:
        return np.empty(shape, dtype=np.float32)
    if path.stat().st_size != 4 * shape[0] * shape[1]:
        raise ExportError(f"{file}: llama.cpp computed {path.stat().st_size} bytes for {shape}", "export again")
    return np.memmap(path, dtype=np.float32, mode="r", shape=shape)
