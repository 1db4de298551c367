"""Compiles every Triton kernel for Hopper, which needs no GPU; prints their names. Fails where one does not compile."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine import triton_ops
from engine.attention import split_decode

HOPPER = GPUTarget("cuda", 90, 32)
SCALARS = {"eps": "fp32", "scale": "fp32", "rows": "i32", "table_width": "i32"}
INTEGERS = {"tables", "query_starts", "context_ends", "row_items", "items"}
FLOATS = {"partial", "lse"}
ROTATE = {"HEADS": 32, "KV_HEADS": 8, "DIM": 128, "PAGE": 128, "GROUP_TILE": 4, "HALF_TILE": 64}
ATTEND = {
    "GROUP": 4,
    "KV_HEADS": 8,
    "DIM": 128,
    "PAGE": 128,
    "WINDOW": 0,
    "KEYS": 64,
    "GROUP_TILE": 16,
    "DIM_TILE": 128,
}
KERNELS: list[tuple[Any, dict[str, int]]] = [
    (triton_ops._rms_norm_kernel, {"WIDTH": 4096, "TILE": 4096}),
    (triton_ops._add_rms_norm_kernel, {"WIDTH": 5000, "TILE": 8192}),
    (triton_ops._silu_and_mul_kernel, {"WIDTH": 14336, "TILE": 1024}),
    (triton_ops._rotate_and_store_kernel, ROTATE | {"NORM": False}),
    (triton_ops._rotate_and_store_kernel, ROTATE | {"NORM": True}),
    (split_decode._plan_kernel, {"WANTED": 66, "WINDOW": 4096, "KEYS": 64, "SHORTEST": 128, "ROWS_TILE": 256}),
    (split_decode._attend_kernel, ATTEND | {"STAGES": 5}),
    (split_decode._attend_kernel, ATTEND | {"STAGES": 5, "PAGE": 16, "WINDOW": 4096}),
    (split_decode._attend_kernel, ATTEND | {"STAGES": 5, "DIM": 256, "DIM_TILE": 256, "KEYS": 32}),
    (split_decode._join_kernel, {"HEADS": 32, "DIM": 128, "SPLITS_TILE": 16, "DIM_TILE": 128}),
]


def type_of(argument: str, constants: dict[str, int]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in SCALARS:
        return SCALARS[argument]
    if argument == "kv_slots":
        return "*i64"
    return "*i32" if argument in INTEGERS else "*fp32" if argument in FLOATS else "*bf16"


for kernel, constants in KERNELS:
    signature = {argument: type_of(argument, constants) for argument in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constexprs), target=HOPPER)
    print(kernel.__name__)
