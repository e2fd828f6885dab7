// What both quantizers do with a piece of 8 channels of a row.
#pragma once
#include "asynchronous.cuh"
#include "numbers.cuh"
#include "instructions.cuh"

// The first four codes and the last four.
__device__ __forceinline__ void encode(uint4 y, const float (&inverse)[8], float reciprocal, uint32_t& first, uint32_t& second) {
  float v[8];
  unpack(y, v);
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = v[e] * inverse[e] * reciprocal;
  first = to_e4m3(v[0], v[1], v[2], v[3]);
  second = to_e4m3(v[4], v[5], v[6], v[7]);
}

// Where the codes of channels 8 quad .. 8 quad + 7 of each 32 of a tile's row lie: 16 bytes each of first and second.
__device__ __forceinline__ int place(int quad, int half, int m) { return ((2 * quad + half) ^ (m & 7)) * 16; }

// Column c of row m of lora (R/64, m_pad, 64), swizzled.
__device__ __forceinline__ void store_lora(uint16_t* lora, int m_pad, int m, int c, float v) {
  const int byte = (c % 64) * 2;
  *(uint16_t*)((uint8_t*)lora + ((size_t)(c / 64) * m_pad + m) * 128 + (((byte / 16) ^ (m & 7)) * 16) + byte % 16) = to_bf16(v);
}
