// h_t = A h_{t-1} + u_t, y_t = 2 Re sum_n C_n h_n with complex A, C and h, and its backward: channels in lanes, a few
// modes in registers. A complex number is two vectors, real and imaginary part, one after the other.
#pragma once

#include "tile.h"

namespace DUALFORM_ISA {
namespace diagonal {

constexpr int64_t TILE = DIAGONAL_SSM_TILE;
constexpr int BLOCK = 4;  // modes in registers at once

INLINE int64_t padded(int64_t modes) { return (modes + BLOCK - 1) / BLOCK * BLOCK; }

// A, or C, of every slice of a slab, (slices, padded N, 2, lanes), times a factor for each part.
template <class T>
INLINE void gather_coefficients(const DiagonalSSM& s, const Slab& slab, const void* from, T* to, T real, T imaginary) {
  const int64_t size = padded(s.states) * 2 * LANES<T>;
  memset(to, 0, sizeof(T) * slab.count * size);
  for (int64_t i = 0; i < slab.count; i++) {
    const Slice& slice = slab.slices[i];
    gather(static_cast<const T*>(from) + slice.first * s.states * 2, s.states * 2, to + i * size, s.states * 2,
           slice.count);
  }
  for (int64_t i = 0; i < slab.count * size; i++) to[i] *= i / LANES<T> % 2 ? imaginary : real;
}

template <class T>
INLINE T* saved_states(const DiagonalSSM& s, int64_t row, int64_t k, const Slice& slice) {
  int64_t tiles = (s.sequences.length + TILE - 1) / TILE;
  return static_cast<T*>(s.saved) + (row * tiles + k) * s.states * 2 * s.width + slice.first;
}

// BLOCK modes through the steps of a piece; adds 2 Re C h to y, which the first block begins. `c` is (2, -2) C.
template <class T>
INLINE void run(T* h_memory, const T* a, const T* c, Rows<const T> u, Rows<T> y, bool first, int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  vec<T> re[BLOCK], im[BLOCK];
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i++) re[i] = load(h_memory + 2 * i * L), im[i] = load(h_memory + (2 * i + 1) * L);
  for (int64_t t = begin; t < end; t++) {
    vec<T> in = load(u[t]), even = first ? vec<T>{} : load(y[t]), odd = {};
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i++) {
      vec<T> a_re = load(a + 2 * i * L), a_im = load(a + (2 * i + 1) * L);
      vec<T> next = fma(a_re, re[i], in) - a_im * im[i];
      im[i] = fma(a_re, im[i], a_im * re[i]);
      re[i] = next;
      even = fma(load(c + 2 * i * L), re[i], even);
      odd = fma(load(c + (2 * i + 1) * L), im[i], odd);
    }
    store(y[t], even + odd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i++) store(h_memory + 2 * i * L, re[i]), store(h_memory + (2 * i + 1) * L, im[i]);
}

template <class T>
int64_t forward(const DiagonalSSM& s, const Task& task) {
  constexpr int L = LANES<T>;
  const Slab& slab = *task.slab;
  const int64_t N = s.states, size = padded(N) * 2 * L, T_ = s.sequences.length, tiles = (T_ + TILE - 1) / TILE;
  Arena arena(task.memory);
  T *a = arena.take<T>(slab.count * size), *c = arena.take<T>(slab.count * size);
  T *states = arena.take<T>(slab.count * size), *u = arena.take<T>(TILE * PANEL * L);
  Rows<T> y = {arena.take<T>(TILE * PANEL * L), PANEL * L};
  if (!task.memory) return arena.used(task.memory);

  gather_coefficients<T>(s, slab, s.a, a, 1, 1);
  gather_coefficients<T>(s, slab, s.c, c, 2, -2);
  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride) {
    memset(states, 0, sizeof(T) * slab.count * size);
    for (int64_t k = 0; k < tiles; k++) {
      Window tile = {row, k * TILE, least((k + 1) * TILE, T_), 0, 0, PANEL * L};
      for (int64_t i = 0, panel = 0; i < slab.count; i++, panel++) {
        const Slice& slice = slab.slices[i];
        if (starts_panel<T>(slab, i, panel)) {
          if (i > 0) write(s.y, tile, y);
          panel = 0, tile.first = slice.first, tile.count = panel_width<T>(slab, i);
          copy(s.u, tile, u);
        }
        T* h = states + i * size;
        if (s.saved) write_states(h, saved_states<T>(s, row, k, slice), s.width, 2 * N, slice.count);
        for (int64_t t = tile.begin; t < tile.end;) {
          Piece piece = first_piece(s.sequences, row, t, tile.end);
          int64_t state = (piece.sequence * s.width + slice.first) * 2 * N;
          if (piece.starts) gather(static_cast<const T*>(s.h0) + state, 2 * N, h, 2 * N, slice.count);
          for (int64_t n = 0; n < N; n += BLOCK) {
            int64_t at = 2 * n * L;
            run<T>(h + at, a + i * size + at, c + i * size + at, {u + panel * L, PANEL * L},
                   {y.data + panel * L, PANEL * L}, n == 0, t - tile.begin, piece.end - tile.begin);
          }
          if (piece.ends) scatter(h, static_cast<T*>(s.final) + state, 2 * N, 2 * N, slice.count);
          t = piece.end;
        }
      }
      write(s.y, tile, y);
    }
  }
  end_stream();
  return 0;
}

// The states of a piece again: h_{t-1} to `before`, (steps, BLOCK, 2, lanes); dC += (2, -2) dy h.
template <class T>
INLINE void replay(T* h_memory, const T* a, T* dc_memory, Rows<const T> u, Rows<const T> dy, T* before, int64_t begin,
                   int64_t end) {
  constexpr int L = LANES<T>;
  vec<T> re[BLOCK], im[BLOCK], dc_re[BLOCK], dc_im[BLOCK];
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i++) {
    re[i] = load(h_memory + 2 * i * L), im[i] = load(h_memory + (2 * i + 1) * L);
    dc_re[i] = load(dc_memory + 2 * i * L), dc_im[i] = load(dc_memory + (2 * i + 1) * L);
  }
  for (int64_t t = begin; t < end; t++) {
    vec<T> in = load(u[t]), out = load(dy[t]) * T(2);
    T* to = before + t * BLOCK * 2 * L;
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i++) {
      vec<T> a_re = load(a + 2 * i * L), a_im = load(a + (2 * i + 1) * L);
      store(to + 2 * i * L, re[i]), store(to + (2 * i + 1) * L, im[i]);
      vec<T> next = fma(a_re, re[i], in) - a_im * im[i];
      im[i] = fma(a_re, im[i], a_im * re[i]);
      re[i] = next;
      dc_re[i] = fma(out, re[i], dc_re[i]);
      dc_im[i] = dc_im[i] - out * im[i];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i++) {
    store(h_memory + 2 * i * L, re[i]), store(h_memory + (2 * i + 1) * L, im[i]);
    store(dc_memory + 2 * i * L, dc_re[i]), store(dc_memory + (2 * i + 1) * L, dc_im[i]);
  }
}

// With g_t = dL/dh_t in full, g_t = 2 conj(C) dy_t + conj(A) g_{t+1}: from the last step of a piece to the first, `carry`
// being conj(A) g_{t+1}. du = sum_n Re g; dA += g conj(h_{t-1}). `c` is (2, -2) C.
template <class T>
INLINE void adjoint(T* carry_memory, const T* a, const T* c, T* da_memory, Rows<const T> dy, const T* before, Rows<T> du,
                    bool first, int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  vec<T> re[BLOCK], im[BLOCK], da_re[BLOCK], da_im[BLOCK];
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i++) {
    re[i] = load(carry_memory + 2 * i * L), im[i] = load(carry_memory + (2 * i + 1) * L);
    da_re[i] = load(da_memory + 2 * i * L), da_im[i] = load(da_memory + (2 * i + 1) * L);
  }
  for (int64_t t = end - 1; t >= begin; t--) {
    vec<T> out = load(dy[t]), sum = first ? vec<T>{} : load(du[t]);
    const T* h = before + t * BLOCK * 2 * L;
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i++) {
      vec<T> a_re = load(a + 2 * i * L), a_im = load(a + (2 * i + 1) * L);
      vec<T> h_re = load(h + 2 * i * L), h_im = load(h + (2 * i + 1) * L);
      vec<T> g_re = fma(out, load(c + 2 * i * L), re[i]), g_im = fma(out, load(c + (2 * i + 1) * L), im[i]);
      sum += g_re;
      da_re[i] = fma(g_re, h_re, fma(g_im, h_im, da_re[i]));
      da_im[i] = fma(g_im, h_re, da_im[i]) - g_re * h_im;
      re[i] = fma(a_re, g_re, a_im * g_im);
      im[i] = a_re * g_im - a_im * g_re;
    }
    store(du[t], sum);
  }
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i++) {
    store(carry_memory + 2 * i * L, re[i]), store(carry_memory + (2 * i + 1) * L, im[i]);
    store(da_memory + 2 * i * L, da_re[i]), store(da_memory + (2 * i + 1) * L, da_im[i]);
  }
}

template <class T>
int64_t backward(const DiagonalSSM& s, const Task& task, const Parts& parts) {
  constexpr int L = LANES<T>;
  const Slab& slab = *task.slab;
  const int64_t N = s.states, size = padded(N) * 2 * L, T_ = s.sequences.length, tiles = (T_ + TILE - 1) / TILE;
  Arena arena(task.memory);
  T *a = arena.take<T>(slab.count * size), *c = arena.take<T>(slab.count * size);
  T *da = arena.take<T>(slab.count * size), *dc = arena.take<T>(slab.count * size);
  T *carries = arena.take<T>(slab.count * size), *h = arena.take<T>(size), *before = arena.take<T>(TILE * BLOCK * 2 * L);
  T *u = arena.take<T>(TILE * PANEL * L), *dy = arena.take<T>(TILE * PANEL * L);
  Rows<T> du = {arena.take<T>(TILE * PANEL * L), PANEL * L};
  if (!task.memory) return arena.used(task.memory);

  gather_coefficients<T>(s, slab, s.a, a, 1, 1);
  gather_coefficients<T>(s, slab, s.c, c, 2, -2);
  memset(da, 0, sizeof(T) * slab.count * size);
  memset(dc, 0, sizeof(T) * slab.count * size);
  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride)
    for (int64_t k = tiles - 1; k >= 0; k--) {
      Window tile = {row, k * TILE, least((k + 1) * TILE, T_), 0, 0, PANEL * L};
      for (int64_t i = 0, panel = 0; i < slab.count; i++, panel++) {
        const Slice& slice = slab.slices[i];
        if (starts_panel<T>(slab, i, panel)) {
          if (i > 0) write(s.du, tile, du);
          panel = 0, tile.first = slice.first, tile.count = panel_width<T>(slab, i);
          copy(s.u, tile, u), copy(s.dy, tile, dy);
        }
        Rows<const T> u_rows = {u + panel * L, PANEL * L}, dy_rows = {dy + panel * L, PANEL * L};
        Rows<T> du_rows = {du.data + panel * L, PANEL * L};
        read_states(saved_states<T>(s, row, k, slice), s.width, h, 2 * N, slice.count);
        memset(h + 2 * N * L, 0, sizeof(T) * (size - 2 * N * L));
        for (int64_t n = 0; n < N; n += BLOCK) {
          const int64_t here = 2 * n * L, at = i * size + here, there = 2 * least(BLOCK, N - n);
          for (int64_t t = tile.begin; t < tile.end;) {
            Piece piece = first_piece(s.sequences, row, t, tile.end);
            int64_t state = ((piece.sequence * s.width + slice.first) * N + n) * 2;
            if (piece.starts) gather(static_cast<const T*>(s.h0) + state, 2 * N, h + here, there, slice.count);
            replay<T>(h + here, a + at, dc + at, u_rows, dy_rows, before, t - tile.begin, piece.end - tile.begin);
            t = piece.end;
          }
          for (int64_t t = tile.end; t > tile.begin;) {
            Piece piece = last_piece(s.sequences, row, tile.begin, t);
            int64_t state = ((piece.sequence * s.width + slice.first) * N + n) * 2;
            if (piece.ends) {
              memset(carries + at, 0, sizeof(T) * BLOCK * 2 * L);
              gather(static_cast<const T*>(s.dfinal) + state, 2 * N, carries + at, there, slice.count);
            }
            adjoint<T>(carries + at, a + at, c + at, da + at, dy_rows, before, du_rows, n == 0,
                       piece.begin - tile.begin, t - tile.begin);
            if (piece.starts) scatter(carries + at, static_cast<T*>(s.dh0) + state, 2 * N, there, slice.count);
            t = piece.begin;
          }
        }
      }
      write(s.du, tile, du);
    }
  for (int64_t i = 0; i < slab.count; i++) {
    const Slice& slice = slab.slices[i];
    const int64_t to = (task.row * s.width + slice.first) * 2 * N;
    scatter(da + i * size, static_cast<T*>(parts.da) + to, 2 * N, 2 * N, slice.count);
    scatter(dc + i * size, static_cast<T*>(parts.dc) + to, 2 * N, 2 * N, slice.count);
  }
  end_stream();
  return 0;
}

}  // namespace diagonal
}  // namespace DUALFORM_ISA
