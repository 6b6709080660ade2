"""What an export's measuring will take is said before training, or refused there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.verify.foresight import foresee_measuring
from qlora.model.resolve import resolve
from qlora.recipe.sections import ExportSection
from tests import all_families

ASKED = ExportSection(formats=("hf",))


@pytest.fixture(scope="module")
def bamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_families.make_base("bamba", tmp_path_factory.mktemp("bamba") / "base")


def foreseen(folder: Path, section: ExportSection, limit_bytes: int) -> list[str]:
    recorder = Recorder()
    foresee_measuring(section, resolve(str(folder), "main", Recorder()), limit_bytes, recorder)
    return [event.as_dict()["message"] for event in recorder.of("notice")]


def test_a_plain_trunk_needs_no_word(llama: Path) -> None:
    assert foreseen(llama, ASKED, 1) == []


def test_a_model_that_is_measured_whole_is_named_before(bamba: Path) -> None:
    reason = "BambaForCausalLM's layers take more than what the layer before gives"
    takes = f"takes 0.00 GiB, not a layer at a time ({reason})"
    assert foreseen(bamba, ASKED, 1 << 30) == [f"measuring an export of this base {takes}"]
    (message,) = foreseen(bamba, ExportSection(), 1 << 10)
    assert message.endswith("0.00 GiB are there: export with verify=False")
    with pytest.raises(ExportError, match="measuring an export of it takes 0") as refused:
        foreseen(bamba, ASKED, 1 << 10)
    assert "leave out export.formats" in refused.value.hint
