"""An export from its beginning to its end: what is made, measured, told, refused; nothing half-made keeps a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.model import meta_model
from tests.export.cases import KINDS, export, line, name_the_base, of_peft, trained
from tests.families import make_base, make_tokenizer
from tests.runs import run_dir, train, write_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Recorder, Path]:
    """All products of one adapter in one call."""
    pytest.importorskip("xllamacpp", reason="the runtime of the extra [gguf]")
    folder = tmp_path_factory.mktemp("made")
    base = make_base("llama", folder / "base", overrides={"hidden_size": 256, "head_dim": 64, "intermediate_size": 256})
    trained(base, folder / "support", KINDS["plain"])
    recorder = Recorder()
    quants = ("f16", "q8_0", "q4_k_m")
    return (
        export(folder / "support", "hf", "gguf", "adapter-gguf", quants=quants, sink=recorder),
        recorder,
        folder / "support-export",
    )


def test_every_product_has_its_folder(made: tuple[Any, Recorder, Path]) -> None:
    report, recorder, folder = made
    keys = ["hf", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "adapter-gguf"]
    assert [product.format for product in report.products] == keys
    assert sorted(path.name for path in folder.iterdir()) == sorted(keys)
    assert (folder / "gguf-q4_k_m" / "support-Q4_K_M.gguf").is_file()
    assert (folder / "adapter-gguf" / "support-LoRA.gguf").is_file()
    assert [event.as_dict()["format"] for event in recorder.of("exported")] == keys


def test_the_table_tells_how_near_each_is(made: tuple[Any, Recorder, Path]) -> None:
    report, recorder, folder = made
    assert report.merge_base == "nf4" and report.fidelity[0].kl == 0 and report.fidelity[0].top1 == 1
    assert line(report, "merged on nf4").kl < 5e-3 < line(report, "merged on full").kl  # bf16 rounds this wide a model
    assert line(report, "hf").kl == line(report, "merged on nf4").kl  # the same weights, from the files
    assert line(report, "gguf-f16").kl < 5e-3
    assert line(report, "gguf-f16").kl < line(report, "gguf-q8_0").kl < line(report, "gguf-q4_k_m").kl < 1.0
    assert "xllamacpp" in line(report, "gguf-f16").measured_by
    told = recorder.of("fidelity")[0].as_dict()
    assert [entry["name"] for entry in told["entries"]] == [entry.name for entry in report.fidelity]
    for product in ("hf", "gguf-q8_0"):
        assert "| gguf-q4_k_m |" in (folder / product / "README.md").read_text()
        said = json.loads((folder / product / "export.json").read_text())
        assert len(said["fidelity"]) == len(report.fidelity) and all(check["ok"] for check in said["checks"])


def test_a_file_says_what_it_is(made: tuple[Any, Recorder, Path]) -> None:
    _, _, folder = made
    reader = gguf.GGUFReader(folder / "gguf-q8_0" / "support-Q8_0.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.type"] == "model" and values["general.base_model.0.name"] == "base"
    assert values["general.file_type"] == 7 and values["general.quantized_by"].startswith("qlora ")
    assert str(folder) not in json.dumps({name: str(value) for name, value in values.items()})
    for key in ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token", "pre"):
        assert f"tokenizer.ggml.{key}" in values
    assert "tokenizer.chat_template" in values
    modelfile = (folder / "gguf-q8_0" / "Modelfile").read_text()
    assert "FROM ./support-Q8_0.gguf" in modelfile and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "ADAPTER ./support-LoRA.gguf" in (folder / "adapter-gguf" / "Modelfile").read_text()


def test_the_model_is_constructed_a_few_times_only(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times: for the whole export, to be loaded as the reference, and of the written folder's own config."""
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    construct, names = meta_model.build_unmatched, []

    def counted(text: Any, attention: str, name: str) -> Any:
        names.append(name)
        return construct(text, attention, name)

    monkeypatch.setattr(meta_model, "build_unmatched", counted)
    export(tmp_path / "adapter", "hf", "gguf", quants=("q8_0",), out=tmp_path / "out")
    assert 0 < len(names) <= 4, names


@pytest.mark.slow
def test_a_file_that_is_too_far_has_no_name_and_the_others_have(tmp_path: Path, llama: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the runtime of the extra [gguf]")
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    near = export(tmp_path / "adapter", "gguf", quants=("f16", "q8_0"), out=tmp_path / "all")
    limit = (line(near, "gguf-f16").kl + line(near, "gguf-q8_0").kl) / 2
    with pytest.raises(ExportError, match=r"gguf-q8_0: is .* over `max_kl`") as caught:
        export(tmp_path / "adapter", "gguf", quants=("f16", "q8_0"), out=tmp_path / "out", max_kl=limit)
    assert caught.value.exit_code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gguf-f16"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "whole", "rslora"])
def test_other_adapters_become_gguf_files(tmp_path: Path, llama: Path, kind: str) -> None:
    trained(llama, tmp_path / "adapter", KINDS[kind])
    report = export(tmp_path / "adapter", "gguf", quants=("f32",), out=tmp_path / "out")
    assert line(report, "gguf-f32").kl < 1e-3


@pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_new_tokens_is_measured_too(tmp_path: Path, tie: bool) -> None:
    base = make_base("llama", tmp_path / "base", tie=tie)
    of_peft(base, tmp_path / "adapter", resize=390)
    name_the_base(tmp_path / "adapter", base)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    report = export(tmp_path / "adapter", "hf", "gguf", quants=("f32",), out=tmp_path / "out")
    assert line(report, "hf").kl < 1e-3 and line(report, "gguf-f32").kl < 1e-3
    reader = gguf.GGUFReader(next((tmp_path / "out" / "gguf-f32").glob("*.gguf")))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 390 and "<|call|>" in tokens and tokens[-1].startswith("[PAD")


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("gguf", {"max_kl": 0.1, "verify": False}, "`max_kl` needs"),
        ("gguf", {"imatrix": True, "quants": ("q8_0",)}, "`imatrix` weighs"),
        ("gguf", {"dtype": "f16"}, "`dtype` is the type of safetensors"),
        ("hf", {"tokenizer_pre": "gpt-2"}, "`tokenizer_pre` is for GGUF"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    tmp_path: Path, llama: Path, to: str, options: dict[str, Any], message: str
) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "adapter", to, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_room_for_all_products_is_looked_for_first(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for each one alone, not for both: nothing is begun."""
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    one = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    monkeypatch.setattr("qlora.disk.free_bytes", lambda path: (64 << 20) + int(1.5 * one))
    export(tmp_path / "adapter", "hf", out=tmp_path / "one", verify=False)
    with pytest.raises(ExportError, match=r"needs .* are free"):
        export(tmp_path / "adapter", "hf", "gguf", quants=("f16",), out=tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_run_is_measured_on_its_evaluation_rows_and_exports_at_its_end(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train(
        recipe,
        "train.max_steps=3",
        "train.batch_size=4",
        "data.eval_fraction=0.2",
        'export.formats=["hf","gguf:q8_0"]',
    )
    folder = run_dir(recipe) / "export"
    assert sorted(path.name for path in folder.iterdir()) == ["gguf-q8_0", "hf"]
    told = recorder.of("fidelity")[0].as_dict()
    assert told["texts"] == "evaluation rows" and told["rows"] == 6
    assert any("this base exports to GGUF: llama" in event.as_dict()["message"] for event in recorder.of("notice"))
    file = gguf.GGUFReader(folder / "gguf-q8_0" / "tiny-Q8_0.gguf")
    assert file.fields["general.dataset.0.name"].contents() == "rows.jsonl"
    pytest.importorskip("xllamacpp", reason="K-quants need llama.cpp's encoder")
    report = export(run_dir(recipe), "gguf", quants=("q4_k_m",), imatrix=True)
    matrix = gguf.GGUFReader(report.folder / "imatrix.gguf")
    assert any(entry.name == "blk.0.attn_q.weight.in_sum2" for entry in matrix.tensors)
    made = gguf.GGUFReader(report.folder / "tiny-Q4_K_M.gguf")
    assert made.fields["quantize.imatrix.file"].contents() == "imatrix.gguf"
