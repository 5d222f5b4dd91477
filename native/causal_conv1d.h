// y_t = act(bias + sum_j weight_j x_{t - (W-1) + j}) per channel, and its backward. The inputs of a chunk are copied to
// a line in scratch memory, behind the W - 1 inputs before them, which come from the sequence or from its initial
// state.
#pragma once

#include "tile.h"

namespace DUALFORM_ISA {
namespace conv {

// Steps of a tile: few, because each step of x and y may lie on a page of its own; more where time is contiguous, so
// that whole cache lines are read.
constexpr int64_t TILE = 8, LONG_TILE = 32;
INLINE int64_t tile_steps(std::initializer_list<const View*> views) {
  for (const View* view : views)
    if (view->inner != 1) return LONG_TILE;
  return TILE;
}

// Weights (W, lanes) of every slice of a share, one after the other.
template <class T>
INLINE void gather_weights(const CausalConv1d& s, const Share& share, T* to) {
  for (int64_t i = 0; i < share.count; i++) {
    const Slice& slice = share.slices[i];
    gather(static_cast<const T*>(s.weight) + slice.first * s.taps, s.taps, to + i * s.taps * LANES<T>, s.taps,
           slice.count);
  }
}

// The W - 1 inputs in one row of a state, (sequences, D, W - 1), for a strip of channels: to (W - 1, channels), and
// back.
template <class T>
INLINE void read_history(const CausalConv1d& s, const void* from, int64_t sequence, const Window& w, T* rows) {
  const int64_t back = s.taps - 1;
  const T* state = static_cast<const T*>(from) + (sequence * s.width + w.first) * back;
  for (int64_t j = 0; j < back; j++)
    for (int64_t i = 0; i < w.width; i++) rows[j * w.width + i] = i < w.count ? state[i * back + j] : T(0);
}
template <class T>
INLINE void write_history(const CausalConv1d& s, const T* rows, void* to, int64_t sequence, const Window& w) {
  const int64_t back = s.taps - 1;
  T* state = static_cast<T*>(to) + (sequence * s.width + w.first) * back;
  for (int64_t i = 0; i < w.count; i++)
    for (int64_t j = 0; j < back; j++) state[i * back + j] = rows[j * w.width + i];
}

INLINE bool is_padding(const CausalConv1d& s, int64_t row, int64_t t) {
  return s.ids && s.ids[row * s.sequences.length + t] < 0;
}
// The first step that step t sees: of its sequence, or of its run, where that is within reach.
INLINE int64_t first_seen(const CausalConv1d& s, int64_t row, int64_t t) {
  if (!s.ids) return whole(s.sequences, row, t).begin;
  int64_t first = t;
  while (first > 0 && first > t - (s.taps - 1) && !begins_run(s, row, first)) first--;
  return first;
}

// What one slice is convolved with. On a line, a step is STRIP vectors behind the one before.
template <class T>
struct Filter {
  const T* weight;  // (W, lanes)
  vec<T> bias;
  int64_t taps;

  Filter(const CausalConv1d& s, const T* weights, int64_t first) : weight(weights), bias{}, taps(s.taps) {
    if (s.bias) bias = load_some(static_cast<const T*>(s.bias) + first, s.width - first);
  }
};

// One output before its activation. TAPS is the number of weights, or 0 where it is only known at run time.
template <class T, int TAPS>
INLINE vec<T> convolve(const Filter<T>& f, const T* line) {
  vec<T> sum = f.bias;
#pragma GCC unroll 4
  for (int64_t j = 0; j < (TAPS ? TAPS : f.taps); j++)
    sum = fma(load(f.weight + j * LANES<T>), load(line + j * STRIP * LANES<T>), sum);
  return sum;
}

template <class T, int TAPS>
INLINE void run(const Filter<T>& f, bool activate, const T* line, Rows<T> y, int64_t column, int64_t steps) {
  for (int64_t t = 0; t < steps; t++) {
    vec<T> sum = convolve<T, TAPS>(f, line + t * STRIP * LANES<T>);
    store(y[t] + column, activate ? silu<T>(sum) : sum);
  }
}

// Replaces dy by the gradient before the activation; then dbias += dy and dweight_j += x_{t - (W-1) + j} dy.
template <class T, int TAPS>
INLINE void gather_gradients(const Filter<T>& f, bool activate, const T* line, T* dy, T* dweight, T* dbias,
                             int64_t steps) {
  constexpr int L = LANES<T>, W = STRIP * L;
  vec<T> sums[TAPS ? TAPS : 1], bias = load(dbias);
#pragma GCC unroll 4
  for (int j = 0; j < TAPS; j++) sums[j] = load(dweight + j * L);
  for (int64_t t = 0; t < steps; t++) {
    vec<T> g = load(dy + t * W);
    if (activate) {
      g *= silu_curve<T>(convolve<T, TAPS>(f, line + t * W)).slope;
      store(dy + t * W, g);
    }
    bias += g;
#pragma GCC unroll 4
    for (int j = 0; j < TAPS; j++) sums[j] = fma(load(line + (t + j) * W), g, sums[j]);
    for (int64_t j = 0; !TAPS && j < f.taps; j++)
      store(dweight + j * L, fma(load(line + (t + j) * W), g, load(dweight + j * L)));
  }
  store(dbias, bias);
#pragma GCC unroll 4
  for (int j = 0; j < TAPS; j++) store(dweight + j * L, sums[j]);
}

// dx_r += sum_j weight_j dy_{r-j} along a line of W - 1 + steps inputs.
template <class T, int TAPS>
INLINE void spread(const Filter<T>& f, const T* dy, T* dline, int64_t steps) {
  constexpr int L = LANES<T>, W = STRIP * L;
  const int64_t back = f.taps - 1;
  for (int64_t r = 0; r < back + steps; r++) {
    vec<T> sum = load(dline + r * W);
    if (TAPS && r >= back && r < steps) {
#pragma GCC unroll 4
      for (int j = 0; j < TAPS; j++) sum = fma(load(f.weight + j * L), load(dy + (r - j) * W), sum);
    } else {
      for (int64_t j = most(0, r - steps + 1); j <= least(back, r); j++)
        sum = fma(load(f.weight + j * L), load(dy + (r - j) * W), sum);
    }
    store(dline + r * W, sum);
  }
}

constexpr int USUAL = 4;  // the number of weights for which there is code of its own

template <class T>
int64_t forward(const CausalConv1d& s, const Task& task) {
  constexpr int L = LANES<T>, W = STRIP * L;
  const Share& share = *task.share;
  const int64_t T_ = s.sequences.length, back = s.taps - 1;
  Arena arena(task.memory);
  T *weights = arena.take<T>(share.count * s.taps * L), *histories = arena.take<T>((share.count + STRIP) * back * L);
  const int64_t tile = tile_steps({&s.x, &s.y});
  T *line = arena.take<T>((back + tile) * W), *y_copy = arena.take<T>(tile * W);
  if (!task.memory) return arena.used();

  gather_weights(s, share, weights);
  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride)
    for (int64_t begin = 0, next; begin < T_; begin = next) {
      Chunk chunk = first_run(s, row, first_chunk(s.sequences, row, begin, least((begin / tile + 1) * tile, T_)));
      next = chunk.end;
      const bool padding = is_padding(s, row, begin), alone = padding || begins_run(s, row, begin);
      for (int64_t i = 0; i < share.count; i += STRIP) {
        Window w = {row, chunk.begin, chunk.end, share.slices[i].first, strip_width<T>(share, i), W};
        T* history = histories + i * back * L;
        if (alone)
          memset(line, 0, sizeof(T) * back * W);
        else if (chunk.starts)
          read_history(s, s.h0, chunk.sequence, w, line);
        else
          memcpy(line, history, sizeof(T) * back * W);
        copy(s.x, w, line + back * W);
        Rows<T> y = target(s.y, w, y_copy);
        const int64_t steps = chunk.end - chunk.begin;
        if (padding) memset(line + back * W, 0, sizeof(T) * steps * W);
        for (int64_t t = 0; padding && t < steps; t++) memset(y[t], 0, sizeof(T) * w.width);
        for (int64_t p = 0; p * L < w.count && !padding; p++) {
          const Filter<T> f(s, weights + (i + p) * s.taps * L, w.first + p * L);
          if (s.taps == USUAL)
            run<T, USUAL>(f, s.silu, line + p * L, y, p * L, steps);
          else
            run<T, 0>(f, s.silu, line + p * L, y, p * L, steps);
        }
        write(s.y, w, y);
        const T* last = line + steps * W;
        if (chunk.ends)
          write_history(s, last, s.final, chunk.sequence, w);
        else
          memcpy(history, last, sizeof(T) * back * W);
      }
    }
  end_stream();
  return 0;
}

// From the last chunk to the first. The gradient of an input is complete when its own step has been visited; until then
// it is pending, as are those of the W - 1 inputs before a chunk. At the start of a sequence what is pending belongs to
// the initial state.
template <class T>
int64_t backward(const CausalConv1d& s, const Task& task, const Parts& parts) {
  constexpr int L = LANES<T>, W = STRIP * L;
  const Share& share = *task.share;
  const int64_t T_ = s.sequences.length, back = s.taps - 1;
  Arena arena(task.memory);
  T *weights = arena.take<T>(share.count * s.taps * L), *dweights = arena.take<T>(share.count * s.taps * L);
  T *dbias = arena.take<T>(share.count * L), *pending = arena.take<T>((share.count + STRIP) * back * L);
  const int64_t tile = tile_steps({&s.x, &s.dy, &s.dx});
  T *line = arena.take<T>((back + tile) * W), *dline = arena.take<T>((back + tile) * W);
  T* dy = arena.take<T>(tile * W);
  if (!task.memory) return arena.used();

  gather_weights(s, share, weights);
  memset(dweights, 0, sizeof(T) * share.count * s.taps * L);
  memset(dbias, 0, sizeof(T) * share.count * L);
  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride)
    for (int64_t end = T_, next; end > 0; end = next) {
      Chunk chunk = last_run(s, row, last_chunk(s.sequences, row, (end - 1) / tile * tile, end));
      next = chunk.begin;
      const int64_t start = first_seen(s, row, chunk.begin);
      const bool padding = is_padding(s, row, next), alone = padding || begins_run(s, row, end);
      const int64_t steps = chunk.end - chunk.begin;
      for (int64_t i = 0; i < share.count; i += STRIP) {
        Window w = {row, chunk.begin, chunk.end, share.slices[i].first, strip_width<T>(share, i), W};
        if (s.ids && start > 0)
          memset(dline, 0, sizeof(T) * back * W);  // dline is free until below
        else if (chunk.begin - start < back)
          read_history(s, s.h0, chunk.sequence, w, dline);
        for (int64_t j = 0; j < back; j++) {
          const int64_t at = chunk.begin - back + j;
          Window one = w;
          one.begin = at, one.end = at + 1;
          if (at >= start)
            copy(s.x, one, line + j * W);
          else
            memcpy(line + j * W, dline + (at - start + back) * W, sizeof(T) * W);
        }
        copy(s.x, w, line + back * W);
        copy(s.dy, w, dy);
        if (padding) memset(line, 0, sizeof(T) * (back + steps) * W), memset(dy, 0, sizeof(T) * steps * W);
        memset(dline, 0, sizeof(T) * steps * W);
        if (alone)
          memset(dline + steps * W, 0, sizeof(T) * back * W);
        else if (chunk.ends)
          read_history(s, s.dfinal, chunk.sequence, w, dline + steps * W);
        else
          memcpy(dline + steps * W, pending + i * back * L, sizeof(T) * back * W);
        for (int64_t p = 0; p * L < w.count; p++) {
          const Filter<T> f(s, weights + (i + p) * s.taps * L, w.first + p * L);
          T *dweight = dweights + (i + p) * s.taps * L, *db = dbias + (i + p) * L;
          if (s.taps == USUAL) {
            gather_gradients<T, USUAL>(f, s.silu, line + p * L, dy + p * L, dweight, db, steps);
            spread<T, USUAL>(f, dy + p * L, dline + p * L, steps);
          } else {
            gather_gradients<T, 0>(f, s.silu, line + p * L, dy + p * L, dweight, db, steps);
            spread<T, 0>(f, dy + p * L, dline + p * L, steps);
          }
        }
        write(s.dx, w, Rows<T>{dline + back * W, W});
        if (chunk.starts)
          write_history(s, dline, s.dh0, chunk.sequence, w);
        else
          memcpy(pending + i * back * L, dline, sizeof(T) * back * W);
      }
    }
  for (int64_t i = 0; i < share.count; i++) {
    const Slice& slice = share.slices[i];
    const int64_t channel = task.row * s.width + slice.first;
    scatter(dweights + i * s.taps * L, static_cast<T*>(parts.da) + channel * s.taps, s.taps, s.taps, slice.count);
    memcpy(static_cast<T*>(parts.dc) + channel, dbias + i * L, sizeof(T) * slice.count);
  }
  end_stream();
  return 0;
}

}  // namespace conv
}  // namespace DUALFORM_ISA
