"""What an event of `events.jsonl` must be like where a page reads it: of any version, by whoever wrote it.

Keys that a page does not show are not read, and keys that older versions did not write have defaults.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from qlora.foreign_json import ForeignModel

MAX_STEP = 1 << 52  # whole numbers up to here are exact as floats
MAX_KEPT = 500  # of each kind of thing that is listed


class Read(ForeignModel):
    """Of every event: a number may be NaN or infinite, as Python writes them."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=True)


class Started(Read):
    recipe: str = ""
    run_dir: str = ""
    base: str = ""
    commit: str | None = None
    device: str = ""
    versions: dict[str, str] = Field(default_factory=dict, max_length=100)
    resumed_from_step: int | None = None
    numerics: dict[str, Any] = Field(default_factory=dict, max_length=100)
    allocator: str | None = None


class Memory(Read):
    peak_bytes: int
    limit_bytes: int
    error_bytes: int = 0
    components: dict[str, int] = Field(default_factory=dict, max_length=100)


class PlannedCard(Read):
    card: str
    share: float
    packs_of_step: int
    needed_bytes: int
    limit_bytes: int


class Planned(Read):
    train_rows: int
    eval_rows: int
    packs: int
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    batch_size: int
    micro_batch_size: int
    steps: int
    epochs: float
    trainable_parameters: int
    total_parameters: int
    packing: bool
    max_length: int
    arithmetic: str = ""
    memory: Memory | None = None
    attention: str = ""
    cards: list[PlannedCard] = Field(default_factory=list, max_length=4096)


class Evaluation(Read):
    step: int = Field(ge=0, le=MAX_STEP)
    loss: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    rows: int = 0
    best: bool = False


class Preference(Read):
    step: int = Field(ge=0, le=MAX_STEP)
    evaluated: bool
    compared: int
    accuracy: float
    margin: float | None = None
    better_reward: float | None = None
    worse_reward: float | None = None
    divergence: float | None = None
    kl: float | None = None
    likelier: float | None = None


class Rewards(Read):
    step: int = Field(ge=0, le=MAX_STEP)
    evaluated: bool
    answers: int
    reward: float
    rewards: dict[str, float] = Field(default_factory=dict, max_length=100)
    tokens: float = 0.0
    cut: float = 0.0
    without_signal: float | None = None
    kl: float | None = None
    clipped: float | None = None
    mismatch: float | None = None


class Routing(Read):
    step: int = Field(ge=0, le=MAX_STEP)
    hit: list[float] = Field(max_length=MAX_KEPT)
    largest: list[float] = Field(max_length=MAX_KEPT)
    changed: list[float] = Field(max_length=MAX_KEPT)


class Sample(Read):
    step: int = Field(ge=0, le=MAX_STEP)
    prompt: str
    expected: str
    base: str
    tuned: str


class Said(Read):
    topic: str
    message: str
    count: int | None = None


class Saved(Read):
    what: str
    step: int = Field(ge=0, le=MAX_STEP)
    bytes: int = 0


class Recovered(Read):
    step: int = Field(ge=0, le=MAX_STEP)
    message: str


class Rejected(Read):
    source: str
    reason: str
    count: int
    examples: list[str] = Field(default_factory=list, max_length=100)


class FidelityEntry(Read):
    name: str
    measured_by: str = ""
    kl: float | None = None
    perplexity: float | None = None
    top1: float | None = None
    bytes: int | None = None


class Fidelity(Read):
    texts: str = ""
    rows: int = 0
    positions: int = 0
    entries: list[FidelityEntry] = Field(max_length=MAX_KEPT)


class Exported(Read):
    format: str
    path: str
    bytes: int = 0
    merge_base: str | None = None
    kl: float | None = None


class Ended(Read):
    reason: str
    step: int
    steps: int
    seconds: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    exact_match_before: float | None = None
    exact_match_after: float | None = None
    peak_bytes: int = 0
    adapter_step: int | None = None
    memory: dict[str, dict[str, int]] | None = Field(None, max_length=100)
    phases: dict[str, float] = Field(default_factory=dict, max_length=100)


class Interval(Read):
    mean: float
    low: float
    high: float


class ExamColumn(Read):
    questions: int
    right: Interval
    f1: Interval | None = None
    exact: Interval | None = None


class ExamPart(Read):
    questions: int
    columns: dict[str, ExamColumn] = Field(max_length=100)
    p_values: dict[str, float] = Field(default_factory=dict, max_length=100)
    untaught: int = 0


class Unanswerable(Read):
    questions: int = 0
    base: float | None = None
    tuned: float | None = None


class Elsewhere(Read):
    prompts: int = 0
    nats: float | None = None


class Exam(Read):
    """The figures of exam.json, and of the event (`study/exam_report.py`)."""

    parts: dict[str, ExamPart] = Field(max_length=100)
    unanswerable: Unanswerable = Unanswerable()
    elsewhere: Elsewhere = Elsewhere()
    coverage: dict[str, int] = Field(default_factory=dict, max_length=100)
    dropped: dict[str, int] = Field(default_factory=dict, max_length=100)
    advice: list[str] = Field(default_factory=list, max_length=100)


class Examined(Read):
    figures: Exam


class ExportNote(Read):
    """What export.json says of how near an export is to the trained model."""

    format: str = ""
    fidelity: list[FidelityEntry] = Field(default_factory=list, max_length=MAX_KEPT)
