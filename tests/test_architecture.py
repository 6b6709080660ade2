"""Imports go down the floors only, heavy packages stay out of the commands' start, no stranger's code runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qlora"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

# The house: a module may import what stands on a lower floor, and of its own room what stands before it on its line.
FLOORS = {
    "cli": 8,
    "api": 7,
    "training": 6,
    "export": 5,
    "memory": 5,
    "model": 4,
    "data": 4,
    "hub": 3,
    "report": 3,
    "run_folder": 3,
    "step": 2,
    "recipe": 2,
    "events": 2,
    "disk": 2,
    "stop": 2,
    "errors": 1,
    "batch": 1,
    "lock": 1,
    "redaction": 1,
    "third_party": 1,
    "version": 1,
    "device": 1,
    "": 0,  # qlora/__init__.py: the public face, which imports when it is asked
}
HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate", "pyarrow"}
LINES = {
    "cli": ["common", "verify_resume", "train", "export", "estimate"],
    "training": [
        *("memory_use", "schedule", "checkpoint", "saving", "best_adapter", "evaluate", "selfcheck"),
        *("health", "recovery", "exam", "probe", "memory_plan", "step_batches", "loop"),
    ],
    "export": [
        *("merge", "staging", "llama_cpp", "versions", "imatrix", "gguf", "hf", "artifacts"),
        *("verify", "ollama", "cards", "pipeline"),
    ],
    "export.merge": ["parts", "merge"],
    "export.llama_cpp": ["library", "runtime_child", "runtime"],
    "export.verify": ["streamed", "fidelity", "weights_child", "weights", "reference", "checks"],
    "export.gguf": [
        *("probes", "pretokenizer", "spm", "special", "vocab", "rope", "architectures", "metadata"),
        *("encode", "quant_mixes", "plan", "write", "lora"),
    ],
    "memory": [
        "allocator",
        "trace",
        "baselines",
        "simulate",
        "hardware",
        "overheads",
        "calibration",
        "estimate",
        "plan",
    ],
    "model": [
        *("tokenizer", "config_filter", "tensors", "base_folder", "adapter_folder", "resolve", "nf4", "cpu_matmul"),
        *("attention", "meta_model", "load", "adapters", "generate"),
    ],
    "data": [
        *("formats", "sources", "hub_rows", "render_worker", "render", "template", "chat"),
        *("packing", "token_cache", "prepare", "loader"),
    ],
    "step": ["loss", "forward", "optimizer"],
    "recipe": ["sections", "problems", "reading", "pins"],
    "report": ["files", "memory", "console"],
}


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
        return FLOORS[one[0]] < FLOORS[other[0]]
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


@pytest.mark.parametrize("command", ["train", "export", "estimate"])
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
    *("data/render_worker.py", "model/adapters.py", "model/meta_model.py", "model/nf4.py", "model/tokenizer.py"),
    "training/memory_plan.py",
]


def test_one_broad_except_and_no_global() -> None:
    """And beside the command line's, that of the helper for libraries that work on a stranger's file."""
    broad = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
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
