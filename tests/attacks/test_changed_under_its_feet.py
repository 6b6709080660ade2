"""What a run or an export works with is altered while it works, or between the two: by a bit, by a hand, by a thief.

Every file that we write a checksum of, and who reads it:

    RUN/adapter/*           seal: every export (of a run, its adapter, a copy of that), a run that is resumed, or ends
    RUN/tokenizer/*         of_run: a run that is resumed, an export of it
    RUN/checkpoints/*/*     newest, at_step: a run that is resumed (tests/faults/test_damage.py)
    CACHE/tokens/*/*        prepare: every run, check and export (tests/data/test_prepare.py)
    .OUT.part/*             _cut_back: an export that goes on where a killed one stopped (tests/export/test_staging.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import qlora
from qlora import api, disk
from qlora.disk import verify_folder
from qlora.errors import ExportError
from qlora.events import Event, Recorder, Sinks
from qlora.export.verify import weights
from qlora.model.adapter_seal import SEALED, damage
from qlora.recipe.reading import load_recipe
from qlora.training import loop
from tests.export.cases import edit, export, exported
from tests.families import make_base
from tests.runs import run_dir, train, values, write_recipe
from tests.sampling import sampled

RUN = (
    *("data.eval_fraction=0.3", "train.batch_size=8", "train.micro_batch_size=2", "train.learning_rate=1e-2"),
    *("eval.every_steps=2", "eval.samples=0", "train.max_steps=4", "checkpoint.every_steps=2", "data.packing=false"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a base and a run of 4 steps, of which step 4 is the best."""
    project = tmp_path_factory.mktemp("trained")
    recorder = train(write_recipe(project, make_base("llama", project / "base")), *RUN)
    assert values(recorder, "end", "adapter_step") == [4]
    return project


@pytest.fixture
def recipe(trained: Path) -> Any:
    """The project's recipe; what a test alters is put back afterwards, in the same place."""
    kept = trained.with_name("kept")
    shutil.copytree(trained, kept, symlinks=True)
    yield trained / "tiny.toml"
    shutil.rmtree(trained)
    kept.rename(trained)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the child that compares weights, which takes most of a tiny export's time and has tests of its own."""
    monkeypatch.setattr(weights, "reopen", lambda merge, targets: {key: [] for key in targets})


def flip(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    file.write_bytes(bytes(data))


def notices(recorder: Recorder, topic: str) -> list[str]:
    return [event.as_dict()["message"] for event in recorder.of("notice") if event.as_dict()["topic"] == topic]


# --- a checksum that somebody reads -----------------------------------------------------------------------------------


def of_the_run(recipe: Path) -> Path:
    return run_dir(recipe)


def of_its_adapter(recipe: Path) -> Path:
    return run_dir(recipe) / "adapter"


def of_a_copy(recipe: Path) -> Path:
    copy = recipe.parent / "copy of the adapter"
    shutil.copytree(run_dir(recipe) / "adapter", copy)
    return copy


@pytest.mark.parametrize("door", sampled([of_the_run, of_its_adapter, of_a_copy], of_the_run))
def test_a_flipped_bit_of_an_adapter_is_refused_at_every_door(recipe: Path, door: Callable[[Path], Path]) -> None:
    adapter = run_dir(recipe) / "adapter"
    present = [name for name in (*SEALED, disk.MANIFEST) if (adapter / name).is_file()]
    assert len(present) >= 6
    for name in present:
        for at in (0.0, 0.5, 1.0):
            whole = (adapter / name).read_bytes()
            flip(adapter / name, at)
            source = door(recipe)
            with pytest.raises(ExportError) as refused:
                exported(source, to="hf", out=recipe.parent / "out")
            assert refused.value.exit_code == 2 and f"/{name}: " in refused.value.what
            assert "put the file back" in refused.value.hint and "remove manifest.json" in refused.value.hint
            (adapter / name).write_bytes(whole)
            shutil.rmtree(recipe.parent / "copy of the adapter", ignore_errors=True)
    assert not (recipe.parent / "out").exists() and not (run_dir(recipe) / "export").exists()


def test_an_edited_card_is_exported_and_said(recipe: Path) -> None:
    (run_dir(recipe) / "adapter" / "README.md").write_text("my own words")
    recorder = Recorder()
    assert exported(run_dir(recipe), to="hf", sink=recorder).products
    (message,) = notices(recorder, "adapter")
    assert "README.md" in message and "edited" in message


def test_another_tokenizer_in_the_adapter_s_folder_is_refused(recipe: Path) -> None:
    adapter = run_dir(recipe) / "adapter"
    (adapter / "added_tokens.json").write_text('{"<new>": 300}')
    with pytest.raises(ExportError, match=r"added_tokens.json: was added"):
        exported(run_dir(recipe), to="hf")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_what_is_swapped_in_while_it_is_exported_never_gets_a_name(recipe: Path, name: str) -> None:
    class Thief:
        def emit(self, event: Event) -> None:
            if event.kind == "progress" and not done:
                done.append(name)
                flip(run_dir(recipe) / "adapter" / name)

        def close(self) -> None:
            pass

    done: list[str] = []
    with pytest.raises(ExportError, match=f"{name}: was replaced while it was being exported"):
        exported(run_dir(recipe), to="hf", sink=Sinks(Thief()))
    assert done and not (run_dir(recipe) / "export" / "hf").exists()


def test_a_damaged_best_adapter_is_delivered_again(recipe: Path) -> None:
    adapter = run_dir(recipe) / "adapter"
    before = {name: (adapter / name).read_bytes() for name in ("adapter_model.safetensors", "qlora.json")}
    flip(adapter / "adapter_model.safetensors")
    recorder = train(recipe, *RUN, mode="resume")
    aside, message = notices(recorder, "adapter")
    assert "it is kept as" in aside and damage(adapter.with_name("adapter.1")) is not None
    assert "adapter_model.safetensors: was changed" in message and "step 4 was delivered again" in message
    assert {name: (adapter / name).read_bytes() for name in before} == before and damage(adapter) is None
    assert values(recorder, "end", "adapter_step") == [4]


def test_where_its_checkpoint_is_gone_the_best_is_looked_for_anew(recipe: Path, monkeypatch: Any) -> None:
    adapter = run_dir(recipe) / "adapter"
    shutil.rmtree(adapter)
    monkeypatch.setattr(loop, "at_step", lambda *_: None)
    recorder = train(recipe, *RUN, mode="resume")
    (message,) = notices(recorder, "adapter")
    assert "step 4 is in no checkpoint that is kept" in message
    assert damage(adapter) is None and values(recorder, "eval", "best") == [True], "it is evaluated anew"
    assert json.loads((adapter / "qlora.json").read_text())["evaluation"]["step"] == 4


def test_a_damaged_copy_of_the_tokenizer_is_said_at_both_doors(recipe: Path, in_this_process: None) -> None:
    flip(run_dir(recipe) / "tokenizer" / "tokenizer.json")
    recorder = Recorder()
    export(run_dir(recipe), "hf", sink=recorder)
    assert ["is damaged" in message for message in notices(recorder, "tokenizer")] == [True]
    recorder = train(recipe, *RUN, mode="resume")
    assert ["is damaged" in message for message in notices(recorder, "tokenizer")] == [True]
    assert verify_folder(run_dir(recipe) / "tokenizer") is None


# --- changed while it is trained --------------------------------------------------------------------------------------


def gone(base: Path) -> None:
    shutil.rmtree(base)


def other_config(base: Path) -> None:
    edit(base / "config.json", rms_norm_eps=0.5)


def other_weights(base: Path) -> None:
    make_base("llama", base.with_name("other"), seed=7)
    shutil.copyfile(base.with_name("other") / "model.safetensors", base / "model.safetensors")


def other_tokenizer(base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"][-1]["content"] = "<|other|>"
    (base / "tokenizer.json").write_text(json.dumps(content))


class Meanwhile:
    """A sink that does something to the base when the first step is done."""

    def __init__(self, base: Path, change: Callable[[Path], None]) -> None:
        self.base, self.change = base, change

    def emit(self, event: Event) -> None:
        if event.kind == "step" and event.as_dict()["step"] == 1:
            self.change(self.base)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("change", "seen", "refused"),
    [
        (gone, "its folder is gone", "the base that it was trained on is not here"),
        (other_config, "its config.json is another one", "another base"),
        (other_weights, "model.safetensors was written to", "not the one that was trained|another base"),
        (other_tokenizer, "its tokenizer is another one", None),
    ],
)
def test_the_adapter_is_delivered_and_its_export_refused(
    tmp_path: Path, in_this_process: None, change: Callable[[Path], None], seen: str, refused: str | None
) -> None:
    base = make_base("llama", tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    recipe, recorder = write_recipe(tmp_path, base), Recorder()
    settings = load_recipe(recipe, (*RUN, "train.max_steps=2", 'export.formats=["hf"]'))
    adapter = run_dir(recipe) / "adapter"

    def start() -> None:
        qlora.train(settings, name=recipe.stem, sink=Sinks(recorder, Meanwhile(base, change)))

    if refused is None:
        start()
    else:
        with pytest.raises(ExportError, match=refused) as error:
            start()
        assert error.value.exit_code == 2 and error.value.hint.endswith(f"its adapter is {adapter}")
        assert not (run_dir(recipe) / "export" / "hf").exists()
        with pytest.raises(qlora.UserError, match=refused):  # and later too
            export(run_dir(recipe), "hf")
    (message,) = notices(recorder, "base")
    assert f"has changed while it was trained on ({seen}" in message
    assert damage(adapter) is None and values(recorder, "end", "reason") == ["finished"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (adapter / name).read_bytes() == before[name], "the tokenizer that it was trained with"
        assert (run_dir(recipe) / "tokenizer" / name).read_bytes() == before[name]
    if refused is None:
        assert (run_dir(recipe) / "export" / "hf" / "tokenizer.json").read_bytes() == before["tokenizer.json"]


def test_a_base_that_stays_is_not_spoken_of(recipe: Path) -> None:
    assert not notices(train(recipe, *RUN, mode="resume"), "base")


# --- the second net: what was learned ---------------------------------------------------------------------------------


def without_identity(adapter: Path) -> None:
    """As an older version, or a person, would leave it: nothing but its loss says which base it was trained on."""
    file = adapter / "qlora.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "fingerprint": None, "identity": None}))
    (adapter / disk.MANIFEST).unlink()


def test_two_fine_tunes_of_one_shape_are_told_apart_by_their_loss(recipe: Path, in_this_process: None) -> None:
    run, base = run_dir(recipe), recipe.parent / "base"
    recorder = Recorder()
    report = export(run, "hf", sink=recorder)
    assert report.evaluation.here == pytest.approx(report.evaluation.delivered, rel=1e-3)
    written = json.loads((run / "export" / "hf" / "export.json").read_text())["evaluation"]
    assert written == recorder.of("fidelity")[0].as_dict()["evaluation"] and written["rows"] == 9
    assert "evaluation rows" in (run / "export" / "hf" / "README.md").read_text()
    # The merged model is a fine-tune of the base, of its own shape, and of the same rows even: the nearest there is.
    fine_tune = (run / "export" / "hf" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "export")
    without_identity(run / "adapter")
    (base / "model.safetensors").write_bytes(fine_tune)
    with pytest.raises(
        ExportError, match="the model that is here is not the one that was trained: its loss"
    ) as refused:
        export(run, "hf")
    assert refused.value.exit_code == 2 and "the run delivered" in refused.value.what
    assert not (run / "export" / "hf").exists()


def test_rows_that_are_gone_or_others_are_said_and_nothing_is_refused(recipe: Path, in_this_process: None) -> None:
    run, rows = run_dir(recipe), recipe.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("euros", "pounds"))
    recorder = Recorder()
    assert export(run, "hf", sink=recorder).evaluation is None
    assert any("evaluation rows have changed since" in message for message in notices(recorder, "verify"))
    rows.unlink()
    recorder = Recorder()
    assert api.merge_and_export(run, out=recipe.parent / "again", sink=recorder).evaluation is None
    assert any("without the run's evaluation rows" in message for message in notices(recorder, "verify"))


def test_libraries_open_a_tokenizer_in_a_private_copy_alone(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = transformers.AutoTokenizer.from_pretrained

    def watched(folder: Path, **settings: Any) -> Any:
        opened.append(Path(folder).resolve())
        assert not any(path.is_symlink() for path in Path(folder).rglob("*"))
        return real(folder, **settings)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", watched)
    config = recipe.parent / "base" / "chat_template.jinja"
    config.rename(config.with_name("aside.txt"))
    config.symlink_to("aside.txt")
    api.check(load_recipe(recipe, RUN))
    checked = len(opened)
    exported(run_dir(recipe), to=["hf", "gguf"], quants=["f16"])
    assert 2 <= checked < len(opened) - 1
    assert not any(folder.is_relative_to(recipe.parent) for folder in opened)
