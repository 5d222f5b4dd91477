// h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t per head, and its backward: matrix products within tiles of
// steps, while the states of a head stay in a core's cache from tile to tile.
//
// A chunk is what a sequence, or a run of equal ids, has of a tile. Let h be the state that enters it, l_t the sum of
// dt A from its first step up to step t, and l that up to its last step. Then y = (M o C B^T) x dt + e^(l_t) C h, where
// M_ts = e^(l_t - l_s) for s <= t and 0 beyond; and the state e^l h + (e^(l - l_t) x dt)^T B leaves it. All heads of a
// group share C B^T. The backward goes from the last span to the first, computes the states that enter the tiles of a
// span again, and adds up what B, C and C B^T get from all heads until the span is done.
//
// A step that is not finite reaches outputs from its own step on, of its own sequence. The gradients of the decays are
// sums along a chunk, and those of B and C products over a chunk: there it may reach the whole chunk.
#pragma once

#include "gemm.h"

namespace DUALFORM_ISA {
namespace ssd {

constexpr int64_t Q = SSD_TILE, TILES = SSD_SPAN / SSD_TILE;
constexpr double FORGOTTEN = 1e4;  // a decay of 2^-FORGOTTEN is 0, and differences of its multiples are finite

// (rows, columns) to (columns, rows), with columns of 0 added up to `wide`.
template <class T>
INLINE void transpose(Rows<const T> from, int64_t rows, int64_t columns, Rows<T> to, int64_t wide) {
  for (int64_t j = 0; j < columns; j += 8)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = j; k < least(j + 8, columns); k++) to[k][i] = from[i][k];
  for (int64_t j = 0; j < columns; j++)
    for (int64_t i = rows; i < wide; i++) to[j][i] = 0;
}

// What all heads of a group share in a tile. A vector that begins in the last row of bt, ct or cb may end behind it.
template <class T>
struct Maps {
  T *b, *c;    // (Q, N)
  T *bt, *ct;  // (N, Q); ct in the backward only
  T* cb;       // (Q, Q), C_t . B_s

  static Maps take(Arena& arena, int64_t N) {
    constexpr int L = LANES<T>;
    return {arena.take<T>(Q * N), arena.take<T>(Q * N), arena.take<T>(Q * N + L), arena.take<T>(Q * N + L),
            arena.take<T>(Q * Q + L)};
  }
  void read(const Ssd& s, int64_t row, int64_t begin, int64_t end, int64_t group) const {
    const int64_t N = s.states, steps = end - begin, wide = up(steps, LANES<T>);
    const Window w = {row, begin, end, group * N, N, N};
    copy(s.b, w, b), copy(s.c, w, c);
    transpose<T>({b, N}, steps, N, {bt, Q}, wide);
    gemm<T>({c, N, 1}, {bt, Q}, {cb, Q}, steps, N, wide / LANES<T>, 0);
  }
};

// The steps of one head in a chunk, and the decays between them. The sums of dt A up to each step, in units of log2,
// are held as a number and what it lacks: decays are differences of two sums, which may be far smaller than either.
template <class T>
struct Steps {
  alignas(LINE) T dt[Q], log[Q], rest[Q], since[Q], until[Q];
  T decay;

  void read(const T* dts, int64_t stride, T a, int64_t count) {
    double sum = 0;
    for (int64_t t = 0; t < Q; t++) {
      dt[t] = t < count ? dts[t * stride] : T(0);
      const double step = double(dt[t]) * a * LOG2_E;
      sum += step < -FORGOTTEN ? -FORGOTTEN : step;
      log[t] = T(sum), rest[t] = T(sum - log[t]);
    }
    for (int64_t t = 0; t < Q; t += LANES<T>) {
      store(since + t, exp2<T>(load(log + t)));
      store(until + t, decay_to(Q - 1, t));
    }
    decay = since[Q - 1];
  }

  // The decays to step t from the steps `from`, `from + 1`, ... of one vector.
  vec<T> decay_to(int64_t t, int64_t from) const {
    return exp2<T>((log[t] - load(log + from)) + (rest[t] - load(rest + from)));
  }

  // M and M o C B^T, lower triangles; what lies beyond in the last vector of a row is 0.
  void weights(const T* cb, int64_t count, T* mask, T* weights) const {
    constexpr int L = LANES<T>;
    for (int64_t t = 0; t < count; t++) {
      for (int64_t i = 0; i <= t; i += L) {
        const vec<T> m = decay_to(t, i);
        store(mask + t * Q + i, m);
        store(weights + t * Q + i, m * load(cb + t * Q + i));
      }
      for (int64_t i = t + 1; i < up(t + 1, L); i++) mask[t * Q + i] = weights[t * Q + i] = 0;
    }
  }
};

// Multiplies each row of a matrix by a number of its own.
template <class T>
INLINE void scale_rows(Rows<const T> from, const T* by, Rows<T> to, int64_t rows, int64_t columns) {
  for (int64_t t = 0; t < rows; t++) {
    int64_t i = 0;
    for (; i + LANES<T> <= columns; i += LANES<T>) store(to[t] + i, load(from[t] + i) * by[t]);
    for (; i < columns; i++) to[t][i] = from[t][i] * by[t];
  }
}

// The state of a head, from (P, N) to (N, P) with the columns padded to whole vectors, and back.
template <class T>
INLINE void read_state(const void* all, int64_t at, int64_t P, int64_t N, T* h, int64_t wide) {
  transpose<T>({static_cast<const T*>(all) + at * P * N, N}, P, N, {h, wide}, wide);
}
template <class T>
INLINE void write_state(const T* h, int64_t wide, int64_t P, int64_t N, void* all, int64_t at) {
  transpose<T>({h, wide}, N, P, {static_cast<T*>(all) + at * P * N, N}, 0);
}

// Where the state of a head that enters a span is saved, (N, P).
template <class T>
INLINE Rows<T> saved_state(const Ssd& s, int64_t row, int64_t begin, int64_t head) {
  const int64_t spans = (s.sequences.length + SSD_SPAN - 1) / SSD_SPAN, size = s.states * s.width;
  return {static_cast<T*>(s.saved) + ((row * spans + begin / SSD_SPAN) * s.heads + head) * size, s.width};
}

template <class T>
int64_t forward(const Ssd& s, const Heads& task) {
  constexpr int L = LANES<T>;
  const int64_t N = s.states, P = up(s.width, L), V = P / L, T_ = s.sequences.length;
  const int64_t heads = task.end - task.first, row = task.row;
  Arena arena(task.memory);
  const Maps<T> maps = Maps<T>::take(arena, N);
  T *states = arena.take<T>(heads * N * P), *dts = arena.take<T>(Q * heads);
  T *x = arena.take<T>(Q * P), *xdt = arena.take<T>(Q * P), *kept = arena.take<T>(Q * P), *y = arena.take<T>(Q * P);
  T *mask = arena.take<T>(Q * Q), *weights = arena.take<T>(Q * Q), *since = arena.take<T>(Q * N);
  Steps<T>* const steps_memory = arena.take<Steps<T>>(1);
  if (!task.memory) return arena.used();
  Steps<T>& steps = *steps_memory;

  for (int64_t begin = 0; begin < T_; begin += Q) {
    const int64_t end = least(begin + Q, T_);
    maps.read(s, row, begin, end, task.group);
    copy(s.dt, {row, begin, end, task.first, heads, heads}, dts);
    for (int64_t head = task.first; head < task.end; head++) {
      T* h = states + (head - task.first) * N * P;
      const T a = static_cast<const T*>(s.a)[head];
      for (int64_t t = begin; t < end;) {
        const Chunk chunk = first_run(s, row, first_chunk(s.sequences, row, t, end));
        const int64_t count = chunk.end - t, from = t - begin, state = chunk.sequence * s.heads + head;
        if (chunk.starts) read_state(s.h0, state, s.width, N, h, P);
        if (begins_run(s, row, t)) memset(h, 0, sizeof(T) * N * P);
        if (s.saved && t % SSD_SPAN == 0) convert(Rows<const T>{h, P}, saved_state<T>(s, row, t, head), N, s.width);
        const Window w = {row, t, chunk.end, head * s.width, s.width, P};
        steps.read(dts + from * heads + head - task.first, heads, a, count);
        scale_rows(read(s.x, w, x), steps.dt, {xdt, P}, count, P);
        scale_rows({xdt, P}, steps.until, {kept, P}, count, P);
        scale_rows({maps.c + from * N, N}, steps.since, {since, N}, count, N);
        steps.weights(maps.cb + from * (Q + 1), count, mask, weights);
        gemm<T>({since, N, 1}, {h, P}, {y, P}, count, N, V, 0);
        gemm<T, Band::LOWER>({weights, Q, 1}, {xdt, P}, {y, P}, count, count, V, 1);
        gemm<T>({maps.b + from * N, 1, N}, {kept, P}, {h, P}, N, count, V, steps.decay);
        write(s.y, w, Rows<T>{y, P});
        if (chunk.ends) write_state(h, P, s.width, N, s.final, state);
        t = chunk.end;
      }
    }
  }
  end_stream();
  return 0;
}

// What the backward computes for one head in a chunk.
template <class T>
struct Replay {
  T *x, *xdt, *kept, *dy, *dsince;  // (Q, P): x, x dt, x dt e^(l - l_t), dy, dy e^(l_t)
  T *turned, *dturned;              // (P, Q): xdt or kept transposed, and dsince transposed
  T *mask, *weights, *dweights;     // (Q, Q): M, M o C B^T and its gradient
  T *dmap, *until;                  // (N, Q), what B or C gets from the head; (Q, N), B e^(l - l_t)
  T *dx, *passing, *dlog;           // (Q, P), (Q) and (Q)
};

template <class T>
INLINE T sum_of(vec<T> v) {
  T sum = 0;
  for (int i = 0; i < LANES<T>; i++) sum += v[i];
  return sum;
}

// The first `count` lanes, and 0 in the others.
template <class T>
INLINE vec<T> first_lanes(vec<T> v, int64_t count) {
  vec<T> lane;
  for (int i = 0; i < LANES<T>; i++) lane[i] = T(i);
  return lane < splat(T(count)) ? v : vec<T>{};
}

// Writes the sums over the rows of a o b, (rows, columns), to `to`, and adds b to `all`, of which other chunks have the
// columns behind these.
template <class T>
INLINE void add_products(Rows<const T> a, Rows<const T> b, Rows<T> all, int64_t rows, int64_t columns, T* to) {
  for (int64_t i = 0; i < columns; i += LANES<T>) {
    vec<T> sum = {};
    for (int64_t n = 0; n < rows; n++) {
      const vec<T> x = load(b[n] + i);
      sum = fma(load(a[n] + i), x, sum);
      store_some(all[n] + i, load(all[n] + i) + x, columns - i);
    }
    store(to + i, sum);
  }
}

// Adds b, (rows, columns), to `all`, of which other chunks have the columns behind these.
template <class T>
INLINE void add_columns(Rows<const T> b, Rows<T> all, int64_t rows, int64_t columns) {
  for (int64_t n = 0; n < rows; n++)
    for (int64_t i = 0; i < columns; i += LANES<T>)
      store_some(all[n] + i, load(all[n] + i) + load(b[n] + i), columns - i);
}

template <class T>
int64_t backward(const Ssd& s, const Heads& task, const Parts& parts) {
  constexpr int L = LANES<T>;
  const int64_t N = s.states, P = up(s.width, L), V = P / L, T_ = s.sequences.length, size = N * P;
  const int64_t heads = task.end - task.first, row = task.row, wide = Q + L;
  Arena arena(task.memory);
  Maps<T> maps[TILES];
  T *dcb[TILES], *dbt[TILES], *dct[TILES], *enter[TILES];
  for (int j = 0; j < TILES; j++) {
    maps[j] = Maps<T>::take(arena, N);
    dcb[j] = arena.take<T>(Q * Q + L), dbt[j] = arena.take<T>(Q * N + L), dct[j] = arena.take<T>(Q * N + L);
    enter[j] = arena.take<T>(size);
  }
  T *carries = arena.take<T>(heads * size), *h0 = arena.take<T>(size);
  T *dts = arena.take<T>(SSD_SPAN * heads), *ddts = arena.take<T>(SSD_SPAN * heads);
  double* da = arena.take<double>(heads);
  const Replay<T> of = {arena.take<T>(Q * P), arena.take<T>(Q * P), arena.take<T>(Q * P), arena.take<T>(Q * P),
                        arena.take<T>(Q * P), arena.take<T>(Q * P), arena.take<T>(Q * P), arena.take<T>(Q * Q),
                        arena.take<T>(Q * Q), arena.take<T>(Q * Q), arena.take<T>(Q * N), arena.take<T>(Q * N),
                        arena.take<T>(Q * P), arena.take<T>(wide),  arena.take<T>(wide)};
  T *of_b = arena.take<T>(wide), *of_c = arena.take<T>(wide);
  Steps<T>* const steps_memory = arena.take<Steps<T>>(1);
  if (!task.memory) return arena.used();
  Steps<T>& steps = *steps_memory;

  memset(da, 0, sizeof(double) * heads);
  for (int64_t first = (T_ - 1) / SSD_SPAN * SSD_SPAN; first >= 0; first -= SSD_SPAN) {
    const int64_t last = least(first + SSD_SPAN, T_), tiles = (last - first + Q - 1) / Q;
    copy(s.dt, {row, first, last, task.first, heads, heads}, dts);
    for (int64_t j = 0; j < tiles; j++) {
      const int64_t begin = first + j * Q, end = least(begin + Q, last);
      maps[j].read(s, row, begin, end, task.group);
      transpose<T>({maps[j].c, N}, end - begin, N, {maps[j].ct, Q}, up(end - begin, L));
      memset(dcb[j], 0, sizeof(T) * Q * Q), memset(dbt[j], 0, sizeof(T) * Q * N), memset(dct[j], 0, sizeof(T) * Q * N);
    }
    for (int64_t head = task.first; head < task.end; head++) {
      const int64_t own = head - task.first;
      const T a = static_cast<const T*>(s.a)[head];
      T* g = carries + own * size;
      auto begin_chunk = [&](const Chunk& chunk) {
        const Window w = {row, chunk.begin, chunk.end, head * s.width, s.width, P};
        const int64_t count = chunk.end - chunk.begin;
        steps.read(dts + (chunk.begin - first) * heads + own, heads, a, count);
        const Rows<const T> x = read(s.x, w, of.x);
        scale_rows(x, steps.dt, {of.xdt, P}, count, P);
        scale_rows({of.xdt, P}, steps.until, {of.kept, P}, count, P);
        return x;
      };
      auto number_of = [&](const Chunk& chunk) { return chunk.sequence * s.heads + head; };

      const Rows<T> kept = saved_state<T>(s, row, first, head);
      memset(enter[0], 0, sizeof(T) * size);
      convert(Rows<const T>{kept.data, kept.stride}, Rows<T>{enter[0], P}, N, s.width);
      for (int64_t j = 0; j + 1 < tiles; j++) {
        const int64_t begin = first + j * Q, end = begin + Q;
        memcpy(enter[j + 1], enter[j], sizeof(T) * size);
        for (int64_t t = begin; t < end;) {
          const Chunk chunk = first_run(s, row, first_chunk(s.sequences, row, t, end));
          if (chunk.starts) read_state(s.h0, number_of(chunk), s.width, N, enter[j + 1], P);
          if (begins_run(s, row, t)) memset(enter[j + 1], 0, sizeof(T) * size);
          begin_chunk(chunk);
          const T* b = maps[j].b + (t - begin) * N;
          gemm<T>({b, 1, N}, {of.kept, P}, {enter[j + 1], P}, N, chunk.end - t, V, steps.decay);
          t = chunk.end;
        }
      }

      for (int64_t j = tiles - 1; j >= 0; j--) {
        const int64_t begin = first + j * Q, end = least(begin + Q, last);
        for (int64_t stop = end; stop > begin;) {
          const Chunk chunk = last_run(s, row, last_chunk(s.sequences, row, begin, stop));
          const bool alone = begins_run(s, row, chunk.begin);
          const int64_t from = chunk.begin - begin, count = chunk.end - chunk.begin, C = (count + L - 1) / L;
          const Window w = {row, chunk.begin, chunk.end, head * s.width, s.width, P};
          const T *b = maps[j].b + from * N, *c = maps[j].c + from * N;
          if (chunk.ends) read_state(s.dfinal, number_of(chunk), s.width, N, g, P);
          if (begins_run(s, row, chunk.end)) memset(g, 0, sizeof(T) * size);
          if (chunk.starts) read_state(s.h0, number_of(chunk), s.width, N, h0, P);
          if (alone) memset(h0, 0, sizeof(T) * size);
          const T* h = chunk.starts || alone ? h0 : enter[j];
          const Rows<const T> x = begin_chunk(chunk), dy = read(s.dy, w, of.dy);

          // Within the chunk: the weights, their gradient, and what x gets through them.
          steps.weights(maps[j].cb + from * (Q + 1), count, of.mask, of.weights);
          transpose<T>({of.xdt, P}, count, s.width, {of.turned, Q}, up(count, L));
          gemm<T>({dy.data, dy.stride, 1}, {of.turned, Q}, {of.dweights, Q}, count, s.width, C, 0);
          gemm<T, Band::UPPER>({of.weights, 1, Q}, dy, {of.dx, P}, count, count, V, 0);
          // A decay gets a sum over the pairs of steps that it lies between. `passing` adds up, for every step before
          // t, what all pairs with t or later ones get: only what passes t, as what does not may be far larger.
          memset(of.passing, 0, sizeof(T) * wide);
          for (int64_t t = count - 1; t >= 0; t--) {
            vec<T> sum = {};
            T* to = dcb[j] + (from + t) * Q + from;
            for (int64_t i = 0; i <= t; i += L) {
              const vec<T> d = load(of.dweights + t * Q + i);
              store_some(to + i, fma(d, load(of.mask + t * Q + i), load(to + i)), t + 1 - i);
              vec<T> through = fma(d, load(of.weights + t * Q + i), load(of.passing + i));
              if (i + L > t) through = first_lanes<T>(through, t - i);
              store(of.passing + i, through);
              sum += through;
            }
            of.dlog[t] = sum_of<T>(sum);
          }

          // Through the state that enters: gradients of C and of the state itself; through the one that leaves: B and
          // x.
          scale_rows(dy, steps.since, {of.dsince, P}, count, P);
          transpose<T>({of.dsince, P}, count, s.width, {of.dturned, Q}, up(count, L));
          gemm<T>({h, P, 1}, {of.dturned, Q}, {of.dmap, Q}, N, s.width, C, 0);
          add_products<T>({maps[j].ct + from, Q}, {of.dmap, Q}, {dct[j] + from, Q}, N, count, of_c);
          for (int64_t i = 0; i < C * L; i += L)  // x dt e^(l - l_t), from x dt
            for (int64_t p = 0; p < s.width; p++)
              store(of.turned + p * Q + i, load(of.turned + p * Q + i) * load(steps.until + i));
          gemm<T>({g, P, 1}, {of.turned, Q}, {of.dmap, Q}, N, s.width, C, 0);
          add_products<T>({maps[j].bt + from, Q}, {of.dmap, Q}, {dbt[j] + from, Q}, N, count, of_b);
          scale_rows({b, N}, steps.until, {of.until, N}, count, N);
          gemm<T>({of.until, N, 1}, {g, P}, {of.dx, P}, count, N, V, 1);
          vec<T> through = {};
          for (int64_t i = 0; i < size; i += L) through = fma(load(g + i), load(h + i), through);
          T earlier = sum_of<T>(through) * steps.decay;
          for (int64_t t = 0; t < count; t++) of.dlog[t] += earlier, earlier += of_b[t];
          gemm<T>({c, 1, N}, {of.dsince, P}, {g, P}, N, count, V, steps.decay);

          // The state that enters passes a decay to reach any later step. And x is multiplied by its step.
          T later = 0;
          for (int64_t t = count - 1; t >= 0; t--) {
            later += of_c[t];
            const T dlog = of.dlog[t] + later;
            vec<T> dot = {};
            for (int64_t i = 0; i < P; i += L) dot = fma(load(of.dx + t * P + i), load(x[t] + i), dot);
            ddts[(chunk.begin - first + t) * heads + own] = dlog * a + sum_of<T>(dot);
            da[own] += double(dlog) * steps.dt[t];
          }
          scale_rows({of.dx, P}, steps.dt, {of.dx, P}, count, P);
          write(s.dx, w, Rows<T>{of.dx, P});
          if (chunk.starts) {
            write_state(g, P, s.width, N, s.dh0, number_of(chunk));
            memset(g, 0, sizeof(T) * size);
          }
          stop = chunk.begin;
        }
      }
    }
    write(s.ddt, {row, first, last, task.first, heads, heads}, Rows<T>{ddts, heads});

    // What B and C get through C B^T, chunk by chunk; then all they got goes to this task's part.
    for (int64_t j = 0; j < tiles; j++) {
      const int64_t begin = first + j * Q, end = least(begin + Q, last), count = end - begin;
      for (int64_t t = begin; t < end;) {
        const Chunk chunk = first_run(s, row, first_chunk(s.sequences, row, t, end));
        const int64_t from = t - begin, own = chunk.end - t, C = (own + L - 1) / L;
        const Rows<const T> through = {dcb[j] + from * (Q + 1), Q};
        transpose<T>(through, own, own, {of.weights, Q}, up(own, L));
        gemm<T>({maps[j].c + from * N, 1, N}, through, {of.dmap, Q}, N, own, C, 0);
        add_columns<T>({of.dmap, Q}, {dbt[j] + from, Q}, N, own);
        gemm<T>({maps[j].b + from * N, 1, N}, {of.weights, Q}, {of.dmap, Q}, N, own, C, 0);
        add_columns<T>({of.dmap, Q}, {dct[j] + from, Q}, N, own);
        t = chunk.end;
      }
      const int64_t at = ((task.part * s.sequences.rows + row) * T_ + begin) * N;
      transpose<T>({dbt[j], Q}, N, count, {static_cast<T*>(parts.db) + at, N}, 0);
      transpose<T>({dct[j], Q}, N, count, {static_cast<T*>(parts.dc) + at, N}, 0);
    }
  }
  for (int64_t i = 0; i < heads; i++) static_cast<T*>(parts.da)[row * s.heads + task.first + i] = T(da[i]);
  end_stream();
  return 0;
}

}  // namespace ssd
}  // namespace DUALFORM_ISA
