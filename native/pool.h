// Threads that are kept alive between calls: those of PyTorch where they can be had, else our own.
#pragma once

#include <cstdint>

// Run f(context, i) for every i below `tasks`, on the calling thread and up to `threads - 1` others. Tasks are handed
// out in order, one at a time. A call that finds the pool busy, such as one from another Python thread, runs alone.
void parallel(int64_t threads, int64_t tasks, void (*f)(void* context, int64_t task), void* context);

template <class F>
void parallel(int64_t threads, int64_t tasks, const F& f) {
  parallel(
      threads, tasks, [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, const_cast<F*>(&f));
}

// At least `bytes` of memory that belongs to the calling thread until it asks again; aligned to a cache line. Its
// contents are arbitrary. Null when there is none.
void* scratch(int64_t bytes);
