"""A layer's frozen matrices in one block of bytes, and the layer computing with such a block."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora.events import Sinks
from qlora.model import adapters, load
from qlora.model.layer_blobs import ALIGNMENT, LayerWeights, Layout, matrices_of
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.layerwise import recomputable
from tests.families import make_base

CPU = torch.device("cpu")


def loaded(folder: Path, family: str = "llama", **quantization: Any) -> Any:
    base = make_base(family, folder, overrides={"num_hidden_layers": 3, "layer_types": None})
    section = QuantizationSection(**quantization)
    return load.load_base(resolve(str(base), "main", Sinks()), section, "auto", CPU, Sinks())


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24)[None], use_cache=False).logits  # type: ignore[no-any-return]


KINDS: list[dict[str, Any]] = [{}, {"double_quant": False}, {"type": "fp4"}, {"type": "none"}]


@pytest.mark.parametrize("quantization", KINDS, ids=str)
def test_a_layer_computes_the_same_with_its_blob(quantization: dict[str, Any], tmp_path: Path) -> None:
    model = loaded(tmp_path, **quantization)
    before = outputs(model)
    for layer in recomputable(model):
        weights = LayerWeights(layer)
        blob = weights.pack()
        weights.take_away(CPU)
        weights.point(blob)
        again = weights.pack()
        assert torch.equal(again, blob) and len(blob) == weights.layout.nbytes
    assert torch.equal(outputs(model), before)


def test_pieces_are_aligned_and_do_not_overlap(tmp_path: Path) -> None:
    (layer, *others) = recomputable(loaded(tmp_path))
    layout = LayerWeights(layer).layout
    ends = [0, *(piece.offset + piece.nbytes for piece in layout.pieces)]
    for piece, end in zip(layout.pieces, ends, strict=False):
        assert piece.offset % ALIGNMENT == 0 and end <= piece.offset < end + ALIGNMENT
    assert ends[-1] <= layout.nbytes < ends[-1] + ALIGNMENT
    assert {piece.part for piece in layout.pieces} == {"codes", "absmax", "nested_absmax"}
    assert len(layout.pieces) == 3 * 7, "q, k, v, o, gate, up, down"
    assert all(LayerWeights(other).layout == layout for other in others), "one kind, one layout"


def test_what_is_small_or_trained_stays(tmp_path: Path) -> None:
    """Norms and adapters are in no blob, and a blob that was made before the adapters were attached is the layer's."""
    model = loaded(tmp_path)
    layer = recomputable(model)[0]
    weights, blob = LayerWeights(layer), LayerWeights(layer).pack()
    adapters.attach(model, LoraSection(r=4), 0)
    norms = {name: value.clone() for name, value in layer.named_parameters() if value.ndim == 1}
    trained = [value for value in layer.parameters() if value.requires_grad]
    weights.take_away(CPU)
    assert all(torch.equal(layer.get_parameter(name), value) for name, value in norms.items()) and norms
    assert all(value.numel() for value in trained) and len(trained) == 14
    assert sum(value.numel() for name, value in matrices_of(layer) if "base_layer" in name) == 0
    weights.point(blob)
    assert torch.equal(weights.pack(), blob)


def test_names_that_are_kept_stay_where_they_are(tmp_path: Path) -> None:
    layer = recomputable(loaded(tmp_path))[0]
    weights = LayerWeights(layer, kept=lambda name: name.startswith("mlp."))
    assert {piece.name.split(".")[0] for piece in weights.layout.pieces} == {"self_attn"}


@pytest.mark.parametrize("quantization", KINDS, ids=str)
def test_nothing_is_read_where_nothing_is(quantization: dict[str, Any], tmp_path: Path) -> None:
    """An error in Python, whoever asks: bitsandbytes' kernels would read past the end of what is empty."""
    model = loaded(tmp_path, **quantization)
    layer = recomputable(model)[1]
    LayerWeights(layer).take_away(CPU)
    linear = layer.self_attn.q_proj
    with pytest.raises((RuntimeError, AttributeError, TypeError)):
        outputs(model)
    inputs = torch.ones(1, 3, linear.in_features, dtype=torch.bfloat16)
    with pytest.raises((RuntimeError, AttributeError, TypeError)):
        linear(inputs)
    if hasattr(linear.weight, "quant_state"):
        import bitsandbytes as bnb

        with pytest.raises((AttributeError, TypeError)):
            bnb.functional.dequantize_4bit(linear.weight.data, copy.copy(linear.weight.quant_state))


def test_matrices_of_any_shape_in_16_bit_have_their_place() -> None:
    """Experts in one slab (E, out, in) are parameters of a module that is no linear layer."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(4, 6, 5).bfloat16(), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

    experts = nn.ModuleDict({"experts": Experts()})
    weights, values = LayerWeights(experts), experts["experts"].gate_up.clone()
    assert [(piece.name, piece.shape) for piece in weights.layout.pieces] == [("experts.gate_up", (4, 6, 5))]
    blob = weights.pack()
    weights.take_away(CPU)
    assert experts["experts"].gate_up.numel() == 0
    weights.point(blob)
    assert torch.equal(experts["experts"].gate_up, values)
    assert Layout.of([]).nbytes == 0
