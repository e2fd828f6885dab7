// Just enough of CUDA to run our kernels on a CPU: a block's threads are fibers, warps meet at collective instructions.
//
// simulator.py turns each inline PTX statement into a call of the function here that is named after its instruction.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct dim { unsigned x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static dim threadIdx, blockIdx, gridDim, blockDim;

// ---- fibers
struct Barrier { unsigned arrived = 0, generation = 0; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool done = false; };
static std::vector<Fiber> fibers;
static unsigned current = 0;  // fiber: threads of a block, behind those of the blocks before it that run at the same time
static unsigned long long meetings = 0;
static ucontext_t scheduler;
static std::function<void()> body;
static bool misaligned = false;
static Barrier block_barrier, warp_barriers[64];
static uint64_t exchange[64][32][8];  // of a warp's lanes

static void yield_() {
    swapcontext(&fibers[current].context, &scheduler);
}
static void resume(unsigned fiber) {
    current = fiber, threadIdx.x = fiber % blockDim.x;
    swapcontext(&scheduler, &fibers[fiber].context);
}
static void meet(Barrier& barrier, unsigned count) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        barrier.generation++, meetings++;
        return;
    }
    while (barrier.generation == generation) yield_();
}
static void meet_warp() { meet(warp_barriers[current / 32], 32); }
static void __syncthreads() { meet(block_barrier, blockDim.x); }
static void enter() {
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}
static void make_fibers(unsigned count, unsigned stack) {
    fibers.assign(count, {});
    for (auto& barrier : warp_barriers) barrier = {};
    for (auto& fiber : fibers) {
        fiber.stack.resize(stack);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, enter, 0);
    }
}
static int run_blocks(dim grid, unsigned threads, std::function<void()> kernel) {
    body = kernel, gridDim = grid, blockDim = {threads, 1, 1};
    for (unsigned z = 0; z < grid.z; z++) for (unsigned y = 0; y < grid.y; y++) for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        block_barrier = {};
        make_fibers(threads, 256 << 10);
        for (unsigned running = threads, round = 0; running > 0; round++) {
            if (round > 10000000) return 1;
            running = 0;
            for (unsigned i = 0; i < threads; i++) {
                const unsigned t = (round + z + x) % 2 ? threads - 1 - i : i;  // no order to rely on
                if (fibers[t].done) continue;
                resume(t);
                running += !fibers[t].done;
            }
        }
        if (block_barrier.arrived) return 2;
    }
    return misaligned ? 3 : 0;
}

// ---- scalar intrinsics
template <class A, class B> static auto min(A a, B b) -> decltype(a + b) { return decltype(a + b)(a) < decltype(a + b)(b) ? a : b; }
template <class A, class B> static auto max(A a, B b) -> decltype(a + b) { return decltype(a + b)(a) > decltype(a + b)(b) ? a : b; }
template <class V> static V __ldg(const V* p) { return *p; }
static unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
static float __int_as_float(int u) { return __uint_as_float(unsigned(u)); }
static int __float2int_rn(float x) {
    if (x != x) return 0;
    return x >= 2147483648.0f ? INT32_MAX : x <= -2147483648.0f ? INT32_MIN : int(std::nearbyint(x));
}
#define __expf fast_exp  // glibc has a function of that name
static float fast_exp(float x) { return std::exp(x); }
static float __fdividef(float a, float b) { return std::fabs(b) > std::ldexp(1.0f, 126) ? 0.0f * a : a / b; }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static char anchor;
static size_t __cvta_generic_to_shared(const void* p) { return size_t(static_cast<const char*>(p) - &anchor); }
static char* shared(uint32_t address) { return &anchor + int32_t(address); }

template <class V> static V __shfl_xor_sync(unsigned, V value, int mask) {
    auto& mine = exchange[current / 32];
    memcpy(mine[threadIdx.x % 32], &value, sizeof value);
    meet_warp();
    V other;
    memcpy(&other, mine[threadIdx.x % 32 ^ mask], sizeof other);
    meet_warp();
    return other;
}

// ---- 16-bit formats
static uint16_t to_bf16(float x) {
    uint32_t u = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static float from_bf16(uint16_t h) { return __uint_as_float(uint32_t(h) << 16); }
static uint16_t to_fp16(float x) { _Float16 h = x; uint16_t u; memcpy(&u, &h, 2); return u; }
static float from_fp16(uint16_t u) { _Float16 h; memcpy(&h, &u, 2); return h; }
static void cvt_rn_bf16x2_f32(unsigned& d, float high, float low) { d = unsigned(to_bf16(high)) << 16 | to_bf16(low); }
static void cvt_rn_f16x2_f32(unsigned& d, float high, float low) { d = unsigned(to_fp16(high)) << 16 | to_fp16(low); }
static void cvt_f32_f16_l(float& d, unsigned w) { d = from_fp16(uint16_t(w)); }
static void cvt_f32_f16_h(float& d, unsigned w) { d = from_fp16(uint16_t(w >> 16)); }
static unsigned larger(unsigned a, unsigned b, float (*from)(uint16_t)) {
    unsigned out = 0;
    for (int s = 0; s < 32; s += 16) {
        const uint16_t x = uint16_t(a >> s), y = uint16_t(b >> s);
        const float f = from(x), g = from(y);
        out |= unsigned(f != f || g != g ? 0x7fff : f >= g ? x : y) << s;
    }
    return out;
}
static void max_NaN_bf16x2(unsigned& a, unsigned b) { a = larger(a, b, from_bf16); }
static void max_NaN_f16x2(unsigned& a, unsigned b) { a = larger(a, b, from_fp16); }
static void rcp_approx_f32(float& d, float x) { d = std::nextafter(1.0f / x, 0.0f); }  // off by one bit, as it may be

static int saturate(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
static void cvt_pack_sat_s4_s32_b32(unsigned& d, int a, int b, unsigned c) {
    d = c << 8 | (saturate(a, -8, 7) & 15) << 4 | (saturate(b, -8, 7) & 15);
}
static void cvt_pack_sat_u4_s32_b32(unsigned& d, int a, int b, unsigned c) {
    d = c << 8 | saturate(a, 0, 15) << 4 | saturate(b, 0, 15);
}

// ---- copies: finished only when they are waited for, as late as the model allows
struct Copy { char* to; const char* from; };
static std::vector<std::vector<Copy>> groups_of[1024];
static std::vector<Copy> open_of[1024];
static void cp_async_cg_shared_global_L2_128B(unsigned to, const void* from) {
    if (size_t(from) % 16 || size_t(shared(to)) % 16) misaligned = true;
    memset(shared(to), 0xff, 16);  // what is read too early is seen
    open_of[threadIdx.x].push_back({shared(to), static_cast<const char*>(from)});
}
static void cp_async_commit_group() {
    groups_of[threadIdx.x].push_back(open_of[threadIdx.x]);
    open_of[threadIdx.x].clear();
}
static void cp_async_wait_group(unsigned pending) {
    auto& groups = groups_of[threadIdx.x];
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

// ---- matrices, from the PTX ISA's fragments
static void ldmatrix_sync_aligned_m8n8_x4_shared_b16(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned address) {
    auto& mine = exchange[current / 32];
    const unsigned lane = threadIdx.x % 32;
    mine[lane][0] = address;
    meet_warp();
    unsigned* out[4] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; i++) memcpy(out[i], shared(unsigned(mine[8 * i + lane / 4][0])) + 4 * (lane % 4), 4);
    meet_warp();
}
static int nibble(uint64_t word, int i, bool is_unsigned) {
    const int value = int(word >> 4 * i & 15);
    return is_unsigned || value < 8 ? value : value - 16;
}
static void multiply_4bit(int* d[4], const unsigned* a, const unsigned* b, const int* c, bool is_unsigned) {
    auto& mine = exchange[current / 32];
    const unsigned lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) mine[lane][i] = a[i];
    for (int i = 0; i < 2; i++) mine[lane][4 + i] = b[i];
    meet_warp();
    for (int i = 0; i < 4; i++) {
        const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        int sum = c[i];
        for (int k = 0; k < 64; k++) {
            const unsigned quarter = k % 32 / 8, half = k / 32;
            sum += nibble(mine[row % 8 * 4 + quarter][2 * half + row / 8], k % 8, is_unsigned) *
                   nibble(mine[column * 4 + quarter][4 + half], k % 8, false);
        }
        *d[i] = sum;
    }
    meet_warp();
}
#define MMA_4BIT(name, is_unsigned)                                                                                        \
    static void name(int& d0, int& d1, int& d2, int& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,  \
                     unsigned b1, int c) {                                                                                 \
        int* d[4] = {&d0, &d1, &d2, &d3};                                                                                  \
        const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};                                                           \
        const int sums[4] = {c, c, c, c};                                                                                  \
        multiply_4bit(d, a, b, sums, is_unsigned);                                                                         \
    }
MMA_4BIT(mma_sync_aligned_m16n8k64_row_col_s32_s4_s4_s32, false)
MMA_4BIT(mma_sync_aligned_m16n8k64_row_col_s32_u4_s4_s32, true)

static void multiply_16bit(float* d[4], const unsigned* a, const unsigned* b, float (*from)(uint16_t)) {
    auto& mine = exchange[current / 32];
    const unsigned lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) mine[lane][i] = a[i];
    for (int i = 0; i < 2; i++) mine[lane][4 + i] = b[i];
    meet_warp();
    for (int i = 0; i < 4; i++) {
        const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        double sum = *d[i];
        for (int k = 0; k < 16; k++) {
            const unsigned quarter = k % 8 / 2, half = k / 8, shift = 16 * (k % 2);
            sum += double(from(uint16_t(mine[row % 8 * 4 + quarter][2 * half + row / 8] >> shift))) *
                   from(uint16_t(mine[column * 4 + quarter][4 + half] >> shift));
        }
        *d[i] = float(sum);
    }
    meet_warp();
}
#define MMA_16BIT(name, from)                                                                                              \
    static void name(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,       \
                     unsigned b0, unsigned b1) {                                                                           \
        float* d[4] = {&d0, &d1, &d2, &d3};                                                                                \
        const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};                                                           \
        multiply_16bit(d, a, b, from);                                                                                     \
    }
MMA_16BIT(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, from_bf16)
MMA_16BIT(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, from_fp16)
