// The 4-bit product of a tile of 128 rows and 128 output channels, with low-rank up-projection and bias.
//
// Four warps of 32 rows each. A step is one group of 64 channels: 4 KB of each operand and the group's scales come
// through cp.async into one of STAGES buffers, straight from the canonical row-major layouts. Each warp reads its rows
// and all weights by ldmatrix and multiplies 2 x 16 tiles of m16n8k64. 42.5 KB of shared memory and at most 255
// registers let two blocks run on an SM.
//
// Integers become floats for free: the mma starts from the bits of 1.5 * 2^23, so its integer result, read as a float,
// is 1.5 * 2^23 + p. Then p * ascale = fma(result, ascale, -1.5 * 2^23 * ascale) is exact (13 + 11 bits), and a second
// fma multiplies by the weight's scale and adds: two instructions and one rounding for each output and group. The price:
// 1.5 * 2^23 * ascale must be finite, so an input of 1e32 and more, which only bfloat16 can hold, gives NaN.
//
// The order of output channels inside a tile is ours to choose, by the order in which weight rows are put into shared
// memory. It is chosen so that a lane owns eight neighbors in every 32 channels: channel 32 b + 8 q + 2 j + e is element
// e of lane quarter q in tile 4 b + j. So scales, biases and outputs are 16-byte words, pairs of RoPE are in one lane,
// and codes for the next layer are whole words.
#pragma once
#include "int4.cuh"

constexpr int TILE = 128;  // rows and output channels of a block
constexpr int STAGES = 5;
constexpr int THREADS = 128;
constexpr float MAGIC = 12582912.0f;
constexpr s32 MAGIC_BITS = 0x4b400000;

struct Product {
    const unsigned char* codes;    // (M, K/2)
    const u16* scales;             // (K/64, scale_stride)
    const float* lowrank;          // (M, lowrank_stride), R columns
    const unsigned char* qweight;  // (N, K/2)
    const u16* wscales;            // (K/64, N)
    const u16* proj_up;            // (N, R)
    const u16* bias;               // (N,)
    int rows;                      // M
    int columns;                   // N, a multiple of 8
    int channels;                  // K, a multiple of 64
    int rank;                      // R, a multiple of 16
    int scale_stride;              // a multiple of 8
    int lowrank_stride;            // a multiple of 4
};

struct Stage {
    unsigned char x[TILE * 32];
    unsigned char w[TILE * 32];
    u16 scales[TILE];
    u16 wscales[TILE];
};
constexpr u32 offsetof_x = 0, offsetof_w = TILE * 32, offsetof_scales = 2 * offsetof_w,
              offsetof_wscales = offsetof_scales + 2 * TILE;

struct Place {
    int row0, column0;  // of the block
};

// Which tile a block computes. Blocks are started with x running fastest, then y, then z: x counts tiles along M inside a
// band, y tiles along N, z bands, so that blocks that run together share their operands in L2.
__device__ inline Place place_of_block() {
    return {static_cast<int>(blockIdx.z * gridDim.x + blockIdx.x) * TILE, static_cast<int>(blockIdx.y) * TILE};
}

// The output channel, relative to the tile, whose weights lie in row `slot` of shared memory.
__device__ inline int channel_of_slot(int slot) {
    return slot / 32 * 32 + slot % 8 / 2 * 8 + slot % 32 / 8 * 2 + slot % 2;
}

// Bytes from the start of an operand: rows of 32 bytes, the halves swapped in every other four rows, so that the eight
// 16-byte words of an ldmatrix lie in different banks.
__device__ inline int operand_offset(int row, int half) { return row * 32 + (half ^ (row / 4 % 2)) * 16; }

__device__ inline void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void load_matrices(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// d (16, 8) = MAGIC_BITS + a (16, 64) b (64, 8)
template <bool Unsigned>
__device__ inline void multiply_codes(s32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (Unsigned) {
        asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(MAGIC_BITS));
    } else {
        asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(MAGIC_BITS));
    }
}

// A lane's share of the tile: rows `row(m, i)`, and in tile 4 b + j the channels 32 b + 8 q + 2 j and the next.
using Sums = float[2][16][4];

// sums += the products of one group.
template <bool Unsigned>
__device__ inline void accumulate(const Stage& stage, Sums& sums) {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 32;
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(&stage));
    const u32 x_address = address + offsetof_x + warp_row * 32 + operand_offset(lane % 16, lane / 16);
    const u32 w_address = address + offsetof_w + operand_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    u32 x[2][4];
    float scale[2][2], offset[2][2];
#pragma unroll
    for (int m = 0; m < 2; m++) {
        load_matrices(x[m], x_address + m * 16 * 32);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            scale[m][i] = T::low(stage.scales[warp_row + lane_row() + 16 * m + 8 * i]);
            offset[m][i] = -MAGIC * scale[m][i];
        }
    }
#pragma unroll
    for (int b = 0; b < 4; b++) {
        const uint4 words = *reinterpret_cast<const uint4*>(stage.wscales + 8 * lane_quarter() + 32 * b);
        const u32 wscales[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            u32 w[4];  // both halves of K of tile 4 b + 2 pair, then of the next
            load_matrices(w, w_address + (2 * b + pair) * 16 * 32);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const int j = 2 * pair + t;
                const float low = T::low(wscales[j]), high = T::high(wscales[j]);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    s32 p[4];
                    multiply_codes<Unsigned>(p, x[m], w[2 * t], w[2 * t + 1]);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float scaled = fmaf(__int_as_float(p[i]), scale[m][i / 2], offset[m][i / 2]);
                        sums[m][4 * b + j][i] = fmaf(scaled, i % 2 ? high : low, sums[m][4 * b + j][i]);
                    }
                }
            }
        }
    }
}

// A thread's part in copying the operands of one group after the other: 16 bytes in rows `slot` and `slot + 64` of each,
// and the first 32 threads eight scales each. Rows and channels past the end are replaced by the last ones: what is
// computed of them is not stored.
struct Copies {
    u32 x, x64, w, w64;  // bytes from the start of each operand
    const unsigned char* scales;
    u32 offset, scales_offset;  // in a stage
    u32 scales_step;            // bytes

    __device__ Copies(const Product& p, Place place) {
        const int slot = threadIdx.x / 2, half = threadIdx.x % 2, first = threadIdx.x % 16 * 8;
        const u32 bytes = p.channels / 2;
        const int row = place.row0 + slot, column = place.column0 + channel_of_slot(slot);
        x = min(row, p.rows - 1) * bytes + half * 16;
        x64 = min(row + 64, p.rows - 1) * bytes + half * 16;
        w = min(column, p.columns - 1) * bytes + half * 16;
        w64 = min(column + 64, p.columns - 1) * bytes + half * 16;
        offset = operand_offset(slot, half);
        const bool of_x = threadIdx.x < 16;
        const u16* from = of_x ? p.scales + min(place.row0 + first, p.scale_stride - 8)
                               : p.wscales + min(place.column0 + first, p.columns - 8);
        scales = reinterpret_cast<const unsigned char*>(from);
        scales_step = 2 * (of_x ? p.scale_stride : p.columns);
        scales_offset = (of_x ? offsetof_scales : offsetof_wscales) + 2 * first;
    }

    __device__ void next(const Product& p, Stage& stage) {
        const u32 address = static_cast<u32>(__cvta_generic_to_shared(&stage));
        copy16(address + offsetof_x + offset, p.codes + x);
        copy16(address + offsetof_x + offset + 64 * 32, p.codes + x64);
        copy16(address + offsetof_w + offset, p.qweight + w);
        copy16(address + offsetof_w + offset + 64 * 32, p.qweight + w64);
        if (threadIdx.x < 32) copy16(address + scales_offset, scales);
        x += 32, x64 += 32, w += 32, w64 += 32, scales += scales_step;
    }
};

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Rows of a lane, r = 2 m + i: relative to the block.
__device__ inline int lane_tile_row(int r) { return threadIdx.x / 32 * 32 + 8 * r + lane_row(); }

// sums += bias. It comes before the low-rank part because the compiler holds the words of both otherwise, and spills.
__device__ inline void add_bias(const Product& p, Place place, Sums& sums) {
#pragma unroll
    for (int b = 0; b < 4; b++) {
        const int column = place.column0 + 32 * b + 8 * lane_quarter();
        const uint4 words = load8(p.bias + column, column < p.columns);
        const u32 bias[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float low = T::low(bias[j]), high = T::high(bias[j]);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                sums[r / 2][4 * b + j][r % 2 * 2] += low;
                sums[r / 2][4 * b + j][r % 2 * 2 + 1] += high;
            }
        }
    }
}

// sums += lowrank proj_up^T, lowrank rounded to 16 bits as the published kernels do. Within 16 ranks a lane takes four
// neighbors of both operands for its two k pairs.
__device__ inline void add_lowrank(const Product& p, Place place, Sums& sums) {
    const int column = place.column0 + channel_of_slot(lane_row());
    for (int rank = 4 * lane_quarter(); rank < p.rank; rank += 16) {
        u32 a[4][2];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = place.row0 + lane_tile_row(r);
            float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (row < p.rows) {
                values = *reinterpret_cast<const float4*>(p.lowrank + static_cast<size_t>(row) * p.lowrank_stride + rank);
            }
            a[r][0] = T::pack(values.x, values.y);
            a[r][1] = T::pack(values.z, values.w);
        }
#pragma unroll
        for (int t = 0; t < 16; t++) {
            const int n = column + t / 4 * 32 + t % 4 * 2;
            uint2 up = make_uint2(0, 0);
            if (n < p.columns) up = __ldg(reinterpret_cast<const uint2*>(p.proj_up + static_cast<size_t>(n) * p.rank + rank));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                T::multiply(sums[m][t], a[2 * m][0], a[2 * m + 1][0], a[2 * m][1], a[2 * m + 1][1], up.x, up.y);
            }
        }
    }
}

// A lane's outputs in 16 bits: y[r][b][j], r of `lane_tile_row`, channels 32 b + 8 q + 2 j and the next in a word.
using Tile = u32[4][4][4];

// All threads of the block must have met since the tile before.
template <bool Unsigned>
__device__ inline void compute_tile(const Product& p, Place place, Tile& y) {
    __shared__ __align__(128) Stage stages[STAGES];
    const int groups = p.channels / 64;
    Sums sums = {};

    Copies copies(p, place);
    for (int group = 0; group < STAGES - 1; group++) {
        if (group < groups) copies.next(p, stages[group]);
        commit();
    }
    int read = 0, written = STAGES - 1;
    for (int group = 0; group < groups; group++) {
        wait<STAGES - 2>();
        __syncthreads();
        if (group + STAGES - 1 < groups) copies.next(p, stages[written]);
        commit();
        accumulate<Unsigned>(stages[read], sums);
        read = read == STAGES - 1 ? 0 : read + 1;
        written = written == STAGES - 1 ? 0 : written + 1;
    }
    add_bias(p, place, sums);
    add_lowrank(p, place, sums);
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int b = 0; b < 4; b++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float(&sum)[4] = sums[r / 2][4 * b + j];
                y[r][b][j] = T::pack(sum[r % 2 * 2], sum[r % 2 * 2 + 1]);
            }
        }
    }
}

// Call `store(line, column, words)` for each eight outputs of this lane that exist, with `line = line_of(row)`.
template <class LineOf, class Store>
__device__ inline void for_outputs(const Product& p, Place place, const Tile& y, const LineOf& line_of,
                                   const Store& store) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int row = place.row0 + lane_tile_row(r);
        if (row >= p.rows) return;
        const auto line = line_of(row);
#pragma unroll
        for (int b = 0; b < 4; b++) {
            const int column = place.column0 + 32 * b + 8 * lane_quarter();
            if (column >= p.columns) break;
            store(line, column, make_uint4(y[r][b][0], y[r][b][1], y[r][b][2], y[r][b][3]));
        }
    }
}

__device__ inline void store8(u16* to, uint4 words) { *reinterpret_cast<uint4*>(to) = words; }
