"""fp32 masters under bf16 adapters, and a state that can be taken out and put back bit for bit."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.flat.moments import Moments
from qlora.step.optimizer import AdapterOptimizer
from tests.flat.cases import SHAPES, one_step, parameters
from tests.step.tensor_by_tensor import TensorByTensor

NAMES = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw", "lion_8bit")


def make_parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # One above bitsandbytes' 4,096 elements, from where on its state is 8 bit, and one below.
    shapes = {"large.A": (96, 64), "small.B": (8, 16)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def train(parameters: dict[str, nn.Parameter], optimizer: AdapterOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        loss = sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum() for p in parameters.values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_is_bit_exact(name: str) -> None:
    straight = make_parameters()
    train(straight, AdapterOptimizer(straight, name, 0.01), range(8))

    first = make_parameters()
    optimizer = AdapterOptimizer(first, name, 0.01)
    train(first, optimizer, range(3))
    tensors, counters = optimizer.state()

    second = make_parameters()
    resumed = AdapterOptimizer(second, name, 0.01)
    resumed.load_state(tensors, counters)
    assert all(torch.equal(second[key], first[key]) for key in first)
    train(second, resumed, range(3, 8))
    assert all(torch.equal(second[key], straight[key]) for key in straight)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_moves_down_the_gradient(name: str) -> None:
    parameters = {"w": nn.Parameter(torch.full((96, 64), 1.0, dtype=torch.bfloat16))}
    optimizer = AdapterOptimizer(parameters, name, 0.0)
    for _ in range(20):
        parameters["w"].float().square().sum().backward()
        optimizer.step(1e-2)
    assert parameters["w"].float().abs().max() < 0.9


def test_small_updates_are_not_lost() -> None:
    """An update of 1e-5 on a weight of 1.0 is below bf16's step of 0.0078: without masters nothing would ever move."""
    parameters = {"w": nn.Parameter(torch.ones(64, 96, dtype=torch.bfloat16))}
    optimizer = AdapterOptimizer(parameters, "adamw", 0.0)
    for _ in range(1000):
        parameters["w"].sum().backward()
        optimizer.step(1e-5)
    assert parameters["w"].max() < 1.0


def test_gradients_are_added_in_fp32() -> None:
    """Many small gradients after a large one: in bf16 each of them would round to nothing."""
    parameters = {"w": nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))}
    optimizer = AdapterOptimizer(parameters, "adamw", 0.0)
    (parameters["w"] * 256.0).sum().backward()
    for _ in range(64):
        (parameters["w"] * 0.25).sum().backward()
    gradient = optimizer.gradients["w"]
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((4,), 272.0))
    assert parameters["w"].grad is None


def test_clip_scales_to_the_norm_and_zero_is_off() -> None:
    parameters = make_parameters(torch.float32)
    optimizer = AdapterOptimizer(parameters, "adamw", 0.0)
    sum((p * 100).sum() for p in parameters.values()).backward()  # type: ignore[union-attr]
    norm = optimizer.gradient_norm()
    optimizer.clip(norm, 0.0)
    assert torch.equal(optimizer.gradient_norm(), norm)
    optimizer.clip(norm, 2.0)
    assert float(optimizer.gradient_norm()) == pytest.approx(2.0, rel=1e-5)


def test_state_of_another_model_is_refused() -> None:
    optimizer = AdapterOptimizer(make_parameters(), "adamw", 0.0)
    tensors, counters = optimizer.state()
    tensors["master/small.B"] = tensors["master/small.B"][:4]
    with pytest.raises(ValueError, match="state of shape"):
        optimizer.load_state(tensors, counters)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("name", NAMES)
def test_one_buffer_is_updated_as_tensor_by_tensor_bit_for_bit(name: str, weight_decay: float) -> None:
    """Awkward sizes, gradients of ten orders, tensors that sleep for some steps or for ever, clipping on and off."""
    flat = AdapterOptimizer(parameters(), name, weight_decay)
    single = TensorByTensor(parameters(), name, weight_decay)
    for step in range(9):
        norms = [one_step(optimizer, step, max_norm=step % 2) for optimizer in (flat, single)]
        assert torch.equal(*norms), step
    (ours, our_counters), (theirs, their_counters) = flat.state(), single.state()
    ours.pop("largest_gradients")
    assert our_counters == their_counters and ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert all(torch.equal(flat.parameters[key], single.parameters[key]) for key in SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_one_call_equals_a_call_a_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a value's place does not matter; here sizes fill a CPU's registers, and no block of 256."""
    monkeypatch.setattr(Moments, "_runs", lambda self, steps: self.layout.runs(steps, 1 << 30))
    shapes = {"a": (64, 96), "b": (8, 40), "c": (4096 + 64,), "d": (64, 3), "e": (320, 64)}
    made = [{key: nn.Parameter(torch.full(shape, 0.1).bfloat16()) for key, shape in shapes.items()} for _ in range(2)]
    flat, single = AdapterOptimizer(made[0], name, 0.01), TensorByTensor(made[1], name, 0.01)
    for step in range(6):
        assert torch.equal(*(one_step(optimizer, step, 1.0) for optimizer in (flat, single)))
    ours, theirs = flat.state()[0], single.state()[0]
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_state_saved_tensor_by_tensor_goes_on_in_one_buffer(name: str) -> None:
    """What older versions saved: their optimizer kept a tensor's moments by itself, and small ones in 32 bit."""
    old = TensorByTensor(parameters(), name, 0.01)
    for step in range(4):
        one_step(old, step, 1.0)
    tensors, counters = old.state()
    new = AdapterOptimizer(parameters(seed=1), name, 0.01)
    new.load_state(tensors | {"largest_gradients": torch.zeros(len(SHAPES))}, counters)
    for step in range(4, 8):
        one_step(old, step, 1.0)
        one_step(new, step, 1.0)
    tensors, counters = old.state()
    found, found_counters = new.state()
    assert found_counters == counters and all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_putting_back_an_earlier_state_forgets_the_moments_since() -> None:
    """The dry run before the first step: the same memory, and nothing of it is left."""
    optimizer, fresh = (AdapterOptimizer(parameters(), "adamw_8bit", 0.01) for _ in range(2))
    before, address = optimizer.state(), optimizer.moments.buffer.data_ptr()
    one_step(optimizer, 5, 1.0)
    optimizer.load_state(*before)
    assert optimizer.moments.buffer.data_ptr() == address and not optimizer.moments.buffer.any()
    for step in range(3):
        one_step(optimizer, step, 1.0)
        one_step(fresh, step, 1.0)
    one, other = optimizer.state()[0], fresh.state()[0]
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    optimizer = AdapterOptimizer(parameters(), "adamw_8bit", 0.0)
    one_step(optimizer, 0, 1.0)
    tensors, counters = optimizer.state()
    wrong = {key: torch.zeros_like(value) for key, value in tensors.items()}
    wrong["absmax2/l.1.lora_B"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state of shape"):
        optimizer.load_state(wrong, counters)
    again, counters_again = optimizer.state()
    assert counters_again == counters and all(torch.equal(again[key], tensors[key]) for key in tensors)


class Launches(TorchDispatchMode):
    """Names of the operations that start work on the device; what only looks at a tensor otherwise starts none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.name())
        # bitsandbytes' updates work in place and know no meta tensors
        return None if func.namespace == "bitsandbytes" else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_448_tensors_is_a_few_launches_and_asks_the_device_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All-linear on 32 layers, in the shapes of an 8B model. bitsandbytes' own classes wait once a tensor."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append("torch"))
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", lambda *_: waits.append("bitsandbytes"))
    sizes = [(16, 4096), (4096, 16), (16, 4096), (1024, 16), (16, 4096), (14336, 16), (2, 2000)] * 64
    many = {
        f"l.{i}": nn.Parameter(torch.empty(size, device="meta", dtype=torch.bfloat16)) for i, size in enumerate(sizes)
    }
    optimizer = AdapterOptimizer(many, name, 0.01)
    for key, parameter in many.items():
        optimizer.add_gradient(key, torch.empty_like(parameter))
    with Launches() as seen:
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(1e-4)
    updates = [launched for launched in seen.names if "bitsandbytes" in launched]
    assert len(updates) == {"adamw": 0, "paged_adamw_32bit": 1}.get(name, 2)  # the small ones' moments in a second
    parts = math.ceil(optimizer.moments.layout.total / (1 << 24))  # of torch's AdamW, whose temporaries are bounded
    assert len(seen.names) - len(updates) <= 14 + (8 * parts if name == "adamw" else 0), seen.names
    assert not any("_local_scalar_dense" in launched for launched in seen.names) and not waits


@pytest.mark.skipif(torch.version.cuda is None, reason="needs torch's CUDA build; no GPU")
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("paged_")])
def test_cuda_tensors_without_a_card_go_through_an_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices, shapes and types, as torch's and bitsandbytes' operators check them for fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # What a byte means is read value by value while it is made, which fake tensors do not have.
    monkeypatch.setattr("qlora.flat.moments.codes", lambda device: (torch.empty(256), torch.empty(256)))
    for stream in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, stream, lambda device: None)
    with FakeTensorMode(), torch.device("cuda", 0):
        made = {key: nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for key, shape in SHAPES.items()}
        optimizer = AdapterOptimizer(made, name, 0.01)
        for key, parameter in made.items():
            optimizer.add_gradient(key, torch.empty_like(parameter))
        norm = optimizer.gradient_norm()
        optimizer.clip(norm, 1.0)
        optimizer.step(1e-4)
    assert {norm.device.type, *(parameter.device.type for parameter in made.values())} == {"cuda"}
    assert optimizer.updates == dict.fromkeys(SHAPES, 1)
