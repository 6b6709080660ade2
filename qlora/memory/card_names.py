"""Which card a name means, as people, shops and drivers write it.

"4070 ti super", "laptop 4060", "RTX3060-12GB" and "NVIDIA A100-SXM4-80GB" are read alike: a model's letters and digits
without blanks, the words that make another card of it ("Ti", "XT"), and what narrows it down: maker, generation,
laptop, slot, gigabytes. A name that several sizes of memory are sold under is refused with all of them.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from qlora.device import OLDEST
from qlora.errors import HardwareError
from qlora.memory import cards
from qlora.units import GIB

NVIDIA, AMD = "nvidia", "amd"
BF16_FROM = 80  # compute capability; ROCm builds of torch say of every AMD card that it has bf16
FP16_FROM = OLDEST[0] * 10 + OLDEST[1]
MOST_CHARACTERS = 120  # of a name: the longest that a driver gives has 60
MOST_SHOWN = 8  # names in a message

_MAKERS = {
    NVIDIA: ("nvidia", "geforce", "quadro", "tesla", "rtx", "gtx", "jetson", "tegra"),
    AMD: ("amd", "radeon", "instinct", "rx"),
}
_MAKER_OF = {word: maker for maker, words in _MAKERS.items() for word in words}
_SUFFIXES = ("ti", "super", "xtx", "xt", "gre", "sff", "nvl", "pcie")
_LAPTOP = ("laptop", "mobile", "notebook")
# CUDA's compute capabilities of a generation, in tens and, where that is not enough, whole.
_GENERATIONS = {
    "kepler": (35, 37),
    "maxwell": (50, 52, 53),
    "pascal": (60, 61, 62),
    "volta": (70, 72),
    "turing": (75,),
    "ampere": (80, 86, 87),
    "ada": (89,),
    "lovelace": (89,),
    "hopper": (90,),
    "blackwell": (100, 103, 110, 120, 121),
}
_NOISE = (
    *("graphicscard", "graphics", "graphic", "gpu", "card", "video", "adapter", "edition", "design", "with", "series"),
    *("generation", "gen", "founders", "fe", "oc", "gaming", "the", "vram", "memory", "ram", "workstation", "server"),
    *("developer", "devkit", "kit", "nvgpu", "corporation", "inc", "ai", "accelerator", "trio", "dual", "eagle"),
    *("asus", "msi", "gigabyte", "evga", "zotac", "palit", "gainward", "inno", "pny", "sapphire", "xfx", "powercolor"),
    *(
        "rog",
        "strix",
        "tuf",
        "ventus",
        "suprim",
        "windforce",
        "aorus",
        "nitro",
        "pulse",
        "phoenix",
        "sxm",
        "lhr",
        "device",
    ),
    *("colorful", "galax", "kfa", "manli", "asrock", "hellhound", "leadtek", "lenovo", "legion", "dell", "alienware"),
)
_VOCABULARY = (*_MAKER_OF, *_SUFFIXES, "tis", *_LAPTOP, "desktop", "maxq", "pro", *_GENERATIONS, *_NOISE)
_LONGEST_FIRST = "|".join(sorted(_VOCABULARY, key=len, reverse=True))
# Letters that stand together: makers, a part of the model's own name, and more words: "rtx" "a", "m" "laptop".
_TOGETHER = re.compile(
    f"((?:{'|'.join(sorted((*_MAKER_OF, 'ai', 'pro'), key=len, reverse=True))})*)([a-z]*?)((?:{_LONGEST_FIRST})*)"
)
_WORD = re.compile(_LONGEST_FIRST)
_SIZE = re.compile(
    r"(\d+)(?:[.,]0+)? ?(gi?b|gigs?|gigabytes?|go|гб|mi?b)(?![a-z0-9])|(?<![a-z0-9])(\d+) ?g(?![a-z0-9])"
)
# The last number of "4060 ti 16", behind a model of three digits or more: "30 80" is one model.
_BARE_SIZE = re.compile(r"(.*\d{3}.*) (\d{1,3})")
# What narrows nothing down, and would leave digits in the model's name: kinds of memory, of AMD's generations, slots.
_WITH_DIGITS = re.compile(r"g?ddr ?\d[a-z]?|hbm ?\d?e?|[rc]dna ?\d|sxm ?[2-6]?(?!\d)|\d+ ?bit|\bmig .*")
# Other words for a model, each by what its letters and digits are without blanks.
_ALIASES = {
    "titan": ("titan", "titanv", "titanxp"),
    "orin": ("agxorin", "orinnx", "orinnano"),
    "orinagx": ("agxorin",),
    "nxorin": ("orinnx",),
    "nanoorin": ("orinnano",),
    "xavier": ("xaviernx", "agxxavier"),
    "thor": ("agxthor",),
    "dgxspark": ("gb10",),
    "spark": ("gb10",),
    "w7900dualslot": ("w7900",),
}
_ROWS: tuple[cards.Row | cards.OldRow, ...] = (
    *cards.GEFORCE,
    *cards.LAPTOPS,
    *cards.WORKSTATIONS,
    *cards.DATA_CENTRE,
    *cards.AMD,
    *cards.WITHOUT_BF16,
)
# Gigabytes that a name has besides those of the table: of a whole module, or as first announced.
_OTHER_SIZES = {("GH200", 480): 96, ("B200", 192): 180, ("GB200", 192): 186, ("MI250", 128): 64, ("MI250X", 128): 64}
_SOLD = {row[1] for row in _ROWS} | {size for _, size in _OTHER_SIZES}
_NOT_SUPPORTED = {
    "Intel": re.compile(r"\bintel\b|\barc\b|\biris\b|\buhd\b|^ ?[ab](310|350|370|380|550|580|730|750|770|570|580)m?\b"),
    "Apple": re.compile(r"\bapple\b|^ ?m[1-5]( (pro|max|ultra))?$|\bmetal\b"),
    "AMD before RX 6000": re.compile(r"\bvega\b|\bradeon vii\b|\brx ?[45]\d\d\b|\brx ?5\d00|\bmi(6|8|25)\b"),
    "Google": re.compile(r"\btpu\b"),
}


@dataclass(frozen=True)
class Gpu:
    """One kind of card. `teraflops` is dense bf16 with float32 accumulation, `gigabytes_per_second` its memory's."""

    name: str
    gigabytes: int  # as sold
    usable_bytes: int
    gigabytes_per_second: float
    teraflops: float
    capability: int  # compute capability, 86 for 8.6
    maker: str = NVIDIA

    @property
    def computes_bf16(self) -> bool:
        return self.maker == AMD or self.capability >= BF16_FROM

    @property
    def trains(self) -> bool:
        return self.computes_bf16 or self.capability >= FP16_FROM

    @property
    def label(self) -> str:
        """The name with its size, for people."""
        return self.name if self.name.endswith("GB") else f"{self.name}, {self.gigabytes} GB"


@dataclass(frozen=True)
class _Read:
    """A name, taken apart."""

    model: str = ""
    suffixes: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()  # of makers, and "pro"
    capabilities: frozenset[int] = frozenset()
    gigabytes: int | None = None
    laptop: bool | None = None
    thin: bool = False  # Max-Q: a laptop's, except where a workstation's card has such an edition

    @property
    def makers(self) -> set[str]:
        return {_MAKER_OF[word] for word in self.words if word in _MAKER_OF}


def _plain(name: str) -> str:
    """Small letters, digits and single blanks; marks of trade, accents and everything else are left out."""
    text = re.sub(r"[™®©]|\((?:tm|r|c)\)", " ", name[:MOST_CHARACTERS], flags=re.IGNORECASE)
    text = unicodedata.normalize("NFKC", text).casefold().replace("pci-e", "pcie").replace("pci express", "pcie")
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")  # widths of zero
    return " ".join(re.sub(r"[^a-z0-9.,гб]+", " ", text).split())


def _size(text: str) -> tuple[str, int | None]:
    """The text without its gigabytes, and them. Digits that stand together are parted: 306012gb is 3060 and 12."""
    match = _SIZE.search(text)
    if match is None:
        bare = _BARE_SIZE.fullmatch(text)
        return (bare[1], int(bare[2])) if bare and int(bare[2]) in _SOLD else (text, None)
    digits, rest = match[1] or match[3], ""
    if match[2] in ("mib", "mb"):
        digits = str(round(int(digits) / 1024)) if len(digits) < 8 else digits
    elif len(digits) > 3:
        tail = next((digits[-n:] for n in (3, 2, 1) if int(digits[-n:]) in _SOLD and digits[-n] != "0"), "")
        digits, rest = (tail, digits[: -len(tail)]) if tail else (digits, "")
    return f"{text[: match.start()]}{rest} {text[match.end() :]}", int(digits) if len(digits) < 6 else 0


def _tokens(text: str) -> Iterator[str]:
    """Words of the vocabulary as such, however they stand together, and what is left: letters, and digits."""
    for piece in re.findall(r"[a-z]+|\d+", text):
        parts = _TOGETHER.fullmatch(piece)
        if parts is None:
            yield piece
        else:
            yield from (*_WORD.findall(parts[1]), parts[2], *_WORD.findall(parts[3]))


def _read(name: str) -> _Read:
    text = re.sub(r"max ?[qp]\b", "maxq", _plain(name))
    text, gigabytes = _size(_WITH_DIGITS.sub(" ", text))
    tokens = [word for token in _tokens(text) for word in (("ti", "super") if token == "tis" else (token,))]
    said = set(tokens)
    capabilities = chain.from_iterable(_GENERATIONS.get(word, ()) for word in tokens)
    return _Read(
        model="".join(word for word in tokens if word not in _VOCABULARY),
        suffixes=frozenset(said & set(_SUFFIXES)),
        words=frozenset(said & {*_MAKER_OF, "pro"}),
        capabilities=frozenset(capabilities),
        gigabytes=gigabytes,
        laptop=True if said & set(_LAPTOP) else False if "desktop" in said else None,
        thin="maxq" in said,
    )


def _row(name: str, gigabytes: int, usable_gib: float, *facts: float, sizes: Counter[str], maker: str = NVIDIA) -> Gpu:
    bandwidth, teraflops, capability = facts
    whole = f"{name} {gigabytes}GB" if sizes[name] > 1 else name
    return Gpu(whole, gigabytes, int(usable_gib * GIB), bandwidth, teraflops, int(capability), maker)


def _old_speed(row: cards.OldRow) -> tuple[float, float]:
    return cards.OLD_SPEEDS.get(row[0]) or cards.SLOWEST_OLD.get(row[3] // 10, (0.0, 0.0))


def _table() -> tuple[Gpu, ...]:
    nvidia = (*cards.GEFORCE, *cards.LAPTOPS, *cards.WORKSTATIONS, *cards.DATA_CENTRE)
    older = [(*row[:3], *_old_speed(row), row[3]) for row in cards.WITHOUT_BF16]
    sizes = Counter(row[0] for row in _ROWS)
    found = [_row(*row, sizes=sizes) for row in (*nvidia, *older)]
    return (*found, *(_row(*row, sizes=sizes, maker=AMD) for row in cards.AMD))


GPUS = _table()
_READ = {gpu.name: _read(gpu.name) for gpu in GPUS}


def find(name: str) -> Gpu:
    """The card that a name means. Raises HardwareError: unknown, several, not supported, or too old."""
    found = named(name)
    if not any(gpu.trains for gpu in found):
        which = found[0].name if len(found) == 1 else name[:60]
        raise HardwareError(
            f"`gpu`: {which}: is older than what bitsandbytes computes 4 bit on (compute capability 6.0, GTX 10)",
            "name a newer card: GTX 10 and later, or AMD's from RX 6000 on",
        )
    first, *others = found
    if any((gpu.usable_bytes, gpu.capability) != (first.usable_bytes, first.capability) for gpu in others):
        raise HardwareError(
            f"`gpu`: {name[:60]!r} is the name of several cards: {_listed(found)}",
            f"name one of them as it stands there, such as {first.name!r}",
        )
    return first


def named(name: str) -> list[Gpu]:
    """The cards that a name may mean, one or several. Raises HardwareError where the table has none."""
    wanted, shown = _read(name), name[:60]
    if found := _meant(wanted):
        return found
    for maker, pattern in _NOT_SUPPORTED.items():
        if pattern.search(_plain(name)):
            raise HardwareError(
                f"`gpu`: {shown!r} ({maker}) is not supported: nothing here trains on it",
                "name a card of NVIDIA from GTX 10 on, or of AMD from RX 6000 on",
            )
    what = f"`gpu`: {shown!r} is not in the table of GPUs"
    if of_model := next(filter(None, _of_model(wanted)), None):
        raise HardwareError(
            f"{what}: of that name there are {_listed(of_model)}",
            "name one of them, or only what it has: vram='12GiB'",
        )
    near = _nearest(wanted)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise HardwareError(what, f"{hint}a name is as in 'RTX 4060 Ti 16GB'; or give only what it has: vram='12GiB'")


def of_this_machine(name: str, total: int, capability: int) -> Gpu:
    """The table's entry for a card by its driver's name, with its own total; for an unknown one the nearest in size."""
    wanted = replace(_read(name), gigabytes=None)
    maker = AMD if AMD in wanted.makers else NVIDIA
    rows = _meant(wanted) or [gpu for gpu in GPUS if gpu.maker == maker and gpu.trains]
    nearest = min(rows, key=lambda gpu: abs(gpu.usable_bytes - total))
    return replace(nearest, name=name, usable_bytes=total, capability=capability)


def _meant(wanted: _Read) -> list[Gpu]:
    return next(filter(None, (_narrowed(rows, wanted) for rows in _of_model(wanted))), [])


def _of_model(wanted: _Read) -> Iterator[list[Gpu]]:
    """Cards of that model, maker and those words that make another card of it, whatever else is said; by spelling."""
    for model, suffixes in _spellings(wanted):
        models = _ALIASES.get(model, (model,))
        yield [
            gpu
            for gpu in GPUS
            if _READ[gpu.name].model in models
            and _READ[gpu.name].suffixes - {"pcie"} == suffixes - {"pcie"}
            and wanted.makers <= {gpu.maker}
        ]


def _spellings(wanted: _Read) -> Iterator[tuple[str, frozenset[str]]]:
    """The model as it was written, then as it was meant: 1660S, 3070M, and A6000 Ada for RTX 6000 Ada."""
    model, suffixes = wanted.model, wanted.suffixes
    yield model, suffixes
    if re.fullmatch(r"\d{4}s", model):
        yield model[:-1], suffixes | {"super"}
    if re.fullmatch(r"[a-z]*\d{4}m", model):
        yield model[:-1], suffixes
    if wanted.capabilities and re.fullmatch(r"a\d{4}", model):
        yield model[1:], suffixes


def _narrowed(rows: Sequence[Gpu], wanted: _Read) -> list[Gpu]:
    """Of cards of one model those that the rest of the name allows; a desktop's before a laptop's."""
    rows = [
        gpu
        for gpu in rows
        if (not wanted.capabilities or (gpu.maker == NVIDIA and gpu.capability in wanted.capabilities))
        and ("pro" not in wanted.words or "pro" in _READ[gpu.name].words)
        and (wanted.gigabytes is None or wanted.gigabytes == gpu.gigabytes or _is_other_size(gpu, wanted.gigabytes))
    ]
    for word in sorted(wanted.words):  # "Quadro RTX 6000", "Titan RTX": where some have the word, they are meant
        rows = [gpu for gpu in rows if word in _READ[gpu.name].words] or rows
    by_slot = [gpu for gpu in rows if "pcie" in _READ[gpu.name].suffixes & wanted.suffixes]
    rows = by_slot or [gpu for gpu in rows if "pcie" not in _READ[gpu.name].suffixes] or rows
    laptops = [gpu for gpu in rows if _READ[gpu.name].laptop]
    desktops = [gpu for gpu in rows if not _READ[gpu.name].laptop]
    if wanted.laptop is not None:
        return laptops if wanted.laptop else desktops
    if wanted.thin or re.search(r"\dm$", wanted.model):
        return laptops or desktops
    return desktops or laptops


def _is_other_size(gpu: Gpu, gigabytes: int) -> bool:
    return _OTHER_SIZES.get((gpu.name.rpartition(" ")[0] or gpu.name, gigabytes)) == gpu.gigabytes


def _listed(rows: Sequence[Gpu]) -> str:
    names = [gpu.name if gpu.name.endswith("GB") else f"{gpu.name} ({gpu.gigabytes} GB)" for gpu in rows]
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def _nearest(wanted: _Read) -> list[str]:
    """Up to three names: of the same model, of models that begin so, or spelled much alike."""
    model, key = wanted.model, _key(wanted)
    keys = {_key(read): name for name, read in reversed(_READ.items())}
    same = [name for name, read in _READ.items() if model and read.model == model]
    begins = [name for name, read in _READ.items() if len(model) > 1 and read.model.startswith(model)]
    alike = [keys[close] for close in difflib.get_close_matches(key, keys, n=3, cutoff=0.7)]
    return list(dict.fromkeys([*same, *begins, *alike]))[:3]


def _key(read: _Read) -> str:
    return read.model + "".join(sorted(read.suffixes))
