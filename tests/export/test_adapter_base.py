"""The base of an adapter from elsewhere is named by hand, and what is said of it speaks of no recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.cli.common import as_options
from qlora.errors import ExportError, UserError
from qlora.events import Recorder
from qlora.export.adapter_base import as_trained, open_base
from qlora.model.adapter_folder import Provenance, provenance, read_adapter
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection
from tests.export.cases import KINDS, edit, export, exported, line, name_the_base, of_peft, trained
from tests.families import make_base, make_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base") / "llama")


def moved(llama: Path, tmp_path: Path) -> Path:
    """An adapter of ours from another machine."""
    trained(llama, tmp_path / "adapter", KINDS["some"])
    edit(tmp_path / "adapter" / "qlora.json", base="/home/anna/models/llama")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="/home/anna/models/llama")
    return tmp_path / "adapter"


def test_a_base_that_lies_elsewhere_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = moved(llama, tmp_path)
    with pytest.raises(ExportError, match="is not here") as caught:
        exported(adapter)
    assert "--base-model" in as_options(caught.value.hint)
    monkeypatch.chdir(llama.parent)
    first = exported(adapter, base_model=llama, out=tmp_path / "one")
    second = exported(adapter, base_model="llama", out=tmp_path / "two")  # a folder is seen from where its user stands
    assert (first.folder / "model.safetensors").read_bytes() == (second.folder / "model.safetensors").read_bytes()


def test_another_base_is_refused_all_the_same(llama: Path, tmp_path: Path) -> None:
    adapter = moved(llama, tmp_path)
    other = make_base("llama", tmp_path / "other", seed=1)
    (tmp_path / "adapter" / "qlora.json").unlink()
    assert exported(adapter, base_model=other, out=tmp_path / "one")  # shapes are all that a stranger's adapter says
    with pytest.raises(ExportError, match=r"is not in the base|is \(.*\) here and"):
        exported(adapter, base_model=make_base("phi3", tmp_path / "phi"), out=tmp_path / "two")
    wide = make_base("llama", tmp_path / "wide", overrides={"intermediate_size": 96})
    with pytest.raises(ExportError, match=r"is \(.*\) here and"):
        exported(adapter, base_model=wide, out=tmp_path / "two")


def test_ours_knows_its_base_by_content(llama: Path, tmp_path: Path) -> None:
    from qlora.model import identity
    from qlora.model.meta_model import build, taken_tensors

    adapter = moved(llama, tmp_path)
    base = resolve(str(llama), "main", Recorder())
    known = identity.read_through(base.config, taken_tensors(base, build(base)), Recorder())
    edit(adapter / "qlora.json", identity=known.model_dump())
    assert exported(adapter, base_model=llama, out=tmp_path / "one")
    with pytest.raises(ExportError, match="was trained on another base"):
        exported(adapter, base_model=make_base("llama", tmp_path / "other", seed=1), out=tmp_path / "two")


@pytest.mark.parametrize(
    ("named", "asked", "what"),
    [
        ("", None, "names no base"),
        ("/home/anna/llama", None, "is not here"),
        ("~/models/llama", None, "is not here"),
        ("./models/my llama", None, "is neither a hub name nor a folder"),
        ("C:\\models\\llama", None, "is neither a hub name nor a folder"),
        ("/home/anna/llama", "/nowhere/llama", "`base_model`: '/nowhere/llama' is neither a folder nor a hub name"),
        ("/home/anna/llama", "no such thing!", "is neither a folder nor a hub name"),
        ("someone/llama", None, "not in the cache"),
        ("/home/anna/llama", "someone/llama", "not in the cache"),
    ],
)
def test_what_is_said_of_a_base_that_is_not_here(
    named: str, asked: str | None, what: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    of_peft(llama, tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=named)
    adapter = read_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=what) as caught:
        open_base(adapter, provenance(adapter.folder, adapter.config), asked, Recorder())
    said = f"{caught.value.what} {caught.value.hint}"
    assert "model.base" not in said and "recipe" not in said
    assert asked is not None or "`base_model`" in caught.value.hint


def test_a_strangers_adapter_was_trained_in_16_bit(llama: Path, tmp_path: Path) -> None:
    """Merged into the original weights, and measured against those with the adapter beside them."""
    of_peft(llama, tmp_path / "adapter")
    name_the_base(tmp_path / "adapter", llama)
    recorder = Recorder()
    report = export(tmp_path / "adapter", "hf", out=tmp_path / "out", sink=recorder)
    assert report.merge_base == "full" and report.choice is None
    assert line(report, "trained").kl == 0 and line(report, "hf").kl < 1e-3
    said = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert any("trained on 16 bit" in message and "merge_base='nf4'" in message for message in said)


def test_a_run_on_16_bit_is_merged_on_no_4_bit_base(llama: Path) -> None:
    """Nothing was measured against such a base, and the run says itself how it held its own."""
    base = resolve(str(llama), "main", Recorder())
    ours = Provenance(base.name, "main", base.fingerprint, QuantizationSection(type="none"))
    with pytest.raises(ExportError) as caught:
        as_trained(ours, base, "nf4")
    assert as_options(caught.value.what) == "--base nf4 is not possible: the run trained on its base in 16 bit"
    assert as_options(caught.value.hint) == "leave --base out"
    assert as_trained(ours, base, "full") is as_trained(ours, base, "auto") is ours


@pytest.mark.slow
def test_a_card_or_its_owner_says_that_it_was_4_bit(llama: Path, tmp_path: Path) -> None:
    of_peft(llama, tmp_path / "adapter")
    name_the_base(tmp_path / "adapter", llama)
    (tmp_path / "adapter" / "README.md").unlink(missing_ok=True)
    asked = export(tmp_path / "adapter", "hf", out=tmp_path / "one", merge_base="nf4")
    assert asked.merge_base == "nf4" and line(asked, "trained, adapter on nf4").kl == 0
    assert asked.choice.by == "asked" and set(asked.choice.kl) == {"nf4", "full"}
    kept = json.loads((asked.folder / "export.json").read_text())
    assert kept["choice"]["by"] == "asked" and kept["quantization"]["type"] == "nf4"
    assert "The merge base: merged on full KL" in (asked.folder / "README.md").read_text()
    (tmp_path / "adapter" / "README.md").write_text("- load_in_4bit: True\n")
    found = export(tmp_path / "adapter", "hf", out=tmp_path / "two", verify=False)
    assert found.merge_base == "nf4"


def test_a_base_that_is_stored_in_4_bit_stays_so(llama: Path, tmp_path: Path) -> None:
    from tests.model.conftest import stored_in_4bit

    of_peft(llama, tmp_path / "adapter")
    name_the_base(tmp_path / "adapter", llama)
    stored = stored_in_4bit(tmp_path, resolve(str(llama), "main", Recorder()), double=True)
    make_tokenizer().save_pretrained(stored)
    report = exported(tmp_path / "adapter", base_model=stored, out=tmp_path / "out")
    assert report.merge_base == "nf4"
