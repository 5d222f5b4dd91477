// y = norm(v) weight + bias over every slice of a row: v = x + residual, v = x silu(z), or v = x with the gate behind
// the norm; and its backward, which computes the statistics anew. A slice stays in a core's cache while it is passed
// through several times.
#pragma once

#include <cmath>

#include "tile.h"

namespace DUALFORM_ISA {
namespace norm {

enum Gate { NONE, BEFORE, AFTER };

// Calls f(i, count, slot) for every vector of a slice: `count` lanes of it are numbers, and vectors of different slots
// may be summed side by side.
constexpr int SLOTS = 4;
template <class T, class F>
INLINE void along(int64_t size, const F& f) {
  constexpr int L = LANES<T>;
  int64_t i = 0;
  for (; i + SLOTS * L <= size; i += SLOTS * L) {
    f(i, L, 0);
    f(i + L, L, 1);
    f(i + 2 * L, L, 2);
    f(i + 3 * L, L, 3);
  }
  for (; i + L <= size; i += L) f(i, L, 0);
  if (i < size) f(i, size - i, 1);
}
#define EACH [&](int64_t i, int64_t count, [[maybe_unused]] int slot) __attribute__((always_inline))

template <class T>
INLINE T total(const vec<T>* slots) {
  T lanes[LANES<T>], sum = 0;
  store(lanes, (slots[0] + slots[1]) + (slots[2] + slots[3]));
  for (int i = 0; i < LANES<T>; i++) sum += lanes[i];
  return sum;
}

// The lanes that are numbers; the others become 0.
template <class T>
INLINE vec<T> only(vec<T> v, int64_t count) {
  if (count >= LANES<T>) return v;
  T lanes[LANES<T>];
  store(lanes, v);
  return load_some(lanes, count);
}

template <class T>
INLINE T mean(const T* v, int64_t size) {
  vec<T> sums[SLOTS] = {};
  along<T>(size, EACH { sums[slot] += load_some(v + i, count); });
  return total<T>(sums) / T(size);
}

// v = x + residual, or x silu(z): where it is one of them, into `scratch`.
template <class T, int GATE>
INLINE const T* normalised(const Norm& s, const Window& w, const T* x, const T* gate, T* scratch) {
  const int64_t size = w.count;
  if (GATE == BEFORE) {
    along<T>(size, EACH { store_some(scratch + i, load_some(x + i, count) * load_some(gate + i, count), count); });
    return scratch;
  }
  if (!s.residual.data) return x;
  const T* more = read(s.residual, w, scratch)[0];
  along<T>(size, EACH { store_some(scratch + i, load_some(x + i, count) + load_some(more + i, count), count); });
  return scratch;
}

INLINE Window window(const Norm& s, int64_t row, int64_t slice) {
  const int64_t size = s.width / s.groups;
  return {row, 0, 1, slice * size, size, size};
}

template <class T, bool CENTER, int GATE>
int64_t forward_as(const Norm& s, int64_t first, int64_t end, void* memory) {
  const int64_t size = s.width / s.groups, padded = up(size, LANES<T>);
  Arena arena(memory);
  T *x_copy = arena.take<T>(padded), *v_copy = arena.take<T>(padded), *y_copy = arena.take<T>(padded);
  T *z_copy = arena.take<T>(padded), *gate = arena.take<T>(padded);
  if (!memory) return arena.used();

  for (int64_t row = first; row < end; row++)
    for (int64_t slice = 0; slice < s.groups; slice++) {
      const Window w = window(s, row, slice);
      const T* x = read(s.x, w, x_copy)[0];
      if (GATE != NONE) {
        const T* z = read(s.z, w, z_copy)[0];
        along<T>(size, EACH { store_some(gate + i, silu<T>(load_some(z + i, count)), count); });
      }
      const T* v = normalised<T, GATE>(s, w, x, gate, v_copy);
      if (s.r.data) write(s.r, w, Rows<T>{v_copy, padded});
      const T middle = CENTER ? mean(v, size) : T(0);
      vec<T> squares[SLOTS] = {};
      along<T>(
          size, EACH {
            vec<T> c = load_some(v + i, count);
            if (CENTER) c = only<T>(c - middle, count);
            squares[slot] = fma(c, c, squares[slot]);
          });
      const T scale = T(1) / std::sqrt(total<T>(squares) / T(size) + T(s.eps));
      const T* weight = static_cast<const T*>(s.weight) + w.first;
      const T* bias = s.bias ? static_cast<const T*>(s.bias) + w.first : nullptr;
      const Rows<T> y = target(s.y, w, y_copy);
      T* to = y[0];
      along<T>(
          size, EACH {
            vec<T> n = load_some(v + i, count);
            if (CENTER) n -= middle;
            n = n * scale * load_some(weight + i, count);
            if (bias) n += load_some(bias + i, count);
            if (GATE == AFTER) n *= load_some(gate + i, count);
            store_some(to + i, n, count);
          });
      write(s.y, w, y);
    }
  end_stream();
  return 0;
}

template <class T, bool CENTER, int GATE>
int64_t backward_as(const Norm& s, int64_t first, int64_t end, T* dweight, T* dbias, void* memory) {
  const int64_t size = s.width / s.groups, padded = up(size, LANES<T>);
  Arena arena(memory);
  T *x_copy = arena.take<T>(padded), *v_copy = arena.take<T>(padded), *dy_copy = arena.take<T>(padded);
  T *dr_copy = arena.take<T>(padded), *dx_copy = arena.take<T>(padded), *dz_copy = arena.take<T>(padded);
  T *z_copy = arena.take<T>(padded), *gate = arena.take<T>(padded), *slope = arena.take<T>(padded);
  T *sums_weight = arena.take<T>(s.width), *sums_bias = arena.take<T>(s.width);
  if (!memory) return arena.used();

  memset(sums_weight, 0, sizeof(T) * s.width);
  memset(sums_bias, 0, sizeof(T) * s.width);
  for (int64_t row = first; row < end; row++)
    for (int64_t slice = 0; slice < s.groups; slice++) {
      const Window w = window(s, row, slice);
      const T *x = read(s.x, w, x_copy)[0], *dy = read(s.dy, w, dy_copy)[0];
      if (GATE != NONE) {
        const T* z = read(s.z, w, z_copy)[0];
        along<T>(
            size, EACH {
              const Curve<T> curve = silu_curve<T>(load_some(z + i, count));
              store_some(gate + i, curve.value, count), store_some(slope + i, curve.slope, count);
            });
      }
      const T* v = normalised<T, GATE>(s, w, x, gate, v_copy);
      const T* weight = static_cast<const T*>(s.weight) + w.first;
      const T* bias = s.bias ? static_cast<const T*>(s.bias) + w.first : nullptr;

      // With c = v - mean and g = dy weight, before the gate that is behind: the sums of c^2, g c and g.
      const T middle = CENTER ? mean(v, size) : T(0);
      vec<T> squares[SLOTS] = {}, products[SLOTS] = {}, slopes[SLOTS] = {};
      along<T>(
          size, EACH {
            vec<T> c = load_some(v + i, count), g = load_some(dy + i, count) * load_some(weight + i, count);
            if (CENTER) c = only<T>(c - middle, count);
            if (GATE == AFTER) g *= load_some(gate + i, count);
            squares[slot] = fma(c, c, squares[slot]);
            products[slot] = fma(g, c, products[slot]);
            if (CENTER) slopes[slot] += g;
          });
      const T scale = T(1) / std::sqrt(total<T>(squares) / T(size) + T(s.eps));
      const T along_n = total<T>(products) * scale / T(size), along_1 = CENTER ? total<T>(slopes) / T(size) : T(0);

      const T* dr = s.dr.data ? read(s.dr, w, dr_copy)[0] : nullptr;
      const Rows<T> dx = target(s.dx, w, dx_copy), dz = GATE == NONE ? Rows<T>{} : target(s.dz, w, dz_copy);
      T *to = dx[0], *to_z = dz.data;
      T *to_weight = sums_weight + w.first, *to_bias = sums_bias + w.first;
      along<T>(
          size, EACH {
            vec<T> n = load_some(v + i, count), d = load_some(dy + i, count);
            if (CENTER) n -= middle;
            n *= scale;
            if (GATE == AFTER) {
              vec<T> u = n * load_some(weight + i, count);
              if (bias) u += load_some(bias + i, count);
              store_some(to_z + i, d * u * load_some(slope + i, count), count);
              d *= load_some(gate + i, count);
            }
            store_some(to_weight + i, fma(d, n, load_some(to_weight + i, count)), count);
            store_some(to_bias + i, load_some(to_bias + i, count) + d, count);
            vec<T> dv = d * load_some(weight + i, count) - n * along_n;
            if (CENTER) dv -= along_1;
            dv *= scale;
            if (GATE == BEFORE) {
              store_some(to_z + i, dv * load_some(x + i, count) * load_some(slope + i, count), count);
              dv *= load_some(gate + i, count);
            }
            if (dr) dv += load_some(dr + i, count);
            store_some(to + i, dv, count);
          });
      if (s.dresidual.data) write(s.dresidual, w, dx);
      write(s.dx, w, dx);
      if (GATE != NONE) write(s.dz, w, dz);
    }
  memcpy(dweight, sums_weight, sizeof(T) * s.width);
  memcpy(dbias, sums_bias, sizeof(T) * s.width);
  end_stream();
  return 0;
}
#undef EACH

// Rows [first, end); `memory` as for the other kernels.
template <class T>
int64_t forward(const Norm& s, int64_t first, int64_t end, void* memory) {
  const int gate = !s.z.data ? NONE : s.norm_before_gate ? AFTER : BEFORE;
  auto kernel = gate == NONE    ? (s.center ? forward_as<T, true, NONE> : forward_as<T, false, NONE>)
                : gate == AFTER ? (s.center ? forward_as<T, true, AFTER> : forward_as<T, false, AFTER>)
                                : (s.center ? forward_as<T, true, BEFORE> : forward_as<T, false, BEFORE>);
  return kernel(s, first, end, memory);
}

// The same, with sums over these rows in `dweight` and `dbias`, (D).
template <class T>
int64_t backward(const Norm& s, int64_t first, int64_t end, void* dweight, void* dbias, void* memory) {
  const int gate = !s.z.data ? NONE : s.norm_before_gate ? AFTER : BEFORE;
  auto kernel = gate == NONE    ? (s.center ? backward_as<T, true, NONE> : backward_as<T, false, NONE>)
                : gate == AFTER ? (s.center ? backward_as<T, true, AFTER> : backward_as<T, false, AFTER>)
                                : (s.center ? backward_as<T, true, BEFORE> : backward_as<T, false, BEFORE>);
  return kernel(s, first, end, static_cast<T*>(dweight), static_cast<T*>(dbias), memory);
}

}  // namespace norm
}  // namespace DUALFORM_ISA
