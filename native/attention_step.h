// One step of a block with attention in it, in the phases of block.h.
#pragma once

#include <cmath>
#include <limits>

#include "activation.h"
#include "block.h"

namespace DUALFORM_ISA {
namespace block {

constexpr int64_t SLOTS = 64;  // whose scores are held at once

// cos and sin of the angles by which pairs of features turn at a position, R each.
template <class T>
INLINE void turns(const AttentionStep& s, int64_t row, T* to) {
  for (int64_t i = 0; i < s.turned; i++) {
    const double angle = double(s.length[row]) * s.frequencies[i];
    to[i] = T(s.magnitude * std::cos(angle)), to[s.turned + i] = T(s.magnitude * std::sin(angle));
  }
}

// Turns the pairs of a query or a key.
template <class T>
INLINE void turn_pairs(const AttentionStep& s, const T* by, T* x) {
  const int64_t R = s.turned, step = s.interleaved ? 2 : 1, apart = s.interleaved ? 1 : R;
  for (int64_t i = 0; i < R; i++) {
    T *p = x + i * step, *q = p + apart;
    const T a = *p, b = *q;
    *p = a * by[i] - b * by[R + i], *q = b * by[i] + a * by[R + i];
  }
}

// q . k of up to OUTPUTS slots from `slot` on.
template <class T, class C>
INLINE void products(const T* q, dense::Lines<C> keys, int64_t slot, int64_t count, int64_t P, T* scores) {
  constexpr int L = LANES<T>, K = dense::OUTPUTS;
  const C* key[K];
  for (int j = 0; j < K; j++) key[j] = keys[slot + least(j, count - 1)];
  vec<T> sums[K] = {};
  int64_t i = 0;
  for (; i + L <= P; i += L) {
    const vec<T> some = load(q + i);
#pragma GCC unroll 4
    for (int j = 0; j < K; j++) sums[j] = fma(dense::widen(key[j] + i), some, sums[j]);
  }
  if (i < P)
    for (int j = 0; j < K; j++) sums[j] = fma(dense::widen_some<T>(key[j] + i, P - i), load_some(q + i, P - i), sums[j]);
  dense::totals(sums, scores);
}

// y = keep y + sum_i weights[i] values[i], for `count` slots, and V numbers of a vector each or fewer.
template <int N, class T, class C>
INLINE void add_values(const T* weights, dense::Lines<C> values, int64_t count, int64_t from, T keep, T* y) {
  constexpr int L = LANES<T>;
  vec<T> sums[N];
  for (int j = 0; j < N; j++) sums[j] = load(y + from + j * L) * keep;
  for (int64_t i = 0; i < count; i++) {
    const vec<T> weight = splat(weights[i]);
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sums[j] = fma(weight, dense::widen(values[i] + from + j * L), sums[j]);
  }
  for (int j = 0; j < N; j++) store(y + from + j * L, sums[j]);
}

// softmax(scale q K^T) V over the first `count` slots, SLOTS at a time. The order of sums follows from the count alone.
template <class T, class C>
INLINE void attend(const AttentionStep& s, const T* q, dense::Lines<C> keys, dense::Lines<C> values, int64_t count,
                   T* y) {
  constexpr int L = LANES<T>;
  constexpr T LOWEST = -std::numeric_limits<T>::infinity();
  const int64_t P = s.width, V = s.values;
  const T scale = T(s.scale), cap = T(s.softcap);
  T scores[SLOTS + L] = {}, greatest = LOWEST, total = 0;
  for (int64_t i = 0; i < V; i++) y[i] = 0;
  for (int64_t first = 0; first < count; first += SLOTS) {
    const int64_t here = least(SLOTS, count - first);
    T best = greatest;
    for (int64_t i = 0; i < here; i += dense::OUTPUTS)
      products(q, keys, first + i, least(dense::OUTPUTS, here - i), P, scores + i);
    for (int64_t i = 0; i < here; i++) {
      scores[i] = cap > 0 ? cap * std::tanh(scores[i] * scale / cap) : scores[i] * scale;
      best = scores[i] > best ? scores[i] : best;
    }
    for (int64_t i = here; i < up(here, L); i++) scores[i] = LOWEST;
    vec<T> sums = {};
    for (int64_t i = 0; i < here; i += L) {
      const vec<T> weights = exp2<T>((load(scores + i) - best) * T(LOG2_E)),
                   kept = load(scores + i) == LOWEST ? vec<T>{} : weights;  // exp2 gives a little more than 0
      store(scores + i, kept);
      sums += kept;
    }
    T lanes[L], keep = 0;
    store(lanes, sums);
    for (int i = 1; i < L; i++) lanes[0] += lanes[i];
    if (greatest > LOWEST) {
      T both[L] = {(greatest - best) * T(LOG2_E)};
      store(both, exp2<T>(load(both)));
      keep = both[0];
    }
    total = total * keep + lanes[0], greatest = best;
    const dense::Lines<C> from = {values[first], values.stride};
    int64_t i = 0;
    for (; i + 4 * L <= V; i += 4 * L) add_values<4>(scores, from, here, i, keep, y);
    for (; i + L <= V; i += L) add_values<1>(scores, from, here, i, keep, y);
    for (; i < V; i++) {
      T sum = y[i] * keep;
      for (int64_t j = 0; j < here; j++) sum += scores[j] * number(from[j][i]);
      y[i] = sum;
    }
  }
  const T share = T(1) / total;
  for (int64_t i = 0; i < V; i++) y[i] *= share;
}

// The heads of group g in a row: the new key and value go to their slot, and are attended to like the others.
template <class T, class C>
INLINE void attend_group(const AttentionStep& s, int64_t row, int64_t g, const T* turn, T* line, T* y) {
  const int64_t H = s.heads, G = s.groups, P = s.width, V = s.values, S = s.slots, each = H / G;
  const int64_t seen = s.length[row], slot = s.ring ? seen % S : seen;
  const dense::Lines<C> keys = {static_cast<const C*>(s.k) + (row * S * G + g) * P, G * P};
  const dense::Lines<C> values = {static_cast<const C*>(s.v) + (row * S * G + g) * V, G * V};
  T *key = line + (H + g) * P, *value = line + (H + G) * P + g * V;
  C *key_to = const_cast<C*>(keys[slot]), *value_to = const_cast<C*>(values[slot]);
  turn_pairs(s, turn, key);
  for (int64_t i = 0; i < P; i++) put(key_to + i, key[i]);
  for (int64_t i = 0; i < V; i++) put(value_to + i, value[i]);
  for (int64_t head = g * each; head < (g + 1) * each; head++) {
    turn_pairs(s, turn, line + head * P);
    attend<T, C>(s, line + head * P, keys, values, least(seen + 1, S), y + head * V);
  }
}

// f(number) with a number of the type of the caches, as far as they are computed with in T.
template <class T, class F>
INLINE void with_caches(const AttentionStep& s, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(double());
  } else {
    if (s.caches == FLOAT32) f(float());
    if (s.caches == BFLOAT16) f(bfloat16());
    if (s.caches == FLOAT16) f(float16());
  }
}

// Phases: norms of rows, outputs of the projection in, groups of heads of all rows, M outputs.
template <class T>
int64_t attention(const AttentionStep& s, int64_t phase, int64_t first, int64_t end, void* memory) {
  const int64_t M = s.features, G = s.groups, rows = s.rows, D = s.heads * s.values;
  const int64_t all = (s.heads + G) * s.width + G * s.values;
  Arena arena(memory);
  T *normed = arena.take<T>(rows * M), *made = arena.take<T>(rows * all), *y = arena.take<T>(rows * D);
  T* turn = arena.take<T>(rows * 2 * s.turned);
  if (!memory) return arena.used();
  if (phase == 0) {
    enter(s, first, end, normed);
    for (int64_t row = first; row < end; row++) turns(s, row, turn + row * 2 * s.turned);
  }
  if (phase == 1) {
    const T* bias = static_cast<const T*>(s.in_bias);
    product(matrix(s, s.in_weight, s.in_scales, M), Lines<T>{normed, M}, M, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { made[row * all + output] = bias ? sum + bias[output] : sum; });
  }
  if (phase == 2)
    with_caches<T>(s, [&](auto cache) {
      for (int64_t unit = first; unit < end; unit++) {
        const int64_t row = unit / G;
        attend_group<T, decltype(cache)>(s, row, unit % G, turn + row * 2 * s.turned, made + row * all, y + row * D);
      }
    });
  if (phase == 3) {
    leave(s, Lines<T>{y, D}, D, first, end);
    for (int64_t row = 0; first == 0 && row < rows; row++) s.next_length[row] = s.length[row] + 1;
  }
  return 0;
}

}  // namespace block
}  // namespace DUALFORM_ISA
