"""The peak, drawn: a column a layer, parts told apart without colours, the limit and the peak marked, at any width."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from qlora.report.explained import PARTS, explained_view

GIB = 1 << 30


def moment(phase: str, layer: int | None, activations: float) -> dict[str, Any]:
    kinds = {"weights": 4 * GIB, "optimizer": GIB, "activations": int(activations * GIB), "context": GIB}
    return {"phase": phase, "layer": layer, "bytes": kinds}


def explained(layers: int) -> dict[str, Any]:
    up = [moment("forward", at, at / layers) for at in range(layers)]
    down = [moment("backward", at, 2 * at / layers) for at in range(layers - 1, -1, -1)]
    whole = [moment("load", None, 0), *up, moment("loss", None, 1), *down, moment("update", None, 0)]
    change = {
        "lines": ["train.gradient_checkpointing = true"],
        "saved_bytes": GIB,
        "fits": True,
        "tokens_per_second": 9,
    }
    return {
        "moments": whole,
        "peak_at": layers + 2,
        "changes": [change, {**change, "saved_bytes": -GIB, "fits": False}],
    }


def lines(width: int, layers: int = 12, limit: int = 9 * GIB) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(explained_view(explained(layers), limit))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("layers", [3, 12, 80, 126])
def test_no_line_is_wider_than_the_screen_and_the_peak_is_marked(width: int, layers: int) -> None:
    drawn = lines(width, layers)
    assert max(map(len, drawn)) <= width
    (mark,) = (line for line in drawn if "▼" in line)
    at = mark.index("▼")
    below = next(line for line in drawn[drawn.index(mark) + 1 :] if "│" in line and len(line) > at and line[at] != " ")
    assert below[at] == next(part.letter for part in PARTS if part.categories == ("activations",))
    assert drawn[0].startswith(f"the peak stands in the backward, layer {layers - 1}: ")


def test_parts_lie_on_each_other_from_the_base_up() -> None:
    drawn = [line[11:] for line in lines(80) if "│" in line or "┤" in line]
    column = [line[15] for line in drawn]  # the first of the backward pass
    letters = [part.letter for part in PARTS]
    order = [letters.index(letter) for letter in column[::-1] if letter in letters]
    assert order == sorted(order) and set(order) == {0, 1, 2, 3}
    assert column.count("█") / len([one for one in column if one in letters]) == pytest.approx(0.5, abs=0.1)


def test_the_limit_is_where_it_is() -> None:
    drawn = lines(80)
    (limit,) = (line for line in drawn if "┤" in line)
    assert limit.strip().startswith("9.00 GiB┤") and "─" in limit
    low = next(line for line in lines(80, limit=5 * GIB) if "┤" in line)
    assert "█" not in low.partition("┤")[2][:3] or low.strip().startswith("5.00 GiB┤")


def test_phases_changes_and_their_verdict_are_listed() -> None:
    text = "\n".join(lines(80))
    for words in ("forward, layer 11", "backward, layer 11", "1 load", "loss", "1.00 GiB less", "1.00 GiB more"):
        assert words in text
    assert "9 tokens/s" in text and "does not fit" in text
