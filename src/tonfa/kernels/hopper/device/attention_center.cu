// What FP8 attention takes from v, and the scales of q, k and v, before any of them is computed. Written for NVRTC: no
// headers but ours. FP16, P_SCALE, SMALLEST_BOUND and LARGEST_BOUND (ops/attention_fp8.py) are defined by the caller.
//
// The center is the v of the mean of SAMPLES rows of one stream's input. It need not be the mean of v: attention is
// a mean itself, so what is taken from v is added to its result. The last block finds the scales from bounds, the others
// CHANNELS of the center each. Weights are fetched into L2 before the input is there. Half of the registers are left to the
// kernel that expands weights meanwhile.
#include "asynchronous.cuh"
#include "numbers.cuh"
#include "instructions.cuh"

constexpr int THREADS = 384, WARPS = THREADS / 32;
constexpr int CHANNELS = 32;  // two times the 16 rows of an mma
constexpr int SAMPLES = 32;   // one for each lane
constexpr int BATCH = 8;      // samples that a thread reads at a time
constexpr int AHEAD = 4;      // groups of 64 input channels, or columns of lora, that a warp reads at a time
constexpr int LARGEST_RANK = 256;
constexpr int HEAD_DIM = 128;

struct Stream {
  const float* norms;      // (rows) bounds of the l2 norms of the input's rows
  const float* bound;      // (2) |v| is at most norm * [0] + [1]
  const uint16_t* norm_q;  // (128)
  const uint16_t* norm_k;
  const float* bias;       // (3 values) of q, k and v
  float* shifted;          // (3 values) the bias, v's less the center
  int rows;
};

struct AttentionCenter {
  Stream streams[2];
  const uint8_t* x;        // of the sampled stream, as in Product: (K/128, m_pad, 128) e4m3
  const float* x_scale;    // (m_pad)
  const uint8_t* lora;     // (R/64, m_pad, 64) bf16, swizzled, divided by x_scale
  const uint8_t* qweight;  // (3 values, K/2)
  const uint16_t* wscales; // (K/64, 3 values)
  const float* w_scale;    // (3 values)
  const uint4* up;         // (3 values / 128, R/16, 256) fragments, bf16, divided by w_scale
  uint16_t* center;        // (values)
  float* factors;          // (3) powers of two: what q, k and v are multiplied with
  float* scalars;          // (8, 4) the first of each row: what cuDNN takes
  float* descale;          // (1) 1 / factors[2]
  int stream_count, sampled, m_pad, k, values, rank, rank_start;
};

// One of each of SAMPLES equal parts of the rows, at a place in it that differs (multiples of the golden ratio), so that
// it is not always the same column of a picture.
__device__ __forceinline__ int sample(int i, int rows) {
  const uint64_t place = (uint64_t)i << 32 | (uint32_t)(i * 0x9E3779B9u + 0x80000000u);
  return (int)(place * (uint32_t)rows / SAMPLES >> 32);
}

__device__ __forceinline__ void unpack_e4m3(uint4 codes, float (&f)[16]) {
  const uint32_t u[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int e = 0; e < 8; ++e) *(float2*)(f + 2 * e) = from_e4m3((uint16_t)(u[e / 2] >> 16 * (e % 2)));
}

// The mean of the samples as B fragments, bf16: channels p and p + 4 of 8 are a word, 8 words of 16 channels each are a
// quad's part of a group of 64. Two lanes share a piece of 16 bytes: channels 32 q + 4 c .. 32 q + 4 c + 3 of its tile.
__device__ __forceinline__ void find_mean(const AttentionCenter& a, uint16_t* mean) {
  const int rows = a.streams[a.sampled].rows, pieces = (a.k + 127) / 128 * 8;
  for (int start = 0; start < 2 * pieces; start += THREADS) {
    const bool exists = start + threadIdx.x < 2 * pieces;
    const int piece = exists ? (start + threadIdx.x) / 2 : 0, c = piece % 8, half = threadIdx.x % 2;
    const uint8_t* from = a.x + (size_t)(piece / 8) * a.m_pad * 128;
    float sum[16] = {};
#pragma unroll 1
    for (int first = half; first < SAMPLES; first += 2 * BATCH) {
      uint4 codes[BATCH];
      float scales[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int row = sample(first + 2 * i, rows);
        codes[i] = __ldg((const uint4*)(from + (size_t)row * 128 + ((c ^ row) & 7) * 16));
        scales[i] = __ldg(a.x_scale + row);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        float f[16];
        unpack_e4m3(codes[i], f);
#pragma unroll
        for (int e = 0; e < 16; ++e) sum[e] = fmaf(f[e], scales[i], sum[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < 16; ++e) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], 1);
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int q = e / 4, quad = piece / 8 * 8 + 2 * q + c / 4, word = c % 4 / 2 * 4 + e % 4;
      if (exists && q / 2 == half) mean[quad * 16 + word * 2 + c % 2] = to_bf16(sum[e] * (1.f / SAMPLES));
    }
  }
}

// Of the low-rank branch: the lane's sample of columns r, r + WARPS, ... over SAMPLES.
__device__ __forceinline__ void read_lora(const AttentionCenter& a, int r, float (&values)[AHEAD]) {
  const int row = sample(threadIdx.x % 32, a.streams[a.sampled].rows);
  const float scale = __ldg(a.x_scale + row) * (1.f / SAMPLES);
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    if (r + i * WARPS >= a.rank) break;
    const int column = a.rank_start + r + i * WARPS;
    const uint8_t* from = a.lora + ((size_t)(column / 64) * a.m_pad + row) * 128 + ((column % 64 / 8 ^ row) & 7) * 16;
    const uint32_t bits = __ldg((const uint16_t*)from + column % 8);
    values[i] = __uint_as_float(bits << 16) * scale;
  }
}

// Codes p and p + 4 of 8, two's complement, as bf16: 136 + code, less 136.
__device__ __forceinline__ uint32_t code_pair(uint32_t codes, int p) { return subtract_bf16((codes >> 4 * p & 0x000F000Fu) ^ 0x43084308u, 0x43084308u); }

// Four groups of a warp: 16 channels of its quad, of rows lane / 4 and that + 8, and of those 16 further.
struct Weights {
  uint2 codes[AHEAD][2][2];
  uint16_t scales[AHEAD][2][2];
};

__device__ __forceinline__ Weights read_weights(const AttentionCenter& a, int n, int first_group) {
  Weights w = {};
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    const int group = first_group + i * WARPS;
    if (group >= a.k / 64) break;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = n + 16 * h + 8 * r + threadIdx.x % 32 / 4;
        w.codes[i][h][r] = __ldg((const uint2*)(a.qweight + (size_t)row * (a.k / 2) + group * 32 + threadIdx.x % 4 * 8));
        w.scales[i][h][r] = __ldg(a.wscales + (size_t)group * 3 * a.values + row);
      }
  }
  return w;
}

__device__ __forceinline__ void find_center(const AttentionCenter& a, uint16_t* mean) {
  __shared__ __align__(4) uint16_t branch[LARGEST_RANK];
  __shared__ float sums[WARPS][CHANNELS], shares[WARPS][16], bias[2][3][CHANNELS], scale[CHANNELS];
  const int first = blockIdx.x * CHANNELS, n = 2 * a.values + first;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  auto read_up = [&](int part) {  // 16 rows, 16 ranks
    const int at = n % 128 / 16 + part % 2, step = part / 2;
    return step < a.rank / 16 ? __ldg(a.up + ((size_t)(n / 128) * (a.rank / 16) + step) * 256 + at * 32 + lane) : make_uint4(0, 0, 0, 0);
  };
  // What does not depend on the input is read while that is still written.
  const int lines = (a.k / 2 + 127) / 128;
  for (int i = threadIdx.x; i < CHANNELS * lines; i += THREADS)
    prefetch_into_l2(a.qweight + (size_t)(n + i / lines) * (a.k / 2) + i % lines * 128);
  for (int group = threadIdx.x; group < a.k / 64; group += THREADS) prefetch_into_l2(a.wscales + (size_t)group * 3 * a.values + n);
  uint4 next_up = read_up(warp);
  if (warp < 3 * a.stream_count) bias[warp / 3][warp % 3][lane] = __ldg(a.streams[warp / 3].bias + warp % 3 * a.values + first + lane);
  if (warp == WARPS - 1) scale[lane] = __ldg(a.w_scale + n + lane);
  earlier_kernels_done();
  next_kernel_may_start();
  float lora[AHEAD];
  read_lora(a, warp, lora);
  find_mean(a, mean);
  for (int r = warp; r < a.rank; r += AHEAD * WARPS) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (r + i * WARPS >= a.rank) break;
      const float sum = warp_sum(lora[i]);
      if (lane == 0) branch[r + i * WARPS] = to_bf16(sum);
    }
    read_lora(a, r + AHEAD * WARPS, lora);
  }
  __syncthreads();

  // All 8 columns of a product are the mean.
  float residual[2][2] = {}, low_rank[4] = {};
  for (int group = warp; group < a.k / 64; group += AHEAD * WARPS) {
    const Weights w = read_weights(a, n, group);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (group + i * WARPS >= a.k / 64) break;
      const uint4* at = (const uint4*)(mean + ((group + i * WARPS) * 4 + quad) * 16);
      const uint4 low = at[0], high = at[1];
      const uint32_t b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint2 upper = w.codes[i][h][0], lower = w.codes[i][h][1];
        float d[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t u = j < 2 ? upper.x : upper.y, l = j < 2 ? lower.x : lower.y;
          const int p = j % 2 * 2;
          mma_bf16(d, code_pair(u, p), code_pair(l, p), code_pair(u, p + 1), code_pair(l, p + 1), b[2 * j], b[2 * j + 1]);
        }
        residual[h][0] = fmaf(d[0], to_float(w.scales[i][h][0]), residual[h][0]);
        residual[h][1] = fmaf(d[2], to_float(w.scales[i][h][1]), residual[h][1]);
      }
    }
  }
  for (int part = warp; part < 2 * (a.rank / 16); part += WARPS) {  // WARPS is even: always the same 16 rows
    const uint4 up = next_up;
    next_up = read_up(part + WARPS);
    const uint32_t* at = (const uint32_t*)branch + part / 2 * 8 + quad;
    mma_bf16(low_rank, up.x, up.y, up.z, up.w, at[0], at[4]);
  }
  if (quad == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) sums[warp][16 * h + row] = residual[h][0], sums[warp][16 * h + row + 8] = residual[h][1];
    shares[warp][row] = low_rank[0], shares[warp][row + 8] = low_rank[2];
  }
  __syncthreads();
  if (warp) return;

  float v = 0.f, share = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) v += sums[w][lane];
#pragma unroll
  for (int w = 0; w < WARPS; w += 2) share += shares[w + lane / 16][lane % 16];
  const uint16_t rounded = (uint16_t)pack(fmaf(share, scale[lane], v) + bias[a.sampled][2][lane], 0.f);
  a.center[first + lane] = rounded;
  for (int s = 0; s < a.stream_count; ++s)
#pragma unroll
    for (int part = 0; part < 3; ++part)
      a.streams[s].shifted[part * a.values + first + lane] = bias[s][part][lane] - (part == 2 ? to_float(rounded) : 0.f);
}

// The largest n with bound * 2^n <= 448 = 1.75 * 2^8, from the bits of the bound.
__device__ __forceinline__ int largest_exponent(float bound) {
  return 135 - (int)((__float_as_uint(fminf(fmaxf(bound, SMALLEST_BOUND), LARGEST_BOUND)) + 0x1FFFFF) >> 23);
}
__device__ __forceinline__ float power(int exponent) { return __uint_as_float((uint32_t)(exponent + 127) << 23); }

// Bits of floats that are not negative are in the order of the floats.
__device__ __forceinline__ float largest_of_block(float v) {
  __shared__ uint32_t largest[WARPS];
  uint32_t most = warp_max(__float_as_uint(v));
  __syncthreads();  // all have read what was found before
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) most = max(most, largest[w]);
  return __uint_as_float(most);
}

__device__ __forceinline__ void find_scales(const AttentionCenter& a) {
  float q = 0.f, k = 0.f, gain[2], offset[2], value = 0.f;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= a.stream_count) break;
    gain[s] = __ldg(a.streams[s].bound), offset[s] = __ldg(a.streams[s].bound + 1);
    if (threadIdx.x >= HEAD_DIM) continue;
    q = fmaxf(q, fabsf(to_float(__ldg(a.streams[s].norm_q + threadIdx.x))));
    k = fmaxf(k, fabsf(to_float(__ldg(a.streams[s].norm_k + threadIdx.x))));
  }
  const float root = sqrtf((float)HEAD_DIM);
  const int of_q = largest_exponent(largest_of_block(q) * root), of_k = largest_exponent(largest_of_block(k) * root);
  earlier_kernels_done();
  next_kernel_may_start();
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s >= a.stream_count) break;
    float largest = 0.f;
#pragma unroll 12
    for (int i = threadIdx.x; i < a.streams[s].rows; i += THREADS) largest = fmaxf(largest, __ldg(a.streams[s].norms + i));
    value = fmaxf(value, fmaf(largest_of_block(largest), gain[s], offset[s]));
  }
  const int of_v = largest_exponent(2.f * value);  // the center is no larger than v
  if (threadIdx.x) return;
  a.factors[0] = power(of_q), a.factors[1] = power(of_k), a.factors[2] = power(of_v);
  a.descale[0] = power(-of_v);
  const float scalars[8] = {power(-(of_q + of_k)), 1.f, 1.f, 1.f / P_SCALE, P_SCALE, 1.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 8; ++i) a.scalars[4 * i] = scalars[i];
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_center(const __grid_constant__ AttentionCenter a) {
  extern __shared__ __align__(16) uint8_t memory[];
  if (blockIdx.x == gridDim.x - 1)
    find_scales(a);
  else
    find_center(a, (uint16_t*)memory);
}
