// The input of an SVDQuant linear on Hopper, in one kernel: LayerNorm and modulation (NORM), smoothing, e4m3 rows, a
// bound of their norms, low-rank down-projection. Written for NVRTC. NORM, FROM_FP8, CHANNELS (K), ROW_BLOCKS (of 8
// rows), FP16 are defined by the caller.
//
// codes = e4m3(y / smooth / x_scale), x_scale = absmax(y / smooth) / 448, lora = (y down) / x_scale, with y = x or
// y = LayerNorm(x) * scale + shift rounded to 16 bits. FROM_FP8: x is e4m3 in units of *unit, which only x_scale and
// norms need to know, since all else is relative to the row's scale.
//
// A block has a.rows rows, all in shared memory, so that all blocks run at once; each row is one copy of the copy
// engine, in the order of use. First, teams of 4 warps take TURN rows at a time into registers, find what belongs to
// whole rows and put y in the place of x; a thread has the same channels of every row, so their weights stay in
// registers. Then warps take tiles of 128 channels of all rows: 16 bytes of a row are at once the B fragments of mma
// (its order of channels is free, as `down` has the same) and 8 codes; `down` is read once a block.
#include "quantize.cuh"

constexpr int TEAMS = 3, TEAM = 128, WARPS = 12, THREADS = TEAMS * TEAM;
constexpr int ROWS = 8 * ROW_BLOCKS;
constexpr int PIECES = (CHANNELS + 8 * TEAM - 1) / (8 * TEAM);  // of a row, 8 channels of each thread of a team
constexpr int TILES = (CHANNELS + 127) / 128;
constexpr int STRIDE = 2 * CHANNELS + 64;  // of rows in shared memory: two rows' 64 bytes meet all banks
constexpr int TURN = PIECES <= 5 ? 2 : 1;
constexpr int KEPT = PIECES <= 3 ? PIECES : 1;  // pieces whose weights stay in registers
constexpr int RANKS = 32;  // of a warp
constexpr uint32_t ONES = FP16 ? 0x3C003C00u : 0x3F803F80u;

constexpr int X_BYTES = FROM_FP8 ? 1 : 2;  // of a channel

struct Quantize {
  const uint8_t* x;          // 16-bit numbers, FROM_FP8: e4m3
  const float* unit;         // FROM_FP8
  const uint16_t* scale;     // (B, modulation_stride), holds the 1 of "1 + scale"
  const uint16_t* shift;
  const float* inverse;      // (K) 1 / smooth
  const uint4* down;         // (K/128, R/16, 8, 32) A fragments of 16 ranks and 16 channels, zeros beyond K
  uint8_t* codes;            // (K/128, m_pad, 128)
  float* x_scale;            // (m_pad), zeros beyond M
  float* norms;              // (M) at least the l2 norm of the dequantized codes
  uint16_t* lora;            // (R/64, m_pad, 64) bf16
  long long batch_stride, row_stride;
  int m, m_pad, rank, length, modulation_stride, rows, rank_parts;
};

// Sums over the warp: v[0] becomes that of value lane / (32 / N). The order of a sum does not depend on N.
template <int N>
__device__ __forceinline__ void fold(float (&v)[N], int lane) {
  int step = 16;
#pragma unroll
  for (int half = N / 2; half >= 1; half /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float mine = upper ? v[i + half] : v[i], theirs = upper ? v[i] : v[i + half];
      v[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, step);
    }
  }
#pragma unroll
  for (step = 16 / N; step >= 1; step /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], step);
}

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

// 8 channels of a row.
__device__ __forceinline__ uint4 read_piece(const uint8_t* from) {
#if FROM_FP8
  const uint2 u = *(const uint2*)from;
  return make_uint4(from_e4m3((uint16_t)u.x), from_e4m3((uint16_t)(u.x >> 16)), from_e4m3((uint16_t)u.y), from_e4m3((uint16_t)(u.y >> 16)));
#else
  return *(const uint4*)from;
#endif
}

struct Exchange {  // of a team, between its warps
  float stats[2 * TURN][4], squares[TURN][4];
  uint32_t absmax[TURN][4];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) quantize(const __grid_constant__ Quantize a) {
  earlier_kernels_done();
  next_kernel_may_start();
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ __align__(16) Exchange exchanges[TEAMS][2];
  __shared__ __align__(8) unsigned long long arrivals[ROWS + 1];
  __shared__ __align__(8) unsigned long long meetings[TEAMS];
  __shared__ float reciprocals[ROWS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.x * a.rows, count = min(a.rows, a.m - m0);
  float* inverses = (float*)memory;
  uint8_t* rows = memory + CHANNELS * 4;
  const uint32_t arrived = shared_address(arrivals);

  if (lane == 0) {
    for (int i = warp; i < count; i += WARPS) barrier_init(arrived + 8 * i, 1);
    if (warp == WARPS - 1) barrier_init(arrived + 8 * ROWS, 1);
    if (warp < TEAMS) barrier_init(shared_address(meetings) + 8 * warp, TEAM / 32);
    barriers_ready();
    for (int i = warp; i < count; i += WARPS) {
      const int m = m0 + i, batch = m / a.length;
      const uint8_t* from = a.x + (batch * a.batch_stride + (m - batch * a.length) * a.row_stride) * X_BYTES;
      load_expected(shared_address(rows + i * STRIDE), from, CHANNELS * X_BYTES, arrived + 8 * i);
    }
    if (warp == WARPS - 1) load_expected(shared_address(inverses), a.inverse, CHANNELS * 4, arrived + 8 * ROWS);
  }

  const int team = threadIdx.x / TEAM, t = threadIdx.x % TEAM;
  int parity = 0;
  // Not bar.sync of a part of the block: teams meet unequally often, and compute-sanitizer then loses __syncthreads.
  auto meet_team = [&]() {
    const uint32_t meeting = shared_address(meetings) + 8 * team;
    __syncwarp();
    if (lane == 0) barrier_arrive(meeting);
    barrier_wait(meeting, parity);
    parity ^= 1;
  };
  auto column_of = [&](int p) { return (p * TEAM + t) * 8; };
  auto exists = [&](int p) { return CHANNELS % (8 * TEAM) == 0 || p < PIECES - 1 || column_of(p) < CHANNELS; };
  float inverse[KEPT][8];
  auto read_inverse = [&](int p) {
    float4 low = make_float4(0.f, 0.f, 0.f, 0.f), high = low;
    if (exists(p)) low = __ldg((const float4*)(a.inverse + column_of(p))), high = __ldg((const float4*)(a.inverse + column_of(p) + 4));
    float(&f)[8] = inverse[p % KEPT];
    f[0] = low.x, f[1] = low.y, f[2] = low.z, f[3] = low.w, f[4] = high.x, f[5] = high.y, f[6] = high.z, f[7] = high.w;
  };
  if (KEPT == PIECES)
#pragma unroll
    for (int p = 0; p < PIECES; ++p) read_inverse(p);
#if NORM
  float scale[KEPT][8], shift[KEPT][8];
  auto read_modulation = [&](int p, int batch) {
    const size_t from = (size_t)batch * a.modulation_stride + column_of(p);
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    unpack(exists(p) ? __ldg((const uint4*)(a.scale + from)) : zeros, scale[p % KEPT]);
    unpack(exists(p) ? __ldg((const uint4*)(a.shift + from)) : zeros, shift[p % KEPT]);
  };
  int batch_read = -1;
#endif
  __syncthreads();  // the barriers are ready

  int turn = 0;
  const int chunk = min(TURN, (count + TEAMS - 1) / TEAMS);
  for (int first = team * chunk; first < count; first += TEAMS * chunk) {
    const int stop = min(first + chunk, count);
    for (int row = first, n; row < stop; row += n, ++turn) {
      n = stop - row;
      Exchange& exchange = exchanges[team][turn % 2];
#if NORM
      const int batch = (m0 + row) / a.length;
      n = min(n, (batch + 1) * a.length - (m0 + row));
      if (KEPT == PIECES && batch != batch_read) {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) read_modulation(p, batch);
        batch_read = batch;
      }
#endif
      // Rows that the turn lacks are its last one again.
      uint8_t* at[TURN];
      uint4 v[TURN][PIECES];
#pragma unroll
      for (int r = 0; r < TURN; ++r) {
        const int i = row + min(r, n - 1);
        at[r] = rows + i * STRIDE;
        barrier_wait(arrived + 8 * i, 0);
      }
      __syncwarp();
#if NORM
      float pivot[TURN], stats[2 * TURN] = {};
      const float own_pivot = to_float(*(const uint16_t*)(rows + (row + min(lane % TURN, n - 1)) * STRIDE));
#endif
#pragma unroll
      for (int r = 0; r < TURN; ++r) {
#if NORM
        const uint32_t first_value = *(const uint16_t*)at[r], fill = first_value | first_value << 16;
        pivot[r] = to_float((uint16_t)first_value);
#else
        const uint32_t fill = 0;
#endif
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
          v[r][p] = make_uint4(fill, fill, fill, fill);
          if (exists(p)) v[r][p] = read_piece(at[r] + column_of(p) * X_BYTES);
        }
      }
#if NORM
      // Squares are taken of the distance to the row's first value. Sums come from mma with ones, which also adds up
      // four lanes (both halves of its rows are this row); values that do not exist are that first value.
      float sums[TURN][4] = {};
#pragma unroll
      for (int p = 0; p < PIECES; ++p)
#pragma unroll
        for (int r = 0; r < TURN; ++r) {
          mma(sums[r], v[r][p].x, v[r][p].y, v[r][p].z, v[r][p].w, ONES, ONES);
          float f[8];
          unpack(v[r][p], f);
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            f[e] -= pivot[r];
            stats[TURN + r] = fmaf(f[e], f[e], stats[TURN + r]);
          }
        }
#pragma unroll
      for (int r = 0; r < TURN; ++r) stats[r] = sums[r][0] + sums[r][2];  // in each of four lanes
      fold(stats, lane);
      if (lane % (16 / TURN) == 0) exchange.stats[lane / (16 / TURN)][warp % 4] = stats[0];
      meet_team();
      const float4 total = *(const float4*)exchange.stats[lane % TURN], squares = *(const float4*)exchange.stats[TURN + lane % TURN];
      const float sum = fmaf(-8.f * TEAM * PIECES, own_pivot, 0.25f * ((total.x + total.y) + (total.z + total.w)));
      const float mean = sum * (1.f / CHANNELS);  // from the pivot on
      const float variance = fmaf(-mean, mean, ((squares.x + squares.y) + (squares.z + squares.w)) * (1.f / CHANNELS));
      const float own_rstd = rsqrtf(fmaxf(variance, 0.f) + 1e-6f), own_offset = -(mean + own_pivot) * own_rstd;
      float rstd[TURN], offset[TURN];  // (x - mean) * rstd = x * rstd + offset
#pragma unroll
      for (int r = 0; r < TURN; ++r) {
        rstd[r] = __shfl_sync(0xffffffffu, own_rstd, r);
        offset[r] = __shfl_sync(0xffffffffu, own_offset, r);
      }
#endif
      float absmax[TURN] = {}, energy[TURN] = {};
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        if (KEPT != PIECES) read_inverse(p);
        const float(&factor)[8] = inverse[p % KEPT];
#if NORM
        if (KEPT != PIECES) read_modulation(p, batch);
        const float(&s)[8] = scale[p % KEPT], (&h)[8] = shift[p % KEPT];
#endif
#pragma unroll
        for (int r = 0; r < TURN; ++r) {
          float f[8];
          unpack(v[r][p], f);
#if NORM
#pragma unroll
          for (int e = 0; e < 8; ++e) f[e] = fmaf(fmaf(f[e], rstd[r], offset[r]), s[e], h[e]);
          const uint4 y = packed(f);
          if (exists(p)) *(uint4*)(at[r] + column_of(p) * 2) = y;
          unpack(y, f);
#endif
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const float u = f[e] * factor[e];
            absmax[r] = fmaxf(absmax[r], fabsf(u));
            energy[r] = fmaf(u, u, energy[r]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < TURN; ++r) {
        const uint32_t largest = warp_max(__float_as_uint(absmax[r]));
        if (lane == r) exchange.absmax[r][warp % 4] = largest;
      }
      fold(energy, lane);
      if (lane % (32 / TURN) == 0) exchange.squares[lane / (32 / TURN)][warp % 4] = energy[0];
      meet_team();
#if FROM_FP8
      // y takes more room than x, so that all of the team must have read first.
#pragma unroll
      for (int p = 0; p < PIECES; ++p)
#pragma unroll
        for (int r = 0; r < TURN; ++r)
          if (exists(p)) *(uint4*)(at[r] + column_of(p) * 2) = v[r][p];
#endif
      if (warp % 4 == (team + turn) % 4 && lane < n) {  // not always the same warp, nor that of one scheduler
        const uint4 l = *(const uint4*)exchange.absmax[lane];
        const float4 e = *(const float4*)exchange.squares[lane];
        const float largest = __uint_as_float(max(max(l.x, l.y), max(l.z, l.w))), s = largest * (1.f / 448.f);
        const int i = row + lane;
        reciprocals[i] = s > 0.f ? 1.f / s : 0.f;
        const float unit = FROM_FP8 ? __ldg(a.unit) : 1.f;
        a.x_scale[m0 + i] = s * unit;
        a.norms[m0 + i] = norm_bound((e.x + e.y) + (e.z + e.w), largest, s) * unit;
      }
    }
  }

  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < a.m_pad - a.m) a.x_scale[a.m + threadIdx.x] = 0.f;

  // The share of a warp: tiles slice, slice + slices, ..., and 32 ranks; the warps that share a tile take turns to encode.
  const int slices = WARPS / a.rank_parts, slice = warp % slices, part = warp / slices;
  const int row8 = lane / 4, quad = lane % 4;  // of a fragment: its row, its 8 of 32 channels
  uint4 down[4][2][2];  // by 32 channels, 16 ranks, half of the channels
  auto read = [&](int tile, int b) {
    const uint4* from = a.down + ((size_t)(tile * (a.rank / 16) + part * 2) * 8 + b * 2) * 32 + lane;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        down[b][j][half] = tile < TILES && part * 2 + j < a.rank / 16 ? __ldg(from + j * 256 + half * 32) : make_uint4(0, 0, 0, 0);
  };
#pragma unroll
  for (int b = 0; b < 4; ++b) read(slice, b);
  if (threadIdx.x == 0) barrier_wait(arrived + 8 * ROWS, 0);
  __syncthreads();

  // Rows that a block lacks are whatever lies there, and stay in their own columns; its memory ends with row a.rows - 1.
  const uint8_t* y = rows + row8 * STRIDE + quad * 16;
  const uint8_t* last_y = rows + min(ROWS - 8 + row8, a.rows - 1) * STRIDE + quad * 16;
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
        if (!beyond(tile, b)) {
          *(float4*)factor = *(const float4*)(inverses + tile * 128 + 32 * b + 8 * quad);
          *(float4*)(factor + 4) = *(const float4*)(inverses + tile * 128 + 32 * b + 8 * quad + 4);
        }
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
