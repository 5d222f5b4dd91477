// The forward. A warp carries its states on from tile to tile; TEAMS of them lie in a block side by side. Where rows
// and channels are too few to fill the chip, the WARPS of a team take turns: each runs K steps from a state of zero,
// keeping their decays, until the warp before it hands it the state that it should have started from; it hands on its
// own at once, and runs its steps again, this time for good.
//
// While a tile is computed, the next one is made ready and the last one is finished, a channel at a time between the
// steps: three chains of instructions that do not wait for each other. Reads come before writes wherever they can, as
// the compiler keeps their order. What lies with time innermost comes line by line, all of a warp's tensors at once:
// the next line while one is read.
#include "lines.cuh"
#include "selective_scan.cuh"

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
  float carried[WARPS > 1 ? 32 : 2][CH * S];  // the states that the warp before hands on
};

// The lines of a warp: two sets, one of each input, and two of the output. Where inputs lie in a set, and its size.
constexpr int LINE_OF_U = 0, LINE_OF_DELTA = LINE_OF_U + U_LAST * sizeof(Lines<INPUT, WIDTH>),
              LINE_OF_Z = LINE_OF_DELTA + DELTA_LAST * sizeof(Lines<DELTA, WIDTH>),
              LINE_OF_B = LINE_OF_Z + Z_LAST * sizeof(Lines<INPUT, WIDTH>),
              LINE_OF_C = LINE_OF_B + B_LAST * sizeof(Lines<MAP, NP>),
              INPUT_LINES = LINE_OF_C + C_LAST * sizeof(Lines<MAP, NP>);
static_assert(sizeof(Shared) == SHARED_BYTES && LINE_BYTES == 2 * (INPUT_LINES + U_LAST * sizeof(Lines<INPUT, WIDTH>)),
              "as the host counts them");
DEVICE bool line_begins(int t) { return LINE == K || t % LINE == 0; }

// Four channels of one step, from K steps that are loaded a tile in advance, or that lie in a set of lines.
template <class T, bool LAST, int AT>
struct Feed {
  Input<T, false> input;
  Four<T> four = {};
  int step;
  METHOD Feed(const View& v, const Scan& p, const Lane& l, const Row& row) : input(v, p, l, row), step(l.step) {}
  METHOD void copy(int, char*) const {}
  METHOD void load(int t) {
    four = input[t + step];
    prefetch(input.at(t + FAR * WARPS * K + step));
  }
  METHOD Four<T> get(const Lane&, int, const char*) const { return four; }
};
template <class T, int AT>
struct Feed<T, true, AT> {
  Rows<T, WIDTH> rows;
  METHOD Feed(const View& v, const Scan&, const Lane& l, const Row& row)
      : rows(v, row.batch, row.begin, row.length, l.first, l.width, l.lane) {}
  METHOD void copy(int t, char* set) const { rows.copy(t, *reinterpret_cast<Lines<T, WIDTH>*>(set + AT)); }
  METHOD void load(int) const {}
  METHOD Four<T> get(const Lane& l, int t, const char* set) const {
    return reinterpret_cast<const Lines<T, WIDTH>*>(set + AT)->read(l.lane, t % LINE + l.step, l.four);
  }
};
// Likewise B or C of one group, on its way to (K, NP) floats.
template <bool LAST, bool CONSTANT, int AT>
struct MapFeed {
  Map<false> map;
  Four<MAP> four[MAPS];
  METHOD MapFeed(const View& v, const Scan& p, const Lane& l, const Row& row, int64 group) : map(v, p, l, row, group) {}
  METHOD void copy(int, char*) const {}
  METHOD void load(int t) {
    map.load(t, four);
    if (WARPS == 1) prefetch(map.at(t + FAR * K));
  }
  METHOD void write(const Lane& l, int, const char*, float* to) const { map.write(l, four, to); }
};
template <int AT>
struct MapFeed<true, false, AT> {
  Rows<MAP, NP> rows;
  METHOD MapFeed(const View& v, const Scan& p, const Lane& l, const Row& row, int64 group)
      : rows(v, row.batch, row.begin, row.length, group * p.states, int(p.states), l.lane) {}
  METHOD void copy(int t, char* set) const { rows.copy(t, *reinterpret_cast<Lines<MAP, NP>*>(set + AT)); }
  METHOD void load(int) const {}
  METHOD void write(const Lane& l, int t, const char* set, float* to) const {
    const auto& line = *reinterpret_cast<const Lines<MAP, NP>*>(set + AT);
    UNROLL for (int i = 0; i < MAPS; i++) {
      const int step = (i * 32 + l.lane) / S;
      float x[4];
      unpack(line.read(l.lane, t % LINE + least(step, K - 1), l.lane % S * 4), x);
      if (K * S % 32 == 0 || step < K) write_floats<4>(to + (i * 32 + l.lane) * 4, x);
    }
  }
};
// Or neither, where it is the same at every step.
template <int AT>
struct MapFeed<false, true, AT> {
  METHOD MapFeed(const View&, const Scan&, const Lane&, const Row&, int64) {}
  METHOD void copy(int, char*) const {}
  METHOD void load(int) const {}
  METHOD void write(const Lane&, int, const char*, float*) const {}
};
// Four channels of the output of one step: to memory, or to one of two lines that are stored when they are complete.
template <bool LAST>
struct Drain {
  Output<INPUT, false> output;
  METHOD Drain(void* data, const Scan& p, const Lane& l, const Row& row, char*) : output(data, p, l, row) {}
  METHOD void put(const Lane& l, int t, const float* y) const { output.put(t + l.step, y); }
  METHOD void store(int) const {}
};
template <>
struct Drain<true> {
  Rows<INPUT, WIDTH> rows;
  Lines<INPUT, WIDTH>* lines;
  METHOD Drain(void* data, const Scan& p, const Lane& l, const Row& row, char* lines)
      : rows({data, p.length * p.width, p.length}, row.batch, row.begin, row.length, l.first, l.width, l.lane),
        lines(reinterpret_cast<Lines<INPUT, WIDTH>*>(lines)) {}
  METHOD Lines<INPUT, WIDTH>& line(int t) const { return lines[t / (WARPS * LINE) % 2]; }
  METHOD void put(const Lane& l, int t, const float* y) const {
    if (t >= 0) line(t).write(l.lane, t % LINE + l.step, l.four, y);
  }
  // What was put of the line of the tile at t.
  METHOD void store(int t) const { rows.store(t / LINE * LINE, line(t)); }
};

// What a lane needs of one step, but for what is the same at every step.
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

  char* set = memory + TEAMS * WARPS * sizeof(Shared) + (team * WARPS + warp) * LINE_BYTES;
  char* spare = set + INPUT_LINES;
  Feed<INPUT, U_LAST, LINE_OF_U> us(p.u, p, l, row);
  Feed<DELTA, DELTA_LAST, LINE_OF_DELTA> deltas(p.delta, p, l, row);
  Feed<INPUT, Z_LAST, LINE_OF_Z> zs(p.z, p, l, row);
  MapFeed<B_LAST, B_CONSTANT, LINE_OF_B> bs(p.b, p, l, row, l.first / (p.width / p.groups_b));
  MapFeed<C_LAST, C_CONSTANT, LINE_OF_C> cs(p.c, p, l, row, l.first / (p.width / p.groups_c));
  const Drain<U_LAST> ys(p.y, p, l, row, spare + INPUT_LINES);
  auto copy = [&](int t, char* to) {
    us.copy(t, to), deltas.copy(t, to);
    if (GATED) zs.copy(t, to);
    bs.copy(t, to), cs.copy(t, to);
    close_copies();
  };
  auto load = [&](int t) {
    us.load(t), deltas.load(t);
    if (GATED) zs.load(t);
    bs.load(t), cs.load(t);
  };
  // A tile to come: dt and dt u of four channels, then all that a tile needs.
  Four<INPUT> u;
  float dt[4], in[4];
  auto begin_preparing = [&](int t) {
    u = us.get(l, t, set);
    unpack(u, in), unpack(deltas.get(l, t, set), dt);
  };
  auto prepare = [&](int t, int i) {
    dt[i] = step_size(dt[i] + bias[i], t + l.step < row.length);
    in[i] *= dt[i];
  };
  auto end_preparing = [&](int t, Buffer& to) {
    to.steps.put(l, dt, in);
    to.u[l.lane] = u;
    if (GATED) to.z[l.lane] = zs.get(l, t, set);
    bs.write(l, t, set, to.maps[0][0]);
    cs.write(l, t, set, to.maps[1][0]);
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
  if (ANY_LAST) {
    copy(t0, set);
    copy(t0 + WARPS * LINE, spare);
    await_copies<1>();
    __syncwarp();
  }
  load(t0);
  begin_preparing(t0);
  UNROLL for (int i = 0; i < 4; i++)
    prepare(t0, i);
  end_preparing(t0, *now);
  load(t0 + WARPS * K);
  for (; t0 < row.length; t0 += WARPS * K) {
    const int before = t0 - WARPS * K, after = t0 + WARPS * K;
    const bool next_line = ANY_LAST && line_begins(after);
    if (next_line) await_copies<0>();
    __syncwarp();
    if (next_line) {
      char* const read = set;
      set = spare, spare = read;
      copy(after + WARPS * LINE, spare);
    }
    if (before >= WARPS * K && line_begins(before)) ys.store(before - WARPS * K);
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
  if (t0 >= WARPS * K && line_begins(t0)) ys.store(t0 - WARPS * K);
  begin_finishing(*other);
  UNROLL for (int i = 0; i < 4; i++)
    finish(i);
  end_finishing(t0);
  __syncwarp();
  ys.store(t0);
  if (t0 + K >= row.length) store_states(p, l, p.final + r * size, h);
}
