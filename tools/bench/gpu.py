"""What `python -m qlora.prove` finds on this machine's GPU, kept in results/ under the card's name.

    python tools/bench/gpu.py
    python tools/bench/gpu.py --model 3b

A laptop's card has "laptop" in its name, as its driver calls it. The file holds no path and nobody's name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "found.json"
        command = [sys.executable, "-m", "qlora.prove", *sys.argv[1:], "--json", str(file)]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            kept = RESULTS / file_name(json.loads(text))
            kept.write_text(text, encoding="utf-8")
            print(f"\n{kept}")
    sys.exit(code)


def file_name(found: dict[str, dict[str, str]]) -> str:
    """`prove-nvidia-geforce-rtx-4060-laptop-gpu-8b.json`."""
    device = re.sub(r"[^a-z0-9]+", "-", found["hardware"]["device"].lower()).strip("-")
    return f"prove-{device}-{found['model']['shape']}.json"


if __name__ == "__main__":
    main()
