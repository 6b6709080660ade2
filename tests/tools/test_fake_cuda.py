"""CUDA tensors without a card: what would fail there fails here; a build of torch for the CPU skips, and says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import fake_cuda  # noqa: E402

needs_cuda = pytest.mark.skipif(
    torch.version.cuda is None, reason="torch is a build for the CPU: it has no CUDA tensors"
)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a build for CUDA")
def test_a_build_for_the_cpu_is_skipped_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fake_cuda.py"])
    assert fake_cuda.main() == 0
    assert "skipped" in capsys.readouterr().out


def test_ci_runs_it() -> None:
    assert "python tools/fake_cuda.py" in (ROOT / "tools" / "check").read_text(encoding="utf-8")


@needs_cuda
def test_two_devices_and_reads_of_the_host_fail() -> None:
    with fake_cuda.fake_cuda():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert float((here + here).sum()) == 6.0  # the host's own arithmetic is real
        with pytest.raises(RuntimeError, match="devices"):
            here + there
        with pytest.raises(RuntimeError):
            float(there.sum())


@needs_cuda
@pytest.mark.slow
def test_a_family_is_loaded_run_updated_and_merged(tmp_path: Path) -> None:
    results = dict(fake_cuda.try_family("llama", tmp_path))
    assert len(results) == 8 and not any(results.values()), results
