"""A model handed to lm-evaluation-harness (EleutherAI), so that "did it forget?" has a number that others know.

The harness is an extra: where it is not installed, that is said before a weight is read. It gets the model as it is
held here, base in 4 bit and adapter included, and the tokenizer that it was trained with. Tasks are its own by name, or
those of a folder or file of yours (YAML beside its rows), which need no network and may not bring code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora import foreign_json, foreign_yaml
from qlora.ask.opened import TorchModel
from qlora.errors import ExportError, foreign_failures
from qlora.events import Notice, Sink

PACKAGE = "lm_eval"
MOST_TASKS = 100
MOST_FILES = 1_000  # of a folder of tasks


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
    """The name that a task's file gives it: its key `task`. Raises ExportError for one that brings code.

    The harness reads all that lie in the folder, so that each is looked at.
    """
    there = sorted((*file.parent.rglob("*.yaml"), *file.parent.rglob("*.yml")))
    if len(there) > MOST_FILES:
        raise ExportError(
            f"{file.parent}: holds more than {MOST_FILES:,} YAML files", "put the task beside its rows alone"
        )
    found = {path: _data_alone(path) for path in there}
    name = found[file].get("task")
    if not isinstance(name, str) or not name.strip():
        raise ExportError(f"{file}: has no line `task: NAME`", "name a YAML file of a task of lm-evaluation-harness")
    return name.strip()


def _data_alone(file: Path) -> dict[str, Any]:
    """A task's file. Raises ExportError for tags, which name Python functions, and for parts from elsewhere."""
    try:
        table = foreign_yaml.load_table(file, str(file))
    except foreign_json.ForeignFileError as error:
        hint = "name tasks that are data alone, or run lm_eval itself on what you trust"
        raise ExportError(str(error), hint) from error
    for name in _included(table):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith((".yaml", ".yml")):
            raise ExportError(f"{file}: includes what is no YAML file beside it", "put that file beside it, as .yaml")
    return table


def _included(value: Any) -> Iterator[Any]:
    """What the values of `include` name, at any depth: one, or several."""
    if isinstance(value, list):
        for item in value:
            yield from _included(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "include":
                yield from item if isinstance(item, list) else (item,)
            yield from _included(item)


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
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # A task's templates are a stranger's: the harness renders them in a plain environment, in which they reach Python.
    plain = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(loader=plain.loader, undefined=plain.undefined)
    sandbox.filters.update(plain.filters)
    lm_eval.utils.env = sandbox
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
