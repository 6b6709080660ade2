"""The keys of a recipe, each declared once: default, bounds, and the sentence that editors and `--schema` show."""

from __future__ import annotations

import difflib
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from qlora.document_keys import DocumentsSection
from qlora.memory_keys import PlaceKeys
from qlora.objective_keys import Minimized, ObjectiveKeys, usual_rate
from qlora.recipe_values import MAX_MEMORY, Count, Minutes, Name, Names, Positive, Rows, Section, Share, Sinks, Text

# What [export] formats may name. The quants are those of qlora.export.gguf.quant_mixes (a test compares the two).
GGUF_QUANTS = ("f32", "f16", "bf16", "q8_0", "mxfp4_moe", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m", "iq4_xs")
EXPORT_FORMATS = ("hf", "adapter-gguf", *(f"gguf:{quant}" for quant in GGUF_QUANTS))


class ModelSection(Section):
    """The frozen base."""

    base: Text = Field(description="Hub name (owner/name) or folder of the base model, relative to the recipe")
    revision: Text = Field("main", description="Hub branch, tag or commit; the run records the commit")
    attention: Literal["auto", "sdpa", "varlen", "eager"] = Field(
        "auto",
        description="varlen: packed documents without a mask of S x S; auto: that where a trial of it passes, else "
        "sdpa, or eager where sdpa cannot compute the model (Gemma 2's softcap)",
    )
    dtype: Literal["auto", "bf16", "fp16"] = Field(
        "auto", description="Layers compute in it; auto: bf16, or fp16 with a scaled loss on a GPU without bf16 (T4)"
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="Layers through torch's compiler; auto: on a GPU where five steps were faster with it"
    )
    chat_template: Text = Field("auto", description="auto is the base's own, chatml for a base without one, or a file")
    template_kwargs: dict[Name, bool | int | float | Text] = Field(
        default_factory=dict, max_length=100, description="What the template is told, such as {enable_thinking = false}"
    )


class QuantizationSection(Section):
    """How the frozen base is stored."""

    type: Literal["nf4", "fp4", "none"] = Field("nf4", description="4-bit type of the base's weights; none is bf16")
    double_quant: bool = Field(
        True, description="The constants of the 4-bit blocks in 8 bit too: 0.37 bits a weight less"
    )


class LoraSection(Section):
    """The trained low-rank matrices."""

    r: Rows = Field(16, description="Rank of the trained matrices")
    alpha: float = Field(32.0, gt=0, le=1_000_000, description="Scale: the adapter's output is multiplied by alpha / r")
    dropout: Share = Field(0.0, description="Share of the adapter's input dropped while training")
    target_modules: Literal["all-linear"] | Names = Field(
        "all-linear", description="all-linear (every linear layer but the head), or names such as ['q_proj', 'v_proj']"
    )
    experts: bool = Field(False, description="Adapters on a mixture's experts too; routers stay frozen")
    init: Literal["default", "gaussian", "eva"] = Field(
        "default", description="Start of the A matrices; eva: main directions of the layers' inputs on your rows"
    )
    from_adapter: Text | None = Field(
        None, alias="from", description="Run or adapter folder whose adapter is trained on, with its rank and layers"
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = Field(
        False, description="Train a magnitude per output row as well: slower, sometimes better at small ranks"
    )
    modules_to_save: Names = Field((), description="Modules trained and saved whole, such as ['lm_head']")


SourceFormat = Literal[
    "auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text", "documents", "preference", "kto", "grpo"
]


class SourceSection(Section):
    """One source of rows."""

    path: Text = Field(
        description="File, glob, folder or folder:SPLIT, relative to the recipe, or hub:NAME[@revision][:split]",
    )
    format: SourceFormat = Field(
        "auto",
        description="How a row is read; auto: the format whose columns are all there, also under usual other names; "
        "documents: passages of md, html, txt, pdf, docx and epub as plain text, which teaches style, not facts; "
        "preference (chosen, rejected), kto (completion, label), grpo (prompt, answer): of objectives other than sft",
    )
    weight: float = Field(1.0, gt=0, le=100, description="Times each row is seen in an epoch; 0.5 draws half of them")
    columns: dict[Text, Text] = Field(
        default_factory=dict,
        max_length=1000,
        description="Your column's name by the format's own: {instruction = 'question'}",
    )


class DataSection(Section):
    """What the model learns from."""

    train: tuple[SourceSection, ...] = Field(
        (), max_length=1000, description="Training sources, as [[data.train]] tables"
    )
    eval: tuple[SourceSection, ...] = Field(
        (),
        max_length=1000,
        description="Evaluation sources, as [[data.eval]] tables; without them eval_fraction is used",
    )
    documents: tuple[DocumentsSection, ...] = Field(
        (), max_length=1000, description="Documents to be learnt by heart, as [[data.documents]] tables"
    )
    max_length: int = Field(2048, ge=16, le=1 << 20, description="Longest row, and length of a pack, in tokens")
    packing: bool = Field(True, description="Short rows share a pack, apart in attention and positions")
    loss_on: Literal["assistant", "all"] = Field(
        "assistant", description="assistant trains the assistant's turns with their end token, all trains every token"
    )
    eval_fraction: Share = Field(
        0.05, description="Share of the training rows kept to evaluate on, without [[data.eval]] or validation split"
    )
    truncation: Literal["drop", "cut", "error"] = Field(
        "drop", description="Rows over max_length: leave them out, cut them to their first tokens, or end with an error"
    )
    max_bad_rows: Count = Field(0, description="Broken rows to leave out, counted and listed, before giving up")


class _TrainKeys(Minimized):
    """The optimization: what is minimized stands before the learning rate that follows from it."""

    epochs: float | None = Field(
        None, gt=0, le=1_000_000, description="Passes over the training rows (3 unless max_steps is given)"
    )
    max_steps: Positive | None = Field(None, description="Optimizer steps, instead of epochs")
    max_minutes: Minutes | None = Field(None, description="Time limit; the learning rate comes down with it")
    batch_size: Rows | Literal["auto"] = Field(
        "auto",
        description="Rows (packs when packing) per optimizer step; auto: the largest up to 16 that leaves 100 steps",
    )
    micro_batch_size: Rows | Literal["auto"] = Field(
        1,
        description="Rows per forward pass: a step of 16 at 4 runs 4 passes; auto: the fastest that fits memory.limit",
    )
    learning_rate: float = Field(
        default_factory=usual_rate, gt=0, le=1, description="Learning rate at its peak (orpo 8e-5, dpo and others 1e-5)"
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate after the warm-up"
    )
    warmup_ratio: Share = Field(0.03, description="Share of the run in which the learning rate rises from 0")
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw", "lion_8bit"] = Field(
        "paged_adamw_8bit", description="Paged ones keep their state where CUDA can move it to host memory"
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay of the adapters")
    max_grad_norm: float = Field(
        1.0, ge=0, le=1_000_000, description="Longer gradients are scaled down to this norm; 0 is off"
    )
    gradient_checkpointing: bool | Rows | Literal["auto"] = Field(
        "auto",
        description="Recompute activations, not keep them: much less memory, a third more time; a number: of so many "
        "layers; auto: of as few as needed",
    )
    neftune_alpha: float = Field(
        0.0, ge=0, le=1_000_000, description="Noise on the embeddings while training (5 is usual); 0 is off"
    )
    seed: int = Field(42, ge=0, lt=1 << 32, description="Decides order, split, initial adapters and dropout")
    deterministic: bool = Field(
        True, description="On a GPU, sum in one order only: a resumed run is the same bit for bit; false is faster"
    )


class TrainSection(ObjectiveKeys, _TrainKeys):
    """The optimization."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps both set the length of the run: give one of them")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 3.0)  # frozen for callers, not while it is made
        return self


class MemorySection(PlaceKeys):
    """How much memory a run may take."""

    limit: Text = Field(
        "auto",
        description="A size such as 6GiB, or auto: what the GPU has free, else the free RAM; plans keep 5 % in reserve",
    )
    cache: bool | Literal["auto"] = Field(
        "auto",
        description="Keep the base in 4 bit on the disk, for quick starts; auto: one of 1 GiB and more, while all take "
        "under a tenth of the free disk",
    )

    @field_validator("limit")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if value != "auto" and parse_bytes(value) is None:
            raise ValueError('a size such as "6GiB" or "7.5 GiB", at most 1024TiB, or "auto"')
        return value


class CheckpointSection(Section):
    """What a killed run continues from."""

    every_steps: Positive = Field(50, description="Optimizer steps between checkpoints")
    every_minutes: Minutes = Field(
        10.0, description="Minutes between checkpoints; of steps and minutes, whichever comes first"
    )
    keep: Rows = Field(2, description="Newest checkpoints to keep")


class EvalSection(Section):
    """What is measured on the evaluation rows."""

    every_steps: Positive = Field(50, description="Optimizer steps between evaluations (one more at the end)")
    early_stopping_patience: Count = Field(0, description="Evaluations without improvement before stopping; 0 is off")
    samples: Count = Field(3, description="Evaluation prompts answered by base and tuned model side by side")
    exact_match_rows: Count = Field(
        0,
        description="Evaluation rows answered greedily, before and after, and compared (after NFC, strip and casefold)",
    )


class ReportSection(Section):
    """Where events go."""

    sinks: Sinks = Field(
        ("console", "jsonl", "html"),
        description="console draws, jsonl keeps events.jsonl, html makes report.html of it; the others are trackers",
    )


class ExportSection(Section):
    """What is made of the adapter when training ends."""

    formats: tuple[str, ...] = Field(
        (),
        max_length=100,
        description="Made at the end, in the run's export/: hf (safetensors), adapter-gguf, gguf:q4_k_m and its like",
        json_schema_extra={"items": {"type": "string", "enum": list(EXPORT_FORMATS)}},
    )
    base: Literal["auto", "nf4", "full"] = Field(
        "auto",
        description="Merge into nf4 (as trained on), full (original weights) or auto: the better, else the nearer one",
    )
    max_kl: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Mean KL in nats per token from the trained model beyond which an export is an error",
    )
    imatrix: bool = Field(False, description="Weigh the rounding of K- and IQ-quants by what your own rows use")

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        for name in formats:
            if name not in EXPORT_FORMATS:
                near = difflib.get_close_matches(name := name[:60], EXPORT_FORMATS, 1, 0.4)
                meant = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(EXPORT_FORMATS)}"
                raise ValueError(f"unknown format {name!r}{meant}")
        return formats


class OutputSection(Section):
    """Where the run's folder is made."""

    dir: Text = Field(
        "runs", description="Where runs stand, each under its recipe's name; relative to the current folder"
    )


def parse_bytes(text: str) -> int | None:
    """ "6GiB", "7.5 GiB", "8GB", "900MiB" as bytes; None for anything else, 0 and more than MAX_MEMORY."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if match is None:
        return None
    power = " KMGT".index(match[2].upper() or " ")
    count = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    return count if 0 < count <= MAX_MEMORY else None
