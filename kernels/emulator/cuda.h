// The part of CUDA C++ that our kernels use, for compilers of plain C++.
//
// Kernel files include common/device.cuh, which includes this file where nvcc is not the compiler.
// Every call that threads of a block make together is a function of the runtime (scheduler.cpp,
// collectives.cpp, checker.cpp); it notes where it was called from, so that errors name a line.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

namespace emulator {

// Where a call stands in a kernel's source: filled in by default arguments.
struct Site {
  const char* file;
  int line;
};
#define EMULATOR_SITE ::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

// The values never change within a thread of a kernel, so the compiler may ask once.
dim3 thread_index() __attribute__((const));
dim3 block_index() __attribute__((const));
dim3 block_size() __attribute__((const));
dim3 grid_size() __attribute__((const));

// Ends the launch with an error that names the kernel, the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What the lanes of a warp do together: the last one to arrive computes for all.
struct Arguments {
  void* of_lane[32];
  unsigned mask;     // the lanes that were named
  unsigned present;  // those of them that are alive
  const char* operation;
};
using Compute = void (*)(const Arguments&);
enum CollectiveFlags : unsigned { kNeedsAllLanes = 1, kOrdersMemory = 2 };
void warp_collective(const char* operation, unsigned mask, void* argument, Compute compute,
                     unsigned flags, Site site);

enum class Vote { kPlain, kCount };
int block_barrier(Vote vote, int predicate, Site site);

enum class Shuffle { kIndex, kUp, kXor };
uint64_t shuffle(const char* operation, Shuffle kind, unsigned mask, uint64_t value, int selector,
                 int width, Site site);
unsigned ballot(const char* operation, unsigned mask, bool predicate, Site site);

void cp_async(void* to, const void* from, int bytes, int source_bytes, Site site);
void cp_async_commit();
void cp_async_wait(int groups_in_flight);
void ldmatrix(unsigned* registers, bool is_transposed, const void* row, Site site);
void mma_bf16(float* d, const unsigned* a, const unsigned* b, Site site);

// A warp's part of products of warpgroups: 16 rows by 8 `num_columns` columns.
unsigned shared_address(const void* at);
void multiply_async(float* d, unsigned num_columns, const unsigned* a, uint64_t b, bool adds,
                    bool is_transposed, Site site);
void commit_products();
void wait_for_products(int groups_in_flight, Site site);

// Atomics live in the runtime, so that the checker sees them as such.
template <class T> T atomic_add(T* to, T value, Site site);
template <class T> T atomic_max(T* to, T value, Site site);

void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name);
// Part of the launch's dynamic shared memory; an array of its own to the checker.
void* dynamic_shared(size_t offset, size_t bytes, size_t alignment, const char* name);

// A kernel that can be launched by name.
struct Kernel {
  const char* name;
  unsigned max_threads;
  size_t params_bytes;
  void (*run)(const void* params);
  Kernel* next;
};
void add_kernel(Kernel* kernel);
template <class Params, void (*kKernel)(Params)>
struct Registered {
  Kernel kernel;
  Registered(const char* name, unsigned max_threads)
      : kernel{name, max_threads, sizeof(Params),
               [](const void* params) { kKernel(*static_cast<const Params*>(params)); }, nullptr} {
    add_kernel(&kernel);
  }
};

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

inline void __syncthreads(EMULATOR_SITE) {
  ::emulator::block_barrier(::emulator::Vote::kPlain, 0, site);
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return ::emulator::block_barrier(::emulator::Vote::kCount, predicate, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
  ::emulator::warp_collective("__syncwarp", mask, nullptr, nullptr, ::emulator::kOrdersMemory,
                              site);
}

#define EMULATOR_SHUFFLE(name, kind, Selector)                                                   \
  template <class T>                                                                             \
  inline T name(unsigned mask, T value, Selector selector, int width = 32, EMULATOR_SITE) {      \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange 4 or 8 bytes");              \
    uint64_t bits = 0;                                                                           \
    memcpy(&bits, &value, sizeof value);                                                         \
    bits = ::emulator::shuffle(#name, ::emulator::Shuffle::kind, mask, bits, int(selector),      \
                               width, site);                                                     \
    memcpy(&value, &bits, sizeof value);                                                         \
    return value;                                                                                \
  }
EMULATOR_SHUFFLE(__shfl_sync, kIndex, int)
EMULATOR_SHUFFLE(__shfl_up_sync, kUp, unsigned)
EMULATOR_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef EMULATOR_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return ::emulator::ballot("__ballot_sync", mask, predicate != 0, site);
}

template <class T> inline T atomicAdd(T* to, std::common_type_t<T> value, EMULATOR_SITE) {
  return ::emulator::atomic_add<T>(to, value, site);
}
template <class T> inline T atomicMax(T* to, std::common_type_t<T> value, EMULATOR_SITE) {
  return ::emulator::atomic_max<T>(to, value, site);
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

#define EMULATOR_MIN_MAX(T)                          \
  inline T min(T a, T b) { return b < a ? b : a; }   \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(unsigned(value.bits) << 16);
}
// Rounds to the nearest, ties to even; NaN stays NaN.
inline __nv_bfloat16 __float2bfloat16(float value) {
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {__bfloat162float(pair.x), __bfloat162float(pair.y)};
}
