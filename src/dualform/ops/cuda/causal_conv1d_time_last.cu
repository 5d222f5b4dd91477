// Where time is last, (B, D, T): a warp takes one channel, and every lane V of its steps at a time. Either V steps are
// aligned and divide the length, or V is one. Inputs before the first are those of the state, as steps before 0.
//
// The forward reads what a lane needs of its neighbours from memory, too: it was just read, and waits in the cache. The
// backward, which needs more of them, asks the lanes that have it.
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

  // V steps from t, which are in the sequence or not; none of them before `first`. Elsewhere there are zeros.
  METHOD Group group(const INPUT* from, int t, int first) const {
    return t >= first && t < length ? load_group(from + t, V) : Group{};
  }
  // V steps before the first, as far as they are in the state.
  METHOD void before(const float* state, int t, float* x) const {
    UNROLL for (int v = 0; v < V; v++)
      x[v] = t + v >= 1 - W ? state[t + v + W - 1] : 0;
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
#pragma unroll 4
  for (int t = of.begin + lane * V; t < of.end; t += 32 * V) {
    float x[PAST + V], y[V];
    UNROLL for (int i = 0; i < PAST + V; i += V) {
      unpack(of.group(xs, t - PAST + i, 0), x + i);
      if (t - PAST + i < 0) of.before(before, t - PAST + i, x + i);
    }
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

// The part of the gradient of an input that comes through the final state.
DEVICE float of_final(const Conv& p, const Track& of, Runs& runs, int64 states, int t) {
  const int j = t - (of.length - (W - 1));
  if (j < 0 || j >= W - 1) return 0;
  runs.go_before(of.length);
  return runs.sees(W - 2 - j) ? p.dfinal[states + j] : 0;
}

// What is `ahead` steps from the first of a lane, among the V of each lane of a round and of the round that is nearest
// in that direction.
DEVICE float of_step(const float* round, const float* next, int ahead, int lane) {
  const int lanes = (ahead + 32 * V) / V - 32, v = (ahead + 32 * V) % V;
  if (lanes == 0) return round[v];
  const bool beyond = lanes > 0 ? lane < lanes : lane >= 32 + lanes;  // seen from the lane that is asked
  return of_lane(beyond ? next[v] : round[v], (lane + lanes) & 31);
}

// The gradients before SiLU of the outputs of a round, and how far these see.
struct Outputs {
  float g[V], reach[V];
};

// Goes back in time, round by round of the lanes: a lane has the outputs that see its inputs from the lanes behind it,
// the last lanes from the round before.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    causal_conv1d_time_last_backward(const __grid_constant__ Conv p) {
  constexpr int ROUND = 32 * V;
  const Track of(p);
  if (!of.exists) return;
  const int lane = threadIdx.x % 32;
  const INPUT *xs = of.input(p.x), *dys = of.input(p.dy);
  const int64 states = of.state(p);
  const Taps taps(p, of);
  const int last = of.begin + (of.end - 1 - of.begin) / ROUND * ROUND;  // where the last round begins
  const int first = of.begin > ROUND ? of.begin - ROUND : 0;            // of the inputs that are wanted
  float sums[ROWS] = {};
  Outputs later = {};
  int at = of.end < of.length ? last + ROUND : last;  // outputs of the next span see inputs of this one
  SHARED_MEMORY(memory);
  const Ring ring{reinterpret_cast<INPUT*>(memory) + threadIdx.x * V};
  auto ask = [&](int slot, int t) {  // the inputs of the round before come with the gradients of a round
    const bool wanted = t - ROUND >= first && t - ROUND < of.length, known = t >= of.begin && t < of.length;
    ring.ask(slot, 0, xs + (wanted ? t - ROUND : 0), V, wanted);
    ring.ask(slot, 1, dys + (known ? t : 0), V, known);
    close_copies();
  };
  Group own = of.group(xs, at + lane * V, first);
  UNROLL for (int i = 0; i < STEPS; i++)
    ask(i, at - i * ROUND + lane * V);
#pragma unroll 1
  for (int slot = 0; at >= of.begin; at -= ROUND, slot++) {
    const int s = at + lane * V;
    float x[V], earlier[V], window[V + W - 1];
    Outputs now;
    await_copies<STEPS - 1>();
    unpack(own, x), unpack(ring.read(slot, 1), now.g);
    own = ring.read(slot, 0), unpack(own, earlier);
    ask(slot, s - STEPS * ROUND);
    if (at < ROUND) of.before(p.state + states, s - ROUND, earlier);
    UNROLL for (int i = 0; i < V + W - 1; i++)
      window[i] = of_step(x, earlier, i - (W - 1), lane);
    const bool inside = s < of.length;  // all V steps, or none
    Runs runs(p, of.row);
    runs.go_before(s);
    UNROLL for (int v = 0; v < V; v++) {
      if (IDS && inside) runs.next(runs.at(s + v));
      if (SILU) {
        const float z = taps.before_silu(window + v, runs.reach), open = sigmoid(z);
        now.g[v] *= open + z * open * (1 - open);
      }
      if (!inside || runs.padding()) now.g[v] = 0;
      now.reach[v] = runs.reach;
    }
    if (at <= last) {  // not that of the next span
      float g[V + W - 1], reach[V + W - 1], dx[V] = {};
      UNROLL for (int i = 0; i < V + W - 1; i++) {
        g[i] = of_step(now.g, later.g, i, lane);
        if (IDS) reach[i] = of_step(now.reach, later.reach, i, lane);
      }
      UNROLL for (int v = 0; v < V; v++) UNROLL
        for (int back = 0; back < W; back++)
          if (!IDS || back <= reach[v + back]) dx[v] += taps.w[W - 1 - back] * g[v + back];
      if (at + ROUND > of.length - (W - 1)) {
        UNROLL for (int v = 0; v < V; v++)
          dx[v] += of_final(p, of, runs, states, s + v);
      }
      if (inside) {
        UNROLL for (int v = 0; v < V; v++) {
          UNROLL for (int j = 0; j < W; j++)
            if (!IDS || W - 1 - j <= reach[v]) sums[j] += g[v] * window[v + j];
          if (BIASED) sums[ROWS - 1] += g[v];
        }
        store_group(of.output(p, p.dx) + s, dx, V);
      }
    }
    later = now;
  }
  if (of.begin == 0) {  // of the steps before the first, which are in the state
    Runs runs(p, of.row);
    UNROLL for (int k = 1; k < W; k++) {
      float d = of_final(p, of, runs, states, -k);
      UNROLL for (int back = k; back < W; back++) {
        const int v = (back - k) % V, from = (back - k) / V;
        const float g = of_lane(later.g[v], from);
        if (!IDS || back <= of_lane(later.reach[v], from)) d += taps.w[W - 1 - back] * g;
      }
      if (lane == 0) p.dstate[states + W - 1 - k] = d;
    }
  }
  UNROLL for (int j = 0; j < ROWS; j++) {
    UNROLL for (int distance = 16; distance > 0; distance /= 2)
      sums[j] += from_lane(sums[j], distance);
    if (lane == 0) p.sums[(of.span * ROWS + j) * p.width + of.channel] = sums[j];
  }
}
