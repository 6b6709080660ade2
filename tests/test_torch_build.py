"""What torch was built for is read from its version.py, without importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qlora import torch_build
from qlora.torch_build import TorchBuild

CUDA = """
from typing import Optional
__version__ = '2.13.0+cu130'
debug = False
cuda: Optional[str] = '13.0'
hip: Optional[str] = None
"""


def test_it_says_what_torch_says_and_does_not_import_it() -> None:
    version = torch.version
    assert torch_build.installed() == TorchBuild(torch.__version__, version.cuda, version.hip, version.xpu)
    code = "from qlora import torch_build; torch_build.installed(); import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_build_for_cuda_is_read() -> None:
    build = torch_build.parsed(CUDA)
    assert build == TorchBuild("2.13.0+cu130", cuda="13.0")
    assert build.cuda_major == 13


@pytest.mark.parametrize("text", ["", "x = 1", "def (", "__version__ = f()", "__version__ = 2"])
def test_what_does_not_say_is_unknown(text: str) -> None:
    assert torch_build.parsed(text) is None


def test_a_build_for_the_cpu_has_no_cuda() -> None:
    build = torch_build.parsed("__version__ = '2.13.0+cpu'\ncuda = None\n")
    assert build is not None and build.cuda is None and build.cuda_major is None
