// The forward: every input is read once, every output written once.
#include "causal_conv1d.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) causal_conv1d_forward(const __grid_constant__ Conv p) {
  const Piece piece(p);
  const Channels of(p);
  if (!piece.exists || of.count <= 0) return;
  const float* before = p.state + of.states(p, piece);
  const Steps xs(p.x, piece, of, piece.end - 1), ys({p.y, p.length * p.width, p.width}, piece, of, piece.end - 1);
  if (piece.begin < piece.end) {
    Group next[STEPS];
    UNROLL for (int u = 0; u < STEPS; u++)
      next[u] = xs[piece.begin + u];
    const Weights weights(p, of);
    float x[W][V];
    read_before(xs, before, piece.begin, x + 1);
    for (int t = piece.begin; t < piece.end; t += STEPS) {
      UNROLL for (int u = 0; u < STEPS; u++) {
        shift(x);
        unpack(next[u], x[W - 1]);
        next[u] = xs[t + u + STEPS];
        float y[V];
        UNROLL for (int v = 0; v < V; v++) {
          y[v] = weights.before_silu(x, v);
          if (SILU) y[v] *= sigmoid(y[v]);
        }
        if (t + u < piece.end) ys.put(t + u, y);
      }
    }
  }

  if (piece.end < piece.length) return;
  float* after = p.final + of.states(p, piece);
#pragma unroll 1
  for (int j = 0; j + 1 < W; j++) {
    float x[V];
    read_input(xs, before, piece.length - (W - 1) + j, x);
    UNROLL for (int v = 0; v < V; v++)
      if (v < of.count) after[v * (W - 1) + j] = x[v];
  }
}
