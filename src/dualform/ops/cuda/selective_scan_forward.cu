// The forward. WARPS warps share a tile of WARPS x K steps: each runs its own steps from a state of zero, keeping their
// decays; then each learns from those before it which state it should have started from, and adds what that state gives.
// With one warp the state is simply carried on.
#include "selective_scan.cuh"

struct Shared {
  Pairs steps;           // dt, and dt u
  Sums y;
  float maps[2][K][NP];  // B and C
  Channels channels;
};
constexpr int LINE = 32 * CH * S;  // numbers of the states of a warp

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) selective_scan_forward(const __grid_constant__ Scan p) {
  SHARED_MEMORY(memory);
  const int warp = threadIdx.x / 32;
  Shared& shared = reinterpret_cast<Shared*>(memory)[warp];
  float* passed = reinterpret_cast<float*>(memory + WARPS * sizeof(Shared));  // (2, WARPS, 2, LINE)
  float* carried = passed + 4 * WARPS * LINE;                                 // (2, LINE)

  const int64 blocks = over(p.width, WIDTH), r = blockIdx.x / blocks, size = p.width * p.states;
  const Lane l(p, blockIdx.x % blocks);
  const Row row = find_row(p, r);
  if (row.length == 0) return;
  float a[CH * S], h[CH * S];
  load_rates(p, l, a);
  load_states(p, l, p.h0 + r * size, h);
  shared.channels.load(p, l);
  if (WARPS > 1 && warp == WARPS - 1) write_shared<CH * S>(carried + l.lane * CH * S, h);

  const Input<INPUT> us(p.u, p, l, row), zs(p.z, p, l, row);
  const Input<DELTA> deltas(p.delta, p, l, row);
  const Map bs(p.b, p, l, row, l.first / (p.width / p.groups_b)), cs(p.c, p, l, row, l.first / (p.width / p.groups_c));
  const Output<INPUT> ys(p.y, p, l, row);
  Four<INPUT> u;
  Four<DELTA> delta;
  Four<MAP> b[MAPS], c[MAPS];
  auto load = [&](int t) {
    u = us[t + l.step], delta = deltas[t + l.step];
    bs.load(t, b), cs.load(t, c);
  };
  load(warp * K);
  __syncwarp();
  for (int t0 = warp * K, turn = 0; t0 - warp * K < row.length; t0 += WARPS * K, turn ^= 1) {
    {
      float in[4], dt[4];
      unpack(u, in);
      step_sizes(delta, shared.channels.bias + l.four, t0 + l.step < row.length, dt);
      UNROLL for (int i = 0; i < 4; i++) in[i] *= dt[i];
      shared.steps.put(l, dt, in);
    }
    Map::write(l, b, shared.maps[0][0]);
    Map::write(l, c, shared.maps[1][0]);
    __syncwarp();
    load(t0 + WARPS * K);

    if (WARPS == 1 && SAVE && t0 % TILE == 0) store_states(p, l, p.saved + (row.tile + t0 / TILE) * size, h);
    float decay[WARPS > 1 ? K : 1][CH * S], total[CH] = {};
    if (WARPS > 1) UNROLL for (int i = 0; i < CH * S; i++) h[i] = 0;
    UNROLL for (int t = 0; t < K; t++) {
      const int keep = WARPS > 1 ? t : 0;
      float step[2 * CH], b[S], c[S], y[CH];
      read_shared<2 * CH>(shared.steps.two[t][l.group * CH], step);
      read_shared<S>(&shared.maps[0][t][l.part * S], b);
      read_shared<S>(&shared.maps[1][t][l.part * S], c);
      UNROLL for (int i = 0; i < CH * S; i++) {
        const int ch = i / S, s = i % S;
        decay[keep][i] = exp2_of(step[2 * ch] * a[i]);
        h[i] = decay[keep][i] * h[i] + step[2 * ch + 1] * b[s];
        y[ch] = (s ? y[ch] : 0) + h[i] * c[s];
        if (WARPS > 1 && s == 0) total[ch] += step[2 * ch];
      }
      shared.y.put(l, t, y);
    }
    if constexpr (WARPS > 1) {
      float* mine = passed + (turn * WARPS + warp) * 2 * LINE + l.lane * CH * S;
      float product[CH * S], before[CH * S], added[CH * S];
      UNROLL for (int i = 0; i < CH * S; i++) product[i] = exp2_of(total[i / S] * a[i]);
      write_shared<CH * S>(mine, product);
      write_shared<CH * S>(mine + LINE, h);
      __syncthreads();
      read_shared<CH * S>(carried + turn * LINE + l.lane * CH * S, before);
      const float* theirs = passed + turn * WARPS * 2 * LINE + l.lane * CH * S;
      for (int w = 0; w < warp; w++, theirs += 2 * LINE) {
        read_shared<CH * S>(theirs, product);
        read_shared<CH * S>(theirs + LINE, added);
        UNROLL for (int i = 0; i < CH * S; i++) before[i] = product[i] * before[i] + added[i];
      }
      if (SAVE && t0 % TILE == 0 && t0 < row.length)
        store_states(p, l, p.saved + (row.tile + t0 / TILE) * size, before);
      UNROLL for (int t = 0; t < K; t++) {
        float c[S], y[CH];
        read_shared<S>(&shared.maps[1][t][l.part * S], c);
        shared.y.get(l, t, y);
        UNROLL for (int i = 0; i < CH * S; i++) {
          before[i] *= decay[t][i];
          y[i / S] += before[i] * c[i % S];
        }
        shared.y.put(l, t, y);
      }
      UNROLL for (int i = 0; i < CH * S; i++) h[i] += before[i];
      if (warp == WARPS - 1) write_shared<CH * S>(carried + (turn ^ 1) * LINE + l.lane * CH * S, h);
    }
    __syncwarp();
    float in[4], gate[4], out[4], skip[4];
    unpack(us[t0 + l.step], in);
    if (GATED) unpack(zs[t0 + l.step], gate);
    read_shared<4>(shared.channels.skip + l.four, skip);
    shared.y.read(l, out);
    UNROLL for (int i = 0; i < 4; i++) {
      out[i] += skip[i] * in[i];
      if (GATED) out[i] *= gate[i] * sigmoid(gate[i]);
    }
    ys.put(t0 + l.step, out);
  }
  if (warp == WARPS - 1) store_states(p, l, p.final + r * size, h);
}
