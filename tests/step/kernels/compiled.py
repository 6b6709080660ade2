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

from qlora.step.kernels import launching, operators, source

WIDTH = launching.LARGEST_ROW
TABLES = {"values_ptr": "*fp32", "constants_ptr": "*fp32", "nested_ptr": "*fp32", "offset_ptr": "*fp32"}
ROW = {"width": "i32", "weight_ptr": "*bf16", "inverse_ptr": "*fp32"}
ROW_SHAPE = {"FROM_ONE": False, "BLOCK": launching.row_block(WIDTH)}
HEADS_SHAPE = launching.turning(256, 192, operators.HALVES, True)  # the widest heads, of which not all is turned
ADAPTED = {f"{name}_ptr": "*bf16" for name in ("e", "g", "low_e", "low_g", "up_e", "up_g", "h")}
SIZES = dict.fromkeys(("rows", "width", "low_e_row", "low_g_row", "rank_e", "rank_g"), "i32")
TURNED = {f"{name}_ptr": "*bf16" for name in ("q", "k", "cos", "sin", "into_q", "into_k")}
STRIDES = {f"{name}_{place}": "i32" for name in ("q", "k") for place in ("heads", "row", "head", "token")}
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
    **{
        f"gated_adapted{'_' * keeps}": (
            {**ADAPTED, **SIZES, "scale_e": "fp32", "scale_g": "fp32"},
            {"KEEPS": keeps, "ROWS": launching.TILE[0], "COLUMNS": launching.TILE[1]},
            launching.TILE_WARPS,
        )
        for keeps in (False, True)
    },
    "rope_qk": (
        {**TURNED, **STRIDES, "length": "i32", "table_row": "i32", "width": "i32", "turned": "i32"},
        HEADS_SHAPE,
        4,
    ),
    "cross_entropy": (
        {
            "logits_ptr": "*bf16",
            "targets_ptr": "*i64",
            "weights_ptr": "*fp32",
            "logprobs_ptr": "*fp32",
            "width": "i32",
            "factor": "fp32",
            "cap": "fp32",
        },
        {"CAPPED": True, "BLOCK": launching.LOGITS},
        launching.LOGITS_WARPS,
    ),
    "dequantize": (
        {"codes_ptr": "*u8", "absmax_ptr": "*u8", "weight_ptr": "*bf16", "count": "i64", **TABLES},
        {"BLOCK": launching.DEQUANTIZED_BYTES},
        4,
    ),
}


def resources(name: str, capability: int) -> dict[str, int]:
    types, constants, warps = KERNELS[name]
    kernel = getattr(source, name.rstrip("_"))
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
