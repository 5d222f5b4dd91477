// Tensors with time innermost, (B, D, T), pass through shared memory: LINE steps of several rows, channels or states,
// are copied at once, and a lane reads four rows of one step from there. So memory sees whole lines of the cache, and
// the turn from rows to steps takes no instructions of its own.
//
// TOGETHER steps, 8, 4 or one, are aligned in all of these tensors and divide their length.
#pragma once

#include "sequences.cuh"

#if defined(DUALFORM_EMULATED)
constexpr bool TURNS = false;
DEVICE void turn_matrices(const void*, unsigned*) {}
#else
// Two matrices of 8 x 8 numbers of 16 bits, lane i < 16 knows where row i of both is: a lane gets columns lane / 4 of
// their rows 2 (lane % 4) and the one after.
constexpr bool TURNS = true;
DEVICE void turn_matrices(const void* row, unsigned* pairs) {
  unsigned from;
  asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(from) : "l"(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(pairs[0]), "=r"(pairs[1])
               : "r"(from)
               : "memory");
}
#endif

// Lines in shared memory, one after another.
struct Taker {
  char* free;
  template <class L>
  METHOD L* take(int lines) {
    L* found = reinterpret_cast<L*>(free);
    free += lines * sizeof(L);
    return found;
  }
};

// LINE steps of ROWS rows, in twos: the first two of every four, then the others. A row takes an odd number of 16
// bytes, so that eight neighbours lie in different banks.
template <class T, int ROWS>
struct Lines {
  static constexpr int SIZE = sizeof(T), STRIDE = (LINE * SIZE / 16 | 1) * 16 / SIZE;  // from one row to the next
  static constexpr int EACH = TOGETHER * SIZE == 16 ? TOGETHER : 4;  // steps that a lane copies at once
  static constexpr int PER_ROW = LINE / EACH, COPIES = ROWS * PER_ROW;
  alignas(16) T number[ROWS * STRIDE];

  METHOD static int place(int row) { return (row / 4 * 2 + row % 2 + row / 2 % 2 * (ROWS / 2)) * STRIDE; }

  // Four rows from `four` on, of step t of the line. A whole warp reads; of 16 rows, lane / 4 is t % 8 and lane % 4 a
  // fourth of `four`.
  METHOD Four<T> read(int lane, int t, int four) const {
    Four<T> found = {};
    if constexpr (TURNS && SIZE == 2 && ROWS == 16) {
      turn_matrices(number + lane % 16 * STRIDE + t / 8 * 8, found.pair);
    } else {
      UNROLL for (int i = 0; i < 4; i++)
        put_one(found, i, number[place(four + i) + t]);
    }
    return found;
  }
  METHOD void write(int t, int four, const float* x) {
    Four<T> f;
    pack(f, x);
    UNROLL for (int i = 0; i < 4; i++)
      number[place(four + i) + t] = get_one(f, i);
  }
};

// Where they lie in memory: `count` rows from `at` on, of one sequence.
template <class T, int ROWS>
struct Rows {
  using Line = Lines<T, ROWS>;
  T* from;  // what this lane copies first
  int64 stride;
  int lane, count, length;
  METHOD Rows(const View& v, int64 batch, int64 begin, int length, int64 at, int count, int lane)
      : from(whole((T*)v.data + batch * v.row + (at + lane / Line::PER_ROW) * v.time + begin +
                   lane % Line::PER_ROW * Line::EACH)),
        stride(v.time),
        lane(lane),
        count(count),
        length(length) {}

  // Calls f(place in a line, address, steps that are there) for all that this lane copies of the line at step t.
  template <class F>
  METHOD void each(int t, const F& f) const {
    const int step = lane % Line::PER_ROW * Line::EACH;
    UNROLL for (int i = 0; i < Line::COPIES; i += 32) {
      if (Line::COPIES % 32 && i + lane >= Line::COPIES) break;
      const int row = (i + lane) / Line::PER_ROW;
      f(Line::place(row) + step, from + i / Line::PER_ROW * stride + t, row < count ? length - t - step : 0);
    }
  }
  // Zeros where there is nothing.
  METHOD void copy(int t, Line& to) const {
    each(t, [&](int place, const T* at, int left) {
      if constexpr (TOGETHER > 1) {
        copy_async<Line::EACH * Line::SIZE, true>(to.number + place, at, left > 0);
      } else {
        *reinterpret_cast<Four<T>*>(to.number + place) = load_four<false>(at, left);
      }
    });
  }
  METHOD void store(int t, const Line& line) const {
    each(t, [&](int place, T* at, int left) {
      if constexpr (TOGETHER == 1) {
        UNROLL for (int i = 0; i < Line::EACH; i++)
          if (i < left) at[i] = line.number[place + i];
      } else if constexpr (Line::EACH * Line::SIZE == 16) {
        if (left > 0) *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(line.number + place);
      } else {
        if (left > 0) *reinterpret_cast<uint2*>(at) = *reinterpret_cast<const uint2*>(line.number + place);
      }
    });
  }
};
