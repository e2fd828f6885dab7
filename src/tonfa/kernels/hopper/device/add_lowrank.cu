// Adds up partial sums of a low-rank down-projection. Written for NVRTC: no headers but ours.
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#include "asynchronous.cuh"

struct AddLowrank {
  const float* partial;  // (parts, m_pad, rank)
  const float* scale;    // (m_pad)
  uint8_t* lora;         // (rank/64, m_pad, 64) bf16, swizzled, divided by scale
  int m, m_pad, rank, parts;
};

extern "C" __global__ void __launch_bounds__(256) add_lowrank(const __grid_constant__ AddLowrank a) {
  earlier_kernels_done();
  next_kernel_may_start();
  const int i = blockIdx.x * 256 + threadIdx.x, m = i / (a.rank / 2), c = i % (a.rank / 2) * 2;
  if (m >= a.m_pad) return;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll 16
  for (int s = 0; s < a.parts; ++s) {
    const float2 part = *(const float2*)(a.partial + ((size_t)s * a.m_pad + m) * a.rank + c);
    sum.x += part.x, sum.y += part.y;
  }
  const float scale = m < a.m ? a.scale[m] : 0.f, reciprocal = scale > 0.f ? __frcp_rn(scale) : 0.f;
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(sum.y * reciprocal), "f"(sum.x * reciprocal));
  const int byte = c % 64 * 2;
  *(uint32_t*)(a.lora + ((size_t)(c / 64) * a.m_pad + m) * 128 + (((byte / 16) ^ (m & 7)) * 16) + byte % 16) = pair;
}
