"""Mixtures of experts: llama.cpp computes what transformers does, each fault and each silent trap is seen."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.gguf.architectures import lay_out
from qlora.export.gguf.families import FAMILIES
from qlora.export.gguf.family import no_check
from qlora.export.gguf.plan import Tokens, plan
from qlora.export.merge.parts import expert_pieces
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from tests import mixtures
from tests.export import llama
from tests.export.gguf import written
from tests.export.gguf.families.cases import Case, check, tiny
from tests.export.gguf.families.mixture_cases import CASES, OSS_YARN, STATE, YARN
from tests.families import make_tokenizer, split_into_shards

# A tensor an expert and matrix; gate and up in turns, with biases; heads on a latent.
FAST = ("qwen3_moe", "gpt_oss", "glm4_moe_lite")
FIRST = {case.model_type: case for case in reversed(CASES)}
# The largest difference of log-probabilities. GELU goes through a table of 16-bit values in llama.cpp: an input near
# the middle between two of them takes another one there.
EXACT, GELU = 1e-4, 2e-3
SEEN = 0.1


def cases(fast: tuple[str, ...], some: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name, marks=() if case.name in fast else pytest.mark.every) for case in some]


def make_base(case: Case, folder: Path, fields: Mapping[str, Any]) -> Path:
    """The case's base in three shards, its answers as vague as a random model's are."""
    folder.mkdir()
    tiny(case, **fields).to(torch.bfloat16).save_pretrained(folder)
    split_into_shards(folder, 3)
    make_tokenizer(mixtures.VOCAB).save_pretrained(folder)
    return folder


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(10, 380, (2, 40), generator=generator).tolist()


def difference(base: Path, file: Path, case: Case | None = None) -> float:
    """The largest difference of log-probabilities between a base and a file."""
    model = written.transformers_model(base)
    if case is not None:
        case.adjust(model)
    reference = torch.cat([written.logprobs(model, row) for row in rows()])
    found = llama.logprobs(file, tuple((row, range(len(row))) for row in rows()))
    return float((reference - found).abs().max())


@pytest.mark.parametrize("narrow", [pytest.param(False, marks=pytest.mark.every), True], ids=["wide", "narrow"])
@pytest.mark.parametrize("case", cases(FAST, [*FIRST.values()]))
def test_log_probabilities_equal_transformers(case: Case, narrow: bool, tmp_path: Path) -> None:
    """Experts wider and narrower than half of the model, whose sides cannot be told apart by their lengths then."""
    base = make_base(case, tmp_path / "base", mixtures.narrow(case.model_type) if narrow else {})
    file = written.write_base(base, tmp_path / "out")["f32"]
    assert difference(base, file, case) <= (GELU if case.model_type == "gemma4_text" else EXACT)


@pytest.mark.parametrize("case", cases(FAST, [*CASES]))
def test_a_familys_file_is_the_model_and_each_fault_is_seen(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", cases(FAST, [*CASES]))
def test_changes_are_undone_and_every_value_is_there_once(case: Case, tmp_path: Path) -> None:
    """What the tensors of a file hold of a parameter adds up to it, each share at its place."""
    base = make_base(case, tmp_path / "base", {})
    opened = resolve(str(base), "main", Recorder())
    tensors = {one.parameter: torch.cat([*one.blocks(1)]) for one in written.plain_tensors(opened)}
    stored: dict[str, int] = {}
    found = {name: torch.zeros_like(values, dtype=torch.float32) for name, values in tensors.items()}
    layout = plan(opened, None, Tokens(), ()).layout
    for tensor in layout.tensors:
        first, last = tensor.taken
        values = tensors[tensor.parameter].float()
        changed = tensor.to_gguf(values[first:last] if values.ndim else values)
        assert tuple(changed.shape) == tensor.shape and changed.is_contiguous(), tensor.name
        stored[tensor.name] = stored.get(tensor.name, 0) + changed.numel()
        found[tensor.parameter][first:last] += tensor.inverse(changed)
    assert stored == {name: torch.Size(shape).numel() for name, shape in layout.stored.items()}
    for name, values in tensors.items():
        assert torch.allclose(found[name], values.float(), rtol=1e-5, atol=1e-6), name


TRAPS = [
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False of qwen3_moe"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob = True of qwen2_moe"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob = True of olmoe"),
    ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob = False of qwen3_next"),
    ("deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}, "group_limited_greedy"),
    ("glm4_moe_lite", {"rope_interleave": False}, "rope_interleave = False of glm4_moe_lite"),
]


@pytest.mark.parametrize(
    ("family", "fields", "message"), [TRAPS[0], *(pytest.param(*trap, marks=pytest.mark.every) for trap in TRAPS[1:])]
)
def test_silent_traps_are_refused_and_are_true(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the key; and without the refusal the file loads and is another model."""
    wrong = copy.deepcopy({**FIRST[family].fields, **fields})
    base = mixtures.make_base(family, tmp_path / "base", overrides=wrong)
    with pytest.raises(ExportError, match=message) as caught:
        written.write_base(base, tmp_path / "refused")
    assert "to='hf'" in caught.value.hint and "\n" not in caught.value.what
    own = FAMILIES[family]
    unchecked = replace(own, fixed={}, check=no_check, reads=own.reads | own.fixed.keys())
    monkeypatch.setitem(FAMILIES, family, unchecked)  # type: ignore[arg-type]
    file = written.write_base(base, tmp_path / "out")["f32"]
    assert difference(base, file) > SEEN


def laid_out(family: str, fields: dict[str, Any], folder: Path) -> None:
    base = mixtures.make_base(family, folder / "base", overrides=copy.deepcopy({**FIRST[family].fields, **fields}))
    opened = resolve(str(base), "main", Recorder())
    meta_model = build(opened)
    shapes = {tensor.parameter: tensor.shape for tensor in written.plain_tensors(opened)}
    lay_out(meta_model.model, shapes, expert_pieces(opened, meta_model))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("olmoe", {"num_key_value_heads": 2}, "2 key heads for 4 heads in olmoe"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] of qwen3_moe"),
        ("deepseek_v3", {"q_lora_rank": None}, "of 2 layers without low-rank queries"),
        (
            "deepseek_v3",
            {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}},
            "mscale is not their mscale_all_dim",
        ),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, "these layer_types of gpt_oss"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0 of gpt_oss"),
        ("qwen3_5_moe_text", {**STATE, "head_dim": 16}, "mrope_section = .* for heads of 16 dims"),
    ],
)
def test_what_its_graph_cannot_compute_is_refused(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        laid_out(family, fields, tmp_path)
    assert "to='hf'" in caught.value.hint


def test_the_ramp_of_gpt_oss_is_told_and_is_all_that_differs(tmp_path: Path) -> None:
    """Published with a ramp that is not rounded, which llama.cpp rounds: the file is the model with `truncate`."""
    fields = {"max_position_embeddings": 131072, "head_dim": 64, "rope_parameters": {**OSS_YARN, "truncate": False}}
    base = mixtures.make_base("gpt_oss", tmp_path / "base", overrides=copy.deepcopy(fields))
    planned = plan(resolve(str(base), "main", Recorder()), None, Tokens(), ("f32",))
    assert any("rounds the ramp" in notice for notice in planned.notices)
    file = written.write_base(base, tmp_path / "out")["f32"]
    assert difference(base, file) > EXACT
    fields["rope_parameters"] = {**OSS_YARN, "truncate": True}
    rounded = mixtures.make_base("gpt_oss", tmp_path / "rounded", overrides=copy.deepcopy(fields))
    assert difference(rounded, file) <= EXACT
