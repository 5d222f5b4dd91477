// The forward. A warp carries its states on from tile to tile; TEAMS of them lie in a block side by side. Where rows
// and channels are too few to fill the chip, the WARPS of a team take turns: each runs K steps from a state of zero,
// keeping their decays, until the warp before it hands it the state that it should have started from; it hands on its
// own at once, and runs its steps again, this time for good.
//
// While a tile is computed, the next one is made ready and the last one is finished, a channel at a time between the
// steps: three chains of instructions that do not wait for each other. Reads come before writes wherever they can, as
// the compiler keeps their order.
// What lies with time innermost comes line by line, all of a warp's tensors at once: the next line while one is read.
#include "selective_scan.cuh"
#include "lines.cuh"

constexpr int FAR = 4;  // tiles that memory is asked for before they are read
constexpr bool ANY_LAST = U_LAST || DELTA_LAST || Z_LAST || B_LAST || C_LAST;

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

// Which of the two lines of an input holds step t, and whether one begins there.
DEVICE int line_of(int t) { return t / (WARPS * LINE) % 2; }
DEVICE bool line_begins(int t) { return LINE == K || t % LINE == 0; }

// Four channels of one step, from K steps that are loaded a tile in advance.
template <class T, bool LAST>
struct Feed {
  Input<T, false> input;
  Four<T> four = {};
  int step;
  METHOD Feed(const View& v, const Scan& p, const Lane& l, const Row& row, Taker&)
      : input(v, p, l, row), step(l.step) {}
  METHOD void copy(int) {}
  METHOD void load(int t) {
    four = input[t + step];
    prefetch(input.at(t + FAR * WARPS * K + step));
  }
  METHOD Four<T> get(const Lane&, int) const { return four; }
};
template <class T>
struct Feed<T, true> {
  Rows<T, WIDTH> rows;
  Lines<T, WIDTH>* lines;
  METHOD Feed(const View& v, const Scan&, const Lane& l, const Row& row, Taker& memory)
      : rows(v, row.batch, row.begin, row.length, l.first, l.width, l.lane), lines(memory.take<Lines<T, WIDTH>>(2)) {}
  METHOD void copy(int t) { rows.copy(t, lines[line_of(t)]); }
  METHOD void load(int) {}
  METHOD Four<T> get(const Lane& l, int t) const { return lines[line_of(t)].read(l.lane, t % LINE + l.step, l.four); }
};
// Likewise B or C of one group, on its way to (K, NP) floats.
template <bool LAST, bool CONSTANT>
struct MapFeed {
  Map<false> map;
  Four<MAP> four[MAPS];
  METHOD MapFeed(const View& v, const Scan& p, const Lane& l, const Row& row, int64 group, Taker&)
      : map(v, p, l, row, group) {}
  METHOD void copy(int) {}
  METHOD void load(int t) {
    map.load(t, four);
    if (WARPS == 1) prefetch(map.at(t + FAR * K));
  }
  METHOD void write(const Lane& l, int, float* to) const { map.write(l, four, to); }
};
template <>
struct MapFeed<true, false> {
  Rows<MAP, NP> rows;
  Lines<MAP, NP>* lines;
  METHOD MapFeed(const View& v, const Scan& p, const Lane& l, const Row& row, int64 group, Taker& memory)
      : rows(v, row.batch, row.begin, row.length, group * p.states, int(p.states), l.lane),
        lines(memory.take<Lines<MAP, NP>>(2)) {}
  METHOD void copy(int t) { rows.copy(t, lines[line_of(t)]); }
  METHOD void load(int) {}
  METHOD void write(const Lane& l, int t, float* to) const {
    const Lines<MAP, NP>& line = lines[line_of(t)];
    UNROLL for (int i = 0; i < MAPS; i++) {
      const int step = (i * 32 + l.lane) / S;
      float x[4];
      unpack(line.read(l.lane, t % LINE + least(step, K - 1), l.lane % S * 4), x);
      if (K * S % 32 == 0 || step < K) write_floats<4>(to + (i * 32 + l.lane) * 4, x);
    }
  }
};
// Or neither, where it is the same at every step.
template <>
struct MapFeed<false, true> {
  METHOD MapFeed(const View&, const Scan&, const Lane&, const Row&, int64, Taker&) {}
  METHOD void copy(int) {}
  METHOD void load(int) {}
  METHOD void write(const Lane&, int, float*) const {}
};
// Four channels of the output of one step.
template <bool LAST>
struct Drain {
  Output<INPUT, false> output;
  METHOD Drain(void* data, const Scan& p, const Lane& l, const Row& row, Taker&) : output(data, p, l, row) {}
  METHOD void put(const Lane& l, int t, const float* y) { output.put(t + l.step, y); }
  METHOD void store(int) {}
};
template <>
struct Drain<true> {
  Rows<INPUT, WIDTH> rows;
  Lines<INPUT, WIDTH>& line;
  METHOD Drain(void* data, const Scan& p, const Lane& l, const Row& row, Taker& memory)
      : rows({data, p.length * p.width, p.length}, row.batch, row.begin, row.length, l.first, l.width, l.lane),
        line(*memory.take<Lines<INPUT, WIDTH>>(1)) {}
  METHOD void put(const Lane& l, int t, const float* y) {
    if (t >= 0) line.write(t % LINE + l.step, l.four, y);
  }
  // All that was put of the line of the tile at t.
  METHOD void store(int t) {
    rows.store(t / LINE * LINE, line);
    __syncwarp();
  }
};

// What a lane needs of one step, but for what is the same at all.
struct Step {
  float dt[2 * CH], b[S], c[S];  // dt and dt u in turn
  METHOD void read(const Buffer& from, const Lane& l, int t, bool with_c) {
    read_floats<2 * CH>(from.steps.two[t][l.group * CH], dt);
    if (!B_CONSTANT) read_floats<S>(&from.maps[0][t][l.part * S], b);
    if (with_c && !C_CONSTANT) read_floats<S>(&from.maps[1][t][l.part * S], c);
  }
  METHOD float entering(const Constants& of, int i) const {
    return dt[i / S * 2 + 1] * (B_CONSTANT ? of.b[i] : b[i % S]);
  }
  METHOD void output(const Constants& of, Buffer& to, const Lane& l, int t, const float* h) const {
    float y[CH] = {};
    UNROLL for (int i = 0; i < CH * S; i++)
      y[i / S] += h[i] * (C_CONSTANT ? of.c[i] : c[i % S]);
    to.y.put(l, t, y);
  }
};
static_assert(sizeof(Shared) == SHARED_BYTES && LINE_BYTES >= (U_LAST ? 3 : 0) * sizeof(Lines<INPUT, WIDTH>) +
                                                                  (Z_LAST ? 2 : 0) * sizeof(Lines<INPUT, WIDTH>) +
                                                                  (DELTA_LAST ? 2 : 0) * sizeof(Lines<DELTA, WIDTH>) +
                                                                  (B_LAST + C_LAST) * 2 * sizeof(Lines<MAP, NP>),
              "as the host counts them");
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
  const Constants constants(p, l);
  load_channels(p.bias, l, bias);
  load_channels(p.d, l, skip);

  Taker lines = {memory + TEAMS * WARPS * sizeof(Shared) + (team * WARPS + warp) * LINE_BYTES};
  Feed<INPUT, U_LAST> us(p.u, p, l, row, lines);
  Feed<DELTA, DELTA_LAST> deltas(p.delta, p, l, row, lines);
  Feed<INPUT, Z_LAST> zs(p.z, p, l, row, lines);
  MapFeed<B_LAST, B_CONSTANT> bs(p.b, p, l, row, l.first / (p.width / p.groups_b), lines);
  MapFeed<C_LAST, C_CONSTANT> cs(p.c, p, l, row, l.first / (p.width / p.groups_c), lines);
  Drain<U_LAST> ys(p.y, p, l, row, lines);
  auto copy = [&](int t) {
    us.copy(t), deltas.copy(t);
    if (GATED) zs.copy(t);
    bs.copy(t), cs.copy(t);
    close_copies();
  };
  auto load = [&](int t) {
    if (ANY_LAST && line_begins(t)) {
      __syncwarp();
      copy(t + WARPS * LINE);
      await_copies<1>();
      __syncwarp();
    }
    us.load(t), deltas.load(t);
    if (GATED) zs.load(t);
    bs.load(t), cs.load(t);
  };
  // A tile to come: dt and dt u of four channels, then all that a tile needs.
  Four<INPUT> u;
  float dt[4], in[4];
  auto begin_preparing = [&](int t) {
    u = us.get(l, t);
    unpack(u, in), unpack(deltas.get(l, t), dt);
  };
  auto prepare = [&](int t, int i) {
    dt[i] = step_size(dt[i] + bias[i], t + l.step < row.length);
    in[i] *= dt[i];
  };
  auto end_preparing = [&](int t, Buffer& to) {
    to.steps.put(l, dt, in);
    to.u[l.lane] = u;
    if (GATED) to.z[l.lane] = zs.get(l, t);
    bs.write(l, t, to.maps[0][0]);
    cs.write(l, t, to.maps[1][0]);
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
  auto end_finishing = [&](int t) { ys.put(l, t, y); };

  Buffer *now = &shared.buffers[0], *other = &shared.buffers[1];
  int t0 = warp * K;
  if (ANY_LAST) copy(t0);
  load(t0);
  begin_preparing(t0);
  UNROLL for (int i = 0; i < 4; i++)
    prepare(t0, i);
  end_preparing(t0, *now);
  load(t0 + WARPS * K);
  for (; t0 < row.length; t0 += WARPS * K) {
    __syncwarp();
    const int before = t0 - WARPS * K, after = t0 + WARPS * K;
    if (U_LAST && before >= WARPS * K && line_begins(before)) ys.store(before - WARPS * K);
    Step steps[K];
    UNROLL for (int t = 0; t < AHEAD; t++)
      steps[t].read(*now, l, t, WARPS == 1);
    begin_finishing(*other);
    begin_preparing(after);
    if constexpr (WARPS == 1) {
      if (SAVE && t0 % TILE == 0) store_states(p, l, p.saved + (row.tile + t0 / TILE) * size, h);
      UNROLL for (int t = 0; t < K; t++) {
        if (t + AHEAD < K) steps[t + AHEAD].read(*now, l, t + AHEAD, true);
        UNROLL for (int i = 0; i < CH * S; i++)
          h[i] = decay_of(steps[t].dt[i / S * 2], a[i]) * h[i] + steps[t].entering(constants, i);
        steps[t].output(constants, *now, l, t, h);
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
          end[i] = decay[t][i] * end[i] + steps[t].entering(constants, i);
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
          h[i] = decay[t][i] * h[i] + steps[t].entering(constants, i);
        steps[t].output(constants, *now, l, t, h);
        if (t % (K / 4) == 0) prepare(after, t / (K / 4));
      }
    }
    end_preparing(after, *other);
    load(after + WARPS * K);
    Buffer* const swap = now;
    now = other, other = swap;
  }
  __syncwarp();
  t0 -= WARPS * K;
  if (U_LAST && t0 >= WARPS * K && line_begins(t0)) ys.store(t0 - WARPS * K);
  begin_finishing(*other);
  UNROLL for (int i = 0; i < 4; i++)
    finish(i);
  end_finishing(t0);
  __syncwarp();
  ys.store(t0);
  if (t0 + K >= row.length) store_states(p, l, p.final + r * size, h);
}
