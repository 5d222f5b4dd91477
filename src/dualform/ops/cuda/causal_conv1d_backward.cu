// The backward: with g_t = dy_t act'(bias + sum_j w_j x_{t - (W-1) + j}),
//
//     dx_s = sum_j w_j g_{s + (W-1) - j},    dw_j = sum_t g_t x_{t - (W-1) + j},    dbias = sum_t g_t.
//
// A thread runs W-1 steps ahead of the gradients of inputs that it writes: at step t it knows dx_{t - (W-1)}. To the
// weights it adds what it finds from step begin + W-1 on, and the steps before in the first piece of a sequence.
#include "causal_conv1d.cuh"

struct Walk {
  Weights weights;
  float x[W][V], g[W][V] = {};  // the last W of each, oldest first
  float sums[ROWS][V] = {};
  METHOD Walk(const Conv& p, const Channels& of) : weights(p, of) {}

  METHOD void next(const Group& input, const Group& dy) {
    shift(x), shift(g);
    unpack(input, x[W - 1]);
    unpack(dy, g[W - 1]);
    if (!SILU) return;
    UNROLL for (int v = 0; v < V; v++) {
      const float z = weights.before_silu(x, v), open = sigmoid(z);
      g[W - 1][v] *= open + z * open * (1 - open);
    }
  }
  // A step beyond the end of the sequence.
  METHOD void nothing() {
    UNROLL for (int v = 0; v < V; v++) g[W - 1][v] = 0;
  }
  METHOD void collect() {
    UNROLL for (int v = 0; v < V; v++) {
      UNROLL for (int j = 0; j < W; j++) sums[j][v] += g[W - 1][v] * x[j][v];
      if (BIASED) sums[ROWS - 1][v] += g[W - 1][v];
    }
  }
  // The gradient of the input W-1 steps ago.
  METHOD void of_input(float* dx) const {
    UNROLL for (int v = 0; v < V; v++) {
      dx[v] = 0;
      UNROLL for (int j = 0; j < W; j++) dx[v] += weights.w[v * W + j] * g[W - 1 - j][v];
    }
  }
};

// The gradient of input s through the final state.
DEVICE void add_final(const Conv& p, const Piece& piece, const Channels& of, int s, float* dx) {
  const int j = s - (piece.length - (W - 1));
  if (j < 0) return;
  UNROLL for (int v = 0; v < V; v++) if (v < of.count) dx[v] += p.dfinal[of.states(p, piece) + v * (W - 1) + j];
}

// Everything but the sums over time: those of this piece are left in the walk.
DEVICE void walk_piece(const Conv& p, const Piece& piece, const Channels& of, Walk& walk) {
  const int length = piece.length, begin = piece.begin;
  const int regular = least(piece.end, length - (W - 1));  // the end of the inputs that reach W outputs each
  const int last = least(piece.end + W - 1, length) - 1;
  const Steps xs(p.x, piece, of, last), dys(p.dy, piece, of, last);
  const Steps dxs(p.dx, p.length * p.width, p.width, piece, of, last);
  Group first[W][2], next[STEPS][2];
  UNROLL for (int j = 0; j + 1 < W; j++) first[j][0] = xs[begin + j], first[j][1] = dys[begin + j];
  UNROLL for (int u = 0; u < STEPS; u++) next[u][0] = xs[begin + u + W - 1], next[u][1] = dys[begin + u + W - 1];
  read_before(xs, p.state + of.states(p, piece), begin, walk.x + 1);
  UNROLL for (int j = 0; j + 1 < W; j++) {
    walk.next(first[j][0], first[j][1]);
    if (begin + j >= length) walk.nothing();
    if (begin > 0) continue;
    walk.collect();
    float dx[V];
    walk.of_input(dx);
    add_final(p, piece, of, j - (W - 1), dx);
    UNROLL for (int v = 0; v < V; v++) if (v < of.count) p.dstate[of.states(p, piece) + v * (W - 1) + j] = dx[v];
  }

  auto step = [&](int s, Group (&given)[2], int ahead) {
    walk.next(given[0], given[1]);
    given[0] = xs[s + ahead + W - 1], given[1] = dys[s + ahead + W - 1];
    walk.collect();
    float dx[V];
    walk.of_input(dx);
    dxs.put(s, dx);
  };
  int s = begin;
#pragma unroll 1
  for (; s + STEPS <= regular; s += STEPS) UNROLL for (int u = 0; u < STEPS; u++) step(s + u, next[u], STEPS);
  if (s == piece.end) return;

  next[0][0] = xs[s + W - 1], next[0][1] = dys[s + W - 1];
#pragma unroll 1
  for (; s < regular; s++) step(s, next[0], 1);
#pragma unroll 1
  for (; s < piece.end; s++) {
    shift(walk.g);
    walk.nothing();
    float dx[V];
    walk.of_input(dx);
    add_final(p, piece, of, s, dx);
    dxs.put(s, dx);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) causal_conv1d_backward(const __grid_constant__ Conv p) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);  // (WARPS, ROWS, LINE)
  const Piece piece(p);
  const Channels of(p);
  Walk walk(p, of);
  if (piece.exists && of.count > 0) {
    if (piece.length > 0) {
      walk_piece(p, piece, of, walk);
    } else {
      const int64 at = of.states(p, piece);
      UNROLL for (int i = 0; i < V * (W - 1); i++) if (i < of.count * (W - 1)) p.dstate[at + i] = p.dfinal[at + i];
    }
  }
  UNROLL for (int j = 0; j < ROWS; j++)
    write_floats<V>(shared + (threadIdx.x / 32 * ROWS + j) * LINE + threadIdx.x % 32 * V, walk.sums[j]);
  __syncthreads();
  const int64 lines = over(p.width, LINE), first = blockIdx.x % lines * LINE;
  for (int i = threadIdx.x; i < ROWS * LINE; i += 32 * WARPS) {
    float sum = 0;
    UNROLL for (int warp = 0; warp < WARPS; warp++) sum += shared[warp * ROWS * LINE + i];
    const int64 channel = first + i % LINE;
    if (channel < p.width) p.sums[(blockIdx.x / lines * ROWS + i / LINE) * p.width + channel] = sum;
  }
}

// The sums of all blocks: a block of threads adds up 32 channels of one row.
extern "C" __global__ void __launch_bounds__(256) causal_conv1d_sums(const __grid_constant__ Conv p) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);  // (8, 32)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64 lines = over(p.width, 32), channel = blockIdx.x % lines * 32 + lane;
  const int j = int(blockIdx.x / lines);
  float sum[4] = {};
  if (channel < p.width) {
#pragma unroll 8
    for (int64 i = warp; i < p.blocks; i += 8) sum[0] += p.sums[(i * ROWS + j) * p.width + channel];
  }
  shared[threadIdx.x] = sum[0];
  __syncthreads();
  if (warp > 0 || channel >= p.width) return;
  UNROLL for (int i = 1; i < 8; i++) sum[0] += shared[32 * i + lane];
  if (j < W) {
    store_four<false>(p.dweight + channel * W + j, sum, 1);
  } else {
    store_four<false>(p.dbias + channel, sum, 1);
  }
}
