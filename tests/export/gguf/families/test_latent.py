"""Keys and values of all heads from one latent: by head in the file; what DeepSeek's positions scale, in one key.

That llama.cpp computes these families as transformers does is in test_mixtures.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.events import Recorder
from qlora.export.gguf.plan import Tokens, plan
from qlora.model.resolve import resolve
from tests import mixtures
from tests.export.gguf.families.mixture_cases import YARN


def layout(folder: Path, family: str, **overrides: Any) -> Any:
    base = mixtures.make_base(family, folder / "base", overrides=overrides)
    return plan(resolve(str(base), "main", Recorder()), None, Tokens(), ()).layout


def test_keys_of_a_head_are_turned_over_and_values_are_not(tmp_path: Path) -> None:
    """4 heads of 16 key rows (nope) and 8 value rows over a latent of 32."""
    found = layout(tmp_path, "deepseek_v3", v_head_dim=8)
    pair = {one.name: one for one in found.tensors if one.parameter.endswith("0.self_attn.kv_b_proj.weight")}
    keys, values = pair["blk.0.attn_k_b.weight"], pair["blk.0.attn_v_b.weight"]
    assert keys.stored == (4, 32, 16) and values.stored == (4, 8, 32)
    rows = torch.arange(4 * 24 * 32.0).view(4, 24, 32)
    assert torch.equal(keys.to_gguf(rows.view(-1, 32)), rows[:, :16].transpose(1, 2))
    assert torch.equal(values.to_gguf(rows.view(-1, 32)), rows[:, 16:])
    assert (keys.unit, keys.matrix_rows(24), values.matrix_rows(48)) == (24, 32, 16)
    assert torch.equal(keys.to_gguf(rows[1:3].reshape(-1, 32)), rows[1:3, :16].transpose(1, 2))  # heads by themselves


def test_attention_is_over_one_head_of_rank_and_rotated_dims(tmp_path: Path) -> None:
    keys = {name.removeprefix("deepseek2."): value for name, value in layout(tmp_path, "deepseek_v3").keys}
    assert keys["attention.head_count_kv"] == 1 and keys["attention.head_count"] == 4
    assert (keys["attention.key_length"], keys["attention.value_length"]) == (32 + 16, 32)
    assert (keys["attention.key_length_mla"], keys["attention.value_length_mla"]) == (32, 16)
    assert (keys["leading_dense_block_count"], keys["expert_gating_func"], keys["expert_shared_count"]) == (1, 2, 1)
    assert "expert_group_count" not in keys  # one group is none


@pytest.mark.parametrize("scale", [1.0, 0.707])
def test_the_factor_on_attention_is_a_multiplier_of_its_own(scale: float, tmp_path: Path) -> None:
    said = {**YARN, "mscale": scale, "mscale_all_dim": scale}
    keys = dict(layout(tmp_path, "deepseek_v2", rope_parameters=said, max_position_embeddings=1280).keys)
    assert keys["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1 * scale)
    assert "deepseek2.rope.scaling.attn_factor" not in keys and keys["deepseek2.expert_gating_func"] == 1


def test_groups_are_told_where_a_choice_goes_by_them(tmp_path: Path) -> None:
    keys = dict(layout(tmp_path, "deepseek_v3", n_group=4, topk_group=2).keys)
    assert (keys["deepseek2.expert_group_count"], keys["deepseek2.expert_group_used_count"]) == (4, 2)
    greedy = dict(layout(tmp_path / "two", "deepseek_v2", n_group=4, topk_group=2, topk_method="greedy").keys)
    assert "deepseek2.expert_group_count" not in greedy
