// What becomes of a finished tile: FINISHERS warps take it from shared memory while the next one is multiplied.
#pragma once

// 16 lanes have a token's 128 channels, 8 each. A warp takes 8 tokens at a time, all their reads under way together.
struct Epilogue {
  static constexpr int AHEAD = 4;
  const Product& a;
  const uint32_t staged;
  const int warp, lane, row;  // of FINISHERS, of 16, of 2
  const bool one_image;
  __device__ __forceinline__ Epilogue(const Product& a, uint32_t staged)
      : a(a), staged(staged), warp(finisher()), lane(threadIdx.x % 16), row(threadIdx.x / 16 % 2), one_image(a.length >= a.m) {}

  __device__ __forceinline__ float sum_of_row(float v) const {
#pragma unroll
    for (int e = 1; e < 16; e *= 2) v += __shfl_xor_sync(0xffffffffu, v, e);
    return v;
  }
  __device__ __forceinline__ float largest_of_row(float v) const {
#pragma unroll
    for (int e = 1; e < 16; e *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, e));
    return v;
  }

  __device__ __forceinline__ void prepare(const Tiles&) const {}

  __device__ __forceinline__ void tile(const Tiles& tile, int) const {
    const int m0 = tile.m0(), channel = tile.n0() + lane * 8;
    const int head = tile.n, which = EPILOGUE == NORM_ROPE ? head / a.heads : 0;  // of q, k, v
    const bool rotated = EPILOGUE == NORM_ROPE && which < 2, inside = channel < a.n;
    float per_channel[8] = {};  // NORM_ROPE: norm weight, GELU: 1 / smooth of the next linear
    uint4 gate = make_uint4(0, 0, 0, 0);
    uint16_t* to = a.out + channel;
    if (EPILOGUE == NORM_ROPE)
      to = (which == 0 ? a.out : which == 1 ? a.out_k : a.out_v) + head % a.heads * a.head_stride + lane * 8;
    if (rotated) unpack(*(const uint4*)((which == 0 ? a.norm_q : a.norm_k) + lane * 8), per_channel);
    if (EPILOGUE == GATE_RESIDUAL && one_image && inside) gate = *(const uint4*)(a.gate + channel);
    if (EPILOGUE == GELU && inside) {
      *(float4*)per_channel = *(const float4*)(a.next_inverse + channel);
      *(float4*)(per_channel + 4) = *(const float4*)(a.next_inverse + channel + 4);
    }
    uint4 next_extra[AHEAD];
    auto row_of = [&](int block, int i) { return m0 + 8 * block + 2 * i + row; };
    auto read = [&](int block) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int m = row_of(block, i);
        if (block >= TOKENS / 8 || m >= a.m || !inside) continue;
        if (rotated) next_extra[i] = *(const uint4*)(a.rotary + (size_t)(one_image ? m : m % a.length) * 64 + lane * 4);
        if (EPILOGUE == GATE_RESIDUAL) next_extra[i] = *(const uint4*)(a.residual + (size_t)m * a.n + channel);
      }
    };
    read(warp);
    for (int block = warp; block < TOKENS / 8; block += FINISHERS) {
      uint4 extra[AHEAD], values[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        extra[i] = next_extra[i];
        values[i] = load_shared(staged_piece(staged, 8 * block + 2 * i + row, lane));
      }
      read(block + FINISHERS);
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int m = row_of(block, i);
        const bool valid = m < a.m && inside;
        uint4 v = values[i];
        if (EPILOGUE == NORM_ROPE) {
          const int batch = one_image ? 0 : m / a.length, position = m - batch * a.length;
          if (rotated) v = norm_rope(v, extra[i], per_channel);
          if (valid) *(uint4*)(to + batch * a.batch_stride + position * a.token_stride) = v;
          continue;
        }
        if (EPILOGUE == GELU) {
          float y[8], largest = 0.f;
          unpack(v, y);
#pragma unroll
          for (int e = 0; e < 8; ++e) y[e] = gelu(y[e]);
          v = packed(y);
          unpack(v, y);
#pragma unroll
          for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(y[e] * per_channel[e]));
          largest = largest_of_row(valid ? largest : 0.f);
          if (lane == 0 && valid) atomicMax(a.absmax + m, __float_as_uint(largest));
        }
        if (EPILOGUE == GATE_RESIDUAL && valid) {
          if (!one_image) gate = *(const uint4*)(a.gate + (size_t)(m / a.length) * a.gate_stride + channel);
          v = gate_residual(v, gate, extra[i]);
        }
        if (valid) *(uint4*)(to + (size_t)m * a.n) = v;
      }
    }
  }

  __device__ __forceinline__ uint4 norm_rope(uint4 v, uint4 rotary, const float (&weight)[8]) const {
    const uint32_t angles[4] = {rotary.x, rotary.y, rotary.z, rotary.w};
    float y[8], sum = 0.f;
    unpack(v, y);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum = fmaf(y[e], y[e], sum);
    const float r = rsqrtf(fmaf(sum_of_row(sum), 1.f / 128.f, 1e-6f));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 cs = half_pair(angles[e]);
      const float p = y[2 * e] * r * weight[2 * e], q = y[2 * e + 1] * r * weight[2 * e + 1];
      y[2 * e] = p * cs.x - q * cs.y, y[2 * e + 1] = q * cs.x + p * cs.y;
    }
    return packed(y);
  }

  __device__ __forceinline__ uint4 gate_residual(uint4 v, uint4 gate, uint4 residual) const {
    float y[8], s[8], g[8];
    unpack(v, y), unpack(residual, s), unpack(gate, g);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      s[e] = fmaf(y[e], g[e], s[e]);
#if FP16
      s[e] = fminf(fmaxf(s[e], -65504.f), 65504.f);
#endif
    }
    return packed(s);
  }
};
