// 4-bit weights to e4m3 in the layout that the product reads (WIDE): the same values that it decodes itself. Written for
// NVRTC: no headers but ours.
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#include "asynchronous.cuh"
#include "decode.cuh"

struct Expand {
  const uint8_t* qweight;    // (N, K/2)
  const uint16_t* w_scales;  // (K/64, N)
  const float* w_inverse;    // (N)
  uint8_t* out;              // (K/128, N, 128)
  int n, k, scales_fp16;
  int beside;  // the kernel in front neither reads `out` nor writes what is read here, and may still run
};

// Leaves L2 to the expanded weights, which the product that follows reads.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 v;
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], policy;\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
}

__device__ __forceinline__ void store_kept(void* to, uint4 v) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w),
               "l"(keep_in_l2())
               : "memory");
}

// Lanes that share a row exchange: lane q gives word w[s] to lane s, and has the words of all four for piece s = q.
__device__ __forceinline__ uint4 transposed(const uint32_t (&w)[4], int q) {
  const bool high = q & 2, odd = q & 1;
  const uint32_t r0 = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[2], 2), r1 = __shfl_xor_sync(0xffffffffu, high ? w[1] : w[3], 2);
  const uint32_t v0 = high ? r0 : w[0], v1 = high ? r1 : w[1], v2 = high ? w[2] : r0, v3 = high ? w[3] : r1;
  const uint32_t t0 = __shfl_xor_sync(0xffffffffu, odd ? v0 : v1, 1), t1 = __shfl_xor_sync(0xffffffffu, odd ? v2 : v3, 1);
  return odd ? make_uint4(t0, v1, t1, v3) : make_uint4(v0, t0, v2, t1);
}

// With the lane of the row beside.
__device__ __forceinline__ uint4 exchanged(uint4 v) {
  return make_uint4(__shfl_xor_sync(0xffffffffu, v.x, 4), __shfl_xor_sync(0xffffffffu, v.y, 4), __shfl_xor_sync(0xffffffffu, v.z, 4),
                    __shfl_xor_sync(0xffffffffu, v.w, 4));
}

struct Source {  // of 32 weights
  uint4 codes;
  uint16_t scale;
};

// A warp takes 8 channels of a step of 128; four lanes a channel, 16 bytes each.
__device__ __forceinline__ void expand_channels(const Expand& a) {
  const int lane = threadIdx.x % 32, q = lane % 4, n = (blockIdx.x * 8 + threadIdx.x / 32) * 8 + lane / 4;
  if (n - lane / 4 >= a.n) return;  // N is a multiple of 8
  const float inverse = a.w_inverse[n];
  const int steps = (a.k + 127) / 128;
  auto read = [&](int step) {
    Source source = {make_uint4(0, 0, 0, 0), 0};
    const int group = 2 * step + q / 2;
    if (group < a.k / 64) {
      source.codes = load_once(a.qweight + (size_t)n * (a.k / 2) + step * 64 + q * 16);
      source.scale = __ldg(a.w_scales + (size_t)group * a.n + n);
    }
    return source;
  };
  Source next = read(blockIdx.y);  // a step is read before the one ahead of it is expanded
  for (int step = blockIdx.y; step < steps; step += gridDim.y) {
    const uint4 codes = next.codes;
    const float scale = widen(next.scale, a.scales_fp16);
    if (step + gridDim.y < steps) next = read(step + gridDim.y);
    const uint4 table = make_table(scale * inverse);
    uint32_t first[4], second[4];
    decode(codes.x, table, first[0], second[0]), decode(codes.y, table, first[1], second[1]);
    decode(codes.z, table, first[2], second[2]), decode(codes.w, table, first[3], second[3]);
    // Piece 2q and 2q + 1 of each row; two lanes exchange, so that a store writes whole rows: even ones, then odd ones.
    const uint4 low = transposed(first, q), high = transposed(second, q);
    const bool odd = lane & 4;
    const uint4 theirs = exchanged(odd ? low : high), even_row = odd ? theirs : low, odd_row = odd ? high : theirs;
    uint8_t* const to = a.out + ((size_t)step * a.n + (n & ~1)) * 128;
    store_kept(to + ((2 * q + odd) ^ (n & 6)) * 16, even_row);
    store_kept(to + 128 + ((2 * q + odd) ^ (n & 6 | 1)) * 16, odd_row);
  }
}

// The kernel in front let this one start when all before it were done. Whoever waits for this one must find that one done
// as well, so one block waits for it; more would keep others from starting.
extern "C" __global__ void __launch_bounds__(256, 6) expand(const __grid_constant__ Expand a) {
  if (!a.beside) earlier_kernels_done();
  next_kernel_may_start();
  expand_channels(a);
  if (a.beside && blockIdx.x == 0 && blockIdx.y == 0) earlier_kernels_done();
}
