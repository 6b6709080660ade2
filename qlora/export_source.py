"""What an export is made of, opened and checked: an adapter, its base, and the rows of its run where they are there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from qlora import files, run_folder
from qlora.errors import ExportError, UserError
from qlora.events import EVENTS_FILE, Notice, Sink, Sinks
from qlora.export import adapter_base, base_check, combine
from qlora.export.artifacts import Artifact, ExportOptions, Report, RunRows, Source
from qlora.export.cards import combined_card
from qlora.export.combination import Combination
from qlora.export.merge.parts import MergeBase
from qlora.export.pipeline import produce
from qlora.export.targets import keep_apart
from qlora.guarded import guarded
from qlora.manifest import sha256_text
from qlora.model import chat_template, delivered_loss, row_packing, tokenizer_files
from qlora.model.adapter_folder import (
    PROVENANCE_FILE,
    Provenance,
    delivered_step,
    keep_private,
    provenance,
    read_adapter,
)
from qlora.model.adapter_seal import seal
from qlora.model.base_cache.places import mode_beside
from qlora.model.base_folder import MAX_SMALL_BYTES, BaseFolder
from qlora.model.cpu_matmul import fast_matmul
from qlora.model.delivered_loss import DeliveredLoss
from qlora.model.weight_names import class_names
from qlora.report.files import read_events
from qlora.run_record import is_run
from qlora.study.rows import as_exported, measured_on
from qlora.training import setup
from qlora.version import __version__

MAX_NAME_BYTES = 160  # of several names as one: file systems take 255, and `.NAME-export.part` and a GGUF's are longer


def adapters_of(
    sources: Sequence[str | Path], combine: Combination | None, to: str | Sequence[str]
) -> tuple[list[Path], Path]:
    """The adapter folders that are named, and where their exports lie by default. Raises ExportError."""
    if combine is not None:
        combine.check(len(sources))
    elif len(sources) != 1:
        what = f"{len(sources)} adapters are named, and no `weights`"
        raise ExportError(what, "say how much of each, such as `weights` 0.5,0.5, or name one alone")
    elif "adapter" in ([to] if isinstance(to, str) else to):
        hint = "it lies in the run's folder as it is; to combine several, name them with `weights`"
        raise ExportError("one adapter alone is not written again", hint)
    found = [run_folder.adapter_of(files.user_path(source, "the run or adapter")) for source in sources]
    folders, default = [folder for folder, _ in found], found[0][1]
    if combine is not None:
        first = folders[0].parent if is_run(folders[0].parent) else folders[0]
        default = first.with_name(f"{name_of_all(folders)}-export")
    return folders, default


def name_of_all(folders: Sequence[Path]) -> str:
    """What an export of these adapters calls itself: all their names.

    Where that is longer than a file's name may be, some of it and a hash of all: others that begin alike have another.
    """
    name = "-and-".join(map(run_folder.name_of, folders))
    if len(folders) == 1 or len(os.fsencode(name)) <= MAX_NAME_BYTES:
        return name
    mark = f"-{len(folders)}-{sha256_text(*map(run_folder.name_of, folders))[:12]}"
    return os.fsencode(name)[: MAX_NAME_BYTES - len(mark)].decode(errors="ignore").rstrip(" .") + mark


def hash_of_request(folders: Sequence[Path], *asked: object) -> str:
    """Of what an export is made and how: the adapters and their runs' recipes by their bytes, and all of `asked`.

    Raises ExportError and ModelError as `seal` does, of an adapter that no export takes.
    """
    known = [__version__, *map(repr, asked)]
    for folder in folders:
        known += [f"{name} {entry.sha256}" for name, entry in sorted(seal(folder, Sinks()).found.items())]
        if is_run(folder.parent):
            with suppress(OSError, files.UnsafePathError):
                recipe = files.read_bytes(folder.parent / run_folder.RECIPE_FILE, MAX_SMALL_BYTES)
                known.append(hashlib.sha256(recipe).hexdigest())
    return sha256_text(*known)


@contextmanager
def opened_source(
    adapter_dirs: Sequence[Path],
    combine: Combination | None,
    asked: tuple[str | Path | None, Literal["auto"] | MergeBase],
    folders: Sequence[Path],
    with_rows: bool,
    sink: Sink,
) -> Iterator[Source]:
    """What is exported: an adapter (see `_open_source`), or several that are combined for the time of the block."""
    if combine is None:
        yield _open_source(adapter_dirs[0], asked, folders, with_rows, sink)
        return
    with tempfile.TemporaryDirectory(prefix="qlora-combined-") as place:
        yield _combine(adapter_dirs, combine, asked, folders, Path(place), sink)


def _combine(
    adapter_dirs: Sequence[Path],
    how: Combination,
    asked: tuple[str | Path | None, Literal["auto"] | MergeBase],
    folders: Sequence[Path],
    place: Path,
    sink: Sink,
) -> Source:
    """Several adapters as one, written below `place`. Raises ExportError where they are not of one base."""
    seals = [seal(folder, sink) for folder in adapter_dirs]
    adapters = [read_adapter(folder) for folder in adapter_dirs]
    origins = [provenance(folder, one.config) for folder, one in zip(adapter_dirs, adapters, strict=True)]
    first = next((number for number, origin in enumerate(origins) if not origin.foreign), 0)
    base = adapter_base.open_base(adapters[first], origins[first], asked[0], sink)
    origin = adapter_base.as_trained(origins[first], base, asked[1])
    recipes = [run_folder.recipe_of(folder, sink) for folder in adapter_dirs]
    for folder, recipe in zip(adapter_dirs, recipes, strict=True):
        for written in folders:
            keep_apart(written, folder, base.path, recipe)
    steps = [delivered_step(folder.parent) if is_run(folder.parent) else None for folder in adapter_dirs]
    names = [run_folder.dataset_name(run_folder.name_of(folder)) for folder in adapter_dirs]
    members = list(map(combine.Member, names, adapters, how.weights, steps))
    combine.check(members, how)
    made = place / name_of_all(adapter_dirs)
    made.mkdir()
    source = Source(made.name, adapters[first], seals[first], origin, base, setup.pick_device())
    for member, of in zip(members, origins, strict=True):
        _check_member(replace(source, adapter=member.adapter, origin=of), origin, sink)
    combined = combine.described(members, how)
    about = {
        "version": __version__,
        "base": base.name,
        "revision": origin.revision,
        "fingerprint": origin.fingerprint,
        "identity": origin.identity and origin.identity.model_dump(),
        "quantization": origin.quantization.model_dump(mode="json"),
        "combined": combined,
    }
    combine.write(members, how, made, about, class_names(base, source.meta_model.model))
    _settle_files(made, adapter_dirs, about, base, sink)
    for sealed in seals:
        sealed.check()
    combine.say(members, how, sink)
    found = dict.fromkeys(name for recipe in recipes if recipe for name in run_folder.dataset_names(recipe))
    opened, sealed = read_adapter(made), seal(made, Sinks())
    return replace(source, adapter=opened, seal=sealed, datasets=tuple(found), combined=combined)


def _check_member(member: Source, origin: Provenance, sink: Sink) -> None:
    """Raises ExportError where one of the adapters is not of the base that the first one has, of which is `origin`."""
    of, folder = member.origin, member.adapter.folder
    if of.identity and origin.identity and (difference := origin.identity.difference(of.identity)):
        what = f"{folder}: was trained on another base than the first adapter: {difference}"
        raise ExportError(what, "combine adapters of one base")
    base_check.at_the_door(member, sink)
    replace(member, origin=origin).merge("nf4", torch.float32)  # its names and shapes are the base's
    name = run_folder.name_of(folder)
    if of.fingerprint is None:
        message = (
            f"{name} keeps no hash of the base that it was trained on: its names and shapes fit {member.base.name}"
        )
        sink.emit(Notice("base", message))
    if of.quantization.type != origin.quantization.type and not of.foreign:
        before, now = of.quantization.type, origin.quantization.type
        sink.emit(Notice("base", f"{name} was trained on its base in {before}, and is measured on it in {now}"))


def _settle_files(
    made: Path, adapter_dirs: Sequence[Path], about: Mapping[str, Any], base: BaseFolder, sink: Sink
) -> None:
    """Provenance, card and tokenizer of a combined adapter; a notice where the adapters bring different ones."""
    (made / PROVENANCE_FILE).write_text(json.dumps(about, indent=1) + "\n")
    keep_private(made, base.name)
    (made / "README.md").write_text(combined_card(base, about["combined"]), encoding="utf-8")
    found = [tokenizer_files.read_files(folder) for folder in adapter_dirs]
    complete = [one for one in found if one.complete]
    if complete:
        complete[0].deliver(made)
    if len({one.fingerprint for one in complete}) > 1:
        message = "the adapters bring different tokenizers or chat templates: the first one's are taken"

        sink.emit(Notice("tokenizer", message))


def _open_source(
    adapter_dir: Path,
    asked: tuple[str | Path | None, Literal["auto"] | MergeBase],
    folders: Sequence[Path],
    with_rows: bool,
    sink: Sink,
) -> Source:
    """An adapter with its base, checked; `with_rows`: and the rows of its run, or a notice that they are gone.

    `asked` are the base and the merge base that the caller named. Raises ExportError where one of `folders`, which are
    to be written, would be among what they are made of.
    """
    sealed = seal(adapter_dir, sink)
    adapter = read_adapter(adapter_dir)
    origin = provenance(adapter_dir, adapter.config)
    base = adapter_base.open_base(adapter, origin, asked[0], sink)
    origin = adapter_base.as_trained(origin, base, asked[1])
    adapter_base.say(adapter, origin, sink)
    source = Source(run_folder.name_of(adapter_dir), adapter, sealed, origin, base, setup.pick_device())
    recipe = run_folder.recipe_of(adapter_dir, sink)
    for folder in folders:
        keep_apart(folder, adapter_dir, base.path, recipe)
    base_check.at_the_door(source, sink)
    delivered, is_older = delivered_loss.read(adapter_dir)
    if recipe is None:
        return replace(source, delivered=delivered)
    source = replace(source, cache=mode_beside(recipe.memory))
    datasets = run_folder.dataset_names(recipe)
    rows = None
    if with_rows:
        try:
            tokenizer = tokenizer_files.of_run(adapter_dir.parent, sink) or chat_template.chosen(
                tokenizer_files.read_files(base.path), recipe.model, base.name, Sinks()
            )
            tokenizer = chat_template.as_before(tokenizer, base.name, adapter_dir, Sinks())
            chat, data = setup.prepare_rows(as_exported(recipe, adapter_dir.parent), tokenizer, Sinks())
            section = row_packing.as_measured(recipe.data, base.config, base.name)
            rows = RunRows(measured_on(recipe, data), section, chat)
        except UserError as error:
            sink.emit(Notice("rows", f"the run's rows cannot be read any more ({error.what})"))
    if rows is not None and is_older:
        delivered = _older_loss(adapter_dir, rows, recipe.data.packing, sink)
    return replace(source, datasets=datasets, rows=rows, delivered=delivered)


def _older_loss(adapter_dir: Path, rows: RunRows, packing: bool, sink: Sink) -> DeliveredLoss | None:
    """The loss of an adapter that an older version delivered: its events may say it."""
    if not any(rows.data.eval.trained):
        return None
    events, step = adapter_dir.parent / EVENTS_FILE, delivered_step(adapter_dir.parent)
    found = None
    with suppress(OSError, files.UnsafePathError):  # it is gone, or was never a run's
        known = read_events(events) if step is not None else []
        found = delivered_loss.of_older_run(known, step or 0, rows.data.eval.trained, packing)
    if found is None:
        message = "an older version delivered the adapter, and recorded no loss that could be compared"
        sink.emit(Notice("verify", message))
    return found


def produced(
    folders: Sequence[Path],
    combine: Combination | None,
    artifacts: Sequence[Artifact],
    asked: tuple[str | Path | None, Literal["auto"] | MergeBase, ExportOptions, Callable[[], str]],
    sink: Sink,
) -> Report:
    """Artifacts made of adapters; `asked` are the base and the merge base that are named, how, and a hash of it all."""
    base_model, merge_base, chosen, request = asked
    with_rows = chosen.verify or chosen.imatrix or any("gguf" in one.key for one in artifacts)
    hint = "end other programs that hold memory"
    hint = f"{hint}; verify=False leaves out what takes most" if chosen.verify else hint
    with guarded("exporting", hint):
        written = [one.folder for one in artifacts]
        with (
            opened_source(folders, combine, (base_model, merge_base), written, with_rows, sink) as opened,
            fast_matmul(opened.device),
        ):
            return produce(opened, artifacts, merge_base, chosen, sink, request())
