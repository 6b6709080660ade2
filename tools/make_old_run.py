"""Makes tests/golden/runs_5990ea1.tar.xz: what an older version left half-way, for the newest one to go on with.

    python tools/make_old_run.py ../clone-at-5990ea1

The clone's own code trains a tiny base for STEPS steps and is stopped after STOP_AFTER of them; its export of the
adapter that is there by then is killed at the second point from which it can go on. Base and rows come from a hub cache
of our own, and every other path is relative: nothing in the archive depends on the place where it was made.
`recorded.json` has what the same clone makes of the same recipe and export when nothing disturbs them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COMMIT = "5990ea1"
STEPS, STOP_AFTER = 10, 5
LIBRARIES = ("transformers", "tokenizers", "jinja2")  # the name of the token cache's folder depends on their versions
PLACE, HOST = "@PLACE@", "@HOST@"
RECIPE = f"""[model]
base = "tests/tiny"
[lora]
r = 4
dropout = 0.1
[[data.train]]
path = "hub:tests/rows"
[data]
max_length = 96
eval_fraction = 0.2
[train]
max_steps = {STEPS}
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-3
neftune_alpha = 5.0
[eval]
every_steps = 2
samples = 0
[checkpoint]
every_steps = 100
keep = 1
[output]
dir = "runs"
"""
TRAIN = "from pathlib import Path; from tests.runs import train; train(Path('tiny.toml'), {arguments})"
EXPORT = """
import os, signal
from qlora import api
from qlora.export import workshop

write, points = workshop.Workshop._write_down, []

def killed_after_two(self, item, reached):
    write(self, item, reached)
    points.append(item)
    if len(points) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

if {kill}:
    workshop.RESTART_BYTES = 48 << 10
    workshop.Workshop._write_down = killed_after_two
api.merge_and_export("runs/tiny", options=api.export_options(verify=False))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help=f"a clone at {COMMIT}")
    clone = parser.parse_args().clone.resolve()
    with tempfile.TemporaryDirectory() as folder:
        half, whole = Path(folder) / "half", Path(folder) / "whole"
        make_hub(half / "hub")
        (half / "tiny.toml").write_text(RECIPE, encoding="utf-8")
        shutil.copytree(half, whole)
        run(clone, half, TRAIN.format(arguments=f"stop_after={STOP_AFTER}"))
        shutil.copytree(half, Path(folder) / "exported")
        run(clone, half, EXPORT.format(kill=True), killed=True)
        run(clone, Path(folder) / "exported", EXPORT.format(kill=False))
        run(clone, whole, TRAIN.format(arguments=""))
        about = recorded(whole, Path(folder) / "exported")
        (half / "recorded.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        without_place(half)
        target = ROOT / "tests" / "golden" / f"runs_{COMMIT}.tar.xz"
        pack(half, target)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size:,} bytes")


def make_hub(cache: Path) -> None:
    """A hub cache with a base and rows, each under a commit that is the hash of its files."""
    from tests.families import make_base
    from tests.runs import write_rows

    base, rows = cache / "base", cache / "rows"
    make_base("llama", base)
    rows.mkdir()
    write_rows(rows / "train.jsonl")
    for made, name in ((base, "models--tests--tiny"), (rows, "datasets--tests--rows")):
        content = b"".join(path.read_bytes() for path in sorted(made.iterdir()))
        commit = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        (cache / name / "refs").mkdir(parents=True)
        (cache / name / "refs" / "main").write_text(commit, encoding="ascii")
        (cache / name / "snapshots").mkdir()
        made.rename(cache / name / "snapshots" / commit)


def run(clone: Path, place: Path, code: str, killed: bool = False) -> None:
    """The clone's code in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(clone),
        "QLORA_CACHE": str(place / "cache"),
        "HF_HUB_CACHE": str(place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment)
    assert (done.returncode < 0) == killed and (killed or done.returncode == 0), done.returncode


def recorded(whole: Path, exported: Path) -> dict[str, Any]:
    """What the undisturbed run and export ended with, and what their numbers depend on."""
    from tests.runs import arithmetic

    checkpoint = whole / "runs" / "tiny" / "checkpoints" / f"step-{STEPS:06d}"
    weights = exported / "runs" / "tiny" / "export" / "hf"
    events = (whole / "runs" / "tiny" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event for event in map(json.loads, events) if event["event"] == "step"]
    return {
        "commit": COMMIT,
        "version": json.loads((whole / "runs/tiny/adapter/qlora.json").read_text(encoding="utf-8"))["version"],
        "libraries": {name: version(name) for name in LIBRARIES},
        "arithmetic": arithmetic(next((whole / "hub" / "models--tests--tiny" / "snapshots").iterdir())),
        "stopped_after": STOP_AFTER,
        "losses": [step["loss"] for step in steps],
        "checkpoint": {path.name: sha256(path) for path in sorted(checkpoint.glob("*.safetensors"))},
        "export": {path.name: sha256(path) for path in sorted(weights.glob("*.safetensors"))},
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_place(folder: Path) -> None:
    """Nothing of this machine: events name the run's folder, a killed process left its host in a lock file."""
    import socket

    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes().replace(str(folder).encode(), PLACE.encode())
            if path.name in (".lock", "lock"):
                content = content.replace(socket.gethostname().encode(), HOST.encode())
            path.write_bytes(content)
            for word in (str(Path.home()), tempfile.gettempdir(), str(ROOT), socket.gethostname()):
                assert word.encode() not in content or len(word) < 3, f"{path}: {word}"


def pack(folder: Path, target: Path) -> None:
    """The same bytes from the same files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted(folder.rglob("*")):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.mode = 0o755 if path.is_dir() else 0o644
            if path.is_dir():
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
            else:
                entry.size = path.stat().st_size
                with path.open("rb") as stream:
                    archive.addfile(entry, stream)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
