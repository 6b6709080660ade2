"""A look at rows as a page: the figures first, then what is wrong, then the rows themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora.report import ahead
from qlora.report.figures import names_of
from qlora.report.page import Element, card, classed, element, page, table
from qlora.report.xray import asked, facts, pair, readable, study_lines

LEVELS = {"wrong": "spoils the run", "harm": "makes it worse", "note": "good to know"}
_BAR_HEIGHT, _GAP, _LEFT, _WIDE, _RIGHT = 16, 5, 92, 420, 66  # of the histogram, in its own units


def page_of(answer: Mapping[str, Any]) -> str:
    """The whole page: the `recipe`'s name, the `base`, the `rows` as `Seen.as_dict` gives them with their `warnings`,
    the `documents` and their `study`; None where there are none.
    """
    base = answer["base"].replace("\\", "/").rstrip("/")
    named = base if base.count("/") == 1 else base.rpartition("/")[2]
    title = element("h1", f"What {answer['recipe']} shows the model")
    sections = [element("section", title, classed("p", "dim", f"base: {named}"))]
    if answer["documents"] is not None:
        sections.append(_documents(answer["documents"]))
    if answer["study"] is not None:
        sections.append(_study(answer["study"]))
    if answer["rows"] is not None:
        sections += _of_rows(answer["rows"])
    return page(f"{answer['recipe']}: rows", *sections)


def _of_rows(seen: Mapping[str, Any]) -> list[Element]:
    return [
        classed("div", "cards", *_cards(seen)),
        element("section", element("h2", "What to mend"), *_warnings(seen["warnings"])),
        element("section", element("h2", "Rows, token by token"), *_rows(seen["drawn"], seen["max_length"])),
        element("section", element("h2", "Sources"), *_sources(seen["sources"])),
        element("section", element("h2", "Lengths"), _histogram(seen["lengths"], seen["max_length"])),
        element("section", element("h2", "Counted over all rows"), table(("", ""), list(facts(seen)))),
    ]


def _documents(documents: Mapping[str, Any]) -> Element:
    rows = [[one["path"], f"{one['pages']:,}", one["language"], f"{one['passages']:,}"] for one in documents["files"]]
    left_out = [*documents["left_out"], *(line for one in documents["files"] for line in one["left_out"])]
    shown = [element("h3", "Left out"), element("ul", *(element("li", line) for line in left_out))] if left_out else []
    made = table(("document", "pages", "language", "passages"), rows)
    said = [element("p", line) for line in (asked(documents), *ahead.lines(documents["ahead"]))]
    return element("section", element("h2", "Documents"), *said, made, *shown)


def _study(study: Mapping[str, Any]) -> Element:
    learnt = table(("asked", "answer"), [[one["question"], one["answer"]] for one in study["examples"]])
    parts = [element("h2", "Study"), *(element("p", line) for line in study_lines(study)), learnt]
    for lost in study["dropped"]:
        parts.append(element("h3", f"{lost['count']:,} dropped: {lost['said']}"))
        parts.append(element("ul", *(element("li", pair(one)) for one in lost["examples"])))
    if study["without"]:
        parts += [element("h3", "Sentences without a question, some of them")]
        parts.append(element("ul", *(element("li", sentence) for sentence in study["without"])))
    return element("section", *parts)


def _cards(seen: Mapping[str, Any]) -> Iterator[Element]:
    train = seen["train"]
    yield card(f"{train['rows']:,}", "rows to train on")
    yield card(f"{seen['eval']['rows'] if seen['eval'] else 0:,}", "rows to evaluate")
    yield card(f"{train['tokens']:,}", "tokens")
    yield card(f"{train['trained'] / train['tokens']:.1%}", "of them trained")
    if seen["packing"]["on"]:
        yield card(f"{seen['packing']['share']:.1%}", f"full: {seen['packing']['packs']:,} packs")
    yield card(f"{sum(one['dropped'] + one['rejected'] for one in seen['sources']):,}", "rows left out")


def _warnings(warnings: Sequence[Mapping[str, Any]]) -> Iterator[Element]:
    if not warnings:
        yield element("p", "Nothing.")
    for one in warnings:
        examples = [element("p", element("code", " like ".join(places))) for places in one["examples"]]
        what = element("p", classed("span", "tag", LEVELS[one["level"]]), one["what"])
        yield classed("div", f"said {one['level']}", what, classed("p", "dim", one["fix"]), *examples)


def _rows(drawn: Sequence[Mapping[str, Any]], max_length: int) -> Iterator[Element]:
    trained, read = classed("span", "token on", "trained"), classed("span", "token", "only read")
    yield element("p", classed("span", "key", trained), classed("span", "key", read))
    for pack in drawn:
        if pack["documents"] > 1:
            said = f"pack {pack['number']:,}: {pack['documents']:,} rows, {pack['tokens']:,} of {max_length:,} tokens"
            yield classed("p", "border dim", said)
        for row in pack["rows"]:
            title = f"{row['where']}: {row['tokens']:,} tokens, {row['trained']:,} trained"
            yield classed("div", "row", element("small", title), classed("pre", "tokens", *_tokens(row), dir="auto"))


def _tokens(row: Mapping[str, Any]) -> Iterator[Element | str]:
    for piece in row["pieces"]:
        ids = " ".join(map(str, piece["ids"]))
        name = "token on" if piece["trained"] else "token"
        yield classed("span", name, readable(piece["text"]), title=ids)
    left = row["tokens"] - sum(len(piece["ids"]) for piece in row["pieces"])
    if left > 0:
        yield f" … {left:,} more tokens"


def _sources(sources: Sequence[Mapping[str, Any]]) -> Iterator[Element]:
    keys = ("rows", "cut", "dropped", "rejected", "tokens", "trained")
    names = names_of([one["path"] for one in sources])
    rows = [[name, one["side"], *(f"{one[key]:,}" for key in keys)] for name, one in zip(names, sources, strict=True)]
    yield table(("source", "for", "rows used", *keys[1:]), rows)
    reasons = [
        [name, f"{reason['count']:,}", reason["reason"], element("code", ", ".join(reason["examples"]))]
        for name, one in zip(names, sources, strict=True)
        for reason in one["reasons"]
    ]
    if reasons:
        yield element("h3", "Left out")
        yield table(("source", "rows", "because", "for example"), reasons)


def _histogram(bars: Sequence[Mapping[str, Any]], max_length: int) -> Element:
    shown = [bar for bar in bars if bar["rows"] or not bar["over"]]
    most = max((bar["rows"] for bar in shown), default=0) or 1
    step, drawn, over, y = _BAR_HEIGHT + _GAP, [], False, 4
    for bar in [*shown, None]:
        if not over and (bar is None or bar["over"]):
            over = True
            drawn += _limit(y, max_length)
            y += step
        if bar is not None:
            drawn += _bar(bar, y, most)
            y += step
    size = {"viewBox": f"0 0 {_LEFT + _WIDE + _RIGHT} {y}", "role": "img", "aria-label": "rows by their tokens"}
    return element("svg", *drawn, attributes=size)


def _bar(bar: Mapping[str, Any], y: int, most: int) -> list[Element]:
    upto = f"{bar['least']:,}–{bar['most']:,}" if bar["most"] else f"over {bar['least'] - 1:,}"
    width = max(_WIDE * bar["rows"] / most, 1.5 * bool(bar["rows"]))
    place = {"x": _LEFT, "y": y, "width": round(width, 1), "height": _BAR_HEIGHT}
    base = y + _BAR_HEIGHT - 4
    return [
        element("text", upto, attributes={"x": _LEFT - 8, "y": base, "text-anchor": "end"}),
        element("rect", attributes={"class": "bar over" if bar["over"] else "bar", **place}),
        element("text", f"{bar['rows']:,}", attributes={"x": round(_LEFT + width + 6, 1), "y": base}),
    ]


def _limit(y: int, max_length: int) -> list[Element]:
    middle = y + _BAR_HEIGHT // 2
    said = f"data.max_length = {max_length:,}"
    ends = {"x1": _LEFT, "x2": _LEFT + _WIDE - 130, "y1": middle, "y2": middle}
    return [
        element("line", attributes={"class": "limit", **ends}),
        element("text", said, attributes={"x": _LEFT + _WIDE - 124, "y": middle + 4}),
    ]
