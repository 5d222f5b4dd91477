// The forward. WARPS warps share a tile of WARPS x K steps: each runs its own steps from a state of zero, keeping their
// decays; then each learns from those before it which state it should have started from, and adds what that state gives.
// With one warp the state is simply carried on.
#include "selective_scan.cuh"

struct Shared {
  float steps[K][WIDTH][2];  // dt, and dt u
  float maps[2][K][NP];      // B and C
  float y[K][WIDTH];
};
constexpr int LINE = 32 * CH * S;  // numbers of the states of a warp

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) selective_scan_forward(const __grid_constant__ Scan p) {
  SHARED_MEMORY(memory);
  const int warp = threadIdx.x / 32;
  Shared& shared = reinterpret_cast<Shared*>(memory)[warp];
  float* passed = reinterpret_cast<float*>(memory + WARPS * sizeof(Shared));  // (2, WARPS, 2, LINE)
  float* carried = passed + 4 * WARPS * LINE;                                 // (2, LINE)

  const int64 blocks = over(p.width, WIDTH), r = blockIdx.x / blocks;
  const Lane l(p, blockIdx.x % blocks);
  const Row row = find_row(p, r);
  const int64 group_b = l.first / (p.width / p.groups_b), group_c = l.first / (p.width / p.groups_c);
  float a[CH * S], h[CH * S], bias[4], skip[4];
  load_rates(p, l, a);
  load_states(p, l, p.h0 + r * p.width * p.states, h);
  load_channels(p.bias, l, bias);
  load_channels(p.d, l, skip);
  if (WARPS > 1 && warp == WARPS - 1) write_shared<CH * S>(carried + l.lane * CH * S, h);

  Four<INPUT> u, z;
  Four<DELTA> delta;
  Map b, c;
  auto load = [&](int64 t) {
    u = load_input<INPUT>(p.u, l, row, t + l.step);
    delta = load_input<DELTA>(p.delta, l, row, t + l.step);
    if (GATED) z = load_input<INPUT>(p.z, l, row, t + l.step);
    b.load(p.b, l, row, t, p.states, group_b);
    c.load(p.c, l, row, t, p.states, group_c);
  };
  load(warp * K);
  for (int64 t0 = warp * K, tile = 0; t0 - warp * K < row.length; t0 += WARPS * K, tile++) {
    const Four<INPUT> u_here = u, z_here = z;
    {
      float in[4], raw[4], dt[4];
      unpack(u, in);
      step_sizes(delta, bias, t0 + l.step < row.length, raw, dt);
      UNROLL for (int i = 0; i < 4; i += 2) {
        float pairs[4] = {dt[i], dt[i] * in[i], dt[i + 1], dt[i + 1] * in[i + 1]};
        write_shared<4>(shared.steps[l.step][l.four + i], pairs);
      }
    }
    b.write(l, shared.maps[0][0]);
    c.write(l, shared.maps[1][0]);
    __syncwarp();
    load(t0 + WARPS * K);

    if (WARPS == 1 && SAVE && t0 % TILE == 0)
      store_states(p, l, p.saved + (row.tile + t0 / TILE) * p.width * p.states, h);
    float y[K][CH], decay[WARPS > 1 ? K : 1][CH * S], total[CH];
    UNROLL for (int ch = 0; ch < CH; ch++) total[ch] = 0;
    if (WARPS > 1) UNROLL for (int i = 0; i < CH * S; i++) h[i] = 0;
    UNROLL for (int t = 0; t < K; t++) {
      float step[2 * CH], bs[S], cs[S];
      read_shared<2 * CH>(shared.steps[t][l.group * CH], step);
      read_shared<S>(&shared.maps[0][t][l.part * S], bs);
      read_shared<S>(&shared.maps[1][t][l.part * S], cs);
      UNROLL for (int ch = 0; ch < CH; ch++) {
        y[t][ch] = 0;
        if (WARPS > 1) total[ch] += step[2 * ch];
        UNROLL for (int s = 0; s < S; s++) {
          const int i = ch * S + s;
          float of = exp2_of(step[2 * ch] * a[i]);
          if (WARPS > 1) decay[t][i] = of;
          h[i] = of * h[i] + step[2 * ch + 1] * bs[s];
          y[t][ch] += h[i] * cs[s];
        }
      }
    }
    if constexpr (WARPS > 1) {
      float* mine = passed + (tile % 2 * WARPS + warp) * 2 * LINE + l.lane * CH * S;
      float product[CH * S];
      UNROLL for (int i = 0; i < CH * S; i++) product[i] = exp2_of(total[i / S] * a[i]);
      write_shared<CH * S>(mine, product);
      write_shared<CH * S>(mine + LINE, h);
      __syncthreads();
      float before[CH * S], added[CH * S];
      read_shared<CH * S>(carried + tile % 2 * LINE + l.lane * CH * S, before);
      for (int w = 0; w < warp; w++) {
        const float* theirs = passed + (tile % 2 * WARPS + w) * 2 * LINE + l.lane * CH * S;
        read_shared<CH * S>(theirs, product);
        read_shared<CH * S>(theirs + LINE, added);
        UNROLL for (int i = 0; i < CH * S; i++) before[i] = product[i] * before[i] + added[i];
      }
      if (SAVE && t0 % TILE == 0 && t0 < row.length)
        store_states(p, l, p.saved + (row.tile + t0 / TILE) * p.width * p.states, before);
      UNROLL for (int t = 0; t < K; t++) {
        float cs[S];
        read_shared<S>(&shared.maps[1][t][l.part * S], cs);
        UNROLL for (int i = 0; i < CH * S; i++) {
          before[i] *= decay[t][i];
          y[t][i / S] += before[i] * cs[i % S];
        }
      }
      UNROLL for (int i = 0; i < CH * S; i++) h[i] += before[i];
      if (warp == WARPS - 1) write_shared<CH * S>(carried + (tile + 1) % 2 * LINE + l.lane * CH * S, h);
    }
    sum_states<K>(y, l, shared.y[0]);
    __syncwarp();
    float in[4], gate[4], out[4];
    unpack(u_here, in);
    if (GATED) unpack(z_here, gate);
    read_shared<4>(&shared.y[l.step][l.four], out);
    UNROLL for (int i = 0; i < 4; i++) {
      out[i] += skip[i] * in[i];
      if (GATED) out[i] *= gate[i] * sigmoid(gate[i]);
    }
    store_output<INPUT>(p, p.y, l, row, t0 + l.step, out);
    __syncwarp();
  }
  if (warp == WARPS - 1) store_states(p, l, p.final + r * p.width * p.states, h);
}
