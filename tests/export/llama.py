"""llama.cpp in this process, asked for what no export asks: greedy answers, and a LoRA adapter on top of a file."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora.export.llama_cpp.runtime import find_runtime
from qlora.export.llama_cpp.runtime_child import Context, Failed, Model, log_softmax, open_llama

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]  # token ids, and the positions that are wanted


def opened(file: Path, longest: int) -> Context:
    """A file of ours with room for `longest` tokens; skips where no llama.cpp is installed."""
    found = find_runtime()
    if found is None:
        pytest.skip("needs xllamacpp or llama-cpp-python")
    return Context.open(Model.load(open_llama(found.library), file), longest, 1)


def greedy(
    file: Path, prompts: Sequence[Sequence[int]], end_ids: Collection[int] = (), most: int = 32
) -> list[list[int]]:
    """The most likely continuation of each prompt, of `most` tokens or up to, and without, an end id."""
    context = opened(file, max(map(len, prompts)) + most)
    answers = []
    for prompt in prompts:
        context.restart()
        answer: list[int] = []
        new, start = list(prompt), 0
        while len(answer) < most:
            (logits,) = context.logits(new, start, frozenset((start + len(new) - 1,)))
            token = int(logits.argmax())
            if token in end_ids:
                break
            answer.append(token)
            start, new = start + len(new), [token]
        answers.append(answer)
    return answers


def logprobs(file: Path, rows: Rows) -> torch.Tensor:
    """Log-probabilities (N, V) at the wanted positions, as `runtime.ask` gives them, without a process of its own."""
    context = opened(file, max(len(ids) for ids, _ in rows))
    found = []
    for ids, positions in rows:
        context.restart()
        found += [log_softmax(row) for row in context.logits(list(ids), 0, frozenset(positions))]
    return torch.from_numpy(np.stack(found))


def logprobs_with_adapter(file: Path, adapter: Path, rows: Rows) -> torch.Tensor:
    """Log-probabilities (N, V) at the wanted positions, with the adapter's GGUF on top of the base's."""
    context = opened(file, max(len(ids) for ids, _ in rows))
    llama, pointer = context.model.library, ctypes.c_void_p
    llama.llama_adapter_lora_init.restype = pointer
    llama.llama_adapter_lora_init.argtypes = (pointer, ctypes.c_char_p)
    scales = ctypes.POINTER(ctypes.c_float)
    llama.llama_set_adapters_lora.argtypes = (pointer, ctypes.POINTER(pointer), ctypes.c_size_t, scales)
    loaded = llama.llama_adapter_lora_init(context.model.model, str(adapter).encode())
    if not loaded:
        raise Failed(f"llama.cpp cannot load the adapter {adapter.name}")
    assert llama.llama_set_adapters_lora(context.context, (pointer * 1)(loaded), 1, (ctypes.c_float * 1)(1.0)) == 0
    found = []
    for ids, positions in rows:
        context.restart()
        found += [log_softmax(row) for row in context.logits(list(ids), 0, frozenset(positions))]
    return torch.from_numpy(np.stack(found))
