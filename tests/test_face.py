"""The package as others see it: the names of `import qlora`, their types, and what lies in a wheel."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

import qlora
from qlora import errors, events, version

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_there() -> None:
    for name in qlora.__all__:
        assert getattr(qlora, name) is not None
        assert name in dir(qlora)
    assert len(set(qlora.__all__)) == len(qlora.__all__)
    assert qlora.__version__ == version.__version__


def test_all_errors_and_all_events_are_public() -> None:
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    emitted = {
        name for name, value in vars(events).items() if isinstance(value, type) and issubclass(value, events.Event)
    }
    assert raised | emitted <= set(qlora.__all__)
    assert all(dataclasses.is_dataclass(getattr(qlora, name)) for name in emitted)


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, qlora; assert not {'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(qlora, "trainer")


def test_a_wheel_holds_the_types_and_the_pages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"qlora-{version.__version__}-py3")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"qlora/py.typed", "qlora/README.md", "qlora/CHANGES.md", "qlora/version.py"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "qlora").rglob("*.py")}
    assert modules <= names
