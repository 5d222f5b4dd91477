// Markov chains of K states that are seen through log-likelihoods b: a filter, a smoother and the most likely path, a
// step after the other. A vector over the states lies in a few registers' worth of memory, padded to whole vectors, and
// a transition takes it to the next step by its rows: sums of products, or maxima of sums.
#pragma once

#include <cmath>

#include "tile.h"

namespace DUALFORM_ISA {
namespace markov {

// A sum of at least this is divided by after the product with a transition, beside which it is computed; less than that
// would take what a transition is to keep below the smallest number.
constexpr double ENOUGH = 1.0 / 1024;

constexpr int WAYS = WIDTH == 64 ? 4 : 2;  // sums of a vector at once, because one waits for itself
constexpr int64_t SPAN = 256;              // steps after which scores are taken relative to the best

template <class T>
INLINE const T* at(const View& view, int64_t row, int64_t t) {
  return static_cast<const T*>(view.data) + row * view.row + t * view.time;
}

// e^x of numbers that are not positive, within about 1 ulp; 0 below the normal numbers. NaN stays NaN.
template <class T>
INLINE vec<T> exponential(vec<T> x) {
  const T lowest = sizeof(T) == 8 ? T(-708) : T(-87);
  const vec<T> bounded = x < splat(lowest) ? splat(lowest) : x, y = bounded * T(LOG2_E);
  const vec<T> rest = fma(bounded, splat(T(LOG2_E)), -y) + bounded * T(LOG2_E - double(T(LOG2_E)));
  const vec<T> value = exp2<T>(y), exact = fma(value, rest * T(LN_2), value);
  return x < splat(lowest) ? vec<T>{} : exact;
}

// The sum and the largest of the lanes, and which of them are equal to a number, one bit for each.
#if defined(__AVX512F__)
INLINE float total(vec<float> v) { return _mm512_reduce_add_ps(v); }
INLINE double total(vec<double> v) { return _mm512_reduce_add_pd(v); }
INLINE float largest(vec<float> v) { return _mm512_reduce_max_ps(v); }
INLINE double largest(vec<double> v) { return _mm512_reduce_max_pd(v); }
INLINE uint64_t equal(vec<float> v, float x) { return _mm512_cmpeq_ps_mask(v, splat(x)); }
INLINE uint64_t equal(vec<double> v, double x) { return _mm512_cmpeq_pd_mask(v, splat(x)); }
#else
template <class V, class F>
INLINE auto folded(V v, const F& join) {
  constexpr int COUNT = sizeof(V) / sizeof(v[0]);
  auto found = v[0];
  for (int i = 1; i < COUNT; i++) found = join(found, v[i]);
  return found;
}
template <class V>
INLINE auto total(V v) {
  return folded(v, [](auto a, auto b) { return a + b; });
}
template <class V>
INLINE auto largest(V v) {
  return folded(v, [](auto a, auto b) { return a > b ? a : b; });
}
#if defined(__AVX2__)
INLINE uint64_t equal(vec<float> v, float x) { return _mm256_movemask_ps(_mm256_cmp_ps(v, splat(x), _CMP_EQ_OQ)); }
INLINE uint64_t equal(vec<double> v, double x) { return _mm256_movemask_pd(_mm256_cmp_pd(v, splat(x), _CMP_EQ_OQ)); }
#else
template <class V, class T>
INLINE uint64_t equal(V v, T x) {
  uint64_t found = 0;
  for (int i = 0; i < LANES<T>; i++) found |= uint64_t(v[i] == x) << i;
  return found;
}
#endif
#endif

struct Products {
  template <class T>
  INLINE vec<T> first() {
    return vec<T>{};
  }
  template <class V>
  INLINE V step(V sum, V x, V a) {
    return fma(x, a, sum);
  }
  template <class V>
  INLINE V join(V a, V b) {
    return a + b;
  }
};

struct Maxima {
  template <class T>
  INLINE vec<T> first() {
    return splat(T(-INFINITY));
  }
  template <class V>
  INLINE V step(V best, V x, V a) {
    return join(best, x + a);
  }
  template <class V>
  INLINE V join(V a, V b) {
    return a > b ? a : b;
  }
};

// Numbers [j, j + R vectors) of the product of x with `count` rows of `a`, which lie `stride` apart.
template <class By, int R, class T>
INLINE void block(const T* x, const T* a, int64_t stride, int64_t count, T* to) {
  constexpr int L = LANES<T>;
  vec<T> sum[WAYS][R];
#pragma GCC unroll 4
  for (int w = 0; w < WAYS; w++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[w][r] = By::template first<T>();
  int64_t i = 0;
  for (; i + WAYS <= count; i += WAYS) {
#pragma GCC unroll 4
    for (int w = 0; w < WAYS; w++) {
      const vec<T> each = splat(x[i + w]);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum[w][r] = By::step(sum[w][r], each, load(a + (i + w) * stride + r * L));
    }
  }
  for (; i < count; i++) {
    const vec<T> each = splat(x[i]);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[0][r] = By::step(sum[0][r], each, load(a + i * stride + r * L));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    vec<T> all = By::join(sum[0][r], sum[1][r]);
    if constexpr (WAYS == 4) all = By::join(all, By::join(sum[2][r], sum[3][r]));
    store(to + r * L, all);
  }
}

// x times `count` rows of `a`, each of whole vectors, by sums of products or by maxima of sums.
template <class By, class T>
INLINE void product(const T* x, const T* a, int64_t stride, int64_t count, T* to) {
  constexpr int L = LANES<T>;
  int64_t j = 0;
  for (; j + 4 * L <= stride; j += 4 * L) block<By, 4>(x, a + j, stride, count, to + j);
  if (j + 2 * L <= stride) block<By, 2>(x, a + j, stride, count, to + j), j += 2 * L;
  if (j < stride) block<By, 1>(x, a + j, stride, count, to + j);
}

// The sum of the products of x and a, whole vectors both.
template <class T>
INLINE T dot(const T* x, const T* a, int64_t padded) {
  vec<T> sum{};
  for (int64_t j = 0; j < padded; j += LANES<T>) sum = fma(load(x + j), load(a + j), sum);
  return total(sum);
}

// The transition after a step, with rows of whole vectors, which end in `nothing`. A constant one is laid out once. If
// most of its states lead to one other state alone, as those of a chain of durations do, only the other rows are.
template <class T>
class Moves {
 public:
  // `turned` lays columns out as rows.
  Moves(const MarkovChain& s, Arena& arena, T nothing, bool turned)
      : s_(s), nothing_(nothing), turned_(turned), stride_(up(s.states, LANES<T>)) {
    laid_ = arena.take<T>(s.states * stride_);
    some_ = arena.take<T>(s.states), only_ = arena.take<T>(s.states);
    which_ = arena.take<int64_t>(s.states), leads_ = arena.take<int64_t>(s.states);
    if (laid_)
      for (int64_t i = 0; i < s.states * stride_; i++) laid_[i] = nothing;
  }

  bool constant() const { return s_.a.time == 0; }

  // Before the first step of a row.
  void begin(int64_t row) {
    if (constant() && s_.length > 1 && row != row_ && (row_ < 0 || s_.a.row != 0)) {
      const T* a = at<T>(s_.a, row, 0);
      choose(a);
      lay(a, turned_ && !sparse());
    }
    row_ = row;
  }

  // x times the transition after step t.
  template <class By>
  void forward(int64_t t, const T* x, T* to) {
    const T* a = rows(t);
    if (!sparse()) return product<By>(x, a, stride_, s_.states, to);
    for (int64_t k = 0; k < count_; k++) some_[k] = x[which_[k]];
    product<By>(some_, a, stride_, count_, to);
    for (int64_t k = count_; k < s_.states; k++) {
      const int64_t i = which_[k], j = leads_[k];
      to[j] = By::step(to[j], x[i], only_[k]);
    }
  }

  // The transition after step t times x; turned.
  void backward(int64_t t, const T* x, T* to) {
    const T* a = rows(t);
    if (constant() && !sparse()) return product<Products>(x, a, stride_, s_.states, to);
    for (int64_t k = 0; k < count_; k++) to[which_[k]] = dot(x, a + k * stride_, stride_);
    for (int64_t k = count_; k < s_.states; k++) to[which_[k]] = x[leads_[k]] * only_[k];
  }

  const T* column(int64_t j) const { return laid_ + j * stride_; }  // of a constant one, turned, for maxima

 private:
  bool sparse() const { return count_ < s_.states; }

  // The rows that are laid out come first: all, or those that lead to several states.
  void choose(const T* a) {
    const int64_t n = s_.states;
    int64_t last = n;
    count_ = 0;
    for (int64_t i = 0; i < n; i++) {
      int64_t found = 0, to = 0;
      for (int64_t j = 0; j < n; j++)
        if (!(a[i * n + j] == nothing_)) found++, to = j;
      if (found == 1)
        which_[--last] = i, leads_[last] = to, only_[last] = a[i * n + to];
      else
        which_[count_++] = i;
    }
    if (2 * count_ > n || (turned_ && nothing_ != 0)) every();
  }
  void every() {
    count_ = s_.states;
    for (int64_t i = 0; i < count_; i++) which_[i] = i;
  }

  void lay(const T* a, bool turned) {
    const int64_t n = s_.states;
    for (int64_t k = 0; k < count_; k++)
      for (int64_t j = 0; j < n; j++) laid_[k * stride_ + j] = turned ? a[j * n + k] : a[which_[k] * n + j];
  }

  const T* rows(int64_t t) {
    if (constant()) return laid_;
    if (count_ != s_.states) every();
    const T* a = at<T>(s_.a, row_, t);
    if (s_.states == stride_) return a;
    lay(a, false);
    return laid_;
  }

  const MarkovChain& s_;
  const T nothing_;
  const bool turned_;
  const int64_t stride_;
  T *laid_, *some_, *only_;
  int64_t *which_, *leads_, count_ = 0, row_ = -1;
};

// exp(b - top) of a step, 0 behind the last state, and top, the largest of b, or 0 where that is not finite.
template <class T>
INLINE T likelihoods(const T* b, int64_t states, T* e) {
  constexpr int L = LANES<T>;
  const vec<T> nothing = splat(T(-INFINITY));
  vec<T> best = nothing;
  int64_t i = 0;
  for (; i + L <= states; i += L) best = Maxima::join(load(b + i), best);
  T tail[L];
  if (i < states) {
    store(tail, nothing);
    for (int64_t k = i; k < states; k++) tail[k - i] = b[k];
    best = Maxima::join(load(tail), best);
  }
  T top = largest(best);
  top = top - top == 0 ? top : 0;
  for (i = 0; i + L <= states; i += L) store(e + i, exponential<T>(load(b + i) - top));
  if (i < states) store(e + i, exponential<T>(load(tail) - top));
  return top;
}

// Copies a vector over the states to a tensor, times a factor.
template <class T>
INLINE void give(const T* from, T factor, int64_t states, T* to) {
  constexpr int L = LANES<T>;
  int64_t i = 0;
  for (; i + L <= states; i += L) store(to + i, load(from + i) * factor);
  for (; i < states; i++) to[i] = from[i] * factor;
}

// The product of x and y, elementwise, and its sum.
template <class T>
INLINE T multiply(const T* x, const T* y, int64_t padded, T* to) {
  constexpr int L = LANES<T>;
  vec<T> sum{};
  for (int64_t i = 0; i < padded; i += L) {
    const vec<T> joint = load(x + i) * load(y + i);
    store(to + i, joint);
    sum += joint;
  }
  return total(sum);
}

// lift(from, to) takes a vector over one transition, after which it is divided by its sum; or before, where that is
// small. Returns the reciprocal of the sum.
template <class T, class F>
INLINE T divided(T sum, T* joint, int64_t padded, const F& lift, T* to) {
  constexpr int L = LANES<T>;
  const T factor = T(1) / sum;
  if (!(sum >= T(ENOUGH))) {
    for (int64_t i = 0; i < padded; i += L) store(joint + i, load(joint + i) * factor);
    lift(joint, to);
    return 1;
  }
  lift(joint, to);
  for (int64_t i = 0; i < padded; i += L) store(to + i, load(to + i) * factor);
  return factor;
}

// p_t = v_t e_t / c_t and v_{t+1} = p_t A_t of rows [first, end).
template <class T>
int64_t filter(const MarkovChain& s, int64_t first, int64_t end, void* memory) {
  Arena arena(memory);
  const int64_t states = s.states, padded = up(states, LANES<T>);
  T *now = arena.take<T>(padded), *e = arena.take<T>(padded), *joint = arena.take<T>(padded);
  Moves<T> moves(s, arena, T(0), false);
  if (!memory) return arena.used();
  for (int64_t row = first; row < end; row++) {
    for (int64_t i = states; i < padded; i++) now[i] = 0;
    memcpy(now, static_cast<const T*>(s.start) + row * states, states * sizeof(T));
    moves.begin(row);
    for (int64_t t = 0; t < s.length; t++) {
      const int64_t step = row * s.length + t;
      const T top = likelihoods(at<T>(s.b, row, t), states, e), sum = multiply(now, e, padded, joint);
      T factor = T(1) / sum;
      if (t + 1 < s.length) {
        auto lift = [&](const T* x, T* to)
                        __attribute__((always_inline)) { moves.template forward<Products>(t, x, to); };
        factor = divided(sum, joint, padded, lift, now);
      }
      give(joint, factor, states, static_cast<T*>(s.p) + step * states);
      static_cast<T*>(s.sum)[step] = sum;
      static_cast<T*>(s.top)[step] = top;
    }
  }
  return 0;
}

// From the last step of rows [first, end) back: what A_t after_{t+1} says of each state, 1 at the end, times p_t gives
// the posterior, times e_t what the step before it reads.
template <class T>
int64_t smooth(const MarkovChain& s, int64_t first, int64_t end, void* memory) {
  Arena arena(memory);
  const int64_t states = s.states, padded = up(states, LANES<T>);
  T *reached = arena.take<T>(padded), *e = arena.take<T>(padded), *joint = arena.take<T>(padded);
  T* p = arena.take<T>(padded);
  Moves<T> moves(s, arena, T(0), true);
  if (!memory) return arena.used();
  for (int64_t i = states; i < padded; i++) p[i] = 0;
  for (int64_t row = first; row < end; row++) {
    moves.begin(row);
    for (int64_t i = 0; i < padded; i++) reached[i] = i < states ? 1 : 0;
    for (int64_t t = s.length - 1; t >= 0; t--) {
      const int64_t step = row * s.length + t;
      memcpy(p, static_cast<const T*>(s.p) + step * states, states * sizeof(T));
      const T weight = multiply(reached, p, padded, joint);
      give(joint, T(1) / weight, states, static_cast<T*>(s.probs) + step * states);
      static_cast<T*>(s.weight)[step] = weight;
      if (!t && !s.after) break;
      likelihoods(at<T>(s.b, row, t), states, e);
      const T sum = multiply(reached, e, padded, joint);
      T factor = T(1) / sum;
      if (t) {
        auto lift = [&](const T* x, T* to) __attribute__((always_inline)) { moves.backward(t - 1, x, to); };
        factor = divided(sum, joint, padded, lift, reached);
      }
      if (s.after) give(joint, factor, states, static_cast<T*>(s.after) + step * states);
    }
  }
  return 0;
}

// Which of the numbers is the greatest; the first one where there are several.
template <class T>
INLINE int64_t best_of(const T* x, int64_t padded, int64_t states) {
  constexpr int L = LANES<T>;
  vec<T> best = load(x);
  for (int64_t i = L; i < padded; i += L) best = Maxima::join(load(x + i), best);
  const T top = largest(best);
  for (int64_t begin = 0; begin < padded; begin += 64) {
    uint64_t found = 0;
    for (int64_t i = begin; i < least(begin + 64, padded); i += L) found |= equal(load(x + i), top) << (i - begin);
    if (found) return begin + __builtin_ctzll(found) < states ? begin + __builtin_ctzll(found) : 0;
  }
  return 0;
}

// The scores of the best paths into every state, of steps [begin, end); `before` are those of the step before.
template <class T>
INLINE void best_scores(const MarkovChain& s, Moves<T>& moves, int64_t row, int64_t begin, int64_t end, const T* before,
                        T* scores, T* now) {
  constexpr int L = LANES<T>;
  const int64_t states = s.states, padded = up(states, L);
  for (int64_t t = begin; t < end; t++) {
    const T* b = at<T>(s.b, row, t);
    if (t)
      moves.template forward<Maxima>(t - 1, before, now);
    else
      memcpy(now, static_cast<const T*>(s.start) + row * states, states * sizeof(T));
    int64_t i = 0;
    for (; i + L <= states; i += L) store(scores + i, load(now + i) + load(b + i));
    for (; i < padded; i++) scores[i] = i < states ? now[i] + b[i] : T(-INFINITY);
    if (t % SPAN == SPAN - 1) {
      const T top = scores[best_of(scores, padded, states)];
      if (top - top == 0)
        for (i = 0; i < padded; i += L) store(scores + i, load(scores + i) - top);
    }
    before = scores;
    scores += padded;
  }
}

// The path of the greatest probability, of rows [first, end). The way back asks of one state at each step where its
// best path came from, by the scores of a span of steps, which are computed again from what the span before it ended
// in. `a` and `start` are logarithms.
template <class T>
int64_t path(const MarkovChain& s, int64_t first, int64_t end, void* memory) {
  constexpr int L = LANES<T>;
  Arena arena(memory);
  const int64_t states = s.states, padded = up(states, L);
  T *now = arena.take<T>(padded), *scores = arena.take<T>(SPAN * padded);
  T* ends = arena.take<T>((s.length / SPAN + 1) * padded);  // of every span but the last
  Moves<T> moves(s, arena, T(-INFINITY), false), columns(s, arena, T(-INFINITY), true);
  if (!memory) return arena.used();
  for (int64_t row = first; row < end; row++) {
    const int64_t length = s.lengths ? s.lengths[row] : s.length;
    int64_t *to = s.path + row * s.length, state = 0;
    for (int64_t t = length; t < s.length; t++) to[t] = -1;
    T* found = static_cast<T*>(s.score) + row;
    *found = 0;
    if (!length) continue;
    moves.begin(row), columns.begin(row);
    const int64_t last = (length - 1) / SPAN;
    for (int64_t span = 0; span <= last; span++) {
      const int64_t begin = span * SPAN, stop = least(begin + SPAN, length);
      best_scores(s, moves, row, begin, stop, ends + (span - 1) * padded, scores, now);
      if (span < last) memcpy(ends + span * padded, scores + (SPAN - 1) * padded, padded * sizeof(T));
    }
    double score = 0;
    for (int64_t t = length - 1; t >= 0; t--) {
      if (t % SPAN == SPAN - 1 && t < length - 1)
        best_scores(s, moves, row, t + 1 - SPAN, t + 1, ends + (t / SPAN - 1) * padded, scores, now);
      const T* from = scores + t % SPAN * padded;
      if (t == length - 1) {
        state = best_of(from, padded, states);
      } else {
        const int64_t after = state;
        const T* column = columns.constant() ? columns.column(after) : at<T>(s.a, row, t) + after;
        if (columns.constant())
          for (int64_t i = 0; i < padded; i += L) store(now + i, load(from + i) + load(column + i));
        else
          for (int64_t i = 0; i < padded; i++) now[i] = i < states ? from[i] + column[i * states] : T(-INFINITY);
        state = best_of(now, padded, states);
        score += double(at<T>(s.a, row, t)[state * states + after]);
      }
      score += double(at<T>(s.b, row, t)[state]);
      to[t] = state;
    }
    *found = T(score + double(static_cast<const T*>(s.start)[row * states + state]));
  }
  return 0;
}

}  // namespace markov
}  // namespace DUALFORM_ISA
