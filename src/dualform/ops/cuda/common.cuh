// What the kernels share: numbers of several types, four neighbours at a time; exponentials; sums across lanes.
//
// Compiled at run time, for the GPU at hand, without any header of CUDA. Where DUALFORM_EMULATED is defined, a host
// compiler runs the same source for the tests, and the few machine instructions are spelled in C++.
#pragma once

typedef long long int64;

#define METHOD __device__ __forceinline__
#define DEVICE static METHOD
#define UNROLL _Pragma("unroll")

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

#if defined(DUALFORM_EMULATED)
#define SHARED_MEMORY(name) char* const name = emulator::shared_memory
// As far off as that of a GPU: x is rounded down to 23 binary places, and the table is a little high.
DEVICE float exp2_of(float x) { return exp2f(x > -1e6f ? float(floor(double(x) * 0x1p23) * 0x1p-23 + 0x1p-25) : x); }
DEVICE float log2_of(float x) { return log2f(x); }
DEVICE float reciprocal(float x) { return 1 / x; }
DEVICE float from_bits(unsigned x) { return __builtin_bit_cast(float, x); }
DEVICE float half_to_float(unsigned short x) { return float(__builtin_bit_cast(_Float16, x)); }
DEVICE unsigned short float_to_half(float x) { return __builtin_bit_cast(unsigned short, _Float16(x)); }
DEVICE unsigned pack_bfloat16(float low, float high) {
  auto round = [](float x) {
    unsigned word = __builtin_bit_cast(unsigned, x);
    return x == x ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fffu;
  };
  return round(low) | round(high) << 16;
}
DEVICE unsigned pack_float16(float low, float high) { return float_to_half(low) | unsigned(float_to_half(high)) << 16; }
// A barrier of two warps: one says that it has come by and goes on, the other waits for it. `never` is false, but the
// compiler does not know: over the end of a loop it moves nothing, and others wait for what follows.
DEVICE void signal(int barrier) { emulator::arrive(barrier, 64); }
DEVICE void await(int barrier, bool) { emulator::sync(barrier, 64); }
DEVICE void prefetch(const void*) {}
DEVICE void pin(float&) {}
DEVICE int64 product(int a, int b) { return int64(a) * b; }
template <class T>
DEVICE T* whole(T* p) {
  return p;
}
template <int BYTES, bool WITH_LINE = false>
DEVICE void copy_async(void* shared, const void* from, bool wanted) {
  emulator::copy({shared, from, BYTES, wanted ? unsigned(BYTES) : 0u});
}
DEVICE void close_copies() { emulator::close_group(); }
template <int LEFT>
DEVICE void await_copies() {
  emulator::await_groups(LEFT);
}
#else
// One instruction, where the compiler would multiply 64 bits by 64.
DEVICE int64 product(int a, int b) {
  int64 found;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(found) : "r"(a), "r"(b));
  return found;
}
// A global address whose parts the compiler shall not add up again at every use.
template <class T>
DEVICE T* whole(T* p) {
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}
DEVICE unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
// From memory to shared memory, past all registers: 8 or 16 bytes, or zeros where they are not wanted. A thread closes
// groups of copies, and waits until no more than LEFT of them are on their way. WITH_LINE the cache gets all 128 bytes
// around them.
template <int BYTES, bool WITH_LINE = false>
DEVICE void copy_async(void* shared, const void* from, bool wanted) {
  const unsigned to = shared_address(shared);
  if constexpr (WITH_LINE && BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0)
                 : "memory");
  else if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                 "r"(wanted ? BYTES : 0)
                 : "memory");
}
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
// Has a number found here, not where it is used.
DEVICE void pin(float& x) { asm volatile("" : "+f"(x)); }
// Asks for a line of memory long before it is needed.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEVICE void signal(int barrier) { asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory"); }
DEVICE void await(int barrier, bool never) {
#pragma unroll 1
  do {
    asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
  } while (never);
}
#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float from_bits(unsigned x) { return __uint_as_float(x); }
DEVICE float half_to_float(unsigned short x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE unsigned pack_bfloat16(float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE unsigned pack_float16(float low, float high) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
#endif

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// log(1 + e^x); log(1 + e) / e on [0, 1] as a polynomial of least relative error, 1e-8.
DEVICE float softplus(float x) {
  constexpr float C[] = {1.f,           -0.499999017f, 0.333299607f,   -0.249541253f, 0.196758956f,
                         -0.153054655f, 0.106034406f,  -0.0569574237f, 0.0198503379f, -0.00324377581f};
  const float e = exp2_of(-fabsf(x) * LOG2_E);
  float p = C[9];
  UNROLL for (int i = 8; i >= 0; i--)
    p = p * e + C[i];
  return fmaxf(x, 0) + p * e;
}
DEVICE float sigmoid(float x) { return reciprocal(1 + exp2_of(-x * LOG2_E)); }

// Four neighbours of a tensor.
template <class T>
struct Four {
  unsigned pair[2];
};
template <>
struct Four<float> {
  float one[4];
};

DEVICE void unpack(const Four<float>& f, float* x) {
  UNROLL for (int i = 0; i < 4; i++)
    x[i] = f.one[i];
}
DEVICE void unpack(const Four<bfloat16>& f, float* x) {
  UNROLL for (int i = 0; i < 2; i++)
    x[2 * i] = from_bits(f.pair[i] << 16), x[2 * i + 1] = from_bits(f.pair[i] & 0xffff0000u);
}
DEVICE void unpack(const Four<float16>& f, float* x) {
  UNROLL for (int i = 0; i < 4; i++)
    x[i] = half_to_float((unsigned short)(f.pair[i / 2] >> (i % 2 * 16)));
}
DEVICE void pack(Four<float>& f, const float* x) {
  UNROLL for (int i = 0; i < 4; i++)
    f.one[i] = x[i];
}
DEVICE void pack(Four<bfloat16>& f, const float* x) {
  UNROLL for (int i = 0; i < 2; i++)
    f.pair[i] = pack_bfloat16(x[2 * i], x[2 * i + 1]);
}
DEVICE void pack(Four<float16>& f, const float* x) {
  UNROLL for (int i = 0; i < 2; i++)
    f.pair[i] = pack_float16(x[2 * i], x[2 * i + 1]);
}

// One of them, as it is.
DEVICE float get_one(const Four<float>& f, int i) { return f.one[i]; }
DEVICE void put_one(Four<float>& f, int i, float x) { f.one[i] = x; }
template <class T>
DEVICE T get_one(const Four<T>& f, int i) {
  return {(unsigned short)(f.pair[i / 2] >> (i % 2 * 16))};
}
template <class T>
DEVICE void put_one(Four<T>& f, int i, T x) {  // where there is zero
  f.pair[i / 2] |= unsigned(x.bits) << (i % 2 * 16);
}

// Four neighbours; with `WHOLE` all are there and may be read at once, else the first `count` of them are there.
template <bool WHOLE, class T>
DEVICE Four<T> load_four(const T* p, int count) {
  Four<T> f = {};
  if constexpr (WHOLE && sizeof(T) == 4) {
    float4 v = *reinterpret_cast<const float4*>(p);
    f.one[0] = v.x, f.one[1] = v.y, f.one[2] = v.z, f.one[3] = v.w;
  } else if constexpr (WHOLE) {
    uint2 v = *reinterpret_cast<const uint2*>(p);
    f.pair[0] = v.x, f.pair[1] = v.y;
  } else if constexpr (sizeof(T) == 4) {
    UNROLL for (int i = 0; i < 4; i++)
      if (i < count) f.one[i] = p[i];
  } else {
    UNROLL for (int i = 0; i < 4; i++)
      if (i < count) f.pair[i / 2] |= unsigned(p[i].bits) << (i % 2 * 16);
  }
  return f;
}
template <bool WHOLE, class T>
DEVICE void store_four(T* p, const float* x, int count) {
  Four<T> f;
  pack(f, x);
  if constexpr (WHOLE && sizeof(T) == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
  } else if constexpr (WHOLE) {
    *reinterpret_cast<uint2*>(p) = make_uint2(f.pair[0], f.pair[1]);
  } else if constexpr (sizeof(T) == 4) {
    UNROLL for (int i = 0; i < 4; i++)
      if (i < count) p[i] = x[i];
  } else {
    UNROLL for (int i = 0; i < 4; i++)
      if (i < count) p[i].bits = (unsigned short)(f.pair[i / 2] >> (i % 2 * 16));
  }
}

// COUNT floats that lie together, aligned as much as their number allows.
template <int COUNT>
DEVICE void read_floats(const float* p, float* x) {
  if constexpr (COUNT % 4 == 0) {
    UNROLL for (int i = 0; i < COUNT; i += 4) {
      float4 v = *reinterpret_cast<const float4*>(p + i);
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
  } else if constexpr (COUNT % 2 == 0) {
    UNROLL for (int i = 0; i < COUNT; i += 2) {
      float2 v = *reinterpret_cast<const float2*>(p + i);
      x[i] = v.x, x[i + 1] = v.y;
    }
  } else {
    UNROLL for (int i = 0; i < COUNT; i++)
      x[i] = p[i];
  }
}
template <int COUNT>
DEVICE void write_floats(float* p, const float* x) {
  if constexpr (COUNT % 4 == 0) {
    UNROLL for (int i = 0; i < COUNT; i += 4)
      *reinterpret_cast<float4*>(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else if constexpr (COUNT % 2 == 0) {
    UNROLL for (int i = 0; i < COUNT; i += 2)
      *reinterpret_cast<float2*>(p + i) = make_float2(x[i], x[i + 1]);
  } else {
    UNROLL for (int i = 0; i < COUNT; i++)
      p[i] = x[i];
  }
}

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int64 least(int64 a, int64 b) { return a < b ? a : b; }
DEVICE float of_lane(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE float from_lane(float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
DEVICE unsigned from_lane(unsigned x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
DEVICE bool in_any_lane(bool x) { return __any_sync(0xffffffffu, x); }

// COUNT values in each of two lanes whose numbers differ by `distance` -> the lower lane has the sums of the first
// half, the upper lane those of the second, in the first COUNT / 2 places.
template <int COUNT>
DEVICE void share_sums(float* x, int distance, int lane) {
  const bool upper = lane & distance;
  UNROLL for (int i = 0; i < COUNT / 2; i++) {
    float mine = upper ? x[COUNT / 2 + i] : x[i], other = upper ? x[i] : x[COUNT / 2 + i];
    x[i] = mine + from_lane(other, distance);
  }
}

// Four lanes, `distance` apart, of which this one is number k, have four numbers each: afterwards it has number k of
// each of them, in the order of the lanes.
DEVICE void turn(float* x, int k, int distance) {
  UNROLL for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = k & bit;
    UNROLL for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const float came = from_lane(upper ? x[i] : x[i + bit], distance * bit);
      x[i] = upper ? came : x[i], x[i + bit] = upper ? x[i + bit] : came;
    }
  }
}
DEVICE void turn(Four<float>& f, int k, int distance) { turn(f.one, k, distance); }
template <class T>
DEVICE void turn(Four<T>& f, int k, int distance) {
  unsigned &low = f.pair[0], &high = f.pair[1];
  const unsigned pair = from_lane(k & 2 ? low : high, 2 * distance);
  low = k & 2 ? pair : low, high = k & 2 ? high : pair;
  const unsigned firsts = low & 0xffffu | high << 16, seconds = low >> 16 | high & 0xffff0000u;
  const unsigned came = from_lane(k & 1 ? firsts : seconds, distance);
  const unsigned first = k & 1 ? came : firsts, second = k & 1 ? seconds : came;
  low = first & 0xffffu | second << 16, high = first >> 16 | second & 0xffff0000u;
}
