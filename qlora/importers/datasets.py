"""Rows that another trainer names, as sources of ours: a local file or folder, or a data set of the hub.

Rows of preference need no format: the objective, which is known before them, says how they are read. Their columns are
named where they have other names than the usual ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora import files, foreign_json
from qlora.importers.draft import Draft, as_shown
from qlora.importers.values import names, text

MOST_SOURCES = 1000
INFO = "dataset_info.json"  # LLaMA-Factory's list of names
_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_SPLIT = re.compile(r"[\w.-]{1,100}", re.ASCII)
_INFO_BYTES = 2_000_000
_INFO_COLUMNS = {  # LLaMA-Factory's names of columns, by format, as the format's own
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
}
# Names of columns of preference, axolotl's `field_…` and LLaMA-Factory's, as our own; others keep theirs.
_JUDGED_COLUMNS = {
    **{name: name for name in ("chosen", "rejected", "prompt", "system", "completion", "label", "messages", "tools")},
    "query": "input",
    "response": "completion",
    "kto_tag": "label",
}
# Columns that are a question by their name, whether they are one text or turns.
_QUESTIONS = (
    *("prompt", "question", "instruction", "input", "query", "messages", "conversations", "conversation"),
    *("chosen", "completion"),  # whole conversations
)
# axolotl's kinds of such rows, whatever template they are written with; and those with other shapes.
_JUDGED_KINDS = ("argilla", "argilla_chat", "icr", "intel", "prompt_pairs", "ultra", "default", "passthrough")
# axolotl's column of a chat, and the keys of a turn's role and text: of `chat_template`, and of the older `sharegpt`.
_CHAT, _LEGACY = ("messages", "role", "content"), ("conversations", "from", "value")
_TURNS = {("from", "value"): "sharegpt", ("role", "content"): "messages"}


def source(draft: Draft, key: str, path: str, split: str = "", revision: str = "") -> dict[str, Any]:
    """The table of a path or hub name; `split` is said where it is a part that no split of ours can be."""
    place = local(draft, path)
    if split and not _SPLIT.fullmatch(split):
        whole, _, _ = split.partition("[")
        draft.leave(f"{key}.split", split, "a part of a split has no counterpart: all of it is read")
        split = whole if _SPLIT.fullmatch(whole) else ""
    if place is not None:
        return {"path": f"{place}:{split}" if split and split != "train" and os.path.isdir(place) else str(place)}
    name = path.removeprefix("hf://datasets/").removeprefix("hub:")
    if _HUB_NAME.fullmatch(name):
        at = f"@{revision}" if revision else ""
        return {"path": f"hub:{name}{at}" + (f":{split}" if split else "")}
    draft.leave(f"{key}.path", path, "is not here: put the file in its place, or change the path")
    return {"path": path}


def local(draft: Draft, path: str) -> Path | None:
    """Where a path of the configuration leads: from the folder that their command runs in, or from the file's own."""
    for folder in (Path.cwd(), draft.folder, draft.folder.parent):
        try:
            place = folder / Path(path).expanduser()
            if place.exists():
                return place.resolve()
        except (OSError, RuntimeError, ValueError):  # no name that a system could have
            return None
    return None


def axolotl(draft: Draft, key: str, value: Any) -> None:
    """axolotl's `datasets`: a list of tables, each with its path, the kind of its rows and its columns."""
    entries = value if isinstance(value, list) else [value]
    into = draft.eval_sources if key == "test_datasets" else draft.sources
    for number, entry in enumerate(entries[:MOST_SOURCES]):
        where = f"{key}.{number}" if len(entries) > 1 else key
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            draft.leave(where, entry, "has no path")
            continue
        into.append(_entry(draft, where, {str(name): item for name, item in entry.items() if item is not None}))
    if len(entries) > MOST_SOURCES:
        draft.leave(key, len(entries), f"only the first {MOST_SOURCES:,} are taken")


def _entry(draft: Draft, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    table = source(draft, key, entry["path"], str(entry.get("split") or ""), str(entry.get("revision") or ""))
    known = {"path", "split", "revision", "type", "field_messages", "message_property_mappings", "field", "data_files"}
    known |= {"message_field_role", "message_field_content", "ds_type", "roles_to_train", "field_tools", "text_column"}
    known |= {f"field_{name}" for name in ("instruction", "input", "output", "system")}
    kind = entry.get("type") or ("pretrain" if key.startswith("pretraining") else "")
    if draft.values.get("train.objective", "sft") != "sft":
        known |= {f"field_{name}" for name in _JUDGED_COLUMNS} | {"roles", "train_on_split"}
        _judged(draft, key, kind, entry, table)
    elif isinstance(kind, Mapping):
        for name in ("instruction", "input", "output", "system"):
            if isinstance(column := kind.get(f"field_{name}"), str):
                table.setdefault("columns", {})[name] = column
        table["format"] = "alpaca"
        if written := sorted(set(kind) - {f"field_{name}" for name in ("instruction", "input", "output", "system")}):
            draft.leave(
                f"{key}.type", ", ".join(map(str, written)), "a prompt of its own: the base's template is taken"
            )
    else:
        _kind(draft, key, str(kind), entry, table)
    if files_named := entry.get("data_files"):
        _files(draft, key, files_named, entry["path"], table)
    if entry.get("roles_to_train") not in (None, ["assistant"], ["gpt"]):
        draft.leave(
            f"{key}.roles_to_train", entry["roles_to_train"], "the assistant's turns are trained, or all tokens"
        )
    for name in sorted(set(entry) - known):
        draft.leave(f"{key}.{name}", entry[name], "has no counterpart in a source of rows")
    shown = ", ".join(f"{name} = {as_shown(name, item)}" for name, item in table.items())
    draft.note(key, f"a source of rows: {shown}")
    return table


def _judged(draft: Draft, key: str, kind: Any, entry: Mapping[str, Any], table: dict[str, Any]) -> None:
    """A source of pairs, or of marked answers: its columns, and what of its kind is not theirs."""
    named = kind if isinstance(kind, Mapping) else entry
    columns = _judged_columns({name: named.get(f"field_{name}") for name in _JUDGED_COLUMNS})
    if columns:
        table["columns"] = columns
    if isinstance(kind, Mapping):
        if written := [str(name) for name in kind if not str(name).startswith("field_")]:
            why = "a prompt of its own: the base's template is taken"
            draft.leave(f"{key}.type", ", ".join(written), why)
        return
    template, _, shape = str(kind).replace(":", ".").partition(".")
    if shape and shape not in _JUDGED_KINDS:
        draft.leave(f"{key}.type", kind, "this kind of rows is not known here: the columns are to tell")
    elif template and template not in ("chat_template", "user_defined", "passthrough"):
        draft.leave(f"{key}.type", kind, f"the style {as_shown('', template)}: the base's own template is taken")


def _judged_columns(found: Mapping[str, Any]) -> dict[str, str]:
    """Of names of columns by another trainer's word: those that are to be named, by ours."""
    own = {_JUDGED_COLUMNS[word]: name for word, name in found.items() if word in _JUDGED_COLUMNS and name}
    usual = {"messages": _QUESTIONS, "prompt": _QUESTIONS, "input": _QUESTIONS}
    return {ours: name for ours, name in own.items() if name != ours and name not in usual.get(ours, ())}


def _kind(draft: Draft, key: str, kind: str, entry: Mapping[str, Any], table: dict[str, Any]) -> None:
    """The format of a source from axolotl's `type`, whose word after a dot or colon is a style of prompt."""
    name, _, style = kind.replace(":", ".").partition(".")
    if style and style != "default":
        draft.leave(f"{key}.type", kind, f"the style {as_shown('', style)}: the base's own template is taken")
    if name in ("chat_template", "sharegpt"):
        _turns(draft, key, entry, table, _LEGACY if name == "sharegpt" else _CHAT)
    elif name in ("alpaca", "alpaca_chat"):
        table["format"] = "alpaca"
        columns = {
            one: entry[f"field_{one}"]
            for one in ("instruction", "input", "output", "system")
            if f"field_{one}" in entry
        }
        if columns:
            table["columns"] = columns
    elif name in ("completion", "pretrain"):
        table["format"] = "text"
        column = entry.get("field") or entry.get("text_column") or "text"
        if column != "text":
            table["columns"] = {"text": column}
    elif name:
        draft.leave(f"{key}.type", kind, "this kind of rows is not known here: the format is told by the columns")
    else:
        draft.leave(f"{key}.type", "", "rows that are tokens already are not read: the format is told by the columns")


def _turns(
    draft: Draft, key: str, entry: Mapping[str, Any], table: dict[str, Any], names_there: tuple[str, str, str]
) -> None:
    """A source of chats. `names_there` are the kind's column and keys of a turn, where the entry says no others."""
    column, role_key, content_key = names_there
    field = entry.get("field_messages") or column
    mapped = entry.get("message_property_mappings")
    mapped = mapped if isinstance(mapped, Mapping) else {}
    role = mapped.get("role") or entry.get("message_field_role") or role_key
    content = mapped.get("content") or entry.get("message_field_content") or content_key
    told = _TURNS.get((role, content))
    if told is None:
        draft.leave(f"{key}.message_property_mappings", dict(mapped), "names of a turn's keys: told by the rows here")
        return
    own = "conversations" if told == "sharegpt" else "messages"
    table["format"] = told
    if field != own:
        table["columns"] = {own: field}
    if isinstance(tools := entry.get("field_tools"), str) and tools != "tools":
        table.setdefault("columns", {})["tools"] = tools
    if others := sorted(set(mapped) - {"role", "content"}):
        draft.leave(f"{key}.message_property_mappings", ", ".join(map(str, others)), "other keys of a turn have names")


def _files(draft: Draft, key: str, value: Any, path: str, table: dict[str, Any]) -> None:
    """`data_files`: local ones are the source; of a data set of the hub they are a choice that we have not."""
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    places = [local(draft, name) or local(draft, f"{path}/{name}") for name in found if isinstance(name, str)]
    if len(places) == 1 and places[0] is not None:
        table["path"] = str(places[0])
    else:
        draft.leave(f"{key}.data_files", value, "a choice of files: give each a [[data.train]] with its path")


def by_name(draft: Draft, key: str, value: Any) -> None:
    """LLaMA-Factory's `dataset`: names of its list, which lies in `dataset_dir`."""
    into = draft.eval_sources if key == "eval_dataset" else draft.sources
    try:
        wanted = names(value)[:MOST_SOURCES]
    except ValueError as error:
        draft.leave(key, value, str(error))
        return
    folder, listed = _info(draft)
    for name in wanted:
        entry = listed.get(name)
        if not isinstance(entry, Mapping):
            if local(draft, name) is not None or _HUB_NAME.fullmatch(name):
                into.append(source(draft, key, name))
                draft.note(key, f"a source of rows: path = {as_shown('path', into[-1]['path'])}")
            else:
                why = f"its list of names ({INFO}) is not here, or lacks it: add [[data.train]] with the path"
                draft.leave(key, name, why)
            continue
        into.append(_listed(draft, f"{key}.{name}", entry, folder))


def _info(draft: Draft) -> tuple[Path, Mapping[str, Any]]:
    for place in (draft.values.get("dataset_dir", "data"), "data", "."):
        found = local(draft, str(place))
        file = None if found is None else found / INFO
        if file is not None and file.is_file():
            try:
                return file.parent, foreign_json.load_object(file.resolve(), _INFO_BYTES)
            except foreign_json.ForeignFileError as error:
                draft.leave("dataset_dir", str(place), str(error))
    return draft.folder, {}


def _listed(draft: Draft, key: str, entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A source from an entry of LLaMA-Factory's list."""
    if isinstance(file := entry.get("file_name"), str):
        try:
            table: dict[str, Any] = {"path": str(files.inside(folder, file))}
        except files.UnsafePathError:
            table = source(draft, key, file)
    else:
        hub = entry.get("hf_hub_url")
        if not isinstance(hub, str):
            draft.leave(f"{key}", ", ".join(map(str, entry)), "its rows lie on another hub")
        table = source(draft, key, hub if isinstance(hub, str) else key, str(entry.get("split") or ""))
    form = entry.get("formatting", "alpaca")
    columns = entry.get("columns")
    tags = entry.get("tags")
    if compares := draft.values.get("train.objective", "sft") != "sft":
        named = columns if isinstance(columns, Mapping) else {}
        if renamed := _judged_columns({str(word): name for word, name in named.items()}):
            table["columns"] = renamed
        if others := sorted(map(str, set(named) - set(_JUDGED_COLUMNS) - {"history"})):
            draft.leave(f"{key}.columns", ", ".join(others), "columns that text has no use for")
    elif form in _INFO_COLUMNS:
        as_messages = form == "sharegpt" and isinstance(tags, Mapping) and tags.get("role_tag") == "role"
        table["format"] = "messages" if as_messages else str(form)
        named = columns if isinstance(columns, Mapping) else {}
        own = dict(_INFO_COLUMNS[str(form)])
        if as_messages:
            own["messages"] = "messages"
        renamed = {own[theirs]: column for theirs, column in named.items() if theirs in own and own[theirs] != column}
        if renamed:
            table["columns"] = renamed
        if others := sorted(set(named) - set(own)):
            draft.leave(f"{key}.columns", ", ".join(others), "columns that text has no use for")
    read = {"file_name", "hf_hub_url", "formatting", "columns", "tags", "split", *(("ranking",) if compares else ())}
    for name in sorted(set(entry) - read):
        draft.leave(f"{key}.{name}", entry[name], "has no counterpart in a source of rows")
    draft.note(
        key, f"a source of rows: {', '.join(f'{name} = {as_shown(name, item)}' for name, item in table.items())}"
    )
    return table


def named(draft: Draft, key: str, value: Any) -> None:
    """One data set, or a list of them, by path or hub name: TRL's and Unsloth's."""
    try:
        for name in [text(value)] if isinstance(value, str) else names(value):
            draft.sources.append(source(draft, key, name))
            draft.note(key, f"a source of rows: path = {as_shown('path', draft.sources[-1]['path'])}")
    except ValueError as error:
        draft.leave(key, value, str(error))


def adapter(draft: Draft, key: str, value: Any) -> None:
    """The folder of an adapter to begin with."""
    folder = local(draft, value) if isinstance(value, str) else None
    if folder is not None and folder.is_dir():
        draft.carry(key, "lora.from", str(folder))
    else:
        draft.leave(key, value, "is no folder here: lora.from names the run or adapter to begin with")
