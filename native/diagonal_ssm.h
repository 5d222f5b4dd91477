// h_t = A h_{t-1} + u_t, y_t = 2 Re sum_n C_n h_n with complex A, C and h, and its backward. Channels lie in lanes, a
// few modes in registers. A complex number is two vectors, the real and then the imaginary part. The backward needs no
// states.
#pragma once

#include "tile.h"

namespace DUALFORM_ISA {
namespace diagonal {

constexpr int64_t TILE = 64;                 // steps
constexpr int BLOCK = 4;                     // modes in registers at once in the forward,
constexpr int BACK = WIDTH == LINE ? 2 : 1;  // and in the backward, where a mode takes more of them

INLINE int64_t padded(int64_t modes) { return up(modes, BLOCK); }

// A, or C, of every slice of a share, (slices, padded N, 2, lanes), times a factor for each part.
template <class T>
INLINE void gather_coefficients(const DiagonalSSM& s, const Share& share, const void* from, T* to, T real,
                                T imaginary) {
  const int64_t size = padded(s.states) * 2 * LANES<T>;
  memset(to, 0, sizeof(T) * share.count * size);
  for (int64_t i = 0; i < share.count; i++) {
    const Slice& slice = share.slices[i];
    gather(static_cast<const T*>(from) + slice.first * s.states * 2, s.states * 2, to + i * size, s.states * 2,
           slice.count);
  }
  for (int64_t i = 0; i < share.count * size; i++) to[i] *= i / LANES<T> % 2 ? imaginary : real;
}

// Takes BLOCK modes through the steps of a chunk, and adds 2 Re C h to y; the first block writes y instead. `c` is the
// real part of C times 2 and the imaginary part times -2.
template <class T>
INLINE void run(T* h_memory, const T* a_memory, const T* c_memory, Rows<const T> u, Rows<T> y, bool first,
                int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  vec<T> re[BLOCK], im[BLOCK];
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i++) re[i] = load(h_memory + 2 * i * L), im[i] = load(h_memory + (2 * i + 1) * L);
  vec<T> a[2 * BLOCK], c[2 * BLOCK];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * BLOCK; i++) a[i] = load(a_memory + i * L), c[i] = load(c_memory + i * L);
  for (int64_t t = begin; t < end; t++) {
    vec<T> in = load(u[t]), even = first ? vec<T>{} : load(y[t]), odd = {};
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i++) {
      vec<T> next = fma(a[2 * i], re[i], in) - a[2 * i + 1] * im[i];
      im[i] = fma(a[2 * i], im[i], a[2 * i + 1] * re[i]);
      re[i] = next;
      even = fma(c[2 * i], re[i], even);
      odd = fma(c[2 * i + 1], im[i], odd);
    }
    store(y[t], even + odd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i++) store(h_memory + 2 * i * L, re[i]), store(h_memory + (2 * i + 1) * L, im[i]);
}

template <class T>
int64_t forward(const DiagonalSSM& s, const Task& task) {
  constexpr int L = LANES<T>;
  const Share& share = *task.share;
  const int64_t N = s.states, size = padded(N) * 2 * L, T_ = s.sequences.length, tiles = (T_ + TILE - 1) / TILE;
  Arena arena(task.memory);
  T *a = arena.take<T>(share.count * size), *c = arena.take<T>(share.count * size);
  T *states = arena.take<T>(share.count * size), *u = arena.take<T>(TILE * STRIP * L);
  Rows<T> y = {arena.take<T>(TILE * STRIP * L), STRIP * L};
  if (!task.memory) return arena.used();

  gather_coefficients<T>(s, share, s.a, a, 1, 1);
  gather_coefficients<T>(s, share, s.c, c, 2, -2);
  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride) {
    memset(states, 0, sizeof(T) * share.count * size);
    for (int64_t k = 0; k < tiles; k++) {
      Window tile = {row, k * TILE, least((k + 1) * TILE, T_), 0, 0, STRIP * L};
      for (int64_t i = 0, strip = 0; i < share.count; i++, strip++) {
        const Slice& slice = share.slices[i];
        if (starts_strip<T>(share, i, strip)) {
          if (i > 0) write(s.y, tile, y);
          strip = 0, tile.first = slice.first, tile.count = strip_width<T>(share, i);
          copy(s.u, tile, u);
        }
        T* h = states + i * size;
        for (int64_t t = tile.begin; t < tile.end;) {
          Chunk chunk = first_chunk(s.sequences, row, t, tile.end);
          int64_t state = (chunk.sequence * s.width + slice.first) * 2 * N;
          if (chunk.starts)
            gather_padded(static_cast<const T*>(s.h0) + state, 2 * N, h, 2 * N, 2 * padded(N), slice.count);
          for (int64_t n = 0; n < N; n += BLOCK) {
            int64_t at = 2 * n * L;
            run<T>(h + at, a + i * size + at, c + i * size + at, {u + strip * L, STRIP * L},
                   {y.data + strip * L, STRIP * L}, n == 0, t - tile.begin, chunk.end - tile.begin);
          }
          if (chunk.ends) scatter(h, static_cast<T*>(s.final) + state, 2 * N, 2 * N, slice.count);
          t = chunk.end;
        }
      }
      write(s.y, tile, y);
    }
  }
  end_stream();
  return 0;
}

// What the backward carries from step to step for every mode, (modes, 2, lanes) each; see `adjoint`.
template <class T>
struct Adjoint {
  T *p, *q, *up, *uq;
  Adjoint at(int64_t offset) const { return {p + offset, q + offset, up + offset, uq + offset}; }
};

// From the last step of a chunk to the first, without the states: with
//     p_t = dy_t + conj(A) p_{t+1},   q_t = p_{t+1} + conj(A) q_{t+1}
// the gradient of h_t is g_t = 2 conj(C) p_t. The gradient of u_t is Re g_t, that of C is the sum over time of 2 u p,
// and that of A the sum of 2 conj(C) u q, because q is the derivative of p by conj(A). With DRIVEN it is computed as
// written, and `c` is 2 C. Without, it is what the gradient of the final state adds: dy is 0 there, and p stands for g
// itself. On entry and on return `p` is conj(A) p_{t+1} and `q` is q_t, of the step that comes next; `up` and `uq` are
// the sums.
template <class T, bool DRIVEN>
INLINE void adjoint(const Adjoint<T>& m, const T* a, const T* c, Rows<const T> u, Rows<const T> dy, Rows<T> du,
                    bool first, int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  vec<T> p_re[BACK], p_im[BACK], q_re[BACK], q_im[BACK], up_re[BACK], up_im[BACK], uq_re[BACK], uq_im[BACK];
#pragma GCC unroll 16
  for (int i = 0; i < BACK; i++) {
    const int re = 2 * i * L, im = re + L;
    p_re[i] = load(m.p + re), p_im[i] = load(m.p + im), q_re[i] = load(m.q + re), q_im[i] = load(m.q + im);
    if (DRIVEN) up_re[i] = load(m.up + re), up_im[i] = load(m.up + im);
    uq_re[i] = load(m.uq + re), uq_im[i] = load(m.uq + im);
  }
  for (int64_t t = end - 1; t >= begin; t--) {
    vec<T> in = load(u[t]), sum = first ? vec<T>{} : load(du[t]), out = {};
    if (DRIVEN) out = load(dy[t]);
#pragma GCC unroll 16
    for (int i = 0; i < BACK; i++) {
      const int re = 2 * i * L, im = re + L;
      vec<T> a_re = load(a + re), a_im = load(a + im), now_re = p_re[i] + out, now_im = p_im[i];
      uq_re[i] = fma(in, q_re[i], uq_re[i]), uq_im[i] = fma(in, q_im[i], uq_im[i]);
      if (DRIVEN) {
        up_re[i] = fma(in, now_re, up_re[i]), up_im[i] = fma(in, now_im, up_im[i]);
        sum = fma(load(c + re), now_re, fma(load(c + im), now_im, sum));
      } else {
        sum += now_re;
      }
      vec<T> next = fma(a_re, q_re[i], fma(a_im, q_im[i], now_re));
      q_im[i] = fma(a_re, q_im[i], now_im) - a_im * q_re[i], q_re[i] = next;
      p_re[i] = fma(a_re, now_re, a_im * now_im), p_im[i] = a_re * now_im - a_im * now_re;
    }
    store(du[t], sum);
  }
#pragma GCC unroll 16
  for (int i = 0; i < BACK; i++) {
    const int re = 2 * i * L, im = re + L;
    store(m.p + re, p_re[i]), store(m.p + im, p_im[i]), store(m.q + re, q_re[i]), store(m.q + im, q_im[i]);
    if (DRIVEN) store(m.up + re, up_re[i]), store(m.up + im, up_im[i]);
    store(m.uq + re, uq_re[i]), store(m.uq + im, uq_im[i]);
  }
}

// to = conj(x) y + plus, of BACK modes.
template <class T>
INLINE void conjugate_times(const T* x, const T* y, const T* plus, T* to) {
  constexpr int L = LANES<T>;
#pragma GCC unroll 16
  for (int re = 0; re < 2 * BACK * L; re += 2 * L) {
    const int im = re + L;
    vec<T> x_re = load(x + re), x_im = load(x + im), y_re = load(y + re), y_im = load(y + im);
    store(to + re, fma(x_re, y_re, fma(x_im, y_im, load(plus + re))));
    store(to + im, fma(x_re, y_im, load(plus + im)) - x_im * y_re);
  }
}

template <class T>
INLINE bool any(const T* x, int64_t count) {
  bool found = false;
  for (int64_t i = 0; i < count; i++) found |= x[i] != 0;
  return found;
}

template <class T>
int64_t backward(const DiagonalSSM& s, const Task& task, const Parts& parts) {
  constexpr int L = LANES<T>;
  constexpr int64_t BLOCK_SIZE = BACK * 2 * L;
  const Share& share = *task.share;
  const int64_t N = s.states, size = padded(N) * 2 * L, T_ = s.sequences.length, tiles = (T_ + TILE - 1) / TILE;
  Arena arena(task.memory);
  T *a = arena.take<T>(share.count * size), *c = arena.take<T>(share.count * size);
  T* carried = arena.take<T>(share.count * size * 8);
  T *u = arena.take<T>(TILE * STRIP * L), *dy = arena.take<T>(TILE * STRIP * L), *h = arena.take<T>(BLOCK_SIZE);
  Rows<T> du = {arena.take<T>(TILE * STRIP * L), STRIP * L};
  if (!task.memory) return arena.used();

  gather_coefficients<T>(s, share, s.a, a, 1, 1);
  gather_coefficients<T>(s, share, s.c, c, 2, 2);
  memset(carried, 0, sizeof(T) * share.count * size * 8);
  auto of = [&](int64_t array, int64_t i) { return carried + (i * 8 + array) * size; };
  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride)
    for (int64_t k = tiles - 1; k >= 0; k--) {
      Window tile = {row, k * TILE, least((k + 1) * TILE, T_), 0, 0, STRIP * L};
      for (int64_t i = 0, strip = 0; i < share.count; i++, strip++) {
        const Slice& slice = share.slices[i];
        if (starts_strip<T>(share, i, strip)) {
          if (i > 0) write(s.du, tile, du);
          strip = 0, tile.first = slice.first, tile.count = strip_width<T>(share, i);
          copy(s.u, tile, u), copy(s.dy, tile, dy);
        }
        Rows<const T> u_rows = {u + strip * L, STRIP * L}, dy_rows = {dy + strip * L, STRIP * L};
        Rows<T> du_rows = {du.data + strip * L, STRIP * L};
        for (int64_t n = 0; n < N; n += BACK) {
          const int64_t here = 2 * n * L, at = i * size + here, numbers = 2 * least(BACK, N - n);
          Adjoint<T> driven = Adjoint<T>{of(0, i), of(1, i), of(2, i), of(3, i)}.at(here);
          Adjoint<T> final = Adjoint<T>{of(4, i), of(5, i), nullptr, of(6, i)}.at(here);
          for (int64_t t = tile.end; t > tile.begin;) {
            Chunk chunk = last_chunk(s.sequences, row, tile.begin, t);
            const int64_t first = chunk.begin - tile.begin, end = t - tile.begin;
            const int64_t state = ((chunk.sequence * s.width + slice.first) * N + n) * 2;
            if (chunk.ends) {
              for (T* x : {driven.p, driven.q, final.q}) memset(x, 0, sizeof(T) * BLOCK_SIZE);
              gather_padded(static_cast<const T*>(s.dfinal) + state, 2 * N, final.p, numbers, 2 * BACK, slice.count);
            }
            adjoint<T, true>(driven, a + at, c + at, u_rows, dy_rows, du_rows, n == 0, first, end);
            if (any(final.p, BLOCK_SIZE) || any(final.q, BLOCK_SIZE))
              adjoint<T, false>(final, a + at, c + at, u_rows, dy_rows, du_rows, false, first, end);
            if (chunk.starts) {
              gather_padded(static_cast<const T*>(s.h0) + state, 2 * N, h, numbers, 2 * BACK, slice.count);
              conjugate_times(h, driven.p, driven.up, driven.up);
              conjugate_times(h, driven.q, driven.uq, driven.uq);
              conjugate_times(h, final.q, final.uq, final.uq);
              conjugate_times(c + at, driven.p, final.p, h);
              scatter(h, static_cast<T*>(s.dh0) + state, 2 * N, numbers, slice.count);
            }
            t = chunk.begin;
          }
        }
      }
      write(s.du, tile, du);
    }
  for (int64_t i = 0; i < share.count; i++) {
    const Slice& slice = share.slices[i];
    const int64_t to = (task.row * s.width + slice.first) * 2 * N;
    for (int64_t at = 0; at < size; at += BLOCK_SIZE)
      conjugate_times(c + i * size + at, of(3, i) + at, of(6, i) + at, of(7, i) + at);
    for (int64_t j = 0; j < size; j++) of(2, i)[j] *= 2;
    scatter(of(7, i), static_cast<T*>(parts.da) + to, 2 * N, 2 * N, slice.count);
    scatter(of(2, i), static_cast<T*>(parts.dc) + to, 2 * N, 2 * N, slice.count);
  }
  end_stream();
  return 0;
}

}  // namespace diagonal
}  // namespace DUALFORM_ISA
