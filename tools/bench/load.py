"""What the NF4 cache gives: the first start, which reads the original and keeps it in 4 bit, and the second.

    python tools/bench/load.py --base /models/SmolLM2-135M     # a base of your own
    python tools/bench/load.py --gigabytes 2                   # a random base, made in a temporary folder
    python tools/bench/load.py --gigabytes 2 --repeats 5 --threads 2 --out tools/bench/results/load-cpu-2gb.json

Each start is a process of its own, in turns: without a cache (`plain`), with an empty one (`first`: load, write,
flush), with a full one (`second`). Before each, the files of base and cache are put out of the page cache, so that
`disk` are bytes that came from the disk (/proc/self/io, read_bytes), `read` all that was asked for (rchar). Seconds are
those of `load_base`: imports, some seconds for any start, are not in it. Peak is anonymous memory (RssAnon) over what
the process had before. The machine's load average stands beside each figure. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from this_machine import commit, hardware, versions  # noqa: E402

STARTS = ("plain", "first", "second")
SAMPLE_SECONDS = 0.01
FIGURES = ("seconds", "processor_seconds", "read_bytes", "disk_bytes", "written_bytes", "peak_bytes")


def status_bytes(key: str) -> int:
    """Of this process: `RssAnon`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def io_bytes() -> dict[str, int]:
    """Of this process: rchar, wchar, read_bytes, write_bytes."""
    return {
        key: int(value)
        for key, value in (line.split(": ") for line in Path("/proc/self/io").read_text().split("\n") if line)
    }


class Peak:
    """The most of RssAnon while a block runs, over what it was before."""

    def __enter__(self) -> Peak:
        self.before = self.most = status_bytes("RssAnon")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.most, status_bytes("RssAnon")) - self.before

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.most = max(self.most, status_bytes("RssAnon"))


def one_start(base: str, mode: str) -> dict[str, Any]:
    """In a child: load once, and say what it took."""
    from qlora.third_party import let_waiting_threads_sleep

    let_waiting_threads_sleep()
    from qlora.device import current
    from qlora.events import Recorder
    from qlora.model.load import load_base
    from qlora.model.resolve import resolve
    from qlora.recipe.sections import QuantizationSection
    from qlora.third_party import import_bitsandbytes

    import_bitsandbytes()
    sink = Recorder()
    found, device = replace(resolve(base, "main", sink), cache=mode != "plain"), current()
    before, clock, worked = io_bytes(), time.perf_counter(), time.process_time()
    with Peak() as peak:
        model = load_base(found, QuantizationSection(), "auto", device, sink)
    after = io_bytes()
    assert model.base_was_kept == (mode == "second"), [one.as_dict() for one in sink.of("notice")]
    return {
        "seconds": time.perf_counter() - clock,
        "processor_seconds": time.process_time() - worked,
        "read_bytes": after["rchar"] - before["rchar"],
        "disk_bytes": after["read_bytes"] - before["read_bytes"],
        "written_bytes": after["wchar"] - before["wchar"],
        "peak_bytes": peak.bytes,
        "load_average": os.getloadavg()[0],
    }


def forget(*folders: Path) -> None:
    """Put the files of folders out of the page cache."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


def started(base: Path, mode: str, cache: Path, threads: int) -> dict[str, Any]:
    if mode == "first":
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(exist_ok=True)
    forget(base.resolve(), cache)
    environment = {**os.environ, "QLORA_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--base", str(base), "--child", mode]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def measure(base: Path, cache: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Every start's figures, and their medians."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in STARTS}
    for _ in range(repeats):
        for mode in STARTS:
            figures = started(base, mode, cache, threads)
            found[mode].append(figures)
            told = f"{figures['seconds']:7.3f} s, processor {figures['processor_seconds']:7.3f} s"
            sizes = ", ".join(f"{key[:-6]} {figures[key] / 1e6:,.1f} MB" for key in FIGURES if key.endswith("bytes"))
            print(f"{mode:7} {told}, {sizes}, load {figures['load_average']:.1f}", flush=True)
    medians = {
        mode: {key: statistics.median(one[key] for one in runs) for key in FIGURES} for mode, runs in found.items()
    }
    return {
        "base_bytes": size_of(base, "*.safetensors"),
        "cache_bytes": size_of(cache / "bases", "*"),
        "medians": medians,
        "second_to_plain": medians["second"]["seconds"] / medians["plain"]["seconds"],
        "starts": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a base's folder; without it a random one is made")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the random base")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where base and cache are made: on the disk that is meant")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--child", choices=STARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(one_start(str(asked.base), asked.child)))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        base = asked.base
        if base is None:
            from identity import random_base

            base = random_base(Path(place) / "base", asked.gigabytes)
            time.sleep(3)  # files that were written just now are not known by their times
        results = measure(base, Path(place) / "cache", asked.repeats, asked.threads)
    made = {"hardware": hardware(), "commit": commit(), "versions": versions(("torch", "transformers", "bitsandbytes"))}
    results |= {**made, "threads": asked.threads}
    print(f"second / plain: {results['second_to_plain']:.3f}")
    if asked.out:
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
