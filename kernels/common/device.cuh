// What every kernel includes: names of the language, shared memory, and the few instructions that
// C++ has no words for. nvcc compiles the first half, any other compiler the second, which is the
// emulator's; inline PTX is in this file alone.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <stdint.h>
#else
#include "../emulator/cuda.h"
#endif

using bf16 = __nv_bfloat16;
using bf16x2 = __nv_bfloat162;

#if defined(__CUDACC__)

// A kernel of one parameter struct, launched by its name.
#define KERNEL(name, Params, max_threads) \
  extern "C" __global__ void __launch_bounds__(max_threads, 1) \
      name(const __grid_constant__ Params params)
// An array of a block's shared memory.
#define SHARED(T, name, size) __shared__ T name[size]

// The dynamic shared memory of a launch, array by array.
struct SharedMemory {
  uint32_t used = 0;
  template <class T> __device__ T* take(uint32_t count, const char*, uint32_t alignment = 128) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    const uint32_t start = (used + alignment - 1) & ~(alignment - 1);
    used = start + count * uint32_t(sizeof(T));
    return reinterpret_cast<T*>(dynamic_shared + start);
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}
// Four 8 x 8 matrices of 16-bit numbers, a row's address from each lane.
__device__ __forceinline__ void ldmatrix(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}
// d += a b with a: 16 x 16, b: 16 x 8.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Copies 16 bytes to shared memory without waiting; zeros where `is_wanted` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(is_wanted ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits for this thread's copies but those of the last `kGroups` commits.
template <int kGroups> __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Products of warpgroups: four warps multiply 64 rows, 16 a warp, by a matrix in shared memory, while
// they go on. `d` must not be touched from the product on until it was waited for.
#define HAS_WARPGROUPS 1

// Orders registers before the products that follow.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Keeps the compiler from using numbers earlier than here.
template <uint32_t kCount> __device__ __forceinline__ void settle(float (&d)[kCount][4]) {
#pragma unroll
  for (uint32_t i = 0; i < kCount; i++)
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
// Waits for the products of all commits but the last kGroups, of which `d` is a result.
template <uint32_t kGroups, uint32_t kCount>
__device__ __forceinline__ void wait_for_products(float (&d)[kCount][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
  settle(d);
}
// Shared memory that this thread has written is seen by products that other threads ask for behind
// the next barrier.
__device__ __forceinline__ void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
#define D1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D4(i) D1(i), D1(i + 1), D1(i + 2), D1(i + 3)
// d (+)= a b with a: 64 x 16 in registers, as `mma` takes it, and b: 16 x 8 kCount in shared memory
// (`swizzled_matrix`), a row of 16 numbers a column of b, or if it is transposed, a row of columns.
template <bool kIsTransposed>
__device__ __forceinline__ void multiply_async(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                               bool adds) {
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"
      "%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, adds, 1, 1, %38;\n}\n"
      : D4(0), D4(4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)), "n"(int(kIsTransposed)));
}
template <bool kIsTransposed>
__device__ __forceinline__ void multiply_async(float (&d)[16][4], const uint32_t (&a)[4],
                                               uint64_t b, bool adds) {
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"
      "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, "
      "adds, 1, 1, %70;\n}\n"
      : D4(0), D4(4), D4(8), D4(12)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)), "n"(int(kIsTransposed)));
}
#undef D1
#undef D4
#else
#define HAS_WARPGROUPS 0
#endif

// 2^x, results below the smallest normal number as zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

#else

#define KERNEL(name, Params, max_threads)                                               \
  static void name(Params params);                                                      \
  static ::emulator::Registered<Params, name> registered_##name(#name, max_threads);    \
  static void name(Params params)
#define SHARED(T, name, size)                                                           \
  static const char key_of_##name = 0;                                                  \
  T(&name)[size] = *static_cast<T(*)[size]>(                                            \
      ::emulator::static_shared(&key_of_##name, sizeof(T) * (size), alignof(T), #name))

struct SharedMemory {
  uint32_t used = 0;
  template <class T> T* take(uint32_t count, const char* name, uint32_t alignment = 128) {
    const uint32_t start = (used + alignment - 1) & ~(alignment - 1);
    used = start + count * uint32_t(sizeof(T));
    return static_cast<T*>(::emulator::dynamic_shared(start, count * sizeof(T), alignment, name));
  }
};

inline void ldmatrix(uint32_t (&matrices)[4], const void* row, EMULATOR_SITE) {
  ::emulator::ldmatrix(matrices, false, row, site);
}
inline void ldmatrix_transposed(uint32_t (&matrices)[4], const void* row, EMULATOR_SITE) {
  ::emulator::ldmatrix(matrices, true, row, site);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_SITE) {
  const uint32_t b[2] = {b0, b1};
  ::emulator::mma_bf16(d, a, b, site);
}
inline void copy_async(void* to, const void* from, bool is_wanted, EMULATOR_SITE) {
  ::emulator::cp_async(to, from, 16, is_wanted ? 16 : 0, site);
}
inline void commit_copies() { ::emulator::cp_async_commit(); }
template <int kGroups> inline void wait_for_copies() { ::emulator::cp_async_wait(kGroups); }
#define HAS_WARPGROUPS 1
inline uint32_t shared_address(const void* at) { return ::emulator::shared_address(at); }
inline void begin_products() {}
inline void commit_products() { ::emulator::commit_products(); }
template <uint32_t kCount> inline void settle(float (&)[kCount][4]) {}
template <uint32_t kGroups, uint32_t kCount>
inline void wait_for_products(float (&)[kCount][4], EMULATOR_SITE) {
  ::emulator::wait_for_products(kGroups, site);
}
inline void show_to_products() {}
template <bool kIsTransposed, uint32_t kCount>
inline void multiply_async(float (&d)[kCount][4], const uint32_t (&a)[4], uint64_t b, bool adds,
                           EMULATOR_SITE) {
  ::emulator::multiply_async(&d[0][0], kCount, a, b, adds, kIsTransposed, site);
}
inline float exp2_approx(float x) {
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;
}

#endif

constexpr uint32_t kWarpSize = 32;

// A matrix of 16-bit numbers in shared memory, as products of warpgroups find it: panels of 64
// numbers (128 bytes) a row, whose packs of 16 bytes are exchanged within a row, pack p of row r
// standing at p ^ r % 8, so that eight rows lie in distinct banks ("128-byte swizzle" in the PTX
// manual, with "matrix descriptor"). `start` lies within the first row of a swizzled group of eight.
constexpr uint32_t kSwizzledRowBytes = 128, kSwizzledBytes = 8 * kSwizzledRowBytes;
__device__ __forceinline__ uint64_t swizzled_matrix(uint32_t start, uint32_t panel_bytes) {
  const uint64_t in_panels = uint64_t(panel_bytes >> 4) << 16 | uint64_t(kSwizzledBytes >> 4) << 32;
  return uint64_t(1) << 62 | in_panels | (start & 0x3ffff) >> 4;
}
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kNone = 0xffffffffu;
#define INFINITY_F __uint_as_float(0x7f800000u)

template <class T> __device__ __forceinline__ T narrowed(float value);
template <> __device__ __forceinline__ float narrowed<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 narrowed<bf16>(float value) {
  return __float2bfloat16(value);
}
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(bf16 value) { return __bfloat162float(value); }

__device__ __forceinline__ bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
// Sums over the lanes below and this one.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value) {
  const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (uint32_t distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// As many numbers as one access moves.
template <class T, uint32_t kCount> struct alignas(kCount * sizeof(T)) Numbers {
  T values[kCount];
};

// Whether stretches of `count` numbers that begin here, one after the other, are whole packs of 16
// bytes, as many as one access moves.
template <class T>
__device__ __forceinline__ bool are_packs(const T* at, uint32_t count) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0 && count % (16 / sizeof(T)) == 0;
}

// All threads of a block take part.
template <class T>
__device__ __forceinline__ void copy_row(T* to, const T* from, uint32_t count) {
  if (are_packs(to, count) && are_packs(from, count)) {
    for (uint32_t i = threadIdx.x; i < count / uint32_t(16 / sizeof(T)); i += blockDim.x)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
  }
}

// How many elements of a sorted array are below a value.
template <class T>
__device__ __forceinline__ uint32_t lower_bound(const T* values, uint32_t count, uint32_t value) {
  uint32_t low = 0, high = count;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (values[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}
