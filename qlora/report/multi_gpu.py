"""How the cards of one run are drawn: each one's share of a step, what it needs and what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora.report.memory import bar
from qlora.units import counted, gib, layers_of

BAR_WIDTH = 16


def card_line(number: int, card: Mapping[str, Any]) -> str:
    """ "0: RTX 3090, 24 GB: 75% of a step, 12 packs in micro-batches of 4; needs 9.80 of 23.69 GiB"."""
    settings = card["settings"]
    recomputed = layers_of(settings["train.gradient_checkpointing"])
    packs = f"{counted(card['packs_of_step'], 'pack')} in micro-batches of {settings['train.micro_batch_size']}"
    needs = f"needs {gib(card['needed_bytes'])} of {gib(card['limit_bytes'])}"
    return f"{number}: {card['card']}: {card['share']:.0%} of a step, {packs}, {recomputed} recomputed; {needs}"


def card_lines(cards: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(card_line(number, card) for number, card in enumerate(cards))


def multi_gpu_view(whole: Mapping[str, Any]) -> RenderableType:
    """`whole` is what `qlora-estimate --json` prints of several cards."""
    table = Table.grid(padding=(0, 2))
    titles = ("", "card", "share", "needed", "free", "", "micro-batch", "alone")
    table.add_row(*(Text(title, style="dim") for title in titles))
    for number, card in enumerate(whole["cards"]):
        needed, limit = card["needed_bytes"], card["limit_bytes"]
        left = Text(gib(limit - needed)) if needed <= limit else Text(f"-{gib(needed - limit)}", style="bold red")
        speed = card["tokens_per_second_alone"]
        cells = (Text(str(number)), Text(card["card"]), Text(f"{card['share']:.0%}"), Text(gib(needed)), left)
        drawn = Text(bar(needed, max(needed, limit), BAR_WIDTH), style="green" if needed <= limit else "red")
        rows = Text(str(card["settings"]["train.micro_batch_size"]))
        table.add_row(*cells, drawn, rows, Text(f"{speed:,.0f} tokens/s" if speed else ""))
    names = [card["card"] for card in whole["cards"] if not card["fits"]]
    verdict = Text(f"{', '.join(dict.fromkeys(names))} cannot hold its part" if names else "it fits", style="bold")
    verdict.stylize("red" if names else "green")
    lines = [Text(line, style="dim") for line in _details(whole)]
    return Group(Text(_title(whole), style="bold"), Text(""), table, Text(""), verdict, *lines)


def _title(whole: Mapping[str, Any]) -> str:
    how = "each keeps a part of every layer" if whole["sharded"] else "each keeps the whole base"
    return f"{len(whole['cards'])} cards, {whole['batch_size']} packs a step; {how}"


def _details(whole: Mapping[str, Any]) -> list[str]:
    first = whole["cards"][0]["components"]
    of = ", ".join(f"{name} {gib(count)}" for name, count in first.items())
    lines = [f"of it      on card 0: {of}"]
    if speed := whole["tokens_per_second"]:
        exchange = 1000 * whole["exchange_seconds"]
        moved = f"{gib(whole['gradient_bytes_exchanged'])} of gradients are added up in {exchange:,.1f} ms"
        lines.append(f"speed      {speed:,.0f} tokens/s predicted of all together; once a step {moved}")
    lines += [f"because    card {card}: {key}: {why}" for card, key, why in whole.get("reasons", ())]
    return [*lines, *(f"note       {note}" for note in whole.get("notes", ()))]
