// The backward: with g_t = dL/dh_t in full, g_t = C_t dy_t + a_{t+1} g_{t+1}, a_t = exp(dt_t A).
//
// Time is cut into spans. A first kernel runs every span from a gradient of zero, a second one joins the spans of a
// sequence, so that the third knows the gradient that enters each of them and runs all side by side: tile by tile from
// the last, where the states of a tile are computed again from the one that entered it. WARPS warps of one block take
// neighbouring channels of one span, and add up what B and C get from them.
#include "selective_scan.cuh"

constexpr int SUBS = TILE / K;

// The span of time that a block runs through, of the sequence that it belongs to.
struct Span {
  Row row;
  int64 r, begin, end, slot;
  METHOD Span(const Scan& p, int64 slot) : slot(slot) {
    if (p.borders) {
      int64 low = 0, high = p.rows;  // the last sequence whose first slot is not beyond this one
      while (high - low > 1) {
        int64 middle = (low + high) / 2;
        (p.borders[middle] / p.span + middle <= slot ? low : high) = middle;
      }
      r = low;
    } else {
      r = slot / over(p.length, p.span);
    }
    row = find_row(p, r);
    begin = (slot - row.span) * p.span;
    end = begin + p.span < row.length ? begin + p.span : row.length;
  }
};

// One step of the states, from (WIDTH, 2) of dt and dt u, and from (NP) of B.
DEVICE void advance(const float (*steps)[2], const float* map, const Lane& l, const float* a, float* h) {
  float step[2 * CH], bs[S];
  read_shared<2 * CH>(steps[l.group * CH], step);
  read_shared<S>(map + l.part * S, bs);
  UNROLL for (int i = 0; i < CH * S; i++)
    h[i] = exp2_of(step[i / S * 2] * a[i]) * h[i] + step[i / S * 2 + 1] * bs[i % S];
}

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

// What reaches the state from the output of four channels: the gradient of y before its gate.
DEVICE void before_gate(const Four<INPUT>& dy, const Four<INPUT>& z, float* given, float* gate, float* found) {
  unpack(dy, given);
  if (GATED) unpack(z, gate);
  UNROLL for (int i = 0; i < 4; i++) found[i] = GATED ? given[i] * gate[i] * sigmoid(gate[i]) : given[i];
}

// What a span adds to the gradient of the state before it, and the sum of its steps.
extern "C" __global__ void __launch_bounds__(32 * WARPS) selective_scan_carry(const __grid_constant__ Scan p) {
  struct Shared {
    float steps[K][WIDTH][2];  // dt and dy
    float map[K][NP];          // C
  };
  SHARED_MEMORY(memory);
  Shared& shared = reinterpret_cast<Shared*>(memory)[threadIdx.x / 32];
  const int64 blocks = over(p.width, WARPS * WIDTH);
  const Lane l(p, blockIdx.x % blocks * WARPS + threadIdx.x / 32);
  const Span span(p, blockIdx.x / blocks);
  const Row& row = span.row;
  if (l.width <= 0 || span.begin >= row.length) return;
  const int64 group = l.first / (p.width / p.groups_c);
  float a[CH * S], g[CH * S] = {}, total[CH] = {}, bias[4];
  load_rates(p, l, a);
  load_channels(p.bias, l, bias);

  Four<INPUT> dy, z = {};
  Four<DELTA> delta;
  Map c;
  auto load = [&](int64 t) {
    if (t < span.begin) return;
    delta = load_input<DELTA>(p.delta, l, row, t + l.step);
    dy = load_input<INPUT>(p.dy, l, row, t + l.step);
    if (GATED) z = load_input<INPUT>(p.z, l, row, t + l.step);
    c.load(p.c, l, row, t, p.states, group);
  };
  int64 t0 = span.begin + over(span.end - span.begin, K) * K - K;
  load(t0);
  for (; t0 >= span.begin; t0 -= K) {
    float raw[4], dt[4], given[4], gate[4], of[4];
    step_sizes(delta, bias, t0 + l.step < row.length, raw, dt);
    before_gate(dy, z, given, gate, of);
    UNROLL for (int i = 0; i < 4; i += 2) {
      float pairs[4] = {dt[i], of[i], dt[i + 1], of[i + 1]};
      write_shared<4>(shared.steps[l.step][l.four + i], pairs);
    }
    c.write(l, shared.map[0]);
    __syncwarp();
    load(t0 - K);
    UNROLL for (int t = K - 1; t >= 0; t--) {
      float step[2 * CH], cs[S];
      read_shared<2 * CH>(shared.steps[t][l.group * CH], step);
      read_shared<S>(&shared.map[t][l.part * S], cs);
      UNROLL for (int i = 0; i < CH * S; i++)
        g[i] = exp2_of(step[i / S * 2] * a[i]) * (g[i] + step[i / S * 2 + 1] * cs[i % S]);
      UNROLL for (int ch = 0; ch < CH; ch++) total[ch] += step[2 * ch];
    }
    __syncwarp();
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
  for (int64 s = row.span + over(row.length, p.span) - 1; s >= row.span; s--) {
    float added = p.carry[s * size + i], decay = exp2_of(a * p.seconds[s * p.width + i / p.states]);
    p.carry[s * size + i] = g;
    g = added + decay * g;
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) selective_scan_backward(const __grid_constant__ Scan p) {
  struct Shared {
    float steps[K][WIDTH][2];     // dt and dt u
    float dy[K][WIDTH];           // before the gate
    float sums[3][K][WIDTH];      // over the states of a channel: y, and the gradients of dt u and of log2 a
    float states[SUBS][CH * S * 32];  // before every K steps of a tile
    float channels[2][WIDTH];     // the bias and D
    float totals[2][32][4];       // what lanes have found of the gradients of D and of the bias
  };
  SHARED_MEMORY(memory);
  const int warp = threadIdx.x / 32;
  Shared& shared = reinterpret_cast<Shared*>(memory)[warp];
  float(*maps)[NP] = reinterpret_cast<float(*)[NP]>(memory + WARPS * sizeof(Shared));  // (2, TILE), of B and C
  float(*given)[WARPS][2][K][NP] = reinterpret_cast<float(*)[WARPS][2][K][NP]>(maps + 2 * TILE);  // (2), to B and C

  const int64 blocks = over(p.width, WARPS * WIDTH), block = blockIdx.x % blocks;
  const Lane l(p, block * WARPS + warp);
  const Span span(p, blockIdx.x / blocks);
  const Row& row = span.row;
  const int64 size = p.width * p.states, first = block * WARPS * WIDTH;
  const int64 group_b = first / (p.width / p.groups_b), group_c = first / (p.width / p.groups_c);
  float a[CH * S], da[CH * S] = {}, g[CH * S];
  load_rates(p, l, a);
  {
    float bias[4], skip[4], zero[4] = {};
    load_channels(p.bias, l, bias);
    load_channels(p.d, l, skip);
    if (l.step == 0) write_shared<4>(shared.channels[0] + l.four, bias), write_shared<4>(shared.channels[1] + l.four, skip);
    write_shared<4>(shared.totals[0][l.lane], zero);
    write_shared<4>(shared.totals[1][l.lane], zero);
  }
  load_states(p, l, span.end < row.length ? p.carry + span.slot * size : p.dfinal + span.r * size, g);

  __syncwarp();
  int turn = 0;
  for (int64 tile = over(span.end, TILE) - 1; tile * TILE >= span.begin && span.begin < span.end; tile--) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * TILE * S; i += 32 * WARPS) {
      const int64 step = i / S % TILE, t = tile * TILE + step, n = i % S * 4;
      const bool is_c = i / S >= TILE;
      const View& v = is_c ? p.c : p.b;
      Four<MAP> four = {};
      if (t < row.length)
        four = load_four<MAP_ALIGNED>(static_cast<const MAP*>(v.data) + row.batch * v.row + (row.begin + t) * v.time +
                                          (is_c ? group_c : group_b) * p.states + n,
                                      p.states - n);
      float x[4];
      unpack(four, x);
      write_shared<4>(&maps[i / S][n], x);
    }
    __syncthreads();

    // The states before every K steps.
    const int subs = int(over((row.length - tile * TILE < TILE ? row.length - tile * TILE : TILE), K));
    float h[CH * S];
    load_states(p, l, p.saved + (row.tile + tile) * size, h);
    {
      Four<INPUT> u;
      Four<DELTA> delta;
      auto load = [&](int sub) {
        u = load_input<INPUT>(p.u, l, row, tile * TILE + sub * K + l.step);
        delta = load_input<DELTA>(p.delta, l, row, tile * TILE + sub * K + l.step);
      };
      load(0);
      for (int sub = 0; sub < subs; sub++) {
        write_shared<CH * S>(shared.states[sub] + l.lane * CH * S, h);
        if (sub == subs - 1) break;
        float in[4], raw[4], dt[4], bias[4];
        unpack(u, in);
        read_shared<4>(shared.channels[0] + l.four, bias);
        step_sizes(delta, bias, true, raw, dt);
        UNROLL for (int i = 0; i < 4; i += 2) {
          float pairs[4] = {dt[i], dt[i] * in[i], dt[i + 1], dt[i + 1] * in[i + 1]};
          write_shared<4>(shared.steps[l.step][l.four + i], pairs);
        }
        __syncwarp();
        load(sub + 1);
        UNROLL for (int t = 0; t < K; t++) advance(shared.steps[t], maps[sub * K + t], l, a, h);
        __syncwarp();
      }
    }

    Four<INPUT> u, dy, z = {};
    Four<DELTA> delta;
    auto load = [&](int sub) {
      const int64 t = tile * TILE + sub * K + l.step;
      u = load_input<INPUT>(p.u, l, row, t);
      delta = load_input<DELTA>(p.delta, l, row, t);
      dy = load_input<INPUT>(p.dy, l, row, t);
      if (GATED) z = load_input<INPUT>(p.z, l, row, t);
    };
    load(subs - 1);
    for (int sub = subs - 1; sub >= 0; sub--, turn ^= 1) {
      const int64 t0 = tile * TILE + sub * K;
      const bool inside = t0 + l.step < row.length;
      {
        float in[4], raw[4], dt[4], out[4], gate[4], of[4], bias[4];
        unpack(u, in);
        read_shared<4>(shared.channels[0] + l.four, bias);
        step_sizes(delta, bias, inside, raw, dt);
        before_gate(dy, z, out, gate, of);
        UNROLL for (int i = 0; i < 4; i += 2) {
          float pairs[4] = {dt[i], dt[i] * in[i], dt[i + 1], dt[i + 1] * in[i + 1]};
          write_shared<4>(shared.steps[l.step][l.four + i], pairs);
        }
        write_shared<4>(&shared.dy[l.step][l.four], of);
      }
      __syncwarp();
      if (sub > 0) load(sub - 1);

#pragma unroll 1
      for (int from = K - HELD; from >= 0; from -= HELD) {
        float decay[HELD][CH * S], decayed[HELD][CH * S];  // a_t, and a_t h_{t-1}
        read_shared<CH * S>(shared.states[sub] + l.lane * CH * S, h);
#pragma unroll 4
        for (int t = 0; t < from; t++) advance(shared.steps[t], maps[sub * K + t], l, a, h);
        float y[HELD][CH], to_c[HELD * S];
        UNROLL for (int t = 0; t < HELD; t++) {
          float step[2 * CH], dys[CH], bs[S], cs[S];
          read_shared<2 * CH>(shared.steps[from + t][l.group * CH], step);
          read_shared<CH>(&shared.dy[from + t][l.group * CH], dys);
          read_shared<S>(&maps[sub * K + from + t][l.part * S], bs);
          read_shared<S>(&maps[TILE + sub * K + from + t][l.part * S], cs);
          UNROLL for (int i = 0; i < CH * S; i++) {
            const int ch = i / S, s = i % S;
            decay[t][i] = exp2_of(step[2 * ch] * a[i]);
            decayed[t][i] = decay[t][i] * h[i];
            h[i] = decayed[t][i] + step[2 * ch + 1] * bs[s];
            y[t][ch] = (s ? y[t][ch] : 0) + h[i] * cs[s];
            to_c[t * S + s] = (ch ? to_c[t * S + s] : 0) + h[i] * dys[ch];
          }
        }
        if (GATED) sum_states<HELD>(y, l, shared.sums[0][from]);
        sum_channels(to_c, l, &given[turn][warp][1][from][0]);
        float dx[HELD][CH], dlog[HELD][CH], to_b[HELD * S];
        UNROLL for (int t = HELD - 1; t >= 0; t--) {
          float step[2 * CH], dys[CH], bs[S], cs[S];
          read_shared<2 * CH>(shared.steps[from + t][l.group * CH], step);
          read_shared<CH>(&shared.dy[from + t][l.group * CH], dys);
          read_shared<S>(&maps[sub * K + from + t][l.part * S], bs);
          read_shared<S>(&maps[TILE + sub * K + from + t][l.part * S], cs);
          UNROLL for (int i = 0; i < CH * S; i++) {
            const int ch = i / S, s = i % S;
            g[i] += dys[ch] * cs[s];
            const float through = g[i] * decayed[t][i];
            dlog[t][ch] = (s ? dlog[t][ch] : 0) + through * a[i];
            da[i] += through * step[2 * ch];
            dx[t][ch] = (s ? dx[t][ch] : 0) + g[i] * bs[s];
            to_b[t * S + s] = (ch ? to_b[t * S + s] : 0) + g[i] * step[2 * ch + 1];
            g[i] *= decay[t][i];
          }
        }
        sum_states<HELD>(dx, l, shared.sums[1][from]);
        sum_states<HELD>(dlog, l, shared.sums[2][from]);
        sum_channels(to_b, l, &given[turn][warp][0][from][0]);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < K * 2 * NP; i += 32 * WARPS) {
        float sum = 0;
        UNROLL for (int w = 0; w < WARPS; w++) sum += (&given[turn][w][0][0][0])[i];
        const int64 t = t0 + i / NP % K, batches = p.borders ? 1 : p.rows, of_map = i / (NP * K) * blocks + block;
        if (t < row.length)
          p.dmaps[((of_map * batches + row.batch) * p.length + row.begin + t) * NP + i % NP] = sum;
      }

      float in[4], raw[4], steps[8], of[4], dx[4], dlog[4], bias[4], skip[4], dd[4], dbias[4], du[4], ddelta[4], dz[4];
      unpack(load_input<INPUT>(p.u, l, row, t0 + l.step), in);
      unpack(load_input<DELTA>(p.delta, l, row, t0 + l.step), raw);
      read_shared<8>(shared.steps[l.step][l.four], steps);
      read_shared<4>(&shared.dy[l.step][l.four], of);
      read_shared<4>(&shared.sums[1][l.step][l.four], dx);
      read_shared<4>(&shared.sums[2][l.step][l.four], dlog);
      read_shared<4>(shared.channels[0] + l.four, bias);
      read_shared<4>(shared.channels[1] + l.four, skip);
      read_shared<4>(shared.totals[0][l.lane], dd);
      read_shared<4>(shared.totals[1][l.lane], dbias);
      UNROLL for (int i = 0; i < 4; i++) {
        du[i] = dx[i] * steps[2 * i] + skip[i] * of[i];
        ddelta[i] = inside ? (dx[i] * in[i] + dlog[i] * LN_2) * (SOFTPLUS ? sigmoid(raw[i] + bias[i]) : 1) : 0;
        dd[i] += of[i] * in[i];
        dbias[i] += ddelta[i];
      }
      write_shared<4>(shared.totals[0][l.lane], dd);
      write_shared<4>(shared.totals[1][l.lane], dbias);
      if (GATED) {
        float out[4], gate[4], y[4];
        unpack(load_input<INPUT>(p.dy, l, row, t0 + l.step), out);
        unpack(load_input<INPUT>(p.z, l, row, t0 + l.step), gate);
        read_shared<4>(&shared.sums[0][l.step][l.four], y);
        UNROLL for (int i = 0; i < 4; i++) {
          const float open = sigmoid(gate[i]);
          dz[i] = out[i] * (y[i] + skip[i] * in[i]) * open * (1 + gate[i] * (1 - open));
        }
      }
      store_output<INPUT>(p, p.du, l, row, t0 + l.step, du);
      store_output<DELTA>(p, p.ddelta, l, row, t0 + l.step, ddelta);
      if (GATED) store_output<INPUT>(p, p.dz, l, row, t0 + l.step, dz);
      __syncwarp();
    }
  }

  if (span.begin == 0 && row.length > 0) store_states(p, l, p.dh0 + span.r * size, g);
  store_states(p, l, p.da + span.slot * size, da);
  float dd[4], dbias[4];
  read_shared<4>(shared.totals[0][l.lane], dd);
  read_shared<4>(shared.totals[1][l.lane], dbias);
  UNROLL for (int i = 0; i < 4; i++) {
    UNROLL for (int distance = WIDTH / 4; distance < 32; distance *= 2) {
      dd[i] += from_lane(dd[i], distance);
      dbias[i] += from_lane(dbias[i], distance);
    }
    if (l.step == 0 && i < l.count()) {
      p.dd[span.slot * p.width + l.first + l.four + i] = dd[i];
      p.dbias[span.slot * p.width + l.first + l.four + i] = dbias[i];
    }
  }
}
