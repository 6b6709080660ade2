"""A run that begins with an adapter: ours or another trainer's, whole and unchanged, or refused in two lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import api, disk, starting_adapter
from qlora.errors import ExportError, QloraError, RecipeError, RunFolderError
from qlora.events import Recorder
from qlora.export.combine import copy_adapter
from qlora.model.adapter_folder import read_adapter
from qlora.model.resolve import resolve
from qlora.recipe.reading import load_recipe, recipe_of_base
from qlora.recorded import load_recorded
from tests.export.cases import edit, name_the_base, of_peft
from tests.families import make_base
from tests.mixtures import make_base as make_mixture
from tests.runs import EVERYTHING, hashes, run_dir, train, values, write_recipe

FEW = (
    "data.max_length=96",
    "data.eval_fraction=0.2",
    "train.batch_size=4",
    "eval.samples=0",
    "train.learning_rate=1e-3",
)
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """The folder of a run that has ended; nobody changes it."""
    recipe = write_recipe(tmp_path_factory.mktemp("first"), llama, "first")
    train(recipe, *FEW, "train.max_steps=4", "lora.r=4", "lora.alpha=16", 'lora.target_modules=["q_proj","down_proj"]')
    return run_dir(recipe)


def second(folder: Path, base: Path, start: Path) -> Path:
    recipe = write_recipe(folder, base, "second")
    text = recipe.read_text().replace("[[data.train]]", f'[lora]\nfrom = "{start}"\n[[data.train]]')
    recipe.write_text(text)
    return recipe


def test_a_run_goes_on_where_the_other_ended(tmp_path: Path, llama: Path, first: Path) -> None:
    before = {file: disk.sha256_file(file) for file in sorted(first.rglob("*")) if file.is_file()}
    recorder = train(second(tmp_path, llama, first), *FEW, "train.max_steps=2")
    ended = [event for event in json_lines(first / "events.jsonl") if event["event"] == "eval"][-1]
    assert values(recorder, "eval", "loss")[0] == pytest.approx(ended["loss"], rel=1e-6)
    assert {file: disk.sha256_file(file) for file in sorted(first.rglob("*")) if file.is_file()} == before
    own = tmp_path / "runs" / "second"
    kept, _ = load_recorded(own / "recipe.toml")
    assert (kept.lora.r, kept.lora.alpha, kept.lora.target_modules) == (4, 16.0, ("down_proj", "q_proj"))
    assert kept.lora.from_adapter == str(first)
    weights = disk.sha256_file(first / "adapter" / FILE)
    said = json.loads((own / "adapter" / "qlora.json").read_text())["started_from"]
    assert (said["adapter"], said["step"], said["sha256"]) == ("first", 4, weights)
    assert said["run"] == json.loads((first / "run.json").read_text())["id"]
    card = (own / "adapter" / "README.md").read_text()
    assert "| continued from | first, step 4 |" in card and str(first.parent) not in card
    assert values(recorder, "plan", "starts_from") == ["first, step 4"]
    assert disk.sha256_file(own / "start" / FILE) == weights
    assert any("begins with the adapter of first: rank 4" in text for text in values(recorder, "notice", "message"))


def json_lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("gone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumed_it_is_the_same_bit_for_bit_whatever_became_of_the_other(
    tmp_path: Path, llama: Path, first: Path, gone: bool
) -> None:
    start = tmp_path / "start"
    shutil.copytree(first, start)
    settings = (*EVERYTHING, "train.max_steps=6", "checkpoint.every_steps=2")
    straight, broken = second(tmp_path / "one", llama, start), second(tmp_path / "two", llama, start)
    train(straight, *settings)
    train(broken, *settings, stop_after=3)
    if gone:
        shutil.rmtree(start)
    else:
        shutil.rmtree(broken.parent / "runs" / "second" / "checkpoints")  # killed before the first one
        change(start / "adapter")
    recorder = train(broken, *settings, mode="resume")
    assert hashes(broken, 6) == hashes(straight, 6)
    assert any("goes on with its own copy" in text for text in values(recorder, "notice", "message")) != gone


def change(adapter: Path) -> None:
    """Other weights under the same names, as a run that has been trained further would have."""
    (adapter / "manifest.json").unlink()
    save_file({key: value * 2 for key, value in load_file(adapter / FILE).items()}, adapter / FILE)


def test_a_run_that_goes_on_refuses_another_adapter(tmp_path: Path, llama: Path, first: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(first / "adapter", other)
    change(other)
    recipe = second(tmp_path, llama, first)
    train(recipe, *FEW, "train.max_steps=3", stop_after=1)
    with pytest.raises(RunFolderError, match=r"lora.from: the run began with another adapter \(first, step 4\)"):
        train(recipe, *FEW, "train.max_steps=3", f"lora.from={json.dumps(str(other))}", mode="resume")


def test_other_weights_in_a_folder_of_no_run_are_another_adapter(tmp_path: Path, first: Path) -> None:
    """Of a run they may be trained further; of a folder alone its name says nothing of what lies in it."""
    for number, start in enumerate((first, first / "adapter")):
        source = tmp_path / f"{number}" / "start"
        shutil.copytree(start, source)
        recipe = recipe_of_base("owner/base")
        recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"from_adapter": str(source)})})
        run, sink = tmp_path / f"run-{number}", Recorder()
        run.mkdir()
        starting_adapter.take(recipe, run, None, False, sink)
        starting_adapter.take(recipe, run, None, True, sink)
        change(source / "adapter" if number == 0 else source)
        if number == 0:
            starting_adapter.take(recipe, run, None, True, sink)
            assert "goes on with its own copy" in vars(sink.events[-1])["message"]
            continue
        with pytest.raises(RunFolderError, match="start: holds other weights than the run began with") as error:
            starting_adapter.take(recipe, run, None, True, sink)
        assert "take the folder away" in error.value.hint
        shutil.rmtree(source)
        starting_adapter.take(recipe, run, None, True, sink)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model._orig_mod."])
def test_another_trainers_adapter_is_trained_on(tmp_path: Path, llama: Path, prefix: str) -> None:
    folder = tmp_path / "theirs"
    of_peft(llama, folder, use_rslora=True, modules_to_save=["norm"])
    name_the_base(folder, llama)
    tensors = {key.replace("base_model.model.", prefix): value for key, value in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE)
    recipe = second(tmp_path, llama, folder)
    recorder = train(recipe, *FEW, "train.max_steps=1", "train.learning_rate=1e-5")
    notices = " ".join(values(recorder, "notice", "message"))
    assert "its matrices are F32, and are trained on in BF16" in notices and "keeps no hash of the base" in notices
    before, after = read_adapter(folder), load_file(run_dir(recipe) / "adapter" / FILE)
    assert before.tensors.keys() == {key.removeprefix("base_model.model.") for key in after}
    for key, value in after.items():
        expected = load_file(folder / FILE)[key.replace("base_model.model.", prefix)]
        assert torch.allclose(value.float(), expected, rtol=2**-7, atol=3e-5), key
    kept, _ = load_recorded(run_dir(recipe) / "recipe.toml")
    assert kept.lora.use_rslora and "model.norm" in kept.lora.modules_to_save


@pytest.mark.parametrize(
    ("line", "key", "write"),
    [
        ("lora.r=8", "lora.r: 8, and the adapter of lora.from has 4", "write r = 4"),
        ("lora.alpha=32", "lora.alpha: 32, and", "write alpha = 16"),
        ("lora.use_dora=true", "lora.use_dora: true, and", "write use_dora = false"),
        ("lora.use_rslora=true", "lora.use_rslora: true, and", "write use_rslora = false"),
        ('lora.target_modules=["q_proj"]', "lora.target_modules: ", 'write target_modules = ["down_proj", "q_proj"]'),
        ('lora.modules_to_save=["lm_head"]', "lora.modules_to_save: ", "write modules_to_save = []"),
        ('lora.init="eva"', 'lora.init: "eva" draws fresh', "take one of the two lines out"),
    ],
)
def test_a_key_that_says_otherwise_is_refused_with_the_line_to_write(
    tmp_path: Path, llama: Path, first: Path, line: str, key: str, write: str
) -> None:
    recipe = load_recipe(second(tmp_path, llama, first), [*FEW, line])
    with pytest.raises(RecipeError) as caught:
        api.check(recipe)
    (problem,) = caught.value.problems
    assert key in f"{problem.where}: {problem.what}" and write in problem.hint
    assert not (tmp_path / "runs").exists()


def test_keys_that_say_the_same_pass(tmp_path: Path, llama: Path, first: Path) -> None:
    same = ("lora.r=4", "lora.alpha=16", "lora.target_modules=['down_proj','q_proj']", "lora.use_dora=false")
    assert api.check(load_recipe(second(tmp_path, llama, first), [*FEW, *same])).data.train.lengths


def test_another_base_of_the_same_shape_is_refused(tmp_path: Path, first: Path) -> None:
    other = make_base("llama", tmp_path / "other", seed=5)
    with pytest.raises(RecipeError, match=r"trained on another base than .*another fine-tune"):
        train(second(tmp_path, other, first), *FEW)
    assert not (tmp_path / "runs").exists()


def broken_adapters(llama: Path, folder: Path) -> list[tuple[str, Path, str]]:
    ranks, resized, empty = folder / "ranks", folder / "resized", folder / "empty"
    of_peft(llama, ranks, rank_pattern={"q_proj": 8})
    of_peft(llama, resized, resize=400)
    empty.mkdir()
    edited = folder / "edited"
    of_peft(llama, edited)
    edit(edited / "adapter_config.json", peft_type="IA3")
    return [
        ("ranks", ranks, "ranks from 4 to 8"),
        ("resized", resized, "for a changed vocabulary"),
        ("empty", empty, "neither a run's folder nor an adapter's"),
        ("gone", folder / "gone", "no such folder"),
        ("edited", edited, "IA3"),
        ("base", llama, "but a whole model"),
    ]


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, llama: Path) -> None:
    for name, folder, reason in broken_adapters(llama, tmp_path):
        recipe = load_recipe(second(tmp_path / f"of {name}", llama, folder), FEW)
        with pytest.raises(QloraError) as caught:
            api.check(recipe)
        assert isinstance(caught.value, RecipeError | ExportError)
        assert reason in caught.value.what and caught.value.hint and "`base_model`" not in caught.value.hint, name


def test_a_run_does_not_begin_with_itself(tmp_path: Path, llama: Path, first: Path) -> None:
    shutil.copytree(first, tmp_path / "runs" / "second")
    recipe = second(tmp_path, llama, tmp_path / "runs" / "second")
    with pytest.raises(RecipeError, match="is the folder of this run itself"):
        train(recipe, *FEW, mode="fresh")
    assert (tmp_path / "runs" / "second" / "adapter").is_dir()


def test_an_estimate_takes_the_rank_of_the_adapter(tmp_path: Path, llama: Path, first: Path) -> None:
    recipe = load_recipe(second(tmp_path, llama, first), FEW)
    sized = starting_adapter.sized(recipe)
    assert sized.lora.r == 4
    plain = load_recipe(write_recipe(tmp_path / "plain", llama), FEW)
    ours, theirs = (api.estimate_memory(one, vram="8GiB").components["adapters"] for one in (recipe, plain))
    assert ours < theirs


def test_a_run_that_a_full_disk_ended_at_the_copy_can_be_resumed(
    tmp_path: Path, llama: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = second(tmp_path, llama, first)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(starting_adapter, "_copy", full)
        with pytest.raises(RunFolderError, match="cannot be written"):
            train(recipe, *FEW, "train.max_steps=2")
    train(recipe, *FEW, "train.max_steps=2", mode="resume", stop_after=1)
    own = run_dir(recipe)
    (own / "start" / "adapter_config.json").write_text("{")  # its checkpoint has all that it needs
    train(recipe, *FEW, "train.max_steps=2", mode="resume")


def test_what_nobody_else_may_read_stays_so(tmp_path: Path, llama: Path, first: Path) -> None:
    """An adapter whose base lies under a name that looks like a token: its files name that base."""
    start = tmp_path / "start"
    shutil.copytree(first, start)
    for name in ("qlora.json", "adapter_config.json"):
        (start / "adapter" / name).chmod(0o600)
    place = tmp_path / "run"
    place.mkdir()
    starting_adapter.take(load_recipe(second(tmp_path, llama, start), FEW), place, None, False, Recorder())
    modes = {path.name: path.stat().st_mode & 0o777 for path in (place / "start").iterdir()}
    assert modes["qlora.json"] == modes["adapter_config.json"] == 0o600
    (tmp_path / "combined").mkdir()
    copy_adapter(place / "start", tmp_path / "combined")
    assert (tmp_path / "combined" / "qlora.json").stat().st_mode & 0o777 == 0o600


def test_the_copy_that_a_killed_run_left_is_what_it_began_with(tmp_path: Path, llama: Path, first: Path) -> None:
    recipe = load_recipe(second(tmp_path, llama, first), FEW)
    place, sink = tmp_path / "run", Recorder()
    place.mkdir()
    starting_adapter.take(recipe, place, None, False, sink)
    began = starting_adapter.started_from(recipe, place)
    assert began is not None and str(began) == "first, step 4"
    (place / "start" / FILE).write_bytes(b"damaged")
    starting_adapter.take(recipe, place, None, True, sink)  # no checkpoint: it is read again
    assert disk.verify_folder(place / "start") is None
    (place / "start" / FILE).write_bytes(b"damaged")
    starting_adapter.take(recipe, place, 3, True, sink)
    assert "its checkpoint has all it needs" in values(sink, "notice", "message")[-1]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_adapters_on_some_experts_alone_are_not_trained_on(tmp_path: Path) -> None:
    """One projection of two, another rank, exchanged sides: named; both projections, as peft trains them, go on."""
    base = make_mixture("qwen3_moe", tmp_path / "base")
    both = ["experts.gate_up_proj", "experts.down_proj"]
    kinds = {
        "all": ({"target_parameters": both}, ""),
        "some": ({"target_parameters": both[1:]}, "has adapters on some experts and none on model.layers.0.mlp.exp"),
        "ranks": ({"target_parameters": both, "rank_pattern": {"gate_up_proj": 8}}, "and one of each is trained"),
    }
    for name, (keys, what) in kinds.items():
        of_peft(base, tmp_path / name, target_modules=["q_proj"], **keys)
        name_the_base(tmp_path / name, base)
        recipe = load_recipe(second(tmp_path / f"of-{name}", base, tmp_path / name), FEW)
        if not what:
            found = starting_adapter.settled(recipe, resolve(str(base), "main", Recorder()), None, Recorder()).lora
            assert (found.experts, found.r, found.alpha, found.target_modules) == (True, 4, 6.0, ("q_proj",))
            continue
        with pytest.raises(RecipeError) as refusal:
            starting_adapter.settled(recipe, resolve(str(base), "main", Recorder()), None, Recorder())
        assert what in str(refusal.value) and refusal.value.problems[0].hint
