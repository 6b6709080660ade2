"""A notebook for tests without a kernel: what IPython would show, by the output's `display_id`."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Page:
    """The outputs of a cell, in their order; `updates` counts what was sent."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.updates = 0

    def display(self, bundle: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        place = len(self.outputs)
        self.outputs.append(bundle)
        self.updates += 1

        def update(bundle: dict[str, str], raw: bool) -> None:
            assert raw
            self.outputs[place] = bundle
            self.updates += 1

        return SimpleNamespace(update=update)

    @property
    def text(self) -> str:
        return "".join(output["text/plain"] for output in self.outputs)

    @property
    def html(self) -> str:
        return "".join(output["text/html"] for output in self.outputs)


def open_notebook(patch: pytest.MonkeyPatch, kernel: Any = "a kernel") -> Page:
    """From here on a kernel runs us; without `kernel`, IPython's terminal does."""
    page, ipython, shown = Page(), ModuleType("IPython"), ModuleType("IPython.display")
    shell = SimpleNamespace(kernel=kernel) if kernel is not None else SimpleNamespace()
    vars(ipython).update(get_ipython=lambda: shell, display=shown)
    vars(shown).update(display=page.display)
    patch.setitem(sys.modules, "IPython", ipython)
    patch.setitem(sys.modules, "IPython.display", shown)
    return page
