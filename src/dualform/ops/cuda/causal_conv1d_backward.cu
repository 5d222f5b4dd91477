// The backward: with g_t = dy_t act'(bias + sum_j w_j x_{t - (W-1) + j}),
//
//     dx_s = sum_j w_j g_{s + (W-1) - j},    dw_j = sum_t g_t x_{t - (W-1) + j},    dbias = sum_t g_t.
//
// A thread runs W-1 steps ahead of the gradients of inputs that it writes: at step t it knows dx_{t - (W-1)}. To the
// weights it adds what it finds from step begin + W-1 on, and the steps before in the first span of a sequence.
#include "causal_conv1d_sums.cuh"

struct Walk {
  Weights weights;
  float x[W][V], g[W][V] = {};  // the last W of each, oldest first
  int reach[W] = {};            // of the same steps
  Runs runs;
  float sums[ROWS][V] = {};
  METHOD Walk(const Conv& p, const Span& span, const Channels& of) : weights(p, of), runs(p, span.batch) {}

  METHOD void next(const Group& input, const Group& dy, int id) {
    shift(x), shift(g);
    unpack(input, x[W - 1]);
    unpack(dy, g[W - 1]);
    if (IDS) {
      runs.next(id), runs.cut(x);
      UNROLL for (int j = 0; j < W; j++)
        reach[j] = j + 1 < W ? reach[j + 1] : runs.reach;
    }
    UNROLL for (int v = 0; v < V; v++) {
      if (SILU) {
        const float z = weights.before_silu(x, v), open = sigmoid(z);
        g[W - 1][v] *= open + z * open * (1 - open);
      }
      if (runs.padding()) g[W - 1][v] = 0;
    }
  }
  METHOD void collect() {
    UNROLL for (int v = 0; v < V; v++) {
      UNROLL for (int j = 0; j < W; j++)
        sums[j][v] += g[W - 1][v] * x[j][v];
      if (BIASED) sums[ROWS - 1][v] += g[W - 1][v];
    }
  }
  // The gradient of the input W-1 steps ago.
  METHOD void of_input(float* dx) const {
    UNROLL for (int v = 0; v < V; v++) {
      dx[v] = 0;
      UNROLL for (int j = 0; j < W; j++)
        dx[v] += IDS && reach[W - 1 - j] < W - 1 - j ? 0 : weights.w[v * W + j] * g[W - 1 - j][v];
    }
  }
};

// The gradient of input s through the final state.
DEVICE void add_final(const Conv& p, const Span& span, const Channels& of, int s, float* dx) {
  const int j = s - (span.length - (W - 1));
  if (j < 0) return;
  Runs runs(p, span.batch);
  runs.go_before(span.length);
  if (!runs.sees(W - 2 - j)) return;
  UNROLL for (int v = 0; v < V; v++)
    if (v < of.count) dx[v] += p.dfinal[of.states(p, span) + v * (W - 1) + j];
}

// Everything but the sums over time: those of this span are left in the walk. Beyond the end of a sequence dy is zero.
DEVICE void walk_span(const Conv& p, const Span& span, const Channels& of, Walk& walk, const Ring& ring) {
  const int begin = span.begin, last = least(span.end + W - 1, span.length) - 1;
  const Steps xs(p.x, span, of, last), dys(p.dy, span, of, last);
  const Steps dxs({p.dx, p.length * p.width, p.width}, span, of, last);
  int id = walk.runs.at(begin);
  auto ask = [&](int i, int slot) {
    ring.ask(slot, 0, xs.at(begin + i), of.count, begin + i <= last);
    ring.ask(slot, 1, dys.at(begin + i), of.count, begin + i <= last);
    close_copies();
  };
  auto next = [&](int i, int slot) {
    await_copies<STEPS - 1>();
    walk.next(ring.read(slot, 0), ring.read(slot, 1), id);
    id = walk.runs.at(begin + i + 1);
    ask(i + STEPS, slot);
  };
  UNROLL for (int i = 0; i < STEPS; i++)
    ask(i, i);
  walk.runs.go_before(begin);
  read_before(xs, p.state + of.states(p, span), walk.runs, begin, walk.x + 1);
  UNROLL for (int i = 0; i < W - 1; i++) {
    next(i, i);
    if (begin > 0) continue;
    walk.collect();
    float dx[V];
    walk.of_input(dx);
    add_final(p, span, of, i - (W - 1), dx);
    UNROLL for (int v = 0; v < V; v++)
      if (v < of.count) p.dstate[of.states(p, span) + v * (W - 1) + i] = dx[v];
  }

  auto step = [&](int s, int slot, float* dx) {
    next(s - begin + W - 1, slot + W - 1);
    walk.collect();
    walk.of_input(dx);
  };
  float dx[V];
  int s = begin;
  const int regular = least(span.end, span.length - (W - 1));  // before the inputs that reach the final state
#pragma unroll 1
  for (; s + STEPS <= regular; s += STEPS) UNROLL
    for (int u = 0; u < STEPS; u++) step(s + u, u, dx), dxs.put(s + u, dx);
#pragma unroll 1
  for (; s < span.end; s++) {
    step(s, s - begin, dx);
    add_final(p, span, of, s, dx);
    dxs.put(s, dx);
  }
  await_copies<0>();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    causal_conv1d_backward(const __grid_constant__ Conv p) {
  SHARED_MEMORY(memory);
  const Span span(p);
  const Channels of(p);
  Walk walk(p, span, of);
  if (span.exists && of.count > 0) {
    if (span.length > 0) {
      walk_span(p, span, of, walk, {reinterpret_cast<INPUT*>(memory) + threadIdx.x * V});
    } else {
      const int64 at = of.states(p, span);
      UNROLL for (int i = 0; i < V * (W - 1); i++)
        if (i < of.count * (W - 1)) p.dstate[at + i] = p.dfinal[at + i];
    }
  }
  __syncthreads();
  float* shared = reinterpret_cast<float*>(memory);  // (WARPS, ROWS, LINE), where the rings were
  UNROLL for (int j = 0; j < ROWS; j++)
    write_floats<V>(shared + (threadIdx.x / 32 * ROWS + j) * LINE + threadIdx.x % 32 * V, walk.sums[j]);
  __syncthreads();
  const int64 lines = over(p.width, LINE), first = blockIdx.x % lines * LINE;
  for (int i = threadIdx.x; i < ROWS * LINE; i += 32 * WARPS) {
    float sum = 0;
    UNROLL for (int warp = 0; warp < WARPS; warp++)
      sum += shared[warp * ROWS * LINE + i];
    const int64 channel = first + i % LINE;
    if (channel < p.width) p.sums[(blockIdx.x / lines * ROWS + i / LINE) * p.width + channel] = sum;
  }
}
