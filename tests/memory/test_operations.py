"""What a step asks of a card: counted operation by operation, and of the whole model by two short ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora.memory.operations import Layers, Operation, OperationCounter, Work, of_whole_model, partly
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.memory.trace import LiveBytes
from qlora.model.experts import Slab
from qlora.model.meta_model import text_config
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.experts import Routing, grouped
from tests.families import make_config
from tests.memory.cases import NAMES
from tests.memory.shapes import SHAPES

aten = torch.ops.aten


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def seen(func: object, *args: object, result: object = None, documents: tuple[int, ...] = (8,)) -> Operation | None:
    counter = OperationCounter(documents)
    counter.see("forward", func, (args, {}), result)
    (found,) = counter.seen.get("forward", {None: 1})
    return found


def test_a_product_reads_both_operands_once_and_has_two_operations_a_value_and_column() -> None:
    left, right = meta(4, 8), meta(8, 3)
    assert seen(aten.mm.default, left, right, result=meta(4, 3)) == Operation(2 * (32 + 24 + 12), 2 * 4 * 8 * 3, False)
    out = meta(4, 3)
    assert seen(aten.addmm_.default, out, left, right, result=out) == Operation(2 * (12 + 32 + 24 + 12), 192, False)
    linear = seen(aten.linear.default, left, meta(3, 8), result=meta(4, 3))
    assert linear is not None and linear.arithmetic == 192


def test_two_parts_of_one_storage_are_both_read_and_one_part_handed_over_twice_once() -> None:
    """Codes and constants of a streamed weight are views of one blob; a square is read once."""
    blob, out = meta(40), meta(32)
    assert seen(aten.mul.Tensor, blob[:32], blob[32:], result=out) == Operation(2 * (32 + 8 + 32), 0, False)
    assert seen(aten.mul.Tensor, blob[:32], blob[:32], result=out) == Operation(2 * (32 + 32), 0, False)


def test_views_and_memory_that_is_not_written_start_nothing() -> None:
    one = meta(4, 8)
    assert seen(aten.view.default, one, [8, 4], result=one.view(8, 4)) is None
    assert seen(aten.empty_like.default, one, result=meta(4, 8)) is None


def test_what_is_looked_up_is_not_read_whole() -> None:
    """An embedding of a gigabyte is not read for eight tokens."""
    ids = torch.empty(8, dtype=torch.int64, device="meta")
    assert seen(aten.embedding.default, meta(1000, 16), ids, result=meta(8, 16)) == Operation(2 * 2 * 8 * 16, 0, False)


def test_an_expanded_tensor_is_as_large_as_what_is_there() -> None:
    wide = meta(1, 8).expand(64, 8)
    found = seen(aten.add.Tensor, wide, 1.0, result=meta(64, 8))
    assert found == Operation(2 * (8 + 64 * 8), 0, False)


def test_attention_is_over_documents_and_with_a_mask_over_the_square() -> None:
    query = meta(1, 4, 64, 16)
    flash, masked = (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
    )
    over = [
        seen(flash, query, query, query, 0.0, True, result=(query.clone(),), documents=one) for one in ((64,), (32, 32))
    ]
    assert [one and one.arithmetic for one in over] == [2 * 64 * 64 * 64, 2 * 2 * 32 * 32 * 64]
    square = seen(masked, query, query, query, meta(1, 4, 64, 64), True, result=(query.clone(),))
    assert square == Operation(square.nbytes, 2 * 2 * 4 * 64 * 64 * 16, True) if square else False
    flat = meta(1, 64, 4, 16)
    back = seen(
        aten._efficient_attention_backward.default,
        flat,
        flat,
        flat,
        flat,
        None,
        result=(flat.clone(),),
        documents=(64,),
    )
    assert back is not None and back.arithmetic == 5 * 64 * 64 * 64


@pytest.mark.parametrize("recompute", [True, False])
def test_two_short_models_extended_ask_for_what_the_whole_one_asks(recompute: bool) -> None:
    overrides = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 7, "layer_types": None}
    text = make_config("llama", vocab=1024, overrides=overrides)
    spec = ModelSpec(text, "llama", LoraSection(r=8), QuantizationSection())
    workload = Workload(1, 128, recompute, evaluates=False)
    extended, whole = (Simulator(spec, whole=one).run(workload).work for one in (False, True))
    assert extended is not None and whole is not None
    assert extended.launches == whole.launches and extended.arithmetic == whole.arithmetic
    assert extended.nbytes == pytest.approx(whole.nbytes, rel=1e-6)
    assert extended.update == pytest.approx(whole.update, rel=0.02)


def test_a_part_that_is_recomputed_asks_for_its_part() -> None:
    one, other = Operation(8, 0, False), Operation(16, 2, False)
    kept = Work((Layers(4, ((one, 1),), ((one, 2),)),), (), (1, 1))
    again = Work((Layers(4, ((one, 1),), ((other, 3),)),), ((other, 1),), (1, 1))
    mixed = partly(kept, again, 0.25)
    assert mixed is not None and mixed.launches == 4 + 3 * 2 + 1 * 3 + 1 and mixed.outside == again.outside
    assert partly(None, again, 0.5) is None and of_whole_model([None], [3], 3) is None


def test_the_step_of_an_8b_is_what_was_counted_apart_from_this() -> None:
    """As peft computes it, one row of 2,048 tokens with a mask: 99 launches and 4.29 GB a layer forth, 9.75 GB back,
    and 102.7 TFLOP a step, by a counter of its own (CUDA.md 2.1, Llama-3.1-8B, rank 16)."""
    text, _ = text_config({**SHAPES[NAMES[8]], "pad_token_id": 0}, NAMES[8])
    spec = ModelSpec(text, NAMES[8], LoraSection(r=16), QuantizationSection(), functions="peft", loss_chunk=0)
    work = Simulator(spec).run(Workload(1, 2048, evaluates=False, documents=4)).work
    assert work is not None
    (layers,) = work.layers
    assert layers.count == 32 and sum(times for _, times in layers.up) == 99
    assert sum(times * one.nbytes for one, times in layers.up) == pytest.approx(4.29e9, rel=0.005)
    assert sum(times * one.nbytes for one, times in layers.down) == pytest.approx(9.75e9, rel=0.02)
    assert work.arithmetic == pytest.approx(102.7e12, rel=0.001)


def test_a_grouped_product_has_the_arithmetic_of_its_rows() -> None:
    """Each row is multiplied once, whatever the number of experts; all of their weights are read."""
    rows, factors, ends = meta(64, 8), meta(4, 8, 3), torch.empty(4, dtype=torch.int32, device="meta")
    found = seen(aten._grouped_mm.default, rows, factors, ends, result=meta(64, 3))
    assert found == Operation(2 * (64 * 8 + 4 * 8 * 3 + 64 * 3) + 4 * 4, 2 * 64 * 8 * 3, False, 4, 64, True)


def test_products_of_experts_are_seen_on_meta() -> None:
    """A slab on meta asks for what a card is asked for: its weights in chunks, and a grouped product of each."""
    section = QuantizationSection()
    slab = Slab((8, 64, 128), section)
    slab.allocate(torch.device("meta"))
    routing, counter = Routing(torch.empty(32, 2, dtype=torch.int64, device="meta"), 8), OperationCounter((32,))
    live = LiveBytes("cuda")
    live.counter = counter
    for dtype in (torch.bfloat16, torch.float16):
        counter.seen.clear()
        with live:
            live.begin("forward")
            result = grouped(torch.empty(64, 128, dtype=dtype, device="meta"), slab, routing, dtype)
        assert result.shape == (64, 64) and result.dtype == dtype
        products = [one for one in counter.seen["forward"] if one.experts]
        assert [(one.arithmetic, one.experts, one.rows) for one in products] == [(2 * 64 * 128 * 64, 8, 64)]
        dequantized = [one for one in counter.seen["forward"] if one.nbytes > 2 * 8 * 64 * 128 and not one.arithmetic]
        assert dequantized, "once a product, whatever the rows"
