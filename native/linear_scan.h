// h_t = a_t h_{t-1} + b_t elementwise, in either direction, real or complex, and its backward. The real and imaginary
// parts of complex numbers lie in neighbouring lanes, as they do in memory. The states of a strip of channels stay in
// registers for a tile.
#pragma once

#include "tile.h"

namespace DUALFORM_ISA {
namespace linear {

constexpr int64_t TILE = 32;

// Lane i of the result is lane `from(i)` of v.
template <class T, class F>
INLINE vec<T> permute(vec<T> v, F from) {
#if defined(__clang__)
  vec<T> found;
  for (int i = 0; i < LANES<T>; i++) found[i] = v[from(i)];
  return found;
#else
  typename Simd<T>::bits lanes;
  for (int i = 0; i < LANES<T>; i++) lanes[i] = from(i);
  return __builtin_shuffle(v, lanes);
#endif
}
template <class T>
INLINE vec<T> reals(vec<T> v) {
  return permute<T>(v, [](int i) { return i / 2 * 2; });
}
template <class T>
INLINE vec<T> imaginaries(vec<T> v) {
  return permute<T>(v, [](int i) { return i / 2 * 2 + 1; });
}
template <class T>
INLINE vec<T> swapped(vec<T> v) {
  return permute<T>(v, [](int i) { return i ^ 1; });
}
// (-1, 1, -1, 1 ..)
template <class T>
INLINE vec<T> signs() {
  vec<T> v;
  for (int i = 0; i < LANES<T>; i++) v[i] = i % 2 ? T(1) : T(-1);
  return v;
}

// a b, and conj(a) b.
template <class T, bool COMPLEX>
INLINE vec<T> times(vec<T> a, vec<T> b) {
  if constexpr (!COMPLEX) return a * b;
  return fma(reals<T>(a), b, imaginaries<T>(a) * signs<T>() * swapped<T>(b));
}
template <class T, bool COMPLEX>
INLINE vec<T> conj_times(vec<T> a, vec<T> b) {
  if constexpr (!COMPLEX) return a * b;
  return fma(reals<T>(a), b, -(imaginaries<T>(a) * signs<T>() * swapped<T>(b)));
}

// The channels of a strip in one row of a state, (sequences, D), to and from vectors; `at` is where the row begins.
template <class T>
INLINE void load_strip(const void* from, int64_t at, const Window& w, vec<T>* h) {
  T lanes[STRIP * LANES<T>] = {};
  memcpy(lanes, static_cast<const T*>(from) + at + w.first, sizeof(T) * w.count);
  for (int64_t i = 0; i < STRIP; i++) h[i] = load(lanes + i * LANES<T>);
}
template <class T>
INLINE void store_strip(const vec<T>* h, void* to, int64_t at, const Window& w) {
  T lanes[STRIP * LANES<T>];
  for (int64_t i = 0; i < STRIP; i++) store(lanes + i * LANES<T>, h[i]);
  memcpy(static_cast<T*>(to) + at + w.first, lanes, sizeof(T) * w.count);
}

// The chunk of [begin, end) that the scan meets first; it is taken off the interval.
INLINE Chunk next_chunk(const Sequences& s, int64_t row, int64_t* begin, int64_t* end, bool reverse) {
  Chunk chunk = reverse ? last_chunk(s, row, *begin, *end) : first_chunk(s, row, *begin, *end);
  (reverse ? *end : *begin) = reverse ? chunk.begin : chunk.end;
  return chunk;
}

template <class T, bool COMPLEX>
int64_t forward(const LinearScan& s, const Task& task) {
  constexpr int L = LANES<T>, W = STRIP * L;
  const Share& share = *task.share;
  const int64_t T_ = s.sequences.length, tiles = (T_ + TILE - 1) / TILE;
  Arena arena(task.memory);
  T *a_copy = arena.take<T>(TILE * W), *b_copy = arena.take<T>(TILE * W), *out_copy = arena.take<T>(TILE * W);
  T* states = arena.take<T>(share.count * L + W);
  if (!task.memory) return arena.used();

  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride)
    for (int64_t j = 0; j < tiles; j++) {
      const int64_t k = s.reverse ? tiles - 1 - j : j;
      Window w = {row, k * TILE, least((k + 1) * TILE, T_), 0, 0, W};
      for (int64_t i = 0; i < share.count; i += STRIP) {
        w.first = share.slices[i].first, w.count = strip_width<T>(share, i);
        Rows<const T> a = read(s.a, w, a_copy), b = read(s.b, w, b_copy);
        Rows<T> out = target(s.h, w, out_copy);
        vec<T> h[STRIP];
        for (int p = 0; p < STRIP; p++) h[p] = load(states + (i + p) * L);
        for (int64_t begin = w.begin, end = w.end; begin < end;) {
          Chunk chunk = next_chunk(s.sequences, row, &begin, &end, s.reverse);
          if (s.reverse ? chunk.ends : chunk.starts) load_strip<T>(s.h0, chunk.sequence * s.width, w, h);
          for (int64_t n = 0; n < chunk.end - chunk.begin; n++) {
            int64_t t = (s.reverse ? chunk.end - 1 - n : chunk.begin + n) - w.begin;
#pragma GCC unroll 16
            for (int p = 0; p < STRIP; p++) {
              __builtin_prefetch(a[t] + W + p * L);
              __builtin_prefetch(b[t] + W + p * L);
              h[p] = times<T, COMPLEX>(load(a[t] + p * L), h[p]) + load(b[t] + p * L);
              store(out[t] + p * L, h[p]);
            }
          }
          if (s.reverse ? chunk.starts : chunk.ends) store_strip<T>(h, s.final, chunk.sequence * s.width, w);
        }
        for (int p = 0; p < STRIP; p++) store(states + (i + p) * L, h[p]);
        write(s.h, w, out);
      }
    }
  end_stream();
  return 0;
}

// Against the direction of the scan. The whole gradient of h_t is g_t = dh_t + conj(a_{t+1}) g_{t+1}; db = g and
// da = g conj(h_{t-1}).
template <class T, bool COMPLEX>
int64_t backward(const LinearScan& s, const Task& task) {
  constexpr int L = LANES<T>, W = STRIP * L;
  const Share& share = *task.share;
  const int64_t T_ = s.sequences.length, tiles = (T_ + TILE - 1) / TILE;
  const int64_t back = s.reverse ? 1 : -1;  // from a step to the one that the scan met before it
  Arena arena(task.memory);
  T *a_copy = arena.take<T>(TILE * W), *dh_copy = arena.take<T>(TILE * W), *h_copy = arena.take<T>((TILE + 1) * W);
  T *da_copy = arena.take<T>(TILE * W), *db_copy = arena.take<T>(TILE * W);
  T* carries = arena.take<T>(share.count * L + W);
  if (!task.memory) return arena.used();

  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride)
    for (int64_t j = 0; j < tiles; j++) {
      const int64_t k = s.reverse ? j : tiles - 1 - j;
      Window w = {row, k * TILE, least((k + 1) * TILE, T_), 0, 0, W};
      for (int64_t i = 0; i < share.count; i += STRIP) {
        w.first = share.slices[i].first, w.count = strip_width<T>(share, i);
        Rows<const T> a = read(s.a, w, a_copy), dh = read(s.dh, w, dh_copy);
        Window around = w;  // the states of the tile and of the step before it
        around.begin = most(w.begin + least(back, 0), 0), around.end = least(w.end + most(back, 0), T_);
        Rows<const T> h = read(s.h, around, h_copy);
        Rows<T> da = {da_copy, W}, db = {db_copy, W};
        vec<T> carry[STRIP], first[STRIP] = {};
        for (int p = 0; p < STRIP; p++) carry[p] = load(carries + (i + p) * L);
        for (int64_t begin = w.begin, end = w.end; begin < end;) {
          Chunk chunk = next_chunk(s.sequences, row, &begin, &end, !s.reverse);
          const int64_t state = chunk.sequence * s.width, steps = chunk.end - chunk.begin;
          const bool enters = s.reverse ? chunk.starts : chunk.ends, leaves = s.reverse ? chunk.ends : chunk.starts;
          if (enters) load_strip<T>(s.dfinal, state, w, carry);
          if (leaves) load_strip<T>(s.h0, state, w, first);
          for (int64_t n = 0; n < steps; n++) {
            const int64_t at = s.reverse ? chunk.begin + n : chunk.end - 1 - n, t = at - w.begin;
            const bool last = leaves && n == steps - 1;
            const T* before = h[(last ? at : at + back) - around.begin];
#pragma GCC unroll 16
            for (int p = 0; p < STRIP; p++) {
              __builtin_prefetch(a[t] + W + p * L);
              __builtin_prefetch(dh[t] + W + p * L);
              __builtin_prefetch(before + W + p * L);
              vec<T> g = load(dh[t] + p * L) + carry[p];
              store(db[t] + p * L, g);
              store(da[t] + p * L, conj_times<T, COMPLEX>(last ? first[p] : load(before + p * L), g));
              carry[p] = conj_times<T, COMPLEX>(load(a[t] + p * L), g);
            }
          }
          if (leaves) store_strip<T>(carry, s.dh0, state, w);
        }
        for (int p = 0; p < STRIP; p++) store(carries + (i + p) * L, carry[p]);
        write(s.da, w, da);
        write(s.db, w, db);
      }
    }
  end_stream();
  return 0;
}

}  // namespace linear
}  // namespace DUALFORM_ISA
