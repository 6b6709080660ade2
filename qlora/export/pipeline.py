"""An export from its beginning to its end: plan, run the trained model, choose the base, write, verify, publish.

What cannot be done is found before a weight is read. Artifacts are written into hidden folders, reopened and measured
there, and get their names last, each in one rename: a file that is not the trained model never has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import gguf
import torch

from qlora import disk
from qlora.errors import DoesNotFit, ExportError, forget_frames
from qlora.events import Exported, Notice, Sink
from qlora.events import Fidelity as FidelityEvent
from qlora.export import cards, hf, kept_codes
from qlora.export import imatrix as importance
from qlora.export.artifacts import DTYPES, Artifact, ExportedArtifact, ExportOptions, Report, Source
from qlora.export.base_content import left_as_found
from qlora.export.combine import copy_adapter
from qlora.export.gguf import lora, write
from qlora.export.gguf import plan as gguf_plan
from qlora.export.gguf import vocab as vocabulary
from qlora.export.gguf.metadata import About, Entry, entries, general_keys
from qlora.export.gguf.plan import GgufPlan, Tokens
from qlora.export.gguf.quant_mixes import QUANTS
from qlora.export.gguf.rope import Key
from qlora.export.gguf.write import GgufFile, Tools
from qlora.export.kept_codes import KeptCodes
from qlora.export.merge.experts import Reading
from qlora.export.merge.merge import Merge
from qlora.export.merge.parts import MergeBase
from qlora.export.staging import StagedExport, check_disk
from qlora.export.verify import checks, choice, weights
from qlora.export.verify.checks import Inspection
from qlora.export.verify.fidelity import Fidelity
from qlora.export.verify.reference import TrainedReference, trained_reference
from qlora.model.tokenizer_files import of_export
from qlora.page_cache import LeftAsFound
from qlora.run_folder import dataset_name, kept

IMATRIX_FILE = "imatrix.gguf"
# Of a line of the table, what its event carries: rows and positions are the same for all lines.
_EMITTED = ("name", "measured_by", "kl", "perplexity", "top1", "bytes")


@dataclass
class _Job:
    """An export under way: what was planned, the hidden folders, and by key what came of each artifact so far.

    `plan` is None where no GGUF file is made, `merge_base` until it is chosen, and where nothing is merged.
    """

    source: Source
    artifacts: Sequence[Artifact]
    options: ExportOptions
    sink: Sink
    stack: ExitStack
    plan: GgufPlan | None = None
    merge_base: MergeBase | None = None
    reference: TrainedReference = field(init=False)
    codes: KeptCodes | None = None
    cache: LeftAsFound | None = None
    staged: dict[str, StagedExport] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    inspections: dict[str, Inspection] = field(default_factory=dict)
    failures: dict[str, ExportError | DoesNotFit] = field(default_factory=dict)

    @property
    def planned(self) -> GgufPlan:
        assert self.plan is not None, "there is a plan wherever a GGUF file is made"
        return self.plan

    def merge(self, dtype: torch.dtype = torch.float32) -> Merge:
        assert self.merge_base is not None, "only an adapter alone is written without a merge"
        merge = replace(self.source.merge(self.merge_base, dtype), reading=Reading(cache=self.cache))
        merge = replace(merge, watch=self.reference.content.watched)
        return merge if self.codes is None else replace(merge, codes=self.codes.read)

    def identity(self, merge: Merge) -> dict[str, str]:
        """Everything that merged values depend on."""
        return {**merge.identity(), **self.reference.content.staged_as()}

    def named(self, prefix: str) -> list[Artifact]:
        return [artifact for artifact in self.artifacts if artifact.key.startswith(prefix)]

    def file_name(self, artifact: Artifact) -> str:
        """Of an artifact's GGUF file, such as support-Q4_K_M.gguf."""
        label = QUANTS[artifact.quant].label if artifact.quant else "LoRA"
        return f"{cards.file_name(self.source.name)}-{label}.gguf"

    def open(self, artifacts: Sequence[Artifact], identity: Mapping[str, str], needed_bytes: int) -> StagedExport:
        """Their hidden folders, for as long as the export runs."""
        finals = {artifact.key: artifact.folder for artifact in artifacts}
        staged = self.stack.enter_context(StagedExport.open(finals, identity, needed_bytes))
        self.staged |= dict.fromkeys(finals, staged)
        return staged

    def folder(self, artifact: Artifact) -> Path:
        return self.staged[artifact.key].folder(artifact.key)


def produce(
    source: Source,
    artifacts: Sequence[Artifact],
    merge_base: MergeBase | Literal["auto"],
    options: ExportOptions,
    sink: Sink,
    asked: str = "",
) -> Report:
    """Make `artifacts` of an adapter and its base. Raises ExportError for what cannot be made, or was made and is not
    the trained model; artifacts that hold are published all the same. `asked` is a hash of all that was asked for.
    """
    _refuse_idle(options, artifacts)
    with ExitStack() as stack:
        job = _Job(source, artifacts, options, sink, stack)
        job.plan = _plan(job, merge_base)
        _check_disk(job)
        merging = any(artifact.merged for artifact in artifacts)
        scratch = artifacts[0].folder.parent
        disk.make_folder(scratch)
        verify = options.verify and merging
        job.reference = stack.enter_context(trained_reference(source, verify, options.imatrix, sink, scratch))
        job.merge_base = _choose_base(job, merge_base) if merging else None
        if job.merge_base == "nf4":
            job.codes = stack.enter_context(kept_codes.opened(source, job.reference.content, sink))
        passes = bool(job.named("hf")) + bool(job.named("gguf-")) + options.verify
        job.cache = left_as_found(source.base, passes)
        _write_hf(job)
        _write_ggufs(job)
        _write_adapter(job)
        _write_combined(job)
        job.reference.content.identity()  # another base than was trained on is refused here at the latest
        if options.verify:
            _verify(job)
        source.seal.check()
        return _publish(job, asked)


# --- before a weight is read -----------------------------------------------------------------------------------------


def _refuse_idle(options: ExportOptions, artifacts: Sequence[Artifact]) -> None:
    """An option must not be a silent nothing."""
    quants = [artifact.quant for artifact in artifacts if artifact.quant]
    if options.max_kl is not None and not options.verify:
        raise ExportError("`max_kl` needs the measuring that verify=False leaves out", "leave out one of them")
    if options.imatrix and not any(QUANTS[quant].needs_library for quant in quants):
        raise ExportError("`imatrix` weighs the rounding of K- and IQ-quants", "add to='gguf', quants=['q4_k_m'], say")
    if options.dtype != "bf16" and all(artifact.key != "hf" for artifact in artifacts):
        raise ExportError("`dtype` is the type of safetensors", "add to='hf', or name the type with `quants`")
    if options.tokenizer_pre and not quants:
        raise ExportError("`tokenizer_pre` is for GGUF files", "add to='gguf'")


def _plan(job: _Job, merge_base: MergeBase | Literal["auto"]) -> GgufPlan | None:
    """What can be found wrong at once: another base, too little to merge, what llama.cpp cannot express."""
    source, options = job.source, job.options
    ggufs = [artifact for artifact in job.artifacts if artifact.key not in ("hf", "adapter")]
    merge = source.merge("nf4" if merge_base == "auto" else merge_base, torch.float32)
    shapes = {tensor.parameter: tensor.shape for tensor in merge.tensors()}
    if not ggufs:
        return None
    if any(artifact.quant is None for artifact in ggufs):
        lora.check(source.adapter)
    quants = [artifact.quant for artifact in ggufs if artifact.quant]
    template = source.rows.chat.template if source.rows is not None else None
    files = of_export(source.base.path, source.adapter.folder)
    tokens = Tokens(files, template, options.tokenizer_pre)
    plan = gguf_plan.plan(source.base, shapes, tokens, quants, options.imatrix, source.meta_model)
    if any(artifact.quant is None for artifact in ggufs):
        lora.check_layout(source.adapter, plan.layout)
    for notice in plan.notices:
        job.sink.emit(Notice("gguf", notice))
    return plan


def _check_disk(job: _Job) -> None:
    """Room for all artifacts together; each one's own is checked again when it begins."""
    needed = 0
    for artifact in job.artifacts:
        if artifact.key == "hf":
            needed += hf.planned_bytes(job.source.merge("nf4", DTYPES[job.options.dtype]))
        elif artifact.quant is not None:
            types = job.planned.choices[artifact.quant].types
            needed += GgufFile(artifact.key, "", (), types).nbytes(job.planned.layout)
    check_disk([artifact.folder for artifact in job.artifacts], needed)


def _choose_base(job: _Job, wanted: MergeBase | Literal["auto"]) -> MergeBase:
    """The merge base: as asked for, else as `choice` takes it from what both are measured to be."""
    asked = None if wanted == "auto" else wanted
    trained_on: MergeBase = "full" if job.source.origin.quantization.type == "none" else "nf4"
    if job.reference.predictions is None:
        return asked or trained_on
    bases: list[MergeBase] = [trained_on]
    if trained_on == "nf4" and not job.source.base.stored_4bit:
        bases.append("full")
    measured = {base: job.reference.measure_merge(base) for base in bases}
    if len(bases) == 1:
        return asked or trained_on
    chosen = choice.choose(measured, job.reference.positions, asked, job.options.max_kl)
    job.reference.choice = chosen
    job.sink.emit(Notice("merge", chosen.in_words()))
    return chosen.merge_base


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_hf(job: _Job) -> None:
    for artifact in job.named("hf"):
        merge = job.merge(DTYPES[job.options.dtype])
        staged = job.open([artifact], job.identity(merge), hf.planned_bytes(merge))
        job.tensors[artifact.key] = hf.fill(merge, staged, job.sink)
        hf.add_stop_token(job.folder(artifact), job.reference.chat.end_ids, job.sink)


def _write_ggufs(job: _Job) -> None:
    """All quants in one pass over the weights."""
    artifacts = job.named("gguf-")
    if not artifacts:
        return
    plan, layout, merge, matrix = job.planned, job.planned.layout, job.merge(), job.reference.imatrix
    files = [GgufFile(a.key, job.file_name(a), _keys(job, a), plan.choices[str(a.quant)].types) for a in artifacts]
    identity = {**job.identity(merge), "keys": disk.sha256_text(*(repr(file.keys) for file in files))}
    if matrix is not None:
        identity["imatrix"] = matrix.sha256()
    staged = job.open(artifacts, identity, sum(file.nbytes(layout) for file in files))
    tools = Tools(plan.library, {} if matrix is None else matrix.renamed(layout.inputs).importance())
    write.write(layout, merge.tensors(), files, staged, tools, job.sink)
    for artifact in artifacts:
        job.tensors[artifact.key] = len(layout.tensors)
        if matrix is not None:
            importance.write(matrix, job.folder(artifact) / IMATRIX_FILE, layout.inputs, job.source.datasets)


def _keys(job: _Job, artifact: Artifact) -> tuple[Entry, ...]:
    """Every key of a model file."""
    assert artifact.quant is not None
    about = About.of(job.source.base, job.source.name, job.source.datasets)
    quant: list[Key] = [
        ("general.file_type", QUANTS[artifact.quant].file_type),
        ("general.quantization_version", gguf.GGML_QUANT_VERSION),
    ]
    if (matrix := job.reference.imatrix) is not None:
        quant += [("quantize.imatrix.file", IMATRIX_FILE), ("quantize.imatrix.entries_count", len(matrix.sums))]
    general = general_keys(about, "model", job.planned.vocab.strips_after_specials)
    return (*entries([*general, *quant, *job.planned.layout.keys]), *vocabulary.metadata(job.planned.vocab))


def _write_adapter(job: _Job) -> None:
    for artifact in job.named("adapter-"):
        source = job.source
        identity = job.identity(source.merge("nf4", torch.float32))
        staged = job.open([artifact], identity, lora.planned_bytes(source.adapter, job.planned.layout))
        if staged.start == 0:
            about = About.of(source.base, source.name, source.datasets)
            lora.write(source.adapter, job.planned.layout, about, staged, (artifact.key, job.file_name(artifact)))
            staged.checkpoint(1)
        job.tensors[artifact.key] = 2 * sum(t.parameter in source.adapter.lora for t in job.planned.layout.tensors)


def _write_combined(job: _Job) -> None:
    """The combined adapter in PEFT's layout, with its tokenizer and what it was made of."""
    for artifact in job.named("adapter"):
        if artifact.key != "adapter":
            continue
        adapter = job.source.adapter
        size = sum(entry.nbytes for entry in adapter.tensors.values())
        staged = job.open([artifact], job.identity(job.source.merge("nf4", torch.float32)), size)
        copy_adapter(adapter.folder, staged.folder(artifact.key))
        job.tensors[artifact.key] = len(adapter.tensors)


# --- verifying -------------------------------------------------------------------------------------------------------


def _verify(job: _Job) -> None:
    """Reopen and measure each artifact where it lies; what does not hold is remembered, the others go on."""
    targets = {artifact.key: _target(job, artifact) for artifact in job.artifacts if artifact.merged}
    of_weights = weights.reopen(job.merge(), targets) if targets else {}
    for artifact in job.artifacts:
        folder = job.folder(artifact)
        file = folder / job.file_name(artifact)
        try:
            if artifact.key == "hf":
                merge = job.merge(DTYPES[job.options.dtype])
                found = checks.inspect_folder(job.reference, merge, folder, of_weights[artifact.key], job.sink)
            elif artifact.key == "adapter":
                found = checks.inspect_combined(job.source.adapter, folder)
            elif artifact.quant is None:
                found = checks.inspect_adapter(job.source.adapter, job.planned, file)
            else:
                found = checks.inspect_gguf(job.reference, job.planned, file, artifact.key, of_weights[artifact.key])
            job.inspections[artifact.key] = found
            _refuse_far(found.fidelity, job.options.max_kl)
        except (ExportError, DoesNotFit) as error:
            forget_frames(error, None)  # what was compared is not kept while others are
            job.failures[artifact.key] = error


def _target(job: _Job, artifact: Artifact) -> weights.Target:
    """What of a merged artifact is to be compared with its base and adapter."""
    if artifact.quant is None:
        return weights.folder_target(job.folder(artifact), DTYPES[job.options.dtype])
    types = job.planned.choices[artifact.quant].types
    return weights.gguf_target(job.folder(artifact) / job.file_name(artifact), types, _keys(job, artifact))


def _refuse_far(line: Fidelity | None, max_kl: float | None) -> None:
    if line is not None and max_kl is not None and line.kl > max_kl:
        what = f"{line.name}: is {line.kl:.2g} nats a token away from the trained model, over `max_kl` {max_kl:g}"
        raise ExportError(what, "choose a `quants` with more bits, or another `merge_base`, or a higher `max_kl`")


# --- the end ---------------------------------------------------------------------------------------------------------


def _publish(job: _Job, asked: str) -> Report:
    """Companions, then the names. Raises the first failure when the others have theirs."""
    table = tuple(job.reference.table)
    told = None
    if table:
        lines = tuple({key: getattr(line, key) for key in _EMITTED} for line in table)
        loss = job.reference.evaluation
        compared = None if loss is None else asdict(loss)
        told = FidelityEvent(job.reference.texts, table[0].rows, table[0].positions, lines, compared)
        job.sink.emit(told)
    published = []
    for artifact in job.artifacts:
        staged = job.staged[artifact.key]
        if artifact.key in job.failures:
            staged.discard(artifact.key)
            continue
        merge = job.merge() if artifact.merged else None
        _write_companions(job, artifact, merge)
        size, aside = staged.publish(artifact.key, {"of": {**_made_of(job.source), "asked": asked}})
        base, merged = (merge.merge_base, len(merge.changed)) if merge is not None else (None, 0)
        made = ExportedArtifact(artifact.key, artifact.folder, size, job.tensors[artifact.key], merged, base)
        if aside is not None:
            made = replace(made, set_aside=str(aside.folder), set_aside_bytes=aside.bytes)
            job.sink.emit(Notice("export", f"{artifact.folder}: the export before had been changed; {kept(aside)}"))
        published.append(made)
        kl = found.fidelity.kl if (found := job.inspections.get(artifact.key)) and found.fidelity else None
        job.sink.emit(Exported(artifact.key, str(artifact.folder), size, base, kl))
    for error in job.failures.values():
        raise error
    results = tuple(
        (key, check.name, check.ok, check.detail) for key, found in job.inspections.items() for check in found.checks
    )
    chosen = job.reference.choice
    return Report(tuple(published), job.merge_base, table, results, job.reference.evaluation, chosen, told=told)


def _made_of(source: Source) -> dict[str, str | None]:
    """For a manifest: names, not folders of this machine."""
    return {
        "adapter": dataset_name(source.name),
        "base": dataset_name(source.base.name),
        "revision": source.base.commit,
    }


def _write_companions(job: _Job, artifact: Artifact, merge: Merge | None) -> None:
    folder, table = job.folder(artifact), tuple(job.reference.table)
    markdown = cards.fidelity_markdown(table, job.reference.texts)
    found = job.inspections.get(artifact.key)
    results = [asdict(check) for check in found.checks] if found else []
    loss = job.reference.evaluation
    compared = None if loss is None else asdict(loss)
    known = job.reference.content.identity().model_dump()
    more = {"base_identity": known, "tensors": job.tensors[artifact.key], "checks": results, "evaluation": compared}
    chosen = job.reference.choice
    more["choice"] = None if chosen is None else asdict(chosen)
    if chosen is not None and markdown and merge is not None:
        markdown += f"\nThe merge base: {chosen.in_words()}.\n"
    if loss is not None and markdown:
        markdown += f"\nIts loss on {loss.rows:,} evaluation rows: {loss.here:.4f} nats a token; the run measured "
        markdown += f"{loss.delivered:.4f} when it was delivered.\n"
    disk.write_atomic(folder / cards.EXPORT_FILE, cards.export_json(job.source, artifact, merge, more, table))
    if artifact.key == "hf":
        assert merge is not None
        card = cards.merged_card(merge, markdown, job.source.datasets)
    elif artifact.key == "adapter":
        assert job.source.combined is not None, "one adapter alone is not written again"
        card = cards.combined_card(job.source.base, job.source.combined)
    else:
        name = job.file_name(artifact)
        card = cards.gguf_card(job.source, artifact, name, merge, markdown)
        # An adapter's base is for the user to put there, or to rename in the Modelfile.
        base_file = f"{cards.file_name(Path(job.source.base.name).name)}.gguf"
        file, adapter = (name, None) if merge is not None else (base_file, name)
        text = cards.modelfile(job.reference, file, adapter, job.planned.vocab.add_bos)
        disk.write_atomic(folder / cards.MODEL_FILE, text)
    disk.write_atomic(folder / "README.md", card)
