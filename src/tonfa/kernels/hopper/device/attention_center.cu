// What FP8 attention takes from v, and the scales of q, k and v, before any of them is computed. Written for NVRTC: no
// headers but ours. FP16, P_SCALE, SMALLEST_BOUND and LARGEST_BOUND (ops/attention_fp8.py) are defined by the caller.
//
// The center is the v of the mean of SAMPLES rows of one stream's input. It need not be the mean of v: attention is
// a mean itself, so what is taken from v is added to its result. The last block finds the scales from bounds, the others
// CHANNELS of the center each.
#include "asynchronous.cuh"
#include "numbers.cuh"
#include "instructions.cuh"

constexpr int THREADS = 384, WARPS = THREADS / 32;
constexpr int CHANNELS = 32;
constexpr int SAMPLES = 32;  // one for each lane
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
  const uint16_t* up;      // (3 values / 128, R/16, 256, 8) fragments, bf16, divided by w_scale
  uint16_t* center;        // (values)
  float* factors;          // (3) powers of two: what q, k and v are multiplied with
  float* scalars;          // (8, 4) the first of each row: what cuDNN takes
  float* descale;          // (1) 1 / factors[2]
  int stream_count, sampled, m_pad, k, values, rank, rank_start;
};

__device__ __forceinline__ float from_bf16_bits(uint16_t v) { return __uint_as_float((uint32_t)v << 16); }

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

// Where four channels of the mean lie in shared memory: two lanes 32 channels apart meet all banks.
__device__ __forceinline__ int place_of_four(int four) { return four ^ (four >> 3 & 1); }

// The mean of the samples. Two lanes share a piece of 16 bytes, which are channels 32 q + 4 c .. 32 q + 4 c + 3 of its tile.
__device__ __forceinline__ void find_mean(const AttentionCenter& a, float4* mean) {
  const int rows = a.streams[a.sampled].rows, pieces = (a.k + 127) / 128 * 8;
  for (int start = 0; start < 2 * pieces; start += THREADS) {
    const bool exists = start + threadIdx.x < 2 * pieces;
    const int piece = exists ? (start + threadIdx.x) / 2 : 0, half = threadIdx.x % 2;
    const uint8_t* from = a.x + (size_t)(piece / 8) * a.m_pad * 128;
    float sum[16] = {};
#pragma unroll 8
    for (int s = half; s < SAMPLES; s += 2) {
      const int row = sample(s, rows);
      const float scale = __ldg(a.x_scale + row) * (1.f / SAMPLES);
      float f[16];
      unpack_e4m3(__ldg((const uint4*)(from + (size_t)row * 128 + ((piece ^ row) & 7) * 16)), f);
#pragma unroll
      for (int e = 0; e < 16; ++e) sum[e] = fmaf(f[e], scale, sum[e]);
    }
#pragma unroll
    for (int e = 0; e < 16; ++e) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], 1);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (exists && q / 2 == half)
        mean[place_of_four(piece / 8 * 32 + 8 * q + piece % 8)] = make_float4(sum[4 * q], sum[4 * q + 1], sum[4 * q + 2], sum[4 * q + 3]);
  }
}

// Of the low-rank branch.
__device__ __forceinline__ void find_branch(const AttentionCenter& a, float* branch) {
  const int row = sample(threadIdx.x % 32, a.streams[a.sampled].rows);
  const float scale = __ldg(a.x_scale + row) * (1.f / SAMPLES);
  for (int r = threadIdx.x / 32; r < a.rank; r += WARPS) {
    const int column = a.rank_start + r;
    const uint8_t* from = a.lora + ((size_t)(column / 64) * a.m_pad + row) * 128 + ((column % 64 / 8 ^ row) & 7) * 16;
    branch[r] = warp_sum(from_bf16_bits(__ldg((const uint16_t*)from + column % 8)) * scale);
  }
}

// Row n of up.
__device__ __forceinline__ float up_of(const AttentionCenter& a, int n, int r) {
  const int thread = n % 128 / 64 * 128 + n % 64 / 16 * 32 + n % 8 * 4 + r % 8 / 2;
  const size_t fragment = ((size_t)(n / 128) * (a.rank / 16) + r / 16) * 256 + thread;
  return from_bf16_bits(__ldg(a.up + fragment * 8 + r % 16 / 8 * 4 + n % 16 / 8 * 2 + r % 2));
}

// Of 32 channels, two's complement.
__device__ __forceinline__ float dot(uint4 codes, const float (&x)[32]) {
  const uint32_t u[4] = {codes.x, codes.y, codes.z, codes.w};
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < 32; ++e) {
    const float code = __uint_as_float((u[e / 8] >> 4 * (e % 8) & 15) ^ 0x4B000008u) - 0x800008p0f;
    sum = fmaf(code, x[e], sum);
  }
  return sum;
}

__device__ __forceinline__ void find_center(const AttentionCenter& a, float4* mean) {
  __shared__ float branch[LARGEST_RANK];
  __shared__ float sums[WARPS][CHANNELS];
  const int first = blockIdx.x * CHANNELS, n0 = 2 * a.values + first, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  find_branch(a, branch);
  find_mean(a, mean);
  __syncthreads();

  // A warp takes every 12th group of 64 channels: two lanes have 32 each, of rows lane / 2 and that + 16.
  float sum[2] = {};
  const uint8_t* codes = a.qweight + (size_t)(n0 + lane / 2) * (a.k / 2) + lane % 2 * 16;
  const uint16_t* scales = a.wscales + n0 + lane / 2;
#pragma unroll 4
  for (int group = warp; group < a.k / 64; group += WARPS) {
    float x[32];
#pragma unroll
    for (int i = 0; i < 8; ++i) *(float4*)(x + 4 * i) = mean[place_of_four(group * 16 + lane % 2 * 8 + i)];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 of_row = __ldg((const uint4*)(codes + (size_t)(16 * h) * (a.k / 2) + group * 32));
      sum[h] = fmaf(dot(of_row, x), to_float(__ldg(scales + (size_t)group * 3 * a.values + 16 * h)), sum[h]);
    }
  }
  const int n = n0 + lane;
  float share = 0.f;  // of the branch, for the lane's channel
  for (int r = warp; r < a.rank; r += WARPS) share = fmaf(up_of(a, n, r), branch[r], share);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    if (lane % 2 == 0) sums[warp][16 * h + lane / 2] = sum[h];
  }
  __syncwarp();
  sums[warp][lane] += share * __ldg(a.w_scale + n);
  __syncthreads();
  if (warp) return;

  float v = __ldg(a.streams[a.sampled].bias + n);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) v += sums[w][lane];
  const uint16_t rounded = (uint16_t)pack(v, 0.f);
  a.center[first + lane] = rounded;
  for (int s = 0; s < a.stream_count; ++s) {
    const Stream& stream = a.streams[s];
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      const int at = part * a.values + first + lane;
      stream.shifted[at] = __ldg(stream.bias + at) - (part == 2 ? to_float(rounded) : 0.f);
    }
  }
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
  float value = 0.f, q = 0.f, k = 0.f;
  for (int s = 0; s < a.stream_count; ++s) {
    const Stream& stream = a.streams[s];
    float largest = 0.f;
#pragma unroll 4
    for (int i = threadIdx.x; i < stream.rows; i += THREADS) largest = fmaxf(largest, __ldg(stream.norms + i));
    value = fmaxf(value, fmaf(largest_of_block(largest), __ldg(stream.bound), __ldg(stream.bound + 1)));
    if (threadIdx.x < HEAD_DIM) {
      q = fmaxf(q, fabsf(to_float(__ldg(stream.norm_q + threadIdx.x))));
      k = fmaxf(k, fabsf(to_float(__ldg(stream.norm_k + threadIdx.x))));
    }
  }
  const float root = sqrtf((float)HEAD_DIM);
  const int of_q = largest_exponent(largest_of_block(q) * root), of_k = largest_exponent(largest_of_block(k) * root);
  const int of_v = largest_exponent(2.f * value);  // the center is no larger than v
  if (threadIdx.x) return;
  a.factors[0] = power(of_q), a.factors[1] = power(of_k), a.factors[2] = power(of_v);
  a.descale[0] = power(-of_v);
  const float scalars[8] = {power(-(of_q + of_k)), 1.f, 1.f, 1.f / P_SCALE, P_SCALE, 1.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 8; ++i) a.scalars[4 * i] = scalars[i];
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_center(const __grid_constant__ AttentionCenter a) {
  extern __shared__ __align__(16) uint8_t memory[];
  earlier_kernels_done();
  next_kernel_may_start();
  if (blockIdx.x == gridDim.x - 1)
    find_scales(a);
  else
    find_center(a, (float4*)memory);
}
