"""What a run's numbers depend on beside its recipe, its base and its rows: kept with its state, compared by a resume.

Two runs with the same recipe end with the same bits where all of this is the same. Whoever chooses one of these things
(a backend of attention, a layout of the optimizer) takes what `of_run` says where this machine can, so that a resumed
run goes on as it began; what cannot be taken is said once, by `differences`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated

from pydantic import Field

from qlora import foreign_json

_Text = Annotated[str, Field(max_length=200)]
_Count = Annotated[int, Field(ge=0, le=2**53)]


class Numerics(foreign_json.ForeignModel):
    """Each field is None where it does not apply, or where the version that recorded it did not know it.

    A new field needs a default of None, its words in `_WORDS`, and its value in `run_numerics.decide`.
    """

    device: _Text | None = None  # the card as its driver calls it, or "cpu"
    capability: _Text | None = None  # of the card, such as "8.9"; of the CPU its vector instructions, such as "AVX2"
    threads: _Count | None = None  # on the CPU: a sum is split among them
    deterministic: bool | None = None  # the recipe's key; on a GPU: kernels sum in one order only
    attention: _Text | None = None  # the function that computes it
    head_chunk: _Count | None = None  # tokens whose logits exist at a time: gradients are summed chunk by chunk
    loss_chunk: _Count | None = None  # tokens whose loss comes with its gradient (`step/head_loss`); 0: none
    head_block: _Count | None = None  # rows of the head that are there at a time (`step/head_blocks`); 0: all
    functions: _Text | None = None  # who computes a linear layer with its adapter
    kernels: _Text | None = None  # who multiplies: on the CPU in fp32 or bf16
    mlp_tile: _Count | None = None  # rows of an MLP's tile, where rows are long: gradients are summed tile by tile
    fp32_tokens: _Count | None = None  # of a document that a CPU attends to in fp32, at most
    compiled: bool | None = None  # layers go through torch's compiler
    dtype: _Text | None = None  # in which 16 bits layers compute: bf16 or fp16
    experts: _Text | None = None  # who multiplies with experts in 4 bit: torch in chunks, or a kernel


# What a field is called in a message.
_WORDS = {
    "device": "device",
    "capability": "instructions",
    "threads": "threads",
    "deterministic": "train.deterministic",
    "attention": "attention",
    "head_chunk": "tokens a chunk of the head",
    "loss_chunk": "tokens a chunk of the loss",
    "head_block": "rows a block of the head",
    "functions": "linear layers",
    "kernels": "products",
    "mlp_tile": "rows a tile of an MLP",
    "fp32_tokens": "tokens attended to in fp32",
    "compiled": "compiled layers",
    "dtype": "model.dtype",
    "experts": "experts",
}
_OF_RUN: ContextVar[Numerics | None] = ContextVar("qlora_numerics", default=None)


def of_run() -> Numerics | None:
    """What was decided for the run that is under way in this thread; None outside of one."""
    return _OF_RUN.get()


@contextmanager
def in_force(numbers: Numerics) -> Iterator[None]:
    """Inside the block, `of_run` answers with `numbers`."""
    token = _OF_RUN.set(numbers)
    try:
        yield
    finally:
        _OF_RUN.reset(token)


def correct(numbers: Numerics) -> None:
    """Something turned out otherwise than decided: `of_run` answers with `numbers` until the run ends."""
    _OF_RUN.set(numbers)


def differences(recorded: Numerics, now: Numerics) -> list[str]:
    """What is another now, as "threads 2 (now 4)"; what one of the two does not know is not compared."""
    changed = []
    for name, word in _WORDS.items():
        before, after = getattr(recorded, name), getattr(now, name)
        if before is not None and after is not None and before != after:
            changed.append(f"{word} {_shown(before)} (now {_shown(after)})")
    return changed


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
