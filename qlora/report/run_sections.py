"""The parts of a run's page: figures, memory, what happened, answers, exam, exports, rows, recipe and versions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora.report import timeline
from qlora.report.curves import Chart, Line
from qlora.report.exam import NAMES
from qlora.report.figures import human_bytes, human_seconds
from qlora.report.page import Element, card, classed, element, table
from qlora.report.run_events import Exam, ExamColumn, FidelityEntry, Interval, Sample
from qlora.report.run_files import Run, without_places
from qlora.report.run_log import MAX_EXAMPLES, RunLog, clipped

_PARTS = {"yours": "Questions of yours", "words": "In other words", "left_out": "Left out of the study"}
_SHOWN_ROWS = 12  # of what happened, before the rest is folded away
_BAR_LEFT, _BAR_WIDE, _BAR_RIGHT, _BAR_STEP = 84, 226, 90, 34  # of the drawing of memory, in its own units


def figure(value: float | None, digits: int = 4) -> str:
    """A number of a run as a person reads it; "" for none, and "not a number" or "infinite" for what is none."""
    if value is None:
        return ""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


def percent(share: float | None) -> str:
    """0.915 -> '91.5 %'; "" for none."""
    return "" if share is None else f"{100 * share:.1f} %" if math.isfinite(share) else figure(share)


def big(value: float) -> str:
    """12,345 -> '12.3k', for an axis."""
    for power, name in ((9, "G"), (6, "M"), (3, "k")):
        if 10**power <= abs(value) < 1e15:
            return f"{value / 10**power:.3g}{name}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """As `human_seconds`, and no more than a person reads of a number that is no time."""
    return human_seconds(value) if abs(value) < 1e10 else "unknown"


def state(run: Run) -> str:
    """How the run stands, in a few words."""
    log = run.log
    steps = log.steps.number
    at = f" at step {steps[-1]:,}" if len(steps) else ""
    if log.ended is not None:
        return clipped(log.ended.reason, 200)
    if run.under_way:
        return f"under way{at}"
    return f"no end recorded{at}: killed, or stopped by an error"


def cards(run: Run) -> Element:
    """The figures that are looked for first."""
    log, end = run.log, run.log.ended
    steps, rate, best = log.steps.number, median_rate(log), best_loss(log)
    loss = log.steps.columns["loss"]
    made = []
    if len(steps):
        of = f"of {log.plan.steps:,} steps" if log.plan else "steps"
        made += [card(f"{steps[-1]:,}", of), card(figure(loss[-1]), "loss, last step")]
    if rate is not None:
        made.append(card(big(rate), "tokens/s, median"))
    if best is not None:
        of_rewards = bool(log.rewarded[True])  # whose loss is minus their mean
        name = "reward held out, best" if of_rewards else "evaluation loss, best"
        made.append(card(figure(-best if of_rewards else best), name))
    if end is not None and end.exact_match_after is not None:
        before = f", {percent(end.exact_match_before)} before" if end.exact_match_before is not None else ""
        made.append(card(percent(end.exact_match_after), f"exact match{before}"))
    if peak := measured_peak(run):
        made.append(card(human_bytes(peak), "peak memory"))
    made.append(card(seconds(log.at), "of work"))
    return classed("div", "cards", *made)


def best_loss(log: RunLog) -> float | None:
    """The least loss of the evaluations, of those that are finite where any is; None without one."""
    losses = [one.loss for one in log.evaluations.values() if one.loss is not None]
    return min(filter(math.isfinite, losses), default=losses[0] if losses else None)


def median_rate(log: RunLog) -> float | None:
    """The median of the finite tokens a second; None without one: NaN has no place in an order."""
    rates = sorted(filter(math.isfinite, log.steps.columns["tokens_per_second"]))
    return rates[len(rates) // 2] if rates else None


def measured_peak(run: Run) -> float:
    """The most memory that a step or the end of the run told of; 0 where none did."""
    told = [value for value in run.log.steps.columns["peak_bytes"] if 0 < value < 1e18]
    return max([*told, run.log.ended.peak_bytes if run.log.ended else 0])


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The curves of one run, or of several in the same drawings."""
    one = runs[0] if len(runs) == 1 else None
    breaks = [process.step for process in one.log.processes if process.step] if one else []

    def lines(column: str, noisy: bool = False) -> list[Line]:
        return [
            Line(run.name, run.log.steps.number, run.log.steps.columns[column], colour, noisy)
            for colour, run in enumerate(runs)
        ]

    loss = lines("loss", True)
    if one:
        loss = [Line("training", loss[0].steps, loss[0].values, 0, True)]
        loss += [] if one.log.rewarded[True] else _evaluations(runs, 1, "evaluation")
    # Of preferences and rewards it is none of tokens, and what was told apart or earned is what one looks for.
    compared = any(found for run in runs for found in (*run.log.preferred, *run.log.rewarded))
    unit_of_loss = "" if compared else ", nats a token"
    made = [Chart(f"Loss{unit_of_loss}", loss, lambda value: f"{value:.3g}", breaks=breaks)]
    if not one:
        measured = _evaluations(runs, 0, "")
        made.append(Chart(f"Evaluation loss{unit_of_loss}", measured, lambda value: f"{value:.3g}"))
    made.append(Chart("Learning rate", lines("learning_rate"), lambda value: f"{value:.2g}", may_be_log=False))
    made.append(Chart("Gradient norm", lines("grad_norm", True), big, breaks=breaks))
    made.append(Chart("Tokens a second", lines("tokens_per_second", True), big, breaks=breaks, may_be_log=False))
    plan = one.log.plan.memory if one and one.log.plan else None
    limits = [("predicted", float(plan.peak_bytes)), ("limit", float(plan.limit_bytes))] if plan else []
    near = max(map(measured_peak, runs)) * 3
    unit, name = (2**30, "GiB") if near > 3 * 2**30 else (2**20, "MiB")
    # A far one would press the curve flat.
    limits = [(which, value / unit) for which, value in limits if 0 < value < max(near, 1.0)]
    peaks = [replace(line, values=[value / unit for value in line.values]) for line in lines("peak_bytes")]
    made.append(Chart(f"Peak memory, {name}", peaks, "{:,.4g}".format, limits, breaks, may_be_log=False))
    return made


def _evaluations(runs: Sequence[Run], colour: int, name: str) -> list[Line]:
    made = []
    for number, run in enumerate(runs):
        found = sorted((step, one.loss) for step, one in run.log.evaluations.items() if one.loss is not None)
        if found:
            steps, values = zip(*found, strict=True)
            made.append(Line(name or run.name, steps, values, colour + number, dots=True))
    return made


def memory(run: Run) -> Iterator[Element]:
    """Part by part, what was predicted and what was measured, where anything is known of it."""
    plan, end = run.log.plan.memory if run.log.plan else None, run.log.ended
    pairs: dict[str, tuple[int | None, float | None]] = {}
    if plan is not None:
        pairs["peak"] = (plan.peak_bytes, measured_peak(run) or None)
        pairs |= {name: (count, None) for name, count in plan.components.items()}
    for name, pair in (end.memory or {}).items() if end else ():
        pairs[name] = (pair.get("predicted"), pair.get("measured"))
    pairs = {clipped(name, 40): pair for name, pair in pairs.items()}
    if not pairs:
        return
    yield element("h2", "Memory, predicted and measured")
    yield classed("div", "narrow", _memory_bars(pairs))
    yield classed(
        "p", "legend", classed("span", "key swatch c1", "predicted"), classed("span", "key swatch c0", "measured")
    )
    if plan is not None:
        margin = f"; {human_bytes(plan.error_bytes)} margin for the estimate's own error" if plan.error_bytes else ""
        yield classed("p", "dim", f"allowed: {human_bytes(plan.limit_bytes)}{margin}")


def _memory_bars(pairs: Mapping[str, tuple[int | None, float | None]]) -> Element:
    most = max((value for pair in pairs.values() for value in pair if value is not None), default=0) or 1
    drawn: list[Element] = []
    for number, (name, pair) in enumerate(pairs.items()):
        y = 4 + number * _BAR_STEP
        drawn.append(element("text", name, attributes={"x": _BAR_LEFT - 8, "y": y + 17, "text-anchor": "end"}))
        for at, (value, colour) in enumerate(zip(pair, ("c1", "c0"), strict=True)):
            if value is not None and value >= 0:
                top, wide = y + at * 13, max(_BAR_WIDE * value / most, 1.0)
                place = {"x": _BAR_LEFT, "y": top, "width": round(wide, 1), "height": 11}
                drawn.append(element("rect", attributes={"class": f"filled {colour}", **place}))
                words: dict[str, str | int | float] = {"x": round(_BAR_LEFT + wide + 5, 1), "y": top + 10}
                drawn.append(element("text", human_bytes(value), attributes=words))
    height = 4 + len(pairs) * _BAR_STEP
    size = {"viewBox": f"0 0 {_BAR_LEFT + _BAR_WIDE + _BAR_RIGHT} {height}", "role": "img"}
    return element("svg", *drawn, attributes={**size, "aria-label": "memory, predicted and measured, by its parts"})


def happened(run: Run) -> Iterator[Element]:
    """The time line, then what was said with its counts."""
    log = run.log
    yield element("h2", "What happened")
    if log.processes or log.marks:
        yield timeline.draw(log.processes, log.marks, log.at)
    rows: list[list[Element | str]] = []
    for process in log.processes[1:]:
        pause = f" after a pause of {seconds(process.pause)}" if process.pause else ""
        went_on = f"went on after step {process.step:,}" if process.step else "began anew"
        rows.append([_when(process.at), "resumed", went_on + pause, ""])
    for mark in log.marks:
        if mark.kind == "recovered" and len(rows) < 200:
            rows.append([_when(mark.at), "recovered", without_places(mark.text), ""])
    for told in log.told.values():
        times = f"said {told.times:,} times" if told.times > 1 else ""
        count = f"{told.count:,}" if told.count is not None else ""
        message = element("div", without_places(told.message), *([classed("p", "dim", times)] if times else []))
        rows.append([_when(told.at), told.topic, message, count])
    rows += [["", "saved", name, f"{count:,}"] for name, count in log.saved.items()]
    heads = ("when", "what", "", "count")
    if rows:
        yield table(heads, rows[:_SHOWN_ROWS])
    if more := rows[_SHOWN_ROWS:]:
        yield element("details", element("summary", f"{len(more):,} more"), table(heads, more))


def _when(at: float) -> str:
    """Seconds of work in a column that does not break."""
    return seconds(at).replace(" ", "\u00a0")


def samples(runs: Sequence[Run]) -> Iterator[Element]:
    """Questions with the wanted answer, the base's and that of each run, side by side."""
    asked: dict[str, dict[str, Sample]] = {}
    for run in runs:
        for sample in run.log.samples:
            asked.setdefault(sample.prompt, {})[run.name] = sample
    if not asked:
        return
    yield element("h2", "Answers, untuned and tuned")
    for prompt, answers in asked.items():
        first = next(iter(answers.values()))
        parts = [("wanted", first.expected), ("base", first.base)]
        for name, sample in answers.items():
            title = f"tuned, step {sample.step:,}" if len(runs) == 1 else f"{name}, step {sample.step:,}"
            parts.append((title, sample.tuned))
        boxes = [
            classed("div", "answer on" if at > 1 else "answer", element("small", title), _words(text))
            for at, (title, text) in enumerate(parts)
        ]
        yield classed("div", "row", element("small", "question"), _words(prompt), classed("div", "answers", *boxes))


def experts(run: Run) -> Iterator[Element]:
    """Where the evaluation rows' tokens went at the last evaluation, of a mixture of experts, a row a layer."""
    found = run.log.routing
    if found is not None:
        yield element("h2", f"Experts, at step {found.step:,}")
        shares = zip(found.hit, found.largest, found.changed, strict=False)
        rows = [[f"{layer:,}", *map(percent, of_layer)] for layer, of_layer in enumerate(shares, start=1)]
        yield table(("layer with experts", "experts hit", "the largest's share", "tokens that go elsewhere"), rows)


def _words(text: str) -> Element:
    return classed("pre", "words", text if text.strip() else "(nothing)", dir="auto")


def exam(found: Exam) -> Iterator[Element]:
    """What the model knows of its documents, part by part."""
    yield element("h2", "Exam")
    for name, title in _PARTS.items():
        part = found.parts.get(name)
        if part is None:
            continue
        yield element("h3", f"{title}: {part.questions:,}")
        rows = [[NAMES.get(key, key), *_exam_cells(column)] for key, column in part.columns.items()]
        yield table(("asked", "questions", "contains the answer", "token F1", "exact match"), rows)
        tests = [f"{_against(pair)}: p = {p:.2g}" for pair, p in part.p_values.items()]
        if tests:
            yield classed("p", "dim", f"McNemar's test, {'; '.join(tests)}")
    told = []
    if found.unanswerable.questions:
        shares = [percent(share) for share in (found.unanswerable.base, found.unanswerable.tuned) if share is not None]
        told.append(f"{found.unanswerable.questions:,} that cannot be answered: invented {' → '.join(shares)}")
    if found.elsewhere.prompts and found.elsewhere.nats is not None:
        told.append(f"elsewhere, {found.elsewhere.prompts:,} prompts: {found.elsewhere.nats:.2f} nats from the base")
    if sentences := found.coverage.get("sentences"):
        told.append(f"{found.coverage.get('with_question', 0):,} of {sentences:,} sentences have a question")
    dropped = [f"{count:,} {clipped(reason, 60)}" for reason, count in found.dropped.items()]
    if dropped:
        told.append(f"rows dropped: {', '.join(dropped)}")
    if told:
        yield element("ul", *(element("li", line) for line in told))
    for line in found.advice:
        yield classed("div", "said harm", element("p", clipped(line)))


def _against(pair: str) -> str:
    """ "tuned/base_retrieval" in words."""
    return " against ".join(NAMES.get(name, clipped(name, 60)) for name in pair.split("/"))


def _exam_cells(column: ExamColumn) -> list[str]:
    return [f"{column.questions:,}", *(_interval(value) for value in (column.right, column.f1, column.exact))]


def _interval(value: Interval | None) -> str:
    return "" if value is None else f"{percent(value.mean)} ({100 * value.low:.0f}–{100 * value.high:.0f})"


def fidelity(entries: Sequence[FidelityEntry]) -> Iterator[Element]:
    """How near each export is to the trained model."""
    if entries:
        yield element("h2", "Exports: how near to the trained model")
        rows: list[list[Element | str]] = [
            [
                *(clipped(entry.name, 200), figure(entry.kl), figure(entry.perplexity), percent(entry.top1)),
                human_bytes(entry.bytes) if entry.bytes else "",
                clipped(entry.measured_by, 200),
            ]
            for entry in entries
        ]
        yield table(("", "mean KL, nats", "perplexity", "same token", "size", "measured by"), rows)


def data(run: Run) -> Iterator[Element]:
    """What was trained on, and what was left out and why."""
    plan, log = run.log.plan, run.log
    if plan is None and not log.rejected:
        return
    yield element("h2", "Rows")
    if plan is not None:
        part = plan.trained_tokens_per_epoch / plan.tokens_per_epoch if plan.tokens_per_epoch else 0.0
        packed = f"{plan.packs:,} packs of up to {plan.max_length:,} tokens" if plan.packing else "off, a row each"
        share = plan.trainable_parameters / plan.total_parameters if plan.total_parameters else 0.0
        facts = [
            ["train on", f"{plan.train_rows:,} rows"],
            ["evaluate", f"{plan.eval_rows:,} rows"],
            ["tokens an epoch", f"{plan.tokens_per_epoch:,}, {plan.trained_tokens_per_epoch:,} trained ({part:.1%})"],
            ["packing", packed],
            ["a step", f"{plan.batch_size:,} in micro-batches of {plan.micro_batch_size:,}"],
            ["epochs", figure(plan.epochs, 2)],
            ["the run", clipped(plan.arithmetic, 500)],
            ["trained", f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters ({share:.2%})"],
        ]
        yield table(("", ""), [row for row in facts if row[1]])
    if log.rejected:
        yield element("h3", "Left out")
        rows: list[list[Element | str]] = [
            [
                *(without_places(one.source), f"{one.count:,}", without_places(one.reason)),
                element("code", without_places(", ".join(clipped(x, 200) for x in one.examples[:MAX_EXAMPLES]))),
            ]
            for one in log.rejected.values()
        ]
        yield table(("source", "rows", "because", "for example"), rows)


def recipe(run: Run) -> Iterator[Element]:
    """Every key of the recipe as the run recorded it."""
    if run.recipe:
        yield element("h2", "Recipe")
        summary = element("summary", f"{len(run.recipe):,} keys, every default written out")
        rows = [[element("code", key), element("code", clipped(value))] for key, value in run.recipe.items()]
        yield element("details", summary, table(("key", "value"), rows))


def versions(run: Run) -> Iterator[Element]:
    """What the run was computed with."""
    started = run.log.started
    if started is None:
        return
    yield element("h2", "Versions")
    known: dict[str, Any] = {**started.versions, "device": started.device, "allocator": started.allocator}
    known |= {f"numerics: {key}": value for key, value in started.numerics.items()}
    shown = {key: clipped(without_places(str(value)), 200) for key, value in known.items() if value not in (None, "")}
    yield table(("", ""), [[clipped(key, 100), value] for key, value in shown.items()])


def unread(run: Run) -> Iterator[Element]:
    """What of the run's files this page could not show, with counts; nothing where all of it is here."""
    log, told = run.log, [without_places(clipped(note, 500)) for note in run.notes]
    if log.foreign:
        told.append(f"{log.foreign:,} lines of the events are none of ours")
    if run.events.ends_within_a_line and not run.under_way:
        told.append("the last line of the events is cut short")
    if run.events.skipped_bytes:
        told.append(f"{human_bytes(run.events.skipped_bytes)} in the middle of the events were not read")
    told += [
        f"{count:,} events of the kind {kind!r}, which this version does not know"
        for kind, count in log.unknown.items()
    ]
    told += [
        f"{count:,} events of the kind {kind!r} have other values than this version reads"
        for kind, count in log.unreadable.items()
    ]
    told += [f"{count:,} {what} are too many to be kept" for what, count in log.left_out.items()]
    if log.clock_went_back:
        told.append(f"the clock went back {log.clock_went_back:,} times: such a stretch counts as no time")
    if told:
        yield element("h2", "Not shown")
        yield element("ul", *(element("li", line) for line in told))
