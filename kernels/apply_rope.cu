// Turns each query and key head of a row by its row of the RoPE tables, first and second half of a head paired
// (RoPE, Su et al. 2021), after an RMS norm of each head where weights are given; then keeps the
// keys and values, those of prompts in contexts and those of beams in tails.
// Grid: a block a row. Block: 256 threads, where heads are whole packs of 16 bytes a thread two packs,
// else a warp a head. Bound by memory: reads a row once, writes queries and keys once, and keys and
// values once more.
#include "common/batch.cuh"

namespace apply_rope {

constexpr uint32_t kThreads = 256;

template <class T>
__device__ __forceinline__ void turn(T* head, const float* rope, const float* norm,
                                     uint32_t head_dim, float epsilon) {
  const uint32_t lane = threadIdx.x % kWarpSize, half = head_dim / 2;
  float scale = 1;
  if (norm) {
    float sum = 0;
    for (uint32_t i = lane; i < head_dim; i += kWarpSize) {
      const float value = widened(head[i]);
      sum += value * value;
    }
    scale = rsqrtf(warp_sum(sum) / float(head_dim) + epsilon);
    __syncwarp();  // all have read the head that each now writes a part of
  }
  for (uint32_t i = lane; i < half; i += kWarpSize) {
    const float x = widened(head[i]) * scale * (norm ? norm[i] : 1.0f);
    const float y = widened(head[half + i]) * scale * (norm ? norm[half + i] : 1.0f);
    const float cosine = rope[i], sine = rope[half + i];
    head[i] = narrowed<T>(x * cosine - y * sine);
    head[half + i] = narrowed<T>(y * cosine + x * sine);
  }
}

// As many numbers of a first and of a second half as one access moves.
template <class T> struct Halves {
  static constexpr uint32_t kPack = 16 / sizeof(T);
  Numbers<T, kPack> first, second;

  __device__ void read(const T* head, uint32_t column, uint32_t half) {
    first = *reinterpret_cast<const Numbers<T, kPack>*>(head + column);
    second = *reinterpret_cast<const Numbers<T, kPack>*>(head + half + column);
  }
  __device__ void write(T* head, uint32_t column, uint32_t half) const {
    *reinterpret_cast<Numbers<T, kPack>*>(head + column) = first;
    *reinterpret_cast<Numbers<T, kPack>*>(head + half + column) = second;
  }
  __device__ float sum_of_squares() const {
    float sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kPack; i++) {
      const float x = widened(first.values[i]), y = widened(second.values[i]);
      sum += x * x + y * y;
    }
    return sum;
  }
  // `rope` and `norm` are those of the first number.
  __device__ void turn(const float* rope, const float* norm, uint32_t half, float scale) {
#pragma unroll
    for (uint32_t i = 0; i < kPack; i += 4) {
      const auto at = [&](const float* numbers) {
        return *reinterpret_cast<const Numbers<float, 4>*>(numbers + i);
      };
      const Numbers<float, 4> cosines = at(rope), sines = at(rope + half);
      Numbers<float, 4> of_first{{1, 1, 1, 1}}, of_second{{1, 1, 1, 1}};
      if (norm) {
        of_first = at(norm);
        of_second = at(norm + half);
      }
#pragma unroll
      for (uint32_t k = 0; k < 4; k++) {
        const float x = widened(first.values[i + k]) * scale * of_first.values[k];
        const float y = widened(second.values[i + k]) * scale * of_second.values[k];
        first.values[i + k] = narrowed<T>(x * cosines.values[k] - y * sines.values[k]);
        second.values[i + k] = narrowed<T>(y * cosines.values[k] + x * sines.values[k]);
      }
    }
  }
};

// A row whose heads are whole packs, `per_head` threads a head: a power of two.
template <class T>
__device__ __forceinline__ void run_packed(const Params& params, uint32_t row, T* qkv,
                                           const float* rope, uint32_t per_head) {
  constexpr uint32_t kPack = Halves<T>::kPack;
  const uint32_t head_dim = params.pages.head_dim, half = head_dim / 2;
  const uint32_t num_kv_heads = params.pages.num_kv_heads;
  const uint32_t num_turned = params.num_heads + num_kv_heads;
  const KvPlace<T> to = kv_place<T>(params.batch, params.pages, params.layer, row);
  // All lanes of a warp go round as often.
  for (uint32_t first = threadIdx.x / kWarpSize * kWarpSize; first < num_turned * per_head;
       first += kThreads) {
    const uint32_t unit = first + threadIdx.x % kWarpSize;
    const uint32_t head = unit / per_head, column = unit % per_head * kPack;
    const bool is_live = head < num_turned, is_key = head >= params.num_heads;
    Halves<T> halves{};
    if (is_live) halves.read(qkv + head * head_dim, column, half);
    const float* norm = is_key ? params.key_norm : params.query_norm;
    float scale = 1;
    if (params.query_norm) {
      float sum = halves.sum_of_squares();
      for (uint32_t distance = per_head / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      scale = rsqrtf(sum / float(head_dim) + params.epsilon);
    }
    if (!is_live) continue;
    halves.turn(rope + column, norm ? norm + column : nullptr, half, scale);
    halves.write(qkv + head * head_dim, column, half);
    if (is_key && to.keys) halves.write(to.at(head - params.num_heads, false), column, half);
  }
  if (!to.keys) return;
  const T* values = qkv + num_turned * head_dim;
  for (uint32_t i = threadIdx.x * kPack; i < num_kv_heads * head_dim; i += kThreads * kPack)
    *reinterpret_cast<uint4*>(to.at(i / head_dim, true) + i % head_dim) =
        *reinterpret_cast<const uint4*>(values + i);
}

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const uint32_t row = blockIdx.x, head_dim = params.pages.head_dim;
  const uint32_t num_kv_heads = params.pages.num_kv_heads;
  T* qkv = static_cast<T*>(params.qkv) +
           size_t(row) * (params.num_heads + 2 * num_kv_heads) * head_dim;
  const float* rope = params.rope + size_t(row) * head_dim;
  const uint32_t per_head = head_dim / (2 * Halves<T>::kPack);
  const bool is_power_of_two = (per_head & (per_head - 1)) == 0;
  const bool has_packed_tables = are_packs(rope, head_dim / 2) &&
                                 are_packs(params.query_norm, 0) && are_packs(params.key_norm, 0);
  if (per_head > 0 && per_head <= kWarpSize && is_power_of_two &&
      head_dim % (2 * Halves<T>::kPack) == 0 && has_packed_tables && are_packed(params.pages, qkv)) {
    run_packed(params, row, qkv, rope, per_head);
    return;
  }
  for (uint32_t head = threadIdx.x / kWarpSize; head < params.num_heads + num_kv_heads;
       head += kThreads / kWarpSize) {
    const float* norm = head < params.num_heads ? params.query_norm : params.key_norm;
    turn(qkv + head * head_dim, rope, norm, head_dim, params.epsilon);
  }
  __syncthreads();
  store_kv(params.batch, params.pages, params.layer, row, qkv + params.num_heads * head_dim);
}

}  // namespace apply_rope

KERNEL(apply_rope_f32, apply_rope::Params, apply_rope::kThreads) { apply_rope::run<float>(params); }
KERNEL(apply_rope_bf16, apply_rope::Params, apply_rope::kThreads) { apply_rope::run<bf16>(params); }
