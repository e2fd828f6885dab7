// 4-bit codes to e4m3 by byte permutation: a table holds the 16 values that a channel's group can take.
#pragma once

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// The e4m3 values code * ratio: 0..7 in x and y, -8..-1 in z and w. e4m3 is symmetric, so -1..-7 mirror 1..7.
__device__ __forceinline__ uint4 make_table(float ratio) {
  uint32_t r2, v[5];
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(r2) : "f"(ratio));
  const uint32_t pairs[5] = {0x3C000000u, 0x42004000u, 0x45004400u, 0x47004600u, 0x00004800u};  // fp16 (0, 1) (2, 3) ... (8, 0)
#pragma unroll
  for (int i = 0; i < 5; ++i)
    asm("{\n.reg .b16 h;\n.reg .b32 p;\nmul.rn.f16x2 p, %1, %2;\ncvt.rn.satfinite.e4m3x2.f16x2 h, p;\nmov.b32 %0, {h, h};\n}"
        : "=r"(v[i])
        : "r"(r2), "r"(pairs[i]));
  const uint32_t x = permute(v[0], v[1], 0x5410), y = permute(v[2], v[3], 0x5410);
  return make_uint4(x, y, permute(y, v[4], 0x1234) ^ 0x80808080u, permute(x, y, 0x1234) ^ 0x80808080u);
}
// Four codes a half of `codes`, two's complement.
__device__ __forceinline__ void decode(uint32_t codes, uint4 table, uint32_t& first, uint32_t& second) {
  uint32_t low = codes & 0x77777777u, sign = ((codes >> 1) & 0x44444444u) | 0x32103210u;
  first = permute(permute(table.x, table.y, low), permute(table.z, table.w, low), sign);
  low >>= 16, sign >>= 16;
  second = permute(permute(table.x, table.y, low), permute(table.z, table.w, low), sign);
}
// A group scale over its channel's, scales being bf16 or fp16.
__device__ __forceinline__ float widen(uint16_t v, bool fp16) {
  if (!fp16) return __uint_as_float((uint32_t)v << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}
