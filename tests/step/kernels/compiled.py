"""Each kernel compiled ahead of time, as for a GPU of each kind: prints registers, spilled bytes and shared memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora.step.kernels import launching, source

WIDTH = launching.LARGEST_ROW
TABLES = {"values_ptr": "*fp32", "constants_ptr": "*fp32", "nested_ptr": "*fp32", "offset_ptr": "*fp32"}
ROW = {"width": "i32", "weight_ptr": "*bf16", "inverse_ptr": "*fp32"}
ROW_SHAPE = {"FROM_ONE": False, "BLOCK": launching.row_block(WIDTH)}
# Of each kernel: its arguments' types, its constants, its warps.
KERNELS = {
    "gated": ({"e_ptr": "*bf16", "g_ptr": "*bf16", "h_ptr": "*bf16", "count": "i64"}, {"BLOCK": launching.BLOCK}, 4),
    "gated_backward": (
        {"grad_ptr": "*bf16", "e_ptr": "*bf16", "g_ptr": "*bf16", "count": "i64"},
        {"BLOCK": launching.BLOCK},
        4,
    ),
    "rms_norm": ({"x_ptr": "*bf16", "y_ptr": "*bf16", "eps": "fp32", **ROW}, ROW_SHAPE, launching.warps(WIDTH)),
    "rms_norm_backward": (
        {"grad_ptr": "*bf16", "x_ptr": "*bf16", "into_ptr": "*bf16", **ROW},
        ROW_SHAPE,
        launching.warps(WIDTH),
    ),
    "dequantize": (
        {"codes_ptr": "*u8", "absmax_ptr": "*u8", "weight_ptr": "*bf16", "count": "i64", **TABLES},
        {"BLOCK": launching.DEQUANTIZED_BYTES},
        4,
    ),
}


def resources(name: str, capability: int) -> dict[str, int]:
    types, constants, warps = KERNELS[name]
    kernel = getattr(source, name)
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    asked = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": name != "dequantize"}
    built = triton.compile(asked, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{word}:(\d+)", said.stdout)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return {"registers": registers, "spilled": stack, "shared": built.metadata.shared}


if __name__ == "__main__":
    names, capabilities = list(KERNELS), [int(one) for one in sys.argv[1:]]
    print(json.dumps({f"{name} {cc}": resources(name, cc) for name in names for cc in capabilities}))
