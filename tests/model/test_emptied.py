"""What a model held is given back while the model itself is still held, and the next one can be loaded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.model.base_folder import BaseFolder
from qlora.model.emptied import empty
from qlora.model.weight_receiving import Place
from qlora.model.weight_streaming import inside
from qlora.step.layerwise import recomputable, set_gradient_checkpointing
from qlora.step.offload import OnHost, Pool
from tests.card import Card, rehearsal
from tests.families import make_base
from tests.model.base_cache.cases import load as load_at
from tests.model.conftest import load

CPU = torch.device("cpu")


def test_no_storage_is_left_and_the_next_model_is_whole(base_of: Callable[[str], BaseFolder]) -> None:
    model = load(base_of("llama"))
    states = [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    assert states and all(state.absmax.numel() for state in states)
    empty(model)
    assert not any(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))
    assert not any(state.absmax.numel() or state.offset.numel() or state.state2.absmax.numel() for state in states)
    logits = load(base_of("llama"))(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert bool(torch.isfinite(logits).all())


def test_no_block_of_the_hosts_memory_is_held(base_of: Callable[[str], BaseFolder]) -> None:
    """Pinned for the inputs of layers, as many gigabytes as a run has needed."""
    model, pool = load(base_of("llama")), Pool(CPU)
    set_gradient_checkpointing(model, True, False, inputs=OnHost(pool, 2, 2))
    held = weakref.ref(pool)
    del pool
    assert held() is not None
    empty(model)
    gc.collect()
    assert held() is None and recomputable(model)


def test_a_gpu_that_failed_keeps_nobody_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of CUDA fails then; the error that ended the run is the one to be seen."""

    def fails(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    base = make_base("llama", tmp_path)
    with rehearsal(monkeypatch, Card()) as card:
        model, _ = load_at(base, cache=False, place=Place(streams=True))
        with torch.no_grad():
            model(input_ids=torch.arange(4)[None])
        monkeypatch.setattr(card, "synchronize", fails)
        empty(model)
    held = inside(model)
    assert held is not None and held.store.host_bytes == 0 and held.ring.slots == []
    assert not any(tensor.numel() for tensor in model.parameters())
