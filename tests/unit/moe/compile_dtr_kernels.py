"""Compile the DTR's Triton kernels for Hopper and print what multiplies in each.

The tile sizes are those of training. test_dtr_triton.py runs this script; it needs no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_evomoe.moe.dtr import triton as dtr_triton
from megatron_evomoe.moe.dtr import triton_kernels as kernels

HOPPER = GPUTarget("cuda", 90, 32)
TOKENS, COLUMNS, DEPTH = dtr_triton.BLOCK_TOKENS, dtr_triton.BLOCK_COLUMNS, dtr_triton.BLOCK_DEPTH
PRODUCT = dict(BLOCK_T=TOKENS, BLOCK_N=COLUMNS, BLOCK_D=DEPTH)
MIX = dict(ACTIVATION="gelu", BLOCK_T=dtr_triton.BLOCK_MIX, BLOCK_R=16, BLOCK_N=4)
INDEX = {"order_ptr": "i64", "num_text_ptr": "i64"}
BF16 = dict(OPERAND=tl.bfloat16)
LAUNCHES = {
    "grouped_product bf16 forward": (
        {"a_ptr": "bf16", "b_ptr": "bf16"},
        dict(PRODUCT, GATHER=True, ROUND=False, b_depth=1, **BF16),
    ),
    "grouped_product bf16 backward": (
        {"b_ptr": "bf16", "out_ptr": "bf16"},
        dict(PRODUCT, GATHER=False, ROUND=True, b_column=1, **BF16),
    ),
    "weight_gradient bf16": (
        {"z_ptr": "bf16", "dweight_ptr": "bf16"},
        dict(BLOCK_P=COLUMNS, BLOCK_C=COLUMNS, BLOCK_T=DEPTH, ROUND=True, **BF16),
    ),
    "grouped_product fp32": ({}, dict(PRODUCT, GATHER=True, ROUND=False, b_depth=1, OPERAND=tl.float32)),
    "mix": ({}, MIX),
    "mix_backward": ({}, MIX),
}


def assembly(name: str, pointers: dict[str, str], constants: dict) -> str:
    """Compile a kernel with `triton.compile`, which also assembles it, and return its PTX.

    Pointers that are not named have dtype fp32.
    """
    kernel = getattr(kernels, name.split()[0])
    signature, aligned = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = (
            "*" + {**INDEX, **pointers}.get(argument, "fp32") if argument.endswith("_ptr") else "i32"
        )
        if argument.endswith("_ptr") or argument in (
            "num_columns",
            "depth",
            "b_modality",
            "b_column",
            "b_depth",
            "P",
            "C",
        ):
            aligned[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": 8} if "OPERAND" in constants else {}
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=HOPPER, options=options
    ).asm["ptx"]


for name, (pointers, constants) in LAUNCHES.items():
    ptx = assembly(name, pointers, constants)
    print(f"{name}: {'wgmma' if 'wgmma.mma_async' in ptx else 'mma' if 'mma.sync' in ptx else 'fma'}")
