// What the parts of the product share: its parameter, its tiles, the layout of shared memory.
#pragma once

constexpr int CHANNELS = 128;
constexpr int FINISHERS = THREADS / 32 - 9;  // warps
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = CHANNELS * 128;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int SCALE_BYTES = TOKENS * 4;
constexpr int SCALE_SLOTS = STAGES + 1;  // tiles with a step under way, and the one whose end is
constexpr int HALF_BYTES = TOKENS * 128;  // 64 channels of a finished tile
constexpr int STAGED_BYTES = 2 * HALF_BYTES;
#ifdef DOWN_RANK
constexpr int DOWN_BYTES = DOWN_RANK * CHANNELS * 2;  // of the next down-projection
constexpr int INVERSE_BYTES = CHANNELS * 4;           // of 1 / smooth of the next linear
constexpr int NEXT_BYTES = DOWN_BYTES + INVERSE_BYTES;
#else
constexpr int DOWN_BYTES = 0, NEXT_BYTES = 0;
#endif

enum { PLAIN = 0, GELU = 1, GATE_RESIDUAL = 2, NORM_ROPE = 3, GELU_QUANTIZE = 4, NORM_ROPE_FP8 = 5 };
constexpr int OUT_BYTES = EPILOGUE == NORM_ROPE_FP8 ? 1 : 2;
constexpr bool HEADS = EPILOGUE == NORM_ROPE || EPILOGUE == NORM_ROPE_FP8;

struct Product {
  const uint8_t* x;          // (K/128, m_pad, 128) e4m3, channels permuted and swizzled
  const float* x_scale;      // (m_pad), those from M on are not used
  const uint8_t* lora;       // (R/64, m_pad, 64) bf16, swizzled, divided by x_scale
  const uint8_t* w;          // (K/128, N, 128) e4m3, laid out as x
  const float* w_scale;      // (N)
  const uint4* up;           // (N/128, R/16, 256) register fragments, bf16, divided by w_scale
  const float* bias;         // (N)
  uint16_t* out;             // (M, N); HEADS: q, see the strides; bytes of e4m3 with NORM_ROPE_FP8
  uint16_t* out_k;
  uint16_t* out_v;
  const uint16_t* residual;  // (M, N)
  const uint16_t* gate;      // (B, gate_stride)
  const uint16_t* norm_q;    // (128)
  const uint16_t* norm_k;    // (128)
  const uint32_t* rotary;    // (length, 64) pairs cos, sin as fp16
  const float* factors;      // NORM_ROPE_FP8: (3) what q, k and v are multiplied with
  const float* next_inverse; // (N) 1 / smooth of the linear that reads a GELU
  uint32_t* absmax;          // GELU: (M) float bits, gathers |gelu(y) / smooth|
  const float* norms;        // GELU_QUANTIZE: (M) bounds of |x / smooth|
  const float* bound;        // GELU_QUANTIZE: (2) |gelu(y) / smooth| is at most norm * bound[0] + bound[1]
  const uint8_t* next_down;  // GELU_QUANTIZE: (N/64, next_rank, 64) 16-bit, swizzled
  uint8_t* next_codes;       // (N/128, m_pad, 128)
  float* next_scale;         // (m_pad)
  float* partial;            // (slots, m_pad, next_rank): lora of the next linear, to be added up
  long long batch_stride, token_stride, head_stride;  // of q, k and v, in elements
  int m, m_pad, n, k, rank, rank_start, length, heads, gate_stride, run;
  int w_stays;  // the weights are kept in e4m3: this is not a buffer that the next layer overwrites
};

__device__ __forceinline__ int rank_in_cluster() { return blockIdx.x % CLUSTER; }

// A block's tiles. A unit is `run` tiles of channels of the same tokens, one after another; units of all tokens for the
// first channels come first, so blocks that run at the same time share weights. The blocks of a cluster take adjacent runs
// of the same tokens, and so many tiles one as the other: the runs must go into CLUSTER equal parts.
struct Tiles {
  int m_tiles, n_tiles, run, slots, m_step, slot_step, m, slot, n, end;
  __device__ __forceinline__ Tiles(const Product& a)
      : m_tiles((a.m + TOKENS - 1) / TOKENS), n_tiles((a.n + CHANNELS - 1) / CHANNELS), run(a.run), slots((n_tiles + run - 1) / run) {
    const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    m = first % m_tiles, slot = first / m_tiles * CLUSTER + rank_in_cluster();
    m_step = step % m_tiles, slot_step = step / m_tiles * CLUSTER;
    begin();
  }
  __device__ __forceinline__ void begin() { n = slot * run, end = min(n + run, n_tiles); }
  __device__ __forceinline__ bool valid() const { return slot < slots; }
  __device__ __forceinline__ bool first_of_unit() const { return n == slot * run; }
  __device__ __forceinline__ bool last_of_unit() const { return n + 1 == end; }
  __device__ __forceinline__ void next() {
    if (++n < end) return;
    m += m_step, slot += slot_step;
    if (m >= m_tiles) m -= m_tiles, slot += CLUSTER;
    begin();
  }
  __device__ __forceinline__ int m0() const { return m * TOKENS; }
  __device__ __forceinline__ int n0() const { return n * CHANNELS; }
};

struct Shared {
  uint32_t base;
  __device__ __forceinline__ uint32_t stage(int i) const { return base + i * STAGE_BYTES; }
  __device__ __forceinline__ uint32_t staged() const { return base + STAGES * STAGE_BYTES; }
  __device__ __forceinline__ uint32_t next_down() const { return staged() + STAGED_BYTES; }
  __device__ __forceinline__ uint32_t next_inverse() const { return next_down() + DOWN_BYTES; }
  __device__ __forceinline__ uint32_t scales(int slot) const { return staged() + STAGED_BYTES + NEXT_BYTES + slot * SCALE_BYTES; }
  __device__ __forceinline__ uint32_t full(int i) const { return scales(SCALE_SLOTS) + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(STAGES) + 8 * i; }
  __device__ __forceinline__ uint32_t finished() const { return empty(STAGES); }
  __device__ __forceinline__ uint32_t taken() const { return finished() + 8; }
  __device__ __forceinline__ uint32_t inverse_full() const { return finished() + 16; }
  __device__ __forceinline__ uint32_t down_full() const { return finished() + 24; }
  __device__ __forceinline__ uint32_t down_read() const { return finished() + 32; }
};

// Threads 128 to 383 multiply, thread 0 loads, the warps beside them finish.
__device__ __forceinline__ int finisher() { return threadIdx.x < 128 ? threadIdx.x / 32 - 1 : threadIdx.x / 32 - 9; }

// Where 8 channels of a token of a finished tile lie: two halves of 64 channels, swizzled rows of 128 bytes.
__device__ __forceinline__ uint32_t staged_piece(uint32_t staged, int token, int piece) {
  return staged + piece / 8 * HALF_BYTES + token * 128 + (((piece % 8) ^ (token & 7)) * 16);
}
