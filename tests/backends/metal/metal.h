// What our kernels use of Metal, on a CPU: its types and functions, and a threadgroup as coroutines in lock-step.
//
// Every thread of a threadgroup is a coroutine on its own stack. It runs until it reaches a barrier or an operation of
// its simdgroup, and goes on when all of its threadgroup or simdgroup have reached the same place; if they cannot, the
// launch fails. Threads run in ascending or in descending order: a kernel whose result depends on it lacks a barrier.
// Each array lies before an unreadable page, and threadgroup memory and outputs start as NaN.
//
// With ADDRESS_SPACES, for clang, pointers into device, constant and threadgroup memory are distinct types, as in Metal.

#pragma once

#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>

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
    memcpy(&word, &x, 4);
    bits = x != x ? 0x7fc0 : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  }
};

struct half {
  uint16_t bits;
  half() = default;
  explicit half(float x) {
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    const float size = fabsf(x);
    if (x != x) {
      bits = 0x7e00;
    } else if (size < 0x1p-14f) {
      bits = sign | uint16_t(nearbyintf(size * 0x1p24f));
    } else if (size >= 65520.0f) {
      bits = sign | 0x7c00;
    } else {
      uint32_t word;
      memcpy(&word, &size, 4);
      word += 0xfff + (word >> 13 & 1);
      bits = sign | uint16_t((word >> 13) - (112 << 10));
    }
  }
  explicit operator float() const {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? ldexpf(1024 + fraction, exponent - 25)
                                      : ldexpf(fraction, -24);
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
  memcpy(&to, &from, sizeof to);
  return to;
}

namespace emulator {

constexpr uint LANES = 32, MAX_THREADS = 1024;
constexpr size_t STACK = 64 << 10, PAGE = 64 << 10;
enum State { READY, AT_SIMDGROUP, AT_THREADGROUP, DONE };
enum Error { FINE, DIVERGED, MEMORY, UNDEFINED, UNEVEN };

struct Coroutine {
  State state;
  bool begun;
  int line;  // of the operation that it waits at
  uint turn;  // operations of the simdgroup so far
  ucontext_t start;
  jmp_buf where;
  uint3 in_grid, in_threadgroup;
  uint index;
};

inline Coroutine coroutines[MAX_THREADS];
inline Coroutine* current;
inline jmp_buf scheduler;
inline sigjmp_buf crashed;
inline uint64_t slots[2][MAX_THREADS];  // what the lanes of a simdgroup give each other, by the parity of their turn

inline void wait(State state, int line) {
  current->state = state, current->line = line;
  if (!_setjmp(current->where)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Coroutine& coroutine) {
  current = &coroutine;
  if (_setjmp(scheduler)) return;
  if (coroutine.begun) _longjmp(coroutine.where, 1);
  coroutine.begun = true;
  setcontext(&coroutine.start);
}

// The values of all lanes of the simdgroup.
template <typename T>
const uint64_t* exchange(T x, int line) {
  uint64_t* const mine = slots[current->turn++ % 2];
  mine[current->index] = 0;
  memcpy(&mine[current->index], &x, sizeof x);
  wait(AT_SIMDGROUP, line);
  return mine + current->index / LANES * LANES;
}

template <typename T>
T lane_of(const uint64_t* values, uint lane) {
  T x;
  memcpy(&x, &values[lane], sizeof x);
  return x;
}

// Let all of [first, end) go on if they wait at the same operation. None may have finished without the others.
inline bool release(uint first, uint end, State state) {
  for (uint i = first; i < end; i++)
    if (coroutines[i].state != state || coroutines[i].line != coroutines[first].line) return false;
  for (uint i = first; i < end; i++) coroutines[i].state = READY;
  return true;
}

inline Error run_threadgroup(uint threads, bool descending) {
  for (;;) {
    for (uint i = 0; i < threads; i++) {
      Coroutine& next = coroutines[descending ? threads - 1 - i : i];
      if (next.state == READY) resume(next);
    }
    uint done = 0;
    for (uint i = 0; i < threads; i++) done += coroutines[i].state == DONE;
    if (done == threads) return FINE;
    bool any = false;
    for (uint first = 0; first < threads; first += LANES) any |= release(first, first + LANES, AT_SIMDGROUP);
    if (!any && !release(0, threads, AT_THREADGROUP)) return DIVERGED;
  }
}

inline char own_code;  // in the library whose threadgroup memory is looked for

inline int poison(dl_phdr_info* info, size_t, void*) {
  bool here = false;
  const ElfW(Phdr)* memory = nullptr;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)& part = info->dlpi_phdr[i];
    const char* const at = (const char*)info->dlpi_addr + part.p_vaddr;
    here |= part.p_type == PT_LOAD && at <= &own_code && &own_code < at + part.p_memsz;
    if (part.p_type == PT_TLS) memory = &part;
  }
  if (here && memory && info->dlpi_tls_data) memset(info->dlpi_tls_data, 0xff, memory->p_memsz);
  return here;
}

inline void on_signal(int number) { siglongjmp(crashed, number == SIGSEGV || number == SIGBUS ? MEMORY : UNDEFINED); }

// Copies of arrays, each of which ends less than 16 bytes before a page that cannot be read.
struct Guarded {
  char *mapping, *data;
  size_t size, mapped;
  void place(const void* source, size_t bytes) {
    size = bytes, mapped = (bytes + 15) / PAGE * PAGE + 2 * PAGE;
    mapping = (char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(mapping + mapped - PAGE, PAGE, PROT_NONE);
    data = mapping + mapped - PAGE - (bytes + 15) / 16 * 16;
    if (source) memcpy(data, source, bytes);
    else memset(data, 0xff, bytes);
  }
};

typedef void (*Body)(void* const* arrays, uint3 grid, uint3 threads);

inline Body body;
inline void* const* body_arrays;
inline uint3 grid_size, threads_size, group_position;

inline void begin() {
  body(body_arrays, grid_size, threads_size);
  current->state = DONE;
  _longjmp(scheduler, 1);
}

inline Error run_grid(bool descending, char* stacks) {
  const uint threads = threads_size.x * threads_size.y * threads_size.z;
  const uint3 groups = {grid_size.x / threads_size.x, grid_size.y / threads_size.y, grid_size.z / threads_size.z};
  for (uint g = 0; g < groups.x * groups.y * groups.z; g++) {
    group_position = {g % groups.x, g / groups.x % groups.y, g / groups.x / groups.y};
    dl_iterate_phdr(poison, nullptr);
    for (uint i = 0; i < threads; i++) {
      Coroutine& c = coroutines[i];
      c.state = READY, c.begun = false, c.turn = 0, c.index = i;
      c.in_threadgroup = {i % threads_size.x, i / threads_size.x % threads_size.y, i / threads_size.x / threads_size.y};
      c.in_grid = {
          group_position.x * threads_size.x + c.in_threadgroup.x,
          group_position.y * threads_size.y + c.in_threadgroup.y,
          group_position.z * threads_size.z + c.in_threadgroup.z};
      getcontext(&c.start);
      c.start.uc_stack.ss_sp = stacks + i * STACK, c.start.uc_stack.ss_size = STACK, c.start.uc_link = nullptr;
      makecontext(&c.start, begin, 0);
    }
    if (const Error error = run_threadgroup(threads, descending)) return error;
  }
  return FINE;
}

// arrays: inputs, then outputs. Returns an Error.
inline int launch(Body run, const void* const* inputs, const size_t* input_sizes, int input_count, void* const* outputs,
                  const size_t* output_sizes, int output_count, const uint* grid, const uint* threads, int descending) {
  grid_size = {grid[0], grid[1], grid[2]}, threads_size = {threads[0], threads[1], threads[2]};
  const uint count = threads[0] * threads[1] * threads[2];
  if (count > MAX_THREADS || count % LANES) return UNEVEN;
  for (int i = 0; i < 3; i++)
    if (grid[i] == 0 || grid[i] % threads[i]) return UNEVEN;
  Guarded guarded[64];
  void* arrays[64];
  for (int i = 0; i < input_count; i++) guarded[i].place(inputs[i], input_sizes[i]);
  for (int i = 0; i < output_count; i++) guarded[input_count + i].place(nullptr, output_sizes[i]);
  for (int i = 0; i < input_count + output_count; i++) arrays[i] = guarded[i].data;
  char* const stacks =
      (char*)mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  body = run, body_arrays = arrays;
  const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  struct sigaction kept[5], action = {};
  action.sa_handler = on_signal;
  for (int i = 0; i < 5; i++) sigaction(numbers[i], &action, &kept[i]);
  int error = sigsetjmp(crashed, 1);
  if (!error) error = run_grid(descending, stacks);
  for (int i = 0; i < 5; i++) sigaction(numbers[i], &kept[i], nullptr);
  for (int i = 0; i < output_count; i++) memcpy(outputs[i], guarded[input_count + i].data, output_sizes[i]);
  for (int i = 0; i < input_count + output_count; i++) munmap(guarded[i].mapping, guarded[i].mapped);
  munmap(stacks, count * STACK);
  return error;
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
  const uint lane = emulator::current->index % emulator::LANES;
  return emulator::lane_of<T>(emulator::exchange(x, line), lane ^ mask);
}

template <typename T, typename Join>
T simd_reduce(T x, int line, Join join) {
  const uint64_t* const values = emulator::exchange(x, line);
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
inline float exp(float x) { return expf(x); }
namespace precise {
inline float rsqrt(float x) { return 1 / sqrtf(x); }
}  // namespace precise

}  // namespace metal

using namespace metal;
