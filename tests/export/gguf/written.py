"""A tiny base written as GGUF without an adapter, and asked by llama.cpp: what tests compare with transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from qlora.events import Recorder
from qlora.export.gguf.metadata import About, entries, general_keys
from qlora.export.gguf.plan import GgufPlan, Tokens, plan
from qlora.export.gguf.quant_mixes import QUANTS
from qlora.export.gguf.vocab import metadata
from qlora.export.gguf.write import GgufFile, Tools, write
from qlora.export.llama_cpp import runtime
from qlora.export.merge.merge import MergedTensor
from qlora.export.merge.parts import expert_pieces
from qlora.export.staging import StagedExport
from qlora.model.base_folder import BaseFolder
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.model.tensors import TensorEntry, read_tensor

Change = Callable[[GgufPlan], GgufPlan]


def unchanged(planned: GgufPlan) -> GgufPlan:
    return planned


def write_base(
    folder: Path, out: Path, quants: Sequence[str] = ("f32",), change: Change = unchanged
) -> dict[str, Path]:
    """Write the base in `folder` as GGUF, a file for each of `quants`; `change` breaks the plan on purpose."""
    base = resolve(str(folder), "main", Recorder())
    return write_planned(base, change(plan(base, None, Tokens(), quants)), plain_tensors(base), out)


def write_planned(
    base: BaseFolder,
    planned: GgufPlan,
    tensors: Sequence[MergedTensor],
    out: Path,
    importance: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, Path]:
    """Write these tensors of the base as `planned`, a file for each quant of the plan."""
    quants = tuple(planned.choices)
    general = general_keys(About.of(base, "tiny", ["rows"]), "model", planned.vocab.strips_after_specials)
    keys = [*entries([*general, *planned.layout.keys]), *metadata(planned.vocab)]
    files = [
        GgufFile(
            quant,
            f"{quant}.gguf",
            (*keys, *entries([("general.file_type", QUANTS[quant].file_type)])),
            planned.choices[quant].types,
        )
        for quant in quants
    ]
    finals = {quant: out / quant for quant in quants}
    with StagedExport.open(finals, {}, 1 << 20) as workshop:
        write(planned.layout, tensors, files, workshop, Tools(planned.library, importance), Recorder())
        for quant in quants:
            workshop.publish(quant)
    return {quant: finals[quant] / f"{quant}.gguf" for quant in quants}


def plain_tensors(base: BaseFolder) -> list[MergedTensor]:
    """The base's own weights as if they were merged."""
    meta_model = build(base)
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model.model.state_dict().items()}
    of_experts = expert_pieces(base, meta_model)
    return [
        MergedTensor(source, name, shapes[name], partial(_whole, base.tensors[source]))
        for name, source in meta_model.sources.items()
    ] + [
        MergedTensor(piece.tensor, name, (entry := base.tensors[piece.tensor]).shape, partial(_whole, entry))
        for name, (_, piece) in of_experts.items()
        if piece.tensor in base.tensors
    ]


def _whole(entry: TensorEntry, unit: int) -> Iterator[torch.Tensor]:
    yield read_tensor(entry)


def ask(file: Path, request: runtime.Request) -> torch.Tensor:
    """llama.cpp's log-probabilities (N, V); skips where no llama.cpp is installed."""
    found = runtime.find_runtime()
    if found is None:
        pytest.skip("needs xllamacpp or llama-cpp-python")
    with runtime.ask(found, file, request) as answer:
        return torch.from_numpy(answer.logprobs_NV.copy())


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([list(ids)]), use_cache=False).logits[0].float(), -1)


def with_layout(planned: GgufPlan, **changes: Any) -> GgufPlan:
    return replace(planned, layout=replace(planned.layout, **changes))
