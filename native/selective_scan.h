// h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = (C_t h_t + D u_t) silu(z_t) with dt = softplus(delta + bias), and its
// backward. Channels lie in lanes, states in registers. The pointwise work is done while its inputs are in the cache.
//
// A task runs through its share of channels tile by tile, so that B and C of a tile stay in the cache for all of them.
// The backward goes from the last tile to the first and recomputes the states of a tile from those that entered it. The
// sums over channels, dB and dC, stay vectors, summed over slices but not over lanes, until the tile is done. Those of
// a constant B or C, which is one of each channel, are sums over time instead, and are kept like those of the rates.
#pragma once

#include "tile.h"

namespace DUALFORM_ISA {
namespace selective {

constexpr int64_t TILE = SELECTIVE_SCAN_TILE;
// How many states are in registers at once. The backward has as many gradients of rates beside them.
constexpr int FORWARD_BLOCK = WIDTH == 64 ? 16 : 4, BACKWARD_BLOCK = 4;

template <class T>
struct Inputs {
  Rows<const T> u, dt, b, c, dy;
};

// States come in blocks; those beyond N are padding.
INLINE int64_t padded(int64_t states) { return up(states, BACKWARD_BLOCK); }

// A log2(e) of every slice of a share, (slices, padded N, lanes). Padding decays like the last state: with a rate of 0
// an infinite step would make it NaN, and with it the sums over states.
template <class T>
INLINE void gather_rates(const SelectiveScan& s, const Share& share, T* rates) {
  constexpr int L = LANES<T>;
  const int64_t N = s.states, size = padded(N) * L;
  for (int64_t i = 0; i < share.count; i++) {
    const Slice& slice = share.slices[i];
    T* own = rates + i * size;
    gather(static_cast<const T*>(s.a) + slice.first * N, N, own, N, slice.count);
    for (int64_t n = N; n < padded(N); n++) memcpy(own + n * L, own + (N - 1) * L, sizeof(T) * L);
  }
  for (int64_t i = 0; i < share.count * size; i++) rates[i] *= T(LOG2_E);
}

// B, or C, and in the backward the sums that are its gradient.
template <class T>
struct Map {
  const View& view;
  const bool constant;
  const int64_t states, size;  // size: numbers of one slice
  T* const numbers;            // of one group in a tile, (steps, padded N); or constant, (slices, padded N, lanes)
  T* const sums;               // of one group in a tile, (steps, padded N / Q, lanes); or as the numbers; or null

  Map(const View& v, bool constant, int64_t states, const Share& share, bool differentiate, Arena& arena)
      : view(v),
        constant(constant),
        states(states),
        size(padded(states) * LANES<T>),
        numbers(arena.take<T>(constant ? share.count * size : TILE * padded(states))),
        sums(differentiate ? arena.take<T>(constant ? share.count * size : TILE * size / Q<T>) : nullptr) {}

  // Before the first tile: constants are read, and their sums begin.
  void start(const Share& share) const {
    if (!constant) return;
    for (int64_t i = 0; i < share.count; i++) {
      const Slice& slice = share.slices[i];
      gather_padded(static_cast<const T*>(view.data) + slice.first * states, states, numbers + i * size, states,
                    padded(states), slice.count);
    }
    if (sums) memset(sums, 0, sizeof(T) * share.count * size);
  }

  // Lines for every step of a tile: those of slice i, the first of its group where `first`, else `before`.
  Rows<const T> read(const Window& tile, int64_t i, int64_t group, bool first, Rows<const T> before) const {
    if (constant) return {numbers + i * size, 0};
    if (!first) return before;
    return DUALFORM_ISA::read(view, {tile.row, tile.begin, tile.end, group * states, states, padded(states)}, numbers);
  }

  // Where the sums of slice i are added up.
  Rows<T> sums_of(int64_t i) const {
    if (constant) return {sums + i * size, 0};
    return {sums, size / Q<T>};
  }

  // Before the first slice of a group in a tile.
  void clear() const {
    if (!constant) memset(sums, 0, sizeof(T) * TILE * size / Q<T>);
  }

  // After its last slice: writes the sums, (steps, N), to part `part`, (rows, T, N).
  void flush(const Sequences& s, const Window& tile, void* parts, int64_t part) const {
    if (constant) return;
    T* to = static_cast<T*>(parts) + ((part * s.rows + tile.row) * s.length + tile.begin) * states;
    for (int64_t t = 0; t < tile.end - tile.begin; t++)
      for (int64_t n = 0; n < states; n++) {
        const T* from = sums + t * size / Q<T> + n / Q<T> * LANES<T> + n % Q<T>;
        T x = 0;
        for (int i = 0; i < LANES<T>; i += Q<T>) x += from[i];
        to[t * states + n] = x;
      }
  }

  // After the last tile: writes the sums of a constant to the part of a task, (D, N).
  void finish(const Share& share, int64_t width, int64_t part, void* parts) const {
    if (!constant) return;
    for (int64_t i = 0; i < share.count; i++) {
      const Slice& slice = share.slices[i];
      scatter(sums + i * size, static_cast<T*>(parts) + (part * width + slice.first) * states, states, states,
              slice.count);
    }
  }
};

// Calls f(Count<whether B is constant>(), Count<whether C is>()).
template <class F>
INLINE void by_maps(const SelectiveScan& s, F f) {
  if (s.constant_b && s.constant_c) return f(Count<1>(), Count<1>());
  if (s.constant_b) return f(Count<1>(), Count<0>());
  if (s.constant_c) return f(Count<0>(), Count<1>());
  f(Count<0>(), Count<0>());
}

// State n of B or C at one step: one number for all channels of a group, or constant, one for each channel.
template <bool CONSTANT, class T>
INLINE vec<T> at(const T* map, int64_t n) {
  if constexpr (CONSTANT) return load(map + n * LANES<T>);
  return splat<T>(map[n]);
}

// Where the states of a slice that enter tile k are saved.
template <class T>
INLINE T* saved_states(const SelectiveScan& s, int64_t row, int64_t k, const Slice& slice) {
  int64_t tiles = (s.sequences.length + TILE - 1) / TILE;
  return static_cast<T*>(s.saved) + (row * tiles + k) * s.states * s.width + slice.first;
}

// One number for every channel of a slice; 0 where the caller gave none.
template <class T>
INLINE vec<T> of_channels(const void* numbers, const Slice& slice) {
  return numbers ? load_some(static_cast<const T*>(numbers) + slice.first, slice.count) : vec<T>{};
}

// dt = softplus(delta + bias) of a slice: in the tensor itself where dt is delta, or in scratch memory.
template <class T>
INLINE Rows<const T> read_steps(const SelectiveScan& s, const Window& tile, const Slice& slice, T* scratch) {
  constexpr int L = LANES<T>;
  const Rows<const T> delta = read(s.delta, tile, scratch);
  if (!s.softplus && !s.bias) return delta;
  const vec<T> bias = of_channels<T>(s.bias, slice);
  for (int64_t t = 0; t < tile.end - tile.begin; t++) {
    __builtin_prefetch(delta[t] + L);
    vec<T> x = load(delta[t]) + bias;
    store(scratch + t * L, s.softplus ? softplus<T>(x) : x);
  }
  return {scratch, L};
}

// y = (y + D u) silu(z) of a slice.
template <class T>
INLINE void finish(const SelectiveScan& s, const Window& tile, const Slice& slice, Rows<const T> u, Rows<T> y,
                   T* scratch) {
  if (!s.d && !s.z.data) return;
  const vec<T> skip = of_channels<T>(s.d, slice);
  const Rows<const T> z = s.z.data ? read(s.z, tile, scratch) : u;
  for (int64_t t = 0; t < tile.end - tile.begin; t++) {
    __builtin_prefetch(z[t] + LANES<T>);
    vec<T> v = load(y[t]);
    if (s.d) v = fma(skip, load(u[t]), v);
    if (s.z.data) v *= silu<T>(load(z[t]));
    store(y[t], v);
  }
}

// Zeros for the sums over states where there are none: otherwise the first block of states begins them.
template <class T>
INLINE void clear(Rows<T> rows, int64_t steps) {
  for (int64_t t = 0; t < steps; t++) store(rows[t], vec<T>{});
}

// Takes NB states through the steps of a chunk, and adds C h to y; the first block writes y instead.
template <class T, int NB, bool CONSTANT_B, bool CONSTANT_C>
INLINE void run(T* h_memory, const T* a, const Inputs<T>& in, int64_t n, Rows<T> y, int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  vec<T> h[NB];
#pragma GCC unroll 16
  for (int i = 0; i < NB; i++) h[i] = load(h_memory + i * L);
  for (int64_t t = begin; t < end; t++) {
    vec<T> dt = load(in.dt[t]), x = dt * load(in.u[t]);
    __builtin_prefetch(in.dt[t] + L);
    __builtin_prefetch(in.u[t] + L);
    const T *b = in.b[t], *c = in.c[t];
    vec<T> sum = n == 0 ? vec<T>{} : load(y[t]);
#pragma GCC unroll 16
    for (int i = 0; i < NB; i++) {
      h[i] = fma(exp2<T>(dt * load(a + i * L)), h[i], x * at<CONSTANT_B>(b, n + i));
      sum = fma(h[i], at<CONSTANT_C>(c, n + i), sum);
    }
    store(y[t], sum);
  }
#pragma GCC unroll 16
  for (int i = 0; i < NB; i++) store(h_memory + i * L, h[i]);
}

template <class T>
int64_t forward(const SelectiveScan& s, const Task& task) {
  constexpr int L = LANES<T>;
  const Share& share = *task.share;
  const int64_t N = s.states, M = padded(N), T_ = s.sequences.length, tiles = (T_ + TILE - 1) / TILE;
  Arena arena(task.memory);
  T *rates = arena.take<T>(share.count * M * L), *states = arena.take<T>(share.count * M * L);
  T *u = arena.take<T>(TILE * L), *dt = arena.take<T>(TILE * L), *z = arena.take<T>(TILE * L);
  T* y = arena.take<T>(TILE * L);
  const Map<T> b(s.b, s.constant_b, N, share, false, arena), c(s.c, s.constant_c, N, share, false, arena);
  if (!task.memory) return arena.used();

  gather_rates(s, share, rates);
  b.start(share), c.start(share);
  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride) {
    memset(states, 0, sizeof(T) * share.count * M * L);
    for (int64_t k = 0; k < tiles; k++) {
      Window tile = {row, k * TILE, least((k + 1) * TILE, T_), 0, 0, L};
      Inputs<T> in = {};
      for (int64_t i = 0; i < share.count; i++) {
        const Slice &slice = share.slices[i], *last = i == 0 ? nullptr : &share.slices[i - 1];
        in.b = b.read(tile, i, slice.group_b, !last || slice.group_b != last->group_b, in.b);
        in.c = c.read(tile, i, slice.group_c, !last || slice.group_c != last->group_c, in.c);
        tile.first = slice.first, tile.count = slice.count;
        in.u = read(s.u, tile, u);
        in.dt = read_steps(s, tile, slice, dt);
        Rows<T> out = target(s.y, tile, y);
        T *h = states + i * M * L, *a = rates + i * M * L;
        if (N == 0) clear(out, tile.end - tile.begin);
        if (s.saved) write_states(h, saved_states<T>(s, row, k, slice), s.width, N, slice.count);
        for (int64_t t = tile.begin; t < tile.end;) {
          Chunk chunk = first_chunk(s.sequences, row, t, tile.end);
          int64_t state = (chunk.sequence * s.width + slice.first) * N;
          if (chunk.starts) gather_padded(static_cast<const T*>(s.h0) + state, N, h, N, M, slice.count);
          by_maps(s, [&](auto constant_b, auto constant_c) {
            by_blocks<FORWARD_BLOCK, BACKWARD_BLOCK>(M, [&](auto block, int64_t n) {
              run<T, block.value, constant_b.value, constant_c.value>(h + n * L, a + n * L, in, n, out, t - tile.begin,
                                                                      chunk.end - tile.begin);
            });
          });
          if (chunk.ends) scatter(h, static_cast<T*>(s.final) + state, N, N, slice.count);
          t = chunk.end;
        }
        finish(s, tile, slice, in.u, out, z);
        write(s.y, tile, out);
      }
    }
  }
  end_stream();
  return 0;
}

// What the backward of one block of states needs from every step of a tile: NB vectors of each.
template <class T>
struct Replay {
  T *decay, *decayed;  // a_t, and a_t h_{t-1}
};

// Adds NB vectors, summed over their lanes as by `merge`, to NB / Q vectors.
template <class T, int NB>
INLINE void add_sums(T* to, const vec<T>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < NB / Q<T>; i++) store(to + i * LANES<T>, load(to + i * LANES<T>) + merge(v + i * Q<T>));
}

// The same over time, where they are those of a constant: adds the sums of one chunk.
template <class T, int NB>
INLINE void add_constants(T* to, const vec<T>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < NB; i++) store(to + i * LANES<T>, load(to + i * LANES<T>) + v[i]);
}

// Computes the states of a chunk again; dC += h dy and, where there is a gate, y += C h.
template <class T, int NB, bool GATED, bool CONSTANT_B, bool CONSTANT_C>
INLINE void replay(T* h_memory, const T* a, const Inputs<T>& in, int64_t n, Replay<T> out, Rows<T> dc, Rows<T> y,
                   int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  vec<T> h[NB], sums[NB] = {};
#pragma GCC unroll 16
  for (int i = 0; i < NB; i++) h[i] = load(h_memory + i * L);
  for (int64_t t = begin; t < end; t++) {
    vec<T> dt = load(in.dt[t]), x = dt * load(in.u[t]), dy = load(in.dy[t]), products[NB];
    const T *b = in.b[t], *c = in.c[t];
    vec<T> sum = GATED && n > 0 ? load(y[t]) : vec<T>{};
#pragma GCC unroll 16
    for (int i = 0; i < NB; i++) {
      vec<T> decay = exp2<T>(dt * load(a + i * L)), decayed = decay * h[i];
      store(out.decay + (t * NB + i) * L, decay);
      store(out.decayed + (t * NB + i) * L, decayed);
      h[i] = fma(x, at<CONSTANT_B>(b, n + i), decayed);
      if (CONSTANT_C)
        sums[i] = fma(h[i], dy, sums[i]);
      else
        products[i] = h[i] * dy;
      if (GATED) sum = fma(h[i], at<CONSTANT_C>(c, n + i), sum);
    }
    if (GATED) store(y[t], sum);
    if (!CONSTANT_C) add_sums<T, NB>(dc[t] + n / Q<T> * L, products);
  }
  if (CONSTANT_C) add_constants<T, NB>(dc.data + n * L, sums);
#pragma GCC unroll 16
  for (int i = 0; i < NB; i++) store(h_memory + i * L, h[i]);
}

// From the last step of a chunk to the first. The whole gradient of h_t is g_t = C_t dy_t + a_{t+1} g_{t+1}, whose
// second term is `carry`. dB += g dt u; dA += g a h_{t-1} dt; and summed over states dx += g B, dlog += g a h_{t-1} A
// log2(e).
template <class T, int NB, bool CONSTANT_B, bool CONSTANT_C>
INLINE void adjoint(T* carry_memory, const T* a, T* da_memory, const Inputs<T>& in, int64_t n, Replay<T> of, Rows<T> db,
                    Rows<T> dx_rows, Rows<T> dlog_rows, int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  vec<T> carry[NB], da[NB], sums[NB] = {};
#pragma GCC unroll 16
  for (int i = 0; i < NB; i++) carry[i] = load(carry_memory + i * L), da[i] = load(da_memory + i * L);
  for (int64_t t = end - 1; t >= begin; t--) {
    vec<T> dt = load(in.dt[t]), x = dt * load(in.u[t]), dy = load(in.dy[t]), products[NB];
    vec<T> dx = n == 0 ? vec<T>{} : load(dx_rows[t]), dlog = n == 0 ? vec<T>{} : load(dlog_rows[t]);
    const T *b = in.b[t], *c = in.c[t];
#pragma GCC unroll 16
    for (int i = 0; i < NB; i++) {
      vec<T> g = fma(dy, at<CONSTANT_C>(c, n + i), carry[i]);
      vec<T> through = g * load(of.decayed + (t * NB + i) * L);
      if (CONSTANT_B)
        sums[i] = fma(g, x, sums[i]);
      else
        products[i] = g * x;
      dx = fma(g, at<CONSTANT_B>(b, n + i), dx);
      dlog = fma(through, load(a + i * L), dlog);
      da[i] = fma(through, dt, da[i]);
      carry[i] = g * load(of.decay + (t * NB + i) * L);
    }
    if (!CONSTANT_B) add_sums<T, NB>(db[t] + n / Q<T> * L, products);
    store(dx_rows[t], dx);
    store(dlog_rows[t], dlog);
  }
  if (CONSTANT_B) add_constants<T, NB>(db.data + n * L, sums);
#pragma GCC unroll 16
  for (int i = 0; i < NB; i++) store(carry_memory + i * L, carry[i]), store(da_memory + i * L, da[i]);
}

// What the backward reads of a strip of slices, (steps, STRIP lanes), and replaces: delta by dt, dy by the gradient of
// the output before the gate, and z by the factor of that output in dz. `ddelta` becomes d(dt) / d(delta).
template <class T>
struct Strip {
  T *u, *dt, *dy, *dz, *du, *ddelta;

  void read(const SelectiveScan& s, const Window& tile, const Slice* slices) const {
    constexpr int L = LANES<T>;
    copy(s.u, tile, u), copy(s.delta, tile, dt), copy(s.dy, tile, dy);
    if (s.z.data) copy(s.z, tile, dz);
    for (int64_t p = 0; p * L < tile.count; p++) {
      const vec<T> bias = of_channels<T>(s.bias, slices[p]);
      for (int64_t t = 0, at = p * L; t < tile.end - tile.begin; t++, at += STRIP * L) {
        Curve<T> step = {load(dt + at) + bias, splat(T(1))};
        if (s.softplus) step = softplus_curve<T>(step.value);
        store(dt + at, step.value), store(ddelta + at, step.slope);
        if (!s.z.data) continue;
        const Curve<T> gate = silu_curve<T>(load(dz + at));
        const vec<T> g = load(dy + at);
        store(dy + at, g * gate.value), store(dz + at, g * gate.slope);
      }
    }
  }

  void write(const SelectiveScan& s, const Window& tile) const {
    DUALFORM_ISA::write(s.du, tile, Rows<T>{du, STRIP * LANES<T>});
    DUALFORM_ISA::write(s.ddelta, tile, Rows<T>{ddelta, STRIP * LANES<T>});
    if (s.z.data) DUALFORM_ISA::write(s.dz, tile, Rows<T>{dz, STRIP * LANES<T>});
  }
};

template <class T>
int64_t backward(const SelectiveScan& s, const Task& task, const Parts& parts) {
  constexpr int L = LANES<T>, NB = BACKWARD_BLOCK;
  const Share& share = *task.share;
  const int64_t N = s.states, M = padded(N), T_ = s.sequences.length, tiles = (T_ + TILE - 1) / TILE;
  Arena arena(task.memory);
  T *rates = arena.take<T>(share.count * M * L), *carries = arena.take<T>(share.count * M * L);
  T *drates = arena.take<T>(share.count * M * L), *h = arena.take<T>(M * L);
  T *dskips = arena.take<T>(share.count * L), *dbiases = arena.take<T>(share.count * L);
  const int64_t wide = TILE * STRIP * L;
  const Strip<T> all = {arena.take<T>(wide), arena.take<T>(wide), arena.take<T>(wide),
                        arena.take<T>(wide), arena.take<T>(wide), arena.take<T>(wide)};
  const Map<T> b(s.b, s.constant_b, N, share, true, arena), c(s.c, s.constant_c, N, share, true, arena);
  Rows<T> dx = {arena.take<T>(TILE * L), L}, dlog = {arena.take<T>(TILE * L), L}, y = {arena.take<T>(TILE * L), L};
  Replay<T> steps = {arena.take<T>(TILE * NB * L), arena.take<T>(TILE * NB * L)};
  if (!task.memory) return arena.used();

  gather_rates(s, share, rates);
  b.start(share), c.start(share);
  memset(drates, 0, sizeof(T) * share.count * M * L);
  memset(dskips, 0, sizeof(T) * share.count * L);
  memset(dbiases, 0, sizeof(T) * share.count * L);
  for (int64_t row = task.row; row < s.sequences.rows; row += task.stride)
    for (int64_t k = tiles - 1; k >= 0; k--) {
      Window tile = {row, k * TILE, least((k + 1) * TILE, T_), 0, 0, STRIP * L};
      Inputs<T> in = {};
      for (int64_t i = 0, strip = 0; i < share.count; i++, strip++) {
        const Slice &slice = share.slices[i], *last = i == 0 ? nullptr : &share.slices[i - 1];
        const bool first_b = !last || slice.group_b != last->group_b, first_c = !last || slice.group_c != last->group_c;
        if (first_b && last) b.flush(s.sequences, tile, parts.db, share.part_b + last->group_b);
        if (first_c && last) c.flush(s.sequences, tile, parts.dc, share.part_c + last->group_c);
        if (first_b) b.clear();
        if (first_c) c.clear();
        in.b = b.read(tile, i, slice.group_b, first_b, in.b), in.c = c.read(tile, i, slice.group_c, first_c, in.c);
        const Rows<T> db = b.sums_of(i), dc = c.sums_of(i);
        if (starts_strip<T>(share, i, strip)) {
          if (i > 0) all.write(s, tile);
          strip = 0, tile.first = slice.first, tile.count = strip_width<T>(share, i);
          all.read(s, tile, &slice);
        }
        in.u = {all.u + strip * L, STRIP * L}, in.dt = {all.dt + strip * L, STRIP * L};
        in.dy = {all.dy + strip * L, STRIP * L};
        T *a = rates + i * M * L, *carry = carries + i * M * L, *da = drates + i * M * L;
        read_states(saved_states<T>(s, row, k, slice), s.width, h, N, slice.count);
        memset(h + N * L, 0, sizeof(T) * (M - N) * L);
        if (N == 0)
          clear(y, tile.end - tile.begin), clear(dx, tile.end - tile.begin), clear(dlog, tile.end - tile.begin);
        for (int64_t n = 0; n < M; n += NB) {
          const int64_t there = least(NB, N - n);
          for (int64_t t = tile.begin; t < tile.end;) {
            Chunk chunk = first_chunk(s.sequences, row, t, tile.end);
            int64_t state = (chunk.sequence * s.width + slice.first) * N + n;
            if (chunk.starts) gather_padded(static_cast<const T*>(s.h0) + state, N, h + n * L, there, NB, slice.count);
            by_maps(s, [&](auto constant_b, auto constant_c) {
              constexpr bool B = constant_b.value, C = constant_c.value;
              const int64_t begin = t - tile.begin, end = chunk.end - tile.begin;
              if (s.z.data)
                replay<T, NB, true, B, C>(h + n * L, a + n * L, in, n, steps, dc, y, begin, end);
              else
                replay<T, NB, false, B, C>(h + n * L, a + n * L, in, n, steps, dc, y, begin, end);
            });
            t = chunk.end;
          }
          for (int64_t t = tile.end; t > tile.begin;) {
            Chunk chunk = last_chunk(s.sequences, row, tile.begin, t);
            int64_t state = (chunk.sequence * s.width + slice.first) * N + n;
            if (chunk.ends)
              gather_padded(static_cast<const T*>(s.dfinal) + state, N, carry + n * L, there, NB, slice.count);
            by_maps(s, [&](auto constant_b, auto constant_c) {
              adjoint<T, NB, constant_b.value, constant_c.value>(carry + n * L, a + n * L, da + n * L, in, n, steps, db,
                                                                 dx, dlog, chunk.begin - tile.begin, t - tile.begin);
            });
            if (chunk.starts) scatter(carry + n * L, static_cast<T*>(s.dh0) + state, N, there, slice.count);
            t = chunk.begin;
          }
        }
        const vec<T> skip = of_channels<T>(s.d, slice);
        vec<T> dskip = splat(T(0)), dbias = dskip;  // of the tile alone: adding those up rounds less
        for (int64_t t = 0, at = strip * L; t < tile.end - tile.begin; t++, at += STRIP * L) {
          vec<T> through = load(dx[t]), u = load(all.u + at), dy = load(all.dy + at);
          vec<T> ddelta = fma(load(dlog[t]), splat<T>(LN_2), through * u) * load(all.ddelta + at);
          store(all.du + at, fma(skip, dy, through * load(all.dt + at)));
          store(all.ddelta + at, ddelta);
          if (s.z.data) store(all.dz + at, load(all.dz + at) * fma(skip, u, load(y[t])));
          dskip = fma(dy, u, dskip), dbias += ddelta;
        }
        store(dskips + i * L, load(dskips + i * L) + dskip), store(dbiases + i * L, load(dbiases + i * L) + dbias);
      }
      all.write(s, tile);
      const Slice& last = share.slices[share.count - 1];
      b.flush(s.sequences, tile, parts.db, share.part_b + last.group_b);
      c.flush(s.sequences, tile, parts.dc, share.part_c + last.group_c);
    }
  for (int64_t i = 0; i < share.count; i++) {
    const Slice& slice = share.slices[i];
    const int64_t channel = task.row * s.width + slice.first;
    scatter(drates + i * M * L, static_cast<T*>(parts.da) + channel * N, N, N, slice.count);
    store_some(static_cast<T*>(parts.dd) + channel, load(dskips + i * L), slice.count);
    store_some(static_cast<T*>(parts.dbias) + channel, load(dbiases + i * L), slice.count);
  }
  b.finish(share, s.width, task.row, parts.db), c.finish(share, s.width, task.row, parts.dc);
  end_stream();
  return 0;
}

}  // namespace selective
}  // namespace DUALFORM_ISA
