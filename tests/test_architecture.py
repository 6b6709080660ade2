"""Imports go down the floors only, heavy packages stay out of the commands' start, no stranger's code runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import conftest
from tests.floors import FLOORS, HEAVY, LINES, MODULES, PACKAGE, ROOT


def imports_of(path: Path) -> Iterator[str]:
    """Every `qlora` module that a file imports, wherever in the file, types included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "qlora")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qlora":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                as_path = PACKAGE.parent / full.replace(".", "/")
                yield full if as_path.with_suffix(".py").is_file() or as_path.is_dir() else str(node.module)


def place(module: str) -> tuple[str, ...]:
    """("model", "load") for qlora.model.load, ("export", "gguf", "vocab") for qlora.export.gguf.vocab."""
    return tuple(module.split(".")[1:]) or ("",)


def stands_before(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether `other` may import `one`: on a lower floor, or earlier on the line of the room that they share."""
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    if shared == 0:
        ground = [LINES[""].index(place[0]) for place in (one, other) if place[0] in LINES[""]]
        return FLOORS[one[0]] < FLOORS[other[0]] or (len(ground) == 2 and ground[0] < ground[1])
    if shared == len(one):  # a package itself: its __init__ holds nothing
        return True
    line = LINES[".".join(one[:shared])]
    return line.index(one[shared]) < line.index(other[shared])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for imported in imports_of(path):
        assert stands_before(place(imported), here), (
            f"{path.relative_to(ROOT)} imports {imported}, which is not before it"
        )


def test_every_module_has_a_place_on_its_line() -> None:
    for path in MODULES:
        *rooms, name = path.relative_to(PACKAGE).with_suffix("").parts
        assert name in (LINES[".".join(rooms)] if rooms else FLOORS), path


@pytest.mark.parametrize(
    "command", ["train", "export", "estimate", "exam", "evaluate", "chat", "prove", "data", "doctor", "report"]
)
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['qlora', '--help']\n"
        f"from qlora.cli.{command} import app\n"
        "try:\n    app()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called == name:
                    yield path, node


def test_only_safe_ways_to_read_files() -> None:
    """No pickle, no torch.load, and transformers is always told not to run a stranger's code."""
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        assert "import pickle" not in source
        assert "torch.load(" not in source and "torch.save(" not in source, path
    for name in ("from_pretrained", "from_config"):
        for path, call in calls(name):
            said = {keyword.arg: keyword.value for keyword in call.keywords}
            value = said.get("trust_remote_code")
            assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{call.lineno}"


# Where a library works on a stranger's file: what it raises there is caught by one helper, `errors.foreign_failures`.
FOREIGN = [
    *("ask/harness.py", "ask/transport.py"),  # a server goes on whatever an answer fails with
    *("data/arrow_worker.py", "data/documents/worker.py"),
    *("data/light_tokenizer.py", "data/light_tokenizer.py", "data/offsets.py"),
    *("data/parquet_worker.py", "data/parquet_worker.py", "data/parquet_worker.py"),
    *("data/render_worker.py", "data/token_cache.py"),
    *("doctor/caches.py", "doctor/checkup.py", "doctor/checkup.py", "doctor/stages.py"),
    *("export/gguf/vocab.py", "export/verify/plain_open.py", "hub.py", "hub_calls.py", "memory/question.py"),
    *("model/adapters.py", *["model/attention_choice.py"] * 3, "model/compiled.py"),
    *("model/family_facts.py", "model/family_facts.py", "model/linear_use.py"),
    *("model/lora_structure.py", "model/lora_structure.py", "model/lora_structure.py"),
    *("model/meta_model.py", "model/meta_model.py", "model/mixtures.py", "model/mixtures.py", "model/nf4.py"),
    *("model/precision.py", "model/rms_norms.py", "model/rotary.py"),
    *("model/tokenizer.py", "model/weight_names.py", "prove/suite.py"),
    *("report/sinks.py", "report/trackers.py", "rewards/worker.py", "rewards/worker.py"),
    *("step/kernels/trial.py", "training/memory_plan.py"),
]


def _keeps_all(handler: ast.ExceptHandler) -> bool:
    """Whether it catches whatever is raised; to tidy up and raise it again is no catch."""
    kind = None if handler.type is None else ast.unparse(handler.type)
    raised = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    return kind in (None, "Exception") or (kind == "BaseException" and not raised)


def test_one_broad_except_and_no_global() -> None:
    """And beside the command line's, that of the helper for libraries that work on a stranger's file."""
    broad = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler) and _keeps_all(node):
                broad.append(f"{path.relative_to(PACKAGE)}")
    assert broad == ["cli/common.py", "errors.py"]
    assert [str(path.relative_to(PACKAGE)) for path, _ in calls("foreign_failures")] == FOREIGN


def test_nothing_outside_report_and_cli_prints() -> None:
    for path, call in calls("print"):
        assert path.relative_to(PACKAGE).parts[0] in ("cli", "report"), f"{path}:{call.lineno}"


# What asks a device for more than a CPU has: in one module, so that a second device is a second module.
DEVICE_NAMES = ("torch.cuda", "torch.Stream", "torch.Event", "torch.accelerator")


def test_only_the_device_module_calls_the_device() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and path.name != "device.py":
                asks = ast.unparse(node) in DEVICE_NAMES or node.attr in ("pin_memory", "record_stream")
                assert not asks, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_what_code_cites_is_a_rule_of_the_page() -> None:
    """A citation reads `(qlora/README.md, packed documents)`: the page ships with the package and has the rule."""
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    rules = set(re.findall(r"^- \*\*([^*]+)\*\*:", page, re.MULTILINE))
    assert {"token-weighted accumulation", "packed documents"} <= rules
    others = (path for room in ("tests", "tools") for path in (ROOT / room).rglob("*.py") if path != Path(__file__))
    for path in (*MODULES, *others):
        text = " ".join(path.read_text(encoding="utf-8").replace("#", " ").split())
        for cited in re.findall(r"qlora/README\.md, ([^).;:\"`]+)", text):
            assert cited in rules, f"{path.relative_to(ROOT)}: {cited}"
    for path in MODULES:
        assert not re.search(r"\bDESIGN\b", path.read_text(encoding="utf-8")), f"{path}: cites what does not ship"


# --- no broad except in disguise -------------------------------------------------------------------------------------

# From this many classes on, a handler means "whatever it raises": `errors.foreign_failures` says so.
MANY = 6


def classes_in(kind: ast.expr, tuples: dict[str, ast.Tuple]) -> int:
    """How many classes `except kind` names, tuples that have a name of their own counted by what is in them."""
    if isinstance(kind, ast.Starred):
        return classes_in(kind.value, tuples)
    if isinstance(kind, ast.Name | ast.Attribute):
        named = tuples.get(ast.unparse(kind))
        return classes_in(named, tuples) if named else 1
    return sum(classes_in(part, tuples) for part in kind.elts) if isinstance(kind, ast.Tuple) else 1


def test_no_handler_enumerates_what_may_be_raised() -> None:
    found = set()
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        given = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)]
        tuples = {ast.unparse(node.targets[0]): node.value for node in given if isinstance(node.value, ast.Tuple)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node.type and (count := classes_in(node.type, tuples)) >= MANY:
                found.add(f"{path.relative_to(PACKAGE)}:{count}")
    assert found == set()


def test_the_longest_test_files_are_there() -> None:
    assert all((ROOT / name).is_file() for name in conftest.LONGEST)


# Whole commands of a shell, which a message or a written file may quote wherever it is made.
SHELL = re.compile(r"qlora-train --schema|llama-cli |ollama show |pip install|--upgrade|--query-|--format=csv")


def test_messages_below_the_commands_name_no_option() -> None:
    """A caller of the Python API has no `--resume`: messages say mode='resume', which `cli.common` makes an option."""
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            below = path.relative_to(PACKAGE).parts[0] != "cli" and id(node) not in docstrings
            if below and not SHELL.search(text):
                assert not re.search(r"(?<![\w-])--[a-z]", text), f"{path.relative_to(ROOT)}:{node.lineno}: {text}"


# --- each module has its file of tests -------------------------------------------------------------------------------


def test_the_tests_of_a_module_stand_in_the_file_of_its_name() -> None:
    """qlora/data/chat.py has tests/data/test_chat.py; of an inner room the test may stand in the outer one's folder."""
    for path in MODULES:
        *rooms, name = path.relative_to(PACKAGE).with_suffix("").parts
        folders = [ROOT.joinpath("tests", *rooms), ROOT.joinpath("tests", *rooms[:1])]
        assert any((folder / f"test_{name}.py").is_file() for folder in folders), path.relative_to(ROOT)


def test_what_test_files_share_stands_in_no_test_file() -> None:
    """A file whose tests move takes nothing with it that others import."""
    for path in (ROOT / "tests").rglob("*.py"):
        imported = re.findall(r"(?m)^from tests\.(?:\w+\.)*(test_\w+) import", path.read_text(encoding="utf-8"))
        assert imported == [], path
