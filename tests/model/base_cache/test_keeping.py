"""The second start reads 4-bit bytes only, and is the first bit for bit, whatever befell cache and original."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import disk, lock
from qlora.errors import UserError
from qlora.events import Progress, Recorder
from qlora.model import identity
from qlora.model import load as module
from qlora.model.base_cache import keeping, places
from qlora.model.layer_blobs import LayerWeights
from qlora.model.load import load_base
from qlora.model.weight_receiving import Place
from qlora.recipe.sections import QuantizationSection
from tests.families import FAMILIES, make_base
from tests.model.base_cache.cases import CPU, aged, assert_same, base_at, counted, kept, load
from tests.model.conftest import logits, stored_in_4bit
from tests.runs import change_unsampled_value, hashes, train, values, write_recipe
from tests.sampling import sampled

STREAMED = Place(streams=True)
FORMS = [QuantizationSection(type=kind, double_quant=double) for kind in ("nf4", "fp4") for double in (True, False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_start_is_the_first_bit_for_bit(tmp_path: Path, family: str) -> None:
    base = aged(make_base(family, tmp_path / "base", shards=2))
    plain, said = load(base, cache=False)
    assert not said and not kept()
    first, (told,) = load(base)
    assert "is kept in 4 bit" in told and not first.base_was_kept
    second, (told,) = load(base)
    assert "is read from the cache in 4 bit" in told and second.base_was_kept
    assert_same(first, plain)
    assert_same(second, plain)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.type} {form.double_quant}")
def test_each_form_has_a_folder_of_its_own(base: Path, form: QuantizationSection) -> None:
    other = form.model_copy(update={"double_quant": not form.double_quant})
    first, _ = load(base, form)
    load(base, other)
    assert len(kept()) == 2
    second, _ = load(base, form)
    assert second.base_was_kept
    assert_same(second, first)


def test_the_second_start_reads_samples_of_the_original_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    with counted(monkeypatch) as first:
        load(base)
    with counted(monkeypatch) as second:
        load(base)
    assert first["original"] > 0.9 * weights and first["cache"] == 0
    assert second["original"] == 0
    folder = kept()[0]
    assert second["cache"] == sum(file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json")
    assert 0 < second["samples"] <= first["samples"]


def test_of_no_quantization_nothing_is_kept(base: Path) -> None:
    whole = QuantizationSection(type="none")
    model, said = load(base, whole)
    assert not said and not kept() and not model.base_was_kept


def test_false_neither_reads_nor_writes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(base)
    before = {path: path.stat().st_mtime_ns for path in places.root().rglob("*")}
    with counted(monkeypatch) as read:
        model, said = load(base, cache=False)
    assert read["cache"] == 0 and not said and not model.base_was_kept
    assert {path: path.stat().st_mtime_ns for path in places.root().rglob("*")} == before


def test_auto_reads_what_is_there_and_writes_nothing_of_a_small_base(base: Path) -> None:
    assert load(base, cache="auto")[1] == [] and not places.root().exists()
    load(base)
    assert load(base, cache="auto")[0].base_was_kept


def test_auto_keeps_a_base_from_the_bound_on(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(entry.nbytes for entry in base_at(base).tensors.values())
    monkeypatch.setattr(places, "LEAST_BYTES", size + 1)
    assert load(base, cache="auto")[1] == [] and not kept()
    monkeypatch.setattr(places, "LEAST_BYTES", size)
    assert "is kept in 4 bit" in load(base, cache="auto")[1][0] and kept()


def test_a_base_that_is_stored_in_4_bit_is_kept_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no more bytes than its copy: "auto" keeps none, and the copy is it, whatever the recipe's type says."""
    monkeypatch.setattr(places, "LEAST_BYTES", 0)
    original = base_at(make_base("llama", tmp_path / "original"))
    stored = aged(stored_in_4bit(tmp_path, original, True, ["lm_head", "v_proj"]))
    plain, said = load(stored, cache="auto")
    assert said == [] and not kept()
    load(stored)
    model, said = load(stored, cache="auto")
    assert model.base_was_kept and len(said) == 1
    assert_same(model, plain)


# --- the original changes --------------------------------------------------------------------------------------------


def test_a_change_that_the_samples_miss_is_another_base(tmp_path: Path) -> None:
    base = aged(make_base("llama", tmp_path / "base"))
    first, _ = load(base)
    change_unsampled_value(base)
    aged(base, seconds=30)
    second, said = load(base)
    assert "copied or written to" in said[0] and not second.base_was_kept
    assert second.base_identity.content != first.base_identity.content
    assert second.base_identity.sampled == first.base_identity.sampled
    assert len(kept()) == 2
    plain, _ = load(base, cache=False)
    third, _ = load(base)
    assert third.base_was_kept
    assert_same(third, plain)


def test_a_change_that_samples_show_is_another_base_at_once(tmp_path: Path) -> None:
    base = aged(make_base("llama", tmp_path / "base"))
    load(base)
    aged(make_base("llama", base, seed=1))
    second, said = load(base)
    assert len(said) == 1 and "is kept in 4 bit" in said[0] and len(kept()) == 2
    assert_same(second, load(base, cache=False)[0])


def test_a_copy_is_read_once_and_known_from_then_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(base)
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    aged(copy, seconds=20)
    first, said = load(copy)
    assert "copied or written to" in said[0] and len(said) == 1 and not first.base_was_kept
    with counted(monkeypatch) as read:
        second, _ = load(copy)
    assert second.base_was_kept and read["original"] == 0 and len(kept()) == 1
    assert load(base)[0].base_was_kept


def test_a_folder_that_was_moved_is_known(base: Path, tmp_path: Path) -> None:
    load(base)
    assert load(base.rename(tmp_path / "elsewhere"))[0].base_was_kept


def test_files_that_were_just_written_are_not_known_by_their_times(tmp_path: Path) -> None:
    """What is written to within the tick of a clock has the time of before."""
    base = make_base("llama", tmp_path / "base")
    aged(base, seconds=0.0)
    load(base)
    assert kept() and not load(base)[0].base_was_kept
    aged(base)
    load(base)
    assert load(base)[0].base_was_kept


def test_what_is_written_to_while_it_is_read_is_not_kept(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = module._stream

    def meanwhile(*about: Any) -> None:
        stream(*about)
        aged(base, seconds=10)

    monkeypatch.setattr(module, "_stream", meanwhile)
    _, said = load(base)
    assert "were written to while they were read" in said[0] and not kept()


# --- room ------------------------------------------------------------------------------------------------------------


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(keeping.disk, "free_bytes", lambda path: count)


def test_true_without_room_is_an_error_before_a_weight_is_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, keeping.SPARE_BYTES)
    with counted(monkeypatch) as read, pytest.raises(UserError) as error:
        load(base)
    assert "memory.cache = true" in error.value.what and "are free" in error.value.what and error.value.exit_code == 2
    assert "QLORA_CACHE" in error.value.hint and read["original"] == 0 and not places.root().exists()


def test_true_needs_no_room_for_what_is_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the original is read once more, and nothing is written of it."""
    load(base)
    aged(base, 120)
    monkeypatch.setattr(disk, "free_bytes", lambda _: 0)
    model, said = load(base)
    assert not model.base_was_kept and "read once more" in said[0] and len(said) == 1
    assert load(base)[0].base_was_kept


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_costs_nothing_but_the_cache(
    base: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plain, _ = load(base, cache=False)

    def fails(_: LayerWeights) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(LayerWeights, "pack", fails)
        model, said = load(base)
    assert_same(model, plain)
    assert said[-1].startswith("the base could not be kept in 4 bit (") and not kept()
    assert [path.name for path in places.root().iterdir()] == [".lock"]
    load(base)
    assert load(base)[0].base_was_kept


def test_auto_stays_under_a_tenth_of_the_free_disk(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LEAST_BYTES", 0)
    free(monkeypatch, 1 << 30)
    load(base, cache="auto")
    size = disk.size_of(kept()[0]) - (kept()[0] / "manifest.json").stat().st_size
    disk.discard(kept()[0])
    free(monkeypatch, 9 * size)
    _, said = load(base, cache="auto")
    assert "more than a tenth of the free disk" in said[0] and "memory.cache = true" in said[0] and not kept()
    free(monkeypatch, 11 * size)
    _, said = load(base, cache="auto")
    assert len(said) == 1 and kept()


def test_the_one_used_longest_ago_makes_room(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LEAST_BYTES", 0)
    for form in FORMS[:2]:
        load(base, form)
    first, second = kept()
    load(base, FORMS[0])  # used now
    whole = sum(map(disk.size_of, kept()))
    free(monkeypatch, 10 * whole)  # room for two of three, when what is there is not counted
    _, said = load(base, FORMS[2], cache="auto")
    assert "made room" in said[0] and second.name in said[0]
    assert first.exists() and not second.exists() and len(kept()) == 2
    with places.using(kept()[0]), places.using(kept()[1]):
        _, said = load(base, FORMS[3], cache="auto")
    assert "more than a tenth" in said[0] and len(kept()) == 2


# --- the folder ------------------------------------------------------------------------------------------------------


def test_two_at_once_write_one(base: Path) -> None:
    with places.writing(places.root()):
        model, (said,) = load(base)
    assert "another process keeps a base" in said and not kept() and not model.base_was_kept
    load(base)
    with places.writing(places.root()):
        assert load(base)[0].base_was_kept


@pytest.mark.parametrize("failing", ["mkdir", "open", "fsync", "rename"])
@pytest.mark.parametrize("code", sampled([errno.ENOSPC, errno.EROFS, errno.EDQUOT], errno.ENOSPC))
def test_a_disk_that_refuses_costs_nothing_but_the_cache(
    base: Path, monkeypatch: pytest.MonkeyPatch, failing: str, code: int
) -> None:
    """From each call on: full, read-only, over a quota."""
    plain, _ = load(base, cache=False)
    places.root().mkdir(parents=True)
    real, calls = getattr(os, failing), 0

    def refuse(*values: Any, **named: Any) -> Any:
        nonlocal calls
        in_cache = failing == "fsync" or str(places.root()) in str(values[0])
        writes = in_cache and (failing != "open" or values[1] & os.O_ACCMODE != os.O_RDONLY)
        calls += writes
        if writes and calls > after:
            raise OSError(code, os.strerror(code))
        return real(*values, **named)

    for after in range(0, 12, 3):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, refuse)
            model, said = load(base)
        assert_same(model, plain)
        if calls > after:
            assert any("could not be kept in 4 bit" in one for one in said)
            left = [path for path in places.root().iterdir() if path.name not in (".lock",)]
            assert all(path.suffix == ".seen" or disk.verify_folder(path) is None for path in left), left
        for folder in kept():
            disk.discard(folder)
    load(base)
    assert load(base)[0].base_was_kept


def test_where_nothing_can_be_written_it_is_still_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(base)

    def refuse(file: Path, *_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(lock, "acquire", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    assert load(base)[0].base_was_kept


def test_progress_ends_at_the_total(base: Path) -> None:
    for task in ("keep base", "load"):
        sink = Recorder()
        load_base(replace(base_at(base), cache=True), QuantizationSection(), "auto", CPU, sink)
        steps = [one for one in sink.events if isinstance(one, Progress) and one.task == task]
        assert len(steps) > 3 and [one.done for one in steps] == sorted(one.done for one in steps)
        assert 0.9 * steps[-1].total < steps[-1].done <= steps[-1].total


# --- streamed --------------------------------------------------------------------------------------------------------


def test_a_streamed_base_is_kept_and_read_as_any_other(base: Path) -> None:
    """The same bytes in the same files; and a second start puts each layer away as it comes."""
    load(base)
    resident = {path.name: path.read_bytes() for path in kept()[0].iterdir()}
    disk.discard(kept()[0])
    plain, _ = load(base, cache=False, place=STREAMED)
    first, said = load(base, place=STREAMED)
    assert "is kept in 4 bit" in said[0]
    assert {path.name: path.read_bytes() for path in kept()[0].iterdir()} == resident
    second, _ = load(base, place=STREAMED)
    assert second.base_was_kept
    ids = torch.arange(5, 45)[None]
    assert torch.equal(logits(first, ids), logits(plain, ids)) and torch.equal(logits(second, ids), logits(plain, ids))
    assert second.model.layers[0].mlp.up_proj.weight.numel() == 0, "and nothing stays in the layers"
    assert load(base)[0].base_was_kept


def change_the_first_layer(base: Path) -> None:
    """What no sample sees, and neither sizes nor times: the original is another one than the cache holds."""
    found = base_at(base)
    entry = found.tensors["model.layers.0.mlp.down_proj.weight"]
    before = identity.at_the_door(found.config, found.tensors)
    raw, times = bytearray(entry.file.read_bytes()), entry.file.stat()
    for at in range(entry.offset + 1, entry.offset + entry.nbytes, 2):  # the high byte: a change that shows
        raw[at] ^= 2
        entry.file.write_bytes(raw)
        if identity.at_the_door(found.config, found.tensors) == before:
            break
        raw[at] ^= 2
    os.utime(entry.file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_damaged_one_leaves_nothing_in_a_streamed_model(base: Path) -> None:
    """The first layer is whole and was put away when the second one's hash is seen to be wrong."""
    plain, _ = load(base, cache=False)
    load(base)
    file = kept()[0] / "layer-00001.blob"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    change_the_first_layer(base)
    model, said = load(base, place=STREAMED)
    assert not model.base_was_kept and "is damaged" in said[0]
    ids = torch.arange(5, 45)[None]
    assert torch.equal(logits(model, ids), logits(load(base, cache=False)[0], ids))
    assert not torch.equal(logits(model, ids), logits(plain, ids))


# --- runs ------------------------------------------------------------------------------------------------------------

SHORT = ("train.max_steps=2", "data.max_length=48", "eval.samples=0", "memory.cache=true", "lora.r=4")


@pytest.mark.parametrize("settings", [(), ('lora.init="eva"',), ("lora.use_dora=true",)], ids=["lora", "eva", "dora"])
def test_a_run_from_the_cache_is_the_run_from_the_original(base: Path, tmp_path: Path, settings: tuple[str]) -> None:
    ends = []
    for name, cache in (
        ("plain", "memory.cache=false"),
        ("first", "memory.cache=true"),
        ("second", "memory.cache=true"),
    ):
        recipe = write_recipe(tmp_path / name, base)
        recorder = train(recipe, *SHORT, *settings, cache)
        ends.append(hashes(recipe, 2))
        said = [one for one in values(recorder, "notice", "message") if "read from the cache" in one]
        assert len(said) == (name == "second")
    assert ends[0] == ends[1] == ends[2]


def test_a_run_that_is_resumed_from_the_cache_is_the_straight_one(base: Path, tmp_path: Path) -> None:
    straight, stopped = (write_recipe(tmp_path / name, base) for name in ("straight", "stopped"))
    train(straight, *SHORT, "memory.cache=false")
    train(stopped, *SHORT, "memory.cache=false", stop_after=1)
    train(stopped, *SHORT, "memory.cache=true", stop_after=None, mode="resume")
    assert hashes(stopped, 2) == hashes(straight, 2)
    shutil.rmtree(stopped.parent / "runs")
    train(stopped, *SHORT, stop_after=1)
    recorder = train(stopped, *SHORT, mode="resume")
    assert any("read from the cache" in one for one in values(recorder, "notice", "message"))
    assert hashes(stopped, 2) == hashes(straight, 2)
