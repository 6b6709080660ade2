"""Processes that we start: none executes what lies in the current folder, and none outlives us."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora import child_process
from qlora.data.render import Renderer, request_of

PACKAGE = Path(child_process.__file__).parent
# Modules that every child imports, of the standard library, of others and of ours: any of them would be a trap.
TRAPS = (
    *("random", "json", "torch", "numpy", "transformers", "safetensors", "gguf", "ctypes", "tempfile", "runpy"),
    *("qlora", "jinja2", "sitecustomize", "usercustomize", "pydantic", "typing_extensions", "bitsandbytes"),
)
CHILDREN = {
    "qlora.export.verify.weights_child": "request.json",
    "qlora.export.llama_cpp.runtime_child": "request.json",
    "qlora.cli.train": "--help",
}


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of modules that leave a marker when one of them is executed; the marker."""
    folder, marker = tmp_path / "traps", tmp_path / "marker"
    folder.mkdir()
    for name in TRAPS:
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write({name!r})\nraise SystemExit(99)\n")
    (folder / "request.json").write_text("{}")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", str(folder), str(PACKAGE.parent))))
    return marker


@pytest.mark.parametrize("module", CHILDREN)
def test_a_child_executes_nothing_of_the_current_folder(module: str, traps: Path) -> None:
    sys.path.insert(0, os.getcwd())  # as it stands in ours when we were started with -m
    try:
        command = child_process.command(module, CHILDREN[module])
    finally:
        del sys.path[0]
    with child_process.life_line() as line:
        done = subprocess.run(command, stdin=line, capture_output=True, text=True, timeout=120)
    assert not traps.exists(), traps.read_text()
    assert done.returncode != 99 and "No module named" not in done.stderr, done.stderr
    if module == "qlora.cli.train":
        assert done.returncode == 0 and "Usage" in done.stdout


def test_the_template_worker_executes_nothing_of_the_current_folder(
    traps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    renderer = Renderer(["{{ messages }}"], {})
    assert renderer.render(request_of(0, {"messages": "answered"})).text == "answered"
    assert not traps.exists(), traps.read_text()


def test_the_current_folder_leaves_the_path_unless_packages_lie_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", ".", "relative", str(Path.cwd()), "/somewhere/else", *sys.path])
    monkeypatch.chdir("/somewhere" if Path("/somewhere").exists() else "/")
    assert "/" not in child_process.import_path() and "/somewhere/else" in child_process.import_path()
    site = next(entry for entry in sys.path if entry.endswith("site-packages"))
    monkeypatch.chdir(site)
    assert site in child_process.import_path()
    monkeypatch.chdir(PACKAGE.parent)
    assert str(PACKAGE.parent) in child_process.import_path()


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed, and cannot tell its child anything."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import os, sys, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    code = (
        f"import subprocess, sys; sys.path.insert(0, {str(tmp_path)!r}); from qlora import child_process as c\n"
        "with c.life_line() as line: subprocess.run(c.command('sleeper'), stdin=line)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=PACKAGE.parent)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(200):  # up to 10 s: nobody else reaps it for us, so a zombie counts as ended
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child went on")


def test_nothing_else_starts_a_process() -> None:
    """Each call of subprocess stands in a file that builds its command line with `child_process`, or isolates it."""
    allowed = {"nvidia.py", "export/child.py", "cli/verify_resume.py", "data/render.py", "data/parquet.py"}
    allowed |= {"data/row_workers.py", "doctor/trial.py", "export/llama_cpp/live.py"}
    allowed |= {"prove/resume.py", "data/documents/parser.py", "rewards/child.py"}
    for path in PACKAGE.rglob("*.py"):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                starts = (owner == "subprocess") or (
                    owner == "os" and node.func.attr.startswith(("exec", "spawn", "system", "popen", "posix_spawn"))
                )
                assert not starts or name in allowed, f"{name}:{node.lineno}"
