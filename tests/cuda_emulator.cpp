// Compiled once for all kernels; what they are compiled with is cuda_emulator.h.
#include "cuda_emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

unsigned current;
float exchange[1024];
char shared_memory[1 << 18];

namespace {

struct Barrier {
  unsigned arrived = 0, turn = 0;
};
struct Thread {
  ucontext_t context;  // to begin with: a switch by it would be two calls of the kernel, for the mask of signals
  jmp_buf at;
  std::vector<char> stack;
  std::vector<Copy> copies;  // not yet in a group
  std::deque<std::vector<Copy>> groups;
  bool begun = false, done = false;
};

std::vector<Thread> threads;
std::vector<Barrier> warps;
Barrier block, named[16];
jmp_buf scheduler;
Body body;
const void* argument;

void yield() {
  if (!_setjmp(threads[current].at)) _longjmp(scheduler, 1);
}
void resume(Thread& thread) {
  if (_setjmp(scheduler)) return;
  if (thread.begun) _longjmp(thread.at, 1);
  thread.begun = true;
  setcontext(&thread.context);
}
void begin() {
  body(argument);
  threads[current].done = true;
  _longjmp(scheduler, 1);
}
void arrive(Barrier& b, unsigned count) {
  if (++b.arrived == count) {
    b.arrived = 0;
    b.turn++;
  }
}
void wait(Barrier& b, unsigned count) {
  unsigned turn = b.turn;
  arrive(b, count);
  while (b.turn == turn) yield();
}

}  // namespace

void arrive(int barrier, unsigned count) { arrive(named[barrier], count); }
void sync(int barrier, unsigned count) { wait(named[barrier], count); }
void sync_block() { wait(block, blockDim.x); }
void sync_warp() { wait(warps[threadIdx.x / 32], 32); }

void copy(const Copy& c) {
  memset(c.to, 0xff, c.bytes);  // NaN
  threads[current].copies.push_back(c);
}
void close_group() {
  threads[current].groups.push_back(std::move(threads[current].copies));
  threads[current].copies.clear();
}
void await_groups(unsigned left) {
  auto& groups = threads[current].groups;
  for (; groups.size() > left; groups.pop_front())
    for (const Copy& c : groups.front()) {
      memset(c.to, 0, c.bytes);
      memcpy(c.to, c.from, c.wanted);
    }
}

void launch(unsigned grid, unsigned size, Body kernel, const void* given) {
  body = kernel, argument = given;
  threads.resize(size);
  blockDim.x = size, gridDim.x = grid;
  for (unsigned b = 0; b < grid; b++) {
    warps.assign((size + 31) / 32, {});
    block = {};
    for (Barrier& b : named) b = {};
    memset(shared_memory, 0xff, sizeof shared_memory);  // NaN
    for (Thread& thread : threads) {
      thread.begun = thread.done = false;
      thread.copies.clear(), thread.groups.clear();
      thread.stack.resize(1 << 16);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, begin, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (unsigned t = 0; t < size; t++) {
        if (threads[t].done) continue;
        left = true, current = t, threadIdx.x = t, blockIdx.x = b;
        resume(threads[t]);
      }
    }
  }
}

}  // namespace emulator
