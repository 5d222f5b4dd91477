// Where time is last, (B, D, T): a warp takes one channel, and every lane V of its steps at a time. A lane reads what
// it needs of its neighbours from memory, too: it was just read, and waits in the cache. Either V steps are aligned and
// divide the length, or V is one.
//
// The backward computes the gradient of an output once more for every lane that needs it. Inputs before the first are
// handled as steps before 0.
#include "causal_conv1d_sums.cuh"

constexpr int PAST = (W - 1 + V - 1) / V * V;  // steps around those of a lane that it reads, on either side

// The channel of a warp and its span of time: steps begin to end of a row.
struct Track {
  int64 row, channel, span;
  int length, begin, end;
  bool exists;
  METHOD Track(const Conv& p) : length(int(p.length)) {
    const int64 number = int64(blockIdx.x) * WARPS + threadIdx.x / 32, spans = over(p.length, p.span);
    channel = number % p.width, span = number / p.width;
    row = span / spans, exists = row < p.rows;
    begin = int(span % spans * p.span), end = int(least(begin + p.span, p.length));
  }
  METHOD int64 state(const Conv& p) const { return (row * p.width + channel) * (W - 1); }
  METHOD const INPUT* input(const View& v) const {
    return static_cast<const INPUT*>(v.data) + row * v.row + channel * v.time;
  }
  METHOD INPUT* output(const Conv& p, INPUT* data) const { return data + (row * p.width + channel) * p.length; }

  // COUNT steps from t, of which V are in the sequence or none. Those before the first are in the state; beyond the end
  // there are zeros.
  template <int COUNT>
  METHOD void read(const INPUT* from, const float* state, int t, float* x) const {
    UNROLL for (int i = 0; i < COUNT; i += V) {
      if (t + i >= 0 && t + i < length) {
        unpack(load_group(from + t + i, V), x + i);
      } else {
        UNROLL for (int v = 0; v < V; v++)
          x[i + v] = state && t + i + v < 0 && t + i + v >= 1 - W ? state[t + i + v + W - 1] : 0;
      }
    }
  }
};

struct Taps {
  float w[W], bias;
  METHOD Taps(const Conv& p, const Track& of) : bias(BIASED ? number(p.bias + of.channel) : 0) {
    UNROLL for (int j = 0; j < W; j++)
      w[j] = number(p.weight + of.channel * W + j);
  }
  template <class T>
  METHOD static float number(const T* p) {
    float four[4];
    unpack(load_four<false>(p, 1), four);
    return four[0];
  }
  // From a window of inputs, oldest first.
  METHOD float before_silu(const float* x, int reach) const {
    float y = bias;
    UNROLL for (int j = 0; j < W; j++)
      y += IDS && W - 1 - j > reach ? 0 : w[j] * x[j];
    return y;
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    causal_conv1d_time_last_forward(const __grid_constant__ Conv p) {
  const Track of(p);
  if (!of.exists) return;
  const int lane = threadIdx.x % 32;
  const INPUT* xs = of.input(p.x);
  const float* before = p.state + of.state(p);
  const Taps taps(p, of);
  Runs runs(p, of.row);
#pragma unroll 2
  for (int t = of.begin + lane * V; t < of.end; t += 32 * V) {
    float x[PAST + V], y[V];
    of.read<PAST + V>(xs, before, t - PAST, x);
    runs.go_before(t);
    UNROLL for (int v = 0; v < V; v++) {
      if (IDS) runs.next(runs.at(t + v));
      y[v] = taps.before_silu(x + PAST + v - (W - 1), runs.reach);
      if (SILU) y[v] *= sigmoid(y[v]);
      if (runs.padding()) y[v] = 0;
    }
    store_group(of.output(p, p.y) + t, y, V);
  }
  const int t = of.length - (W - 1) + lane;
  if (of.end < of.length || t >= of.length) return;
  runs.go_before(of.length);
  const bool seen = runs.sees(W - 2 - lane);
  p.final[of.state(p) + lane] = !seen ? 0 : t < 0 ? before[t + W - 1] : Taps::number(xs + t);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    causal_conv1d_time_last_backward(const __grid_constant__ Conv p) {
  const Track of(p);
  if (!of.exists) return;
  const int lane = threadIdx.x % 32;
  const INPUT *xs = of.input(p.x), *dys = of.input(p.dy);
  const int64 states = of.state(p);
  const Taps taps(p, of);
  float sums[ROWS] = {};
  // Steps before 0 are those of the state.
  for (int s = (of.begin ? of.begin : -PAST) + lane * V; s < of.end; s += 32 * V) {
    float x[2 * PAST + V], g[PAST + V], dx[V] = {};
    of.read<2 * PAST + V>(xs, p.state + states, s - PAST, x);
    of.read<PAST + V>(dys, nullptr, s, g);
    Runs runs(p, of.row);
    runs.go_before(s);
    UNROLL for (int i = 0; i < V + W - 1; i++) {
      const bool inside = s + i >= 0 && s + i < of.length;
      const float* window = x + PAST + i - (W - 1);
      if (IDS && inside) runs.next(runs.at(s + i));
      if (SILU) {
        const float z = taps.before_silu(window, runs.reach), open = sigmoid(z);
        g[i] *= open + z * open * (1 - open);
      }
      if (!inside || runs.padding()) g[i] = 0;
      // Output i for the inputs of this lane that it sees, and for the weights if its step is one of this lane's.
      UNROLL for (int v = 0; v < V; v++)
        if (i >= v && i - v < W && runs.sees(i - v)) dx[v] += taps.w[W - 1 - (i - v)] * g[i];
      if (i >= V || !inside) continue;
      UNROLL for (int j = 0; j < W; j++)
        if (runs.sees(W - 1 - j)) sums[j] += g[i] * window[j];
      if (BIASED) sums[ROWS - 1] += g[i];
    }
    UNROLL for (int v = 0; v < V; v++) {
      const int j = s + v - (of.length - (W - 1));
      if (j >= 0 && j < W - 1) {
        runs.go_before(of.length);
        if (runs.sees(W - 2 - j)) dx[v] += p.dfinal[states + j];
      }
      if (s + v < 0 && s + v >= 1 - W) p.dstate[states + s + v + W - 1] = dx[v];
    }
    if (s >= 0) store_group(of.output(p, p.dx) + s, dx, V);
  }
  UNROLL for (int j = 0; j < ROWS; j++) {
    UNROLL for (int distance = 16; distance > 0; distance /= 2)
      sums[j] += from_lane(sums[j], distance);
    if (lane == 0) p.sums[(of.span * ROWS + j) * p.width + of.channel] = sums[j];
  }
}
