"""What is simulated, and what comes of it: the model and its workload, and bytes of every phase of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from qlora.memory import tape
from qlora.memory.asking import Asked, Asks
from qlora.memory.baselines import BASELINES, Baseline
from qlora.memory.operations import Work
from qlora.memory.trace import Peak
from qlora.model.weight_receiving import Place
from qlora.recipe.sections import LoraSection, QuantizationSection

DOCUMENT_TOKENS = 256  # of a document, where no rows are known
TRAIN_PHASES = ("forward", "loss", "backward", "backward end", "update")


@dataclass(frozen=True)
class ModelSpec:
    """What the model is made of: the same for every workload."""

    text: Any  # transformers' configuration of the causal model
    name: str
    lora: LoraSection
    quantization: QuantizationSection
    attention: str = "auto"
    target: str = "cuda"  # the device that the meta tensors stand for
    baseline: Baseline = BASELINES["qlora"]
    kernel: str | None = None  # what attends to documents (`attention_choice.assumed`); None: sdpa or eager with a mask
    functions: str | None = None  # who computes linear layers; None: who does in a new run of this `lora`
    loss_chunk: int | None = None  # of the loss that comes with its gradient, 0: it does not; None: as in a new run
    head_block: int = 0  # rows of the head that are there at a time, as a run has recorded them; 0: none has
    place: Place = field(default_factory=Place)  # what of the weights is on the host
    dtype: torch.dtype = torch.bfloat16  # in which our own step computes (`precision`)
    experts: str | None = None  # who multiplies with experts in 4 bit; None: who does in a new run

    @property
    def adapter_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype == torch.float16 else self.baseline.adapter_dtype

    @property
    def layers(self) -> int:
        return int(self.text.num_hidden_layers)


@dataclass(frozen=True)
class Workload:
    """What a step does: `rows` of `length` tokens. `packed`: rows hold several documents, or padding. `trained` of a
    row's tokens have a loss at most; 0 is all of them.

    `documents` are the most of a row (0: as many as have DOCUMENT_TOKENS); `multiprocessors` of the card, where sums
    are done in one order only (`trace.Sums`).

    Layers are recomputed with `gradient_checkpointing`: the first `recomputed` of them, 0 is all. `offloads`: their
    inputs wait on the host.

    `accumulates`: a step has several micro-batches, so that gradients live while one runs. `samples` prompts of
    `prompt_tokens` are answered with `new_tokens` between steps; 0 is none. `asks` are the batches of a study, `draws`
    a batch of the answers that a step of GRPO learns from.
    """

    rows: int
    length: int
    gradient_checkpointing: bool = True
    optimizer: str = "paged_adamw_8bit"
    packed: bool = True
    accumulates: bool = True
    neftune_alpha: float = 0.0
    evaluates: bool = True
    samples: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    trained: int = 0
    compares: bool = False  # answers with each other (`step/objectives.py`)
    rows_of_pack: int = 1  # of `rows`, those that a pair takes whose sides do not share one
    documents: int = 0
    multiprocessors: int = 0
    asks: Asks = ()
    recomputed: int = 0
    offloads: bool = False
    draws: Asked | None = None

    @property
    def recompute(self) -> bool | int:
        """As the recipe has it: True is all layers, a number the first so many."""
        return self.gradient_checkpointing and (self.recomputed or True)

    @property
    def document_lengths(self) -> tuple[int, ...]:
        count = max(1, min(self.length, self.documents or max(2, self.length // DOCUMENT_TOKENS))) if self.packed else 1
        first = [self.length // count] * (count - 1)
        return (*first, self.length - sum(first)) * self.rows


@dataclass(frozen=True)
class Simulation:
    """Bytes of every phase at its peak, and of what is kept from the first step to the last.

    `paged` of the optimizer's bytes are managed by the driver, which moves them to the host when it must; the
    allocator's counters don't show them. `reserved` is what the allocator takes from the driver over the step. `each`:
    activations that a layer more adds to a phase, 0 where none was added; `first`: of them, what the first keeps less.
    `held`: activations once every layer has been gone through forth, and none back. `pinned` bytes are the host's.
    `work`: what a step asks a GPU for.
    """

    phases: Mapping[str, Peak]
    kept: Mapping[str, int]
    paged: int
    reserved: tape.Reserved
    each: Mapping[str, int]
    first: int = 0
    held: int = 0
    pinned: int = 0
    work: Work | None = None

    @property
    def worst(self) -> Peak:
        """Of the phase with the highest total."""
        return self.peak_of(tuple(self.phases))

    def peak_of(self, names: Sequence[str]) -> Peak:
        """Of these phases, the one with the highest total; a phase that did not take place is left out."""
        return max((self.phases[name] for name in names if name in self.phases), key=lambda peak: peak.total)


class ValueCounts(NamedTuple):
    """Parameters: of all layers that "all-linear" means, of the largest of them, of the rest, and of adapters."""

    linear: int
    largest_linear: int
    other: int
    adapter: int


class Drawn(NamedTuple):
    """Of the model itself: its values, what a baseline held before, bytes of weights on the host, of these what is in
    tables of the vocabulary and of these in a head that comes in blocks, and of experts in 4 bit wherever they are."""

    values: ValueCounts
    cast_bytes: int
    host_bytes: int = 0
    table_bytes: int = 0
    head_bytes: int = 0
    stacked_bytes: int = 0
