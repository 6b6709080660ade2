"""Benchmarks: the packs that they train are the trainer's, and results carry the card's name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.floors import ROOT

BENCH = ROOT / "tools" / "bench"


@pytest.fixture(autouse=True)
def _beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


@pytest.mark.parametrize(("documents", "trained"), [(1, 23), (4, 20)])
def test_a_row_is_one_document_or_several(documents: int, trained: int) -> None:
    from step_measure import Settings, figures_of  # type: ignore[import-not-found]
    from step_qlora import micro_batch  # type: ignore[import-not-found]

    batch = micro_batch([list(range(24)), list(range(24, 48))], documents)
    assert batch.input_ids_BS.tolist() == [list(range(24)), list(range(24, 48))]
    assert [row.unique().numel() for row in batch.document_ids_BS] == [documents] * 2
    assert batch.trained_T.numel() == 2 * trained
    settings = Settings("base", 2, 24, 1, 1, 8, "adamw", True, True, 1, documents)
    figures = figures_of(settings, [2.0], 1.0, 0, "cpu")
    assert figures["trained_tokens_per_second"] == 2 * trained / 2.0


def test_results_have_the_cards_name_and_a_laptops_says_so() -> None:
    from gpu import file_name  # type: ignore[import-not-found]

    found = {"hardware": {"device": "NVIDIA GeForce RTX 4060 Laptop GPU"}, "model": {"shape": "3b"}}
    assert file_name(found) == "prove-nvidia-geforce-rtx-4060-laptop-gpu-3b.json"
    assert (Path(BENCH) / "results").is_dir()


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL |= {"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 96, "eos_token_id": 3}


def test_both_forms_of_experts_are_measured_and_train_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin stands in for the kernel: the forms' losses agree, and the results have their figures."""
    import experts as bench  # type: ignore[import-not-found]

    from qlora.step.kernels import experts as kernels
    from qlora.step.kernels import trial

    cpu, asked, real = torch.device("cpu"), [], kernels.grouped
    alone = bench.measured(2, 24, 1, cpu, **SMALL)
    assert set(alone) == {"in chunks", "qlora in Triton"} and alone["qlora in Triton"].startswith("left out: ")
    monkeypatch.setattr(trial, "multiplies_experts", lambda device: True)
    monkeypatch.setattr(kernels, "grouped", lambda *given: asked.append(1) or real(*given))
    both = bench.measured(2, 24, 2, cpu, **SMALL)
    assert len(asked) >= 3 * 2 * 2 * 3  # steps, layers, projections; forth, recomputed and back
    first, second = both["qlora in Triton"], both["in chunks"]
    assert first["loss"] == pytest.approx(second["loss"], rel=0.01) and first["tokens_per_second"] > 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import experts as bench

    monkeypatch.setattr(sys, "argv", ["experts.py"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 2 and "needs a GPU" in capsys.readouterr().err


def test_a_save_is_timed_in_its_two_parts(tmp_path: Path) -> None:
    from saving import measure, trained  # type: ignore[import-not-found]

    found = measure(trained(2, {"q_proj": (64, 64), "k_proj": (32, 64)}, 4), tmp_path, 3)
    files = [path for path in (tmp_path / "checkpoints").glob("step-*/*") if path.is_file()]
    assert {path.parent.name for path in files} == {"step-000002", "step-000003"}
    assert min(found["copy"], found["write"]) > 0
    assert 2 * found["bytes"] == sum(path.stat().st_size for path in files if path.name != "manifest.json")
