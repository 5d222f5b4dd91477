// One step of a selective recurrence, and one of a short convolution, which streaming runs for every token. States are
// read and written once, and the pointwise work around them is done in the same pass.
#pragma once

#include "tile.h"

namespace DUALFORM_ISA {
namespace update {

// The rates, states and maps of some neighbouring channels that share their B and C.
template <class T>
struct States {
  const T *rates, *b, *c, *h;
  T* next;
};

// `count` channels, Q at a time. With MATRIX every state has a rate and every channel a step size; without, there is
// one rate and one step size for all.
template <class T, bool MATRIX>
INLINE void step(const States<T>& of, const T* log_decay, const T* dt, const T* x, T* y, int64_t N, int64_t count) {
  constexpr int L = LANES<T>;
  const vec<T> alike = MATRIX ? vec<T>{} : exp2<T>(splat(log_decay[0] * of.rates[0]));
  for (int64_t d = 0; d < count; d += Q<T>) {
    const int64_t here = least(Q<T>, count - d);
    vec<T> sums[Q<T>] = {};
    for (int64_t n = 0; n < N; n += L) {
      const int64_t there = N - n;
      const vec<T> b = load_some(of.b + n, there), c = load_some(of.c + n, there);
      for (int64_t q = 0; q < here; q++) {
        const int64_t at = (d + q) * N + n, size = MATRIX ? d + q : 0;
        const vec<T> decay = MATRIX ? exp2<T>(log_decay[size] * load_some(of.rates + at, there)) : alike;
        const vec<T> v = fma(decay, load_some(of.h + at, there), b * (dt[size] * x[d + q]));
        store_some(of.next + at, v, there);
        sums[q] = fma(v, c, sums[q]);
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

// Channels [first, end) of one row, both multiples of `per`; `memory` as for the other kernels.
template <class T>
int64_t selective(const SelectiveUpdate& s, int64_t row, int64_t first, int64_t end, void* memory) {
  constexpr int L = LANES<T>;
  const int64_t N = s.states, width = up(end - first, L), sizes = (end - first) / s.per, wide = up(sizes, L);
  Arena arena(memory);
  T *x = arena.take<T>(width), *y = arena.take<T>(width), *z = arena.take<T>(width);
  T *dt = arena.take<T>(wide), *log_decay = arena.take<T>(wide);
  T *b = arena.take<T>(s.groups_b * N), *c = arena.take<T>(s.groups_c * N);
  if (!memory) return arena.used();

  const Window all = {row, 0, 1, first, end - first, width};
  copy(s.x, all, x);
  copy(s.dt, {row, 0, 1, first / s.per, sizes, wide}, dt);
  copy(s.b, {row, 0, 1, 0, s.groups_b * N, s.groups_b * N}, b);
  copy(s.c, {row, 0, 1, 0, s.groups_c * N, s.groups_c * N}, c);
  const T *A = static_cast<const T*>(s.a), *bias = static_cast<const T*>(s.dt_bias);
  for (int64_t i = 0; i < wide; i += L) {
    vec<T> v = load(dt + i);
    if (bias) v += load_some(bias + first / s.per + i, sizes - i);
    if (s.softplus) v = softplus<T>(v);
    store(dt + i, v);
    store(log_decay + i, v * T(LOG2_E));
  }

  const int64_t each_b = s.width / s.groups_b, each_c = s.width / s.groups_c;
  for (int64_t d = first, next; d < end; d = next) {  // those of one group of B and of C, and of one rate
    const int64_t group_b = d / each_b, group_c = d / each_c, size = d / s.per;
    next = least(end, least((group_b + 1) * each_b, (group_c + 1) * each_c));
    if (!s.matrix) next = least(next, (size + 1) * s.per);
    States<T> of = {A + (s.matrix ? d * N : size), b + group_b * N, c + group_c * N,
                    static_cast<const T*>(s.h) + (row * s.width + d) * N,
                    static_cast<T*>(s.next) + (row * s.width + d) * N};
    const int64_t at = size - first / s.per;
    if (s.matrix)
      step<T, true>(of, log_decay + at, dt + at, x + d - first, y + d - first, N, next - d);
    else
      step<T, false>(of, log_decay + at, dt + at, x + d - first, y + d - first, N, next - d);
  }

  if (s.gated) copy(s.z, all, z);
  const T* skip = static_cast<const T*>(s.d);
  for (int64_t i = 0; i < end - first; i += L) {
    vec<T> v = load_some(y + i, end - first - i);
    if (skip) v = fma(load_some(skip + first + i, end - first - i), load(x + i), v);
    if (s.gated) v *= silu<T>(load(z + i));
    store(y + i, v);
  }
  write(s.y, all, Rows<T>{y, width});
  end_stream();
  return 0;
}

template <class T>
int64_t conv(const ConvUpdate& s, int64_t row, void* memory) {
  constexpr int L = LANES<T>;
  const int64_t D = s.width, back = s.taps - 1, width = up(D, L);
  Arena arena(memory);
  T *x = arena.take<T>(width), *y = arena.take<T>(width);
  if (!memory) return arena.used();

  const Window all = {row, 0, 1, 0, D, width};
  copy(s.x, all, x);
  const T *weight = static_cast<const T*>(s.weight), *bias = static_cast<const T*>(s.bias);
  const T* h = static_cast<const T*>(s.h) + row * D * back;
  T* next = static_cast<T*>(s.next) + row * D * back;
  for (int64_t d = 0; d < D; d++, weight += s.taps, h += back, next += back) {
    T sum = bias ? bias[d] : T(0);
    for (int64_t j = 0; j < back; j++) {
      sum += weight[j] * h[j];
      next[j] = j + 1 < back ? h[j + 1] : x[d];
    }
    y[d] = sum + weight[back] * x[d];
  }
  if (s.silu)
    for (int64_t i = 0; i < width; i += L) store(y + i, silu<T>(load_some(y + i, D - i)));
  write(s.y, all, Rows<T>{y, width});
  end_stream();
  return 0;
}

}  // namespace update
}  // namespace DUALFORM_ISA
