"""The adapter that a run begins with, where its recipe names one: `lora.from`, a run of ours or anyone's LoRA folder.

Its layers, rank and scale are the run's: matrices of one shape cannot begin as those of another, and another scale
would be another model at step 0. So the recipe's other keys of [lora] follow it, and one that says otherwise is
refused. The folder is read once and copied to `start/` in the run's: what becomes of it afterwards changes nothing, and
a run that was killed before its first checkpoint begins again with the same. The optimizer begins anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora import disk, files, foreign_json, manifest, run_folder
from qlora.errors import ExportError, Problem, RecipeError, RunFolderError
from qlora.events import Notice, Sink, Sinks
from qlora.model import identity
from qlora.model.adapter_config import shown
from qlora.model.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PROVENANCE_FILE,
    Adapter,
    Provenance,
    delivered_step,
    provenance,
    read_adapter,
)
from qlora.model.adapter_seal import AdapterSeal, seal
from qlora.model.base_folder import BaseFolder
from qlora.recipe.reading import Recipe
from qlora.run_record import id_of, is_run

START = "start"
KEY = "lora.from"
_COPIED = (ADAPTER_FILE, ADAPTER_CONFIG, PROVENANCE_FILE)
_MERGE_FIRST = "export it merged (hf), and name what comes of that as model.base"


class StartedFrom(foreign_json.ForeignModel):
    """Which adapter a run began with: its name, the step and the run that it is of where that is known, its weights."""

    adapter: str
    sha256: str
    step: int | None = None
    run: str | None = None

    def __str__(self) -> str:
        return self.adapter if self.step is None else f"{self.adapter}, step {self.step}"


class _About(foreign_json.ForeignModel):
    of: StartedFrom


def settled(recipe: Recipe, base: BaseFolder, run_dir: Path | None, sink: Sink) -> Recipe:
    """The recipe with the keys of [lora] as the adapter that it begins with has them, which a notice says.

    `run_dir` is where the run will stand. Raises RecipeError for keys that say otherwise, for an adapter that was
    trained on another base or holds what is not trained here, and for what is no adapter; ExportError for a damaged
    one.
    """
    if recipe.lora.from_adapter is None:
        return recipe
    from qlora.model.meta_model import build, linear_layers, taken_tensors

    folder, _, adapter = _opened(recipe, run_dir, sink)
    meta_model = build(base)
    origin = provenance(folder, adapter.config)
    _refuse_another(folder, origin, base, identity.at_the_door(base.config, taken_tensors(base, meta_model)))
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model.model.state_dict().items()}
    layers = [f"{name}.weight" for name, _ in linear_layers(meta_model.model)]
    _refuse_strange(folder, adapter, shapes, layers)
    _refuse_other_experts(folder, adapter, meta_model.model)
    taken = _keys_of(adapter, layers)
    _refuse_differing(recipe, adapter, taken, layers, shapes)
    _say(recipe, folder, adapter, origin, sink)
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=taken)})


def sized(recipe: Recipe) -> Recipe:
    """The recipe with rank and layers of the adapter that it begins with, for an estimate that has no base at hand."""
    if recipe.lora.from_adapter is None:
        return recipe
    _, _, adapter = _opened(recipe, None, Sinks())
    taken = _keys_of(adapter, ())
    unset = {key: value for key, value in taken.items() if key not in recipe.lora.model_fields_set}
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=unset)})


def take(recipe: Recipe, run_dir: Path, step: int | None, goes_on: bool, sink: Sink) -> None:
    """Copy the adapter that the run begins with into its folder. `step` is that of the checkpoint it goes on from.

    A run that goes on keeps its copy; a recipe that names another adapter than that is refused. Raises RunFolderError
    for that and for a disk that is full, RecipeError and ExportError as `settled` does.
    """
    if recipe.lora.from_adapter is None:
        return
    kept = run_dir / START
    if goes_on and kept.is_dir() and disk.verify_folder(kept) is None:
        _refuse_another_start(recipe, run_dir, sink)
        return
    if step is not None:
        message = f"{kept}, the adapter that the run began with, is gone or changed; its checkpoint has all it needs"
        sink.emit(Notice("lora", message))
        return
    folder, sealed, _ = _opened(recipe, run_dir, sink)
    of_run = folder.parent if is_run(folder.parent) else None
    of = StartedFrom(
        adapter=run_folder.dataset_name(run_folder.name_of(folder)),
        sha256=sealed.found[ADAPTER_FILE].sha256,
        step=delivered_step(folder.parent) if folder.name == "adapter" else None,
        run=None if of_run is None else id_of(of_run),
    )
    try:
        disk.publish_folder(kept, lambda place: _copy(folder, sealed, place), {"kind": START, "of": of.model_dump()})
    except OSError as error:
        what = f"{kept}: cannot be written ({error.strerror or error})"
        raise RunFolderError(what, "free some space there, or name another folder in output.dir") from error


def put_on(model: Any, recipe: Recipe, base: BaseFolder, run_dir: Path) -> None:
    """Give the model's fresh adapters the weights that the run begins with, where it begins with some.

    A run that goes on from a checkpoint may have none. Raises RecipeError where the loaded base is another one than
    the adapter was trained on, ModelError where their shapes are.
    """
    from qlora.model import adapters

    folder = run_dir / START
    if recipe.lora.from_adapter is None or disk.verify_folder(folder) is not None:
        return  # `take` has said so where it is gone or changed
    origin = provenance(folder, read_adapter(folder).config)
    _refuse_another(Path(recipe.lora.from_adapter), origin, base, model.get_base_model().base_identity)
    adapters.load_into(model, folder)


def started_from(recipe: Recipe, run_dir: Path) -> StartedFrom | None:
    """What the run began with; None for fresh matrices, and where that is not known any more."""
    if recipe.lora.from_adapter is None:
        return None
    folder = run_dir / START
    try:
        return foreign_json.checked(_About, manifest.read(folder), str(folder)).of
    except (foreign_json.ForeignFileError, OSError):
        return None


# --- the adapter's folder ---------------------------------------------------------------------------------------------


def _opened(recipe: Recipe, run_dir: Path | None, sink: Sink) -> tuple[Path, AdapterSeal, Adapter]:
    """The folder that `lora.from` means, what stands in it, and the adapter. A run means the one that it delivered."""
    named = Path(str(recipe.lora.from_adapter))
    if run_dir is not None and run_dir in (place := named.resolve(), *place.parents):
        what = f"{named}: is the folder of this run itself"
        raise RecipeError([Problem(KEY, what, "give the recipe another name: its run is called like it")])
    try:
        folder, _ = run_folder.adapter_of(named)
    except ExportError as error:
        hint = "name a run's folder, such as runs/first, or an adapter folder, seen from the recipe"
        raise RecipeError([Problem(KEY, error.what, error.hint if "holds" in error.what else hint)]) from error
    sealed = seal(folder, sink)
    return folder, sealed, read_adapter(folder)


def _copy(folder: Path, sealed: AdapterSeal, place: Path) -> None:
    for name in _COPIED:
        if name not in sealed.found:
            continue
        with files.open_to_read(files.inside(folder, name)) as source, (place / name).open("xb") as target:
            shutil.copyfileobj(source, target)
            open_to = os.fstat(source.fileno()).st_mode
        (place / name).chmod(0o644 if open_to & 0o077 else 0o600)  # what nobody else may read stays so
        if manifest.sha256_file(place / name) != sealed.found[name].sha256:
            what = f"{folder / name}: was replaced while it was read"
            raise ExportError(what, "start again, when nothing else writes into that folder")


def _refuse_another_start(recipe: Recipe, run_dir: Path, sink: Sink) -> None:
    """Of a run that goes on: the recipe must not name another adapter now; the same one may have been trained since."""
    began = started_from(recipe, run_dir)
    try:
        folder, sealed, _ = _opened(recipe, run_dir, Sinks())
    except (RecipeError, ExportError):
        return  # it is gone, or is being written: the run has its own copy
    if began is None or sealed.found[ADAPTER_FILE].sha256 == began.sha256:
        return
    of_run = id_of(folder.parent) if is_run(folder.parent) else None
    if (of_run, run_folder.dataset_name(run_folder.name_of(folder))) != (began.run, began.adapter):
        what = f"{KEY}: the run began with another adapter ({began}) than {recipe.lora.from_adapter}"
        raise RunFolderError(what, "set it back to go on, or start anew with mode='fresh'")
    if of_run is None:  # a folder's name says nothing of whose adapter lies in it now
        what = f"{recipe.lora.from_adapter}: holds other weights than the run began with (sha256 {began.sha256[:12]}…)"
        hint = (
            "put the adapter back, or take the folder away: the run has its own copy; or start anew with mode='fresh'"
        )
        raise RunFolderError(what, hint)
    message = f"{recipe.lora.from_adapter} has changed since this run began with it; the run goes on with its own copy"
    sink.emit(Notice("lora", message))


# --- does it fit ------------------------------------------------------------------------------------------------------


def _refuse_another(folder: Path, origin: Provenance, base: BaseFolder, now: identity.BaseIdentity) -> None:
    if origin.fingerprint is None:
        return
    difference = identity.another_base(origin.identity, now, origin.fingerprint, base.fingerprint)
    if difference is not None:
        what = f"{folder}: was trained on another base than {base.name}: {difference}"
        raise RecipeError([Problem(KEY, what, f"name that one as model.base ({origin.base})")])


def _refuse_strange(
    folder: Path, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], layers: Iterable[str]
) -> None:
    """What cannot be trained further as it is: raises RecipeError naming the first."""
    known = set(layers)
    another = "name the base that it was trained on as model.base"
    problem = None
    if adapter.rows or adapter.under or (adapter.whole and not adapter.config.modules_to_save):
        name = next(iter((*adapter.rows, *adapter.under, *adapter.whole)))
        problem = f"holds {shown(name)} for a changed vocabulary", _MERGE_FIRST
    elif not adapter.parameters:
        problem = "holds no tensors", "name an adapter that was trained"
    elif lost := [name for name in adapter.parameters if name not in shapes]:
        problem = f"{shown(lost[0])} is not in the base", another
    elif odd := [name for name, entry in adapter.whole.items() if tuple(entry.shape) != shapes[name]]:
        problem = f"{shown(odd[0])} is {tuple(adapter.whole[odd[0]].shape)} here, {shapes[odd[0]]} in the base", another
    elif odd := [name for name in adapter.lora if name not in known]:
        problem = f"was trained on {shown(odd[0])}, which takes no adapter here", _MERGE_FIRST
    elif odd := [name for name, lora in adapter.lora.items() if lora.shape != shapes[name]]:
        problem = f"{shown(odd[0])} is {adapter.lora[odd[0]].shape} here, {shapes[odd[0]]} in the base", another
    elif len(ranks := {lora.a.shape[0] for lora in adapter.lora.values()}) > 1:
        problem = f"its modules have ranks from {min(ranks)} to {max(ranks)}, and one rank is trained", _MERGE_FIRST
    elif len(alphas := {lora.alpha for lora in adapter.lora.values()}) > 1:
        problem = f"its modules have alphas from {min(alphas):g} to {max(alphas):g}, and one is trained", _MERGE_FIRST
    elif 0 < sum(lora.magnitude is not None for lora in adapter.lora.values()) < len(adapter.lora):
        problem = "is DoRA on some of its modules only", _MERGE_FIRST
    elif not adapter.lora:
        problem = "holds no low-rank matrices", "name a LoRA adapter"
    if problem is not None:
        raise RecipeError([Problem(KEY, f"{folder}: {problem[0]}", problem[1])])


def _refuse_other_experts(folder: Path, adapter: Adapter, causal_lm: Any) -> None:
    """Adapters on experts that are not on all of them, alike, and of the base's shapes: raises RecipeError."""
    from qlora.model.experts import projections

    if not adapter.experts:
        return
    some, problem = next(iter(adapter.lora.values())), None
    held = {name: (module, leaf) for name, module, leaf in projections(causal_lm)}
    for name, expert in adapter.experts.items():
        module, leaf = held[name]
        if reason := expert.misfit(tuple(getattr(module, leaf).shape), module.is_transposed):
            problem = f"the adapter of {shown(name)} {reason}", "name the base that it was trained on as model.base"
        elif (expert.rank, expert.alpha) != (some.a.shape[0], some.alpha):
            alike = f"rank {expert.rank} and alpha {expert.alpha:g} on experts, {some.a.shape[0]} and {some.alpha:g} on"
            problem = f"has {alike} layers, and one of each is trained", _MERGE_FIRST
    if lost := sorted(held.keys() - adapter.experts.keys()):
        problem = f"has adapters on some experts and none on {lost[0]}, and all are trained", _MERGE_FIRST
    if problem is not None:
        raise RecipeError([Problem(KEY, f"{folder}: {problem[0]}", problem[1])])


def _keys_of(adapter: Adapter, layers: Iterable[str]) -> dict[str, Any]:
    """The keys of [lora] that make fresh matrices of the adapter's shapes and scale; `layers` are the base's."""
    some = next(iter(adapter.lora.values()), None)
    return {
        "r": adapter.config.r if some is None else some.a.shape[0],
        "alpha": float(adapter.config.lora_alpha if some is None else some.alpha),
        "use_rslora": adapter.config.use_rslora,
        "use_dora": some is not None and some.magnitude is not None,
        "target_modules": _named(set(adapter.lora), set(layers)),
        "experts": bool(adapter.experts),
        "modules_to_save": tuple(sorted({name.rpartition(".")[0] for name in adapter.whole})),
    }


def _named(trained: set[str], layers: set[str]) -> str | tuple[str, ...]:
    """The shortest names that mean just these layers. Both are of weights."""
    if trained == layers:
        return "all-linear"
    ends = {name.split(".")[-2] for name in trained}
    if {name for name in layers if name.split(".")[-2] in ends} == trained:
        return tuple(sorted(ends))
    return tuple(sorted(name.removesuffix(".weight") for name in trained))


def _refuse_differing(
    recipe: Recipe, adapter: Adapter, taken: Mapping[str, Any], layers: Iterable[str], shapes: Iterable[str]
) -> None:
    """Raises RecipeError naming every key that the recipe sets to something else than the adapter has."""
    lora, problems = recipe.lora, []
    for key in sorted(taken.keys() & lora.model_fields_set):
        ours, theirs = getattr(lora, key), taken[key]
        if key == "target_modules":
            same = _meant(ours, layers) == set(adapter.lora)
        elif key == "modules_to_save":
            same = _meant(ours, shapes) == set(adapter.whole)
        else:
            same = ours == theirs
        if not same:
            what = f"{_toml(ours)}, and the adapter of {KEY} has {_toml(theirs)}"
            hint = f"write {key} = {_toml(theirs)}, or take the line out: it is then the adapter's"
            problems.append(Problem(f"lora.{key}", what, hint))
    if lora.init != "default":
        what = f"{_toml(lora.init)} draws fresh matrices, and {KEY} names trained ones"
        problems.append(Problem("lora.init", what, "take one of the two lines out"))
    if problems:
        raise RecipeError(problems)


def _meant(names: str | tuple[str, ...], weights: Iterable[str]) -> set[str]:
    """The parameters of the modules that a key of [lora] names: whole, or by the last parts of their names."""
    if names == "all-linear":
        return set(weights)
    wanted = [names] if isinstance(names, str) else names
    return {weight for weight in weights if any(f".{name}." in f".{weight}" for name in wanted)}


def _toml(value: Any) -> str:
    """A value as a line of a recipe has it; a long list by its beginning."""
    listed = list(value) if isinstance(value, tuple) else value
    text = json.dumps(int(listed) if isinstance(listed, float) and listed == int(listed) else listed)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _say(recipe: Recipe, folder: Path, adapter: Adapter, origin: Provenance, sink: Sink) -> None:
    some = next(iter(adapter.lora.values()))
    dtypes = sorted({lora.a.dtype for lora in adapter.lora.values()})
    message = f"begins with the adapter of {run_folder.name_of(folder)}: rank {some.a.shape[0]}, alpha {some.alpha:g}, "
    of_experts = f" and {len(adapter.experts)} projections of experts" if adapter.experts else ""
    message += f"{len(adapter.lora)} layers{of_experts}, as it has them; the optimizer begins anew"
    if dtypes != ["BF16"]:
        message += f"; its matrices are {' and '.join(dtypes)}, and are trained on in BF16"
    sink.emit(Notice("lora", message))
    if origin.fingerprint is None:
        named = f" (it names {shown(origin.base)})" if origin.base else ""
        message = f"the adapter keeps no hash of the base that it was trained on{named}: names and shapes fit this one"
        sink.emit(Notice("base", message))
    elif origin.quantization != recipe.quantization:
        before, now = origin.quantization.type, recipe.quantization.type
        sink.emit(Notice("base", f"the adapter was trained on the base in {before}, and goes on on it in {now}"))
    if adapter.idle:
        message = "adapters on other parts than the text model never moved, and are left out"
        sink.emit(Notice("adapter", f"{message}, {adapter.idle[0]} first", len(adapter.idle)))
