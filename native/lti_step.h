// One step of a block with a diagonal, time-invariant system in it, in the phases of block.h: norms of rows, the
// states, where they are shared the sums that read them, and the outputs.
#pragma once

#include "activation.h"
#include "block.h"

namespace DUALFORM_ISA {
namespace block {

// Complex numbers lie in vectors as pairs. Each pair with its real part twice, its imaginary part twice, or turned
// around.
enum Pairs { REAL, IMAGINARY, TURNED };
template <class T, Pairs KIND>
INLINE vec<T> paired(vec<T> v) {
  auto source = [](int i) { return KIND == REAL ? i & ~1 : KIND == IMAGINARY ? i | 1 : i ^ 1; };
#if defined(__clang__)
  vec<T> found;
  for (int i = 0; i < LANES<T>; i++) found[i] = v[source(i)];
  return found;
#else
  typename Simd<T>::bits from;
  for (int i = 0; i < LANES<T>; i++) from[i] = source(i);
  return __builtin_shuffle(v, from);
#endif
}

// a h + more, of complex numbers.
template <class T>
INLINE vec<T> complex_fma(vec<T> a, vec<T> h, vec<T> more) {
  vec<T> signs;
  for (int i = 0; i < LANES<T>; i++) signs[i] = i % 2 ? T(1) : T(-1);
  const vec<T> turned = fma(signs * paired<T, IMAGINARY>(a), paired<T, TURNED>(h), more);
  return fma(paired<T, REAL>(a), h, turned);
}

#define OF [&](vec<T> v, [[maybe_unused]] int64_t i) __attribute__((always_inline))

// gelu(s + D u) of the features [first, end) of a row, in place of s.
template <class T>
INLINE void skip_and_gelu(const LtiStep& s, const T* u, T* y, int64_t first, int64_t end) {
  const T* skip = static_cast<const T*>(s.d);
  each(y, first, end, OF { return gelu(fma(load_some(skip + i, end - i), load_some(u + i, end - i), v)); });
}

// The states of the features [first, end) of a row, and s.
template <class T>
INLINE void own_states(const LtiStep& s, int64_t row, const T* u, T* y, int64_t first, int64_t end) {
  constexpr int L = LANES<T>;
  const int64_t size = 2 * s.states, at = row * s.features * size;
  const T *a = static_cast<const T*>(s.a), *b = static_cast<const T*>(s.b), *c = static_cast<const T*>(s.c);
  const T* h = static_cast<const T*>(s.h) + at;
  T* next = static_cast<T*>(s.next_h) + at;
  for (int64_t d = first; d < end; d += Q<T>) {
    const int64_t here = least(Q<T>, end - d);
    vec<T> sums[Q<T>] = {};
    for (int64_t q = 0; q < here; q++) {
      const vec<T> in = splat(u[d + q]);
      for (int64_t n = 0; n < size; n += L) {
        const int64_t i = (d + q) * size + n, there = size - n;
        const vec<T> v = complex_fma<T>(load_some(a + i, there), load_some(h + i, there), load_some(b + i, there) * in);
        store_some(next + i, v, there);
        sums[q] = fma(v, load_some(c + i, there), sums[q]);
      }
    }
    T lanes[L];
    store(lanes, merge(sums));
    for (int64_t q = 0; q < here; q++) {
      T sum = 0;
      for (int i = 0; i < L; i += Q<T>) sum += lanes[i + q];
      y[d + q] = sum;
    }
  }
}

template <class T>
struct LtiMaps {
  Map<T> in, read, out;  // the first two where states are shared
};

template <class T>
struct LtiRows {
  T *u, *y, *made, *inputs;
};

// Phases: norms of rows; features of all rows, or with shared states their 2 N numbers; M features, where states are
// shared; M outputs.
template <class T>
void lti_phase(const LtiStep& s, const LtiMaps<T>& of, const LtiRows<T>& m, Span span, int64_t phase, int64_t first,
               int64_t end) {
  const int64_t M = s.features, size = 2 * s.states, rows = span.rows;
  T *u = m.u, *y = m.y, *made = m.made, *inputs = m.inputs;
  if (phase == 0) enter(s, span, first, end, u);
  if (phase == 1 && !s.shared)
    for (int64_t row = first / M; row * M < end; row++) {
      const int64_t from = most(first - row * M, 0), to = least(end - row * M, M);
      own_states(s, span.from + row, u + row * M, y + row * M, from, to);
      skip_and_gelu(s, u + row * M, y + row * M, from, to);
    }
  const T* h = static_cast<const T*>(s.h) + (s.shared ? span.from * size : 0);
  T* next = static_cast<T*>(s.next_h) + (s.shared ? span.from * size : 0);
  if (phase == 1 && s.shared) {
    product(of.in, Lines<T>{u, M}, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { inputs[row * size + output] = sum; });
    const T* a = static_cast<const T*>(s.a);
    for (int64_t at = 0; at < rows * size; at += size)
      for (int64_t i = first; i < end; i += LANES<T>) {
        const vec<T> in = load_some(inputs + at + i, end - i);
        store_some(next + at + i, complex_fma<T>(load_some(a + i, end - i), load_some(h + at + i, end - i), in),
                   end - i);
      }
  }
  if (phase == 2) {
    product(of.read, Lines<T>{next, size}, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { y[row * M + output] = sum; });
    for (int64_t row = 0; row < rows; row++) skip_and_gelu(s, u + row * M, y + row * M, first, end);
  }
  if (phase == 3) {
    const T *x = static_cast<const T*>(s.x) + span.from * M, *bias = static_cast<const T*>(s.out_bias);
    T* to = static_cast<T*>(s.y) + span.from * M;
    const int64_t behind = s.gate ? 0 : M;  // rows of W before those that open the gate
    auto give = [&](int64_t output, int64_t row, T sum) {
      made[row * 2 * M + output] = bias ? sum + bias[output] : sum;
    };
    product(of.out, Lines<T>{y, M}, rows, behind + first, behind + end, give);
    if (!s.gate && !of.out.turned) product(of.out, Lines<T>{y, M}, rows, first, end, give);
    for (int64_t row = 0; row < rows; row++) {
      const T *p = s.gate ? y + row * M : made + row * 2 * M, *q = made + row * 2 * M + behind, *from = x + row * M;
      for (int64_t i = first; i < end; i += LANES<T>) {
        const vec<T> open = load_some(q + i, end - i), in = load_some(p + i, end - i);
        const vec<T> out = in / (exp2<T>(open * T(-LOG2_E)) + T(1));
        store_some(to + row * M + i, load_some(from + i, end - i) + out, end - i);
      }
    }
  }
}

template <class T>
int64_t lti(const LtiStep& s, int64_t phase, int64_t first, int64_t end, int64_t seat, void* memory) {
  const int64_t M = s.features, size = 2 * s.states;
  Arena arena(memory);
  LtiMaps<T> of = {{}, {}, map<T>(s, Matrix{s.out_weight, s.matrices, M, nullptr, 0}, s.gate ? M : 2 * M, arena)};
  if (s.shared) {
    of.in = map<T>(s, Matrix{s.b, s.dtype, M, nullptr, 0}, size, arena);
    of.read = map<T>(s, Matrix{s.c, s.dtype, size, nullptr, 0}, M, arena);
  }
  LtiRows<T> own = {};
  for (int64_t i = 0, rows = by_tiles(s) ? TILE : s.rows; i < seats(s); i++) {
    const LtiRows<T> there = {arena.take<T>(rows * M), arena.take<T>(rows * M), arena.take<T>(rows * 2 * M),
                              arena.take<T>(s.shared ? rows * size : 0)};
    if (i == 0 || i == seat) own = there;
  }
  if (!memory) return arena.used();
  auto run = [&](Span span, int64_t part, int64_t from, int64_t to) { lti_phase(s, of, own, span, part, from, to); };
  auto size_of = [&](int64_t part, int64_t rows) {
    const int64_t sizes[] = {rows, s.shared ? size : rows * M, s.shared ? M : 0, M};
    return sizes[part];
  };
  in_spans<T>(s, {of.out, of.in, of.read}, phase, first, end, 4, size_of, run);
  return 0;
}
#undef OF

}  // namespace block
}  // namespace DUALFORM_ISA
