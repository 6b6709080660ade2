"""Cores that a process may use: never more than a container's share of time; and whether others are on them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora import cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.max": "nonsense\n"}, 8),
        ({"cpu.max": "100 0\n"}, 8),
    ],
)
def test_a_share_of_time_is_a_number_of_cores(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores.usable_cores() == expected


# What three looks at the load say of threads that can run, the looking one among them; cores, and a container's share.
@pytest.mark.parametrize(
    ("looks", "bound", "share", "expected"),
    [
        ((1, 1, 1), 2, None, True),
        ((2, 2, 2), 2, None, False),
        ((2, 5, 1), 2, None, True),  # who ran for a moment does not compute
        ((4, 4, 4), 8, None, True),
        ((5, 6, 5), 8, None, False),
        ((1, 1, 1), 8, "300000 100000", False),  # threads of eight cores in the time of three
        ((1, 1, 1), 1, None, True),
        ((2, 2, 2), 1, None, False),
    ],
)
def test_cores_are_free_where_no_one_computes(
    looks: tuple[int, ...],
    bound: int,
    share: str | None,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if share:
        (tmp_path / "cpu.max").write_text(share)
    load, told = tmp_path / "loadavg", iter(looks)
    monkeypatch.setattr(cores, "_GROUP", tmp_path)
    monkeypatch.setattr(cores, "_LOAD", load)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)), raising=False)
    monkeypatch.setattr(cores.time, "sleep", lambda _: load.write_text(f"0.52 0.58 0.59 {next(told)}/467 42\n"))
    assert cores.are_free() == expected


@pytest.mark.parametrize("text", [None, "", "0.52 0.58 0.59", "0.52 0.58 0.59 x/467 42"])
def test_where_the_load_is_not_told_cores_are_not_free(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "loadavg").write_text(text)
    monkeypatch.setattr(cores, "_GROUP", tmp_path)
    monkeypatch.setattr(cores, "_LOAD", tmp_path / "loadavg")
    assert not cores.are_free()
