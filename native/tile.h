// How kernels read and write tensors: for a slice of channels, as many as a vector has lanes, and a tile of steps.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <initializer_list>

#include "common.h"
#include "simd.h"

namespace DUALFORM_ISA {

template <class T>
constexpr int64_t DTYPE = sizeof(T) == 4 ? FLOAT32 : FLOAT64;

// `count` numbers, or a whole vector where there are more; the other lanes are 0.
template <class T>
INLINE vec<T> load_some(const T* p, int64_t count) {
  if (count >= LANES<T>) return load(p);
  T lanes[LANES<T>] = {};
  for (int64_t i = 0; i < count; i++) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
INLINE void store_some(T* p, vec<T> v, int64_t count) {
  if (count >= LANES<T>) return store(p, v);
  for (int64_t i = 0; i < count; i++) p[i] = v[i];
}

// One line of numbers for every step of a tile, in the tensor itself or in scratch memory.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t t) const { return data + t * stride; }
};

// Steps [begin, end) of one row of a batch, and `width` channels from `first` on, of which the tensor has `count`.
struct Window {
  int64_t row, begin, end;
  int64_t first, count, width;
};

template <class S>
INLINE S* address(const View& v, const Window& w) {
  return static_cast<S*>(v.data) + w.row * v.row + w.begin * v.time + w.first * v.inner;
}

template <class T>
INLINE void convert(Rows<const T> from, Rows<T> to, int64_t steps, int64_t count) {
  for (int64_t t = 0; t < steps; t++) {
    const T* source = from[t];
    T* target = to[t];
    int64_t i = 0;
    for (; i + LANES<T> <= count; i += LANES<T>) {
      __builtin_prefetch(source + count + i);
      store(target + i, load(source + i));
    }
    for (; i < count; i++) target[i] = source[i];
  }
}

template <class S, class D>
INLINE void convert(Rows<const S> from, Rows<D> to, int64_t steps, int64_t count) {
  for (int64_t t = 0; t < steps; t++) {
    const S* source = from[t];
    D* target = to[t];
    for (int64_t i = 0; i < count; i++) put(target + i, number(source[i]));
  }
}

// Where time is contiguous, a tensor has a line of steps for every channel, and kernels want a line of channels for
// every step: `from` one `to` the other, Q steps of a vector of channels at once.
template <class T>
INLINE void turn_lines(Rows<const T> from, Rows<T> to, int64_t steps, int64_t count) {
  constexpr int L = LANES<T>, K = Q<T>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    for (int64_t j = i; j < i + L; j++)
      for (int64_t ahead = 0; ahead < steps; ahead += LINE / int(sizeof(T)))
        __builtin_prefetch(from[j] + steps + ahead);
    int64_t t = 0;
    for (; t + K <= steps; t += K) {
      vec<T> v[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) v[k] = load_pieces(from[i + k] + t, K * from.stride);
      turn(v);
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) store(to[t + k] + i, v[k]);
    }
    for (; t < steps; t++)
      for (int64_t j = i; j < i + L; j++) to[t][j] = from[j][t];
  }
  for (; i < count; i++)
    for (int64_t t = 0; t < steps; t++) to[t][i] = from[i][t];
}

// And back.
template <class T>
INLINE void turn_steps(Rows<const T> from, Rows<T> to, int64_t steps, int64_t count) {
  constexpr int L = LANES<T>, K = Q<T>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    int64_t t = 0;
    for (; t + K <= steps; t += K) {
      vec<T> v[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) v[k] = load(from[t + k] + i);
      turn(v);
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) store_pieces(to[i + k] + t, K * to.stride, v[k]);
    }
    for (; t < steps; t++)
      for (int64_t j = i; j < i + L; j++) to[j][t] = from[t][j];
  }
  for (; i < count; i++)
    for (int64_t t = 0; t < steps; t++) to[i][t] = from[t][i];
}

// The window to lines of channels, and back, as numbers of type S in a tensor.
template <class S, class T>
void take(const View& v, const Window& w, Rows<T> to) {
  const int64_t steps = w.end - w.begin;
  const S* from = address<const S>(v, w);
  if (v.inner == 1) return convert(Rows<const S>{from, v.time}, to, steps, w.count);
  if constexpr (sizeof(S) == sizeof(T)) {
    turn_lines(Rows<const T>{from, v.inner}, to, steps, w.count);
  } else {
    constexpr int64_t L = LANES<T>, BLOCK = 32;
    T block[L * BLOCK];
    for (int64_t i = 0; i < w.count; i += L)
      for (int64_t t = 0; t < steps; t += BLOCK) {
        const int64_t count = least(L, w.count - i), some = least(BLOCK, steps - t);
        convert(Rows<const S>{from + i * v.inner + t, v.inner}, Rows<T>{block, BLOCK}, count, some);
        turn_lines(Rows<const T>{block, BLOCK}, Rows<T>{to[t] + i, to.stride}, some, count);
      }
  }
}
template <class S, class T>
void give(const View& v, const Window& w, Rows<const T> from) {
  const int64_t steps = w.end - w.begin;
  S* to = address<S>(v, w);
  if (v.inner == 1) return convert(from, Rows<S>{to, v.time}, steps, w.count);
  if constexpr (sizeof(S) == sizeof(T)) {
    turn_steps(from, Rows<T>{to, v.inner}, steps, w.count);
  } else {
    constexpr int64_t L = LANES<T>, BLOCK = 32;
    T block[L * BLOCK];
    for (int64_t i = 0; i < w.count; i += L)
      for (int64_t t = 0; t < steps; t += BLOCK) {
        const int64_t count = least(L, w.count - i), some = least(BLOCK, steps - t);
        turn_steps(Rows<const T>{from[t] + i, from.stride}, Rows<T>{block, BLOCK}, some, count);
        convert(Rows<const T>{block, BLOCK}, Rows<S>{to + i * v.inner + t, v.inner}, count, some);
      }
  }
}

// A copy of the window, (steps, width). Channels that the tensor does not have are 0.
template <class T>
INLINE Rows<const T> copy(const View& v, const Window& w, T* scratch) {
  int64_t steps = w.end - w.begin;
  if (w.count < w.width) memset(scratch, 0, sizeof(T) * steps * w.width);
  Rows<T> to = {scratch, w.width};
  if (v.dtype == FLOAT32) take<float>(v, w, to);
  if (v.dtype == FLOAT64) take<double>(v, w, to);
  if (v.dtype == BFLOAT16) take<bfloat16>(v, w, to);
  if (v.dtype == FLOAT16) take<float16>(v, w, to);
  return {scratch, w.width};
}

// Whether the window can be used where it lies: its lines are lines of channels, of the right dtype, and complete.
template <class T>
INLINE bool in_place(const View& v, const Window& w) {
  return v.dtype == DTYPE<T> && v.inner == 1 && w.count == w.width;
}

// The window in the tensor itself, or a copy.
template <class T>
INLINE Rows<const T> read(const View& v, const Window& w, T* scratch) {
  if (in_place<T>(v, w)) return {address<const T>(v, w), v.time};
  return copy(v, w, scratch);
}

// Where a kernel computes what `write` then puts into the tensor: there already, or in scratch memory.
template <class T>
INLINE Rows<T> target(const View& v, const Window& w, T* scratch) {
  if (in_place<T>(v, w)) return {address<T>(v, w), v.time};
  return {scratch, w.width};
}

// To be followed by end_stream() before another thread reads the tensor.
template <class T>
INLINE void write(const View& v, const Window& w, Rows<T> rows) {
  if (v.dtype == DTYPE<T> && rows.data == address<T>(v, w)) return;
  int64_t steps = w.end - w.begin;
  Rows<const T> from = {rows.data, rows.stride};
  const bool lines = v.inner == 1 && reinterpret_cast<uintptr_t>(v.data) % LINE == 0 &&
                     (v.row | v.time | w.first | w.count) % (LINE / int(sizeof(T))) == 0;
  if (v.dtype == DTYPE<T> && lines) {
    T* to = address<T>(v, w);
    for (int64_t t = 0; t < steps; t++)
      for (int64_t i = 0; i < w.count; i += LANES<T>) stream(to + t * v.time + i, load(from[t] + i));
    return;
  }
  if (v.dtype == FLOAT32) give<float>(v, w, from);
  if (v.dtype == FLOAT64) give<double>(v, w, from);
  if (v.dtype == BFLOAT16) give<bfloat16>(v, w, from);
  if (v.dtype == FLOAT16) give<float16>(v, w, from);
}

// From `count` channels, whose `states` numbers each lie side by side and `stride` apart from those of the next
// channel, to one vector for each state, with a lane for each channel; and back. Further lanes are 0.
template <class T>
INLINE void gather(const T* from, int64_t stride, T* to, int64_t states, int64_t count) {
  for (int64_t n = 0; n < states; n++) {
    for (int64_t i = 0; i < count; i++) to[n * LANES<T> + i] = from[i * stride + n];
    for (int64_t i = count; i < LANES<T>; i++) to[n * LANES<T> + i] = 0;
  }
}

// The same, with states of 0 added up to `padded`. What an earlier sequence left there must go, though it is only ever
// multiplied by 0: that makes NaN of what is not finite.
template <class T>
INLINE void gather_padded(const T* from, int64_t stride, T* to, int64_t states, int64_t padded, int64_t count) {
  gather(from, stride, to, states, count);
  memset(to + states * LANES<T>, 0, sizeof(T) * (padded - states) * LANES<T>);
}

template <class T>
INLINE void scatter(const T* from, T* to, int64_t stride, int64_t states, int64_t count) {
  for (int64_t n = 0; n < states; n++)
    for (int64_t i = 0; i < count; i++) to[i * stride + n] = from[n * LANES<T> + i];
}

// The states of one slice, (states, lanes), to and from a tensor (states, D) whose first channel is the slice's.
template <class T>
INLINE void write_states(const T* h, T* to, int64_t stride, int64_t states, int64_t count) {
  constexpr int L = LANES<T>;
  const bool lines = WIDTH == LINE && reinterpret_cast<uintptr_t>(to) % LINE == 0 && stride % L == 0 && count == L;
  for (int64_t n = 0; n < states; n++)
    if (lines)
      stream(to + n * stride, load(h + n * L));
    else if (count == L)
      store(to + n * stride, load(h + n * L));
    else
      for (int64_t i = 0; i < count; i++) to[n * stride + i] = h[n * L + i];
}
template <class T>
INLINE void read_states(const T* from, int64_t stride, T* h, int64_t states, int64_t count) {
  constexpr int L = LANES<T>;
  for (int64_t n = 0; n < states; n++)
    if (count == L)
      store(h + n * L, load(from + n * stride));
    else
      for (int64_t i = 0; i < L; i++) h[n * L + i] = i < count ? from[n * stride + i] : T(0);
}

// A strip is up to STRIP slices that are copied together, because every step of a tile may lie on a page of its own.
// All of them but the last are full.
constexpr int64_t STRIP = 4;
template <class T>
INLINE bool starts_strip(const Share& share, int64_t i, int64_t strip) {
  return i == 0 || strip == STRIP || share.slices[i - 1].count < LANES<T>;
}
template <class T>
INLINE int64_t strip_width(const Share& share, int64_t i) {
  int64_t width = 0;
  for (int64_t j = i; j < least(i + STRIP, share.count); j++) {
    width += share.slices[j].count;
    if (share.slices[j].count < LANES<T>) break;
  }
  return width;
}

// The steps of one sequence inside of a tile.
struct Chunk {
  int64_t begin, end;
  int64_t sequence;
  bool starts, ends;  // whether the sequence starts, or ends, here
};

// The whole sequence that step t of a row belongs to.
INLINE Chunk whole(const Sequences& s, int64_t row, int64_t t) {
  if (!s.borders) return {0, s.length, row, true, true};
  int64_t low = 0, high = s.count;  // the last border that is not after t
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (s.borders[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  return {s.borders[low], s.borders[low + 1], low, true, true};
}

// The first, or last, chunk of the steps [begin, end).
INLINE Chunk first_chunk(const Sequences& s, int64_t row, int64_t begin, int64_t end) {
  Chunk p = whole(s, row, begin);
  return {begin, least(p.end, end), p.sequence, p.begin == begin, p.end <= end};
}
INLINE Chunk last_chunk(const Sequences& s, int64_t row, int64_t begin, int64_t end) {
  Chunk p = whole(s, row, end - 1);
  return {most(p.begin, begin), end, p.sequence, p.begin >= begin, p.end == end};
}

// With ids a row consists of runs of equal ids, which do not see each other: the part of a chunk that lies in its first
// run, or in its last.
template <class S>
INLINE Chunk first_run(const S& s, int64_t row, const Chunk& c) {
  if (!s.ids) return c;
  const int32_t* ids = s.ids + row * s.sequences.length;
  int64_t end = c.begin + 1;
  while (end < c.end && ids[end] == ids[c.begin]) end++;
  return {c.begin, end, c.sequence, c.starts, c.ends && end == c.end};
}
template <class S>
INLINE Chunk last_run(const S& s, int64_t row, const Chunk& c) {
  if (!s.ids) return c;
  const int32_t* ids = s.ids + row * s.sequences.length;
  int64_t begin = c.end - 1;
  while (begin > c.begin && ids[begin - 1] == ids[begin]) begin--;
  return {begin, c.end, c.sequence, c.starts && begin == c.begin, c.ends};
}
// Whether a run begins at step t, behind another one of its row.
template <class S>
INLINE bool begins_run(const S& s, int64_t row, int64_t t) {
  if (!s.ids || t == 0 || t == s.sequences.length) return false;
  const int32_t* ids = s.ids + row * s.sequences.length;
  return ids[t] != ids[t - 1];
}

// Cover `states`, a multiple of LEAST, by blocks of MOST, MOST / 2, ... or LEAST states, each as large as fits: calls
// f(Count<K>(), first) for a block of K.
template <int K>
struct Count {
  static constexpr int value = K;
};
template <int MOST, int LEAST, class F>
INLINE void by_blocks(int64_t states, F f, int64_t first = 0) {
  for (; states - first >= MOST; first += MOST) f(Count<MOST>(), first);
  if constexpr (MOST > LEAST) by_blocks<MOST / 2, LEAST>(states, f, first);
}

// Hands out the scratch memory of one thread, array after array; each begins at a cache line. Without memory it only
// adds up what is needed. AddressSanitizer guards what lies behind the numbers of an array.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t begin = used_, bytes = count * int64_t(sizeof(T));
    used_ += up(bytes, LINE) + GUARD;
    if (!memory_) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_ + begin, bytes);
    __asan_poison_memory_region(memory_ + begin + bytes, used_ - begin - bytes);
#endif
    return reinterpret_cast<T*>(memory_ + begin);
  }

  int64_t used() const { return used_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t GUARD = 4 * LINE;
#else
  static constexpr int64_t GUARD = 0;
#endif
  char* memory_;
  int64_t used_ = 0;
};

template <class T>
void add_groups(const Groups& s, int64_t row) {
  const int64_t N = s.states, size = s.rows * s.length * N;
  for (int64_t p = 0, next; p < s.count; p = next) {
    for (next = p + 1; next < s.count && s.group[next] == s.group[p];) next++;
    for (int64_t t = 0; t < s.length; t++) {
      const T* from = static_cast<const T*>(s.parts) + p * size + (row * s.length + t) * N;
      for (int64_t n = 0; n < N; n++) {
        T x = from[n];
        for (int64_t q = 1; q < next - p; q++) x += from[q * size + n];
        int64_t to = row * s.out.row + t * s.out.time + (s.group[p] * N + n) * s.out.inner;
        if (s.out.dtype == FLOAT32) put(static_cast<float*>(s.out.data) + to, x);
        if (s.out.dtype == FLOAT64) put(static_cast<double*>(s.out.data) + to, x);
        if (s.out.dtype == BFLOAT16) put(static_cast<bfloat16*>(s.out.data) + to, x);
        if (s.out.dtype == FLOAT16) put(static_cast<float16*>(s.out.data) + to, x);
      }
    }
  }
}

}  // namespace DUALFORM_ISA
