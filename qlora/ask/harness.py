"""A model handed to lm-evaluation-harness (EleutherAI), so that "did it forget?" has a number that others know.

The harness is an extra: where it is not installed, that is said before a weight is read. It gets the model as it is
held here, base in 4 bit and adapter included, and the tokenizer that it was trained with. Tasks are its own by name, or
those of a folder or file of yours (YAML beside its rows), which need no network and may not bring code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora import files
from qlora.ask.opened import TorchModel
from qlora.errors import ExportError, foreign_failures
from qlora.events import Notice, Sink

PACKAGE = "lm_eval"
MOST_TASKS = 100
MOST_FILES = 1_000  # of a folder of tasks
MAX_TASK_BYTES = 1_000_000
_ELSEWHERE = re.compile(r"(?m)^[\s\"']*include[\"'\s]*:.*(?:[/\\]|\.\.)")


def check_installed() -> None:
    """Raises ExportError where the harness is not there."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ExportError("lm-evaluation-harness is not installed", 'pip install "qlora[eval]" brings it')


def split_tasks(text: str) -> tuple[list[str], list[Path]]:
    """ "arc_easy,mine/task.yaml" as names, and the folders in which to look for tasks beside the harness' own.

    Raises ExportError for a file or folder that is not there or holds no task.
    """
    names, folders = [], []
    for part in filter(None, (part.strip() for part in text[:10_000].split(","))):
        path = Path(part).expanduser()
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise ExportError(f"{path}: no such task", "name a YAML file of a task, or a task of the harness")
            names.append(_task_of(path))
            folders.append(path.resolve().parent)
        elif path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
            if not found:
                raise ExportError(f"{path}: holds no task (.yaml)", "name a YAML file of a task, or its folder")
            names += map(_task_of, found)
            folders.append(path.resolve())
        else:
            names.append(part)
    if not 1 <= len(names) <= MOST_TASKS:
        raise ExportError(f"{len(names)} tasks are named", f"name 1 to {MOST_TASKS}, with commas between them")
    return names, list(dict.fromkeys(folders))


def _task_of(file: Path) -> str:
    """The name that a task's file gives it: its line `task: NAME`. Raises ExportError for one that brings code."""
    for beside in sorted((*file.parent.rglob("*.yaml"), *file.parent.rglob("*.yml")))[:MOST_FILES]:
        text = _text(beside)
        if "!function" in text:
            what = f"{beside}: runs Python code of its own (!function)"
            raise ExportError(what, "name tasks that are data alone, or run lm_eval itself on what you trust")
        if _ELSEWHERE.search(text):
            raise ExportError(f"{beside}: includes a file of another folder", "put that file beside it")
    for line in _text(file).splitlines():
        key, _, value = line.partition(":")
        if key == "task" and value.strip():
            return value.split("#")[0].strip().strip("\"'")
    raise ExportError(f"{file}: has no line `task: NAME`", "name a YAML file of a task of lm-evaluation-harness")


def _text(file: Path) -> str:
    try:
        return files.read_bytes(file, MAX_TASK_BYTES).decode("utf-8", "replace")
    except (OSError, files.UnsafePathError) as error:
        raise ExportError(f"{file}: cannot be read ({error})", "name a YAML file of a task") from error


Tasks = tuple[Sequence[str], Sequence[Path]]  # names, and folders in which to look for them


def run(opened: TorchModel, tasks: Tasks, limit: int | None, sink: Sink) -> dict[str, Any]:
    """Each task's figures: metric, value, its standard error, and rows. `limit`: rows of a task at most.

    Raises ExportError for a task that the harness does not know or cannot read, in its own words.
    """
    names, folders = tasks
    sink.emit(Notice("harness", f"{PACKAGE} {importlib.metadata.version(PACKAGE)}: {', '.join(names)}", len(names)))
    with foreign_failures() as failure:
        found = _evaluate(opened, list(names), list(folders), limit)
    if failure.error:
        what = f"lm-evaluation-harness: {failure.reason}"
        raise ExportError(what, "name tasks that it knows (lm_eval ls tasks) and whose rows are here or can be loaded")
    return {task: _figures(values, found["n-samples"].get(task)) for task, values in found["results"].items()}


def _evaluate(opened: TorchModel, names: list[str], folders: list[Path], limit: int | None) -> Any:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    causal = opened.model.get_base_model() if opened.adapter is not None else opened.model
    tokenizer = opened.chat.tokenizer
    model = HFLM(pretrained=causal, tokenizer=tokenizer, max_length=opened.context, batch_size=1)
    manager = TaskManager(include_path=[str(folder) for folder in folders] or None)
    return lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=manager, limit=limit, log_samples=False, verbosity="ERROR"
    )


def _figures(values: dict[str, Any], samples: dict[str, int] | None) -> dict[str, Any]:
    """Of "acc,none" and "acc_stderr,none": the metric `acc` with its value and standard error."""
    found: dict[str, Any] = {"rows": None if samples is None else samples.get("effective"), "metrics": {}}
    for key, value in values.items():
        metric, comma, by = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        error = values.get(f"{metric}_stderr,{by}")
        name = metric if by == "none" else f"{metric} ({by})"
        is_number = isinstance(error, int | float) and math.isfinite(error)
        found["metrics"][name] = {"value": float(value), "stderr": float(error) if is_number else None}  # type: ignore[arg-type]
    return found
