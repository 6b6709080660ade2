"""What the libraries say that nobody needs, silenced where we handle what they warn of, and only there."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def no_word_to_developers() -> None:
    """For a command: no warnings of names that a library is about to change, which its user cannot act on.

    Whoever asks for warnings (`-W`, PYTHONWARNINGS, TRANSFORMERS_VERBOSITY) gets them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported, here or in a child
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


def import_bitsandbytes() -> Any:
    """The library, without its advice on import to install `kernels`, which would fetch native code at run time."""
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        advice.setLevel(level)
    return bitsandbytes


@contextmanager
def old_names_in_peft() -> Iterator[None]:
    """peft asks transformers for `is_gradient_checkpointing`, whose name is about to change; both still work."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
