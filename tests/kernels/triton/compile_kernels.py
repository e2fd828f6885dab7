"""Compile every kernel for GPUs that are not here; a JSON line each: matrix instructions, registers, spills.

A program of its own, because the tests' process has Triton's interpreter in place of its compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tonfa.kernels.triton import descent_columns, expand, gptq_columns, product, quantize, tiles, w4a16

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*")

ANY_INTEGER = ("M", "length", "B", "columns")  # and N where it is not specialized
"""Arguments that are no multiples of 16."""


def compile_kernel(
    function: Any, arguments: dict[str, str], constants: dict[str, Any], capability: int, **options: int
) -> dict[str, Any]:
    """Compile for one GPU: types of arguments by name, values of constants."""
    names = function.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    values = {(i,): constants.get(name) for i, name in enumerate(names) if name not in arguments}
    aligned = [
        (i,)
        for i, name in enumerate(names)
        if arguments.get(name, "").startswith("*") or (arguments.get(name) == "i32" and name not in ANY_INTEGER)
    ]
    source = ASTSource(function, signature, values, {i: [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "matrix": sorted({m.group(0) for m in MATRIX.finditer(compiled.asm["ptx"])}),
        "tma": "cp.async.bulk.tensor" in compiled.asm["ptx"],
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
    }


def product_kernel(capability: tuple[int, int], code: str, epilogue: str, tile: tiles.Tile) -> dict[str, Any]:
    tma = capability >= (9, 0)
    m, n, k, width = tile.block_m, tile.block_n, tile.block_k, min(tile.block_n, 128)
    heads, gate = epilogue == "heads", epilogue == "gate"
    arguments = {
        "a": f"tensordesc<{code}[{m}, {k}]>" if tma else f"*{code}",
        "b": f"tensordesc<{code}[{n}, {k}]>" if tma else f"*{code}",
        "a_scales": "*fp32",
        "b_scales": "*fp32",
        "lowrank": "*fp32",
        "up": "*bf16",
        "bias": "*fp32",
        "out": f"tensordesc<bf16[{m}, {width}]>" if tma and not heads else "*bf16",
        **dict.fromkeys(("M", "N", "K", "lowrank_stride", "length"), "i32"),
    }
    if gate:
        arguments |= {"residual": "*bf16", "gate": "*bf16", "gate_stride": "i32"}
    if heads:
        arguments |= {"norm_q": "*bf16", "norm_k": "*bf16", "cos": "*fp32", "sin": "*fp32"}
        arguments |= dict.fromkeys(("part_stride", "batch_stride", "head_stride", "token_stride"), "i32")
    constants = {
        "EPILOGUE": epilogue,
        "INTEGERS": code == "i8",
        "TMA": tma,
        "BRANCH": "bf16",
        "RANK": 32,
        "ONE_IMAGE": True,
        "HEAD_DIM": 128,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": tile.group_m,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    number = capability[0] * 10 + capability[1]
    return compile_kernel(product.product_kernel, arguments, constants, number, **options)


def quantize_kernel(capability: int, code: str, rank: int = 32) -> dict[str, Any]:
    """With LayerNorm."""
    cut = quantize.choose(3072, rank, 2)
    arguments = {
        "x": "*bf16",
        "inverse_smooth": "*fp32",
        "down": "*bf16",
        "scale": "*bf16",
        "shift": "*bf16",
        "codes": f"*{code}",
        "scales": "*fp32",
        "lowrank": "*fp32",
        **dict.fromkeys(("M", "K", "length", "scale_stride", "shift_stride"), "i32"),
    }
    constants = {
        "NORM": True,
        "ONE_IMAGE": True,
        "FP8": code != "i8",
        "PRECISION": None,
        "RANK": rank,
        "RANK_BLOCK": rank,
        "BLOCK_M": cut.block_m,
        "BLOCK_K": cut.block_k,
    }
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    return compile_kernel(quantize.quantize_kernel, arguments, constants, capability, **options)


def expand_kernel(capability: int, fp8: bool) -> dict[str, Any]:
    tile = expand.TILE
    pointers = {"qweight": "*i32", "wscales": "*bf16", "inverse_scales": "*fp32", "out": "*i32"}
    constants = {"FP8": fp8, "ROWS": tile.rows, "BLOCK_GROUPS": tile.groups}
    arguments = {**pointers, "N": "i32", "GROUPS": "i32"}
    return compile_kernel(expand.expand_kernel, arguments, constants, capability, num_warps=tile.num_warps)


def w4a16_kernel(capability: int) -> dict[str, Any]:
    pointers = {"x": "*bf16", "addresses": "*i64", "blocks": "*i32", "out": "*bf16"}
    constants = {"FLOAT": tl.bfloat16, "BATCH": 1, "ROWS": w4a16.ROWS, "WORDS": 128}
    arguments = {**pointers, **dict.fromkeys(("B", "K", "columns"), "i32")}
    return compile_kernel(w4a16.w4a16_kernel, arguments, constants, capability, num_warps=4)


def gptq_kernel(capability: int) -> dict[str, Any]:
    arguments = dict.fromkeys(("rest", "feedback", "steps", "inverse_steps", "codes", "errors"), "*fp32")
    constants = {"COLUMNS": 128, "ROWS": gptq_columns.ROWS}
    arguments |= {"N": "i32", "lowest": "fp32"}
    return compile_kernel(gptq_columns.gptq_columns_kernel, arguments, constants, capability, num_warps=1)


def descent_kernel(capability: int) -> dict[str, Any]:
    arguments = dict.fromkeys(("codes", "step", "ratios", "gradient", "local"), "*fp32")
    constants = {"COLUMNS": 64, "ROWS": descent_columns.ROWS}
    arguments |= {"N": "i32", "lowest": "fp32"}
    return compile_kernel(descent_columns.descent_columns_kernel, arguments, constants, capability, num_warps=1)


def main() -> None:
    def show(name: str, facts: dict[str, Any]) -> None:
        print(json.dumps({"name": name, **facts}), flush=True)

    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        code = "i8" if capability < (8, 9) else "fp8e4nv"
        tile = tiles.candidates(capability)[0].tile
        name = f"sm_{capability[0]}{capability[1]}"
        show(f"product {code} {name}", product_kernel(capability, code, "plain", tile))
    for epilogue in ("gelu", "gate", "heads"):
        tile = tiles.choose((9, 0), 132, 4608, 3072, 3072)
        show(f"{epilogue} fp8e4nv sm_90", product_kernel((9, 0), "fp8e4nv", epilogue, tile))
    show("product i8 sm_90", product_kernel((9, 0), "i8", "plain", tiles.candidates((9, 0))[1].tile))
    show("quantize fp8e4nv sm_90", quantize_kernel(90, "fp8e4nv"))
    show("quantize i8 sm_80", quantize_kernel(80, "i8"))
    show("quantize rank 64 i8 sm_86", quantize_kernel(86, "i8", 64))
    show("quantize rank 128 i8 sm_86", quantize_kernel(86, "i8", 128))
    show("expand fp8 sm_90", expand_kernel(90, True))
    show("expand i8 sm_86", expand_kernel(86, False))
    show("w4a16 sm_90", w4a16_kernel(90))
    for capability in (80, 90):
        show(f"gptq columns sm_{capability}", gptq_kernel(capability))
        show(f"descent columns sm_{capability}", descent_kernel(capability))


if __name__ == "__main__":
    main()
