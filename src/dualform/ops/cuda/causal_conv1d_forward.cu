// The forward: every input is read once, every output written once.
#include "causal_conv1d.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) causal_conv1d_forward(const __grid_constant__ Conv p) {
  const Span span(p);
  const Channels of(p);
  if (!span.exists || of.count <= 0) return;
  const float* before = p.state + of.states(p, span);
  const Steps xs(p.x, span, of, span.end - 1), ys({p.y, p.length * p.width, p.width}, span, of, span.end - 1);
  Runs runs(p, span.batch);
  if (span.begin < span.end) {
    Group next[STEPS];
    UNROLL for (int u = 0; u < STEPS; u++)
      next[u] = xs[span.begin + u];
    const Weights weights(p, of);
    float x[W][V];
    runs.go_before(span.begin);
    int id = runs.at(span.begin);
    read_before(xs, before, runs, span.begin, x + 1);
    for (int t = span.begin; t < span.end; t += STEPS) {
      UNROLL for (int u = 0; u < STEPS; u++) {
        shift(x);
        unpack(next[u], x[W - 1]);
        next[u] = xs[t + u + STEPS];
        if (IDS) runs.next(id), id = runs.at(t + u + 1), runs.cut(x);
        float y[V];
        UNROLL for (int v = 0; v < V; v++) {
          y[v] = weights.before_silu(x, v);
          if (SILU) y[v] *= sigmoid(y[v]);
          if (runs.padding()) y[v] = 0;
        }
        if (t + u < span.end) ys.put(t + u, y);
      }
    }
  }

  if (span.end < span.length) return;
  float* after = p.final + of.states(p, span);
  runs.go_before(span.length);
#pragma unroll 1
  for (int j = 0; j + 1 < W; j++) {
    float x[V];
    read_input(xs, before, span.length - (W - 1) + j, x);
    UNROLL for (int v = 0; v < V; v++)
      if (v < of.count) after[v * (W - 1) + j] = runs.sees(W - 2 - j) ? x[v] : 0;
  }
}
