// h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = (C_t h_t + D u_t) silu(z_t): how lanes share the work.
//
// A warp computes 8 CH channels for K steps. Four neighbouring lanes share CH channels, each holds S of their states; a
// state never leaves its lane. Inputs arrive as four channels of one step per lane, are made into floats there, so that
// nothing is computed twice, and pass through shared memory to the lanes that need them.
#pragma once

#include "sequences.cuh"

// exp(dt A), a given in units of log2. The unit that computes 2^x rounds x down to 23 binary places; of what that takes
// on average its table gives half back. A slow state would feel the rest hundreds of times over, so x is as much more.
// Without a step nothing decays: 2^(2^-25) is one.
DEVICE float decay_of(float dt, float a) { return exp2_of(dt * a + 0x1p-25f); }

constexpr int CH = CHANNELS, S = STATES;  // of one lane
constexpr int WIDTH = 8 * CH;             // channels of a warp
constexpr int K = 32 / (WIDTH / 4);       // steps of a warp, one of which a lane reads
constexpr int NP = 4 * S;                 // states of a channel, those beyond N stay zero
constexpr int MAPS = (K * S + 31) / 32;   // reads of four numbers that bring K steps of B or C
constexpr bool PADDED = !FULL;            // some of NP are not there
constexpr int TILE = 64;                  // steps between the states that the backward starts from

// One scan, forward and backward. A, D, the bias and states are float; y, du and dz are like u, others are float.
struct Scan {
  int64 rows, length, width, states, groups_b, groups_c;
  const int64* borders;            // (rows + 1), of sequences packed end to end, or null
  View u, delta, z, b, c;          // b and c are (D, N) floats where they are constant
  const float *a, *d, *bias, *h0;  // (D, N), (D), (D), (rows, D, N)
  void* y;                         // (B, T, D), lies as u does
  float* final;                    // (rows, D, N)
  float* saved;                    // (tiles, D, N), the states entering every tile, or null
  // Backward only.
  int64 lead, span;  // steps of the first span of a row, and of the others: multiples of TILE, the same where packed
  View dy;
  const float* dfinal;     // (rows, D, N)
  float* carry;            // (spans, D, N), the gradient of the state after a span
  float* seconds;          // (spans, D), the sum of dt over a span
  void *du, *ddelta, *dz;  // (B, T, D), each lies as its tensor does; ddelta is like delta
  float* dmaps;            // (1 or 2, blocks of channels, B, T, NP), sums over the channels of a block, to B, then to C
  float *da, *dd, *dbias;  // (spans, D, N), (spans, D), (spans, D)
  float *db, *dc;          // (spans, D, N), to B and to C where they are constant
  float* dh0;              // (rows, D, N)
  int64 spans;
  void* sums_of_maps[2];  // (B, T, G, N), like B and C
  float* sums[5];         // (D, N), (D), (D), and of a constant B and C (D, N)
};

// A sequence: where it begins on the time axis of which row of the tensors, and its first tile and span. Spans are in
// turn of all rows, so that the long ones begin first; those of a packed sequence lie together.
struct Row {
  int64 begin, batch, tile, span;
  int length;
};

DEVICE Row find_row(const Scan& p, int64 r) {
  if (!p.borders) return {0, r, r * over(p.length, TILE), r, int(p.length)};
  const int64 begin = p.borders[r];
  return {begin, 0, begin / TILE + r, begin / p.span + r, int(p.borders[r + 1] - begin)};
}

// What one lane is to its warp.
struct Lane {
  int lane, group, part;  // its channels are CH group .., its states S part ..
  int step, four;         // it reads channels four .. of step
  int64 first;            // of the warp's channels
  int width;              // how many of them there are
  METHOD Lane(const Scan& p, int64 block)
      : lane(threadIdx.x % 32),
        group(lane / 4),
        part(lane % 4),
        step(lane / (WIDTH / 4)),
        four(lane % (WIDTH / 4) * 4),
        first(block * WIDTH),
        width(int(least(p.width - first, int64(WIDTH)))) {}
  METHOD int count() const { return width - four; }  // channels to read
  METHOD int64 channel(int c) const { return first + group * CH + c; }
  METHOD bool has(int c) const { return group * CH + c < width; }
};

// CH x S numbers of this lane, from (.., D, N), and back.
DEVICE void load_states(const Scan& p, const Lane& l, const float* from, float* h) {
  UNROLL for (int c = 0; c < CH; c++) {
    const float* at = from + l.channel(c) * p.states + l.part * S;
    UNROLL for (int s = 0; s < S; s++)
      h[c * S + s] = l.has(c) && (FULL || l.part * S + s < p.states) ? at[s] : 0;
  }
}
DEVICE void store_states(const Scan& p, const Lane& l, float* to, const float* h) {
  UNROLL for (int c = 0; c < CH; c++) {
    if (!l.has(c)) continue;
    float* at = whole(to + l.channel(c) * p.states + l.part * S);
    if constexpr (FULL) {
      write_floats<S>(at, h + c * S);
    } else {
      UNROLL for (int s = 0; s < S; s++)
        if (l.part * S + s < p.states) at[s] = h[c * S + s];
    }
  }
}

// B and C where they are constant over time, (D, N).
struct Constants {
  float b[CH * S], c[CH * S];
  METHOD Constants(const Scan& p, const Lane& l) {
    if (B_CONSTANT) load_states(p, l, static_cast<const float*>(p.b.data), b);
    if (C_CONSTANT) load_states(p, l, static_cast<const float*>(p.c.data), c);
  }
};

// Rates in units of log2: a step decays by exp2(dt A).
DEVICE void load_rates(const Scan& p, const Lane& l, float* a) {
  load_states(p, l, p.a, a);
  UNROLL for (int i = 0; i < CH * S; i++)
    a[i] *= LOG2_E;
}

// Four channels of any step of a sequence. Steps beyond the end repeat the last one, and channels beyond the width
// those before: neither is used, and an address that is always valid needs no branch.
//
// Where time is LAST, four lanes read four steps of one channel each, zeros where there is none, and have what they are
// to have after `turn`.
template <class T, bool LAST>
struct Input {
  Column<const T> column;
  int last, count, k;
  METHOD Input(const View& v, const Scan& p, const Lane& l, const Row& row)
      : column(v, row.batch, row.begin,
               LAST            ? least(l.first + l.four + l.step % 4, p.width - 1)
               : INPUT_ALIGNED ? least(l.first + l.four, p.width - 4)
                               : l.first + l.four,
               LAST),
        last(row.length - 1),
        count(l.count()),
        k(LAST ? l.step % 4 : 0) {}
  METHOD const T* at(int t) const { return column.at(least(t - k, LAST && INPUT_ALIGNED ? last - 3 : last)); }
  METHOD Four<T> operator[](int t) const {
    if (LAST && count <= k) return {};
    return load_four<INPUT_ALIGNED>(at(t), LAST ? last + 1 - (t - k) : count);
  }
  METHOD void turn(Four<T>& f) const {
    if (LAST) ::turn(f, k, WIDTH / 4);
  }
};
template <class T, bool LAST>
struct Output {
  Column<T> column;
  int last, count, k;
  METHOD Output(void* data, const Scan& p, const Lane& l, const Row& row)
      : column({data, p.length * p.width, LAST ? p.length : p.width}, row.batch, row.begin,
               l.first + l.four + (LAST ? l.step % 4 : 0), LAST),
        last(row.length - 1),
        count(l.count()),
        k(LAST ? l.step % 4 : 0) {}
  METHOD void put(int t, const float* x) const {  // no step of the sequence: nowhere
    if constexpr (LAST) {
      float y[4] = {x[0], x[1], x[2], x[3]};
      ::turn(y, k, WIDTH / 4);
      if (t >= k && t - k <= last && count > k) store_four<INPUT_ALIGNED>(column.at(t - k), y, last + 1 - (t - k));
    } else {
      if (unsigned(t) <= unsigned(last) && count > 0) store_four<INPUT_ALIGNED>(column.at(t), x, count);
    }
  }
};

// Four states of any step of B or C, or four steps of a state where time is LAST, of one group: S threads read a step,
// or four times as many read four.
template <bool LAST>
struct States {
  Column<const MAP> column;
  int count, last, k;
  METHOD States(const View& v, const Scan& p, const Row& row, int64 group, int thread)
      : column(v, row.batch, row.begin,
               group * p.states + (LAST ? least(int64(state(thread)), p.states - 1) : thread % S * 4), LAST),
        count(int(p.states) - (LAST ? state(thread) : thread % S * 4)),
        last(row.length - 1),
        k(LAST ? thread / S % 4 : 0) {}
  METHOD static int state(int thread) { return thread % S * 4 + thread / S % 4; }
  METHOD const MAP* at(int t) const { return column.at(least(t - k, LAST && MAP_ALIGNED ? last - 3 : last)); }
  METHOD Four<MAP> operator[](int t) const {
    if ((LAST || MAP_ALIGNED) && PADDED && count <= 0) return {};
    return load_four<MAP_ALIGNED>(at(t), LAST ? last + 1 - (t - k) : count);
  }
  // Four states of a step as floats; nowhere if that is not wanted.
  METHOD void put(Four<MAP> f, float* to, bool wanted = true) const {
    if (LAST) turn(f, k, S);
    float x[4];
    unpack(f, x);
    if (wanted) write_floats<4>(to, x);
  }
};
// B or C of one group for K steps from t, as it lies in memory, and its way to (K, NP) floats.
template <bool LAST>
struct Map {
  States<LAST> states;
  int step;
  METHOD Map(const View& v, const Scan& p, const Lane& l, const Row& row, int64 group)
      : states(v, p, row, group, l.lane), step(LAST ? l.lane / S : least(l.lane / S, K - 1)) {}
  METHOD const MAP* at(int t) const { return states.at(t + step); }
  METHOD void load(int t, Four<MAP>* four) const {
    UNROLL for (int i = 0; i < MAPS; i++)
      four[i] = states[t + step + i * (32 / S)];
  }
  METHOD void write(const Lane& l, const Four<MAP>* four, float* to) const {
    UNROLL for (int i = 0; i < MAPS; i++)
      states.put(four[i], to + (i * 32 + l.lane) * 4, K * S % 32 == 0 || i * 32 + l.lane < K * S);
  }
};

// A step size, zero beyond the end of the sequence: nothing decays there and nothing enters.
DEVICE float step_size(float raw, bool inside) { return SOFTPLUS ? softplus(inside ? raw : -1e30f) : inside ? raw : 0; }
DEVICE void step_sizes(const Four<DELTA>& delta, const float* biases, bool inside, float* dt) {
  float bias[4];
  unpack(delta, dt);
  read_floats<4>(biases, bias);
  UNROLL for (int i = 0; i < 4; i++)
    dt[i] = step_size(dt[i] + bias[i], inside);
}

// A number each of the four channels that a lane reads, zero where there are none.
DEVICE void load_channels(const float* from, const Lane& l, float* x) {
  UNROLL for (int i = 0; i < 4; i++)
    x[i] = from && i < l.count() ? from[l.first + l.four + i] : 0;
}

// What is the same at every step: the bias and D.
struct Channels {
  float bias[WIDTH], skip[WIDTH];
  METHOD void load(const Scan& p, const Lane& l) {
    UNROLL for (int i = l.lane; i < WIDTH; i += 32) {
      bias[i] = p.bias && i < l.width ? p.bias[l.first + i] : 0;
      skip[i] = p.d && i < l.width ? p.d[l.first + i] : 0;
    }
  }
};

// For K steps and the channels of a warp, pairs of numbers.
struct Pairs {
  float two[K][WIDTH][2];
  METHOD void put(const Lane& l, const float* x, const float* y) {
    UNROLL for (int i = 0; i < 4; i += 2) {
      const float pairs[4] = {x[i], y[i], x[i + 1], y[i + 1]};
      write_floats<4>(two[l.step][l.four + i], pairs);
    }
  }
};

// Sums over the states of a channel: what the four lanes of a channel have found, for K steps.
struct Sums {
  float parts[4][K * WIDTH + 8];  // 8: the banks of the parts differ
  METHOD void put(const Lane& l, int t, const float* x) {
    write_floats<CH>(parts[l.part] + t * WIDTH + l.group * CH, x);
  }
  METHOD void read(const Lane& l, float* x) const {
    read_floats<4>(parts[0] + l.lane * 4, x);
    UNROLL for (int part = 1; part < 4; part++) {
      float more[4];
      read_floats<4>(parts[part] + l.lane * 4, more);
      UNROLL for (int i = 0; i < 4; i++)
        x[i] += more[i];
    }
  }
};
