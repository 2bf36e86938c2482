// A threadgroup's threads as coroutines in lock-step, on one thread of a CPU.
//
// Each runs on its own stack until it reaches a barrier or an operation of its simdgroup, and goes on when all of its
// threadgroup or simdgroup have reached the same place; if they cannot, the launch fails. They run in ascending or in
// descending order: a kernel whose result depends on it lacks a barrier. Each array lies before an unreadable page, and
// threadgroup memory and outputs start as NaN.

#include "metal.h"

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {

constexpr uint MAX_THREADS = 1024;
constexpr size_t STACK = 64 << 10, PAGE = 64 << 10;
enum Error { FINE, DIVERGED, MEMORY, UNDEFINED, UNEVEN };

struct Coroutine {
  State state;
  bool begun;
  int line;  // of the operation that it waits at
  uint turn;  // operations of the simdgroup so far
  ucontext_t start;
  jmp_buf where;
  Place place;
};

static Coroutine coroutines[MAX_THREADS];
static Coroutine* running;
static jmp_buf scheduler;
static sigjmp_buf crashed;
static uint64_t slots[2][MAX_THREADS];  // what the lanes of a simdgroup give each other, by the parity of their turn

const Place& current() { return running->place; }

void wait(State state, int line) {
  running->state = state, running->line = line;
  if (!_setjmp(running->where)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void resume(Coroutine& coroutine) {
  running = &coroutine;
  if (_setjmp(scheduler)) return;
  if (coroutine.begun) _longjmp(coroutine.where, 1);
  coroutine.begun = true;
  setcontext(&coroutine.start);
}

const uint64_t* exchange(uint64_t value, int line) {
  uint64_t* const mine = slots[running->turn++ % 2];
  mine[running->place.index] = value;
  wait(AT_SIMDGROUP, line);
  return mine + running->place.index / LANES * LANES;
}

// Let all of [first, end) go on if they wait at the same operation. None may have finished without the others.
static bool release(uint first, uint end, State state) {
  for (uint i = first; i < end; i++)
    if (coroutines[i].state != state || coroutines[i].line != coroutines[first].line) return false;
  for (uint i = first; i < end; i++) coroutines[i].state = READY;
  return true;
}

static Error run_threadgroup(uint threads, bool descending) {
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

static char own_code;  // in the library whose threadgroup memory is looked for

static int poison(dl_phdr_info* info, size_t, void*) {
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

static void on_signal(int number) { siglongjmp(crashed, number == SIGSEGV || number == SIGBUS ? MEMORY : UNDEFINED); }

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

static void* const* kernel_arrays;
static uint3 grid_size, threads_size, group;

uint3 group_position() { return group; }

static void begin() {
  call(kernel_arrays, grid_size, threads_size);
  running->state = DONE;
  _longjmp(scheduler, 1);
}

static Error run_grid(bool descending, char* stacks) {
  const uint threads = threads_size.x * threads_size.y * threads_size.z;
  const uint3 groups = {grid_size.x / threads_size.x, grid_size.y / threads_size.y, grid_size.z / threads_size.z};
  for (uint g = 0; g < groups.x * groups.y * groups.z; g++) {
    group = {g % groups.x, g / groups.x % groups.y, g / groups.x / groups.y};
    dl_iterate_phdr(poison, nullptr);
    for (uint i = 0; i < threads; i++) {
      Coroutine& c = coroutines[i];
      c.state = READY, c.begun = false, c.turn = 0, c.place.index = i;
      c.place.in_threadgroup = {
          i % threads_size.x, i / threads_size.x % threads_size.y, i / threads_size.x / threads_size.y};
      c.place.in_grid = {
          group.x * threads_size.x + c.place.in_threadgroup.x,
          group.y * threads_size.y + c.place.in_threadgroup.y,
          group.z * threads_size.z + c.place.in_threadgroup.z};
      getcontext(&c.start);
      c.start.uc_stack.ss_sp = stacks + i * STACK, c.start.uc_stack.ss_size = STACK, c.start.uc_link = nullptr;
      makecontext(&c.start, begin, 0);
    }
    if (const Error error = run_threadgroup(threads, descending)) return error;
  }
  return FINE;
}


}  // namespace emulator

using namespace emulator;

// Run the kernel on copies of the inputs, and copy what it writes to the outputs. Returns an Error.
extern "C" __attribute__((visibility("default"))) int run(
    const void* const* inputs, const size_t* input_sizes, int input_count, void* const* outputs,
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
  kernel_arrays = arrays;
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

