// The plain C functions of products with a few rows, and of steps of whole blocks, which are made of those.
#include <deque>

#include "support.h"

namespace {

constexpr int64_t TASKS = 16;    // of each thread: what one of them loses to another program, the others take over
constexpr int64_t TOGETHER = 4;  // outputs that a kernel sums at once

bool is_narrow(int64_t dtype) { return dtype == BFLOAT16 || dtype == FLOAT16; }

// Matrices are of the dtype that is computed in, or narrow beside float; those of 8 bits have scales, the first one at
// least, and rows of at most `widest` numbers.
void check_matrices(int64_t dtype, int64_t matrices, std::initializer_list<const void*> scales, int64_t group,
                    int64_t widest) {
  check_state_dtype(dtype);
  require(matrices == dtype || (dtype == FLOAT32 && (is_narrow(matrices) || matrices == INT8)));
  if (matrices == INT8)
    check_pointers({*scales.begin()}), require(group > 0 && (group % INT8_CHUNK == 0 || group >= widest));
}

// Run kernel(first, end) over parts of `size` units, of which `together` stay together.
template <class K>
void by_parts(int64_t wanted, int64_t work, int64_t size, int64_t together, const K& kernel) {
  const int64_t threads = threads_for(wanted, work), units = over(size, together);
  const int64_t tasks = threads == 1 ? 1 : std::min(units, TASKS * threads);
  parallel(threads, tasks, [&](int64_t i) {
    NoDenormals here;
    kernel(units * i / tasks * together, std::min(size, units * (i + 1) / tasks * together));
  });
}

// Memory of the calling thread, which no kernel of a phase asks for again.
void* memory_of(int64_t bytes) {
  void* found = scratch(bytes);
  if (!found) throw std::bad_alloc();
  return found;
}

// A part of a step after which all threads meet: `size` units, of which `together` stay together, are cut into tasks.
struct Phase {
  const void* step;
  void (*run)(const Phase& phase, int64_t first, int64_t end, int64_t seat, void* memory);
  int64_t number, size, together, tasks;
  std::atomic<int64_t> next{0}, done{0};

  Phase(const void* of, decltype(run) kernel, int64_t index, int64_t units, int64_t kept, int64_t count)
      : step(of), run(kernel), number(index), size(units), together(kept), tasks(count) {}
};

// Steps one after the other, in one go.
class Line {
 public:
  void add(const MambaStep& s) {
    check_matrices(s.dtype, s.matrices, {s.in_scales, s.maps_scales, s.steps_scales, s.out_scales}, s.group,
                   std::max({s.features, s.width, s.rank}));
    if (!check_sizes({s.rows, s.features, s.width, s.states, s.rank, s.taps})) return;
    check_pointers({s.x, s.h, s.norm, s.in_weight, s.conv_weight, s.maps, s.steps, s.dt_bias, s.a, s.d, s.out_weight,
                    s.y, s.next_h});
    if (s.taps > 1) check_pointers({s.conv, s.next_conv});
    const int64_t M = s.features, D = s.width, all = s.rank + 2 * s.states, rows = s.rows;
    bytes_ = std::max(bytes_, kernels->steps->mamba_step[s.dtype](s, 0, 0, 0, 0, nullptr));
    begin(&s, s.threads, [](const Phase& phase, int64_t first, int64_t end, int64_t seat, void* memory) {
      const MambaStep& step = *static_cast<const MambaStep*>(phase.step);
      kernels->steps->mamba_step[step.dtype](step, phase.number, first, end, seat, memory);
    });
    if (by_tiles(s)) return tiles(s, 4, rows * D * 8 * s.states);
    phase(rows, 1, rows * M);
    phase(2 * D, TOGETHER, rows * 2 * D * M);
    phase(all, TOGETHER, rows * all * D);
    phase(D, TOGETHER, rows * D * (s.rank + 8 * s.states));
    phase(M, TOGETHER, rows * M * D);
  }

  void add(const Mamba2Step& s) {
    check_matrices(s.dtype, s.matrices, {s.in_scales, s.out_scales}, s.group, std::max(s.features, s.heads * s.width));
    require(is_flag(s.norm_before_gate));
    if (!check_sizes({s.rows, s.features, s.heads, s.width, s.states, s.taps})) return;
    check_groups(s.groups, s.heads);
    check_pointers({s.x, s.h, s.norm, s.in_weight, s.conv_weight, s.dt_bias, s.a, s.d, s.out_weight, s.y, s.next_h});
    if (s.taps > 1) check_pointers({s.conv, s.next_conv});
    const int64_t M = s.features, D = s.heads * s.width, rows = s.rows;
    const int64_t all = 2 * D + 2 * s.groups * s.states + s.heads;
    bytes_ = std::max(bytes_, kernels->steps->mamba2_step[s.dtype](s, 0, 0, 0, 0, nullptr));
    begin(&s, s.threads, [](const Phase& phase, int64_t first, int64_t end, int64_t seat, void* memory) {
      const Mamba2Step& step = *static_cast<const Mamba2Step*>(phase.step);
      kernels->steps->mamba2_step[step.dtype](step, phase.number, first, end, seat, memory);
    });
    if (by_tiles(s)) return tiles(s, 2, rows * D * s.states * 2);
    phase(rows, 1, rows * M);
    phase(all, TOGETHER, rows * all * M);
    phase(rows * s.heads, 1, rows * D * s.states * 2);
    phase(rows, 1, rows * D * 4);
    phase(M, TOGETHER, rows * M * D);
  }

  void add(const LtiStep& s) {
    check_matrices(s.dtype, s.matrices, {nullptr}, 0, 0);  // without scales: none of 8 bits
    require(is_flag(s.shared) && is_flag(s.gate));
    if (!check_sizes({s.rows, s.features, s.states})) return;
    check_pointers({s.x, s.h, s.norm, s.a, s.b, s.c, s.d, s.out_weight, s.y, s.next_h});
    const int64_t M = s.features, N = s.states, rows = s.rows;
    bytes_ = std::max(bytes_, kernels->steps->lti_step[s.dtype](s, 0, 0, 0, 0, nullptr));
    begin(&s, s.threads, [](const Phase& phase, int64_t first, int64_t end, int64_t seat, void* memory) {
      const LtiStep& step = *static_cast<const LtiStep*>(phase.step);
      kernels->steps->lti_step[step.dtype](step, phase.number, first, end, seat, memory);
    });
    if (by_tiles(s)) return tiles(s, s.shared ? 3 : 1, rows * M * N * 8);
    phase(rows, 1, rows * M);
    phase(s.shared ? 2 * N : rows * M, TOGETHER, rows * M * N * 8);
    phase(s.shared ? M : 0, TOGETHER, rows * M * N * 2);
    phase(M, TOGETHER, rows * M * M * 2);
  }

  void add(const AttentionStep& s) {
    check_matrices(s.dtype, s.matrices, {s.in_scales, s.out_scales}, s.group, std::max(s.features, s.heads * s.values));
    require(s.caches == s.dtype || (s.dtype == FLOAT32 && is_narrow(s.caches)));
    require(is_flag(s.ring) && is_flag(s.interleaved) && s.turned >= 0 && 2 * s.turned <= s.width);
    if (!check_sizes({s.rows, s.features, s.heads, s.groups, s.width, s.values})) return;
    check_groups(s.groups, s.heads);
    check_pointers({s.x, s.length, s.norm, s.in_weight, s.out_weight, s.y, s.next_length});
    if (s.turned > 0) check_pointers({s.frequencies});
    require(s.slots >= (s.ring ? 1 : 0));
    for (int64_t row = 0; row < s.rows; row++) {
      require(s.length[row] >= 0);
      if (!s.ring && s.length[row] >= s.slots) throw Full();
    }
    check_pointers({s.k, s.v});
    const int64_t M = s.features, rows = s.rows, D = s.heads * s.values;
    const int64_t all = (s.heads + s.groups) * s.width + s.groups * s.values;
    const int64_t longest = std::min(s.slots, *std::max_element(s.length, s.length + rows) + 1);
    bytes_ = std::max(bytes_, kernels->steps->attention_step[s.dtype](s, 0, 0, 0, nullptr));
    begin(&s, s.threads, [](const Phase& phase, int64_t first, int64_t end, int64_t, void* memory) {
      const AttentionStep& step = *static_cast<const AttentionStep*>(phase.step);
      kernels->steps->attention_step[step.dtype](step, phase.number, first, end, memory);
    });
    phase(rows, 1, rows * (M + s.turned * 32));
    phase(all, TOGETHER, rows * all * M);
    phase(rows * s.groups, 1, rows * s.heads * longest * (s.width + s.values));
    phase(M, TOGETHER, rows * M * D);
  }

  void add(const MlpStep& s) {
    check_matrices(s.dtype, s.matrices, {s.in_scales, s.out_scales}, s.group, std::max(s.features, s.hidden));
    require(is_flag(s.gated) && s.activation >= SILU && s.activation <= RELU2);
    if (!check_sizes({s.rows, s.features, s.hidden})) return;
    check_pointers({s.x, s.norm, s.in_weight, s.out_weight, s.y});
    const int64_t M = s.features, D = s.hidden, rows = s.rows;
    bytes_ = std::max(bytes_, kernels->steps->mlp_step[s.dtype](s, 0, 0, 0, nullptr));
    begin(&s, s.threads, [](const Phase& phase, int64_t first, int64_t end, int64_t, void* memory) {
      const MlpStep& step = *static_cast<const MlpStep*>(phase.step);
      kernels->steps->mlp_step[step.dtype](step, phase.number, first, end, memory);
    });
    phase(rows, 1, rows * M);
    phase(D, TOGETHER, rows * D * M * (1 + s.gated));
    phase(M, TOGETHER, rows * M * D);
  }

  void add(const HeadStep& s) {
    check_matrices(s.dtype, s.matrices, {s.out_scales}, s.group, s.features);
    if (!check_sizes({s.rows, s.features, s.outputs})) return;
    check_pointers({s.x, s.norm, s.out_weight});
    check_views({&s.y});
    bytes_ = std::max(bytes_, kernels->steps->head_step[s.dtype](s, 0, 0, 0, nullptr));
    begin(&s, s.threads, [](const Phase& phase, int64_t first, int64_t end, int64_t, void* memory) {
      const HeadStep& step = *static_cast<const HeadStep*>(phase.step);
      kernels->steps->head_step[step.dtype](step, phase.number, first, end, memory);
    });
    phase(s.rows, 1, s.rows * s.features);
    phase(s.outputs, TOGETHER, s.rows * s.features * s.outputs);
  }

  // A thread that comes late begins where the others are, and none waits for it.
  void run() {
    if (phases_.empty()) return;
    void* memory = memory_of(bytes_);
    parallel(threads_, threads_, [&](int64_t seat) {
      NoDenormals here;
      for (Phase& phase : phases_) {
        const int64_t parts = over(phase.size, phase.together);
        for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.tasks;) {
          const int64_t end = std::min(phase.size, parts * (i + 1) / phase.tasks * phase.together);
          phase.run(phase, parts * i / phase.tasks * phase.together, end, seat, memory);
          phase.done.fetch_add(1, std::memory_order_release);
        }
        wait_until([&] { return phase.done.load(std::memory_order_acquire) == phase.tasks; });
      }
    });
  }

 private:
  void begin(const void* step, int64_t threads, decltype(Phase::run) run) {
    require(phases_.empty() || threads == wanted_);  // each seat has memory of its own
    step_ = step, wanted_ = threads, run_ = run, number_ = 0;
  }

  // A step by tiles: of some matrices, and of states that take so much work.
  template <class S>
  void tiles(const S& s, int64_t matrices, int64_t work) {
    phase(matrices, 1, numbers(s));
    phase(s.rows, TILE, s.rows * numbers(s) + work);
  }

  void phase(int64_t size, int64_t together, int64_t work) {
    const int64_t threads = threads_for(wanted_, work);
    const int64_t tasks = threads == 1 ? 1 : std::min(over(size, together), TASKS * threads);
    threads_ = std::max(threads_, std::min(threads, tasks));
    phases_.emplace_back(step_, run_, number_++, size, together, tasks);
  }

  const void* step_ = nullptr;
  decltype(Phase::run) run_ = nullptr;
  int64_t wanted_ = 1, number_ = 0, threads_ = 1, bytes_ = 0;
  std::deque<Phase> phases_;
};

}  // namespace

EXPORT int dualform_linear(const Linear* s) {
  return guarded([&] {
    check_state_dtype(s->dtype);
    require(s->inputs >= 0);
    if (!check_sizes({s->rows, s->outputs})) return;
    check_views({&s->y});
    if (s->inputs > 0) {
      check_views({&s->x});
      require(s->weight.inner == 1), check_pointers({s->weight.data});
      check_matrices(s->dtype, s->weight.dtype, {s->scales}, s->group, s->inputs);
    }
    const void* x = s->x.data;
    if (s->x.dtype != s->dtype || s->x.row != s->inputs) {
      auto read_rows = kernels->steps->read_rows[s->dtype];
      void* copy = memory_of(at_least_one(read_rows(*s, nullptr)));
      if (s->inputs > 0) read_rows(*s, copy);
      x = copy;
    }
    auto kernel = kernels->steps->linear[s->dtype];
    by_parts(s->threads, s->rows * s->inputs * s->outputs, s->outputs, TOGETHER,
             [&](int64_t first, int64_t end) { kernel(*s, x, first, end); });
  });
}

template <class S>
static int run_step(const S* s) {
  return guarded([&] {
    Line line;
    line.add(*s);
    line.run();
  });
}

EXPORT int dualform_mamba_step(const MambaStep* s) { return run_step(s); }
EXPORT int dualform_mamba2_step(const Mamba2Step* s) { return run_step(s); }
EXPORT int dualform_lti_step(const LtiStep* s) { return run_step(s); }
EXPORT int dualform_attention_step(const AttentionStep* s) { return run_step(s); }
EXPORT int dualform_mlp_step(const MlpStep* s) { return run_step(s); }
EXPORT int dualform_head_step(const HeadStep* s) { return run_step(s); }

EXPORT int dualform_steps(const Steps* s) {
  return guarded([&] {
    if (!check_sizes({s->count})) return;
    check_pointers({s->kinds, s->steps});
    Line line;
    for (int64_t i = 0; i < s->count; i++) {
      const void* step = reinterpret_cast<const void*>(s->steps[i]);
      require(step && s->kinds[i] >= MAMBA_STEP && s->kinds[i] <= HEAD_STEP);
      if (s->kinds[i] == MAMBA_STEP) line.add(*static_cast<const MambaStep*>(step));
      if (s->kinds[i] == MAMBA2_STEP) line.add(*static_cast<const Mamba2Step*>(step));
      if (s->kinds[i] == LTI_STEP) line.add(*static_cast<const LtiStep*>(step));
      if (s->kinds[i] == ATTENTION_STEP) line.add(*static_cast<const AttentionStep*>(step));
      if (s->kinds[i] == MLP_STEP) line.add(*static_cast<const MlpStep*>(step));
      if (s->kinds[i] == HEAD_STEP) line.add(*static_cast<const HeadStep*>(step));
    }
    line.run();
  });
}
