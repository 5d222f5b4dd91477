// What the C functions share: checks of what they are given, and how tasks get their memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <new>

#include "kernels.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern const Kernels* kernels;  // of the instruction set in use

namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 15;  // multiplications: waking a thread takes about as long

inline int64_t at_least_one(int64_t n) { return std::max<int64_t>(n, 1); }
inline int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t lanes(int64_t dtype) { return kernels->width / (dtype == FLOAT64 ? 8 : 4); }

// What a caller got wrong. Python checks its arguments, too, and explains; this keeps a mistake there from reaching
// memory that is not ours.
struct Refused {};

// A cache has no slot for one more token.
struct Full {};

inline void require(bool fits) {
  if (!fits) throw Refused();
}

inline bool is_flag(int64_t value) { return value == 0 || value == 1; }

// Sizes of at least 0; false where one is 0, so that there is nothing to compute.
inline bool check_sizes(std::initializer_list<int64_t> sizes) {
  bool some = true;
  for (int64_t size : sizes) require(size >= 0), some = some && size > 0;
  return some;
}

inline void check_groups(int64_t groups, int64_t channels) { require(groups > 0 && channels % groups == 0); }
inline void check_state_dtype(int64_t dtype) { require(dtype == FLOAT32 || dtype == FLOAT64); }

inline void check_view(const View& view, bool fits) {
  require(fits && view.data && view.dtype >= FLOAT32 && view.dtype <= FLOAT16);
}

inline void check_views(std::initializer_list<const View*> views) {
  for (const View* view : views) check_view(*view, view->inner == 1);
}

inline void check_pointers(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) require(pointer);
}

// Run f(i, memory) for every i below `tasks`, in scratch memory of the size that f(i, nullptr) asks for.
template <class F>
void in_scratch(int64_t threads, int64_t tasks, const F& f) {
  std::atomic<bool> failed{false};
  parallel(threads, tasks, [&](int64_t i) {
    void* memory = scratch(f(i, nullptr));
    if (memory) {
      NoDenormals here;
      f(i, memory);
    } else {
      failed.store(true);
    }
  });
  if (failed.load()) throw std::bad_alloc();
}

template <class F>
int guarded(const F& f) {
  try {
    f();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (const Refused&) {
    return REFUSED;
  } catch (const Full&) {
    return FULL;
  }
}

inline int64_t threads_for(int64_t wanted, int64_t work) {
  return std::min(at_least_one(wanted), at_least_one(work / WORTH_A_THREAD));
}

}  // namespace
