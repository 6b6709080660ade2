"""Gemma 1, 3n and 4: llama.cpp computes what transformers does, sees each fault; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qlora.events import Recorder
from qlora.export.gguf.architectures import lay_out
from qlora.export.gguf.families.gemma import FAMILIES
from qlora.export.gguf.plan import Tokens, plan
from qlora.model.resolve import resolve
from tests.export.gguf import written
from tests.export.gguf.cases import shapes_of
from tests.export.gguf.families.cases import VOCAB, Case, check, make_base, marked, refused, tiny
from tests.export.gguf.families.gemma_cases import CASES

FAST = ("gemma", "gemma4_text")  # norms less 1; shared keys, embeddings by layer, heads of two sizes
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize("case", marked(CASES, FAMILIES, FAST))
def test_a_familys_file_is_the_model_and_each_fault_is_seen(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.slow
def test_several_weights_are_one_tensor_and_rows_without_one_are_zeros(tmp_path: Path) -> None:
    """Gemma 3n: the streams' projections in their order, and 4 rows for tokens that no text has; in Q8_0 too."""
    case = next(case for case in CASES if case.model_type == "gemma3n_text")
    base = make_base(case, tmp_path / "base")
    opened = resolve(str(base), "main", Recorder())
    files = written.write_planned(
        opened, plan(opened, None, Tokens(), ("f32", "q8_0")), written.plain_tensors(opened), tmp_path / "out"
    )
    parameters = written.transformers_model(base).state_dict()
    for quant, tolerance in (("f32", 0.0), ("q8_0", 0.02)):
        stored = {entry.name: entry for entry in gguf.GGUFReader(files[quant]).tensors}
        values = {name: gguf.quants.dequantize(entry.data, entry.tensor_type) for name, entry in stored.items()}
        for number in range(3):
            expected = parameters[f"model.altup_projections.{number}.weight"].numpy()
            assert np.abs(values["altup_proj.weight"][number] - expected).max() <= tolerance
        by_layer = values["per_layer_token_embd.weight"]
        assert by_layer.shape[0] == VOCAB and not by_layer[VOCAB - 4 :].any() and by_layer[VOCAB - 5].any()


def test_no_cap_is_said() -> None:
    """llama.cpp caps the logits of a Gemma 4 at 30 where the file says nothing."""
    model = tiny(next(case for case in CASES if case.note == "keys as values"))
    assert model.config.final_logit_softcapping is None
    assert dict(lay_out(model, shapes_of(model)).keys)["gemma4.final_logit_softcapping"] == 0.0


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("gemma", {"tie_word_embeddings": False}, "head is not its embedding"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3n_text", {"final_logit_softcapping": 20.0}, "final_logit_softcapping = 20"),
        ("gemma3n_text", {"laurel_rank": 32}, "laurel_rank = 32"),
        ("gemma3n_text", {"num_kv_shared_layers": 10}, "15 layers with keys of their own"),
        ("gemma3n_text", {"activation_sparsity_pattern": [0.9] * 25}, "activation_sparsity_pattern"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "attention in both directions"),
        ("gemma4_text", {"layer_types": SLIDING}, "these layer_types of gemma4_text"),
    ],
)
def test_what_its_graph_cannot_compute_is_refused(model_type: str, fields: dict[str, Any], message: str) -> None:
    refused(CASES, model_type, fields, message)
