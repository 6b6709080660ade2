"""Layers through torch's compiler: whole, one graph for all that are alike, equal numbers, and only where it pays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import numerics
from qlora.errors import HardwareError, ModelError
from qlora.events import Recorder
from qlora.model import adapters, compiled, load, lora_functions
from qlora.model.attention_choice import trial_batch
from qlora.model.resolve import resolve
from qlora.numerics import Numerics
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.layerwise import recomputable, set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from tests.families import make_base

CPU = torch.device("cpu")
LAYERS, WIDTH = 4, 256
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("four") / "llama", overrides={"num_hidden_layers": LAYERS})


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By a backend that traces forth and back and makes no C++, which takes a minute; the slow test has that."""
    import torch._dynamo

    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def trained(base: Path, functions: str, layers: bool | int, attention: str = "sdpa") -> Any:
    """A float32 model with adapters that do something, whose first `layers` layers are recomputed."""
    model: Any = load.load_base(
        resolve(str(base), "main", Recorder()), QuantizationSection(), attention, CPU, Recorder()
    ).float()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = torch.float32
    tuned = adapters.attach(model, LoraSection(r=4), 1, torch.float32, functions=functions).train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in adapters.trainable(tuned).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    set_gradient_checkpointing(tuned.get_base_model(), layers, keep_random_state=False)
    return tuned


def stepped(model: Any, vocabulary: int = 300) -> tuple[float, Gradients]:
    for parameter in model.parameters():
        parameter.grad = None
    parts = CausalParts.of(model.get_base_model())
    loss = forward_backward(parts, trial_batch(vocabulary), SupervisedObjective(), 100.0)
    return float(loss), {name: one.grad.clone() for name, one in adapters.trainable(model).items()}


def apart(one: Gradients, other: Gradients) -> float:
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


@pytest.mark.parametrize(
    ("functions", "layers", "attention", "graphs"),
    [
        (lora_functions.NORMED, True, "sdpa", 3),  # forth, back, and back of the first layer
        (lora_functions.NORMED, False, "sdpa", 2),
        (lora_functions.OURS, True, "sdpa", 3),
        (lora_functions.PEFT, True, "sdpa", 3),
        (lora_functions.NORMED, True, "varlen", 3),
    ],
)
def test_one_graph_without_breaks_and_the_same_numbers(
    base: Path, functions: str, layers: bool, attention: str, graphs: int
) -> None:
    from torch._dynamo.utils import counters

    model = trained(base, functions, layers, attention)
    loss, wanted = stepped(model)
    compiled.put_in(model.get_base_model(), WIDTH)
    for vocabulary in (300, 300, 200):  # other tokens are no other graph
        found_loss, found = stepped(model, vocabulary)
        if vocabulary == 300:
            assert abs(found_loss - loss) <= 2e-6 * abs(loss) and apart(wanted, found) <= 2e-6
    known = counters["stats"]["unique_graphs"]
    assert 2 <= known <= graphs and not counters["graph_break"]
    compiled.take_out(model.get_base_model())
    assert not any(isinstance(layer, compiled.Compiled) for layer in recomputable(model.get_base_model()))
    assert apart(wanted, stepped(model)[1]) == 0
    assert counters["stats"]["unique_graphs"] == known


def test_other_documents_are_no_other_graph(base: Path) -> None:
    """With attention by documents: another number of them, of other lengths, in the same width."""
    from torch._dynamo.utils import counters

    model = trained(base, lora_functions.NORMED, True, "varlen")
    compiled.put_in(model.get_base_model(), WIDTH)
    stepped(model)
    known = counters["stats"]["unique_graphs"]
    batch = trial_batch(300)
    lengths = (100, 156)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    changed = replace(
        batch, position_ids_BS=positions, document_ids_BS=documents, cu_seqlens=starts, document_lengths=lengths
    )
    parts = CausalParts.of(model.get_base_model())
    found = float(forward_backward(parts, changed, SupervisedObjective(), 100.0))
    assert counters["stats"]["unique_graphs"] == known
    compiled.take_out(model.get_base_model())
    assert abs(found - float(forward_backward(parts, changed, SupervisedObjective(), 100.0))) <= 2e-6 * abs(found)


def test_evaluation_and_rows_of_another_width_are_not_compiled(base: Path) -> None:
    from torch._dynamo.utils import counters

    model = trained(base, lora_functions.NORMED, True)
    compiled.put_in(model.get_base_model(), WIDTH + 16)
    stepped(model)
    compiled.put_in(model.get_base_model(), WIDTH)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(WIDTH)[None] % 300, use_cache=False)
    assert not counters["stats"]


class Clock:
    """Seconds that steps take, in the order in which they are measured."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.now, self.steps = list(seconds), 0.0, 0

    def step(self) -> None:
        self.steps += 1
        self.now += self.seconds.pop(0)

    def monotonic(self) -> float:
        return self.now


def settled(model: Any, before: bool | None, clock: Clock, patch: pytest.MonkeyPatch, width: int = WIDTH) -> Recorder:
    recorder = Recorder()
    patch.setattr(compiled.time, "monotonic", clock.monotonic)
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    compiled.settle(model.get_base_model(), clock.step, width, recorder)
    return recorder


@pytest.mark.parametrize("faster", [True, False])
def test_a_trial_keeps_what_is_faster_and_says_both_figures(
    base: Path, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(base, lora_functions.NORMED, True)
    clock = Clock(*[2.0] * 5, 30.0, *[1.0 if faster else 2.5] * 5)
    with numerics.in_force(Numerics(compiled=None)):
        recorder = settled(model, None, clock, monkeypatch)
        assert numerics.of_run() == Numerics(compiled=faster)
    layers = recomputable(model.get_base_model())
    assert all(isinstance(layer, compiled.Compiled) == faster for layer in layers) and not clock.seconds
    (said,) = [event.as_dict()["message"] for event in recorder.of("notice")]
    ours = "1.000" if faster else "2.500"
    assert f"{ours} s each compiled, 2.000 s as they are" in said and "compiling took 2" in said


def test_what_cannot_be_compiled_is_left_or_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(base, lora_functions.NORMED, True)

    def step() -> None:
        if any(isinstance(layer, compiled.Compiled) for layer in recomputable(model.get_base_model())):
            raise RuntimeError("nothing like that")

    clock = Clock()
    clock.step = step  # type: ignore[method-assign]
    with numerics.in_force(Numerics(compiled=None)):
        recorder = settled(model, None, clock, monkeypatch)
        assert numerics.of_run() == Numerics(compiled=False)
    assert "fails on this model (RuntimeError" in str(recorder.of("notice")[0]) or "nothing like that" in str(
        recorder.of("notice")[0]
    )
    for width, why in ((WIDTH, "fails on this model"), (0, "rows have many widths")):
        with numerics.in_force(Numerics(compiled=True)), pytest.raises(ModelError, match=why) as caught:
            settled(model, True, clock, monkeypatch, width)
        assert "model.compile = false" in caught.value.hint
    assert not any(isinstance(layer, compiled.Compiled) for layer in recomputable(model.get_base_model()))


@pytest.mark.parametrize(
    ("wanted", "on_card", "lacks", "recorded", "chosen"),
    [
        ("auto", False, False, None, False),
        ("auto", True, False, None, None),
        ("auto", True, True, None, False),
        ("auto", True, False, Numerics(compiled=True), True),
        ("auto", True, False, Numerics(compiled=False), False),
        ("auto", True, False, Numerics(), False),  # of a version that compiled nothing
        ("auto", False, True, Numerics(compiled=True), False),
        (False, True, False, None, False),
        (True, False, False, None, True),
        (True, True, False, Numerics(compiled=True), True),
    ],
)
def test_what_is_chosen(
    wanted: bool | str,
    on_card: bool,
    lacks: bool,
    recorded: Numerics | None,
    chosen: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "lack_of", lambda device: "no compiler" if lacks else "")
    monkeypatch.setattr(compiled.hardware, "is_card", lambda device: on_card)
    assert compiled.choose(wanted, CPU, recorded) is chosen


@pytest.mark.parametrize(("on_card", "what"), [(True, "Triton"), (False, "a C.. compiler")])
def test_without_its_tools_it_is_refused_in_two_lines(
    on_card: bool, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.hardware, "is_card", lambda device: on_card)
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HardwareError, match=f"model.compile = true: torch's compiler needs {what}") as caught:
        compiled.choose(True, CPU, None)
    assert 'model.compile = "auto"' in caught.value.hint
    assert compiled.choose("auto", CPU, None) is False


@pytest.mark.slow
@pytest.mark.skipif(bool(compiled.lack_of(CPU)), reason="needs a C++ compiler")
def test_five_steps_by_inductor(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels that are really made and run: float32, to rounding."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / compiled.FOLDER))
    model = trained(base, lora_functions.NORMED, True)
    loss, wanted = stepped(model)
    compiled.put_in(model.get_base_model(), WIDTH)
    for _ in range(5):
        found_loss, found = stepped(model)
        # Its norms and activations sum in another order: of the gradients, the worst of 56 tensors is off by 2.4e-6.
        assert abs(found_loss - loss) <= 2e-6 * abs(loss) and apart(wanted, found) <= 5e-6
    assert os.listdir(tmp_path / compiled.FOLDER)
