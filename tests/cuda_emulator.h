// Runs a CUDA kernel on the host, thread by thread: every thread is a fibre, barriers and shuffles switch between them.
// Enough of the language for the kernels of this library, and their arithmetic in plain C++.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <vector>

#define DUALFORM_EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Barrier {
  unsigned arrived = 0, turn = 0;
};
struct Copy {
  void* to;
  const void* from;
  unsigned bytes, wanted;  // what is not wanted becomes zero
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<Copy> copies;  // not yet in a group
  std::deque<std::vector<Copy>> groups;
  bool done = false;
};

static std::vector<Thread> threads;
static std::vector<Barrier> warps;
static Barrier block, named[16];
static ucontext_t scheduler;
static unsigned current;
static float exchange[1024];
static char shared_memory[1 << 18];

inline void yield() { swapcontext(&threads[current].context, &scheduler); }
inline void wait(Barrier& b, unsigned count) {
  unsigned turn = b.turn;
  if (++b.arrived == count) {
    b.arrived = 0;
    b.turn++;
  }
  while (b.turn == turn) yield();
}

inline void arrive(int barrier, unsigned count) {
  Barrier& b = named[barrier];
  if (++b.arrived == count) {
    b.arrived = 0;
    b.turn++;
  }
}
inline void sync(int barrier, unsigned count) { wait(named[barrier], count); }

// Copies that take effect as late as they may: when they are waited for.
inline void copy(const Copy& c) {
  memset(c.to, 0xff, c.bytes);  // NaN
  threads[current].copies.push_back(c);
}
inline void close_group() {
  threads[current].groups.push_back(std::move(threads[current].copies));
  threads[current].copies.clear();
}
inline void await_groups(unsigned left) {
  auto& groups = threads[current].groups;
  for (; groups.size() > left; groups.pop_front())
    for (const Copy& c : groups.front()) {
      memset(c.to, 0, c.bytes);
      memcpy(c.to, c.from, c.wanted);
    }
}

template <class F>
void launch(unsigned grid, unsigned size, const F& kernel) {
  static const F* body;
  body = &kernel;
  threads.resize(size);
  blockDim.x = size, gridDim.x = grid;
  for (unsigned b = 0; b < grid; b++) {
    warps.assign((size + 31) / 32, {});
    block = {};
    for (Barrier& b : named) b = {};
    memset(shared_memory, 0xff, sizeof shared_memory);  // NaN
    for (unsigned t = 0; t < size; t++) {
      Thread& thread = threads[t];
      thread.done = false;
      thread.copies.clear(), thread.groups.clear();
      thread.stack.resize(1 << 16);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, +[] { (*body)(), threads[current].done = true; }, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (unsigned t = 0; t < size; t++) {
        if (threads[t].done) continue;
        left = true, current = t, threadIdx.x = t, blockIdx.x = b;
        swapcontext(&scheduler, &threads[t].context);
      }
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block, blockDim.x); }
inline void __syncwarp() {
  unsigned warp = threadIdx.x / 32;
  emulator::wait(emulator::warps[warp], 32);
}
inline float __shfl_xor_sync(unsigned, float x, int distance) {
  unsigned me = emulator::current;
  emulator::exchange[me] = x;
  __syncwarp();
  float found = emulator::exchange[me ^ unsigned(distance)];
  __syncwarp();
  return found;
}
inline unsigned __shfl_xor_sync(unsigned mask, unsigned x, int distance) {
  return __builtin_bit_cast(unsigned, __shfl_xor_sync(mask, __builtin_bit_cast(float, x), distance));
}
inline bool __any_sync(unsigned, bool x) {
  unsigned me = emulator::current;
  emulator::exchange[me] = x;
  __syncwarp();
  bool found = false;
  for (unsigned lane = 0; lane < 32; lane++) found |= emulator::exchange[me / 32 * 32 + lane] != 0;
  __syncwarp();
  return found;
}
