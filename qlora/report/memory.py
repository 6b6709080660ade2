"""How an estimate is drawn: a table with bars, and plans that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora.units import gib

BAR_WIDTH = 24
FULL, EIGHTHS = "█", " ▏▎▍▌▋▊▉"
MEANINGS = {
    "weights": "the frozen base",
    "adapters": "what is trained",
    "gradients": "summed in float32",
    "optimizer": "master copies and moments",
    "activations": "kept for the backward pass",
    "logits": "of one chunk of tokens",
    "workspace": "dequantized weights, kernels, gaps",
    "context": "driver and libraries",
}


def bar(value: float, full: float, width: int = BAR_WIDTH) -> str:
    """`value` of `full` as a bar of at most `width` characters, to an eighth of one."""
    eighths = min(width * 8, max(0, round(value / full * width * 8))) if full > 0 else 0
    return FULL * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def estimate_view(estimate: Mapping[str, Any]) -> RenderableType:
    """`estimate` is what `--json` prints; the first line says what the limit is, and where it comes from."""
    peak, error, limit = estimate["peak_bytes"], estimate["error_bytes"], estimate["limit_bytes"]
    full = max(peak + error, limit)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=11)
    table.add_column(no_wrap=True, min_width=10, justify="right")
    table.add_column(style="green", no_wrap=True, min_width=BAR_WIDTH)
    table.add_column(style="dim")
    for name, count in estimate["components"].items():
        table.add_row(Text(name), gib(count), bar(count, full), MEANINGS.get(name, ""))
    table.add_row("peak", Text(gib(peak), style="bold"), Text(bar(peak, full), style="bold"), "the best guess")
    table.add_row("margin", gib(error), bar(error, full), "what past errors earned")
    table.add_row("limit", gib(limit), bar(limit, full), "")
    first = Text(f"limit {gib(limit)}: {estimate['limit_source']}", style="bold")
    return Group(first, Text(""), table, Text(""), verdict(peak + error, limit), *_details(estimate))


def verdict(needed: int, limit: int) -> Text:
    """`needed` is the peak with its margin."""
    if needed <= limit:
        return Text(f"it fits: {gib(limit - needed)} are left", style="bold green")
    return Text(f"it does not fit: {gib(needed - limit)} are missing", style="bold red")


def _details(estimate: Mapping[str, Any]) -> list[Text]:
    phases = " · ".join(f"{name} {gib(count)}" for name, count in estimate["phases"].items())
    settings = ", ".join(f"{key} = {value}" for key, value in estimate["settings"].items())
    lines = [
        f"phases    {phases}",
        f"host      {gib(estimate['host_peak_bytes'])} of RAM; {gib(estimate['disk_bytes'])} of disk",
        f"settings  {settings}",
    ]
    if line := speed_line(estimate):
        lines.append(f"speed     {line}")
    lines += [f"because   {key}: {why}" for key, why in estimate.get("reasons", {}).items()]
    lines += [f"note      {note}" for note in estimate["notes"]]
    return [Text(line, style="dim") for line in lines]


def speed_line(estimate: Mapping[str, Any]) -> str:
    """What is predicted of the step, and what nothing could exceed; "" without a card to predict it of."""
    speed, ideal = estimate["tokens_per_second"], estimate["tokens_per_second_ideal"]
    if not speed:
        return ""
    line = f"{speed:,.0f} tokens/s predicted on such a card; arithmetic alone would allow {ideal:,.0f}"
    parts = estimate["speed"] or {"seconds": {}, "host_bound": False}
    waits = parts["seconds"].get("of_it_waiting_for_copies", 0)
    if waits:
        everything = sum(value for name, value in parts["seconds"].items() if not name.startswith("of_it"))
        line += f"; {waits / everything:.0%} of the time waits for copies over PCIe"
    return line + ("; starting its kernels takes longer than running them" if parts["host_bound"] else "")


def plans_view(plans: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Plans that fit, the fastest first, and the lines of the recipe that the first one changes."""
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(title, style="dim") for title in ("", "peak", "margin", "predicted", "recipe change")))
    for number, plan in enumerate(plans, 1):
        estimate = plan["estimate"]
        speed = estimate["tokens_per_second"]
        lines = ", ".join(plan["lines"]) or "none: it fits as it is"
        peak, margin = gib(estimate["peak_bytes"]), gib(estimate["error_bytes"])
        table.add_row(str(number), peak, margin, f"{speed:,.0f} tokens/s" if speed else "", Text(lines))
    return table
