"""Measures, for every family, how far a packed row's loss is from the row's alone, and writes `packing_table.py`.

    python tools/packing_table.py                 all families: a line each, then the table
    python tools/packing_table.py --only falcon,mpt
    python tools/packing_table.py --check         the table as it stands must be the one that is measured

Tiny random models in fp32. Beside the measured leak stands what was seen on `meta`, which must never be more lenient:
exit code 1 where a family seen as safe leaks, a head seen as known is another, or a trunk seen as plain is none.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qlora.errors import ModelError, foreign_failures  # noqa: E402
from qlora.model import packing_table  # noqa: E402
from qlora.model.family_facts import FamilyFacts, facts_of, two_documents  # noqa: E402
from qlora.model.layer_walk import WeightHolder, layers_of, trained_hidden, trained_hidden_states  # noqa: E402
from qlora.model.meta_model import choose_attention  # noqa: E402
from qlora.step.forward import CausalParts, hidden_states  # noqa: E402
from tests import all_families  # noqa: E402
from tests.families import make_model  # noqa: E402

FILE = ROOT / "qlora" / "model" / "packing_table.py"
LENGTHS = (21, 34, 5)  # of the documents of the pack, the last is padding
# Other shapes of a family, which are measured as well: the table has the worst of them.
VARIANTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "falcon": ({"alibi": True}, {"new_decoder_architecture": False, "multi_query": True}),
    "granitemoehybrid": ({"layer_types": ["attention"] * 4},),
    "gpt_neo": ({"attention_types": [[["global"], 4]]},),
    "doge": ({"keep_window_size": 8},),
}


@dataclass(frozen=True)
class Measured:
    """Largest differences in nats of a token: of packed rows, of our head; and of a walk by layers, relative."""

    leak: float
    head: float
    layerwise: float

    def line(self) -> str:
        return f"leak {self.leak:.1e}  head {self.head:.1e}  by layers {self.layerwise:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    packing_table.LEAKS.clear()  # what is seen, not what was measured before
    names = [name for name in asked.only.split(",") if name] or list(all_families.DENSE)
    faults, leaks = [], {}
    for family in names:
        worst = 0.0
        for shape in ({}, *VARIANTS.get(family, ())):
            with foreign_failures() as failure:
                facts = facts_of(all_families.make_config(family, shape), family)
                measured = measure(all_families.make_config(family, shape))
            if failure.error:
                print(f"{family:20} not measured: {failure.reason[:100]}", flush=True)
                worst = math.inf
                continue
            print(f"{family:20} {measured.line()}  seen: {facts.packing or 'safe'}", flush=True)
            faults += [f"{family}: {fault}" for fault in too_lenient(facts, measured)]
            worst = max(worst, measured.leak)
            if facts.packing and measured.leak <= packing_table.LARGEST_LEAK:
                leaks[family] = worst
        if worst > packing_table.LARGEST_LEAK:
            leaks.pop(family, None)
    text = table({family: leaks[family] for family in sorted(leaks)})
    if asked.check and FILE.read_text() != text:
        faults.append(f"{FILE.name} is not what is measured")
    elif not asked.only and not asked.check:
        FILE.write_text(text)
    print("\n".join(faults) or f"{len(names)} families: what is seen is never more lenient than what is measured")
    sys.exit(1 if faults else 0)


def too_lenient(facts: FamilyFacts, measured: Measured) -> list[str]:
    """What was seen as right and is not."""
    found = []
    if not facts.packing and measured.leak > packing_table.LARGEST_LEAK:
        found.append(f"seen as safe to pack, leaks {measured.leak:.1e} nats")
    if not facts.head and measured.head > packing_table.LARGEST_LEAK:
        found.append(f"its head is seen as known, and is {measured.head:.1e} nats off")
    if not facts.layerwise and measured.layerwise > packing_table.LARGEST_LEAK:
        found.append(f"its trunk is seen as plain, and is {measured.layerwise:.1e} off")
    return found


def measure(text: Any) -> Measured:
    """A random model of `text` in fp32, asked about two documents packed and alone."""
    text._attn_implementation = choose_attention(text, "auto", "a tiny model")
    model = make_model(text)
    parts, batch = CausalParts.of(model), two_documents(LENGTHS)
    ids_BS = torch.randint(4, 380, batch.input_ids_BS.shape, generator=torch.Generator().manual_seed(0))
    batch = replace(batch, input_ids_BS=ids_BS)
    with torch.no_grad():
        packed_BSD = hidden_states(parts, batch)
        alone, own, start = [], [], 0
        for length in LENGTHS[:2]:
            document_BS = ids_BS[:, start : start + length]
            hidden_BSD = parts.trunk(input_ids=document_BS, use_cache=False).last_hidden_state
            alone.append(_logprobs(_our_logits(parts, hidden_BSD), document_BS))
            own.append(_logprobs(model(input_ids=document_BS, use_cache=False).logits, document_BS))
            packed = _our_logits(parts, packed_BSD[:, start : start + length])
            alone[-1] = torch.stack((alone[-1], _logprobs(packed, document_BS)))
            start += length
        both_T, own_T = torch.cat(alone, dim=1), torch.cat(own)
        if own_T.std() < 0.05:
            raise ModelError(f"{text.model_type}: its tiny model says the same of every token", "draw wider weights")
        leak, head = float((both_T[1] - both_T[0]).abs().max()), float((both_T[0] - own_T).abs().max())
        return Measured(leak, head, _layerwise(model, batch, packed_BSD))


def _layerwise(model: Any, batch: Any, hidden_BSD: torch.Tensor) -> float:
    """How far the walk of `model.layer_walk` is from the trunk, relative to its largest value; inf where it fails."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    holder = WeightHolder(model, list(weights), lambda _, own: own, torch.device("cpu"), torch.float32)
    with foreign_failures() as failure:
        walked_TD = trained_hidden_states(holder, layers_of(model), [batch])
    if failure.error:
        return math.inf
    plain_TD = trained_hidden(hidden_BSD, batch)
    return float((walked_TD - plain_TD).abs().max() / plain_TD.abs().max())


def _our_logits(parts: CausalParts, hidden_BSD: torch.Tensor) -> torch.Tensor:
    logits_BSV = parts.head(hidden_BSD)
    return parts.transform(logits_BSV) if parts.transform is not None else logits_BSV


def _logprobs(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
    """Of each next token of the one row."""
    logprobs_SV = torch.log_softmax(logits_BSV[0, :-1].float(), dim=-1)
    return logprobs_SV.gather(1, ids_BS[0, 1:, None]).squeeze(1)


def table(leaks: Mapping[str, float]) -> str:
    """The text of the module."""
    rows = "".join(f'    "{family}": {max(leak, 1e-9):.0e},\n' for family, leak in leaks.items())
    return f'''"""Families that keep the rows of a pack apart in code of their own, which is not seen without weights.

Measured on tiny random models in fp32, each shape of the family that is known: the largest difference of a token's
log-probability in a pack from the row's alone. Written by `python tools/packing_table.py`.
"""

from __future__ import annotations

LARGEST_LEAK = {packing_table.LARGEST_LEAK:.0e}  # nats; fp32 alone differs by 1e-6, a leak by 1e-2 and more
LEAKS: dict[str, float] = {{
{rows}}}
'''


if __name__ == "__main__":
    main()
