"""`python -m qlora.prove`: the command, which stands above with the others and prints."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("qlora.cli.prove", run_name="__main__", alter_sys=True)
