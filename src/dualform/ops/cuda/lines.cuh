// Tensors with time innermost, (B, D, T), pass through shared memory: LINE steps of several rows, channels or states,
// are copied at once, and a lane reads four rows of one step from there. So memory is read in whole sectors, and the
// turn from rows to steps takes no instructions of its own.
//
// TOGETHER steps, 8, 4 or one, are aligned in all of these tensors and divide their length.
#pragma once

#include "sequences.cuh"

#if defined(DUALFORM_EMULATED)
constexpr bool READS_TURNED = false, WRITES_TURNED = false;
DEVICE void read_turned(const void*, unsigned*) {}
DEVICE void write_turned(void*, const unsigned*) {}
#else
// Two matrices of 8 x 8 numbers of 16 bits; lane i < 16 gives the address of row i of both. Of each matrix a lane has
// column lane / 4 of row 2 (lane % 4) and of the next one.
constexpr bool READS_TURNED = true, WRITES_TURNED = __CUDA_ARCH__ >= 900;
DEVICE void read_turned(const void* row, unsigned* pairs) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(pairs[0]), "=r"(pairs[1])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void write_turned(void* row, const unsigned* pairs) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
               "r"(pairs[0]), "r"(pairs[1])
               : "memory");
#endif
}
#endif

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
    if constexpr (READS_TURNED && SIZE == 2 && ROWS == 16) {
      read_turned(number + lane % 16 * STRIDE + t / 8 * 8, found.pair);
    } else {
      UNROLL for (int i = 0; i < 4; i++)
        put_one(found, i, number[place(four + i) + t]);
    }
    return found;
  }
  METHOD void write(int lane, int t, int four, const float* x) {
    Four<T> f;
    pack(f, x);
    if constexpr (WRITES_TURNED && SIZE == 2 && ROWS == 16) {
      write_turned(number + lane % 16 * STRIDE + t / 8 * 8, f.pair);
      return;
    }
    UNROLL for (int i = 0; i < 4; i++)
      number[place(four + i) + t] = get_one(f, i);
  }
};

// Where they lie in memory: `count` rows from `at` on, of one sequence. Lanes beyond the copies do what others do.
template <class T, int ROWS>
struct Rows {
  using Line = Lines<T, ROWS>;
  static constexpr int FIRST = Line::COPIES < 32 ? Line::COPIES : 32, PER_ROW = Line::PER_ROW;
  static_assert(PER_ROW <= 8, "so that the rows of a lane are a multiple of four apart, and so are their places");
  T* from;  // what this lane copies first
  int64 stride;
  int row, count, limit, place;
  METHOD Rows(const View& v, int64 batch, int64 begin, int length, int64 at, int count, int lane)
      : stride(v.time), row(lane % FIRST / PER_ROW), count(count) {
    const int step = lane % PER_ROW * Line::EACH;
    from = whole((T*)v.data + batch * v.row + (at + row) * v.time + begin + step);
    limit = row < count ? length - step : 0;
    place = Line::place(row) + step;
  }

  // Calls f(place in a line, address, steps that are there) for all that this lane copies of the line at step t.
  template <class F>
  METHOD void each(int t, const F& f) const {
    UNROLL for (int more = 0; more < ROWS; more += 32 / PER_ROW)
      f(place + Line::place(more), from + more * stride + t, more && row + more >= count ? 0 : limit - t);
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
