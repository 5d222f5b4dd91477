#include "pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

namespace {

constexpr int SPINS = 2000;  // how often a thread looks for work before it sleeps: some tens of microseconds

// Runs one job at a time. A worker may join a job while it has seats. When no task is left the caller takes the seats
// away and waits for the workers that have joined, never for one that has not woken up.
class Pool {
 public:
  void run(int64_t threads, int64_t tasks, void (*f)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> one(caller_, std::try_to_lock);
    if (!one.owns_lock()) {
      for (int64_t i = 0; i < tasks; i++) f(context, i);
      return;
    }
    {
      std::lock_guard<std::mutex> hold(mutex_);
      f_ = f, context_ = context, tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      seats_ = (threads < tasks ? threads : tasks) - 1;
      try {
        for (; workers_ < seats_; workers_++) std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        // The system gives us no more threads: those that there are, and the caller, do the work.
      }
      posted_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    help();
    {
      std::lock_guard<std::mutex> hold(mutex_);
      seats_ = 0;
    }
    for (int i = 0; i < SPINS && busy_.load(std::memory_order_acquire) > 0; i++) relax();
    if (busy_.load(std::memory_order_acquire) > 0) {
      std::unique_lock<std::mutex> hold(mutex_);
      done_.wait(hold, [this] { return busy_.load(std::memory_order_acquire) == 0; });
    }
  }

 private:
  void help() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) f_(context_, i);
  }

  [[noreturn]] void work() {
    for (int64_t seen = 0;;) {
      for (int i = 0; i < SPINS && posted_.load(std::memory_order_acquire) == seen; i++) relax();
      {
        std::unique_lock<std::mutex> hold(mutex_);
        wake_.wait(hold, [&] { return posted_.load(std::memory_order_relaxed) != seen; });
        seen = posted_.load(std::memory_order_relaxed);
        if (seats_ == 0) continue;
        seats_--;
        busy_.fetch_add(1, std::memory_order_relaxed);
      }
      help();
      std::lock_guard<std::mutex> hold(mutex_);
      if (busy_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_, done_;
  void (*f_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0, seats_ = 0, workers_ = 0;
  std::atomic<int64_t> next_{0}, posted_{0}, busy_{0};
};

// Never destroyed, because workers may outlive main. The child of a fork has no workers, so it makes a new pool.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)once;
  Pool* found = current.load();
  if (!found) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(found, fresh))
      found = fresh;
    else
      delete fresh;
  }
  return *found;
}

// PyTorch's own threads, where it uses OpenMP. After an operation of PyTorch they spin for a while, so threads of ours
// would compete with them for the processor. A `Team` calls a function in each of its threads. It is null where PyTorch
// has no OpenMP, and in the child of a fork, in which those threads no longer exist.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};
const int watched = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

#if defined(__linux__)
Team find_team() {
  std::string found;
  auto look = [](dl_phdr_info* info, size_t, void* to) {
    const char *path = info->dlpi_name, *slash = std::strrchr(path, '/'), *name = slash ? slash + 1 : "";
    for (const char* known : {"libgomp", "libiomp", "libomp"})
      if (!std::strncmp(name, known, std::strlen(known))) *static_cast<std::string*>(to) = path;
    return *static_cast<std::string*>(to) == path && std::strstr(path, "torch")
               ? 1
               : 0;  // other packages may load their own
  };
  dl_iterate_phdr(look, &found);
  void* library = found.empty() ? nullptr : dlopen(found.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Team>(dlsym(library, "GOMP_parallel")) : nullptr;
}
#else
Team find_team() { return nullptr; }
#endif

Team team() {
  static const Team found = find_team();
  return watched == 0 && !forked.load(std::memory_order_relaxed) ? found : nullptr;
}

// One job of a team. The team keeps the size that PyTorch gave it, because another size would make OpenMP start new
// threads; threads beyond `threads` find no seat and do nothing.
struct Shift {
  int64_t threads, tasks;
  void (*f)(void*, int64_t);
  void* context;
  std::atomic<int64_t> seated{0}, next{0};

  void run() {
    auto work = [](void* shift) {
      Shift& s = *static_cast<Shift*>(shift);
      if (s.seated.fetch_add(1, std::memory_order_relaxed) >= s.threads) return;
      for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) s.f(s.context, i);
    };
    team()(work, this, 0, 0);
  }
};

struct Memory {
  void* at = nullptr;
  int64_t bytes = 0;
  ~Memory() { std::free(at); }
};
thread_local Memory memory;

}  // namespace

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void give_way() { std::this_thread::yield(); }

void parallel(int64_t threads, int64_t tasks, void (*f)(void*, int64_t), void* context) {
  if (threads > 1 && tasks > 1 && team())
    Shift{threads, tasks, f, context}.run();
  else if (threads > 1 && tasks > 1)
    pool().run(threads, tasks, f, context);
  else
    for (int64_t i = 0; i < tasks; i++) f(context, i);
}

void* scratch(int64_t bytes) {
  if (bytes > memory.bytes) {
    std::free(memory.at);
    memory.bytes = (bytes + 4095) / 4096 * 4096;
    memory.at = std::aligned_alloc(4096, static_cast<size_t>(memory.bytes));
    if (!memory.at) memory.bytes = 0;
  }
  return memory.at;
}
