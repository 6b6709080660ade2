"""What proofs found, as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

STYLES = {"held": "green", "broken": "bold red", "not here": "dim"}


def proofs_view(found: Mapping[str, Any]) -> RenderableType:
    """`found` is what `prove.report.as_dict` gives: a line a proof, and what it was tried on."""
    columns = (Column("promise", no_wrap=True), Column("", no_wrap=True), Column("found", ratio=1), Column("seconds"))
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[3].justify = "right"
    for proof in found["proofs"]:
        outcome = Text(proof["outcome"], style=STYLES[proof["outcome"]])
        table.add_row(Text(proof["name"]), outcome, Text(proof["said"]), f"{proof['seconds']:.1f}")
    hardware, model, count = found["hardware"], found["model"], found["outcomes"]
    what = f"a random {model['shape']} model in NF4, {model['rows']} x {model['length']:,} tokens"
    kinds = ", ".join(f"{number} {name}" for name, number in count.items() if number)
    return Group(table, Text(f"{hardware['device']}, {what}: {kinds}, in {found['seconds']:,.0f} seconds"))
