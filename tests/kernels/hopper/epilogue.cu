// Runs the epilogue alone: `w` holds the product (M, N), which a block lays out as its finished tile.
#include "simt.hpp"
#include "device.hpp"
#include "product.cuh"
#include "epilogue.cuh"

static void epilogue(const Product& a) {
  alignas(128) static uint8_t memory[STAGED_BYTES];
  const uint32_t staged = shared_address(memory);
  for (Tiles tile(a); tile.valid(); tile.next()) {
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * 16; i += THREADS) {
      const int m = tile.m0() + i / 16, channel = tile.n0() + i % 16 * 8;
      char* to = shared(staged_piece(staged, i / 16, i % 16));
      if (m < a.m && channel < a.n) memcpy(to, a.w + (size_t(m) * a.n + channel) * 2, 16);
      else memset(to, 0xff, 16);
    }
    __syncthreads();
    if (threadIdx.x >= 32 && (threadIdx.x < 128 || threadIdx.x >= 384)) Epilogue(a, staged).tile(tile, 0);
  }
}
