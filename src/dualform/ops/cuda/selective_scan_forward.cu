// The forward. A warp carries its states on from tile to tile; TEAMS of them lie in a block side by side. Where rows
// and channels are too few to fill the chip, the WARPS of a team take turns: each runs K steps from a state of zero,
// keeping their decays, until the warp before it hands it the state that it should have started from; it hands on its
// own at once, and runs its steps again, this time for good.
//
// While a tile is computed, the next one is made ready and the last one is finished, a channel at a time between the
// steps: three chains of instructions that do not wait for each other. Reads come before writes wherever they can, as
// the compiler keeps their order.
#include "selective_scan.cuh"

struct Buffer {
  Pairs steps;           // dt and dt u
  float maps[2][K][NP];  // B and C
  Sums y;
  Four<INPUT> u[32], z[32];  // as read
};
struct Shared {
  Buffer buffers[2];
  float carried[32][CH * S];  // the states that the warp before hands on
};

// What a lane needs of one step.
struct Step {
  float dt[2 * CH], b[S], c[S];  // dt and dt u in turn
  METHOD void read(const Buffer& from, const Lane& l, int t, bool with_c) {
    read_floats<2 * CH>(from.steps.two[t][l.group * CH], dt);
    read_floats<S>(&from.maps[0][t][l.part * S], b);
    if (with_c) read_floats<S>(&from.maps[1][t][l.part * S], c);
  }
  METHOD void output(Buffer& to, const Lane& l, int t, const float* h) const {
    float y[CH] = {};
    UNROLL for (int i = 0; i < CH * S; i++)
      y[i / S] += h[i] * c[i % S];
    to.y.put(l, t, y);
  }
};
constexpr int FAR = 4;    // tiles that memory is asked for before they are read
constexpr int AHEAD = 2;  // steps that are read before they are needed

extern "C" __global__ void __launch_bounds__(32 * TEAMS * WARPS, BLOCKS)
    selective_scan_forward(const __grid_constant__ Scan p) {
  SHARED_MEMORY(memory);
  const int team = threadIdx.x / (32 * WARPS), warp = threadIdx.x / 32 % WARPS, next = (warp + 1) % WARPS;
  Shared *all = reinterpret_cast<Shared*>(memory) + team * WARPS, &shared = all[warp];

  const int64 blocks = over(p.width, TEAMS * WIDTH), r = blockIdx.x / blocks, size = p.width * p.states;
  const Lane l(p, blockIdx.x % blocks * TEAMS + team);
  const Row row = find_row(p, r);
  if (warp * K >= row.length || l.width <= 0) return;
  float a[CH * S], h[CH * S], bias[4], skip[4];
  load_rates(p, l, a);
  load_states(p, l, p.h0 + r * size, h);
  load_channels(p.bias, l, bias);
  load_channels(p.d, l, skip);

  const Input<INPUT, U_LAST> us(p.u, p, l, row);
  const Input<INPUT, Z_LAST> zs(p.z, p, l, row);
  const Input<DELTA, DELTA_LAST> deltas(p.delta, p, l, row);
  const Map<B_LAST> bs(p.b, p, l, row, l.first / (p.width / p.groups_b));
  const Map<C_LAST> cs(p.c, p, l, row, l.first / (p.width / p.groups_c));
  const Output<INPUT, U_LAST> ys(p.y, p, l, row);
  Four<INPUT> u, z = {};
  Four<DELTA> delta;
  Four<MAP> b[MAPS], c[MAPS];
  auto load = [&](int t) {
    u = us[t + l.step], delta = deltas[t + l.step];
    if (GATED) z = zs[t + l.step];
    bs.load(t, b), cs.load(t, c);
    const int far = t + FAR * WARPS * K;
    prefetch(us.at(far + l.step)), prefetch(deltas.at(far + l.step));
    if (GATED) prefetch(zs.at(far + l.step));
    if (WARPS == 1) prefetch(bs.at(far)), prefetch(cs.at(far));
  };
  // A tile to come: dt and dt u of four channels, then all that a tile needs.
  float dt[4], in[4];
  auto begin_preparing = [&] { unpack(u, in), unpack(delta, dt); };
  auto prepare = [&](int t, int i) {
    if (i == 0 && (U_LAST || DELTA_LAST)) us.turn(u), deltas.turn(delta), begin_preparing();
    dt[i] = step_size(dt[i] + bias[i], t + l.step < row.length);
    in[i] *= dt[i];
  };
  auto end_preparing = [&](Buffer& to) {
    to.steps.put(l, dt, in);
    to.u[l.lane] = u;
    if (GATED) zs.turn(z), to.z[l.lane] = z;
    bs.write(l, b, to.maps[0][0]);
    cs.write(l, c, to.maps[1][0]);
  };
  // A tile that was computed: the output of four channels.
  float y[4], direct[4], gate[4];
  auto begin_finishing = [&](const Buffer& from) {
    unpack(from.u[l.lane], direct);
    if (GATED) unpack(from.z[l.lane], gate);
    from.y.read(l, y);
  };
  auto finish = [&](int i) {
    y[i] += skip[i] * direct[i];
    if (GATED) y[i] *= gate[i] * sigmoid(gate[i]);
  };
  auto end_finishing = [&](int t) { ys.put(t + l.step, y); };

  Buffer *now = &shared.buffers[0], *other = &shared.buffers[1];
  int t0 = warp * K;
  load(t0);
  begin_preparing();
  UNROLL for (int i = 0; i < 4; i++)
    prepare(t0, i);
  end_preparing(*now);
  load(t0 + WARPS * K);
  for (; t0 < row.length; t0 += WARPS * K) {
    __syncwarp();
    const int before = t0 - WARPS * K, after = t0 + WARPS * K;
    Step steps[K];
    UNROLL for (int t = 0; t < AHEAD; t++)
      steps[t].read(*now, l, t, WARPS == 1);
    begin_finishing(*other);
    begin_preparing();
    if constexpr (WARPS == 1) {
      if (SAVE && t0 % TILE == 0) store_states(p, l, p.saved + (row.tile + t0 / TILE) * size, h);
      UNROLL for (int t = 0; t < K; t++) {
        if (t + AHEAD < K) steps[t + AHEAD].read(*now, l, t + AHEAD, true);
        UNROLL for (int i = 0; i < CH * S; i++)
          h[i] = decay_of(steps[t].dt[i / S * 2], a[i]) * h[i] + steps[t].dt[i / S * 2 + 1] * steps[t].b[i % S];
        steps[t].output(*now, l, t, h);
        if (t % (K / 8) == 0) {
          const int i = t / (K / 8);
          i < 4 ? finish(i) : prepare(after, i - 4);
          if (i == 3) end_finishing(before);
        }
      }
    } else {
      float decay[K][CH * S], total[CH] = {}, end[CH * S] = {};
      UNROLL for (int t = 0; t < K; t++) {
        if (t + AHEAD < K) steps[t + AHEAD].read(*now, l, t + AHEAD, false);
        UNROLL for (int i = 0; i < CH * S; i++) {
          decay[t][i] = decay_of(steps[t].dt[i / S * 2], a[i]);
          end[i] = decay[t][i] * end[i] + steps[t].dt[i / S * 2 + 1] * steps[t].b[i % S];
        }
        UNROLL for (int ch = 0; ch < CH; ch++)
          total[ch] += steps[t].dt[2 * ch];
        if (t % (K / 4) == 0) finish(t / (K / 4));
      }
      end_finishing(before);
      float through[CH * S];
      UNROLL for (int i = 0; i < CH * S; i++)
        pin(through[i] = decay_of(total[i / S], a[i])), pin(end[i]);
      if (t0 > 0) {
        await(team * WARPS + warp, p.rows < 0);
        read_floats<CH * S>(shared.carried[l.lane], h);
      }
      if (t0 + K < row.length) {
        UNROLL for (int i = 0; i < CH * S; i++)
          end[i] += through[i] * h[i];
        write_floats<CH * S>(all[next].carried[l.lane], end);
        signal(team * WARPS + next);
      }
      if (SAVE && t0 % TILE == 0) store_states(p, l, p.saved + (row.tile + t0 / TILE) * size, h);
      UNROLL for (int t = 0; t < AHEAD; t++)
        steps[t].read(*now, l, t, true);
      UNROLL for (int t = 0; t < K; t++) {
        if (t + AHEAD < K) steps[t + AHEAD].read(*now, l, t + AHEAD, true);
        UNROLL for (int i = 0; i < CH * S; i++)
          h[i] = decay[t][i] * h[i] + steps[t].dt[i / S * 2 + 1] * steps[t].b[i % S];
        steps[t].output(*now, l, t, h);
        if (t % (K / 4) == 0) prepare(after, t / (K / 4));
      }
    }
    end_preparing(*other);
    load(after + WARPS * K);
    Buffer* const swap = now;
    now = other, other = swap;
  }
  __syncwarp();
  t0 -= WARPS * K;
  begin_finishing(*other);
  UNROLL for (int i = 0; i < 4; i++)
    finish(i);
  end_finishing(t0);
  if (t0 + K >= row.length) store_states(p, l, p.final + r * size, h);
}
