// What all Hopper kernels take from asynchronous.cuh, numbers.cuh and instructions.cuh, on a CPU; include it behind simt.hpp.
#pragma once

static void earlier_kernels_done() {}
static void next_kernel_may_start() {}
static void prefetch_into_l2(const void*) {}
static float to_float(uint16_t v) { return FP16 ? from_fp16(v) : from_bf16(v); }
static uint32_t pack(float low, float high) {
  return FP16 ? uint32_t(to_fp16(high)) << 16 | to_fp16(low) : uint32_t(to_bf16(high)) << 16 | to_bf16(low);
}
static void unpack(uint4 v, float (&f)[8]) {
  const uint32_t u[4] = {v.x, v.y, v.z, v.w};
  for (int e = 0; e < 8; ++e) f[e] = to_float(uint16_t(u[e / 2] >> 16 * (e % 2)));
}
static uint4 packed(const float (&f)[8]) { return {pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7])}; }
static uint32_t e4m3(float v) {
  const uint32_t sign = __float_as_uint(v) >> 24 & 0x80;
  if (v != v) return sign | 0x7f;
  v = std::fmin(std::fabs(v), 448.f);
  int exponent;
  std::frexp(v, &exponent);
  exponent = v == 0 ? -6 : std::max(exponent - 1, -6);
  const uint32_t eighths = uint32_t(std::nearbyint(std::ldexp(v, 3 - exponent)));  // 8..16, below 8 if subnormal
  return sign | (((exponent + 6) << 3) + eighths);
}
static uint32_t to_e4m3(float a, float b, float c, float d) { return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | e4m3(d) << 24; }
static float2 from_e4m3(uint16_t pair) {
  float v[2];
  for (int i = 0; i < 2; i++) {
    const uint32_t code = pair >> 8 * i & 0xff, exponent = code >> 3 & 15, eighths = code & 7;
    const float size = exponent ? std::ldexp(8.f + eighths, int(exponent) - 10) : std::ldexp(float(eighths), -9);
    v[i] = (code & 0x7f) == 0x7f ? NAN : code & 0x80 ? -size : size;
  }
  return {v[0], v[1]};
}
static float2 half_pair(uint32_t v) { return {from_fp16(uint16_t(v)), from_fp16(uint16_t(v >> 16))}; }
static float gelu(float x) { return 0.5f * x * (1 + std::tanh(0.79788456080f * x + 0.035677408136f * x * x * x)); }
static void atomicMax(uint32_t* p, uint32_t v) { *p = std::max(*p, v); }
static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  float* sums[4] = {d, d + 1, d + 2, d + 3};
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  multiply_16bit(sums, a, b, FP16 ? from_fp16 : from_bf16);
}
static void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  float* sums[4] = {d, d + 1, d + 2, d + 3};
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  multiply_16bit(sums, a, b, from_bf16);
}
static uint32_t subtract_bf16(uint32_t a, uint32_t b) {
  const uint32_t high = to_bf16(from_bf16(uint16_t(a >> 16)) - from_bf16(uint16_t(b >> 16)));
  return high << 16 | to_bf16(from_bf16(uint16_t(a)) - from_bf16(uint16_t(b)));
}

static uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
static void __syncwarp() { meet_warp(); }
static float warp_sum(float v) {
  for (int step = 16; step >= 1; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}
static uint32_t warp_max(uint32_t v) {
  auto& mine = exchange[current / 32];
  mine[threadIdx.x % 32][0] = v;
  meet_warp();
  for (int i = 0; i < 32; i++) v = std::max(v, uint32_t(mine[i][0]));
  meet_warp();
  return v;
}
static uint4 load_shared(uint32_t from) {
  uint4 v;
  memcpy(&v, shared(from), sizeof v);
  return v;
}
static void store_shared(uint32_t to, uint4 v) { memcpy(shared(to), &v, sizeof v); }
