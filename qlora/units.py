"""Sizes of memory, and counts of things as words."""

MIB = 1 << 20
GIB = 1 << 30


def gib(count: float) -> str:
    """ "1.50 GiB"; of less than a hundredth in MiB or KiB, as "1.5 MiB"."""
    if 0 < count < GIB / 100:
        return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"
    return f"{count / GIB:.2f} GiB"


def layers_of(setting: bool | int) -> str:
    """Which layers a setting recomputes: "layers", "the first layer", "the first 3 layers"; "no layer" for False."""
    if isinstance(setting, bool):
        return "layers" if setting else "no layer"
    return "the first layer" if setting == 1 else f"the first {setting:,} layers"


def counted(count: int, thing: str) -> str:
    """ "1 page", "2,000 pages"."""
    return f"{count:,} {thing}{'s' * (count != 1)}"
