"""Sizes of memory, and counts of things as words."""

MIB = 1 << 20
GIB = 1 << 30


def counted(count: int, thing: str) -> str:
    """ "1 page", "2,000 pages"."""
    return f"{count:,} {thing}{'s' * (count != 1)}"
