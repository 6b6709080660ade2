"""A family is shown: a tiny model with sharp answers, its file asked by llama.cpp, and each fault that must be seen.

Answers are sharp when their mean entropy is below half of that of a blind guess: of a model that hardly knows one token
from another, most faults hide in the noise. Rows are longer than every window. A fault is a change of the plan, as if
somebody had forgotten what the family declares.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.gguf.architectures import lay_out
from qlora.export.gguf.family import NOTHING, Change, GgufTensor
from qlora.export.gguf.plan import GgufPlan, Tokens, plan
from qlora.export.llama_cpp.runtime import Request
from qlora.export.llama_cpp.runtime_child import Failed
from qlora.model.resolve import resolve
from tests import mixtures
from tests.export import llama
from tests.export.gguf import written
from tests.export.gguf.cases import shapes_of
from tests.families import make_config, make_model, make_tokenizer

VOCAB = 384
ROWS, TOKENS = 2, 72  # windows of the cases are 12 to 24 long
SHARP = 0.5 * math.log(VOCAB)
EXACT, SEEN = 1e-6, 1e-3  # mean KL in nats: of a right file at most, of a fault at least

Fault = Callable[[GgufPlan], GgufPlan]


@dataclass(frozen=True)
class Case:
    """A tiny model of `model_type` that uses all that is special about its family, and the faults by name.

    damped  ends of parameters' names to what they are multiplied by, so that the random model does not enlarge each
            rounding from layer to layer (its own float32 is then as near to its float64 as a file must be)
    adjust  done to the model that is compared with: what llama.cpp is known to compute a little differently
    """

    model_type: str
    fields: Mapping[str, Any]
    faults: Mapping[str, Fault]
    note: str = ""  # what makes this case another one than the family's first
    damped: Mapping[str, float] = field(default_factory=dict)
    adjust: Callable[[Any], None] = lambda model: None
    mixture: bool = False  # of those in tests.mixtures

    @property
    def name(self) -> str:
        return f"{self.model_type} {self.note}".strip()


@dataclass(frozen=True)
class Shown:
    """What llama.cpp made of a case: mean entropy and KL of each quant, and of each fault (None: it will not load)."""

    entropy: float
    kl: Mapping[str, float]
    faults: Mapping[str, float | None] = field(default_factory=dict)


def unchanged_weights(*changes: str) -> Fault:
    """Weights written as they are stored, where one of `changes` is called for (no name: any)."""

    def fault(planned: GgufPlan) -> GgufPlan:
        tensors = tuple(
            replace(tensor, change=NOTHING, unit=1) if not changes or tensor.change.name in changes else tensor
            for tensor in planned.layout.tensors
        )
        assert tensors != planned.layout.tensors
        return written.with_layout(planned, tensors=tensors)

    return fault


def without(*ends: str) -> Fault:
    """The file without the keys that end so."""

    def fault(planned: GgufPlan) -> GgufPlan:
        kept = tuple(pair for pair in planned.layout.keys if not pair[0].endswith(ends))
        assert len(kept) == len(planned.layout.keys) - len(ends), (ends, planned.layout.keys)
        return written.with_layout(planned, keys=kept)

    return fault


def with_key(end: str, value: Any) -> Fault:
    """The file with another value under the key that ends so, or with that key."""

    def fault(planned: GgufPlan) -> GgufPlan:
        kept = [pair for pair in planned.layout.keys if not pair[0].endswith(f".{end}")]
        return written.with_layout(planned, keys=(*kept, (f"{planned.layout.arch}.{end}", value)))

    return fault


def without_factors(planned: GgufPlan) -> GgufPlan:
    """The file without its tensors of rotary factors."""
    assert planned.layout.constants
    return written.with_layout(planned, constants={})


def neutral_tensors(part: str) -> Fault:
    """Tensors whose names hold `part` as if they did nothing: norms of 1, biases of 0 (norms and biases are 1-D)."""

    def fault(planned: GgufPlan) -> GgufPlan:
        value = 0.0 if part.endswith("bias") else 1.0

        def blank(tensor: GgufTensor) -> Change:
            own = tensor.change
            made = lambda rows, unit: torch.full_like(own.to_gguf(rows, unit), value)  # noqa: E731
            return replace(own, to_gguf=made, name=f"blank {part}")

        tensors = tuple(
            replace(tensor, change=blank(tensor)) if part in tensor.name else tensor
            for tensor in planned.layout.tensors
        )
        assert tensors != planned.layout.tensors
        return written.with_layout(planned, tensors=tensors)

    return fault


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(10, VOCAB, (ROWS, TOKENS), generator=generator).tolist()


def tiny(case: Case, **fields: Any) -> Any:
    """The case's model, with other `fields`. transformers writes into the dictionaries that it is given."""
    own = copy.deepcopy({**case.fields, **fields})
    if case.mixture:
        return stir(make_model(mixtures.make_config(case.model_type, own)))
    return make_model(make_config(case.model_type, vocab=VOCAB, overrides=own))


def stir(model: Any) -> Any:
    """Random values where transformers begins a mixture's biases with zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if name.endswith(("e_score_correction_bias", "_proj_bias")):
                values.add_(0.3 * torch.randn(values.shape, generator=generator))
    return model


def make_base(case: Case, folder: Path) -> Path:
    """The case's base, in bfloat16, with a final norm that makes its answers sharp."""
    model = tiny(case)
    damp(model, case.damped)
    sharpen(model)
    folder.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(VOCAB).save_pretrained(folder)
    return folder


def damp(model: Any, factors: Mapping[str, float]) -> None:
    """Multiplies the parameters and stored buffers whose names end as `factors` says."""
    with torch.no_grad():
        for name, values in model.state_dict().items():
            for factor in (factor for end, factor in factors.items() if name.endswith(end)):
                values.mul_(factor)


def sharpen(model: Any) -> None:
    """Scales the last norm (its weight, or 1 + its weight) until the answers are sharp."""
    backbone = model.base_model
    norm = next(
        getattr(backbone, name) for name in ("norm", "final_layernorm", "embedding_norm") if hasattr(backbone, name)
    )
    hooked = torch.tensor(1.0)
    handle = norm.register_forward_hook(lambda module, given, result: result * hooked)
    while entropy(torch.cat([written.logprobs(model, row) for row in rows()])) > 0.9 * SHARP:
        hooked *= 1.25
    handle.remove()
    if getattr(norm, "weight", None) is None:  # OLMo's: the head instead
        model.lm_head.weight.data.mul_(hooked)
        return
    before = norm.weight.detach().clone()
    with torch.no_grad():
        probe = torch.randn(1, 4, norm.weight.shape[0], generator=torch.Generator().manual_seed(0))
        one = norm(probe)
        norm.weight.mul_(hooked)
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(hooked)
        if not torch.allclose(norm(probe), one * hooked, rtol=1e-4):  # the norm is stored less 1
            norm.weight.copy_((1 + before) * hooked - 1)
        assert torch.allclose(norm(probe), one * hooked, rtol=1e-3, atol=1e-5)


def entropy(logprobs_NV: torch.Tensor) -> float:
    return float(-(logprobs_NV.exp() * logprobs_NV).sum(-1).mean())


def divergence(reference_NV: torch.Tensor, found_NV: torch.Tensor) -> float:
    """Mean KL in nats."""
    reference, found = reference_NV.double(), found_NV.double()
    kl = float((reference.exp() * (reference - found)).sum(-1).mean())
    return kl if math.isfinite(kl) else math.inf


def show(case: Case, folder: Path, quants: tuple[str, ...] = ("f32",), isolated: bool = False) -> Shown:
    """The case written and asked; each fault alone in a file of its own. `isolated`: llama.cpp in a child process each
    time, which takes a second and outlives a file that aborts it; tests have it here."""
    base = make_base(case, folder / "base")
    model = written.transformers_model(base)
    case.adjust(model)
    reference = torch.cat([written.logprobs(model, row) for row in rows()])
    request = Request(rows=tuple((row, range(len(row))) for row in rows()))

    def asked(file: Path) -> float:
        found = written.ask(file, request) if isolated else llama.logprobs(file, request.rows)
        return divergence(reference, found)

    opened = resolve(str(base), "main", Recorder())
    planned, tensors = plan(opened, None, Tokens(), quants), written.plain_tensors(opened)
    files = written.write_planned(opened, planned, tensors, folder / "right")
    kl = {quant: asked(file) for quant, file in files.items()}
    faults: dict[str, float | None] = {}
    for number, (name, fault) in enumerate(case.faults.items()):
        broken = fault(replace(planned, choices={"f32": planned.choices["f32"]}))
        file = written.write_planned(opened, broken, tensors, folder / f"fault{number}")["f32"]
        try:
            faults[name] = asked(file)
        except (ExportError, Failed):
            faults[name] = None
    return Shown(entropy(reference), kl, faults)


def check(case: Case, folder: Path) -> None:
    """The case is right, and each of its faults is seen."""
    shown = show(case, folder)
    assert shown.entropy < SHARP
    assert shown.kl["f32"] <= EXACT
    unseen = {name: kl for name, kl in shown.faults.items() if kl is not None and kl <= SEEN}
    assert not unseen


def marked(
    cases: Sequence[Case], families: Collection[str], fast: Collection[str], slow: Collection[str] | None = None
) -> list[Any]:
    """The cases of these families as pytest's parameters: a few in the fast suite, one for each mechanism; where `slow`
    names families, CI runs theirs beside them, and the others are of those that it leaves out."""
    chosen = [case for case in cases if case.model_type in families]
    assert set(fast) <= {case.name for case in chosen}

    def mark(case: Case) -> Any:
        if case.name in fast:
            return ()
        return pytest.mark.slow if slow is None or case.model_type in slow else pytest.mark.every

    return [pytest.param(case, id=case.name, marks=mark(case)) for case in chosen]


def refused(cases: Sequence[Case], model_type: str, fields: Mapping[str, Any], message: str) -> None:
    """The family's first case is laid out, and refused by name with these fields."""
    case = next(case for case in cases if case.model_type == model_type)
    right, wrong = tiny(case), tiny(case, **fields)
    lay_out(right, shapes_of(right))
    with pytest.raises(ExportError, match=message) as caught:
        lay_out(wrong, shapes_of(wrong))
    assert "to='hf'" in caught.value.hint
