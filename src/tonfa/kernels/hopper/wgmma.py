"""PTX of wgmma as C++ functions: the accumulators are so many that the text is written by a program."""

from __future__ import annotations

from functools import lru_cache

_TYPES = "typedef unsigned int uint32_t;\ntypedef unsigned long long uint64_t;\n"


def _wrapper(name: str, tokens: int, channels: int, types: str, tail: str, shared: bool = False) -> str:
    """A in four registers, or in shared memory behind a descriptor; B in shared memory."""
    count = tokens // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    first = ["%" + str(count)] if shared else [f"%{count + i}" for i in range(4)]
    second, predicate = (f"%{count + len(first) + i}" for i in range(2))
    a = first[0] if shared else f"{{{', '.join(first)}}}"
    inputs = '"l"(a)' if shared else ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], {"uint64_t" if shared else "const uint32_t*"} a, uint64_t b,
                                       int accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {predicate}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{tokens}k{channels}.f32.{types} "
      "{{{accumulators}}}, {a}, {second}, p, 1, 1{tail};\\n}}\\n"
      : {outputs}
      : {inputs}, "l"(b), "r"(accumulate));
}}
"""


@lru_cache(maxsize=32)
def wrappers(tokens: int, down_rank: int = 0, fp16: bool = False) -> str:
    """m64 n<tokens> products (PTX ISA, wgmma), B in shared memory.

    `wgmma_fp8` (k32) has A in shared memory, `wgmma_bf16` (k16) in registers. `wgmma_down` (n<down_rank> k16) has both
    in shared memory, in bf16 or fp16.
    """
    text = _TYPES + _wrapper("wgmma_fp8", tokens, 32, "e4m3.e4m3", "", shared=True)
    text += _wrapper("wgmma_bf16", tokens, 16, "bf16.bf16", ", 0")
    if down_rank:
        types = "f16.f16" if fp16 else "bf16.bf16"
        text += _wrapper("wgmma_down", down_rank, 16, types, ", 0, 0", shared=True)
    return text
