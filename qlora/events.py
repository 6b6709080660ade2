"""What a run reports. The trainer emits these; sinks in `report/` draw or store them.

Every event is a frozen dataclass of plain values (numbers, strings, tuples, dicts), so that a line of
`events.jsonl` holds all of it; there it has the time of day as well: `time`, UTC, ISO 8601 with milliseconds.
`Progress` is the one event that is drawn and not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from qlora.redaction import redact_all
from qlora.shown import plain_values

EVENTS_FILE = "events.jsonl"  # in a run's folder


@dataclass(frozen=True)
class Event:
    kind: ClassVar[str] = ""

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON-ready values, its kind first."""
        return {"event": self.kind, **vars(self)}


@dataclass(frozen=True)
class Start(Event):
    """The first event of a process: what will run, where, with what."""

    kind: ClassVar[str] = "start"
    recipe: str
    run_dir: str
    base: str
    commit: str | None
    device: str
    versions: Mapping[str, str]
    resumed_from_step: int | None
    numerics: Mapping[str, Any] = field(default_factory=dict)  # what its numbers depend on (`numerics.Numerics`)
    allocator: str | None = None  # settings of torch's allocator (PYTORCH_ALLOC_CONF); None where torch's own hold


@dataclass(frozen=True)
class Plan(Event):
    """What will happen, with the arithmetic, before anything long starts."""

    kind: ClassVar[str] = "plan"
    train_rows: int
    eval_rows: int
    packs: int
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    batch_size: int
    micro_batch_size: int
    accumulation: int
    steps: int
    epochs: float
    trainable_parameters: int
    total_parameters: int
    packing: bool
    gradient_checkpointing: bool | int  # of so many layers, the first ones; True: of all
    max_length: int
    arithmetic: str
    memory: Mapping[str, Any] | None = None  # predicted peak, limit, parts and settings; None where not estimated
    attention: str = ""  # what attends: sdpa or eager with a mask, or a kernel that takes documents
    resume: str | None = None  # what a resumed run equals; None: the uninterrupted one, bit for bit
    starts_from: str | None = None  # the adapter that it begins with; None: fresh matrices
    cards: tuple[Mapping[str, Any], ...] = ()  # of several processes: each one's share of a step, need and settings


@dataclass(frozen=True)
class Notice(Event):
    """Something chosen, dropped, cut, skipped or worked around, with its count where there is one."""

    kind: ClassVar[str] = "notice"
    topic: str
    message: str
    count: int | None = None


@dataclass(frozen=True)
class Progress(Event):
    """Work under way (load, tokenize, evaluate, answer, merge). Drawn, never kept."""

    kind: ClassVar[str] = "progress"
    task: str
    done: int
    total: int
    unit: str = ""


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step. `loss` is nats per trained token, `seconds` the step's own time."""

    kind: ClassVar[str] = "step"
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Evaluated(Event):
    """Evaluation rows measured. `exact_match` is a share of 0 to 1, None when it was not asked for."""

    kind: ClassVar[str] = "eval"
    step: int
    loss: float | None
    perplexity: float | None
    exact_match: float | None
    rows: int
    best: bool


@dataclass(frozen=True)
class Preferred(Event):
    """How pairs of answers (or marked answers) were told apart: of a step's rows before its update, or `evaluated`.

    `accuracy` is a share of 0 to 1; rewards are means over answers (`step/objectives.py`). `divergence` is KTO's, in
    nats an answer; `kl` that of the reference from the model on evaluation rows, in nats a token; `likelier` the share
    of pairs whose better answer has the higher log-probability a token. None: not measured.
    """

    kind: ClassVar[str] = "preference"
    step: int
    evaluated: bool
    compared: int
    accuracy: float
    margin: float | None
    better_reward: float | None
    worse_reward: float | None
    divergence: float | None
    kl: float | None = None
    likelier: float | None = None


@dataclass(frozen=True)
class Routed(Event):
    """Where evaluation tokens went in each layer with experts (model/routing.py): shares of 0 to 1, a value a layer."""

    kind: ClassVar[str] = "routing"
    step: int
    hit: tuple[float, ...]
    largest: tuple[float, ...]
    changed: tuple[float, ...]


@dataclass(frozen=True)
class Sampled(Event):
    """One greedy answer of the model being tuned, beside the untuned base's."""

    kind: ClassVar[str] = "sample"
    step: int
    prompt: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Saved(Event):
    kind: ClassVar[str] = "saved"
    what: str
    step: int
    path: str
    bytes: int


@dataclass(frozen=True)
class Recovered(Event):
    """The run met a fault, did something about it, and goes on."""

    kind: ClassVar[str] = "recovered"
    step: int
    message: str


@dataclass(frozen=True)
class Rejected(Event):
    """Data rows left out, per source and reason. `examples` are `file:line` of the first few."""

    kind: ClassVar[str] = "rejected"
    source: str
    reason: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fidelity(Event):
    """How near exports are to the trained model. Each entry: name, measured_by, kl, perplexity, top1, bytes.

    `kl` is the mean over `positions` of KL(trained || candidate) in nats, `top1` the share of positions where both
    think the same token most likely. `texts` says whose rows they are. `evaluation` holds the trained model's loss on
    rows of the run in nats, `here` and as `delivered`, with how many `rows` and `tokens`; None where none is compared.
    """

    kind: ClassVar[str] = "fidelity"
    texts: str
    rows: int
    positions: int
    entries: tuple[Mapping[str, Any], ...]
    evaluation: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Exported(Event):
    """One product under its final name. `format` is "hf", "gguf-q8_0", "adapter-gguf" and so on."""

    kind: ClassVar[str] = "exported"
    format: str
    path: str
    bytes: int
    merge_base: str | None
    kl: float | None


@dataclass(frozen=True)
class Examined(Event):
    """What a model knows of its documents: the figures of exam.json (`study/exam_report.py` says which)."""

    kind: ClassVar[str] = "exam"
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class End(Event):
    """The last event of the training: why it ended and its totals. What [export] asks for follows.

    `phases` is where this process's time went, in seconds: rows (read and tokenized), checks (memory plan, self-check,
    dry run), load (of the base), evaluation, samples, training and saving; what there was none of is not in it.
    """

    kind: ClassVar[str] = "end"
    reason: str
    step: int
    steps: int
    seconds: float
    tokens: int
    trained_tokens: int
    train_loss: float | None
    eval_loss: float | None
    exact_match_before: float | None
    exact_match_after: float | None
    peak_bytes: int
    adapter: str | None
    adapter_step: int | None
    memory: Mapping[str, Mapping[str, int]] | None = None  # part: predicted and measured bytes
    phases: Mapping[str, float] = field(default_factory=dict)


def clean(event: Event) -> Event:
    """The event without secrets, and with nothing in its texts that steers a terminal; itself where all is clean.

    Only the words of a sample may have several lines.
    """
    texts = {name: value for name, value in vars(event).items() if isinstance(value, str | tuple | Mapping)}
    plain = {name: plain_values(redact_all(value), isinstance(event, Sampled)) for name, value in texts.items()}
    changed = {name: value for name, value in plain.items() if value != texts[name]}
    return replace(event, **changed) if changed else event


class Sink(Protocol):
    """Receives every event of a run, in order."""

    def emit(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Several sinks as one, and the gate of all: an event may quote a path, a row or a library's error."""

    def __init__(self, *sinks: Sink) -> None:
        """Those that are several sinks themselves are taken apart: an event goes through the gate once."""
        self.sinks: tuple[Sink, ...] = tuple(
            inner for sink in sinks for inner in (sink.sinks if isinstance(sink, Sinks) else (sink,))
        )

    def emit(self, event: Event) -> None:
        passed = clean(event)
        for sink in self.sinks:
            sink.emit(passed)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class Recorder:
    """A sink that keeps the events in a list: for tests and for callers of the Python API."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing is open."""

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]
