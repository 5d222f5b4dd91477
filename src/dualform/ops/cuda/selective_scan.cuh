// h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = (C_t h_t + D u_t) silu(z_t): how lanes share the work.
//
// A warp computes 8 CH channels for K steps. Four neighbouring lanes share CH channels, each holds S of their states; a
// state never leaves its lane. Inputs arrive as four channels of one step per lane, are made into floats there, so that
// nothing is computed twice, and pass through shared memory to the lanes that need them.
#pragma once

#include "common.cuh"

constexpr int CH = CHANNELS, S = STATES;  // of one lane
constexpr int WIDTH = 8 * CH;             // channels of a warp
constexpr int K = 32 / (WIDTH / 4);       // steps of a warp, one of which a lane reads
constexpr int NP = 4 * S;                 // states of a channel, those beyond N stay zero
constexpr int MAPS = (K * S + 31) / 32;   // reads of four numbers that bring K steps of B or C
constexpr int TILE = 64;                  // steps between the states that the backward starts from

struct View {  // (rows, T, ...), strides in elements, the last axes contiguous
  const void* data;
  int64 row, time;
};

// One scan, forward and backward. A, D, the bias and states are float; y, du and dz are like u, others are float.
struct Scan {
  int64 rows, length, width, states, groups_b, groups_c;
  const int64* borders;  // (rows + 1), of sequences packed end to end, or null
  View u, delta, z, b, c;
  const float *a, *d, *bias, *h0;  // (D, N), (D), (D), (rows, D, N)
  void* y;                         // (B, T, D)
  float* final;                    // (rows, D, N)
  float* saved;                    // (tiles, D, N), the states entering every tile, or null
  // Backward only.
  int64 span;                      // steps that one warp runs through, a multiple of TILE
  View dy;
  const float* dfinal;             // (rows, D, N)
  float* carry;                    // (spans, D, N), the gradient of the state after a span
  float* seconds;                  // (spans, D), the sum of dt over a span
  void *du, *ddelta, *dz;          // (B, T, D); ddelta is like delta
  float* dmaps;                    // (2, blocks of channels, B, T, NP), sums over the channels of a block, to B and to C
  float *da, *dd, *dbias;          // (spans, D, N), (spans, D), (spans, D)
  float* dh0;                      // (rows, D, N)
};

// A sequence: where it begins on the time axis of which row of the tensors, and its first tile and span.
struct Row {
  int64 begin, length, batch, tile, span;
};

DEVICE int64 over(int64 a, int64 b) { return (a + b - 1) / b; }

DEVICE Row find_row(const Scan& p, int64 r) {
  if (!p.borders) return {0, p.length, r, r * over(p.length, TILE), r * over(p.length, p.span)};
  int64 begin = p.borders[r];
  return {begin, p.borders[r + 1] - begin, 0, begin / TILE + r, begin / p.span + r};
}

// What one lane is to its warp.
struct Lane {
  int lane, group, part;  // its channels are CH group .., its states S part ..
  int step, four;         // it reads channels four .. of step
  int64 first, width;     // of the warp's channels, and how many there are
  METHOD Lane(const Scan& p, int64 block)
      : lane(threadIdx.x % 32), group(lane / 4), part(lane % 4), step(lane / (WIDTH / 4)), four(lane % (WIDTH / 4) * 4),
        first(block * WIDTH), width(p.width - first) {}
  METHOD int64 count() const { return width - four; }  // channels to read
  METHOD int64 channel(int c) const { return first + group * CH + c; }
  METHOD bool has(int c) const { return group * CH + c < width; }
};

// CH x S numbers of this lane, from (.., D, N), and back.
DEVICE void load_states(const Scan& p, const Lane& l, const float* from, float* h) {
  UNROLL for (int c = 0; c < CH; c++)
    UNROLL for (int s = 0; s < S; s++) {
      int64 n = l.part * S + s;
      h[c * S + s] = l.has(c) && n < p.states ? from[l.channel(c) * p.states + n] : 0;
    }
}
DEVICE void store_states(const Scan& p, const Lane& l, float* to, const float* h) {
  UNROLL for (int c = 0; c < CH; c++)
    UNROLL for (int s = 0; s < S; s++) {
      int64 n = l.part * S + s;
      if (l.has(c) && n < p.states) to[l.channel(c) * p.states + n] = h[c * S + s];
    }
}

// Rates in units of log2: a step decays by exp2(dt A).
DEVICE void load_rates(const Scan& p, const Lane& l, float* a) {
  load_states(p, l, p.a, a);
  UNROLL for (int i = 0; i < CH * S; i++) a[i] *= LOG2_E;
}

// Four channels of one step.
template <class T>
DEVICE Four<T> load_input(const View& v, const Lane& l, const Row& row, int64 t) {
  if (t >= row.length) return {};
  return load_four<INPUT_ALIGNED, T>(
      static_cast<const T*>(v.data) + row.batch * v.row + (row.begin + t) * v.time + l.first + l.four, l.count());
}
template <class T>
DEVICE void store_output(const Scan& p, void* to, const Lane& l, const Row& row, int64 t, const float* x) {
  if (t >= row.length) return;
  store_four<INPUT_ALIGNED>(static_cast<T*>(to) + (row.batch * p.length + row.begin + t) * p.width + l.first + l.four, x,
                      l.count());
}

// B or C of one group for K steps from t, as it lies in memory, and its way to (K, NP) floats.
struct Map {
  Four<MAP> four[MAPS];
  METHOD void load(const View& v, const Lane& l, const Row& row, int64 t, int64 states, int64 group) {
    UNROLL for (int i = 0; i < MAPS; i++) {
      int step = (i * 32 + l.lane) / S, n = (i * 32 + l.lane) % S * 4;
      four[i] = {};
      if (step < K && t + step < row.length)
        four[i] = load_four<MAP_ALIGNED>(
            static_cast<const MAP*>(v.data) + row.batch * v.row + (row.begin + t + step) * v.time + group * states + n,
            states - n);
    }
  }
  METHOD void write(const Lane& l, float* to) const {
    UNROLL for (int i = 0; i < MAPS; i++) {
      float x[4];
      unpack(four[i], x);
      if (K * S % 32 == 0 || i * 32 + l.lane < K * S) write_shared<4>(to + (i * 32 + l.lane) * 4, x);
    }
  }
};

// The step sizes of four channels, zero beyond the end of the sequence: nothing decays there and nothing enters.
DEVICE void step_sizes(const Four<DELTA>& delta, const float* bias, bool inside, float* raw, float* dt) {
  unpack(delta, raw);
  UNROLL for (int i = 0; i < 4; i++) {
    raw[i] += bias[i];
    dt[i] = inside ? (SOFTPLUS ? softplus(raw[i]) : raw[i]) : 0;
  }
}
DEVICE void load_channels(const float* from, const Lane& l, float* x) {
  UNROLL for (int i = 0; i < 4; i++) x[i] = from && i < l.count() ? from[l.first + l.four + i] : 0;
}

// Sums over the states of a channel, of parts in four lanes, for COUNT steps: to (COUNT, WIDTH).
template <int COUNT>
DEVICE void sum_states(const float (*parts)[CH], const Lane& l, float* to) {
  UNROLL for (int q = 0; q < COUNT / 4; q++) {
    float found[CH];
    UNROLL for (int c = 0; c < CH; c++) {
      float x[4] = {parts[4 * q][c], parts[4 * q + 1][c], parts[4 * q + 2][c], parts[4 * q + 3][c]};
      share_sums<4>(x, 2, l.lane);
      share_sums<2>(x, 1, l.lane);
      found[c] = x[0];
    }
    write_shared<CH>(to + (4 * q + l.part) * WIDTH + l.group * CH, found);
  }
}
