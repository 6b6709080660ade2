"""The device that computes: a CPU has an answer to every question, and a GPU that lacks bf16 is none."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from qlora import device, wsl
from qlora.device import Card
from tests.card import MIB, rehearsal
from tests.card import Card as StandIn

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_cpu_answers_everything() -> None:
    assert device.name_of(CPU) == "cpu" and device.computes_bf16(CPU)
    assert device.peak_bytes(CPU) is None
    assert not device.is_card(CPU) and device.is_card(CUDA)


@pytest.mark.parametrize(("is_there", "used"), [(False, "cpu"), (True, "cuda:1")])
def test_torchs_own_gpu_computes_where_there_is_one(is_there: bool, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device.current() == torch.device(used)


@pytest.mark.parametrize(("is_there", "has_bf16"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("capability", [(5, 2), (7, 5)])
def test_a_card_needs_bf16_that_is_not_emulated_or_kernels_of_4_bit(
    is_there: bool, has_bf16: bool, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation  # as torch answers for older cards

    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (5, 8))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(is_integrated=0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "RTX 3070")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    able = is_there and (has_bf16 or capability >= device.OLDEST)
    assert device.card() == (Card("RTX 3070", 5, 8, capability) if able else None)
    assert device.computes_bf16(CUDA) is has_bf16


def test_memory_is_given_back_with_what_refers_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cache"))
    monkeypatch.setattr(device.heap, "give_back_holes", lambda: emptied.append("holes"))
    watched = weakref.ref(Cycle())
    device.release_memory(CPU)
    assert watched() is None and emptied == ["holes"]
    device.release_memory(CUDA)
    assert emptied == ["holes", "cache"]


def test_random_numbers_drawn_inside_are_as_if_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"card": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda place: states["card"].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, place: states.update(card=state))
    before = torch.get_rng_state()
    for place in (CPU, CUDA):
        with device.random_state_kept(place):
            torch.rand(3)
            states["card"] += 1 if place == CUDA else 0
        assert torch.equal(torch.get_rng_state(), before) and states["card"].tolist() == [1]


@pytest.mark.parametrize(
    ("capability", "hip", "answer"), [((8, 9), None, (8, 9)), ((11, 0), "6.4", (0, 0))], ids=["nvidia", "amd"]
)
def test_amds_architectures_are_no_compute_capability(
    capability: tuple[int, int], hip: str | None, answer: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert device.capability(CUDA) == answer


def test_a_card_says_what_it_is_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, StandIn(capability=(8, 9))) as stand_in:
        assert device.facts() == (stand_in.name, (8, 9), ["sm_89"])
        assert device.trouble() is None and stand_in.calls["synchronize"] == 1
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert device.facts() is None and device.trouble() is None


def test_trouble_is_told_in_torchs_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: CUDA unknown error (Triggered internally at /src/c10.cpp:1)", stacklevel=1)
        return False

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`")

    with rehearsal(monkeypatch, StandIn()) as stand_in:
        monkeypatch.setattr(stand_in, "synchronize", lost)
        assert device.trouble() == "CUDA error: unspecified launch failure"
        monkeypatch.setattr(stand_in, "get_device_capability", lost)
        assert device.facts() is None
        monkeypatch.setattr(stand_in, "is_available", lambda: False)
        assert device.trouble() == "it finds none"
        monkeypatch.setattr(stand_in, "is_available", is_available)
        assert device.trouble() == "CUDA initialization: CUDA unknown error" and device.facts() is None


def test_intels_gpus_are_asked_by_their_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert device.has_xpu()


def test_free_memory_is_the_cards_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, StandIn(total=64 * MIB)) as stand_in:
        assert device.free_bytes(CPU) == stand_in.mem_get_info()[0]


@pytest.mark.parametrize(
    ("shares", "hip", "available", "free"),
    [(1, None, 30, 30), (1, None, 90, 60), (1, None, 10, 20), (0, None, 30, 20), (1, "6.4", 30, 20)],
)
def test_what_the_page_cache_holds_is_free_on_a_card_that_shares_the_ram(
    shares: int, hip: str | None, available: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than there is, nor less than the driver says; AMD's have a part of the RAM of their own."""
    monkeypatch.setattr(device, "available_ram", lambda: available * MIB)
    monkeypatch.setattr(device, "may_spill", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    with rehearsal(monkeypatch, StandIn(total=60 * MIB)) as stand_in:
        stand_in.is_integrated = shares
        monkeypatch.setattr(stand_in, "mem_get_info", lambda *_: (20 * MIB, 60 * MIB))
        found = device.card()
        assert found is not None and found.free_bytes == device.free_bytes(CPU) == free * MIB
        assert device.context_taken(CPU, 99 * MIB) == (60 - free) * MIB
        device.limit_memory(CPU, None, 0)
        assert abs(stand_in.limit - free * MIB) <= 1


def test_a_side_stream_waits_for_the_default_one_and_it_for_the_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes launches on the default stream stands in order with what was asked of the current one."""
    order: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            order.append(f"{self.name} waits for {other.name}")

    default, side = Stream("default"), Stream("side")
    current = [default]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: current[0])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda place: default)

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        order.append(f"on {chosen.name}")
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    for place in (CUDA, CPU):
        with device.on_default_stream(place):
            order.append("work")
    assert order == ["work", "work"]
    order.clear()
    current[0] = side
    with device.on_default_stream(CUDA):
        order.append("work")
    assert order == ["default waits for side", "on default", "work", "side waits for default"]


def test_a_gpu_is_waited_for_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device.synchronize(CPU)
    device.synchronize(CUDA)
    assert waited == [CUDA]


# --- the stand-in itself ---------------------------------------------------------------------------------------------


def test_it_counts_live_bytes_and_raises_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, StandIn(total=64 * MIB)) as stand_in:
        first = torch.empty(8 * MIB, dtype=torch.uint8)
        second = first[: 4 * MIB]  # the same storage
        assert stand_in.live == stand_in.highest == 8 * MIB
        stand_in.set_per_process_memory_fraction(0.25)
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 16.00 MiB\. GPU 0 has"):
            torch.empty(16 * MIB, dtype=torch.uint8)
        del first
        assert stand_in.live == 8 * MIB
        del second
        assert stand_in.live == 0 and stand_in.highest == 8 * MIB
        torch.empty(16 * MIB, dtype=torch.uint8)
    assert not device.is_card(CPU)


def test_a_limit_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of the process, less its context, and never more than is free: 5 % of it less where the driver spills."""
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (700, 1000))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(is_integrated=0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 100)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, *_: fractions.append(part))
    monkeypatch.setattr(device, "may_spill", lambda: False)
    assert [device.context_taken(CUDA, expected) for expected in (40, 400)] == [40, 200]
    assert device.context_taken(CPU, 40) == 0
    device.limit_memory(CUDA, 600, 40)
    device.limit_memory(CUDA, 600, 400)  # the context takes no more than is gone: 1000 - 700 - 100
    device.limit_memory(CUDA, None, 40)
    device.limit_memory(CUDA, 5000, 40)
    device.limit_memory(CUDA, 10, 40)
    assert fractions == [0.56, 0.4, 0.8, 0.8, 0.0]
    monkeypatch.setattr(device, "may_spill", lambda: True)
    for limit in (None, 5000, 820):
        device.limit_memory(CUDA, limit, 40)
    assert fractions[5:] == [0.765] * 3
    device.limit_memory(CPU, 600, 40)
    assert len(fractions) == 8


def test_the_context_is_what_its_first_kernel_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other programs hold, and whatever they do later: 300 of 1,024 MiB are theirs."""
    with rehearsal(monkeypatch, StandIn(total=1024 * MIB)) as stand_in:
        stand_in.context = 300 * MIB  # the driver's word before there is a context
        before = stand_in.mem_get_info()[0]
        assert device.measured_context() is None and device.context_taken(CPU, 400 * MIB) == 300 * MIB
        stand_in.context += 120 * MIB
        kept = torch.ones(MIB, dtype=torch.uint8)  # and what torch reserved for it is no part of the context
        device.measure_context(before)
        assert kept.numel() and device.context_taken(CPU, 400 * MIB) == 120 * MIB
        stand_in.context += 200 * MIB  # another program
        assert device.context_taken(CPU, 400 * MIB) == 120 * MIB
        device.limit_memory(CPU, 500 * MIB, 100 * MIB)
        assert abs(stand_in.limit - 380 * MIB) < MIB
        device.limit_memory(CPU, 500 * MIB, 150 * MIB)  # what it will be after a step is more
        assert abs(stand_in.limit - 350 * MIB) < MIB
        for unbelievable in (0, 3 * stand_in.total):  # less was free before than now; more is gone than any context has
            device.measure_context(unbelievable)
            assert device.measured_context() is None
    device.measure_context(7)
    assert device.context_taken(CPU, 40) == 0


@pytest.mark.parametrize(
    ("system", "release", "spills"),
    [
        ("linux", "6.8.0-45-generic", False),
        ("linux", "5.15.167.4-microsoft-standard-WSL2", True),
        ("linux", "4.4.0-19041-Microsoft", True),
        ("win32", "10", True),
    ],
)
def test_which_drivers_spill(system: str, release: str, spills: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.sys, "platform", system)
    monkeypatch.setattr(wsl.platform, "release", lambda: release)
    assert device.may_spill() is spills
    assert device.usable(1000) == (950 if spills else 1000)


def test_a_run_leaves_nothing_and_the_next_ones_peak_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: done.append("reset"))
    device.release(CPU)
    assert done == []
    device.release(CUDA)
    assert done == ["empty", "reset"]


def test_long_sums_are_fp32_on_a_card_and_settings_are_put_back() -> None:
    settings = torch.backends.cuda.matmul
    with device.full_sums(CPU):
        assert settings.allow_bf16_reduced_precision_reduction
    with device.full_sums(CUDA):
        assert not settings.allow_bf16_reduced_precision_reduction
        assert not settings.allow_fp16_reduced_precision_reduction
    assert settings.allow_bf16_reduced_precision_reduction and settings.allow_fp16_reduced_precision_reduction


def test_whether_a_sum_may_be_split_stays_the_users_choice() -> None:
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "allow_bf16_reduced_precision_reduction_split_k"):
        pytest.skip("this torch has no such setting")
    try:  # torch takes no other pair whose second is False
        settings.allow_bf16_reduced_precision_reduction = (False, False)
        with device.full_sums(CUDA):
            assert not settings.allow_bf16_reduced_precision_reduction_split_k
        assert not settings.allow_bf16_reduced_precision_reduction
        assert not settings.allow_bf16_reduced_precision_reduction_split_k
    finally:
        settings.allow_bf16_reduced_precision_reduction = True
