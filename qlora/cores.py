"""How many cores a process may use: of those that the machine has, what the system lets it have and others leave it."""

from __future__ import annotations

import os
import time
from pathlib import Path

_GROUP, _LOAD = Path("/sys/fs/cgroup"), Path("/proc/loadavg")


def usable_cores() -> int:
    """At least 1: the cores it is bound to (taskset), and not more than its control group's share of time."""
    share = _share(_GROUP)
    return max(1, _bound() if share is None else min(_bound(), int(share)))


def are_free() -> bool:
    """Whether all of its cores are this process' for its whole time, and others compute on less than half as many now.

    Others are threads that can run (proc(5), /proc/loadavg), but for the one that looks: up to three times, since who
    computes is in all of them. False where that is not told.
    """
    cores = usable_cores()
    if cores < _bound():
        return False
    try:
        for pause in (0.0, 0.002, 0.002):  # seconds
            time.sleep(pause)
            if 2 * (_runnable() - 1) < cores:
                return True
    except (OSError, ValueError, IndexError):
        return False
    return False


def _runnable() -> int:
    return int(_LOAD.read_text().split()[3].split("/")[0])


def _bound() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share(group: Path) -> float | None:
    """Cores' worth of time in each period, of version 2 of control groups or of version 1; None without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else None
        except (OSError, ValueError, ZeroDivisionError):  # no such file; "max", which is no limit
            continue
    return None
