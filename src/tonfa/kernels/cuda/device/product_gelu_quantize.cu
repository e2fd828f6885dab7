// product_gelu_quantize: GELU and the quantization of the next layer's input in the product's epilogue (ops/fused.py).
//
// The 16-bit result never reaches memory. A block computes `tiles` neighboring tiles along N, one after the other, and
// adds up their share of the next layer's low-rank input in its own slice of `partial`; the slices are then added in a
// fixed order by add_partials.cu. Nothing depends on timing, unlike sums by floating-point atomics.
#include "product.cuh"

struct Following {
    CodeOutput out;        // K is N of this layer
    const float2* smooth;  // (N,)
    const u16* proj_down;  // (R or more, N)
    float* partial;        // (slices, M, R)
    int rank;              // R, a multiple of 16
    int tiles;             // of a slice
};

// y * sigmoid(2u) is y / 2 * (1 + tanh(u)) without its cancellation.
__device__ inline float gelu(float y) {
    const float u = 0.7978845608028654f * fmaf(0.044715f * y * y, y, y);
    return __fdividef(y, 1.0f + __expf(-2.0f * u));
}

__device__ inline void add_lowrank_down(const Product& p, const Following& f, Place place, const Tile& h) {
    const bool first = place.column0 == blockIdx.y * f.tiles * TILE;
#pragma unroll 1
    for (int rank = 0; rank < f.rank; rank += 8) {
        const u16* down = f.proj_down + static_cast<size_t>(rank + lane_row()) * p.columns;
        float acc[2][4] = {};
#pragma unroll
        for (int b = 0; b < 4; b++) {
            const int column = place.column0 + 32 * b + 8 * lane_quarter();
            const uint4 w = load8(down + column, column < p.columns);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const u32(&upper)[4] = h[2 * m][b];
                const u32(&lower)[4] = h[2 * m + 1][b];
                T::multiply(acc[m], upper[0], lower[0], upper[1], lower[1], w.x, w.y);
                T::multiply(acc[m], upper[2], lower[2], upper[3], lower[3], w.z, w.w);
            }
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = place.row0 + lane_tile_row(r);
            if (row >= p.rows) continue;
            const size_t at = (static_cast<size_t>(blockIdx.y) * p.rows + row) * f.rank + rank + 2 * lane_quarter();
            float2* sum = reinterpret_cast<float2*>(f.partial + at);
            const float2 before = first ? make_float2(0.0f, 0.0f) : *sum;
            const float(&found)[4] = acc[r / 2];
            *sum = make_float2(before.x + found[r % 2 * 2], before.y + found[r % 2 * 2 + 1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
product_gelu_quantize(const __grid_constant__ Product p, const __grid_constant__ Following f) {
    const int end = min((blockIdx.y + 1) * f.tiles * TILE, p.columns);
    __shared__ volatile int column0;  // read again behind the main loop, which needs every register
    if (place_of_block().row0 >= p.rows) return;
    if (threadIdx.x == 0) column0 = blockIdx.y * f.tiles * TILE;
    __syncthreads();
    while (column0 < end) {
        Tile h;
        compute_tile<UNSIGNED>(p, {place_of_block().row0, column0}, h);
        const Place place = {place_of_block().row0, column0};
#pragma unroll
        for (int r = 0; r < 4; r++) {
#pragma unroll
            for (int b = 0; b < 4; b++) {
#pragma unroll
                for (int j = 0; j < 4; j++) h[r][b][j] = T::pack(gelu(T::low(h[r][b][j])), gelu(T::high(h[r][b][j])));
            }
        }
        add_lowrank_down(p, f, place, h);
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const int k = place.column0 + 64 * pair;
            if (k >= p.columns) break;
            u32 blocks[2][4][4];
#pragma unroll
            for (int b = 0; b < 2; b++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) blocks[b][r][j] = h[r][2 * pair + b][j];
                }
                smooth_block<FOLLOWING_UNSIGNED>(blocks[b], f.smooth + k + 32 * b + 8 * lane_quarter());
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int row = place.row0 + lane_tile_row(r);
                store_group<FOLLOWING_UNSIGNED>(f.out, row, k, blocks[0][r], blocks[1][r], p.rows);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) column0 = place.column0 + TILE;
        __syncthreads();
    }
}
