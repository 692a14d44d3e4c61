// Threads of a block as fibers, blocks over threads of the host, and the C interface.
//
// The thread of highest priority that can run always runs, until it waits. That drives one warp as
// far ahead of the others as the kernel's barriers allow, which is what makes a missing barrier
// visible. The order is ascending, descending, or random from a seed.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "runtime.h"

#if !defined(__x86_64__)
#error "switch_stack is written for x86-64; on another architecture it needs its callee-saved registers"
#endif

// Saves the callee's registers on this stack, keeps its pointer, and goes on with another.
asm(R"(
.text
.globl emulator_switch_stack
.type emulator_switch_stack,@function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch_stack,.-emulator_switch_stack
)");
extern "C" void emulator_switch_stack(void** from, void* to);

namespace emulator {

thread_local Worker* worker = nullptr;
thread_local Fiber* fiber = nullptr;
bool is_checked = false;

static constexpr size_t kGuardBytes = 64 << 10;
static std::atomic<uint64_t> num_launches{0};
static std::mutex idle_mutex;
static std::vector<Worker*> idle_workers;
static thread_local std::string last_error;
static Kernel* kernels = nullptr;

void add_kernel(Kernel* kernel) {
  kernel->next = kernels;
  kernels = kernel;
}

uint64_t random_bits(Worker* worker) {
  uint64_t x = worker->random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return worker->random_state = x;
}

const char* file_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

dim3 thread_index() { return fiber->index; }
dim3 block_index() { return worker->block; }
dim3 block_size() { return worker->launch->block; }
dim3 grid_size() { return worker->launch->grid; }

// Which thread runs.

static void switch_to(Fiber* from, Fiber* to) {
  fiber = to;
  to->state = State::kRunning;
  emulator_switch_stack(from ? &from->stack_pointer : &worker->stack_pointer, to->stack_pointer);
}

[[noreturn]] static void leave_block() {
  Fiber* from = fiber;
  fiber = nullptr;
  emulator_switch_stack(&from->stack_pointer, worker->stack_pointer);
  __builtin_unreachable();
}

void make_ready(Worker* worker, Fiber* fiber) {
  fiber->state = State::kReady;
  worker->warps[fiber->warp].ready |= 1u << fiber->lane;
  worker->ready_warps |= 1u << fiber->warp;
}

void shuffle_priorities(Worker* worker) {
  for (unsigned left = worker->num_warps; left > 1; left--)
    std::swap(worker->priorities[left - 1], worker->priorities[random_bits(worker) % left]);
}

static unsigned random_bit_of(Worker* worker, unsigned bits) {
  unsigned turn = unsigned(random_bits(worker)) & 31;
  unsigned turned = turn ? (bits >> turn) | (bits << (32 - turn)) : bits;
  return (__builtin_ctz(turned) + turn) & 31;
}

static Fiber* take_ready(Worker* worker) {
  if (!worker->ready_warps) return nullptr;
  unsigned warp, lane;
  switch (worker->launch->order) {
    case Order::kAscending:
      warp = __builtin_ctz(worker->ready_warps);
      lane = __builtin_ctz(worker->warps[warp].ready);
      break;
    case Order::kDescending:
      warp = 31 - __builtin_clz(worker->ready_warps);
      lane = 31 - __builtin_clz(worker->warps[warp].ready);
      break;
    default: {
      if (random_bits(worker) % 128 == 0) shuffle_priorities(worker);
      unsigned first = 0;
      while (!(worker->ready_warps >> worker->priorities[first] & 1)) first++;
      warp = worker->priorities[first];
      lane = random_bit_of(worker, worker->warps[warp].ready);
    }
  }
  Warp& of = worker->warps[warp];
  of.ready &= ~(1u << lane);
  if (!of.ready) worker->ready_warps &= ~(1u << warp);
  return &worker->fibers[warp * 32 + lane];
}

// Who waits where, as "64 threads wait in __syncthreads at rms_norm.cu:58: threads 0-31,64-95".
static std::string describe_stall(Worker* worker) {
  struct Group {
    const Fiber* first;
    std::vector<unsigned> members;
  };
  std::vector<Group> groups;
  unsigned num_done = 0;
  for (unsigned i = 0; i < worker->num_threads; i++) {
    const Fiber& fiber = worker->fibers[i];
    if (fiber.state == State::kDone) {
      num_done++;
      continue;
    }
    auto is_same = [&](const Group& group) {
      return group.first->site.line == fiber.site.line && group.first->mask == fiber.mask &&
             !strcmp(group.first->operation, fiber.operation);
    };
    auto group = std::find_if(groups.begin(), groups.end(), is_same);
    if (group == groups.end()) group = groups.insert(group, Group{&fiber, {}});
    group->members.push_back(i);
  }
  std::string text;
  char part[256];
  for (const Group& group : groups) {
    const Fiber& first = *group.first;
    snprintf(part, sizeof part, "  %zu threads wait in %s (mask 0x%08x) at %s:%d: threads ",
             group.members.size(), first.operation, first.mask, file_name(first.site.file),
             first.site.line);
    text += part;
    for (size_t i = 0; i < group.members.size();) {
      size_t last = i;
      while (last + 1 < group.members.size() &&
             group.members[last + 1] == group.members[last] + 1)
        last++;
      snprintf(part, sizeof part, last > i ? "%s%u-%u" : "%s%u", i ? "," : "", group.members[i],
               group.members[last]);
      text += part;
      i = last + 1;
    }
    text += "\n";
  }
  snprintf(part, sizeof part, "  %u threads have exited", num_done);
  return text + part;
}

// `from` waits, is ready, or is done.
void run_another(Fiber* from) {
  Fiber* next = take_ready(worker);
  if (!next) {
    if (worker->num_live == 0) leave_block();
    fail("deadlock: no thread of the block can run\n%s", describe_stall(worker).c_str());
  }
  if (next == from) {
    fiber = from;
    from->state = State::kRunning;
    return;
  }
  switch_to(from, next);
}

// Failure.

std::string where() {
  char text[240];
  const Launch* launch = worker->launch;
  const dim3& block = worker->block;
  if (fiber)
    snprintf(text, sizeof text,
             "kernel %s, block (%u,%u,%u), thread (%u,%u,%u) [warp %u lane %u]",
             launch->kernel->name, block.x, block.y, block.z, fiber->index.x, fiber->index.y,
             fiber->index.z, fiber->warp, fiber->lane);
  else
    snprintf(text, sizeof text, "kernel %s, block (%u,%u,%u)", launch->kernel->name, block.x,
             block.y, block.z);
  return text;
}

void record_failure(const std::string& message) {
  Launch* launch = worker->launch;
  std::lock_guard<std::mutex> guard(launch->mutex);
  if (launch->error.empty()) launch->error = message;
  launch->has_failed = true;
}

void fail(const char* format, ...) {
  char text[4096];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  record_failure(where() + ": " + text);
  leave_block();  // the other threads of the block are left where they are
}

// A fault in a kernel is a failure of its launch and not the end of the process.
static struct sigaction previous_action;
static void on_fault(int signal, siginfo_t* info, void* context) {
  if (fiber) {
    uintptr_t address = uintptr_t(info->si_addr);
    if (address - uintptr_t(fiber->stack - kGuardBytes) < kGuardBytes)
      fail("a thread's stack is full (%zu KiB of local memory)", kStackBytes >> 10);
    uintptr_t at = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
    std::string line = source_line(at + 1);
    if (info->si_code == SI_KERNEL)
      fail("misaligned 16-byte access (%s)", line.c_str());
    fail("access outside every device buffer: %s (%s)", nearest_buffer(address).c_str(),
         line.c_str());
  }
  sigaction(signal, &previous_action, nullptr);
}

// Blocks.

static void fiber_main() {
  worker->launch->kernel->run(worker->launch->params);
  Fiber* self = fiber;
  Warp& warp = worker->warps[self->warp];
  if (!self->copies.empty())
    fail("the thread exits with %zu copies that it never waited for (the first at %s:%d)",
         self->copies.size(), file_name(self->copies[0].site.file), self->copies[0].site.line);
  self->state = State::kDone;
  worker->num_live--;
  warp.live &= ~(1u << self->lane);
  for (size_t i = 0; i < warp.pending.size();) {
    Pending* pending = warp.pending[i];
    if (pending->mask >> self->lane & 1) {
      if (pending->flags & kNeedsAllLanes)
        fail("the thread exits while lanes 0x%08x of its warp wait in %s (%s:%d)",
             pending->arrived, pending->operation, file_name(pending->site.file),
             pending->site.line);
      unsigned needed = pending->mask & warp.live;
      if (needed && (pending->arrived & needed) == needed) {
        complete_collective(worker, self->warp, pending, nullptr);
        continue;
      }
    }
    i++;
  }
  if (worker->num_waiting)
    fail("the thread exits while %u threads of the block wait in __syncthreads (%s:%d)",
         worker->num_waiting, file_name(worker->barrier_site.file), worker->barrier_site.line);
  run_another(self);
  abort();
}

static void make_stacks(Worker* worker, size_t count) {
  if (worker->num_stacks >= count) return;
  const size_t stride = kStackBytes + kGuardBytes;
  if (worker->stacks) munmap(worker->stacks, worker->num_stacks * stride);
  worker->stacks = static_cast<uint8_t*>(
      mmap(nullptr, count * stride, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (size_t i = 0; i < count; i++) mprotect(worker->stacks + i * stride, kGuardBytes, PROT_NONE);
  worker->num_stacks = count;
}

static void start_fiber(Worker* worker, unsigned linear) {
  const dim3& block = worker->launch->block;
  Fiber& fiber = worker->fibers[linear];
  fiber.index = {linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
  fiber.linear = linear;
  fiber.lane = linear % 32;
  fiber.warp = linear / 32;
  fiber.operation = "start";
  fiber.site = {"", 0};
  fiber.mask = 0;
  fiber.epoch = fiber.clock = 1;
  memset(fiber.clocks, 0, sizeof fiber.clocks);
  fiber.copies.clear();
  fiber.copy_groups.clear();
  fiber.products.clear();
  fiber.product_groups.clear();
  fiber.stack = worker->stacks + linear * (kStackBytes + kGuardBytes) + kGuardBytes;
  // Staggered, so that the frames of a warp do not share the sets of the cache.
  uint8_t* top = fiber.stack + kStackBytes - 64 - linear % 16 * 256;
  void** slot = reinterpret_cast<void**>(uintptr_t(top) & ~uintptr_t(15));
  *--slot = nullptr;
  *--slot = reinterpret_cast<void*>(fiber_main);
  for (int saved = 0; saved < 6; saved++) *--slot = nullptr;
  fiber.stack_pointer = slot;
  make_ready(worker, &fiber);
}

static void run_block(Worker* worker, Launch* launch, uint64_t number) {
  const dim3& grid = launch->grid;
  worker->launch = launch;
  worker->block = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                   unsigned(number / grid.x / grid.y)};
  worker->block_number = unsigned(number);
  unsigned count = launch->block.x * launch->block.y * launch->block.z;
  worker->num_threads = worker->num_live = count;
  worker->num_warps = (count + 31) / 32;
  worker->random_state =
      (launch->seed * 0x9E3779B97F4A7C15ull) ^ ((number + 1) * 0xD1B54A32D192ED03ull) ^ 0x1234567;
  if (!worker->random_state) worker->random_state = 1;
  for (int i = 0; i < 4; i++) random_bits(worker);
  worker->num_waiting = 0;
  worker->ready_warps = 0;
  forget_block(worker);
  make_stacks(worker, count);
  if (worker->fibers.size() < count) worker->fibers.resize(count);
  if (worker->warps.size() < worker->num_warps) worker->warps.resize(worker->num_warps);
  for (unsigned i = 0; i < worker->num_warps; i++) {
    worker->priorities[i] = uint8_t(i);
    Warp& warp = worker->warps[i];
    unsigned lanes = std::min(32u, count - i * 32);
    warp.existing = warp.live = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
    warp.ready = 0;
    warp.spare.insert(warp.spare.end(), warp.pending.begin(), warp.pending.end());
    warp.pending.clear();
  }
  if (launch->order == Order::kRandom) shuffle_priorities(worker);
  for (unsigned i = 0; i < count; i++) start_fiber(worker, i);
  switch_to(nullptr, take_ready(worker));
  fiber = nullptr;
  check_canaries(worker);
}

static Worker* take_worker() {
  std::lock_guard<std::mutex> guard(idle_mutex);
  if (!idle_workers.empty()) {
    Worker* idle = idle_workers.back();
    idle_workers.pop_back();
    return idle;
  }
  auto* fresh = new Worker;
  auto map = [](size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  fresh->arena = static_cast<uint8_t*>(map(kArenaBytes));
  fresh->shared_bytes = static_cast<SharedByte*>(map(kArenaBytes));
  fresh->cells = static_cast<Cell*>(map(kArenaBytes / 2 * sizeof(Cell)));
  return fresh;
}

static void run_blocks(Launch* launch) {
  Worker* own = take_worker();
  worker = own;
  own->last_buffer = nullptr;
  remember_thread_storage();
  stack_t signal_stack{}, previous{};
  std::vector<uint8_t> space(256 << 10);
  signal_stack.ss_sp = space.data();
  signal_stack.ss_size = space.size();
  sigaltstack(&signal_stack, &previous);
  for (;;) {
    uint64_t next = launch->next_block++;
    if (next >= launch->num_blocks || launch->has_failed) break;
    if (launch->order == Order::kDescending) next = launch->num_blocks - 1 - next;
    if (launch->order == Order::kRandom) next = (next + launch->seed * 7919) % launch->num_blocks;
    run_block(own, launch, next);
  }
  sigaltstack(&previous, nullptr);
  worker = nullptr;
  std::lock_guard<std::mutex> guard(idle_mutex);
  idle_workers.push_back(own);
}

static void start_once() {
  static std::once_flag once;
  std::call_once(once, [] {
    remember_segments();
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_action);
    sigaction(SIGBUS, &action, nullptr);
  });
}

static int refuse(const std::string& error) {
  last_error = error;
  return 1;
}

static int launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                  const void* params, size_t params_bytes, Order order, uint64_t seed) {
  start_once();
  const Kernel* kernel = kernels;
  while (kernel && strcmp(kernel->name, name)) kernel = kernel->next;
  if (!kernel) return refuse(std::string("there is no kernel ") + name);
  char text[256];
  if (params_bytes != kernel->params_bytes) {
    snprintf(text, sizeof text, "kernel %s takes %zu bytes of parameters and was given %zu", name,
             kernel->params_bytes, params_bytes);
    return refuse(text);
  }
  uint64_t threads = uint64_t(block.x) * block.y * block.z;
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kernel->max_threads || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > 227 * 1024) {
    snprintf(text, sizeof text,
             "kernel %s cannot be launched with grid (%u,%u,%u), block (%u,%u,%u) of at most %u "
             "threads, %zu bytes of shared memory",
             name, grid.x, grid.y, grid.z, block.x, block.y, block.z, kernel->max_threads,
             shared_bytes);
    return refuse(text);
  }
  Launch launch;
  launch.kernel = kernel;
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = shared_bytes;
  launch.params = params;
  launch.order = order;
  launch.seed = seed;
  launch.num_blocks = blocks;
  launch.serial = ++num_launches;
  // The shadow of memory is not made for several threads of the host.
  unsigned most = is_checked ? 1 : std::thread::hardware_concurrency();
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < std::min<uint64_t>(most, blocks / 4); i++)
    others.emplace_back(run_blocks, &launch);
  run_blocks(&launch);
  for (std::thread& other : others) other.join();
  return launch.has_failed ? refuse(launch.error) : 0;
}

}  // namespace emulator

extern "C" {

// Runs a kernel to its end, its threads in an order: 0 ascending, 1 descending, 2 random from the
// seed. Not zero where it failed; `emulator_last_error` then says why.
int emulator_launch(const char* name, const unsigned grid[3], const unsigned block[3],
                    size_t shared_bytes, const void* params, size_t params_bytes, int order,
                    uint64_t seed) {
  return emulator::launch(name, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                          shared_bytes, params, params_bytes,
                          static_cast<emulator::Order>(order), seed);
}

// Of the last launch of this thread that failed.
const char* emulator_last_error() { return emulator::last_error.c_str(); }
}
