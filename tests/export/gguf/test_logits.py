"""llama.cpp computes from our files what transformers computes from the base; each silent trap is sprung on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.export.gguf.family import NOTHING
from qlora.export.gguf.plan import GgufPlan
from qlora.export.llama_cpp.runtime import Request
from tests import tokenizers
from tests.export import llama
from tests.export.gguf import written
from tests.export.gguf.cases import LINEAR, LLAMA3, LONGROPE, YARN
from tests.families import FAMILIES, WINDOW, make_base

# Gemma's activation goes through a table of 16-bit values in llama.cpp.
EXACT, GEMMA = 5e-5, 5e-3
SENTENCEPIECE: dict[str, Callable[..., Path]] = {
    "llama": tokenizers.llama2,
    "mistral": tokenizers.llama2,
    "phi3": tokenizers.phi3,
    "gemma2": tokenizers.gemma,
    "gemma3": tokenizers.gemma,
}
LOCAL = {  # another base for the sliding layers than llama.cpp takes by default
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
CASES = [(family, "bpe") for family in FAMILIES] + [(family, "spm") for family in SENTENCEPIECE]


def base_of(family: str, kind: str, folder: Path, **overrides: Any) -> Path:
    """A tiny base; its windows are off where llama.cpp has none (that it ignores them is told, and tested there)."""
    if family in ("mistral", "phi3"):
        overrides = {"sliding_window": None, **overrides}
    if kind == "bpe":
        return make_base(family, folder, overrides=overrides)
    tokenizer = SENTENCEPIECE[family](folder.parent / "tokenizer")
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    top = max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1
    make_base(family, folder, vocab=top + 5, overrides=overrides)
    for file in ("generation_config.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def row(count: int, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 300, (count,), generator=generator).tolist()


def request(ids: list[int]) -> Request:
    return Request(rows=((ids, range(len(ids))),))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_greedy_answers_equal_transformers(tmp_path: Path, family: str, kind: str) -> None:
    base = base_of(family, kind, tmp_path / "base")
    files = written.write_base(base, tmp_path / "out", ("f32", "f16"))
    model = written.transformers_model(base)
    ids = row(3 * WINDOW)
    reference = written.logprobs(model, ids)
    limit = GEMMA if family.startswith("gemma") else EXACT
    found = written.ask(files["f32"], request(ids))
    assert float((found - reference).abs().max()) <= limit
    half = written.ask(files["f16"], request(ids))
    assert 0 < float((half - reference).abs().max()) <= 1e-2
    expected = model.generate(
        torch.tensor([ids[:7]]), attention_mask=torch.ones(1, 7), max_new_tokens=32, do_sample=False, eos_token_id=-1
    )
    assert llama.greedy(files["f32"], [ids[:7]]) == [expected[0, 7:].tolist()]


@pytest.mark.parametrize(
    ("family", "parameters", "more"),
    [
        ("llama", LLAMA3, {}),
        ("llama", LINEAR, {}),
        ("qwen2", YARN, {}),
        ("qwen3", {**YARN, "attention_factor": 1.0}, {}),
        ("phi3", LONGROPE, {"original_max_position_embeddings": 512, "max_position_embeddings": 4096}),
        ("phi3", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}, {}),
    ],
)
def test_scaled_positions(tmp_path: Path, family: str, parameters: dict[str, Any], more: dict[str, Any]) -> None:
    """200 tokens: beyond the trained length of LLAMA3 and YARN. LONGROPE's short factors hold up to 512."""
    said = dict(parameters)
    if "original_max_position_embeddings" in more:
        said["original_max_position_embeddings"] = more["original_max_position_embeddings"]
    base = base_of(family, "bpe", tmp_path / "base", rope_parameters=said, **more)
    file = written.write_base(base, tmp_path / "out")["f32"]
    ids = row(200)
    found = written.ask(file, Request(rows=((ids, range(len(ids))),)))
    assert float((found - written.logprobs(written.transformers_model(base), ids)).abs().max()) <= EXACT


def test_biases_and_wide_heads(tmp_path: Path) -> None:
    """Llama with all its biases, and heads of 32 dims in a model 64 wide with 4 of them."""
    base = base_of("llama", "bpe", tmp_path / "base", attention_bias=True, mlp_bias=True, head_dim=32)
    file = written.write_base(base, tmp_path / "out")["f32"]
    ids = row(40)
    found = written.ask(file, Request(rows=((ids, range(len(ids))),)))
    assert float((found - written.logprobs(written.transformers_model(base), ids)).abs().max()) <= EXACT


def unpermuted(planned: GgufPlan) -> GgufPlan:
    tensors = [replace(tensor, change=NOTHING, unit=1) for tensor in planned.layout.tensors]
    return written.with_layout(planned, tensors=tuple(tensors))


def without(key: str) -> Callable[[GgufPlan], GgufPlan]:
    def change(planned: GgufPlan) -> GgufPlan:
        kept = tuple(pair for pair in planned.layout.keys if not pair[0].endswith(key))
        assert len(kept) < len(planned.layout.keys)
        return written.with_layout(planned, keys=kept)

    return change


def no_factors(planned: GgufPlan) -> GgufPlan:
    assert planned.layout.constants
    return written.with_layout(planned, constants={})


@pytest.mark.parametrize(
    ("family", "overrides", "trap"),
    [
        ("llama", {}, unpermuted),  # GGUF.md, trap 1
        ("mistral", {}, unpermuted),
        ("gemma2", {}, unpermuted),  # the norms stay as they are stored
        ("gemma3", {}, unpermuted),
        ("gemma3", {"rope_parameters": LOCAL}, without("rope.freq_base_swa")),
        ("gemma3", {}, without("attention.sliding_window_pattern")),
        ("gemma2", {}, without("attention.sliding_window")),
        ("gemma2", {"final_logit_softcapping": 3.0}, without("final_logit_softcapping")),
        ("llama", {"rope_parameters": LLAMA3}, no_factors),
        ("qwen3", {"rope_parameters": YARN}, without("rope.scaling.type")),
    ],
)
def test_traps_that_load_and_are_wrong(
    tmp_path: Path, family: str, overrides: dict[str, Any], trap: Callable[[GgufPlan], GgufPlan]
) -> None:
    """Each of these files loads without a word, and is another model: the comparison above would see it."""
    base = base_of(family, "bpe", tmp_path / "base", **overrides)
    ids = row(200)
    reference = written.logprobs(written.transformers_model(base), ids)
    file = written.write_base(base, tmp_path / "out", change=trap)["f32"]
    found = written.ask(file, Request(rows=((ids, range(len(ids))),)))
    assert float((found - reference).abs().max()) > 2 * GEMMA


def test_a_window_that_llama_cpp_ignores_shows_beyond_it_only(tmp_path: Path) -> None:
    base = make_base("mistral", tmp_path / "base")
    file = written.write_base(base, tmp_path / "out")["f32"]
    ids = row(3 * WINDOW)
    found = written.ask(file, Request(rows=((ids, range(len(ids))),)))
    difference = (found - written.logprobs(written.transformers_model(base), ids)).abs().amax(dim=1)
    assert float(difference[:WINDOW].max()) <= EXACT < 1e-2 < float(difference[WINDOW:].max())
