// The input of an SVDQuant linear on Hopper, in one kernel: LayerNorm and modulation (NORM), smoothing, e4m3 rows,
// low-rank down-projection. Written for NVRTC: no headers but ours. NORM, KNOWN, GROUPS, RANK_BLOCKS and FP16 are
// defined by the caller.
//
// codes = e4m3(y / smooth / x_scale), x_scale = absmax(y / smooth) / 448, lora = (y down) / x_scale, with y = x or
// y = LayerNorm(x) * scale + shift rounded to 16 bits. KNOWN: the absmax was gathered by the kernel that wrote x; then
// the channels are split over blocks too, and the last block of a row adds up the partial sums of lora in order.
//
// A block has 8 warps and GROUPS x 16 rows; a warp takes whole tiles of 128 channels of 16 rows. A thread's 16-byte
// pieces are at once the A fragments of mma (its order of channels is free, as long as `down` has the same) and the
// bytes of two 16-byte stores. Each thread copies its own pieces to shared memory and alone reads them: all tiles at
// once where the rows are needed several times, otherwise STAGES tiles ahead.

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
#include "numbers.cuh"

constexpr int SLICES = 8 / GROUPS;  // warps that share 16 rows
constexpr int ROWS = 16 * GROUPS;
constexpr int RANKS = RANK_BLOCKS * 8;
#if KNOWN
constexpr int STAGES = 3;
#endif

struct Quantize {
  const uint16_t* x;
  const uint16_t* scale;     // (B, modulation_stride), holds the 1 of "1 + scale"
  const uint16_t* shift;
  const float* inverse;      // (K) 1 / smooth
  const uint16_t* down;      // (rank, K)
  const uint32_t* absmax;    // (M) float bits
  uint8_t* codes;            // (K/128, m_pad, 128)
  float* x_scale;            // (M)
  uint16_t* lora;            // (R/64, m_pad, 64) bf16
  float* partial;            // (splits, m_pad, rank)
  uint32_t* arrived;         // (row blocks), zero; left at zero
  long long batch_stride, row_stride;
  int m, m_pad, k, rank, length, modulation_stride;
};

__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if FP16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 v;
  // no memory clobber: loads of weights may move across
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

extern "C" __global__ void __launch_bounds__(256, RANK_BLOCKS <= 8 ? 2 : 1) quantize(const __grid_constant__ Quantize a) {
  extern __shared__ __align__(128) uint8_t pieces[];
  auto sums = (float (*)[ROWS][RANKS + 1])pieces;  // when the rows are done with
  __shared__ float exchange[2][8][16];
  __shared__ float scales[ROWS];
  __shared__ uint32_t last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int group = warp / SLICES, slice = warp % SLICES;
  const int m0 = blockIdx.x * ROWS + group * 16;
  const int tiles = (a.k + 127) / 128, share = (tiles + gridDim.y - 1) / gridDim.y;
  const int begin = blockIdx.y * share, end = min(tiles, begin + share);
  const int mine = max(0, (end - begin - slice + SLICES - 1) / SLICES);  // tiles begin + slice + i * SLICES

  const uint16_t* source[2];
  long long modulation[2];
  bool inside[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int m = m0 + row + 8 * h;
    inside[h] = m < a.m;
    const int batch = inside[h] ? m / a.length : 0, position = inside[h] ? m % a.length : 0;
    source[h] = a.x + batch * a.batch_stride + position * a.row_stride;
    modulation[h] = (long long)batch * a.modulation_stride;
  }
  const uint32_t base = (uint32_t)__cvta_generic_to_shared(pieces) + threadIdx.x * 16;
  auto column_of = [&](int i, int b) { return (begin + slice + i * SLICES) * 128 + 32 * b + 8 * quad; };
  auto piece = [&](int i, int h, int b) -> uint32_t { return base + ((i * 2 + h) * 4 + b) * 4096; };
  auto fetch = [&](int i, int place) {
#pragma unroll
    for (int b = 0; b < 4; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = column_of(i, b);
        copy_async(piece(place, h, b), source[h] + column, inside[h] && column < a.k);
      }
  };
  // Over the threads that share a row; every thread gets the result.
  auto combine = [](bool maximum, float p, float q) { return maximum ? fmaxf(p, q) : p + q; };
  auto reduce = [&](int turn, float (&v)[2], bool maximum) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      v[h] = combine(maximum, v[h], __shfl_xor_sync(0xffffffffu, v[h], 1));
      v[h] = combine(maximum, v[h], __shfl_xor_sync(0xffffffffu, v[h], 2));
      if (quad == 0) exchange[turn][warp][row + 8 * h] = v[h];
    }
  };
  auto reduced = [&](int turn, float (&v)[2], bool maximum) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      v[h] = exchange[turn][group * SLICES][row + 8 * h];
#pragma unroll
      for (int s = 1; s < SLICES; ++s) v[h] = combine(maximum, v[h], exchange[turn][group * SLICES + s][row + 8 * h]);
    }
  };

  float absmax[2] = {0.f, 0.f};
#if KNOWN
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < mine) fetch(i, i);
    commit();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) absmax[h] = inside[h] ? __uint_as_float(a.absmax[m0 + row + 8 * h]) : 0.f;
#else
  for (int i = 0; i < mine; ++i) fetch(i, i);
  commit();
#if NORM
  float pivot[2], sum[2] = {0.f, 0.f}, square[2] = {0.f, 0.f};
#pragma unroll
  for (int h = 0; h < 2; ++h) pivot[h] = inside[h] ? to_float(source[h][0]) : 0.f;
  wait<0>();
  for (int i = 0; i < mine; ++i)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if (column_of(i, b) >= a.k) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float f[8];
        unpack(load_shared(piece(i, h, b)), f);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          f[e] -= pivot[h];
          square[h] = fmaf(f[e], f[e], square[h]);
        }
        sum[h] += ((f[0] + f[1]) + (f[2] + f[3])) + ((f[4] + f[5]) + (f[6] + f[7]));
      }
    }
  reduce(0, sum, false);
  reduce(1, square, false);
  __syncthreads();
  reduced(0, sum, false);
  reduced(1, square, false);
  __syncthreads();
  float rstd[2], offset[2];  // (x - mean) * rstd = x * rstd + offset
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float mean = sum[h] / (float)a.k;
    rstd[h] = rsqrtf(fmaxf(square[h] / (float)a.k - mean * mean, 0.f) + 1e-6f);
    offset[h] = -(mean + pivot[h]) * rstd[h];
  }
#else
  wait<0>();
#endif
  for (int i = 0; i < mine; ++i)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int column = column_of(i, b);
      if (column >= a.k) continue;
      float inverse[8];
      *(float4*)inverse = __ldg((const float4*)(a.inverse + column));
      *(float4*)(inverse + 4) = __ldg((const float4*)(a.inverse + column + 4));
#if NORM
      float s[8], t[8];
#endif
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float f[8];
        unpack(load_shared(piece(i, h, b)), f);
#if NORM
        if (h == 0 || modulation[1] != modulation[0]) {
          unpack(__ldg((const uint4*)(a.scale + modulation[h] + column)), s);
          unpack(__ldg((const uint4*)(a.shift + modulation[h] + column)), t);
        }
        uint32_t y[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          y[e] = pack(fmaf(fmaf(f[2 * e], rstd[h], offset[h]), s[2 * e], t[2 * e]),
                      fmaf(fmaf(f[2 * e + 1], rstd[h], offset[h]), s[2 * e + 1], t[2 * e + 1]));
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(piece(i, h, b)), "r"(y[0]), "r"(y[1]), "r"(y[2]), "r"(y[3])
                     : "memory");
        unpack(make_uint4(y[0], y[1], y[2], y[3]), f);
#endif
#pragma unroll
        for (int e = 0; e < 8; ++e) absmax[h] = fmaxf(absmax[h], fabsf(f[e] * inverse[e]));
      }
    }
  reduce(0, absmax, true);
  __syncthreads();
  reduced(0, absmax, true);
#endif
  float reciprocal[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float s = absmax[h] * (1.f / 448.f);
    reciprocal[h] = inside[h] && s > 0.f ? 1.f / s : 0.f;
    if (slice == 0 && quad == 0) {
      scales[group * 16 + row + 8 * h] = reciprocal[h];
      if (blockIdx.y == 0 && inside[h]) a.x_scale[m0 + row + 8 * h] = s;
    }
  }

  float d[RANK_BLOCKS][4] = {};
  // The down-projection of a piece is read while the piece before is computed, if registers allow.
  constexpr bool AHEAD = RANK_BLOCKS <= 4;
  uint4 down[RANK_BLOCKS], next_down[RANK_BLOCKS];
  auto read = [&](int i, int b) {
    const int column = column_of(i, b);
    const bool valid = i < mine && column < a.k;
#pragma unroll
    for (int n = 0; n < RANK_BLOCKS; ++n)
      next_down[n] = valid && n * 8 < a.rank ? __ldg((const uint4*)(a.down + (size_t)(n * 8 + row) * a.k + column)) : make_uint4(0, 0, 0, 0);
  };
  if (AHEAD) read(0, 0);
  for (int i = 0; i < mine; ++i) {
#if KNOWN
    const int place = i % STAGES;
    wait<STAGES - 2>();
    if (i + STAGES - 1 < mine) fetch(i + STAGES - 1, (i + STAGES - 1) % STAGES);
    commit();
#else
    const int place = i;
#endif
    const int tile = begin + slice + i * SLICES;
    uint32_t bytes[2][8];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int column = column_of(i, b);
      float factor[8] = {};
      if (column < a.k) {
        *(float4*)factor = __ldg((const float4*)(a.inverse + column));
        *(float4*)(factor + 4) = __ldg((const float4*)(a.inverse + column + 4));
      }
      if (!AHEAD) read(i, b);
#pragma unroll
      for (int n = 0; n < RANK_BLOCKS; ++n) down[n] = next_down[n];
      if (AHEAD) read(b == 3 ? i + 1 : i, (b + 1) % 4);
      uint4 y[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        y[h] = load_shared(piece(place, h, b));  // zeros beyond the last channel
        float v[8];
        unpack(y[h], v);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = v[e] * factor[e] * reciprocal[h];
        bytes[h][b] = to_e4m3(v[0], v[1], v[2], v[3]);
        bytes[h][4 + b] = to_e4m3(v[4], v[5], v[6], v[7]);
      }
#pragma unroll
      for (int n = 0; n < RANK_BLOCKS; ++n) {
        mma(d[n], y[0].x, y[1].x, y[0].y, y[1].y, down[n].x, down[n].y);
        mma(d[n], y[0].z, y[1].z, y[0].w, y[1].w, down[n].z, down[n].w);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = m0 + row + 8 * h;
      if (m >= a.m_pad) continue;
      uint8_t* to = a.codes + ((size_t)tile * a.m_pad + m) * 128;
      *(uint4*)(to + ((2 * quad) ^ (m & 7)) * 16) = make_uint4(bytes[h][0], bytes[h][1], bytes[h][2], bytes[h][3]);
      *(uint4*)(to + ((2 * quad + 1) ^ (m & 7)) * 16) = make_uint4(bytes[h][4], bytes[h][5], bytes[h][6], bytes[h][7]);
    }
  }
  if (a.rank == 0) return;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < RANK_BLOCKS; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[slice][group * 16 + row + 8 * (e / 2)][n * 8 + 2 * quad + e % 2] = d[n][e];
  __syncthreads();
  const int first = blockIdx.x * ROWS;
  auto store = [&](int r, int c, float v) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(v * scales[r]));
    const int m = first + r, byte = (c % 64) * 2;
    *(uint16_t*)((uint8_t*)a.lora + ((size_t)(c / 64) * a.m_pad + m) * 128 + (((byte / 16) ^ (m & 7)) * 16) + byte % 16) = (uint16_t)pair;
  };
  for (int i = threadIdx.x; i < ROWS * a.rank; i += 256) {
    const int r = i / a.rank, c = i % a.rank;
    float v = 0.f;
#pragma unroll
    for (int s = 0; s < SLICES; ++s) v += sums[s][r][c];
    if (first + r >= a.m_pad) continue;
    if (gridDim.y == 1) store(r, c, v);
    else __stcg(a.partial + ((size_t)blockIdx.y * a.m_pad + first + r) * a.rank + c, v);
  }
  if (gridDim.y == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(a.arrived + blockIdx.x, 1u) == gridDim.y - 1;
    if (last) a.arrived[blockIdx.x] = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = threadIdx.x; i < ROWS * a.rank; i += 256) {
    const int r = i / a.rank, c = i % a.rank;
    if (first + r >= a.m_pad) continue;
    float v = 0.f;
    for (int s = 0; s < gridDim.y; ++s) v += __ldcg(a.partial + ((size_t)s * a.m_pad + first + r) * a.rank + c);
    store(r, c, v);
  }
}
