"""`qlora-eval`: models on the same rows, as near to each other as their exports were measured to be."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora import api, evaluate
from qlora.errors import DataError, ExportError, QloraError, TokenizerError
from qlora.evaluate import HowToEvaluate
from qlora.events import Recorder, Sinks
from qlora.export.llama_cpp.runtime import find_runtime
from qlora.recipe.sections import QuantizationSection
from qlora.report import evaluation
from qlora.stop import StopRequest
from tests.runs import run_dir, train, values, write_recipe, write_rows

FEW = ("data.max_length=96", "data.eval_fraction=0.2", "train.batch_size=4", "eval.samples=0")
MUCH = ("train.learning_rate=5e-3", "train.max_steps=30", "lora.r=4")
HOW = HowToEvaluate(rows=24, answers=6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A run's folder with exports in it; rows of two files beside it."""
    place = tmp_path_factory.mktemp("evaluated")
    recipe = write_recipe(place, llama, "lamps")
    train(recipe, *FEW, *MUCH)
    options = api.export_options(verify=False)
    quants = ["f16"] if find_runtime() else []
    api.merge_and_export(run_dir(recipe), to=["hf", *(["gguf"] if quants else [])], quants=quants, options=options)
    rows = place / "rows"
    rows.mkdir()
    write_rows(rows / "one.jsonl", 12)
    write_rows(rows / "two.jsonl", 8)
    return run_dir(recipe)


@pytest.fixture(scope="module")
def measured(trained: Path) -> Iterator[dict[str, Any]]:
    exports = trained / "export"
    files = [exports / "gguf-f16"] if find_runtime() else []
    yield evaluate.evaluate([trained, exports / "hf", *files], trained.parent.parent / "rows", how=HOW)


def test_base_adapter_merged_folder_and_file_stand_in_one_table(measured: dict[str, Any]) -> None:
    base, adapter, *exports = measured["models"]
    assert (base["kind"], adapter["kind"], adapter["name"]) == ("base", "adapter", "lamps")
    assert exports[0]["name"] == "lamps/hf" and measured["rows"] == 20 and measured["answers"] == 6
    for line in measured["models"]:
        for key in ("loss", "perplexity", "token_accuracy", "exact_match", "contains"):
            assert line[key]["low"] <= line[key]["mean"] <= line[key]["high"]
        assert line["perplexity"]["mean"] == pytest.approx(math.exp(line["loss"]["mean"]))
        assert {name: some["rows"] for name, some in line["sources"].items()} == {"one.jsonl": 12, "two.jsonl": 8}
        total = sum(some["rows"] * 1 for some in line["sources"].values())
        assert total == measured["rows"]
    assert adapter["loss"]["mean"] < base["loss"]["mean"] - 0.5
    for line in exports:  # merged on NF4 in bf16: as near as the table of fidelity has them
        assert line["loss"]["mean"] == pytest.approx(adapter["loss"]["mean"], abs=0.01)


def test_pairs_say_what_is_beyond_chance(measured: dict[str, Any]) -> None:
    count = len(measured["models"])
    assert len(measured["pairs"]) == count * (count - 1) // 2
    of_base, same = measured["pairs"][0], measured["pairs"][-1]
    assert of_base["beyond_chance"] and of_base["loss_difference"]["high"] < 0
    names = {line["name"]: line for line in measured["models"]}
    means = [names[of_base[key]]["loss"]["mean"] for key in ("other", "one")]
    assert of_base["loss_difference"]["mean"] == pytest.approx(means[0] - means[1])
    assert abs(same["loss_difference"]["mean"]) < 0.01 and 0 < same["exact_match"]["p"] <= 1


def test_the_screen_shows_each_model_and_each_source(measured: dict[str, Any]) -> None:
    text = "\n".join(evaluation.lines(measured))
    assert "20 rows" in text and "6 of them answered" in text and "beyond chance" in text
    for line in measured["models"]:
        assert line["name"][:20] in text
    assert text.count("two.jsonl") == 2 * len(measured["models"])


def test_the_loss_is_that_of_the_run(trained: Path, tmp_path: Path) -> None:
    """Rows as training reads them: the figures that the run measured of its own evaluation rows."""
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    known = [event for event in events if event["event"] == "eval"][-1]
    from qlora.data.hub_rows import localize
    from qlora.model import tokenizer_files
    from qlora.recorded import load_recorded
    from qlora.training import setup

    recipe, _ = load_recorded(trained / "recipe.toml")
    kept = tokenizer_files.of_run(trained, Recorder())
    assert kept is not None and localize(recipe.data, Recorder()).local
    _, data = setup.prepare_rows(recipe, kept, Recorder())
    rows = [
        json.loads((trained.parent.parent / "rows.jsonl").read_text().splitlines()[int(w.rpartition(":")[2]) - 1])
        for w in data.eval.wheres
    ]
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sink = Recorder()
    found = evaluate.evaluate([trained], file, how=HowToEvaluate(base=False, answers=0), sink=sink)
    assert found["models"][0]["loss"]["mean"] == pytest.approx(known["loss"], rel=1e-4)
    assert found["models"][0]["exact_match"] is None and found["pairs"] == []
    assert any("rows are few" in text for text in values(sink, "notice", "message"))


def test_few_of_many_rows_are_spread_over_all(trained: Path) -> None:
    sink = Recorder()
    how = HowToEvaluate(rows=5, answers=2, base=False)
    found = evaluate.evaluate([trained], trained.parent.parent / "rows", how=how, sink=sink)
    assert found["rows"] == 5 and found["answers"] == 2 and found["sources"] == ["one.jsonl", "two.jsonl"]
    assert any("measured are 5 rows, spread evenly over all 20" in text for text in values(sink, "notice", "message"))


def test_a_long_prompt_does_not_shorten_the_other_answers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(file: Path, sink: Recorder) -> Any:
        how = HowToEvaluate(answers=50, max_length=500)
        return evaluate._asked([evaluate.named(trained)], file, how, Sinks(sink), StopRequest())

    rows = trained.parent.parent / "rows" / "two.jsonl"
    short, sink = asked(rows, Recorder()), Recorder()
    assert short.max_new_tokens > 8 and len(short.questions) == 8
    longest = max(len(question.prompt_ids) for question in short.questions)
    monkeypatch.setattr(evaluate, "_context", lambda *_: longest + short.max_new_tokens - 1)
    left = asked(rows, sink)
    assert left.max_new_tokens == short.max_new_tokens and 0 < len(left.questions) < 8
    assert len(left.answered) == len(left.questions) and len(left.split.lengths) == 8
    (said,) = [event for event in sink.of("notice") if "not answered are questions" in event.message]
    assert said.count == 8 - len(left.questions)
    monkeypatch.undo()
    assert evaluate._context(evaluate.named(trained), HowToEvaluate(), Recorder()) == 512


def test_bases_are_told_apart_by_what_they_are() -> None:
    def opened(content: str, held: str = "nf4") -> Any:
        known = SimpleNamespace(config="c", sampled=content, content=content)
        model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(base_identity=known))
        origin = SimpleNamespace(quantization=QuantizationSection(type=held))  # type: ignore[arg-type]
        return SimpleNamespace(model=model, origin=origin, base=SimpleNamespace(name="x/model", path=Path("x/model")))

    lines = evaluate._Lines()
    told = [lines.name_of_base(one) for one in (opened("a"), opened("b"), opened("a"), opened("a", "none"))]
    assert told == ["base (model, nf4)", "base (model, nf4) (2)", None, "base (model, 16 bit)"]
    same = evaluate.Named("model", Path("y/model"))
    assert [lines.name_of(same), lines.name_of(same)] == ["model", "model (2)"]


@pytest.mark.skipif(find_runtime() is None, reason="there is no llama.cpp")
def test_a_file_in_a_runs_exports_is_read_with_the_runs_tokenizer(trained: Path, tmp_path: Path) -> None:
    rows = trained.parent.parent / "rows" / "two.jsonl"
    found = evaluate.evaluate([trained / "export" / "gguf-f16"], rows, how=HowToEvaluate(answers=1))
    assert [line["kind"] for line in found["models"]] == ["gguf"]
    (file,) = (trained / "export" / "gguf-f16").glob("*.gguf")
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(file.read_bytes())
    with pytest.raises(ExportError, match="a GGUF file alone has no tokenizer"):
        evaluate.evaluate([alone], rows)


def test_what_cannot_be_compared_is_refused(trained: Path, tmp_path: Path) -> None:
    rows = trained.parent.parent / "rows" / "two.jsonl"
    other = tmp_path / "other"
    shutil.copytree(trained / "export" / "hf", other)
    template = other / "chat_template.jinja"
    template.write_text("Hello. " + template.read_text())
    empty, broken, folder = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl", tmp_path / "folder"
    empty.write_text("")
    broken.write_text("{\n")
    folder.mkdir()
    cases: list[tuple[list[Path], Path, type[QloraError], str]] = [
        ([trained, other], rows, TokenizerError, "has another tokenizer or chat template"),
        ([trained], empty, DataError, "the file is empty"),
        ([trained], broken, DataError, "broken.jsonl"),
        ([trained], tmp_path / "gone.jsonl", DataError, "gone.jsonl"),
        ([folder], rows, ExportError, "folder"),
        ([tmp_path / "gone"], rows, ExportError, "no such file or folder"),
        ([trained] * 9, rows, ExportError, "9 models are named"),
    ]
    for models, data, kind, what in cases:
        with pytest.raises(kind, match=what) as caught:
            evaluate.evaluate(models, data)
        assert caught.value.hint
