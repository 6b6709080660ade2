"""An export from its beginning to its end: plan, look at the trained model, choose the base, write, verify, publish.

What cannot be done is found before a weight is read. Products are written into hidden folders, reopened and measured
there, and get their names last, each in one rename: a file that is not the trained model never has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import gguf
import torch

from qlora import disk
from qlora.errors import ExportError
from qlora.events import Exported, Notice, Sink
from qlora.events import Fidelity as FidelityEvent
from qlora.export import cards, hf
from qlora.export import imatrix as importance
from qlora.export.artifacts import DTYPES, Artifact, ExportedArtifact, ExportOptions, Report, Source
from qlora.export.gguf import lora, write
from qlora.export.gguf import plan as gguf_plan
from qlora.export.gguf import vocab as vocabulary
from qlora.export.gguf.metadata import About, entries, general_keys
from qlora.export.gguf.plan import GgufPlan, Tokens
from qlora.export.gguf.quant_mixes import QUANTS
from qlora.export.gguf.rope import Key
from qlora.export.gguf.write import GgufFile, Tools
from qlora.export.merge.merge import Merge, MergeBase
from qlora.export.staging import StagedExport, check_disk
from qlora.export.verify import checks, weights
from qlora.export.verify.checks import Inspection
from qlora.export.verify.fidelity import Fidelity
from qlora.export.verify.reference import TrainedReference, better_base, study
from qlora.export.verify.weights import Verified

IMATRIX_FILE = "imatrix.gguf"


@dataclass
class _Job:
    """An export under way: what was planned, the hidden folders, and what came of each product so far."""

    source: Source
    products: Sequence[Artifact]
    options: ExportOptions
    sink: Sink
    plan: GgufPlan | None
    study: TrainedReference
    workshops: dict[str, StagedExport] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    inspections: dict[str, Inspection] = field(default_factory=dict)
    failures: dict[str, ExportError] = field(default_factory=dict)

    @property
    def planned(self) -> GgufPlan:
        assert self.plan is not None, "there is a plan wherever a GGUF file is made"
        return self.plan

    def named(self, prefix: str) -> list[Artifact]:
        return [product for product in self.products if product.key.startswith(prefix)]

    def file_name(self, product: Artifact) -> str:
        """Of a product's GGUF file, such as support-Q4_K_M.gguf."""
        label = QUANTS[product.quant].label if product.quant else "LoRA"
        return f"{self.source.name}-{label}.gguf"


def produce(
    source: Source,
    products: Sequence[Artifact],
    merge_base: Literal["auto", "nf4", "full"],
    options: ExportOptions,
    sink: Sink,
) -> Report:
    """Make `products` of an adapter and its base. Raises ExportError for what cannot be made, or was made and is not
    the trained model; products that hold are published all the same.
    """
    _refuse_idle(options, products)
    plan = _plan(source, products, merge_base, options, sink)
    _check_disk(source, products, options, plan)
    merging = any(product.key != "adapter-gguf" for product in products)
    imatrix = options.imatrix and any(product.quant for product in products)
    scratch = products[0].folder.parent
    disk.make_folder(scratch)
    with study(source, options.verify and merging, imatrix, sink, scratch) as found, ExitStack() as stack:
        job = _Job(source, products, options, sink, plan, found)
        chosen = _choose_base(job, merge_base) if merging else None
        _write_hf(job, chosen, stack)
        _write_ggufs(job, chosen, stack)
        _write_adapter(job, stack)
        if options.verify:
            _verify(job, chosen)
        return _publish(job, chosen)


# --- before a weight is read -----------------------------------------------------------------------------------------


def _refuse_idle(options: ExportOptions, products: Sequence[Artifact]) -> None:
    """An option must not be a silent nothing."""
    quants = [product.quant for product in products if product.quant]
    if options.max_kl is not None and not options.verify:
        raise ExportError("--max-kl needs the measuring that --no-verify leaves out", "leave out one of them")
    if options.imatrix and not any(QUANTS[quant].needs_library for quant in quants):
        raise ExportError("--imatrix weighs the rounding of K- and IQ-quants", "add --to gguf --quant q4_k_m, say")
    if options.dtype != "bf16" and all(product.key != "hf" for product in products):
        raise ExportError("--dtype is the type of safetensors", "add --to hf, or name the type with --quant")
    if options.tokenizer_pre and not quants:
        raise ExportError("--tokenizer-pre is for GGUF files", "add --to gguf")


def _plan(
    source: Source,
    products: Sequence[Artifact],
    merge_base: Literal["auto", "nf4", "full"],
    options: ExportOptions,
    sink: Sink,
) -> GgufPlan | None:
    """What can be found wrong at once: another base, too little to merge, what llama.cpp cannot express."""
    ggufs = [product for product in products if product.key != "hf"]
    merge = source.merge("nf4" if merge_base == "auto" else merge_base, torch.float32)
    shapes = {tensor.parameter: tensor.shape for tensor in merge.tensors()}
    if not ggufs:
        return None
    if any(product.quant is None for product in ggufs):
        lora.check(source.adapter)
    quants = [product.quant for product in ggufs if product.quant]
    template = source.rows.chat.template if source.rows is not None else None
    tokens = Tokens(source.adapter.folder, template, options.tokenizer_pre)
    plan = gguf_plan.plan(source.base, shapes, tokens, quants, options.imatrix)
    for notice in plan.notices:
        sink.emit(Notice("gguf", notice))
    return plan


def _check_disk(source: Source, products: Sequence[Artifact], options: ExportOptions, plan: GgufPlan | None) -> None:
    """Room for all products together; each one's own is looked at again when it begins."""
    needed = 0
    for product in products:
        if product.key == "hf":
            needed += hf.planned_bytes(source.merge("nf4", DTYPES[options.dtype]))
        elif plan is not None and product.quant is not None:
            types = plan.choices[product.quant].types
            needed += GgufFile(product.key, "", (), types).nbytes(plan.layout)
    check_disk([product.folder for product in products], needed)


def _choose_base(job: _Job, wanted: Literal["auto", "nf4", "full"]) -> MergeBase:
    """The merge base: as asked for, else the one that is measured nearer to the trained model."""
    source, found = job.source, job.study
    trained_on: MergeBase = "full" if source.origin.quantization.type == "none" else "nf4"
    both: list[MergeBase] = (
        ["full"] if trained_on == "full" else ["nf4"] if source.base.stored_4bit else ["nf4", "full"]
    )
    if found.reference is None:
        return trained_on if wanted == "auto" else wanted
    measured = [(base, found.measure_merge(base)) for base in both]
    return better_base(measured) if wanted == "auto" else wanted


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_hf(job: _Job, chosen: MergeBase | None, stack: ExitStack) -> None:
    for product in job.named("hf"):
        merge = job.source.merge(_known(chosen), DTYPES[job.options.dtype])
        opened = StagedExport.open({product.key: product.folder}, merge.identity(), hf.planned_bytes(merge))
        job.workshops[product.key] = stack.enter_context(opened)
        job.tensors[product.key] = hf.fill(merge, opened, job.sink)
        hf.add_stop_token(opened.folder(product.key), job.study.voice.end_ids, job.sink)


def _write_ggufs(job: _Job, chosen: MergeBase | None, stack: ExitStack) -> None:
    """All quants in one pass over the weights."""
    products = job.named("gguf-")
    if not products:
        return
    plan, layout = job.planned, job.planned.layout
    merge = job.source.merge(_known(chosen), torch.float32)
    matrix = job.study.imatrix
    files = [GgufFile(p.key, job.file_name(p), _keys(job, p), plan.choices[str(p.quant)].types) for p in products]
    identity = {**merge.identity(), "keys": disk.sha256_text(*(repr(file.keys) for file in files))}
    if matrix is not None:
        identity["imatrix"] = matrix.sha256()
    finals = {product.key: product.folder for product in products}
    opened = StagedExport.open(finals, identity, sum(file.nbytes(layout) for file in files))
    job.workshops |= dict.fromkeys(finals, stack.enter_context(opened))
    weights = {} if matrix is None else matrix.renamed(layout.names).importance()
    write.write(layout, merge.tensors(), files, opened, Tools(plan.library, weights), job.sink)
    for product in products:
        job.tensors[product.key] = len(layout.tensors)
        if matrix is not None:
            importance.write(matrix, opened.folder(product.key) / IMATRIX_FILE, layout.names, job.source.datasets)


def _keys(job: _Job, product: Artifact) -> tuple[vocabulary.Entry, ...]:
    """Every key of a model file."""
    assert product.quant is not None
    about = About.of(job.source.base, job.source.name, job.source.datasets)
    quant: list[Key] = [
        ("general.file_type", QUANTS[product.quant].file_type),
        ("general.quantization_version", gguf.GGML_QUANT_VERSION),
    ]
    if job.study.imatrix is not None:
        quant += [
            ("quantize.imatrix.file", IMATRIX_FILE),
            ("quantize.imatrix.entries_count", len(job.study.imatrix.sums)),
        ]
    general = general_keys(about, "model", job.planned.vocab.strips_after_specials)
    own = entries([*general, *quant, *job.planned.layout.keys])
    return (*own, *vocabulary.metadata(job.planned.vocab))


def _write_adapter(job: _Job, stack: ExitStack) -> None:
    for product in job.named("adapter-"):
        source = job.source
        identity = source.merge("nf4", torch.float32).identity()
        opened = StagedExport.open({product.key: product.folder}, identity, lora.planned_bytes(source.adapter))
        job.workshops[product.key] = stack.enter_context(opened)
        if opened.start == 0:
            about = About.of(source.base, source.name, source.datasets)
            lora.write(source.adapter, job.planned.layout, about, opened, (product.key, job.file_name(product)))
            opened.checkpoint(1)
        job.tensors[product.key] = 2 * len(source.adapter.lora)


# --- verifying -------------------------------------------------------------------------------------------------------


def _verify(job: _Job, chosen: MergeBase | None) -> None:
    """Reopen and measure each product where it lies; what does not hold is remembered, the others go on."""
    folders = {key: workshop.folder(key) for key, workshop in job.workshops.items()}
    verified: dict[str, Verified] = {}
    if chosen is not None:
        merge = job.source.merge(chosen, torch.float32)
        verified = checks.reopen(merge, {p.key: _target(job, p, chosen) for p in job.products if p.key in _merged(job)})
    for product in job.products:
        folder = folders[product.key]
        file = folder / job.file_name(product)
        try:
            if product.key == "hf":
                written = job.source.merge(_known(chosen), DTYPES[job.options.dtype])
                found = checks.inspect_folder(job.study, written, folder, verified[product.key], job.sink)
            elif product.quant is None:
                found = checks.inspect_adapter(job.source.adapter, job.planned, file)
            else:
                found = checks.inspect_gguf(job.study, job.planned, file, product.key, verified[product.key])
            job.inspections[product.key] = found
            _refuse_far(found.fidelity, job.options.max_kl)
        except ExportError as error:
            job.failures[product.key] = error


def _merged(job: _Job) -> set[str]:
    return {product.key for product in job.products if product.key != "adapter-gguf"}


def _target(job: _Job, product: Artifact, chosen: MergeBase) -> weights.Target:
    """What of a merged product is to be compared with its base and adapter."""
    folder = job.workshops[product.key].folder(product.key)
    if product.quant is None:
        return weights.folder_target(folder, job.source.merge(chosen, DTYPES[job.options.dtype]))
    types = job.planned.choices[product.quant].types
    return weights.gguf_target(folder / job.file_name(product), types, _keys(job, product))


def _refuse_far(line: Fidelity | None, max_kl: float | None) -> None:
    if line is not None and max_kl is not None and line.kl > max_kl:
        what = f"{line.name}: is {line.kl:.2g} nats a token away from the trained model, over --max-kl {max_kl:g}"
        raise ExportError(what, "choose a --quant with more bits, or another --base, or a higher --max-kl")


# --- the end ---------------------------------------------------------------------------------------------------------


def _publish(job: _Job, chosen: MergeBase | None) -> Report:
    """Companions, then the names. Raises the first failure when the others have theirs."""
    table = tuple(job.study.table)
    _tell(job, table)
    done = []
    for product in job.products:
        workshop = job.workshops[product.key]
        if product.key in job.failures:
            workshop.discard(product.key)
            continue
        merge = None if product.key == "adapter-gguf" else job.source.merge(_known(chosen), torch.float32)
        _write_companions(job, product, merge, table)
        size = workshop.publish(product.key)
        merged = len(merge.changed) if merge is not None else 0
        base = merge.merge_base if merge is not None else None
        done.append(ExportedArtifact(product.key, product.folder, size, job.tensors[product.key], merged, base))
        kl = found.fidelity.kl if (found := job.inspections.get(product.key)) and found.fidelity else None
        job.sink.emit(Exported(product.key, str(product.folder), size, base, kl))
    for error in job.failures.values():
        raise error
    results = tuple(
        (key, check.name, check.ok, check.detail) for key, found in job.inspections.items() for check in found.checks
    )
    return Report(tuple(done), chosen, table, results)


def _write_companions(job: _Job, product: Artifact, merge: Merge | None, table: Sequence[Fidelity]) -> None:
    folder = job.workshops[product.key].folder(product.key)
    texts = job.study.texts
    markdown = cards.fidelity_markdown(table, texts)
    found = job.inspections.get(product.key)
    more = {"tensors": job.tensors[product.key], "checks": [check.as_dict() for check in found.checks] if found else []}
    disk.write_atomic(folder / cards.EXPORT_FILE, cards.export_json(job.source, product, merge, more, table))
    if product.key == "hf":
        assert merge is not None
        card = cards.merged_card(merge, markdown)
    else:
        name = job.file_name(product)
        card = cards.gguf_card(job.source, product, name, merge, markdown)
        base_file = (
            f"{Path(job.source.base.name).name}.gguf"  # for the user to put there, or to rename in the Modelfile
        )
        file, adapter = (name, None) if merge is not None else (base_file, name)
        text = cards.modelfile(job.study, file, adapter, job.planned.vocab.add_bos)
        disk.write_atomic(folder / cards.MODEL_FILE, text)
    disk.write_atomic(folder / "README.md", card)


def _tell(job: _Job, table: Sequence[Fidelity]) -> None:
    if not table:
        return
    lines = tuple(
        {
            "name": line.name,
            "measured_by": line.measured_by,
            "kl": line.kl,
            "perplexity": line.perplexity,
            "top1": line.top1,
            "bytes": line.bytes,
        }
        for line in table
    )
    job.sink.emit(FidelityEvent(job.study.texts, table[0].rows, table[0].positions, lines))


def _known(chosen: MergeBase | None) -> MergeBase:
    assert chosen is not None, "only an adapter alone is written without a merge"
    return chosen
