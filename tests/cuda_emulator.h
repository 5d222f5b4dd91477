// Runs a CUDA kernel on the host, thread by thread: every thread is a fibre, barriers and shuffles switch between them.
// Enough of the language for the kernels of this library, and their arithmetic in plain C++.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

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

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, wanted;  // what is not wanted becomes zero
};
using Body = void (*)(const void*);

extern unsigned current;
extern float exchange[1024];
extern char shared_memory[1 << 18];

void arrive(int barrier, unsigned count);
void sync(int barrier, unsigned count);
void sync_block();
void sync_warp();
// Copies that take effect as late as they may: when they are waited for.
void copy(const Copy& c);
void close_group();
void await_groups(unsigned left);
void launch(unsigned grid, unsigned size, Body kernel, const void* given);

}  // namespace emulator

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp() { emulator::sync_warp(); }
inline float __shfl_sync(unsigned, float x, int lane) {
  unsigned me = emulator::current;
  emulator::exchange[me] = x;
  __syncwarp();
  float found = emulator::exchange[me / 32 * 32 + unsigned(lane) % 32];
  __syncwarp();
  return found;
}
inline float __shfl_xor_sync(unsigned mask, float x, int distance) {
  return __shfl_sync(mask, x, int(emulator::current % 32) ^ distance);
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
