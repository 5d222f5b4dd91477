// The forward. A warp carries its states on from tile to tile; TEAMS of them lie in a block side by side. Where rows and channels are too few to fill the chip,
// the WARPS of a team take turns: each runs K steps from a state of zero, keeping their decays, until the warp before it hands it
// the state that it should have started from; it hands on its own at once, and runs its steps again, this time for good.
#include "selective_scan.cuh"

struct Shared {
  Pairs steps;             // dt, and dt u
  Sums y;
  float maps[2][K][NP];    // B and C
  Four<INPUT> kept[2][32];  // u and z, as read
  Channels channels;
  float carried[32][CH * S];  // the states that the warp before hands on
};

// C h of one step, to be summed.
DEVICE void output(Shared& shared, const Lane& l, int t, const float* h) {
  float c[S], y[CH] = {};
  read_floats<S>(&shared.maps[1][t][l.part * S], c);
  UNROLL for (int i = 0; i < CH * S; i++) y[i / S] += h[i] * c[i % S];
  shared.y.put(l, t, y);
}

extern "C" __global__ void __launch_bounds__(32 * TEAMS * WARPS, BLOCKS) selective_scan_forward(const __grid_constant__ Scan p) {
  SHARED_MEMORY(memory);
  const int team = threadIdx.x / (32 * WARPS), warp = threadIdx.x / 32 % WARPS, next = (warp + 1) % WARPS;
  Shared *all = reinterpret_cast<Shared*>(memory) + team * WARPS, &shared = all[warp];

  const int64 blocks = over(p.width, TEAMS * WIDTH), r = blockIdx.x / blocks, size = p.width * p.states;
  const Lane l(p, blockIdx.x % blocks * TEAMS + team);
  const Row row = find_row(p, r);
  if (row.length == 0 || l.width <= 0) return;
  float a[CH * S], h[CH * S];
  load_rates(p, l, a);
  load_states(p, l, p.h0 + r * size, h);
  shared.channels.load(p, l);

  const Input<INPUT> us(p.u, p, l, row), zs(p.z, p, l, row);
  const Input<DELTA> deltas(p.delta, p, l, row);
  const Map bs(p.b, p, l, row, l.first / (p.width / p.groups_b)), cs(p.c, p, l, row, l.first / (p.width / p.groups_c));
  const Output<INPUT> ys(p.y, p, l, row);
  Four<INPUT> u, z = {};
  Four<DELTA> delta;
  Four<MAP> b[MAPS], c[MAPS];
  auto load = [&](int t) {
    u = us[t + l.step], delta = deltas[t + l.step];
    if (GATED) z = zs[t + l.step];
    bs.load(t, b), cs.load(t, c);
  };
  load(warp * K);
  __syncwarp();
  for (int t0 = warp * K; t0 < row.length; t0 += WARPS * K) {
    {
      float in[4], dt[4];
      unpack(u, in);
      step_sizes(delta, shared.channels.bias + l.four, t0 + l.step < row.length, dt);
      UNROLL for (int i = 0; i < 4; i++) in[i] *= dt[i];
      shared.steps.put(l, dt, in);
      shared.kept[0][l.lane] = u;
      if (GATED) shared.kept[1][l.lane] = z;
    }
    Map::write(l, b, shared.maps[0][0]);
    Map::write(l, c, shared.maps[1][0]);
    __syncwarp();
    if (WARPS == 1) load(t0 + K);

    if (WARPS == 1 && SAVE && t0 % TILE == 0) store_states(p, l, p.saved + (row.tile + t0 / TILE) * size, h);
    if constexpr (WARPS == 1) {
      UNROLL for (int t = 0; t < K; t++) {
        float step[2 * CH], b[S];
        read_floats<2 * CH>(shared.steps.two[t][l.group * CH], step);
        read_floats<S>(&shared.maps[0][t][l.part * S], b);
        UNROLL for (int i = 0; i < CH * S; i++)
          h[i] = exp2_of(step[i / S * 2] * a[i]) * h[i] + step[i / S * 2 + 1] * b[i % S];
        output(shared, l, t, h);
      }
    } else {
      float decay[K][CH * S], total[CH] = {}, after[CH * S] = {};
      UNROLL for (int t = 0; t < K; t++) {
        float step[2 * CH], b[S];
        read_floats<2 * CH>(shared.steps.two[t][l.group * CH], step);
        read_floats<S>(&shared.maps[0][t][l.part * S], b);
        UNROLL for (int i = 0; i < CH * S; i++) {
          decay[t][i] = exp2_of(step[i / S * 2] * a[i]);
          after[i] = decay[t][i] * after[i] + step[i / S * 2 + 1] * b[i % S];
        }
        UNROLL for (int ch = 0; ch < CH; ch++) total[ch] += step[2 * ch];
      }
      load(t0 + WARPS * K);
      if (t0 > 0) {
        await(team * WARPS + warp);
        read_floats<CH * S>(shared.carried[l.lane], h);
      }
      if (t0 + K < row.length) {
        UNROLL for (int i = 0; i < CH * S; i++) after[i] += exp2_of(total[i / S] * a[i]) * h[i];
        write_floats<CH * S>(all[next].carried[l.lane], after);
        signal(team * WARPS + next);
      }
      if (SAVE && t0 % TILE == 0) store_states(p, l, p.saved + (row.tile + t0 / TILE) * size, h);
      UNROLL for (int t = 0; t < K; t++) {
        float step[2 * CH], b[S];
        read_floats<2 * CH>(shared.steps.two[t][l.group * CH], step);
        read_floats<S>(&shared.maps[0][t][l.part * S], b);
        UNROLL for (int i = 0; i < CH * S; i++) h[i] = decay[t][i] * h[i] + step[i / S * 2 + 1] * b[i % S];
        output(shared, l, t, h);
      }
      if (t0 + K >= row.length) store_states(p, l, p.final + r * size, h);
    }
    __syncwarp();
    float in[4], gate[4], out[4], skip[4];
    unpack(shared.kept[0][l.lane], in);
    if (GATED) unpack(shared.kept[1][l.lane], gate);
    read_floats<4>(shared.channels.skip + l.four, skip);
    shared.y.read(l, out);
    UNROLL for (int i = 0; i < 4; i++) {
      out[i] += skip[i] * in[i];
      if (GATED) out[i] *= gate[i] * sigmoid(gate[i]);
    }
    ys.put(t0 + l.step, out);
  }
  if (WARPS == 1) store_states(p, l, p.final + r * size, h);
}
