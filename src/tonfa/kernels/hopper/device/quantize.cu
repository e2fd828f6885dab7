// The input of an SVDQuant linear on Hopper, in one kernel: LayerNorm and modulation (NORM), smoothing, e4m3 rows, a
// bound of their norms, low-rank down-projection. Written for NVRTC. NORM, FROM_FP8, CHANNELS (K), ROW_BLOCKS (of 8
// rows), FP16 are defined by the caller.
//
// codes = e4m3(y / smooth / x_scale), x_scale = absmax(y / smooth) / 448, lora = (y down) / x_scale, with y = x or
// y = LayerNorm(x) * scale + shift rounded to 16 bits. FROM_FP8: x is e4m3 in units of *unit, a power of two, and
// y = x + shift / *unit rounded to 16 bits, in these units: only x_scale and norms need to know them, since all else is
// relative to the row's scale.
//
// A block has a.rows rows, all in shared memory, so that all blocks run at once; each row is one copy of the copy
// engine, in the order of use. First, a warp takes every 12th row, alone and as it arrives: its mean and variance, then
// y in the place of x, its maximum and its norm, at times for two rows, whose weights are read and unpacked once. Then
// warps take tiles of 128 channels of all rows: 16 bytes of a row are at once the B fragments of mma (its order of
// channels is free, as `down` has the same) and 8 codes; `down` is read once a block.
#include "quantize.cuh"

constexpr int WARPS = 12, THREADS = 32 * WARPS;
constexpr int ROWS = 8 * ROW_BLOCKS;
constexpr int STEPS = (CHANNELS + 255) / 256;  // of a row, 8 channels of each lane
constexpr int TILES = (CHANNELS + 127) / 128;
constexpr int STRIDE = 2 * CHANNELS + 64;  // of rows in shared memory: two rows' 64 bytes meet all banks
constexpr int TURN = 3;  // rows that a warp takes at once, at most: more share weights, fewer wait for the last to arrive
constexpr int RANKS = 32;  // of a warp
constexpr uint32_t ONES = FP16 ? 0x3C003C00u : 0x3F803F80u;

constexpr bool SHIFT = NORM || FROM_FP8;

#if FROM_FP8
using Eight = uint2;  // channels of x
constexpr int X_PLACE = CHANNELS;  // of a row's bytes in its place: y, from the front on, follows behind what is read
#else
using Eight = uint4;
constexpr int X_PLACE = 0;
#endif
constexpr int X_BYTES = sizeof(Eight) / 8;  // of a channel

struct Quantize {
  const uint8_t* x;          // 16-bit numbers, FROM_FP8: e4m3
  const float* unit;         // FROM_FP8
  const uint16_t* scale;     // NORM: (B, modulation_stride), holds the 1 of "1 + scale"
  const uint16_t* shift;     // NORM: likewise; FROM_FP8: (K)
  const float* inverse;      // (K) 1 / smooth
  const uint4* down;         // (K/128, R/16, 8, 32) A fragments of 16 ranks and 16 channels, zeros beyond K
  uint8_t* codes;            // (K/128, m_pad, 128)
  float* x_scale;            // (m_pad), zeros beyond M
  float* norms;              // (M) at least the l2 norm of the dequantized codes
  uint16_t* lora;            // (R/64, m_pad, 64) bf16
  long long batch_stride, row_stride;
  int m, m_pad, rank, length, modulation_stride, rows, rank_parts;
};

// e4m3 rounds by 1/17 of a normal value at most, by 2^-10 of a subnormal one; 1/16 leaves room for float32's rounding.
__device__ __forceinline__ float norm_bound(float squares, float absmax, float x_scale) {
  const float root = sqrtf((float)CHANNELS);
  const bool exact = squares >= 0x1p-100f && squares < __uint_as_float(0x7f800000u);  // no square of weight was lost
  return fmaf(exact ? sqrtf(squares) : root * absmax, 1.0625f, root * x_scale * 0x1p-10f);
}

// Whether these 32 channels of a tile do not exist.
__device__ __forceinline__ bool beyond(int tile, int b) { return CHANNELS % 128 && b >= 2 && tile == TILES - 1; }

// One copy of whole 16-byte pieces, all that the barrier waits for.
__device__ __forceinline__ void load_expected(uint32_t to, const void* from, int bytes, uint32_t bar) {
  barrier_expect(bar, bytes);
  load_bulk(to, from, bytes, bar);
}

__device__ __forceinline__ void unpack(uint2 v, float (&f)[8]) {
  const uint32_t u[2] = {v.x, v.y};
#pragma unroll
  for (int e = 0; e < 4; ++e) *(float2*)(f + 2 * e) = from_e4m3((uint16_t)(u[e / 2] >> 16 * (e % 2)));
}

// Where 8 channels' inverses lie in shared memory, the first 4; the others lie 32 further. In each 64 channels all first
// halves come first, so that 8 lanes meet all banks.
__device__ __forceinline__ int place_of_inverse(int piece) { return piece / 8 * 64 + piece % 8 * 4; }

__device__ __forceinline__ void read_inverse(const float* from, float (&inverse)[8]) {
  *(float4*)inverse = *(const float4*)from;
  *(float4*)(inverse + 4) = *(const float4*)(from + 32);
}

// Whether these 8 channels of a lane exist.
__device__ __forceinline__ bool exists(int step) {
  return CHANNELS % 256 == 0 || step < STEPS - 1 || step * 256 + threadIdx.x % 32 * 8 < CHANNELS;
}

struct Normalization {  // (x - mean) * rstd = x * rstd + offset
  float rstd, offset;
};

// Of the row at `row`, in every lane. Squares are taken of the distance to the row's first value. Sums come from mma with
// ones, which also adds up four lanes; values that do not exist are that first value.
__device__ __forceinline__ Normalization normalization(const uint8_t* row) {
  constexpr int BATCH = STEPS < 4 ? STEPS : 4;
  const uint32_t first_value = *(const uint16_t*)row, fill = first_value | first_value << 16;
  const float pivot = to_float((uint16_t)first_value);
  float sums[BATCH][4] = {}, squares[2] = {};
#pragma unroll 1
  for (int first = 0; first < STEPS; first += BATCH) {
    uint4 v[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      v[i] = make_uint4(fill, fill, fill, fill);
      if ((STEPS % BATCH == 0 || first + i < STEPS) && exists(first + i)) v[i] = *(const uint4*)(row + (first + i) * 512 + threadIdx.x % 32 * 16);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      mma(sums[i], v[i].x, v[i].y, v[i].z, v[i].w, ONES, ONES);
      float f[8];
      unpack(v[i], f);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        f[e] -= pivot;
        squares[e % 2] = fmaf(f[e], f[e], squares[e % 2]);
      }
    }
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < BATCH; ++i) sum += sums[i][0] + sums[i][2];  // both halves of its rows are this row
  constexpr int TAKEN = (STEPS + BATCH - 1) / BATCH * BATCH * 256;
#pragma unroll
  for (int step = 4; step <= 16; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const float mean = fmaf(-(float)TAKEN, pivot, sum) * (1.f / CHANNELS);  // from the pivot on
  const float variance = fmaf(-mean, mean, warp_sum(squares[0] + squares[1]) * (1.f / CHANNELS));
  const float rstd = rsqrtf(fmaxf(variance, 0.f) + 1e-6f);
  return {rstd, -(mean + pivot) * rstd};
}

// 8 channels of N rows, and their weights.
template <int N>
struct Piece {
  Eight x[N];
  float inverse[8];
#if NORM
  uint4 scale;
#endif
  uint4 shift;
};

struct Found {  // of a row, in the lane with the row's number among those of the warp
  float largest, squares;
};

// Row `first` of the block and those that come 12 behind one another: y, 16 bits a channel, and what is found. A step is
// read before the one ahead of it is computed. The rows' normalizations are the last ones of `norms`; `per_unit` is 1 / unit.
template <int N>
__device__ __forceinline__ void take(const Quantize& a, uint8_t* rows, const float* inverses, int first, int batch, float per_unit, const Normalization (&norms)[TURN], Found& found) {
  const int lane = threadIdx.x % 32;
  const uint8_t* from = rows + first * STRIDE + X_PLACE + lane * (8 * X_BYTES);
  uint8_t* to = rows + first * STRIDE + lane * 16;
  const float* inverse = inverses + place_of_inverse(lane);
  const size_t modulation = (size_t)batch * a.modulation_stride + lane * 8;
  const uint16_t *scale = a.scale + modulation, *shift = a.shift + modulation;
  auto read = [&](int step) {
    Piece<N> piece;
    if (CHANNELS % 256) piece = {};
    if (exists(step)) {
#pragma unroll
      for (int r = 0; r < N; ++r)
        piece.x[r] = *(const Eight*)(from + r * (WARPS * STRIDE) + step * (256 * X_BYTES));
      read_inverse(inverse + step * 256, piece.inverse);
#if NORM
      piece.scale = __ldg((const uint4*)(scale + step * 256));
#endif
      if (SHIFT) piece.shift = __ldg((const uint4*)(shift + step * 256));
    }
    return piece;
  };

  float absmax[N] = {}, energy[N] = {};
  Piece<N> next = read(0);
#pragma unroll 2
  for (int step = 0; step < STEPS; ++step) {
    const Piece<N> now = next;
    next = read(min(step + 1, STEPS - 1));  // the last one in vain: a branch would cost copies of registers
    float s[8], h[8];
#if NORM
    unpack(now.scale, s);
#endif
    if (SHIFT) unpack(now.shift, h);
    if (FROM_FP8) __syncwarp();  // y may be written where another lane read
#pragma unroll
    for (int r = 0; r < N; ++r) {
      float f[8];
      unpack(now.x[r], f);
#if NORM
#pragma unroll
      for (int e = 0; e < 8; ++e) f[e] = fmaf(fmaf(f[e], norms[TURN - N + r].rstd, norms[TURN - N + r].offset), s[e], h[e]);
#elif FROM_FP8
#pragma unroll
      for (int e = 0; e < 8; ++e) f[e] = fmaf(h[e], per_unit, f[e]);
#endif
      if (SHIFT) {
        const uint4 y = packed(f);
        if (exists(step)) *(uint4*)(to + r * (WARPS * STRIDE) + step * 512) = y;
        unpack(y, f);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float u = f[e] * now.inverse[e];
        absmax[r] = fmaxf(absmax[r], fabsf(u));
        energy[r] = fmaf(u, u, energy[r]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < N; ++r) {
    const float largest = __uint_as_float(warp_max(__float_as_uint(absmax[r]))), squares = warp_sum(energy[r]);
    if (lane == first / WARPS + r) found = {largest, squares};
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) quantize(const __grid_constant__ Quantize a) {
  earlier_kernels_done();
  next_kernel_may_start();
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ __align__(8) unsigned long long arrivals[ROWS];
  __shared__ float reciprocals[ROWS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.x * a.rows, count = min(a.rows, a.m - m0);
  float* inverses = (float*)memory;
  uint8_t* rows = memory + CHANNELS * 4;
  const uint32_t arrived = shared_address(arrivals);

  int batch = (m0 + warp) / a.length, token = m0 + warp - batch * a.length;  // of the warp's first row
  auto go_on = [&](int& batch, int& token) {
    for (token += WARPS; token >= a.length; token -= a.length) ++batch;
  };
  if (lane == 0) {
    for (int i = warp; i < count; i += WARPS) barrier_init(arrived + 8 * i, 1);
    barriers_ready();
    for (int i = warp, b = batch, t = token; i < count; i += WARPS, go_on(b, t)) {
      const uint8_t* from = a.x + (b * a.batch_stride + t * a.row_stride) * X_BYTES;
      load_expected(shared_address(rows + i * STRIDE + X_PLACE), from, CHANNELS * X_BYTES, arrived + 8 * i);
    }
  }
  for (int piece = threadIdx.x; piece < CHANNELS / 8; piece += THREADS) {
    float* to = inverses + place_of_inverse(piece);
    *(float4*)to = __ldg((const float4*)(a.inverse + piece * 8));
    *(float4*)(to + 32) = __ldg((const float4*)(a.inverse + piece * 8 + 4));
  }
  __syncthreads();  // also the barriers are ready

  const float unit = FROM_FP8 ? __ldg(a.unit) : 1.f, per_unit = 1.f / unit;
  // Turns are whole but for the first: the warp is done with it when the other rows arrive. n: rows of the turn so far.
  Found found;
  Normalization norms[TURN] = {};
  for (int row = warp, n = 1; row < count; row += WARPS, go_on(batch, token), ++n) {
    bool last = (count - 1 - row) / WARPS % TURN == 0;  // of its turn
    barrier_wait(arrived + 8 * row, 0);
#if NORM
#pragma unroll
    for (int i = 0; i < TURN - 1; ++i) norms[i] = norms[i + 1];
    norms[TURN - 1] = normalization(rows + row * STRIDE);
    __syncwarp();  // all have read the first value
    last |= token + WARPS >= a.length;  // the next row's modulation is another
#endif
    if (!last) continue;
    const int first = row - (n - 1) * WARPS;
    if (n == 1) take<1>(a, rows, inverses, first, batch, per_unit, norms, found);
    if (n == 2) take<2>(a, rows, inverses, first, batch, per_unit, norms, found);
    if (n == 3) take<3>(a, rows, inverses, first, batch, per_unit, norms, found);
    n = 0;
  }
  const int own = warp + lane * WARPS;
  if (own < count) {
    const float s = found.largest * (1.f / 448.f);
    reciprocals[own] = s > 0.f ? 1.f / s : 0.f;
    a.x_scale[m0 + own] = s * unit;
    a.norms[m0 + own] = norm_bound(found.squares, found.largest, s) * unit;
  }

  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < a.m_pad - a.m) a.x_scale[a.m + threadIdx.x] = 0.f;

  // The share of a warp: tiles slice, slice + slices, ..., and 32 ranks; the warps that share a tile take turns to encode.
  const int slices = WARPS / a.rank_parts, slice = warp % slices, part = warp / slices;
  const int row8 = lane / 4, quad = lane % 4;  // of a fragment: its row, its 8 of 32 channels
  uint4 down[4][2][2] = {};  // by 32 channels, 16 ranks, half of the channels; zeros where there are no such ranks
  auto read = [&](int tile, int b) {
    const uint4* from = a.down + (tile * (a.rank / 16) + part * 2) * 256 + lane;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (tile < TILES && part * 2 + j < a.rank / 16) down[b][j][half] = __ldg(from + j * 256 + b * 64 + half * 32);
  };
#pragma unroll
  for (int b = 0; b < 4; ++b) read(slice, b);
  __syncthreads();

  // Rows that a block lacks are whatever lies there, and stay in their own columns; its memory ends with row a.rows - 1.
  const uint8_t* y = rows + row8 * STRIDE + quad * 16;
  const uint8_t* last_y = rows + min(ROWS - 8 + row8, a.rows - 1) * STRIDE + quad * 16;
  const float* inverse = inverses + quad * 4;
  float d[ROW_BLOCKS][2][4] = {};
  for (int tile = slice, turn = 0; tile < TILES; tile += slices) {
    const bool encoding = turn == part;
    if (++turn == a.rank_parts) turn = 0;
#pragma unroll
    for (int n = 0; n < ROW_BLOCKS; ++n) {
      const uint8_t* from = n < ROW_BLOCKS - 1 ? y + n * (8 * STRIDE) : last_y;
      uint4 v[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        // Beyond the last channel `down` holds zeros; channels that exist stand in for those that do not.
        v[b] = *(const uint4*)(from + (beyond(tile, b) ? 0 : tile * 256 + 64 * b));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint4 first = down[b][j][0], second = down[b][j][1];
          mma(d[n][j], first.x, first.y, first.z, first.w, v[b].x, v[b].y);
          mma(d[n][j], second.x, second.y, second.z, second.w, v[b].z, v[b].w);
        }
        if (n == ROW_BLOCKS - 1) read(tile + slices, b);
      }
      if (!encoding) continue;
      const int i = 8 * n + row8, m = m0 + i;
      const float reciprocal = reciprocals[i];
      uint32_t codes[8];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        float factor[8] = {};
        if (!beyond(tile, b)) read_inverse(inverse + tile * 128 + place_of_inverse(4 * b), factor);
        encode(v[b], factor, reciprocal, codes[b], codes[4 + b]);
      }
      if (i >= count) continue;
      uint8_t* to = a.codes + ((size_t)tile * a.m_pad + m) * 128;
      *(uint4*)(to + place(quad, 0, m)) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
      *(uint4*)(to + place(quad, 1, m)) = make_uint4(codes[4], codes[5], codes[6], codes[7]);
    }
  }
  if (a.rank == 0) return;

  const int width = a.rank_parts * RANKS + 4;  // the columns of a fragment meet all banks
  float* sums = (float*)memory;  // (slices, ROWS, width)
  __syncthreads();
#pragma unroll
  for (int n = 0; n < ROW_BLOCKS; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[(slice * ROWS + 8 * n + 2 * quad + e % 2) * width + part * RANKS + 16 * j + 8 * (e / 2) + row8] = d[n][j][e];
  __syncthreads();
  for (int i = threadIdx.x; i < count * a.rank; i += THREADS) {
    const int r = i / a.rank, c = i - r * a.rank;
    float v = 0.f;
    for (int s = 0; s < slices; ++s) v += sums[(s * ROWS + r) * width + c];
    store_lora(a.lora, a.m_pad, m0 + r, c, v * reciprocals[r]);
  }
}
