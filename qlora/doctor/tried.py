"""Lines for what was tried in processes of their own: libraries, arithmetic, 4 bit, paging, locked memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from qlora.doctor.finding import Finding, green, red, yellow
from qlora.doctor.requirements import Installed, named
from qlora.doctor.trial import Trial
from qlora.units import MIB

Trials = Mapping[str, Trial]
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets")
# bf16 has 8 bits of mantissa: a sum of products of rounded values is some 0.2 % off, and rounded itself.
BF16_TOLERANCE = 0.01
NF4_TOLERANCE = 0.005  # the values are the table's, rounded to bf16
LEAST_LOCKED = 64 << 10  # what a system lets everybody lock; less means none (getrlimit(2))
_AGAIN = 'pip install --force-reinstall --no-cache-dir "bitsandbytes>=0.50"'
_REDISTRIBUTABLE = "install Microsoft's Visual C++ Redistributable (https://aka.ms/vs/17/release/vc_redist.x64.exe)"


def findings(trials: Trials, installed: Installed | None) -> list[Finding]:
    """A line a subject; what could not be tried because something else failed says so, in yellow."""
    found = [_libraries(trials, installed)] if all(_went(trials, name) for name in LIBRARIES) else []
    found += [_broken(name, trials[name], installed) for name in LIBRARIES if not _went(trials, name)]
    for stage, judge in _JUDGES.items():
        trial = trials[stage]
        if trial.answer is not None:
            found.append(judge(trial.answer))
        elif stage in ("bitsandbytes", "llama.cpp"):
            found.append(_broken(stage, trial, installed))
        elif stage != "device":  # the card's own lines say it
            found.append(_failed(_NAMES[stage], trial, installed))
    return [one for one in found if one is not None]


def _went(trials: Trials, name: str) -> bool:
    return trials[name].answer is not None


def _libraries(trials: Trials, installed: Installed | None) -> Finding:
    versions = {name: str((trials[name].answer or {}).get("version")) for name in LIBRARIES}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return green("libraries", f"imported: {said}", figures=versions)


def _broken(name: str, trial: Trial, installed: Installed | None) -> Finding:
    if trial.needs:
        return yellow(name, f"not tried, because {trial.needs} does not work", f"mend what is said of {trial.needs}")
    package = "xllamacpp" if name == "llama.cpp" else name
    colour = yellow if name == "llama.cpp" else red
    return colour(
        name, f"cannot be used: {trial.failure}", trial.mend or import_mend(package, trial.failure, installed)
    )


def import_mend(package: str, failure: str, installed: Installed | None) -> str:
    """What helps a package that cannot be imported; a missing one that it needs itself is installed."""
    missing = re.search(r"No module named '([A-Za-z0-9_]+)", failure)
    if missing:
        return f"pip install {named(installed, package if missing[1] == package else missing[1])}"
    if "WinError 126" in failure or "WinError 1114" in failure:
        return _REDISTRIBUTABLE
    if "SIGILL" in failure:
        return f"its build of {package} needs a newer processor: use another machine, or build it for this one"
    if "did not end" in failure:
        return "try again: the disk may be slow; else restart the machine"
    return _again(package, installed)


def _again(package: str, installed: Installed | None) -> str:
    """Installing a package anew. On Windows PyPI's torch is one for CPUs: the index of builds for CUDA is named."""
    name = named(installed, package)
    if (package, sys.platform) == ("torch", "win32"):
        return f"pip install --force-reinstall --index-url https://download.pytorch.org/whl/cu130 {name}"
    return f"pip install --force-reinstall --no-cache-dir {name}"


def _failed(name: str, trial: Trial, installed: Installed | None) -> Finding:
    if trial.needs:
        first = {"device": "the GPU"}.get(trial.needs, trial.needs)
        return yellow(name, f"not tried, because {first} does not work", f"mend what is said of {first}")
    package = "bitsandbytes" if name in ("NF4", "paged memory") else "torch"
    return red(name, trial.failure, trial.mend or _again(package, installed))


# --- what was answered -----------------------------------------------------------------------------------------------


def _bf16(answer: Mapping[str, Any]) -> Finding:
    apart = float(answer["apart"])
    if not apart <= BF16_TOLERANCE:  # NaN is no distance
        return red(
            "bf16", f"a product is {apart:.2%} from the one in fp32", "test the card's memory, or install torch again"
        )
    return green("bf16", f"a product is {apart:.2%} from the one in fp32", figures={"apart": apart})


def _bitsandbytes(answer: Mapping[str, Any]) -> Finding:
    if not answer["native"]:
        mend = f"unset BNB_CUDA_VERSION if it is set; else {_AGAIN}"
        return red("bitsandbytes", f"{answer['version']}: its native library cannot be loaded", mend)
    return green(
        "bitsandbytes", f"{answer['version']}, with its native library", figures={"version": str(answer["version"])}
    )


def _nf4(answer: Mapping[str, Any]) -> Finding:
    apart, count = float(answer["apart"]), int(answer["values"])
    if not apart <= NF4_TOLERANCE or answer["bytes"] != count // 2:
        said = f"{count:,} weights came back from 4 bit {apart:.2%} away from what they should be"
        return red("NF4", said, _AGAIN)
    return green(
        "NF4", f"{count:,} weights went to 4 bit and back, {apart:.3%} from the paper's table", figures={"apart": apart}
    )


def _paged(answer: Mapping[str, Any]) -> Finding:
    if why := str(answer.get("why_not", "")):
        if not answer["on_card"]:
            return green("paged memory", "none without a GPU, and none is needed")
        return yellow("paged memory", why, 'choose optimizer = "adamw_8bit", which needs none')
    if answer["wrong"]:
        said = f"{answer['wrong']:,} of {answer['bytes']:,} bytes are not what the GPU wrote"
        return red("paged memory", said, 'choose optimizer = "adamw_8bit", and a newer driver')
    return green("paged memory", f"{answer['bytes'] / MIB:.0f} MiB were written by the GPU and read by the host")


def _pinned(answer: Mapping[str, Any]) -> Finding:
    limit, locked, pinned = answer["limit"], answer["locked"], answer["pinned"]
    allowed = "no limit" if limit == -1 else "" if limit is None else f"a limit of {limit / MIB:,.1f} MiB"
    if pinned is False:
        mend = "give WSL more memory (memory= in .wslconfig), or raise the limit (ulimit -l unlimited)"
        return yellow("locked memory", "the system locks none for copies to the GPU, which then wait", mend)
    if locked is False and limit is not None and -1 < limit < LEAST_LOCKED:
        return yellow(
            "locked memory", f"{allowed}: nothing can be locked", "ulimit -l unlimited, or memlock in limits.conf"
        )
    how = "copies to the GPU need not wait" if pinned else "1 MiB was locked" if locked else "not tried on this system"
    return green(
        "locked memory",
        ", ".join(filter(None, (how, allowed))),
        figures={"limit": limit, "pinned": pinned, "locked": locked},
    )


def _llama_cpp(answer: Mapping[str, Any]) -> Finding:
    if answer["package"] is None:
        said = "not installed: GGUF files are written in f16, bf16 and q8_0 alone, and not tried"
        return yellow("llama.cpp", said, 'pip install "qlora[gguf]"')
    return green(
        "llama.cpp",
        f"{answer['package']} {answer['version']}, its library opens",
        figures={"version": str(answer["version"])},
    )


_NAMES = {"bf16": "bf16", "nf4": "NF4", "paged": "paged memory", "pinned": "locked memory"}
_JUDGES: dict[str, Callable[[Mapping[str, Any]], Finding]] = {
    "bf16": _bf16,
    "bitsandbytes": _bitsandbytes,
    "nf4": _nf4,
    "paged": _paged,
    "pinned": _pinned,
    "llama.cpp": _llama_cpp,
}
