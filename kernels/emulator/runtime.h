// What the files of the runtime share. Never compiled with the hooks of the checker.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {

constexpr size_t kStackBytes = 128 << 10;   // of a thread: its local memory
constexpr size_t kArenaBytes = 1 << 20;     // for a block's shared memory
constexpr size_t kRedZone = 128;            // between two arrays of shared memory
constexpr uint8_t kPoison = 0xFF;           // NaN in every float, -1 in every integer
constexpr uint8_t kCanary = 0xA5;
constexpr unsigned kAllLanes = 0xffffffffu;

enum class State : uint8_t { kReady, kRunning, kAtBlockBarrier, kAtWarpCollective, kDone };

// A copy that was asked for and has not been waited for.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, source_bytes;
  Site site;
};

// A product of warpgroups that was asked for and has not been waited for.
struct AsyncProduct {
  float* d;
  std::vector<float> before;  // what `d` held, at the first product that changes it
  unsigned num_columns, a[4];
  uint64_t b;
  bool adds, is_transposed;
  Site site;
};

// One thread of a block.
struct Fiber {
  void* stack_pointer;
  uint8_t* stack;  // its lowest address
  dim3 index;
  unsigned linear, lane, warp;
  State state;
  // What it waits for.
  const char* operation;
  Site site;
  unsigned mask;
  // What it knows to have happened before: barriers of the block, and steps of its warp's lanes.
  unsigned epoch, clock, clocks[32];
  std::vector<AsyncCopy> copies;
  std::vector<unsigned> copy_groups;  // copies in each committed group
  std::vector<AsyncProduct> products;
  std::vector<unsigned> product_groups;
};

// Lanes that wait for others at one collective.
struct Pending {
  unsigned mask, arrived, flags;
  const char* operation;
  Compute compute;
  Site site;
  Arguments arguments;
};

struct Warp {
  unsigned existing, live, ready;
  std::vector<Pending*> pending, spare;
};

// An array of shared memory.
struct Region {
  const void* key;
  size_t offset, bytes;  // the offset counts in dynamic shared memory
  uint8_t* start;
  const char* name;
};

// Who touched two bytes last: a write and two reads, each packed by `record` in checker.cpp.
struct Cell {
  uint64_t write, reads[2];
  unsigned write_block, read_blocks[2];
  unsigned write_place, read_places[2];
};

enum class SharedByte : uint8_t { kOutside, kUninitialised, kInitialised, kInFlight };

// Memory of the device.
struct Buffer {
  uintptr_t start, end;
  std::string name;
  void* mapping;
  size_t mapping_bytes;
  uint8_t* is_written;  // by byte, where accesses are checked
  Cell* shadow;
  uint64_t launch;  // the one that the shadow tells of
  uint64_t bytes_read, bytes_written;
  size_t num_cells() const { return (end - start) / 2 + 2; }
};

enum class Order { kAscending, kDescending, kRandom };

struct Launch {
  const Kernel* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  const void* params;
  Order order;
  uint64_t seed, num_blocks, serial;
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> has_failed{false};
  std::mutex mutex;
  std::string error;
};

// A thread of the host, and the block that it runs.
struct Worker {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  uint8_t* stacks = nullptr;
  size_t num_stacks = 0;
  uint8_t* arena = nullptr;
  SharedByte* shared_bytes = nullptr;  // of each byte of the arena, where accesses are checked
  Cell* cells = nullptr;
  void* stack_pointer = nullptr;

  Launch* launch = nullptr;
  dim3 block{};
  unsigned block_number = 0, num_threads = 0, num_live = 0, num_warps = 0;
  unsigned ready_warps = 0;
  uint8_t priorities[32] = {};
  uint64_t random_state = 1;
  size_t arena_used = 0;
  std::vector<Region> regions;
  // The block's barrier.
  unsigned num_waiting = 0;
  Vote vote = Vote::kPlain;
  Site barrier_site{};
  unsigned num_true = 0;
  int vote_result = 0;
  Buffer* last_buffer = nullptr;
};

extern thread_local Worker* worker;
extern thread_local Fiber* fiber;
extern bool is_checked;  // the kernels were compiled with the checker's hooks

uint64_t random_bits(Worker* worker);
const char* file_name(const char* path);

// scheduler.cpp
void make_ready(Worker* worker, Fiber* fiber);
void run_another(Fiber* from);
void shuffle_priorities(Worker* worker);
void record_failure(const std::string& message);
std::string where();

// collectives.cpp
void complete_collective(Worker* worker, unsigned warp, Pending* pending, Fiber* self);
void complete_barrier(Worker* worker);

// checker.cpp
void forget_block(Worker* worker);
void check_canaries(Worker* worker);
void note_access(const void* at, size_t bytes, bool is_write, bool is_atomic, Site site);
void set_shared_bytes(const void* at, size_t bytes, SharedByte state);
void join_clocks(Worker* worker, unsigned warp, unsigned lanes);
void remember_thread_storage();
void remember_segments();
std::string source_line(uintptr_t return_address);
std::string nearest_buffer(uintptr_t address);

}  // namespace emulator
