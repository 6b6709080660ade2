"""The screen: what will happen, a live panel while it happens, what came of it. A pure function of events.

On a terminal rich draws one live panel at the bottom and only what matters scrolls above it; anywhere else (a file, a
pipe, CI) the same events become plain lines.
"""

from __future__ import annotations

import errno
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from qlora import events
from qlora.report import exam
from qlora.report.fidelity import fidelity_table
from qlora.report.figures import SPARK_WIDTH, how_far, human_bytes, human_seconds, sparkline, told_apart, worth
from qlora.report.multi_gpu import card_lines
from qlora.reward_events import Rewarded
from qlora.units import layers_of

PLAIN_SECONDS = 5.0  # at most one plain progress line in this time
DRAWS_PER_SECOND = 4


class Terminal(Console):
    """rich's console for text of anybody: nothing in it is markup, an emoji's name, or a figure to be coloured.

    And rich ends the process when whoever reads the output has gone; here that ends the drawing alone.
    """

    def __init__(self, file: IO[str] | None = None, **settings: Any) -> None:
        super().__init__(file=file or sys.stdout, markup=False, emoji=False, highlight=False, **settings)

    @property
    def is_live(self) -> bool:
        """Whether what was drawn can be drawn over: on a terminal that knows how to move its cursor."""
        return self.is_terminal and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


class ConsoleSink:
    """Draws a run on `console`; live when that is a terminal, as lines when not."""

    def __init__(self, console: Terminal | None = None) -> None:
        self.console = console or Terminal()
        self.live: Live | None = None
        self.plan: events.Plan | None = None
        self.losses: list[float] = []
        self.last_step: events.StepDone | None = None
        self.recent_seconds: deque[float] = deque(maxlen=20)
        self.last_eval: events.Evaluated | None = None
        self.task: events.Progress | None = None
        self.plain_at = 0.0
        self.preferred = ""  # how the last step told its pairs apart, or what its answers were worth
        self.judged = -1  # the step whose evaluation is of rewards, which its loss is minus the mean of
        self.compares = False  # whether losses are of answers that are compared or rewarded, and not of tokens
        self.title = ""
        self.sample_step = -1
        self.handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.Start: self._start,
            events.Plan: self._plan,
            events.Notice: self._notice,
            events.Progress: self._progress,
            events.StepDone: self._step,
            events.Evaluated: self._evaluated,
            events.Preferred: self._preferred,
            Rewarded: self._rewarded,
            events.Routed: self._routed,
            events.Sampled: self._sampled,
            events.Saved: self._saved,
            events.Recovered: self._recovered,
            events.Rejected: self._rejected,
            events.Fidelity: self._fidelity,
            events.Exported: self._exported,
            events.Examined: self._examined,
            events.End: self._end,
        }

    def emit(self, event: events.Event) -> None:
        self.handlers[type(event)](event)

    def close(self) -> None:
        self.task = None
        if self.live is not None:
            self.live.stop()
            self.live = None

    # --- one method an event -------------------------------------------------------------------------------------

    def _start(self, event: events.Start) -> None:
        self.title = event.run_dir
        commit = f" @ {event.commit[:12]}" if event.commit else ""
        resumed = "" if event.resumed_from_step is None else f", going on after step {event.resumed_from_step}"
        self._print(Text.assemble(("qlora", "bold"), f"  {event.base}{commit} on {event.device}{resumed}"))
        self._print(Text(f"run folder  {event.run_dir}", style="dim"))

    def _plan(self, event: events.Plan) -> None:
        self.plan = event
        self.task = None
        self._print(plan_table(event))

    def _notice(self, event: events.Notice) -> None:
        self._print(Text.assemble((f"{event.topic}: ", "yellow"), event.message))

    def _rejected(self, event: events.Rejected) -> None:
        more = ", …" if event.count > len(event.examples) else ""
        shown = f" ({', '.join(event.examples)}{more})" if event.examples else ""
        message = f"{event.count} of {event.source}: {event.reason}{shown}"
        self._print(Text.assemble(("rows left out: ", "yellow"), message))

    def _progress(self, event: events.Progress) -> None:
        new = self.task is None or self.task.task != event.task
        self.task = None if event.done >= event.total else event
        if self.console.is_live:
            self._draw()
        elif event.total == 1:
            # Work of one part may take minutes, and has no other moment to show that it lives than its beginning.
            if event.done == 0:
                self._print(Text(f"{event.task} …"))
        elif new or time.monotonic() - self.plain_at > PLAIN_SECONDS:
            # Short tasks need no line: the first one comes when a task has run for a while.
            if not new:
                self._print(Text(f"{event.task} {how_far(event)}"))
            self.plain_at = time.monotonic()

    def _step(self, event: events.StepDone) -> None:
        self.task = None
        self.losses.append(event.loss)
        self.last_step = event
        self.recent_seconds.append(event.seconds)
        first_or_last = event.step == 1 or (self.plan is not None and event.step >= self.plan.steps)
        if self.console.is_live:
            self._draw()
        elif first_or_last or time.monotonic() - self.plain_at > PLAIN_SECONDS:
            self.plain_at = time.monotonic()
            self._print(Text(self._step_line(event)))

    def _evaluated(self, event: events.Evaluated) -> None:
        self.task = None
        self.last_eval = event
        parts = []
        if event.loss is not None and event.step != self.judged:
            parts.append(f"loss {event.loss:.4f}")
        if event.perplexity is not None:
            parts.append(f"perplexity {event.perplexity:.2f}")
        if event.exact_match is not None:
            parts.append(f"exact match {event.exact_match:.1%}")
        if event.best and event.exact_match is None:
            parts.append("best so far")
        about = f"evaluation at step {event.step}" if event.step else "untuned base"
        if parts:
            self._print(Text(f"{about}: {' · '.join(parts)}", style="cyan"))

    def _preferred(self, event: events.Preferred) -> None:
        words = told_apart(event.accuracy, event.margin, event.divergence, event.kl)
        self._of_answers(event.compared if event.evaluated else 0, words)

    def _rewarded(self, event: Rewarded) -> None:
        if event.evaluated:
            self.judged = event.step
        self._of_answers(event.answers if event.evaluated else 0, worth(event))

    def _of_answers(self, held_out: int, words: str) -> None:
        self.compares = True
        if held_out:
            self._print(Text(f"of {held_out:,} held out: {words}", style="cyan"))
        else:
            self.preferred = words

    def _routed(self, event: events.Routed) -> None:
        shares = [max(values or (0.0,)) for values in (event.largest, event.changed)]
        least, most, changed = min(event.hit or (0.0,)), *shares
        words = f"experts: {least:.0%} are hit in every layer, one takes up to {most:.0%}"
        self._print(Text(f"{words}, {changed:.1%} of tokens go elsewhere than untuned", style="dim"))

    def _sampled(self, event: events.Sampled) -> None:
        self.task = None
        if event.step != self.sample_step:
            self.sample_step = event.step
            self._print(Text(f"answers at step {event.step}", style="bold"))
        self._print(sample_table(event))

    def _saved(self, event: events.Saved) -> None:
        if self.console.is_live:
            self._draw()
        else:
            self._print(Text(f"saved {event.what} of step {event.step} ({human_bytes(event.bytes)})", style="dim"))

    def _recovered(self, event: events.Recovered) -> None:
        self._print(Text.assemble((f"step {event.step}: ", "yellow"), event.message))

    def _fidelity(self, event: events.Fidelity) -> None:
        self.close()
        self._print(fidelity_table(event))

    def _examined(self, event: events.Examined) -> None:
        self.close()
        self._print(Text("\n".join(exam.lines(event.figures))))

    def _exported(self, event: events.Exported) -> None:
        self.close()
        merged = f", merged on {event.merge_base}" if event.merge_base else ""
        self._print(Text(f"{event.format}  {human_bytes(event.bytes)}{merged}  {event.path}", style="green"))

    def _end(self, event: events.End) -> None:
        self.close()
        self._print(end_panel(event, self.losses, self._measured))

    def _measured(self, loss: float) -> str:
        """An evaluation's loss with its unit; of rewards it is minus their mean."""
        if self.judged >= 0:
            return f"reward {-loss:.4f}"
        return f"{loss:.4f}" if self.compares else f"{loss:.4f} nats a token"

    # --- drawing -------------------------------------------------------------------------------------------------

    def _print(self, what: RenderableType) -> None:
        self.console.print(what, soft_wrap=isinstance(what, Text))

    def _draw(self) -> None:
        if self.live is None:
            # Not to be redirected through rich, which would obey the control sequences that a library's warning quotes.
            self.live = Live(
                console=self.console,
                refresh_per_second=DRAWS_PER_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.live.start()
        self.live.update(self.picture())

    def picture(self) -> RenderableType:
        """What the live panel shows now."""
        parts: list[RenderableType] = []
        if self.last_step is not None:
            parts.append(self._training_panel(self.last_step))
        if self.task is not None:
            parts.append(task_line(self.task))
        return Group(*parts)

    def _steps(self, step: events.StepDone) -> int:
        return self.plan.steps if self.plan else step.step

    def _time_left(self, step: events.StepDone, separator: str) -> str:
        """By the mean of the last steps; evaluations and saving come on top."""
        mean = sum(self.recent_seconds) / len(self.recent_seconds)
        left = mean * max(0, self._steps(step) - step.step)
        return f"{separator}{human_seconds(left)} left" if self.plan else ""

    def _training_panel(self, step: events.StepDone) -> Panel:
        total = self._steps(step)
        width = max(20, min(SPARK_WIDTH, self.console.width - 40))
        grid = Table.grid(Column(style="dim"), Column(), padding=(0, 2))
        grid.add_row("step", f"{step.step} of {total}   epoch {step.epoch:.2f}{self._time_left(step, '   ')}")
        grid.add_row("", ProgressBar(total=max(total, 1), completed=step.step, width=width))
        grid.add_row("loss", Text.assemble((f"{step.loss:.4f}  ", "bold"), (sparkline(self.losses, width), "green")))
        if self.last_eval is not None and self.last_eval.loss is not None:
            grid.add_row("evaluation", f"{self._measured(self.last_eval.loss)} at step {self.last_eval.step}")
        if self.preferred:
            grid.add_row("answers", self.preferred)
        grid.add_row("rate", f"{step.learning_rate:.2e}   gradient norm {step.grad_norm:.3f}")
        grid.add_row("speed", f"{step.tokens_per_second:,.0f} tokens/s   peak {human_bytes(step.peak_bytes)}")
        title = Text(self.title)
        return Panel(grid, title=title, title_align="left", box=box.ROUNDED, expand=False, border_style="dim")

    def _step_line(self, step: events.StepDone) -> str:
        left = self._time_left(step, " · ") + (f" · before it: {self.preferred}" if self.preferred else "")
        return (
            f"step {step.step}/{self._steps(step)} · loss {step.loss:.4f} · lr {step.learning_rate:.2e} · "
            f"{step.tokens_per_second:,.0f} tokens/s · peak {human_bytes(step.peak_bytes)}{left}"
        )


def task_line(task: events.Progress) -> RenderableType:
    """A named bar."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(task.task), ProgressBar(total=max(task.total, 1), completed=task.done, width=30), how_far(task))
    return grid


def plan_table(plan: events.Plan) -> Table:
    """What will happen, with the arithmetic."""
    table = _two_columns()
    table.add_row("rows", f"{plan.train_rows:,} to train on, {plan.eval_rows:,} to evaluate")
    share = plan.trained_tokens_per_epoch / max(plan.tokens_per_epoch, 1)
    trained = f"{plan.trained_tokens_per_epoch:,} trained ({share:.0%})"
    table.add_row("tokens", f"{plan.tokens_per_epoch:,} an epoch, {trained}")
    packed = f"packed up to {plan.max_length:,} tokens" if plan.packing else f"up to {plan.max_length:,} tokens each"
    table.add_row("batch", f"{plan.arithmetic}; {packed}")
    table.add_row("steps", f"{plan.steps:,} ({plan.epochs:.4g} epochs)")
    part = plan.trainable_parameters / max(plan.total_parameters, 1)
    recompute = f", {layers_of(plan.gradient_checkpointing)} recomputed in the backward pass"
    parameters = f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters ({part:.2%})"
    table.add_row("trained", parameters + recompute)
    if plan.starts_from is not None:
        table.add_row("begins with", f"the adapter of {plan.starts_from}")
    if plan.attention not in ("", "sdpa"):
        masked = " with a mask" if plan.attention == "eager" else ", documents without a mask of S × S"
        table.add_row("attention", plan.attention + masked)
    if plan.memory is not None:
        peak, limit = plan.memory["peak_bytes"], plan.memory["limit_bytes"]
        chosen = ", ".join(f"{key} = {json.dumps(value)}" for key, value in plan.memory["changes"].items())
        why = f"; chosen to fit: {chosen}" if chosen else ""
        error = plan.memory.get("error_bytes", 0)  # a plan of an older run has none
        beside = f" ± {human_bytes(error)}" if error else ""
        table.add_row("memory", f"{human_bytes(peak)}{beside} predicted at the peak, {human_bytes(limit)} allowed{why}")
    if plan.cards:
        table.add_row("cards", card_lines(plan.cards))
    if plan.resume is not None:
        table.add_row("resume", plan.resume)
    return table


def sample_table(sample: events.Sampled) -> Table:
    """One question with what was wanted, what the untuned base says and what the tuned model says."""
    table = _two_columns()
    table.add_row("question", Text(_clip(sample.prompt)))
    table.add_row("  wanted", Text(_clip(sample.expected)))
    table.add_row("  base", Text(_clip(sample.base)))
    table.add_row("  tuned", Text(_clip(sample.tuned), style="green"))
    return table


def end_panel(end: events.End, losses: list[float], measured: Callable[[float], str]) -> Panel:
    """Totals of a run and where its adapter is."""
    grid = _two_columns()
    ended = f"{end.reason} at step {end.step} of {end.steps}, {human_seconds(end.seconds)} of training"
    grid.add_row("ended", Text(ended))
    if end.train_loss is not None:
        grid.add_row("loss", f"{end.train_loss:.4f}  {sparkline(losses)}")
    if end.eval_loss is not None:
        grid.add_row("evaluation", measured(end.eval_loss))
    if end.exact_match_after is not None and end.exact_match_before is not None:
        grid.add_row("exact match", f"{end.exact_match_before:.1%} before, {end.exact_match_after:.1%} after")
    grid.add_row("tokens", f"{end.tokens:,} read, {end.trained_tokens:,} trained")
    grid.add_row("peak memory", peak_line(end))
    if spent := time_line(end):
        grid.add_row("time", spent)
    if end.adapter is not None:
        grid.add_row("adapter", Text(f"{end.adapter} (step {end.adapter_step})"))
    color = "yellow" if end.reason.startswith("stopped") else "green"
    return Panel(grid, box=box.ROUNDED, expand=False, border_style=color)


def peak_line(end: events.End) -> str:
    """The measured peak, and beside it what was predicted, with the parts that can be measured by themselves."""
    if end.memory is None:
        return human_bytes(end.peak_bytes)
    pairs = [
        f"{part} {human_bytes(pair['measured'])} ({human_bytes(pair['predicted'])})"
        for part, pair in end.memory.items()
        if part != "peak"
    ]
    predicted = end.memory["peak"]["predicted"]
    return f"{human_bytes(end.peak_bytes)} (predicted {human_bytes(predicted)}); {' · '.join(pairs)}"


def time_line(end: events.End) -> str:
    """Where the process's time went, the longest phase first; "" where nothing took a second."""
    longest = sorted(end.phases.items(), key=lambda pair: -pair[1])
    return " · ".join(f"{name} {human_seconds(seconds)}" for name, seconds in longest if round(seconds))


def _two_columns() -> Table:
    return Table.grid(Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2))


def _clip(text: str, longest: int = 300) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"
