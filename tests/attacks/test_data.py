"""Data files from strangers: whatever lies under a data file's name is read as rows, or refused; never run."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import qlora
from qlora.data import readers, text_pieces
from qlora.data.prepare import check_files
from qlora.data.row_json import RowTooLong
from qlora.data.sources import read_rows
from qlora.errors import DataError
from qlora.recipe.sections import DataSection, SourceSection
from tests.attacks import payloads as p

MODULES = sorted(Path(qlora.__file__).parent.rglob("*.py"))
Make = Callable[[Path, Path], Path]  # (folder, marker) to the path that a recipe names


def written(name: str, data: Callable[[Path], bytes]) -> Make:
    def make(folder: Path, marker: Path) -> Path:
        (folder / name).write_bytes(data(marker))
        return folder / name

    return make


def script(folder: Path, marker: Path) -> Path:
    """A data set as a loading script, as older versions of `datasets` ran them."""
    p.python_file(folder, marker, "rows")
    return folder


def pipe(folder: Path, marker: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def device(folder: Path, marker: Path) -> Path:
    (folder / "rows.jsonl").symlink_to("/dev/zero")
    return folder / "rows.jsonl"


def loop_of_links(folder: Path, marker: Path) -> Path:
    (folder / "rows.jsonl").symlink_to(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def folder_of_pipes(folder: Path, marker: Path) -> Path:
    pipe(folder, marker)
    return folder


ATTACKS: dict[str, Make] = {
    **{
        f"pickle as .{ending}": written(f"rows.{ending}", p.exploit)
        for ending in ("jsonl", "json", "csv", "tsv", "parquet", "txt", "pkl", "pickle", "arrow", "pt", "npy")
    },
    "pickle 0 as .jsonl": written("rows.jsonl", lambda marker: p.exploit(marker, 0)),
    "torch zip as .parquet": written("rows.parquet", p.torch_zip),
    "a zip": written("rows.zip", p.torch_zip),
    "a Python file": written("rows.py", lambda marker: f"import os; os.system('touch {marker}')".encode()),
    "a folder with a loading script": script,
    "a pipe": pipe,
    "a device": device,
    "a loop of links": loop_of_links,
    "a folder of pipes": folder_of_pipes,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_in_two_lines_and_nothing_ran(tmp_path: Path, name: str) -> None:
    folder, marker = tmp_path / "data", tmp_path / "marker"
    folder.mkdir()
    path = ATTACKS[name](folder, marker)
    with pytest.raises(DataError) as refused:
        check_files(DataSection(train=(SourceSection(path=str(path)),)))
    assert refused.value.hint and "\n" not in refused.value.what + refused.value.hint
    assert not marker.exists()


def test_a_parquet_file_brings_no_types_of_its_own(tmp_path: Path) -> None:
    """CVE-2023-47248: an extension type that unpickles itself when its schema is read."""
    import pyarrow
    import pyarrow.parquet

    marker = tmp_path / "marker"
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": p.exploit(marker),
    }
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=metadata)])
    pyarrow.parquet.write_table(pyarrow.table([["hello"]], schema=schema), tmp_path / "rows.parquet")
    rows = [item.row for item in read_rows(SourceSection(path=str(tmp_path / "rows.parquet")))]
    assert rows == [{"text": "hello"}] and not marker.exists()


def test_rows_without_an_end_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (readers, text_pieces):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 20)
    long = b'{"text": "' + b"x" * 3_000_000 + b'"}'
    good = b'{"text": "good"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, long, good]))
    rows = list(read_rows(SourceSection(path=str(tmp_path / "a.jsonl"))))
    assert [(row.where, str(row.row)) for row in rows] == [
        ("a.jsonl:1", "{'text': 'good'}"),
        ("a.jsonl:2", "over 1 MiB in one line"),
        ("a.jsonl:3", "{'text': 'good'}"),
    ]
    (tmp_path / "a.json").write_bytes(b"[" + good + b",\n" + long + b",\n" + good + b"]")
    (tmp_path / "a.txt").write_bytes(long)
    (tmp_path / "a.csv").write_bytes(b"text\n" + b"x" * 3_000_000 + b"\ngood\n")
    (tmp_path / "b.csv").write_bytes(b"text\n" + b'"' + b"x\n" * 1_500_000 + b'"\ngood\n')
    too_long = [
        ("a.json", ["good", "over 1 MiB in one row", "good"]),
        ("a.txt", ["over 1 MiB in one line"]),
        ("a.csv", ["over 1 MiB in one row", "good"]),
        ("b.csv", ["over 1 MiB in one row"]),  # and then its other lines, until the quote closes
    ]
    for name, expected in too_long:
        found = [item.row for item in read_rows(SourceSection(path=str(tmp_path / name)))][: len(expected)]
        assert [row["text"] if isinstance(row, dict) else row.reason for row in found] == expected
        assert any(isinstance(row, RowTooLong) for row in found)


def test_nothing_but_our_own_readers_opens_data() -> None:
    """No builder of `datasets` (its pandas one unpickles, CVE-2026-57845), no script, no pandas, no numpy.load. One
    module runs a user's code, in a process of its own: the rewards that the command line names."""
    runs_code = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                name = called.rpartition(".")[2]
                assert name not in ("load_dataset", "load_dataset_builder", "read_pickle", "read_csv", "literal_eval")
                assert called not in ("eval", "numpy.load", "np.load", "marshal.loads", "__import__"), path
                runs_code |= {path} if called == "exec" else set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pandas", "pickle", "marshal", "shelve", "dill", "joblib"} & set(names), path
    assert [path.parts[-2:] for path in runs_code] == [("rewards", "worker.py")]


def test_only_the_hubs_module_and_the_lock_know_the_network() -> None:
    """The lock asks for this machine's name and opens no socket; a shell is asked by nobody.

    What serves a model reads the connections of this machine's own programs: it listens on 127.0.0.1 and calls nobody.
    """
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        imported = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([alias.name for alias in node.names] + [getattr(node, "module", None) or ""])
        }
        network = imported & {"socket", "requests", "httpx", "urllib", "urllib.request", "http.client", "aiohttp"}
        assert not network or path.name in ("lock.py", "transport.py"), (path, network)
        assert "create_connection" not in source and ".connect(" not in source, path
        # Model cards are text that the library formats; only ModelCard's own upload would use the network.
        cards = path.name == "cards.py" and imported & {"ModelCard", "ModelCardData"} and ".push_to_hub" not in source
        assert "huggingface_hub" not in imported or path.name in ("hub.py", "hub_calls.py") or cards, path
        assert "shell=True" not in source and "os.system(" not in source and "os.popen(" not in source
