// One step of a block, norm and residual included, in phases between which all threads meet. A phase is a product with
// a matrix, and what can be done with its outputs one by one: the convolution behind the projection in, the recurrence
// behind the projection of the step. Of many rows and small matrices, each thread takes tiles of rows through all
// phases.
#pragma once

#include <cmath>
#include <type_traits>

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

// Rows [from, from + rows) of the tensors: all of them, or a tile.
struct Span {
  int64_t from, rows;
};

// A matrix of a step: `outputs` rows of `depth` numbers, and the same turned, or null.
template <class T>
struct Map {
  Matrix matrix;
  int64_t depth, outputs;
  T* turned;
};

// A matrix of a step, whose rows have `depth` numbers; beside those of 8 bits one without scales is of floats.
template <class S>
INLINE Matrix matrix(const S& s, const void* data, const void* scales, int64_t depth) {
  return {data, s.matrices == INT8 && !scales ? int64_t(FLOAT32) : s.matrices, depth, scales, s.group};
}
template <class T, class S>
INLINE Map<T> map(const S& s, const Matrix& matrix, int64_t outputs, Arena& arena) {
  const int64_t depth = matrix.stride, size = dense::turned_size<T>(depth, outputs);
  return {matrix, depth, outputs, by_tiles(s) ? arena.take<T>(size) : nullptr};
}

// A matrix of a step that takes all rows together.
template <class T, class S>
INLINE Map<T> map(const S& s, const void* data, const void* scales, int64_t depth, int64_t outputs) {
  return {matrix(s, data, scales, depth), depth, outputs, nullptr};
}

template <class T>
INLINE void turn(const Map<T>& map) {
  dense::turn(map.matrix, map.depth, map.outputs, map.turned);
}

// give(output, row, sum) for the outputs [first, end), which are all of them where the matrix is turned.
template <class T, class F>
INLINE void product(const Map<T>& map, Lines<T> x, int64_t rows, int64_t first, int64_t end, const F& give) {
  if (map.turned) return dense::outputs_of_turned(map.turned, x, map.depth, rows, map.outputs, give);
  dense::rows_of<T>(map.matrix, map.depth,
                    [&](auto weight) { dense::outputs(weight, x, map.depth, rows, first, end, give); });
}

// Every thread has memory for a tile of its own, or all have the same for all rows: of `seat` in the first case.
template <class S>
INLINE int64_t seats(const S& s) {
  return by_tiles(s) ? most(s.threads, 1) : 1;
}

// run(span, phase, first, end) for a phase of all rows. A step by tiles has two phases: 0 turns the matrices
// [first, end), and 1 takes the rows [first, end), a tile at a time, through all phases, of sizes size_of(phase, rows).
template <class T, class S, class G, class F>
INLINE void in_spans(const S& s, std::initializer_list<Map<T>> maps, int64_t phase, int64_t first, int64_t end,
                     int64_t phases, const G& size_of, const F& run) {
  if (!by_tiles(s)) return run(Span{0, s.rows}, phase, first, end);
  if (phase == 0)
    for (int64_t i = first; i < end; i++) turn(maps.begin()[i]);
  if (phase == 1)
    for (int64_t row = first; row < end; row += TILE) {
      const Span tile{row, least(TILE, end - row)};
      for (int64_t i = 0; i < phases; i++) run(tile, i, 0, size_of(i, tile.rows));
    }
}

// The norms of the rows [first, end) of a span.
template <class T, class S>
INLINE void enter(const S& s, Span span, int64_t first, int64_t end, T* to) {
  const int64_t M = s.features;
  for (int64_t row = first; row < end; row++)
    rms(static_cast<const T*>(s.x) + (span.from + row) * M, static_cast<const T*>(s.norm), to + row * M, M, s.eps);
}

// silu(conv) of the channels [first, end), of `channels`, in place of their new inputs x. BACK is one less than the
// taps, where the compiler knows it.
template <class T, class S, class BACK>
INLINE void convolve(const S& s, int64_t row, int64_t channels, int64_t first, int64_t end, T* x, BACK back) {
  const T *weight = static_cast<const T*>(s.conv_weight), *bias = static_cast<const T*>(s.conv_bias);
  const T* h = static_cast<const T*>(s.conv) + row * channels * back;
  T* next = static_cast<T*>(s.next_conv) + row * channels * back;
#pragma GCC ivdep
  for (int64_t d = first; d < end; d++) {  // the next inputs may lie where the last ones do
    T sum = bias ? bias[d] : T(0);
    const T in = x[d];
    for (int64_t j = 0; j < back; j++) {
      sum += weight[d * (back + 1) + j] * h[d * back + j];
      next[d * back + j] = j + 1 < back ? h[d * back + j + 1] : in;
    }
    x[d] = sum + weight[d * (back + 1) + back] * in;
  }
  each(x, first, end, OF { return silu<T>(v); });
}
template <class T, class S>
INLINE void convolve(const S& s, int64_t row, int64_t channels, int64_t first, int64_t end, T* x) {
  if (s.taps == 4)
    convolve(s, row, channels, first, end, x, std::integral_constant<int64_t, 3>());
  else
    convolve(s, row, channels, first, end, x, s.taps - 1);
}

// Outputs [first, end) of x + out(y), where y has rows of D numbers.
template <class T, class S>
INLINE void leave(const S& s, const Map<T>& out, Lines<T> y, Span span, int64_t first, int64_t end) {
  const T *x = static_cast<const T*>(s.x), *bias = static_cast<const T*>(s.out_bias);
  T* to = static_cast<T*>(s.y);
  product(out, y, span.rows, first, end, [&](int64_t output, int64_t row, T sum) {
    const int64_t at = (span.from + row) * s.features + output;
    to[at] = x[at] + (bias ? sum + bias[output] : sum);
  });
}

template <class T>
struct MambaMaps {
  Map<T> in, maps, steps, out;
};

// What a span of rows needs in between.
template <class T>
struct MambaRows {
  T *normed, *both, *maps, *y, *dt, *log_decay;
};

// Phases: norms of rows, 2 D outputs of the projection in, R + 2 N maps, D channels, M outputs.
template <class T>
void mamba_phase(const MambaStep& s, const MambaMaps<T>& of, const MambaRows<T>& m, Span span, int64_t phase,
                 int64_t first, int64_t end) {
  const int64_t M = s.features, D = s.width, N = s.states, R = s.rank, all = R + 2 * N, rows = span.rows;
  T *both = m.both, *maps = m.maps, *y = m.y, *dt = m.dt, *log_decay = m.log_decay;
  if (phase == 0) enter(s, span, first, end, m.normed);
  if (phase == 1) {
    const T* bias = static_cast<const T*>(s.in_bias);
    product(of.in, Lines<T>{m.normed, M}, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { both[row * 2 * D + output] = bias ? sum + bias[output] : sum; });
    for (int64_t row = 0; row < rows; row++) convolve(s, span.from + row, D, first, least(end, D), both + row * 2 * D);
  }
  if (phase == 2)
    product(of.maps, Lines<T>{both, 2 * D}, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { maps[row * all + output] = sum; });
  if (phase == 3) {
    product(of.steps, Lines<T>{maps, all}, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { dt[row * D + output] = sum; });
    const T *bias = static_cast<const T*>(s.dt_bias), *skip = static_cast<const T*>(s.d);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t at = row * D, state = ((span.from + row) * D + first) * N;
      const T *x = both + 2 * at, *z = x + D, *low = maps + row * all;
      each(dt + at, first, end, OF { return softplus<T>(v + load_some(bias + i, end - i)); });
      for (int64_t i = first; i < end; i++) log_decay[at + i] = dt[at + i] * T(LOG2_E);
      const update::States<T> states = {static_cast<const T*>(s.a) + first * N, low + R, low + R + N,
                                        static_cast<const T*>(s.h) + state, static_cast<T*>(s.next_h) + state};
      update::step<T, true>(states, log_decay + at + first, dt + at + first, x + first, y + at + first, N, end - first);
      each(
          y + at, first, end, OF {
            v = fma(load_some(skip + i, end - i), load_some(x + i, end - i), v);
            return v * silu<T>(load_some(z + i, end - i));
          });
    }
  }
  if (phase == 4) leave(s, of.out, Lines<T>{y, D}, span, first, end);
}

// Without memory these only return how many bytes of it they need, all threads together.

template <class T>
int64_t mamba(const MambaStep& s, int64_t phase, int64_t first, int64_t end, int64_t seat, void* memory) {
  const int64_t M = s.features, D = s.width, R = s.rank, all = R + 2 * s.states;
  Arena arena(memory);
  const MambaMaps<T> of = {map<T>(s, matrix(s, s.in_weight, s.in_scales, M), 2 * D, arena),
                           map<T>(s, matrix(s, s.maps, s.maps_scales, D), all, arena),
                           map<T>(s, matrix(s, s.steps, s.steps_scales, R), D, arena),
                           map<T>(s, matrix(s, s.out_weight, s.out_scales, D), M, arena)};
  MambaRows<T> own = {};
  for (int64_t i = 0, rows = by_tiles(s) ? TILE : s.rows; i < seats(s); i++) {
    const MambaRows<T> there = {arena.take<T>(rows * M), arena.take<T>(rows * 2 * D), arena.take<T>(rows * all),
                                arena.take<T>(rows * D), arena.take<T>(rows * D),     arena.take<T>(rows * D)};
    if (i == 0 || i == seat) own = there;
  }
  if (!memory) return arena.used();
  auto run = [&](Span span, int64_t part, int64_t from, int64_t to) { mamba_phase(s, of, own, span, part, from, to); };
  auto size_of = [&](int64_t part, int64_t rows) {
    const int64_t sizes[] = {rows, 2 * D, all, D, M};
    return sizes[part];
  };
  in_spans<T>(s, {of.in, of.maps, of.steps, of.out}, phase, first, end, 5, size_of, run);
  return 0;
}

template <class T>
struct Mamba2Maps {
  Map<T> in, out;
};

template <class T>
struct Mamba2Rows {
  T *normed, *made, *y;
};

// Phases: norms of rows, outputs of the projection in, heads of all rows, norms at the gate of rows, M outputs.
template <class T>
void mamba2_phase(const Mamba2Step& s, const Mamba2Maps<T>& of, const Mamba2Rows<T>& m, Span span, int64_t phase,
                  int64_t first, int64_t end) {
  const int64_t M = s.features, H = s.heads, P = s.width, N = s.states, G = s.groups, rows = span.rows, D = H * P;
  const int64_t conv = D + 2 * G * N, all = D + conv + H;  // a row of z, then x, B and C, then dt
  T *made = m.made, *y = m.y;
  if (phase == 0) enter(s, span, first, end, m.normed);
  if (phase == 1) {
    const T *bias = static_cast<const T*>(s.in_bias), *dt_bias = static_cast<const T*>(s.dt_bias);
    product(of.in, Lines<T>{m.normed, M}, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { made[row * all + output] = bias ? sum + bias[output] : sum; });
    for (int64_t row = 0; row < rows; row++) {
      convolve(s, span.from + row, conv, most(first - D, 0), least(end - D, conv), made + row * all + D);
      each(
          made + row * all, most(first, D + conv), end, OF {
            v += load_some(dt_bias + i - D - conv, end - i);
            const vec<T> dt = softplus<T>(v), low = splat(T(s.low)), high = splat(T(s.high));
            const vec<T> raised = dt < low ? low : dt;
            return raised > high ? high : raised;
          });
    }
  }
  if (phase == 2)
    for (int64_t unit = first; unit < end; unit++) {
      const int64_t row = unit / H, head = unit % H, group = head / (H / G), at = row * D + head * P;
      const int64_t state = (span.from * D + at) * N;
      const T *line = made + row * all, *z = line + head * P, *x = z + D, *b = line + 2 * D + group * N, *c = b + G * N;
      const T dt = line[D + conv + head], log_decay = dt * T(LOG2_E), skip = static_cast<const T*>(s.d)[head];
      const update::States<T> states = {static_cast<const T*>(s.a) + head, b, c, static_cast<const T*>(s.h) + state,
                                        static_cast<T*>(s.next_h) + state};
      update::step<T, false>(states, &log_decay, &dt, x, y + at, N, P);
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
  if (phase == 4) leave(s, of.out, Lines<T>{y, D}, span, first, end);
}

template <class T>
int64_t mamba2(const Mamba2Step& s, int64_t phase, int64_t first, int64_t end, int64_t seat, void* memory) {
  const int64_t M = s.features, H = s.heads, D = H * s.width, all = 2 * D + 2 * s.groups * s.states + H;
  Arena arena(memory);
  const Mamba2Maps<T> of = {map<T>(s, matrix(s, s.in_weight, s.in_scales, M), all, arena),
                            map<T>(s, matrix(s, s.out_weight, s.out_scales, D), M, arena)};
  Mamba2Rows<T> own = {};
  for (int64_t i = 0, rows = by_tiles(s) ? TILE : s.rows; i < seats(s); i++) {
    const Mamba2Rows<T> there = {arena.take<T>(rows * M), arena.take<T>(rows * all), arena.take<T>(rows * D)};
    if (i == 0 || i == seat) own = there;
  }
  if (!memory) return arena.used();
  auto run = [&](Span span, int64_t part, int64_t from, int64_t to) { mamba2_phase(s, of, own, span, part, from, to); };
  auto size_of = [&](int64_t part, int64_t rows) {
    const int64_t sizes[] = {rows, all, rows * H, rows, M};
    return sizes[part];
  };
  in_spans<T>(s, {of.in, of.out}, phase, first, end, 5, size_of, run);
  return 0;
}
#undef OF

}  // namespace block
}  // namespace DUALFORM_ISA
