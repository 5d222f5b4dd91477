// One step of a block, norm and residual included, in phases between which all threads meet. A phase is a product with
// a matrix, and what can be done with its outputs one by one: the convolution behind the projection in, the recurrence
// behind the projection of the step.
#pragma once

#include <cmath>

#include "dense.h"
#include "update.h"

namespace DUALFORM_ISA {
namespace block {

using dense::Lines;
using dense::Matrix;

// f(vector) of the numbers [first, end), in place.
template <class T, class F>
INLINE void each(T* at, int64_t first, int64_t end, const F& f) {
  for (int64_t i = first; i < end; i += LANES<T>) store_some(at + i, f(load_some(at + i, end - i), i), end - i);
}
#define OF [&](vec<T> v, [[maybe_unused]] int64_t i) __attribute__((always_inline))

// v / sqrt(mean(v^2) + eps) * weight, of `count` numbers.
template <class T>
INLINE void rms(const T* v, const T* weight, T* to, int64_t count, double eps) {
  vec<T> squares = {};
  for (int64_t i = 0; i < count; i += LANES<T>) {
    const vec<T> some = load_some(v + i, count - i);
    squares = fma(some, some, squares);
  }
  T lanes[LANES<T>], sum = 0;
  store(lanes, squares);
  for (int i = 0; i < LANES<T>; i++) sum += lanes[i];
  const T scale = T(1) / std::sqrt(sum / T(count) + T(eps));
  for (int64_t i = 0; i < count; i += LANES<T>)
    store_some(to + i, load_some(v + i, count - i) * scale * load_some(weight + i, count - i), count - i);
}

// The norms of the rows [first, end) of x.
template <class T, class S>
INLINE void enter(const S& s, int64_t first, int64_t end, T* to) {
  const int64_t M = s.features;
  for (int64_t row = first; row < end; row++)
    rms(static_cast<const T*>(s.x) + row * M, static_cast<const T*>(s.norm), to + row * M, M, s.eps);
}

// give(output, row, sum) for outputs of a matrix whose rows have `depth` numbers.
template <class T, class F>
INLINE void product(const Matrix& matrix, Lines<T> x, int64_t depth, int64_t rows, int64_t first, int64_t end,
                    const F& give) {
  dense::rows_of<T>(matrix, depth, [&](auto weight) { dense::outputs(weight, x, depth, rows, first, end, give); });
}

// A matrix of a step, whose rows have `depth` numbers; beside those of 8 bits one without scales is of floats.
template <class S>
INLINE Matrix matrix(const S& s, const void* data, const void* scales, int64_t depth) {
  return {data, s.matrices == INT8 && !scales ? int64_t(FLOAT32) : s.matrices, depth, scales, s.group};
}

// The convolution of channel d, of `channels`, given its new input.
template <class T, class S>
INLINE T convolve(const S& s, int64_t row, int64_t d, int64_t channels, T x) {
  const int64_t back = s.taps - 1, at = (row * channels + d) * back;
  const T *weight = static_cast<const T*>(s.conv_weight) + d * s.taps, *h = static_cast<const T*>(s.conv) + at;
  T *next = static_cast<T*>(s.next_conv) + at, sum = s.conv_bias ? static_cast<const T*>(s.conv_bias)[d] : T(0);
  for (int64_t j = 0; j < back; j++) {
    sum += weight[j] * h[j];
    next[j] = j + 1 < back ? h[j + 1] : x;
  }
  return sum + weight[back] * x;
}

// Outputs [first, end) of x + out(y), where y (rows, D).
template <class T, class S>
INLINE void leave(const S& s, Lines<T> y, int64_t D, int64_t first, int64_t end) {
  const T *x = static_cast<const T*>(s.x), *bias = static_cast<const T*>(s.out_bias);
  T* to = static_cast<T*>(s.y);
  product(matrix(s, s.out_weight, s.out_scales, D), y, D, s.rows, first, end, [&](int64_t output, int64_t row, T sum) {
    const int64_t at = row * s.features + output;
    to[at] = x[at] + (bias ? sum + bias[output] : sum);
  });
}

// Without memory these only return how many bytes of it they need, all threads together.

// Phases: norms of rows, 2 D outputs of the projection in, R + 2 N maps, D channels, M outputs.
template <class T>
int64_t mamba(const MambaStep& s, int64_t phase, int64_t first, int64_t end, void* memory) {
  const int64_t M = s.features, D = s.width, N = s.states, R = s.rank, all = R + 2 * N, rows = s.rows;
  Arena arena(memory);
  T *normed = arena.take<T>(rows * M), *both = arena.take<T>(rows * 2 * D), *maps = arena.take<T>(rows * all);
  T *y = arena.take<T>(rows * D), *dt = arena.take<T>(rows * D), *log_decay = arena.take<T>(rows * D);
  if (!memory) return arena.used();
  if (phase == 0) enter(s, first, end, normed);
  if (phase == 1) {
    const T* bias = static_cast<const T*>(s.in_bias);
    product(matrix(s, s.in_weight, s.in_scales, M), Lines<T>{normed, M}, M, rows, first, end,
            [&](int64_t output, int64_t row, T sum) {
              if (bias) sum += bias[output];
              both[row * 2 * D + output] = output < D ? convolve(s, row, output, D, sum) : sum;
            });
    for (int64_t row = 0; row < rows; row++) each(both + row * 2 * D, first, least(end, D), OF { return silu<T>(v); });
  }
  if (phase == 2)
    product(matrix(s, s.maps, s.maps_scales, D), Lines<T>{both, 2 * D}, D, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { maps[row * all + output] = sum; });
  if (phase == 3) {
    product(matrix(s, s.steps, s.steps_scales, R), Lines<T>{maps, all}, R, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { dt[row * D + output] = sum; });
    const T *bias = static_cast<const T*>(s.dt_bias), *skip = static_cast<const T*>(s.d);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t at = row * D;
      const T *x = both + 2 * at, *z = x + D, *low = maps + row * all;
      each(dt + at, first, end, OF { return softplus<T>(v + load_some(bias + i, end - i)); });
      for (int64_t i = first; i < end; i++) log_decay[at + i] = dt[at + i] * T(LOG2_E);
      const update::States<T> of = {static_cast<const T*>(s.a) + first * N, low + R, low + R + N,
                                    static_cast<const T*>(s.h) + (at + first) * N,
                                    static_cast<T*>(s.next_h) + (at + first) * N};
      update::step<T, true>(of, log_decay + at + first, dt + at + first, x + first, y + at + first, N, end - first);
      each(
          y + at, first, end, OF {
            v = fma(load_some(skip + i, end - i), load_some(x + i, end - i), v);
            return v * silu<T>(load_some(z + i, end - i));
          });
    }
  }
  if (phase == 4) leave(s, Lines<T>{y, D}, D, first, end);
  return 0;
}

// Phases: norms of rows, outputs of the projection in, heads of all rows, norms at the gate of rows, M outputs.
template <class T>
int64_t mamba2(const Mamba2Step& s, int64_t phase, int64_t first, int64_t end, void* memory) {
  const int64_t M = s.features, H = s.heads, P = s.width, N = s.states, G = s.groups, rows = s.rows, D = H * P;
  const int64_t conv = D + 2 * G * N, all = D + conv + H;  // a row of z, then x, B and C, then dt
  Arena arena(memory);
  T *normed = arena.take<T>(rows * M), *made = arena.take<T>(rows * all), *y = arena.take<T>(rows * D);
  if (!memory) return arena.used();
  if (phase == 0) enter(s, first, end, normed);
  if (phase == 1) {
    const T *bias = static_cast<const T*>(s.in_bias), *dt_bias = static_cast<const T*>(s.dt_bias);
    product(matrix(s, s.in_weight, s.in_scales, M), Lines<T>{normed, M}, M, rows, first, end,
            [&](int64_t output, int64_t row, T sum) {
              if (bias) sum += bias[output];
              if (output >= D + conv) sum += dt_bias[output - D - conv];
              made[row * all + output] =
                  output < D || output >= D + conv ? sum : convolve(s, row, output - D, conv, sum);
            });
    for (int64_t row = 0; row < rows; row++) {
      each(made + row * all, most(first, D), least(end, D + conv), OF { return silu<T>(v); });
      each(
          made + row * all, most(first, D + conv), end, OF {
            const vec<T> dt = softplus<T>(v), low = splat(T(s.low)), high = splat(T(s.high));
            const vec<T> raised = dt < low ? low : dt;
            return raised > high ? high : raised;
          });
    }
  }
  if (phase == 2)
    for (int64_t unit = first; unit < end; unit++) {
      const int64_t row = unit / H, head = unit % H, group = head / (H / G), at = row * D + head * P;
      const T *line = made + row * all, *z = line + head * P, *x = z + D, *b = line + 2 * D + group * N, *c = b + G * N;
      const T dt = line[D + conv + head], log_decay = dt * T(LOG2_E), skip = static_cast<const T*>(s.d)[head];
      const update::States<T> of = {static_cast<const T*>(s.a) + head, b, c, static_cast<const T*>(s.h) + at * N,
                                    static_cast<T*>(s.next_h) + at * N};
      update::step<T, false>(of, &log_decay, &dt, x, y + at, N, P);
      each(
          y + at, 0, P, OF {
            v = fma(splat(skip), load_some(x + i, P - i), v);
            return s.norm_before_gate ? v : v * silu<T>(load_some(z + i, P - i));
          });
    }
  if (phase == 3)
    for (int64_t row = first; row < end; row++) {
      T* line = y + row * D;
      const int64_t size = D / G;
      for (int64_t group = 0; s.gate && group < G; group++)
        rms(line + group * size, static_cast<const T*>(s.gate) + group * size, line + group * size, size, s.gate_eps);
      if (s.norm_before_gate) each(line, 0, D, OF { return v * silu<T>(load_some(made + row * all + i, D - i)); });
    }
  if (phase == 4) leave(s, Lines<T>{y, D}, D, first, end);
  return 0;
}
#undef OF

}  // namespace block
}  // namespace DUALFORM_ISA
