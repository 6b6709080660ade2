"""What may be attached to a public report: no path, no name of a person or a machine; figures and addresses stay."""

from __future__ import annotations

import pytest

from qlora import anonymous


@pytest.mark.parametrize(
    "said",
    [
        "0.22 TFLOP/s by a matmul, 28 GB/s by a copy",
        "step/forward.py, seed_micro_batch",
        "1/2 of 3 / 4",
        'pip install "torch>=2.10,<2.14" --index-url https://download.pytorch.org/whl/cu130',
    ],
)
def test_figures_fractions_and_addresses_are_no_paths(said: str) -> None:
    assert anonymous.text(said) == said


@pytest.mark.parametrize("path", ["/srv/models/x.bin", "file:///srv/models/x", "//server/models/x", "C:\\models\\x"])
def test_paths_go(path: str) -> None:
    assert "models" not in anonymous.text(f"no such file: {path}")


def test_names_go_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "maria.rossi")
    found = anonymous.values({"a": ["maria.rossi, https://example.org/maria.rossi"], "b": 3, "c": ("x", None)})
    assert found == {"a": ["…, https://example.org/…"], "b": 3, "c": ["x", None]}


def test_a_full_disk_leaves_texts_anonymous(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("USER", "maria.rossi")
    monkeypatch.setattr(anonymous.tempfile, "gettempdir", none)
    assert anonymous.text("maria.rossi: /srv/x/y") == "…: …"
