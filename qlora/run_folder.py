"""The folder of a run, seen from outside: whose it is, what may be done with it, what it holds."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qlora import disk, files, foreign_json, lock, recorded, shown, third_party
from qlora.errors import ExportError, RecipeError, RunFolderError, TrainingStopped
from qlora.events import EVENTS_FILE, Notice, Sink, Start
from qlora.numerics import Numerics
from qlora.recipe.pins import folder_split
from qlora.recipe.reading import Recipe, recipe_toml, with_paths
from qlora.redaction import redact
from qlora.run_record import HEADING, RESULTS, RUN_FILE, RunRecord, has_id, id_of, is_run, not_a_name, recorded_folder
from qlora.run_record import LOCK_FILE as LOCK_FILE
from qlora.run_record import RECIPE_FILE as RECIPE_FILE
from qlora.run_record import relocated as relocated
from qlora.version import __version__

# What we write in a run's folder: under these names nothing may be a link, wherever it leads.
_FILES = {RECIPE_FILE, RUN_FILE, LOCK_FILE, EVENTS_FILE, "rewards.json"}
OURS = {*RESULTS, "tokenizer", "start", "reference", "generations", *_FILES}
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Claim:
    """A run's folder taken by this process, until `release`; `aside` is the earlier run that mode='fresh' moved."""

    lock: lock.FolderLock
    aside: disk.SetAside | None

    def release(self) -> None:
        self.lock.release()


def path_of(recipe: Recipe, name: str) -> Path:
    """`output.dir/name`, absolute, links resolved. Raises RunFolderError where `name` is no plain part of a path."""
    if why := not_a_name(name):
        what = f"{name!r}: cannot be the name of a run's folder ({why})"
        raise RunFolderError(what, "give the recipe's file another name: its run is called like it")
    folder = files.user_path(recipe.output.dir, "output.dir")
    run_dir = files.user_path(folder / name, "output.dir")
    if why := files.unreachable(run_dir):
        raise RunFolderError(f"{run_dir}: cannot be a run's folder ({why})", "change output.dir")
    return run_dir


def check_claim(run_dir: Path, recipe: Recipe, mode: Literal["new", "resume", "fresh"]) -> None:
    """Whether this run may have the folder; changes nothing. Raises RunFolderError.

    A folder in which nothing was trained yet (its rows were broken, say) is taken again.
    """
    for place in (run_dir, *run_dir.parents):
        if place.exists() and not place.is_dir():
            raise RunFolderError(f"{place}: is a file, the run needs a folder there", "move it, or change output.dir")
    try:
        lock.check_free(run_dir / LOCK_FILE)
    except lock.LockHeld as held:
        raise _under_way(run_dir, held.holder) from held
    except files.UnsafePathError as error:
        raise _unsafe(error) from error
    _check_whose(run_dir, mode)
    if mode == "resume":
        _must_match(run_dir, recipe)
    disk.check_writable(run_dir)


def _check_whose(run_dir: Path, mode: Literal["new", "resume", "fresh"]) -> None:
    """A folder that is not a run's is nobody's to take; in one that is, what we write must not be a link."""
    names = {path.name for path in run_dir.iterdir() if not disk.is_leftover(path)} if run_dir.exists() else set()
    ours = is_run(run_dir)
    if names == {LOCK_FILE} and (ours or _is_lock(run_dir / LOCK_FILE)):
        return  # nothing has happened here yet
    if names and not ours:
        shown = ", ".join(sorted(names)[:3])
        what = f"{run_dir}: holds files that are not a run's ({shown})"
        raise RunFolderError(what, "change output.dir, or the recipe's name")
    if mode == "new" and names & RESULTS:
        hint = "mode='resume' goes on with it, mode='fresh' keeps it under another name and starts anew"
        raise RunFolderError(f"{run_dir}: holds a run already", hint)
    for folder in (run_dir, run_dir / "checkpoints"):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            try:
                if folder != run_dir or entry.name in OURS:
                    files.refuse_links(run_dir, entry)
                    if entry.name in OURS or entry.name.startswith("step-"):  # others may be the system's own
                        _check_kind(entry)
                elif files.is_link(entry):
                    files.inside(folder, entry.name)
            except files.UnsafePathError as error:
                raise _unsafe(error) from error


def _check_kind(entry: Path) -> None:
    """Whether what stands under a name of ours is a file or a folder, as a run has it. Raises RunFolderError."""
    wanted = "file" if entry.name in _FILES else "folder"
    if not (entry.is_file() if wanted == "file" else entry.is_dir()):
        raise RunFolderError(f"{entry}: is no {wanted}, as a run has it there", "move it away")


def _is_lock(file: Path) -> bool:
    """Whether a file is the lock of a run that got no further, and not somebody's file of that name."""
    return lock.holder_of(file) is not None or (file.is_file() and file.stat().st_size == 0)


def _unsafe(error: files.UnsafePathError) -> RunFolderError:
    return RunFolderError(str(error), "put what it leads to in its place, or take it away")


def claim(run_dir: Path, mode: Literal["new", "resume", "fresh"]) -> Claim:
    """Take the folder: "fresh" moves an old run out of the way, "new" forgets a run that trained nothing.

    Raises RunFolderError when another process was faster, and when the folder is not a run's.
    """
    _check_whose(run_dir, mode)  # again: much time may have passed
    disk.make_folder(run_dir)
    folder_lock, aside = _take(run_dir), None
    try:
        _check_whose(run_dir, mode)
        if mode == "fresh" and {path.name for path in run_dir.iterdir()} - {LOCK_FILE}:
            # with the lock in it: whoever has just opened that one sees that it has moved
            moved = disk.set_aside(run_dir, ".")
            aside = disk.SetAside(moved, disk.size_of(moved))
            folder_lock.release()
            disk.make_folder(run_dir)
            folder_lock = _take(run_dir)
        if mode == "new":
            (run_dir / EVENTS_FILE).unlink(missing_ok=True)
    except BaseException:
        folder_lock.release()
        raise
    return Claim(folder_lock, aside)


def check_there(run_dir: Path, about: Mapping[str, Any]) -> None:
    """Raises TrainingStopped when a run's folder is gone, or is another one than that of the run in `about`.

    `about` is its `provenance`. Nothing of a run is written where its folder no longer is.
    """
    held, run = lock.is_held(run_dir / LOCK_FILE), about.get("of", {}).get("run")
    # Without its lock (somebody removed it), its record tells; what cannot be read at this moment is no reason to stop.
    if held or (held is None and run_dir.is_dir() and (run is None or has_id(run_dir, run))):
        return
    what = f"{run_dir}: the run's folder was moved, removed or replaced while it trained"
    raise TrainingStopped(what, "put it back as it was and go on with mode='resume', or start again")


def publish_adapter(run_dir: Path, write: Callable[[Path], None], sink: Sink) -> int:
    """Publish `run_dir/adapter` anew; what somebody changed in the one before is kept, and said. Returns its bytes."""
    about = {"kind": "adapter", "of": {"run": id_of(run_dir)}}
    published = disk.publish_folder(run_dir / "adapter", write, about)
    if published.aside is not None:
        sink.emit(Notice("adapter", f"the adapter before had been changed; {kept(published.aside)}"))
    return published.bytes


def kept(aside: disk.SetAside) -> str:
    """What a notice says of something that was in the way: where it lies now, and its size."""
    return f"it is kept as {aside.folder} ({aside.bytes / 2**20:,.1f} MiB)"


def _take(run_dir: Path) -> lock.FolderLock:
    try:
        return lock.acquire(run_dir / LOCK_FILE)
    except lock.LockHeld as held:
        raise _under_way(run_dir, held.holder) from held
    except files.UnsafePathError as error:
        raise _unsafe(error) from error


def _under_way(run_dir: Path, holder: lock.Holder | None) -> RunFolderError:
    who = f"process {holder.pid} on {holder.host}" if holder else "another process"
    hint = f"wait for it or stop it; a run that died holds no lock, and on a disk that cannot lock, remove {LOCK_FILE}"
    return RunFolderError(f"{run_dir}: a run is under way in it ({who})", hint)


def _must_match(run_dir: Path, recipe: Recipe) -> None:
    file = run_dir / RECIPE_FILE
    if not file.is_file():
        raise RunFolderError(f"{run_dir}: there is no run here to resume", "start it without mode='resume'")
    try:
        old, _ = recorded.load_recorded(file)
    except RecipeError as error:
        raise RunFolderError(f"{file}: cannot be read ({error.what})", "start anew with mode='fresh'") from error
    keys = _other_keys(recipe, old)
    if keys:
        what = f"{run_dir}: was made by another recipe; these keys differ: {', '.join(keys)}"
        raise RunFolderError(what, "set them back to go on, or start anew with mode='fresh'")


def _other_keys(recipe: Recipe, old: Recipe) -> list[str]:
    """What differs, but for where the base lies: what it is decides (`checkpoint.check_base`)."""
    differing = recorded.differing_keys(recorded.resumed(recipe, old), old)
    return [key for key in differing if key != "model.base"]


def resumed(run_dir: Path, recipe: Recipe, sink: Sink) -> Recipe:
    """The recipe of the run in `run_dir` as it goes on: what `recipe` does not set is as the run recorded it."""
    old, unknown = recorded.load_recorded(run_dir / RECIPE_FILE)
    if unknown:
        message = f"{run_dir / RECIPE_FILE}: keys that this version does not know are not read: {', '.join(unknown)}"
        sink.emit(Notice("recipe", message, len(unknown)))
    return recorded.resumed(recipe, recorded.whole_folders(relocated_recipe(old, run_dir)))


def write_recipe(run_dir: Path, recipe: Recipe, commit: str | None) -> bool:
    """The resolved recipe: every default written out, paths absolute, the revision as the commit it meant.

    And run.json, which says whose folder it is and where it lies. A path that looks like a token must stay what it is.
    Returns whether one does: then the files are their owner's to read.
    """
    if commit is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})})
    text = recipe_toml(recipe, f"{HEADING}{__version__}; every key resolved\n")
    run = id_of(run_dir) or uuid.uuid4().hex
    record = RunRecord(made_by="qlora", kind="run", version=__version__, id=run, folder=str(run_dir))
    is_private = redact(f"{text}{run_dir}") != f"{text}{run_dir}"
    permissions = 0o600 if is_private else 0o644
    disk.write_atomic(run_dir / RECIPE_FILE, text, permissions)
    # After the recipe: until it is written, the paths in that are seen from where the folder lay before.
    disk.write_atomic(run_dir / RUN_FILE, record.model_dump_json(indent=1) + "\n", permissions)
    return is_private


def start_event(
    recipe: Recipe, run_dir: Path, commit: str | None, device: str, numbers: Numerics, step: int | None
) -> Start:
    facts = numbers.model_dump(exclude_none=True)
    allocator = third_party.allocator_settings()
    return Start(run_dir.name, str(run_dir), recipe.model.base, commit, device, versions(), step, facts, allocator)


def versions() -> dict[str, str]:
    """Ours and those of the packages that numbers depend on."""
    return {"qlora": __version__, **{name: package_version(name) for name in PACKAGES}}


def provenance(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """How a checkpoint was made and of which run, for its manifest."""
    of = {"run": id_of(run_dir), "base": dataset_name(recipe.model.base)}
    recipe_sha256 = disk.sha256_text(recipe_toml(recipe))
    return {"kind": "checkpoint", "of": of, "versions": versions(), "recipe_sha256": recipe_sha256}


class _Manifest(foreign_json.ForeignModel):
    versions: dict[str, Annotated[str, Field(max_length=100)]] = Field(default_factory=dict)


def made_with(checkpoint: Path) -> Mapping[str, str]:
    """The versions that a checkpoint's manifest records. Raises ForeignFileError with file and key."""
    file = checkpoint / disk.MANIFEST
    return foreign_json.checked(_Manifest, foreign_json.load(file), str(file)).versions


def other_versions(checkpoint: Path) -> list[str]:
    """Packages that were of another version when the checkpoint was made: "torch 2.10 (now 2.11)"."""
    before, now = made_with(checkpoint), sorted(versions().items())
    changed = ((name, before[name], version) for name, version in now if before.get(name, version) != version)
    return [f"{name} {old} (now {new})" for name, old, new in changed]


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def adapter_of(path: Path) -> tuple[Path, Path]:
    """The adapter folder that `path` (a run or an adapter) means, and the parent of its exports. Raises ExportError."""
    if not path.is_dir():
        hint = "name a run's folder, such as runs/quickstart, or an adapter folder"
        raise ExportError(f"{path}: no such folder", hint)
    if files.is_link(path / "adapter"):
        raise ExportError(f"{path / 'adapter'}: is a link", "name the adapter's folder itself")
    if (path / "adapter" / "adapter_config.json").is_file():
        return _plain(path / "adapter"), path / "export"
    if (path / "adapter_config.json").is_file():
        return _plain(path), path.parent / "export" if is_run(path.parent) else path.with_name(path.name + "-export")
    if is_run(path):
        raise ExportError(f"{path}: this run has no adapter yet", "train it to its first evaluation or its end")
    inside = sorted(path.glob("*/adapter_config.json"), key=lambda file: (_number(file.parent.name), file.parent.name))
    if inside:
        what = f"{path}: holds no adapter itself, but {len(inside)} in folders of its own"
        raise ExportError(what, f"name one of them, such as {inside[-1].parent}")
    what = f"{path}: neither a run's folder nor an adapter's (no adapter_config.json)"
    if (path / "config.json").is_file():
        raise ExportError(f"{what}, but a whole model", "name the adapter, or the run, that is to be merged")
    raise ExportError(what, "check the path")


def _number(name: str) -> int:
    """The step in the name of another trainer's checkpoint, such as checkpoint-1200."""
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else -1


def relocated_recipe(recipe: Recipe, run_dir: Path) -> Recipe:
    """A recipe that the run in `run_dir` recorded, with its base and its rows where they lie today: see `relocated`."""
    base = recipe.model.model_copy(update={"base": relocated(recipe.model.base, run_dir)})

    def placed(path: str, _: object) -> str:
        folder, split = folder_split(path)
        place = relocated(folder, run_dir)
        return f"{place}:{split}" if split else place

    start = recipe.lora.from_adapter
    lora = recipe.lora.model_copy(update={"from_adapter": relocated(start, run_dir)}) if start else recipe.lora
    return with_paths(recipe.model_copy(update={"model": base, "lora": lora}), placed)


def recipe_of(adapter_dir: Path, sink: Sink) -> Recipe | None:
    """The recipe of the run that an adapter's folder belongs to; None for an adapter alone.

    Its base and rows are named where they lie today, which is said where that is another place.
    """
    run_dir = adapter_dir.parent
    if not is_run(run_dir):
        return None
    file = run_dir / RECIPE_FILE
    hint = "name the adapter's folder, moved elsewhere"
    if files.is_link(file):
        raise ExportError(f"{file}: is a link", hint)
    try:
        old, _ = recorded.load_recorded(file)
    except RecipeError as error:
        raise ExportError(f"{file}: cannot be read ({error.what})", hint) from error
    recipe = relocated_recipe(old, run_dir)
    if recipe != old:
        was = recorded_folder(run_dir)
        sink.emit(Notice("moved", f"the run lay in {was}: base and rows are taken from where they are seen from here"))
    return recorded.whole_folders(recipe)


def name_of(adapter_dir: Path) -> str:
    """What an export calls itself: the run's name, or the adapter folder's."""
    return adapter_dir.parent.name if is_run(adapter_dir.parent) else adapter_dir.name


def dataset_names(recipe: Recipe) -> tuple[str, ...]:
    """How a published file may name what a run was trained on: each source of rows or documents once."""
    paths = [*(source.path for source in recipe.data.train), *(source.path for source in recipe.data.documents)]
    return tuple(dict.fromkeys(map(dataset_name, paths)))


def dataset_name(path: str) -> str:
    """How a published file may name a source of rows: a hub dataset's name, or a file's without its folders."""
    name = path.removeprefix("hub:").split(":")[0] if path.startswith("hub:") else Path(folder_split(path)[0]).name
    return shown.one_line(redact(name))


def _plain(folder: Path) -> Path:
    """The folder, when no entry of it is a pipe, a device or a link out of it: some of them are copied into exports."""
    for entry in sorted(folder.iterdir()):
        try:
            files.inside(folder, entry.name)
        except files.UnsafePathError as error:
            raise ExportError(f"{folder}: {error}", "do not use this adapter; get a clean copy of it") from error
    return folder
