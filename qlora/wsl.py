"""Whether this Linux runs inside Windows (WSL), where the card's driver is Windows' own."""

from __future__ import annotations

import platform


def is_wsl() -> bool:
    """Microsoft's kernels have its name in their release, those of both versions of WSL; a container there too."""
    return "microsoft" in platform.release().lower()
