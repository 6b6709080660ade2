"""The lines of what was tried: the cause decides the command."""

from __future__ import annotations

import pytest

from qlora.doctor import tried
from qlora.doctor.finding import Colour
from qlora.doctor.requirements import Installed, Requirement
from qlora.doctor.trial import Trial
from tests.doctor.cases import only, trials

INSTALLED = Installed((Requirement("torch", ">=2.10,<2.14"), Requirement("bitsandbytes", ">=0.50")), {})


def test_a_well_machine_is_green_and_says_so_in_one_line_a_subject() -> None:
    found = tried.findings(trials(), INSTALLED)
    assert {one.colour for one in found} == {Colour.GREEN}
    assert [one.name for one in found] == [
        *("libraries", "bf16", "bitsandbytes", "NF4", "paged memory", "locked memory", "llama.cpp")
    ]


@pytest.mark.parametrize(
    ("failure", "mend"),
    [
        ("ModuleNotFoundError: No module named 'torch'", 'pip install "torch>=2.10,<2.14"'),
        ("ModuleNotFoundError: No module named 'sympy'", 'pip install "sympy"'),
        ("ImportError: libcudart.so.13: cannot open", 'pip install --force-reinstall --no-cache-dir "torch>=2.10'),
        ("OSError: [WinError 126] The specified module", "Visual C++ Redistributable"),
        ("it crashed (SIGILL)", "needs a newer processor"),
        ("it crashed (SIGSEGV)", "--force-reinstall"),
        ("it did not end within 120 seconds", "try again"),
    ],
)
def test_the_cause_decides_the_command(failure: str, mend: str) -> None:
    found = only(tried.findings(trials(torch=failure), INSTALLED), "torch")
    assert found.colour == Colour.RED and failure in found.said and mend in found.mend


def test_what_needs_a_broken_one_is_not_called_broken() -> None:
    broken = trials(bitsandbytes="OSError: libbitsandbytes_cuda130.so")
    broken["nf4"] = Trial("nf4", needs="bitsandbytes")
    found = tried.findings(broken, INSTALLED)
    assert only(found, "bitsandbytes").colour == Colour.RED and "bitsandbytes>=0.50" in only(found, "bitsandbytes").mend
    nf4 = only(found, "NF4")
    assert (nf4.colour, nf4.mend) == (Colour.YELLOW, "mend what is said of bitsandbytes")


@pytest.mark.parametrize(
    ("answers", "name", "colour"),
    [
        ({"bf16": {"apart": 0.5}}, "bf16", Colour.RED),
        ({"bf16": {"apart": float("nan")}}, "bf16", Colour.RED),
        ({"nf4": {"apart": 0.2, "values": 4, "bytes": 2}}, "NF4", Colour.RED),
        ({"nf4": {"apart": 0.0, "values": 4, "bytes": 4}}, "NF4", Colour.RED),
        ({"nf4": "RuntimeError: CUDA error: no kernel image"}, "NF4", Colour.RED),
        ({"paged": {"why_not": "this driver cannot page", "on_card": True}}, "paged memory", Colour.YELLOW),
        ({"paged": {"wrong": 5, "bytes": 9, "on_card": True}}, "paged memory", Colour.RED),
        ({"paged": {"wrong": 0, "bytes": 9, "on_card": True}}, "paged memory", Colour.GREEN),
        ({"paged": "it crashed (SIGABRT): cudaMallocManaged"}, "paged memory", Colour.RED),
        ({"pinned": {"pinned": False, "locked": True, "limit": -1}}, "locked memory", Colour.YELLOW),
        ({"pinned": {"pinned": None, "locked": False, "limit": 0}}, "locked memory", Colour.YELLOW),
        ({"pinned": {"pinned": None, "locked": None, "limit": None}}, "locked memory", Colour.GREEN),
        ({"llama_cpp": {"package": None}}, "llama.cpp", Colour.YELLOW),
        ({"llama_cpp": "ExportError: not a usable ggml"}, "llama.cpp", Colour.YELLOW),
    ],
)
def test_each_answer_has_its_colour(answers: dict[str, object], name: str, colour: Colour) -> None:
    found = only(tried.findings(trials(**answers), INSTALLED), name)  # type: ignore[arg-type]
    assert found.colour == colour and bool(found.mend) is (colour != Colour.GREEN)
