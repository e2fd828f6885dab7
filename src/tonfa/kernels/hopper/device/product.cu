// Product of an SVDQuant linear on Hopper: FP8 activations, 4-bit weights decoded in registers, low-rank branch in the
// same accumulators. Written for NVRTC: no headers. TOKENS, STAGES, EPILOGUE, OUT_FP16 are defined by the caller, and
// the wgmma wrappers stand above this text.
//
// y[m, n] = x_scale[m] * w_scale[n] * (sum_k x[m, k] w[n, k] + sum_r lora[m, r] up[n, r]) + bias[n]
//
// The channels are the M of wgmma, so the decoded weights can be its register operand; a tile is 128 channels (64 for
// each consumer warpgroup) x TOKENS. Three warpgroups: one loads (TMA) and builds decoding tables, two decode and
// multiply. Tables: the 16 e4m3 values of a channel's group, looked up by byte permutation.

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;

constexpr int CHANNELS = 128;
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = CHANNELS * 64;
constexpr int TABLE_BYTES = 2 * CHANNELS * 16;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES + TABLE_BYTES;
constexpr int PART = (TOKENS / 8 + 1) / 2 * 8;  // tokens that are staged at a time: first half, then the rest
constexpr int STAGED_BYTES = 2 * PART * 128;  // two warpgroups x PART tokens x 64 channels x 2 bytes

enum { PLAIN = 0, GELU = 1, GATE_RESIDUAL = 2, NORM_ROPE = 3 };

struct alignas(64) TensorMap { unsigned long long opaque[16]; };

struct Product {
  const uint8_t* x;         // (K/128, m_pad, 128) e4m3, channels permuted and swizzled
  const float* x_scale;     // (M)
  const uint8_t* lora;      // (R/64, m_pad, 64) bf16, swizzled, divided by x_scale
  const uint16_t* w_scales; // (K/64, N) bf16 or fp16 group scales
  const float* w_inverse;   // (N) 1 / w_scale
  const float* w_scale;     // (N)
  const uint4* up;          // (N/128, R/16, 256) register fragments, bf16, divided by w_scale
  const float* bias;        // (N)
  uint16_t* out;            // (M, N); NORM_ROPE: q, see the strides
  uint16_t* out_k;
  uint16_t* out_v;
  const uint16_t* residual; // (M, N)
  const uint16_t* gate;     // (B, gate_stride)
  const uint16_t* norm_q;   // (128)
  const uint16_t* norm_k;   // (128)
  const uint32_t* rotary;   // (length, 64) pairs cos, sin as fp16
  const float* next_inverse; // (N) 1 / smooth of the linear that reads a GELU
  uint32_t* absmax;         // (M) float bits, gathers |gelu(y) / smooth|
  long long batch_stride, token_stride, head_stride;  // of q, k and v, in elements
  int m, m_pad, n, k, rank, rank_start, length, heads, gate_stride, scales_fp16;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, int phase) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(bar),
      "r"(phase)
      : "memory");
}
__device__ __forceinline__ void load_bulk(uint32_t to, const void* from, int bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(bar)
               : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap* map, int column, int row, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void sync_threads(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// All ones after the wait for this phase. What depends on it stays behind the products issued before it: without such a
// tie the assembler gathers the decoding of several steps in front of one product.
__device__ __forceinline__ uint32_t barrier_passed(uint32_t bar, int phase) {
  uint32_t all;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 0xffffffff, 0, p;\n}"
               : "=r"(all)
               : "r"(bar), "r"(phase)
               : "memory");
  return all;
}
// A K-major tile of 128-byte rows, swizzled in atoms of 8 rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// Four codes a half of `codes`, two's complement; table.xy holds the values of 0..7, table.zw those of -8..-1.
__device__ __forceinline__ void decode(uint32_t codes, uint4 table, uint32_t& first, uint32_t& second) {
  uint32_t low = codes & 0x77777777u, sign = ((codes >> 1) & 0x44444444u) | 0x32103210u;
  first = permute(permute(table.x, table.y, low), permute(table.z, table.w, low), sign);
  low >>= 16, sign >>= 16;
  second = permute(permute(table.x, table.y, low), permute(table.z, table.w, low), sign);
}
__device__ __forceinline__ float to_float(uint16_t v) {
#if OUT_FP16
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#else
  return __uint_as_float((uint32_t)v << 16);
#endif
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t d;
#if OUT_FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
  return d;
}
__device__ __forceinline__ float low_half(uint32_t v) { return to_float((uint16_t)v); }
__device__ __forceinline__ float high_half(uint32_t v) { return to_float((uint16_t)(v >> 16)); }
__device__ __forceinline__ void unpack(uint4 v, float (&f)[8]) {
  const uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) f[2 * e] = low_half(u[e]), f[2 * e + 1] = high_half(u[e]);
}
__device__ __forceinline__ float2 half_pair(uint32_t v) {
  float2 f;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(f.x), "=f"(f.y) : "r"(v));
  return f;
}
__device__ __forceinline__ float gelu(float x) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * fmaf(0.035677408136f, x * x, 0.79788456080f)));
  return fmaf(0.5f * x, t, 0.5f * x);
}

// The 16 e4m3 values code * ratio: 0..7 in x and y, -8..-1 in z and w. e4m3 is symmetric, so -1..-7 mirror 1..7.
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

__device__ __forceinline__ void store_table(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

struct Ring {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

extern "C" __global__ void __launch_bounds__(384, 1)
    product(const __grid_constant__ TensorMap weights, const __grid_constant__ Product a) {
  extern __shared__ uint8_t raw[];
  const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t staged = base + STAGES * STAGE_BYTES;
  const uint32_t scales = staged + STAGED_BYTES, full = scales + 2 * TOKENS * 4, empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1 + 4);
      barrier_init(empty + 8 * i, 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  const int m_tiles = (a.m + TOKENS - 1) / TOKENS, tiles = m_tiles * ((a.n + CHANNELS - 1) / CHANNELS);
  const int k_steps = (a.k + 127) / 128, groups = a.k / 64;
  const int first_chunk = a.rank_start / 64, rank_chunks = a.rank ? (a.rank_start + a.rank + 63) / 64 - first_chunk : 0;

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    Ring ring;
    const int t = threadIdx.x;  // its channel
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int m0 = tile % m_tiles * TOKENS, n0 = tile / m_tiles * CHANNELS;
      const int bytes = min(TOKENS, a.m_pad - m0) * 128;
      const bool inside = n0 + t < a.n;
      const float inverse = inside ? a.w_inverse[n0 + t] : 0.f;
      const uint16_t* scales = a.w_scales + n0 + t;
      auto scale = [&](int g) -> uint16_t { return inside && g < groups ? scales[(size_t)g * a.n] : (uint16_t)0; };
      auto widen = [&](uint16_t v) -> float {
        if (!a.scales_fp16) return __uint_as_float((uint32_t)v << 16);
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
        return f;
      };
      uint16_t next0 = scale(0), next1 = scale(1);
      for (int i = -rank_chunks; i < k_steps; ++i, ring.next()) {
        const uint32_t to = base + ring.stage * STAGE_BYTES, bar = full + 8 * ring.stage;
        barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
        if (t == 0) {
          if (i < 0) {
            barrier_expect(bar, bytes);
            load_bulk(to, a.lora + ((size_t)(first_chunk + i + rank_chunks) * a.m_pad + m0) * 128, bytes, bar);
          } else {
            barrier_expect(bar, bytes + W_BYTES);
            load_bulk(to, a.x + ((size_t)i * a.m_pad + m0) * 128, bytes, bar);
            load_tile(to + X_BYTES, &weights, i * 64, n0, bar);
          }
        }
        if (i >= 0) {
          const uint16_t now0 = next0, now1 = next1;
          next0 = scale(2 * i + 2), next1 = scale(2 * i + 3);
          store_table(to + X_BYTES + W_BYTES + t * 16, make_table(widen(now0) * inverse));
          store_table(to + X_BYTES + W_BYTES + (CHANNELS + t) * 16, make_table(widen(now1) * inverse));
          __syncwarp();
        }
        if (lane == 0) barrier_arrive(bar);
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  const int half = group - 1, warp4 = warp % 4, row = lane / 4, quad = lane % 4;
  const uint32_t w_row = X_BYTES + (half * 64 + warp4 * 16 + row) * 64 + quad * 16;
  const uint32_t t_row = X_BYTES + W_BYTES + ((quad / 2) * CHANNELS + half * 64 + warp4 * 16 + row) * 16;
  const uint32_t my_staged = staged + half * PART * 128, my_scales = scales + half * TOKENS * 4;
  Ring ring;
  float d[TOKENS / 2];
  uint32_t regs[16], branch[8];
  uint4 codes0, codes1, table0, table1;

  auto load4 = [](uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
  };
  auto fetch = [&] {
    barrier_wait(full + 8 * ring.stage, ring.phase);
    const uint32_t stage = base + ring.stage * STAGE_BYTES;
    codes0 = load4(stage + w_row), codes1 = load4(stage + w_row + 8 * 64);
    table0 = load4(stage + t_row), table1 = load4(stage + t_row + 8 * 16);
  };

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int m0 = tile % m_tiles * TOKENS, n0 = tile / m_tiles * CHANNELS;
    const int t = threadIdx.x - 128;
    for (int i = t % 128; i < TOKENS; i += 128) {
      const float scale = m0 + i < a.m ? a.x_scale[m0 + i] : 0.f;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(my_scales + 4 * i), "f"(scale) : "memory");
    }
    int accumulate = 0;
    uint32_t pending = 0;  // barrier of the stage that the step before has read
    for (int i = 0; i < rank_chunks; ++i, ring.next()) {
      const uint32_t stage = base + ring.stage * STAGE_BYTES;
      const int start = (first_chunk + i) * 64 - a.rank_start, begin = max(0, -start / 16), end = min(4, (a.rank - start) / 16);
      for (int j = begin; j < end; j += 2) {
        const uint4* up = a.up + ((size_t)(n0 / CHANNELS) * (a.rank / 16) + start / 16 + j) * 256 + t;
        const uint4 v0 = up[0], v1 = j + 1 < end ? up[256] : make_uint4(0, 0, 0, 0);  // a step of zeros adds nothing
        branch[0] = v0.x, branch[1] = v0.y, branch[2] = v0.z, branch[3] = v0.w;
        branch[4] = v1.x, branch[5] = v1.y, branch[6] = v1.z, branch[7] = v1.w;
        if (j == begin) barrier_wait(full + 8 * ring.stage, ring.phase);
        wgmma_fence();
        wgmma_bf16(d, branch, descriptor(stage + 32 * j), accumulate);
        wgmma_bf16(d, branch + 4, descriptor(stage + 32 * (j + 1 < end ? j + 1 : j)), 1);
        wgmma_commit();
        wgmma_wait<0>();
        accumulate = 1;
      }
      if (lane == 0) barrier_arrive(empty + 8 * ring.stage);
    }

    // A wgmma with its A operand in registers holds the warp until the one before is done, so each step of 32 channels
    // is decoded behind the product of the step before, and the next stage is read behind the last.
    fetch();
    for (int i = 0; i < k_steps; ++i) {
      const uint32_t stage = base + ring.stage * STAGE_BYTES;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t* const r = regs + 4 * j;
        uint32_t c0 = j == 0 ? codes0.x : j == 1 ? codes0.y : j == 2 ? codes0.z : codes0.w;
        uint32_t c1 = j == 0 ? codes1.x : j == 1 ? codes1.y : j == 2 ? codes1.z : codes1.w;
        if (j > 0) {
          const uint32_t all = barrier_passed(full + 8 * ring.stage, ring.phase);
          c0 &= all, c1 &= all;
        }
        decode(c0, table0, r[0], r[2]), decode(c1, table1, r[1], r[3]);
        wgmma_fence();
        wgmma_fp8(d, r, descriptor(stage + 32 * j), accumulate);
        wgmma_commit();
        accumulate = 1;
        if (j == 0) {
          wgmma_wait<1>();
          if (pending && lane == 0) barrier_arrive(pending);
          pending = empty + 8 * ring.stage;
        }
      }
      ring.next();
      if (i + 1 < k_steps) fetch();
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(pending);

    const int c0 = n0 + half * 64 + warp4 * 16 + row, c1 = c0 + 8;
    const float ws0 = c0 < a.n ? a.w_scale[c0] : 0.f, ws1 = c1 < a.n ? a.w_scale[c1] : 0.f;
    const float b0 = c0 < a.n ? a.bias[c0] : 0.f, b1 = c1 < a.n ? a.bias[c1] : 0.f;
    // What the second half of the epilogue reads: eight lanes hold 64 channels of a row, with NORM_ROPE 16 a head.
    const bool one_image = a.length >= a.m;
    const int lane_of_row = EPILOGUE == NORM_ROPE ? t % 16 : t % 8, row_of_turn = EPILOGUE == NORM_ROPE ? t / 16 : t % 128 / 8;
    const int channel = n0 + (EPILOGUE == NORM_ROPE ? 0 : half * 64) + lane_of_row * 8;
    const int head = n0 / CHANNELS, which = EPILOGUE == NORM_ROPE ? head / a.heads : 0;  // of q, k, v
    const bool rotated = EPILOGUE == NORM_ROPE && which < 2;
    float per_channel[8];  // NORM_ROPE: norm weight, GELU: 1 / smooth of the next linear
    uint4 gate = make_uint4(0, 0, 0, 0);
    if (rotated) {
      unpack(*(const uint4*)((which == 0 ? a.norm_q : a.norm_k) + lane_of_row * 8), per_channel);
    } else if (EPILOGUE == GELU) {
#pragma unroll
      for (int e = 0; e < 8; ++e) per_channel[e] = channel < a.n ? a.next_inverse[channel + e] : 0.f;
    } else if (EPILOGUE == GATE_RESIDUAL && one_image && channel < a.n) {
      gate = *(const uint4*)(a.gate + channel);
    }
    uint16_t* to = a.out + channel;
    if (EPILOGUE == NORM_ROPE)
      to = (which == 0 ? a.out : which == 1 ? a.out_k : a.out_v) + head % a.heads * a.head_stride + lane_of_row * 8;

    sync_threads(1 + half, 128);  // the scales
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int tokens = part ? TOKENS - PART : PART;
      constexpr int TURNS = (PART + 15) / 16;
      // Read before the first half, behind which their latency hides.
      uint4 extra[TURNS];
#pragma unroll
      for (int b = 0; b < TURNS; ++b) {
        const int token = row_of_turn + 16 * b, m = m0 + part * PART + token;
        if (token >= tokens || m >= a.m) continue;
        if (rotated) extra[b] = *(const uint4*)(a.rotary + (size_t)(one_image ? m : m % a.length) * 64 + lane_of_row * 4);
        if (EPILOGUE == GATE_RESIDUAL && channel < a.n) extra[b] = *(const uint4*)(a.residual + (size_t)m * a.n + channel);
      }
#pragma unroll
      for (int j = 0; j < tokens / 8; j += 2) {
        const int blocks = tokens / 8;
        uint32_t v[4];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int jj = part * (PART / 8) + j + q;
          if (j + q >= blocks) {
            v[2 * q] = v[2 * q + 1] = 0;
            continue;
          }
          float s0, s1;
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(s0), "=f"(s1) : "r"(my_scales + (8 * jj + 2 * quad) * 4));
          float y00 = fmaf(d[4 * jj] * s0, ws0, b0), y01 = fmaf(d[4 * jj + 1] * s1, ws0, b0);
          float y10 = fmaf(d[4 * jj + 2] * s0, ws1, b1), y11 = fmaf(d[4 * jj + 3] * s1, ws1, b1);
          if (EPILOGUE == GELU) y00 = gelu(y00), y01 = gelu(y01), y10 = gelu(y10), y11 = gelu(y11);
          v[2 * q] = pack(y00, y01), v[2 * q + 1] = pack(y10, y11);
        }
        const int matrix = lane / 8, token = 8 * (j + matrix / 2) + lane % 8, chunk = warp4 * 2 + matrix % 2;
        const uint32_t to = my_staged + token * 128 + ((chunk ^ (token & 7)) * 16);
        if (j + 1 < blocks)
          asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]),
                       "r"(v[2]), "r"(v[3])
                       : "memory");
        else
          asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(v[0]), "r"(v[1]) : "memory");
      }
      if (EPILOGUE == NORM_ROPE)
        sync_threads(3, 256);
      else
        sync_threads(1 + half, 128);
      const uint32_t from = EPILOGUE == NORM_ROPE ? staged + lane_of_row / 8 * PART * 128 : my_staged;
#pragma unroll
      for (int b = 0; b < TURNS; ++b) {
        const int token = row_of_turn + 16 * b, m = m0 + part * PART + token;
        if (token >= tokens || m >= a.m || channel >= a.n) continue;  // alike in the lanes of a row
        uint4 v = load4(from + token * 128 + (((lane_of_row % 8) ^ (token & 7)) * 16));
        if (EPILOGUE == NORM_ROPE) {
          const int batch = one_image ? 0 : m / a.length, position = m - batch * a.length;
          if (rotated) {
            const uint32_t angles[4] = {extra[b].x, extra[b].y, extra[b].z, extra[b].w};
            float y[8], sum = 0.f;
            uint32_t u[4];
            unpack(v, y);
#pragma unroll
            for (int e = 0; e < 8; ++e) sum = fmaf(y[e], y[e], sum);
#pragma unroll
            for (int e = 1; e < 16; e *= 2) sum += __shfl_xor_sync(0xffffu << (lane & 16), sum, e);
            const float r = rsqrtf(fmaf(sum, 1.f / 128.f, 1e-6f));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float2 cs = half_pair(angles[e]);
              const float p = y[2 * e] * r * per_channel[2 * e], q = y[2 * e + 1] * r * per_channel[2 * e + 1];
              u[e] = pack(p * cs.x - q * cs.y, q * cs.x + p * cs.y);
            }
            v = make_uint4(u[0], u[1], u[2], u[3]);
          }
          *(uint4*)(to + batch * a.batch_stride + position * a.token_stride) = v;
          continue;
        }
        if (EPILOGUE == GELU) {
          float y[8], largest = 0.f;
          unpack(v, y);
#pragma unroll
          for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(y[e] * per_channel[e]));
#pragma unroll
          for (int e = 1; e < 8; e *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffu << (lane & 24), largest, e));
          if (lane_of_row == 0) atomicMax(a.absmax + m, __float_as_uint(largest));
        }
        if (EPILOGUE == GATE_RESIDUAL) {
          if (!one_image) gate = *(const uint4*)(a.gate + (size_t)(m / a.length) * a.gate_stride + channel);
          float y[8], s[8], g[8];
          uint32_t u[4];
          unpack(v, y), unpack(extra[b], s), unpack(gate, g);
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            s[e] = fmaf(y[e], g[e], s[e]);
#if OUT_FP16
            s[e] = fminf(fmaxf(s[e], -65504.f), 65504.f);
#endif
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) u[e] = pack(s[2 * e], s[2 * e + 1]);
          v = make_uint4(u[0], u[1], u[2], u[3]);
        }
        *(uint4*)(to + (size_t)m * a.n) = v;
      }
      if (EPILOGUE == NORM_ROPE)
        sync_threads(3, 256);
      else
        sync_threads(1 + half, 128);
    }
  }
}
