// Threads that stay alive between calls: PyTorch's own where it uses OpenMP, otherwise a pool of ours.
#pragma once

#include <cstdint>

// Run f(context, i) for every i below `tasks`, on the calling thread and up to `threads - 1` others. Tasks are handed
// out in order, one at a time. A call that finds the pool busy, such as one from another Python thread, does all of its
// tasks itself.
void parallel(int64_t threads, int64_t tasks, void (*f)(void* context, int64_t task), void* context);

template <class F>
void parallel(int64_t threads, int64_t tasks, const F& f) {
  parallel(
      threads, tasks, [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, const_cast<F*>(&f));
}

// Wait for what another thread is about to do: looking for it first, then leaving the processor to others in between.
void relax();
void give_way();
template <class F>
void wait_until(const F& f) {
  constexpr int64_t LOOKS = 20000;
  for (int64_t i = 0; !f(); i++) i < LOOKS ? relax() : give_way();
}

// At least `bytes` of uninitialised memory, aligned to a page, that the calling thread may use until it calls this
// again. Null when there is none.
void* scratch(int64_t bytes);
