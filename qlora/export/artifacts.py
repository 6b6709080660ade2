"""What is exported, into which folders, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from qlora.errors import ExportError
from qlora.events import Fidelity as FidelityEvent
from qlora.export.gguf.quant_mixes import QUANTS
from qlora.export.merge.merge import Merge
from qlora.export.merge.parts import MergeBase, Plan, make_plan
from qlora.model.adapter_folder import Adapter, Provenance
from qlora.model.adapter_seal import AdapterSeal
from qlora.model.base_folder import BaseFolder
from qlora.model.delivered_loss import DeliveredLoss
from qlora.model.meta_model import MetaModel, build
from qlora.report.drawn import Drawn

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qlora.data.chat import ChatTokenizer
    from qlora.data.prepare import PreparedData
    from qlora.recipe.sections import DataSection

FORMATS = ("hf", "gguf", "adapter-gguf", "adapter")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    verify         reopen and measure what was written
    max_kl         nats; a file whose mean KL is larger does not keep its name
    imatrix        weigh the errors of K- and IQ-quants by the activations of the run's rows
    dtype          of safetensors: bf16, f16 or f32
    tokenizer_pre  llama.cpp's name of the pre-tokenizer, where its structure is not known here
    """

    verify: bool = True
    max_kl: float | None = None
    imatrix: bool = False
    dtype: Literal["bf16", "f16", "f32"] = "bf16"
    tokenizer_pre: str | None = None


@dataclass(frozen=True)
class Source:
    """An adapter with its base, and the rows of its run where they are still there.

    `name` is the run's, or the adapter folder's; `datasets` are names of files or hub datasets; `delivered` is the loss
    that the run measured of this adapter, None where that is not known; `combined` says of which adapters it was made,
    None of one that was trained.
    """

    name: str
    adapter: Adapter
    seal: AdapterSeal
    origin: Provenance
    base: BaseFolder
    device: torch.device
    datasets: tuple[str, ...] = ()
    rows: RunRows | None = None
    delivered: DeliveredLoss | None = None
    combined: Mapping[str, Any] | None = None
    _plans: dict[MergeBase, Plan] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def meta_model(self) -> MetaModel:
        """The base without weights, built once for a whole export. Whoever computes with it takes a copy."""
        return build(self.base)

    def merge(self, merge_base: MergeBase, dtype: torch.dtype) -> Merge:
        """The adapter merged onto `merge_base`, planned once. Raises ExportError where it cannot be."""
        quantization = self.origin.quantization
        if merge_base not in self._plans:
            self._plans[merge_base] = make_plan(self.base, self.meta_model, self.adapter, merge_base, quantization)
        plan = self._plans[merge_base]
        return Merge(self.base, self.adapter, merge_base, quantization, self.device, plan, dtype)


@dataclass(frozen=True)
class RunRows:
    """A run's rows as tokens, with what made them."""

    data: PreparedData
    section: DataSection
    chat: ChatTokenizer


@dataclass(frozen=True)
class Artifact:
    """One folder to be published. `key` is "hf", "gguf-<quant>", "adapter-gguf", or "adapter" for a combined one."""

    key: str
    folder: Path
    quant: str | None = None

    @property
    def merged(self) -> bool:
        """Whether a merged model is in it, and not the adapter alone."""
        return self.key not in ("adapter-gguf", "adapter")


@dataclass(frozen=True)
class ExportedArtifact:
    """A published artifact. `merge_base` and `merged_modules` are None and 0 for an adapter alone.

    `set_aside` is where an earlier export lies now that had been changed since, `set_aside_bytes` its size.
    """

    format: str
    folder: Path
    bytes: int
    tensors: int
    merged_modules: int
    merge_base: MergeBase | None
    set_aside: str | None = None
    set_aside_bytes: int = 0


@dataclass(frozen=True)
class Report(Drawn):
    """All artifacts, the merge base (None where nothing was merged), and the table of fidelity (empty without
    verification). `checks` are the structural ones: the artifact's key, the check's name, whether it holds, detail.
    `evaluation` is the trained model's loss beside the delivered one (`evaluation.ComparedLoss`), None where it is not
    known; `choice` that of the merge base (`choice.Choice`), None where there was none; `pushed` what came of a push
    (`push.Pushed`), None where none was asked for; `told` the table as an event.
    """

    products: tuple[ExportedArtifact, ...]
    merge_base: MergeBase | None
    fidelity: tuple[Any, ...] = ()
    checks: tuple[tuple[str, str, bool, str], ...] = ()
    evaluation: Any = None
    choice: Any = None
    pushed: Any = None
    told: FidelityEvent | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """Of the first artifact: the only one, mostly."""
        return self.products[0].folder

    def drawing(self) -> RenderableType:
        """The table of fidelity; without one, the folders, which are told as they get their names."""
        from qlora.report import results
        from qlora.report.fidelity import fidelity_table

        if self.told is not None:
            return fidelity_table(self.told)
        sent = [] if self.pushed is None else [f"pushed to {self.pushed.url}"]
        return results.text([*(f"{one.format}  {one.bytes:,} bytes  {one.folder}" for one in self.products), *sent])


def plan_artifacts(to: Sequence[str], quants: Sequence[str], out: Path | None, default: Path) -> list[Artifact]:
    """The artifacts that `to` and `quants` name. One alone takes the folder `out` itself, several take folders in it.

    Raises ExportError for unknown names, and for quants without "gguf".
    """
    if unknown := [name for name in to if name not in FORMATS]:
        raise ExportError(f"unknown format {unknown[0]!r}", f"formats are {', '.join(FORMATS)}")
    if unknown := [name for name in quants if name not in QUANTS]:
        raise ExportError(f"unknown quant {unknown[0]!r}", f"quants are {', '.join(QUANTS)}")
    if quants and "gguf" not in to:
        raise ExportError("`quants` is for GGUF files", "add to='gguf'")
    wanted: list[tuple[str, str | None]] = []
    for name in dict.fromkeys(to):
        if name == "gguf":
            wanted += [(f"gguf-{quant}", quant) for quant in dict.fromkeys(quants or ("q8_0",))]
        else:
            wanted.append((name, None))
    if not wanted:
        raise ExportError("nothing to export", f"name a format: to={FORMATS[0]!r}")
    if out is not None and len(wanted) == 1:
        return [Artifact(wanted[0][0], out, wanted[0][1])]
    return [Artifact(key, (out or default) / key, quant) for key, quant in wanted]
