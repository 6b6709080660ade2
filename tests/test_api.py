"""The Python API: what a caller gets without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora import api, run_folder
from qlora.errors import RecipeError
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe
from tests.export.cases import KINDS, trained
from tests.runs import write_recipe


def test_check_reads_every_row_and_makes_no_run(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    checked = api.check(load_recipe(recipe))
    data = checked.data
    assert checked.memory is not None and checked.memory.fits
    assert len(data.train.lengths) + len(data.eval.lengths) == 30
    assert not (tmp_path / "runs").exists()


def test_a_callers_own_sink_gets_clean_events(tmp_path: Path, llama: Path) -> None:
    recipe, name = write_recipe(tmp_path, llama), "hf_LooksLikeATokenOfTheHub0123"
    (tmp_path / "rows.jsonl").rename(tmp_path / f"{name}.jsonl")
    recipe.write_text(recipe.read_text().replace("rows.jsonl", f"{name}.jsonl"))
    mine = Recorder()
    api.check(recipe, sink=mine)
    assert "[hidden].jsonl" in repr(mine.events) and name not in repr(mine.events)


def test_a_recipe_a_folder_or_a_hub_name_is_asked_about(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    assert api.recipe_or_model(str(recipe), ["lora.r=5"]).lora.r == 5
    for what in (llama, llama / "config.json"):
        assert api.recipe_or_model(str(what)).model.base == str(llama)
    assert api.recipe_or_model("owner/name").model.base == "owner/name"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gpu": "RTX 4090", "vram": "8GiB"}, "both name the limit"), ({"stack": "other"}, "no stack 'other'")],
)
def test_questions_that_cannot_be_answered(settings: dict[str, str], message: str, llama: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        api.question(api.recipe_or_model(str(llama)), **settings)


def test_a_gguf_takes_the_rows_of_its_run_without_verification_too(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Modelfile has the rows' system text and context, whatever the quant: keys are gguf-<quant>."""
    recipe = write_recipe(tmp_path / "run", llama)
    run_folder.write_recipe(tmp_path / "run", load_recipe(recipe), None)
    trained(llama, tmp_path / "run" / "adapter", KINDS["plain"])
    asked: list[bool] = []
    real = api.setup.prepare_rows

    def prepare_rows(*arguments: Any) -> Any:
        asked.append(True)
        return real(*arguments)

    monkeypatch.setattr(api.setup, "prepare_rows", prepare_rows)
    for to, reads in (("hf", False), ("gguf", True)):
        asked.clear()
        api.merge_and_export(
            tmp_path / "run", to=to, out=tmp_path / to, merge_base="nf4", options=api.export_options(verify=False)
        )
        assert bool(asked) is reads, to
