// The input of the linear behind a GELU, out of a finished tile: e4m3 codes and sums of the low-rank down-projection.
//
// The row's scale must be known before the row is: it comes from a bound (Cauchy-Schwarz) on the row's magnitudes. e4m3
// is floating point, so a bound that is a hundred times too high costs no precision yet: what is then below the normal
// range is less than a ten thousandth of the largest.
//
// The finishers leave GELU(y) where they took y from, and the warpgroups that multiply project it down by wgmma beside the
// next tile: mma.sync would wait for the tensor cores behind their products.
#pragma once

__device__ __forceinline__ float scale_of(const Product& a, int m) {
  return m < a.m ? fmaf(a.norms[m], a.bound[0], a.bound[1]) * (1.f / 448.f) : 0.f;
}
__device__ __forceinline__ float reciprocal_of(float scale) { return scale > 0.f ? __frcp_rn(scale) : 0.f; }

// A finisher takes 16 tokens at a time; a lane's 16-byte pieces make the bytes of two 16-byte stores.
struct GeluQuantize {
  const Product& a;
  const Shared& shared;
  const int warp, lane, row, quad;
  __device__ __forceinline__ GeluQuantize(const Product& a, const Shared& shared)
      : a(a), shared(shared), warp(finisher()), lane(threadIdx.x % 32), row(lane / 4), quad(lane % 4) {}

  __device__ __forceinline__ void prepare(const Tiles& tile) const {
    sync_threads(4, 32 * FINISHERS);  // all are done with the tile before
    if (threadIdx.x != 32) return;
    barrier_expect(shared.inverse_full(), INVERSE_BYTES);
    load_bulk(shared.next_inverse(), a.next_inverse + tile.n0(), INVERSE_BYTES, shared.inverse_full());
  }

  // Of a finished tile: the one before it has been projected.
  __device__ __forceinline__ void load_down(const Tiles& tile) const {
    if (DOWN_RANK == 0 || threadIdx.x != 32) return;
    barrier_expect(shared.down_full(), DOWN_BYTES);
    load_bulk(shared.next_down(), a.next_down + (size_t)tile.n * DOWN_BYTES, DOWN_BYTES, shared.down_full());
  }

  __device__ __forceinline__ void tile(const Tiles& tile, int phase) const {
    const int m0 = tile.m0();
    load_down(tile);
    float next_scale[2];
    auto read_scales = [&](int block) {
#pragma unroll
      for (int h = 0; h < 2; ++h) next_scale[h] = block < TOKENS / 16 ? scale_of(a, m0 + block * 16 + row + 8 * h) : 0.f;
    };
    read_scales(warp);
    barrier_wait(shared.inverse_full(), phase);
    for (int block = warp; block < TOKENS / 16 && m0 + block * 16 < a.m_pad; block += FINISHERS) {
      float reciprocal[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = m0 + block * 16 + row + 8 * h;
        reciprocal[h] = reciprocal_of(next_scale[h]);
        if (tile.n == 0 && quad == 0 && m < a.m_pad) a.next_scale[m] = next_scale[h];
      }
      read_scales(block + FINISHERS);
      uint32_t bytes[2][8];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        float factor[8];
        const uint32_t inverse = shared.next_inverse() + (32 * b + 8 * quad) * 4;
        *(uint4*)factor = load_shared(inverse), *(uint4*)(factor + 4) = load_shared(inverse + 16);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t place = staged_piece(shared.staged(), block * 16 + row + 8 * h, 4 * b + quad);
          float v[8];
          unpack(load_shared(place), v);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = m0 + block * 16 + row + 8 * h < a.m ? gelu(v[e]) : 0.f;
          const uint4 y = packed(v);
          if (DOWN_RANK) store_shared(place, y);
          unpack(y, v);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] *= factor[e] * reciprocal[h];
          bytes[h][b] = to_e4m3(v[0], v[1], v[2], v[3]);
          bytes[h][4 + b] = to_e4m3(v[4], v[5], v[6], v[7]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = m0 + block * 16 + row + 8 * h;
        if (m >= a.m_pad) continue;
        uint8_t* to = a.next_codes + ((size_t)tile.n * a.m_pad + m) * 128;
        *(uint4*)(to + ((2 * quad) ^ (m & 7)) * 16) = make_uint4(bytes[h][0], bytes[h][1], bytes[h][2], bytes[h][3]);
        *(uint4*)(to + ((2 * quad + 1) ^ (m & 7)) * 16) = make_uint4(bytes[h][4], bytes[h][5], bytes[h][6], bytes[h][7]);
      }
    }
    fence_async();
  }
};

#if DOWN_RANK
// The two warpgroups that multiply share the tokens in blocks of 64, and keep their sums over a unit's tiles. A tile is
// projected among the last steps of the next one, so that the tensor cores never wait for it.
constexpr int LATE = 4;  // steps before the next tile's end, which has two at least
struct DownProject {
  static constexpr int BLOCKS = TOKENS / 64, OWN = (BLOCKS + 1) / 2;
  const Product& a;
  const Shared& shared;
  const int group, thread;
  float sums[OWN][DOWN_RANK / 2];
  int phase = 0, m0 = 0, slot = 0;  // phase: of all three barriers
  bool any = false, first = false, last = false;  // of its unit
  __device__ __forceinline__ DownProject(const Product& a, const Shared& shared)
      : a(a), shared(shared), group(threadIdx.x / 128 - 1), thread(threadIdx.x % 128) {}

  __device__ __forceinline__ void remember(const Tiles& tile) {
    any = true, m0 = tile.m0(), slot = tile.slot, first = tile.first_of_unit(), last = tile.last_of_unit();
  }

  // The products of the tile remembered, left under way; false if there is none.
  __device__ __forceinline__ bool start() {
    if (!any) return false;
    barrier_wait(shared.taken(), phase);
    barrier_wait(shared.down_full(), phase);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int block = min(group * OWN + i, BLOCKS - 1);  // an odd one out is computed twice
#pragma unroll
      for (int j = 0; j < 8; ++j)
        wgmma_down(sums[i], descriptor(shared.staged() + j / 4 * HALF_BYTES + block * 64 * 128 + j % 4 * 32),
                   descriptor(shared.next_down() + j / 4 * (DOWN_BYTES / 2) + j % 4 * 32), !first || j > 0);
    }
    wgmma_commit();
    return true;
  }

  // They are done.
  __device__ __forceinline__ void finish() {
    if (thread % 32 == 0) barrier_arrive(shared.down_read());
    if (!last) return;
    const int row = thread / 32 * 16 + thread % 32 / 4, quad = thread % 4;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int block = group * OWN + i, m = m0 + block * 64 + row + 8 * h;
        if (block >= BLOCKS || m >= a.m_pad) continue;
        float* const to = a.partial + ((size_t)slot * a.m_pad + m) * DOWN_RANK + 2 * quad;
#pragma unroll
        for (int c = 0; c < DOWN_RANK / 8; ++c) *(float2*)(to + c * 8) = make_float2(sums[i][4 * c + 2 * h], sums[i][4 * c + 2 * h + 1]);
      }
  }

  // In both warpgroups: what they read can be overwritten.
  __device__ __forceinline__ void wait_for_all() {
    barrier_wait(shared.down_read(), phase);
    phase ^= 1;
  }
};
#endif
