"""PTX of wgmma as C++ functions: the accumulators are so many that the text is written by a program."""

from __future__ import annotations

from functools import lru_cache

_TYPES = "typedef unsigned int uint32_t;\ntypedef unsigned long long uint64_t;\n"


def _wrapper(name: str, tokens: int, channels: int, types: str, tail: str) -> str:
    count = tokens // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    operand = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], const uint32_t* a, uint64_t b, int accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{tokens}k{channels}.f32.{types} "
      "{{{accumulators}}}, {{{operand}}}, %{count + 4}, p, 1, 1{tail};\\n}}\\n"
      : {outputs}
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}}
"""


@lru_cache(maxsize=32)
def wrappers(tokens: int) -> str:
    """`wgmma_fp8` (m64 n<tokens> k32) and `wgmma_bf16` (k16), A in registers, B in shared memory (PTX ISA, wgmma)."""
    fp8 = _wrapper("wgmma_fp8", tokens, 32, "e4m3.e4m3", "")
    return _TYPES + fp8 + _wrapper("wgmma_bf16", tokens, 16, "bf16.bf16", ", 0")
