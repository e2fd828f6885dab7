// The product's blocks on a CPU, those of a cluster at the same time and in random order; include it behind simt.hpp.
//
// Barriers count arrivals and bytes. A copy's destination is NaN from its start until it is done, which takes any time.
// Products of wgmma read their operands when they are waited for, as late as they may.
#pragma once
#include <algorithm>
#include <map>

#include "device.hpp"

enum Status { FINE, STUCK, UNINITIALIZED, MISALIGNED, GONE, TOO_MANY_ARRIVALS, TOO_MANY_BYTES, OVERLAP, UNFINISHED };
static Status status = FINE;
static void fault(Status what) { if (!status) status = what; }

// ---- shared memory
constexpr unsigned SHARED_BYTES = 256 << 10;
alignas(1024) static char memory[CLUSTER][SHARED_BYTES];
static bool gone[CLUSTER];  // blocks all threads of which have returned
static unsigned block() { return current / blockDim.x; }
static char* memory_of_block() { return memory[block()]; }
static int block_at(uint32_t address) { return int((shared(address) - memory[0]) / long(SHARED_BYTES)); }
static uint32_t at_block(uint32_t address, int other) { return address + (other - block_at(address)) * SHARED_BYTES; }
static float2 load_shared_pair(uint32_t from) { return *reinterpret_cast<float2*>(shared(from)); }
static void store_transposed(uint32_t to, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
  auto& lanes = exchange[current / 32];
  const unsigned lane = threadIdx.x % 32;
  const uint32_t v[4] = {v0, v1, v2, v3};
  lanes[lane][0] = to;
  meet_warp();
  for (int i = 0; i < 4; i++)
    for (int h = 0; h < 2; h++) {
      const uint16_t half = uint16_t(v[i] >> 16 * h);
      memcpy(shared(uint32_t(lanes[8 * i + 2 * (lane % 4) + h][0])) + 2 * (lane / 4), &half, 2);
    }
  meet_warp();
}

// ---- barriers: the number of a phase is that of its parity
static unsigned long long events = 0;
struct TransactionBarrier { int count, missing, bytes = 0, phase = 0; };
static std::map<uint32_t, TransactionBarrier> barriers;
static TransactionBarrier& barrier(uint32_t bar) {
  if (!barriers.count(bar)) fault(UNINITIALIZED);
  else if (gone[block_at(bar)]) fault(GONE);
  return barriers[bar];
}
static void count_down(uint32_t bar, int arrivals, int bytes) {
  TransactionBarrier& b = barrier(bar);
  if (b.missing < arrivals) fault(TOO_MANY_ARRIVALS);
  b.missing -= arrivals, b.bytes -= bytes, events++;
  if (b.missing == 0 && b.bytes < 0) fault(TOO_MANY_BYTES);
  if (b.missing == 0 && b.bytes == 0) b.missing = b.count, b.phase ^= 1;
}
static void barrier_init(uint32_t bar, int count) { barriers[bar] = {count, count}; }
static void barriers_ready() {}
static void barrier_arrive(uint32_t bar) { count_down(bar, 1, 0); }
static void barrier_arrive_at(uint32_t bar, int other) { count_down(at_block(bar, other), 1, 0); }
static void barrier_expect(uint32_t bar, int bytes) { count_down(bar, 1, -bytes); }
static void barrier_wait(uint32_t bar, int parity) {
  while (barrier(bar).phase == parity) yield_();
}
static Barrier cluster_barrier, named_barriers[CLUSTER][16];
static void sync_cluster() { meet(cluster_barrier, CLUSTER * blockDim.x); }
static void sync_threads(int id, unsigned count) { meet(named_barriers[block()][id], count); }

// ---- copies
struct Bulk { uint32_t to; const char* from; int bytes; uint32_t bar; };
static std::vector<Bulk> under_way;
static bool written_to(uint32_t begin, int bytes) {
  return std::any_of(under_way.begin(), under_way.end(), [&](const Bulk& b) {
    return int32_t(b.to - begin) < bytes && int32_t(begin - b.to) < b.bytes;
  });
}
static void load_multicast(uint32_t to, const void* from, int bytes, uint32_t bar, int blocks) {
  if (size_t(from) % 16 || to % 16 || bytes % 16 || bytes <= 0) fault(MISALIGNED);
  for (int other = 0; other < CLUSTER; other++) {
    if (!(blocks >> other & 1)) continue;
    const uint32_t there = at_block(to, other);
    if (written_to(there, bytes)) fault(OVERLAP);
    if (gone[other]) fault(GONE);
    memset(shared(there), 0xff, bytes);
    under_way.push_back({there, static_cast<const char*>(from), bytes, at_block(bar, other)});
  }
  events++;
}
static void load_bulk(uint32_t to, const void* from, int bytes, uint32_t bar) {
  load_multicast(to, from, bytes, bar, 1 << block());
}
static void load_bulk_kept(uint32_t to, const void* from, int bytes, uint32_t bar) { load_bulk(to, from, bytes, bar); }
static void finish_copy(unsigned i) {
  const Bulk bulk = under_way[i];
  under_way.erase(under_way.begin() + i);
  if (gone[block_at(bulk.to)]) fault(GONE);
  memcpy(shared(bulk.to), bulk.from, bulk.bytes);
  count_down(bulk.bar, 0, bulk.bytes);
}
static void fence_async() {}

// ---- wgmma, from the PTX ISA's fragments and its swizzle of 128 bytes. A warp's lanes stay together.
static std::vector<std::vector<std::function<void()>>> groups_in_flight[CLUSTER * 1024];
static std::vector<std::function<void()>> open_group[CLUSTER * 1024];
static uint64_t descriptor(uint32_t address) { return address; }
static void wgmma_fence() { meet_warp(); }
static void wgmma_commit() { groups_in_flight[current].push_back(open_group[current]), open_group[current].clear(); }
template <int N>
static void wgmma_wait() {
  auto& groups = groups_in_flight[current];
  while (groups.size() > N) {
    for (auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  meet_warp();
}
template <int N>
static void more_registers() {}
template <int N>
static void fewer_registers() {}

struct E4m3 {
  static constexpr int BYTES = 1;
  static float value(const char* p) {
    static const std::vector<float> table = [] {
      std::vector<float> values;
      for (int code = 0; code < 256; code++) values.push_back(from_e4m3(uint16_t(code)).x);
      return values;
    }();
    return table[uint8_t(*p)];
  }
};
template <bool HALF>
struct Sixteen {
  static constexpr int BYTES = 2;
  static float value(const char* p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return HALF ? from_fp16(v) : from_bf16(v);
  }
};
// 32 bytes of a row, numbers of format V.
template <class V>
static void read_row(uint32_t start, int row, float* out) {
  for (int k = 0; k < 32 / V::BYTES; k++) {
    const uint32_t linear = start + row * 128 + k * V::BYTES;
    out[k] = V::value(shared(linear ^ (linear >> 7 & 7) << 4));
  }
}
// What this thread has of 64 x 2N sums; `a` are its two rows of the first factor.
template <class V, int N>
static void add_products(float* d, const float (&a)[2][32], uint32_t b, bool accumulate) {
  const int quad = threadIdx.x % 4;
  for (int column = 2 * quad; column < 2 * N; column += column % 2 ? 7 : 1) {
    float values[32];
    read_row<V>(b, column, values);
    for (int h = 0; h < 2; h++) {
      float& sum = d[column / 8 * 4 + 2 * h + column % 2];
      if (!accumulate) sum = 0;
      for (int k = 0; k < 32 / V::BYTES; k++) sum += a[h][k] * values[k];
    }
  }
}
template <class V, int N>
static void multiply_shared(float (&d)[N], uint64_t a, uint64_t b, bool accumulate) {
  if (written_to(uint32_t(a), 64 * 128 - 96) || written_to(uint32_t(b), 2 * N * 128 - 96)) fault(OVERLAP);
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  float* const sums = d;
  open_group[current].push_back([=] {
    float rows[2][32];
    read_row<V>(uint32_t(a), row, rows[0]), read_row<V>(uint32_t(a), row + 8, rows[1]);
    add_products<V, N>(sums, rows, uint32_t(b), accumulate);
  });
}
template <int N>
static void wgmma_fp8(float (&d)[N], uint64_t a, uint64_t b, int accumulate) { multiply_shared<E4m3>(d, a, b, accumulate); }
template <int N>
static void wgmma_down(float (&d)[N], uint64_t a, uint64_t b, int accumulate) {
  multiply_shared<Sixteen<FP16>>(d, a, b, accumulate);
}
template <int N>
static void wgmma_bf16(float (&d)[N], const uint32_t* a, uint64_t b, int accumulate) {
  auto& lanes = exchange[current / 32];
  const int lane = threadIdx.x % 32;
  struct { float of[2][32]; } rows;
  for (int i = 0; i < 4; i++) lanes[lane][i] = a[i];
  meet_warp();
  for (int q = 0; q < 4; q++)
    for (int i = 0; i < 4; i++)
      for (int e = 0; e < 2; e++)
        rows.of[i % 2][i / 2 * 8 + 2 * q + e] = from_bf16(uint16_t(lanes[lane / 4 * 4 + q][i] >> 16 * e));
  meet_warp();
  float* const sums = d;
  open_group[current].push_back(
      [=] { add_products<Sixteen<false>, N>(sums, rows.of, uint32_t(b), accumulate); });
}

// ---- the order of things
static uint32_t random_state;
static unsigned random_below(unsigned n) {
  random_state ^= random_state << 13, random_state ^= random_state >> 17, random_state ^= random_state << 5;
  return random_state % n;
}
static bool asleep[CLUSTER][32];  // warps

// For a while a block, its warps of one part, or some of them do nothing.
static void lull() {
  for (int b = 0; b < CLUSTER; b++) {
    const unsigned part = random_below(6);
    for (int warp = 0; warp < 32; warp++) {
      const bool loads = warp == 0, multiplies = warp >= 4 && warp < 12;
      asleep[b][warp] = part == 0 || (part == 1 && loads) || (part == 2 && multiplies) || (part == 3 && !loads && !multiplies) ||
                        (part == 4 && random_below(2));
    }
  }
}

static Status run_cluster(unsigned first, unsigned threads) {
  barriers.clear(), under_way.clear();
  memset(memory, 0xff, sizeof memory);
  cluster_barrier = {};
  block_barrier = {};
  for (int b = 0; b < CLUSTER; b++) {
    gone[b] = false;
    for (auto& barrier : named_barriers[b]) barrier = {};
  }
  make_fibers(CLUSTER * threads, 32 << 10);
  unsigned awake_until = 0, idle = 0;
  for (unsigned round = 0, running = 1; running && !status; round++) {
    const unsigned long long before = events + meetings;
    if (round >= awake_until) lull(), awake_until = round + 1 + random_below(30);
    if (idle) memset(asleep, 0, sizeof asleep);
    running = 0;
    unsigned returned[CLUSTER] = {};
    const unsigned start = random_below(CLUSTER * threads), copies = random_below(4);
    for (unsigned i = 0; i < CLUSTER * threads && !status; i++) {
      const unsigned fiber = (start + i) % (CLUSTER * threads), b = fiber / threads;
      if (!fibers[fiber].done && !asleep[b][fiber % threads / 32]) {
        blockIdx = {first + b, 0, 0};
        resume(fiber);
        events += fibers[fiber].done;
      }
      returned[b] += fibers[fiber].done;
      running += !fibers[fiber].done;
      if (copies == 3 && !under_way.empty() && random_below(64) == 0) finish_copy(random_below(under_way.size()));
    }
    for (int b = 0; b < CLUSTER; b++) gone[b] |= returned[b] == threads;
    for (unsigned n = copies == 3 ? 1 : copies; (n > 0 || idle) && !under_way.empty() && !status; n -= n > 0)
      finish_copy(random_below(under_way.size()));
    idle = events + meetings == before ? idle + 1 : 0;
    if (idle > 4) fault(STUCK);
  }
  if (status) return status;
  if (!under_way.empty()) fault(UNFINISHED);
  memset(gone, 0, sizeof gone);
  for (auto& b : barriers)
    if (b.second.bytes || b.second.missing != b.second.count) fault(UNFINISHED);
  return status;
}
static int run_clusters(unsigned blocks, unsigned threads, unsigned seed, std::function<void()> kernel) {
  status = FINE, body = kernel, random_state = seed, gridDim = {blocks, 1, 1}, blockDim = {threads, 1, 1};
  for (auto& group : open_group) group.clear();
  for (auto& groups : groups_in_flight) groups.clear();
  for (unsigned first = 0; first < blocks && !status; first += CLUSTER) run_cluster(first, threads);
  return status;
}
