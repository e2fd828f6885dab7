// The input of the linear behind a GELU, out of a finished tile: e4m3 codes and sums of the low-rank down-projection.
//
// The row's scale must be known before the row is: it comes from a bound (Cauchy-Schwarz) on the row's magnitudes. e4m3
// is floating point, so a bound that is a hundred times too high costs no precision yet: what is then below the normal
// range is less than a ten thousandth of the largest.
#pragma once

// A warp takes 16 tokens at a time, its lanes as in quantize.cu: the 16-byte pieces are A fragments of mma and the bytes
// of two 16-byte stores. What the channels need, fragments of the down-projection and 1 / smooth, comes by TMA.
struct GeluQuantize {
  const Product& a;
  const Shared& shared;
  const int warp, lane, row, quad;
  __device__ __forceinline__ GeluQuantize(const Product& a, const Shared& shared)
      : a(a), shared(shared), warp(threadIdx.x / 32 - 1), lane(threadIdx.x % 32), row(lane / 4), quad(lane % 4) {}

  __device__ __forceinline__ float scale_of(int m) const {
    return m < a.m ? fmaf(a.norms[m], a.bound[0], a.bound[1]) * (1.f / 448.f) : 0.f;
  }

  __device__ __forceinline__ void prepare(const Tiles& tile) const {
    sync_threads(4, 32 * FINISHERS);  // all are done with the tile before
    if (threadIdx.x != 32) return;
    barrier_expect(shared.down_full(), NEXT_BYTES);
    if (DOWN_BLOCKS) load_bulk(shared.next_down(), a.next_down + (size_t)tile.n * DOWN_BYTES, DOWN_BYTES, shared.down_full());
    load_bulk(shared.next_down() + DOWN_BYTES, a.next_inverse + tile.n0(), CHANNELS * 4, shared.down_full());
  }

  __device__ __forceinline__ void tile(const Tiles& tile, int phase) const {
    const int m0 = tile.m0();
    const bool first = tile.n == tile.slot() * tile.run;
    float next_scale[2];
    auto read_scales = [&](int block) {
#pragma unroll
      for (int h = 0; h < 2; ++h) next_scale[h] = block < TOKENS / 16 ? scale_of(m0 + block * 16 + row + 8 * h) : 0.f;
    };
    read_scales(warp);
    barrier_wait(shared.down_full(), phase);
    for (int block = warp; block < TOKENS / 16 && m0 + block * 16 < a.m_pad; block += FINISHERS) {
      float reciprocal[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = m0 + block * 16 + row + 8 * h;
        reciprocal[h] = next_scale[h] > 0.f ? __frcp_rn(next_scale[h]) : 0.f;
        if (tile.n == 0 && quad == 0 && m < a.m_pad) a.next_scale[m] = next_scale[h];
      }
      read_scales(block + FINISHERS);
      float sums[DOWN_BLOCKS ? DOWN_BLOCKS : 1][4] = {};
      uint32_t bytes[2][8];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        float factor[8];
        const uint32_t inverse = shared.next_down() + DOWN_BYTES + (32 * b + 8 * quad) * 4;
        *(uint4*)factor = load_shared(inverse), *(uint4*)(factor + 4) = load_shared(inverse + 16);
        uint4 y[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float v[8];
          unpack(load_shared(staged_piece(shared.staged(), block * 16 + row + 8 * h, 4 * b + quad)), v);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = m0 + block * 16 + row + 8 * h < a.m ? gelu(v[e]) : 0.f;
          y[h] = packed(v);
          unpack(y[h], v);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] *= factor[e] * reciprocal[h];
          bytes[h][b] = to_e4m3(v[0], v[1], v[2], v[3]);
          bytes[h][4 + b] = to_e4m3(v[4], v[5], v[6], v[7]);
        }
#pragma unroll
        for (int i = 0; i < DOWN_BLOCKS; ++i) {
          const uint4 down = load_shared(shared.next_down() + ((b * DOWN_BLOCKS + i) * 32 + lane) * 16);
          mma(sums[i], y[0].x, y[1].x, y[0].y, y[1].y, down.x, down.y);
          mma(sums[i], y[0].z, y[1].z, y[0].w, y[1].w, down.z, down.w);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = m0 + block * 16 + row + 8 * h;
        if (m >= a.m_pad) continue;
        uint8_t* to = a.next_codes + ((size_t)tile.n * a.m_pad + m) * 128;
        *(uint4*)(to + ((2 * quad) ^ (m & 7)) * 16) = make_uint4(bytes[h][0], bytes[h][1], bytes[h][2], bytes[h][3]);
        *(uint4*)(to + ((2 * quad + 1) ^ (m & 7)) * 16) = make_uint4(bytes[h][4], bytes[h][5], bytes[h][6], bytes[h][7]);
        float* const partial = a.partial + ((size_t)tile.slot() * a.m_pad + m) * a.next_rank + 2 * quad;
#pragma unroll
        for (int i = 0; i < DOWN_BLOCKS; ++i) add(partial + i * 8, sums[i][2 * h], sums[i][2 * h + 1], first);
      }
    }
    if (DOWN_BLOCKS && tile.last_of_unit()) finish(tile);
  }

  // One thread adds to a place, in the order of its tiles: results do not depend on timing.
  __device__ __forceinline__ void add(float* to, float x, float y, bool first) const {
    if (first)
      *(float2*)to = make_float2(x, y);
    else
      asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
  }

  // The block that comes last to these tokens adds up the sums of all in order.
  __device__ __forceinline__ void finish(const Tiles& tile) const {
    __shared__ uint32_t last;
    __threadfence();
    sync_threads(4, 32 * FINISHERS);
    if (threadIdx.x == 32) last = atomicAdd(a.arrived + tile.m_tile(), 1u) == tile.slots() - 1;
    sync_threads(4, 32 * FINISHERS);
    if (!last) return;
    __threadfence();
    const int m0 = tile.m0(), slots = tile.slots(), pairs = a.next_rank / 2, count = min(TOKENS, a.m_pad - m0);
    for (int i = threadIdx.x - 32; i < count * pairs; i += 32 * FINISHERS) {
      const int m = m0 + i / pairs, c = i % pairs * 2;
      float2 sum = make_float2(0.f, 0.f);
      for (int s = 0; s < slots; ++s) {
        const float2 part = __ldcg((const float2*)(a.partial + ((size_t)s * a.m_pad + m) * a.next_rank + c));
        sum.x += part.x, sum.y += part.y;
      }
      const float scale = scale_of(m), reciprocal = scale > 0.f ? __frcp_rn(scale) : 0.f;
      uint32_t pair;
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(sum.y * reciprocal), "f"(sum.x * reciprocal));
      const int byte = c % 64 * 2;
      uint8_t* to = (uint8_t*)a.next_lora + ((size_t)(c / 64) * a.m_pad + m) * 128;
      *(uint32_t*)(to + (((byte / 16) ^ (m & 7)) * 16) + byte % 16) = pair;
    }
  }
};
