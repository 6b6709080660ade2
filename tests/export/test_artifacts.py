"""What is exported, into which folders: names that are unknown are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora import api
from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export import artifacts
from qlora.export.artifacts import Source, plan_artifacts
from qlora.model.adapter_folder import provenance, read_adapter
from qlora.model.adapter_seal import seal
from qlora.model.resolve import resolve
from tests.export.cases import KINDS, trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": ("onnx",)}, "unknown format 'onnx'"),
        ({"to": ("gguf",), "quants": ("q9",)}, "unknown quant 'q9'"),
        ({"to": ("hf",), "quants": ("q8_0",)}, "`quants` is for GGUF"),
    ],
)
def test_unknown_formats_and_quants(tmp_path: Path, llama: Path, arguments: dict[str, Any], message: str) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    with pytest.raises(ExportError, match=message):
        api.merge_and_export(tmp_path / "adapter", **arguments)


OUT, DEFAULT = Path("out"), Path("run/export")


def planned(to: Sequence[str], quants: Sequence[str] = (), out: Path | None = None) -> list[tuple[str, str]]:
    return [(artifact.key, str(artifact.folder)) for artifact in plan_artifacts(to, quants, out, DEFAULT)]


def test_one_artifact_is_the_folder_and_several_lie_in_it() -> None:
    assert planned(["hf"], out=OUT) == [("hf", "out")]
    assert planned(["hf"]) == [("hf", "run/export/hf")]
    assert planned(["gguf"], out=OUT) == [("gguf-q8_0", "out")]
    assert planned(["hf", "gguf"], ["f16", "q4_k_m"], OUT) == [
        *(("hf", "out/hf"), ("gguf-f16", "out/gguf-f16"), ("gguf-q4_k_m", "out/gguf-q4_k_m")),
    ]


def test_what_is_named_twice_is_made_once() -> None:
    assert planned(["gguf", "gguf"], ["f16", "f16"], OUT) == [("gguf-f16", "out")]
    with pytest.raises(ExportError, match="nothing to export"):
        planned([])


def test_an_adapter_alone_is_no_merged_model() -> None:
    hf, adapter = plan_artifacts(["hf", "adapter-gguf"], (), None, DEFAULT)
    assert hf.merged and not adapter.merged


def test_a_source_builds_its_model_and_plans_its_merges_once(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    adapter = read_adapter(tmp_path / "adapter")
    origin = provenance(tmp_path / "adapter", adapter.config)
    sealed = seal(tmp_path / "adapter", Recorder())
    source = Source("lamps", adapter, sealed, origin, resolve(str(llama), "main", Recorder()), torch.device("cpu"))
    built: list[str] = []
    real = artifacts.build
    monkeypatch.setattr(artifacts, "build", lambda base: built.append(base.name) or real(base))
    one, two, other = (
        *(source.merge("nf4", dtype) for dtype in (torch.bfloat16, torch.float32)),
        source.merge("full", torch.bfloat16),
    )
    assert one.plan is two.plan is not other.plan and len(built) == 1
    assert (one.dtype, two.dtype, other.merge_base) == (torch.bfloat16, torch.float32, "full")


def test_a_report_without_a_table_draws_its_folders_and_where_they_were_sent() -> None:
    made = artifacts.ExportedArtifact("hf", Path("runs/tiny/export/hf"), 1024, 3, 2, "nf4")
    pushed = SimpleNamespace(url="https://hub.example/me/tiny")
    drawn = str(artifacts.Report((made,), "nf4", pushed=pushed).drawing())
    assert drawn.splitlines() == ["hf  1,024 bytes  runs/tiny/export/hf", "pushed to https://hub.example/me/tiny"]
