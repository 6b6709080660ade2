"""Families that keep the rows of a pack apart in code of their own, which is not seen without weights.

Measured on tiny random models in fp32, each shape of the family that is known: the largest difference of a token's
log-probability in a pack from the row's alone. Written by `python tools/packing_table.py`.
"""

from __future__ import annotations

LARGEST_LEAK = 1e-03  # nats; fp32 alone differs by 1e-6, a leak by 1e-2 and more
LEAKS: dict[str, float] = {
    "doge": 1e-06,
    "falcon": 1e-06,
    "gpt2": 1e-06,
    "gpt_neo": 1e-09,
    "gpt_neox_japanese": 1e-09,
}
