// Product of an SVDQuant linear on Hopper: FP8 activations, 4-bit weights expanded to FP8 before, low-rank branch in the
// same accumulators. Written for NVRTC: no headers but ours. TOKENS, STAGES, THREADS, CLUSTER, EPILOGUE and FP16
// are defined by the caller, with GELU_QUANTIZE DOWN_RANK too; the wgmma wrappers stand above this text.
//
// y[m, n] = x_scale[m] * w_scale[n] * (sum_k x[m, k] w[n, k] + sum_r lora[m, r] up[n, r]) + bias[n]
//
// The channels are the M of wgmma; a tile is 128 channels (64 for each of two warpgroups) x TOKENS. The two multiply and
// leave the finished tile in shared memory; one thread loads (TMA), and the warps beside it take the finished tile from
// there while the next one is multiplied.
//
// In a cluster two blocks take adjacent channels of the same tokens. Each loads half of the tokens for both, so that L2
// gives each of their bytes once for 256 channels, and the weights of its own.
#include "asynchronous.cuh"
#include "numbers.cuh"
#include "product.cuh"
#include "epilogue.cuh"
#ifdef DOWN_RANK
#include "gelu_quantize.cuh"
#endif

struct Ring {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// Steps of a tile: the branch, 64 ranks each, then the channels, 128 each.
struct Steps {
  int first_chunk, rank_chunks, k_steps;
  __device__ __forceinline__ Steps(const Product& a)
      : first_chunk(a.rank_start / 64), rank_chunks(a.rank ? (a.rank_start + a.rank + 63) / 64 - a.rank_start / 64 : 0),
        k_steps((a.k + 127) / 128) {}
};

// A stage is filled by all blocks of the cluster, and can be filled again once it was read in all of them.
__device__ __forceinline__ void release(uint32_t empty, int lane) {
  if (CLUSTER > 1) {
    if (lane < CLUSTER) barrier_arrive_at(empty, lane);
  } else if (lane == 0) {
    barrier_arrive(empty);
  }
}

// What one of the cluster's blocks brings of `bytes` bytes of all tokens, to each of them: of 8 tokens' scales, the least,
// 16 bytes.
__device__ __forceinline__ void load_part(uint32_t to, const void* from, int bytes, uint32_t bar) {
  const int part = bytes / CLUSTER, first = rank_in_cluster() * part;
  if (CLUSTER > 1)
    load_multicast(to + first, (const uint8_t*)from + first, part, bar, (1 << CLUSTER) - 1);
  else
    load_bulk(to, from, bytes, bar);
}

__device__ __forceinline__ void produce(const Product& a, const Shared& shared) {
  const Steps steps(a);
  Ring ring;
  for (Tiles tile(a); tile.valid(); tile.next()) {
    const int m0 = tile.m0(), n0 = tile.n0(), x_bytes = min(TOKENS, a.m_pad - m0) * 128, w_bytes = min(CHANNELS, a.n - n0) * 128;
    for (int i = -steps.rank_chunks; i < steps.k_steps; ++i, ring.next()) {
      const uint32_t to = shared.stage(ring.stage), bar = shared.full(ring.stage);
      barrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      if (i < 0) {
        barrier_expect(bar, x_bytes);
        load_part(to, a.lora + ((size_t)(steps.first_chunk + i + steps.rank_chunks) * a.m_pad + m0) * 128, x_bytes, bar);
        continue;
      }
      const int scale_bytes = i + 1 == steps.k_steps ? x_bytes / 32 : 0;
      barrier_expect(bar, x_bytes + w_bytes + scale_bytes);
      load_part(to, a.x + ((size_t)i * a.m_pad + m0) * 128, x_bytes, bar);
      load_bulk(to + X_BYTES, a.w + ((size_t)i * a.n + n0) * 128, w_bytes, bar);
      if (scale_bytes) load_part(to + X_BYTES + W_BYTES, a.x_scale + m0, scale_bytes, bar);
    }
  }
  // A block's memory is its own no longer once all its threads have returned: stay until the others have read all that
  // they were sent, and have arrived here for the last time.
  if (CLUSTER > 1)
    for (int i = 0; i < STAGES; ++i, ring.next()) barrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
}

__device__ __forceinline__ void multiply(const Product& a, const Shared& shared) {
  const Steps steps(a);
  const int t = threadIdx.x - 128, half = t / 128, warp4 = t / 32 % 4, lane = t % 32, row = lane / 4, quad = lane % 4;
  Ring ring;
  float d[TOKENS / 2];
  uint32_t branch[8];
  int taken = 1;  // parity of the finished tile's barrier
#if DOWN_RANK
  DownProject down(a, shared);
  down.load(Tiles(a));
#endif

  // Steps of 16 ranks of a chunk of 64 that are this linear's, and the fragments of two of them.
  auto begin_of = [&](int chunk) { return max(0, (a.rank_start - (steps.first_chunk + chunk) * 64) / 16); };
  auto end_of = [&](int chunk) { return min(4, (a.rank_start + a.rank - (steps.first_chunk + chunk) * 64) / 16); };
  auto read_branch = [&](int n0, int chunk, int j) {
    const int start = (steps.first_chunk + chunk) * 64 - a.rank_start;
    const uint4* up = a.up + ((size_t)(n0 / CHANNELS) * (a.rank / 16) + start / 16 + j) * 256 + t;
    const uint4 v0 = __ldg(up), v1 = j + 1 < end_of(chunk) ? __ldg(up + 256) : make_uint4(0, 0, 0, 0);  // zeros add nothing
    branch[0] = v0.x, branch[1] = v0.y, branch[2] = v0.z, branch[3] = v0.w;
    branch[4] = v1.x, branch[5] = v1.y, branch[6] = v1.z, branch[7] = v1.w;
  };
  Tiles tile(a);
  if (tile.valid() && steps.rank_chunks) read_branch(tile.n0(), 0, begin_of(0));

  while (tile.valid()) {
    const int n0 = tile.n0(), c0 = n0 + half * 64 + warp4 * 16 + row, c1 = c0 + 8;
    const float ws0 = c0 < a.n ? __ldg(a.w_scale + c0) : 0.f, ws1 = c1 < a.n ? __ldg(a.w_scale + c1) : 0.f;
    const float b0 = c0 < a.n ? __ldg(a.bias + c0) : 0.f, b1 = c1 < a.n ? __ldg(a.bias + c1) : 0.f;
    int accumulate = 0;
    uint32_t pending = 0;  // barrier of the stage that the step before has read
    for (int i = 0; i < steps.rank_chunks; ++i, ring.next()) {
      const uint32_t stage = shared.stage(ring.stage);
      const int begin = begin_of(i), end = end_of(i);
      for (int j = begin; j < end; j += 2) {
        if (i > 0 || j > begin) read_branch(n0, i, j);
        if (j == begin) barrier_wait(shared.full(ring.stage), ring.phase);
        wgmma_fence();
        wgmma_bf16(d, branch, descriptor(stage + 32 * j), accumulate);
        wgmma_bf16(d, branch + 4, descriptor(stage + 32 * (j + 1 < end ? j + 1 : j)), 1);
        wgmma_commit();
        wgmma_wait<0>();  // fragments that change behind a product that is under way make the assembler serialize all
        accumulate = 1;
      }
      release(shared.empty(ring.stage), lane);
    }
    for (int i = 0; i < steps.k_steps; ++i, ring.next()) {
      const uint32_t stage = shared.stage(ring.stage), w = stage + X_BYTES + half * 64 * 128;
      barrier_wait(shared.full(ring.stage), ring.phase);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_fp8(d, descriptor(w + 32 * j), descriptor(stage + 32 * j), accumulate);
        accumulate = 1;
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (pending) release(pending, lane);
      pending = shared.empty(ring.stage);
    }
    wgmma_wait<0>();

    const uint32_t scales = shared.stage((ring.stage + STAGES - 1) % STAGES) + X_BYTES + W_BYTES + 8 * quad;
    const uint32_t staged = shared.staged() + half * HALF_BYTES;
    auto read_scales = [&](int j) { return load_shared_pair(scales + 32 * j); };
    barrier_wait(shared.taken(), taken);
    taken ^= 1;
#if DOWN_RANK
    down.run(tile);
    down.remember(tile);
#endif
    tile.next();
    if (tile.valid() && steps.rank_chunks) read_branch(tile.n0(), 0, begin_of(0));
    float2 next0 = read_scales(0), next1 = read_scales(1);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j += 2) {
      const float2 s0 = next0, s1 = next1;
      if (j + 2 < TOKENS / 8) next0 = read_scales(j + 2), next1 = read_scales(j + 3);
      const float* const y = d + 4 * j;
      const uint32_t v0 = pack(fmaf(y[0] * s0.x, ws0, b0), fmaf(y[1] * s0.y, ws0, b0));
      const uint32_t v1 = pack(fmaf(y[2] * s0.x, ws1, b1), fmaf(y[3] * s0.y, ws1, b1));
      const uint32_t v2 = pack(fmaf(y[4] * s1.x, ws0, b0), fmaf(y[5] * s1.y, ws0, b0));
      const uint32_t v3 = pack(fmaf(y[6] * s1.x, ws1, b1), fmaf(y[7] * s1.y, ws1, b1));
      const int matrix = lane / 8, token = 8 * (j + matrix / 2) + lane % 8, chunk = warp4 * 2 + matrix % 2;
      store_transposed(staged + token * 128 + ((chunk ^ (token & 7)) * 16), v0, v1, v2, v3);
    }
    __syncwarp();
    release(pending, lane);  // the last stage holds the scales
    if (lane == 0) barrier_arrive(shared.finished());
  }
#if DOWN_RANK
  barrier_wait(shared.taken(), taken);
  down.run(tile);
#endif
}

__device__ __forceinline__ void finish(const Product& a, const Shared& shared) {
#ifdef DOWN_RANK
  const GeluQuantize epilogue(a, shared);
#else
  const Epilogue epilogue(a, shared.staged());
#endif
  int phase = 0;
  for (Tiles tile(a); tile.valid(); tile.next(), phase ^= 1) {
    epilogue.prepare(tile);
    barrier_wait(shared.finished(), phase);
    epilogue.tile(tile, phase);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared.taken());
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Product a) {
  extern __shared__ uint8_t raw[];
  const Shared shared{(shared_address(raw) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared.full(i), 1);
      barrier_init(shared.empty(i), 8 * CLUSTER);
    }
    barrier_init(shared.finished(), 8);
    barrier_init(shared.taken(), FINISHERS);
    barrier_init(shared.inverse_full(), 1);
    barrier_init(shared.down_full(), 1);
    barriers_ready();
  }
  if (CLUSTER > 1)
    sync_cluster();
  else
    __syncthreads();
  earlier_kernels_done();
  next_kernel_may_start();
  // 64 K registers: the sums of a tile of more than 192 tokens leave room for three finishers, else for seven.
  constexpr bool FEW = THREADS == 384;
  if (threadIdx.x >= 128 && threadIdx.x < 384) {
    more_registers<FEW ? 200 : 168>();
    multiply(a, shared);
    return;
  }
  fewer_registers<FEW ? 104 : 88>();
  if (threadIdx.x >= 32)
    finish(a, shared);
  else if (threadIdx.x == 0)
    produce(a, shared);
}
