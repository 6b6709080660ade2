"""`qlora-estimate`: answers without network and without weights, in seconds, as a table and as JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.cli import cards, estimate
from qlora.errors import HardwareError
from tests.floors import HEAVY
from tests.memory.shapes import config_folder

ROOT = Path(__file__).parent.parent.parent
KEYS = {"peak_bytes", "limit_bytes", "fits", "host_peak_bytes", "disk_bytes", "components", "settings"}
# Nothing may open a connection. What takes the time are imports, models that are drawn and operations of steps, each
# of them counted; what none of them needs is not imported.
COMMAND = """
import socket, sys
def refuse(*_): raise AssertionError("a connection")
socket.socket.connect = refuse
sys.argv = ["qlora-estimate", *sys.argv[1:]]
from qlora.cli import estimate
from qlora.memory import simulate
drawn, operations = [], []
draw, run = simulate._MetaModel.__init__, simulate._MetaModel.run
def counted(self, spec, layers, *others):
    drawn.append(layers)
    draw(self, spec, layers, *others)
    operations.append(self.live._operations)
def counted_run(self, *about):
    done = run(self, *about)
    operations.append(self.live._operations)
    return done
simulate._MetaModel.__init__, simulate._MetaModel.run = counted, counted_run
try:
    estimate.app()
finally:
    unneeded = [name for name in UNNEEDED if name in sys.modules]
    print("COUNTED", __import__("json").dumps([drawn, sum(operations), unneeded]), file=sys.stderr)
"""
# torch imports its own testing, and a configuration of transformers the tokenizers: those two cannot be spared.
UNNEEDED = (
    *("datasets", "pyarrow", "pandas", "matplotlib", "sklearn", "xllamacpp", "pypdfium2"),
    *(
        "torch._inductor.compile_fx",
        "qlora.training.loop",
        "qlora.export.pipeline",
        "qlora.study.study",
    ),
)
MOST_OPERATIONS = 21_000  # of a step of two short models and its self-check, 60 µs each: 20,160


def run_in_a_process(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"UNNEEDED = {UNNEEDED!r}\n{COMMAND}", *arguments]
    environment = {**os.environ, "QLORA_CACHE": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=180, env=environment)


def counted(done: subprocess.CompletedProcess[str]) -> tuple[list[int], int, list[str]]:
    """Layers of each model that was drawn, operations that were simulated, and what was imported without need."""
    drawn, operations, unneeded = json.loads(done.stderr.partition("COUNTED ")[2].splitlines()[0])
    return drawn, operations, unneeded


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, where everything is imported already; without a network."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(sys, "argv", ["qlora-estimate", *arguments])
        with pytest.raises(SystemExit) as end:
            estimate.app()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), out, err)

    return command


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 1),
        pytest.param("meta-llama/Llama-3.1-70B-Instruct", 4, marks=pytest.mark.slow),
    ],
)
def test_json_in_seconds(name: str, plans: int, tmp_path: Path) -> None:
    """Two short models, whatever the size, and two more where layers are streamed; one step of them a plan (where it
    fits as it is: one), and nothing twice."""
    folder = config_folder(name, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    done = run_in_a_process(tmp_path / "cache", str(folder), "--gpu", "RTX 4090", "--json")
    drawn, operations, unneeded = counted(done)
    assert drawn in ([3, 4], [3, 4] * 2) and 0 < operations <= plans * MOST_OPERATIONS and not unneeded
    answer = json.loads(done.stdout)
    assert set(answer) >= KEYS
    assert done.returncode == (0 if answer["fits"] else 3)
    assert sum(answer["components"].values()) == answer["peak_bytes"]
    again = run_in_a_process(tmp_path / "cache", str(folder), "--gpu", "RTX 4090", "--json")
    assert counted(again)[:2] == ([], 0) and again.stdout == done.stdout


@pytest.mark.slow
def test_the_table_the_search_and_the_exit_code(run: Run, tmp_path: Path) -> None:
    folder = str(config_folder("meta-llama/Llama-3.2-1B-Instruct", tmp_path))
    fitting = run(folder, "--vram", "6GiB", "--fit")
    assert fitting.returncode == 0, fitting.stderr
    assert fitting.stdout.startswith("limit 5.66 GiB: a card sold with 6 GB, less what its driver keeps")
    for word in ("weights", "activations", "peak", "limit", "it fits", "the fastest first", "[train]"):
        assert word in fitting.stdout, fitting.stdout
    too_large = run(folder, "--vram", "512MiB")
    assert too_large.returncode == 3 and "it does not fit" in too_large.stdout
    assert too_large.stderr.startswith("error: needs ") and "Traceback" not in too_large.stderr


def test_a_card_that_torch_cannot_use_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> None:
        raise HardwareError("GeForce GTX 1080: computes no bf16", "hide it")

    monkeypatch.setattr(cards, "settle", refused)
    model = str(config_folder("meta-llama/Llama-3.2-1B-Instruct", tmp_path))
    (note,) = (note for note in json.loads(run(model, "--json").stdout)["notes"] if "GTX 1080" in note)
    assert "a run on the CPU" in note
    assert "GTX 1080" not in run(model, "--gpu", "RTX 4090", "--json").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gpu", "RTX 9999"),
        ("--gpu", "RTX 4060 Ti"),
        ("--gpu", "Arc A770"),
        ("--vram", "lots"),
        ("--plot", "/nowhere/at/all.png"),
    ],
)
def test_what_needs_no_model_to_be_wrong_is_refused_before_imports(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['qlora-estimate', 'owner/name', *{arguments!r}]\n"
        "from qlora.cli.estimate import app\n"
        "try:\n    app()\n"
        "except SystemExit as end:\n    assert end.code == 2, end.code\n"
        f"heavy = {HEAVY | {'matplotlib'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 2 and done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "RTX 9999"), "not in the table of GPUs"),
        (("--gpu", "RTX 4090", "--vram", "8GiB"), "both name the limit"),
        (("--vram", "lots"), "is not a size"),
        (("--set", "lora.rank=3"), "lora.r"),
    ],
)
def test_wrong_questions_are_told_in_two_lines(run: Run, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run(str(config_folder("meta-llama/Llama-3.2-1B-Instruct", tmp_path)), *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_folder_without_a_configuration_and_a_name_without_network(run: Run, tmp_path: Path) -> None:
    for what in (str(tmp_path), "owner/never-seen"):
        done = run(what, "--vram", "8GiB")
        assert done.returncode == 2 and done.stderr.count("\n") >= 2 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_picture_or_the_line_that_says_what_is_missing(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "peak.png"
    folder = str(config_folder("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path))
    done = run(folder, "--vram", "64GiB", "--plot", str(picture))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert done.returncode == 2 and 'pip install "qlora[plot]"' in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_line_of_a_picture_goes_up_with_the_length_of_rows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where "auto" recomputes only long rows, their peak would be lower than that of shorter ones."""
    drawn: list[dict[int, tuple[int, int]]] = []
    limits: list[tuple[str, int]] = []

    def draw(peaks: dict[int, tuple[int, int]], asked: tuple[str, int], *_: object) -> None:
        drawn.append(peaks)
        limits.append(asked)

    monkeypatch.setattr("qlora.report.picture.draw_lengths", draw)
    monkeypatch.setattr("qlora.report.picture.find_spec", lambda _: "as if installed")
    monkeypatch.setattr(estimate, "PLOT_LENGTHS", (512, 4096))
    folder = str(config_folder("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path))
    done = run(folder, "--vram", "4GB", "--plot", str(tmp_path / "peak.png"), "--json")
    assert done.returncode == 0, done.stderr
    (short, long) = drawn[0].values()
    assert short[0] < long[0] and limits == [
        ("a card sold with 4 GB, less what its driver keeps (3.81 GiB)", json.loads(done.stdout)["limit_bytes"])
    ]


def test_an_estimate_begins_without_torch_s_compiler() -> None:
    """It comes with attention over documents (`torch.nn.attention.varlen`), which a processor does not use."""
    code = "import sys\nfrom qlora.memory import estimate\nsys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
