"""What readers give and raise."""

from __future__ import annotations

from qlora.data.documents.parsed import NotReadable, Parsed


def test_a_reason_with_what_to_do() -> None:
    error = NotReadable("there is no text in it", "leave it out")
    assert (str(error), error.hint) == ("there is no text in it", "leave it out")
    assert Parsed([]).left_out == () and Parsed([]).pages == 0
