// One step of a block with a feed-forward in it, and of what follows the last block, in the phases of block.h.
#pragma once

#include "activation.h"
#include "block.h"

namespace DUALFORM_ISA {
namespace block {

#define OF [&](vec<T> v, [[maybe_unused]] int64_t i) __attribute__((always_inline))

// Phases: norms of rows, D hidden features, M outputs.
template <class T>
int64_t mlp(const MlpStep& s, int64_t phase, int64_t first, int64_t end, void* memory) {
  const int64_t M = s.features, D = s.hidden, rows = s.rows, wide = s.gated ? 2 * D : D;
  Arena arena(memory);
  T *normed = arena.take<T>(rows * M), *made = arena.take<T>(rows * wide);
  if (!memory) return arena.used();
  if (phase == 0) enter(s, Span{0, rows}, first, end, normed);
  if (phase == 1) {
    const T *bias = static_cast<const T*>(s.in_bias), factor = T(s.factor);
    const Map<T> in = map<T>(s, s.in_weight, s.in_scales, M, wide);
    for (int64_t half = 0; half < wide; half += D)
      product(in, Lines<T>{normed, M}, rows, half + first, half + end,
              [&](int64_t output, int64_t row, T sum) { made[row * wide + output] = bias ? sum + bias[output] : sum; });
    for (int64_t row = 0; row < rows; row++) {
      T *line = made + row * wide, *up = line + D;
      each(
          line, first, end, OF {
            v = activate<T>(s.activation, v * factor);
            return s.gated ? v * load_some(up + i, end - i) : v;
          });
    }
  }
  if (phase == 2)
    leave(s, map<T>(s, s.out_weight, s.out_scales, D, M), Lines<T>{made, wide}, Span{0, rows}, first, end);
  return 0;
}
#undef OF

// A number to its place.
template <class T>
INLINE void give(const View& to, int64_t at, T x) {
  if (to.dtype == FLOAT32) put(static_cast<float*>(to.data) + at, x);
  if (to.dtype == FLOAT64) put(static_cast<double*>(to.data) + at, double(x));
  if (to.dtype == BFLOAT16) put(static_cast<bfloat16*>(to.data) + at, x);
  if (to.dtype == FLOAT16) put(static_cast<float16*>(to.data) + at, x);
}

// Phases: norms of rows, V outputs.
template <class T>
int64_t head(const HeadStep& s, int64_t phase, int64_t first, int64_t end, void* memory) {
  const int64_t M = s.features, rows = s.rows;
  Arena arena(memory);
  T* normed = arena.take<T>(rows * M);
  if (!memory) return arena.used();
  if (phase == 0) enter(s, Span{0, rows}, first, end, normed);
  if (phase == 1) {
    const T *bias = static_cast<const T*>(s.out_bias), factor = T(s.factor), cap = T(s.cap);
    product(map<T>(s, s.out_weight, s.out_scales, M, s.outputs), Lines<T>{normed, M}, rows, first, end,
            [&](int64_t output, int64_t row, T sum) {
              sum = factor * (bias ? sum + bias[output] : sum);
              give(s.y, row * s.y.row + output, cap > 0 ? cap * std::tanh(sum / cap) : sum);
            });
  }
  return 0;
}

}  // namespace block
}  // namespace DUALFORM_ISA
