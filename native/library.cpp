// The plain C functions. Each checks what it is given, chooses the kernel of the instruction set in use, cuts the work
// into tasks, and adds up the sums that several tasks have a part of.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "support.h"

#if defined(__x86_64__)
// Whether there are instructions that convert 16 bits to 32; not every compiler's __builtin_cpu_supports knows the
// name.
static bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

static const Kernels* find(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (!*name || !strcmp(name, kernels_avx512.name))) return &kernels_avx512;
  if (avx2 && (!*name || !strcmp(name, kernels_avx2.name))) return &kernels_avx2;
#endif
  return !*name || !strcmp(name, kernels_baseline.name) ? &kernels_baseline : nullptr;
}

const Kernels* kernels = find("");

namespace {

constexpr int64_t WIDEST_SHARE = 64;           // slices: what a tile reads and writes of them stays in a core's cache
constexpr int64_t WIDEST_TIMED_SHARE = 16;     // where time is contiguous: every channel lies on a page of its own
constexpr int64_t SCRATCH_OF_STEPS = 1 << 16;  // numbers that the steps of a convolution hold at a time, if it can be

// Views in which time may be contiguous.
void check_timed(std::initializer_list<const View*> views) {
  for (const View* view : views) check_view(*view, view->inner == 1 || view->time == 1);
}

// Packed, the borders rise from 0 to the length of the one row.
bool check_sequences(const Sequences& s) {
  const bool some = check_sizes({s.rows, s.length});
  if (!some || !s.borders) return some;
  require(s.rows == 1 && s.count > 0 && s.borders[0] == 0 && s.borders[s.count] == s.length);
  for (int64_t i = 0; i < s.count; i++) require(s.borders[i] <= s.borders[i + 1]);
  return true;
}

// How the channels are cut: into slices, which do not cross the borders of groups; slices into shares; and the rows of
// the batch are dealt out to `strides` tasks for each share.
struct ChannelTasks {
  int64_t strides;
  std::vector<Slice> slices;
  std::vector<Share> shares;
  std::vector<int64_t> parts_b, parts_c;  // the group of every part

  ChannelTasks(int64_t rows, int64_t width, int64_t dtype, int64_t tasks, std::initializer_list<const View*> timed = {},
               int64_t groups_b = 1, int64_t groups_c = 1) {
    int64_t widest = WIDEST_SHARE;
    for (const View* view : timed)
      if (view->data && view->inner != 1) widest = WIDEST_TIMED_SHARE;
    int64_t each_b = width / groups_b, each_c = width / groups_c;
    for (int64_t first = 0, next; first < width; first = next) {
      int64_t b = first / each_b, c = first / each_c;
      next = std::min({first + lanes(dtype), (b + 1) * each_b, (c + 1) * each_c});
      slices.push_back({first, next - first, b, c});
    }
    int64_t count = static_cast<int64_t>(slices.size());
    strides = std::min(rows, tasks);
    int64_t wanted = std::min(std::max(over(tasks, strides), over(count, widest)), count);
    for (int64_t i = 0; i < wanted; i++) {
      int64_t begin = count * i / wanted, end = count * (i + 1) / wanted;
      const Slice &first = slices[begin], &last = slices[end - 1];
      int64_t part_b = static_cast<int64_t>(parts_b.size()), part_c = static_cast<int64_t>(parts_c.size());
      shares.push_back({&slices[begin], end - begin, part_b - first.group_b, part_c - first.group_c});
      for (int64_t g = first.group_b; g <= last.group_b; g++) parts_b.push_back(g);
      for (int64_t g = first.group_c; g <= last.group_c; g++) parts_c.push_back(g);
    }
  }

  // Run kernel(task) for every share and stride.
  template <class K>
  void run(int64_t threads, const K& kernel) const {
    in_scratch(threads, strides * static_cast<int64_t>(shares.size()),
               [&](int64_t i, void* memory) { return kernel({&shares[i / strides], i % strides, strides, memory}); });
  }
};

// How the heads are cut: those of every group into `shares`, each of which has a part of the sums over heads.
struct HeadTasks {
  int64_t rows, each, shares;   // each: heads of a group
  std::vector<int64_t> groups;  // of every part

  HeadTasks(const Ssd& s, int64_t tasks) : rows(s.sequences.rows), each(s.heads / s.groups) {
    shares = std::min(each, over(tasks, rows * s.groups));
    for (int64_t part = 0; part < s.groups * shares; part++) groups.push_back(part / shares);
  }

  int64_t parts() const { return static_cast<int64_t>(groups.size()); }

  // Run kernel(task) for every row and part.
  template <class K>
  void run(int64_t threads, const K& kernel) const {
    in_scratch(threads, rows * parts(), [&](int64_t i, void* memory) {
      const int64_t part = i % parts(), share = part % shares, first = groups[part] * each;
      return kernel({i / parts(), groups[part], first + each * share / shares, first + each * (share + 1) / shares,
                     part, memory});
    });
  }
};

// Memory for `count` floats or doubles, uninitialised.
class Memory {
 public:
  Memory(int64_t count, int64_t dtype) : at(new char[count * (dtype == FLOAT64 ? 8 : 4)]) {}
  void* get() const { return at.get(); }

 private:
  std::unique_ptr<char[]> at;
};

// The sum of `count` arrays of `size` numbers, in their order.
template <class T>
void add_up(const void* parts, int64_t count, int64_t size, void* out) {
  const T* from = static_cast<const T*>(parts);
  T* to = static_cast<T*>(out);
  std::copy(from, from + size, to);
  for (int64_t p = 1; p < count; p++)
    for (int64_t i = 0; i < size; i++) to[i] += from[p * size + i];
}

void add_up(const Memory& parts, int64_t dtype, int64_t count, int64_t size, void* out) {
  (dtype == FLOAT64 ? add_up<double> : add_up<float>)(parts.get(), count, size, out);
}

// The parts of the gradient of B, or of C: those of the steps of each group, or constant, one for each stride of tasks.
struct MapSums {
  const SelectiveScan& s;
  const bool constant;
  const int64_t strides;
  const std::vector<int64_t>& group;
  Memory parts;

  MapSums(const SelectiveScan& scan, bool is_constant, const ChannelTasks& cut, const std::vector<int64_t>& of)
      : s(scan), constant(is_constant), strides(cut.strides), group(of), parts(numbers(), scan.dtype) {}

  int64_t count() const { return static_cast<int64_t>(group.size()); }
  int64_t numbers() const {
    return constant ? strides * s.width * s.states : count() * s.sequences.rows * s.sequences.length * s.states;
  }

  // The sums of one row, or of all rows where they are those of a constant.
  void add(const View& out, int64_t row) const {
    if (!constant)
      kernels->add_groups[s.dtype](
          {out, parts.get(), group.data(), count(), s.sequences.rows, s.sequences.length, s.states}, row);
    else if (row == 0 && s.states > 0)
      add_up(parts, s.dtype, strides, s.width * s.states, out.data);
  }
};

// B, C or its gradient, which has groups or is constant.
void check_map(const SelectiveScan& s, int64_t groups, int64_t constant, const View& map) {
  require(is_flag(constant) && (!constant || groups == 1));
  check_groups(groups, s.width);
  if (s.states == 0) return;
  if (constant)
    check_view(map, map.dtype == s.dtype);
  else
    check_timed({&map});
}

// Run kernel(row, first, end, memory) for every row and at least `parts` parts of its channels, which are multiples of
// `per`.
template <class K>
void by_rows(int64_t wanted, int64_t work, int64_t rows, int64_t parts, int64_t width, int64_t per, const K& kernel) {
  const int64_t threads = threads_for(wanted, work), sizes = width / per;
  if (threads > 1) parts = std::max(parts, over(4 * threads, rows));
  parts = std::min(sizes, parts);
  in_scratch(threads, rows * parts, [&](int64_t i, void* memory) {
    const int64_t part = i % parts, first = sizes * part / parts * per, end = sizes * (part + 1) / parts * per;
    return kernel(i / parts, first, end, memory);
  });
}

// Each of these checks one structure; false where there is nothing to compute.

bool check(const SelectiveScan& s) {
  check_state_dtype(s.dtype);
  require(s.states >= 0);
  if (!check_sequences(s.sequences) || !check_sizes({s.width})) return false;
  check_map(s, s.groups_b, s.constant_b, s.b), check_map(s, s.groups_c, s.constant_c, s.c);
  if (s.states > 0) check_pointers({s.a, s.h0});
  check_timed({&s.u, &s.delta});
  if (s.z.data) check_timed({&s.z});
  return true;
}

bool check(const Ssd& s) {
  check_state_dtype(s.dtype);
  if (!check_sequences(s.sequences) || !check_sizes({s.heads, s.width, s.states})) return false;
  check_groups(s.groups, s.heads);
  check_views({&s.x, &s.dt, &s.b, &s.c}), check_pointers({s.a, s.h0});
  require(!s.ids || !s.sequences.borders);
  return true;
}

bool check(const DiagonalSSM& s) {
  check_state_dtype(s.dtype);
  if (!check_sequences(s.sequences) || !check_sizes({s.width, s.states})) return false;
  check_views({&s.u}), check_pointers({s.a, s.c, s.h0});
  return true;
}

bool check(const LinearScan& s) {
  check_state_dtype(s.dtype);
  require(is_flag(s.complex) && is_flag(s.reverse) && (!s.complex || s.width % 2 == 0));
  if (!check_sequences(s.sequences) || !check_sizes({s.width})) return false;
  check_views({&s.a, &s.b, &s.h}), check_pointers({s.h0});
  return true;
}

bool check(const CausalConv1d& s) {
  check_state_dtype(s.dtype);
  require(s.taps > 0);
  if (!check_sequences(s.sequences) || !check_sizes({s.width})) return false;
  check_timed({&s.x}), check_pointers({s.weight});
  if (s.taps > 1) check_pointers({s.h0});
  require(!s.ids || !s.sequences.borders);
  return true;
}

// Each of `rows` indices is a row of a table of `table` rows, or negative; without indices the table has those rows.
void check_rows(const int64_t* indices, int64_t rows, int64_t table) {
  if (!indices) return require(rows <= table);
  for (int64_t i = 0; i < rows; i++) require(indices[i] < table);
}

// A row that is padding for reading is none that is written.
template <class S>
void check_tables(const S& s) {
  require(s.h_rows >= 0 && s.next_rows >= 0);
  check_rows(s.reads, s.rows, s.h_rows), check_rows(s.writes, s.rows, s.next_rows);
  for (int64_t i = 0; s.writes && i < s.rows; i++) require((s.reads ? s.reads[i] < 0 : false) == (s.writes[i] < 0));
}

bool check(const SelectiveUpdate& s) {
  check_state_dtype(s.dtype);
  require(s.states >= 0);
  if (!check_sizes({s.rows, s.width})) return false;
  check_groups(s.groups_b, s.width), check_groups(s.groups_c, s.width), check_groups(s.per, s.width);
  check_tables(s);
  if (s.states > 0) check_pointers({s.a}), check_views({&s.h, &s.next, &s.b, &s.c});
  check_views({&s.x, &s.dt, &s.y});
  if (s.gated) check_views({&s.z});
  return true;
}

bool check(const ConvUpdate& s) {
  check_state_dtype(s.dtype);
  require(s.taps > 0 && s.size >= s.taps - 1 && s.renewed >= 0 && s.renewed <= s.size && (s.size > 0 || !s.seen));
  if (!check_sizes({s.rows, s.length, s.width})) return false;
  check_tables(s);
  check_views({&s.x, &s.y}), check_pointers({s.weight});
  for (const Inputs* m : {&s.h, &s.next})
    require(s.size == 0 || (m->data && m->dtype >= FLOAT32 && m->dtype <= FLOAT16));
  return true;
}

bool check(const Norm& s) {
  check_state_dtype(s.dtype);
  require(is_flag(s.center) && is_flag(s.norm_before_gate) && !(s.residual.data && s.z.data));
  if (!check_sizes({s.rows, s.width})) return false;
  check_groups(s.groups, s.width);
  check_views({&s.x}), check_pointers({s.weight});
  for (const View* view : {&s.residual, &s.z, &s.r, &s.dr, &s.dresidual})
    if (view->data) check_views({view});
  require(!s.r.data || s.residual.data);
  return true;
}

}  // namespace

EXPORT int64_t dualform_version() { return DUALFORM_VERSION; }

// Ask for large pages under memory that is about to be written for the first time: the system hands out and clears two
// megabytes at once, several times sooner than page by page.
EXPORT void dualform_fresh(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = uintptr_t(2) << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / PAGE * PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// The instruction set in use, after choosing the one of that name; the best one for an empty name. Null, and no change,
// where this processor does not have it or the name is unknown.
EXPORT const char* dualform_choose(const char* name) {
  const Kernels* found = find(name);
  if (!found) return nullptr;
  kernels = found;
  return found->name;
}

EXPORT int dualform_selective_scan(const SelectiveScan* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_timed({&s->y});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->width * s->states);
    ChannelTasks cut(q.rows, s->width, s->dtype, threads == 1 ? 1 : 8 * threads, {&s->u, &s->delta, &s->z, &s->y},
                     s->groups_b, s->groups_c);
    auto kernel = kernels->selective_scan[s->dtype];
    cut.run(threads, [&](const Task& task) { return kernel(*s, task); });
  });
}

EXPORT int dualform_selective_scan_backward(const SelectiveScan* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_timed({&s->dy, &s->du, &s->ddelta});
    if (s->states > 0) check_pointers({s->saved, s->dfinal, s->da, s->dh0});
    check_map(*s, s->groups_b, s->constant_b, s->db), check_map(*s, s->groups_c, s->constant_c, s->dc);
    if (s->z.data) check_timed({&s->dz});
    require((!s->d || s->dd) && (!s->bias || s->dbias));
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->width * s->states);
    ChannelTasks cut(q.rows, s->width, s->dtype, threads == 1 ? 1 : 2 * threads,
                     {&s->u, &s->delta, &s->z, &s->dy, &s->du, &s->ddelta, &s->dz}, s->groups_b, s->groups_c);
    const int64_t each = s->width * s->states;
    MapSums b(*s, s->constant_b, cut, cut.parts_b), c(*s, s->constant_c, cut, cut.parts_c);
    Memory da(cut.strides * each, s->dtype);
    Memory dd(cut.strides * s->width, s->dtype), dbias(cut.strides * s->width, s->dtype);
    Parts parts = {da.get(), b.parts.get(), c.parts.get(), dd.get(), dbias.get()};
    auto kernel = kernels->selective_scan_backward[s->dtype];
    cut.run(threads, [&](const Task& task) { return kernel(*s, task, parts); });

    parallel(threads, q.rows * 2, [&](int64_t i) { i % 2 ? b.add(s->db, i / 2) : c.add(s->dc, i / 2); });
    if (s->states > 0) add_up(da, s->dtype, cut.strides, each, s->da);
    if (s->d) add_up(dd, s->dtype, cut.strides, s->width, s->dd);
    if (s->bias) add_up(dbias, s->dtype, cut.strides, s->width, s->dbias);
  });
}

EXPORT int dualform_ssd(const Ssd* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_views({&s->y}), check_pointers({s->final});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->heads * s->width * s->states);
    auto kernel = kernels->ssd[s->dtype];
    HeadTasks cut(*s, threads == 1 ? 1 : 2 * threads);
    cut.run(threads, [&](const Heads& task) { return kernel(*s, task); });
  });
}

EXPORT int dualform_ssd_backward(const Ssd* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_views({&s->dy, &s->dx, &s->ddt, &s->db, &s->dc}), check_pointers({s->saved, s->dfinal, s->da, s->dh0});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->heads * s->width * s->states);
    const HeadTasks cut(*s, threads == 1 ? 1 : 2 * threads);
    int64_t size = cut.parts() * q.rows * q.length * s->states;
    Memory da(q.rows * s->heads, s->dtype), db(size, s->dtype), dc(size, s->dtype);
    Parts parts = {da.get(), db.get(), dc.get()};
    auto kernel = kernels->ssd_backward[s->dtype];
    cut.run(threads, [&](const Heads& task) { return kernel(*s, task, parts); });

    auto add = kernels->add_groups[s->dtype];
    Groups b = {s->db, db.get(), cut.groups.data(), cut.parts(), q.rows, q.length, s->states};
    Groups c = {s->dc, dc.get(), cut.groups.data(), cut.parts(), q.rows, q.length, s->states};
    parallel(threads, q.rows * 2, [&](int64_t i) { add(i % 2 ? b : c, i / 2); });
    add_up(da, s->dtype, q.rows, s->heads, s->da);
  });
}

EXPORT int dualform_diagonal_ssm(const DiagonalSSM* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_views({&s->y}), check_pointers({s->final});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->width * s->states);
    ChannelTasks cut(q.rows, s->width, s->dtype, threads == 1 ? 1 : 8 * threads);
    auto kernel = kernels->diagonal_ssm[s->dtype];
    cut.run(threads, [&](const Task& task) { return kernel(*s, task); });
  });
}

EXPORT int dualform_diagonal_ssm_backward(const DiagonalSSM* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_views({&s->dy, &s->du}), check_pointers({s->dfinal, s->da, s->dc, s->dh0});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->width * s->states);
    ChannelTasks cut(q.rows, s->width, s->dtype, threads == 1 ? 1 : 8 * threads);
    int64_t size = s->width * s->states * 2;
    Memory da(cut.strides * size, s->dtype), dc(cut.strides * size, s->dtype);
    Parts parts = {da.get(), nullptr, dc.get()};
    auto kernel = kernels->diagonal_ssm_backward[s->dtype];
    cut.run(threads, [&](const Task& task) { return kernel(*s, task, parts); });
    add_up(da, s->dtype, cut.strides, size, s->da);
    add_up(dc, s->dtype, cut.strides, size, s->dc);
  });
}

EXPORT int dualform_linear_scan(const LinearScan* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_pointers({s->final});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->width);
    ChannelTasks cut(q.rows, s->width, s->dtype, threads == 1 ? 1 : 4 * threads);
    auto kernel = kernels->linear_scan[s->dtype][s->complex];
    cut.run(threads, [&](const Task& task) { return kernel(*s, task); });
  });
}

EXPORT int dualform_linear_scan_backward(const LinearScan* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_views({&s->dh, &s->da, &s->db}), check_pointers({s->dfinal, s->dh0});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->width);
    ChannelTasks cut(q.rows, s->width, s->dtype, threads == 1 ? 1 : 4 * threads);
    auto kernel = kernels->linear_scan_backward[s->dtype][s->complex];
    cut.run(threads, [&](const Task& task) { return kernel(*s, task); });
  });
}

EXPORT int dualform_causal_conv1d(const CausalConv1d* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_timed({&s->y});
    if (s->taps > 1) check_pointers({s->final});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->width);
    ChannelTasks cut(q.rows, s->width, s->dtype, threads == 1 ? 1 : 4 * threads, {&s->x, &s->y});
    auto kernel = kernels->causal_conv1d[s->dtype];
    cut.run(threads, [&](const Task& task) { return kernel(*s, task); });
  });
}

EXPORT int dualform_causal_conv1d_backward(const CausalConv1d* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_timed({&s->dy, &s->dx}), check_pointers({s->dweight, s->dbias});
    if (s->taps > 1) check_pointers({s->dfinal, s->dh0});
    const Sequences& q = s->sequences;
    int64_t threads = threads_for(s->threads, q.rows * q.length * s->width);
    ChannelTasks cut(q.rows, s->width, s->dtype, threads == 1 ? 1 : 4 * threads, {&s->x, &s->dy, &s->dx});
    Memory dweight(cut.strides * s->width * s->taps, s->dtype), dbias(cut.strides * s->width, s->dtype);
    Parts parts = {dweight.get(), nullptr, dbias.get()};
    auto kernel = kernels->causal_conv1d_backward[s->dtype];
    cut.run(threads, [&](const Task& task) { return kernel(*s, task, parts); });
    add_up(dweight, s->dtype, cut.strides, s->width * s->taps, s->dweight);
    add_up(dbias, s->dtype, cut.strides, s->width, s->dbias);
  });
}

EXPORT int dualform_selective_update(const SelectiveUpdate* s) {
  return guarded([&] {
    if (!check(*s)) return;
    auto kernel = kernels->selective_update[s->dtype];
    by_rows(s->threads, s->rows * s->width * s->states, s->rows, 1, s->width, s->per,
            [&](auto... task) { return kernel(*s, task...); });
  });
}

EXPORT int dualform_conv_update(const ConvUpdate* s) {
  return guarded([&] {
    if (!check(*s)) return;
    auto kernel = kernels->conv_update[s->dtype];
    const int64_t parts = over(s->length * s->width, SCRATCH_OF_STEPS);
    by_rows(s->threads, s->rows * s->length * s->width * s->taps, s->rows, parts, s->width, 1,
            [&](auto... task) { return kernel(*s, task...); });
  });
}

EXPORT int dualform_norm(const Norm* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_views({&s->y});
    const int64_t threads = threads_for(s->threads, s->rows * s->width);
    const int64_t tasks = std::min(s->rows, threads == 1 ? 1 : 4 * threads);
    auto kernel = kernels->norm[s->dtype];
    in_scratch(threads, tasks, [&](int64_t i, void* memory) {
      return kernel(*s, s->rows * i / tasks, s->rows * (i + 1) / tasks, memory);
    });
  });
}

EXPORT int dualform_norm_backward(const Norm* s) {
  return guarded([&] {
    if (!check(*s)) return;
    check_views({&s->dy, &s->dx}), check_pointers({s->dweight, s->dbias});
    if (s->z.data) check_views({&s->dz});
    const int64_t threads = threads_for(s->threads, s->rows * s->width);
    const int64_t tasks = std::min(s->rows, threads == 1 ? 1 : 4 * threads), each = s->dtype == FLOAT64 ? 8 : 4;
    Memory dweight(tasks * s->width, s->dtype), dbias(tasks * s->width, s->dtype);
    auto kernel = kernels->norm_backward[s->dtype];
    in_scratch(threads, tasks, [&](int64_t i, void* memory) {
      void *to_weight = static_cast<char*>(dweight.get()) + i * s->width * each,
           *to_bias = static_cast<char*>(dbias.get()) + i * s->width * each;
      return kernel(*s, s->rows * i / tasks, s->rows * (i + 1) / tasks, to_weight, to_bias, memory);
    });
    add_up(dweight, s->dtype, tasks, s->width, s->dweight);
    add_up(dbias, s->dtype, tasks, s->width, s->dbias);
  });
}
