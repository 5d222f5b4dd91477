// One step of a selective recurrence, and some of a short convolution, which streaming runs for every token. States are
// read and written once, in their own dtype, and the pointwise work around them is done in the same pass.
#pragma once

#include <utility>

#include "tile.h"

namespace DUALFORM_ISA {
namespace update {

// The row of a table that row i of x has.
INLINE int64_t row_of(const int64_t* indices, int64_t i) { return indices ? indices[i] : i; }

// Zeros instead of `count` numbers of a row.
template <class T>
INLINE void clear(const View& v, int64_t row, int64_t first, int64_t count, T* scratch) {
  for (int64_t end = first + count; first < end; first += LANES<T>) {
    const Window w = {row, 0, 1, first, least(LANES<T>, end - first), LANES<T>};
    store(scratch, vec<T>{});
    write(v, w, Rows<T>{scratch, LANES<T>});
  }
}

// How many channels of a state are converted at a time, where it has another dtype than what is computed.
constexpr int64_t BLOCK = 16;

// The rates, states and maps of some neighbouring channels that share their B and C.
template <class T>
struct States {
  const T *rates, *b, *c, *h;
  T* next;
};

// How far ahead of what is computed states are fetched: those of the next channels.
constexpr int64_t AHEAD = 2048;  // bytes

// The channels d + I; `alike` is the decay of all without MATRIX. Their numbers are known to the compiler, which keeps
// the sums in registers.
template <class T, bool MATRIX, size_t... I>
INLINE void some(const States<T>& of, vec<T> alike, const T* log_decay, const T* dt, const T* x, T* y, int64_t N,
                 int64_t d, std::index_sequence<I...>) {
  constexpr int L = LANES<T>;
  vec<T> sums[Q<T>] = {};
  const T in[] = {(dt[MATRIX ? d + int64_t(I) : 0] * x[d + int64_t(I)])...};
  const T log_decays[] = {(MATRIX ? log_decay[d + int64_t(I)] : T(0))...};
  for (int64_t n = 0; n < N; n += L) {
    const int64_t there = N - n;
    const vec<T> b = load_some(of.b + n, there), c = load_some(of.c + n, there);
    auto channel = [&](int64_t q, vec<T>& sum) __attribute__((always_inline)) {
      const int64_t at = (d + q) * N + n;
      __builtin_prefetch(of.h + at + AHEAD / int64_t(sizeof(T)));
      const vec<T> decay = MATRIX ? exp2<T>(log_decays[q] * load_some(of.rates + at, there)) : alike;
      const vec<T> v = fma(decay, load_some(of.h + at, there), b * in[q]);
      store_some(of.next + at, v, there);
      sum = fma(v, c, sum);
    };
    (channel(I, sums[I]), ...);
  }
  T lanes[L];
  store(lanes, merge(sums));
  for (int64_t q = 0; q < int64_t(sizeof...(I)); q++) {
    T sum = 0;
    for (int i = 0; i < L; i += Q<T>) sum += lanes[i + q];
    y[d + q] = sum;
  }
}

// `count` channels, Q at a time. With MATRIX every state has a rate and every channel a step size; without, there is
// one rate and one step size for all.
template <class T, bool MATRIX>
INLINE void step(const States<T>& of, const T* log_decay, const T* dt, const T* x, T* y, int64_t N, int64_t count) {
  const vec<T> alike = MATRIX ? vec<T>{} : exp2<T>(splat(log_decay[0] * of.rates[0]));
  int64_t d = 0;
  for (; d + Q<T> <= count; d += Q<T>)
    some<T, MATRIX>(of, alike, log_decay, dt, x, y, N, d, std::make_index_sequence<Q<T>>());
  for (; d < count; d++) some<T, MATRIX>(of, alike, log_decay, dt, x, y, N, d, std::make_index_sequence<1>());
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
  const bool converted = s.h.dtype != DTYPE<T> || s.next.dtype != DTYPE<T>;
  T* held = arena.take<T>(most(L, converted ? BLOCK * N : 0));
  if (!memory) return arena.used();

  const int64_t from = row_of(s.reads, row), to = row_of(s.writes, row);
  const Window all = {row, 0, 1, first, end - first, width};
  if (from < 0) {
    clear(s.y, row, first, end - first, held);
    if (!s.writes) clear(s.next, row, first * N, (end - first) * N, held);
    end_stream();
    return 0;
  }
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
  if (N == 0) memset(y, 0, sizeof(T) * width);
  for (int64_t d = N > 0 ? first : end, next; d < end; d = next) {  // those of one group of B and of C, and of one rate
    const int64_t group_b = d / each_b, group_c = d / each_c, size = d / s.per;
    next = least(end, least((group_b + 1) * each_b, (group_c + 1) * each_c));
    if (!s.matrix) next = least(next, (size + 1) * s.per);
    if (converted) next = least(next, d + BLOCK);
    const Window before = {from, 0, 1, d * N, (next - d) * N, (next - d) * N};
    const Window after = {to, 0, 1, before.first, before.count, before.width};
    Rows<T> h = target(s.next, after, held);
    States<T> of = {A + (s.matrix ? d * N : size), b + group_b * N, c + group_c * N, read(s.h, before, held).data,
                    h.data};
    const int64_t at = size - first / s.per;
    if (s.matrix)
      step<T, true>(of, log_decay + at, dt + at, x + d - first, y + d - first, N, next - d);
    else
      step<T, false>(of, log_decay + at, dt + at, x + d - first, y + d - first, N, next - d);
    write(s.next, after, h);
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

// f(pointer) with the type of the numbers behind it.
template <class F>
INLINE void typed(const Inputs& m, F f) {
  if (m.dtype == FLOAT32) f(static_cast<float*>(m.data));
  if (m.dtype == FLOAT64) f(static_cast<double*>(m.data));
  if (m.dtype == BFLOAT16) f(static_cast<bfloat16*>(m.data));
  if (m.dtype == FLOAT16) f(static_cast<float16*>(m.data));
}

// `count` slots of the channels [first, end) from slot `slot` on, round the ring of `size` where it ends: to lines of
// `width` numbers, one for each slot, and back.
template <class T>
INLINE void read_slots(const Inputs& m, int64_t row, int64_t first, int64_t end, int64_t slot, int64_t count,
                       int64_t size, T* lines, int64_t width) {
  typed(m, [&](const auto* from) {
    for (int64_t i = 0; i < count; i++, lines += width) {
      const auto* at = from + row * m.row + first * m.channel + (slot + i) % size * m.slot;
      for (int64_t d = 0; d < end - first; d++) lines[d] = number(at[d * m.channel]);
    }
  });
}
template <class T>
INLINE void write_slots(const Inputs& m, int64_t row, int64_t first, int64_t end, int64_t slot, int64_t count,
                        int64_t size, const T* lines, int64_t width) {
  typed(m, [&](auto* to) {
    for (int64_t i = 0; i < count; i++, lines += width) {
      auto* at = to + row * m.row + first * m.channel + (slot + i) % size * m.slot;
      for (int64_t d = 0; d < end - first; d++) put(at + d * m.channel, lines[d]);
    }
  });
}

// One step of a state that is not a ring, of the dtype that is computed in, whose slots lie side by side.
template <class T>
INLINE bool is_plain(const ConvUpdate& s) {
  return s.length == 1 && !s.seen && s.renewed == s.size && s.h.dtype == DTYPE<T> && s.next.dtype == DTYPE<T> &&
         s.h.slot == 1 && s.next.slot == 1;
}
template <class T>
INLINE void plain(const ConvUpdate& s, int64_t from, int64_t to, int64_t first, int64_t count, const T* x, T* y) {
  const int64_t size = s.size, skipped = size - (s.taps - 1);  // inputs that the convolution does not see any more
  const T *weight = static_cast<const T*>(s.weight) + first * s.taps, *bias = static_cast<const T*>(s.bias);
  const T* h = static_cast<const T*>(s.h.data) + from * s.h.row + first * s.h.channel;
  T* next = static_cast<T*>(s.next.data) + to * s.next.row + first * s.next.channel;
  for (int64_t d = 0; d < count; d++, weight += s.taps, h += s.h.channel, next += s.next.channel) {
    T sum = bias ? bias[first + d] : T(0);
    for (int64_t j = 0; j < size; j++) {
      if (j >= skipped) sum += weight[j - skipped] * h[j];
      next[j] = j + 1 < size ? h[j + 1] : x[d];
    }
    y[d] = sum + weight[s.taps - 1] * x[d];
  }
}

// Channels [first, end) of one row. There is a line for every input: those that the state holds, then the new ones.
template <class T>
int64_t conv(const ConvUpdate& s, int64_t row, int64_t first, int64_t end, void* memory) {
  constexpr int L = LANES<T>;
  const int64_t back = s.taps - 1, steps = s.length, count = end - first, width = up(count, L), size = s.size;
  const int64_t held = most(back, s.renewed - steps);
  Arena arena(memory);
  T *lines = arena.take<T>((held + steps) * width), *y = arena.take<T>(steps * width);
  T* weight = arena.take<T>((s.taps + 1) * width);
  if (!memory) return arena.used();

  const int64_t from = row_of(s.reads, row), to = row_of(s.writes, row);
  const Window all = {row, 0, steps, first, count, width};
  if (from < 0) {
    memset(y, 0, sizeof(T) * steps * width);
    write(s.y, all, Rows<T>{y, width});
    for (int64_t i = 0; i < size && !s.writes; i++) write_slots(s.next, row, first, end, i, 1, size, y, width);
    end_stream();
    return 0;
  }
  T *x = lines + held * width, *bias = weight + s.taps * width;
  copy(s.x, all, x);
  if (is_plain<T>(s) && size > 0) {
    plain(s, from, to, first, count, x, y);
  } else {
    const int64_t place = s.seen ? (s.seen[row] % size + size) % size : 0;  // the slot of the next input
    if (held > 0) read_slots(s.h, from, first, end, place + size - held, held, size, lines, width);
    for (int64_t j = 0; j <= s.taps; j++)
      for (int64_t d = count; d < width; d++) weight[j * width + d] = 0;
    for (int64_t j = 0; j < held; j++)
      for (int64_t d = count; d < width; d++) lines[j * width + d] = 0;
    for (int64_t j = 0; j < s.taps; j++)
      for (int64_t d = 0; d < count; d++)
        weight[j * width + d] = static_cast<const T*>(s.weight)[(first + d) * s.taps + j];
    for (int64_t d = 0; d < count; d++) bias[d] = s.bias ? static_cast<const T*>(s.bias)[first + d] : T(0);
    for (int64_t t = 0; t < steps; t++)
      for (int64_t i = 0; i < width; i += L) {
        vec<T> sum = load(bias + i);
        for (int64_t j = 0; j < s.taps; j++)
          sum = fma(load(weight + j * width + i), load(lines + (held - back + t + j) * width + i), sum);
        store(y + t * width + i, sum);
      }
    if (s.renewed > 0) {
      const int64_t oldest = s.seen ? (place + steps) % size + size - s.renewed : 0;
      write_slots(s.next, to, first, end, oldest, s.renewed, size, x + (steps - s.renewed) * width, width);
    }
  }
  if (s.silu)
    for (int64_t i = 0; i < steps * width; i += L) store(y + i, silu<T>(load(y + i)));
  write(s.y, all, Rows<T>{y, width});
  end_stream();
  return 0;
}

}  // namespace update
}  // namespace DUALFORM_ISA
