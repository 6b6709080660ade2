"""The table of fidelity: exact where a hand can compute it, near zero for the same model, large for broken ones."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.chat import TokenRow
from qlora.data.token_cache import PreparedSplit
from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.verify import candidates, fidelity
from qlora.export.verify.fidelity import choose_positions, divergence, live_logprobs, measure, probe_split, reference
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.model.tokenizer import open_tokenizer
from tests.export.cases import KINDS, NF4, merge_of, trained

CPU = torch.device("cpu")


def split_of(lengths: list[int], vocabulary: int = 380) -> PreparedSplit:
    """Rows of random tokens; of each the second half is trained."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in lengths:
        ids = torch.randint(4, vocabulary, (length,), generator=generator).tolist()
        rows.append(TokenRow(ids, [float(at >= length // 2) for at in range(length)]))
    trained_tokens = [sum(weight > 0 for weight in row.loss_weights[1:]) for row in rows]
    return PreparedSplit(rows, lengths, trained_tokens, [""] * len(rows), [0] * len(rows))


SPLIT = split_of([30, 17, 41, 8, 25, 33])


def test_divergence_is_the_textbooks() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(50, 300, generator=generator) * 3, -1) for _ in range(2))
    textbook = (p.double().exp() * (p.double() - q.double())).sum(1)
    torch.testing.assert_close(divergence(p, q), textbook, atol=2e-6, rtol=1e-6)
    assert bool((divergence(p, p) == 0).all())


@given(st.floats(1e-6, 1e-2), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_small_divergences_are_not_lost_in_rounding(size: float, seed: int) -> None:
    """fp32 logarithms carry errors of 1e-6: summed as in the textbook they would drown a KL of 1e-9."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 2048, generator=generator, dtype=torch.float64) * 3
    other = logits + size * torch.randn(1, 2048, generator=generator, dtype=torch.float64)
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(other, -1)
    exact = (p.exp() * (p - q)).sum(1)
    found = divergence(p.float(), q.float())
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0.05)
    assert float(found) >= 0


def test_positions_are_all_where_they_fit_and_the_rows_come_back() -> None:
    for layout in ((64, True), (64, False)):
        positions = choose_positions(SPLIT, layout, 0, 384)
        assert positions.count == sum(SPLIT.trained)
        assert positions.rows == 6
        assert positions.source == fidelity.EVALUATION_ROWS
        targets = []
        for ids, places in positions.documents():
            row = next(row for row in SPLIT.rows if row.input_ids[: len(ids)] == ids)
            assert all(row.loss_weights[place + 1] > 0 for place in places)
            targets += [row.input_ids[place + 1] for place in places]
        assert targets == positions.targets_N().tolist(), "documents and batches count positions in another order"


def test_positions_are_thinned_evenly_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "REFERENCE_BYTES", 4 * 384 * 20)
    positions = choose_positions(SPLIT, (64, True), 0, 384)
    assert positions.count == 20 < sum(SPLIT.trained)
    assert positions.rows == 6, "every row gives some"
    again = choose_positions(SPLIT, (64, True), 0, 384)
    assert [b.trained_T.tolist() for b in again.batches] == [b.trained_T.tolist() for b in positions.batches]
    monkeypatch.setattr(fidelity, "MOST_TOKENS", 80)
    fewer = choose_positions(SPLIT, (64, True), 0, 384)
    assert 2 <= fewer.rows < 6 and sum(len(ids) for ids, _ in fewer.documents()) <= 80


def test_rows_without_a_trained_token_are_an_error() -> None:
    with pytest.raises(ExportError, match="no trained position"):
        choose_positions(split_of([]), (64, True), 0, 384)


def test_a_candidate_by_hand(tmp_path: Path) -> None:
    positions = choose_positions(split_of([4]), (16, True), 0, 4)
    assert positions.count == 2
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.4, 0.1]]).log()
    q = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1]]).log()
    with reference([p], positions, tmp_path) as trained_model:
        trained_model = replace(trained_model, targets_N=torch.tensor([0, 2]))
        line = measure(trained_model, "x", "hand", iter([q[:1], q[1:].numpy()]), 17)
        own = measure(trained_model, "trained", "hand", [trained_model.logprobs_NV], None)
    kl = 0.7 * math.log(0.7 / 0.4) + 0.1 * math.log(0.1 / 0.4)
    kl += 0.25 * math.log(2.5) + 0.25 * math.log(1.25) + 0.4 * math.log(0.4 / 0.6)
    assert line.kl == pytest.approx(kl / 2, rel=1e-5)
    assert line.perplexity == pytest.approx(math.exp(-(math.log(0.4) + math.log(0.6)) / 2), rel=1e-5)
    assert (line.top1, line.bytes, line.positions, line.rows) == (1.0, 17, 2, 1)
    assert own.kl == 0 and own.top1 == 1 and own.perplexity == pytest.approx(math.exp(-math.log(0.28) / 2), rel=1e-5)
    assert json.loads(json.dumps(asdict(line)))["name"] == "x"
    assert not list(tmp_path.iterdir()), "the reference's file stays behind"


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (torch.full((2, 4), float("nan")), "not finite"),
        (torch.zeros(2, 5), "a vocabulary of 5, the trained model one of 4"),
        (torch.zeros(1, 4), "computed at 1 of 2 positions"),
        (np.full((2, 4), -np.inf, dtype=np.float32), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_an_error(tmp_path: Path, chunk: torch.Tensor, message: str) -> None:
    positions = choose_positions(split_of([4]), (16, True), 0, 4)
    with (
        reference([torch.full((2, 4), math.log(0.25))], positions, tmp_path) as trained_model,
        pytest.raises(ExportError, match=f"^x: .*{message}"),
    ):
        measure(replace(trained_model, targets_N=torch.tensor([0, 2])), "x", "hand", [chunk], None)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_the_merged_model_is_near_the_trained_one_and_broken_ones_are_far(
    llama: Path, tmp_path: Path, kind: str
) -> None:
    model = trained(llama, tmp_path / "adapter", KINDS[kind])
    base = resolve(str(llama), "main", Recorder())
    merge = {
        kind: merge_of(llama, tmp_path / "adapter", merge_base=kind, quantization=NF4, dtype=torch.bfloat16)
        for kind in ("nf4", "full")
    }
    positions = choose_positions(SPLIT, (64, True), 0, 384)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    with reference(live_logprobs(model, positions.batches, CPU), positions, tmp_path) as trained_model:

        def line(weights: candidates.Weights) -> fidelity.Fidelity:
            chunks = candidates.vocabulary_logprobs(build(base).model, weights, positions.batches, CPU)
            return measure(trained_model, "candidate", "transformers", chunks, None)

        merged = candidates.of_merge(merge["nf4"].tensors())
        right, full = line(merged), line(candidates.of_merge(merge["full"].tensors()))
        bare = line(candidates.of_merge(merge["nf4"].base_tensors()))
        halves = merged[q_proj]().view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
        permuted = line({**merged, q_proj: lambda: halves})
    assert right.kl < 1e-3 and right.top1 > 0.9  # bf16 makes near ties of some of the 79 positions
    assert full.kl > 5 * right.kl, "NF4 changes too little to be seen"
    assert bare.kl > 0.01 and permuted.kl > 0.1 and permuted.top1 < 0.9
    assert right.positions == sum(SPLIT.trained) and right.rows == 6


def test_live_chunks_do_not_change_the_model(llama: Path, tmp_path: Path) -> None:
    model = trained(llama, tmp_path / "adapter", KINDS["plain"]).train()
    positions = choose_positions(SPLIT, (64, False), 0, 384)
    first = torch.cat(list(live_logprobs(model, positions.batches, CPU)))
    assert model.training and not first.requires_grad
    assert torch.equal(first, torch.cat(list(live_logprobs(model, positions.batches, CPU))))


def test_probe_texts_serve_where_there_are_no_rows(llama: Path) -> None:
    tokenizer = open_tokenizer(llama, "llama")
    split = probe_split(tokenizer, 32)
    assert max(split.lengths) <= 32 and len(split.rows) == len(fidelity.PROBES)
    positions = choose_positions(split, (32, False), 0, 384, fidelity.PROBE_ROWS)
    assert positions.count == sum(length - 1 for length in split.lengths)
    assert positions.source == "built-in probe texts"
