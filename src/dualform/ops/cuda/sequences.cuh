// Sequences in memory, side by side in rows or packed end to end in one, and their division into spans of time.
//
// Where sequences are packed, the spans of sequence r are numbered from begin / size + r: a number never belongs to two
// sequences, and some numbers belong to none.
#pragma once

#include "common.cuh"

// Strides in elements; (rows, T, ...) with the last axes contiguous, or (rows, D, T), where `time` is from one channel
// to the next.
struct View {
  const void* data;
  int64 row, time;
};

// What lies at one place of every step: an address, and the bytes from one step to the next. With `last` time is.
template <class T>
struct Column {
  const char* from;
  int bytes;
  METHOD Column(const View& v, int64 row, int64 time, int64 place, bool last = false)
      : from(whole(static_cast<const char*>(v.data) +
                   (row * v.row + (last ? place * v.time + time : time * v.time + place)) * int(sizeof(T)))),
        bytes((last ? 1 : int(v.time)) * int(sizeof(T))) {}
  METHOD T* at(int t) const { return (T*)(from + product(t, bytes)); }
};

DEVICE int64 over(int64 a, int64 b) { return (a + b - 1) / b; }

// The sequence that a span belongs to; for a number beyond the last span the result may be `rows`.
DEVICE int64 find_sequence(const int64* borders, int64 rows, int64 length, int64 size, int64 span) {
  if (!borders) return span / over(length, size);
  int64 low = 0, high = rows;  // the last sequence whose first span is not beyond this one
  while (high - low > 1) {
    const int64 middle = (low + high) / 2;
    (borders[middle] / size + middle <= span ? low : high) = middle;
  }
  return low;
}
