"""How many cores a process may use: of those that the machine has, what the system lets it have."""

from __future__ import annotations

import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """At least 1: the cores it is bound to (taskset), and not more than its control group's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _share(_GROUP)
    return max(1, bound if share is None else min(bound, int(share)))


def _share(group: Path) -> float | None:
    """Cores' worth of time in each period, of version 2 of control groups or of version 1; None without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else None
        except (OSError, ValueError, ZeroDivisionError):  # no such file; "max", which is no limit
            continue
    return None
