"""A picture of an estimate: the peak against the length of rows, with limits as lines."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from qlora import shown
from qlora.errors import UserError
from qlora.redaction import redact
from qlora.units import GIB


def check_place(file: Path) -> None:
    """Before anything is computed: whether a picture can be drawn at all, and written there. Raises UserError."""
    if find_spec("matplotlib") is None:
        raise _not_installed()
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        is_new = not file.exists()
        if is_new or file.is_file():  # to open a pipe would wait for its reader
            file.open("ab").close()
        if is_new:
            file.unlink()
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL character
        raise _unwritable(file, error) from None


def draw_lengths(
    peaks: Mapping[int, tuple[int, int]], asked: tuple[str, int], others: Mapping[str, int], title: str, file: Path
) -> None:
    """A PNG of the peak and, as a band, its margin (bytes) by sequence length. Raises UserError.

    `asked` is the limit that the question is about, with its name; `others` are limits of common cards.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise _not_installed() from None
    figure = Figure(figsize=(8, 5), dpi=150)
    axes = figure.subplots()
    lengths = list(peaks)
    low = [peak / GIB for peak, _ in peaks.values()]
    high = [(peak + error) / GIB for peak, error in peaks.values()]
    axes.plot(lengths, low, marker="o", color="#157f3b", label="predicted peak")
    axes.fill_between(lengths, low, high, color="#157f3b", alpha=0.2, linewidth=0, label="its margin")
    limits = [(name, limit, "#888888", 0.8) for name, limit in others.items()]
    for name, limit, colour, width in [*limits, (*asked, "#b00020", 1.4)]:
        axes.axhline(limit / GIB, linestyle="--", linewidth=width, color=colour)
        label, place = shown.one_line(redact(name)), (lengths[0], limit / GIB)
        axes.annotate(label, place, fontsize=8, ha="left", va="bottom", color=colour, parse_math=False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("GiB")
    axes.set_title(shown.one_line(redact(title)), parse_math=False)  # a `$` in a name begins no formula
    axes.legend(loc="lower right")
    figure.tight_layout()
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise _unwritable(file, error) from None


def _not_installed() -> UserError:
    return UserError("`plot`: matplotlib is not installed", 'pip install "qlora[plot]"')


def _unwritable(file: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"`plot`: {file} cannot be written: {reason}", "name another file")
