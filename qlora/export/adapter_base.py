"""The base that an adapter is exported with: where it is looked for, and how training held it.

An adapter names its base by a path of the machine where it was trained, or by a hub name; whoever has it elsewhere says
where. What it is decides, not what it is called: `base_check` compares. Nobody who exports need have a recipe, so that
no message here speaks of one.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from qlora import files, hub, run_folder
from qlora.errors import ExportError, ModelError
from qlora.events import Notice, Sink
from qlora.model.adapter_folder import Adapter, Provenance
from qlora.model.base_folder import BaseFolder
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection

_ELSEWHERE = "say where it lies, or its name on the hub, with `base_model`"


def open_base(adapter: Adapter, origin: Provenance, asked: str | Path | None, sink: Sink) -> BaseFolder:
    """The checked folder of the base: `asked` (a folder or a hub name), else the one that the adapter names.

    Raises ExportError where that is not here, ModelError for what is no base.
    """
    folder = adapter.folder
    if asked is not None:
        name = _asked(asked)
        return resolve(name, origin.revision if name == origin.base else "main", sink)
    if not origin.base:
        raise ExportError(f"{folder}: its adapter_config.json names no base", _ELSEWHERE)
    name = run_folder.relocated(origin.base, folder.parent)
    is_path = Path(name).is_absolute() or name.startswith("~")
    if is_path and not os.path.isdir(os.path.expanduser(name)):  # which leaves the home of an unknown user as it is
        raise ExportError(f"{folder}: the base that it was trained on is not here ({name})", _ELSEWHERE)
    if not is_path and not hub.is_name(name):
        what = f"{folder}: names its base {name!r}, which is neither a hub name nor a folder from its root on"
        raise ExportError(what, _ELSEWHERE)
    try:
        return resolve(name, origin.revision, sink)
    except ModelError as error:
        raise ModelError(error.what, f"{error.hint}; or name another place with `base_model`") from error


def _asked(asked: str | Path) -> str:
    """What the user named: a folder, seen from where he stands, or a hub name."""
    folder = files.user_path(asked, "`base_model`")
    if folder.is_dir():
        return str(folder)
    text = str(asked)
    if isinstance(asked, Path) or Path(text).is_absolute() or not hub.is_name(text):
        what = f"`base_model`: {text!r} is neither a folder nor a hub name (owner/name)"
        raise ExportError(what, "give the folder's path, or a name as it stands on huggingface.co")
    return text


def as_trained(origin: Provenance, base: BaseFolder, merge_base: Literal["auto", "nf4", "full"]) -> Provenance:
    """How training held the base, of an adapter that is not ours: it is measured against that.

    A base that is stored in 4 bit stays so, and who asks for a merge into NF4 says that it was trained on that. Raises
    ExportError for that merge of a run of ours which never had its base in 4 bit.
    """
    if origin.quantization.type != "none":
        return origin
    if not origin.foreign:
        if merge_base == "nf4":
            what = "merge_base='nf4' is not possible: the run trained on its base in 16 bit"
            raise ExportError(what, "leave `merge_base` out")
        return origin
    if base.stored_4bit:
        return replace(origin, quantization=QuantizationSection(), why="its base is stored in 4 bit")
    if merge_base == "nf4":
        return replace(origin, quantization=QuantizationSection(), why="merge_base='nf4' says so")
    return origin


def say(adapter: Adapter, origin: Provenance, sink: Sink) -> None:
    """What a stranger's adapter was taken for, and what of it is left out."""
    if origin.foreign and origin.quantization.type == "none":
        message = (
            f"{adapter.folder.name} names no base in 4 bit: it was trained on 16 bit, is merged into the original "
            "weights and measured against them; for one that was trained in 4 bit all the same: merge_base='nf4'"
        )
        sink.emit(Notice("base", message))
    elif origin.foreign:
        message = f"{adapter.folder.name} was trained on a base in 4 bit ({origin.why}): it is measured against that"
        sink.emit(Notice("base", message))
    if adapter.idle:
        message = "adapters on other parts than the text model never moved, and are left out"
        sink.emit(Notice("adapter", f"{message}, {adapter.idle[0]} first", len(adapter.idle)))
