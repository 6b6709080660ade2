"""Windows' own Linux is told from others by its kernel."""

from __future__ import annotations

import pytest

from qlora import wsl


@pytest.mark.parametrize(
    ("release", "is_one"),
    [
        ("5.15.167.4-microsoft-standard-WSL2", True),
        ("4.4.0-19041-Microsoft", True),
        ("6.8.0-48-generic", False),
        ("24.1.0", False),
    ],
)
def test_windows_linux_is_known_by_its_kernel(release: str, is_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsl.platform, "release", lambda: release)
    assert wsl.is_wsl() is is_one
