// From 16-bit values to 4-bit codes: the arithmetic of ops/quantize.py and formats.GroupInt4, bit by bit.
//
// A lane holds eight neighbors in K as four words; four lanes hold 32, and two such blocks make a group of 64.
#pragma once
#include "numbers.cuh"

constexpr float GELU_SHIFT = 0.171875f;

// x / smooth rounded to nearest in float32: quotient by the rounded reciprocal, corrected by its exact remainder. (The
// 16-bit result must be that of a true division: a quotient off by one bit would round ties the wrong way.)
__device__ inline float divide(float x, float2 smooth) {
    const float quotient = x * smooth.y;
    return fmaf(fmaf(-quotient, smooth.x, x), smooth.y, quotient);
}

// Shift (unsigned codes only) and smooth a lane's eight channels of `ROWS` rows in place.
template <bool Unsigned, int ROWS>
__device__ inline void smooth_block(u32 (&x)[ROWS][4], const float2* smooth) {
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const float4 pair = __ldg(reinterpret_cast<const float4*>(smooth) + w);
        const float2 first = make_float2(pair.x, pair.y), second = make_float2(pair.z, pair.w);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            u32 word = x[r][w];
            if (Unsigned) word = T::pack(T::low(word) + GELU_SHIFT, T::high(word) + GELU_SHIFT);
            x[r][w] = T::pack(divide(T::low(word), first), divide(T::high(word), second));
        }
    }
}

// 1 / x rounded to nearest, for x in the range of 16-bit scales (a float's reciprocal is approximate by one bit at most,
// and one step of Newton's iteration mends it); infinity for the smallest subnormal numbers.
__device__ inline float reciprocal_of(float x) {
    float r;
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
    const float mended = fmaf(r, fmaf(-x, r, 1.0f), r);
    return __float_as_uint(r) == 0x7f800000u ? r : mended;
}

template <bool Unsigned>
__device__ inline u32 pack_codes(s32 low, s32 high, u32 above) {  // saturates both to 4 bits, above << 8 | high << 4 | low
    u32 word;
    if (Unsigned) {
        asm("cvt.pack.sat.u4.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(high), "r"(low), "r"(above));
    } else {
        asm("cvt.pack.sat.s4.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(high), "r"(low), "r"(above));
    }
    return word;
}

template <bool Unsigned>
__device__ inline u32 code_block(const u32 (&x)[4], float reciprocal) {
    u32 codes = 0;
#pragma unroll
    for (int w = 3; w >= 0; w--) {
        codes = pack_codes<Unsigned>(__float2int_rn(T::low(x[w]) * reciprocal), __float2int_rn(T::high(x[w]) * reciprocal),
                                     codes);
    }
    return codes;
}

struct GroupCodes {
    u32 first, second;  // eight codes of each block
    u16 scale;          // the same in the four lanes of a row
};

// One row's group: scale = absmax / 7 (15), codes from the unrounded scale; a group of zeros gets scale 0.
template <bool Unsigned>
__device__ inline GroupCodes quantize_group(const u32 (&first)[4], const u32 (&second)[4]) {
    u32 largest = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        largest = T::larger(largest, first[w] & 0x7fff7fffu);
        largest = T::larger(largest, second[w] & 0x7fff7fffu);
    }
    largest = T::larger(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = T::larger(largest, __shfl_xor_sync(~0u, largest, 2));
    largest = T::larger(largest, largest >> 16);
    const float scale = T::low(largest) * (Unsigned ? 1.0f / 15.0f : 1.0f / 7.0f);
    const float reciprocal = scale > 0.0f ? reciprocal_of(scale) : 0.0f;
    GroupCodes out;
    out.first = code_block<Unsigned>(first, reciprocal);
    out.second = code_block<Unsigned>(second, reciprocal);
    out.scale = static_cast<u16>(T::pack(scale, 0.0f));
    return out;
}

// Where the codes of a layer's input go.
struct CodeOutput {
    u32* codes;        // (M, K/8), eight codes a word
    u16* scales;       // (K/64, scale_stride)
    int channels;      // K
    int scale_stride;  // M rounded up; the rows past M get scales too, of zeros
};

template <bool Unsigned>
__device__ inline void store_group(const CodeOutput& out, int row, int k, const u32 (&first)[4], const u32 (&second)[4],
                                   int rows) {
    const GroupCodes group = quantize_group<Unsigned>(first, second);
    if (lane_quarter() == 0 && row < out.scale_stride) {
        out.scales[static_cast<size_t>(k / 64) * out.scale_stride + row] = group.scale;
    }
    if (row >= rows) return;
    u32* codes = out.codes + (static_cast<size_t>(row) * out.channels + k) / 8 + lane_quarter();
    codes[0] = group.first;
    codes[4] = group.second;
}
