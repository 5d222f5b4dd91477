// The draw of tokens: in double, as sampling.py defines it.
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "support.h"

namespace {

constexpr double INF = std::numeric_limits<double>::infinity(), MOST = std::numeric_limits<double>::max();

double number(const View& v, int64_t row, int64_t i) {
  const int64_t at = row * v.row + i;
  if (v.dtype == FLOAT32) return static_cast<const float*>(v.data)[at];
  if (v.dtype == FLOAT64) return static_cast<const double*>(v.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(v.data)[at];
  uint32_t word = uint32_t(bits) << 16;
  if (v.dtype == FLOAT16) {
    const int exponent = bits >> 10 & 31, sign = bits >> 15;
    const double part = bits & 1023;
    const double size = std::ldexp(exponent ? 1024 + part : part, std::max(exponent, 1) - 25);
    const double all = exponent < 31 ? size : part ? std::numeric_limits<double>::quiet_NaN() : INF;
    return sign ? -all : all;
  }
  float wide;
  memcpy(&wide, &word, 4);
  return wide;
}

// The place of the first of the largest numbers; NaN is larger than any.
int64_t largest(const double* x, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 1; i < count; i++)
    if (x[i] > x[found] || (x[i] != x[i] && x[found] == x[found])) found = i;
  return found;
}

// e^x of each number, and their sum.
double exponentials(const double* x, double* to, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += to[i] = std::exp(x[i]);
  return sum;
}

void penalize(const Draw& s, int64_t row, double repetition, double presence, double* logits) {
  auto bounded = [](double x) { return std::min(std::max(x, -MOST), MOST); };
  const int64_t* seen = s.history + row * s.remembered;
  int64_t* once = reinterpret_cast<int64_t*>(logits + s.tokens);
  std::copy(seen, seen + s.remembered, once);
  std::sort(once, once + s.remembered);
  for (int64_t i = 0; i < s.remembered; i++) {
    if (once[i] < 0 || once[i] >= s.tokens || (i > 0 && once[i] == once[i - 1])) continue;
    double& x = logits[once[i]];
    if (std::isfinite(x)) x = bounded(bounded(x > 0 ? x / repetition : x * repetition) - presence);
  }
}

// Only the fewest most likely tokens whose shares reach p are left.
void keep_top_p(double p, double* x, double* weights, int64_t* order, int64_t count) {
  const double total = exponentials(x, weights, count);
  std::iota(order, order + count, 0);
  std::stable_sort(order, order + count, [&](int64_t a, int64_t b) { return x[a] > x[b]; });
  double reached = 0;
  for (int64_t i = 0; i < count; i++) {
    const bool drop = reached >= p;
    reached += weights[order[i]] / total;
    if (drop) x[order[i]] = -INF;
  }
}

void draw(const Draw& s, int64_t row, double* x, double* weights, int64_t* order) {
  const int64_t V = s.tokens;
  const double* options = s.options + row * 6;
  const double temperature = options[0], k = options[1], p = options[2], least = options[3];
  for (int64_t i = 0; i < V; i++) x[i] = number(s.logits, row, i);
  int64_t best = largest(x, V);
  s.token[row] = best, s.finite[row] = std::isfinite(x[best]);
  if (!s.finite[row]) return;
  if (options[4] != 1 || options[5] != 0) {
    penalize(s, row, options[4], options[5], x);
    best = s.token[row] = largest(x, V);
  }
  if (temperature == 0) return;
  const double most = x[best];
  for (int64_t i = 0; i < V; i++) x[i] = (x[i] - most) / temperature;
  if (k > 0 && k < double(V)) {
    std::copy(x, x + V, weights);
    double* kth = weights + int64_t(k) - 1;
    std::nth_element(weights, kth, weights + V, [](double a, double b) { return a > b; });
    const double bound = *kth;
    for (int64_t i = 0; i < V; i++) x[i] = x[i] < bound ? -INF : x[i];
  }
  if (p < INF) keep_top_p(p, x, weights, order, V);
  for (int64_t i = 0; least > 0 && i < V; i++) x[i] = std::exp(x[i]) < least ? -INF : x[i];
  const double total = exponentials(x, weights, V);
  double sum = 0;
  for (int64_t i = 0; i < V; i++) weights[i] = sum += weights[i] / total;
  s.token[row] = std::min<int64_t>(std::upper_bound(weights, weights + V, s.draws[row] * sum) - weights, V - 1);
}

}  // namespace

EXPORT int dualform_draw(const Draw* s) {
  return guarded([&] {
    require(s->remembered >= 0);
    if (!check_sizes({s->rows, s->tokens})) return;
    check_views({&s->logits});
    check_pointers({s->options, s->draws, s->token, s->finite});
    if (s->remembered > 0) check_pointers({s->history});
    const int64_t V = s->tokens, bytes = (V + std::max(V, s->remembered) + V) * 8;
    in_scratch(threads_for(s->threads, s->rows * V * 16), s->rows, [&](int64_t row, void* memory) {
      if (!memory) return bytes;
      double* x = static_cast<double*>(memory);
      draw(*s, row, x, x + V, reinterpret_cast<int64_t*>(x + V + std::max(V, s->remembered)));
      return bytes;
    });
  });
}
