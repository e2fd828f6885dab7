// 16-bit numbers, bf16 or with FP16 half precision, to float and back; e4m3; GELU.
#pragma once

__device__ __forceinline__ float to_float(uint16_t v) {
#if FP16
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#else
  return __uint_as_float((uint32_t)v << 16);
#endif
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t d;
#if FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
  return d;
}
__device__ __forceinline__ uint16_t to_bf16(float v) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(v));
  return (uint16_t)pair;
}
__device__ __forceinline__ void unpack(uint4 v, float (&f)[8]) {
  const uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) f[2 * e] = to_float((uint16_t)u[e]), f[2 * e + 1] = to_float((uint16_t)(u[e] >> 16));
}
__device__ __forceinline__ uint4 packed(const float (&f)[8]) {
  return make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
}
__device__ __forceinline__ float2 half_pair(uint32_t v) {
  float2 f;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(f.x), "=f"(f.y) : "r"(v));
  return f;
}
__device__ __forceinline__ uint32_t to_e4m3(float a, float b, float c, float d) {
  uint32_t v;
  asm("{\n.reg .b16 l, h;\ncvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\nmov.b32 %0, {l, h};\n}"
      : "=r"(v)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return v;
}
// Two e4m3 numbers.
__device__ __forceinline__ float2 from_e4m3(uint16_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return half_pair(halves);
}
__device__ __forceinline__ float gelu(float x) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * fmaf(0.035677408136f, x * x, 0.79788456080f)));
  return fmaf(0.5f * x, t, 0.5f * x);
}
