#!/usr/bin/env python3
"""The export step without installing the commands: python tools/merge_and_export.py RUN_OR_ADAPTER --to hf"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora.cli.export import app

if __name__ == "__main__":
    app()
