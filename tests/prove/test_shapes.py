"""Shapes of random models: real configurations, and the largest that fits."""

from __future__ import annotations

from qlora.prove.shapes import SHAPES, config_of, largest, with_layers
from qlora.units import GIB


def test_the_largest_that_fits_is_taken() -> None:
    wanted = {80: "8b", 7.6: "8b", 7.5: "3b", 4: "1b", 2: "small", 0.1: "small"}
    assert {size: largest(int(size * GIB)).name for size in wanted} == wanted


def test_an_8b_is_llamas() -> None:
    config = config_of(SHAPES["8b"])
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (4096, 32, 8)
    assert not config.tie_word_embeddings and config_of(SHAPES["1b"]).tie_word_embeddings
    assert with_layers(SHAPES["8b"], 2).layers == 2 and with_layers(SHAPES["mini"], 99).layers == 2
