"""`qlora-export`: what it prints, and what a user can get wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli import cards, export
from qlora.errors import ExportError, HardwareError
from tests.cli.cases import expect_two_lines, run
from tests.export.cases import KINDS, edit, trained
from tests.push_hub import TOKEN, USER, PushHub, an_export, push_hub

__all__ = ["push_hub"]


def test_export_of_nothing(tmp_path: Path) -> None:
    expect_two_lines(run(str(tmp_path / "none"), cwd=tmp_path, module="export"), "no such folder")


def test_a_card_that_torch_cannot_use_is_refused_as_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> None:
        raise HardwareError("a card is here that torch can't use", "install a driver")

    monkeypatch.setattr(cards, "settle", refused)
    with pytest.raises(HardwareError, match="a card is here"):
        export._run(Path("none"), {}, {}, as_json=True)


@pytest.mark.slow
def test_the_command_prints_json(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    edit(tmp_path / "adapter" / "qlora.json", base="/home/anna/models/llama")  # it comes from another machine
    command = [sys.executable, "tools/merge_and_export.py", str(tmp_path / "adapter"), "--to", "gguf", "--quant", "f16"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "--no-verify"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and "--base-model" in done.stderr and "recipe" not in done.stderr
    command += ["--no-verify", "--json", "--base-model", str(llama)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["merge_base"] == "nf4" and said["choice"] is None and said["products"][0]["format"] == "gguf-f16"
    assert Path(said["products"][0]["folder"]).is_dir()


def test_a_name_that_the_hub_has_not_is_refused_before_anything_is_imported(tmp_path: Path) -> None:
    for name in ("a/b/c", "https://huggingface.co/a/b", "a--b", ".x", "x.git", "a b", "ü", ""):
        with pytest.raises(ExportError, match="is no name of a repository"):
            export._run([tmp_path], {"push": name}, {}, as_json=True)
    code = (
        "import sys\n"
        "from qlora.cli import export\n"
        "from qlora.errors import ExportError\n"
        "try:\n    export._run([], {'push': 'a/b/c'}, {}, True)\n"
        "except ExportError:\n    assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(ExportError, match="are for a push"):
        export._run([tmp_path], {"public": True}, {}, as_json=True)


def test_the_command_pushes_what_is_there(
    tmp_path: Path, push_hub: PushHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = an_export(tmp_path / "hf")
    export._run([folder], {"push": "support", "to": [], "quants": [], "merge_base": "auto"}, {"verify": True}, True)
    told = json.loads(capsys.readouterr().out)["push"]
    assert told["commit"] == push_hub.repos[f"{USER}/support"].head and told["url"].endswith(f"/{USER}/support")
    for request, chosen, name in (
        ({"to": ["gguf"]}, {}, "to"),
        ({}, {"verify": False}, "verify"),
        ({}, {"dtype": "f16"}, "dtype"),
    ):
        with pytest.raises(ExportError, match=f"is pushed as it is, and `{name}` is of one that is made"):
            export._run([folder], {"push": "support", **request}, chosen, True)
    asked = {"push": "open", "public": True}
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # no terminal: nobody is asked
    with pytest.raises(ExportError, match="everybody may read"):
        export._run([folder], dict(asked), {}, True)
    terminal = io.StringIO("n\ny\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    with pytest.raises(ExportError, match="you did not agree"):
        export._run([folder], dict(asked), {}, True)
    export._run([folder], dict(asked), {}, True)
    assert not push_hub.repos[f"{USER}/open"].private and "Push it? [y/N] " in capsys.readouterr().err
    export._run([folder], {"push": "second", "public": True, "yes": True}, {}, True)


@pytest.mark.slow
def test_the_command_ends_with_the_right_code(
    tmp_path: Path, push_hub: PushHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(an_export(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", push_hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    expect_two_lines(run(folder, "--push", "support", cwd=tmp_path, module="export"), "does not accept your token")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, error, _ = run(folder, "--push", "support", "--json", cwd=tmp_path, module="export")
    assert code == 0 and json.loads(out)["push"]["there_already"] == 0, error
    done = run(folder, "--push", "open", "--public", cwd=tmp_path, module="export")
    expect_two_lines(done, "everybody may read")
    assert "--yes" in done[2] and "`" not in done[2]
