// What our kernels use of Metal, on a CPU: its types and functions. runtime.cpp runs them.
//
// With ADDRESS_SPACES, for clang, pointers into device, constant and threadgroup memory are distinct types, as in Metal.
// No header of the system but stdint.h, so that a kernel compiles quickly.

#pragma once

#include <stdint.h>

#ifdef ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup static __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup static thread_local
#endif
#define thread

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#ifdef ADDRESS_SPACES // the members of a class would be in one address space
typedef _Float16 half;
typedef __bf16 bfloat;
typedef half half2 __attribute__((ext_vector_type(2)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
#else
// Metal converts float to bfloat only when told to, and what is declared here is stricter: the reverse as well.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {
    uint32_t word;
    __builtin_memcpy(&word, &x, 4);
    bits = x != x ? 0x7fc0 : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    __builtin_memcpy(&x, &word, 4);
    return x;
  }
};

struct half {
  uint16_t bits;
  half() = default;
  explicit half(float x) {
    const uint16_t sign = __builtin_signbit(x) ? 0x8000 : 0;
    const float size = __builtin_fabsf(x);
    if (x != x) {
      bits = 0x7e00;
    } else if (size < 0x1p-14f) {
      bits = sign | uint16_t(__builtin_nearbyintf(size * 0x1p24f));
    } else if (size >= 65520.0f) {
      bits = sign | 0x7c00;
    } else {
      uint32_t word;
      __builtin_memcpy(&word, &size, 4);
      word += 0xfff + (word >> 13 & 1);
      bits = sign | uint16_t((word >> 13) - (112 << 10));
    }
  }
  explicit operator float() const {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? __builtin_nanf("") : __builtin_inff())
                       : exponent     ? __builtin_ldexpf(1024 + fraction, exponent - 25)
                                      : __builtin_ldexpf(fraction, -24);
    return bits & 0x8000 ? -size : size;
  }
};

struct alignas(4) half2 { half x, y; };
struct alignas(8) uint2 { uint x, y; };
struct alignas(16) uint4 { uint x, y, z, w; };
#endif
struct uint3 { uint x, y, z; };

typedef half float16_t;
typedef bfloat bfloat16_t;

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

namespace emulator {

constexpr uint LANES = 32;
enum State { READY, AT_SIMDGROUP, AT_THREADGROUP, DONE };

// The thread that runs, and the threadgroup's place in the grid. Defined in runtime.cpp.
struct Place {
  uint3 in_grid, in_threadgroup;
  uint index;
};
const Place& current();
uint3 group_position();
void wait(State state, int line);
void call(void* const* arrays, uint3 grid, uint3 threads);  // the kernel, defined after its text
// Gives a value to the simdgroup, and returns those of its lanes.
const uint64_t* exchange(uint64_t value, int line);

template <typename T>
const uint64_t* exchange_bits(T x, int line) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &x, sizeof x);
  return exchange(bits, line);
}

template <typename T>
T lane_of(const uint64_t* values, uint lane) {
  T x;
  __builtin_memcpy(&x, &values[lane], sizeof x);
  return x;
}

}  // namespace emulator

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  emulator::wait(emulator::AT_THREADGROUP, line);
}
inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) { emulator::wait(emulator::AT_SIMDGROUP, line); }

template <typename T>
T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  const uint lane = emulator::current().index % emulator::LANES;
  return emulator::lane_of<T>(emulator::exchange_bits(x, line), lane ^ mask);
}

template <typename T, typename Join>
T simd_reduce(T x, int line, Join join) {
  const uint64_t* const values = emulator::exchange_bits(x, line);
  T parts[emulator::LANES];
  for (uint lane = 0; lane < emulator::LANES; lane++) parts[lane] = emulator::lane_of<T>(values, lane);
  for (uint half = emulator::LANES / 2; half; half /= 2)
    for (uint lane = 0; lane < half; lane++) parts[lane] = join(parts[lane], parts[lane + half]);
  return parts[0];
}

template <typename T>
T simd_sum(T x, int line = __builtin_LINE()) {
  return simd_reduce(x, line, [](T a, T b) { return a + b; });
}
template <typename T>
T simd_max(T x, int line = __builtin_LINE()) {
  return simd_reduce(x, line, [](T a, T b) { return a < b || a != a ? b : a; });
}
template <typename T>
T simd_min(T x, int line = __builtin_LINE()) {
  return simd_reduce(x, line, [](T a, T b) { return b < a || a != a ? b : a; });
}

// As Metal's, both arguments have one type, and a NaN loses.
template <typename T>
T max(T a, T b) { return a < b || a != a ? b : a; }
template <typename T>
T min(T a, T b) { return b < a || a != a ? b : a; }
inline float exp(float x) { return __builtin_expf(x); }
namespace precise {
inline float rsqrt(float x) { return 1 / __builtin_sqrtf(x); }
}  // namespace precise

}  // namespace metal

using namespace metal;
