"""One buffer for all moments: of the size that they have, brought by one move, and put back where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.flat.layout import Layout
from qlora.flat.methods import METHODS
from qlora.flat.moments import Moments
from qlora.step.optimizer import AdapterOptimizer
from qlora.training import loop
from tests.flat.cases import Driver, driver_of, one_step, parameters
from tests.runs import EVERYTHING, hashes, train, values, write_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", METHODS)
def test_its_bytes_are_those_of_all_moments(name: str) -> None:
    shapes = {key: parameter.shape for key, parameter in parameters().items()}
    moments = Moments(Layout(shapes, METHODS[name].eight_bit), METHODS[name], CPU, paged=False)
    layout, views = moments.layout, moments.views
    parts = [*views.narrow.values(), *views.wide.values(), *views.scales.values()]
    assert sum(part.nbytes for part in parts) == moments.buffer.nbytes
    slots, narrow = len(METHODS[name].slots), layout.wide_from
    assert moments.buffer.nbytes == slots * (narrow + narrow // 64 + 4 * (layout.total - narrow))
    for number, part in enumerate(parts):  # no two share a byte
        part.fill_(number + 1)
    assert all(bool((part == number + 1).all()) for number, part in enumerate(parts))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return driver_of(monkeypatch)


def test_paged_state_is_brought_once_an_update_and_read_after_waiting(driver: Driver) -> None:
    paged = AdapterOptimizer(parameters(), "paged_adamw_8bit", 0.01)
    resident = AdapterOptimizer(parameters(), "adamw_8bit", 0.01)
    assert paged.moments.not_paged == "" and len(driver.given) == 1
    for step in range(3):
        one_step(paged, step, 1.0)
        one_step(resident, step, 1.0)
    assert driver.asked == ["get", "prefetch", "prefetch", "prefetch"]  # no update waits for the device
    one, counters = paged.state()
    assert driver.asked[4:] == ["wait"]
    other, _ = resident.state()
    assert all(torch.equal(one[name], other[name]) for name in other)
    paged.load_state(one, counters)
    assert driver.asked[5:7] == ["wait", "wait"] and len(driver.given) == 1
    again, _ = paged.state()
    assert all(torch.equal(one[name], again[name]) for name in one)
    paged.detach()
    assert not driver.given and driver.asked[-1] == "free"


def test_resident_state_is_where_the_weights_are() -> None:
    meta = {key: torch.nn.Parameter(parameter.to("meta")) for key, parameter in parameters().items()}
    assert AdapterOptimizer(meta, "paged_adamw_8bit", 0.0).moments.buffer.is_meta
    assert AdapterOptimizer(parameters(), "paged_adamw_8bit", 0.0).moments.not_paged.endswith("stays in RAM")
    assert AdapterOptimizer(parameters(), "adamw_8bit", 0.0).moments.not_paged == ""


@pytest.mark.slow
def test_a_run_asks_the_driver_once_and_gives_all_of_it_back(
    tmp_path: Path, llama: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dry run, memory that runs out in it, a stop, and a resume: one buffer each time, and none stays."""
    real, calls = loop.forward_backward, iter(range(1000))

    def forward_backward(*args: Any) -> Any:
        loss = real(*args)
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB.")
        return loss

    monkeypatch.setattr(loop, "forward_backward", forward_backward)
    paged, resident = write_recipe(tmp_path / "paged", llama), write_recipe(tmp_path / "resident", llama)
    settings = (*EVERYTHING, "train.max_steps=4", "lora.dropout=0", "train.neftune_alpha=0")
    settings += ("train.gradient_checkpointing=true",)  # so that smaller micro-batches are what recovery has left
    first = train(paged, *settings, "train.optimizer=paged_adamw_8bit", stop_after=2)
    assert values(first, "recovered", "step") == [0]
    assert driver.asked.count("get") == 1 and not driver.given
    again = train(paged, *settings, "train.optimizer=paged_adamw_8bit", mode="resume")
    assert driver.asked.count("get") == 2 and driver.asked[-1] == "free" and not driver.given
    assert not [text for text in values(again, "notice", "message") if "paging" in text]
    train(resident, *settings, "train.optimizer=adamw_8bit", "train.micro_batch_size=1")
    assert hashes(paged, 4) == hashes(resident, 4)
