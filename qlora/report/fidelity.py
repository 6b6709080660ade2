"""How near a run's exports are to its model, as a table on the screen."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from qlora import events
from qlora.report.figures import human_bytes


def fidelity_table(fidelity: events.Fidelity) -> RenderableType:
    """How near each export is to the trained model, a line each, and who measured which."""
    figures = ("mean KL, nats", "perplexity", "same token", "size")
    columns = [Column("", no_wrap=True), *(Column(name, justify="right", no_wrap=True) for name in figures)]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    by: dict[str, list[str]] = {}
    for entry in fidelity.entries:
        by.setdefault(entry["measured_by"], []).append(entry["name"])
        table.add_row(
            Text(entry["name"]),
            "0" if entry["kl"] == 0 else f"{entry['kl']:.1e}",
            f"{entry['perplexity']:.4f}",
            f"{entry['top1']:.1%}",
            human_bytes(entry["bytes"]) if entry["bytes"] else "",
        )
    counted = f"{fidelity.positions:,} tokens of {fidelity.rows:,} {fidelity.texts}"
    measured = "; ".join(f"{', '.join(names)} by {who}" for who, names in by.items())
    heading = Text(f"how near to the trained model, on {counted}", style="bold")
    lines = [Text(f"measured: {measured}", style="dim")]
    if (loss := fidelity.evaluation) is not None:
        compared = f"{loss['here']:.4f} nats a token here, {loss['delivered']:.4f} as the run delivered it"
        lines.append(Text(f"the trained model's loss on {loss['rows']:,} evaluation rows: {compared}", style="dim"))
    return Group(heading, table, *lines)
