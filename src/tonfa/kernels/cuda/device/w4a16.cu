// w4a16: 4-bit linears with 16-bit activations for the few rows of the modulations (ops/w4a16.py), one launch for all
// that read the same x.
//
// A warp owns 32 output channels and walks along K in pieces of 128, with the loads of the next pieces under way. A lane
// holds 32 codes of each of four channels as they lie in memory: two codes become the 16-bit numbers of a word by a mask
// (and, in bfloat16, the exponent of 128 put over them), in the order of fragment A of m16n8k16. x lies in shared memory
// in that order. The four lanes of a fragment's row hold two groups of 64 codes; the eight columns of B are therefore
// (row of x, group), zero where a lane's codes are of the other group, and a product gives the sums of both groups apart:
// sum (code * scale + zero) x = scale * sum code x + zero * sum x.
#include "numbers.cuh"

constexpr int WARPS = 4;
constexpr int CHANNELS = 32;  // output channels of a warp
constexpr int PIECE = 128;    // codes of each channel
constexpr int AHEAD = 3;      // pieces under way
constexpr int ROWS = 4;       // of x in fragment B
constexpr int LINEARS = 80;

struct W4A16Linear {
    const unsigned char* qweight;  // (N, K/2)
    const u16* wscales;            // (K/64, N)
    const u16* wzeros;             // (K/64, N)
    const u16* bias;               // (N,)
    int columns;                   // N, a multiple of 4
    int first_block;               // of the grid
    int first_column;              // the sum of N before it
};

struct W4A16 {
    const u16* x;   // (B, K)
    u16* out;       // (B, N) of each linear, one behind the other
    int batch;      // B
    int rows;       // of x to a block, up to ROWS
    int channels;   // K, a multiple of 64
    int count;      // linears
    W4A16Linear linears[LINEARS];
};

// Two codes of a word as 16-bit numbers: (OFFSET + code) / UNIT.
template <class Element> struct Codes;
template <> struct Codes<Bf16> {
    static constexpr u32 EXPONENT = 0x43004300u;
    static constexpr float OFFSET = 128.0f, UNIT = 1.0f;
};
template <> struct Codes<Fp16> {  // subnormal
    static constexpr u32 EXPONENT = 0;
    static constexpr float OFFSET = 0.0f, UNIT = 16777216.0f;
};
using C = Codes<T>;

__device__ inline u32 pair(u32 word, int i) { return (word >> (4 * i) & 0x000f000fu) | C::EXPONENT; }

__device__ inline u32 word_of(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

struct Piece {
    uint4 codes[4];
    uint2 scales[2], zeros[2];  // of two groups
};

// What a lane reads of a linear: four channels, its 32 codes of each piece.
struct Source {
    const unsigned char* codes;
    const char *scales, *zeros;
    int stride, columns, channels;

    __device__ Source(const W4A16Linear& linear, int n, int k)
        : codes(linear.qweight + static_cast<size_t>(n) * k / 2),
          scales(reinterpret_cast<const char*>(linear.wscales + n)),
          zeros(reinterpret_cast<const char*>(linear.wzeros + n)),
          stride(k / 2),
          columns(linear.columns),
          channels(k) {}

    // Behind the end of K the last codes and scales come again; x is zero there.
    __device__ void read(Piece& piece, int at) const {
        const unsigned char* from = codes + min(at * PIECE + 32 * lane_quarter(), channels - 32) / 2;
#pragma unroll
        for (int c = 0; c < 4; c++) piece.codes[c] = __ldg(reinterpret_cast<const uint4*>(from + c * stride));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const long long group = 2ll * columns * min(2 * at + h, channels / 64 - 1);
            piece.scales[h] = __ldg(reinterpret_cast<const uint2*>(scales + group));
            piece.zeros[h] = __ldg(reinterpret_cast<const uint2*>(zeros + group));
        }
    }
};

// Rows of x in the order of fragment B, and the sums of their groups. Every eight values 0..7 become 0 4, 1 5, 2 6, 3 7.
__device__ inline void arrange(const W4A16& p, int first, int rows, int eights, uint4* inputs, float* totals) {
    for (int base = threadIdx.x / 32 * 32; base < rows * eights; base += 32 * WARPS) {
        const int i = base + threadIdx.x % 32, row = i / eights, at = i % eights;
        const bool there = row < rows && 8 * at < p.channels;
        const uint4 v = load8(p.x + static_cast<size_t>(first + row) * p.channels + 8 * at, there);
        float total = T::low(v.x) + T::high(v.x) + T::low(v.y) + T::high(v.y) + T::low(v.z) + T::high(v.z) +
                      T::low(v.w) + T::high(v.w);
        for (int distance = 1; distance < 8; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
        if (row >= rows) continue;
        inputs[i] = make_uint4((v.x & 0xffffu) | v.z << 16, v.x >> 16 | (v.z & 0xffff0000u),
                               (v.y & 0xffffu) | v.w << 16, v.y >> 16 | (v.w & 0xffff0000u));
        if (at % 8 == 0) totals[at / 8 * ROWS + row] = total;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) w4a16(const __grid_constant__ W4A16 p) {
    extern __shared__ __align__(16) char shared_memory[];
    const int pieces = (p.channels + PIECE - 1) / PIECE, eights = pieces * (PIECE / 8);
    float* totals = reinterpret_cast<float*>(shared_memory);                   // (groups, ROWS)
    uint4* zeros = reinterpret_cast<uint4*>(totals + pieces * (PIECE / 64) * ROWS);  // four
    uint4* inputs = zeros + 4;                                                       // (rows, eights)

    const int block = blockIdx.x;
    int index = 0;
    for (int step = 64; step > 0; step /= 2) {
        if (index + step < p.count && p.linears[index + step].first_block <= block) index += step;
    }
    const W4A16Linear& linear = p.linears[index];
    const int warp_n = ((block - linear.first_block) * WARPS + threadIdx.x / 32) * CHANNELS;
    const int n = warp_n + 4 * lane_row();
    const Source weights(linear, min(n, linear.columns - 4), p.channels);

    Piece ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) weights.read(ahead[i], i);

    const int first = blockIdx.y * p.rows, rows = min(p.rows, p.batch - first);
    arrange(p, first, rows, eights, inputs, totals);
    if (threadIdx.x < 4) zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    if (warp_n >= linear.columns) return;

    const int quarter = lane_quarter(), row = lane_row() / 2;  // of fragment B's column
    const bool active = row < rows && lane_row() % 2 == quarter / 2;
    const uint4* values = active ? inputs + row * eights + 4 * quarter : zeros;
    const int step = active ? PIECE / 8 : 0;
    float sums[4] = {};
    for (int start = 0; start < pieces; start += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = start + i;
            if (at >= pieces) break;
            Piece& piece = ahead[i];
            float products[2][4] = {};  // of channels n, n + 1 and of n + 2, n + 3
#pragma unroll
            for (int word = 0; word < 4; word++) {
                const uint4 b = values[word];
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    const u32 low = word_of(piece.codes[2 * t], word), high = word_of(piece.codes[2 * t + 1], word);
                    T::multiply(products[t], pair(low, 0), pair(high, 0), pair(low, 1), pair(high, 1), b.x, b.y);
                    T::multiply(products[t], pair(low, 2), pair(high, 2), pair(low, 3), pair(high, 3), b.z, b.w);
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint2 s = piece.scales[h], z = piece.zeros[h];
                const float total = totals[(2 * at + h) * ROWS + quarter];
                const float scale[4] = {T::low(s.x), T::high(s.x), T::low(s.y), T::high(s.y)};
                const float zero[4] = {T::low(z.x), T::high(z.x), T::low(z.y), T::high(z.y)};
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const float rest = fmaf(-C::OFFSET, scale[c], zero[c]);
                    sums[c] = fmaf(C::UNIT * scale[c], products[c / 2][c % 2 * 2 + h], fmaf(rest, total, sums[c]));
                }
            }
            values += step;
            if (at + AHEAD < pieces) weights.read(piece, at + AHEAD);
        }
    }
    if (quarter >= rows || n >= linear.columns) return;
    const uint2 bias = __ldg(reinterpret_cast<const uint2*>(linear.bias + n));
    const size_t place = static_cast<size_t>(linear.first_column) * p.batch +
                         static_cast<size_t>(first + quarter) * linear.columns + n;
    *reinterpret_cast<uint2*>(p.out + place) = make_uint2(T::pack(sums[0] + T::low(bias.x), sums[1] + T::high(bias.x)),
                                                          T::pack(sums[2] + T::low(bias.y), sums[3] + T::high(bias.y)));
}
