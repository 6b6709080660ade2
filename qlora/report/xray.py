"""A look at rows on the terminal: tokens in their colours, counts as tables, warnings with what mends them.

Readable without colours: what is trained stands between « and » there. Takes what `Seen.as_dict` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

from qlora import shown
from qlora.report import ahead
from qlora.report.figures import names_of
from qlora.units import counted

TRAINED, MASKED = "bold green", "dim"
LEVELS = {"wrong": "bold red", "harm": "yellow", "note": "cyan"}
MAX_SHOWN = 400  # tokens of a row
_BAR = 40
_COUNTED = ("page", "passage", "sentence")


def tokens_view(drawn: Sequence[Mapping[str, Any]], max_length: int, coloured: bool) -> RenderableType:
    """The packs that are drawn, a rule between them, and a line before each row in them."""
    key = Text.assemble(("trained", TRAINED), "  ", ("only read", MASKED)) if coloured else Text("«trained»  only read")
    parts: list[RenderableType] = [key]
    for pack in drawn:
        if pack["documents"] > 1:
            title = f"pack {pack['number']:,}: {pack['documents']:,} rows, {pack['tokens']:,} of {max_length:,} tokens"
            parts.append(Rule(Text(title), style="dim", align="left"))
        else:
            parts.append(Rule(style="dim"))
        for row in pack["rows"]:
            parts.append(Text(f"{row['where']}: {row['tokens']:,} tokens, {row['trained']:,} trained", style="cyan"))
            parts.append(_row(row, coloured))
    return Group(*parts)


def _row(row: Mapping[str, Any], coloured: bool) -> Text:
    pieces = row["pieces"][:MAX_SHOWN]
    text = Text(overflow="fold")
    for number, piece in enumerate(pieces):
        words = readable(piece["text"])
        if coloured:
            text.append(words, TRAINED if piece["trained"] else MASKED)
            continue
        before = number > 0 and pieces[number - 1]["trained"]
        text.append("«" * (piece["trained"] and not before) + "»" * (before and not piece["trained"]) + words)
    if not coloured and pieces and pieces[-1]["trained"]:
        text.append("»")
    left = row["tokens"] - sum(len(piece["ids"]) for piece in pieces)
    if left > 0:
        text.append(f" … {left:,} more tokens", "cyan")
    return text


def readable(text: str) -> str:
    """A token's text with its control characters as symbols, a line break as a symbol and a line break."""
    return shown.block(text).replace("\t", "\u2409\t").replace("\n", "\u21b5\n")


def sources_view(sources: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A line a source, and below it why rows of it are left out."""
    keys = ("rows", "cut", "dropped", "rejected", "tokens", "trained")
    table = Table(Column("source", overflow="fold", min_width=8), box=None, pad_edge=False, header_style="dim")
    for key in keys:
        figures = max((len(f"{source[key]:,}") for source in sources), default=0)
        table.add_column("rows used" if key == "rows" else key, justify="right", min_width=max(4, figures))
    reasons = []
    for name, source in zip(names_of([one["path"] for one in sources]), sources, strict=True):
        counts = (f"{source[key]:,}" for key in keys)
        table.add_row(Text(f"{name} ({source['side']})"), *counts)
        for reason in source["reasons"]:
            where = f": {', '.join(reason['examples'])}" if reason["examples"] else ""
            reasons.append(Text(f"{name}: {reason['count']:,} left out, {reason['reason']}{where}"))
    return Group(table, *reasons)


def documents_view(documents: Mapping[str, Any]) -> RenderableType:
    """A line a file, what was left out, and how many questions will be asked."""
    table = Table(Column("document", overflow="fold", min_width=8), box=None, pad_edge=False, header_style="dim")
    for key in ("pages", "language", "passages"):
        table.add_column(key, justify="right", min_width=len(key))
    for one in documents["files"]:
        table.add_row(Text(one["path"]), f"{one['pages']:,}", Text(one["language"]), f"{one['passages']:,}")
    said = [*(f"left out: {line}" for line in _left_out(documents)), asked(documents), *ahead.lines(documents["ahead"])]
    return Group(table, *map(Text, said))


def _left_out(documents: Mapping[str, Any]) -> list[str]:
    return [*documents["left_out"], *(line for one in documents["files"] for line in one["left_out"])]


def asked(documents: Mapping[str, Any]) -> str:
    """What will be asked of the documents, for screen and page."""
    there = {"document": len(documents["files"])} | {thing: documents[f"{thing}s"] for thing in _COUNTED}
    found = ", ".join(counted(count, thing) for thing, count in there.items())
    return f"{found}: up to {counted(documents['questions'], 'question')} will be asked; {documents['takes']}"


def study_view(study: Mapping[str, Any]) -> RenderableType:
    """What a study gave: figures, rows as they are learnt, and what was dropped with its reasons."""
    parts: list[RenderableType] = [Rule(Text("study"), style="dim", align="left"), *map(Text, study_lines(study))]
    for one in study["examples"]:
        parts.append(Text.assemble(("learnt  ", "green"), pair(one)))
    for lost in study["dropped"]:
        parts.append(Text(f"{lost['count']:,} dropped: {lost['said']}", "yellow"))
        parts += [Text(f"    {pair(one)}", MASKED) for one in lost["examples"]]
    for sentence in study["without"]:
        parts.append(Text(f"no question about: {sentence}"))
    return Group(*parts)


def study_lines(study: Mapping[str, Any]) -> list[str]:
    """The figures of a study as sentences, for screen and page."""
    share = study["with_question"] / max(1, study["sentences"])
    return [
        f"{counted(study['rows'], 'row')} to learn, {study['questions']:,} of them new questions alone; "
        f"{study['known']:,} of the good questions are known to the base already",
        f"coverage: {share:.0%} of {study['sentences']:,} sentences have a question",
        f"{study['exam']:,} questions are kept for the exam, and {study['left_out']:,} on sentences left out",
        f"all of it is in {study['folder']}; the run goes on from there",
    ]


def pair(one: Mapping[str, Any]) -> str:
    """A question with its answer, and what gave the reason why it is dropped."""
    answer = f" → {one['answer']}" if one["answer"] else ""
    return f"{one['question']}{answer}" + (f"  ({one['detail']})" if one["detail"] else "")


def lengths_view(bars: Sequence[Mapping[str, Any]], max_length: int) -> RenderableType:
    """Rows by their tokens; a rule stands where data.max_length is."""
    bars = [bar for bar in bars if bar["rows"] or not bar["over"]]
    while bars and not bars[-1]["rows"] and not bars[-1]["over"]:
        bars.pop()
    most = max((bar["rows"] for bar in bars), default=0) or 1
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="crop")
    limit = Text(f"─── data.max_length = {max_length:,}", style="red")
    over = False
    for bar in bars:
        if bar["over"] and not over:
            table.add_row("", "", limit)
            over = True
        upto = f"{bar['least']:,}–{bar['most']:,}" if bar["most"] else f"{bar['least']:,}–"
        length = round(_BAR * bar["rows"] / most) or int(bar["rows"] > 0)
        table.add_row(upto, f"{bar['rows']:,}", Text("█" * length, "red" if bar["over"] else "green"))
    if not over:
        table.add_row("", "", limit)
    return table


def facts_view(seen: Mapping[str, Any]) -> RenderableType:
    """What is counted over all rows, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for name, value in facts(seen):
        table.add_row(name, Text(value))
    return table


def facts(seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of what is counted over all rows, for screen and page."""
    train, packing, serving = seen["train"], seen["packing"], seen["serving"]
    share = train["trained"] / train["tokens"]
    yield "train on", f"{train['rows']:,} rows, {train['tokens']:,} tokens, {train['trained']:,} trained ({share:.1%})"
    if seen["eval"]:
        asked = seen["eval"]
        yield "evaluate", f"{asked['rows']:,} rows, {asked['tokens']:,} tokens, {asked['trained']:,} trained"
    yield "longest row", f"{train['longest']:,} tokens, {train['longest_at']}"
    full = f"{packing['packs']:,} packs of {seen['max_length']:,} tokens, {packing['share']:.1%} full"
    yield "packing", full if packing["on"] else "off, a row each"
    yield "end token trained", f"in {train['ended']:,} of {train['rows']:,} rows"
    if train["bos"] is None:
        yield "BOS", "the tokenizer has none"
    else:
        none, one, more = train["bos"]
        yield "BOS", f"none in {none:,} rows, one in {one:,}, several in {more:,}"
    if serving["compared"]:
        same = serving["compared"] - len(serving["differ"])
        yield "prompt as served", f"in {same:,} of {serving['compared']:,} rows compared"
    yield "copies", f"{train['copies']['count']:,} the same as an earlier row, {_alike(train)}"
    if seen["leaks"]:
        leaks = {name: found["count"] for name, found in seen["leaks"].items()}
        yield (
            "evaluation rows in training",
            f"{leaks['rows']:,} to the token, {leaks['questions']:,} by their question, {leaks['answers']:,} by their "
            f"answer, {leaks['inside']:,} by their answer inside a text",
        )


def _alike(train: Mapping[str, Any]) -> str:
    at_least = "" if train["all_compared"] else "at least "
    of = "" if train["compared"] == train["rows"] else f" of the first {train['compared']:,}"
    return f"{at_least}{train['alike']['count']:,} nearly{of}"


def warnings_view(warnings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The worst first, each with its fix."""
    if not warnings:
        return Text("nothing to warn of", style="green")
    parts: list[RenderableType] = []
    for one in warnings:
        parts.append(Text.assemble((f"{one['level']:<5} ", LEVELS[one["level"]]), one["what"]))
        parts.append(Text(f"      {one['fix']}", style="dim"))
        if one["examples"]:
            parts.append(Text("      " + ", ".join(" like ".join(places) for places in one["examples"]), style="dim"))
    return Group(*parts)


def show(console: Console, seen: Mapping[str, Any]) -> None:
    """All of it, in the order in which it is read: rows, sources, lengths, counts, and last what is wrong."""
    coloured = console.is_terminal and not console.no_color
    console.print(tokens_view(seen["drawn"], seen["max_length"], coloured))
    console.print(Rule(style="dim"))
    console.print(sources_view(seen["sources"]))
    console.print(lengths_view(seen["lengths"], seen["max_length"]))
    console.print()
    console.print(facts_view(seen))
    console.print()
    console.print(warnings_view(seen["warnings"]))
