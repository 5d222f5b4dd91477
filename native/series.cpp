// The plain C functions of classical models of series: Kalman filters, Markov chains, moving averages.
#include "support.h"

namespace {

bool check(const KalmanFilter& s) {
  check_state_dtype(s.dtype);
  if (!check_sizes({s.rows, s.length, s.states, s.observed})) return false;
  for (const View* view : {&s.a, &s.shift, &s.q, &s.c, &s.r, &s.y}) check_view(*view, view->dtype == s.dtype);
  check_pointers({s.seen, s.mean, s.cov, s.loglik, s.last_mean, s.last_cov});
  const bool moments = s.means;
  for (const void* part : {s.covs, s.predicted_means, s.predicted_covs}) require((part != nullptr) == moments);
  return true;
}

bool check(const Arma& s) {
  check_state_dtype(s.dtype);
  require(s.p >= 0 && s.q >= 0);
  if (!check_sizes({s.rows, s.length})) return false;
  check_pointers({s.variance, s.y, s.loglik ? s.loglik : s.dvariance});
  if (s.p) check_pointers({s.ar}), require((s.dar != nullptr) == (s.dvariance != nullptr));
  if (s.q) check_pointers({s.ma}), require((s.dma != nullptr) == (s.dvariance != nullptr));
  require(!s.dy || s.dvariance), require((s.variance_way != nullptr) == (s.y_way != nullptr));
  if (s.y_way && s.p) check_pointers({s.ar_way});
  if (s.y_way && s.q) check_pointers({s.ma_way});
  return true;
}

// Run kernel(s, first, end, memory) for groups of as many series as a vector has lanes, or for single ones where groups
// would leave threads without work.
template <class S, class K>
void by_series(const S& s, int64_t work, const K& kernel) {
  const int64_t group = lanes(s.dtype), groups = over(s.rows, group), threads = threads_for(s.threads, work);
  const int64_t size = groups >= threads ? group : 1, units = over(s.rows, size);
  const int64_t tasks = std::min(units, threads == 1 ? 1 : 4 * threads);
  in_scratch(threads, tasks, [&](int64_t i, void* memory) {
    return kernel(s, units * i / tasks * size, std::min(units * (i + 1) / tasks * size, s.rows), memory);
  });
}

bool check(const MarkovChain& s) {
  check_state_dtype(s.dtype);
  if (!check_sizes({s.rows, s.length, s.states})) return false;
  check_view(s.b, s.b.dtype == s.dtype);
  if (s.length > 1) check_view(s.a, s.a.dtype == s.dtype);
  return true;
}

template <class K>
void by_rows(const MarkovChain& s, const K& kernel) {
  const int64_t threads = threads_for(s.threads, s.rows * s.length * s.states * s.states);
  const int64_t tasks = std::min(s.rows, threads == 1 ? 1 : 4 * threads);
  in_scratch(threads, tasks,
             [&](int64_t i, void* memory) { return kernel(s, s.rows * i / tasks, s.rows * (i + 1) / tasks, memory); });
}

template <class K>
void by_series(const KalmanFilter& s, const K& kernel) {
  const int64_t n = s.states;
  by_series(s, s.rows * s.length * n * n * (2 * n + 3 * s.observed), kernel);
}

}  // namespace

EXPORT int dualform_kalman_filter(const KalmanFilter* s) {
  return guarded([&] {
    if (check(*s)) by_series(*s, kernels->kalman_filter[s->dtype]);
  });
}

EXPORT int dualform_kalman_filter_backward(const KalmanFilter* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_pointers({s->means, s->dloglik, s->dlast_mean, s->dlast_cov});
    for (const void* part : {s->dcovs, s->dpredicted_means, s->dpredicted_covs})
      require((part != nullptr) == (s->dmeans != nullptr));
    by_series(*s, kernels->kalman_filter_backward[s->dtype]);
  });
}

EXPORT int dualform_kalman_smoother(const KalmanFilter* s) {
  return guarded([&] {
    if (!check(*s)) return;
    require(s->dtype == FLOAT64), check_pointers({s->means, s->first_mean, s->first_cov});
    by_series(*s, kernels->kalman_smoother);
  });
}

EXPORT int dualform_markov_filter(const MarkovChain* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_pointers({s->start, s->p, s->sum, s->top});
    by_rows(*s, kernels->markov_filter[s->dtype]);
  });
}

EXPORT int dualform_markov_smoother(const MarkovChain* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_pointers({s->p, s->probs, s->weight});
    by_rows(*s, kernels->markov_smoother[s->dtype]);
  });
}

EXPORT int dualform_markov_path(const MarkovChain* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_pointers({s->start, s->path, s->score});
    for (int64_t row = 0; s->lengths && row < s->rows; row++)
      require(s->lengths[row] >= 0 && s->lengths[row] <= s->length);
    by_rows(*s, kernels->markov_path[s->dtype]);
  });
}

EXPORT int dualform_arma(const Arma* s) {
  return guarded([&] {
    if (check(*s)) by_series(*s, s->rows * s->length * (s->p + s->q + 1) * 4, kernels->arma[s->dtype]);
  });
}
