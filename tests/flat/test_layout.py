"""Places in a buffer: whole blocks, small tensors behind, and as few runs as can be."""

from __future__ import annotations

import torch

from qlora.flat.layout import BLOCK, Layout, Run
from tests.flat.cases import SHAPES

SIZES = {key: torch.Size(shape) for key, shape in SHAPES.items()}
ALL = 1 << 30


def test_no_block_holds_values_of_two_tensors() -> None:
    for eight_bit in (True, False):
        places = Layout(SIZES, eight_bit).places
        blocks = [block for place in places.values() for block in range(place.start // BLOCK, place.stop // BLOCK)]
        assert len(blocks) == len({*blocks}) and all(place.start % BLOCK == 0 for place in places.values())


def test_small_tensors_lie_behind_those_with_8_bit_moments() -> None:
    layout = Layout(SIZES, eight_bit=True)
    narrow = {key for key, place in layout.places.items() if place.stop <= layout.wide_from}
    assert narrow == {key for key, size in SIZES.items() if size.numel() >= 4096}
    assert Layout(SIZES, eight_bit=False).wide_from == 0 and layout.total == Layout(SIZES, eight_bit=False).total


def test_views_are_parts_of_the_buffer_in_their_own_shape() -> None:
    layout = Layout(SIZES, eight_bit=True)
    flat = layout.zeros(torch.device("cpu"))
    for view in layout.views(flat).values():
        view.fill_(1.0)
    assert int(flat.sum()) == sum(size.numel() for size in SIZES.values())


def test_all_tensors_alike_are_one_run_on_each_side() -> None:
    layout = Layout(SIZES, eight_bit=True)
    everything = [Run(0, layout.wide_from, 3), Run(layout.wide_from, layout.total, 3)]
    assert [*layout.runs(dict.fromkeys(SIZES, 3), ALL)] == everything
    assert [*Layout(SIZES, eight_bit=False).runs(dict.fromkeys(SIZES, 3), ALL)] == [Run(0, layout.total, 3)]


def test_another_number_or_none_parts_them() -> None:
    three = dict.fromkeys("abc", torch.Size((300,)))
    assert [*Layout(three, False).runs({"a": 1, "c": 1}, ALL)] == [Run(0, 512, 1), Run(1024, 1536, 1)]
    assert [*Layout(three, False).runs({"a": 1, "b": 2, "c": 2}, ALL)] == [Run(0, 512, 1), Run(512, 1536, 2)]
    assert [*Layout(three, False).runs({}, ALL)] == [] and [*Layout({}, True).runs({}, ALL)] == []


def test_a_run_is_no_longer_than_a_call_can_count() -> None:
    """bitsandbytes' kernels count values in 32 bits: head and embeddings of a large model trained whole are more."""
    layout = Layout({"head": torch.Size((1 << 17, 1 << 14)), "one": torch.Size((1,))}, False)
    runs = [*layout.runs({"head": 1, "one": 1}, ALL)]
    assert [run.stop - run.start for run in runs] == [1 << 30, 1 << 30, 256]


def test_a_tensor_without_values_takes_no_place() -> None:
    layout = Layout({"none": torch.Size((0, 8)), "some": torch.Size((8,))}, False)
    assert [*layout.runs({"none": 1, "some": 1}, ALL)] == [Run(0, 256, 1)]


def test_on_a_cpu_only_whole_registers_of_one_thread_join() -> None:
    """What ends inside a register, and what is computed by several threads, is a run of its own, without padding."""
    shapes = {"a": (320,), "b": (64,), "odd": (77,), "c": (128,), "d": (16_384,), "e": (16_384,), "large": (65_536,)}
    layout = Layout({key: torch.Size(shape) for key, shape in shapes.items()}, False)
    runs = [(run.start, run.stop - run.start) for run in layout.runs_on_cpu(dict.fromkeys(shapes, 1))]
    assert runs == [(0, 512 + 64), (768, 77), (1024, 256 + 16_384), (17_664, 16_384), (34_048, 65_536)]
    wide = [(run.start, run.stop) for run in Layout(SIZES, True).runs_on_cpu({"l.0.lora_A": 1, "l.0.lora_B": 1})]
    assert len(wide) == 2  # never across the two sides
