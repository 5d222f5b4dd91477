// y_t = act(bias + sum_j w_j x_{t - (W-1) + j}): a thread owns V neighbouring channels and walks through a span of
// time. What it will need again stays in registers, and the next STEPS inputs are on their way from memory: only the
// few steps around a span are read twice. The warps of a block take neighbouring spans of the same channels.
#pragma once

#include "sequences.cuh"

constexpr int W = TAPS, V = EACH;      // V numbers of a thread lie together: channels, or steps where time is last
constexpr int LINE = 32 * V;           // channels of a warp
constexpr int ROWS = W + int(BIASED);  // of sums: the gradients of the weights, and of the bias

// One convolution, forward and backward.
struct Conv {
  int64 rows, length, width, span;  // span: steps of a warp
  const int64* borders;             // (rows + 1), of sequences packed end to end, or null
  const int* ids;                   // (B, T), see Runs, or null
  View x;
  const WEIGHT* weight;  // (D, W)
  const BIAS* bias;      // (D)
  const float* state;    // (rows, D, W-1)
  INPUT* y;              // (B, T, D), or (B, D, T) like x
  float* final;          // (rows, D, W-1)
  // Backward only.
  View dy;
  const float* dfinal;  // (rows, D, W-1)
  INPUT* dx;            // like y
  float* dstate;        // (rows, D, W-1)
  int64 blocks;         // of spans of time
  float* sums;          // (blocks, ROWS, D)
  WEIGHT* dweight;      // (D, W)
  BIAS* dbias;          // (D)
};

// V numbers, as they lie in memory; eight are 16 bytes that can be read at once.
template <class T>
struct GroupOf {
  Four<T> fours[(V + 3) / 4];
};
using Group = GroupOf<INPUT>;
template <class T>
DEVICE GroupOf<T> load_group(const T* p, int count) {
  GroupOf<T> g;
  if constexpr (V == 8) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    g.fours[0].pair[0] = v.x, g.fours[0].pair[1] = v.y, g.fours[1].pair[0] = v.z, g.fours[1].pair[1] = v.w;
  } else {
    g.fours[0] = load_four<ALIGNED>(p, count);
  }
  return g;
}
template <class T>
DEVICE void unpack(const GroupOf<T>& g, float* x) {
  UNROLL for (int i = 0; i < V / 4; i++)
    unpack(g.fours[i], x + 4 * i);
  if constexpr (V < 4) {
    float four[4];
    unpack(g.fours[0], four);
    x[0] = four[0];
  }
}
template <class T>
DEVICE void store_group(T* p, const float* x, int count) {
  if constexpr (V == 8) {
    Four<T> low, high;
    pack(low, x), pack(high, x + 4);
    *reinterpret_cast<uint4*>(p) = make_uint4(low.pair[0], low.pair[1], high.pair[0], high.pair[1]);
  } else if constexpr (V < 4) {
    const float four[4] = {x[0]};
    store_four<false>(p, four, 1);
  } else {
    store_four<ALIGNED>(p, x, count);
  }
}

// The span of time of a warp: steps begin to end of a sequence. One without steps stands for an empty sequence.
struct Span {
  int64 sequence, batch, start;
  int length, begin, end;
  bool exists;
  METHOD Span(const Conv& p) {
    const int64 number = blockIdx.x / over(p.width, LINE) * WARPS + threadIdx.x / 32;
    sequence = find_sequence(p.borders, p.rows, p.length, p.span, number);
    const bool known = sequence < p.rows;
    sequence = known ? sequence : 0;
    batch = p.borders ? 0 : sequence, start = p.borders ? p.borders[sequence] : 0;
    length = int(p.borders ? p.borders[sequence + 1] - start : p.length);
    const int64 first = p.borders ? start / p.span + sequence : sequence * over(p.length, p.span);
    const int64 from = (number - first) * p.span;
    exists = known && (from < length || from == 0);
    begin = int(least(from, int64(length))), end = int(least(from + p.span, int64(length)));
  }
};

// The channels of a thread.
struct Channels {
  int64 first;
  int count;  // V, or fewer, or none
  METHOD Channels(const Conv& p)
      : first(blockIdx.x % over(p.width, LINE) * LINE + threadIdx.x % 32 * V),
        count(int(least(p.width - first, int64(V)))) {}
  // Where the states of a sequence lie: (V, W-1).
  METHOD int64 states(const Conv& p, const Span& span) const { return (span.sequence * p.width + first) * (W - 1); }
  METHOD int64 outputs(const Conv& p, const Span& span) const {
    return (span.batch * p.length + span.start) * p.width + first;
  }
};

// A tensor (B, T, D) as a thread sees it: its channels of any step of a sequence that has steps. A step beyond the last
// one that is wanted is that one again: the address is always valid, so that reads need no branch.
struct Steps : Column<INPUT> {
  int last, count;
  METHOD Steps(const View& v, const Span& span, const Channels& of, int last)
      : Column(v, span.batch, span.start, of.first), last(last), count(of.count) {}
  METHOD Group operator[](int t) const { return load_group(at(least(t, last)), count); }
  METHOD void put(int t, const float* x) const { store_group(at(t), x, count); }
};

// How far steps see back, where ids divide rows into runs of equal ids: a step sees the input of its own and `reach`
// earlier ones of its run, W-1 at most; one with a negative id is padding and sees none, -1. The run that a row begins
// with sees its state, too.
struct Runs {
  const int* ids;  // of a row
  int last, id = 0, reach = W - 1;
  METHOD Runs(const Conv& p, int64 batch) : ids(IDS ? p.ids + batch * p.length : nullptr), last(int(p.length) - 1) {}
  METHOD int at(int t) const { return IDS ? ids[least(t, last)] : 0; }
  // Goes to the place before step t, of one row.
  METHOD void go_before(int t) {
    if (!IDS) return;
    id = at(t > 0 ? t - 1 : 0), reach = W - 1;
    UNROLL for (int k = W - 1; k > 0; k--)
      if (t - 1 - k >= 0 && ids[t - 1 - k] != id) reach = k - 1;
    reach = t > 0 && id < 0 ? -1 : reach;
  }
  METHOD void next(int of_step) {
    reach = of_step < 0 ? -1 : of_step != id ? 0 : least(reach + 1, W - 1);
    id = of_step;
  }
  METHOD bool padding() const { return IDS && reach < 0; }
  METHOD bool sees(int back) const { return !IDS || back <= reach; }
  // Takes from a window, whose last input is that of the present step, what this one does not see.
  METHOD void cut(float (&x)[W][V]) const {
    if (!IDS || reach > 0) return;
    UNROLL for (int j = 0; j < W; j++) UNROLL
      for (int v = 0; v < V; v++) x[j][v] = j == W - 1 && reach == 0 ? x[j][v] : 0;
  }
};

// The input of any step, also of the W-1 before the first: those are in the state.
DEVICE void read_input(const Steps& xs, const float* states, int t, float* x) {
  if (t >= 0) return unpack(xs[t], x);
  UNROLL for (int v = 0; v < V; v++)
    x[v] = v < xs.count ? states[v * (W - 1) + t + W - 1] : 0;
}
// The W-1 inputs before a span of time, oldest first.
DEVICE void read_before(const Steps& xs, const float* states, const Runs& runs, int begin, float (*x)[V]) {
  if (begin > 0) {
    UNROLL for (int j = 0; j + 1 < W; j++) {
      unpack(xs[begin - (W - 1) + j], x[j]);
      UNROLL for (int v = 0; v < V; v++)
        x[j][v] = runs.sees(W - 2 - j) ? x[j][v] : 0;
    }
  } else {
    UNROLL for (int j = 0; j + 1 < W; j++) UNROLL
      for (int v = 0; v < V; v++) x[j][v] = v < xs.count ? states[v * (W - 1) + j] : 0;
  }
}

struct Weights {
  float w[V * W], bias[V];
  METHOD Weights(const Conv& p, const Channels& of) {
    const int64 first =
        ALIGNED ? least(of.first, p.width - V) : of.first;  // an address that is always valid needs no branch
    load<V * W>(p.weight + first * W, of.count * W, w);
    UNROLL for (int v = 0; v < V; v++)
      bias[v] = 0;
    if (BIASED) load<V>(p.bias + first, of.count, bias);
  }
  template <int COUNT, class T>
  METHOD static void load(const T* from, int count, float* to) {
    UNROLL for (int i = 0; i < COUNT; i += 4)
      unpack(load_four<ALIGNED>(from + i, count - i), to + i);
  }
  // From a window of inputs, oldest first.
  METHOD float before_silu(const float (&x)[W][V], int v) const {
    float y = bias[v];
    UNROLL for (int j = 0; j < W; j++)
      y += w[v * W + j] * x[j][v];
    return y;
  }
};

DEVICE void shift(float (&x)[W][V]) {
  UNROLL for (int j = 0; j + 1 < W; j++) UNROLL
    for (int v = 0; v < V; v++) x[j][v] = x[j + 1][v];
}
