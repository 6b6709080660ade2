"""Loads, runs, updates and merges tiny models on CUDA tensors that hold nothing: needs torch's CUDA build and no GPU.

    python tools/fake_cuda.py
    python tools/fake_cuda.py --family gemma2

Tensors on `cuda` are torch's FakeTensors: they have a shape, a type and a device, and each operation on them is checked
as CUDA's own would be, without a value. What fails here fails on a card: tensors of two devices in one operation, types
that a product does not take, a value that the host reads. What a file holds and the host computes stays real. A build
of torch for the CPU makes no such tensors: then this says so and ends with 0, as `tools/check` expects.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora import device as hardware
from qlora.data.loader import collate
from qlora.events import Recorder
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection, TrainSection
from qlora.step.forward import CausalParts, batch_loss, evaluating
from qlora.step.loss import SupervisedObjective
from qlora.step.optimizer import AdapterOptimizer
from qlora.third_party import import_bitsandbytes
from tests.card import GIB, Card
from tests.data.cases import split_of
from tests.export.cases import merge_of, of_peft
from tests.families import FAMILIES, make_base

CUDA = torch.device("cuda", 0)


@cache
def fake_mode() -> FakeTensorMode:
    """One for the process: bitsandbytes keeps its code tables, and tensors of two modes do not mix."""
    return FakeTensorMode()


class OnCuda(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations on CUDA's tensors go to `fake`, all others are computed."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, shape = tree_flatten((args, kwargs or {}))
        on_cuda = any(isinstance(value, FakeTensor) for value in flat) or any(
            isinstance(value, torch.device) and value.type == "cuda" for value in flat
        )
        if not on_cuda:
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        faked = [self.fake.from_tensor(value) if _is_real(value) else value for value in flat]
        args, kwargs = tree_unflatten(faked, shape)
        return func(*args, **kwargs)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


class FakeCard(Card):  # type: ignore[no-untyped-call]
    """What the device answers, beside its tensors: those are CUDA's here."""

    def owns(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def device(self, index: int) -> Any:
        return torch.device("cuda", index)


def _weight_4bit(data: Tensor, requires_grad: bool = False, **facts: Any) -> Tensor:
    """bitsandbytes' Params4bit of a tensor that is an object of another class already."""
    made = data.detach().requires_grad_(requires_grad)
    made._is_param = True  # type: ignore[attr-defined]  # what torch.nn.Parameter is told by (torch/nn/parameter.py)
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def _moved(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """torch's `Module._apply`, which cannot put a tensor of another class into a parameter that is known elsewhere."""
    for child in module.children() if recurse else ():
        _moved(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                module._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, `cuda` is a device whose tensors hold nothing."""
    bnb, fake = import_bitsandbytes(), fake_mode()
    with (
        mock.patch.object(hardware, "accelerator", FakeCard(8 * GIB)),  # room for all of a model
        mock.patch.object(bnb.nn, "Params4bit", _weight_4bit),
        mock.patch.object(nn.Module, "_apply", _moved),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        fake,
        OnCuda(fake),
    ):
        yield


def forward(model: Any) -> None:
    """Packed rows and a single one, in training (dropout, NEFTune) and in evaluation, to the summed loss."""
    parts, split = CausalParts.of(model.get_base_model()), split_of([20, 12, 30])
    for packs in ([(0, 1), (2,)], [(2,)]):
        batch = collate(split, packs, 0, 64).to(CUDA)
        model.train()
        _on_cuda(batch_loss(parts, batch, SupervisedObjective(), 5.0))
        with evaluating(model):
            _on_cuda(batch_loss(parts, batch, SupervisedObjective()))


def update(model: Any) -> None:
    """Gradients added up, clipped and applied twice by each optimizer, and its state taken to the host."""
    for name in get_args(TrainSection.model_fields["optimizer"].annotation):
        optimizer = AdapterOptimizer(adapters.trainable(model), name, 0.01)
        for _ in range(2):
            for key, parameter in optimizer.parameters.items():
                optimizer.add_gradient(key, torch.ones_like(parameter))
                optimizer.add_gradient(key, torch.ones_like(parameter))
            norm = optimizer.gradient_norm()
            _on_cuda(norm)
            optimizer.clip(norm, 1.0)
            optimizer.step(1e-3)
        optimizer.detach()
    for parameter in model.parameters():
        _on_cuda(parameter)


def merge(base: Path, adapter: Path) -> None:
    """Every tensor of the merged model, on the 4-bit base and on the original one."""
    for onto, quantization in (("nf4", QuantizationSection()), ("full", QuantizationSection(type="none"))):
        merged = merge_of(base, adapter, merge_base=onto, quantization=quantization, dtype=torch.bfloat16, device=CUDA)
        for tensor in merged.tensors():
            for block in tensor.blocks(1):
                assert block.device.type == "cpu" and block.dtype == torch.bfloat16, (tensor.name, block)


def _on_cuda(value: Tensor) -> None:
    assert isinstance(value, FakeTensor) and value.device == CUDA, f"{value} is not on {CUDA}"


def try_family(family: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Each part of a family with what it failed by, "" where it did not."""
    base = make_base(family, folder / family)
    targets = ["o_proj", "down_proj"]
    of_peft(base, folder / "adapter", target_modules=targets)
    for kind in ("nf4", "fp4", "none"):
        with fake_cuda():
            model: Any = None

            def loading(kind: str = kind) -> None:
                nonlocal model
                found = resolve(str(base), "main", Recorder())
                loaded = load.load_base(
                    found, QuantizationSection.model_validate({"type": kind}), "auto", CUDA, Recorder()
                )
                model = adapters.attach(loaded, LoraSection(dropout=0.1), 0)

            yield f"{family}, {kind}: load", _failure(loading)
            if model is not None:
                yield f"{family}, {kind}: forward", _failure(lambda: forward(model))  # noqa: B023
                if kind == "nf4":
                    yield f"{family}: update", _failure(lambda: update(model))  # noqa: B023
    with fake_cuda():
        yield f"{family}: merge", _failure(lambda: merge(base, folder / "adapter"))


def _failure(work: Callable[[], None]) -> str:
    """Whatever it raises is what is looked for."""
    try:
        work()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = next((frame for frame in reversed(place) if "/qlora/" in frame.filename), place[-1])
        return f"{type(error).__name__}: {str(error)[:300]} ({Path(ours.filename).name}:{ours.lineno})"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="one of the tiny models; all by default")
    chosen = parser.parse_args().family or FAMILIES
    if torch.version.cuda is None:
        print(f"fake_cuda: skipped, torch {torch.__version__} is not a build for CUDA")
        return 0
    failed = 0
    for family in chosen:
        with tempfile.TemporaryDirectory() as name:
            for part, failure in try_family(family, Path(name)):
                failed += bool(failure)
                print(f"{part}: {failure or 'ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
