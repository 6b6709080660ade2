"""What a study takes is counted as its own code takes it on real tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.memory.asking import Asked, _more, as_asked, ask, halved, most_rows
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.memory.trace import LiveBytes
from qlora.model import generate
from qlora.model.attention import OnMeta
from qlora.model.sampled import draw
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.study.generation import Manner, score, write
from tests.families import make_base, make_config


def highest(live: LiveBytes, before: int) -> int:
    return live.peaks["asked"].total - before


def counted(model: Any, asked: Asked) -> int:
    """Bytes beside the weights that the study's own functions take at most, on real tensors."""
    beginning = [5 + at % 7 for at in range(asked.shared)]
    prompts = [[*beginning, row + 3, *range(3, 2 + asked.own)] for row in range(asked.rows)]
    with LiveBytes("cpu") as live:
        live.begin("asked")
        if asked.drawn:
            draw(model, prompts, [str(row) for row in range(asked.rows)], 0.7, generate.Asked((), asked.new, 0))
        elif asked.scored:
            score(model, prompts, [[4] * asked.new] * asked.rows, 0)
        else:
            write(model, prompts, Manner(asked.new, frozenset(), 0))
    return highest(live, 0)


def simulated(text: Any, asked: Asked) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    with LiveBytes("cpu") as live, OnMeta("cpu"), torch.no_grad():
        live.begin("asked")
        ask(model, asked)
    return highest(live, 0)


@pytest.mark.parametrize(("family", "window"), [("llama", {}), ("gemma3", {}), ("gemma3", {"sliding_window": 64})])
@pytest.mark.parametrize(
    "asked",
    [Asked(6, 96, 24, 40), Asked(6, 0, 120, 24), Asked(6, 0, 40, 24, 25), Asked(6, 0, 80, 40, drawn=1)],
    ids=["shared", "apart", "scored", "drawn"],
)
def test_what_is_asked_is_counted(family: str, window: dict[str, int], asked: Asked, tmp_path: Path) -> None:
    """Not under, and over by at most 15 %; also of prompts that are longer than a window."""
    from transformers import AutoModelForCausalLM

    folder = make_base(family, tmp_path / family, overrides={"hidden_size": 128, "intermediate_size": 256, **window})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    real = counted(model, asked)
    assert real <= simulated(model.config, asked) <= 1.15 * real


def test_a_study_is_phases_of_a_run() -> None:
    spec = ModelSpec(make_config("llama", vocab=512), "tiny", LoraSection(r=4), QuantizationSection())
    asks = as_asked([("study", [(8, 96, 16, 24, 0)]), ("exam", [(4, 0, 300, 16, 0)])])
    with_study, without = (Simulator(spec, True).run(Workload(1, 64, asks=one)) for one in (asks, ()))
    assert set(with_study.phases) - set(without.phases) == {"study", "exam"}
    assert {name: with_study.phases[name] for name in without.phases} == dict(without.phases)
    assert min(with_study.phases[name].total for name in ("study", "exam")) > sum(
        without.kept[name] for name in ("weights", "adapters")
    )


@pytest.mark.parametrize(("kept", "more"), [(63, 0), (50, 13), (20, 23)])
def test_a_window_keeps_no_more_keys_than_it_sees(kept: int, more: int) -> None:
    keys = torch.empty(6, 1, kept, 8, device="meta")
    layer = SimpleNamespace(is_sliding=True, sliding_window=64, cumulative_length=120, keys=keys)
    assert _more(layer, 23) == more and layer.cumulative_length == 143, "all are counted"
    assert _more(SimpleNamespace(keys=keys), 23) == 23


def test_half_of_the_rows() -> None:
    asks = as_asked([("study", [(24, 96, 16, 24, 0), (1, 0, 3, 3, 0)])])
    assert most_rows(halved(asks)) == 12 and halved(asks)[0][1][1].rows == 1 and most_rows(()) == 1
