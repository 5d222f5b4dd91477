// The backward: with g_t = dL/dh_t in full, g_t = C_t dy_t + a_{t+1} g_{t+1}, a_t = exp(dt_t A).
//
// Time is cut into spans. A first kernel runs every span from a gradient of zero, a second one joins the spans of a
// sequence, so that the third knows the gradient that enters each of them and runs all side by side: tile by tile from
// the last, where the states of a tile are computed again from the one that entered it. WARPS warps of one block take
// neighbouring channels of one span, and add up what B and C get from them.
#include "lines.cuh"
#include "selective_scan.cuh"

constexpr int SUBS = TILE / K, HELD = 8;  // steps whose decays are held in registers
constexpr int LEVEL = 16 * TILE;

// The span of time that a block runs through, of the sequence that it belongs to.
struct Span {
  Row row;
  int64 r, slot;
  int begin, end;
  METHOD Span(const Scan& p, int64 slot) : slot(slot) {
    r = p.borders ? find_sequence(p.borders, p.rows, p.length, p.span, slot) : slot % p.rows;
    row = find_row(p, r);
    const int64 turn = p.borders ? slot - row.span : slot / p.rows, from = turn ? p.lead + (turn - 1) * p.span : 0;
    begin = int(least(from, int64(row.length)));
    end = int(least(from + (turn ? p.span : p.lead), int64(row.length)));
  }
};

// Step t of the states, from pairs of dt and dt u, and from (NP) of B.
DEVICE void advance(const float (*steps)[2], const float* map, const Lane& l, const Constants& of, const float* a,
                    float* h) {
  float step[2 * CH], b[S];
  read_floats<2 * CH>(steps[l.group * CH], step);
  if (!B_CONSTANT) read_floats<S>(map + l.part * S, b);
  UNROLL for (int i = 0; i < CH * S; i++)
    h[i] = decay_of(step[i / S * 2], a[i]) * h[i] + step[i / S * 2 + 1] * (B_CONSTANT ? of.b[i] : b[i % S]);
}

// What a lane needs of one step.
struct Step {
  float dt[2 * CH], dy[CH], b[S], c[S];  // dt and dt u in turn; b and c where they are not constant
  METHOD void read(const Pairs& steps, const float (*dys)[WIDTH], const float (*maps)[NP], const Lane& l, int t,
                   int of_tile) {
    read_floats<2 * CH>(steps.two[t][l.group * CH], dt);
    read_floats<CH>(dys[t] + l.group * CH, dy);
    if (!B_CONSTANT) read_floats<S>(maps[of_tile] + l.part * S, b);
    if (!C_CONSTANT) read_floats<S>(maps[TILE + of_tile] + l.part * S, c);
  }
};

// Sums over the channels of a warp of (HELD, S) numbers in every lane: to (HELD, NP).
DEVICE void sum_channels(float* x, const Lane& l, float* to) {
  share_sums<HELD * S>(x, 16, l.lane);
  share_sums<HELD * S / 2>(x, 8, l.lane);
  share_sums<HELD * S / 4>(x, 4, l.lane);
  UNROLL for (int i = 0; i < HELD * S / 8; i++) {
    const int at = l.group * (HELD * S / 8) + i;
    to[at / S * NP + l.part * S + at % S] = x[i];
  }
}

// What reaches the state from an output: its gradient before the gate.
DEVICE float before_gate(float dy, float gate, bool inside) {
  return inside ? (GATED ? dy * gate * sigmoid(gate) : dy) : 0;
}

// Four channels of one step, of K steps that are loaded in advance: into registers, or where time is LAST to shared
// memory. Nothing is gained there by numbers of 32 bits, nor by those that cannot be copied past the registers.
template <class T, bool LAST>
constexpr bool LINED = LAST && sizeof(T) == 2 && TOGETHER > 1;

template <class T, bool LAST, bool = LINED<T, LAST>>
struct Feed {
  Input<T, LAST> input;
  Four<T> four = {};
  int step;
  METHOD Feed(const View& v, const Scan& p, const Lane& l, const Row& row, char*) : input(v, p, l, row), step(l.step) {}
  METHOD void load(int t) { four = input[t + step]; }
  METHOD Four<T> get(const Lane&) {
    input.turn(four);
    return four;
  }
};
template <class T, bool LAST>
struct Feed<T, LAST, true> {
  Rows<T, WIDTH> rows;
  Lines<T, WIDTH>& line;
  METHOD Feed(const View& v, const Scan&, const Lane& l, const Row& row, char* at)
      : rows(v, row.batch, row.begin, row.length, l.first, l.width, l.lane),
        line(*reinterpret_cast<Lines<T, WIDTH>*>(at)) {}
  METHOD void load(int t) { rows.copy(t, line); }
  METHOD Four<T> get(const Lane& l) const { return line.read(l.lane, l.step, l.four); }
};

// Four channels of one step, of K steps that are put together.
template <class T, bool LAST, bool = LINED<T, LAST>>
struct Sink {
  Output<T, LAST> output;
  METHOD Sink(void* data, const Scan& p, const Lane& l, const Row& row, char*) : output(data, p, l, row) {}
  METHOD void put(const Lane& l, int t, const float* x) { output.put(t + l.step, x); }
  METHOD void store(int) const {}
};
template <class T, bool LAST>
struct Sink<T, LAST, true> {
  Rows<T, WIDTH> rows;
  Lines<T, WIDTH>& line;
  METHOD Sink(void* data, const Scan& p, const Lane& l, const Row& row, char* at)
      : rows({data, p.length * p.width, p.length}, row.batch, row.begin, row.length, l.first, l.width, l.lane),
        line(*reinterpret_cast<Lines<T, WIDTH>*>(at)) {}
  METHOD void put(const Lane& l, int, const float* x) { line.write(l.lane, l.step, l.four, x); }
  METHOD void store(int t) const {
    if (t >= 0) rows.store(t, line);
  }
};
constexpr bool ANY_LINED = LINED<INPUT, U_LAST> || LINED<INPUT, Z_LAST> || LINED<DELTA, DELTA_LAST>;
// A warp's lines: of u, the gradient of y and that of u, then of z, then of delta.
constexpr int OF_INPUT = sizeof(Lines<INPUT, WIDTH>), OF_DELTA = sizeof(Lines<DELTA, WIDTH>);
constexpr int OF_U = LINED<INPUT, U_LAST> * 3 * OF_INPUT, OF_Z = LINED<INPUT, Z_LAST> * 2 * OF_INPUT;
static_assert(LINE_BYTES >= OF_U + OF_Z + LINED<DELTA, DELTA_LAST> * 2 * OF_DELTA, "as the host counts them");

// What a span adds to the gradient of the state before it, and the sum of its steps; the first span of a sequence is
// left out, as nothing comes before it.
extern "C" __global__ void __launch_bounds__(32 * WARPS) selective_scan_carry(const __grid_constant__ Scan p) {
  struct Shared {
    Pairs steps;       // dt and dy
    float map[K][NP];  // C
    Channels channels;
  };
  SHARED_MEMORY(memory);
  Shared& shared = reinterpret_cast<Shared*>(memory)[threadIdx.x / 32];
  const int64 blocks = over(p.width, WARPS * WIDTH);
  const Lane l(p, blockIdx.x % blocks * WARPS + threadIdx.x / 32);
  const Span span(p, blockIdx.x / blocks);
  const Row& row = span.row;
  if (l.width <= 0 || span.begin == 0 || span.begin >= span.end) return;
  float a[CH * S], g[CH * S] = {}, total[CH] = {};
  load_rates(p, l, a);
  const Constants constants(p, l);
  shared.channels.load(p, l);

  char* const lines = memory + WARPS * sizeof(Shared) + threadIdx.x / 32 * LINE_BYTES;
  Feed<INPUT, U_LAST> dys(p.dy, p, l, row, lines);
  Feed<INPUT, Z_LAST> zs(p.z, p, l, row, lines + OF_U);
  Feed<DELTA, DELTA_LAST> deltas(p.delta, p, l, row, lines + OF_U + OF_Z);
  const Map<C_LAST> cs(p.c, p, l, row, l.first / (p.width / p.groups_c));
  Four<MAP> c[MAPS];
  auto load = [&](int t) {
    dys.load(t), deltas.load(t);
    if (GATED) zs.load(t);
    if (ANY_LINED) close_copies();
    if (!C_CONSTANT) cs.load(t, c);
  };
  int t0 = span.begin + (span.end - span.begin - 1) / K * K;
  load(t0);
  for (; t0 >= span.begin; t0 -= K) {
    if (ANY_LINED) await_copies<0>();
    __syncwarp();
    float dt[4], of[4], gate[4] = {};
    const bool inside = t0 + l.step < row.length && l.count() > 0;
    step_sizes(deltas.get(l), shared.channels.bias + l.four, inside, dt);
    unpack(dys.get(l), of);
    if (GATED) unpack(zs.get(l), gate);
    UNROLL for (int i = 0; i < 4; i++)
      of[i] = before_gate(of[i], gate[i], inside);
    shared.steps.put(l, dt, of);
    if (!C_CONSTANT) cs.write(l, c, shared.map[0]);
    __syncwarp();
    load(t0 > 0 ? t0 - K : 0);
    UNROLL for (int t = K - 1; t >= 0; t--) {
      float step[2 * CH], c[S];
      read_floats<2 * CH>(shared.steps.two[t][l.group * CH], step);
      if (!C_CONSTANT) read_floats<S>(&shared.map[t][l.part * S], c);
      UNROLL for (int i = 0; i < CH * S; i++)
        g[i] =
            decay_of(step[i / S * 2], a[i]) * (g[i] + step[i / S * 2 + 1] * (C_CONSTANT ? constants.c[i] : c[i % S]));
      UNROLL for (int ch = 0; ch < CH; ch++)
        total[ch] += step[2 * ch];
    }
  }
  store_states(p, l, p.carry + span.slot * p.width * p.states, g);
  UNROLL for (int ch = 0; ch < CH; ch++)
    if (l.part == 0 && l.has(ch)) p.seconds[span.slot * p.width + l.channel(ch)] = total[ch];
}

// From what each span adds to the gradient that enters it, for one state of one sequence.
extern "C" __global__ void __launch_bounds__(256) selective_scan_join(const __grid_constant__ Scan p) {
  const int64 size = p.width * p.states, blocks = over(size, 256), r = blockIdx.x / blocks;
  const int64 i = blockIdx.x % blocks * 256 + threadIdx.x;
  if (i >= size) return;
  const Row row = find_row(p, r);
  const float a = p.a[i] * LOG2_E;
  float g = p.dfinal[r * size + i];
  const int64 spans = row.length ? 1 + over(row.length > p.lead ? row.length - p.lead : 0, p.span) : 0;
  for (int64 turn = spans - 1; turn >= 0; turn--) {
    const int64 s = row.span + turn * (p.borders ? 1 : p.rows);
    const float added = turn ? p.carry[s * size + i] : 0;
    const float decay = turn ? decay_of(p.seconds[s * p.width + i / p.states], a) : 0;
    p.carry[s * size + i] = g;
    g = added + decay * g;
  }
}

// The input of K steps, as a warp needs it.
struct Given {
  Pairs steps;                         // dt and dt u
  float dy[K][WIDTH];                  // before the gate
  Four<INPUT> u[32], dout[32], z[32];  // as read
  Four<DELTA> delta[32];
};

// As in the forward, the K steps to come are made ready while those at hand are computed, and those before finished.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    selective_scan_backward(const __grid_constant__ Scan p) {
  struct Shared {
    Given given[2];
    Sums y, dx, dlog;                 // of y, and of the gradients of dt u and of the logarithm of the decay
    float states[SUBS][CH * S * 32];  // before every K steps of a tile
    Channels channels;
    float totals[2][32][4];  // what lanes have found of the gradients of D and of the bias
  };
  SHARED_MEMORY(memory);
  const int warp = threadIdx.x / 32;
  Shared& shared = reinterpret_cast<Shared*>(memory)[warp];
  float (*maps)[NP] = reinterpret_cast<float (*)[NP]>(memory + WARPS * sizeof(Shared));  // (2, TILE), of B and C
  float (*found)[WARPS][2][K * NP] = reinterpret_cast<float (*)[WARPS][2][K * NP]>(maps + 2 * TILE);  // (2), to B and C

  const int64 blocks = over(p.width, WARPS * WIDTH), block = blockIdx.x % blocks, first = block * WARPS * WIDTH;
  const Lane l(p, block * WARPS + warp);
  const Span span(p, blockIdx.x / blocks);
  const Row& row = span.row;
  const int64 size = p.width * p.states;
  float a[CH * S], da[CH * S] = {}, g[CH * S];
  float db[CH * S] = {}, dc[CH * S] = {};  // where B and C are constant
  load_rates(p, l, a);
  const Constants constants(p, l);
  load_states(p, l, span.end < row.length ? p.carry + span.slot * size : p.dfinal + span.r * size, g);
  // What lanes have found for D and the bias, added to what the span has: every LEVEL steps, as a sum of a thousand
  // numbers, a thousand times, is far more exact than a sum of a million.
  bool some = false;
  auto add_totals = [&] {
    const float zero[4] = {};
    for (int k = 0; k < 2; k++) {
      float* to = (k ? p.dbias : p.dd) + span.slot * p.width + l.first + l.four;
      float total[4];
      read_floats<4>(shared.totals[k][l.lane], total);
      write_floats<4>(shared.totals[k][l.lane], zero);
      UNROLL for (int i = 0; i < 4; i++) {
        UNROLL for (int distance = WIDTH / 4; distance < 32; distance *= 2)
          total[i] += from_lane(total[i], distance);
        if (l.step == 0 && i < l.count()) to[i] = some ? to[i] + total[i] : total[i];
      }
    }
    some = true;
  };
  {
    const float zero[4] = {};
    write_floats<4>(shared.totals[0][l.lane], zero);
    write_floats<4>(shared.totals[1][l.lane], zero);
  }
  shared.channels.load(p, l);
  char* const lines = reinterpret_cast<char*>(found + 2) + warp * LINE_BYTES;
  Feed<INPUT, U_LAST> us(p.u, p, l, row, lines), dys(p.dy, p, l, row, lines + OF_INPUT);
  Feed<INPUT, Z_LAST> zs(p.z, p, l, row, lines + OF_U);
  Feed<DELTA, DELTA_LAST> deltas(p.delta, p, l, row, lines + OF_U + OF_Z);
  Sink<INPUT, U_LAST> dus(p.du, p, l, row, lines + 2 * OF_INPUT);
  Sink<INPUT, Z_LAST> dzs(p.dz, p, l, row, lines + OF_U + OF_INPUT);
  Sink<DELTA, DELTA_LAST> ddeltas(p.ddelta, p, l, row, lines + OF_U + OF_Z + OF_DELTA);
  const States<B_LAST> bs(p.b, p, row, first / (p.width / p.groups_b), threadIdx.x);
  const States<C_LAST> cs(p.c, p, row, first / (p.width / p.groups_c), threadIdx.x);
  const int64 maps_of_block = (p.borders ? 1 : p.rows) * p.length * NP;
  const View sums{p.dmaps + block * maps_of_block, p.length * NP, NP};
  const Column<float> dbs(sums, row.batch, row.begin, 0),
      dcs(sums, row.batch, row.begin, B_CONSTANT ? 0 : blocks * maps_of_block);

  // K steps to come. They may be asked for again before they are there; those behind the first of a span are not used.
  Four<INPUT> u, dout, z = {};
  Four<DELTA> delta;
  auto load_steps = [&](int t) {
    if (ANY_LINED) await_copies<0>(), __syncwarp();
    us.load(t), deltas.load(t);
    if (ANY_LINED) close_copies();
  };
  auto load_outputs = [&](int t) {
    dys.load(t);
    if (GATED) zs.load(t);
    if (ANY_LINED) close_copies();
  };
  float dt[4], in[4], dy[4], gate[4], bias[4];
  auto begin_steps = [&] {
    if (ANY_LINED) await_copies<0>(), __syncwarp();
    u = us.get(l), delta = deltas.get(l);
    unpack(u, in), unpack(delta, dt);
    read_floats<4>(shared.channels.bias + l.four, bias);
  };
  auto prepare_steps = [&](bool inside, int i) {
    dt[i] = step_size(dt[i] + bias[i], inside);
    in[i] *= dt[i];
  };
  auto begin_outputs = [&] {
    dout = dys.get(l);
    unpack(dout, dy);
    if (GATED) z = zs.get(l), unpack(z, gate);
  };
  auto prepare_outputs = [&](bool inside, int i) { dy[i] = before_gate(dy[i], gate[i], inside); };
  auto end_preparing = [&](Given& to) {
    to.steps.put(l, dt, in);
    write_floats<4>(&to.dy[l.step][l.four], dy);
    to.u[l.lane] = u, to.delta[l.lane] = delta;
    if (GATED) to.dout[l.lane] = dout, to.z[l.lane] = z;
  };

  // K steps that were computed.
  float x[4], raw[4], of[4], dx[4], dlog[4], biases[4], skip[4], dd[4], dbias[4], steps_of[8], du[4], ddelta[4], dz[4];
  float out[4], open[4], y[4];
  auto begin_finishing = [&](const Given& from) {
    unpack(from.u[l.lane], x);
    unpack(from.delta[l.lane], raw);
    read_floats<8>(from.steps.two[l.step][l.four], steps_of);
    read_floats<4>(&from.dy[l.step][l.four], of);
    shared.dx.read(l, dx);
    shared.dlog.read(l, dlog);
    read_floats<4>(shared.channels.bias + l.four, biases);
    read_floats<4>(shared.channels.skip + l.four, skip);
    read_floats<4>(shared.totals[0][l.lane], dd);
    read_floats<4>(shared.totals[1][l.lane], dbias);
    if (GATED) {
      unpack(from.dout[l.lane], out);
      unpack(from.z[l.lane], open);
      shared.y.read(l, y);
    }
  };
  auto finish = [&](bool inside, int i) {
    du[i] = dx[i] * steps_of[2 * i] + skip[i] * of[i];
    const float of_step = dx[i] * x[i] + dlog[i] * LN_2;
    ddelta[i] = inside ? SOFTPLUS ? of_step * sigmoid(raw[i] + biases[i]) : of_step : 0;
    dd[i] += inside ? of[i] * x[i] : 0;
    dbias[i] += ddelta[i];
    if (GATED) {
      const float z = open[i], part = sigmoid(z);
      dz[i] = out[i] * (y[i] + skip[i] * x[i]) * part * (1 + z * (1 - part));
    }
  };
  auto end_finishing = [&](int t) {
    write_floats<4>(shared.totals[0][l.lane], dd);
    write_floats<4>(shared.totals[1][l.lane], dbias);
    dus.put(l, t, du);
    ddeltas.put(l, t, ddelta);
    if (GATED) dzs.put(l, t, dz);
    if (!ANY_LINED) return;
    __syncwarp();
    dus.store(t), ddeltas.store(t);
    if (GATED) dzs.store(t);
  };
  // What all warps have found for B and C, of some steps from t.
  auto add_maps = [&](int turn, int t, int steps) {
    UNROLL for (int k = 0; k < K * NP; k += 32 * WARPS) {
      const int i = k + threadIdx.x;
      if (K * NP % (32 * WARPS) && i >= K * NP) break;
      UNROLL for (int map = 0; map < 2; map++) {
        if (map ? C_CONSTANT : B_CONSTANT) continue;
        float sum = 0;
        UNROLL for (int w = 0; w < WARPS; w++)
          sum += found[turn][w][map][i];
        if (i < steps * NP) (map ? dcs : dbs).at(t)[i] = sum;
      }
    }
  };

  __syncwarp();
  int turn = 0;
  for (int begin = (span.end - 1) / TILE * TILE; begin >= span.begin && span.begin < span.end; begin -= TILE) {
    const int subs = (least(row.length - begin, TILE) + K - 1) / K;
    load_steps(begin);
    load_outputs(begin + (subs - 1) * K);
    for (int t = threadIdx.x / S; t < TILE; t += 32 * WARPS / S) {
      if (!B_CONSTANT) bs.put(bs[begin + t], &maps[t][threadIdx.x % S * 4]);
      if (!C_CONSTANT) cs.put(cs[begin + t], &maps[TILE + t][threadIdx.x % S * 4]);
    }
    float h[CH * S];
    load_states(p, l, p.saved + (row.tile + begin / TILE) * size, h);
    begin_steps();
    UNROLL for (int i = 0; i < 4; i++)
      prepare_steps(true, i);
    shared.given[turn].steps.put(l, dt, in);
    load_steps(begin + least(1, subs - 1) * K);
    __syncthreads();

    // The states before every K steps.
    for (int sub = 0; sub < subs - 1; sub++, turn ^= 1) {
      const int next = begin + least(sub + 2, subs - 1) * K;
      write_floats<CH * S>(shared.states[sub] + l.lane * CH * S, h);
      begin_steps();
      if (ANY_LINED) load_steps(next);
      UNROLL for (int t = 0; t < K; t++) {
        advance(shared.given[turn].steps.two[t], maps[sub * K + t], l, constants, a, h);
        if (t % (K / 4) == 0) prepare_steps(true, t / (K / 4));
      }
      shared.given[turn ^ 1].steps.put(l, dt, in);
      if (!ANY_LINED) load_steps(next);
      __syncwarp();
    }
    write_floats<CH * S>(shared.states[subs - 1] + l.lane * CH * S, h);

    auto is_inside = [&](int t) { return t + l.step < row.length && l.count() > 0; };
    {
      const int t = begin + (subs - 1) * K;
      begin_steps(), begin_outputs();
      UNROLL for (int i = 0; i < 4; i++)
        prepare_steps(is_inside(t), i), prepare_outputs(is_inside(t), i);
      end_preparing(shared.given[turn]);
      const int next = begin + (subs > 1 ? subs - 2 : 0) * K;
      load_steps(next), load_outputs(next);
    }
    for (int sub = subs - 1; sub >= 0; sub--, turn ^= 1) {
      const Given& given = shared.given[turn];
      Given& other = shared.given[turn ^ 1];
      const int t0 = begin + sub * K, before = t0 + K, after = t0 - K, next = begin + (sub > 1 ? sub - 2 : 0) * K;
      const bool any = sub < subs - 1, finishing = any && is_inside(before), preparing = is_inside(after);
      __syncthreads();
      begin_finishing(other);
      add_maps(turn ^ 1, before, any ? least(row.length - before, K) : 0);
      __syncwarp();
#pragma unroll 1
      for (int from = K - HELD; from >= 0; from -= HELD) {
        float decay[HELD][CH * S], decayed[HELD][CH * S];  // a_t, and a_t h_{t-1}
        read_floats<CH * S>(shared.states[sub] + l.lane * CH * S, h);
#pragma unroll 4
        for (int t = 0; t < from; t++) advance(given.steps.two[t], maps[sub * K + t], l, constants, a, h);
        float to_c[HELD * S], to_b[HELD * S];
        Step steps[HELD], again[HELD];  // each read a step before it is needed, ahead of what the last one writes
        auto read = [&](Step& step, int t) { step.read(given.steps, given.dy, maps, l, from + t, sub * K + from + t); };
        read(steps[0], 0);
        UNROLL for (int t = 0; t < HELD; t++) {
          if (t + 1 < HELD) read(steps[t + 1], t + 1);
          const Step& of = steps[t];
          float y[CH] = {};
          UNROLL for (int i = 0; i < CH * S; i++) {
            const int ch = i / S, s = i % S;
            decay[t][i] = decay_of(of.dt[2 * ch], a[i]);
            decayed[t][i] = decay[t][i] * h[i];
            h[i] = decayed[t][i] + of.dt[2 * ch + 1] * (B_CONSTANT ? constants.b[i] : of.b[s]);
            y[ch] += h[i] * (C_CONSTANT ? constants.c[i] : of.c[s]);
            float& sum = C_CONSTANT ? dc[i] : to_c[t * S + s];
            sum = (C_CONSTANT || ch ? sum : 0) + h[i] * of.dy[ch];
          }
          if (GATED) shared.y.put(l, from + t, y);
          if (t < 4 && from == K - HELD) finish(finishing, t);
          if (t == 3 && from == K - HELD) end_finishing(any ? before : -K);
        }
        read(again[HELD - 1], HELD - 1);
        if (!C_CONSTANT) sum_channels(to_c, l, &found[turn][warp][1][from * NP]);
        if (from == 0) {
          begin_steps(), begin_outputs();
          if (ANY_LINED) load_steps(next), load_outputs(next);
        }
        UNROLL for (int t = HELD - 1; t >= 0; t--) {
          if (t > 0) read(again[t - 1], t - 1);
          const Step& of = again[t];
          float dx[CH] = {}, dlog[CH] = {};
          UNROLL for (int i = 0; i < CH * S; i++) {
            const int ch = i / S, s = i % S;
            g[i] += of.dy[ch] * (C_CONSTANT ? constants.c[i] : of.c[s]);
            const float through = g[i] * decayed[t][i];
            dlog[ch] += through * a[i];
            da[i] += through * of.dt[2 * ch];
            dx[ch] += g[i] * (B_CONSTANT ? constants.b[i] : of.b[s]);
            float& sum = B_CONSTANT ? db[i] : to_b[t * S + s];
            sum = (B_CONSTANT || ch ? sum : 0) + g[i] * of.dt[2 * ch + 1];
            g[i] *= decay[t][i];
          }
          shared.dx.put(l, from + t, dx);
          shared.dlog.put(l, from + t, dlog);
          if (t < 4 && from == 0) prepare_steps(preparing, t), prepare_outputs(preparing, t);
        }
        if (!B_CONSTANT) sum_channels(to_b, l, &found[turn][warp][0][from * NP]);
      }
      end_preparing(other);
      if (!ANY_LINED) load_steps(next), load_outputs(next);
    }
    __syncthreads();
    begin_finishing(shared.given[turn ^ 1]);
    add_maps(turn ^ 1, begin, least(row.length - begin, K));
    UNROLL for (int i = 0; i < 4; i++)
      finish(is_inside(begin), i);
    end_finishing(begin);
    if (begin % LEVEL == 0) add_totals();
  }
  if (span.begin % LEVEL || span.begin >= span.end) add_totals();

  if (span.begin == 0 && row.length > 0) store_states(p, l, p.dh0 + span.r * size, g);
  store_states(p, l, p.da + span.slot * size, da);
  if (B_CONSTANT) store_states(p, l, p.db + span.slot * size, db);
  if (C_CONSTANT) store_states(p, l, p.dc + span.slot * size, dc);
}

// What the blocks of channels have found for B and C, and the spans for A, D and the bias, added up: a thread adds four
// numbers of B or C, or one of the others.
extern "C" __global__ void __launch_bounds__(256) selective_scan_sums(const __grid_constant__ Scan p) {
  const int64 blocks = over(p.width, WARPS * WIDTH), fours = (p.borders ? 1 : p.rows) * p.length * S;
  int64 i = int64(blockIdx.x) * 256 + threadIdx.x;
  UNROLL for (int map = 0; map < 2; map++) {
    if (map ? C_CONSTANT : B_CONSTANT) continue;
    const int64 groups = map ? p.groups_c : p.groups_b, group = i / fours, at = i % fours,
                count = p.states - at % S * 4;
    if (group < groups) {
      const int64 each = blocks / groups;
      const float* from = p.dmaps + (((B_CONSTANT ? 0 : map) * blocks + group * each) * fours + at) * 4;
      float sum[4] = {}, x[4];
      for (int64 block = 0; block < each; block++) {
        read_floats<4>(from + block * fours * 4, x);
        UNROLL for (int k = 0; k < 4; k++)
          sum[k] += x[k];
      }
      MAP* to = static_cast<MAP*>(p.sums_of_maps[map]);
      if (map ? C_LAST : B_LAST) {
        const int64 row = at / S / p.length, t = at / S % p.length;
        to += ((row * groups + group) * p.states + at % S * 4) * p.length + t;
        UNROLL for (int k = 0; k < 4; k++) {
          const float one[4] = {sum[k]};
          if (k < count) store_four<false>(whole(to + k * p.length), one, 1);
        }
      } else {
        to += (at / S * groups + group) * p.states + at % S * 4;
        if (count > 0) store_four<MAP_ALIGNED>(whole(to), sum, int(count));
      }
    }
    i -= over(groups * fours, 256) * 256;
    if (i < 0) return;
  }
  const float* const found[] = {p.da, p.dd, p.dbias, p.db, p.dc};
  UNROLL for (int k = 0; k < 5; k++) {
    if (k == 3 && !B_CONSTANT || k == 4 && !C_CONSTANT) continue;
    const int64 size = k == 1 || k == 2 ? p.width : p.width * p.states;
    if (i < size) {
      float sum = 0;
      for (int64 span = 0; span < p.spans; span++) sum += found[k][span * size + i];
      p.sums[k][i] = sum;
    }
    i -= over(size, 256) * 256;
    if (i < 0) return;
  }
}
