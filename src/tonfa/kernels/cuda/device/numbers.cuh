// The two 16-bit formats, two values a word (the lower index in the lower half), and what a warp does with them.
// Conversions are inline PTX: NVRTC's own package has no cuda_fp16.h and cuda_bf16.h.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using s32 = int;

struct Bf16 {
    static __device__ u32 pack(float low, float high) {
        u32 word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }
    static __device__ float low(u32 word) { return __uint_as_float(word << 16); }
    static __device__ float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
    static __device__ u32 larger(u32 a, u32 b) {  // of each half; NaN wins
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
    }
    static __device__ float finite(float x) { return x; }
    // d (16, 8) += a (16, 16) b (16, 8), the fragments of m16n8k16
    static __device__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

struct Fp16 {
    static __device__ u32 pack(float low, float high) {
        u32 word;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }
    static __device__ float low(u32 word) {
        float value;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(word));
        return value;
    }
    static __device__ float high(u32 word) {
        float value;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(word));
        return value;
    }
    static __device__ u32 larger(u32 a, u32 b) {
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
    }
    static __device__ float finite(float x) {  // Diffusers clamps float16 residuals; NaN stays
        return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    }
    static __device__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

using T = ELEMENT;  // Bf16 or Fp16

// A lane's place in the fragments of every mma here: row (and column of b) `lane / 4`, column pair `lane % 4`.
__device__ inline int lane_row() { return (threadIdx.x % 32) / 4; }
__device__ inline int lane_quarter() { return threadIdx.x % 4; }

// Sum over the four lanes that share a row, the same in each of them.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ inline float warp_sum(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Eight 16-bit values, read through the read-only path; zeros where there are none.
__device__ inline uint4 load8(const u16* from, bool there) {
    return there ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
}
