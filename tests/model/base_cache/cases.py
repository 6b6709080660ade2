"""Kept bases for tests: files that are old enough to be known by their times, a load, and what it read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import manifest
from qlora.events import Notice, Recorder
from qlora.model import tensors
from qlora.model.base_cache import places, reading
from qlora.model.base_folder import BaseFolder
from qlora.model.load import load_base
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection

CPU = torch.device("cpu")
NF4 = QuantizationSection()


def aged(folder: Path, seconds: float = 60.0) -> Path:
    """The same folder, its files written some time ago."""
    past = time.time() - seconds
    for file in folder.iterdir():
        os.utime(file, (past, past))
    return folder


def base_at(folder: Path) -> BaseFolder:
    return resolve(str(folder), "main", Recorder())


def load(folder: Path, quantization: QuantizationSection = NF4, cache: Any = True) -> tuple[Any, list[str]]:
    """The model, and what was said about the cache."""
    sink = Recorder()
    model = load_base(base_at(folder), quantization, "auto", CPU, sink, cache)
    return model, [one.message for one in sink.events if isinstance(one, Notice) and one.topic == "cache"]


def state_of(model: Any) -> dict[str, Any]:
    """Every tensor and number of a model: parameters, buffers, and all that belongs to 4-bit weights."""
    found: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, weight in model.named_parameters():
        part, state = "state", getattr(weight, "quant_state", None)
        while state is not None:
            for key in ("absmax", "code", "offset", "shape", "dtype", "blocksize", "quant_type", "nested"):
                found[f"{name}/{part}/{key}"] = getattr(state, key, None)
            part, state = f"{part}2", getattr(state, "state2", None)
    return found


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, in each type, shape and class."""
    mine, others = state_of(one), state_of(other)
    assert mine.keys() == others.keys() and len(mine) > 10
    for name, value in mine.items():
        there = others[name]
        assert type(value) is type(there), name
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape, value.device) == (there.dtype, there.shape, there.device), name
            assert torch.equal(value, there), name
            assert value.requires_grad == there.requires_grad, name
        else:
            assert value == there, name
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (one, other)]
    assert kinds[0] == kinds[1] and one.is_loaded_in_4bit == other.is_loaded_in_4bit
    assert one.base_identity == other.base_identity


def kept() -> list[Path]:
    """The folders of bases in the cache that are whole by their names."""
    return [one.folder for one in places.held(places.root()) if places.NAME.fullmatch(one.folder.name)]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Bytes that are read of weight files: `original` in tensors or rows, `samples` of their bytes, `cache`."""
    read = {"original": 0, "samples": 0, "cache": 0}
    fill, spans, into = tensors._fill, tensors.read_spans, reading._Reading._fill

    def counting(entry: Any, stream: Any, offset: int, view: memoryview) -> None:
        read["original"] += len(view)
        fill(entry, stream, offset, view)

    def sampling(entry: Any, wanted: Any) -> Any:
        before = read["original"]
        found = spans(entry, wanted)
        read["samples"] += read["original"] - before
        read["original"] = before
        return found

    def cached(self: Any, view: memoryview) -> None:
        read["cache"] += len(view)
        into(self, view)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "_fill", counting)
        patch.setattr("qlora.model.identity.read_spans", sampling)
        patch.setattr(reading._Reading, "_fill", cached)
        yield read


def resealed(folder: Path, change: Any) -> None:
    """Changes a kept base's manifest, and seals it as ours is: whoever can write there can do so."""
    file = folder / manifest.MANIFEST
    said = json.loads(file.read_text())
    said.pop("sha256")
    change(said)
    file.write_text(manifest.sealed(said))
