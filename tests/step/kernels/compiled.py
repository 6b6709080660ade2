"""Each kernel compiled ahead of time, as for a GPU of each kind: prints registers, spilled bytes and shared memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora.step.kernels import experts, experts_source, launching, operators, source

WIDTH = launching.LARGEST_ROW
TABLES = {"values_ptr": "*fp32", "constants_ptr": "*fp32", "nested_ptr": "*fp32", "offset_ptr": "*fp32"}
ROW = {"width": "i32", "weight_ptr": "*bf16", "inverse_ptr": "*fp32"}
ROW_SHAPE = {"FROM_ONE": False, "BLOCK": launching.row_block(WIDTH)}
HEADS_SHAPE = launching.turning(256, 192, operators.HALVES, True)  # the widest heads, of which not all is turned
ADAPTED = {f"{name}_ptr": "*bf16" for name in ("e", "g", "low_e", "low_g", "up_e", "up_g", "h")}
SIZES = dict.fromkeys(("rows", "width", "low_e_row", "low_g_row", "rank_e", "rank_g"), "i32")
TURNED = {f"{name}_ptr": "*bf16" for name in ("q", "k", "cos", "sin", "into_q", "into_k")}
STRIDES = {f"{name}_{place}": "i32" for name in ("q", "k") for place in ("heads", "row", "head", "token")}
GROUPED = {f"{name}_ptr": kind for name, kind in (("rows", "*bf16"), ("codes", "*u8"), ("table", "*fp32"))}
GROUPED |= {"into_ptr": "*bf16", "ends_ptr": "*i32", **dict.fromkeys(("experts", "out", "width"), "i32")}
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
OF_EXPERTS = {
    "route": (
        {
            **{f"{name}_ptr": "*i64" for name in ("index", "expert", "order", "inverse", "token")},
            "ends_ptr": "*i32",
            "rows": "i32",
            "choices": "i32",
        },
        {"BLOCK": experts.CHOICES},
        experts.CHOICES_WARPS,
    ),
    "unnest": (
        {
            "absmax_ptr": "*u8",
            "nested_ptr": "*fp32",
            "table_ptr": "*fp32",
            "offset_ptr": "*fp32",
            "into_ptr": "*fp32",
            "blocks": "i32",
            "padded": "i32",
        },
        {"BLOCK": experts.UNNESTED},
        4,
    ),
    **{
        f"grouped {height} {'back' if back else 'forth'} {'mxfp4' if mx else 'nf4'}": (
            {**GROUPED, "constants_ptr": "*u8" if mx else "*fp32"},
            {"BACK": back, **experts.tile(height, 512, 32 if mx else 64, not mx, mx)},
            experts.tile(height, 512, 64, False, False)["num_warps"],
        )
        for height in (experts.ROWS, experts.FEW_ROWS)
        for back in (False, True)
        for mx in (False, True)
    },
}
MODULES = {"source": list(KERNELS), "experts_source": list(OF_EXPERTS)}
ROUNDED_FIRST = ("dequantize", "unnest")  # products, before something is added to them


def resources(name: str, capability: int) -> dict[str, int]:
    types, given, warps = (KERNELS | OF_EXPERTS)[name]
    constants = {name: value for name, value in given.items() if name.isupper()}
    kernel: Any = getattr(experts_source if name in OF_EXPERTS else source, name.split()[0].rstrip("_"))
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    # As in every launch of it: rows, out and in begin at whole 16 bytes (`experts.fits`).
    aligned = [
        place
        for place, argument in enumerate(kernel.arg_names)
        if name.startswith("grouped") and (argument.endswith("_ptr") or argument in ("out", "width"))
    ]
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    asked = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": name not in ROUNDED_FIRST}
    options |= {name: value for name, value in given.items() if name == "num_stages"}
    built = triton.compile(asked, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{word}:(\d+)", said.stdout)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return {"registers": registers, "spilled": stack, "shared": built.metadata.shared}


if __name__ == "__main__":
    names, capabilities = MODULES[sys.argv[1]], [int(one) for one in sys.argv[2:]]
    print(json.dumps({f"{name} {cc}": resources(name, cc) for name in names for cc in capabilities}))
