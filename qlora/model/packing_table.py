"""Families that were measured: how far a packed row's loss is from the row's alone.

Written by `tools/packing_table.py`.
"""

LARGEST_LEAK = 1e-3
LEAKS: dict[str, float] = {}
