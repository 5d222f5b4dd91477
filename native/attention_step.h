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

// Reads ahead: the lines of memory that will be read, as many at a time as others are read meanwhile.
struct Ahead {
  const char *at, *end;
  inline __attribute__((always_inline)) void fetch(int64_t bytes) {
    for (const char* to = at + bytes; at < to && at < end; at += LINE) __builtin_prefetch(at, 0, 2);
  }
};

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
    for (int j = 0; j < K; j++)
      sums[j] = fma(dense::widen_some<T>(key[j] + i, P - i), load_some(q + i, P - i), sums[j]);
  dense::totals(sums, scores);
}

// y = keep y + sum_i weights[i] values[i] of `count` slots, N vectors from number `from` on.
template <int N, class T, class C>
INLINE void add_values(const T* weights, dense::Lines<C> values, int64_t count, int64_t from, T keep, Ahead& ahead,
                       T* y) {
  constexpr int L = LANES<T>;
  vec<T> sums[N];
  for (int j = 0; j < N; j++) sums[j] = load(y + from + j * L) * keep;
  for (int64_t i = 0; i < count; i++) {
    const vec<T> weight = splat(weights[i]);
    ahead.fetch(N * L * int64_t(sizeof(C)));
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sums[j] = fma(weight, dense::widen(values[i] + from + j * L), sums[j]);
  }
  for (int j = 0; j < N; j++) store(y + from + j * L, sums[j]);
}

// The sum of what a head has seen: of e^(score - greatest), and of that times the values.
template <class T>
struct Sum {
  T greatest, total;
  T* y;
};

// Adds `count` slots, SLOTS at most. The order of sums follows from the slots alone.
template <class T, class C>
INLINE void attend(const AttentionStep& s, const T* q, dense::Lines<C> keys, dense::Lines<C> values, int64_t count,
                   Ahead& next_keys, Ahead& next_values, Sum<T>& sum) {
  constexpr int L = LANES<T>;
  constexpr T LOWEST = -std::numeric_limits<T>::infinity();
  const int64_t P = s.width, V = s.values, wide = up(count, L);
  const T scale = T(s.scale), cap = T(s.softcap);
  T scores[SLOTS + L], lanes[L];
  for (int64_t i = 0; i < count; i += dense::OUTPUTS) {
    next_keys.fetch(dense::OUTPUTS * P * int64_t(sizeof(C)));
    products(q, keys, i, least(dense::OUTPUTS, count - i), P, scores + i);
  }
  for (int64_t i = 0; cap > 0 && i < count; i++) scores[i] = cap * std::tanh(scores[i] * scale / cap);
  for (int64_t i = count; i < wide; i++) scores[i] = LOWEST;
  vec<T> best = splat(sum.greatest), sums = {};
  for (int64_t i = 0; i < wide; i += L) {
    const vec<T> some = cap > 0 ? load(scores + i) : load(scores + i) * scale;
    store(scores + i, some);
    best = some > best ? some : best;
  }
  store(lanes, best);
  T greatest = lanes[0];
  for (int i = 1; i < L; i++) greatest = lanes[i] > greatest ? lanes[i] : greatest;
  for (int64_t i = 0; i < wide; i += L) {
    const vec<T> some = load(scores + i), weights = exp2<T>((some - greatest) * T(LOG2_E));
    const vec<T> kept = some == LOWEST ? vec<T>{} : weights;  // exp2 gives a little more than 0
    store(scores + i, kept);
    sums += kept;
  }
  store(lanes, sums);
  for (int i = 1; i < L; i++) lanes[0] += lanes[i];
  T keep[L] = {(sum.greatest - greatest) * T(LOG2_E)};
  store(keep, exp2<T>(load(keep)));
  if (sum.greatest == LOWEST) keep[0] = 0;
  sum.total = sum.total * keep[0] + lanes[0], sum.greatest = greatest;
  int64_t i = 0;
  for (; i + 4 * L <= V; i += 4 * L) add_values<4>(scores, values, count, i, keep[0], next_values, sum.y);
  for (; i + L <= V; i += L) add_values<1>(scores, values, count, i, keep[0], next_values, sum.y);
  for (; i < V; i++) {
    T one = sum.y[i] * keep[0];
    for (int64_t j = 0; j < count; j++) one += scores[j] * number(values[j][i]);
    sum.y[i] = one;
  }
}

// The heads of the groups [first, end) in a row: new keys and values go to their slot, and are attended to like the
// others. A line of memory is read once for all heads.
template <class T, class C>
INLINE void attend_groups(const AttentionStep& s, int64_t row, int64_t first, int64_t end, const T* turn, T* line, T* y,
                          Sum<T>* sums) {
  const int64_t H = s.heads, G = s.groups, P = s.width, V = s.values, S = s.slots, each = H / G;
  const int64_t seen = s.length[row], slot = s.ring ? seen % S : seen, count = least(seen + 1, S);
  C *keys = static_cast<C*>(s.k) + row * S * G * P, *values = static_cast<C*>(s.v) + row * S * G * V;
  T *key = line + H * P, *value = key + G * P;
  for (int64_t g = first; g < end; g++) {
    turn_pairs(s, turn, key + g * P);
    for (int64_t i = 0; i < P; i++) put(keys + (slot * G + g) * P + i, key[g * P + i]);
    for (int64_t i = 0; i < V; i++) put(values + (slot * G + g) * V + i, value[g * V + i]);
  }
  for (int64_t head = first * each; head < end * each; head++) {
    turn_pairs(s, turn, line + head * P);
    sums[head] = {-std::numeric_limits<T>::infinity(), 0, y + head * V};
    for (int64_t i = 0; i < V; i++) sums[head].y[i] = 0;
  }
  for (int64_t from = 0; from < count; from += SLOTS) {
    const int64_t here = least(SLOTS, count - from), then = most(least(SLOTS, count - from - SLOTS), 0);
    const bool all = first == 0 && end == G;  // whose keys lie side by side
    const C *k = keys + (from + here) * G * P, *v = values + (from + here) * G * V;
    Ahead next_keys = {reinterpret_cast<const char*>(k), reinterpret_cast<const char*>(k + (all ? then : 0) * G * P)};
    Ahead next_values = {reinterpret_cast<const char*>(v), reinterpret_cast<const char*>(v + (all ? then : 0) * G * V)};
    for (int64_t head = first * each; head < end * each; head++) {
      const int64_t g = head / each;
      const dense::Lines<C> k_of = {keys + (from * G + g) * P, G * P}, v_of = {values + (from * G + g) * V, G * V};
      attend<T, C>(s, line + head * P, k_of, v_of, here, next_keys, next_values, sums[head]);
    }
  }
  for (int64_t head = first * each; head < end * each; head++) {
    const T share = T(1) / sums[head].total;
    for (int64_t i = 0; i < V; i++) sums[head].y[i] *= share;
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
  Sum<T>* sums = arena.take<Sum<T>>(rows * s.heads);
  if (!memory) return arena.used();
  if (phase == 0) {
    enter(s, Span{0, rows}, first, end, normed);
    for (int64_t row = first; row < end; row++) turns(s, row, turn + row * 2 * s.turned);
  }
  if (phase == 1) {
    const T* bias = static_cast<const T*>(s.in_bias);
    product(map<T>(s, s.in_weight, s.in_scales, M, all), Lines<T>{normed, M}, rows, first, end,
            [&](int64_t output, int64_t row, T sum) { made[row * all + output] = bias ? sum + bias[output] : sum; });
  }
  if (phase == 2)
    with_caches<T>(s, [&](auto cache) {
      for (int64_t row = first / G; row * G < end; row++)
        attend_groups<T, decltype(cache)>(s, row, most(first - row * G, 0), least(end - row * G, G),
                                          turn + row * 2 * s.turned, made + row * all, y + row * D,
                                          sums + row * s.heads);
    });
  if (phase == 3) {
    leave(s, map<T>(s, s.out_weight, s.out_scales, D, M), Lines<T>{y, D}, Span{0, rows}, first, end);
    for (int64_t row = 0; first == 0 && row < rows; row++) s.next_length[row] = s.length[row] + 1;
  }
  return 0;
}

}  // namespace block
}  // namespace DUALFORM_ISA
