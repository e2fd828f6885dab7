// One pass over an input: 4-bit codes, scales and the low-rank down-projection of 32 rows a block.
//
// The eight warps take groups of 64 channels in turn, so each x is read once from DRAM, as 16-byte words; the words are
// the A operands of the down-projection as they are. `proj_down` is read transposed, (R, K), for 16-byte words too; which
// of a lane's words are called which k of the mma does not matter as long as both operands agree. The warps' partial
// sums are added in the order of the warps: the result does not depend on timing.
#pragma once
#include "int4.cuh"

constexpr int WARPS = 8;
constexpr int ROWS = 32;                    // of a block
constexpr int LANE_ROWS = ROWS / 8;         // of a lane: lane_row() + 8 r
constexpr int RANK_TILES = RANK_CHUNK / 8;  // columns of lowrank that a block computes
constexpr int BLOCKS = RANK_CHUNK > 32 ? 1 : 2;  // on an SM: what the registers allow without spills

struct Quantize {
    const float2* smooth;   // (K,): factor and its reciprocal
    const u16* proj_down;   // (R rounded up to RANK_CHUNK, K)
    float* lowrank;         // (M, R)
    CodeOutput out;
    int rows;               // M
    int rank;               // R
};

// `source(row, k)` gives eight channels from k of a row, zeros if the row is past the end.
template <class Source>
__device__ inline void quantize_rows(const Quantize& p, const Source& source) {
    __shared__ float sums[ROWS][RANK_CHUNK];
    const int warp = threadIdx.x / 32, channels = p.out.channels;
    const int row0 = blockIdx.x * ROWS + lane_row(), rank0 = blockIdx.y * RANK_CHUNK;
    const u16* down = p.proj_down + static_cast<size_t>(rank0 + lane_row()) * channels;
    float acc[LANE_ROWS / 2][RANK_TILES][4] = {};

    for (int k0 = warp * 64; k0 < channels; k0 += WARPS * 64) {
        u32 x[2][LANE_ROWS][4];
#pragma unroll
        for (int block = 0; block < 2; block++) {
#pragma unroll
            for (int r = 0; r < LANE_ROWS; r++) {
                const uint4 words = source(row0 + 8 * r, k0 + 32 * block + 8 * lane_quarter());
                x[block][r][0] = words.x, x[block][r][1] = words.y, x[block][r][2] = words.z, x[block][r][3] = words.w;
            }
        }
#pragma unroll
        for (int block = 0; block < 2; block++) {
            const int k = k0 + 32 * block + 8 * lane_quarter();
#pragma unroll
            for (int t = 0; t < RANK_TILES; t++) {
                const uint4 b = load8(down + static_cast<size_t>(t) * 8 * channels + k, true);
#pragma unroll
                for (int m = 0; m < LANE_ROWS / 2; m++) {
                    const u32(&upper)[4] = x[block][2 * m];
                    const u32(&lower)[4] = x[block][2 * m + 1];
                    T::multiply(acc[m][t], upper[0], lower[0], upper[1], lower[1], b.x, b.y);
                    T::multiply(acc[m][t], upper[2], lower[2], upper[3], lower[3], b.z, b.w);
                }
            }
        }
        if (blockIdx.y > 0) continue;  // another chunk of the rank: the first one writes the codes
        smooth_block<UNSIGNED>(x[0], p.smooth + k0 + 8 * lane_quarter());
        smooth_block<UNSIGNED>(x[1], p.smooth + k0 + 32 + 8 * lane_quarter());
#pragma unroll
        for (int r = 0; r < LANE_ROWS; r++) {
            const int row = row0 + 8 * r;
            store_group<UNSIGNED>(p.out, row, k0, x[0][r], x[1][r], p.rows);
        }
    }

    for (int turn = 0; turn < WARPS; turn++) {
        if (warp == turn) {
#pragma unroll
            for (int m = 0; m < LANE_ROWS / 2; m++) {
#pragma unroll
                for (int t = 0; t < RANK_TILES; t++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float& sum = sums[16 * m + 8 * (i / 2) + lane_row()][8 * t + 2 * lane_quarter() + i % 2];
                        sum = turn == 0 ? acc[m][t][i] : sum + acc[m][t][i];
                    }
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < ROWS * RANK_CHUNK; i += blockDim.x) {
        const int row = blockIdx.x * ROWS + i / RANK_CHUNK, column = rank0 + i % RANK_CHUNK;
        if (row < p.rows && column < p.rank) p.lowrank[static_cast<size_t>(row) * p.rank + column] = (&sums[0][0])[i];
    }
}
