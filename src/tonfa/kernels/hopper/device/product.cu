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

template <int N>
struct Ring {
  int at = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++at == N) at = 0, phase ^= 1;
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
  Ring<STAGES> ring;
  Ring<SCALE_SLOTS> scales;
  for (Tiles tile(a); tile.valid(); tile.next(), scales.next()) {
    const int m0 = tile.m0(), n0 = tile.n0(), x_bytes = min(TOKENS, a.m_pad - m0) * 128, w_bytes = min(CHANNELS, a.n - n0) * 128;
    for (int i = -steps.rank_chunks; i < steps.k_steps; ++i, ring.next()) {
      const uint32_t to = shared.stage(ring.at), bar = shared.full(ring.at);
      const int scale_bytes = i == -steps.rank_chunks ? x_bytes / 32 : 0;
      barrier_wait(shared.empty(ring.at), ring.phase ^ 1);
      barrier_expect(bar, x_bytes + scale_bytes + (i < 0 ? 0 : w_bytes));
      if (scale_bytes) load_part(shared.scales(scales.at), a.x_scale + m0, scale_bytes, bar);
      if (i < 0) {
        load_part(to, a.lora + ((size_t)(steps.first_chunk + i + steps.rank_chunks) * a.m_pad + m0) * 128, x_bytes, bar);
      } else {
        load_part(to, a.x + ((size_t)i * a.m_pad + m0) * 128, x_bytes, bar);
        const uint8_t* w = a.w + ((size_t)i * a.n + n0) * 128;
        if (a.w_stays)
          load_bulk(to + X_BYTES, w, w_bytes, bar);
        else
          load_bulk_kept(to + X_BYTES, w, w_bytes, bar);
      }
    }
  }
  // A block's memory is its own no longer once all its threads have returned: stay until the others have read all that
  // they were sent, and have arrived here for the last time.
  if (CLUSTER > 1)
    for (int i = 0; i < STAGES; ++i, ring.next()) barrier_wait(shared.empty(ring.at), ring.phase ^ 1);
}

// Factors and bias of a thread's two channels.
struct PerChannel {
  float scale[2], bias[2];
  __device__ __forceinline__ void read(const Product& a, int channel) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = channel + 8 * h;
      scale[h] = c < a.n ? __ldg(a.w_scale + c) : 0.f, bias[h] = c < a.n ? __ldg(a.bias + c) : 0.f;
    }
  }
};

__device__ __forceinline__ void multiply(const Product& a, const Shared& shared) {
  const Steps steps(a);
  const int t = threadIdx.x - 128, half = t / 128, warp4 = t / 32 % 4, lane = t % 32, row = lane / 4, quad = lane % 4;
  const uint32_t staged = shared.staged() + half * HALF_BYTES;
  Ring<STAGES> ring;
  Ring<SCALE_SLOTS> scale_slot;
  float d[TOKENS / 2];
  uint32_t branch[8];
  int accumulate, taken = 1;  // parity of the finished tile's barrier
  uint32_t pending;           // barrier of the stage that the products under way read
#if DOWN_RANK
  DownProject down(a, shared);
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
  // What a tile needs in registers before its first step.
  PerChannel channel;
  auto prepare = [&](const Tiles& tile, PerChannel& channel) {
    if (!tile.valid()) return;
    if (steps.rank_chunks) read_branch(tile.n0(), 0, begin_of(0));
    channel.read(a, tile.n0() + half * 64 + warp4 * 16 + row);
  };
  // Leaves the last products under way. Fragments must not change behind any that are, nor may a loop begin behind them:
  // the assembler would serialize all.
  auto multiply_branch = [&](int n0) {
    for (int i = 0, j = begin_of(0); i < steps.rank_chunks;) {
      const uint32_t stage = shared.stage(ring.at);
      const int end = end_of(i);
      barrier_wait(shared.full(ring.at), ring.phase);
      wgmma_fence();
      wgmma_bf16(d, branch, descriptor(stage + 32 * j), accumulate);
      wgmma_bf16(d, branch + 4, descriptor(stage + 32 * (j + 1 < end ? j + 1 : j)), 1);
      wgmma_commit();
      accumulate = 1;
      j += 2;
      const bool last_of_chunk = j >= end;
      if (last_of_chunk) pending = shared.empty(ring.at), ring.next(), ++i;
      if (i == steps.rank_chunks) break;
      wgmma_wait<0>();
      if (last_of_chunk) release(pending, lane), j = begin_of(i);
      read_branch(n0, i, j);
    }
  };
  auto step = [&]() {
    const uint32_t stage = shared.stage(ring.at), w = stage + X_BYTES + half * 64 * 128;
    barrier_wait(shared.full(ring.at), ring.phase);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma_fp8(d, descriptor(w + 32 * j), descriptor(stage + 32 * j), accumulate);
      accumulate = 1;
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (pending) release(pending, lane);
    pending = shared.empty(ring.at);
    ring.next();
  };

  Tiles tile(a);
  prepare(tile, channel);
  for (; tile.valid(); scale_slot.next()) {
    accumulate = 0, pending = 0;
    multiply_branch(tile.n0());
    step();
    int i = 1;
#if DOWN_RANK
    for (; i < steps.k_steps - LATE; ++i) step();
    const bool behind = down.start();
    step(), ++i;
    if (behind) down.finish();
    down.remember(tile);
#endif
    for (; i < steps.k_steps; ++i) step();

    // While the last step is under way.
    tile.next();
    PerChannel next;
    prepare(tile, next);
    const uint32_t scales = shared.scales(scale_slot.at) + 8 * quad;
    auto read_scales = [&](int j) { return load_shared_pair(scales + 32 * j); };
    float2 next0 = read_scales(0), next1 = read_scales(1);
#if DOWN_RANK
    if (behind) down.wait_for_all();
#else
    barrier_wait(shared.taken(), taken);
    taken ^= 1;
#endif
    wgmma_wait<0>();
    release(pending, lane);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j += 2) {
      const float2 s0 = next0, s1 = next1;
      if (j + 2 < TOKENS / 8) next0 = read_scales(j + 2), next1 = read_scales(j + 3);
      const float* const y = d + 4 * j;
      auto pair = [&](float y0, float y1, float2 s, int h) {
        return pack(fmaf(y0 * s.x, channel.scale[h], channel.bias[h]), fmaf(y1 * s.y, channel.scale[h], channel.bias[h]));
      };
      const int matrix = lane / 8, token = 8 * (j + matrix / 2) + lane % 8, chunk = warp4 * 2 + matrix % 2;
      store_transposed(staged + token * 128 + ((chunk ^ (token & 7)) * 16), pair(y[0], y[1], s0, 0), pair(y[2], y[3], s0, 1),
                       pair(y[4], y[5], s1, 0), pair(y[6], y[7], s1, 1));
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.finished());
    channel = next;
  }
#if DOWN_RANK
  if (down.start()) {
    wgmma_wait<0>();
    down.finish();
  }
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
    barrier_init(shared.down_read(), 8);
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
