// w4a16: a 4-bit linear with 16-bit activations for the few rows of the modulations (ops/w4a16.py).
//
// A warp owns four output channels and walks along K, a lane taking 32 codes (16 bytes) of each channel at a time, so
// the weights are read once in whole lines and x comes from L1. With one scale and zero for each 64 channels,
// sum (code * scale + zero) x = scale * sum code x + zero * sum x.
#include "numbers.cuh"

constexpr int CHANNELS = 4;  // output channels of a warp
constexpr int WARPS = 4;

struct W4A16 {
    const u16* x;                  // (B, K)
    const unsigned char* qweight;  // (N, K/2)
    const u16* wscales;            // (K/64, N)
    const u16* wzeros;             // (K/64, N)
    const u16* bias;               // (N,)
    u16* out;                      // (B, N)
    int columns;                   // N, a multiple of 4
    int channels;                  // K, a multiple of 64
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) w4a16(const __grid_constant__ W4A16 p) {
    const int lane = threadIdx.x % 32, n0 = (blockIdx.x * WARPS + threadIdx.x / 32) * CHANNELS;
    if (n0 >= p.columns) return;
    const u16* x = p.x + static_cast<size_t>(blockIdx.y) * p.channels;
    float sums[CHANNELS] = {};
    for (int k = 32 * lane; k < p.channels; k += 1024) {
        uint4 codes[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            codes[c] = __ldg(reinterpret_cast<const uint4*>(p.qweight + (static_cast<size_t>(n0 + c) * p.channels + k) / 2));
        }
        const size_t group = static_cast<size_t>(k / 64) * p.columns + n0;
        const uint2 scales = __ldg(reinterpret_cast<const uint2*>(p.wscales + group));
        const uint2 zeros = __ldg(reinterpret_cast<const uint2*>(p.wzeros + group));
        float products[CHANNELS] = {}, total = 0.0f;
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const uint4 words = load8(x + k + 8 * part, true);
            const float values[8] = {T::low(words.x), T::high(words.x), T::low(words.y), T::high(words.y),
                                     T::low(words.z), T::high(words.z), T::low(words.w), T::high(words.w)};
#pragma unroll
            for (int i = 0; i < 8; i++) total += values[i];
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) {
                const u32 word = part == 0 ? codes[c].x : part == 1 ? codes[c].y : part == 2 ? codes[c].z : codes[c].w;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    // 2^23 + code, exactly, by its bits
                    const float code = __uint_as_float(0x4b000000u | (word >> (4 * i) & 15u)) - 8388608.0f;
                    products[c] = fmaf(code, values[i], products[c]);
                }
            }
        }
        const float scale[CHANNELS] = {T::low(scales.x), T::high(scales.x), T::low(scales.y), T::high(scales.y)};
        const float zero[CHANNELS] = {T::low(zeros.x), T::high(zeros.x), T::low(zeros.y), T::high(zeros.y)};
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) sums[c] = fmaf(scale[c], products[c], fmaf(zero[c], total, sums[c]));
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) sums[c] = warp_sum(sums[c]);
    if (lane > 0) return;
    const uint2 bias = __ldg(reinterpret_cast<const uint2*>(p.bias + n0));
    *reinterpret_cast<uint2*>(p.out + static_cast<size_t>(blockIdx.y) * p.columns + n0) =
        make_uint2(T::pack(sums[0] + T::low(bias.x), sums[1] + T::high(bias.x)),
                   T::pack(sums[2] + T::low(bias.y), sums[3] + T::high(bias.y)));
}
