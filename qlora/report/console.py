"""The screen: what will happen, a live panel while it happens, what came of it. A pure function of events.

On a terminal rich draws one live panel at the bottom and only what matters scrolls above it; anywhere else (a file, a
pipe, CI) the same events become plain lines.
"""

from __future__ import annotations

import errno
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora.events import (
    End,
    Evaluated,
    Event,
    Exported,
    Fidelity,
    Notice,
    Plan,
    Progress,
    Recovered,
    Rejected,
    Sampled,
    Saved,
    Start,
    StepDone,
)
from qlora.report.figures import SPARK_WIDTH, how_far, human_bytes, human_seconds, sparkline

PLAIN_SECONDS = 5.0  # at most one plain progress line in this time
DRAWS_PER_SECOND = 4


class _Terminal(Console):
    """rich ends the process when whoever reads the output has gone; here that ends the drawing alone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


class ConsoleSink:
    """Draws a run on `console`; live when that is a terminal, as lines when not."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Terminal(file=sys.stdout, highlight=False)
        self.live: Live | None = None
        self.plan: Plan | None = None
        self.losses: list[float] = []
        self.last_step: StepDone | None = None
        self.recent_seconds: deque[float] = deque(maxlen=20)
        self.last_eval: Evaluated | None = None
        self.task: Progress | None = None
        self.plain_at = 0.0
        self.title = ""
        self.sample_step = -1
        self.handlers: dict[type[Event], Callable[[Any], None]] = {
            Start: self._start,
            Plan: self._plan,
            Notice: self._notice,
            Progress: self._progress,
            StepDone: self._step,
            Evaluated: self._evaluated,
            Sampled: self._sampled,
            Saved: self._saved,
            Recovered: self._recovered,
            Rejected: self._rejected,
            Fidelity: self._fidelity,
            Exported: self._exported,
            End: self._end,
        }

    def emit(self, event: Event) -> None:
        self.handlers[type(event)](event)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    # --- one method an event -------------------------------------------------------------------------------------

    def _start(self, event: Start) -> None:
        self.title = event.run_dir
        commit = f" @ {event.commit[:12]}" if event.commit else ""
        resumed = "" if event.resumed_from_step is None else f", going on after step {event.resumed_from_step}"
        self._print(Text.assemble(("qlora", "bold"), f"  {event.base}{commit} on {event.device}{resumed}"))
        self._print(Text(f"run folder  {event.run_dir}", style="dim"))

    def _plan(self, event: Plan) -> None:
        self.plan = event
        self._drop_task()
        self._print(plan_table(event))

    def _notice(self, event: Notice) -> None:
        self._print(Text.assemble((f"{event.topic}: ", "yellow"), event.message))

    def _rejected(self, event: Rejected) -> None:
        examples = f" ({', '.join(event.examples)}{', …' if event.count > len(event.examples) else ''})"
        shown = examples if event.examples else ""
        self._print(
            Text.assemble(("rows left out: ", "yellow"), f"{event.count} of {event.source}: {event.reason}{shown}")
        )

    def _progress(self, event: Progress) -> None:
        new = self.task is None or self.task.task != event.task
        self.task = None if event.done >= event.total else event
        if self.console.is_terminal:
            self._draw()
        elif new or time.monotonic() - self.plain_at > PLAIN_SECONDS:
            # Short tasks need no line: the first one comes when a task has run for a while.
            if not new:
                self.console.print(f"{event.task} {how_far(event)}", highlight=False)
            self.plain_at = time.monotonic()

    def _step(self, event: StepDone) -> None:
        self._drop_task()
        self.losses.append(event.loss)
        self.last_step = event
        self.recent_seconds.append(event.seconds)
        if self.console.is_terminal:
            self._draw()
        elif event.step == 1 or time.monotonic() - self.plain_at > PLAIN_SECONDS or self._is_last(event):
            self.plain_at = time.monotonic()
            self.console.print(self._step_line(event), highlight=False, soft_wrap=True)

    def _evaluated(self, event: Evaluated) -> None:
        self._drop_task()
        self.last_eval = event
        parts = [f"evaluation at step {event.step}:"] if event.step else ["untuned base:"]
        if event.loss is not None and event.perplexity is not None:
            parts.append(f"loss {event.loss:.4f} · perplexity {event.perplexity:.2f}")
        if event.exact_match is not None:
            parts.append(f"· exact match {event.exact_match:.1%}")
        if event.best and event.exact_match is None:
            parts.append("· best so far")
        self._print(Text(" ".join(parts), style="cyan"))

    def _sampled(self, event: Sampled) -> None:
        self._drop_task()
        if event.step != self.sample_step:
            self.sample_step = event.step
            self._print(Text(f"answers at step {event.step}", style="bold"))
        self._print(sample_table(event))

    def _saved(self, event: Saved) -> None:
        if self.console.is_terminal:
            self._draw()
        else:
            self._print(Text(f"saved {event.what} of step {event.step} ({human_bytes(event.bytes)})", style="dim"))

    def _recovered(self, event: Recovered) -> None:
        self._print(Text.assemble((f"step {event.step}: ", "yellow"), event.message))

    def _fidelity(self, event: Fidelity) -> None:
        self._drop_task()
        self.close()
        self._print(fidelity_table(event))

    def _exported(self, event: Exported) -> None:
        self._drop_task()
        self.close()
        merged = f", merged on {event.merge_base}" if event.merge_base else ""
        self._print(Text(f"{event.format}  {human_bytes(event.bytes)}{merged}  {event.path}", style="green"))

    def _end(self, event: End) -> None:
        self._drop_task()
        self.close()
        self._print(end_panel(event, self.losses))

    # --- drawing -------------------------------------------------------------------------------------------------

    def _print(self, what: RenderableType) -> None:
        self.console.print(what, highlight=False, soft_wrap=isinstance(what, Text))

    def _drop_task(self) -> None:
        self.task = None

    def _is_last(self, event: StepDone) -> bool:
        return self.plan is not None and event.step >= self.plan.steps

    def _draw(self) -> None:
        if self.live is None:
            self.live = Live(console=self.console, refresh_per_second=DRAWS_PER_SECOND, transient=True)
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

    def seconds_left(self) -> float | None:
        """By the mean of the last steps; evaluations and saving come on top."""
        if self.plan is None or self.last_step is None or not self.recent_seconds:
            return None
        mean = sum(self.recent_seconds) / len(self.recent_seconds)
        return mean * max(0, self.plan.steps - self.last_step.step)

    def _training_panel(self, step: StepDone) -> Panel:
        total = self.plan.steps if self.plan else step.step
        width = max(20, min(SPARK_WIDTH, self.console.width - 40))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column()
        left = self.seconds_left()
        ending = "" if left is None else f"   {human_seconds(left)} left"
        grid.add_row("step", Text(f"{step.step} of {total}   epoch {step.epoch:.2f}{ending}"))
        grid.add_row("", ProgressBar(total=max(total, 1), completed=step.step, width=width))
        grid.add_row("loss", Text.assemble((f"{step.loss:.4f}  ", "bold"), (sparkline(self.losses, width), "green")))
        if self.last_eval is not None and self.last_eval.loss is not None:
            grid.add_row("evaluation", f"{self.last_eval.loss:.4f} at step {self.last_eval.step}")
        grid.add_row("rate", f"{step.learning_rate:.2e}   gradient norm {step.grad_norm:.3f}")
        grid.add_row("speed", f"{step.tokens_per_second:,.0f} tokens/s   peak {human_bytes(step.peak_bytes)}")
        return Panel(grid, title=self.title, title_align="left", box=box.ROUNDED, expand=False, border_style="dim")

    def _step_line(self, step: StepDone) -> str:
        total = self.plan.steps if self.plan else step.step
        left = self.seconds_left()
        ending = "" if left is None else f" · {human_seconds(left)} left"
        return (
            f"step {step.step}/{total} · loss {step.loss:.4f} · lr {step.learning_rate:.2e} · "
            f"{step.tokens_per_second:,.0f} tokens/s · peak {human_bytes(step.peak_bytes)}{ending}"
        )


def task_line(task: Progress) -> RenderableType:
    """A named bar."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(task.task, ProgressBar(total=max(task.total, 1), completed=task.done, width=30), how_far(task))
    return grid


def plan_table(plan: Plan) -> Table:
    """What will happen, with the arithmetic."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    share = plan.trained_tokens_per_epoch / max(plan.tokens_per_epoch, 1)
    table.add_row("rows", f"{plan.train_rows:,} to train on, {plan.eval_rows:,} to evaluate")
    table.add_row(
        "tokens", f"{plan.tokens_per_epoch:,} an epoch, {plan.trained_tokens_per_epoch:,} trained ({share:.0%})"
    )
    packed = f"packed up to {plan.max_length:,} tokens" if plan.packing else f"up to {plan.max_length:,} tokens each"
    table.add_row("batch", f"{plan.arithmetic}; {packed}")
    table.add_row("steps", f"{plan.steps:,} ({plan.epochs:.4g} epochs)")
    part = plan.trainable_parameters / max(plan.total_parameters, 1)
    recompute = ", layers recomputed in the backward pass" if plan.gradient_checkpointing else ""
    table.add_row(
        "trained",
        f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters ({part:.2%}){recompute}",
    )
    if plan.memory is not None:
        peak, limit = plan.memory["peak_bytes"], plan.memory["limit_bytes"]
        chosen = ", ".join(f"{key} = {value}" for key, value in plan.memory["changes"].items())
        why = f"; chosen to fit: {chosen}" if chosen else ""
        table.add_row("memory", f"{human_bytes(peak)} predicted at the peak, {human_bytes(limit)} allowed{why}")
    return table


def sample_table(sample: Sampled) -> Table:
    """One question with what was wanted, what the untuned base says and what the tuned model says."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("question", Text(_clip(sample.prompt)))
    table.add_row("  wanted", Text(_clip(sample.expected)))
    table.add_row("  base", Text(_clip(sample.base)))
    table.add_row("  tuned", Text(_clip(sample.tuned), style="green"))
    return table


def fidelity_table(fidelity: Fidelity) -> RenderableType:
    """How near each export is to the trained model, a line each, and who measured which."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("mean KL, nats", "perplexity", "same token", "size"):
        table.add_column(name, justify="right", no_wrap=True)
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
    return Group(heading, table, Text(f"measured: {measured}", style="dim"))


def end_panel(end: End, losses: list[float]) -> Panel:
    """Totals of a run and where its adapter is."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("ended", f"{end.reason} at step {end.step} of {end.steps}, {human_seconds(end.seconds)} of training")
    if end.train_loss is not None:
        grid.add_row("loss", f"{end.train_loss:.4f}  {sparkline(losses)}")
    if end.eval_loss is not None:
        grid.add_row("evaluation", f"{end.eval_loss:.4f} nats a token")
    if end.exact_match_after is not None and end.exact_match_before is not None:
        grid.add_row("exact match", f"{end.exact_match_before:.1%} before, {end.exact_match_after:.1%} after")
    grid.add_row("tokens", f"{end.tokens:,} read, {end.trained_tokens:,} trained")
    grid.add_row("peak memory", peak_line(end))
    if spent := time_line(end):
        grid.add_row("time", spent)
    if end.adapter is not None:
        grid.add_row("adapter", Text(f"{end.adapter} (step {end.adapter_step})"))
    return Panel(
        grid, box=box.ROUNDED, expand=False, border_style="yellow" if end.reason.startswith("stopped") else "green"
    )


def peak_line(end: End) -> str:
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


def time_line(end: End) -> str:
    """Where the process's time went, the longest phase first; "" where nothing took a second."""
    longest = sorted(end.phases.items(), key=lambda pair: -pair[1])
    return " · ".join(f"{name} {human_seconds(seconds)}" for name, seconds in longest if round(seconds))


def _clip(text: str, longest: int = 300) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"
