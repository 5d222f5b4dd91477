// The backward, without the states: from the last step of a span to the first, with
//
//     p_t = dy_t + conj(A) p_{t+1},   q_t = p_{t+1} + conj(A) q_{t+1},
//
// the gradient of h_t is g_t = 2 conj(C) p_t. Those of the input, of C and of A are Re sum_n g_t and the sums over time
// of 2 u_t p_t and 2 conj(C) u_t q_t, since q is the derivative of p by conj(A). The gradient F of the final state adds
// f_t = conj(A)^(T-t) F to g_t, of which r_t = f_{t+1} + conj(A) r_{t+1} is what q is of p; where no channel of a warp
// has one, as in most training, WITH_FINAL is false and they are left out.
#include "diagonal_ssm.cuh"

struct Adjoint {
  Modes a, c, p, q, up, uq, f, r, ur;  // c: 2 C; up, uq, ur: sums of u times p, q, r
  template <int COUNT>
  METHOD void advance(const float* dy) {
    UNROLL for (int t = COUNT - 1; t >= 0; t--) UNROLL
      for (int m = 0; m < M; m++) back(m, dy[t]);
  }
  template <int COUNT>
  METHOD void run(const float* u, const float* dy, float* du) {
    UNROLL for (int t = COUNT - 1; t >= 0; t--) {
      float sum = 0;
      UNROLL for (int m = 0; m < M; m++) {
        back(m, dy[t]);
        up.re[m] += u[t] * p.re[m], up.im[m] += u[t] * p.im[m];
        uq.re[m] += u[t] * q.re[m], uq.im[m] += u[t] * q.im[m];
        sum += c.re[m] * p.re[m], sum += c.im[m] * p.im[m];
        if (WITH_FINAL) {
          ur.re[m] += u[t] * r.re[m], ur.im[m] += u[t] * r.im[m];
          sum += f.re[m];
          conjugate(m, r, f.re[m], f.im[m]);
          conjugate(m, f, 0, 0);
        }
      }
      du[t] = sum;
    }
  }
  // The state before the first step is an input, too.
  METHOD void enter(const Modes& h0, Modes& dh0) {
    UNROLL for (int m = 0; m < M; m++) {
      back(m, 0);
      times_conjugate(h0, p, up, m), times_conjugate(h0, q, uq, m);
      if (WITH_FINAL) times_conjugate(h0, r, ur, m), dh0.re[m] = f.re[m], dh0.im[m] = f.im[m];
      times_conjugate(c, p, dh0, m);
    }
  }
  // The gradients of A and C.
  METHOD void finish(Modes& da, Modes& dc) const {
    UNROLL for (int m = 0; m < M; m++) {
      if (WITH_FINAL) da.re[m] = ur.re[m], da.im[m] = ur.im[m];
      times_conjugate(c, uq, da, m);
      dc.re[m] = 2 * up.re[m], dc.im[m] = 2 * up.im[m];
    }
  }

 private:
  // x = conj(A) x + y
  METHOD void conjugate(int m, Modes& x, float re, float im) {
    const float next = re + a.re[m] * x.re[m] + a.im[m] * x.im[m];
    x.im[m] = im + a.re[m] * x.im[m] - a.im[m] * x.re[m], x.re[m] = next;
  }
  METHOD void back(int m, float dy) {
    conjugate(m, q, p.re[m], p.im[m]);
    conjugate(m, p, dy, 0);
  }
  // sum += conj(x) y
  METHOD static void times_conjugate(const Modes& x, const Modes& y, Modes& sum, int m) {
    sum.re[m] += x.re[m] * y.re[m] + x.im[m] * y.im[m];
    sum.im[m] += x.re[m] * y.im[m] - x.im[m] * y.re[m];
  }
};

// What every span but the first of a sequence adds to p and q before it.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    diagonal_ssm_backward_carry(const __grid_constant__ System p) {
  SHARED_MEMORY(memory);
  Tile& shared = reinterpret_cast<Tile*>(memory)[threadIdx.x / 32];
  const Lane l(p);
  const Span span(p, blockIdx.x / Lane::blocks(p));
  if (l.width <= 0 || span.begin == 0 || span.begin >= span.end) return;
  Adjoint s;
  s.a.load(p, l, p.a);
  const Input dys(p.dy, p, l, span);
  int t0 = span.begin + (span.end - span.begin - 1) / K * K;
  Four<INPUT> dy = dys[t0 + l.step];
  for (; t0 >= span.begin; t0 -= K) {
    shared.put(l, dy);
    __syncwarp();
    dy = dys[t0 - K + l.step];
    const float* of = shared.of(l);
    float in[4], next[4];
    int t = least(span.end - t0, K);
#pragma unroll 1
    for (; t % 4; t--) s.advance<1>(of + t - 1);
    if (t) read_floats<4>(of + t - 4, in);
#pragma unroll 1
    for (; t; t -= 4) {
      read_floats<4>(of + (t > 4 ? t - 8 : 0), next);
      s.advance<4>(in);
      UNROLL for (int i = 0; i < 4; i++)
        in[i] = next[i];
    }
    __syncwarp();
  }
  s.p.store(p, l, p.carry, span.number), s.q.store(p, l, p.carry_q, span.number);
}

// From what each span adds, p and q after it, for one mode of one sequence.
extern "C" __global__ void __launch_bounds__(256) diagonal_ssm_backward_join(const __grid_constant__ System p) {
  const int64 size = p.width * p.modes, blocks = over(size, 256), i = blockIdx.x % blocks * 256 + threadIdx.x;
  if (i >= size) return;
  const Span all = Span::whole(p, blockIdx.x / blocks);
  const int64 spans = over(all.length, p.span);
  if (spans < 2) return;
  const Complex a = {p.a[2 * i], -p.a[2 * i + 1]}, before = power(a, p.span - 1), decay = before * a;
  Complex after_p = {0, 0}, after_q = {0, 0};
  for (int64 s = spans - 1; s >= 0; s--) {
    float *carry = p.carry + 2 * ((all.number + s) * size + i),
          *carry_q = p.carry_q + 2 * ((all.number + s) * size + i);
    const Complex added_p = s > 0 ? load_complex(carry) : Complex{0, 0};
    const Complex added_q = s > 0 ? load_complex(carry_q) : Complex{0, 0};
    store_complex(carry, after_p), store_complex(carry_q, after_q);
    const Complex kept_p = decay * after_p, kept_q = decay * after_q, driven = before * after_p;
    after_q = {kept_q.re + added_q.re + p.span * driven.re, kept_q.im + added_q.im + p.span * driven.im};
    after_p = {kept_p.re + added_p.re, kept_p.im + added_p.im};
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    diagonal_ssm_backward(const __grid_constant__ System p) {
  struct Shared {
    Tile u, dy;
    Sums du;
  };
  SHARED_MEMORY(memory);
  Shared& shared = reinterpret_cast<Shared*>(memory)[threadIdx.x / 32];
  const Lane l(p);
  const Span span(p, blockIdx.x / Lane::blocks(p));
  if (l.width <= 0) return;
  Adjoint s;
  bool some = false;
  s.f.load(p, l, p.dfinal, span.sequence);
  UNROLL for (int m = 0; m < M; m++)
    some |= s.f.re[m] != 0 || s.f.im[m] != 0;
  if (in_any_lane(some) != WITH_FINAL) return;
  s.a.load(p, l, p.a), s.c.load(p, l, p.c);
  UNROLL for (int m = 0; m < M; m++)
    s.c.re[m] *= 2, s.c.im[m] *= 2;
  if (span.end < span.length) {
    s.p.load(p, l, p.carry, span.number), s.q.load(p, l, p.carry_q, span.number);
    if (WITH_FINAL) {
      const double steps = span.length - span.end;
      UNROLL for (int m = 0; m < M; m++) {
        const Complex a = {s.a.re[m], -s.a.im[m]}, f = {s.f.re[m], s.f.im[m]};
        const Complex driven = power(a, span.length - span.end - 1) * f, kept = a * driven;
        s.f.re[m] = float(kept.re), s.f.im[m] = float(kept.im);
        s.r.re[m] = float(steps * driven.re), s.r.im[m] = float(steps * driven.im);
      }
    }
  }

  if (span.begin < span.end) {
    const Input us(p.u, p, l, span), dys(p.dy, p, l, span);
    const Output dus(p.du, p, l, span);
    int t0 = span.begin + (span.end - span.begin - 1) / K * K;
    Four<INPUT> u = us[t0 + l.step], dy = dys[t0 + l.step];
    for (; t0 >= span.begin; t0 -= K) {
      shared.u.put(l, u), shared.dy.put(l, dy);
      __syncwarp();
      u = us[t0 - K + l.step], dy = dys[t0 - K + l.step];
      const float *of = shared.u.of(l), *of_dy = shared.dy.of(l);
      float *to = shared.du.of(l), in[4], in_dy[4], next[4], next_dy[4], du[4];
      int t = least(span.end - t0, K);
#pragma unroll 1
      for (; t % 4; t--) s.run<1>(of + t - 1, of_dy + t - 1, to + t - 1);
      if (t) read_floats<4>(of + t - 4, in), read_floats<4>(of_dy + t - 4, in_dy);
#pragma unroll 1
      for (; t; t -= 4) {
        const int before = t > 4 ? t - 8 : 0;
        read_floats<4>(of + before, next), read_floats<4>(of_dy + before, next_dy);
        s.run<4>(in, in_dy, du);
        write_floats<4>(to + t - 4, du);
        UNROLL for (int i = 0; i < 4; i++)
          in[i] = next[i], in_dy[i] = next_dy[i];
      }
      __syncwarp();
      shared.du.read(l, du);
      dus.put(t0 + l.step, du);
    }
    if (span.begin == 0) {
      Modes h0, dh0;
      h0.load(p, l, p.h0, span.sequence);
      s.enter(h0, dh0);
      dh0.store(p, l, p.dh0, span.sequence);
    }
  }
  Modes da, dc;
  s.finish(da, dc);
  da.store(p, l, p.da, span.number), dc.store(p, l, p.dc, span.number);
}
