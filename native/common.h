// What the library and the kernels of every instruction set share.
#pragma once

#include <cstdint>

#include "dualform.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Denormal numbers become zero while this lives: a state that fades away would otherwise slow every step that follows.
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

// Channels that lie in the lanes of one vector: neighbours, in one group of B and in one of C.
struct Slice {
  int64_t first, count;
  int64_t group_b, group_c;
};

// Slices that one task runs through, tile by tile. Sums over its channels go to parts of their own, one for each group
// it meets: group g of B to part `part_b + g`, of C to `part_c + g`.
struct Slab {
  const Slice* slices;
  int64_t count;
  int64_t part_b, part_c;
};

// One task: a slab in the rows `row, row + stride, ...` of the batch. Without `memory` a kernel only returns the bytes
// of scratch memory that it needs there.
struct Task {
  const Slab* slab;
  int64_t row, stride;
  void* memory;
};

// One task: heads [first, end) of one group, in one row of the batch. Sums over its heads go to a part of their own.
struct Heads {
  int64_t row, group, first, end;
  int64_t part;
  void* memory;
};

// Gradients that several tasks share, before they are added up.
struct Parts {
  void *da, *db, *dc, *dd = nullptr, *dbias = nullptr;
};

// Sums over slabs: `out` (rows, T, G, N) from `parts` (count, rows, T, N), whose groups ascend.
struct Groups {
  View out;
  const void* parts;
  const int64_t* group;  // of every part
  int64_t count, rows, length, states;
};
