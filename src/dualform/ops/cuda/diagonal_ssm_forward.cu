// The forward. Where rows and channels alone do not fill the chip, a first kernel runs every span from a state of zero,
// and a second one joins the spans of a sequence; the third knows the state that enters each of them.
#include "diagonal_ssm.cuh"

struct State {
  Modes a, c, h;  // c: (2, -2) C
  template <int COUNT>
  METHOD void advance(const float* u) {
    UNROLL for (int t = 0; t < COUNT; t++) UNROLL
      for (int m = 0; m < M; m++) {
        const float re = u[t] + a.re[m] * h.re[m] - a.im[m] * h.im[m];
        h.im[m] = a.re[m] * h.im[m] + a.im[m] * h.re[m], h.re[m] = re;
      }
  }
  template <int COUNT>
  METHOD void run(const float* u, float* y) {
    UNROLL for (int t = 0; t < COUNT; t++) {
      advance<1>(u + t);
      y[t] = 0;
      UNROLL for (int m = 0; m < M; m++)
        y[t] += c.re[m] * h.re[m], y[t] += c.im[m] * h.im[m];
    }
  }
};

// What every span but the last of a sequence adds to the state after it.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) diagonal_ssm_carry(const __grid_constant__ System p) {
  SHARED_MEMORY(memory);
  Tile& shared = reinterpret_cast<Tile*>(memory)[threadIdx.x / 32];
  const Lane l(p);
  const Span span(p, blockIdx.x / Lane::blocks(p));
  if (l.width <= 0 || span.end == span.length) return;
  State s;
  s.a.load(p, l, p.a);
  const Input us(p.u, p, l, span);
  Four<INPUT> u = us[span.begin + l.step];
  for (int t0 = span.begin; t0 < span.end; t0 += K) {  // whole tiles: only the last span of a sequence has others
    shared.put(l, u);
    __syncwarp();
    u = us[t0 + K + l.step];
    float in[4], next[4];
    read_floats<4>(shared.of(l), in);
#pragma unroll 1
    for (int t = 0; t < K; t += 4) {
      read_floats<4>(shared.of(l) + t + 4, next);
      s.advance<4>(in);
      UNROLL for (int i = 0; i < 4; i++)
        in[i] = next[i];
    }
    __syncwarp();
  }
  s.h.store(p, l, p.carry, span.number);
}

// From what each span adds, the state that enters it, for one mode of one sequence.
extern "C" __global__ void __launch_bounds__(256) diagonal_ssm_join(const __grid_constant__ System p) {
  const int64 size = p.width * p.modes, blocks = over(size, 256), i = blockIdx.x % blocks * 256 + threadIdx.x;
  if (i >= size) return;
  const Span all = Span::whole(p, blockIdx.x / blocks);
  const int64 spans = over(all.length, p.span);
  if (spans < 2) return;
  const Complex decay = power(load_complex(p.a + 2 * i), p.span);
  Complex h = load_complex(p.h0 + 2 * (all.sequence * size + i));
  for (int64 s = 0; s < spans; s++) {
    float* carry = p.carry + 2 * ((all.number + s) * size + i);
    const Complex added = s + 1 < spans ? load_complex(carry) : Complex{0, 0};
    store_complex(carry, h);
    const Complex kept = decay * h;
    h = {kept.re + added.re, kept.im + added.im};
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    diagonal_ssm_forward(const __grid_constant__ System p) {
  struct Shared {
    Tile u;
    Sums y;
  };
  SHARED_MEMORY(memory);
  Shared& shared = reinterpret_cast<Shared*>(memory)[threadIdx.x / 32];
  const Lane l(p);
  const Span span(p, blockIdx.x / Lane::blocks(p));
  if (l.width <= 0 || span.begin >= span.end) return;
  State s;
  s.a.load(p, l, p.a), s.c.load(p, l, p.c);
  UNROLL for (int m = 0; m < M; m++)
    s.c.re[m] *= 2, s.c.im[m] *= -2;
  s.h.load(p, l, span.begin == 0 ? p.h0 : p.carry, span.begin == 0 ? span.sequence : span.number);

  const Input us(p.u, p, l, span);
  const Output ys(p.y, p, l, span);
  Four<INPUT> u = us[span.begin + l.step];
  for (int t0 = span.begin; t0 < span.end; t0 += K) {
    shared.u.put(l, u);
    __syncwarp();
    u = us[t0 + K + l.step];
    const float* of = shared.u.of(l);
    float *to = shared.y.of(l), in[4], next[4], y[4];
    const int count = least(span.end - t0, K);
    int t = 0;
    read_floats<4>(of, in);
#pragma unroll 1
    for (; t + 4 <= count; t += 4) {
      read_floats<4>(of + t + 4, next);
      s.run<4>(in, y);
      write_floats<4>(to + t, y);
      UNROLL for (int i = 0; i < 4; i++)
        in[i] = next[i];
    }
#pragma unroll 1
    for (; t < count; t++) s.run<1>(of + t, to + t);
    __syncwarp();
    shared.y.read(l, y);
    ys.put(t0 + l.step, y);
  }
  if (span.end == span.length) s.h.store(p, l, p.final, span.sequence);
}
