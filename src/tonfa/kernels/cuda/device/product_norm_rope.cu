// product_norm_rope: RMSNorm and RoPE of q and k, and the split into heads, in the product's epilogue (ops/fused.py).
//
// Heads have 128 channels, so a tile is one head of q, k or v, and a row of it lies in four neighboring lanes.
#include "product.cuh"

struct Heads {
    u16* out;           // (3, B, H, L, 128), the last contiguous
    const u16* norm_q;  // (128,)
    const u16* norm_k;  // (128,)
    const float* cos;   // (L, 128), every angle twice in a row
    const float* sin;   // (L, 128)
    long long which_stride;
    long long image_stride;
    long long head_stride;
    long long token_stride;
    int length;  // L
    int heads;   // H
    float epsilon;
};

// RMSNorm of one row, then rotation of its pairs (2i, 2i + 1), rounded once.
__device__ inline void norm_rotate(u32 (&y)[4][4], const u16* weight, const float* cos, const float* sin, float epsilon) {
    float squares = 0.0f;
#pragma unroll
    for (int b = 0; b < 4; b++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float low = T::low(y[b][j]), high = T::high(y[b][j]);
            squares = fmaf(low, low, fmaf(high, high, squares));
        }
    }
    const float inverse = rsqrtf(quad_sum(squares) / TILE + epsilon);
#pragma unroll
    for (int b = 0; b < 4; b++) {
        const int d = 32 * b + 8 * lane_quarter();
        const uint4 words = load8(weight + d, true);
        const u32 weights[4] = {words.x, words.y, words.z, words.w};
        const float4* cosines = reinterpret_cast<const float4*>(cos + d);
        const float4* sines = reinterpret_cast<const float4*>(sin + d);
        const float4 cos01 = __ldg(cosines), cos23 = __ldg(cosines + 1), sin01 = __ldg(sines), sin23 = __ldg(sines + 1);
        const float pair_cos[4] = {cos01.x, cos01.z, cos23.x, cos23.z}, pair_sin[4] = {sin01.x, sin01.z, sin23.x, sin23.z};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float c = pair_cos[j], s = pair_sin[j];
            const float real = T::low(y[b][j]) * inverse * T::low(weights[j]);
            const float imaginary = T::high(y[b][j]) * inverse * T::high(weights[j]);
            y[b][j] = T::pack(fmaf(real, c, -(imaginary * s)), fmaf(imaginary, c, real * s));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
product_norm_rope(const __grid_constant__ Product p, const __grid_constant__ Heads e) {
    const Place place = place_of_block();
    if (place.row0 >= p.rows) return;
    Tile y;
    compute_tile<UNSIGNED>(p, place, y);
    const int which = place.column0 / TILE / e.heads, head = place.column0 / TILE % e.heads;
    if (which < 2) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = min(place.row0 + lane_tile_row(r), p.rows - 1);  // all lanes of a row go together
            const size_t at = static_cast<size_t>(row % e.length) * TILE;
            norm_rotate(y[r], which == 0 ? e.norm_q : e.norm_k, e.cos + at, e.sin + at, e.epsilon);
        }
    }
    const auto line_of = [&](int row) {
        return e.out + which * e.which_stride + row / e.length * e.image_stride + head * e.head_stride +
               row % e.length * e.token_stride;
    };
    for_outputs(p, place, y, line_of,
                [](u16* line, int column, uint4 words) { store8(line + column % TILE, words); });
}
