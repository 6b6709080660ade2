"""An export of a base that its adapter does not know: what is kept of it, and what a half-written one goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.export import hf
from qlora.model.identity import at_the_door
from tests.export.cases import KINDS, edit, exported, trained
from tests.families import make_base


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A PEFT adapter of others, which says nothing of its base but the path."""
    base = make_base("llama", tmp_path / "base")
    trained(base, tmp_path / "adapter", KINDS["some"])
    edit(tmp_path / "adapter" / "qlora.json", fingerprint=None)
    return tmp_path / "adapter"


def change_the_base(base: Path) -> None:
    tensors = {name: tensor + 0.01 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_a_half_written_export_goes_on_with_the_same_base_only(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bases of one shape give files of one size: half of each would be a whole file."""
    out = adapter.parent / "out"
    starts: list[int] = []
    real = hf.fill

    def fill(merge, staged, sink):  # type: ignore[no-untyped-def]
        starts.append(staged.start)
        done = real(merge, staged, sink)
        if len(starts) < 3:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(hf, "fill", fill)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            exported(adapter, out=out)
    change_the_base(adapter.parent / "base")
    exported(adapter, out=out)
    assert starts[0] == 0 and starts[1] > 0 and starts[2] == 0


def test_an_export_keeps_which_base_it_was_made_of(adapter: Path) -> None:
    report = exported(adapter, out=adapter.parent / "out")
    first = json.loads((report.folder / "export.json").read_text())["base_identity"]
    change_the_base(adapter.parent / "base")
    report = exported(adapter, out=adapter.parent / "out")
    second = json.loads((report.folder / "export.json").read_text())["base_identity"]
    assert first["content"] != second["content"] and first["shapes"] == second["shapes"]
    assert set(first) == set(at_the_door({}, {}).model_dump())


def test_weights_that_are_not_finite_are_not_exported(adapter: Path) -> None:
    file = adapter.parent / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][7] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    sink = Recorder()
    with pytest.raises(ModelError, match=r"tensor 'model\.embed_tokens\.weight' holds values that are not finite"):
        exported(adapter, out=adapter.parent / "out", sink=sink)
    assert not (adapter.parent / "out").exists() and not sink.of("exported")
