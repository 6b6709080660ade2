"""The folder of a run, seen from outside: whose it is, what may be done with it, what it holds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from qlora import disk, lock, recorded
from qlora.errors import ExportError, RecipeError, RunFolderError
from qlora.events import EVENTS_FILE, Notice, Sink, Start
from qlora.recipe.reading import Recipe, recipe_toml
from qlora.version import __version__

RECIPE_FILE = "recipe.toml"
LOCK_FILE = ".lock"
RESULTS = {"adapter", "checkpoints", "export"}  # what a run leaves once it has trained
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "datasets")


def path_of(recipe: Recipe, name: str) -> Path:
    """`output.dir/name`, absolute."""
    return (Path(recipe.output.dir).expanduser() / name).resolve()


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
    names = {path.name for path in run_dir.iterdir()} - {LOCK_FILE} if run_dir.exists() else set()
    if mode == "new" and names & RESULTS:
        hint = "mode='resume' goes on with it, mode='fresh' keeps it under another name and starts anew"
        raise RunFolderError(f"{run_dir}: holds a run already", hint)
    if mode == "new" and names and RECIPE_FILE not in names:
        raise RunFolderError(f"{run_dir}: holds files that are not a run's", "change output.dir, or the recipe's name")
    if mode == "resume":
        _must_match(run_dir, recipe)
    disk.check_writable(run_dir)


def claim(run_dir: Path, mode: Literal["new", "resume", "fresh"]) -> lock.FolderLock:
    """Take the folder: "fresh" moves an old run out of the way, "new" forgets a run that trained nothing.

    Raises RunFolderError when another process was faster.
    """
    disk.make_folder(run_dir)
    folder_lock = _take(run_dir)
    try:
        if mode == "fresh" and {path.name for path in run_dir.iterdir()} - {LOCK_FILE}:
            disk.set_aside(run_dir, ".")  # with the lock in it: whoever has just opened that one sees that it has moved
            folder_lock.release()
            disk.make_folder(run_dir)
            folder_lock = _take(run_dir)
        if mode == "new":
            (run_dir / EVENTS_FILE).unlink(missing_ok=True)
    except BaseException:
        folder_lock.release()
        raise
    return folder_lock


def _take(run_dir: Path) -> lock.FolderLock:
    try:
        return lock.acquire(run_dir / LOCK_FILE)
    except lock.LockHeld as held:
        raise _under_way(run_dir, held.holder) from held


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
    if keys := recorded.differing_keys(recorded.resumed(recipe, old), old):
        what = f"{run_dir}: was made by another recipe; these keys differ: {', '.join(keys)}"
        raise RunFolderError(what, "set them back to go on, or start anew with mode='fresh'")


def resumed(run_dir: Path, recipe: Recipe, sink: Sink) -> Recipe:
    """The recipe of the run in `run_dir` as it goes on: what `recipe` does not set is as the run recorded it."""
    old, unknown = recorded.load_recorded(run_dir / RECIPE_FILE)
    if unknown:
        message = f"{run_dir / RECIPE_FILE}: keys that this version does not know are not read: {', '.join(unknown)}"
        sink.emit(Notice("recipe", message, len(unknown)))
    return recorded.resumed(recipe, old)


def write_recipe(run_dir: Path, recipe: Recipe, commit: str | None) -> None:
    """The resolved recipe: every default written out, paths absolute, the revision as the commit it meant."""
    if commit is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})})
    heading = f"# written by qlora {__version__}; every key resolved\n"
    disk.write_atomic(run_dir / RECIPE_FILE, recipe_toml(recipe, heading))


def start_event(recipe: Recipe, run_dir: Path, commit: str | None, device: str, step: int | None) -> Start:
    return Start(run_dir.name, str(run_dir), recipe.model.base, commit, device, versions(), resumed_from_step=step)


def versions() -> dict[str, str]:
    """Ours and those of the packages that numbers depend on."""
    return {"qlora": __version__, **{name: package_version(name) for name in PACKAGES}}


def provenance(recipe: Recipe) -> dict[str, Any]:
    """How a checkpoint was made, for its manifest."""
    return {"versions": versions(), "recipe_sha256": disk.sha256_text(recipe_toml(recipe))}


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
    if (path / "adapter" / "adapter_config.json").is_file():
        return _plain(path / "adapter"), path / "export"
    if (path / "adapter_config.json").is_file():
        of_run = (path.parent / RECIPE_FILE).is_file()
        return _plain(path), path.parent / "export" if of_run else path.with_name(path.name + "-export")
    if (path / RECIPE_FILE).is_file():
        raise ExportError(f"{path}: this run has no adapter yet", "train it to its first evaluation or its end")
    raise ExportError(f"{path}: neither a run's folder nor an adapter's (no adapter_config.json)", "check the path")


def recipe_of(adapter_dir: Path) -> Recipe | None:
    """The recipe of the run that an adapter's folder belongs to; None for an adapter alone."""
    file = adapter_dir.parent / RECIPE_FILE
    if not file.is_file():
        return None
    try:
        return recorded.load_recorded(file)[0]
    except RecipeError as error:
        hint = "name the adapter's folder, moved elsewhere"
        raise ExportError(f"{file}: cannot be read ({error.what})", hint) from error


def name_of(adapter_dir: Path) -> str:
    """What an export calls itself: the run's name, or the adapter folder's."""
    return adapter_dir.parent.name if (adapter_dir.parent / RECIPE_FILE).is_file() else adapter_dir.name


def dataset_name(path: str) -> str:
    """How a published file may name a source of rows: a hub dataset's name, or a file's without its folders."""
    return path.removeprefix("hub:").split(":")[0] if path.startswith("hub:") else Path(path).name


def _plain(folder: Path) -> Path:
    """The folder, when no entry of it is a pipe, a device or a link out of it: some of them are copied into exports."""
    for entry in sorted(folder.iterdir()):
        try:
            disk.inside(folder, entry.name)
        except ValueError as error:
            raise ExportError(f"{folder}: {error}", "do not use this adapter; get a clean copy of it") from error
    return folder


def refuse_foreign_folder(target: Path) -> None:
    """Only what an earlier export published may be replaced."""
    published = target.is_dir() and ((target / disk.MANIFEST).exists() or not any(target.iterdir()))
    if target.exists() and not published:
        what = f"{target}: exists and was not made by an export"
        raise ExportError(what, "name another folder with `out`, or remove it")
