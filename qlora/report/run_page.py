"""The page of a run, or of several beside each other: `report.html`, one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora.report import curves, preferences, rewards, run_multi_gpu, run_sections
from qlora.report.figures import human_bytes
from qlora.report.page import Element, classed, element, page, table
from qlora.report.run_files import Run, without_places
from qlora.report.run_log import clipped

REFRESH_SECONDS = 5  # how often a browser opens the page of a run under way again
MAX_RUNS = 24  # beside each other: three dashes of eight colours


def page_of(runs: Sequence[Run], live: bool = False) -> str:
    """The whole page. `live`: it is written again while the run goes on, and a browser looks for that by itself."""
    title = ", ".join(clipped(run.name, 100) for run in runs)
    sections = _one(runs[0]) if len(runs) == 1 else _several(runs)
    heading = element("section", element("h1", title), *_heading(runs, live))
    return page(f"{title}: report", heading, *sections, refresh_seconds=REFRESH_SECONDS if live else None)


def _heading(runs: Sequence[Run], live: bool) -> Iterator[Element]:
    if len(runs) == 1:
        run = runs[0]
        started = run.log.started
        parts = [run_sections.state(run)]
        if started is not None:
            base = started.base.replace("\\", "/").rstrip("/")
            named = base if base.count("/") == 1 else base.rpartition("/")[2]
            parts += [f"base: {clipped(named, 200)}", f"on {clipped(started.device, 100)}"]
        if run.log.begun:
            parts.append(f"begun {run.log.begun[:16].replace('T', ' ')} UTC")
        yield classed("p", "dim", " · ".join(parts))
    if live:
        yield element(
            "p", classed("span", "tag", "live"), f"written again as the run goes on, seen every {REFRESH_SECONDS} s"
        )


def _one(run: Run) -> Iterator[Element]:
    yield run_sections.cards(run)
    of_answers = (*preferences.charts(*run.log.preferred), *rewards.charts(*run.log.rewarded))
    loss, *others = run_sections.charts([run])
    drawn = [loss, *of_answers, *others]
    yield classed("div", "charts", *map(curves.draw, drawn))
    yield from _details(run)
    yield from _section(run_sections.samples([run]))
    yield from _section(run_sections.experts(run))
    yield from _tables(run)


def _details(run: Run) -> Iterator[Element]:
    yield from _section(preferences.section(run.log.preferred[True]))
    yield from _section(rewards.section(run.log.rewarded[True]))
    yield from _section(run_multi_gpu.section(run.log.plan))
    yield from _section(run_sections.memory(run))
    yield from _section(run_sections.happened(run))


def _tables(run: Run) -> Iterator[Element]:
    if run.exam is not None:
        yield from _section(run_sections.exam(run.exam))
    yield from _section(run_sections.fidelity(run.fidelity))
    yield from _section(run_sections.data(run))
    yield from _section(run_sections.recipe(run))
    yield from _section(run_sections.versions(run))
    yield from _section(run_sections.unread(run))


def _section(parts: Iterator[Element]) -> Iterator[Element]:
    found = list(parts)
    if found:
        yield element("section", *found)


def _several(runs: Sequence[Run]) -> Iterator[Element]:
    yield curves.legend([(run.name, number) for number, run in enumerate(runs)])
    yield from _section(_results(runs))
    yield from _section(_differing(runs))
    drawn = [curves.draw(chart) for chart in run_sections.charts(runs)]
    yield element("section", element("h2", "Curves"), classed("div", "charts", *drawn))
    yield from _section(run_sections.samples(runs))
    for run in runs:
        summary = element("summary", f"All of {run.name}")
        yield classed("section", "whole", element("details", summary, *_details(run), *_tables(run)))


def _results(runs: Sequence[Run]) -> Iterator[Element]:
    yield element("h2", "Results")
    rows = []
    for run in runs:
        log, rate, best = run.log, run_sections.median_rate(run.log), run_sections.best_loss(run.log)
        match = log.ended.exact_match_after if log.ended else None
        exam = run.exam.parts.get("words") if run.exam else None
        tuned = exam.columns.get("tuned") if exam else None
        peak = run_sections.measured_peak(run)
        rows.append(
            [
                *(run.name, run_sections.state(run)),
                f"{log.steps.number[-1]:,}" if len(log.steps.number) else "",
                run_sections.figure(log.steps.columns["loss"][-1]) if len(log.steps.number) else "",
                *(run_sections.figure(best), run_sections.percent(match)),
                run_sections.percent(tuned.right.mean) if tuned else "",
                run_sections.big(rate) if rate is not None else "",
                *(human_bytes(peak) if peak else "", run_sections.seconds(log.at)),
            ]
        )
    heads = ("run", "", "steps", "loss", "best evaluation", "exact match", "exam", "tokens/s", "peak memory", "work")
    filled = [number for number, head in enumerate(heads) if any(row[number] for row in rows)]
    yield table([heads[number] for number in filled], [[row[number] for number in filled] for row in rows])


def _differing(runs: Sequence[Run]) -> Iterator[Element]:
    """The keys in which the recipes of the runs differ, and the versions they ran with."""
    yield element("h2", "What differs in their recipes")
    known = [run for run in runs if run.recipe]
    values = [{**run.recipe, **_versions(run)} for run in known]
    keys = list(dict.fromkeys(key for one in values for key in one))
    rows: list[list[Element | str]] = []
    for key in keys:
        row = [one.get(key) for one in values]
        if len(set(row)) > 1:
            rows.append(
                [element("code", key), *(element("code", "not set" if v is None else clipped(v, 300)) for v in row)]
            )
    if rows:
        yield table(("key", *(run.name for run in known)), rows)
    elif len(known) > 1:
        yield element("p", "Nothing: all keys and versions are the same.")
    if without := [run.name for run in runs if not run.recipe]:
        yield classed("p", "dim", f"without a recipe that can be read: {', '.join(without)}")


def _versions(run: Run) -> dict[str, str]:
    started = run.log.started
    if started is None:
        return {}
    versions = {f"version of {clipped(name, 60)}": clipped(value, 60) for name, value in started.versions.items()}
    return {**versions, "device": clipped(without_places(started.device), 100)}
