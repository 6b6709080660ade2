"""The table of exports beside the trained model: figures, who measured which, and the loss that was found again."""

from __future__ import annotations

import io

from rich.console import Console

from qlora import events
from qlora.report.fidelity import fidelity_table

EXACT = {"name": "trained", "measured_by": "transformers", "kl": 0.0, "perplexity": 1.5, "top1": 1.0, "bytes": None}
NEAR = {"name": "gguf", "measured_by": "xllamacpp", "kl": 3.3e-5, "perplexity": 1.5, "top1": 0.999, "bytes": 5 << 20}


def test_each_export_has_its_line_and_its_measurer() -> None:
    out = io.StringIO()
    loss = {"rows": 64, "here": 0.1456, "delivered": 0.1455}
    told = events.Fidelity("evaluation rows", 64, 1227, (EXACT, NEAR), loss)
    Console(file=out, width=140).print(fidelity_table(told))
    text = out.getvalue()
    assert "on 1,227 tokens of 64 evaluation rows" in text
    (first,) = [line.split() for line in text.splitlines() if line.strip().startswith("trained ")]
    (second,) = [line.split() for line in text.splitlines() if line.strip().startswith("gguf ")]
    assert first == ["trained", "0", "1.5000", "100.0%"]
    assert second == ["gguf", "3.3e-05", "1.5000", "99.9%", "5.0", "MiB"]
    assert "measured: trained by transformers; gguf by xllamacpp" in text
    assert "0.1456 nats a token here, 0.1455 as the run delivered it" in text
