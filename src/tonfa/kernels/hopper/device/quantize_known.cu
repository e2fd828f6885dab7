// The input of an SVDQuant linear on Hopper whose rows' largest magnitudes are known, gathered by the kernel that wrote
// x: smoothing, e4m3 rows, low-rank down-projection. Written for NVRTC. RANK_BLOCKS, FP16 are defined by the caller.
//
// codes = e4m3(x / smooth / x_scale), x_scale = absmax / 448, lora = (x down) / x_scale. The channels are split over
// blocks too, and the last block of some rows adds up the partial sums of lora in order.
//
// A block has 8 warps and 64 rows; a warp takes whole tiles of 128 channels of 16 rows. A thread's 16-byte pieces are
// at once the A fragments of mma (its order of channels is free, as long as `down` has the same) and the bytes of two
// 16-byte stores. Each thread copies its own pieces to shared memory, STAGES tiles ahead, and alone reads them.
#include "quantize.cuh"

constexpr int GROUPS = 4, SLICES = 2;  // of 16 rows; warps that share them
constexpr int ROWS = 16 * GROUPS, THREADS = 32 * GROUPS * SLICES;
constexpr int RANKS = RANK_BLOCKS * 8;
constexpr int STAGES = 3;

struct QuantizeKnown {
  const uint16_t* x;
  const float* inverse;      // (K) 1 / smooth
  const uint16_t* down;      // (rank, K)
  const uint32_t* absmax;    // (M) float bits
  uint8_t* codes;            // (K/128, m_pad, 128)
  float* x_scale;            // (M)
  uint16_t* lora;            // (R/64, m_pad, 64) bf16
  float* partial;            // (splits, m_pad, rank)
  uint32_t* arrived;         // (row blocks), zero; left at zero
  long long batch_stride, row_stride;
  int m, m_pad, k, rank, length;
};

extern "C" __global__ void __launch_bounds__(THREADS, RANK_BLOCKS <= 8 ? 2 : 1) quantize_known(const __grid_constant__ QuantizeKnown a) {
  earlier_kernels_done();
  next_kernel_may_start();
  extern __shared__ __align__(128) uint8_t memory[];
  auto sums = (float (*)[ROWS][RANKS + 1])memory;  // when the rows are done with
  __shared__ float reciprocals[ROWS];
  __shared__ uint32_t last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int group = warp / SLICES, slice = warp % SLICES;
  const int m0 = blockIdx.x * ROWS + group * 16;
  const int tiles = (a.k + 127) / 128, share = (tiles + gridDim.y - 1) / gridDim.y;
  const int begin = blockIdx.y * share, end = min(tiles, begin + share);
  const int mine = max(0, (end - begin - slice + SLICES - 1) / SLICES);  // tiles begin + slice + i * SLICES

  const uint16_t* source[2];
  bool inside[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int m = m0 + row + 8 * h;
    inside[h] = m < a.m;
    const int batch = inside[h] ? m / a.length : 0, position = inside[h] ? m % a.length : 0;
    source[h] = a.x + batch * a.batch_stride + position * a.row_stride;
  }
  auto column_of = [&](int i, int b) { return (begin + slice + i * SLICES) * 128 + 32 * b + 8 * quad; };
  auto piece = [&](int place, int h, int b) -> uint8_t* { return memory + threadIdx.x * 16 + ((place * 2 + h) * 4 + b) * (THREADS * 16); };
  auto fetch = [&](int i, int place) {
#pragma unroll
    for (int b = 0; b < 4; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = column_of(i, b);
        copy_async(shared_address(piece(place, h, b)), source[h] + column, inside[h] && column < a.k);
      }
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < mine) fetch(i, i);
    commit();
  }

  float reciprocal[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int m = m0 + row + 8 * h;
    const float s = (inside[h] ? __uint_as_float(a.absmax[m]) : 0.f) * (1.f / 448.f);
    reciprocal[h] = s > 0.f ? 1.f / s : 0.f;
    if (slice == 0 && quad == 0) {
      reciprocals[group * 16 + row + 8 * h] = reciprocal[h];
      if (blockIdx.y == 0 && m < a.m_pad) a.x_scale[m] = s;
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
    const int place_read = i % STAGES;
    wait<STAGES - 2>();
    if (i + STAGES - 1 < mine) fetch(i + STAGES - 1, (i + STAGES - 1) % STAGES);
    commit();
    const int tile = begin + slice + i * SLICES;
    uint32_t codes[2][8];
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
        y[h] = *(const uint4*)piece(place_read, h, b);  // zeros beyond the last channel
        encode(y[h], factor, reciprocal[h], codes[h][b], codes[h][4 + b]);
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
      *(uint4*)(to + place(quad, 0, m)) = make_uint4(codes[h][0], codes[h][1], codes[h][2], codes[h][3]);
      *(uint4*)(to + place(quad, 1, m)) = make_uint4(codes[h][4], codes[h][5], codes[h][6], codes[h][7]);
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
  for (int i = threadIdx.x; i < ROWS * a.rank; i += THREADS) {
    const int r = i / a.rank, c = i % a.rank;
    float v = 0.f;
#pragma unroll
    for (int s = 0; s < SLICES; ++s) v += sums[s][r][c];
    if (first + r >= a.m_pad) continue;
    if (gridDim.y == 1) store_lora(a.lora, a.m_pad, first + r, c, v * reciprocals[r]);
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
  for (int i = threadIdx.x; i < ROWS * a.rank; i += THREADS) {
    const int r = i / a.rank, c = i % a.rank;
    if (first + r >= a.m_pad) continue;
    float v = 0.f;
    for (int s = 0; s < gridDim.y; ++s) v += __ldcg(a.partial + ((size_t)s * a.m_pad + first + r) * a.rank + c);
    store_lora(a.lora, a.m_pad, first + r, c, v * reciprocals[r]);
  }
}
