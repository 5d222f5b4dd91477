// What the library and the kernels of every instruction set share.
#pragma once

#include <cstdint>

#include "dualform.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// While one of these exists, its thread computes with zero instead of denormal numbers: a state that fades away would
// otherwise slow every step that follows.
class NoDenormals {
 public:
#if defined(__x86_64__)
  NoDenormals() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before); }

 private:
  unsigned before;
#elif defined(__aarch64__)
  NoDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"(before | (uint64_t(1) << 24)));
  }
  ~NoDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(before)); }

 private:
  uint64_t before;
#endif
};

// Rows of a step up to which the order of a sum does not depend on how many there are.
constexpr int64_t FEW = 16;

// With more rows, and matrices of few numbers, a step of a block runs in two phases: the matrices are turned, so that
// the lanes of a vector are outputs; then rows go through the whole step in tiles, whose numbers stay in a cache.
constexpr int64_t TILE = 32, NUMBERS_FOR_A_ROW = 1024;

inline int64_t numbers(const MambaStep& s) { return s.width * (3 * s.features + 2 * s.rank + 2 * s.states); }
inline int64_t numbers(const Mamba2Step& s) {
  const int64_t width = s.heads * s.width;
  return s.features * (3 * width + 2 * s.groups * s.states + s.heads);
}
inline int64_t numbers(const LtiStep& s) {
  return s.features * (s.features * (s.gate ? 1 : 2) + (s.shared ? 4 * s.states : 0));
}
template <class S>
bool by_tiles(const S& s) {
  return s.rows > FEW && numbers(s) <= s.rows * NUMBERS_FOR_A_ROW;
}

// The channels in the lanes of one vector: neighbours that belong to one group of B and to one of C.
struct Slice {
  int64_t first, count;
  int64_t group_b, group_c;
};

// The slices that one task runs through, tile by tile. Its sums over channels go to parts that no other task writes,
// one part for each group among its channels: those of group g of B to part `part_b + g`, of C to `part_c + g`.
struct Share {
  const Slice* slices;
  int64_t count;
  int64_t part_b, part_c;
};

// One task: a share of the channels in the rows `row`, `row + stride`, ... of the batch. Called without `memory`, a
// kernel only returns how many bytes of scratch memory it needs.
struct Task {
  const Share* share;
  int64_t row, stride;
  void* memory;
};

// One task: heads [first, end) of one group in one row of the batch. Its sums over heads go to `part`, which no other
// task writes.
struct Heads {
  int64_t row, group, first, end;
  int64_t part;
  void* memory;
};

// Memory for gradients to which several tasks add, a part for each of them.
struct Parts {
  void *da, *db, *dc, *dd = nullptr, *dbias = nullptr;
};

// The sums over the parts of each group: `out` (rows, T, G, N) from `parts` (count, rows, T, N), ordered by group.
struct Groups {
  View out;
  const void* parts;
  const int64_t* group;  // of every part
  int64_t count, rows, length, states;
};
