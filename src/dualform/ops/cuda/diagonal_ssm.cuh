// h_t = A h_{t-1} + u_t, y_t = 2 Re sum_n C_n h_n, with complex A, C and h: how lanes share the work.
//
// A warp computes 32 / LANES channels. LANES neighbouring lanes share a channel, each keeps M of its modes: A and C,
// which never change, and the state stay in registers for the whole length. Per step one number comes in and a part of
// one goes out, through shared memory, four steps at a time; everything else is arithmetic.
//
// Time is cut into spans, which run side by side: what a span passes on is known from what it adds to a state of zero,
// since the decay over its length is a power of A.
#pragma once

#include "sequences.cuh"

constexpr int M = MODES;             // of a lane
constexpr int WIDTH = 32 / LANES;    // channels of a warp
constexpr int K = 32 / (WIDTH / 4);  // steps of a tile, one of which a lane reads and writes, four channels of it
constexpr int LINE = K + 4;          // what a channel of a tile takes up: the banks of channels differ

// One system, forward and backward. Complex numbers are pairs of floats; y and du are like u.
struct System {
  int64 rows, length, width, modes, span;
  const int64* borders;  // (rows + 1), of sequences packed end to end, or null
  View u;
  const float *a, *c, *h0;  // (D, N), (D, N), (rows, D, N)
  float* carry;             // (spans, D, N), the state before a span; backward, p after it
  void* y;                  // (B, T, D)
  float* final;             // (rows, D, N)
  // Backward only.
  View dy;
  const float* dfinal;  // (rows, D, N)
  float* carry_q;       // (spans, D, N), q after a span
  void* du;             // (B, T, D)
  float *da, *dc;       // (spans, D, N)
  float* dh0;           // (rows, D, N)
};

struct Complex {
  double re, im;
};
DEVICE Complex operator*(Complex x, Complex y) { return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re}; }

// In double: the rounding of a slow pole grows with its power.
DEVICE Complex power(Complex x, int64 n) {
  Complex y = {1, 0};
  for (; n > 0; n /= 2, x = x * x)
    if (n % 2) y = y * x;
  return y;
}
DEVICE Complex load_complex(const float* p) { return {p[0], p[1]}; }
DEVICE void store_complex(float* p, Complex x) { p[0] = float(x.re), p[1] = float(x.im); }

// A sequence and the steps of it that a block runs through.
struct Span {
  int64 sequence, batch, start, number;
  int length, begin, end;
  METHOD Span(const System& p, int64 number) : number(number) {
    sequence = find_sequence(p.borders, p.rows, p.length, p.span, number);
    find(p);
    const int64 from = (number - first(p)) * p.span;
    begin = int(least(from, int64(length))), end = int(least(from + p.span, int64(length)));
  }
  // All of a sequence.
  METHOD static Span whole(const System& p, int64 sequence) {
    Span s;
    s.sequence = sequence, s.find(p);
    s.begin = 0, s.end = s.length, s.number = s.first(p);
    return s;
  }
  METHOD int64 first(const System& p) const {
    return p.borders ? start / p.span + sequence : sequence * over(p.length, p.span);
  }

 private:
  METHOD Span() {}
  METHOD void find(const System& p) {
    batch = p.borders ? 0 : sequence, start = p.borders ? p.borders[sequence] : 0;
    length = int(p.borders ? p.borders[sequence + 1] - start : p.length);
  }
};

// What one lane is to its warp.
struct Lane {
  int lane, group, part;  // its channel is group, its modes M part ..
  int step, four;         // it reads and writes channels four .. of step
  int64 first;            // of the warp's channels
  int width;              // how many of them there are
  METHOD Lane(const System& p)
      : lane(threadIdx.x % 32),
        group(lane / LANES),
        part(lane % LANES),
        step(lane / (WIDTH / 4)),
        four(lane % (WIDTH / 4) * 4),
        first((blockIdx.x % blocks(p) * WARPS + threadIdx.x / 32) * WIDTH),
        width(int(least(p.width - first, int64(WIDTH)))) {}
  METHOD static int64 blocks(const System& p) { return over(p.width, WARPS * WIDTH); }
  METHOD int count() const { return width - four; }  // channels to read
};

// One number of each mode of a lane; zero for modes that are not there.
struct Modes {
  float re[M] = {}, im[M] = {};
  METHOD bool has(const System& p, const Lane& l, int m) const { return l.group < l.width && l.part * M + m < p.modes; }
  METHOD static int64 place(const System& p, const Lane& l, int64 slot) {
    return ((slot * p.width + l.first + l.group) * p.modes + l.part * M) * 2;
  }
  METHOD void load(const System& p, const Lane& l, const float* from, int64 slot = 0) {
    from += place(p, l, slot);
    UNROLL for (int m = 0; m < M; m++)
      if (has(p, l, m)) re[m] = from[2 * m], im[m] = from[2 * m + 1];
  }
  METHOD void store(const System& p, const Lane& l, float* to, int64 slot) const {
    to += place(p, l, slot);
    UNROLL for (int m = 0; m < M; m++)
      if (has(p, l, m)) to[2 * m] = re[m], to[2 * m + 1] = im[m];
  }
};

// Four channels of any step. Steps beyond the end repeat the last one, and channels beyond the width those before:
// neither is used, and an address that is always valid needs no branch.
struct Input {
  const INPUT* from;
  int64 time;
  int last, count;
  METHOD Input(const View& v, const System& p, const Lane& l, const Span& span)
      : from(static_cast<const INPUT*>(v.data) + span.batch * v.row + span.start * v.time +
             (INPUT_ALIGNED ? least(l.first + l.four, p.width - 4) : l.first + l.four)),
        time(v.time),
        last(span.length - 1),
        count(l.count()) {}
  METHOD Four<INPUT> operator[](int t) const {
    t = t < 0 ? 0 : least(t, last);
    return load_four<INPUT_ALIGNED>(from + t * time, count);
  }
};
struct Output {
  INPUT* to;
  int64 time;
  int end, count;
  METHOD Output(void* data, const System& p, const Lane& l, const Span& span)
      : to(static_cast<INPUT*>(data) + (span.batch * p.length + span.start) * p.width + l.first + l.four),
        time(p.width),
        end(span.end),
        count(l.count()) {}
  METHOD void put(int t, const float* x) const {
    if (t < end && count > 0) store_four<INPUT_ALIGNED>(to + t * time, x, count);
  }
};

// K steps of the channels of a warp.
struct Tile {
  float at[WIDTH][LINE];
  METHOD void put(const Lane& l, const Four<INPUT>& four) {
    float x[4];
    unpack(four, x);
    UNROLL for (int i = 0; i < 4; i++)
      at[l.four + i][l.step] = x[i];
  }
  METHOD const float* of(const Lane& l) const { return at[l.group]; }
};

// What the lanes of a channel have found of K steps.
struct Sums {
  // The banks of neighbouring lanes differ when they write four steps each.
  static constexpr int PAD = LANES == 8 ? 20 : 8;
  float parts[LANES][WIDTH * LINE + PAD];
  METHOD float* of(const Lane& l) { return parts[l.part] + l.group * LINE; }
  METHOD void read(const Lane& l, float* x) const {
    UNROLL for (int i = 0; i < 4; i++) {
      x[i] = 0;
      UNROLL for (int part = 0; part < LANES; part++)
        x[i] += parts[part][(l.four + i) * LINE + l.step];
    }
  }
};
