// The barriers and copies of the quantizers, on a CPU; include it behind simt.hpp.
#pragma once
#include <map>

#include "device.hpp"

// A copy of the copy engine is made when its barrier, which has no other, is waited for; until then its bytes are NaN.
struct Bulk { char* to; const char* from; int bytes; bool done; };
static std::map<uint32_t, Bulk> bulks;
static std::map<uint32_t, int> expected;
static void barrier_init(uint32_t bar, int count) { bulks.erase(bar), expected.erase(bar), misaligned |= count != 1; }
static void barriers_ready() {}
static void barrier_expect(uint32_t bar, int bytes) { expected[bar] = bytes; }
static void load_bulk(uint32_t to, const void* from, int bytes, uint32_t bar) {
  if (size_t(from) % 16 || size_t(shared(to)) % 16 || bytes % 16 || bulks.count(bar)) misaligned = true;
  if (expected[bar] != bytes) misaligned = true;
  memset(shared(to), 0xff, bytes);
  bulks[bar] = {shared(to), static_cast<const char*>(from), bytes, false};
}
static void barrier_wait(uint32_t bar, int parity) {
  Bulk& bulk = bulks.at(bar);
  if (!bulk.done) memcpy(bulk.to, bulk.from, bulk.bytes);
  bulk.done = true;
}

// cp.async: see simt.hpp.
static void copy_async(uint32_t to, const void* from, bool inside) {
  static const char nothing[16] = {};
  cp_async_cg_shared_global_L2_128B(to, inside ? from : nothing);
}
static void commit() { cp_async_commit_group(); }
template <int N>
static void wait() { cp_async_wait_group(N); }
static void __threadfence() {}
template <class V> static void __stcg(V* p, V v) { *p = v; }
template <class V> static V __ldcg(const V* p) { return *p; }
static unsigned atomicAdd(unsigned* p, unsigned v) { return (*p += v) - v; }
